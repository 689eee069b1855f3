"""The examples of docs/api.md run as they stand there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from brief import be_brief
from builders import build_artifact

from subspec.planner.model.hub import DEMO

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the examples have in common: each goes on from the one before; and how many have run."""
    torch.set_num_threads(1)  # two that wait for each other take minutes on a busy machine
    folder = tmp_path_factory.mktemp("api")
    built = build_artifact(DEMO, folder / "demo-artifact", width=2, depth=3, num_sequences=3)
    with pytest.MonkeyPatch.context() as patch:
        be_brief(patch)
        yield {"artifact": built.path, "out": folder / "planned", "num_run": 0}


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_of_the_library_page_runs(index: int, names: dict[str, Any]) -> None:
    for example in EXAMPLES[names["num_run"] : index + 1]:
        names["num_run"] += 1
        exec(compile(example, "docs/api.md", "exec"), names)
