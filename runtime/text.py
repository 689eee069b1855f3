"""Text <-> token ids: chat template, tokeniser, and a decoder that never splits a character."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from subspec.artifacts.errors import Exit, SubspecError

LONGEST_PROMPT = 4 << 20  # characters a chat template may produce
CONTROL = {code: None for code in range(32) if chr(code) not in "\n\t"} | {
    code: None for code in range(127, 160)
}


@dataclass(frozen=True)
class Text:
    """The artifact's tokenizer folder."""

    tokenizer: Tokenizer
    template: str | None
    special_tokens: dict[str, str | None]
    begins_with_bos: bool

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages -> ids, the assistant's turn opened. A model without a template: plain text."""
        if self.template is None:
            return self.plain_ids("\n\n".join(message["content"] for message in messages))
        ids: list[int] = self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids
        return ids

    def plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def render(self, messages: list[dict[str, str]]) -> str:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        safe = [{**m, "content": self._without_control_tokens(m["content"])} for m in messages]
        try:
            template = environment.from_string(self.template or "")
            text = template.render(
                messages=safe, add_generation_prompt=True, tools=None, **self.special_tokens
            )
        except (TemplateError, TypeError, ValueError, RecursionError, OverflowError) as error:
            raise SubspecError(
                Exit.CORRUPT,
                f"the model's chat template failed: {error or type(error).__name__}",
                "use --raw to continue the text as it is",
            ) from None
        if len(text) > LONGEST_PROMPT:
            raise SubspecError(Exit.CORRUPT, f"the chat template made {len(text)} characters")
        return text

    def _without_control_tokens(self, content: str) -> str:
        """A person's text cannot forge turns: special tokens in it are broken up by a zero-width
        space, so that they tokenise as ordinary text."""
        for token in self.tokenizer.get_added_tokens_decoder().values():
            if token.special and len(token.content) > 1 and token.content in content:
                broken = token.content[0] + "\u200b" + token.content[1:]
                content = content.replace(token.content, broken)
        return content


def load_text(folder: Path) -> Text:
    """`folder`: the artifact's tokenizer/."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise SubspecError(
            Exit.CORRUPT, f"tokenizer.json cannot be read: {str(error)[:200]}"
        ) from None
    settings = folder / "settings.json"
    known: dict[str, Any] = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
    template = folder / "chat_template.jinja"
    return Text(
        tokenizer,
        template.read_text("utf-8") if template.exists() else None,
        known.get("special_tokens", {}),
        known.get("begins_with_bos", False),
    )


class Printer:
    """Ids -> printable text, whole characters only, stop strings cut off."""

    def __init__(self, text: Text, stop: tuple[str, ...] = (), keep_control: bool = False) -> None:
        self._tokenizer = text.tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._keep_control = keep_control
        self._held = ""
        self.text = ""
        self.stopped = False
        self.num_tokens = 0  # that the text needed, the one that completed a stop string included

    def feed(self, ids: list[int]) -> str:
        """Text that is now certain. After a stop string was met, `stopped` is True."""
        fresh = ""
        for token in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            self._held += self._stream.step(self._tokenizer, token) or ""
            fresh += self._release(final=False)
        return self._emit(fresh)

    def finish(self) -> str:
        """What was held back because it could have begun a stop string."""
        return self._emit("" if self.stopped else self._release(final=True))

    def _release(self, final: bool) -> str:
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = 0 if final else self._possible_stop()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return certain

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string could begin with."""
        lengths = [n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])]
        return max(lengths, default=0)

    def _emit(self, fresh: str) -> str:
        self.text += fresh
        # Model output is foreign text: escape sequences must not reach the terminal.
        return fresh if self._keep_control else fresh.translate(CONTROL)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=min(indent, 8) if indent else None)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
