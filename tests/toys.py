"""A model and a machine small enough to check a plan by hand; no torch, no files."""

from dataclasses import replace
from typing import Any

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.model import (
    Attention,
    Block,
    DeltaNet,
    Dense,
    LayerSpec,
    ModelSpec,
    NormStyle,
    Rope,
    ScaleBlock,
    Source,
)
from subspec.artifacts.profile import LinkRate, Profile, Timing


def make_curve(
    width: int,
    rate: float,
    kind: str = "code",
    min_path_probability: float = 0.0,
    lasts: float = 1.0,
    margin: float = 0.1,
) -> Curve:
    """64 levels, each accepted as often as any other. lasts: the share of the trees that go on
    after a level, of those that have it."""
    levels, trees = range(64), 10_000
    drafted = [round(trees * lasts**level) for level in levels]
    accepted = [min(round(trees * rate ** (n + 1)), drafted[n]) for n in levels]
    return Curve(
        width, min_path_probability, kind, 5, trees, tuple(drafted), tuple(accepted), margin
    )


# Most levels are accepted, as often deep in a tree as at its root.
ACCEPTANCE = Acceptance((make_curve(1, 0.8), make_curve(3, 0.9)), measured=True)


def make_spec(
    num_layers: int = 8,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    intermediate_size: int = 512,
    qkv_bias: bool = True,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    rope: Rope | None = None,
    window: int | None = None,
    windowed_layers: tuple[int, ...] = (),
    **changes: Any,
) -> ModelSpec:
    """8 layers of 1 MB, 11 MB in all, bf16; every layer as Llama's are."""
    rope = replace(rope or Rope(10_000.0, 0), size=head_size)
    dense = Block(Dense(intermediate_size, mlp_bias), "post_attention_layernorm")
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        rope=rope,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm="head" if qk_norm else "none",
    )

    def layer(index: int) -> LayerSpec:
        own = replace(attention, window=window if index in windowed_layers else None)
        return LayerSpec((Block(own, "input_layernorm"), dense))

    spec = ModelSpec(
        family="toy",
        dtype="bfloat16",
        hidden_size=256,
        vocab_size=2048,
        max_positions=4096,
        layers=tuple(layer(index) for index in range(num_layers)),
        norm=NormStyle(1e-6),
        tie_word_embeddings=False,
        source=Source("org/toy", "0" * 40, "apache-2.0"),
    )
    return replace(spec, **changes)


def make_hybrid_spec(**changes: Any) -> ModelSpec:
    """The first layer is a gated delta net."""
    spec = make_spec(**changes)
    mixes, dense = spec.layers[0].blocks
    first = LayerSpec((replace(mixes, body=DeltaNet(2, 4, 32, 32, 4)), dense))
    return replace(spec, layers=(first, *spec.layers[1:]))


def make_fp8_spec(**changes: Any) -> ModelSpec:
    """The matrices of all layers in FP8, the head in bf16."""
    spec = make_spec(**changes)
    return replace(spec, fp8={one.name: ScaleBlock(64, 64) for one in spec.linears[:-1]})


def make_profile(**changes: Any) -> Profile:
    """A slow link, on which speculation pays well; no decoder for residuals."""
    profile = Profile(
        device="cpu",
        machine="cpu: a toy, 2 threads",
        num_threads=2,
        free_bytes=1 << 33,
        pinnable_bytes=0,
        overhead_bytes=0,
        link=(LinkRate(64 << 10, 50e6), LinkRate(1 << 20, 100e6)),
        contended_link=0.8,
        contended_compute=0.9,
        digest_bytes_per_second=1e9,
        exact_layer=(Timing(1, 1e-4, 1.5e-4), Timing(8, 2e-4, 3e-4), Timing(64, 8e-4, 9e-4)),
        fast_layer=(Timing(1, 8e-5), Timing(128, 1.28e-3)),
        draft_layer=(Timing(1, 5e-5, 6e-5), Timing(8, 2e-4, 3e-4)),
        exact_attention=(Timing(1, 1e-5), Timing(64, 2e-4)),
        fast_attention=(Timing(1, 1e-5), Timing(64, 1e-4)),
        draft_attention=(Timing(1, 1e-5), Timing(64, 1e-4)),
        exact_head=(Timing(1, 1e-4, 1e-4), Timing(64, 4e-4, 5e-4)),
        draft_head=(Timing(1, 5e-5, 5e-5), Timing(8, 1e-4, 1e-4)),
        round_overhead_seconds=1e-4,
        int4_kernel="aten",
        batch_invariant_widths=((8, 16, 32, 64),),
        residual_weights_per_second=0.0,
    )
    return replace(profile, **changes)
