"""The text of an answer as it becomes certain, over a sequence's tokens."""

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import replace

from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.text.detokenizer import StreamingDetokenizer
from subspec.runtime.text.tokenizer import ChatTokenizer


class TextStream:
    """Iterating yields pieces of the answer to `prompt_ids` in whole characters; together they are
    `text`: what follows the prompt's own text. A text in `stop` ends the answer and is not part of
    it; it may be, or contain, special tokens.

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
    ) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self._sequence = sequence
        self._params = replace(params, cut=self._cut)
        self._detokenizer = StreamingDetokenizer(tokenizer, stop, prompt_ids)
        self._fresh = ""

    @property
    def text(self) -> str:
        """The text so far, control characters included."""
        return self._detokenizer.text

    def __iter__(self) -> Iterator[str]:
        """Raises SubspecError(USAGE) for a prompt that the context has no room for."""
        try:
            for tokens in self._sequence.generate(self.prompt_ids, self._params):
                self.token_ids += tokens
                fresh, self._fresh = self._fresh, ""
                yield fresh
        finally:
            rest = self._detokenizer.finish()  # withheld, as a stop text could have begun with it
        if rest:
            yield rest

    def _cut(self, tokens: Tokens[int]) -> int | None:
        """Called before a round is committed: number of tokens to keep if a stop text ends it."""
        before = self._detokenizer.num_tokens
        self._fresh += self._detokenizer.feed(list(tokens))
        return self._detokenizer.num_tokens - before if self._detokenizer.stopped else None
