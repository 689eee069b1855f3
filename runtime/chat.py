"""A chat on the terminal: several turns over one KV cache."""

import sys
from typing import TYPE_CHECKING

from subspec.artifacts.errors import Exit, SubspecError

if TYPE_CHECKING:
    from subspec.runtime.cli import Options
    from subspec.runtime.session import Session
    from subspec.runtime.text import Text

HELP = """/clear forgets the conversation    /system TEXT sets the system message and clears
/stats shows the last answer's figures    /exit or Ctrl-D leaves    Ctrl-C stops an answer
"""


def chat(session: "Session", text: "Text", options: "Options", first: str | None) -> None:
    """Reads turns until /exit or the end of stdin. `first`: a turn given on the command line."""
    from subspec.runtime.cli import generate, stats_line

    messages = opening(options.system)
    sys.stderr.write(f"{session.artifact.spec.source.repository}: /help lists the commands\n")
    while True:
        turn = first if first is not None else next_turn()
        first = None
        if turn is None or turn in ("/exit", "/bye"):
            return
        if turn == "/help":
            sys.stderr.write(HELP)
        elif turn == "/clear":
            messages = opening(options.system)
        elif turn == "/stats":
            sys.stderr.write(stats_line(session) + "\n")
        elif turn.startswith("/system"):
            messages = opening(turn.removeprefix("/system").strip())
        elif turn.startswith("/"):
            sys.stderr.write(f"{turn.split()[0]} is not a command; /help lists them\n")
        elif turn:
            messages.append({"role": "user", "content": turn})
            try:
                answer = generate(session, text, options, text.chat_ids(messages), echo=True)
            except SubspecError as error:
                if error.exit_code != Exit.USAGE:
                    raise
                messages.pop()  # too long for the context: the conversation goes on without it
                sys.stderr.write(f"error: {error.message}\n\nhint: /clear, or {error.hint}\n")
                continue
            sys.stdout.write("\n")
            sys.stdout.flush()
            messages.append({"role": "assistant", "content": answer.text})


def opening(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def next_turn() -> str | None:
    """One line from the person; None at the end. Ctrl-C at the prompt leaves with 130."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
