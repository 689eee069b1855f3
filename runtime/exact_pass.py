"""One pass of the exact weights over rows of trees to verify and of prompts to prefill.

Every row goes through calls of widths that give it the same bits, and through batch-invariant
attention: whatever tree, chunk or batch it is in.
W = rows of a tree, V = vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.plan import Plan, split_rows
from subspec.runtime.clock import Clock
from subspec.runtime.draft.beam import TokenTree, narrowed, root_only
from subspec.runtime.draft.draft_head import HeadWeights
from subspec.runtime.draft.drafter import DecodeState, Drafter, tree_nodes, tree_rows
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.paths import on_device, tree_paths
from subspec.runtime.model.sampling import Sampler
from subspec.runtime.model.transformer import (
    Attend,
    HeadRows,
    KVLocations,
    Rows,
    SharedWeights,
    forward_hidden,
)
from subspec.runtime.model.windows import WindowSlots
from subspec.runtime.stream.exact_weights import ExactWeights


@dataclass(frozen=True)
class Model:
    """Everything a pass needs, placed in fast memory by engine.py."""

    plan: Plan
    weights: SharedWeights
    exact: ExactWeights
    drafter: Drafter | None  # None: plain decoding only
    clock: Clock
    head: HeadWeights | None = None  # of a drafter that reads hidden states


@dataclass(frozen=True)
class Outputs:
    """Outputs of one pass, by tree and by chunk: logits, [W, V] and of a chunk's `head_rows`, and
    the hidden states of all rows that a draft head reads (`forward_hidden`), [rows, H] or wider."""

    tree_logits: Sequence[Tensor]
    chunk_logits: Sequence[Tensor]
    hidden_of_trees: Sequence[Tensor]
    hidden_of_chunks: Sequence[Tensor]


@dataclass(frozen=True)
class PrefillChunk:
    """The next tokens of a prompt."""

    cache: Cache
    tokens: Sequence[int]
    sampler: Sampler | None  # for the answer's first token; None: more of the prompt follows
    num_logprobs: int | None = None  # likeliest tokens to report with the first token
    # With the prompt's own log probabilities: the tokens that follow each of `tokens` in the
    # prompt, and how many of the likeliest tokens to report.
    next_tokens: Sequence[int] = ()
    num_prompt_logprobs: int = 0
    # Numbers of tokens after which states are kept as checkpoints
    checkpoints_at: Sequence[int] = ()


def pad_trees(plan: Plan, drafts: Sequence[TokenTree]) -> tuple[list[TokenTree], list[int]]:
    """Pad the drafts to the rows of calls that they share; return the trees and the rows of each
    call. Calls are shared because each reads all of a weight, however few its rows. The padding
    fits: a draft's tensors already have a width with room for it."""
    room = [len(draft.tokens) for draft in drafts]
    calls = split_rows(plan.prompt_widths, sum(draft.num_nodes for draft in drafts))
    if sum(calls) > sum(room):
        calls = room
    spare, trees = sum(calls) - sum(draft.num_nodes for draft in drafts), list[TokenTree]()
    for draft in drafts:
        padding = min(spare, len(draft.tokens) - draft.num_nodes)
        trees.append(narrowed(draft, draft.num_nodes + padding))
        spare -= padding
    return trees, calls


def exact_outputs(
    model: Model,
    trees: Sequence[TokenTree],
    calls_of_trees: Sequence[int],
    states: Sequence[DecodeState],
    chunks: Sequence[PrefillChunk],
) -> Outputs:
    """Run the exact weights over trees and chunks. calls_of_trees: as returned by `pad_trees`."""
    plan, rows_of_trees = model.plan, [len(tree.tokens) for tree in trees]
    batch = [whole_tree(tree, state.cache) for tree, state in zip(trees, states, strict=True)]
    batch += [padded_rows(plan, chunk) for chunk in chunks]
    sizes, wanted, head_sizes = list(calls_of_trees), list[slice](), list(calls_of_trees)
    rows_of_chunks = list[int]()
    for chunk in chunks:
        calls = split_rows(plan.prompt_widths, len(chunk.tokens))
        rows, chunk_head_sizes = head_rows(plan, chunk, calls)
        wanted.append(slice(sum(sizes) + rows.start, sum(sizes) + rows.stop))
        sizes += calls
        rows_of_chunks.append(sum(calls))
        head_sizes += chunk_head_sizes
    of_trees = slice(0, sum(rows_of_trees))
    head = HeadRows([of_trees, *wanted] if trees else wanted, gemm_ranges(head_sizes))
    eagle3 = model.weights.spec.eagle3 if model.head is not None else None
    reads = eagle3.reads if eagle3 is not None else ()
    logits, x = forward_hidden(model.weights, model.exact, batch, gemm_ranges(sizes), head, reads)
    first, *others = logits.split([rows.stop - rows.start for rows in (of_trees, *wanted)])
    hidden = x.split([*rows_of_trees, *rows_of_chunks])
    num_trees = len(trees)
    of_each_tree = first.split(rows_of_trees) if trees else []
    return Outputs(of_each_tree, others, hidden[:num_trees], hidden[num_trees:])


def head_rows(plan: Plan, chunk: PrefillChunk, calls: list[int]) -> tuple[slice, list[int]]:
    """Return the rows of a chunk that have logits, and the head's calls for them: all, if the
    prompt's own log probabilities are requested, or the fewest that end with its last token."""
    if chunk.next_tokens:
        return slice(0, sum(calls)), calls
    narrowest = plan.prompt_widths[0]
    first = max(0, len(chunk.tokens) - narrowest)
    return slice(first, first + narrowest), [narrowest]


def tokens_that_fit(plan: Plan, num_tokens: int, num_rows: int) -> int:
    """Number of a prompt's `num_tokens` tokens that `num_rows` rows can prefill."""
    if sum(split_rows(plan.prompt_widths, num_tokens)) <= num_rows:
        return num_tokens
    whole, rest = divmod(num_rows, plan.prompt_widths[-1])
    fitting = [width for width in plan.prompt_widths if width <= rest]
    return whole * plan.prompt_widths[-1] + (fitting[-1] if fitting else 0)


def whole_tree(tree: TokenTree, cache: Cache) -> Rows:
    """Rows of all nodes of a tree that follows the committed tokens of `cache`."""
    nodes = torch.arange(len(tree.tokens), device=tree.tokens.device)
    slots = cache.tree_slots(len(nodes))
    rows = tree_rows(tree, nodes, cache, slots, attend_batch_invariant)
    return with_paths(rows, tree) if cache.nets else rows


def with_paths(rows: Rows, tree: TokenTree) -> Rows:
    """Rows of a whole tree, with the paths that delta nets follow, computed on the host."""
    assert rows.tree is not None
    parents = tree.parents[: tree.num_nodes].tolist()
    before = [parent if parent < node else -1 for node, parent in enumerate(parents)]
    paths = tree_paths(before, rows.cache.conv_kernel_size)
    paths = on_device(paths, rows.cache.device, rows.tree.windows[: len(paths)])
    return replace(rows, tree=replace(rows.tree, paths=paths))


def root_row(cache: Cache, root: Tensor) -> Rows:
    """The one row of a tree of its root only, int64 [1], with fast attention."""
    rows = causal_rows(cache, root, attend)
    if not cache.nets:
        return rows
    tree = root_only(root, 1)
    first = torch.zeros(1, dtype=torch.int64, device=root.device)
    return with_paths(replace(rows, tree=tree_nodes(tree, first, cache.conv_kernel_size)), tree)


def padded_rows(plan: Plan, chunk: PrefillChunk) -> Rows:
    """Rows of a chunk and its padding: copies of its last row that write to an unread slot."""
    tokens = torch.tensor(list(chunk.tokens), device=chunk.cache.device)
    rows = causal_rows(chunk.cache, tokens, attend_batch_invariant)
    rows = replace(rows, stops=chunk.cache.stops(chunk.checkpoints_at))
    num_rows = sum(split_rows(plan.prompt_widths, len(chunk.tokens)))
    return repeated_last(rows, num_rows - len(chunk.tokens))


def repeated_last(rows: Rows, count: int) -> Rows:
    if not count:
        return rows
    tokens, positions = (
        torch.cat((x, x[-1:].repeat(count))) for x in (rows.tokens, rows.positions)
    )
    windowed, windows = rows.windowed, rows.cache.windows
    if windowed is not None and windows is not None and windowed.num_before is None:
        slots = with_padding(windowed.slots, count, windows.padding_slot)
        windowed = replace(windowed, slots=slots)
    return replace(
        rows,
        tokens=tokens,
        positions=positions,
        slots=with_padding(rows.slots, count, rows.cache.padding_slot),
        windowed=windowed,
        num_padding=rows.num_padding + count,
    )


def with_padding(slots: Tensor, count: int, padding_slot: int) -> Tensor:
    return torch.cat((slots, torch.full((count,), padding_slot, device=slots.device)))


def causal_rows(cache: Cache, tokens: Tensor, attention: Attend) -> Rows:
    """Rows of tokens int64 [T] that follow the committed ones; each sees all before it."""
    cache.make_room(len(tokens))
    positions = torch.arange(len(tokens), device=tokens.device) + cache.length
    live = cache.live_slots(cache.length + len(tokens))
    slot_positions = torch.arange(live, device=tokens.device)
    rows = Rows(tokens, positions, positions, slot_positions, None, cache, attention)
    if cache.windows is None:
        return rows
    return replace(rows, windowed=in_windows(cache.windows, cache.length, positions, live))


def in_windows(
    windows: WindowSlots, length: int, positions: Tensor, live_slots: int
) -> KVLocations:
    """Locations in layers with windows of rows at int64 [T] positions, behind `length` tokens."""
    device, end = positions.device, length + len(positions)
    if windows.fit(end):
        live = torch.arange(min(live_slots, windows.num_slots), device=device)
        return KVLocations(positions - windows.base, live + windows.base, None)
    num_before = min(length - windows.start, windows.widest - 1)
    last = windows.last_places(end)
    slots = torch.arange(last.start, last.stop, device=device)
    return KVLocations(
        slots, torch.arange(length - num_before, end, device=device), None, num_before
    )
