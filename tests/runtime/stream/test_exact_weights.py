"""Streaming: right bytes in the right order, whatever the delays; failures are never skipped."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import build_artifact, replan
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import linears, parts
from subspec.artifacts.plan import Block, Placement, make_blocks
from subspec.planner.model.hub import DEMO
from subspec.runtime.load import Loader
from subspec.runtime.memory import host_buffer
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.session import Session
from subspec.runtime.stream.exact_weights import ExactWeights, Ring
from subspec.runtime.stream.link import DiskLink


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_artifact(DEMO, tmp_path_factory.mktemp("stream") / "artifact")


class SlowLink:
    """A link that delays copies and scribbles over a slot the moment it may be refilled: compute
    that read a slot too early or too late would see other bytes."""

    def __init__(self, inner: DiskLink, slots: list[Tensor], delay: float) -> None:
        self._inner, self._slots, self._delay = inner, slots, delay
        self._holders: dict[int, bool] = {}
        self.wait_seconds = 0.0

    def begin(self, slot: int, offset: int, num_bytes: int) -> None:
        assert not self._holders.get(slot, False), "a slot was refilled while compute held it"
        self._slots[slot].fill_(0xFF)
        threading.Event().wait(self._delay)
        self._inner.begin(slot, offset, num_bytes)

    def wait(self, slot: int) -> Tensor:
        self._holders[slot] = True
        return self._inner.wait(slot)

    def release(self, slot: int) -> None:
        self._holders[slot] = False

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("copy_delay, compute_delay", [(0.0, 0.0), (0.003, 0.0), (0.0, 0.003)])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_every_pass_sees_the_checkpoints_weights(
    artifact: Artifact, copy_delay: float, compute_delay: float, num_slots: int
) -> None:
    from safetensors.torch import load_file

    spec, checkpoint = artifact.spec, load_file(DEMO / "model.safetensors")
    stored = artifact.stored_parts()
    resident = tuple(part.name for part in stored[5:9])
    block_bytes = 500_000
    blocks = make_blocks(stored, Placement(resident, (), block_bytes, num_slots, {}))
    where = artifact.part_entries()
    slots = [host_buffer(block_bytes // 4096 * 4096 + 4096) for _ in range(num_slots)]
    link = SlowLink(DiskLink(artifact.path / "exact.safetensors", slots, None), slots, copy_delay)
    ring = Ring(blocks, [where[b.parts[0].name].offset for b in blocks], link, num_slots)
    kept = {name: checkpoint[f"{name}.weight"] for name in resident}
    head = {"lm_head": checkpoint["model.embed_tokens.weight"]}
    weights = ExactWeights(spec, stored, head, kept, {}, ring)
    for _ in range(3):
        for layer, product in enumerate(weights):
            for linear in (n for n in linears(spec) if n.layer == layer):
                x = torch.eye(linear.in_features, dtype=torch.bfloat16)
                time.sleep(compute_delay)
                name = "model.embed_tokens" if linear.kind == "head" else linear.name
                expected = checkpoint[f"{name}.weight"].t()
                assert torch.equal(product(linear.kind, x), expected), linear.name
    weights.close()


def test_a_pass_that_is_cut_short_leaves_the_next_one_right(artifact: Artifact) -> None:
    prompt = list(range(5, 45))
    with Session(replan(artifact, resident_share=0.3), method="plain") as session:
        expected = [t for some in session.generate(prompt, 12, Sampling()) for t in some]
        for num_layers in range(1, 4):
            for layer, product in enumerate(session.model.exact):
                for linear in (n for n in linears(artifact.spec) if n.layer == layer):
                    product(linear.kind, torch.zeros(1, linear.in_features).bfloat16())
                if layer == num_layers:
                    break
            session.model.cache.roll_back(0)
            again = [t for some in session.generate(prompt, 12, Sampling()) for t in some]
            assert again == expected


def test_a_file_that_shrinks_while_it_streams_is_an_error_not_a_wrong_weight(
    artifact: Artifact, tmp_path: Path
) -> None:
    import shutil
    from dataclasses import replace

    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    changed = replan(replace(artifact, path=copy), resident_share=0.0)
    with Session(changed, method="plain") as session:
        tokens = session.generate([5] * 20, 50, Sampling())
        next(tokens)
        with open(copy / "exact.safetensors", "r+b") as file:
            file.truncate(1 << 20)
        with pytest.raises(SubspecError, match="exact.safetensors ends at byte"):
            list(tokens)


class Checks:
    """What a ring's checks are asked, and when they are waited for."""

    def __init__(self, wrong: int | None) -> None:
        self.begun, self.ended = list[bytes](), 0
        self._wrong = wrong

    def begin(self, block: Block, memory: Tensor) -> Callable[[], None]:
        assert self.ended == len(self.begun), "one at a time: its slot must stay as it is"
        seen = bytes(memory[: block.num_bytes].numpy())
        self.begun.append(seen)

        def wait() -> None:
            assert bytes(memory[: block.num_bytes].numpy()) == seen, "the slot was filled anew"
            self.ended += 1
            if self.ended == self._wrong:
                raise SubspecError(Exit.CORRUPT, "that block is wrong")

        return wait


def checked_ring(artifact: Artifact, checks: Checks) -> tuple[Ring, int]:
    blocks = make_blocks(artifact.stored_parts(), Placement((), (), 500_000, 2, {}))
    slots = [host_buffer(126 * 4096) for _ in range(2)]
    link = SlowLink(DiskLink(artifact.path / "exact.safetensors", slots, None), slots, 0.0)
    offsets = [artifact.part_entries()[block.parts[0].name].offset for block in blocks]
    return Ring(blocks, offsets, link, 2, checks.begin), len(blocks)


def test_a_block_is_checked_the_first_time_while_it_is_computed_with(artifact: Artifact) -> None:
    checks = Checks(None)
    ring, num_blocks = checked_ring(artifact, checks)
    for _ in range(2 * num_blocks):
        ring.take()
        assert len(checks.begun) <= num_blocks
        ring.give_back()
        assert checks.ended == len(checks.begun), "nothing comes into a slot that is being checked"
    assert len(checks.begun) == num_blocks
    ring.close()


def test_a_block_that_is_wrong_ends_the_pass_before_another_comes(artifact: Artifact) -> None:
    ring, _ = checked_ring(artifact, Checks(wrong=2))
    ring.take()
    ring.give_back()
    ring.take()
    with pytest.raises(SubspecError, match="that block is wrong"):
        ring.give_back()
    for _ in range(2):  # nothing is taken any more
        with pytest.raises(SubspecError, match="that block is wrong"):
            ring.take()
    ring.close()


def test_the_last_block_of_a_pass_is_checked_before_the_pass_has_ended(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no token depends on bytes that were not compared."""
    asked = list[str]()
    begin = Loader._check_block

    def note(loader: Loader, block: Block, memory: Tensor) -> Callable[[], None]:
        wait = begin(loader, block, memory)

        def noted() -> None:
            wait()
            asked.append(block.parts[-1].name)

        return noted

    monkeypatch.setattr(Loader, "_check_block", note)
    with Session(replan(artifact, resident_share=0.0), method="plain") as session:
        next(session.generate([5] * 20, 3, Sampling()))
        assert asked[-1] == artifact.stored_parts()[-1].name


def test_a_slower_link_is_slower_by_the_bytes_it_moves(artifact: Artifact) -> None:
    """Not a timing of ours: the throttle is a lower bound on the time of a pass."""
    changed = replan(artifact, resident_share=0.0)
    with Session(changed, method="plain", link_bandwidth=100e6) as session:
        started = time.perf_counter()
        list(session.generate([5] * 20, 3, Sampling()))
        moved = 3 * sum(part.padded_bytes for part in parts(artifact.spec))
        assert time.perf_counter() - started >= 0.9 * moved / 100e6
