"""ModelSpec: a decoder as data, layer by layer, without a checkpoint.

A layer is a sequence of blocks, and a block is x += multiplier * after(body(before(x))) with two
optional norms: so pre-norm, post-norm and sandwich-norm decoders are one form. Norms are named,
because roles and names disagree between families. Names are canonical and do not depend on what
a checkpoint calls its tensors: `model.layers.3.self_attn.q_proj`, without ".weight".
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

from subspec.artifacts.common.bounds import Below, Between, Length, Matching

GROUP_SIZE = 64  # input features that share one scale and zero point of a substitute
PAGE_BYTES = 4096  # direct reads and slabs are aligned to it
PART_BYTES = 64 << 20  # a larger matrix is stored, placed and streamed in row parts of this size
SMALL_PART_BYTES = 1 << 20  # smaller reads make poor use of a disk
PART_ROWS = 64  # parts begin at multiples of it; kernels tile rows by 64 at most

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DType = Literal["bfloat16", "float16", "float32"]
# How a part is stored: the checkpoint's bytes, or their residual (residual.py); of a matrix that
# the checkpoint has in FP8, its codes (fp8.py), or their residual (fp8_residual.py).
Encoding = Literal["raw", "residual", "fp8", "fp8-residual"]
RESIDUALS: tuple[Encoding, ...] = ("residual", "fp8-residual")

Size = Annotated[int, Between(1, 1 << 20)]  # of features, heads
Positions = Annotated[int, Between(1, 1 << 30)]
Positive = Annotated[float, Between(1e-12, 1e18)]
Name = Annotated[
    str, Matching(r"[a-z][a-z0-9_]{0,63}(\.[a-z][a-z0-9_]{0,63}){0,3}", "a tensor name")
]

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"
# Tensors of a draft head
FUSION, HEAD_LAYER, HEAD_NORM = "fc", "layers.0", "norm"
FUSED_NORMS = "pre_fc_norm_embedding", "pre_fc_norm_hidden"
HIDDEN_NORM, TOKEN_IDS = f"{HEAD_LAYER}.hidden_norm", "token_ids"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (arXiv 2104.09864). Fields after `interleaved` are for the kinds noted."""

    theta: Positive
    size: Size  # leading features of a head that rotate; the others pass unchanged
    kind: Literal["default", "linear", "llama3", "yarn", "longrope", "proportional"] = "default"
    interleaved: bool = False  # pairs (0, 1), (2, 3), ..., instead of (i, i + size / 2)
    factor: Positive = 1.0  # linear, llama3, yarn, proportional
    original_max_positions: Annotated[int, Between(0, 1 << 30)] = 0  # llama3, yarn
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: Positive = 32.0  # yarn (arXiv 2309.00071)
    beta_slow: Positive = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp between the betas ends at whole dimensions
    attention_factor: Positive = 1.0  # yarn, longrope: multiplies cos and sin
    # longrope (arXiv 2402.13753): divides each frequency; [size / 2]
    divisors: tuple[Positive, ...] = ()
    turning_pairs: Annotated[int, Between(0, 1 << 19)] = 0  # proportional: the others stand still


@dataclass(frozen=True)
class QueryGrowth:
    """Queries grow with their position: q *= 1 + beta * ln(1 + floor(position / positions))."""

    beta: float
    positions: Positions


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: <name>.q_proj, k_proj, v_proj, o_proj. Where values are keys, there
    is no v_proj: the values are k_proj's product, before k_norm."""

    num_heads: Size
    num_kv_heads: Size
    head_size: Size
    scale: Positive  # of the scores q k
    rope: Rope | None  # None: no positions (NoPE)
    window: Positions | None = None  # positions that a query sees, its own included; None: all
    qkv_bias: bool = False
    output_bias: bool = False
    # RMSNorms <name>.q_norm and k_norm before the rotation: over each head, or all heads together.
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    value_norm: bool = False  # RMSNorm of v without a weight, over each head
    values_are_keys: bool = False
    # q_proj has the rows of a gate behind those of each head: sigmoid(gate) multiplies the result.
    output_gate: bool = False
    query_growth: QueryGrowth | None = None
    name: Name = "self_attn"
    kind: Literal["attention"] = "attention"

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size


NetTensor = Literal["A_log", "conv1d.weight", "dt_bias", "norm.weight"]


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta net (arXiv 2412.06464), with a state of one size however long the text is:
    <name>.in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj. runtime/model/delta_net.py says
    what it computes. Value head h uses key head h * num_key_heads // num_value_heads."""

    num_key_heads: Size
    num_value_heads: Size
    key_size: Size  # of a head
    value_size: Size
    conv_kernel_size: Annotated[int, Between(2, 64)]  # convolves q, k and v along the text
    # Small tensors that are f32 whatever the model is.
    f32_tensors: Annotated[tuple[NetTensor, ...], Length(0, 4)] = ()
    name: Name = "linear_attn"
    kind: Literal["delta_net"] = "delta_net"

    @property
    def keys_width(self) -> int:
        return self.num_key_heads * self.key_size

    @property
    def values_width(self) -> int:
        return self.num_value_heads * self.value_size

    @property
    def num_channels(self) -> int:
        """Rows of in_proj_qkv: q and k of every key head, v of every value head."""
        return 2 * self.keys_width + self.values_width

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """f32 numbers of the recurrent state."""
        return self.num_value_heads, self.key_size, self.value_size

    @property
    def tensor_shapes(self) -> dict[NetTensor, tuple[int, ...]]:
        """Names of its small tensors under <name>, in execution order."""
        return {
            "conv1d.weight": (self.num_channels, 1, self.conv_kernel_size),
            "A_log": (self.num_value_heads,),
            "dt_bias": (self.num_value_heads,),
            "norm.weight": (self.value_size,),
        }


@dataclass(frozen=True)
class Dense:
    """Gated feed-forward, down(activation(gate(x)) * up(x)): <name>.gate_proj, up_proj,
    down_proj."""

    intermediate_size: Size
    bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"  # gelu by its approximation with tanh
    name: Name = "mlp"
    kind: Literal["dense"] = "dense"


@dataclass(frozen=True)
class Block:
    """x += multiplier * after(body(before(x)))."""

    body: Attention | DeltaNet | Dense
    before: Name | None  # name of an RMSNorm under the layer
    after: Name | None = None
    multiplier: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    blocks: Annotated[tuple[Block, ...], Length(1, 16)]
    scalar: Name | None = None  # name of a tensor [1] that multiplies x after all blocks

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Attention bodies in execution order: each has a KV cache."""
        return tuple(block.body for block in self.blocks if isinstance(block.body, Attention))

    @property
    def delta_nets(self) -> tuple[DeltaNet, ...]:
        """Delta nets in execution order: each has a state."""
        return tuple(block.body for block in self.blocks if isinstance(block.body, DeltaNet))


@dataclass(frozen=True)
class NormStyle:
    """RMSNorm (arXiv 1910.07467)."""

    epsilon: Annotated[float, Between(1e-15, 1), Below(1)]
    rounds_late: bool = False  # the weight is applied in f32, else after rounding to the dtype
    zero_centered: bool = False  # the weight is 1 + what is stored, in f32; only if it rounds late


@dataclass(frozen=True)
class DraftHead:
    """A layer that predicts the token after the next one, from the embedding of the next one and a
    hidden state of the model (docs/format.md).

    mtp: as checkpoints of qwen3_5 have it. eagle: EAGLE and EAGLE-2 (arXiv 2401.15077, 2406.16858),
    without norms around the layer. eagle3: EAGLE-3 (arXiv 2503.01840), see Eagle3.
    """

    layout: Literal["mtp", "eagle", "eagle3"]
    layer: LayerSpec
    norm: NormStyle
    fusion_bias: bool = False


@dataclass(frozen=True)
class Eagle3:
    """Additional fields of an EAGLE-3 head: it reads the model's residual stream in several places,
    its attention takes embedding and hidden state side by side, and it has logits of its own, of
    some of the model's tokens."""

    # Layers before which the stream is read; the number of all layers: behind the last one.
    reads: Annotated[tuple[Annotated[int, Between(0, 10_000)], ...], Length(1, 16)]
    vocab_size: Annotated[int, Between(1, 1 << 24)]  # tokens that it has logits of
    norm_before_residual: bool = False  # its layer adds to the normed hidden state


@dataclass(frozen=True)
class Source:
    """Origin of the checkpoint; `revision` is a commit, never a branch."""

    repository: str
    revision: str = ""
    license: str = ""


@dataclass(frozen=True)
class ScaleBlock:
    """Weights of an FP8 matrix that share one scale; blocks are counted from its first weight."""

    rows: Annotated[int, Between(1, 1 << 24)]
    columns: Size  # a multiple of GROUP_SIZE


@dataclass(frozen=True)
class ModelSpec:
    family: str  # informative: no code depends on it
    dtype: DType
    hidden_size: Size
    vocab_size: Annotated[int, Between(1, 1 << 24)]
    max_positions: Positions
    layers: Annotated[tuple[LayerSpec, ...], Length(1, 10_000)]
    norm: NormStyle
    tie_word_embeddings: bool  # the head is the embedding matrix
    embedding_scale: Positive = 1.0  # multiplies embedding rows
    rounds_embedding_scale: bool = False  # to the dtype, before it multiplies
    logits_divisor: Positive = 1.0
    logits_soft_cap: Positive | None = None  # logits become cap * tanh(logits / cap)
    rope_in_f32: bool = False  # q and k are rotated in f32 and then rounded
    # The artifact has its weights, which are in no pass of the model's own.
    draft_head: DraftHead | None = None
    eagle3: Eagle3 | None = None  # of a draft head of this layout
    eos_token_ids: tuple[int, ...] = ()
    quantized: bool = True  # False: no matrix has a substitute, all of them are always resident
    # Matrices that the checkpoint has in FP8, by name. All others, and what is computed: `dtype`.
    fp8: dict[str, ScaleBlock] = field(default_factory=dict)
    source: Source = field(default_factory=lambda: Source(""))

    def __hash__(self) -> int:
        """A cheap hash, because cached results are looked up by model often."""
        return hash((self.family, self.hidden_size, self.vocab_size, len(self.layers)))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """All attentions in execution order, as caches number them."""
        return tuple(one for layer in self.layers for one in layer.attentions)

    @cached_property
    def attentions_by_window(self) -> dict[int | None, int]:
        """Window -> number of attentions; None: without a window."""
        return dict(Counter(one.window for one in self.attentions))

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Distinct window sizes."""
        return tuple(one for one in self.attentions_by_window if one is not None)

    @cached_property
    def ropes(self) -> tuple[Rope, ...]:
        """Distinct rotary embeddings: each needs a table of cosines and sines."""
        head = (self.draft_head.layer,) if self.draft_head else ()
        layers = (*self.layers, *head)
        found = (one.rope for layer in layers for one in layer.attentions if one.rope)
        return tuple(dict.fromkeys(found))

    @cached_property
    def mixers_before(self) -> tuple[tuple[int, int], ...]:
        """Numbers of attentions and delta nets before each layer: their first indices in caches."""
        found, attentions, nets = list[tuple[int, int]](), 0, 0
        for layer in self.layers:
            found.append((attentions, nets))
            attentions += len(layer.attentions)
            nets += len(layer.delta_nets)
        return tuple(found)

    @cached_property
    def delta_nets(self) -> tuple[DeltaNet, ...]:
        """Delta nets of all layers, in execution order."""
        return tuple(net for layer in self.layers for net in layer.delta_nets)

    @cached_property
    def bodies(self) -> tuple[Attention | DeltaNet | Dense, ...]:
        """Distinct attentions, delta nets and feed-forwards."""
        return tuple(dict.fromkeys(block.body for layer in self.layers for block in layer.blocks))

    @cached_property
    def linears(self) -> tuple["Linear", ...]:
        """Every matrix product of a forward pass in execution order, the head last."""
        found = []
        for index, layer in enumerate(self.layers):
            for place, (name, (shape, exact)) in enumerate(_linear_shapes(self, layer).items()):
                full = f"{layer_name(index)}.{name}"
                own = self.fp8.get(full)
                stays = exact or not self.quantized
                found.append(Linear(full, index, place, *shape, stays_exact=stays, fp8=own))
        padding = -self.vocab_size % PART_ROWS
        rows = self.vocab_size + padding
        found.append(
            Linear(
                HEAD,
                self.num_layers,
                0,
                rows,
                self.hidden_size,
                False,
                padding,
                stays_exact=not self.quantized,
                fp8=self.fp8.get(HEAD),
            )
        )
        return tuple(found)

    @cached_property
    def parts(self) -> tuple["Part", ...]:
        """Every exact weight that can be streamed, in execution order. Matrices without a
        substitute are not among them: the draft uses them as they are, so they are resident."""
        return tuple(
            part
            for linear in self.linears
            if linear.has_substitute
            for part in _parts(self, linear)
        )

    @cached_property
    def norm_sizes(self) -> dict[str, int]:
        """Name -> length of every RMSNorm weight, in execution order."""
        found = dict[str, int]()
        for index, layer in enumerate(self.layers):
            for block in layer.blocks:
                found |= {
                    f"{layer_name(index)}.{k}": n for k, n in _norm_sizes(self, block).items()
                }
        found[FINAL_NORM] = self.hidden_size
        return found

    @cached_property
    def scalar_names(self) -> tuple[str | None, ...]:
        """By layer, the name of the tensor [1] that multiplies its output; None: none does."""
        return tuple(
            f"{layer_name(index)}.{layer.scalar}" if layer.scalar else None
            for index, layer in enumerate(self.layers)
        )

    @cached_property
    def resident_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of the exact weights that are always resident: norms, biases,
        matrices without a substitute, small tensors of delta nets, and the layers' scalars."""
        found = dict[str, tuple[int, ...]]()
        for linear in self.linears:
            if linear.has_bias:
                found[f"{linear.name}.bias"] = (linear.out_features,)
            if not linear.has_substitute:
                found[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
        found |= {f"{name}.weight": (size,) for name, size in self.norm_sizes.items()}
        found |= {name: shape for name, (shape, _) in self.net_tensors.items()}
        return found | {name: (1,) for name in self.scalar_names if name}

    @cached_property
    def net_tensors(self) -> dict[str, tuple[tuple[int, ...], DType]]:
        """Tensor name -> shape and dtype of the small tensors of delta nets."""
        return {
            f"{layer_name(index)}.{net.name}.{name}": (
                shape,
                "float32" if name in net.f32_tensors else self.dtype,
            )
            for index, layer in enumerate(self.layers)
            for net in layer.delta_nets
            for name, shape in net.tensor_shapes.items()
        }

    def resident_dtype(self, name: str) -> DType:
        """Dtype of a tensor of `resident_shapes`."""
        return self.net_tensors[name][1] if name in self.net_tensors else self.dtype

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Size of each tensor of `resident_shapes`."""
        return {
            name: math.prod(shape) * DTYPE_BYTES[self.resident_dtype(name)]
            for name, shape in self.resident_shapes.items()
        }

    @cached_property
    def draft_head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of the draft head's tensors."""
        if self.draft_head is None:
            return {}
        head, hidden = self.draft_head, self.hidden_size
        found: dict[str, tuple[int, ...]] = {}
        if head.layout == "mtp":
            found |= {f"{name}.weight": (hidden,) for name in FUSED_NORMS}
        fused = len(self.eagle3.reads) if self.eagle3 else 2
        found[f"{FUSION}.weight"] = hidden, fused * hidden
        if head.fusion_bias:
            found[f"{FUSION}.bias"] = (hidden,)
        wide = 2 if self.eagle3 else 1
        shapes = _linear_shapes(self, head.layer, attention_inputs=wide * hidden)
        for name, ((rows, columns, bias), _) in shapes.items():
            found[f"{HEAD_LAYER}.{name}.weight"] = rows, columns
            if bias:
                found[f"{HEAD_LAYER}.{name}.bias"] = (rows,)
        for block in head.layer.blocks:
            sizes = _norm_sizes(self, block)
            found |= {f"{HEAD_LAYER}.{name}.weight": (size,) for name, size in sizes.items()}
        if self.eagle3:
            found[f"{HIDDEN_NORM}.weight"] = (hidden,)
        if head.layout != "eagle":
            found[f"{HEAD_NORM}.weight"] = (hidden,)
        if self.eagle3:
            found[f"{HEAD}.weight"] = self.eagle3.vocab_size, hidden
            if self.eagle3.vocab_size < self.vocab_size:  # int64: whose logits they are
                found[TOKEN_IDS] = (self.eagle3.vocab_size,)
        return found

    @cached_property
    def scale_shapes(self) -> dict[str, tuple[int, int]]:
        """Tensor name -> shape of the f32 scales of FP8 matrices, in execution order; they are
        always resident."""
        return {f"{one.name}.fp8_scale": one.scale_shape for one in self.linears if one.fp8}

    @property
    def embedding_bytes(self) -> int:
        """Size of the embedding matrix, which is in slow memory."""
        return self.vocab_size * self.hidden_size * self.item_bytes


@dataclass(frozen=True)
class Linear:
    """One matrix of y = x W^T + b, W [out_features, in_features]."""

    name: str
    layer: int  # num_layers for the head
    place: int  # index in its layer, in execution order
    out_features: int
    in_features: int
    has_bias: bool
    padding_rows: int = 0  # zero rows of a head, up to a multiple of PART_ROWS
    # True without quantization; also for small matrices whose errors would accumulate over a text.
    stays_exact: bool = False
    fp8: ScaleBlock | None = None  # None: the checkpoint has it in the model's dtype

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the f32 scales of an FP8 matrix."""
        assert self.fp8 is not None
        rows, columns = self.fp8.rows, self.fp8.columns
        return -(-self.out_features // rows), -(-self.in_features // columns)

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def has_substitute(self) -> bool:
        """True if there is a 4-bit copy, that is, if format and kernels support the shape.
        Otherwise the exact matrix is resident, and draft and verification share it."""
        fits = self.in_features % GROUP_SIZE == 0 and self.out_features % 16 == 0
        return fits and not self.stays_exact

    @property
    def can_be_fp8(self) -> bool:
        """True if the two FP8 encodings support this shape. Otherwise an FP8 matrix of a checkpoint
        is dequantized while an artifact is built."""
        return self.has_substitute and self.out_features % PART_ROWS == 0 and not self.padding_rows


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one Linear: the unit that is placed in fast memory or streamed."""

    linear: Linear
    first_row: int
    num_rows: int
    num_bytes: int  # of the exact weights, as they are multiplied; without padding

    @property
    def name(self) -> str:
        if self.num_rows == self.linear.out_features:
            return self.linear.name
        return f"{self.linear.name}[{self.first_row}:{self.first_row + self.num_rows}]"

    @property
    def padded_bytes(self) -> int:
        return padded(self.num_bytes)

    @property
    def num_weights(self) -> int:
        return self.num_rows * self.linear.in_features

    @property
    def plain_encoding(self) -> Encoding:
        """The encoding of this part without a residual."""
        return "fp8" if self.linear.fp8 else "raw"

    @property
    def residual_encoding(self) -> Encoding:
        return "fp8-residual" if self.linear.fp8 else "residual"

    @property
    def plain_bytes(self) -> int:
        """Size as the checkpoint has it, without padding."""
        return self.num_weights if self.linear.fp8 else self.num_bytes

    @property
    def can_be_residual(self) -> bool:
        """Residuals need whole tiles of rows (residual.py), and so do packed codes (linear.py)."""
        return self.linear.out_features % PART_ROWS == 0


@dataclass(frozen=True)
class StoredPart:
    """A Part as it is stored in exact.safetensors and streamed."""

    part: Part
    encoding: Encoding
    num_bytes: int  # without padding

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def padded_bytes(self) -> int:
        return padded(self.num_bytes)

    @property
    def is_residual(self) -> bool:
        return self.encoding in RESIDUALS


def layer_name(index: int) -> str:
    return f"model.layers.{index}"


def padded(num_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _linear_shapes(
    spec: ModelSpec, layer: LayerSpec, attention_inputs: int | None = None
) -> dict[str, tuple[tuple[int, int, bool], bool]]:
    """Name under the layer -> (out features, in features, has a bias), and whether it stays exact;
    in execution order. attention_inputs: features that q, k and v are made of; None: the hidden
    size."""
    found = dict[str, tuple[tuple[int, int, bool], bool]]()
    hidden = spec.hidden_size
    attended = attention_inputs or hidden

    def add(name: str, rows: int, columns: int, bias: bool, exact: bool = False) -> None:
        found[f"{body.name}.{name}"] = (rows, columns, bias), exact

    for block in layer.blocks:
        body = block.body
        if isinstance(body, Attention):
            add("q_proj", body.query_size * (2 if body.output_gate else 1), attended, body.qkv_bias)
            add("k_proj", body.kv_size, attended, body.qkv_bias)
            if not body.values_are_keys:
                add("v_proj", body.kv_size, attended, body.qkv_bias)
            add("o_proj", hidden, body.query_size, body.output_bias)
        elif isinstance(body, DeltaNet):
            add("in_proj_qkv", body.num_channels, hidden, False)
            add("in_proj_z", body.values_width, hidden, False)
            add("in_proj_b", body.num_value_heads, hidden, False, exact=True)
            add("in_proj_a", body.num_value_heads, hidden, False, exact=True)
            add("out_proj", hidden, body.values_width, False)
        else:
            add("gate_proj", body.intermediate_size, hidden, body.bias)
            add("up_proj", body.intermediate_size, hidden, body.bias)
            add("down_proj", hidden, body.intermediate_size, body.bias)
    return found


def _norm_sizes(spec: ModelSpec, block: Block) -> dict[str, int]:
    """Name under the layer -> length, in execution order."""
    found = {block.before: spec.hidden_size} if block.before else {}
    body = block.body
    if isinstance(body, Attention) and body.qk_norm != "none":
        whole = body.qk_norm == "all_heads"
        found[f"{body.name}.q_norm"] = body.query_size if whole else body.head_size
        found[f"{body.name}.k_norm"] = body.kv_size if whole else body.head_size
    return found | ({block.after: spec.hidden_size} if block.after else {})


def _parts(spec: ModelSpec, linear: Linear) -> list[Part]:
    row_bytes = linear.in_features * spec.item_bytes
    most = PART_BYTES
    if linear.name == HEAD:  # needs no more staging than the layers: a vocabulary may dwarf them
        largest = max(one.num_weights for one in spec.linears[:-1]) * spec.item_bytes
        most = min(most, max(largest, SMALL_PART_BYTES))
    num_parts = math.ceil(linear.out_features * row_bytes / most)
    rows = math.ceil(linear.out_features / num_parts / PART_ROWS) * PART_ROWS
    found = []
    for first in range(0, linear.out_features, rows):
        num_rows = min(rows, linear.out_features - first)
        found.append(Part(linear, first, num_rows, num_rows * row_bytes))
    return found
