"""Widen a small checkpoint to any size without changing its function: a large model to benchmark.

    python benchmarks/widen.py --hidden 2048 --layers 24 --out DIR

It has the bytes, time and memory of a model of that size, with no download. It is not a real model
of that size: draft acceptance measured on it says nothing about one. Its config says so too.

The algebra (Net2Net). Entry j of a wide dimension copies entry m(j) of the source's.
  Columns  W'[r, j] = f[r, j] W[m(r), m(j)], with random f > 0 that sum to 1 over the copies of a
           column, drawn anew for every row: no two rows or columns are equal.
  Hidden   The residual stream is x'[j] = c[j] x[m(j)]: c multiplies the embedding's columns and
           the rows of o_proj and down_proj. The sum of c^2 over the copies is N/H for every source
           channel, so mean(x'^2) = mean(x^2) for every x, and each RMSNorm divides by the source's
           number. Its weight becomes w/c: what it puts out are plain copies.
  Head     Untied, it is one more set of columns. Tied to the embedding, the logits are
           sum_j c[j]^2 E[v, m(j)] w'[j] x/rms, so the final norm's weight is w' = w H/N.
  Heads    Each query head reads a copy of the kv head that its own source reads. Delta nets have
           whole copies of their heads, each with channels, decay and state of its own.
  Layers   An extra layer is a widened copy of the real one before it, but o_proj, out_proj and
           down_proj share columns out as +1/2 and -1/2: real work that adds 0 to the stream.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.tensors import read_header, write_header
from subspec.artifacts.model import GROUP_SIZE, Attention, DeltaNet, Dense, ModelSpec, Source
from subspec.planner.model.checkpoint import read_checkpoint
from subspec.planner.model.config import read_config

Files = dict[str, Path]  # by the name of the source tensor
Recipes = dict[str, "Recipe"]  # by the name of the wide tensor
DEMO_MODEL = Path(__file__).resolve().parent.parent / "planner" / "demo-model"
DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float32": ("F32", torch.float32)}
SHARD_BYTES = 2_000_000_000
CHUNK_WEIGHTS = 8 << 20  # made at a time: bounds the float32 temporaries to a few times 32 MiB
CHECKED_PARAMETERS = 300_000_000  # a larger model is checked only when asked for
NOTE = "measures mechanics (bytes, time, memory), not the acceptance of a real model of this size"
DIMENSIONS = {  # of each module's weight: rows, columns, and what is only copied
    "embed_tokens": ("vocabulary", "hidden"), "lm_head": ("vocabulary", "hidden"),
    "q_proj": ("query_and_gate", "hidden"),
    "k_proj": ("kv", "hidden"), "v_proj": ("kv", "hidden"),
    "o_proj": ("hidden", "query"), "q_norm": ("head",), "k_norm": ("head",),
    "gate_proj": ("inner", "hidden"), "up_proj": ("inner", "hidden"),
    "down_proj": ("hidden", "inner"), "norm": ("hidden",),
    "input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",),
    "in_proj_qkv": ("channels", "hidden"), "in_proj_z": ("values", "hidden"),
    "in_proj_a": ("value_heads", "hidden"), "in_proj_b": ("value_heads", "hidden"),
    "out_proj": ("hidden", "values"), "conv1d": ("channels", "one", "taps"),
    "linear_attn.A_log": ("value_heads",), "linear_attn.dt_bias": ("value_heads",),
    "linear_attn.norm": ("value_head",),
}  # fmt: skip
INSIDE = "model.language_model."  # where a model that also sees has its decoder


@dataclass(frozen=True)
class Copies:
    """A wide dimension: for each of its entries, the source entry that it copies."""

    sources: torch.Tensor  # [wide]
    ranks: torch.Tensor  # [wide], earlier copies of the same source entry
    num_sources: int
    cancels: bool = False  # as columns, copies of W and of -W alternate


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the wide checkpoint is made from one of the source."""

    source: str
    dimensions: tuple[Copies, ...]
    row_scale: torch.Tensor | None = None  # [wide rows]
    column_scale: torch.Tensor | None = None  # columns are copied times this, and not shared
    offset: float = 0.0  # of a norm whose weight is 1 + what is stored: 1
    stays_f32: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(dimension.sources) for dimension in self.dimensions)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], epilog=NOTE)
    parser.add_argument("--hidden", type=int, required=True, help=f"a multiple of {GROUP_SIZE}")
    parser.add_argument("--layers", type=int, help="default: the source's")
    parser.add_argument("--intermediate", type=int, help="default: in proportion to --hidden")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="source checkpoint folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, help="compare logits")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    try:
        print(json.dumps(widen(parser.parse_args(arguments))))
    except SubspecError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


def widen(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    if args.out.exists():
        raise SubspecError(Exit.USAGE, f"--out {args.out} exists, expected a new folder")
    source = read_checkpoint(args.model, Source(args.model.name)).spec
    files = {name: path for path in args.model.glob("*.safetensors") for name in read_header(path)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as scratch:
        folder = Path(scratch) / args.out.name
        folder.mkdir()
        for path in args.model.iterdir():
            if path.suffix in (".json", ".jinja", ".txt") and "safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)
        write_config(folder / "config.json", source, args)
        wide = read_config(folder, source.source)
        recipes = all_recipes(source, wide, sorted(files), args.seed)
        num_parameters = sum(math.prod(recipe.shape) for recipe in recipes.values())
        print(f"{num_parameters / 1e6:.0f} M parameters: it {NOTE}", file=sys.stderr)
        write_weights(folder, recipes, files, args.dtype, args.seed)
        result = {"path": str(args.out), "parameters": num_parameters}
        if num_parameters < CHECKED_PARAMETERS if args.check is None else args.check:
            result |= check(args.model, folder, args.dtype)
        folder.rename(args.out)
    return result | {"seconds": round(time.perf_counter() - start, 1), "note": NOTE}


def write_config(path: Path, source: ModelSpec, args: argparse.Namespace) -> None:
    layers = args.layers or source.num_layers
    if args.hidden % GROUP_SIZE or layers < source.num_layers:
        problem = f"--hidden {args.hidden} --layers {layers}, expected a multiple of {GROUP_SIZE} "
        raise SubspecError(Exit.USAGE, problem + f"and at least {source.num_layers}")
    growth = args.hidden / source.hidden_size
    attention, net, dense = common_form(source)
    heads = round(attention.num_heads * growth)
    inner = round(dense.intermediate_size * growth / GROUP_SIZE) * GROUP_SIZE
    origin = {"model": args.model.name, "hidden_size": source.hidden_size}
    origin |= {"num_hidden_layers": source.num_layers, "seed": args.seed, "note": NOTE}
    whole = json.loads(path.read_text("utf-8"))
    config = whole.get("text_config", whole)  # inside a model that also sees
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate or inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads
        // math.gcd(heads, attention.num_heads // attention.num_kv_heads),
        "head_dim": attention.head_size,
        "dtype": args.dtype,
    }
    if net is not None:
        sizes["linear_num_key_heads"] = keys = round(net.num_key_heads * growth)
        sizes["linear_num_value_heads"] = keys * net.num_value_heads // net.num_key_heads
    kinds = config.get("layer_types")
    if net is not None and kinds is None:
        kinds = [
            "linear_attention" if one.delta_nets else "full_attention" for one in source.layers
        ]
    if kinds:
        sizes["layer_types"] = [kinds[n] for n in layer_origins(source.num_layers, layers)]
    config |= sizes
    whole["subspec_widened_from"] = origin
    path.write_text(json.dumps(whole, indent=2) + "\n", "utf-8")


def common_form(spec: ModelSpec) -> tuple[Attention, DeltaNet | None, Dense]:
    """What all layers share, windows aside: an attention, or else a delta net, and a feed-forward,
    a norm before each."""
    attentions, nets, denses = set[Attention](), set[DeltaNet](), set[Dense]()
    for layer in spec.layers:
        match [block.body for block in layer.blocks if block.before and not block.after]:
            case [Attention() as attention, Dense() as dense] if len(layer.blocks) == 2:
                attentions.add(replace(attention, window=None))
            case [DeltaNet() as net, Dense() as dense] if len(layer.blocks) == 2:
                nets.add(net)
            case _:
                raise SubspecError(
                    Exit.UNSUPPORTED,
                    f"a layer of this {spec.family} model is not an attention or a delta net and a "
                    "feed-forward with a norm before each, as expected",
                )
        denses.add(dense)
    if not len(attentions) == len(denses) == 1 or len(nets) > 1:
        raise SubspecError(
            Exit.UNSUPPORTED,
            f"the layers have attentions of {len(attentions)} different shapes, delta nets of "
            f"{len(nets)} and feed-forwards of {len(denses)}, expected one of each",
        )
    return attentions.pop(), next(iter(nets), None), denses.pop()


def layer_origins(num_source_layers: int, num_layers: int) -> list[int]:
    """The source layer of each wide one; the first of those with one origin is the real one."""
    return [layer * num_source_layers // num_layers for layer in range(num_layers)]


def all_recipes(source: ModelSpec, wide: ModelSpec, names: list[str], seed: int) -> Recipes:
    usual = wide_dimensions(source, wide)
    into_stream = [name for name in ("query", "values", "inner") if name in usual]
    extra = usual | {name: replace(usual[name], cancels=True) for name in into_stream}
    growth = wide.hidden_size / source.hidden_size
    generator = torch.Generator().manual_seed(seed)
    shares = shared(torch.ones(1, source.hidden_size), usual["hidden"], generator)[0]
    scale = (shares * growth).sqrt()  # c
    prefix = INSIDE if any(name.startswith(INSIDE) for name in names) else "model."
    nets = set(source.delta_nets)

    def recipe(name: str, sizes: dict[str, Copies]) -> Recipe:
        made = recipe_of(name, sizes, scale)
        stays_f32 = any(name.endswith(f".{n.name}.{of}") for n in nets for of in n.f32_tensors)
        return replace(made, offset=float(source.norm.zero_centered), stays_f32=stays_f32)

    found = {n: recipe(n, usual) for n in names if not n.startswith(f"{prefix}layers.")}
    if source.tie_word_embeddings:
        norm = found[f"{prefix}norm.weight"]
        even = torch.full_like(scale, 1 / growth)
        found[f"{prefix}norm.weight"] = replace(norm, row_scale=even)
        found.pop("lm_head.weight", None)  # a second copy that nothing reads
    origins = layer_origins(source.num_layers, wide.num_layers)
    for layer, origin in enumerate(origins):
        here, there = f"{prefix}layers.{layer}.", f"{prefix}layers.{origin}."
        sizes = extra if origin in origins[:layer] else usual
        inside = [name for name in names if name.startswith(there)]
        found |= {name.replace(there, here): recipe(name, sizes) for name in inside}
    return found


def known_as(source: str) -> str:
    """What DIMENSIONS calls a tensor."""
    above, module, kind = ("", *source.split("."))[-3:]
    own = f"{above}.{module}" if kind in ("weight", "bias") else f"{module}.{kind}"
    return own if own in DIMENSIONS else module


def recipe_of(source: str, sizes: dict[str, Copies], scale: torch.Tensor) -> Recipe:
    module, kind = known_as(source), source.split(".")[-1]
    known = DIMENSIONS.get(module, ())
    if not known or (kind == "bias" and known[0] == "hidden"):  # an output bias cannot cancel
        raise SubspecError(Exit.UNSUPPORTED, f"no recipe for the tensor {source!r}")
    dimensions = tuple(sizes[dimension] for dimension in known)
    if kind == "bias":
        return Recipe(source, dimensions[:1])
    if module == "embed_tokens":
        return Recipe(source, dimensions, column_scale=scale)
    hidden_scale = scale if len(known) == 2 else 1 / scale
    return Recipe(source, dimensions, hidden_scale if known[0] == "hidden" else None)


def wide_dimensions(source: ModelSpec, wide: ModelSpec) -> dict[str, Copies]:
    narrow, net, narrow_dense = common_form(source)
    broad, broad_net, broad_dense = common_form(wide)
    num_kv, size = narrow.num_kv_heads, narrow.head_size
    group, wide_group = narrow.num_heads // num_kv, broad.num_heads // broad.num_kv_heads
    query: list[int] = []
    for head in range(broad.num_heads):
        kv_head, member = divmod(head, wide_group)
        reader = kv_head // num_kv * wide_group + member  # the how-manieth of its source kv head
        query.append(kv_head % num_kv * group + reader % group)
    least = 1 if wide.num_layers == source.num_layers else 2  # one copy cannot cancel itself
    gated = size * (2 if narrow.output_gate else 1)  # rows of q_proj a head
    of_nets: dict[str, Copies] = {}
    if net is not None and broad_net is not None:
        of_nets = net_dimensions(net, broad_net, least)
    return of_nets | {
        "vocabulary": copies(source.vocab_size, source.vocab_size),
        "head": copies(size, size),
        "hidden": copies(source.hidden_size, wide.hidden_size),
        "query": copies(narrow.query_size, broad.query_size, least, rows_of(query, size)),
        "query_and_gate": copies(
            narrow.num_heads * gated, broad.num_heads * gated, 1, rows_of(query, gated)
        ),
        "kv": copies(narrow.kv_size, broad.kv_size),
        "inner": copies(narrow_dense.intermediate_size, broad_dense.intermediate_size, least),
    }


def net_dimensions(net: DeltaNet, wide: DeltaNet, least: int) -> dict[str, Copies]:
    """Value heads in the order of the key heads that they use."""
    readers = net.num_value_heads // net.num_key_heads
    keys = [head % net.num_key_heads for head in range(wide.num_key_heads)]
    values = rows_of(keys, readers)
    q, v = rows_of(keys, net.key_size), rows_of(values, net.value_size)
    channels = [*q, *(net.keys_width + row for row in q), *(2 * net.keys_width + row for row in v)]
    return {
        "channels": copies(net.num_channels, wide.num_channels, 1, channels),
        "values": copies(net.values_width, wide.values_width, least, v),
        "value_heads": copies(net.num_value_heads, wide.num_value_heads, 1, values),
        "value_head": copies(net.value_size, net.value_size),
        "one": copies(1, 1),
        "taps": copies(net.conv_kernel_size, net.conv_kernel_size),
    }


def rows_of(heads: list[int], size: int) -> list[int]:
    return [head * size + row for head in heads for row in range(size)]


def copies(num_sources: int, num: int, least: int = 1, sources: list[int] | None = None) -> Copies:
    sources = sources or [j % num_sources for j in range(num)]
    seen, ranks = [0] * num_sources, []
    for entry in sources:
        ranks.append(seen[entry])
        seen[entry] += 1
    if (got := min(seen)) < least:
        problem = f"{num} channels hold {got} copies of one of {num_sources} source channels"
        raise SubspecError(Exit.USAGE, f"{problem}, expected {least}: choose a larger size")
    return Copies(torch.tensor(sources), torch.tensor(ranks), num_sources)


def shared(weight: torch.Tensor, columns: Copies, generator: torch.Generator) -> torch.Tensor:
    """Each column divided among its copies in unequal random shares, other ones in every row."""
    sources, ranks, num_sources = columns.sources, columns.ranks, columns.num_sources
    if columns.cancels:
        weight = torch.cat([weight, -weight], dim=1) / 2
        sources, ranks, num_sources = sources + ranks % 2 * num_sources, ranks // 2, 2 * num_sources
    slots = ranks * num_sources + sources  # each entry's place in [copies, sources]
    used = torch.zeros(int(ranks.max()) + 1, num_sources)
    used.view(-1)[slots] = 1.0
    shares = torch.rand(len(weight), *used.shape, generator=generator).add_(0.5).mul_(used)
    shares.mul_(weight[:, None] / shares.sum(1, keepdim=True))
    return shares.flatten(1)[:, slots]  # [rows, wide]


def make(recipe: Recipe, weight: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    if weight.shape != (expected := tuple(d.num_sources for d in recipe.dimensions)):
        problem = f"{recipe.source!r} has the shape {tuple(weight.shape)}, expected {expected}"
        raise SubspecError(Exit.UNSUPPORTED, problem)
    rows, *columns = recipe.dimensions
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(recipe.shape, dtype=dtype)
    num_rows = max(1, CHUNK_WEIGHTS // math.prod(recipe.shape[1:]))
    for first in range(0, len(made), num_rows):
        here = slice(first, first + num_rows)
        part = weight[rows.sources[here]]
        if recipe.row_scale is not None:
            offset = 0.0 if columns else recipe.offset
            part += offset
            part *= recipe.row_scale[here].view(-1, *[1] * len(columns))
            part -= offset
        if recipe.column_scale is not None:
            part = part[:, columns[0].sources] * recipe.column_scale
        elif len(columns) == 1:
            part = shared(part, columns[0], generator)
        made[here] = part
    return made.view(torch.uint8)  # numpy, which writes it, has no bfloat16


def write_weights(folder: Path, recipes: Recipes, files: Files, dtype: str, seed: int) -> None:
    """Tensor by tensor, so that memory holds one of them however large the model is."""
    dtypes = {n: DTYPES["float32" if r.stays_f32 else dtype] for n, r in recipes.items()}
    sizes = {n: torch.empty(r.shape, dtype=dtypes[n][1], device="meta") for n, r in recipes.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    for filename, names in split.filename_to_tensors.items():
        with open(folder / filename, "wb") as output:
            header = [(name, dtypes[name][0], recipes[name].shape) for name in names]
            write_header(output, header)
            for name in names:
                with safe_open(files[recipes[name].source], "pt") as file:
                    weight = file.get_tensor(recipes[name].source).float()
                seed += 1  # every tensor has its own random stream
                output.write(make(recipes[name], weight, dtypes[name][1], seed).numpy().data)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


@torch.no_grad()
def check(source: Path, wide: Path, dtype: str) -> dict[str, float]:
    """Compares the float32 logits of both at every position of some Python code: of this file."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokens = tokenizer.encode(Path(__file__).read_text("utf-8")[-1500:]).ids
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (source, wide)]
    expected, got = (model(torch.tensor([tokens])).logits[0] for model in models)
    difference = (got - expected).abs().max().item()
    agreement = (got.argmax(-1) == expected.argmax(-1)).float().mean().item()
    close = torch.allclose(got, expected, rtol=1e-3, atol=1e-3) and agreement == 1.0
    # Rounded weights are another function: only what float32 keeps can be demanded exactly.
    if not (close if dtype == "float32" else agreement > 0.9):
        problem = f"logits differ by up to {difference:.2g}, {agreement:.1%} have the same argmax"
        raise SubspecError(Exit.UNEXPECTED, f"{dtype}: {problem}")
    return {"max_logit_difference": difference, "argmax_agreement": agreement}


if __name__ == "__main__":
    sys.exit(main())
