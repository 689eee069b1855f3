"""What the web side asks of the engine side, and what comes back: the one boundary between the
event loop and the engine's thread.

A request has token ids, not messages; an answer comes in pieces of text with the tokens that they
are made of. scheduler.py implements `Generator` with an engine.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import TokenLogprobs
from subspec.runtime.sequence import FinishReason, GenerationParams, Stats
from subspec.runtime.text.detokenizer import Unstopped


@dataclass(frozen=True)
class GenerationRequest:
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    stop: tuple[str, ...] = ()  # texts that end the answer and are no part of it
    # As in StreamingDetokenizer: special tokens that are part of the text, and where stop texts do
    # not count.
    shown: frozenset[str] = frozenset()
    unstopped: tuple[Unstopped, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that has become certain, and the tokens that were decided since the last piece. The two
    need not meet: a character may take several tokens, and a text that a stop text could begin with
    is withheld."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token, if the request asked for them


@dataclass(frozen=True)
class Outcome:
    """How an answer ended, and what it took."""

    reason: FinishReason  # eos, stop, length or context
    stop_text: str | None  # which of the request's stop texts ended it
    stats: Stats
    queue_seconds: float  # from the request to its sequence
    generation_seconds: float  # from the sequence to the last token
    predicted_tokens_per_second: float | None
    # Of each token of the prompt but the first, if the request asked for them.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    lossy: Lossy | None = None  # by which its drafts were verified; None: exactly


class Generation(Protocol):
    """One request's answer. Iterate it to the end, or cancel it: its sequence is free then."""

    def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces as they come. Raises SubspecError if the engine fails."""
        ...

    @property
    def queue_position(self) -> int:
        """0: it is being answered; else its place among those that wait."""
        ...

    @property
    def outcome(self) -> Outcome:
        """After the last piece."""
        ...

    def cancel(self) -> None:
        """Ends it before the next round, waiting or not; no more pieces come. May be called twice,
        and after the end."""
        ...


@dataclass(eq=False)  # not frozen: an exception on its way is written to
class QueueFull(Exception):
    num_waiting: int
    retry_after_seconds: int


class PromptTooLong(SubspecError):
    """OpenAI's context_length_exceeded."""

    def __init__(self, num_tokens: int | None, context: int) -> None:
        """num_tokens: None: so many that they were not counted."""
        self.num_tokens, self.context = num_tokens, context
        super().__init__(
            Exit.USAGE,
            f"the prompt has {self.counted} tokens, expected at most {context - 1}: the context "
            f"has room for {context}, and the answer needs one",
            "shorten the messages",
        )

    @property
    def counted(self) -> str:
        return f"more than {self.context}" if self.num_tokens is None else str(self.num_tokens)


class Generator(Protocol):
    """Called in the event loop; nothing here blocks."""

    def submit(self, request: GenerationRequest) -> Generation:
        """Raises QueueFull, or SubspecError(USAGE) for a prompt that the context has no room for or
        that has ids beyond the vocabulary, (RESOURCES) if the engine has failed or is closing."""
        ...


@dataclass(frozen=True)
class Status:
    """How far an engine is. stage, share (0 to 1): of loading. error: why it failed."""

    phase: Literal["loading", "ready", "closed", "failed"]
    stage: str = ""
    share: float = 0.0
    error: SubspecError | None = None


class ServedEngine(Generator, Protocol):
    """An engine in a thread of its own."""

    @property
    def status(self) -> Status: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def peak_bytes(self) -> int:
        """Of fast memory, as measured so far."""
        ...

    def start(self) -> None:
        """Begins to load the weights."""
        ...

    async def close(self, timeout_seconds: float) -> None:
        """Waits for running answers up to `timeout_seconds`, ends the others with an error, and
        gives the memory back."""
        ...
