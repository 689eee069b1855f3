"""Errors as sentences and exit codes, whatever happens to the streams, whoever sends a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from subspec.artifacts.common.command import Program, printable, size_option
from subspec.artifacts.common.errors import Exit, SubspecError

# A program of its own in a child: `act` is what the command does.
PROGRAM = """
import os, sys, time
import click
from subspec.artifacts.common.command import Program
from subspec.artifacts.common.errors import Exit, SubspecError

@click.command(cls=Program)
@click.option("--json", "as_json", is_flag=True)
def main(as_json):
    {act}

sys.exit(main())
"""


@click.command(cls=Program)
@click.argument("artifact")
@click.option("--vram", callback=size_option)
@click.option("--count", type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True)
def program(artifact: str, **_: Any) -> None:
    if artifact == "broken":
        raise SubspecError(Exit.CORRUPT, "plan.json is \x1b[2Jbroken", "build it again")
    if artifact == "endless":
        raise KeyboardInterrupt
    if artifact == "huge":
        raise MemoryError
    if artifact == "bug":
        raise ZeroDivisionError
    print("done")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        sys.exit(program(list(words)))
    return int(ended.value.code or 0)


def start(act: str, *words: str, **settings: Any) -> "subprocess.Popen[bytes]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    code = PROGRAM.format(act=act)
    return subprocess.Popen([sys.executable, "-c", code, *words], **{**pipes, **settings})


def ended_by(number: signal.Signals, act: str) -> tuple[int, bytes, bytes]:
    """Sends a signal once `act` has printed "open" -> exit code, stdout after that, stderr."""
    with start(act) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"open\n"
        child.send_signal(number)
        out, story = child.stdout.read(), child.stderr.read()
    return child.returncode, out, story


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "Missing argument 'ARTIFACT'", "--help lists the options"),
        (["a", "--vram", "24gb"], "'24gb' is not a size", "a small b means bits"),
        (["a", "--count", "0"], "0 is not in the range x>=1", "--help lists the options"),
        (["a", "--count"], "Option '--count' requires an argument", "--help lists the options"),
        (["a", "--nope"], "No such option", "--help lists the options"),
        (["a", "good", "day"], "unexpected extra arguments (good day)", "only in quotes"),
    ],
)
def test_a_wrong_command_line_is_a_sentence_a_hint_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    assert run(*words) == Exit.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    first, _, second = said.err.partition("\n\nhint: ")
    assert first.startswith("error: ") and message in first and "\n" not in first
    assert hint in second


def test_with_json_a_wrong_command_line_is_an_object_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("a", "--vram", "24gb", "--json") == Exit.USAGE
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "subspec.error/1"
    assert found["error"]["code"] == "usage" and found["error"]["exit"] == 2
    assert "is not a size" in found["error"]["message"]
    assert found["error"]["hint"].startswith("a small b means bits")


def test_an_error_of_the_command_keeps_its_code_and_steers_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("broken", "--json") == Exit.CORRUPT
    said = capsys.readouterr()
    assert said.err == "error: plan.json is [2Jbroken\n\nhint: build it again\n"
    assert "\x1b" not in said.out
    assert json.loads(said.out)["error"]["message"] == "plan.json is \x1b[2Jbroken"


def test_interrupt_and_memory_error_have_their_codes_and_a_bug_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("endless") == Exit.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert run("huge") == Exit.RESOURCES
    assert "out of memory" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        program(["bug"])


def test_help_and_success_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert run("a") == 0
    assert capsys.readouterr().out.endswith("done\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    act = "[print('a line of the answer', flush=True) for _ in range(100000)]"
    with start(act) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.read(10) == b"a line of "
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    with open("/dev/full", "wb") as full, start("print('x' * 100000)", stdout=full) as child:
        assert child.stderr is not None
        assert child.stderr.read() == b"error: cannot write: No space left on device\n"
    assert child.returncode == Exit.RESOURCES


def test_with_closed_streams_no_file_gets_their_numbers(tmp_path: Path) -> None:
    act = (
        f"[os.open({str(tmp_path)!r} + '/' + name, os.O_CREAT | os.O_RDWR) for name in 'abc']; "
        "print('lost'); os.write(1, b'noise of a library'); os.write(2, b'noise')"
    )
    command = [sys.executable, "-c", PROGRAM.format(act=act)]
    ended = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command])
    assert ended.returncode == 0
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b""] * 3


def test_what_the_locale_cannot_print_is_a_question_mark() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    with start("print('caf\\u00e9 \\u4f60')", env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.read() == b"caf\xe9 ?\n"
    assert child.returncode == 0


def test_a_termination_closes_what_is_open_and_ends_with_143() -> None:
    act = (
        "\n    try: print('open', flush=True); time.sleep(60)"
        "\n    finally: print('closed', flush=True)"
    )
    assert ended_by(signal.SIGTERM, act) == (Exit.TERMINATED, b"closed\n", b"")


def test_ctrl_c_pressed_again_while_leaving_prints_no_traceback() -> None:
    act = (
        "\n    import atexit"
        "\n    atexit.register(lambda: (print('leaving', flush=True), time.sleep(1)))"
        "\n    print('open', flush=True); time.sleep(60)"
    )
    with start(act) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"open\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == b"leaving\n"
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() == b"\ninterrupted\n"
    assert child.returncode == Exit.INTERRUPTED


@pytest.mark.parametrize(
    ("patience", "seconds", "printed"), [(60, 1.5, b"closed\n"), (0.1, 30, b"")]
)
def test_a_second_signal_ends_a_command_whose_closing_hangs_but_not_at_once(
    patience: float, seconds: float, printed: bytes
) -> None:
    act = (
        f"\n    from subspec.artifacts.common import signals; signals.PATIENCE_SECONDS = {patience}"
        "\n    try: print('open', flush=True); time.sleep(60)"
        f"\n    finally: print('closing', flush=True); time.sleep({seconds})"
        "; print('closed', flush=True)"
    )
    with start(act) as child:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == b"closing\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == printed
    assert child.returncode == Exit.TERMINATED


def test_printable_text_keeps_all_but_what_steers_a_terminal() -> None:
    clipboard = "\x1b]52;c;ZXZpbA==\x07"
    assert printable(f"a\tb\n{clipboard}\x9b2J\x7f\r é 你 🙂") == "a\tb\n]52;c;ZXZpbA==2J é 你 🙂"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_an_import_that_drops_exceptions_still_ends_the_command(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "native.py").write_text(
        "import time\nprint('open', flush=True)\ntry: time.sleep(1)\nexcept BaseException: pass\n"
    )
    act = (
        f"\n    sys.path.insert(0, {str(tmp_path)!r})"
        "\n    try: import native; time.sleep(60)"
        "\n    finally: print('closed', flush=True)"
    )
    code, out, story = ended_by(number, act)
    assert (code, out) == (128 + number, b"closed\n") and b"Traceback" not in story


def test_a_signal_whose_exception_is_dropped_is_raised_again() -> None:
    act = (
        "\n    try: print('open', flush=True); time.sleep(60)"
        "\n    except BaseException: pass"
        "\n    time.sleep(60)"
    )
    assert ended_by(signal.SIGTERM, act) == (Exit.TERMINATED, b"", b"")


def test_a_signal_whose_exception_ends_in_a_destructor_says_nothing() -> None:
    act = (
        "\n    class Slow:"
        "\n        def __del__(self): print('open', flush=True); time.sleep(60)"
        "\n    Slow(); time.sleep(60)"
    )
    assert ended_by(signal.SIGTERM, act) == (Exit.TERMINATED, b"", b"")


def test_an_ignored_hangup_stays_ignored() -> None:
    ignored = f"signal.signal({int(signal.SIGHUP)}, signal.SIG_IGN)"
    code = f"import signal; {ignored}" + PROGRAM.format(
        act=f"os.kill(os.getpid(), {int(signal.SIGHUP)}); print('done')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, b"done\n")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>/dev/null"])
@pytest.mark.parametrize(
    ("act", "code"),
    [
        ("sys.stderr.write('note\\n'); print('answer')", Exit.OK),
        ("raise SubspecError(Exit.CORRUPT, 'broken', 'again')", Exit.CORRUPT),
    ],
)
def test_what_stderr_cannot_take_changes_no_exit_code(
    redirection: str, act: str, code: Exit
) -> None:
    command = [sys.executable, "-c", PROGRAM.format(act=act)]
    ended = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command], stdout=subprocess.PIPE
    )
    assert ended.returncode == code
    assert ended.stdout == (b"" if code else b"answer\n")


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_whatever_stdout_cannot_take_is_one_sentence(words: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full, start("print('x')", *words, stdout=full) as child:
        assert child.stderr is not None
        assert child.stderr.read() == b"error: cannot write: No space left on device\n"
    assert child.returncode == Exit.RESOURCES
    with open("/dev/null", "rb") as unwritable, start("print('x')", stdout=unwritable) as child:
        assert child.stderr is not None
        assert child.stderr.read() == b"error: cannot write: Bad file descriptor\n"
    assert child.returncode == Exit.RESOURCES


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ('RuntimeError("can\'t start new thread")', b"can't start new thread"),
        ("OSError(24, 'Too many open files')", b"Too many open files"),
        ("OSError(5, 'Input/output error', 'a')", b"reading or writing failed: [Errno 5]"),
        ("ImportError('x.so: failed to map segment from shared object')", b"failed to map segment"),
        ("BlockingIOError(11, 'Resource temporarily unavailable')", b"temporarily unavailable"),
        ("MemoryError()", b"out of memory"),
    ],
)
def test_what_the_system_has_no_more_of_is_a_sentence(error: str, said: bytes) -> None:
    with start(f"raise {error}") as child:
        assert child.stderr is not None
        first, _, hint = child.stderr.read().partition(b"\n\nhint: ")
    assert child.returncode == Exit.RESOURCES
    assert first.startswith(b"error: ") and said in first and b"\n" not in first
    assert hint.startswith((b"close other programs", b"check the disk"))
