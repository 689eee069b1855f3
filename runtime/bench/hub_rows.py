"""Rows of a data set on the hub. The only module that imports the extra [bench]."""

from collections.abc import Iterable
from typing import Any

from datasets import load_dataset

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.layouts import Layout


def hub_rows(task: str, layout: Layout) -> Iterable[dict[str, Any]]:
    """Yield the data set's rows. Raises SubspecError(HUB)."""
    name, config, split = layout.hub
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(name, config, split=split)
    except Exception as error:  # of many libraries
        said = (str(error).splitlines() or [""])[0][:300]
        raise SubspecError(
            Exit.HUB,
            f"{task}: {name} cannot be loaded: {said}",
            f"hf download --repo-type dataset {name}, and give its rows as --data FOLDER with "
            f"{task}.jsonl; a gated one needs HF_TOKEN",
        ) from None
    return rows
