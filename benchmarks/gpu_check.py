"""What only a GPU can show, in one run: losslessness, memory, link, round terms.

    python benchmarks/gpu_check.py --out DIR [--hidden 4096 --layers 24 --vram 6GB]

Makes a widened demo model (mechanics of that size, not its acceptance), plans it for the GPU with
raw weights and with residuals, and checks for both: speculation and plain decoding give the same
tokens, greedy and seeded; the driver's peak stays within the budget; how busy the link is while
verifying; the terms of a round at full and at throttled link speed; a draft's level with and
without CUDA graphs. And how fast residuals decode, as weights and as share of the memory's
bandwidth, and how long exact attention and a draft's take. Stories on stderr, one JSON object as
the last line of stdout.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

from subspec.artifacts.common.command import reported, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size, weights_rate
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.plan import Method
from subspec.runtime.device import restrict_cuda_kernels
from subspec.runtime.draft.graphs import capture_on_gpu
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import triton_driver
from subspec.runtime.model.attention import attend, attend_batch_invariant, attend_in_fp64
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

HERE = Path(__file__).parent
ENCODINGS = ("raw", "residual")
METHODS: tuple[Method, ...] = ("substitute", "plain")  # plain: padded, the draft's exact twin
PROMPTS = ("def read_file(path):\n", "class Cache:\n", "import os\n\n\ndef main():\n")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--hidden", default=4096, show_default=True)
@click.option("--layers", default=24, show_default=True)
@click.option("--vram", default="6GB", callback=size_option, show_default=True)
@click.option("--tokens", default=96, show_default=True)
@click.option(
    "--links",
    default="full,25GB,12GB",
    show_default=True,
    help="Bytes a second; consumer PCIe 4.0 x16 and x8 by default.",
)
@click.option("--few-prompts", is_flag=True, help="Rehearse on one prompt of each kind.")
@reported
def main(
    out: Path, hidden: int, layers: int, vram: int, tokens: int, links: str, few_prompts: bool
) -> None:
    """Check the CUDA path on this machine."""
    if not torch.cuda.is_available():
        raise SubspecError(Exit.WRONG_MACHINE, "torch finds no CUDA GPU", "run it where one is")
    out.mkdir(parents=True, exist_ok=True)
    model = out / "model"
    if not model.exists():
        run("widen.py", "--hidden", hidden, "--layers", layers, "--no-check", "--out", model)
    # A plan without a draft would need no padded twin, and there would be nothing to compare.
    given = {"--model": model.absolute(), "--vram": f"{vram}B", "--device": "cuda",
             "--method": "substitute", "--sequences": 2}  # fmt: skip
    if few_prompts:
        given["--calibration"] = few(out / "few.jsonl")
    # What runs in processes of its own comes first: where the driver does not tell processes apart,
    # all that this one takes of the GPU would count as theirs.
    artifacts, found = dict[str, Artifact](), dict[str, dict[str, object]]()
    for encoding in ENCODINGS:
        artifacts[encoding] = plan(out / encoding, {**given, "--encoding": encoding})
        speeds = {link: speed(out / encoding, link) for link in links.split(",")}
        found[encoding] = {"speed": speeds}
    failed = list[str]()
    for encoding, artifact in artifacts.items():
        checked = check_predictions(artifact, tokens)
        failed += [f"{encoding}, {name}" for name, holds in checked.items() if not holds]
        found[encoding] |= {
            "link_bytes_per_second": artifact.profile.link[-1].bytes_per_second,
            "int4_kernel": artifact.profile.int4_kernel,
            "checks": checked,
            "draft_level_seconds": draft_level_seconds(artifact, tokens),
        }
        print(json.dumps(found), file=sys.stderr, flush=True)  # should what follows fail
    here = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({**here, **found, "decode": decode(artifact), "attention": attention()}))
    if failed:
        raise SubspecError(Exit.UNEXPECTED, f"on this GPU these checks failed: {'; '.join(failed)}")


def plan(folder: Path, given: dict[str, object]) -> Artifact:
    words = [str(word) for pair in given.items() for word in pair]
    planner = [sys.executable, "-P", "-m", "subspec.planner.cli"]
    command = [*planner, *words, "--out", str(folder), "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return open_artifact(folder)


def few(path: Path) -> Path:
    """The first held-out prompt of each kind, written to `path`."""
    lines = (HERE / "prompts.jsonl").read_text("utf-8").splitlines()
    first = {json.loads(line)["kind"]: line for line in reversed(lines)}
    path.write_text("\n".join(first.values()) + "\n", encoding="utf-8")
    return path


def decode(artifact: Artifact) -> dict[str, float]:
    """Weights per second of the Triton decoder, and the memory traffic that this is: the residual
    and the substitute are read, the weight is written."""
    stored = artifact.stored_parts()
    num_weights = sum(part.part.num_weights for part in stored)
    residual_bits = 8 * sum(part.num_bytes for part in stored) / num_weights
    rate = artifact.profile.residual_weights_per_second
    moved = rate * (residual_bits / 8 + 4.5 / 8 + artifact.spec.item_bytes)
    bandwidth = memory_bandwidth()
    print(
        f"decoding: {weights_rate(rate)}, {moved / bandwidth:.0%} of the memory's bandwidth",
        file=sys.stderr,
    )
    return {
        "weights_per_second": rate,
        "bits_per_weight": residual_bits,
        "memory_bytes_per_second": bandwidth,
        "share_of_memory": moved / bandwidth,
    }


def attention() -> dict[str, float]:
    """Seconds of exact attention in a layer of a 32 B model, 4096 slots: a tree of 64 rows behind
    what all see, a prompt's piece, one row, and the tree by the plain twin."""
    q = torch.randn(40, 128, 128, device="cuda").bfloat16()
    keys, values = torch.randn(2, 8, 4096, 128, device="cuda").bfloat16()
    causal = torch.arange(4096, device="cuda") <= 3968 + torch.arange(128, device="cuda")[:, None]
    parents = torch.arange(64) // 2  # a binary tree
    tree = torch.zeros(64, 4096, dtype=torch.bool)
    tree[:, :4032] = True
    for node in range(64):
        tree[node] |= tree[parents[node]]
        tree[node, 4032 + node] = True
    masks = {"tree": tree.cuda(), "prompt": causal, "one": causal[-1:]}
    found = {}
    for name, visible, exact in (
        *((name, visible, attend_batch_invariant) for name, visible in masks.items()),
        ("tree, by the twin", masks["tree"], attend_in_fp64),
    ):
        given = q[:, : len(visible)], keys, values, visible, 128**-0.5
        found[name] = device_seconds(partial(exact, *given), 10)
        print(f"attention, {name}: {found[name] * 1e3:.2f} ms a layer", file=sys.stderr)
    return found | draft_attention()


def draft_attention() -> dict[str, float]:
    """Seconds of a draft's attention in a layer of a 7 B model, a level of 4 rows over 4096 slots,
    as a captured level has it: by torch's kernel, which has one thread block for a KV head where
    there is a mask, and by the exact one, which divides the slots among blocks."""
    device = torch.device("cuda", torch.cuda.current_device())
    ways = {"torch": attend}
    if triton_driver.unavailable(device) is None:
        from subspec.runtime.kernels.attention_triton import attend_in_blocks

        ways["in blocks"] = attend_in_blocks
    restrict_cuda_kernels()  # as the engine does
    q = torch.randn(28, 4, 128, device="cuda").bfloat16()
    keys, values = torch.randn(2, 4, 4096, 128, device="cuda").bfloat16()
    visible = torch.ones(4, 4096, dtype=torch.bool, device="cuda")
    visible[:, 4092:] = torch.eye(4, dtype=torch.bool, device="cuda")
    capture, found = capture_on_gpu(device), {}
    for name, chosen in ways.items():
        action = partial(chosen, q, keys, values, visible, 128**-0.5)
        action()  # what was never run is built, which a capture forbids
        found[f"draft, {name}"] = device_seconds(capture(action), 20)
    timed = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in found.items())
    print(f"attention, 4 rows of 28 heads over 4 KV heads: {timed} a layer", file=sys.stderr)
    return found


def device_seconds(action: Callable[[], object], count: int) -> float:
    """Of one of `count` calls in a row, after one that is not counted."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    action()
    before.record()
    for _ in range(count):
        action()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3 / count


def memory_bandwidth() -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    rate = 2 * source.numel() / device_seconds(copy, 10)
    del source, target, copy
    torch.cuda.empty_cache()
    return rate


def check_predictions(artifact: Artifact, tokens: int) -> dict[str, bool]:
    """Same tokens with and without speculation; peak memory within the budget."""
    print(f"{artifact.path.name}: same tokens, within the budget?", file=sys.stderr)
    text, budget = load_tokenizer(artifact.path / "tokenizer"), artifact.plan.budget_bytes
    samplings = {"greedy": SamplingParams(), "seeded": SamplingParams(temperature=0.8, seed=1)}
    said: dict[str, dict[Method, list[list[int]]]] = {name: {} for name in samplings}
    within = True
    for method in METHODS:
        with Engine.open(artifact, OpenOptions(method)) as engine:
            for name, sampling in samplings.items():
                params = GenerationParams(tokens, sampling)
                said[name][method] = [
                    answer(engine, text.plain_ids(prompt), params) for prompt in PROMPTS
                ]
            peak = engine.peak.peak_bytes
        within &= peak <= budget
        print(f"{method}: peak {format_size(peak)} of {format_size(budget)}", file=sys.stderr)
    same = {f"same_tokens_{name}": by["substitute"] == by["plain"] for name, by in said.items()}
    return {**same, "within_budget": within}


def answer(engine: Engine, prompt: list[int], params: GenerationParams) -> list[int]:
    with engine.new_sequence() as sequence:
        return [token for some in sequence.generate(prompt, params) for token in some]


def draft_level_seconds(artifact: Artifact, tokens: int) -> dict[str, float]:
    """Of one level: launched kernel by kernel, and as captured graphs; how long the substitutes
    take to be read at the memory's bandwidth is the floor."""
    found = {}
    prompt = load_tokenizer(artifact.path / "tokenizer").plain_ids(PROMPTS[0])
    for name, graphs in (("kernels", False), ("graphs", True)):
        with Engine.open(artifact, OpenOptions("substitute", graphs=graphs)) as engine:
            answer(engine, prompt, GenerationParams(tokens))  # the first time builds and captures
            with engine.new_sequence() as sequence:
                for _ in sequence.generate(prompt, GenerationParams(tokens)):
                    pass
                stats, problem = sequence.stats, engine.missing_graphs_reason
            found[name] = stats.draft_seconds / max(1, stats.drafted_levels)
            print(f"a draft level by {name}: {found[name] * 1e3:.2f} ms", problem or "",
                  file=sys.stderr)  # fmt: skip
            read_bytes = engine.placement.ledger.substitutes
    print(f"kernels / graphs: {found['kernels'] / found['graphs']:.2f}x", file=sys.stderr)
    return found | {"floor": read_bytes / memory_bandwidth()}


def speed(folder: Path, link: str) -> dict[str, object]:
    throttle = [] if link == "full" else ["--link-bandwidth", link]
    print(f"link: {link}", file=sys.stderr)
    last = run("speed.py", folder, *throttle).strip().splitlines()[-1]
    found: dict[str, object] = json.loads(last)
    return found


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
