"""The README keeps up with the code: its tree, its commands, its options."""

import re
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TREE = README.partition("## The tree")[2].partition("```")[2].partition("```")[0].lstrip("\n")


def listed(folder: Path) -> set[str]:
    """The names on the folder's lines of the tree, up to three spaces; a subfolder's is indented,
    and so is what continues a line."""
    depth = len(folder.relative_to(ROOT).parts) - 1
    tree = re.sub(r"(?<! ) *\n {15}(?=\S)", " ", TREE)
    block = re.split(rf"\n{folder.relative_to(ROOT).parts[0]}/ +", "\n" + tree)[1]
    lines = ["  " * depth + folder.name + "/ " + block] if not depth else block.splitlines()
    line = next(one for one in lines if re.match(rf" *{folder.name}/", one))
    return set(re.split(r"/ +", line.splitlines()[0], maxsplit=1)[1].split("   ")[0].split())


@pytest.mark.parametrize("package", ["artifacts", "planner", "runtime", "benchmarks"])
def test_the_tree_names_every_module(package: str) -> None:
    folders = [ROOT / package, *(p.parent for p in (ROOT / package).glob("*/__init__.py"))]
    for folder in folders:
        on_disk = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        assert listed(folder) == on_disk, folder


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"a"}
    assert named <= targets


def test_every_option_that_is_named_exists() -> None:
    from subspec.planner.cli import main as plan
    from subspec.runtime.bench.cli import main as bench
    from subspec.runtime.cli import main as run
    from subspec.runtime.server.cli import main as serve

    assert isinstance(bench, click.Group)
    commands = (plan, run, serve, *bench.commands.values())
    known = {name for command in commands for p in command.params for name in p.opts}
    for line in re.findall(r"subspec-(?:plan|run|serve|bench) [^\n`|]*", README):
        assert set(re.findall(r"--[a-z-]+", line)) <= known, line


def test_every_file_that_is_linked_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
