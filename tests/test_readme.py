"""The README keeps up with the code: its tree, its commands, its options."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("folder", ["artifacts", "planner", "runtime", "benchmarks"])
def test_the_tree_names_every_file(folder: str) -> None:
    block = re.split(rf"\n{folder}/ *", README)[1].split("\n```")[0]
    listed = re.findall(r"^  (\S+\.py) ", re.split(r"\n\S", block)[0], re.MULTILINE)
    on_disk = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert set(listed) == on_disk


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"a"}
    assert named <= targets


def test_every_option_that_is_named_exists() -> None:
    from subspec.planner.cli import main as plan
    from subspec.runtime.cli import main as run

    known = {name for command in (plan, run) for p in command.params for name in p.opts}
    for line in re.findall(r"subspec-(?:plan|run) [^\n`|]*", README):
        assert set(re.findall(r"--[a-z-]+", line)) <= known, line


def test_every_file_that_is_linked_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
