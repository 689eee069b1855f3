"""Residuals against raw weights: how fast they decode, and what that is worth on a slow link.

    subspec-plan --model MODEL --vram SIZE --encoding raw --out raw
    subspec-plan --model MODEL --vram SIZE --encoding residual --out residual
    python benchmarks/residual.py raw residual [--link 0.25GB --link 0.5GB …]

First the decoders on one matrix, beside what each link brings. Then both artifacts at each link:
re-planned for it with the same measured acceptance, the same prompts in turns. The weights that
stream are the only difference. The last line of stdout is one JSON object.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch
from speed import Speed, decode_prompts, opened, summarize

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.command import reported
from subspec.artifacts.common.sizes import parse_size, short_size, weights_rate
from subspec.artifacts.format import residual
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.native import residual_cpu
from subspec.artifacts.plan import Constraints
from subspec.planner.build.quantize import quantize
from subspec.planner.machine.profiles import under_link
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import Storage

ROWS, COLUMNS = 2048, 2048
LINKS = ("250MB", "500MB", "1GB", "2GB")


def decode_rates() -> dict[str, float]:
    """Weights per second of every decoder and of the encoder, on one matrix, once warm."""
    torch.manual_seed(0)
    weight = (torch.randn(ROWS, COLUMNS) * COLUMNS**-0.5).bfloat16()
    made = quantize(weight, "cpu")
    stored, out = residual.encode(weight, made.codes, made.qparams), torch.empty_like(weight)
    found = {"bits_per_weight": 8 * stored.numel() / weight.numel()}
    tries: dict[str, Callable[[], object]] = {}
    if (problem := residual_cpu.unavailable()) is None:
        for threads in sorted({1, torch.get_num_threads()}):
            tries[f"decode, {threads} threads"] = lambda threads=threads: residual_cpu.decode_into(  # type: ignore[misc]
                out, stored, made.codes, made.qparams, 0, threads
            )
        tries["encode, 1 thread"] = lambda: residual_cpu.encode(weight, made.codes, made.qparams, 1)
    else:
        print(f"no compiled decoder: {problem}", file=sys.stderr)
    tries["decode, plain twin"] = lambda: residual.decode(
        stored, made.codes, made.qparams, weight.dtype
    )
    for name, action in tries.items():
        action()
        seconds = []
        for _ in range(7 if "twin" not in name else 1):
            started = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - started)
        found[name] = weight.numel() / statistics.median(seconds)
        print(f"{name:22} {weights_rate(found[name])}", file=sys.stderr)
    return found


def planned_for(artifact: Artifact, acceptance: Acceptance, link: int) -> Artifact:
    """The same weights under the plan that this link calls for."""
    constraints = Constraints(context=artifact.plan.context, method="substitute", encoding="kept")
    plan = search(
        artifact.spec,
        under_link(artifact.profile, link),
        artifact.plan.budget_bytes,
        constraints,
        acceptance,
        Storage(tuple(artifact.stored_parts())),
    )
    return replace(artifact, plan=plan)


def at_link(artifacts: dict[str, Artifact], link: int, tokens: int) -> dict[str, object]:
    acceptance, found = artifacts["residual"].plan.acceptance, dict[str, Speed]()
    for encoding, artifact in artifacts.items():
        planned = planned_for(artifact, acceptance, link)
        with opened(planned, "substitute", link) as engine:
            answers = decode_prompts(engine, tokens)
            peak = engine.peak.peak_bytes
        speed = found[encoding] = summarize(planned, answers, peak, link)
        tree = planned.plan.tree
        print(
            f"{short_size(link):>7}/s {encoding:9} {speed.tokens_per_second:6.2f} tokens/s "
            f"(predicted {speed.predicted_tokens_per_second:.2f}), "
            f"tree {tree.width} x {tree.depth}, {short_size(speed.streamed_bytes)} a round, "
            f"verify {speed.verify_seconds:.2f} s",
            file=sys.stderr,
        )
    ratio = found["residual"].tokens_per_second / found["raw"].tokens_per_second
    print(f"{short_size(link):>7}/s residual / raw: {ratio:.2f}x", file=sys.stderr)
    speeds = {encoding: asdict(speed) for encoding, speed in found.items()}
    return {"link_bytes_per_second": link, "ratio": ratio, **speeds}


@click.command()
@click.argument("raw", type=click.Path(path_type=Path))
@click.argument("coded", metavar="RESIDUAL", type=click.Path(path_type=Path))
@click.option("--link", "links", multiple=True, default=LINKS, show_default=True, metavar="SIZE")
@click.option("--tokens", default=64, show_default=True, help="Tokens per prompt.")
@reported
def main(raw: Path, coded: Path, links: tuple[str, ...], tokens: int) -> None:
    """Compare an artifact of RAW weights with one of RESIDUALs of the same model and budget."""
    artifacts = {"raw": open_artifact(raw), "residual": open_artifact(coded)}
    rates = decode_rates()
    size = artifacts["raw"].spec.item_bytes
    for link in map(parse_size, links):
        raw_rate, coded_rate = link / size, 8 * link / rates["bits_per_weight"]
        print(
            f"{short_size(link):>7}/s brings {weights_rate(raw_rate)} raw, "
            f"{weights_rate(coded_rate)} as residuals",
            file=sys.stderr,
        )
    found = [at_link(artifacts, parse_size(link), tokens) for link in links]
    print(json.dumps({"rates": rates, "links": found}))


if __name__ == "__main__":
    main()
