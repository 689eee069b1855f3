"""Assemble and run a server from an artifact and an engine."""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from subspec.artifacts.common.errors import Exit
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.format.store import Artifact
from subspec.runtime.app.opening_options import OpeningOptions
from subspec.runtime.lossy import verification_json
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.open_model import OpenOptions
from subspec.runtime.prediction import predicted_speed
from subspec.runtime.server import chat_page
from subspec.runtime.server.admission import Admission
from subspec.runtime.server.app import make_app
from subspec.runtime.server.chat_events import Chat, CountTokens
from subspec.runtime.server.generation import Generator, ServedEngine, Status
from subspec.runtime.server.log_format import NAME, LogFormat, request_log, start_log
from subspec.runtime.server.metrics import Metrics
from subspec.runtime.server.middleware import (
    OPEN_PATHS,
    GuardSettings,
    is_loopback,
    without_brackets,
)
from subspec.runtime.server.model_info import ModelInfo
from subspec.runtime.server.service import Service
from subspec.runtime.server.serving import address_of, serve
from subspec.runtime.text.tokenizer import ChatTokenizer

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Server settings from a command line. host: as given."""

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    shutdown_seconds: float = 30.0
    log_format: LogFormat = "text"
    sampling: SamplingParams = SamplingParams()
    refuse_unknown: bool = False


def model_info(artifact: Artifact, options: OpeningOptions, name: str | None) -> ModelInfo:
    """Return the model's description for clients. name: its id; None: that of its checkpoint."""
    plan, spec, how = artifact.plan, artifact.spec, OpenOptions(options.method, options.drafter)
    method, drafter = how.chosen(plan)
    draft = None if method == "plain" else plan.draft_of(method)
    speed = predicted_speed(plan, method, drafter, options.draft_temperature, how.pads(plan))
    source = spec.source.repository.rstrip("/")
    folder = artifact.path.resolve().name
    model_id = name or source or folder
    return ModelInfo(
        id=model_id,
        created=int(time.time()),
        context=plan.context,
        vocab_size=spec.vocab_size,
        end_tokens=frozenset(spec.eos_token_ids),
        method=method,
        width=draft.tree.width if draft else 0,
        depth=max(tree.depth for tree in draft.trees) if draft else 0,
        num_sequences=plan.num_sequences,
        max_positions=spec.max_positions,
        weight_bytes=sum(part.num_bytes for part in artifact.stored_parts()),
        budget_bytes=plan.budget_bytes,
        predicted_tokens_per_second=speed if options.lossy is None else None,
        names=frozenset({source.rpartition("/")[2], source, folder} - {"", model_id}),
        lossy=options.lossy,
    )


def guard_settings(settings: Settings) -> GuardSettings:
    """Settings of the guards. On loopback without a key, only this machine's names are accepted as
    Host: a web page cannot bind these to its own name (DNS rebinding)."""
    checked = is_loopback(settings.host) and not settings.keys
    hosts = (*LOCAL_NAMES, without_brackets(settings.host)) if checked else ()
    return GuardSettings(settings.keys, hosts, (*OPEN_PATHS, *sorted(chat_page.PATHS)))


def notify_listening(settings: Settings, listening: socket.socket) -> None:
    """Start the log and write its first line."""
    logger = start_log(settings.log_format)
    logger.info("listening", {"address": address_of(listening)})


def serve_engine(
    settings: Settings,
    model: ModelInfo,
    tokenizer: ChatTokenizer,
    engine: ServedEngine,
    make_chat: Callable[[Generator], Chat],
    count_tokens: CountTokens,
    template_caps: Mapping[str, bool],
    listening: socket.socket,
    progress: Progress,
) -> Exit:
    """Serve until a signal arrives; returns and raises as `serve`. The log has been started."""
    metrics = Metrics(model.id, model.depth, model.predicted_tokens_per_second)
    admission = Admission(engine, model.context, model.vocab_size, metrics)
    service = Service(
        model,
        tokenizer,
        admission,
        make_chat(admission),
        count_tokens,
        metrics,
        settings.sampling,
        settings.refuse_unknown,
        template_caps,
    )
    logger = logging.getLogger(NAME)
    app = make_app(service, guard_settings(settings), settings.cors_origins, request_log(logger))
    address = address_of(listening)
    logger.info("loading", {"model": model.id})
    if model.lossy is not None:
        logger.warning("lossy", {"rule": str(model.lossy), **verification_json(model.lossy)})
    told = partial(tell, logger, model, address, progress, set())
    return serve(app, admission, listening, settings.shutdown_seconds, told)


def tell(
    logger: logging.Logger,
    model: ModelInfo,
    address: str,
    progress: Progress,
    said: set[str],
    status: Status,
) -> None:
    """Report loading progress, and its completion once. said: phases reported so far."""
    if status.phase == "loading" and status.stage:
        progress(status.stage, status.share)
    if status.phase == "ready" and "ready" not in said:
        said.add("ready")
        progress("", 1.0)
        logger.info(
            "ready",
            {
                "address": address,
                "model": model.id,
                "context": model.context,
                "sequences": model.num_sequences,
            },
        )
