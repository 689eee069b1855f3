"""The forward pass that a ModelSpec describes, in plain torch: the twin of the fast one.

T tokens, H hidden, D head size, V vocabulary
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.model import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Attention,
    Block,
    DeltaNet,
    Dense,
    ModelSpec,
    Rope,
    layer_name,
)

Weights = Callable[[str], Tensor]  # "model.norm.weight" -> the tensor


def logits_of(spec: ModelSpec, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [T] -> [T, V]"""
    x = F.embedding(tokens, weights(f"{EMBEDDING}.weight"))
    scale = torch.tensor(spec.embedding_scale)
    x = x * (scale.to(x.dtype) if spec.rounds_embedding_scale else scale)
    for index, layer in enumerate(spec.layers):
        for block in layer.blocks:
            x = x + _block(spec, block, weights, layer_name(index), x)
        if layer.scalar:
            x = x * weights(f"{layer_name(index)}.{layer.scalar}")
    x = _norm(spec, x, weights(f"{FINAL_NORM}.weight"))
    logits = F.linear(x, weights(f"{HEAD}.weight")) / spec.logits_divisor
    cap = spec.logits_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _block(spec: ModelSpec, block: Block, weights: Weights, layer: str, x: Tensor) -> Tensor:
    def norm(name: str | None, x: Tensor) -> Tensor:
        return x if name is None else _norm(spec, x, weights(f"{layer}.{name}.weight"))

    def linear(name: str, x: Tensor, has_bias: bool) -> Tensor:
        bias = weights(f"{layer}.{name}.bias") if has_bias else None
        return F.linear(x, weights(f"{layer}.{name}.weight"), bias)

    body, normed = block.body, norm(block.before, x)
    if isinstance(body, Dense):
        gate = linear(f"{body.name}.gate_proj", normed, body.bias)
        gate = F.silu(gate) if body.activation == "silu" else F.gelu(gate, approximate="tanh")
        up = linear(f"{body.name}.up_proj", normed, body.bias)
        out = linear(f"{body.name}.down_proj", gate * up, body.bias)
    elif isinstance(body, DeltaNet):
        out = _recur(spec, body, lambda name: weights(f"{layer}.{body.name}.{name}"), normed)
    else:
        names = "qkk" if body.values_are_keys else "qkv"
        q, k, v = (linear(f"{body.name}.{n}_proj", normed, body.qkv_bias) for n in names)
        gate = None
        if body.output_gate:
            both = q.unflatten(1, (body.num_heads, 2 * body.head_size))
            q, gate = (some.flatten(1) for some in both.split(body.head_size, -1))
        if body.qk_norm == "all_heads":
            q, k = norm(f"{body.name}.q_norm", q), norm(f"{body.name}.k_norm", k)
        q, k, v = (some.unflatten(1, (-1, body.head_size)) for some in (q, k, v))
        if body.qk_norm == "head":
            q, k = norm(f"{body.name}.q_norm", q), norm(f"{body.name}.k_norm", k)
        if body.value_norm:
            v = _norm(spec, v, None)
        mixed = _attend(body, *(some.transpose(0, 1) for some in (q, k, v)))
        mixed = mixed.transpose(0, 1).flatten(1)
        if gate is not None:
            mixed = mixed * torch.sigmoid(gate)
        out = linear(f"{body.name}.o_proj", mixed, body.output_bias)
    return norm(block.after, out) * block.multiplier


def _recur(spec: ModelSpec, net: DeltaNet, weights: Weights, x: Tensor) -> Tensor:
    """The gated delta rule, token after token. x [T, H] -> [T, H]"""
    qkv, z, b, a = (
        F.linear(x, weights(f"in_proj_{name}.weight")) for name in ("qkv", "z", "b", "a")
    )
    taps, channels = net.conv_kernel_size, net.num_channels
    padded = F.pad(qkv.t(), (taps - 1, 0))[None]
    qkv = F.silu(F.conv1d(padded, weights("conv1d.weight"), groups=channels))[0].t()
    q, k, v = qkv.split((net.keys_width, net.keys_width, net.values_width), 1)
    repeats = net.num_value_heads // net.num_key_heads
    q, k = (some.unflatten(1, (net.num_key_heads, -1)) for some in (q, k))
    q, k = (some * torch.rsqrt(some.square().sum(-1, keepdim=True) + 1e-6) for some in (q, k))
    q, k = (some.repeat_interleave(repeats, 1) for some in (q / math.sqrt(net.key_size), k))
    v, beta = v.unflatten(1, (net.num_value_heads, -1)), torch.sigmoid(b)
    decay = torch.exp(-torch.exp(weights("A_log")) * F.softplus(a + weights("dt_bias")))
    memory, out = torch.zeros(net.memory_shape), []
    for t in range(len(x)):
        memory = memory * decay[t][:, None, None]
        change = beta[t][:, None] * (v[t] - torch.einsum("jef,je->jf", memory, k[t]))
        memory = memory + torch.einsum("je,jf->jef", k[t], change)
        out.append(torch.einsum("jef,je->jf", memory, q[t]))
    mixed = torch.stack(out)
    mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + spec.norm.epsilon)
    mixed = (mixed * weights("norm.weight")).flatten(1) * F.silu(z)
    return F.linear(mixed, weights("out_proj.weight"))


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[heads, T, D] each"""
    positions = torch.arange(q.shape[1])
    if attention.rope is not None:
        q, k = (_rotate(some, attention.rope, positions) for some in (q, k))
    growth = attention.query_growth
    if growth is not None:
        steps = torch.floor(positions / growth.positions)
        q = q * (1 + growth.beta * torch.log(1 + steps))[:, None]
    repeats = attention.num_heads // attention.num_kv_heads
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    distance = positions[:, None] - positions
    hidden = distance < 0
    if attention.window is not None:
        hidden |= distance >= attention.window
    scores = q @ k.transpose(1, 2) * attention.scale
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def _rotate(x: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    angles = positions.float()[:, None] * frequencies(rope)  # [T, size / 2]
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    turned, passed = x[..., : rope.size], x[..., rope.size :]
    first, second = turned.chunk(2, -1)
    if rope.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if rope.interleaved else torch.cat(pair, -1)
    return torch.cat((turned, passed), -1)


def frequencies(rope: Rope) -> Tensor:
    """f32 [size / 2]"""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.size, 2).float() / rope.size)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "longrope":
        return plain / torch.tensor(rope.divisors)
    if rope.kind == "proportional":
        plain[rope.turning_pairs :] = 0
        return plain / rope.factor
    original = rope.original_max_positions
    if rope.kind == "llama3":
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        turns = original * plain / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * plain / rope.factor + smooth * plain

    def dimension(turns: float) -> float:
        return rope.size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.size - 1)
    ramp = ((torch.arange(rope.size // 2) - first) / (last - first or 0.001)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _norm(spec: ModelSpec, x: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.norm.epsilon)
    if weight is None:
        return normed.to(x.dtype)
    return (normed * (weight.float() + spec.norm.zero_centered)).to(x.dtype)
