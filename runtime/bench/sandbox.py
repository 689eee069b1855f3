"""Run generated code (--execute-code): in a child process with limits, in a folder of its own,
and without network or other processes where the system supports that.

It guards against accidents, not attacks: the child can read the user's files.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path

from subspec.artifacts.common.child import child_process, kill_group
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.items import Item
from subspec.runtime.bench.scoring import code_of, definition_of

SECONDS = 10.0  # for one program
MEMORY_BYTES = 1 << 30  # of its address space
OUTPUT_BYTES = 1 << 20  # of one file
FOLDER_BYTES = 16 << 20  # of all its files, with namespaces
MAX_TESTS = 100  # of one item
TOKEN_BYTES = 32
FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
# Command prefix that mounts a small file system of its own on a folder.
MOUNTED = f"""
mount -t proc proc /proc 2>/dev/null # forbidden in some containers; then it shows all processes
mount -t tmpfs -o size={FOLDER_BYTES},nr_inodes=1000,mode=700 tmpfs "$1" && shift && exec "$@"
"""
NAMESPACES = (
    "unshare", "--user", "--map-root-user", "--net", "--ipc", "--mount", "--pid", "--fork",
    "--kill-child", "sh", "-c", MOUNTED, "sh",
)  # fmt: skip
NOT_ISOLATED = (
    "note: this system does not let this user make namespaces (unshare), so generated code has the "
    "network, can end this user's processes, leave some behind and fill the disk: run the whole "
    "command in a container, or only models that you trust"
)
# Runs in the child before the program: sets hard limits, which it cannot raise. Errors after
# `finished` exists are the program's. The token is read first and written last, so that only a
# program that ran to its last line has written it.
HARNESS = f"""
import os, resource, runpy, sys
folder, name = sys.argv[1:]
token = os.read(0, {TOKEN_BYTES})
os.chdir(folder)
streams = [os.open("stdin", os.O_RDONLY)]
streams += [os.open(one, os.O_WRONLY | os.O_CREAT, 0o600) for one in ("stdout", "stderr")]
with open("program.py", "rb") as given, open("work/program.py", "wb") as program:
    program.write(given.read())
finished = os.open("finished", os.O_WRONLY | os.O_CREAT, 0o600)
for number, stream in enumerate(streams):
    os.dup2(stream, number)
os.chdir("work")
for kind, most in (("CPU", {int(SECONDS)}), ("AS", {MEMORY_BYTES}), ("FSIZE", {OUTPUT_BYTES}),
                   ("NOFILE", 32), ("NPROC", 64), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
sys.argv = ["program.py"]
runpy.run_path("program.py", run_name=name)
os.write(finished, token)
"""
# LeetCode's and LiveCodeBench's imports; builtins come last, since some are shadowed.
MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
    "statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
GIVEN_TO_METHODS = (
    "".join(f"from {one} import *\n" for one in MODULES)
    + f"import {', '.join(MODULES)}\nsys.setrecursionlimit(50_000)\n"
)


@dataclass(frozen=True)
class Ran:
    ok: bool  # it ended with 0 within its limits
    out: str
    said: str  # the last line of its stderr, or why it was killed; "" if ok
    finished: bool = False  # ok, and its last line was reached


@cache
def isolation() -> tuple[str, ...]:
    """Command prefix, followed by a folder and a command, that runs it without network, unable to
    end other processes, and ending with its children; empty if unsupported."""
    with suppress(OSError), tempfile.TemporaryDirectory(prefix="subspec-code-") as folder:
        done = subprocess.run(
            [*NAMESPACES, folder, "true"],
            capture_output=True, stdin=subprocess.DEVNULL, env=ENVIRONMENT,
        )  # fmt: skip
        return NAMESPACES if done.returncode == 0 else ()
    return ()


def run_program(
    program: str, given: str = "", seconds: float = SECONDS, name: str = "__main__"
) -> Ran:
    """Run Python code as the module `name`. Raises SubspecError(RESOURCES)."""
    try:
        with tempfile.TemporaryDirectory(
            prefix="subspec-code-", ignore_cleanup_errors=True
        ) as folder:
            return run_in(Path(folder), program, given, seconds, name)
    except OSError as error:
        message = f"generated code cannot be run: {error.strerror}"
        raise SubspecError(Exit.RESOURCES, message) from None


def run_in(folder: Path, program: str, given: str, seconds: float, name: str) -> Ran:
    """Run it in its folder `work`; files beside that are safe from accidents."""
    work, token = folder / "work", secrets.token_bytes(TOKEN_BYTES)
    work.mkdir()
    (folder / "program.py").write_text(program, "utf-8", "replace")
    # Not a pipe: an orphaned process would keep it open.
    (folder / "stdin").write_text(given, "utf-8", "replace")
    inside = [sys.executable, "-I", "-B", "-c", HARNESS, str(folder), name]
    before = [*isolation(), str(work)] if isolation() else []
    environment = ENVIRONMENT | {"HOME": str(work), "TMPDIR": str(work)}
    with child_process([*before, *inside], environment=environment) as child:
        try:
            _, errors = child.communicate(token, seconds)
        except subprocess.TimeoutExpired:
            return Ran(False, "", f"it ran for more than {seconds:g} s")
        finally:
            kill_group(child)
    if not (folder / "finished").exists():
        why = last_line(errors.decode("utf-8", "replace"))
        raise SubspecError(Exit.RESOURCES, f"generated code cannot be run: {why}")
    stdout, stderr, finished = (end_of(folder / one) for one in ("stdout", "stderr", "finished"))
    text, code = stdout.decode("utf-8", "replace"), child.returncode
    if code:
        said = last_line(stderr.decode("utf-8", "replace")) or f"it ended with {code}"
        return Ran(False, text, said)
    return Ran(True, text, "", finished == token)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def end_of(file: Path) -> bytes:
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as opened:
            return opened.read(OUTPUT_BYTES)
    return b""


def score_code(text: str, item: Item) -> tuple[float, str]:
    """Return 1.0 if the answer's function passes the item's test, and the reason if not."""
    code = with_given(code_of(text, item.entry_point), item)
    return called(f"{code}\n\n{item.references[0]}\n\ncheck({item.entry_point})\n")


def called(program: str) -> tuple[float, str]:
    """Return 1.0 if a program that calls and checks an answer completes. It does not run as
    `__main__`, as in HumanEval and LiveCodeBench, so that the answer's own main code is skipped."""
    ran = run_program(program, name="answer")
    return float(ran.finished), "" if ran.finished else ran.said or "it ended before its test"


def with_given(code: str, item: Item) -> str:
    """Prepend the prompt's code: imports and functions that the test or the answer may call, and
    the function's head if the code is only its body. Definitions in the code come later and take
    precedence."""
    head = definition_of(item.entry_point)
    if head.search(code) is None:
        indented = code.lstrip("\n").startswith((" ", "\t"))
        return item.given + (code if indented else textwrap.indent(code, "    "))
    of_function = head.search(item.given)
    return after(item.given[: of_function.start()] if of_function else "", code)


def after(before: str, code: str) -> str:
    """Join code, moving `from __future__` imports to the beginning, as Python requires."""
    futures = "".join(f"{line}\n" for line in FUTURE.findall(code))
    return f"{futures}{before}\n{FUTURE.sub('', code)}"


def score_stdin(text: str, item: Item) -> tuple[float, str]:
    """Return 1.0 if the answer's program prints the expected output of each test."""
    for number, (given, expected) in enumerate(pairs_of(item), 1):
        ran = run_program(code_of(text), given)
        if not ran.ok or not same_output(ran.out, expected):
            why = ran.said or "it writes something else"
            return 0.0, f"test {number}: {why}"
    return 1.0, ""


def same_output(found: str, expected: str) -> bool:
    """Compare word by word; words that differ may be the same number, as in LiveCodeBench."""
    a, b = found.split(), expected.split()
    return len(a) == len(b) and all(map(same_word, a, b))


def same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        x, y = Decimal(a), Decimal(b)
    except InvalidOperation:
        return False
    return x.is_finite() and y.is_finite() and x == y


def score_calls(text: str, item: Item) -> tuple[float, str]:
    """Return 1.0 if the answer's method returns each test's expected value. Arguments are JSON, one
    per line. As in LiveCodeBench a tuple equals a list, and the method may be a function."""
    code = code_of(text, item.entry_point)
    method = f"Solution().{item.entry_point}" if "class Solution" in code else item.entry_point
    for number, (given, expected) in enumerate(pairs_of(item), 1):
        arguments = [line for line in given.split("\n") if line.strip()]
        test = (
            f"import json\nfound = {method}(*[json.loads(one) for one in {arguments!r}])\n"
            "found = list(found) if isinstance(found, tuple) else found\n"
            f"assert found == json.loads({expected!r}), 'it returns something else'\n"
        )
        score, why = called(f"{after(GIVEN_TO_METHODS, code)}\n\n{test}")
        if not score:
            return 0.0, f"test {number}: {why}"
    return 1.0, ""


def pairs_of(item: Item) -> list[tuple[str, str]]:
    """Return inputs and outputs of the item's tests. Raises SubspecError(USAGE)."""
    try:
        found = json.loads(item.references[0])
        tests = [(str(one["input"]), str(one["output"])) for one in found[:MAX_TESTS]]
    except (ValueError, KeyError, TypeError, RecursionError):
        tests = []
    if not tests:
        raise SubspecError(
            Exit.USAGE,
            f"{item.task} {item.name} has no tests with input and output",
            "public_test_cases is a JSON list of them",
        )
    return tests
