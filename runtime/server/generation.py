"""The interface between the event loop and the engine's thread.

Requests have token ids, not messages; answers come as pieces of text with their tokens.
scheduler.py implements `Generator` with an engine.
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
    stop: tuple[str, ...] = ()  # texts that end the answer, not included in it
    # As in StreamingDetokenizer: special tokens that are part of the text, and spans without stop
    # texts.
    shown: frozenset[str] = frozenset()
    unstopped: tuple[Unstopped, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Complete text, and the tokens decoded since the last piece. They may be offset: a character
    may take several tokens, and text that may begin a stop text is withheld."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token, if requested


@dataclass(frozen=True)
class Outcome:
    """Finish reason and statistics of an answer."""

    reason: FinishReason  # eos, stop, length or context
    stop_text: str | None  # which of the request's stop texts ended it
    stats: Stats
    queue_seconds: float  # from the request to its sequence
    generation_seconds: float  # from the sequence to the last token
    predicted_tokens_per_second: float | None
    # Of each token of the prompt but the first, if requested.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    lossy: Lossy | None = None  # verification rule; None: exact


class Generation(Protocol):
    """One request's answer. Iterate it to the end, or cancel it, to free its sequence."""

    def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield pieces. Raises SubspecError if the engine fails."""
        ...

    @property
    def queue_position(self) -> int:
        """Position in the queue from 1; 0 while it is being answered."""
        ...

    @property
    def outcome(self) -> Outcome:
        """The outcome; available after the last piece."""
        ...

    def cancel(self) -> None:
        """End the answer, waiting or running, before the next round; no more pieces follow. May be
        called repeatedly and after the end."""
        ...


@dataclass(eq=False)  # not frozen: Python writes to a raised exception
class QueueFull(Exception):
    num_waiting: int
    retry_after_seconds: int


class PromptTooLong(SubspecError):
    """Raised for a prompt that exceeds the context (OpenAI's context_length_exceeded)."""

    def __init__(self, num_tokens: int | None, context: int) -> None:
        """num_tokens: None if there are too many to count."""
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
    """Submits requests. Called in the event loop; does not block."""

    def submit(self, request: GenerationRequest) -> Generation:
        """Submit a request. Raises QueueFull, or SubspecError: USAGE for a prompt that leaves no
        room in the context or has ids beyond the vocabulary, RESOURCES if the engine has failed or
        is closing."""
        ...


@dataclass(frozen=True)
class Status:
    """State of an engine. stage, share (0 to 1): loading progress. error: why it failed."""

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
        """Measured peak of fast memory."""
        ...

    def start(self) -> None:
        """Start loading the weights."""
        ...

    async def close(self, timeout_seconds: float) -> None:
        """Wait up to `timeout_seconds` for running answers, end the others with an error, and free
        all memory."""
        ...
