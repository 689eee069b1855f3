"""Running generated code, which only --execute-code asks for: in a child with limits, in an empty
folder, without network where the system lets a user take that away.

It is a guard against accidents, not against an attacker: the child can read what this user can.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from subspec.artifacts.common.child import run_child
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.items import Item
from subspec.runtime.bench.scoring import code_of

SECONDS = 10.0  # for one program
MEMORY_BYTES = 1 << 30  # of its address space
OUTPUT_BYTES = 1 << 20  # of one file
MOST_TESTS = 100  # of one item
FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
ALONE = ("unshare", "--user", "--map-root-user", "--net", "--ipc")
# In the child, before the program: hard limits, which it cannot raise again.
WITH_LIMITS = f"""
import os, resource, runpy, sys
for kind, most in (("CPU", {int(SECONDS)}), ("AS", {MEMORY_BYTES}), ("FSIZE", {OUTPUT_BYTES}),
                   ("NOFILE", 32), ("NPROC", 64), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
sys.argv = ["program.py"]
runpy.run_path("program.py", run_name="__main__")
"""


@dataclass(frozen=True)
class Ran:
    ok: bool  # it ended with 0 within its limits
    out: str
    said: str  # the last line of its stderr, or why it was ended


@cache
def alone() -> tuple[str, ...]:
    """The words before a command that has no network; empty: not on this system."""
    if shutil.which(ALONE[0]) is None:
        return ()
    done = subprocess.run([*ALONE, "true"], capture_output=True)
    return ALONE if done.returncode == 0 else ()


def run_program(program: str, given: str = "", seconds: float = SECONDS) -> Ran:
    """Run Python code to its end."""
    with tempfile.TemporaryDirectory(prefix="subspec-code-") as folder:
        Path(folder, "program.py").write_text(program, "utf-8")
        inside = f"import os; os.chdir({folder!r})\n{WITH_LIMITS}"
        command = [*alone(), sys.executable, "-I", "-B", "-c", inside]
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder}
        environment |= {"OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        try:
            with suppress(BrokenPipeError):  # it need not read what it is given
                code = run_child(
                    command, given.encode(), seconds, environment=environment
                ).returncode
        except subprocess.TimeoutExpired:
            return Ran(False, "", f"it ran for more than {seconds:g} s")
        except OSError as error:
            message = f"generated code cannot be run: {error.strerror}"
            raise SubspecError(Exit.RESOURCES, message) from None
        out, story = (end_of(Path(folder, name)) for name in ("stdout", "stderr"))
        last = (story.strip().splitlines() or [""])[-1][:300]
        return Ran(code == 0, out, last if code else "")


def end_of(file: Path) -> str:
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as opened:
            return opened.read(OUTPUT_BYTES).decode("utf-8", "replace")
    return ""


def score_code(text: str, item: Item) -> tuple[float, str]:
    """1.0 if the function of the answer passes the item's own test, and why not."""
    code = with_given(code_of(text), item)
    ran = run_program(f"{code}\n\n{item.references[0]}\n\ncheck({item.entry_point})\n")
    return float(ran.ok), ran.said


def with_given(code: str, item: Item) -> str:
    """The code after what the prompt has of the program: imports and functions that the test or
    the answer may call, and the head of the function if the code is only its body. What the code
    defines itself comes later, so that it counts."""
    head = re.compile(rf"^[ \t]*(?:async +)?def +{re.escape(item.entry_point)}\b", re.MULTILINE)
    if head.search(code) is None:
        return item.given + code
    of_function = head.search(item.given)
    before = item.given[: of_function.start()] if of_function else ""
    # These are allowed at the beginning of a program only.
    futures = "".join(f"{line}\n" for line in FUTURE.findall(code))
    return f"{futures}{before}\n{FUTURE.sub('', code)}"


def score_stdin(text: str, item: Item) -> tuple[float, str]:
    """1.0 if the program of the answer writes what each test expects."""
    for number, (given, expected) in enumerate(stdin_tests(item), 1):
        ran = run_program(code_of(text), given)
        if not ran.ok or ran.out.split() != expected.split():
            why = ran.said or "it writes something else"
            return 0.0, f"test {number}: {why}"
    return 1.0, ""


def stdin_tests(item: Item) -> list[tuple[str, str]]:
    """Input and output of the item's tests. Raises SubspecError(USAGE)."""
    try:
        found = json.loads(item.references[0])
        tests = [(str(one["input"]), str(one["output"])) for one in found[:MOST_TESTS]]
    except (ValueError, KeyError, TypeError, RecursionError):
        tests = []
    if not tests:
        raise SubspecError(
            Exit.USAGE,
            f"{item.task} {item.name} has no tests with input and output",
            "public_test_cases is a JSON list of them",
        )
    return tests
