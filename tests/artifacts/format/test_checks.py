import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.checks import HEAD_FILE, check_headers, check_plan, check_spec
from subspec.artifacts.format.codec import dump_json, load_dataclass
from subspec.artifacts.format.tensors import ITEM_BYTES, write_header
from subspec.artifacts.model import (
    HEAD,
    TOKEN_IDS,
    Attention,
    Block,
    Dense,
    DraftHead,
    Eagle3,
    LayerSpec,
    ModelSpec,
    NormStyle,
    QueryGrowth,
    Rope,
    ScaleBlock,
    StoredPart,
)
from subspec.artifacts.plan import Ledger, Method, Placement, Plan, Tree

Stored = tuple[str, tuple[int, ...]]  # dtype and shape
Header = dict[str, Stored]

ROPE = Rope(10000.0, size=32)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_size=32, scale=0.2, rope=ROPE)
DENSE = Dense(192, bias=True)
SPEC = ModelSpec(
    family="llama",
    dtype="float16",
    hidden_size=128,
    vocab_size=64,
    max_positions=100,
    layers=(
        LayerSpec(
            (Block(ATTENTION, "input_layernorm"), Block(DENSE, "post_attention_layernorm")),
        ),
    ),
    norm=NormStyle(1e-6),
    tie_word_embeddings=True,
)
EAGLE3_HEAD = DraftHead("eagle3", SPEC.layers[0], SPEC.norm)
WITH_EAGLE3 = replace(SPEC, draft_head=EAGLE3_HEAD, eagle3=Eagle3((0, 1), vocab_size=32))
RAW = [StoredPart(part, "raw", part.num_bytes) for part in SPEC.parts]
CODED = [StoredPart(part, "residual", part.num_bytes // 2) for part in SPEC.parts]
MAX_PART = max(part.padded_bytes for part in RAW)
STREAMING = Placement((), (), MAX_PART, 2, Ledger(staging=2 * MAX_PART, cache=1000))
PLAN = Plan(
    device="cpu", machine="test", budget_bytes=2 * MAX_PART + 1000, context=100,
    num_sequences=1, method="substitute", tree=Tree(2, 3), verify_widths=(3, 7),
    prompt_widths=(3, 7), num_threads=1,
    int4_kernel="aten", prefill_chunk_tokens=64, residuals=(), predicted={},
    placements={"substitute": STREAMING, "plain": STREAMING},
    acceptance=Acceptance((Curve(2, 0.0, "code", 2, 10, (10, 9), (6, 3)),), measured=True),
)  # fmt: skip


def refused(where: str, check: Callable[[], None]) -> None:
    start = time.monotonic()
    with pytest.raises(SubspecError) as caught:
        check()
    assert time.monotonic() - start < 30  # no list of a billion layers, whatever the machine
    assert caught.value.exit_code == Exit.CORRUPT
    assert caught.value.message.startswith(where) and len(caught.value.message) < 600


def check_plan_as_read(plan: Plan) -> None:
    """As a reader does: fields against their bounds first, then what goes together."""
    read: Plan = load_dataclass(Plan, json.loads(dump_json(plan)), "plan.json")
    check_plan(SPEC, RAW, read)


def check_spec_as_read(spec: ModelSpec) -> None:
    read: ModelSpec = load_dataclass(ModelSpec, json.loads(dump_json(spec)), "model.json")
    check_spec(read)


def test_a_sane_model_and_a_plan_that_just_fits_pass() -> None:
    check_spec_as_read(SPEC)
    check_spec_as_read(WITH_EAGLE3)
    check_plan_as_read(PLAN)


def in_attention(**changes: Any) -> dict[str, Any]:
    blocks = (replace(SPEC.layers[0].blocks[0], body=replace(ATTENTION, **changes)),)
    return {"layers": (LayerSpec((*blocks, *SPEC.layers[0].blocks[1:])),)}


def in_rope(**changes: Any) -> dict[str, Any]:
    return in_attention(rope=replace(ROPE, **changes))


def in_dense_block(**changes: Any) -> dict[str, Any]:
    first, second = SPEC.layers[0].blocks
    return {"layers": (LayerSpec((first, replace(second, **changes))),)}


def in_eagle3(reads: tuple[int, ...] = (0, 1), vocab_size: int = 32) -> dict[str, Any]:
    return {"draft_head": EAGLE3_HEAD, "eagle3": Eagle3(reads, vocab_size)}


def without_first_norm(layer: LayerSpec) -> LayerSpec:
    return LayerSpec((replace(layer.blocks[0], before=None), *layer.blocks[1:]))


WRONG_MODELS: dict[str, dict[str, Any]] = {
    "a head of EAGLE-3 that is not described": {"draft_head": EAGLE3_HEAD},
    "EAGLE-3 without a head": {"eagle3": Eagle3((0, 1), 32)},
    "EAGLE-3 beside another head": {
        "draft_head": replace(EAGLE3_HEAD, layout="eagle"), "eagle3": Eagle3((0, 1), 32),
    },
    "EAGLE-3 reads nothing": in_eagle3(()),
    "EAGLE-3 reads a lot": in_eagle3(tuple(range(17))),
    "EAGLE-3 reads behind the last layer": in_eagle3((0, 2)),
    "EAGLE-3 reads before the first layer": in_eagle3((-1, 0)),
    "EAGLE-3 reads one layer twice": in_eagle3((1, 1)),
    "EAGLE-3 has no tokens": in_eagle3(vocab_size=0),
    "EAGLE-3 has more tokens than the model": in_eagle3(vocab_size=65),
    "EAGLE-3 without a norm of the embedding": {
        "draft_head": replace(EAGLE3_HEAD, layer=without_first_norm(SPEC.layers[0])),
        "eagle3": Eagle3((0, 1), 32),
    },
    "no layers": {"layers": ()},
    "many layers": {"layers": SPEC.layers * 10_001},
    "a layer without blocks": {"layers": (LayerSpec(()),)},
    "a layer of many blocks": {"layers": (LayerSpec(SPEC.layers[0].blocks * 9),)},
    "a layer without attention": {"layers": (LayerSpec(SPEC.layers[0].blocks[1:]),)},
    "one name for two matrices": {"layers": (LayerSpec(SPEC.layers[0].blocks[:1] * 2),)},
    "one name for two norms": in_dense_block(before="input_layernorm"),
    "a norm with a path for a name": in_dense_block(after="../norm"),
    "a body without a name": in_dense_block(body=replace(DENSE, name="")),
    "no inner size": in_dense_block(body=replace(DENSE, intermediate_size=0)),
    "negative size": {"hidden_size": -64},
    "huge vocabulary": {"vocab_size": 10**12},
    "huge product": {
        "layers": in_dense_block(body=replace(DENSE, intermediate_size=1 << 20))["layers"] * 9999,
        "hidden_size": 1 << 20,
    },
    "heads that do not divide": in_attention(num_heads=3),
    "odd head": in_attention(head_size=31),
    "no scale": in_attention(scale=0.0),
    "window of none": in_attention(window=0),
    "queries that grow at no position": in_attention(query_growth=QueryGrowth(0.1, 0)),
    "epsilon": {"norm": NormStyle(0.0)},
    "norms around zero that round early": {"norm": NormStyle(1e-6, zero_centered=True)},
    "a cap of 0": {"logits_soft_cap": 0.0},
    "a scalar with a path for a name": {
        "layers": (replace(SPEC.layers[0], scalar="../scalar"),),
    },
    "one name for a scalar and a norm": {
        "layers": (replace(SPEC.layers[0], scalar="input_layernorm"),),
    },
    "more pairs than a head has": in_rope(kind="proportional", turning_pairs=17),
    "embedding scale": {"embedding_scale": 0.0},
    "logits divisor": {"logits_divisor": 0.0},
    "theta": in_rope(theta=0.0),
    "factor": in_rope(kind="linear", factor=0.0),
    "a rope larger than its head": in_rope(size=34),
    "a rope of nothing": in_rope(size=0),
    "a rope of odd size": in_rope(size=31),
    "original positions": in_rope(kind="yarn", factor=2.0),
    "betas": in_rope(kind="yarn", original_max_positions=64, beta_slow=0.0),
    "too few divisors": in_rope(kind="longrope", divisors=(1.0,) * 15),
    "a divisor of 0": in_rope(kind="longrope", divisors=(0.0,) * 16),
    "equal frequencies": in_rope(
        kind="llama3", factor=2.0, original_max_positions=64, low_frequency_factor=2.0,
        high_frequency_factor=2.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes", WRONG_MODELS.values(), ids=WRONG_MODELS.keys())
def test_a_model_that_no_checkpoint_describes_is_refused(changes: dict[str, Any]) -> None:
    refused("model.json", lambda: check_spec_as_read(replace(SPEC, **changes)))


def placed(method: str, **changes: Any) -> dict[str, Any]:
    """Another placement of one method."""
    return {"placements": {**PLAN.placements, method: replace(STREAMING, **changes)}}


WRONG_PLANS: dict[str, dict[str, Any]] = {
    "no budget": {"budget_bytes": 0},
    "budget beyond any machine": {"budget_bytes": 1 << 60},
    "ledger over budget": {"budget_bytes": 2 * MAX_PART + 999},
    "negative ledger": placed("plain", ledger=Ledger(cache=-1, guard=2)),
    "unknown part": placed("substitute", resident=("model.layers.9.mlp.up_proj",)),
    "a raw part that is split": placed("substitute", residuals=(RAW[0].name,)),
    "one slot": placed("plain", num_slots=1),
    "a million slots": placed("plain", num_slots=10**6),
    "blocks of half pages": placed("plain", block_bytes=STREAMING.block_bytes + 2048),
    "slots too small": placed("plain", block_bytes=MAX_PART - 1),
    "huge slots": placed("plain", block_bytes=1 << 62),
    "no width": {"tree": Tree(0, 3)},
    "wide tree": {"tree": Tree(10**6, 1), "verify_widths": (10**7,)},
    "negative depth": {"tree": Tree(1, -1)},
    "no temperature": {"tree": Tree(2, 3, temperature=0.0)},
    "a stop below nothing": {"tree": Tree(2, 3, min_path_probability=-0.1)},
    "a stop below everything": {"tree": Tree(2, 3, min_path_probability=1.0)},
    "more nodes than rows": {"verify_widths": (3, 6)},
    "no rows": {"verify_widths": ()},
    "passes of no rows": {"verify_widths": (0, 7)},
    "many rows": {"verify_widths": (7, 4097)},
    "many widths": {"verify_widths": tuple(range(7, 72))},
    "widths that descend": {"verify_widths": (8, 7)},
    "a width twice": {"verify_widths": (7, 7)},
    "context beyond the model": {"context": 101},
    "no context": {"context": 0},
    "no threads": {"num_threads": 0},
    "no prefill": {"prefill_chunk_tokens": 0},
    "a method that has no placement": {"placements": {"plain": STREAMING}},
    "no sequences": {"num_sequences": 0},
    "a million sequences": {"num_sequences": 10**6},
    "nothing accepted or rejected": {"acceptance": Acceptance((), measured=True)},
}


@pytest.mark.parametrize("changes", WRONG_PLANS.values(), ids=WRONG_PLANS.keys())
def test_a_plan_that_does_not_go_together_is_refused(changes: dict[str, Any]) -> None:
    refused("plan.json", lambda: check_plan_as_read(replace(PLAN, **changes)))


def counted(**changes: Any) -> tuple[Curve, ...]:
    """A curve of 9 trees with two levels, but for the changes."""
    return (replace(Curve(2, 0.3, "", 2, 9, (9, 6), (5, 2)), **changes),)


def at_thresholds(count: int) -> tuple[Curve, ...]:
    return tuple(curve for n in range(count) for curve in counted(min_path_probability=n / count))


WRONG_COUNTS: dict[str, tuple[Curve, ...]] = {
    "more levels than any tree has": counted(drafted=(1,) * 1025, accepted=(1,) * 1025),
    "a level without its other count": counted(accepted=(5,)),
    "a level without a draft": counted(drafted=(9,)),
    "more accepted than drafted": counted(accepted=(5, 7), drafted=(9, 6)),
    "more drafted than trees": counted(drafted=(10, 6)),
    "more drafted than one level before": counted(drafted=(5, 6), accepted=(5, 2)),
    "more accepted than one level before": counted(accepted=(2, 3)),
    "fewer than none": counted(accepted=(5, -1)),
    "fewer drafts than none": counted(drafted=(9, -1), accepted=(5, -2)),
    "no tree": counted(num_trees=0, drafted=(), accepted=()),
    "fewer trees than none": counted(num_trees=-1),
    "fewer answers than none": counted(num_answers=-1),
    "a tree of width 0": counted(width=0),
    "a tree wider than any": counted(width=257),
    "a threshold below nothing": counted(min_path_probability=-0.1),
    "a threshold that everything is below": counted(min_path_probability=1.0),
    "a margin below nothing": counted(margin=-0.1),
    "a margin beyond any tree": counted(margin=1e10),
    "widths that descend": counted(width=3) + counted(width=1),
    "thresholds that descend": counted() + counted(min_path_probability=0.2),
    "more thresholds than a search has time for": at_thresholds(65),
}


@pytest.mark.parametrize("curves", WRONG_COUNTS.values(), ids=WRONG_COUNTS.keys())
def test_counts_that_no_trees_have_are_refused(curves: tuple[Curve, ...]) -> None:
    plan = replace(PLAN, acceptance=Acceptance(curves, measured=True))
    refused("plan.json", lambda: check_plan_as_read(plan))


def test_a_plan_whose_drafts_end_early_passes() -> None:
    for min_path_probability in (0.0, 0.15, 0.9999):
        tree = Tree(2, 3, 0.2, min_path_probability)
        check_plan_as_read(replace(PLAN, tree=tree))


def test_curves_of_several_thresholds_and_kinds_may_have_one_width() -> None:
    curves = (
        Curve(1, 0.0, "b", 1, 9, (9, 9, 9), (5, 0, 0)),
        Curve(1, 0.0, "a", 1, 9, (9, 9), (9, 9), 2.5),
        Curve(1, 0.25, "b", 1, 12, (12, 5, 0), (6, 5, 0)),
        Curve(3, 0.0, "", 0, 1, (), ()),
    )
    for some in (curves, at_thresholds(64)):
        check_plan_as_read(replace(PLAN, acceptance=Acceptance(some, measured=True)))


def test_a_plan_that_streams_nothing_needs_no_slots_and_no_ledger() -> None:
    everything = Placement(tuple(part.name for part in RAW), (), 0, 0, Ledger())
    check_plan(SPEC, RAW, replace(PLAN, placements={**PLAN.placements, "plain": everything}))


def test_what_is_multiplied_out_is_resident_fp8() -> None:
    fp8 = {one.name: ScaleBlock(64, 64) for one in SPEC.linears[:-1]}
    spec = replace(SPEC, dtype="bfloat16", fp8=fp8)
    stored = [StoredPart(part, part.plain_encoding, part.plain_bytes) for part in spec.parts]
    everything = tuple(part.name for part in stored)

    def check(resident: tuple[str, ...], wide: tuple[str, ...]) -> None:
        own = replace(STREAMING, resident=resident, dequantized=wide)
        both: dict[Method, Placement] = {"substitute": own, "plain": own}
        check_plan(spec, stored, replace(PLAN, placements=both))

    check(everything, everything[:3])
    for resident, wide in ((everything[1:], everything[:1]), (everything, (HEAD,)), ((), ("x",))):
        refused("plan.json", lambda a=resident, b=wide: check(a, b))


def test_residuals_are_decoded_over_substitutes_in_memory() -> None:
    refused("plan.json", lambda: check_plan(SPEC, CODED, PLAN))
    ledger = Ledger(substitutes=1, staging=2 * MAX_PART)
    with_them = replace(STREAMING, ledger=ledger)
    some_stay = replace(with_them, residuals=(CODED[0].name,))
    loaded = replace(STREAMING, resident=tuple(part.name for part in CODED))  # decoded by then
    for placement in (with_them, some_stay, loaded):
        both: dict[Method, Placement] = {"substitute": placement, "plain": placement}
        check_plan(SPEC, CODED, replace(PLAN, placements=both))


def headers() -> dict[str, Header]:
    """By file, as they should be."""
    substitutes: Header = {}
    for linear in SPEC.linears:
        rows, groups = linear.out_features, linear.in_features // 64
        substitutes[f"{linear.name}.codes"] = ("U8", (rows, linear.in_features // 2))
        substitutes[f"{linear.name}.qparams"] = ("BF16", (groups, rows, 2))
    resident = {name: ("F16", shape) for name, shape in SPEC.resident_shapes.items()}
    return {
        "substitutes.safetensors": substitutes,
        "resident.safetensors": resident,
        "embedding.safetensors": {"model.embed_tokens.weight": ("F16", (64, 128))},
    }


def write(folder: Path, files: dict[str, Header]) -> None:
    for name, tensors in files.items():
        with open(folder / name, "wb") as file:
            listed = [(tensor, *rest) for tensor, rest in tensors.items()]
            offset = write_header(file, listed)
            sizes = [ITEM_BYTES[dtype] * math.prod(shape) for _, dtype, shape in listed]
            file.truncate(offset + sum(sizes))


def test_headers_that_hold_the_model_pass_with_more_beside_it(tmp_path: Path) -> None:
    files = headers()
    files["resident.safetensors"]["another"] = ("F32", (3,))
    write(tmp_path, files)
    check_headers(tmp_path, SPEC)


@pytest.mark.parametrize("wrong", [None, ("BF16", (64, 128)), ("F16", (128, 64)), ("F16", (64,))])
def test_an_embedding_of_another_dtype_or_shape_is_refused(
    tmp_path: Path, wrong: Stored | None
) -> None:
    files = headers()
    del files["embedding.safetensors"]["model.embed_tokens.weight"]
    if wrong is not None:
        files["embedding.safetensors"]["model.embed_tokens.weight"] = wrong
    write(tmp_path, files)
    refused("embedding.safetensors", lambda: check_headers(tmp_path, SPEC))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.bias"])
@pytest.mark.parametrize("wrong", [None, ("BF16", (128,)), ("F16", (129,)), ("F16", (1, 128))])
def test_a_resident_tensor_of_another_dtype_or_shape_is_refused(
    tmp_path: Path, wrong: Stored | None, name: str
) -> None:
    files = headers()
    del files["resident.safetensors"][name]
    if wrong is not None:
        files["resident.safetensors"][name] = wrong
    write(tmp_path, files)
    refused("resident.safetensors", lambda: check_headers(tmp_path, SPEC))


EAGLE3_SHAPES = {
    "fc.weight": (128, 256), "layers.0.self_attn.q_proj.weight": (128, 256),
    "layers.0.self_attn.k_proj.weight": (64, 256), "layers.0.self_attn.v_proj.weight": (64, 256),
    "layers.0.self_attn.o_proj.weight": (128, 128), "layers.0.mlp.gate_proj.weight": (192, 128),
    "layers.0.mlp.gate_proj.bias": (192,), "layers.0.mlp.up_proj.weight": (192, 128),
    "layers.0.mlp.up_proj.bias": (192,), "layers.0.mlp.down_proj.weight": (128, 192),
    "layers.0.mlp.down_proj.bias": (128,), "layers.0.input_layernorm.weight": (128,),
    "layers.0.post_attention_layernorm.weight": (128,), "layers.0.hidden_norm.weight": (128,),
    "norm.weight": (128,), "lm_head.weight": (32, 128), "token_ids": (32,),
}  # fmt: skip


def test_a_head_of_eagle_3_is_these_tensors_and_no_others_pass(tmp_path: Path) -> None:
    assert list(WITH_EAGLE3.draft_head_shapes.items()) == list(EAGLE3_SHAPES.items())
    head: Header = {name: ("F16", shape) for name, shape in EAGLE3_SHAPES.items()}
    head[TOKEN_IDS] = ("I64", (32,))
    write(tmp_path, {**headers(), HEAD_FILE: head})
    check_headers(tmp_path, WITH_EAGLE3)
    for name, (_, shape) in head.items():
        for wrong in (("F32", shape), ("F16", (*shape, 1))):
            write(tmp_path, {HEAD_FILE: {**head, name: wrong}})
            refused(HEAD_FILE, lambda: check_headers(tmp_path, WITH_EAGLE3))
    whole = replace(WITH_EAGLE3, eagle3=Eagle3((0, 1), SPEC.vocab_size))
    assert TOKEN_IDS not in whole.draft_head_shapes


@pytest.mark.parametrize("suffix", ["codes", "qparams"])
@pytest.mark.parametrize(
    "wrong", [None, ("BF16", (128, 2, 2)), ("U8", (128, 2)), ("F16", (2, 128, 2))]
)
def test_a_substitute_of_another_dtype_or_shape_is_refused(
    tmp_path: Path, suffix: str, wrong: Stored | None
) -> None:
    files = headers()
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    del files["substitutes.safetensors"][name]
    if wrong is not None:
        files["substitutes.safetensors"][name] = wrong
    write(tmp_path, files)
    refused("substitutes.safetensors", lambda: check_headers(tmp_path, SPEC))
