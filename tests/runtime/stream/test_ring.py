"""Parts that stream: the right bytes in any order, slots that are not refilled too soon, failures
that are never skipped."""

import errno
import fcntl
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import StrictLink, exact_over, open_requested, open_ring, write_parts
from torch import Tensor
from toy_weights import ToyWeights, empty_cache, exact_weights, random_weights, shared_weights
from toys import make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import StoredPart
from subspec.artifacts.plan import Block
from subspec.runtime.exact_pass import causal_rows
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.memory import host_buffer
from subspec.runtime.model.attention import attend
from subspec.runtime.model.transformer import forward
from subspec.runtime.stream import link as link_module
from subspec.runtime.stream.exact_weights import ExactWeights
from subspec.runtime.stream.link import DirectFile, DiskLink, Link, tell_of_cached_reads
from subspec.runtime.stream.ring import Requested, view_of

SPEC = make_spec(
    num_layers=3, head_size=16, intermediate_size=320, hidden_size=64, vocab_size=256,
    dtype="float32", output_bias=True,
)  # fmt: skip
NAMES = [part.name for part in SPEC.parts]


@pytest.fixture(scope="module")
def toy() -> ToyWeights:
    return random_weights(SPEC)


@pytest.fixture
def stored(toy: ToyWeights, tmp_path: Path) -> tuple[Path, dict[str, int]]:
    path = tmp_path / "exact.safetensors"
    return path, write_parts(toy, path)


Stored = tuple[Path, dict[str, int]]


def slow(delay: float) -> Callable[[DiskLink, list[Tensor]], Link]:
    return lambda inner, slots: StrictLink(inner, slots, delay)


def logits(toy: ToyWeights, exact: ExactWeights, request: Requested | None = None) -> Tensor:
    """Of a prompt; `request`: each layer asks for its parts before they are taken."""
    cache = empty_cache(SPEC, 64)
    rows = [causal_rows(cache, torch.arange(20), attend)]

    def asking() -> Iterator[Any]:
        for layer, product in enumerate(exact):
            if request is not None:
                request.request([p.name for p in SPEC.parts if p.linear.layer == layer])
            yield product

    products = exact if request is None else asking()
    return forward(shared_weights(toy, 64), products, rows, gemm_ranges([20]))


# ---- the weights over both ----------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.0, 0.002])
@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("block_bytes", [0, 200_000])
def test_a_pass_over_a_ring_has_the_bits_of_one_with_all_weights_in_memory(
    toy: ToyWeights, stored: Stored, delay: float, num_slots: int, block_bytes: int
) -> None:
    expected = logits(toy, exact_weights(toy))
    for resident in ([], NAMES[3:8], NAMES[:-1]):
        ring, blocks = open_ring(toy, *stored, resident, block_bytes, num_slots, slow(delay))
        exact = exact_over(toy, ring, resident)
        for num_passes in (1, 2, 3):
            assert torch.equal(logits(toy, exact), expected)
            assert exact.streamed_bytes == num_passes * sum(block.num_bytes for block in blocks)
        ring.close()


@pytest.mark.parametrize("delay", [0.0, 0.002])
@pytest.mark.parametrize("num_slots", [2, 3, 8, 40])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_pass_over_requested_parts_has_the_same_bits(
    toy: ToyWeights, stored: Stored, delay: float, num_slots: int, ahead: bool
) -> None:
    """Also where a layer asks for more parts than there are slots."""
    expected = logits(toy, exact_weights(toy))
    requested = open_requested(toy, *stored, num_slots, slow(delay))
    exact = exact_over(toy, requested)
    for _ in range(3):
        assert torch.equal(logits(toy, exact, requested if ahead else None), expected)
    every = sum(part.padded_bytes for part in toy.stored)
    assert exact.streamed_bytes == (every if num_slots == 40 else 3 * every)
    requested.close()


@pytest.mark.parametrize("kind", ["ring", "requested"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_pass_that_is_cut_short_leaves_the_next_one_right(
    toy: ToyWeights, stored: Stored, kind: str, after: int
) -> None:
    expected = logits(toy, exact_weights(toy))
    requested = open_requested(toy, *stored)
    streamed = open_ring(toy, *stored)[0] if kind == "ring" else requested
    exact = exact_over(toy, streamed)
    for num_products in (0, 1, 5):
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
        for layer, product in enumerate(exact):
            whole = layer < after
            for name in names if whole else names[:num_products]:
                num_columns = 320 if "down" in name else 64
                product(name, torch.ones(1, num_columns), gemm_ranges([1]))
            if not whole:
                break
        assert torch.equal(logits(toy, exact), expected)
    streamed.close()
    if kind == "ring":
        requested.close()


# ---- a ring -------------------------------------------------------------------------------------


def test_the_next_passes_first_blocks_are_on_their_way_when_a_pass_ends(
    toy: ToyWeights, stored: Stored
) -> None:
    ring, blocks = open_ring(toy, *stored)
    link: Any = ring._link
    first_two = [stored[1][block.parts[0].name] for block in blocks[:2]]
    assert [offset for _, offset in link.begun] == first_two
    for name in NAMES:
        ring.take(name)
    assert len(link.begun) == len(blocks) + 1, "the last block is in use"
    ring.end_pass()
    assert [offset for _, offset in link.begun[-2:]] == first_two
    ring.close()


def test_parts_of_one_block_stay_until_the_next_block_is_asked_for(
    toy: ToyWeights, stored: Stored
) -> None:
    ring, blocks = open_ring(toy, *stored, block_bytes=200_000)
    assert len(blocks) < len(NAMES)
    for block in blocks:
        for part in (*block.parts, *block.parts[::-1]):
            assert torch.equal(ring.take(part.name), toy.resident[part.name])
    ring.close()


def test_a_part_that_is_asked_for_out_of_order_is_a_mistake_of_ours(
    toy: ToyWeights, stored: Stored
) -> None:
    ring, blocks = open_ring(toy, *stored)
    ring.take(NAMES[0])
    with pytest.raises(AssertionError, match="taken out of order"):
        ring.take(blocks[2].parts[0].name)
    ring.close()


class Checks:
    """What a ring's checks are asked, and when they are waited for."""

    def __init__(self, wrong: int | None = None) -> None:
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


def test_a_block_is_checked_the_first_time_while_it_is_computed_with(
    toy: ToyWeights, stored: Stored
) -> None:
    checks = Checks()
    ring, blocks = open_ring(toy, *stored, block_bytes=200_000, check=checks.begin)
    for num_passes in range(2):
        for index, block in enumerate(blocks):
            for part in block.parts:
                ring.take(part.name)
            first = not num_passes
            assert len(checks.begun) == (index + 1 if first else len(blocks))
            assert checks.ended == len(checks.begun) - first, "the last check is under way"
        ring.end_pass()
        assert checks.ended == len(checks.begun) == len(blocks)
    ring.close()


def test_a_block_that_is_wrong_ends_the_pass_before_another_comes(
    toy: ToyWeights, stored: Stored
) -> None:
    ring, blocks = open_ring(toy, *stored, check=Checks(wrong=2).begin)
    names = [block.parts[0].name for block in blocks[:3]]
    ring.take(names[0])
    ring.take(names[1])
    for _ in range(3):  # nothing is taken any more
        with pytest.raises(SubspecError, match="that block is wrong"):
            ring.take(names[2])
    ring.close()


def test_a_wrong_block_is_told_when_it_is_settled_and_ever_after(
    toy: ToyWeights, stored: Stored
) -> None:
    ring, blocks = open_ring(toy, *stored, check=Checks(wrong=1).begin)
    ring.take(NAMES[0])
    with pytest.raises(SubspecError, match="that block is wrong"):
        ring.settle()
    ring.close()


@pytest.mark.parametrize("which", [0, 4, -1])
def test_no_pass_ends_with_a_block_that_is_wrong_nor_does_any_later_one(
    toy: ToyWeights, stored: Stored, which: int
) -> None:
    """Wherever it is: the last block too is checked before its pass has ended."""
    checks = Checks()
    ring, blocks = open_ring(toy, *stored, check=checks.begin)
    checks._wrong = range(1, len(blocks) + 1)[which]
    exact = exact_over(toy, ring)
    for _ in range(2):
        with pytest.raises(SubspecError, match="that block is wrong"):
            logits(toy, exact)
    ring.close()


@pytest.mark.parametrize("where", ["before begin", "after begin", "before wait", "after wait"])
def test_a_pass_that_is_interrupted_anywhere_leaves_the_next_one_right(
    toy: ToyWeights, stored: Stored, where: str
) -> None:
    expected, left = logits(toy, exact_weights(toy)), 0

    class Interrupted(StrictLink):
        def begin(self, slot: int, offset: int, num_bytes: int) -> None:
            interrupt("before begin")
            super().begin(slot, offset, num_bytes)
            interrupt("after begin")

        def wait(self, slot: int) -> Tensor:
            interrupt("before wait")
            found = super().wait(slot)
            interrupt("after wait")
            return found

    def interrupt(here: str) -> None:
        nonlocal left
        left -= here == where
        if here == where and left == 0:
            raise KeyboardInterrupt

    ring, blocks = open_ring(toy, *stored, wrap=Interrupted)
    exact = exact_over(toy, ring)
    for count in (1, 4, len(blocks)):
        left = count
        with pytest.raises(KeyboardInterrupt):
            logits(toy, exact)
        assert torch.equal(logits(toy, exact), expected)
        assert torch.equal(logits(toy, exact), expected)
    ring.close()


def failing_reads(monkeypatch: pytest.MonkeyPatch, code: int, direct_only: bool = False) -> None:
    """Reads end with an error; direct_only: not those through the page cache."""
    read = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if direct_only and not direct:
            return read(descriptor, buffers, offset)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_not_called_a_damaged_artifact(
    code: int, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_reads(monkeypatch, code)
    file = DirectFile(stored[0])
    with pytest.raises(SubspecError, match="exact.safetensors: reading failed") as failed:
        file.read_into(host_buffer(4096), 0)
    file.close()
    assert failed.value.exit_code == Exit.RESOURCES and "dmesg" in failed.value.hint


def test_a_read_that_lacks_memory_may_be_asked_again(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_reads(monkeypatch, errno.ENOMEM)
    file = DirectFile(stored[0])
    with pytest.raises(OSError, match="Cannot allocate memory"):
        file.read_into(host_buffer(4096), 0)
    file.close()


@pytest.mark.parametrize("at_open", [True, False])
def test_where_direct_reads_are_refused_the_page_cache_is_read_and_a_note_says_so_once(
    at_open: bool,
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell_of_cached_reads.cache_clear()
    real = os.open

    def refusing(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags)

    if at_open:
        monkeypatch.setattr(os, "open", refusing)
    else:
        failing_reads(monkeypatch, errno.EINVAL, direct_only=True)
    found, size = host_buffer(8192), stored[0].stat().st_size // 4096 * 4096
    for _ in range(2):
        file = DirectFile(stored[0])
        for offset in (0, size - 8192):
            file.read_into(found, offset)
            assert bytes(found.tolist()) == stored[0].read_bytes()[offset:][:8192]
        file.close()
    said = capsys.readouterr().err
    assert said.count("the file system refuses direct reads (Invalid argument)") == 1


def test_a_reader_that_lacks_memory_once_is_asked_again(
    toy: ToyWeights, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real, left = logits(toy, exact_weights(toy)), DirectFile.read_into, 5

    def read_into(self: DirectFile, target: Tensor, offset: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        real(self, target, offset)

    monkeypatch.setattr(DirectFile, "read_into", read_into)
    ring, _ = open_ring(toy, *stored)
    exact = exact_over(toy, ring)
    with pytest.raises(MemoryError):
        logits(toy, exact)
    assert torch.equal(logits(toy, exact), expected)
    ring.close()


def test_a_check_that_cannot_begin_fails_every_pass(toy: ToyWeights, stored: Stored) -> None:
    """It may wait for an earlier part, and find that wrong."""

    def check(block: Block, memory: Tensor) -> Callable[[], None]:
        raise SubspecError(Exit.CORRUPT, "an earlier part is wrong")

    ring, _ = open_ring(toy, *stored, check=check)
    exact = exact_over(toy, ring)
    for _ in range(2):
        with pytest.raises(SubspecError, match="an earlier part is wrong"):
            logits(toy, exact)
    ring.close()


@pytest.mark.parametrize("where", ["begin", "wait"])
def test_an_interrupted_check_is_done_in_the_next_pass(
    toy: ToyWeights, stored: Stored, where: str
) -> None:
    expected, checks = logits(toy, exact_weights(toy)), Checks()
    left, begun = 3, list[Block]()

    def interrupted(here: str) -> bool:
        nonlocal left
        left -= here == where and len(begun) in (2, 4)
        return left > 0 and here == where and len(begun) in (2, 4)

    def check(block: Block, memory: Tensor) -> Callable[[], None]:
        begun.append(block)
        if interrupted("begin"):
            raise KeyboardInterrupt
        wait = checks.begin(block, memory)

        def waited() -> None:
            if interrupted("wait"):
                raise KeyboardInterrupt
            wait()

        return waited

    ring, blocks = open_ring(toy, *stored, check=check)
    exact = exact_over(toy, ring)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            logits(toy, exact)
    assert torch.equal(logits(toy, exact), expected) and torch.equal(logits(toy, exact), expected)
    assert len(checks.begun) == checks.ended == len(blocks)
    ring.close()


# ---- requested parts ----------------------------------------------------------------------------


def taken(toy: ToyWeights, requested: Requested, name: str) -> None:
    assert torch.equal(requested.take(name), toy.resident[name]), name


@pytest.mark.parametrize("num_slots", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_parts_come_in_any_order_requested_or_not(
    toy: ToyWeights, stored: Stored, num_slots: int, seed: int
) -> None:
    requested, chance = open_requested(toy, *stored, num_slots), random.Random(seed)
    for _ in range(100):
        requested.request(chance.choices(NAMES, k=chance.randrange(6)))
        for name in chance.choices(NAMES, k=chance.randrange(4)):
            taken(toy, requested, name)
            if chance.random() < 0.5:
                requested.request(chance.choices(NAMES, k=chance.randrange(4)))
        if chance.random() < 0.2:
            chance.choice((requested.begin_pass, requested.end_pass))()
    requested.close()


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], NAMES[1::2] + NAMES[::2]], ids=len)
def test_more_may_be_requested_than_there_are_slots(
    toy: ToyWeights, stored: Stored, order: list[str]
) -> None:
    requested = open_requested(toy, *stored, 3)
    requested.request(NAMES)
    for name in order:
        taken(toy, requested, name)
    requested.close()


def test_what_is_there_already_is_not_copied_again(toy: ToyWeights, stored: Stored) -> None:
    requested = open_requested(toy, *stored, 3)
    requested.request(NAMES[:2])
    for name in (*NAMES[:2], *NAMES[:2]):
        taken(toy, requested, name)
    sizes = [part.padded_bytes for part in toy.stored]
    assert requested.streamed_bytes == sum(sizes[:2])
    requested.request(NAMES[:3])
    assert requested.streamed_bytes == sum(sizes[:3])
    requested.close()


def test_what_was_used_longest_ago_makes_room(toy: ToyWeights, stored: Stored) -> None:
    requested = open_requested(toy, *stored, 3)
    link: Any = requested._link
    for name in (NAMES[0], NAMES[1], NAMES[2], NAMES[0]):
        taken(toy, requested, name)
    requested.request([NAMES[3]])
    assert link.begun[-1] == (link.begun[1][0], stored[1][NAMES[3]])
    for name in (NAMES[0], NAMES[2], NAMES[3]):
        taken(toy, requested, name)
    assert len(link.begun) == 4
    requested.close()


def test_a_request_makes_no_room_of_what_it_asks_for_itself(
    toy: ToyWeights, stored: Stored
) -> None:
    """What is there and is asked for again would be copied twice otherwise."""
    requested = open_requested(toy, *stored, 3)
    link: Any = requested._link
    for name in NAMES[:3]:
        taken(toy, requested, name)
    requested.request([NAMES[0], NAMES[5], NAMES[6]])
    for name in (NAMES[0], NAMES[5]):
        taken(toy, requested, name)
    assert [offset for _, offset in link.begun].count(stored[1][NAMES[0]]) == 1
    requested.close()


def test_the_part_in_use_keeps_its_slot_until_another_is_taken(
    toy: ToyWeights, stored: Stored
) -> None:
    requested = open_requested(toy, *stored, 2)
    link: Any = requested._link
    in_use = requested.take(NAMES[0])
    [(slot, _)] = link.begun
    requested.request(NAMES[1:6])
    assert [other for other, _ in link.begun[1:]] == [1 - slot]
    assert torch.equal(in_use, toy.resident[NAMES[0]])
    taken(toy, requested, NAMES[4])  # nobody asked for it: the guess makes room, or the first part
    requested.end_pass()
    assert link.held <= {0, 1} - {link.begun[-1][0]}
    requested.close()


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ring", "requested", "requested ahead"])
def test_a_read_that_fails_fails_its_pass_and_every_later_one(
    toy: ToyWeights, stored: Stored, kind: str
) -> None:
    path, offsets = stored
    with open(path, "r+b") as file:
        file.truncate(offsets[NAMES[9]] + 100)
    requested = open_requested(toy, *stored)
    streamed = open_ring(toy, *stored)[0] if kind == "ring" else requested
    exact = exact_over(toy, streamed)
    for _ in range(3):
        with pytest.raises(SubspecError, match="exact.safetensors ends at byte") as caught:
            logits(toy, exact, requested if kind == "requested ahead" else None)
        assert caught.value.exit_code == Exit.CORRUPT
    streamed.close()
    if kind == "ring":
        requested.close()


def test_a_wrong_guess_that_cannot_be_read_is_an_error_too(toy: ToyWeights, stored: Stored) -> None:
    path, offsets = stored
    with open(path, "r+b") as file:
        file.truncate(offsets[NAMES[-1]] + 100)
    requested = open_requested(toy, *stored, 2)
    requested.request([NAMES[-1], NAMES[1]])
    for _ in range(2):
        with pytest.raises(SubspecError, match="exact.safetensors ends at byte"):
            requested.take(NAMES[0])
    requested.begin_pass()
    requested.close()


def test_closing_waits_for_the_reader(toy: ToyWeights, stored: Stored) -> None:
    before = {*threading.enumerate()}
    ring, _ = open_ring(toy, *stored)
    requested = open_requested(toy, *stored)
    requested.request(NAMES)
    readers = {*threading.enumerate()} - before
    assert len(readers) == 2
    ring.close()
    requested.close()
    assert not readers & {*threading.enumerate()}


def test_closing_does_not_wait_for_a_link_that_takes_years(stored: Stored) -> None:
    link = DiskLink(stored[0], [torch.empty(4096, dtype=torch.uint8)], bytes_per_second=1e-9)
    for _ in range(3):
        link.begin(0, 0, 4096)
    closing = threading.Thread(target=link.close, daemon=True)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()


def test_closing_does_not_wait_for_a_disk_that_never_answers(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, answer = threading.Event(), threading.Event()

    def hang(self: DirectFile, target: Tensor, offset: int) -> None:
        reading.set()
        answer.wait()

    monkeypatch.setattr(DirectFile, "read_into", hang)
    monkeypatch.setattr(link_module, "CLOSING_SECONDS", 0.1)
    link = DiskLink(stored[0], [torch.empty(4096, dtype=torch.uint8)], None)
    link.begin(0, 0, 4096)
    reading.wait()
    closing = threading.Thread(target=link.close, daemon=True)
    closing.start()
    closing.join(timeout=5)
    ended = not closing.is_alive()
    answer.set()
    closing.join()
    assert ended
    link._file.close()  # the reader kept it


def test_a_reader_that_cannot_start_leaves_no_file_open(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unstartable(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Unstartable)
        with pytest.raises(RuntimeError, match="new thread"):
            DiskLink(stored[0], [], None)
    open_files = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert str(stored[0]) not in [os.readlink(link) for link in open_files]


def test_a_residual_is_seen_as_its_bytes_and_a_raw_part_as_its_matrix(toy: ToyWeights) -> None:
    part = SPEC.parts[0]
    memory = torch.arange(part.padded_bytes, dtype=torch.int64).to(torch.uint8)
    raw = view_of(StoredPart(part, "raw", part.num_bytes), memory, torch.float32)
    assert raw.shape == (64, 64) and raw.data_ptr() == memory.data_ptr()
    residual = view_of(StoredPart(part, "residual", 77), memory, torch.float32)
    assert residual.shape == (77,) and residual.dtype == torch.uint8
