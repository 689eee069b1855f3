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
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from roofline import (
    TRACED_ROUNDS,
    ceilings,
    link_rate,
    roofline,
    say_roofline,
    trace_rounds,
    verdict,
    write_trace,
)

from subspec.artifacts.common.command import reported, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.session import Session
from subspec.runtime.text.tokenizer import load_tokenizer

CHATS = (
    "Write the Python function read_file: Read a file and return its lines.",
    "Write the Python function parse_date: Parse a date and return a tuple.",
)
TEXTS = (
    'import os\nimport sys\n\n\nclass Parser:\n    """',
    "def main(argv):\n    ",
)


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
    text = load_tokenizer(artifact.path / "tokenizer")
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
        rounds = trace_rounds(session, TEXTS[0])
        best = ceilings(session, link_bandwidth)
    against = roofline(opened, rounds, best)
    say_roofline(against)
    if trace is not None:
        write_trace(trace, opened, rounds)
    print(json.dumps(found | {"roofline": asdict(against) | {"verdict": verdict(against)}}))


if __name__ == "__main__":
    main()
