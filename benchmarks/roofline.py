"""The terms of a traced round, each beside the least that this machine's ceilings let it take.

No script of its own: `speed.py` traces some rounds, prints them so and writes the trace.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.footprint import substitutes_bytes
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import layer_name
from subspec.artifacts.plan import Method
from subspec.runtime.clock import Span, chrome_trace
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.engine import Engine
from subspec.runtime.load import DRAFT_DTYPE
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

WARM_UP_ROUNDS = 2
TRACED_ROUNDS = 8
MEMORY_BYTES = 256 << 20  # summed up to time the memory; larger than caches
CEILING_SECONDS = 0.3  # that one ceiling is looked for
MIN_CALLS = 5


@dataclass(frozen=True)
class Traced:
    """Consecutive rounds of the substitute method; seconds and bytes of all of them together."""

    spans: list[Span]
    num_rounds: int
    num_levels: int  # drafted
    wait_seconds: float
    streamed_bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What this machine could do at best; a second."""

    memory_bytes: float  # read by a sum over MEMORY_BYTES
    matmul_flops: float  # of one exact product of verify_width rows
    draft_levels: float  # of which nothing but the products is computed, by the packed kernel
    link_bytes: float  # by the profile, or as throttled
    decoded_weights: float  # by the profile; 0: no decoder


@dataclass(frozen=True)
class Term:
    """Seconds of one part of a round beside the least that each ceiling lets it take."""

    seconds: float | None  # None: not recorded on this device
    floors: dict[str, float]  # by what limits it


@dataclass(frozen=True)
class Roofline:
    num_rounds: int  # that all seconds below are means of
    draft_seconds: float
    verify_seconds: float
    wait_seconds: float
    link_busy_in_verify: float
    terms: dict[str, Term]  # all in seconds of a round, but a draft level's
    ceilings: Ceilings


def trace_rounds(engine: Engine, beginning: str) -> Traced:
    """Of a text that begins so. The engine was opened with trace=True."""
    text, spans = load_tokenizer(engine.artifact.path / "tokenizer"), engine.model.clock.spans
    assert spans is not None
    context = engine.plan.context
    with engine.new_sequence() as sequence:
        # Without ends of text: rounds go on until the context is full.
        rounds = sequence.generate(text.plain_ids(beginning), GenerationParams(context))
        list(islice(rounds, 1 + WARM_UP_ROUNDS))  # the prompt's pass comes first
        before = sequence.stats
        spans.clear()
        num_rounds = sum(1 for _ in islice(rounds, TRACED_ROUNDS))
        stats = sequence.stats
    if not num_rounds:
        raise SubspecError(
            Exit.USAGE,
            f"a context of {context} tokens is full before any round can be traced",
            "plan with --context 256 or more",
        )
    return Traced(
        list(spans),
        num_rounds,
        stats.drafted_levels - before.drafted_levels,
        stats.stream_wait_seconds - before.stream_wait_seconds,
        stats.streamed_bytes - before.streamed_bytes,
    )


def link_rate(artifact: Artifact, method: Method, link_bandwidth: int | None) -> float:
    """Bytes per second: the profile's at the plan's block size, or what it is throttled to."""
    measured = artifact.profile.link_rate(artifact.plan.placement(method).block_bytes)
    return min(measured, link_bandwidth) if link_bandwidth else measured


@torch.inference_mode()
def ceilings(engine: Engine, link_bandwidth: int | None) -> Ceilings:
    artifact, spec, tree = engine.artifact, engine.artifact.spec, engine.plan.tree
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if engine.device.type == "cuda":  # the budget leaves no room for what is timed here
        torch.cuda.set_per_process_memory_fraction(1.0, engine.device)
    memory = torch.ones(MEMORY_BYTES // 4, device=engine.device)
    largest = max(spec.linears[:-1], key=lambda linear: linear.num_weights)  # the head aside
    shape = largest.out_features, largest.in_features
    weight = torch.randn(shape).to(engine.device, dtype)
    x = torch.randn(engine.plan.verify_width, largest.in_features).to(engine.device, dtype)
    out = x.new_empty(len(x), len(weight))
    actions: list[Callable[[], object]] = [
        lambda: memory.sum(),
        lambda: torch.mm(x, weight.t(), out=out),
        draft_products(engine, 1),
        draft_products(engine, tree.width),
    ]
    timed = [fastest(action, engine.device) for action in actions]
    return Ceilings(
        memory_bytes=MEMORY_BYTES / timed[0],
        matmul_flops=2 * x.numel() * len(weight) / timed[1],
        draft_levels=tree.depth / (timed[2] + (tree.depth - 1) * timed[3]),
        link_bytes=link_rate(artifact, "substitute", link_bandwidth),
        decoded_weights=artifact.profile.residual_weights_per_second,
    )


def fastest(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest call: what disturbs the machine lowers no ceiling."""
    seconds, until = list[float](), time.perf_counter() + CEILING_SECONDS
    while len(seconds) < MIN_CALLS or time.perf_counter() < until:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def draft_products(engine: Engine, rows: int) -> Callable[[], None]:
    """All products of one level, and nothing else."""
    drafter, every = engine.model.drafter, engine.artifact.spec.linears
    assert isinstance(drafter, SubstituteDrafter)
    products = list(drafter.substitutes)
    sizes = {linear.in_features for linear in every}
    x = {size: torch.randn(rows, size).to(engine.device, DRAFT_DTYPE) for size in sizes}
    calls = [
        (products[n.layer], n.name.removeprefix(f"{layer_name(n.layer)}."), x[n.in_features])
        for n in every
    ]

    def run() -> None:
        for product, name, inputs in calls:
            product(name, inputs, rows)

    return run


def overlap_seconds(some: Iterable[Span], others: Sequence[Span]) -> float:
    """Seconds during which one of `some` and one of `others` run; neither overlap among
    themselves."""
    return sum(
        max(0.0, min(a.end_seconds, b.end_seconds) - max(a.start_seconds, b.start_seconds))
        for a in some
        for b in others
    )


def roofline(artifact: Artifact, traced: Traced, ceilings: Ceilings) -> Roofline:
    plan, spec, rounds = artifact.plan, artifact.spec, traced.num_rounds
    lanes: dict[str, list[Span]] = {}
    for span in traced.spans:
        lanes.setdefault(span.lane, []).append(span)
    drafts, verifies = lanes["draft"], lanes["verify"]
    start, end = drafts[0].start_seconds, verifies[-1].end_seconds
    whole = Span("", "", start, end - start, {})
    on_cpu = plan.device == "cpu"

    def per_round(lane: str) -> float | None:
        return overlap_seconds(lanes.get(lane, []), [whole]) / rounds if on_cpu else None

    draft, verify = (sum(s.seconds for s in some) / rounds for some in (drafts, verifies))
    wait = traced.wait_seconds / rounds
    link_floor = traced.streamed_bytes / rounds / ceilings.link_bytes
    busy = overlap_seconds(lanes.get("copy", []), verifies) / rounds if on_cpu else link_floor
    every, resident = spec.linears, set(plan.placement("substitute").resident)
    num_weights = sum(n.num_weights for n in every)
    draft_bytes = substitutes_bytes(spec, "w4a8") + sum(  # other kernels read as much
        n.num_weights * spec.item_bytes for n in every if not n.has_substitute
    )
    num_decoded = sum(
        p.part.num_weights
        for p in artifact.stored_parts()
        if p.encoding == "residual" and p.name not in resident
    )
    products, decode = per_round("product"), per_round("decode")
    terms = {
        "draft level": Term(
            draft * rounds / max(1, traced.num_levels),
            {"memory": draft_bytes / ceilings.memory_bytes, "kernel": 1 / ceilings.draft_levels},
        ),
        "copy": Term(per_round("copy"), {"link": link_floor}),
        "decode": Term(
            decode,
            {"decoder": num_decoded / ceilings.decoded_weights} if ceilings.decoded_weights else {},
        ),
        "products": Term(
            products,
            {
                "matmul": 2 * plan.verify_widths[0] * num_weights / ceilings.matmul_flops,
                "memory": num_weights * spec.item_bytes / ceilings.memory_bytes,
            },
        ),
        "rest of verify": Term(  # attention, norms, choosing and accepting
            None if products is None or decode is None else verify - products - decode - wait, {}
        ),
    }
    return Roofline(rounds, draft, verify, wait, min(1.0, busy / verify), terms, ceilings)


def verdict(found: Roofline) -> str:
    """The busier one of link and compute is what the phase is bound by."""
    verify, busy = found.verify_seconds, found.link_busy_in_verify
    if found.wait_seconds / verify > 1 - busy:
        waits = f"compute waits {found.wait_seconds:.3f} s of {verify:.3f} s"
        return f"verify: bound by the link ({busy:.0%} busy), {waits}"
    known = {name: found.terms[name].seconds for name in ("decode", "products")}
    parts = " + ".join(f"{name} {s:.3f} s" for name, s in known.items() if s is not None)
    return f"verify: bound by compute ({parts or 'all'} of {verify:.3f} s), link {busy:.0%} busy"


def say_roofline(found: Roofline) -> None:
    print(
        f"{found.num_rounds} traced rounds: draft {found.draft_seconds:.3f} s,"
        f" verify {found.verify_seconds:.3f} s each\n"
        f"{'':16}{'measured':>10}  floors, and their share of what was measured",
        file=sys.stderr,
    )
    for name, term in found.terms.items():
        measured = "-" if term.seconds is None else f"{1e3 * term.seconds:.1f} ms"
        floors = [
            f"{limit} {1e3 * floor:.1f} ms"
            + (f" ({floor / term.seconds:.0%})" if term.seconds else "")
            for limit, floor in term.floors.items()
        ]
        print(f"{name:16}{measured:>10}  {', '.join(floors)}".rstrip(), file=sys.stderr)
    best = found.ceilings
    print(
        f"memory: {short_size(best.memory_bytes)}/s (a sum over {MEMORY_BYTES >> 20} MiB),"
        f" matmul: {best.matmul_flops / 1e9:.0f} GFLOP/s, link: {short_size(best.link_bytes)}/s\n"
        f"{verdict(found)}",
        file=sys.stderr,
    )


def write_trace(path: Path, artifact: Artifact, traced: Traced) -> None:
    cuda = artifact.plan.device == "cuda"
    about = {
        "artifact": artifact.path.name,
        "machine": artifact.plan.machine,
        "times": "draft and verify only: inside them the host would time the launches of kernels"
        if cuda
        else "of the host",
    }
    try:
        path.write_text(json.dumps(chrome_trace(traced.spans, about)), "utf-8")
    except OSError as error:
        raise SubspecError(
            Exit.USAGE, f"--trace {path} cannot be written: {error.strerror}", "name another file"
        ) from None
