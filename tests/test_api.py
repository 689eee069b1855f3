"""The examples of docs/api.md run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest
from builders import build_artifact

from subspec.planner.model.hub import DEMO

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples have in common: each goes on from the one before."""
    folder = tmp_path_factory.mktemp("api")
    built = build_artifact(DEMO, folder / "demo-artifact", width=2, depth=3, num_sequences=3)
    return {"artifact": built.path, "out": folder / "planned"}


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_of_the_library_page_runs(index: int, names: dict[str, Any]) -> None:
    for before in EXAMPLES[: index + 1]:
        exec(compile(before, "docs/api.md", "exec"), names)
