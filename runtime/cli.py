"""subspec-run ARTIFACT|--model REF [PROMPT]: one prompt, or a chat. Slow imports are done when
needed."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.common.command import Program, say, size_option
from subspec.artifacts.common.cpu_load import cpu_times, others_share
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size
from subspec.runtime.app.run_options import (
    MOST_LOGPROBS,
    Options,
    arranged,
    bias_option,
    check_options,
    device_option,
    finite_option,
    option,
)

if TYPE_CHECKING:
    from subspec.artifacts.format.store import Artifact
    from subspec.artifacts.plan import Method
    from subspec.runtime.app.answer import Answering
    from subspec.runtime.engine import Engine
    from subspec.runtime.text.tokenizer import ChatTokenizer

LARGEST_PROMPT = 16 << 20  # bytes read from stdin
LOADED_FIRST_BYTES = 2 << 30  # that a disk reads in about a second
SECONDS_BETWEEN_LINES = 10.0  # of progress, if stderr is not a terminal


@click.command("subspec-run", cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("artifact", required=False)
@click.argument("prompt", required=False)
@option("--model", "Instead of ARTIFACT: plan REF for --vram, once, and keep it.", metavar="REF")
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
    "--min-p", "Sample from tokens with at least P times the likeliest's probability.",
    type=click.FloatRange(0, 1), callback=finite_option,
)  # fmt: skip
@option(
    "--repetition-penalty", "Penalty on tokens in the prompt or the answer; 1 disables.",
    type=click.FloatRange(0, min_open=True), callback=finite_option,
)  # fmt: skip
@option(
    "--presence-penalty", "Penalty on tokens in the answer, subtracted from their logits.",
    type=float, callback=finite_option,
)  # fmt: skip
@option(
    "--frequency-penalty", "The same, for each time that a token is in the answer.",
    type=float, callback=finite_option,
)  # fmt: skip
@option(
    "--logit-bias", "Add BIAS to the logit of token ID; may be repeated.",
    multiple=True, metavar="ID=BIAS", callback=bias_option,
)  # fmt: skip
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
@option(
    "--vram", "Budget: re-plan for SIZE if the plan needs more.",
    callback=size_option, metavar="SIZE",
)  # fmt: skip
@option("--no-replan", "Use the stored plan as it is, on any machine.", is_flag=True)
@option(
    "--trust-kernels", "Load the pre-built kernels in ARTIFACT; they are programs.", is_flag=True
)
@option("--device", "cpu, or one GPU such as cuda:1.", callback=device_option, metavar="DEVICE")
@option(
    "--link-bandwidth", "Limit the link to SIZE per second.", callback=size_option, metavar="SIZE"
)
@option("--context", "With --model: tokens of prompt and answer.", type=click.IntRange(min=16))
@option("--sequences", "With --model: conversations in memory.", type=click.IntRange(1, 256))
@option("--rehearse", "With --model: as for subspec-plan.", metavar="SECONDS|none")
@option(
    "--logprobs", "With --json: log probabilities of each token and of the N likeliest.",
    type=click.IntRange(0, MOST_LOGPROBS), metavar="N",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@option("--check", "Check the artifact's structure and exit.", is_flag=True)
@option("--full", "With --check: compare every byte with its digest.", is_flag=True)
@option("--stats", "Compare recorded runs with the plan's predictions.", is_flag=True)
@option("--no-record", "Do not add this run to the run records.", is_flag=True)
@click.version_option(package_name="subspec")
def main(**given: Any) -> None:
    """Run the model in the folder ARTIFACT on PROMPT (- reads it from stdin); or, with --model REF
    --vram SIZE in place of ARTIFACT, plan the model first, which is kept for the next time.

    The answer goes to stdout, everything else to stderr. Exit codes, the SIZE grammar and the JSON
    object are in docs/commands.md.
    """
    options = arranged(Options(**given))
    check_options(options)
    if options.check:
        check(chosen_folder(options), options)
        return
    if options.stats:
        from subspec.runtime.app.history import report

        report(open_folder(chosen_folder(options)), options.as_json)
        return
    prompt = read_prompt(options)  # before a model is planned, as it may be empty
    artifact = open_folder(chosen_folder(options))
    begin_to_read(artifact, options)
    if options.trust_kernels:
        trust_kernels(artifact)
    check_bias(artifact, options)
    artifact = planned_for_here(artifact, options)
    from subspec.runtime.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    if prompt is None or options.chat:
        with opened(artifact, options) as engine:
            from subspec.runtime.app.chat import chat

            how = answering(artifact, options)
            chat(engine, tokenizer, how, options.system or "", prompt)
        return
    # Before the weights load, as the prompt may be too long.
    ids = prompt_ids(artifact, tokenizer, options, prompt)
    with opened(artifact, options) as engine:
        from subspec.runtime.app.answer import answer_once

        answer_once(engine, tokenizer, answering(artifact, options), ids, options.as_json)


def answering(artifact: "Artifact", options: Options) -> "Answering":
    from subspec.runtime.app.answer import Answering
    from subspec.runtime.model.sampling import Sampling
    from subspec.runtime.sequence import GenerationParams

    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        options.min_p,
        options.repetition_penalty,
        options.presence_penalty,
        options.frequency_penalty,
        options.logit_bias,
    )
    ends = frozenset(artifact.spec.eos_token_ids)
    params = GenerationParams(options.max_tokens, sampling, ends, logprobs=options.logprobs)
    return Answering(params, options.stop, options.link_bandwidth, not options.no_record)


def chosen_folder(options: Options) -> Path:
    """ARTIFACT, or that of --model, which is planned if it is not there yet."""
    if options.model is None:
        assert options.artifact is not None, "arranged() asks for it"
        return Path(options.artifact)
    from subspec.runtime.app.planned_model import ModelRequest, planned_model

    assert options.vram is not None, "check_options asks for it"
    return planned_model(
        ModelRequest(
            options.model, options.vram, options.device, options.context, options.sequences,
            options.link_bandwidth, options.rehearse,
        )
    )  # fmt: skip


def check(folder: Path, options: Options) -> None:
    from subspec.artifacts.format.store import verify

    artifact = open_folder(folder)
    size = sum(entry.num_bytes for entry in artifact.manifest.files)
    if options.full:
        verify(folder)
    said = "every byte matches" if options.full else "structure is sound (--full checks every byte)"
    if options.as_json:
        found = {"schema": "subspec.check/1", "bytes": size, "full": options.full, "ok": True}
        print(json.dumps(found))
    say(f"{folder}: {format_size(size)}, {said}")


def open_folder(path: Path) -> "Artifact":
    """open_artifact, with a hint if `path` is a checkpoint or the name of a model."""
    from subspec.artifacts.format.store import open_artifact

    is_checkpoint = (path / "config.json").exists() and not (path / "manifest.json").exists()
    if path.exists() and not is_checkpoint:
        return open_artifact(path)
    what = "is a checkpoint, not an artifact" if is_checkpoint else "does not exist"
    model = path if is_checkpoint or not path.is_absolute() else "REF"
    raise SubspecError(
        Exit.USAGE,
        f"{path} {what}",
        f"plan and run it: subspec-run --model {model} --vram SIZE; or give a folder that was made "
        f"with subspec-plan --model {model} --vram SIZE",
    )


def begin_to_read(artifact: "Artifact", options: Options) -> None:
    """Start reading the substitutes, which are loaded first, into the page cache: the disk is idle
    for a second or two while torch is imported."""
    from threading import Thread

    from subspec.artifacts.format.tensors import read_ahead

    method: Method = "plain" if options.no_speculation else artifact.plan.method
    placement = artifact.plan.placements.get(method)
    if placement is not None and placement.ledger.substitutes:
        path = artifact.path / "substitutes.safetensors"
        Thread(target=read_ahead, args=(path, LOADED_FIRST_BYTES), daemon=True).start()


def trust_kernels(artifact: "Artifact") -> None:
    """Install the artifact's pre-built kernels, before anything is built or planned."""
    from subspec.artifacts.format.prebuilt import install_prebuilt
    from subspec.runtime.engine import kernel_sources

    missing = install_prebuilt(artifact, kernel_sources(artifact.plan))
    if missing:
        say(f"note: no pre-built kernels for this machine, compiling: {', '.join(missing)}")


def planned_for_here(artifact: "Artifact", options: Options) -> "Artifact":
    """The artifact with its own plan, or re-planned if that does not fit this machine."""
    if options.no_replan:
        return artifact
    from subspec.runtime.app.replan import fitted

    artifact, note = fitted(
        artifact,
        "plain" if options.no_speculation else None,
        options.vram,
        options.device,
        options.link_bandwidth,
        progress_line() if sys.stderr.isatty() else lambda *_: None,  # elsewhere only the note
    )
    if note:
        say(f"note: {note}")
    return artifact


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


def check_bias(artifact: "Artifact", options: Options) -> None:
    """Before the weights load. Raises SubspecError(USAGE)."""
    last = artifact.spec.vocab_size - 1
    if (
        wrong := next((token for token, _ in options.logit_bias if token > last), None)
    ) is not None:
        message = f"--logit-bias has the token id {wrong}, expected 0 to {last}"
        raise SubspecError(Exit.USAGE, message, "use the ids of the model's own tokenizer")


@contextmanager
def opened(artifact: "Artifact", options: Options) -> "Iterator[Engine]":
    """Open the engine, with progress and notes on stderr."""
    import torch

    from subspec.artifacts.profile import UNDER_LOAD
    from subspec.runtime.engine import Engine, OpenOptions, machine_name

    how = OpenOptions(
        method="plain" if options.no_speculation else None,
        padded=not options.unpadded,
        device=options.device,
        link_bandwidth=options.link_bandwidth,
        graphs=not options.no_graphs,
    )
    started = cpu_times()
    try:
        with Engine.open(artifact, how, progress_line()) as engine:
            here, planned = machine_name(engine.device), artifact.plan.machine
            if here != planned:
                say(
                    f"note: planned on ({planned}), running on ({here}): speeds will differ; "
                    "subspec-plan --from re-plans for this machine"
                )
            elif (
                planned == artifact.profile.machine
                and artifact.profile.under_load
                and others_share(started, cpu_times()) <= UNDER_LOAD
            ):
                say(measured_under_load(artifact))
            if (problem := engine.missing_kernels) is not None:
                trust = " (--trust-kernels would load the artifact's own)"
                say(
                    "note: without the C++ kernels residuals decode a hundred times slower, exact "
                    "attention is several times slower, and near-ties may be decided differently: "
                    f"{problem}"
                    f"{trust if engine.has_prebuilt_kernels else ''}"
                )
            if (problem := engine.plain_draft) is not None:
                say(f"note: drafting is slower than it could be: {problem}")
            yield engine
            if (problem := engine.missing_graphs) is not None:
                say(f"note: the draft's kernels were launched one by one: {problem}")
    except torch.OutOfMemoryError as error:
        raise SubspecError(
            Exit.RESOURCES,
            f"the GPU ran out of memory: {str(error).partition('. ')[0]}",
            "close other programs that use the GPU, or re-plan with a smaller --vram",
        ) from None


def measured_under_load(artifact: "Artifact") -> str:
    return (
        f"note: other programs used {artifact.profile.others_cpu_share:.0%} of the CPUs while this "
        "plan was measured, so predictions are too slow, and another plan may be faster: "
        f"subspec-plan --from {shlex.quote(str(artifact.path))} --reprofile"
    )


def progress_line() -> Callable[[str, float], None]:
    """Progress on one line of a terminal; elsewhere a line every SECONDS_BETWEEN_LINES."""
    spoken = time.monotonic()

    def show(stage: str, share: float) -> None:
        nonlocal spoken
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{stage} {share:4.0%}" if share < 1 else "\r\033[K")
            sys.stderr.flush()
        elif time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            say(f"{stage} {share:4.0%}")

    return show
