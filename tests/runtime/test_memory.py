"""Fast memory: arenas of the ledger's sizes, and temporaries that stay within its workspace."""

import errno
import mmap
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_weights import empty_cache, exact_weights, random_weights, shared_weights
from toys import make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import Shape, cache_slots, workspace_bytes
from subspec.artifacts.model import (
    Attention,
    DeltaNet,
    Dense,
    LayerSpec,
    ModelSpec,
    QueryGrowth,
    Rope,
)
from subspec.artifacts.plan import Ledger
from subspec.runtime import memory as memory_module
from subspec.runtime.decode import logprobs
from subspec.runtime.draft.beam import root_only
from subspec.runtime.exact_pass import causal_rows, whole_tree
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.memory import HUGE_PAGE_BYTES, Arena, FastMemory, Temporaries, host_buffer
from subspec.runtime.model.attention import attend_batch_invariant
from subspec.runtime.model.sampling import Sampler, SamplingParams
from subspec.runtime.model.transformer import HeadRows, forward

CPU = torch.device("cpu")


# ---- arenas -------------------------------------------------------------------------------------


def test_a_kernel_without_huge_pages_has_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    found = host_buffer(8 * HUGE_PAGE_BYTES)
    assert len(found) == 8 * HUGE_PAGE_BYTES and not found.any()


def test_tensors_are_carved_from_their_purposes_arena_in_order() -> None:
    memory = FastMemory(CPU, Ledger(norms=1024, cache=4096, workspace=1 << 20, guard=5))
    assert memory.arena_bytes == 5120  # workspace and guard are no arenas
    first = memory.take_tensor("norms", (3, 5), torch.float32)
    second = memory.take_tensor("norms", (4,), torch.bfloat16)
    assert first.shape == (3, 5) and not first.any()
    assert second.data_ptr() - first.data_ptr() == 256
    assert memory.take("cache", 100, 4096).data_ptr() % 4096 == 0
    memory.release()


def test_asking_for_more_than_the_ledger_grants_is_a_mistake_of_ours() -> None:
    memory = FastMemory(CPU, Ledger(norms=512))
    memory.take("norms", 257)
    with pytest.raises(AssertionError, match="norms: 256 bytes requested, ledger has 0"):
        memory.take("norms", 1)
    with pytest.raises(AssertionError, match="cache: 256 bytes requested, ledger has 0"):
        memory.take("cache", 1)
    memory.release()


def test_a_plan_that_needs_more_than_is_free_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_module, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(FastMemory, "_allocate", None)
    with pytest.raises(SubspecError, match="needs 1.02 KB .* but only 1.00 KB") as caught:
        FastMemory(CPU, Ledger(norms=512, workspace=512))
    assert caught.value.exit_code == Exit.RESOURCES


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_an_allocation_that_fails_releases_what_was_allocated_before_it(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, held, released = FastMemory._allocate, list[int](), list[int]()

    def counted(self: FastMemory, num_bytes: int) -> Arena:
        if len(held) == fails_at:
            raise SubspecError(Exit.RESOURCES, "no more")
        held.append(num_bytes)
        arena = allocate(self, num_bytes)

        def release() -> None:
            released.append(num_bytes)
            arena.release()

        return Arena(arena.bytes, release)

    monkeypatch.setattr(FastMemory, "_allocate", counted)
    with pytest.raises(SubspecError, match="no more"):
        FastMemory(CPU, Ledger(substitutes=256, norms=512, cache=1024))
    assert held == released == [256, 512, 1024][:fails_at]


def test_memory_that_cannot_be_reserved_is_an_error_with_a_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory_module.mmap, "mmap", refuse)
    with pytest.raises(SubspecError, match="cannot reserve .*: Cannot allocate memory") as caught:
        FastMemory(CPU, Ledger(norms=512))
    assert caught.value.exit_code == Exit.RESOURCES and caught.value.hint


def test_released_memory_is_given_back_although_tensors_still_lie_in_it() -> None:
    memory = FastMemory(CPU, Ledger(cache=1 << 20))
    kept = memory.take("cache", 1 << 20).fill_(7)
    memory.release()
    assert not kept.any()  # zero pages again, which take no memory


# ---- temporaries --------------------------------------------------------------------------------


def test_temporaries_are_counted_while_they_live() -> None:
    with Temporaries() as seen:
        first = torch.empty(1000, dtype=torch.uint8)
        view = first[:10]
        second = torch.empty(500, dtype=torch.uint8)
        assert (seen.live_bytes, len(view)) == (1500, 10)
        del second
        third = first + first
    assert (seen.live_bytes, seen.peak_bytes, len(third)) == (2000, 2000, 1000)


def changed(spec: ModelSpec, after: bool = False, **changes: object) -> ModelSpec:
    def layer(one: LayerSpec) -> LayerSpec:
        blocks = [
            replace(
                block,
                after=f"after_{index}" if after else None,
                multiplier=0.5 if after else 1.0,
                body=replace(block.body, **changes)  # type: ignore[type-var]
                if isinstance(block.body, Attention)
                else block.body,
            )
            for index, block in enumerate(one.blocks)
        ]
        return LayerSpec(tuple(blocks))

    return replace(spec, layers=tuple(map(layer, spec.layers)))


NET = DeltaNet(2, 6, 24, 40, 4)
SMALL = make_spec(
    num_layers=2, hidden_size=128, head_size=32, intermediate_size=256, vocab_size=512
)
SPECS = {
    "llama": SMALL,
    "one KV head, norms of heads, every bias": make_spec(
        num_layers=2, num_heads=8, num_kv_heads=1, hidden_size=128, head_size=32,
        intermediate_size=64, vocab_size=512, qk_norm=True, output_bias=True, mlp_bias=True,
    ),
    "biases of a wide feed-forward": make_spec(
        num_layers=2, hidden_size=128, head_size=32, intermediate_size=1024, vocab_size=512,
        mlp_bias=True,
    ),
    "many tokens": make_spec(
        num_layers=1, hidden_size=64, head_size=32, intermediate_size=128, vocab_size=40_960,
    ),
    "many tokens, divided logits": replace(
        make_spec(
            num_layers=1, hidden_size=64, head_size=32, intermediate_size=128, vocab_size=40_960,
        ), logits_divisor=8.0,
    ),
    "a KV head for each head, f32 ropes": changed(
        replace(SMALL, rope_in_f32=True), num_kv_heads=4
    ),
    "everything": replace(
        changed(
            SMALL, after=True, rope=Rope(500.0, 16, interleaved=True), qk_norm="all_heads",
            query_growth=QueryGrowth(0.1, 64), window=50,
        ),
        embedding_scale=3.0, logits_divisor=2.0,
    ),
    "delta nets, gated attention": replace(
        SMALL,
        layers=(
            *(replace(layer, blocks=(replace(layer.blocks[0], body=NET), layer.blocks[1]))
              for layer in SMALL.layers),
            *changed(SMALL, output_gate=True).layers[:1],
        ),
    ),
    "a wide feed-forward": replace(SMALL, layers=tuple(
        LayerSpec((layer.blocks[0], replace(layer.blocks[1], body=Dense(2048))))
        for layer in SMALL.layers
    )),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("context", [64, 600])
def test_the_temporaries_of_every_exact_pass_are_within_the_workspace(
    name: str, dtype: str, context: int
) -> None:
    toy = random_weights(replace(SPECS[name], dtype=dtype))
    spec, width, num_sequences = toy.spec, 24, 2
    shape = Shape(context, num_sequences, width, None, context, torch.get_num_threads(), 8)
    granted = workspace_bytes(spec, "cpu", shape)
    slots = cache_slots(context, width)
    shared, exact = shared_weights(toy, slots), exact_weights(toy)
    caches = [empty_cache(spec, slots, toy.tensors, width) for _ in range(num_sequences)]
    prompt = torch.arange(context) % spec.vocab_size

    def peak_of_prompt() -> int:
        with Temporaries() as seen:
            rows, last = (
                [causal_rows(caches[0], prompt, attend_batch_invariant)],
                slice(context - 8, context),
            )
            head = HeadRows([last], gemm_ranges([8]))
            logits = forward(shared, exact, rows, gemm_ranges([context]), head)
            Sampler(SamplingParams(1.0, 5, 0.9)).sample(logits[0], context)
        return seen.peak_bytes

    def peak_of_verification() -> int:
        trees = [root_only(torch.tensor([5]), width) for _ in caches]
        with Temporaries() as seen:
            rows = [whole_tree(tree, cache) for tree, cache in zip(trees, caches, strict=True)]
            logits: Tensor = forward(shared, exact, rows, gemm_ranges([width] * num_sequences))
            Sampler(SamplingParams(1.0, 5, 0.9)).sample(logits[0], context)
            logprobs(logits, torch.arange(width), [5] * width, 3)
        return seen.peak_bytes

    assert peak_of_prompt() <= granted
    for cache in caches:
        cache.commit(prompt.tolist())
    assert peak_of_verification() <= granted


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["llama", "one KV head, norms of heads, every bias"])
def test_a_long_text_is_granted_little_more_than_reading_it_takes(name: str) -> None:
    """The workspace takes memory from resident weights."""
    context, piece, width = 8192, 1024, 24
    toy = random_weights(replace(SPECS[name], dtype="bfloat16"))
    granted = workspace_bytes(toy.spec, "cpu", Shape(context, 1, width, None, piece, 2, 8))
    slots = cache_slots(context, width)
    shared, exact = shared_weights(toy, slots), exact_weights(toy)
    cache = empty_cache(toy.spec, slots, toy.tensors, width)
    cache.commit([0] * (context - piece))
    prompt = torch.arange(piece) % toy.spec.vocab_size
    with Temporaries() as seen:
        rows = [causal_rows(cache, prompt, attend_batch_invariant)]
        head = HeadRows([slice(piece - 8, piece)], gemm_ranges([8]))
        forward(shared, exact, rows, gemm_ranges([piece]), head)
    assert seen.peak_bytes <= granted <= 1.25 * seen.peak_bytes
