"""Layers that keep only the tokens in their windows, against layers that keep all."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_weights import ToyWeights, empty_cache, exact_weights, random_weights, shared_weights
from toys import make_spec

from subspec.artifacts import footprint
from subspec.artifacts.footprint import (
    Shape,
    cache_bytes,
    cache_slots,
    window_slots,
    windows_bytes,
    workspace_bytes,
)
from subspec.artifacts.model import LayerSpec, ModelSpec
from subspec.runtime.draft.beam import TokenTree, root_only
from subspec.runtime.exact_pass import causal_rows, repeated_last, whole_tree
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.memory import Temporaries
from subspec.runtime.model import attention
from subspec.runtime.model.attention import attend_batch_invariant
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.transformer import SharedWeights, forward
from subspec.runtime.model.windows import WindowSlots

CONTEXT, WIDTH = 1000, 8
SLOTS = cache_slots(CONTEXT, WIDTH)


@pytest.fixture(scope="module", autouse=True)
def short_texts() -> Iterator[None]:
    """Windows of 20 and 30 tokens keep 128: texts of a thousand move them often. One thread: two
    that wait for each other on a busy machine take minutes."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "TOKENS_BEHIND_WINDOW", 8)
        yield


def spec_of(*windows: int | None, dtype: str = "float32") -> ModelSpec:
    made = make_spec(
        num_layers=len(windows), hidden_size=64, head_size=32, intermediate_size=64, num_heads=4,
        num_kv_heads=2, vocab_size=256, dtype=dtype,
    )  # fmt: skip

    def windowed(layer: LayerSpec, window: int | None) -> LayerSpec:
        body = replace(layer.attentions[0], window=window)
        return LayerSpec((replace(layer.blocks[0], body=body), *layer.blocks[1:]))

    layers = zip(made.layers, windows, strict=True)
    return replace(made, layers=tuple(windowed(*pair) for pair in layers))


SOME, ALL = spec_of(20, None, 30), spec_of(20, 20)
IDS = ["some layers", "all layers", "some layers, bf16"]


def caches(spec: ModelSpec) -> tuple[Cache, Cache]:
    """One that keeps little, and one that keeps all."""
    few = window_slots(spec, CONTEXT, WIDTH)
    assert few == 320
    return empty_cache(spec, SLOTS, windowed=few), empty_cache(spec, SLOTS)


def read(toy: ToyWeights, shared: SharedWeights, cache: Cache, tokens: Tensor) -> Tensor:
    """A chunk of a prompt, with three rows of padding."""
    rows = repeated_last(causal_rows(cache, tokens, attend_batch_invariant), 3)
    logits = forward(shared, exact_weights(toy), [rows], gemm_ranges([len(tokens) + 3]))
    cache.commit(tokens.tolist())
    return logits[: len(tokens)]


def tree_of(tokens: Tensor) -> TokenTree:
    """Two children of the root, the second of which has a child."""
    tree = root_only(tokens[:1], WIDTH)
    for node, parent in enumerate((0, 0, 2), 1):
        tree.tokens[node], tree.parents[node] = tokens[node], parent
        tree.depths[node] = tree.depths[parent] + 1
        tree.ancestors[node] = tree.ancestors[parent]
        tree.ancestors[node, node] = True
    return replace(tree, num_nodes=4, num_levels=2)


def verify(toy: ToyWeights, shared: SharedWeights, cache: Cache, tokens: Tensor) -> Tensor:
    """A round that keeps the root, its second child and that one's child."""
    rows = whole_tree(tree_of(tokens), cache)
    logits = forward(shared, exact_weights(toy), [rows], gemm_ranges([WIDTH]))
    cache.commit_path(torch.tensor([0, 2, 3, 0]), tokens[[0, 2, 3]].tolist())
    return logits[:4]


@pytest.mark.parametrize("kernel", ["compiled", "twin"])
@pytest.mark.parametrize("spec", [SOME, ALL, replace(SOME, dtype="bfloat16")], ids=IDS)
def test_a_row_has_the_bits_that_it_has_where_every_token_is_kept(
    spec: ModelSpec, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in pieces that fit and that do not, rounds, and ways back."""
    if kernel == "twin":
        monkeypatch.setattr(attention, "unavailable", lambda: "no compiler")
    toy = random_weights(spec)
    shared, (few, every) = shared_weights(toy, SLOTS), caches(spec)
    windows, generator = few.windows, torch.Generator().manual_seed(1)
    assert windows is not None
    bases = [0]
    for what in (7, 400, 0, 90, 150, *[0] * 30, -40, 0, 1, 200, -20, 0):
        tokens = torch.randint(spec.vocab_size, (max(4, what),), generator=generator)
        if what < 0:
            length = few.reachable(few.length + what)
            assert length == every.length + what
            few.roll_back(length)
            every.roll_back(length)
            continue
        run = read if what else verify
        assert torch.equal(run(toy, shared, few, tokens), run(toy, shared, every, tokens))
        assert few.tokens == every.tokens
        if windows.base != bases[-1]:
            bases.append(windows.base)
    assert len(bases) > 3 and all(base % 64 == 0 for base in bases)


def test_an_abandoned_piece_leaves_what_is_committed() -> None:
    """It is longer than there is room for, and ends in the second layer."""
    toy = random_weights(SOME)
    shared, (few, every) = shared_weights(toy, SLOTS), caches(SOME)
    first, piece, last = (torch.arange(count) % 256 for count in (300, 400, 4))
    for cache in few, every:
        read(toy, shared, cache, first)

    def broken(*given: object) -> Tensor:
        raise KeyboardInterrupt

    rows = replace(causal_rows(few, piece, attend_batch_invariant))
    with pytest.raises(KeyboardInterrupt):
        products = [*exact_weights(toy)]
        forward(shared, [*products[:2], broken], [rows], gemm_ranges([len(piece)]))  # type: ignore[list-item]
    assert few.tokens == every.tokens
    assert torch.equal(verify(toy, shared, few, last), verify(toy, shared, every, last))
    assert torch.equal(read(toy, shared, few, piece), read(toy, shared, every, piece))


def test_a_copy_that_fails_over_itself_leaves_an_empty_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other leaves what it was to copy."""
    toy = random_weights(SOME)
    shared = shared_weights(toy, SLOTS)

    def fails(*given: object) -> None:
        raise MemoryError

    monkeypatch.setattr(WindowSlots, "move", fails)
    for length, rows, left in ((200, 200, 0), (315, 8, 315)):
        few, _ = caches(SOME)
        read(toy, shared, few, torch.arange(length) % 256)
        with pytest.raises(MemoryError):
            few.make_room(rows)
        assert few.length == left
        assert few.windows is not None and few.windows.base == few.windows.start == 0


def test_what_an_interrupted_copy_wrote_over_is_not_gone_back_to() -> None:
    few, _ = caches(ALL)
    few.commit([0] * 319)

    class Broken:
        def __getitem__(self, place: object) -> None:
            raise KeyboardInterrupt

    assert few.windows is not None
    with pytest.raises(KeyboardInterrupt):
        few.windows.move([few.keys[0], Broken()], 319)  # type: ignore[list-item]
    assert few.windows.base == 0
    assert few.reachable(211) == 211 and few.reachable(210) == 0


def test_one_can_go_back_as_far_as_the_windows_are_kept() -> None:
    few, _ = caches(ALL)
    assert few.windows is not None and few.windows.kept == 128
    few.commit([0] * 319)
    assert few.reachable(3) == 3
    few.make_room(WIDTH)
    assert few.windows.base == few.windows.start == 192
    assert few.reachable(211) == 211 and few.reachable(210) == 0
    few.roll_back(211)
    few.commit([0] * 400)
    assert (few.windows.base, few.windows.start) == (384, 512)
    assert few.reachable(531) == 531 and few.reachable(530) == 0
    few.roll_back(0)
    assert few.windows.base == few.windows.start == 0 and few.reachable(5) == 0


def test_the_ledger_is_what_a_cache_takes_and_no_more_where_little_is_saved() -> None:
    taken = sum(one.nbytes for cache in caches(SOME)[:1] for one in (*cache.keys, *cache.values))
    shape = Shape(CONTEXT, 3, WIDTH, None, 64, 1, 8)
    assert cache_bytes(SOME, shape) + windows_bytes(SOME, shape) == 3 * taken
    kept = replace(shape, keeps_all_tokens=True)
    assert windows_bytes(SOME, kept) == 0 and cache_bytes(SOME, kept) > 3 * taken
    assert window_slots(SOME, 311, WIDTH) is None and window_slots(SOME, 312, WIDTH) == 320
    assert window_slots(spec_of(None, None), CONTEXT, WIDTH) is None


@pytest.mark.parametrize("spec", [SOME, ALL], ids=["some", "all"])
def test_temporaries_of_long_pieces_and_of_copies_are_within_the_workspace(
    spec: ModelSpec,
) -> None:
    toy = random_weights(spec)
    shared, (few, _) = shared_weights(toy, SLOTS), caches(spec)
    shape = Shape(CONTEXT, 1, WIDTH, None, 512, torch.get_num_threads(), 512)
    products = exact_weights(toy)
    for length, rows in ((512, 512), (190, 300), (0, 10)):
        few.roll_back(0) if length == 512 else None
        with Temporaries() as seen:
            tokens = torch.arange(rows) % 256
            made = causal_rows(few, tokens, attend_batch_invariant)
            forward(shared, products, [made], gemm_ranges([rows]))
        few.commit(tokens.tolist())
        assert seen.peak_bytes <= workspace_bytes(spec, "cpu", shape)
