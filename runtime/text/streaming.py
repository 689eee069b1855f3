"""Text of an answer as it becomes certain, from a sequence's tokens."""

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import replace

from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.text.detokenizer import StreamingDetokenizer
from subspec.runtime.text.tokenizer import ChatTokenizer


class AnswerText:
    """The text of one answer. Its `cut` is the `stopping_criteria` of its GenerationParams: it
    sees each round's tokens before they are committed, so that the answer ends with a stop text."""

    def __init__(self, detokenizer: StreamingDetokenizer) -> None:
        self.detokenizer = detokenizer
        self._new_text = ""

    def cut(self, tokens: Tokens[int]) -> int | None:
        """Return the number of tokens to keep if a stop text ends the answer, else None."""
        before = self.detokenizer.num_tokens
        self._new_text += self.detokenizer.feed(list(tokens))
        return self.detokenizer.num_tokens - before if self.detokenizer.stopped else None

    def take_new_text(self) -> str:
        """Return the text that has become certain since the last call."""
        new_text, self._new_text = self._new_text, ""
        return new_text

    def finish(self) -> str:
        """Return the text that was withheld because a stop text could have begun with it."""
        return self.detokenizer.finish()


class TextStream:
    """Iterating yields pieces of the answer to `prompt_ids` in whole characters; together they are
    `text`: what follows the prompt's own text. A text in `stop` ends the answer and is not part of
    it; it may be, or contain, special tokens. Those in `shown` are part of the text.

        for piece in TextStream(sequence, tokenizer, ids, GenerationParams(max_tokens=64)):
            print(piece, end="")
    """

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: ChatTokenizer,
        prompt_ids: list[int],
        params: GenerationParams,
        stop: tuple[str, ...] = (),
        shown: frozenset[str] = frozenset(),
    ) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self._sequence = sequence
        self._answer = AnswerText(StreamingDetokenizer(tokenizer, stop, prompt_ids, shown))
        self._params = replace(params, stopping_criteria=self._answer.cut)

    @property
    def text(self) -> str:
        """The text so far, control characters included."""
        return self._answer.detokenizer.text

    def __iter__(self) -> Iterator[str]:
        """Raises SubspecError(USAGE) for a prompt that the context has no room for."""
        try:
            for tokens in self._sequence.generate(self.prompt_ids, self._params):
                self.token_ids += tokens
                yield self._answer.take_new_text()
        finally:
            rest = self._answer.finish()
        if rest:
            yield rest
