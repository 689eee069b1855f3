"""Small artifacts for the simulated device, built once per run."""

from collections.abc import Callable
from functools import cache
from shutil import which

import pytest
from builders import build_artifact

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding
from subspec.planner.model.hub import DEMO


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if which("g++") is None:
        for item in items:
            if "/simcuda/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="the simulated device needs g++"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Encoding], Artifact]:
    """The demo model, its exact weights stored either way, planned for a GPU."""
    folder = tmp_path_factory.mktemp("simulated")

    @cache
    def built(encoding: Encoding) -> Artifact:
        return build_artifact(DEMO, folder / encoding, encoding, device="cuda", context=512)

    return built
