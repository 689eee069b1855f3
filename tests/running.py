"""Answers of an engine, and runs of subspec-run as a person starts them: in this process, in a
child, on a terminal."""

import errno
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from pathlib import Path
from select import select
from typing import IO, Any

import pytest
import torch
from builders import build_artifact
from torch import Tensor

from subspec.artifacts.format.store import write_json, write_manifest
from subspec.artifacts.plan import Prediction
from subspec.planner.model.hub import DEMO
from subspec.runtime.cli import main
from subspec.runtime.draft import drafter
from subspec.runtime.draft.beam import TokenTree
from subspec.runtime.engine import Engine
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams, Sequence

SUBSPEC_RUN = str(Path(sys.executable).with_name("subspec-run"))
QUESTION = "Write the Python function add: adds two numbers"
# The child takes the terminal that is its stdin, as a shell's job has one: Ctrl-C then works.
ON_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


PREDICTED = Prediction(50.0, 0.1, 9_000_000, 2.0, 3.0, 0.01, 0.01, 0.01, 0.01, 0.0, 4_000_000)


def demo_artifact(folder: Path) -> Path:
    """The demo model under a plan made by hand, once per `folder`: half of it streams."""
    out = folder / "demo-artifact"
    if not out.exists():
        torch.set_num_threads(1)  # two that wait for each other on a busy machine take minutes
        artifact = build_artifact(DEMO, out, width=2, depth=3)
        plan = replace(artifact.plan, predicted={"substitute": PREDICTED, "plain": PREDICTED})
        write_json(out, "plan.json", plan)
        listed = artifact.manifest
        write_manifest(out, listed.producer, listed.parts, listed.substitutes, {})
    return out


def own_cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of the test's own in `base`, with what was compiled before."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kernels = base / "subspec" / "kernels"
    kernels.mkdir(mode=0o700, parents=True)
    for library in (users / "subspec" / "kernels").glob("*.so"):
        shutil.copy(library, kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base / "subspec"


def generated(sequence: Sequence, prompt: list[int], params: GenerationParams) -> list[int]:
    """All tokens of an answer."""
    return [token for some in sequence.generate(prompt, params) for token in some]


def drafts_of_depths(patch: pytest.MonkeyPatch, depths: Iterator[int]) -> None:
    """The next trees grow as deep as `depths` say, if their rounds have room: as drafts that end
    early do, whatever this machine's draft is sure of."""
    real = drafter.grow

    def grow(roots: Many[Tensor], most: Many[int], *rest: Any) -> list[TokenTree]:
        return real(roots, [min(one, next(depths)) for one in most], *rest)

    patch.setattr(drafter, "grow", grow)


def answer(
    engine: Engine, prompt: list[int], num_tokens: int, sampling: SamplingParams | None = None
) -> list[int]:
    """All tokens of an answer by a sequence of its own."""
    with engine.new_sequence() as sequence:
        return generated(
            sequence, prompt, GenerationParams(num_tokens, sampling or SamplingParams())
        )


@dataclass(frozen=True)
class Ended:
    exit_code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Ended:
    """The command in this process: no second import of torch."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words]) or 0
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return Ended(code, said.out, said.err)


def start(*words: object, **settings: Any) -> "subprocess.Popen[bytes]":
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [SUBSPEC_RUN, *map(str, words)]
    return subprocess.Popen(command, **{**pipes, **settings})


def opened(stream: "IO[bytes] | None") -> "IO[bytes]":
    assert stream is not None
    return stream


class Terminal:
    """A child on a terminal of its own. Its output is read up to what is expected."""

    def __init__(self, *words: object) -> None:
        self._mine, theirs = pty.openpty()
        command = [sys.executable, "-c", ON_TERMINAL, SUBSPEC_RUN, *map(str, words)]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)
        self.screen = ""
        self._num_seen = 0

    def send(self, keys: str) -> None:
        os.write(self._mine, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C, as late as a person's: a signal between a prompt and the wait for a key would
        be seen at the next key."""
        time.sleep(0.3)
        self.send("\x03")

    def expect(self, text: str, seconds: float = 60) -> str:
        """What came up to `text`, which must come after what was expected before."""
        limit = time.monotonic() + seconds
        while (at := self.screen.find(text, self._num_seen)) < 0:
            left = limit - time.monotonic()
            if left < 0 or not self._read(left):
                raise AssertionError(f"no {text!r} in {self.screen[self._num_seen :]!r}")
        before, self._num_seen = self.screen[self._num_seen : at], at + len(text)
        return before

    def end(self, seconds: float = 60) -> int:
        """The exit code; everything up to the end is on `screen`."""
        limit = time.monotonic() + seconds
        while self._read(max(0.0, limit - time.monotonic())):
            pass
        return self.process.wait(seconds)

    def _read(self, seconds: float) -> bool:
        if not select([self._mine], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._mine, 1 << 16)
        except OSError as error:  # what Linux says once the other side is closed
            if error.errno != errno.EIO:
                raise
            data = b""
        self.screen += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._mine)
