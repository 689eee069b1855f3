"""One answer: prompt ids -> text, as it becomes certain, and the figures of how it was made."""

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from subspec.artifacts.common.command import leave, printable, say
from subspec.artifacts.common.errors import Exit
from subspec.artifacts.common.formatting import counted, duration, number
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.runs import Run, append_run, plan_digest
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.session import Session, machine_name
from subspec.runtime.text.tokenizer import StreamingDetokenizer, Text

if TYPE_CHECKING:
    from subspec.runtime.cli import Options


@dataclass(frozen=True)
class Answer:
    text: str  # the model's, control characters included
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "eos", "stop", "length" or "interrupted"

    def as_json(self, session: Session) -> dict[str, Any]:
        return {
            "schema": "subspec.run/1",
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_token_ids": self.prompt_token_ids,
            "finish_reason": self.finish_reason,
            "method": session.method,
            "stats": stats_json(session),
        }


def answer_once(session: Session, text: Text, options: "Options", ids: list[int]) -> None:
    """The prompt `ids`, its answer on stdout and its figures on stderr."""
    answer = generate(session, text, options, ids, echo=not options.as_json)
    if options.as_json:
        print(json.dumps(answer.as_json(session)))
    else:
        sys.stdout.write("\n")
    sys.stdout.flush()
    why = cut_off(answer, session, options)
    say(stats_line(session) + (f" · {why}" if why else ""))
    if answer.finish_reason == "interrupted":
        leave(Exit.INTERRUPTED)


def generate(
    session: Session, text: Text, options: "Options", ids: list[int], echo: bool
) -> Answer:
    """Runs the prompt `ids`; with `echo` the text streams to stdout as it becomes certain.

    Ctrl-C ends the answer after the round under way; a second one does not wait for it.
    """
    printer, token_ids, reason = StreamingDetokenizer(text, options.stop), list[int](), "length"
    eos = frozenset(session.artifact.spec.eos_token_ids)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)

    def show(fresh: str) -> None:
        if echo and fresh:
            sys.stdout.write(printable(fresh))
            sys.stdout.flush()

    with recorded(session, options), first_interrupt_noted() as interrupted:
        for emitted in session.generate(ids, options.max_tokens, sampling, eos):
            before = printer.num_tokens
            show(printer.feed(emitted))
            token_ids += emitted[: printer.num_tokens - before]
            if printer.stopped:
                reason = "stop"
                break
            if emitted[-1] in eos:
                reason = "eos"
            elif interrupted():
                reason = "interrupted"
                break
    show(printer.finish())
    return Answer(printer.text, token_ids, ids, reason)


@contextmanager
def first_interrupt_noted() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C inside the block is only noted: an answer ends between two rounds, and the
    cache and the weights under way stay in order for the next one. The second is an exception."""
    presses = 0

    def note(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:  # as for a shell script's background job
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def recorded(session: Session, options: "Options") -> Iterator[None]:
    """The answer that is made inside the block joins the artifact's run records, also if it was
    interrupted; not if no round was decoded."""
    before = session.stats
    try:
        yield
    finally:
        stats = session.stats
        if stats is not before and stats.accepted and not options.no_record:
            append_run(session.artifact.path, run_of(session, options))


def run_of(session: Session, options: "Options") -> Run:
    stats, plan = session.stats, session.plan
    said = plan.predicted.get(session.method)
    # What was drafted behind the end of the text says nothing about it. A second Ctrl-C may have
    # come between the two lists.
    rounds = [(min(pair), pair[1]) for pair in zip(stats.accepted, stats.judged, strict=False)]
    levels = range(1, plan.tree.depth + 1) if session.method == "substitute" else ()
    return Run(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        plan=plan_digest(plan),
        machine=machine_name(session.device),
        method=session.method,
        padded=session.padded,
        link_bandwidth=options.link_bandwidth,
        greedy=options.temperature == 0,
        prompt_tokens=stats.prompt_tokens,
        reused_tokens=stats.reused_tokens,
        generated_tokens=stats.generated_tokens,
        first_of_session=stats.first_of_session,
        tried=tuple(
            sum(accepted >= level - 1 and judged >= level for accepted, judged in rounds)
            for level in levels
        ),
        accepted=tuple(histogram([accepted for accepted, _ in rounds])),
        drafted_levels=stats.drafted_levels,
        draft_seconds=stats.draft_seconds,
        verify_seconds=stats.verify_seconds,
        stream_wait_seconds=stats.stream_wait_seconds,
        first_token_seconds=stats.time_to_first_token_seconds,
        streamed_bytes=stats.streamed_bytes,
        fast_peak_bytes=session.peak.peak_bytes,
        predicted_tokens_per_second=session.predicted_tokens_per_second,
        predicted_first_token_seconds=said.time_to_first_token_seconds if said else None,
        predicted_peak_bytes=said.fast_peak_bytes if said else None,
    )


def cut_off(answer: Answer, session: Session, options: "Options") -> str:
    """Why the answer is shorter than the model wanted; empty if it is not."""
    if answer.finish_reason != "length":
        return ""
    if len(answer.token_ids) >= options.max_tokens:
        return f"cut off at --max-tokens {options.max_tokens}"
    return f"cut off: the plan's context of {session.plan.context} tokens is full"


def stats_json(session: Session) -> dict[str, Any]:
    stats = session.stats
    rounds = len(stats.accepted)
    return {
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "generated_tokens": stats.generated_tokens,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "time_to_first_token_seconds": stats.time_to_first_token_seconds,
        "rounds": rounds,
        "mean_accepted_per_round": sum(stats.accepted) / rounds if rounds else 0.0,
        "accepted_histogram": histogram(stats.accepted),
        "draft_seconds": stats.draft_seconds,
        "verify_seconds": stats.verify_seconds,
        "stream_wait_seconds": stats.stream_wait_seconds,
        "streamed_bytes": stats.streamed_bytes,
        "fast_peak_bytes": session.peak.peak_bytes,
        "budget_bytes": session.plan.budget_bytes,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "predicted_tokens_per_second": session.predicted_tokens_per_second,
    }


def histogram(accepted: list[int]) -> list[int]:
    """At index n: rounds that accepted n."""
    return [accepted.count(n) for n in range(max(accepted, default=0) + 1)]


def stats_line(session: Session) -> str:
    """One line for a person: prompt, speed against its prediction, acceptance, memory."""
    stats, found = session.stats, stats_json(session)
    rounds, predicted = found["rounds"], found["predicted_tokens_per_second"]
    reused = f" ({stats.reused_tokens} reused)" if stats.reused_tokens else ""
    said = [
        f"prompt {counted(stats.prompt_tokens, 'token')}{reused}, "
        f"first token after {duration(stats.time_to_first_token_seconds)}",
    ]
    speed = counted(stats.generated_tokens, "token")
    if rounds:
        speed += f" at {number(stats.decode_tokens_per_second)} tokens/s"
        speed += f" (predicted {number(predicted)})" if predicted else ""
    said.append(speed)
    if rounds and session.method == "substitute":
        said.append(f"accepted {found['mean_accepted_per_round']:.1f} per round")
    if rounds and stats.streamed_bytes:
        said.append(f"streamed {short_size(stats.streamed_bytes / rounds)} per round")
    said.append(
        f"peak {short_size(found['fast_peak_bytes'])} of {short_size(found['budget_bytes'])}"
    )
    return " · ".join(said)
