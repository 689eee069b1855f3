"""A chat on the terminal: several turns in one sequence."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from subspec.artifacts.common.command import say
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.app.answer import Answering, answer_prompt, cut_off, stats_line
from subspec.runtime.app.settings import changed, described
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import Sequence
from subspec.runtime.text.tokenizer import ChatTokenizer

HELP = '''  /clear          forget the conversation
  /system TEXT    set the system message, without TEXT remove it; forgets the conversation
  /set NAME VALUE change a setting, such as temperature 0.7; without NAME show them all
  /stats          figures of the last answer
  /exit           leave, as Ctrl-D does
  """             begins and ends a turn of several lines
Ctrl-C ends an answer; twice in a row it leaves.'''
SAME = {"/?": "/help", "/reset": "/clear", "/bye": "/exit", "/quit": "/exit"}
QUOTES = '"""'


def chat(
    engine: Engine, tokenizer: ChatTokenizer, how: Answering, system: str, first: str | None
) -> None:
    """Read turns until /exit or the end of stdin. system: system message, "" for none; first: a
    turn from the command line."""
    say(f"{engine.artifact.spec.source.repository}: /help lists the commands, Ctrl-D leaves")
    with engine.new_sequence() as sequence, interrupts_caught():
        talk(Conversation(engine, sequence, tokenizer, how, system), first)


@contextmanager
def interrupts_caught() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block at every Ctrl-C, also after a caught one."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def talk(conversation: "Conversation", first: str | None) -> None:
    if first is not None:
        conversation.take(first)
    while not conversation.ended:
        try:
            turn = next_turn()
        except KeyboardInterrupt:
            if conversation.interrupted:
                raise
            conversation.interrupted = True
            say("\nCtrl-C once more leaves; /help lists the commands")
            continue
        except UnicodeDecodeError as error:
            say(f"that line is not UTF-8: {error.reason} at byte {error.start}")
            continue
        if turn is None:
            return
        conversation.interrupted = False
        conversation.take(turn)


class Conversation:
    """The conversation's messages, and the commands that change them."""

    def __init__(
        self,
        engine: Engine,
        sequence: Sequence,
        tokenizer: ChatTokenizer,
        how: Answering,
        system: str,
    ) -> None:
        self._engine = engine
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._how = how
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._clear()
        self.ended = False
        self.interrupted = False  # the last input was Ctrl-C

    def take(self, turn: str) -> None:
        """Answer a turn, or run a command such as /clear."""
        command, _, rest = turn.partition(" ")
        command = SAME.get(command, command)
        if not command.startswith("/"):
            if turn:
                self._answer(turn)
        elif command == "/exit":
            self.ended = True
        elif command == "/help":
            say(HELP)
        elif command == "/clear":
            self._clear()
            say("conversation cleared")
        elif command == "/system":
            self._system = rest.strip()
            self._clear()
            say(f"system message {'set' if self._system else 'removed'}, conversation cleared")
        elif command == "/set":
            self._set(rest)
        elif command == "/stats":
            answered = self._sequence.stats.generated_tokens > 0
            say(stats_line(self._engine, self._sequence) if answered else "no answer yet")
        else:
            say(f"{command} is not a command; /help lists them")

    def _set(self, given: str) -> None:
        if given.strip():
            try:
                params = changed(self._how.params, given)
            except SubspecError as error:
                say(f"error: {error.message}" + (f"\n\nhint: {error.hint}" if error.hint else ""))
                return
            self._how = replace(self._how, params=params)
        say(described(self._how.params))

    def _clear(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _answer(self, turn: str) -> None:
        asked = [*self._messages, {"role": "user", "content": turn}]
        try:
            ids = self._tokenizer.chat_ids(asked)
            self._tokenizer.check_known(ids, self._engine.artifact.spec.vocab_size)
            answer = answer_prompt(
                self._engine, self._sequence, self._tokenizer, self._how, ids, echo=True
            )
        except SubspecError as error:
            if error.exit_code != Exit.USAGE:
                raise
            # Too long, unknown to the model, or refused by the template: the conversation continues
            # without this turn.
            say(f"error: {error.message}\n\nhint: /clear, or {error.hint}")
            return
        sys.stdout.write("\n\n" if sys.stdout.isatty() else "\n")
        sys.stdout.flush()
        if why := cut_off(answer, self._engine, self._how):
            say(f"({why})")
        self.interrupted = answer.finish_reason == "interrupted"
        self._messages = [*asked, {"role": "assistant", "content": answer.text}]


def next_turn() -> str | None:
    """Read a turn: a line, or lines between triple quotes; None at the end of stdin."""
    line = next_line("> ")
    if line is None or not line.lstrip().startswith(QUOTES):
        return None if line is None else line.strip()
    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        line = next_line("... ")
        if line is None:
            break
        lines.append(line)
    return "\n".join(lines).rstrip().removesuffix(QUOTES).strip()


def next_line(prompt: str) -> str | None:
    """Read a line without its newline; None at the end of stdin."""
    if not sys.stdin.isatty():
        raw = sys.stdin.buffer.readline()
        return raw.decode("utf-8").rstrip("\r\n") if raw else None
    import readline  # noqa: F401  line editing and history for input()

    try:
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)  # stdout is a file and gets only answers
        sys.stderr.flush()
        return input()
    except EOFError:
        say("")  # put the shell's prompt on a new line
        return None
