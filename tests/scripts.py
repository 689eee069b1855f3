"""The scripts of benchmarks/ as modules."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


def benchmark(name: str) -> ModuleType:
    """Imported as it is when it runs: from its own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        return importlib.import_module(name)
