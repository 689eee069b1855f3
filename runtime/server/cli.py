"""subspec-serve ARTIFACT: the model behind OpenAI's API. Slow imports are done when needed."""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from subspec.artifacts.common.command import HINT, Program, leave, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.app.run_options import device_option, finite_option

if TYPE_CHECKING:
    from socket import socket

    from subspec.artifacts.format.store import Artifact
    from subspec.runtime.app.opening import Opening

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")  # by the extra [serve]
LARGEST_KEY_FILE = 64 << 10  # bytes
KEY = re.compile(r"[\x21-\x7e]{1,512}")  # what a header can have
ORIGIN = re.compile(r"\*|https?://[^\s/@?#]+|[a-z][a-z0-9+.-]*://[^\s/@?#]*", re.ASCII)
MODEL_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")
KEY_VARIABLE = "SUBSPEC_API_KEY"

Command = Callable[..., None]


@dataclass(frozen=True)
class Options:
    """The command line, as click parsed it."""

    artifact: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    insecure_no_auth: bool = False
    cors_origin: tuple[str, ...] = ()
    model_name: str | None = None
    sequences: int | None = None
    queue: int = 8
    prefix_cache: int = 0
    shutdown_timeout: float = 30.0
    log_format: str = "text"
    strict: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    no_speculation: bool = False
    no_graphs: bool = False
    vram: int | None = None
    no_replan: bool = False
    trust_kernels: bool = False
    device: str | None = None
    link_bandwidth: int | None = None
    no_record: bool = False


def option(name: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option with the default of its field in Options."""
    default = getattr(Options, name.lstrip("-").replace("-", "_"))
    shown = default not in (None, False, ())
    return click.option(name, default=default, show_default=shown, help=help, **settings)


def matching(
    pattern: re.Pattern[str], expected: str
) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that refuses text which the pattern does not match."""

    def check(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        given = value if isinstance(value, tuple) else (value,) if value is not None else ()
        for one in given:
            if pattern.fullmatch(one) is None:
                raise click.BadParameter(f"{one!r} is not {expected}")
        return value

    return check


def no_size_or_size(context: click.Context, parameter: click.Parameter, value: Any) -> int | None:
    return 0 if value in (0, "0") else size_option(context, parameter, value)


@click.command(
    "subspec-serve", cls=Program, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("artifact", type=click.Path(path_type=Path))
@option("--host", "Address to listen on. Others than loopback need a key.")
@option("--port", "Port to listen on; 0 takes a free one.", type=click.IntRange(0, 65535))
@option(
    "--api-key-file",
    f"File with keys, one a line, of which a request needs one; {KEY_VARIABLE} adds one.",
    type=click.Path(path_type=Path), metavar="FILE",
)  # fmt: skip
@option("--insecure-no-auth", "Serve another host than loopback without a key.", is_flag=True)
@option(
    "--cors-origin", "Let web pages of this origin use the API; may be repeated.", multiple=True,
    metavar="ORIGIN", callback=matching(ORIGIN, f"an origin{HINT}such as https://example.org"),
)  # fmt: skip
@option(
    "--model-name", "The model's id for clients. Default: the name of its checkpoint.",
    metavar="NAME", callback=matching(MODEL_NAME, "a name of letters, digits and . _ : / @ -"),
)  # fmt: skip
@option("--sequences", "Answer at most N requests at once. Default: the plan's.",
        type=click.IntRange(1, 256), metavar="N")  # fmt: skip
@option("--queue", "Requests that may wait; more are refused with 503.",
        type=click.IntRange(0, 10_000), metavar="N")  # fmt: skip
@option("--prefix-cache", "Host memory for the prefixes of idle conversations.",
        type=click.UNPROCESSED, callback=no_size_or_size, metavar="SIZE")  # fmt: skip
@option("--shutdown-timeout", "Seconds that answers have to end after SIGTERM or Ctrl-C.",
        type=click.FloatRange(0, 86400), callback=finite_option, metavar="SECONDS")  # fmt: skip
@option("--log-format", "Form of the log on stderr.", type=click.Choice(["text", "json"]))
@option("--strict", "Refuse requests with unknown fields instead of ignoring these.", is_flag=True)
@option("--temperature", "Of requests that do not say; 0 is greedy.",
        type=click.FloatRange(0, 100), callback=finite_option)  # fmt: skip
@option("--top-p", "Of requests that do not say.",
        type=click.FloatRange(0, 1, min_open=True), callback=finite_option)  # fmt: skip
@option("--top-k", "Of requests that do not say; 0 disables.", type=click.IntRange(min=0))
@option("--no-speculation", "Decode plainly: the same tokens without a draft.", is_flag=True)
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
@option("--no-record", "Do not add answers to the run records.", is_flag=True)
@click.version_option(package_name="subspec")
def main(**given: Any) -> None:
    """Serve the model in the folder ARTIFACT over HTTP, with OpenAI's API.

    It listens at once, and answers when its weights have loaded. docs/server.md has the endpoints.
    """
    options = Options(**given)
    check_extra()
    keys = api_keys(options.api_key_file, os.environ.get(KEY_VARIABLE))
    check_options(options, keys)
    code = served(options, keys)
    if code != Exit.OK:
        leave(code)


def check_extra() -> None:
    """Raises SubspecError(USAGE) if packages of the extra [serve] are missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise SubspecError(
            Exit.USAGE,
            f"subspec-serve needs {', '.join(missing)}, which {verb} not installed",
            "pip install 'subspec[serve]'",
        )


def check_options(options: Options, keys: tuple[str, ...]) -> None:
    """Raises SubspecError(USAGE) for what click cannot see."""
    if options.vram and options.no_replan:
        message = "--vram and --no-replan exclude each other"
        raise SubspecError(Exit.USAGE, message, "leave one out")
    from subspec.runtime.server.guards import is_loopback

    if not keys and not options.insecure_no_auth and not is_loopback(options.host):
        raise SubspecError(
            Exit.USAGE,
            f"--host {options.host} lets other machines in, and there is no API key",
            f"give --api-key-file FILE or {KEY_VARIABLE}; --insecure-no-auth serves everybody",
        )


def api_keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """Keys of the environment and of the file, one a line. Raises SubspecError(USAGE), also for a
    place without a key: nobody may be let in because a file is empty."""
    places = []
    if variable is not None:
        places.append((KEY_VARIABLE, [variable]))
    if file is not None:
        try:
            with open(file, "rb") as opened:
                lines = opened.read(LARGEST_KEY_FILE).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            message = f"--api-key-file {file} cannot be read: {reason}"
            raise SubspecError(Exit.USAGE, message, "give a file with one key a line") from None
        places.append((f"--api-key-file {file}", lines))
    keys = []
    for place, lines in places:
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise SubspecError(Exit.USAGE, f"{place} has no key", "write one, or leave it out")
        if not all(KEY.fullmatch(key) for key in found):
            message = f"a key of {place} is not printable ASCII without spaces"
            raise SubspecError(Exit.USAGE, message, "such as 32 hexadecimal digits")
        keys += found
    return tuple(keys)


def served(options: Options, keys: tuple[str, ...]) -> Exit:
    """From the options to the end of the server."""
    from subspec.runtime.app.folder import begin_to_read, open_folder

    artifact = open_folder(options.artifact)
    begin_to_read(artifact, "plain" if options.no_speculation else None)
    from subspec.runtime.server.serving import listen

    with listen(options.host, options.port) as listening:
        from subspec.runtime.app.opening import planned_for_here, trust_kernels

        how = opening(options)
        if options.trust_kernels:
            trust_kernels(artifact)
        artifact = planned_for_here(artifact, how)
        check_sequences(artifact, options.sequences)
        return serve_artifact(options, keys, artifact, how, listening)


def check_sequences(artifact: "Artifact", asked: int | None) -> None:
    """Raises SubspecError(USAGE) for more sequences than the plan has memory for."""
    planned = artifact.plan.num_sequences
    if asked is not None and asked > planned:
        raise SubspecError(
            Exit.USAGE,
            f"--sequences {asked}, but the plan has memory for {planned}",
            f"subspec-plan --from {shlex.quote(str(artifact.path))} --sequences {asked}",
        )


def opening(options: Options) -> "Opening":
    from subspec.runtime.app.opening import Opening

    return Opening(
        method="plain" if options.no_speculation else None,
        vram=options.vram,
        replan=not options.no_replan,
        device=options.device,
        link_bandwidth=options.link_bandwidth,
        graphs=not options.no_graphs,
    )


def serve_artifact(
    options: Options,
    keys: tuple[str, ...],
    artifact: "Artifact",
    how: "Opening",
    listening: "socket",
) -> Exit:
    from subspec.runtime.app.opening import open_engine, progress_line
    from subspec.runtime.model.sampling import Sampling
    from subspec.runtime.server.assembly import Settings, model_info, serve_engine
    from subspec.runtime.server.chat import chat, count_tokens, open_chat_model
    from subspec.runtime.server.constraints import Constraints
    from subspec.runtime.server.scheduler import Scheduler
    from subspec.runtime.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(artifact.path / "tokenizer")
    model = model_info(artifact, how.method, options.model_name)
    if options.sequences is not None:
        model = replace(model, num_sequences=options.sequences)
    engine = Scheduler(
        open_engine=lambda progress: open_engine(artifact, how, progress),
        tokenizer=tokenizer,
        num_sequences=model.num_sequences,
        queue_limit=options.queue,
        prefix_cache_bytes=options.prefix_cache,
        record=not options.no_record,
    )
    settings = Settings(
        host=options.host,
        keys=keys,
        cors_origins=options.cors_origin,
        shutdown_seconds=options.shutdown_timeout,
        log_format="json" if options.log_format == "json" else "text",
        sampling=Sampling(options.temperature, options.top_k, options.top_p),
        refuse_unknown=options.strict,
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
