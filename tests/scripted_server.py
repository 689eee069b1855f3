"""A server process with a scripted engine, for tests of its life: what it does while it loads, when
it is told to end, and when its engine fails.

    python tests/scripted_server.py '{"num_words": 10}'
"""

import json
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from scripted_generator import Script
from served import CONTEXT, ScriptedEngine, model_of, scripted_chat, scripted_count

from subspec.artifacts.common.command import leave, reported
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.signals import end_at_once
from subspec.planner.model.hub import DEMO
from subspec.runtime.lossy import Lossy
from subspec.runtime.server import serving
from subspec.runtime.server.assembly import Settings, notify_listening, serve_engine
from subspec.runtime.server.generation import Status
from subspec.runtime.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Life:
    """loaded, failed: files; it loads until there is the first, and fails once there is the other.
    None: it has loaded at once, it never fails."""

    loaded: str | None = None
    failed: str | None = None
    pause_seconds: float = 0.0  # before each token
    num_words: int = 20
    shutdown_seconds: float = 30.0
    idle_seconds: float = 15.0
    log_format: str = "text"
    lossy: bool = False


class GatedEngine(ScriptedEngine):
    life: Life

    @property
    def status(self) -> Status:
        if self.life.failed is not None and Path(self.life.failed).exists():
            return Status("failed", error=SubspecError(Exit.CORRUPT, "a digest does not match"))
        if self.life.loaded is not None and not Path(self.life.loaded).exists():
            return Status("loading", "weights", 0.5)
        return Status("ready")

    @status.setter
    def status(self, value: Status) -> None:
        pass


@reported
def main(life: Life) -> None:
    serving.IDLE_SECONDS = life.idle_seconds
    tokenizer = load_tokenizer(DEMO)
    script = Script("word " * life.num_words, largest_round=1, pause_seconds=life.pause_seconds)
    engine = GatedEngine(tokenizer, [script])
    engine.life = life
    assert CONTEXT > 2 * life.num_words
    settings = Settings(
        shutdown_seconds=life.shutdown_seconds,
        log_format="json" if life.log_format == "json" else "text",
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        notify_listening(settings, listening)
        code = serve_engine(
            settings,
            replace(model_of(tokenizer), lossy=Lossy() if life.lossy else None),
            tokenizer,
            engine,
            lambda generator: scripted_chat(generator, tokenizer, [], ()),
            scripted_count,
            {},
            listening,
            lambda stage, share: None,
        )
    if code != Exit.OK:
        leave(code)


if __name__ == "__main__":
    end_at_once()
    main(life=Life(**json.loads(sys.argv[1])))
