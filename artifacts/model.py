"""ModelSpec: a decoder as the planner and the runtime both see it, without a checkpoint.

Tensor names are the checkpoint's own (`model.layers.0.self_attn.q_proj`), less ".weight".
"""

import math
from dataclasses import dataclass, field
from typing import Literal

GROUP_SIZE = 64  # input features that share one scale and zero_point of a substitute
PAGE_BYTES = 4096  # direct reads and slabs are aligned to it
PART_BYTES = 64 << 20  # a larger matrix is stored, placed and streamed in row parts of this size
PART_ROWS = 64  # parts begin at multiples of it; kernels tile rows by 64 at most

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DType = Literal["bfloat16", "float16", "float32"]
Kind = Literal["q", "k", "v", "o", "gate", "up", "down", "head"]
Encoding = Literal["raw", "residual"]  # the checkpoint's bytes, or what the substitute leaves open

LAYER_LINEARS: dict[Kind, str] = {  # in execution order
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. The fields beyond `theta` are used by the kinds named beside them."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


@dataclass(frozen=True)
class Source:
    """Where the checkpoint came from; `revision` is a commit, never a branch."""

    repository: str
    revision: str = ""
    license: str = ""


@dataclass(frozen=True)
class ModelSpec:
    family: Literal["qwen2", "qwen3", "llama", "mistral"]
    dtype: DType
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    norm_epsilon: float
    max_positions: int
    rope: Rope
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # positions a query sees, itself included
    windowed_layers: tuple[int, ...] = ()  # the layers that `sliding_window` holds for
    eos_token_ids: tuple[int, ...] = ()
    source: Source = field(default_factory=lambda: Source(""))

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.item_bytes


@dataclass(frozen=True)
class Linear:
    """One matrix of y = x W^T + b, W [out_features, in_features]."""

    name: str
    kind: Kind
    layer: int  # the head's is num_layers
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def has_substitute(self) -> bool:
        """Whether the 4-bit format and its kernels take this shape; else it stays in fast memory
        as it is, and draft and verification share it."""
        return self.in_features % GROUP_SIZE == 0 and self.out_features % 16 == 0

    @property
    def substitute_bytes(self) -> int:
        """Codes of 4 bits, a 16-bit scale and a 16-bit zero_point for each group."""
        return self.num_weights // 2 + self.num_weights // GROUP_SIZE * 4


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one Linear: the unit that is placed in fast memory or streamed."""

    linear: Linear
    first_row: int
    num_rows: int
    num_bytes: int  # exact weights, without padding

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
    def can_be_residual(self) -> bool:
        """Residuals come in tiles of rows (residual.py) over codes in tiles of rows (linear.py)."""
        return self.linear.out_features % PART_ROWS == 0


@dataclass(frozen=True)
class StoredPart:
    """A Part as it lies in exact.safetensors and crosses the link."""

    part: Part
    encoding: Encoding
    num_bytes: int  # without padding

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def padded_bytes(self) -> int:
        return padded(self.num_bytes)


def padded(num_bytes: int) -> int:
    """Up to the next page."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def linears(spec: ModelSpec) -> list[Linear]:
    """Every matrix product of a forward pass in execution order, the head last."""
    heads, kv_heads = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[Kind, tuple[int, int, bool]] = {
        "q": (heads, hidden, spec.qkv_bias),
        "k": (kv_heads, hidden, spec.qkv_bias),
        "v": (kv_heads, hidden, spec.qkv_bias),
        "o": (hidden, heads, spec.output_bias),
        "gate": (inner, hidden, spec.mlp_bias),
        "up": (inner, hidden, spec.mlp_bias),
        "down": (hidden, inner, spec.mlp_bias),
    }
    found = [
        Linear(f"model.layers.{layer}.{path}", kind, layer, *shapes[kind])
        for layer in range(spec.num_layers)
        for kind, path in LAYER_LINEARS.items()
    ]
    found.append(Linear(HEAD, "head", spec.num_layers, spec.vocab_size, hidden, False))
    return found


def norms(spec: ModelSpec) -> dict[str, int]:
    """Name -> length of every RMSNorm weight, in execution order."""
    found = {}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm"] = spec.hidden_size
        if spec.qk_norm:
            found[f"{prefix}.self_attn.q_norm"] = spec.head_size
            found[f"{prefix}.self_attn.k_norm"] = spec.head_size
        found[f"{prefix}.post_attention_layernorm"] = spec.hidden_size
    found[FINAL_NORM] = spec.hidden_size
    return found


def parts(spec: ModelSpec) -> list[Part]:
    """Every exact weight that can be streamed, in execution order.

    A tied head is the embedding, and a matrix without a substitute is needed by the draft as it
    is: both live in fast memory and are not listed.
    """
    found = []
    for linear in linears(spec):
        if not is_streamable(spec, linear):
            continue
        row_bytes = linear.in_features * spec.item_bytes
        num_parts = math.ceil(linear.out_features * row_bytes / PART_BYTES)
        rows = math.ceil(linear.out_features / num_parts / PART_ROWS) * PART_ROWS
        for first in range(0, linear.out_features, rows):
            num_rows = min(rows, linear.out_features - first)
            found.append(Part(linear, first, num_rows, num_rows * row_bytes))
    return found


def is_streamable(spec: ModelSpec, linear: Linear) -> bool:
    return linear.has_substitute and not (linear.kind == "head" and spec.tied_head)


def resident_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of what is always in fast memory, exact: embedding, norms, biases
    and the matrices that have no substitute."""
    found: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (spec.vocab_size, spec.hidden_size)}
    for linear in linears(spec):
        if linear.has_bias:
            found[f"{linear.name}.bias"] = (linear.out_features,)
        if not linear.has_substitute and not (linear.kind == "head" and spec.tied_head):
            found[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
    for name, length in norms(spec).items():
        found[f"{name}.weight"] = (length,)
    return found
