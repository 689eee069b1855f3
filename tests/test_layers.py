"""Imports run one way: templates <- planner -> artifacts <- runtime."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "artifacts": set(),
    "templates": set(),
    "runtime": {"artifacts"},
    "planner": {"artifacts", "templates"},
}
SOLVE = [f"subspec.planner.solve.{path.stem}" for path in (ROOT / "planner/solve").glob("[!_]*.py")]
# A profile times the kernels that will run, a rehearsal runs the artifact, a benchmark has a page.
MAY_ALSO_IMPORT = {
    "planner/machine": {"runtime"},
    "planner/rehearse": {"runtime"},
    "runtime/bench": {"templates"},
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_its_layer_may(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        more = MAY_ALSO_IMPORT.get(name.rpartition("/")[0], set())
        allowed = {package, *MAY_IMPORT[package], *more}
        extra = imported_packages(file) - allowed
        assert not extra, f"{name} imports subspec.{', subspec.'.join(sorted(extra))}"


def test_every_package_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    on_disk = {
        "subspec." + file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert set(settings["packages"]) == on_disk


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("subspec.runtime.cli", ("subspec.planner", "torch", "transformers", "hqq")),
        ("subspec.planner.cli", ("subspec.runtime", "torch", "transformers", "hqq")),
        (
            "subspec.runtime.server.cli",
            ("subspec.planner", "torch", "transformers", "fastapi", "uvicorn", "pydantic"),
        ),
        ("subspec.runtime.bench.cli", ("subspec.planner", "torch", "transformers", "numpy")),
        (", ".join(SOLVE), ("torch", "numpy", "transformers", "jinja2", "rich")),
    ],
    ids=["subspec-run", "subspec-plan", "subspec-serve", "subspec-bench", "planner/solve"],
)
def test_imports_do_without_what_may_not_be_needed(modules: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert [m for m in loaded if m.startswith(tuple(f"{u}." for u in unwanted))] == []
    assert set(unwanted).isdisjoint(loaded)


def imported_packages(file: Path) -> set[str]:
    """The X of every `subspec.X` that is imported anywhere in `file`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
            if node.module == "subspec":
                names = [f"subspec.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("subspec.")}
    return found
