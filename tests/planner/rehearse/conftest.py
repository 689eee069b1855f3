import pytest
import torch
from builders import build_artifact
from invariance import widths_here

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Source
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.hub import DEMO
from subspec.planner.rehearse.replay import MAX_DEPTH, WIDTHS
from subspec.planner.solve.problem import make_tree


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Under a plan with room for two answers, and for trees of any of the widths. A row has the
    same bits in all widths of its verifications: answers of other plans are compared."""
    torch.set_num_threads(1)
    spec = read_checkpoint(DEMO, Source("test/model")).spec
    widths = widths_here(spec, "cpu", make_tree(max(WIDTHS["cpu"]), MAX_DEPTH).num_nodes)
    folder = tmp_path_factory.mktemp("demo") / "artifact"
    return build_artifact(
        DEMO,
        folder,
        width=3,
        depth=5,
        verify_widths=widths,
        resident_share=0.8,
        int4_kernel="w4a8",
        num_sequences=2,
    )
