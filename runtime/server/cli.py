"""subspec-serve ARTIFACT|--model REF: serve a model through OpenAI's and Anthropic's APIs. Slow
imports are done when needed."""

import os
import shlex
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.common.command import HINT, finite_option, leave
from subspec.artifacts.common.configuration import Configured
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.app.opening_options import drafting_options, lossy_options, plan_options
from subspec.runtime.server.serve_options import (
    KEY_VARIABLE,
    MODEL_NAME,
    ORIGIN,
    RULES,
    Options,
    api_keys,
    check_options,
    matching,
    no_size_or_size,
    option,
)

if TYPE_CHECKING:
    from socket import socket

    from subspec.artifacts.format.store import Artifact
    from subspec.runtime.server.assembly import Settings

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")  # by the extra [serve]


@click.command(
    "subspec-serve", cls=Configured, rules=RULES,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@option(
    "--model",
    "Model to run instead of ARTIFACT; it is planned for --vram on first use and cached.",
    metavar="REF",
)
@option("--host", "Address to listen on. Addresses other than loopback need an API key.")
@option("--port", "Port to listen on; 0 takes a free one.", type=click.IntRange(0, 65535))
@option(
    "--api-key-file",
    f"File with API keys, one per line; {KEY_VARIABLE} adds one.",
    type=click.Path(path_type=Path), metavar="FILE",
)  # fmt: skip
@option("--insecure-no-auth", "Allow a non-loopback --host without an API key.", is_flag=True)
@option(
    "--cors-origin", "Allow web pages of this origin to use the API; may be repeated.",
    multiple=True, metavar="ORIGIN",
    callback=matching(ORIGIN, f"an origin{HINT}such as https://example.org"),
)  # fmt: skip
@option(
    "--model-name", "The model's id for clients. Default: the name of its checkpoint.",
    metavar="NAME", callback=matching(MODEL_NAME, "a name of letters, digits and . _ : / @ -"),
)  # fmt: skip
@option(
    "--sequences", "Answer at most N requests at once; re-plan if the plan has memory for fewer. "
    "Default: the plan's; with --model 1.",
    type=click.IntRange(1, 256), metavar="N",
)  # fmt: skip
@option("--queue", "Maximum number of waiting requests; more are refused with 503.",
        type=click.IntRange(0, 10_000), metavar="N")  # fmt: skip
@option("--prefix-cache", "Host memory for the prefixes of idle conversations.",
        type=click.UNPROCESSED, callback=no_size_or_size, metavar="SIZE")  # fmt: skip
@option("--shutdown-timeout", "Seconds to let running answers finish after SIGTERM or Ctrl-C.",
        type=click.FloatRange(0, 86400), callback=finite_option, metavar="SECONDS")  # fmt: skip
@option("--log-format", "Form of the log on stderr.", type=click.Choice(["text", "json"]))
@option("--strict", "Refuse requests with unknown fields instead of ignoring these.", is_flag=True)
@option("--temperature", "Default temperature; 0 is greedy.",
        type=click.FloatRange(0, 100), callback=finite_option)  # fmt: skip
@option("--top-p", "Default top-p.",
        type=click.FloatRange(0, 1, min_open=True), callback=finite_option)  # fmt: skip
@option("--top-k", "Default top-k; 0 disables.", type=click.IntRange(min=0))
@drafting_options
@lossy_options
@plan_options
@option(
    "--context", "With --model: tokens of prompt and answer together.",
    type=click.IntRange(min=16), metavar="N",
)  # fmt: skip
@option("--rehearse", "With --model: as for subspec-plan.", metavar="SECONDS|none")
@option("--draft-model", "With --model: a smaller model as draft model.", metavar="REF")
@option("--no-record", "Do not add answers to the run records.", is_flag=True)
@click.version_option(package_name="subspec")
def main(**given: Any) -> None:
    """Serve the model in the folder ARTIFACT over HTTP: a chat page, and the APIs of OpenAI and
    Anthropic. With --model REF --vram SIZE in place of ARTIFACT, plan the model first and cache the
    artifact.

    The server listens at once and answers once its weights are loaded. docs/server.md lists the
    endpoints.
    """
    options = Options(**given)
    check_extra()
    keys = api_keys(options.api_key_file, os.environ.get(KEY_VARIABLE))
    check_options(options, keys)
    code = served(options, keys)
    if code != Exit.OK:
        leave(code)


def check_extra() -> None:
    """Raise SubspecError(USAGE) if packages of the extra [serve] are missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise SubspecError(
            Exit.USAGE,
            f"subspec-serve needs {', '.join(missing)}, which {verb} not installed",
            "pip install 'subspec[serve]'",
        )


def served(options: Options, keys: tuple[str, ...]) -> Exit:
    """Run the server and return its exit code."""
    artifact = None if options.artifact is None else begun(options.artifact, options)
    from subspec.runtime.server.assembly import guard_settings, notify_listening
    from subspec.runtime.server.planning import answering_meanwhile
    from subspec.runtime.server.serving import listen

    settings = settings_of(options, keys)
    with listen(options.host, options.port) as listening:
        notify_listening(settings, listening)
        with answering_meanwhile(listening, guard_settings(settings)):
            artifact = artifact or begun(planned_folder(options), options)
            from subspec.runtime.app.opening import planned_for_here, trust_kernels

            if options.trust_kernels:
                trust_kernels(artifact)
            artifact = planned_for_here(artifact, options)
            check_sequences(artifact, options.sequences)
        return serve_artifact(options, settings, artifact, listening)


def begun(folder: Path, options: Options) -> "Artifact":
    """Open the artifact and start reading its files into the page cache."""
    from subspec.runtime.app.folder import begin_to_read, open_folder

    artifact = open_folder(folder)
    begin_to_read(artifact, options.method)
    return artifact


def planned_folder(options: Options) -> Path:
    """Return the folder of the artifact for --model, planning it if needed."""
    from subspec.runtime.app.planned_model import planned_model, request_of

    return planned_model(request_of(options))


def settings_of(options: Options, keys: tuple[str, ...]) -> "Settings":
    from subspec.runtime.model.sampling import SamplingParams
    from subspec.runtime.server.assembly import Settings

    return Settings(
        host=options.host,
        keys=keys,
        cors_origins=options.cors_origin,
        shutdown_seconds=options.shutdown_timeout,
        log_format="json" if options.log_format == "json" else "text",
        sampling=SamplingParams(options.temperature, options.top_k, options.top_p),
        refuse_unknown=options.strict,
    )


def check_sequences(artifact: "Artifact", asked: int | None) -> None:
    """Raise SubspecError(USAGE) for more sequences than the plan has memory for."""
    planned = artifact.plan.num_sequences
    if asked is not None and asked > planned:
        raise SubspecError(
            Exit.USAGE,
            f"--sequences {asked}, but the plan has memory for {planned}",
            f"subspec-plan --from {shlex.quote(str(artifact.path))} --sequences {asked}",
        )


def serve_artifact(
    options: Options,
    settings: "Settings",
    artifact: "Artifact",
    listening: "socket",
) -> Exit:
    from subspec.runtime.app.opening import open_engine, progress_line
    from subspec.runtime.server.assembly import model_info, serve_engine
    from subspec.runtime.server.chat import chat, count_tokens, open_chat_model
    from subspec.runtime.server.constraints import Constraints
    from subspec.runtime.server.scheduler import Scheduler
    from subspec.runtime.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    model = model_info(artifact, options, options.model_name)
    if options.sequences is not None:
        model = replace(model, num_sequences=options.sequences)
    engine = Scheduler(
        open_engine=lambda progress: open_engine(artifact, options, progress),
        tokenizer=tokenizer,
        num_sequences=model.num_sequences,
        queue_limit=options.queue,
        prefix_cache_bytes=options.prefix_cache,
        record=not options.no_record,
        lossy=options.lossy,
    )
    chats = open_chat_model(tokenizer, model.context, model.vocab_size, model.end_tokens)
    constraints = Constraints(
        tokenizer.tokenizer, model.vocab_size, tuple(artifact.spec.eos_token_ids)
    )
    try:
        return serve_engine(
            settings,
            model,
            tokenizer,
            engine,
            lambda generator: partial(
                chat, model=chats, generator=generator, make_constraint=constraints.make
            ),
            partial(count_tokens, model=chats),
            chats.caps.as_dict(),
            listening,
            progress_line(),
        )
    finally:
        constraints.close()
        chats.close()
