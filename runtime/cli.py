"""subspec-run ARTIFACT [PROMPT]: one prompt, or a chat. Heavy imports wait until they are needed."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.command import reported, size_option
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.sizes import format_size, short_size

if TYPE_CHECKING:
    from subspec.runtime.sampling import Sampling
    from subspec.runtime.session import Session
    from subspec.runtime.text import Text

Command = Callable[..., None]


@dataclass(frozen=True)
class Options:
    """The command line, as click parsed it."""

    artifact: Path
    prompt: str | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    system: str | None = None
    raw: bool = False
    chat: bool = False
    no_speculation: bool = False
    unpadded: bool = False
    vram: int | None = None
    device: str | None = None
    link_bandwidth: int | None = None
    as_json: bool = False
    check: bool = False
    full: bool = False


def option(name: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option whose default is the one of Options."""
    field = name.lstrip("-").replace("-", "_")
    default = getattr(Options, field)
    shown = default not in (None, False, ())
    return click.option(name, default=default, show_default=shown, help=help, **settings)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@option("--max-tokens", "Longest answer, in tokens.", type=click.IntRange(min=1))
@option("--temperature", "0 takes the likeliest token.", type=click.FloatRange(min=0, max=100))
@option("--top-p", "Sample from this share.", type=click.FloatRange(0, 1, min_open=True))
@option("--top-k", "Sample from so many tokens; 0: all.", type=click.IntRange(min=0))
@option("--seed", "The same seed gives the same tokens.", type=click.IntRange(0, 2**63 - 1))
@option("--stop", "End before this text; may be repeated.", multiple=True)
@option("--system", "System message of the chat.")
@option("--raw", "Continue PROMPT as it is, without the chat template.", is_flag=True)
@option("--chat", "Several turns; the default on a terminal without PROMPT.", is_flag=True)
@option("--no-speculation", "The plain twin: the same tokens without a draft.", is_flag=True)
@option("--unpadded", "With --no-speculation: plain decoding at its fastest.", is_flag=True)
@option("--vram", "Refuse a plan that takes more.", callback=size_option, metavar="SIZE")
@option("--device", "One GPU of several, such as cuda:1.")
@option(
    "--link-bandwidth", "Slow the link to SIZE a second.", callback=size_option, metavar="SIZE"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@option("--check", "Check the artifact's structure and stop.", is_flag=True)
@option("--full", "With --check: every byte against its digest.", is_flag=True)
@click.version_option(package_name="subspec")
@reported
def main(**given: Any) -> None:
    """Run the model in the folder ARTIFACT on PROMPT (- reads it from stdin).

    The answer goes to stdout, everything else to stderr. Exit codes, the SIZE grammar and the JSON
    object are in docs/commands.md.
    """
    options = Options(**given)
    for flag, needs in (("full", "check"), ("unpadded", "no_speculation")):
        if getattr(options, flag) and not getattr(options, needs):
            needed = needs.replace("_", "-")
            raise SubspecError(
                Exit.USAGE, f"--{flag} was given without --{needed}", f"add --{needed}"
            )
    if options.check:
        check(options)
        return
    prompt = read_prompt(options)
    with opened(options) as (session, text):
        if prompt is None or options.chat:
            from subspec.runtime.chat import chat

            chat(session, text, options, prompt)
        else:
            answer_once(session, text, options, prompt)


def check(options: Options) -> None:
    from subspec.artifacts.store import open_artifact, verify

    artifact = open_artifact(options.artifact)
    size = sum(entry.num_bytes for entry in artifact.manifest.files)
    if options.full:
        verify(options.artifact)
    said = "every byte matches" if options.full else "structure is sound (--full checks every byte)"
    if options.as_json:
        found = {"schema": "subspec.check/1", "bytes": size, "full": options.full, "ok": True}
        print(json.dumps(found))
    sys.stderr.write(f"{options.artifact}: {format_size(size)}, {said}\n")


def read_prompt(options: Options) -> str | None:
    if options.prompt is None:
        if options.as_json or not (options.chat or sys.stdin.isatty()):
            raise SubspecError(
                Exit.USAGE, "no PROMPT was given", "give a PROMPT, - for stdin, or --chat"
            )
        return None
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise SubspecError(Exit.USAGE, "the PROMPT is empty", "give some text")
    return prompt


@contextmanager
def opened(options: Options) -> "Iterator[tuple[Session, Text]]":
    """The model in fast memory and its tokenizer, progress on stderr."""
    from subspec.artifacts.store import open_artifact

    artifact = open_artifact(options.artifact)
    plan = artifact.plan
    if options.vram is not None and options.vram < plan.budget_bytes:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"the plan takes up to {format_size(plan.budget_bytes)}, --vram allows "
            f"{format_size(options.vram)}",
            f"plan again: subspec-plan --model {artifact.spec.source.repository} "
            f"--vram {options.vram}B",
        )
    from subspec.runtime.session import Session, machine_name
    from subspec.runtime.text import load_text

    text = load_text(artifact.path / "tokenizer")
    with Session(
        artifact,
        method="plain" if options.no_speculation else None,
        padded=not options.unpadded,
        device=options.device,
        link_bandwidth=options.link_bandwidth,
        progress=progress_line(),
    ) as session:
        here = machine_name(session.device)
        if here != plan.machine:
            sys.stderr.write(
                f"note: planned on ({plan.machine}), running on ({here}): speeds will differ, "
                "subspec-plan would fit the plan to this machine\n"
            )
        yield session, text


def progress_line() -> Any:
    """Progress on one line of a terminal; nothing elsewhere, since loading is brief."""

    def show(stage: str, share: float) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{stage} {share:4.0%}" if share < 1 else "\r\033[K")
            sys.stderr.flush()

    return show


def answer_once(session: "Session", text: "Text", options: Options, prompt: str) -> None:
    if options.raw:
        ids = text.plain_ids(prompt)
    else:
        messages = [{"role": "system", "content": options.system}] if options.system else []
        ids = text.chat_ids([*messages, {"role": "user", "content": prompt}])
    answer = generate(session, text, options, ids, echo=not options.as_json)
    if options.as_json:
        print(json.dumps(answer.as_json(session), ensure_ascii=False))
    else:
        sys.stdout.write("\n")
    sys.stderr.write(stats_line(session) + "\n")
    if answer.finish_reason == "interrupted":
        sys.stdout.flush()
        sys.exit(int(Exit.INTERRUPTED))


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "eos", "stop", "length" or "interrupted"

    def as_json(self, session: "Session") -> dict[str, Any]:
        return {
            "schema": "subspec.run/1",
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_token_ids": self.prompt_token_ids,
            "finish_reason": self.finish_reason,
            "method": session.method,
            "stats": stats_json(session),
        }


def generate(
    session: "Session", text: "Text", options: Options, ids: list[int], echo: bool
) -> Answer:
    """Runs the prompt `ids`; with `echo` the text streams to stdout as it becomes certain."""
    from subspec.runtime.text import Printer

    printer, token_ids, reason = Printer(text, options.stop), list[int](), "length"
    eos = frozenset(session.artifact.spec.eos_token_ids)

    def show(fresh: str) -> None:
        if echo and fresh:
            sys.stdout.write(fresh)
            sys.stdout.flush()

    try:
        for emitted in session.generate(ids, options.max_tokens, sampling_of(options), eos):
            before = printer.num_tokens
            show(printer.feed(emitted))
            token_ids += emitted[: printer.num_tokens - before]
            if printer.stopped:
                reason = "stop"
                break
            if emitted[-1] in eos:
                reason = "eos"
    except KeyboardInterrupt:
        reason = "interrupted"
    show(printer.finish())
    return Answer(printer.text, token_ids, ids, reason)


def sampling_of(options: Options) -> "Sampling":
    from subspec.runtime.sampling import Sampling

    return Sampling(options.temperature, options.top_k, options.top_p, options.seed)


def stats_json(session: "Session") -> dict[str, Any]:
    stats = session.stats
    rounds = len(stats.accepted)
    histogram = [stats.accepted.count(n) for n in range(max(stats.accepted, default=0) + 1)]
    return {
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "generated_tokens": stats.generated_tokens,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "time_to_first_token_seconds": stats.time_to_first_token_seconds,
        "rounds": rounds,
        "mean_accepted_per_round": sum(stats.accepted) / rounds if rounds else 0.0,
        "accepted_histogram": histogram,
        "draft_seconds": stats.draft_seconds,
        "verify_seconds": stats.verify_seconds,
        "stream_wait_seconds": stats.stream_wait_seconds,
        "streamed_bytes": stats.streamed_bytes,
        "fast_peak_bytes": session.peak.peak_bytes,
        "fast_cap_bytes": session.plan.budget_bytes,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "predicted_tokens_per_second": session.predicted_tokens_per_second,
    }


def stats_line(session: "Session") -> str:
    """One line for a person: what was read, how fast, how much memory, against the prediction."""
    stats, found = session.stats, stats_json(session)
    rounds = max(1, found["rounds"])
    predicted = found["predicted_tokens_per_second"]
    said = [
        f"prompt {stats.prompt_tokens} tokens ({stats.reused_tokens} reused), "
        f"first after {stats.time_to_first_token_seconds:.2f} s",
        f"{stats.generated_tokens} tokens at {stats.decode_tokens_per_second:.2f} tokens/s"
        + (f" (predicted {predicted:.2f})" if predicted else ""),
        f"accepted {found['mean_accepted_per_round']:.1f} a round",
        f"streamed {short_size(stats.streamed_bytes / rounds)} a round",
        f"peak {short_size(found['fast_peak_bytes'])} of {short_size(found['fast_cap_bytes'])}",
    ]
    return " · ".join(said)
