"""subspec-run ARTIFACT [PROMPT]: one prompt, or a chat. Slow imports are done when needed."""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.common.command import HINT, Program, say, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size

if TYPE_CHECKING:
    from subspec.artifacts.format.store import Artifact
    from subspec.runtime.app.answer import Answering
    from subspec.runtime.app.opening import Opening
    from subspec.runtime.text.tokenizer import ChatTokenizer

LARGEST_PROMPT = 16 << 20  # bytes read from stdin
DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?", re.ASCII)

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
    no_graphs: bool = False
    vram: int | None = None
    no_replan: bool = False
    trust_kernels: bool = False
    device: str | None = None
    link_bandwidth: int | None = None
    as_json: bool = False
    check: bool = False
    full: bool = False
    stats: bool = False
    no_record: bool = False


# The first flag of a pair needs the second, or excludes it.
NEEDS = (("full", "check"), ("unpadded", "no_speculation"))
EXCLUDES = (
    ("as_json", "chat"), ("raw", "chat"), ("raw", "system"), ("vram", "no_replan"),
    ("stats", "prompt"), ("stats", "chat"), ("stats", "check"),
)  # fmt: skip


def option(name: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option with the default of its field in Options."""
    field = name.lstrip("-").replace("-", "_")
    default = getattr(Options, field)
    shown = default not in (None, False, ())
    return click.option(name, default=default, show_default=shown, help=help, **settings)


def finite_option(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Refuse nan, which click's ranges accept, and infinity."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number{HINT}0.7 is one")
    return value


def device_option(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value is not None and DEVICE.fullmatch(value) is None:
        raise click.BadParameter(
            f"{value!r} is not a device{HINT}use cpu, cuda, or one of several GPUs, such as cuda:1"
        )
    return value


@click.command("subspec-run", cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@option("--max-tokens", "Longest answer, in tokens.", type=click.IntRange(min=1))
@option(
    "--temperature", "Sampling temperature; 0 is greedy.",
    type=click.FloatRange(0, 100), callback=finite_option,
)  # fmt: skip
@option(
    "--top-p", "Nucleus sampling: smallest set of tokens with cumulative probability P.",
    type=click.FloatRange(0, 1, min_open=True), callback=finite_option,
)  # fmt: skip
@option("--top-k", "Sample from the K likeliest tokens; 0 disables.", type=click.IntRange(min=0))
@option(
    "--seed",
    "Seed of the sampling noise; the same seed gives the same tokens.",
    type=click.IntRange(0, 2**63 - 1),
)
@option("--stop", "Stop before this text; may be repeated.", multiple=True)
@option("--system", "System message of the chat.")
@option("--raw", "Continue PROMPT as it is, without the chat template.", is_flag=True)
@option("--chat", "Chat of several turns; the default on a terminal without PROMPT.", is_flag=True)
@option("--no-speculation", "Decode plainly: the same tokens without a draft.", is_flag=True)
@option(
    "--unpadded", "With --no-speculation: one unpadded row per pass, the fastest.", is_flag=True
)
@option("--no-graphs", "On a GPU: no CUDA graphs for the draft.", is_flag=True)
@option("--vram", "Re-plan for SIZE if the plan needs more.", callback=size_option, metavar="SIZE")
@option("--no-replan", "Use the stored plan as it is, on any machine.", is_flag=True)
@option(
    "--trust-kernels", "Load the pre-built kernels in ARTIFACT; they are programs.", is_flag=True
)
@option("--device", "cpu, or one GPU such as cuda:1.", callback=device_option, metavar="DEVICE")
@option(
    "--link-bandwidth", "Limit the link to SIZE per second.", callback=size_option, metavar="SIZE"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@option("--check", "Check the artifact's structure and exit.", is_flag=True)
@option("--full", "With --check: compare every byte with its digest.", is_flag=True)
@option("--stats", "Compare recorded runs with the plan's predictions.", is_flag=True)
@option("--no-record", "Do not add this run to the run records.", is_flag=True)
@click.version_option(package_name="subspec")
def main(**given: Any) -> None:
    """Run the model in the folder ARTIFACT on PROMPT (- reads it from stdin).

    The answer goes to stdout, everything else to stderr. Exit codes, the SIZE grammar and the JSON
    object are in docs/commands.md.
    """
    options = Options(**given)
    check_options(options)
    if options.check:
        check(options)
        return
    if options.stats:
        from subspec.runtime.app.folder import open_folder
        from subspec.runtime.app.history import report

        report(open_folder(options.artifact), options.as_json)
        return
    from subspec.runtime.app.folder import begin_to_read, open_folder

    artifact = open_folder(options.artifact)
    begin_to_read(artifact, "plain" if options.no_speculation else None)
    prompt = read_prompt(options)
    from subspec.runtime.app.opening import opened, planned_for_here, progress_line, trust_kernels
    from subspec.runtime.text.tokenizer import load_tokenizer

    how = opening(options)
    if options.trust_kernels:
        trust_kernels(artifact)
    artifact = planned_for_here(artifact, how)

    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    if prompt is None or options.chat:
        with opened(artifact, how, progress_line()) as engine:
            from subspec.runtime.app.chat import chat

            chat(engine, tokenizer, answering(artifact, options), options.system or "", prompt)
        return
    # Before the weights load, as the prompt may be too long.
    ids = prompt_ids(artifact, tokenizer, options, prompt)
    with opened(artifact, how, progress_line()) as engine:
        from subspec.runtime.app.answer import answer_once

        answer_once(engine, tokenizer, answering(artifact, options), ids, options.as_json)


def opening(options: Options) -> "Opening":
    from subspec.runtime.app.opening import Opening

    return Opening(
        method="plain" if options.no_speculation else None,
        vram=options.vram,
        replan=not options.no_replan,
        device=options.device,
        link_bandwidth=options.link_bandwidth,
        padded=not options.unpadded,
        graphs=not options.no_graphs,
    )


def answering(artifact: "Artifact", options: Options) -> "Answering":
    from subspec.runtime.app.answer import Answering
    from subspec.runtime.model.sampling import Sampling
    from subspec.runtime.sequence import GenerationParams

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    ends = frozenset(artifact.spec.eos_token_ids)
    params = GenerationParams(options.max_tokens, sampling, ends)
    return Answering(params, options.stop, options.link_bandwidth, not options.no_record)


def check_options(options: Options) -> None:
    """Raises SubspecError(USAGE) for what click cannot see."""
    for flag, other in NEEDS:
        if getattr(options, flag) and not getattr(options, other):
            message = f"{spelled(flag)} was given without {spelled(other)}"
            raise SubspecError(Exit.USAGE, message, f"add {spelled(other)}")
    for flag, other in EXCLUDES:
        if getattr(options, flag) and getattr(options, other):
            message = f"{spelled(flag)} and {spelled(other)} exclude each other"
            raise SubspecError(Exit.USAGE, message, "leave one out")
    if "" in options.stop:
        raise SubspecError(Exit.USAGE, "--stop is empty", "give the text that ends the answer")
    try:
        "".join([options.prompt or "", options.system or "", *options.stop]).encode("utf-8")
    except UnicodeEncodeError:  # surrogates, which stand for bytes that are not UTF-8
        raise SubspecError(Exit.USAGE, "an argument is not UTF-8", "convert it to UTF-8") from None


def spelled(field: str) -> str:
    names = {"as_json": "--json", "prompt": "a PROMPT"}
    return names.get(field, "--" + field.replace("_", "-"))


def check(options: Options) -> None:
    from subspec.artifacts.format.store import verify
    from subspec.runtime.app.folder import open_folder

    artifact = open_folder(options.artifact)
    size = sum(entry.num_bytes for entry in artifact.manifest.files)
    if options.full:
        verify(options.artifact)
    said = "every byte matches" if options.full else "structure is sound (--full checks every byte)"
    if options.as_json:
        found = {"schema": "subspec.check/1", "bytes": size, "full": options.full, "ok": True}
        print(json.dumps(found))
    say(f"{options.artifact}: {format_size(size)}, {said}")


def read_prompt(options: Options) -> str | None:
    """The PROMPT, or the text of stdin; None for a chat on a terminal."""
    prompt = options.prompt
    if prompt is None and options.chat:
        return None
    if prompt is None and sys.stdin.isatty():
        if not options.as_json:
            return None
        raise SubspecError(Exit.USAGE, "--json was given without a PROMPT", "give a PROMPT")
    from_stdin = prompt is None or prompt == "-"
    if from_stdin:
        raw = sys.stdin.buffer.read(LARGEST_PROMPT + 1)
        if len(raw) > LARGEST_PROMPT:
            message = f"stdin has more than {format_size(LARGEST_PROMPT)}"
            raise SubspecError(Exit.USAGE, message, "give a shorter PROMPT")
        try:
            prompt = raw.decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            message = f"stdin is not UTF-8: {error.reason} at byte {error.start}"
            raise SubspecError(Exit.USAGE, message, "convert it to UTF-8") from None
    if not prompt or (prompt.isspace() and not options.raw):  # a raw newline can be continued
        what = "the PROMPT is empty: stdin has no text" if from_stdin else "the PROMPT is empty"
        others = ", or --chat" if not (options.raw or options.as_json) else ""
        hint = "give a PROMPT" if from_stdin else "give some text, - for stdin"
        raise SubspecError(Exit.USAGE, what, hint + others)
    return prompt


def prompt_ids(
    artifact: "Artifact", tokenizer: "ChatTokenizer", options: Options, prompt: str
) -> list[int]:
    if options.raw:
        ids = tokenizer.plain_ids(prompt)
    else:
        messages = [{"role": "system", "content": options.system}] if options.system else []
        ids = tokenizer.chat_ids([*messages, {"role": "user", "content": prompt}])
        if tokenizer.template is None:
            say("note: this model has no chat template, it continues the PROMPT as it is")
    if not ids:
        by_template = not options.raw and tokenizer.template is not None
        raise SubspecError(
            Exit.USAGE,
            "the prompt has 0 tokens: the model's "
            f"{'chat template' if by_template else 'tokenizer'} leaves nothing of the PROMPT",
            "continue it without the template: --raw" if by_template else "give other text",
        )
    tokenizer.check_known(ids, artifact.spec.vocab_size)
    context = artifact.plan.context
    if len(ids) >= context:
        raise SubspecError(
            Exit.USAGE,
            f"the prompt has {len(ids)} tokens, the plan's context is {context}",
            f"shorten it, or plan with --context {len(ids) + 256} or more",
        )
    return ids
