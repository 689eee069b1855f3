"""Memory that a model needs: arithmetic that planner and runtime share; no torch.

The runtime allocates an arena of exactly this size for each purpose of the ledger. Its loops are
bounded by the constants below, and tests compare measured temporaries with `workspace_bytes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from subspec.artifacts.model import (
    GROUP_SIZE,
    TOKEN_IDS,
    Attention,
    DeltaNet,
    Dense,
    ModelSpec,
)
from subspec.artifacts.plan import DeviceKind, HostLedger, Int4Kernel, Ledger

ALIGNMENT = 256  # bytes; of every tensor in fast memory
SLOT_ALIGNMENT = 64  # live lengths of the KV cache are multiples of it, for few distinct shapes

# Rows that the runtime's loops process at a time, which bounds the temporaries of a long prompt.
ATTENTION_ROWS = 128
NORM_ROWS = 256
PRODUCT_ROWS = 256
NET_ROWS = 128
HEAD_ROWS = 128
NET_SLOTS = 18  # states that live at once along a tree of up to 16 nodes a level
# Checkpoints: delta-net states of a sequence in host memory that it can be rolled back to. They are
# taken at the start of the last prompt, where the previous answer ended; before its end, by more
# tokens than chat templates end prompts with; and every CHECKPOINT_TOKENS, further apart in a long
# text.
CHECKPOINTS = 5
CHECKPOINT_TOKENS = 2048
TOKENS_BEHIND_CHECKPOINT = 16
# Tokens kept before the widest window: a conversation can be cut back by so many without prefilling
# again.
TOKENS_BEHIND_WINDOW = 192
# Tokens per pass in which a draft model prefills texts that it has not seen yet.
CATCH_UP_ROWS = 128
# Prefill tokens in a pass that also verifies: few, so that other sequences' answers are not
# delayed.
MIXED_PREFILL_ROWS = 128

DRAFT_BYTES = 2  # the draft computes in bf16
TOKEN_ID_BYTES = 8
GUARD_SHARE = 0.01  # of the budget, for what operations allocate internally
GUARD_BYTES = 128 << 10  # at least
# cuda: at most. Kernels' own temporaries are of the sizes of a pass, not of the weights.
MAX_GUARD_BYTES = 96 << 20
# cuda: cuBLAS' workspaces (32 MiB on each of two streams on Hopper, 8 elsewhere), and the rounding
# of segments in torch's allocator: a test sends real shapes through a model of it.
ALLOCATOR_BYTES = (64 << 20) + (48 << 20)
# cuda: what the driver keeps of a draft's graphs, outside torch's allocator. A sequence has graphs
# of two levels for so many numbers of live slots. Kernels are counted on the simulated device, the
# bytes of one are estimated: about 1 kB.
GRAPH_SETS = 2
GRAPH_KERNELS_PER_BLOCK = 48
GRAPH_KERNELS_OUTSIDE = 96  # of the layers: embedding, head, choosing
GRAPH_KERNEL_BYTES = 2 << 10
ATTENTION_PIECE = 16  # attention.cpp rounds head sizes and slots up to multiples of it
DELTA_NET_PIECE = 32  # delta_net.cpp rounds the sizes of heads up to multiples of it
DELTA_NET_ROWS = 32  # whose inputs it widens together
ATTENTION_SECTION = 512  # slots that attention_triton.py adds up on their own
ATTENTION_SECTIONS = 8  # of them, at a time
MAX_PROPOSED = 15  # tokens of each sequence that a draft's pass checks beside a level
DRAFT_GROUP_BYTES = 76  # for 64 quantized activations in draft_layers.cpp


@dataclass(frozen=True)
class Ring:
    """Ring of staging slots that streamed weights are copied to."""

    block_bytes: int
    num_slots: int

    @property
    def num_bytes(self) -> int:
        return self.block_bytes * self.num_slots


@dataclass(frozen=True)
class Shape:
    """Inputs of a ledger, besides the resident exact weights."""

    context: int
    num_sequences: int
    verify_width: int
    draft_width: int | None  # of the tree; None: no draft
    prefill_chunk_tokens: int
    num_threads: int  # of the CPU
    head_rows: int  # of each sequence, whose logits a prompt's pass computes
    ring: Ring | None = None  # None: nothing streams
    scratch_bytes: int | None = None  # for one decoded part; None: nothing is decoded at its use
    decodes_residuals: bool = False  # at their use
    drafts_with_head: bool = False  # by the model's draft head
    keeps_all_tokens: bool = False  # in layers with windows too
    draft_model: ModelSpec | None = None  # that drafts, or proposes what the substitutes check
    substitutes_draft: bool = True  # as far as there is a draft

    @property
    def draft_needs_substitutes(self) -> bool:
        return self.draft_width is not None and self.substitutes_draft

    @property
    def slots(self) -> int:
        return cache_slots(self.context, self.verify_width)

    def window_slots(self, spec: ModelSpec) -> int | None:
        """KV slots of layers with windows; None: as many as other layers."""
        if self.keeps_all_tokens:
            return None
        return window_slots(spec, self.context, self.verify_width)


@dataclass(frozen=True)
class Slots:
    """KV slots of one sequence: in full attentions, and in those with windows (None: the same)."""

    every: int
    windowed: int | None


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def cache_slots(context: int, verify_width: int) -> int:
    """Slots of one sequence: for `context` tokens, a tree after them, and the padding slot."""
    return aligned_slots(context + verify_width + 1)


def aligned_slots(num_slots: int) -> int:
    return -(-num_slots // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def tokens_in_windows(spec: ModelSpec) -> int:
    """Tokens that layers with windows keep: what the widest window shows, and some before it. As
    their first slot is aligned, they may be fewer by less than SLOT_ALIGNMENT."""
    return aligned_slots(max(spec.windows) + TOKENS_BEHIND_WINDOW + SLOT_ALIGNMENT)


def window_slots(spec: ModelSpec, context: int, verify_width: int) -> int | None:
    """KV slots of one sequence in layers with windows: room for twice the tokens that they keep, so
    that entries are moved rarely and a copy never overlaps its source. None: a slot for every token
    of the context, because there are no such layers or that takes no more memory."""
    if not spec.windows:
        return None
    slots = cache_slots(2 * tokens_in_windows(spec), verify_width)
    return slots if slots < cache_slots(context, verify_width) else None


def tokens_held(spec: ModelSpec, window: int | None, num_tokens: float) -> float:
    """Upper bound of the tokens of a text that an attention has in its cache."""
    return num_tokens if window is None else min(num_tokens, 2 * tokens_in_windows(spec))


def make_ledger(
    spec: ModelSpec,
    device: DeviceKind,
    kernel: Int4Kernel,
    shape: Shape,
    overhead_bytes: int,
    budget_bytes: int,
) -> Ledger:
    """Ledger of everything except resident exact weights."""
    # A residual is decoded with its substitute, even if there is no draft.
    needs_substitutes = shape.draft_needs_substitutes or shape.decodes_residuals
    other = shape.draft_model
    return Ledger(
        substitutes=substitutes_bytes(spec, kernel) if needs_substitutes else 0,
        norms=norms_bytes(spec),
        tables=tables_bytes(spec, shape),
        windows=windows_bytes(spec, shape),
        cache=sequences_bytes(spec, device, shape),
        staging=shape.ring.num_bytes if shape.ring else 0,
        scratch=shape.scratch_bytes or 0,
        drafter=draft_head_bytes(spec)
        if shape.drafts_with_head
        else draft_model_bytes(other, kernel, shape)
        if other
        else 0,
        drafter_cache=head_states_bytes(spec, shape)
        if shape.drafts_with_head
        else sequences_bytes(other, device, all_tokens_kept(shape))
        if other
        else 0,
        workspace=workspace_bytes(spec, device, shape),
        overhead=overhead_bytes,
        guard=guard_bytes(device, budget_bytes),
    )


def guard_bytes(device: DeviceKind, budget_bytes: int) -> int:
    share = max(GUARD_BYTES, int(budget_bytes * GUARD_SHARE))
    return min(share, MAX_GUARD_BYTES) if device == "cuda" else share


def packed_bytes(num_rows: int, num_columns: int, kernel: Int4Kernel) -> tuple[int, ...]:
    """Sizes of a substitute's codes and of its qparams as stored, which the residual decoder and
    ATen's kernels read. gemlite needs a second copy of the qparams in its own layout."""
    qparams = num_rows * num_columns // GROUP_SIZE * 4
    return (num_rows * num_columns // 2, qparams, *((qparams,) if kernel == "gemlite" else ()))


@lru_cache(maxsize=8)
def substitutes_bytes(spec: ModelSpec, kernel: Int4Kernel) -> int:
    return sum(
        aligned(size)
        for linear in spec.linears
        if linear.has_substitute
        for size in packed_bytes(linear.out_features, linear.in_features, kernel)
    )


@lru_cache(maxsize=8)
def draft_head_bytes(spec: ModelSpec) -> int:
    return sum(
        aligned(prod(shape) * (TOKEN_ID_BYTES if name == TOKEN_IDS else spec.item_bytes))
        for name, shape in spec.draft_head_shapes.items()
    )


@lru_cache(maxsize=8)
def norms_bytes(spec: ModelSpec) -> int:
    """Size of norms, biases, matrices without a substitute, and the scales of FP8 matrices."""
    tensors = sum(aligned(size) for size in spec.resident_bytes.values())
    return tensors + sum(aligned(prod(shape) * 4) for shape in spec.scale_shapes.values())


def tables_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Size of the RoPE tables and, unless the model is bf16, of the draft's bf16 copies of tables,
    norms and biases."""
    positions = shape.slots
    item = 4 if spec.rope_in_f32 else spec.item_bytes
    total = sum(2 * aligned(positions * rope.size * item) for rope in spec.ropes)
    if shape.draft_needs_substitutes and spec.dtype != "bfloat16":
        if not spec.rope_in_f32:
            total += sum(2 * aligned(positions * r.size * DRAFT_BYTES) for r in spec.ropes)
        total += draft_copies_bytes(spec)
    return total


def draft_model_bytes(spec: ModelSpec, kernel: Int4Kernel, shape: Shape) -> int:
    """Size of a draft model's weights, its RoPE tables and, unless it is bf16, its bf16 copies of
    norms and biases."""
    positions = cache_slots(shape.context, shape.verify_width)
    item = 4 if spec.rope_in_f32 else DRAFT_BYTES
    tables = sum(2 * aligned(positions * rope.size * item) for rope in spec.ropes)
    copies = draft_copies_bytes(spec) if spec.dtype != "bfloat16" else 0
    return substitutes_bytes(spec, kernel) + norms_bytes(spec) + tables + copies


@lru_cache(maxsize=8)
def draft_copies_bytes(spec: ModelSpec) -> int:
    return sum(
        aligned(prod(shape) * DRAFT_BYTES)
        for name, shape in spec.resident_shapes.items()
        if len(shape) == 1 and name not in spec.net_tensors
    )


def all_tokens_kept(shape: Shape) -> Shape:
    """Shape of a draft model, which keeps all tokens because each round cuts its text back."""
    return replace(shape, keeps_all_tokens=True)


def sequences_bytes(spec: ModelSpec, device: DeviceKind, shape: Shape) -> int:
    """Fast memory of all sequences' caches."""
    on_cpu = device == "cpu"
    return cache_bytes(spec, shape) + (
        checkpoints_bytes(spec, shape.num_sequences) if on_cpu else 0
    )


def cache_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Size of the keys and values of every attention that has all slots, and of the states of every
    delta net, for all sequences."""
    every = shape.window_slots(spec) is None
    kept = (one for one in spec.attentions if every or one.window is None)
    nets = (net_state_bytes(spec, net, shape.verify_width) for net in spec.delta_nets)
    total = sum(kv_bytes(spec, one, shape.slots) for one in kept) + sum(nets)
    return shape.num_sequences * total


def windows_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Size of the keys and values of the attentions that do not have all slots, for all
    sequences."""
    slots = shape.window_slots(spec)
    if slots is None:
        return 0
    kept = (one for one in spec.attentions if one.window is not None)
    return shape.num_sequences * sum(kv_bytes(spec, one, slots) for one in kept)


def text_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """Size of the keys and values of a text; layers with windows keep only its last tokens."""
    kept = (tokens_held(spec, one.window, num_tokens) * one.kv_size for one in spec.attentions)
    return int(2 * sum(kept) * spec.item_bytes)


def kv_bytes(spec: ModelSpec, attention: Attention, num_slots: int) -> int:
    return 2 * aligned(num_slots * attention.kv_size * spec.item_bytes)


def head_states_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Size of a draft head's keys and values, and of the hidden states that it has not read yet,
    for all sequences."""
    assert spec.draft_head is not None
    item, [attention] = spec.item_bytes, spec.draft_head.layer.attentions
    slots = shape.slots
    unread = aligned(shape.verify_width * spec.hidden_size * item)
    return shape.num_sequences * (2 * aligned(slots * attention.kv_size * item) + unread)


@lru_cache(maxsize=4096)
def net_state_bytes(spec: ModelSpec, net: DeltaNet, width: int) -> int:
    """Size of a delta net's states: what is committed, what a chunk of a prompt leaves, and what
    the nodes of a tree keep."""
    heads, item = width * net.num_value_heads, spec.item_bytes
    nodes = aligned(width * net.num_channels * item) + 2 * aligned(heads * item)
    drafted = (width * net.keys_width, heads * net.value_size, heads)
    return 2 * memory_bytes(spec, net) + nodes + sum(aligned(4 * count) for count in drafted)


def checkpoints_bytes(spec: ModelSpec, num_sequences: int) -> int:
    """Host memory of the delta-net states that sequences can go back to; on CPUs it is fast
    memory."""
    states = sum(memory_bytes(spec, net) for net in spec.delta_nets)
    return num_sequences * CHECKPOINTS * states


def make_host_ledger(
    specs: Sequence[ModelSpec], streamed_bytes: int, num_sequences: int
) -> HostLedger:
    """Host memory of a plan for a GPU. specs: the model's, and that of a draft model in use."""
    return HostLedger(
        streamed_bytes,
        sum(spec.embedding_bytes for spec in specs),
        sum(checkpoints_bytes(spec, num_sequences) for spec in specs),
    )


def memory_bytes(spec: ModelSpec, net: DeltaNet) -> int:
    """Size of one state of a delta net."""
    recent = (net.conv_kernel_size - 1) * net.num_channels * spec.item_bytes
    return aligned(recent) + aligned(4 * prod(net.memory_shape))


@lru_cache(maxsize=8)
def model_bytes(spec: ModelSpec) -> int:
    """Size of the checkpoint's weights."""
    small = sum(spec.resident_bytes.values())
    small += sum(prod(shape) for shape in spec.scale_shapes.values()) * 4
    matrices = sum(part.plain_bytes for part in spec.parts)
    embedding = spec.embedding_bytes
    return small + matrices + (0 if spec.tie_word_embeddings else embedding)


def workspace_bytes(spec: ModelSpec, device: DeviceKind, shape: Shape) -> int:
    """Upper bound of the temporaries of any pass; a test compares it with a measurement."""
    slots, threads = Slots(shape.slots, shape.window_slots(spec)), shape.num_threads
    sequences, width = shape.num_sequences, shape.verify_width
    of_heads = logits_bytes(spec, sequences * shape.head_rows)
    prompt = pass_bytes(spec, device, 1, shape.prefill_chunk_tokens, slots, of_heads, threads)
    # All sequences verify, or all but one do while a chunk of its prompt is read; the chunk counts
    # as further sequences.
    chunk = min(max(MIXED_PREFILL_ROWS, width), shape.prefill_chunk_tokens)
    verifying = max(sequences, sequences - 1 + -(-chunk // width)) if sequences > 1 else 1
    of_heads = logits_bytes(spec, sequences * width)
    trees = pass_bytes(spec, device, verifying, width, slots, of_heads, threads, width)
    exact = max(prompt, trees, moving_bytes(spec) if slots.windowed else 0)
    if shape.drafts_with_head:  # it reads a pass's hidden states, which are still allocated
        exact += head_pass_bytes(spec, device, 1, max(HEAD_ROWS, width), slots)
        exact += 2 * sequences * width * spec.hidden_size * spec.item_bytes
        if spec.eagle3:  # the streams that it reads, of all rows, and those of what is kept
            rows = max(shape.prefill_chunk_tokens, verifying * width) + sequences * width
            exact += rows * len(spec.eagle3.reads) * spec.hidden_size * spec.item_bytes
    if shape.draft_width is None:
        return aligned(exact) + (ALLOCATOR_BYTES if device == "cuda" else 0)
    draft, vocabulary = 0, padded_vocabulary(spec)
    if shape.substitutes_draft:
        rows = min(shape.draft_width + MAX_PROPOSED, max(shape.draft_width, width))
        draft = draft_pass_bytes(spec, device, shape, sequences, rows)
        if shape.drafts_with_head:
            draft = max(draft, head_pass_bytes(spec, device, sequences, max(rows, width), slots))
            if spec.eagle3:  # its own logits, rounded
                own = spec.eagle3.vocab_size * (spec.item_bytes + DRAFT_BYTES)
                draft += sequences * rows * own
        draft += sequences * 2 * rows * vocabulary
    if shape.draft_model is not None:
        # A level; or the last tokens before it, of which one has logits; or a text that is read.
        rows, whole = max(shape.draft_width, 1 + MAX_PROPOSED), all_tokens_kept(shape)
        own = max(
            draft_pass_bytes(shape.draft_model, device, whole, sequences, rows),
            draft_pass_bytes(shape.draft_model, device, whole, 1, CATCH_UP_ROWS),
        )
        # As the draft model gives them, and as many as the model has.
        vocabulary = max(vocabulary, padded_vocabulary(shape.draft_model))
        draft = max(draft, own + sequences * 4 * shape.draft_width * vocabulary)
    # Logits are in bf16; those of a level then in f32, and sharpened.
    draft += sequences * 12 * shape.draft_width * vocabulary
    if device == "cpu":
        return aligned(max(exact, draft))
    # Captured levels keep their temporaries.
    graphs = sequences * graph_bytes(spec) if shape.draft_model is None else 0
    return aligned(exact + draft) + graphs + ALLOCATOR_BYTES


def draft_pass_bytes(
    spec: ModelSpec, device: DeviceKind, shape: Shape, sequences: int, rows: int
) -> int:
    """Temporaries of a draft's pass of so many rows for each sequence, without logits."""
    slots, width = Slots(shape.slots, shape.window_slots(spec)), shape.verify_width
    draft = pass_bytes(spec, device, sequences, rows, slots, 0, tree_rows=width)
    if device == "cpu":
        threads = shape.num_threads
        draft = max(draft, compiled_draft_bytes(spec, sequences, rows, slots, threads))
    return draft


def moving_bytes(spec: ModelSpec) -> int:
    """Size of the temporary copy when entries of a layer with a window are moved."""
    sizes = (one.kv_size for one in spec.attentions if one.window is not None)
    return tokens_in_windows(spec) * max(sizes) * spec.item_bytes


def graph_bytes(spec: ModelSpec) -> int:
    """Memory of the driver for the graphs of one sequence's draft."""
    return GRAPH_SETS * 2 * graph_kernels(spec) * GRAPH_KERNEL_BYTES


@lru_cache(maxsize=8)
def graph_kernels(spec: ModelSpec) -> int:
    """Upper bound of the kernels of a captured level."""
    blocks = sum(len(layer.blocks) for layer in spec.layers)
    return blocks * GRAPH_KERNELS_PER_BLOCK + GRAPH_KERNELS_OUTSIDE


def pass_bytes(
    spec: ModelSpec,
    device: DeviceKind,
    sequences: int,
    rows: int,  # of each sequence
    slots: Slots,
    head_bytes: int,  # of the logits and what is chosen from them, when the layers' are gone
    exact_threads: int | None = None,  # of batch-invariant attention; None: fast attention
    tree_rows: int = 0,  # of the trees whose nodes the rows are; 0: they are a prompt's
) -> int:
    """Size of the activations in the layer that needs most, or of the head's."""
    every = sequences * rows
    live = slots.every + (slots.windowed or 0)
    places = sequences * (8 * live + rows * 64)
    # A tree's mask is there for the whole pass; that of a prompt, for the rows that are attended.
    masks = sequences * rows * (rows + live) if tree_rows else 0
    residual = every * spec.hidden_size * spec.item_bytes
    blocks = (
        block_bytes(spec, device, body, sequences, rows, slots, exact_threads, tree_rows)
        for body in spec.bodies
    )
    return 2 * residual + places + masks + max(head_bytes, *blocks)


def head_pass_bytes(
    spec: ModelSpec, device: DeviceKind, sequences: int, rows: int, slots: Slots
) -> int:
    """Size of the activations of a draft head, and of what it returned for the nodes of trees."""
    assert spec.draft_head is not None
    every = sequences * rows
    live = slots.every + (slots.windowed or 0)
    masks = sequences * (rows * (rows + 2 * live) + 8 * live + rows * 64)
    blocks = (
        block_bytes(spec, device, block.body, sequences, rows, slots, None, rows)
        for block in spec.draft_head.layer.blocks
    )
    inputs = 13 if spec.eagle3 else 9
    return inputs * every * spec.hidden_size * spec.item_bytes + masks + max(blocks)


@lru_cache(maxsize=4096)
def block_bytes(
    spec: ModelSpec,
    device: DeviceKind,
    body: Attention | DeltaNet | Dense,
    sequences: int,
    rows: int,
    slots: Slots,
    exact_threads: int | None,
    tree_rows: int,
) -> int:
    item, hidden = spec.item_bytes, spec.hidden_size
    every = sequences * rows
    piece = min(every, PRODUCT_ROWS)
    result, norm = every * hidden * item, piece * hidden * (item + 12)
    if isinstance(body, Dense):
        inner, widest = body.intermediate_size, max(body.intermediate_size, hidden)
        gates = every * inner * item * (2 if body.bias else 1)
        return max(norm, gates + max(2 * piece * widest * item, result))
    if isinstance(body, DeltaNet):
        projected = body.num_channels + body.values_width + 2 * body.num_value_heads
        if exact_threads is None:
            rule = drafted_net_bytes(spec, body, rows, tree_rows)
        else:
            rule = net_rule_bytes(body, rows if tree_rows else min(rows, NET_ROWS), exact_threads)
        return max(norm, every * projected * item + max(rule, result))
    some, live, joined = min(rows, ATTENTION_ROWS), slots.every, 0
    if body.window is not None and slots.windowed is not None:
        live = slots.windowed
        if not tree_rows and rows + tokens_in_windows(spec) >= live:
            # A chunk of a prompt that they have no room for, and what its windows show before it.
            joined = 2 * (max(spec.windows) + rows) * body.kv_size * item
    query, repeats = body.query_size, body.num_heads // body.num_kv_heads
    turned = 4 if spec.rope_in_f32 else item
    if exact_threads is not None:
        # By the plain twin: f64 scores of one KV head, two alive, its keys and values.
        scored = min(some, rows_in_fp64(repeats)) if device == "cpu" else some
        twin = scored * (repeats * 16 + 1) * live + live * body.head_size * 16
        if device == "cpu":
            compiled = attention_scratch_bytes(exact_threads, live, body.head_size)
        else:
            compiled = attention_blocks_bytes(body.num_heads, some, live, body.head_size)
        # int64 distances and masks, which are gone before the scores
        in_window = 10 * some * live if body.window is not None else 0
        scores = max(twin, compiled, in_window) + some * live
        scores += 2 * some * query * max(item, turned)
    else:  # the mask, and its copy for the repeated heads; no mask-free kernel is assumed
        scores = some * live * (2 + item * (1 + repeats)) + 4 * some * query * max(item, turned)
        if device == "cuda":
            scores += body.num_heads * some * live * 4  # the math kernel's scores
    tables = 2 * every * (body.rope.size if body.rope else 0) * turned
    gated = 3 * query if body.output_gate else 0  # q and its gate, before and after they part
    normed = 0
    if body.qk_norm != "none":
        normed = every * query * item + min(every, NORM_ROWS) * query * (item + 12)
    return (
        every * (query + gated + 2 * body.kv_size) * item
        + tables
        + joined
        + max(result + norm, normed, 5 * rows * body.kv_size * turned, scores)
    )


def net_rule_bytes(net: DeltaNet, rows: int, num_threads: int) -> int:
    """Temporaries of delta_net.py over one sequence's rows: those of the plain twin, or of the
    compiled one."""
    keys, values = net.num_value_heads * net.key_size, net.values_width
    inputs = rows * (4 * net.num_channels + 5 * keys + 6 * values)
    twin = 4 * (inputs + (NET_SLOTS + 8) * prod(net.memory_shape))
    of_head = net.key_size, net.value_size, net.conv_kernel_size
    return max(twin, delta_net_scratch_bytes(num_threads, *of_head, NET_SLOTS))


def drafted_net_bytes(spec: ModelSpec, net: DeltaNet, rows: int, tree_rows: int) -> int:
    """Temporaries of delta_draft.py over one sequence's rows of a level."""
    keys, values = net.num_value_heads * net.key_size, net.values_width
    before = (net.conv_kernel_size + tree_rows) * net.num_channels * spec.item_bytes
    inputs = rows * net.num_channels * (net.conv_kernel_size * (spec.item_bytes + 8) + 12)
    scores = 4 * rows * net.num_value_heads * 8 * tree_rows
    return before + inputs + scores + 4 * rows * (6 * keys + 12 * values)


def rows_in_fp64(repeats: int) -> int:
    """Rows that the fp64 twin of exact attention computes at a time on CPUs. repeats: query heads
    per KV head."""
    return max(1, ATTENTION_PIECE // repeats)


def attention_scratch_bytes(num_threads: int, num_slots: int, head_size: int) -> int:
    """Scratch memory of attention.cpp: per thread, the keys and values of a KV head in f32 and the
    scores of 16 rows."""
    piece = ATTENTION_PIECE
    slots, dims = (-(-size // piece) * piece for size in (num_slots, head_size))
    per_thread = slots * (2 * dims + piece + 2) + dims * piece
    return 4 * (slots + num_threads * per_thread)


def delta_net_scratch_bytes(
    num_threads: int, key_size: int, value_size: int, conv_kernel_size: int, num_slots: int
) -> int:
    """Scratch memory of delta_net.cpp: per thread, the inputs of some rows of a head in f32, and a
    state for each slot."""
    rows, piece = DELTA_NET_ROWS, DELTA_NET_PIECE
    keys, values = (-(-size // piece) * piece for size in (key_size, value_size))
    inputs = (conv_kernel_size + rows) * (2 * keys + values) + rows * (values + 2)
    return 4 * num_threads * (inputs + num_slots * keys * values)


def delta_net_slots_bytes(num_slots: int, num_heads: int, key_size: int, value_size: int) -> int:
    """Scratch memory of delta_net_triton.py: states that several rows continue from."""
    return 4 * num_slots * num_heads * key_size * value_size


def attention_sections(num_slots: int) -> int:
    """Sections that attention_triton.py computes at a time."""
    return min(ATTENTION_SECTIONS, -(-num_slots // ATTENTION_SECTION))


def attention_results(num_slots: int) -> int:
    """Results of sections that attention_triton.py holds: those computed at a time and, where these
    are not all sections, one accumulated over the sections before."""
    at_once = attention_sections(num_slots)
    return at_once + (at_once * ATTENTION_SECTION < num_slots)


def attention_blocks_bytes(num_heads: int, num_rows: int, num_slots: int, head_size: int) -> int:
    """Scratch memory of attention_triton.py: the slots that each row sees, and the f32 results
    of sections."""
    sums = attention_results(num_slots) * num_heads * (head_size + 2)
    return 4 * num_rows * (num_slots + 2 + sums)


def compiled_draft_bytes(
    spec: ModelSpec, sequences: int, rows: int, slots: Slots, num_threads: int
) -> int:
    """Temporaries of draft_layers.cpp in bf16: rows, RoPE, masks and scratch."""
    attentions = [body for body in spec.bodies if isinstance(body, Attention)]
    nets = [body for body in spec.bodies if isinstance(body, DeltaNet)]
    inner = max(
        (body.intermediate_size for body in spec.bodies if isinstance(body, Dense)), default=0
    )
    mixed = max([body.query_size for body in attentions] + [net.values_width for net in nets])
    width = max(
        [2 * (body.query_size + body.kv_size) for body in attentions]
        + [net.num_channels + net.values_width for net in nets]
    )
    head_size = max((body.head_size for body in attentions), default=0)
    groups = (max(spec.hidden_size, mixed) + inner) * DRAFT_GROUP_BYTES // GROUP_SIZE
    per_thread = [64 * (head_size + 15)]
    per_thread += [
        4 * (2 * net.key_size + 3 * net.value_size)
        + net.conv_kernel_size * (2 * net.key_size + net.value_size)
        for net in nets
    ]
    every = sequences * rows
    of_nets = max((2 * spec.hidden_size + 8 * net.num_value_heads for net in nets), default=0)
    scratch = every * (groups + 2 * width + of_nets) + 4 * num_threads * max(per_thread) + 6 * 64
    live = slots.every + (slots.windowed or 0)
    masks = sequences * (rows * (rows + live * 11) + 8 * live + rows * 64)
    if nets:  # where rows are in their trees
        masks += every * (2 * (rows + 64) + 16 * max(net.conv_kernel_size for net in nets) + 64)
    return every * (2 * spec.hidden_size + 4 * head_size) + masks + scratch


def logits_bytes(spec: ModelSpec, rows: int) -> int:
    """Size of the logits of all rows, and of the f64 copies of the row that is sampled."""
    vocabulary = padded_vocabulary(spec)
    return rows * vocabulary * spec.item_bytes + vocabulary * 72


def padded_vocabulary(spec: ModelSpec) -> int:
    return spec.linears[-1].out_features
