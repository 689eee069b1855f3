"""Answer one prompt on a terminal: text, statistics, run record."""

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from subspec.artifacts.common.command import leave, printable, say
from subspec.artifacts.common.errors import Exit
from subspec.artifacts.common.formatting import counted, duration, number
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.runs import Run, append_run, plan_digest
from subspec.runtime.device import machine_name
from subspec.runtime.engine import Engine
from subspec.runtime.lossy import verification_json
from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.text.streaming import TextStream
from subspec.runtime.text.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Answering:
    """Options of an answer from the command line."""

    params: GenerationParams
    stop: tuple[str, ...] = ()
    record: bool = True  # add answers to the run records


@dataclass(frozen=True)
class Answer:
    text: str  # from the model, control characters included
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "eos", "stop", "length", "context" or "interrupted"
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of each of token_ids, if requested

    def as_json(self, engine: Engine, sequence: Sequence) -> dict[str, Any]:
        return {
            "schema": "subspec.run/1",
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_token_ids": self.prompt_token_ids,
            "finish_reason": self.finish_reason,
            "logprobs": logprobs_json(self.logprobs),
            "method": engine.method,
            "drafter": engine.drafter,
            "draft_temperature": engine.draft_temperature,
            **verification_json(sequence.params.lossy),
            "stats": stats_json(engine, sequence),
        }


def answer_once(
    engine: Engine, tokenizer: ChatTokenizer, how: Answering, ids: list[int], as_json: bool
) -> None:
    """Answer the prompt `ids` on stdout, with statistics on stderr."""
    with engine.new_sequence() as sequence:
        answer = answer_prompt(engine, sequence, tokenizer, how, ids, echo=not as_json)
        if as_json:
            print(json.dumps(answer.as_json(engine, sequence)))
        else:
            sys.stdout.write("\n")
        sys.stdout.flush()
        why = cut_off(answer, engine, how)
        say(stats_line(engine, sequence) + (f" · {why}" if why else ""))
    if answer.finish_reason == "interrupted":
        leave(Exit.INTERRUPTED)


def answer_prompt(
    engine: Engine,
    sequence: Sequence,
    tokenizer: ChatTokenizer,
    how: Answering,
    ids: list[int],
    echo: bool,
) -> Answer:
    """Run the prompt `ids`; with `echo`, stream complete text to stdout.

    Ctrl-C ends the answer after the current round; a second one does not wait for it.
    """
    stream = TextStream(sequence, tokenizer, ids, how.params, how.stop)
    shown, cut_short = 0, False

    def show() -> None:
        nonlocal shown
        if echo and len(stream.text) > shown:
            sys.stdout.write(printable(stream.text[shown:]))
            sys.stdout.flush()
        shown = len(stream.text)

    with recorded(engine, sequence, how), first_interrupt_noted() as interrupted:
        pieces = iter(stream)
        for _ in pieces:
            show()
            if interrupted() and sequence.finish_reason is None:
                cut_short = True
                break
        pieces.close()  # type: ignore[attr-defined]
    show()
    reason = "interrupted" if cut_short else sequence.finish_reason or "interrupted"
    asked = how.params.logprobs is not None
    logprobs = tuple(sequence.logprobs[: len(stream.token_ids)]) if asked else None
    return Answer(stream.text, stream.token_ids, ids, reason, logprobs)


@contextmanager
def first_interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once Ctrl-C was pressed. The first Ctrl-C is only
    recorded, so that an answer ends between rounds and the cache stays reusable. A second one
    raises KeyboardInterrupt as usual."""
    presses = 0
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1 and callable(before):
            before(number, frame)

    if before == signal.SIG_IGN:  # ignored in a shell script's background job
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def recorded(engine: Engine, sequence: Sequence, how: Answering) -> Iterator[None]:
    """Add the block's answer to the artifact's run records, also if it was interrupted, unless it
    decoded no round or the plan predicts no such answers."""
    before = sequence.stats
    try:
        yield
    finally:
        stats = sequence.stats
        decoded = stats is not before and stats.accepted
        if decoded and how.record and engine.is_predicted_by_plan(sequence):
            append_run(engine.artifact.path, run_of(engine, sequence))


def run_of(engine: Engine, sequence: Sequence) -> Run:
    stats, plan = sequence.stats, engine.plan
    said = plan.predicted.get(engine.method)
    depth = 0 if engine.method == "plain" else plan.draft_of(engine.method).tree.depth
    levels = range(1, depth + 1)
    return Run(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        plan=plan_digest(plan),
        machine=machine_name(engine.device),
        method=engine.method,
        padded=engine.padded,
        link_bandwidth=round(engine.link_bandwidth) if engine.link_bandwidth else None,
        greedy=sequence.params.sampling.temperature == 0,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        generated_tokens=stats.generated_tokens,
        includes_digest_check=stats.includes_digest_check,
        drafted=tuple(sum(drafted >= level for drafted in stats.drafted) for level in levels),
        accepted=tuple(histogram(stats.accepted)),
        draft_seconds=stats.draft_seconds,
        verify_seconds=stats.verify_seconds,
        stream_wait_seconds=stats.stream_wait_seconds,
        first_token_seconds=stats.time_to_first_token_seconds,
        streamed_bytes=stats.streamed_bytes,
        fast_peak_bytes=engine.peak.peak_bytes,
        predicted_tokens_per_second=engine.predicted_speed_of(sequence),
        predicted_first_token_seconds=said.time_to_first_token_seconds if said else None,
        predicted_peak_bytes=said.fast_peak_bytes if said else None,
    )


def cut_off(answer: Answer, engine: Engine, how: Answering) -> str:
    """Return why the answer was cut off; "" if it was not."""
    if answer.finish_reason == "length":
        return f"cut off at --max-tokens {how.params.max_tokens}"
    if answer.finish_reason == "context":
        return f"cut off: the plan's context of {engine.plan.context} tokens is full"
    return ""


def stats_json(engine: Engine, sequence: Sequence) -> dict[str, Any]:
    stats = sequence.stats
    rounds = len(stats.accepted)
    return {
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "generated_tokens": stats.generated_tokens,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "time_to_first_token_seconds": stats.time_to_first_token_seconds,
        "rounds": rounds,
        "mean_accepted_per_round": sum(stats.accepted) / rounds if rounds else 0.0,
        "accepted_histogram": histogram(stats.accepted),
        "lossy_tokens": stats.lossy_tokens,
        "drafted_levels": stats.drafted_levels,
        "proposed_levels": sum(stats.proposed),
        "draft_seconds": stats.draft_seconds,
        "verify_seconds": stats.verify_seconds,
        "stream_wait_seconds": stats.stream_wait_seconds,
        "streamed_bytes": stats.streamed_bytes,
        "fast_peak_bytes": engine.peak.peak_bytes,
        "budget_bytes": engine.plan.budget_bytes,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "predicted_tokens_per_second": engine.predicted_speed_of(sequence),
    }


def logprobs_json(logprobs: tuple[TokenLogprobs, ...] | None) -> list[dict[str, Any]] | None:
    if logprobs is None:
        return None
    return [
        {
            "token_id": one.token,
            "logprob": one.logprob,
            "top": [{"token_id": token, "logprob": logprob} for token, logprob in one.top],
        }
        for one in logprobs
    ]


def histogram(accepted: "list[int] | tuple[int, ...]") -> list[int]:
    """Histogram: item n is the number of rounds that accepted n tokens."""
    return [accepted.count(n) for n in range(max(accepted, default=0) + 1)]


def stats_line(engine: Engine, sequence: Sequence) -> str:
    """Format a line of statistics: prompt, speed and memory against the prediction."""
    stats, found = sequence.stats, stats_json(engine, sequence)
    rounds, predicted = found["rounds"], found["predicted_tokens_per_second"]
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    said = [
        f"prompt {counted(stats.prompt_tokens, 'token')}{cached}, "
        f"first token after {duration(stats.time_to_first_token_seconds)}",
    ]
    speed = counted(stats.generated_tokens, "token")
    if rounds:
        speed += f" at {number(stats.decode_tokens_per_second)} tokens/s"
        speed += f" (predicted {number(predicted)})" if predicted else ""
    said.append(speed)
    if rounds and engine.drafter is not None:
        said.append(f"accepted {found['mean_accepted_per_round']:.1f} per round")
    if sequence.params.lossy is not None:
        said.append(f"LOSSY: {counted(stats.lossy_tokens, 'token')} not the model's own")
    if rounds and stats.streamed_bytes:
        said.append(f"streamed {short_size(stats.streamed_bytes / rounds)} per round")
    said.append(
        f"peak {short_size(found['fast_peak_bytes'])} of {short_size(found['budget_bytes'])}"
    )
    return " · ".join(said)
