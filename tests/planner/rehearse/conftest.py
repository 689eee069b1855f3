import pytest
import torch
from builders import build_artifact

from subspec.artifacts.format.store import Artifact
from subspec.planner.model.hub import DEMO


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Under a plan with room for two answers, and for trees of any of the widths."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "artifact"
    return build_artifact(
        DEMO,
        folder,
        width=3,
        depth=5,
        verify_widths=(8, 16, 32, 104),
        resident_share=0.8,
        int4_kernel="w4a8",
        num_sequences=2,
    )
