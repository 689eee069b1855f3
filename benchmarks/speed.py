"""Plain against substitute decoding on one artifact, in one run, and the terms of a round.

    python benchmarks/speed.py ARTIFACT [--tokens 96] [--link-bandwidth 500MB] [--trace FILE]

Plain is the fastest plain decoding we have: one row, unpadded, the memory that the substitutes
would take full of exact weights. Both decode greedily from the same prompts, in turns; the order
alternates so that a drifting disk favours nobody.

Then some rounds are traced in a session of their own, which also times what this machine could do
at best: each term of a round stands beside its floors. `--trace` writes these rounds for Perfetto.
The last line of stdout is one JSON object.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import click
import torch

from subspec.artifacts.command import reported, size_option
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import linears
from subspec.artifacts.sizes import short_size
from subspec.artifacts.store import Artifact, open_artifact
from subspec.runtime.clock import Span, chrome_trace, overlap_seconds
from subspec.runtime.load import DRAFT_DTYPE
from subspec.runtime.sampling import Sampling
from subspec.runtime.session import Session
from subspec.runtime.text import load_text

CHATS = (
    "Write the Python function read_file: Read a file and return its lines.",
    "Write the Python function parse_date: Parse a date and return a tuple.",
)
TEXTS = (
    'import os\nimport sys\n\n\nclass Parser:\n    """',
    "def main(argv):\n    ",
)
WARM_UP_ROUNDS = 2
TRACED_ROUNDS = 8
MEMORY_BYTES = 256 << 20  # summed up to time the memory; larger than caches
CEILING_SECONDS = 0.3  # that one ceiling is looked for
FEWEST_CALLS = 5


@dataclass
class Run:
    """One prompt decoded by one method."""

    tokens: list[int]
    tokens_per_second: float
    first_token_seconds: float
    rounds: int
    accepted: float
    draft_seconds: float  # of a round, like the next three
    verify_seconds: float
    wait_seconds: float
    streamed_bytes: float
    peak_bytes: int


def run_all(artifact: Artifact, method: str, tokens: int, link_bandwidth: int | None) -> list[Run]:
    text = load_text(artifact.path / "tokenizer")
    found = []
    with Session(
        artifact,
        method="plain" if method == "plain" else "substitute",
        padded=False,
        link_bandwidth=link_bandwidth,
    ) as session:
        prompts = [text.chat_ids([{"role": "user", "content": chat}]) for chat in CHATS]
        prompts += [text.plain_ids(beginning) for beginning in TEXTS]
        eos = frozenset(artifact.spec.eos_token_ids)
        for ids in prompts:
            session.model.cache.roll_back(0)
            emitted = [t for some in session.generate(ids, tokens, Sampling(), eos) for t in some]
            stats, rounds = session.stats, max(1, len(session.stats.accepted))
            found.append(
                Run(
                    emitted,
                    stats.decode_tokens_per_second,
                    stats.time_to_first_token_seconds,
                    rounds,
                    sum(stats.accepted) / rounds,
                    stats.draft_seconds / rounds,
                    stats.verify_seconds / rounds,
                    stats.stream_wait_seconds / rounds,
                    stats.streamed_bytes / rounds,
                    session.peak.peak_bytes,
                )
            )
    return found


def mean(runs: list[Run], field: str) -> float:
    return statistics.mean(getattr(run, field) for run in runs)


def report(artifact: Artifact, runs: dict[str, list[Run]], link_bandwidth: int | None) -> dict:  # type: ignore[type-arg]
    plan, summary = artifact.plan, {}
    for method, some in runs.items():
        predicted = plan.predicted.get(method)
        floor = mean(some, "streamed_bytes") / link_rate(artifact, method, link_bandwidth)
        summary[method] = {
            "tokens_per_second": sum(len(r.tokens) - 1 for r in some)
            / sum(r.rounds * (r.draft_seconds + r.verify_seconds) for r in some),
            "predicted_tokens_per_second": predicted.tokens_per_second if predicted else None,
            "first_token_seconds": mean(some, "first_token_seconds"),
            "accepted_per_round": mean(some, "accepted"),
            "draft_seconds": mean(some, "draft_seconds"),
            "verify_seconds": mean(some, "verify_seconds"),
            "stream_wait_seconds": mean(some, "wait_seconds"),
            "streamed_bytes": mean(some, "streamed_bytes"),
            "link_floor_seconds": floor,
            "link_busy": min(1.0, floor / max(mean(some, "verify_seconds"), 1e-9)),
            "peak_bytes": max(run.peak_bytes for run in some),
        }
        say(method, summary[method])
    ratio = summary["substitute"]["tokens_per_second"] / summary["plain"]["tokens_per_second"]
    print(f"substitute / plain (unpadded): {ratio:.2f}x", file=sys.stderr)
    return {"artifact": artifact.path.name, "budget_bytes": plan.budget_bytes,
            "tree": [plan.tree.width, plan.tree.depth], "ratio": ratio, **summary}  # fmt: skip


def link_rate(artifact: Artifact, method: str, link_bandwidth: int | None) -> float:
    """Bytes per second: the profile's at the plan's block size, or what it is throttled to."""
    placement = artifact.plan.placement("plain" if method == "plain" else "substitute")
    measured = artifact.profile.link_rate(placement.block_bytes if placement else 0)
    return min(measured, link_bandwidth) if link_bandwidth else measured


def say(method: str, found: dict[str, float]) -> None:
    predicted = found["predicted_tokens_per_second"]
    print(
        f"{method:10}  {found['tokens_per_second']:7.2f} tokens/s"
        f" (predicted {predicted or 0:.2f})"
        f"  first {found['first_token_seconds']:.2f} s\n"
        f"            round: draft {found['draft_seconds']:.3f} s,"
        f" verify {found['verify_seconds']:.3f} s"
        f" (waiting {found['stream_wait_seconds']:.3f} s)"
        f" for {short_size(found['streamed_bytes'])},"
        f" link floor {found['link_floor_seconds']:.3f} s,"
        f" accepted {found['accepted_per_round']:.1f},"
        f" peak {short_size(found['peak_bytes'])}",
        file=sys.stderr,
    )


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


def trace_rounds(session: Session) -> Traced:
    """The session was opened with trace=True."""
    text, spans = load_text(session.artifact.path / "tokenizer"), session.model.clock.spans
    assert spans is not None
    context = session.plan.context
    # Without ends of text: rounds go on until the context is full.
    rounds = session.generate(text.plain_ids(TEXTS[0]), context, Sampling())
    list(islice(rounds, 1 + WARM_UP_ROUNDS))  # the prompt's pass comes first
    stats = session.stats
    waited, streamed, levels = stats.stream_wait_seconds, stats.streamed_bytes, sum(stats.judged)
    spans.clear()
    num_rounds = sum(1 for _ in islice(rounds, TRACED_ROUNDS))
    if not num_rounds:
        raise SubspecError(
            Exit.USAGE,
            f"a context of {context} tokens is full before any round can be traced",
            "plan with --context 256 or more",
        )
    return Traced(
        list(spans),
        num_rounds,
        sum(stats.judged) - levels,
        stats.stream_wait_seconds - waited,
        stats.streamed_bytes - streamed,
    )


@torch.inference_mode()
def ceilings(session: Session, link_bandwidth: int | None) -> Ceilings:
    artifact, spec, tree = session.artifact, session.artifact.spec, session.plan.tree
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if session.device.type == "cuda":  # the session's cap leaves no room for what is timed here
        torch.cuda.set_per_process_memory_fraction(1.0, session.device)
    memory = torch.ones(MEMORY_BYTES // 4, device=session.device)
    x = torch.randn(session.plan.verify_width, spec.hidden_size).to(session.device, dtype)
    weight = torch.randn(spec.intermediate_size, spec.hidden_size).to(session.device, dtype)
    out = x.new_empty(len(x), len(weight))
    actions: list[Callable[[], object]] = [
        lambda: memory.sum(),
        lambda: torch.mm(x, weight.t(), out=out),
        draft_products(session, 1),
        draft_products(session, tree.width),
    ]
    timed = [fastest(action, session.device) for action in actions]
    return Ceilings(
        memory_bytes=MEMORY_BYTES / timed[0],
        matmul_flops=2 * x.numel() * len(weight) / timed[1],
        draft_levels=tree.depth / (timed[2] + (tree.depth - 1) * timed[3]),
        link_bytes=link_rate(artifact, "substitute", link_bandwidth),
        decoded_weights=artifact.profile.decode_rate,
    )


def fastest(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest call: what disturbs the machine lowers no ceiling."""
    seconds, until = list[float](), time.perf_counter() + CEILING_SECONDS
    while len(seconds) < FEWEST_CALLS or time.perf_counter() < until:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def draft_products(session: Session, rows: int) -> Callable[[], None]:
    """All products of one level, and nothing else."""
    substitutes, every = session.model.substitutes, linears(session.artifact.spec)
    assert substitutes is not None
    products = list(substitutes)
    sizes = {linear.in_features for linear in every}
    x = {size: torch.randn(rows, size).to(session.device, DRAFT_DTYPE) for size in sizes}

    def run() -> None:
        for linear in every:
            products[linear.layer](linear.kind, x[linear.in_features])

    return run


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
    every, placement = linears(spec), plan.substitute
    num_weights = sum(n.num_weights for n in every)
    draft_bytes = sum(
        n.substitute_bytes if n.has_substitute else n.num_weights * spec.item_bytes for n in every
    )
    resident = set(placement.resident) if placement else set()
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
                "matmul": 2 * plan.verify_width * num_weights / ceilings.matmul_flops,
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


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--tokens", default=96, show_default=True, help="Tokens per prompt and method.")
@click.option("--repeats", default=1, show_default=True)
@click.option("--link-bandwidth", callback=size_option, metavar="SIZE")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Write {TRACED_ROUNDS} rounds as a Chrome trace.",
)
@reported
def main(
    artifact: Path, tokens: int, repeats: int, link_bandwidth: int | None, trace: Path | None
) -> None:
    """Compare plain and substitute decoding on ARTIFACT."""
    if trace is not None and not os.access(trace.absolute().parent, os.W_OK):
        raise SubspecError(
            Exit.USAGE, f"--trace {trace}: its folder is missing or read-only", "name another file"
        )
    opened = open_artifact(artifact)
    runs: dict[str, list[Run]] = {"plain": [], "substitute": []}
    for repeat in range(repeats):
        order = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
        for method in order:
            runs[method] += run_all(opened, method, tokens, link_bandwidth)
    found = report(opened, runs, link_bandwidth)
    with Session(
        opened, "substitute", padded=False, link_bandwidth=link_bandwidth, trace=True
    ) as session:
        rounds = trace_rounds(session)
        best = ceilings(session, link_bandwidth)
    against = roofline(opened, rounds, best)
    say_roofline(against)
    if trace is not None:
        write_trace(trace, opened, rounds)
    print(json.dumps(found | {"roofline": asdict(against) | {"verdict": verdict(against)}}))


if __name__ == "__main__":
    main()
