"""A draft head: one decoder layer that predicts the token after the next one.

Its row for a token takes the token's embedding and the model's hidden state of the token before,
and gives the logits of the token after it. Further down a draft, a row takes the head's own output
for the token before. So a row lies in the slot of its token, beside the model's own keys and
values, and the first token has none.
T = rows, H = hidden size, S = live slots, V = vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspec.artifacts.footprint import HEAD_ROWS
from subspec.artifacts.model import (
    FINAL_NORM,
    FUSED_NORMS,
    FUSION,
    HEAD,
    HEAD_LAYER,
    HEAD_NORM,
    HIDDEN_NORM,
    TOKEN_IDS,
    Attention,
    DraftHead,
    ModelSpec,
    layer_name,
)
from subspec.runtime.kernels.linear import GemmRanges, gemm_ranges, product
from subspec.runtime.load import DRAFT_DTYPE
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache, Unread
from subspec.runtime.model.net_state import Take
from subspec.runtime.model.transformer import (
    Pass,
    Product,
    Rows,
    SharedWeights,
    add_block,
    add_layer,
    add_result,
    attend_rows,
    embed,
    join,
    logits_of,
    normalize,
    rms_norm,
)

# Logit of tokens outside a head's vocabulary: below all others, but finite, because a constraint
# may leave no other token.
OUTSIDE = -1e30


@dataclass(frozen=True)
class HeadWeights:
    """Weights of a draft head in fast memory; embedding and rope tables are the model's own."""

    head: DraftHead
    model: SharedWeights  # whose hidden states it reads
    decoder: SharedWeights  # of a model of this one layer
    tensors: Mapping[str, Tensor]

    def __call__(
        self, name: str, x: Tensor, calls: GemmRanges, gate: Tensor | None = None
    ) -> Tensor:
        """A product of the layer."""
        prefix = f"{HEAD_LAYER}.{name}"
        out = product(x, self.tensors[f"{prefix}.weight"], self.tensors.get(f"{prefix}.bias"))
        return out if gate is None else gate.mul_(out)


def read_from(weights: HeadWeights, x: Tensor) -> Tensor:
    """Hidden states [T, H] that the head takes, from the residual stream x of the exact model, [T,
    H] or of several places side by side."""
    if weights.model.spec.eagle3 is not None:
        return fused(weights, x)
    return normalize(weights.model, FINAL_NORM, x)


def next_hidden(weights: HeadWeights, batch: Sequence[Rows], hidden: Tensor) -> Tensor:
    """Run the head: return its outputs [T, H], from which `logits_from` makes logits. hidden [T,
    H]: of the token before each row's, the exact model's or the head's own output. batch: over
    caches of the head's one attention."""
    head, tensors = weights.head, weights.tensors
    tokens, positions = (join([getattr(r, n) for r in batch]) for n in ("tokens", "positions"))
    now = Pass(weights.decoder, batch, gemm_ranges([len(tokens)]), positions)
    parts = [embed(weights.model, tokens), hidden]
    if head.layout == "eagle3":
        return next_of_eagle3(weights, now, *parts)
    if head.layout == "mtp":
        names = (f"{name}.weight" for name in FUSED_NORMS)
        pairs = zip(names, parts, strict=True)
        parts = [rms_norm(head.norm, tensors[name], part) for name, part in pairs]
    x = fused(weights, torch.cat(parts, dim=1))
    add_layer(now, 0, weights, x)
    if head.layout == "mtp":
        return rms_norm(head.norm, tensors[f"{HEAD_NORM}.weight"], x)
    return x


def fused(weights: HeadWeights, x: Tensor) -> Tensor:
    return product(x, weights.tensors[f"{FUSION}.weight"], weights.tensors.get(f"{FUSION}.bias"))


def next_of_eagle3(weights: HeadWeights, now: Pass, embedded: Tensor, hidden: Tensor) -> Tensor:
    """Output of EAGLE-3's layer for embedded and hidden [T, H]: attention takes both, normed, side
    by side, and adds to the hidden state."""
    eagle3, layer = weights.model.spec.eagle3, layer_name(0)
    attending, feeding = weights.head.layer.blocks
    assert eagle3 is not None and isinstance(attending.body, Attention)
    normed = rms_norm(weights.head.norm, weights.tensors[f"{HIDDEN_NORM}.weight"], hidden)
    x = (normed if eagle3.norm_before_residual else hidden).clone()
    embedded = normalize(weights.decoder, f"{layer}.{attending.before}", embedded)
    both = torch.cat((embedded, normed), dim=1)
    out = attend_rows(now, layer, 0, attending.body, weights, both)
    add_result(weights.decoder, layer, attending, out, x)
    add_block(now, 0, 0, feeding, weights, x)
    return x


def logits_from(weights: HeadWeights, head: Product, hidden: Tensor) -> Tensor:
    """Logits bf16 [T, V] of the draft head's outputs [T, H]. head: the substitute of the model's,
    for draft heads without logits of their own."""
    spec, tensors = weights.model.spec, weights.tensors
    if spec.eagle3 is None:
        normed = hidden.to(DRAFT_DTYPE)
        return logits_of(spec, head, normed, gemm_ranges([len(normed)]))
    normed = rms_norm(weights.head.norm, tensors[f"{HEAD_NORM}.weight"], hidden)
    own = product(normed, tensors[f"{HEAD}.weight"]).to(DRAFT_DTYPE)
    if TOKEN_IDS not in tensors:
        return own
    every = own.new_full((len(own), spec.vocab_size), OUTSIDE)
    return every.index_copy_(1, tensors[TOKEN_IDS], own)


def read_text(weights: HeadWeights, cache: Cache, tokens: Sequence[int], x: Tensor) -> Tensor:
    """Write the head's keys and values for a text that follows the committed tokens. x [T, H]: the
    residual stream of each token. Returns the hidden state that the head has not read yet, [1, H].
    A first token has no hidden state before it: its slot is not written."""
    first, text = cache.length, [*cache.tokens, *tokens]
    live, unread = cache.live_slots(len(text)), cache.unread
    assert unread is not None
    if unread.reaches(first):
        read_some(weights, cache, text, unread.first, unread.rows[: unread.count], live)
    for start in range(0, len(tokens), HEAD_ROWS):
        hidden = read_from(weights, x[start : start + HEAD_ROWS])
        read_some(weights, cache, text, first + start, hidden, live)
    return hidden[-1:].clone()


def read_some(
    weights: HeadWeights, cache: Cache, text: Sequence[int], first: int, hidden: Tensor, live: int
) -> None:
    """Read the text from `first` on: each of its hidden states [T, H] with the next token, if
    any."""
    following = text[first + 1 : first + 1 + len(hidden)]
    if following:
        tokens = torch.tensor(list(following), device=cache.device)
        rows = following_rows(cache, tokens, first + 1, live)
        next_hidden(weights, [rows], hidden[: len(following)])


def following_rows(cache: Cache, tokens: Tensor, first: int, live_slots: int) -> Rows:
    """Rows of the head for tokens int64 [T] from position `first` on; each sees all before it but
    the first of the text, which has no row."""
    positions = torch.arange(len(tokens), device=cache.device) + first
    slots = torch.arange(live_slots, device=cache.device)
    visible = (slots <= positions[:, None]) & (slots > 0)
    return Rows(tokens, positions, positions, slots, visible, of_head(cache), attend)


def of_head(cache: Cache) -> Cache:
    """The head's part of a cache."""
    return Cache(cache.keys[-1:], cache.values[-1:], tokens=cache.tokens)


def with_head(cache: Cache, spec: ModelSpec, num_unread: int, take: Take) -> Cache:
    """Return the empty cache with room for the model's draft head. num_unread: maximum number of
    hidden states to be read; take: see make_cache()."""
    assert spec.draft_head is not None
    [attention] = spec.draft_head.layer.attentions
    dtype = cache.keys[0].dtype
    shape = attention.num_kv_heads, cache.num_slots, attention.head_size
    return replace(
        cache,
        keys=(*cache.keys, take(shape, dtype)),
        values=(*cache.values, take(shape, dtype)),
        unread=Unread(take((num_unread, spec.hidden_size), dtype)),
    )


def make_head(shared: SharedWeights, tensors: Mapping[str, Tensor]) -> HeadWeights:
    """Return the weights of the draft head. tensors: those of `spec.draft_head_shapes`, in the
    dtype of the model's activations."""
    head = shared.spec.draft_head
    assert head is not None
    spec = replace(shared.spec, layers=(head.layer,), norm=head.norm, draft_head=None, eagle3=None)
    own = {
        name.replace(HEAD_LAYER, layer_name(0), 1).removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{HEAD_LAYER}.")
    }
    norms = {name: own[name] for name in spec.norm_sizes if name in own}
    decoder = replace(shared, spec=spec, norms=norms, scalars=(None,))
    return HeadWeights(head, shared, decoder, tensors)
