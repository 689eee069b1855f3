"""Plain against substitute decoding on one artifact, in one run, and the terms of a round.

    python benchmarks/speed.py ARTIFACT [--tokens 96] [--link-bandwidth 500MB] [--trace FILE]
                                        [--sequences 4]

Plain is the fastest plain decoding we have: one row, unpadded, the memory that the substitutes
would take full of exact weights. Both decode greedily from the same prompts, in turns; the order
alternates so that a drifting disk favours nobody.

With --sequences N, for a plan of N sequences, both also decode N prompts in a batch, one stream of
the weights for all of them, and the same prompts one after another.

Then some rounds are traced, and what this machine could do at best is timed: each term of a round
stands beside its floors. `--trace` writes these rounds for Perfetto. The last line of stdout is one
JSON object.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle, islice
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
from subspec.artifacts.plan import Method
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.sequence import GenerationParams, Stats
from subspec.runtime.text.tokenizer import load_tokenizer

METHODS: tuple[Method, ...] = ("plain", "substitute")
CHATS = (
    "Write the Python function read_file: Read a file and return its lines.",
    "Write the Python function parse_date: Parse a date and return a tuple.",
)
TEXTS = (
    'import os\nimport sys\n\n\nclass Parser:\n    """',
    "def main(argv):\n    ",
)


@dataclass(frozen=True)
class Speed:
    """One method over all prompts; seconds, bytes and accepted tokens are means of a round."""

    tokens_per_second: float
    predicted_tokens_per_second: float | None  # None: the plan says nothing
    first_token_seconds: float
    accepted_per_round: float
    draft_seconds: float
    verify_seconds: float
    stream_wait_seconds: float
    streamed_bytes: float
    link_floor_seconds: float  # of the streamed bytes
    link_busy: float  # share of verification
    peak_bytes: int


@dataclass(frozen=True)
class BatchSpeed:
    """The same prompts one after another and all at once; tokens/s of all sequences together."""

    num_sequences: int
    alone_tokens_per_second: float
    together_tokens_per_second: float
    ratio: float
    same_tokens: bool


def opened(
    artifact: Artifact, method: Method, link_bandwidth: int | None, trace: bool = False
) -> Engine:
    how = OpenOptions(method, padded=False, link_bandwidth=link_bandwidth, trace=trace)
    return Engine.open(artifact, how)


def prompts_for(artifact: Artifact) -> list[list[int]]:
    text = load_tokenizer(artifact.path / "tokenizer")
    prompts = [text.chat_ids([{"role": "user", "content": chat}]) for chat in CHATS]
    return prompts + [text.plain_ids(beginning) for beginning in TEXTS]


def decode_prompts(engine: Engine, tokens: int) -> list[Stats]:
    """Every prompt, one after another."""
    params = GenerationParams(tokens, stop_token_ids=frozenset(engine.artifact.spec.eos_token_ids))
    found = []
    for prompt in prompts_for(engine.artifact):
        with engine.new_sequence() as sequence:
            for _ in sequence.generate(prompt, params):
                pass
            found.append(sequence.stats)
    return found


def summarize(
    artifact: Artifact, answers: Sequence[Stats], peak_bytes: int, link_bandwidth: int | None
) -> Speed:
    """Of one method's answers."""
    method = answers[0].method
    predicted = artifact.plan.predicted.get(method)
    num_rounds = max(1, sum(len(one.accepted) for one in answers))
    verify = sum(one.verify_seconds for one in answers) / num_rounds
    streamed = sum(one.streamed_bytes for one in answers) / num_rounds
    floor = streamed / link_rate(artifact, method, link_bandwidth)
    return Speed(
        tokens_per_second=sum(one.generated_tokens - 1 for one in answers)
        / max(1e-9, sum(one.decode_seconds for one in answers)),
        predicted_tokens_per_second=predicted.tokens_per_second if predicted else None,
        first_token_seconds=statistics.mean(one.time_to_first_token_seconds for one in answers),
        accepted_per_round=sum(sum(one.accepted) for one in answers) / num_rounds,
        draft_seconds=sum(one.draft_seconds for one in answers) / num_rounds,
        verify_seconds=verify,
        stream_wait_seconds=sum(one.stream_wait_seconds for one in answers) / num_rounds,
        streamed_bytes=streamed,
        link_floor_seconds=floor,
        link_busy=min(1.0, floor / max(1e-9, verify)),
        peak_bytes=peak_bytes,
    )


def compare_methods(
    artifact: Artifact, tokens: int, repeats: int, link_bandwidth: int | None
) -> dict[Method, Speed]:
    answers: dict[Method, list[Stats]] = {method: [] for method in METHODS}
    peaks = dict.fromkeys(METHODS, 0)
    for repeat in range(repeats):
        for method in METHODS if repeat % 2 == 0 else METHODS[::-1]:
            with opened(artifact, method, link_bandwidth) as engine:
                answers[method] += decode_prompts(engine, tokens)
                peaks[method] = max(peaks[method], engine.peak.peak_bytes)
    return {
        method: summarize(artifact, some, peaks[method], link_bandwidth)
        for method, some in answers.items()
    }


def compare_batched(engine: Engine, num_sequences: int, tokens: int) -> BatchSpeed:
    """No token ends an answer: a sequence that left early would let the others run faster."""
    params = GenerationParams(tokens)
    prompts = list(islice(cycle(prompts_for(engine.artifact)), num_sequences))

    def decode(groups: Sequence[Sequence[list[int]]]) -> tuple[float, list[list[int]]]:
        """Each group in a batch -> tokens/s after the first tokens, and the answers."""
        before, answers = decoding_seconds(engine), list[list[int]]()
        for group in groups:
            with ExitStack() as stack:
                sequences = [stack.enter_context(engine.new_sequence()) for _ in group]
                for sequence, prompt in zip(sequences, group, strict=True):
                    sequence.begin(prompt, params)
                while any(sequence.finish_reason is None for sequence in sequences):
                    engine.step()
                answers += [sequence.take_new_tokens() for sequence in sequences]
        seconds = decoding_seconds(engine) - before
        return sum(len(answer) - 1 for answer in answers) / max(1e-9, seconds), answers

    # As sequences grow, an engine measures its temporaries: a longest one has been before.
    decode([[max(prompts, key=len)]])
    alone, expected = decode([[prompt] for prompt in prompts])
    together, got = decode([prompts])
    return BatchSpeed(num_sequences, alone, together, together / alone, got == expected)


def decoding_seconds(engine: Engine) -> float:
    seconds = engine.model.clock.seconds
    return seconds.get("draft", 0.0) + seconds.get("verify", 0.0)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say_speed(method: Method, found: Speed) -> None:
    predicted = found.predicted_tokens_per_second
    said = "no prediction" if predicted is None else f"predicted {predicted:.2f}"
    say(
        f"{method:10}  {found.tokens_per_second:7.2f} tokens/s ({said})"
        f"  first {found.first_token_seconds:.2f} s\n"
        f"            round: draft {found.draft_seconds:.3f} s,"
        f" verify {found.verify_seconds:.3f} s"
        f" (waiting {found.stream_wait_seconds:.3f} s)"
        f" for {short_size(found.streamed_bytes)},"
        f" link floor {found.link_floor_seconds:.3f} s,"
        f" accepted {found.accepted_per_round:.1f},"
        f" peak {short_size(found.peak_bytes)}"
    )


def say_batched(method: Method, found: BatchSpeed) -> None:
    say(
        f"{method:10}  {found.num_sequences} sequences together"
        f" {found.together_tokens_per_second:.2f} tokens/s,"
        f" one after another {found.alone_tokens_per_second:.2f}: {found.ratio:.2f}x,"
        f" {'the same' if found.same_tokens else 'OTHER'} tokens"
    )


def check_given(artifact: Artifact, num_sequences: int, trace: Path | None) -> None:
    """Before anything runs. Raises SubspecError(USAGE)."""
    if trace is not None and not os.access(trace.absolute().parent, os.W_OK):
        raise SubspecError(
            Exit.USAGE, f"--trace {trace}: its folder is missing or read-only", "name another file"
        )
    if not 1 <= num_sequences <= artifact.plan.num_sequences:
        raise SubspecError(
            Exit.USAGE,
            f"--sequences {num_sequences}, expected 1 to {artifact.plan.num_sequences}: the plan "
            "has memory for so many",
            f"plan with more: subspec-plan --sequences {num_sequences}",
        )


@click.command()
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option("--tokens", default=96, show_default=True, help="Tokens per prompt and method.")
@click.option("--repeats", default=1, show_default=True)
@click.option("--link-bandwidth", callback=size_option, metavar="SIZE")
@click.option(
    "--sequences", default=1, show_default=True, help="Compare so many in a batch with one alone."
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Write {TRACED_ROUNDS} rounds as a Chrome trace.",
)
@reported
def main(
    folder: Path,
    tokens: int,
    repeats: int,
    link_bandwidth: int | None,
    sequences: int,
    trace: Path | None,
) -> None:
    """Compare plain and substitute decoding on ARTIFACT."""
    artifact = open_artifact(folder)
    check_given(artifact, sequences, trace)
    speeds = compare_methods(artifact, tokens, repeats, link_bandwidth)
    for method, speed in speeds.items():
        say_speed(method, speed)
    ratio = speeds["substitute"].tokens_per_second / speeds["plain"].tokens_per_second
    say(f"substitute / plain (unpadded): {ratio:.2f}x")
    batched = dict[Method, BatchSpeed]()
    for method in METHODS if sequences > 1 else ():
        with opened(artifact, method, link_bandwidth) as engine:
            batched[method] = compare_batched(engine, sequences, tokens)
        say_batched(method, batched[method])
    with opened(artifact, "substitute", link_bandwidth, trace=True) as engine:
        rounds = trace_rounds(engine, TEXTS[0])
        best = ceilings(engine, link_bandwidth)
    against = roofline(artifact, rounds, best)
    say_roofline(against)
    if trace is not None:
        write_trace(trace, artifact, rounds)
    plan = artifact.plan
    found: dict[str, object] = {
        "artifact": artifact.path.name,
        "budget_bytes": plan.budget_bytes,
        "tree": [plan.tree.width, plan.tree.depth],
        "ratio": ratio,
        "plain": asdict(speeds["plain"]),
        "substitute": asdict(speeds["substitute"]),
        "batched": {method: asdict(one) for method, one in batched.items()},
        "roofline": asdict(against) | {"verdict": verdict(against)},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
