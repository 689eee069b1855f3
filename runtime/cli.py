"""subspec-run ARTIFACT|--model REF [PROMPT]: one prompt, or a chat. Slow imports are done when
needed."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.common.command import finite_option, say
from subspec.artifacts.common.configuration import Configured
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size
from subspec.runtime.app.opening_options import drafting_options, lossy_options, plan_options
from subspec.runtime.app.run_options import (
    MAX_LOGPROBS,
    RULES,
    Options,
    arranged,
    bias_option,
    check_options,
    option,
)

if TYPE_CHECKING:
    from subspec.artifacts.format.store import Artifact
    from subspec.runtime.app.answer import Answering
    from subspec.runtime.text.tokenizer import ChatTokenizer

MAX_PROMPT = 16 << 20  # bytes read from stdin


@click.command(
    "subspec-run", cls=Configured, rules=RULES,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
@click.argument("artifact", required=False)
@click.argument("prompt", required=False)
@option(
    "--model",
    "Model to run instead of ARTIFACT; it is planned for --vram on first use and cached.",
    metavar="REF",
)
@option("--max-tokens", "Longest answer, in tokens.", type=click.IntRange(min=1))
@option(
    "--temperature", "SamplingParams temperature; 0 is greedy.",
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
    "--frequency-penalty",
    "Penalty per occurrence of a token in the answer, subtracted from its logit.",
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
@drafting_options
@option(
    "--unpadded", "With --no-speculation: one unpadded row per pass, the fastest.", is_flag=True
)
@plan_options
@option("--context", "With --model: tokens of prompt and answer.", type=click.IntRange(min=16))
@option("--sequences", "With --model: conversations in memory.", type=click.IntRange(1, 256))
@option("--rehearse", "With --model: as for subspec-plan.", metavar="SECONDS|none")
@option("--draft-model", "With --model: a smaller model that may draft.", metavar="REF")
@lossy_options
@option(
    "--logprobs", "With --json: log probabilities of each token and of the N likeliest.",
    type=click.IntRange(0, MAX_LOGPROBS), metavar="N",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@option("--check", "Check the artifact's structure and exit.", is_flag=True)
@option("--full", "With --check: compare every byte with its digest.", is_flag=True)
@option("--stats", "Compare recorded runs with the plan's predictions.", is_flag=True)
@option("--no-record", "Do not add this run to the run records.", is_flag=True)
@click.version_option(package_name="subspec")
def main(**given: Any) -> None:
    """Run the model in the folder ARTIFACT on PROMPT (- reads it from stdin); or, with --model REF
    --vram SIZE in place of ARTIFACT, plan the model first and cache the artifact.

    The answer goes to stdout, everything else to stderr. Exit codes, the SIZE grammar and the JSON
    object are in docs/commands.md.
    """
    options = arranged(Options(**given))
    check_options(options)
    if options.check:
        check(chosen_folder(options), options)
        return
    if options.stats:
        from subspec.runtime.app.folder import open_folder
        from subspec.runtime.app.history import report

        report(open_folder(chosen_folder(options)), options.as_json)
        return
    prompt = read_prompt(options)  # before a model is planned, as it may be empty
    from subspec.runtime.app.folder import begin_to_read, open_folder

    artifact = open_folder(chosen_folder(options))
    begin_to_read(artifact, options.method)
    from subspec.runtime.app.opening import opened, planned_for_here, progress_line, trust_kernels
    from subspec.runtime.text.tokenizer import load_tokenizer

    if options.trust_kernels:
        trust_kernels(artifact)
    check_bias(artifact, options)
    artifact = planned_for_here(artifact, options)

    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    if prompt is None or options.chat:
        with opened(artifact, options, progress_line(), not options.unpadded) as engine:
            from subspec.runtime.app.chat import chat

            chat(engine, tokenizer, answering(artifact, options), options.system or "", prompt)
        return
    # Before the weights load, as the prompt may be too long.
    ids = prompt_ids(artifact, tokenizer, options, prompt)
    with opened(artifact, options, progress_line(), not options.unpadded) as engine:
        from subspec.runtime.app.answer import answer_once

        answer_once(engine, tokenizer, answering(artifact, options), ids, options.as_json)


def answering(artifact: "Artifact", options: Options) -> "Answering":
    from subspec.runtime.app.answer import Answering
    from subspec.runtime.model.sampling import SamplingParams
    from subspec.runtime.sequence import GenerationParams

    sampling = SamplingParams(
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
    params = GenerationParams(
        options.max_tokens, sampling, ends, logprobs=options.logprobs, lossy=options.lossy
    )
    return Answering(params, options.stop, not options.no_record)


def chosen_folder(options: Options) -> Path:
    """Folder of ARTIFACT, or of the artifact of --model, which is planned if it is missing."""
    if options.model is None:
        assert options.artifact is not None, "arranged() asks for it"
        return Path(options.artifact)
    from subspec.runtime.app.planned_model import planned_model, request_of

    return planned_model(request_of(options))


def check(folder: Path, options: Options) -> None:
    from subspec.artifacts.format.store import verify
    from subspec.runtime.app.folder import open_folder

    artifact = open_folder(folder)
    size = sum(entry.num_bytes for entry in artifact.manifest.files)
    if options.full:
        verify(folder)
    said = "every byte matches" if options.full else "structure is sound (--full checks every byte)"
    if options.as_json:
        found = {"schema": "subspec.check/1", "bytes": size, "full": options.full, "ok": True}
        print(json.dumps(found))
    say(f"{folder}: {format_size(size)}, {said}")


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
        raw = sys.stdin.buffer.read(MAX_PROMPT + 1)
        if len(raw) > MAX_PROMPT:
            message = f"stdin has more than {format_size(MAX_PROMPT)}"
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
    """Raise SubspecError(USAGE) for unknown token ids, before the weights load."""
    last = artifact.spec.vocab_size - 1
    wrong = next((token for token, _ in options.logit_bias if token > last), None)
    if wrong is not None:
        message = f"--logit-bias has the token id {wrong}, expected 0 to {last}"
        raise SubspecError(Exit.USAGE, message, "use the ids of the model's own tokenizer")
