"""Generated programs run within limits, and what they may not do ends them."""

import json
import os
import time
from pathlib import Path

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench import sandbox
from subspec.runtime.bench.items import Item
from subspec.runtime.bench.sandbox import (
    pairs_of,
    run_program,
    score_calls,
    score_code,
    score_stdin,
)

ADD = 'import math\ndef add(a, b):\n    """Sum."""\n'
TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
ITEM = Item("human-eval", "T/0", ("ask",), "code", (TEST,), entry_point="add", given=ADD)
TESTS = '[{"input": "2 3", "output": "5"}, {"input": "1 1", "output": "2\\n"}]'
SUMS = Item("livecodebench", "q", ("ask",), "stdin", (TESTS,))


def test_a_program_reads_stdin_writes_stdout_and_sees_little() -> None:
    ran = run_program("import os; print(input()[::-1], sorted(os.environ), os.listdir())", "abc")
    assert ran.ok and ran.out.startswith("cba ['HOME', 'LANG'") and "program.py" in ran.out
    assert os.environ["PATH"] not in ran.out


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('f', 'wb').write(bytes(8 << 20))", "File too large"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40,) * 2)", "limit"),
        ("import sys; sys.exit(3)", ""),
    ],
)
def test_what_a_program_may_not_do_ends_it(program: str, expected: str) -> None:
    if "setrlimit" in program and os.getuid() == 0 and not sandbox.isolation():
        pytest.skip("root may raise its limits where there is no namespace")
    ran = run_program(program)
    assert not ran.ok and expected in ran.said


def test_a_program_that_does_not_end_is_ended_with_its_children() -> None:
    ran = run_program("import os, time\nos.fork()\ntime.sleep(60)", seconds=1)
    assert not ran.ok and ran.said == "it ran for more than 1 s"


def test_a_program_has_no_network_where_that_can_be_taken_away() -> None:
    if not sandbox.isolation():
        pytest.skip("this user may make no namespaces")
    ran = run_program("import socket; socket.create_connection(('127.0.0.1', 9), 1)")
    assert not ran.ok and "unreachable" in ran.said


def test_its_folder_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_program("open('left', 'w').write('x')").ok
    assert not list(tmp_path.iterdir())


def running(marker: str) -> bool:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in command.read_bytes():
                return True
        except OSError:  # it has just ended
            continue
    return False


def check_nothing_is_left(start: str) -> None:
    marker = f"77.{os.getpid()}"
    code = "from subprocess import Popen\n" + start.format(f"['sleep', '{marker}']")
    begun = time.monotonic()
    assert run_program(code, given="x" * (1 << 20)).ok  # more than a pipe has room for
    assert time.monotonic() - begun < sandbox.SECONDS
    while running(marker) and time.monotonic() - begun < sandbox.SECONDS:
        time.sleep(0.05)
    assert not running(marker)


@pytest.mark.parametrize("start", ["Popen({})", "Popen({}, start_new_session=True)"])
def test_processes_that_a_program_leaves_end_with_it(start: str) -> None:
    if not sandbox.isolation():
        pytest.skip("this user may make no namespaces")
    check_nothing_is_left(start)


def test_without_namespaces_its_process_group_ends_with_a_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "isolation", tuple)
    check_nothing_is_left("Popen({})")


def test_a_process_that_goes_on_writing_into_the_folder_costs_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sandbox, "isolation", tuple)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # what it leaves is pytest's to remove
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    end = time.time() + 2\n"
        "    while time.time() < end:\n        open(str(time.time()), 'w').close()\n"
        "else:\n    time.sleep(0.2)\n"
    )
    assert run_program(code).ok


def test_a_program_sees_no_other_process_and_has_a_small_disk_where_it_has_namespaces() -> None:
    if not sandbox.isolation():
        pytest.skip("this user may make no namespaces")
    ran = run_program(f"import os; os.kill({os.getpid()}, 0)")
    assert not ran.ok and "No such process" in ran.said
    ran = run_program("for n in range(32): open(str(n), 'wb').write(bytes(1 << 20))")
    assert not ran.ok and "No space left" in ran.said


def test_a_program_that_cannot_be_started_is_no_wrong_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for words in (("false",), ("no-such-command",)):
        monkeypatch.setattr(sandbox, "isolation", lambda words=words: words)
        with pytest.raises(SubspecError, match="generated code cannot be run") as error:
            score_code("```python\ndef add(a, b):\n    return a + b\n```", ITEM)
        assert error.value.exit_code == Exit.RESOURCES


WRONG = "def add(a, b):\n    return a - b\n\n"
RIGHT = "def add(a, b):\n    return a + b\n\n"


@pytest.mark.parametrize(
    "answer",
    [
        WRONG + "if __name__ == '__main__':\n    import sys\n    sys.exit(0)\n",
        WRONG + "import unittest\nif __name__ == '__main__':\n    unittest.main()\n",
        WRONG + "raise SystemExit(0)\n",
        WRONG + "import os\nopen('../finished', 'wb').write(bytes(32))\nos._exit(0)\n",
        "import os\ndef add(a, b):\n    os._exit(0)\n",
    ],
)
def test_an_answer_that_ends_before_its_test_has_not_passed_it(answer: str) -> None:
    score, why = score_code(f"```python\n{answer}```", ITEM)
    assert score == 0.0 and why


def test_what_an_answer_does_as_a_program_is_not_run() -> None:
    answer = RIGHT + "if __name__ == '__main__':\n    print(add(int(input()), 1))\n"
    assert score_code(f"```python\n{answer}```", ITEM) == (1.0, "")


def test_usage_after_the_function_is_not_taken_for_it() -> None:
    usage = "from mine import add\n" + "print(add(1, 2))\n" * 9
    text = f"1. So:\n\n   ``` python\n{RIGHT}   ```\n\nUse it:\n\n```python\n{usage}```\n"
    assert score_code(text, ITEM) == (1.0, "")
    assert score_code("```python\nreturn a + b\n```", ITEM) == (1.0, "")  # only the body


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```python\ndef add(a, b):\n    return int(math.fsum((a, b)))\n```", 1.0),
        ("    return a + b\n", 1.0),  # only the body
        ("```python\ndef add(a, b):\n    return a - b\n```", 0.0),
        ("I do not know", 0.0),
    ],
)
def test_a_function_is_judged_by_the_items_own_test(answer: str, expected: float) -> None:
    score, why = score_code(answer, ITEM)
    assert score == expected and bool(why) == (not expected)


# As HumanEval/32, /38 and /50: the test calls a function that the prompt defines.
HELPED = (
    "import math\nfrom typing import List\n\n\ndef shifted(text: str):\n"
    '    """Next letters."""\n    return "".join(chr(ord(one) + 1) for one in text)\n\n\n'
    "def unshifted(text: str):\n" + '    """Undo shifted."""\n'
)
ROUND_TRIP = "def check(candidate):\n    assert candidate(shifted('abc')) == 'abc'\n"
SHIFT = Item("human-eval", "T/1", ("ask",), "code", (ROUND_TRIP,), 768, "unshifted", HELPED)
UNSHIFTED = 'def unshifted(text: str):\n    return "".join(chr(ord(one) - 1) for one in text)\n'
BY_TWO = "def {}(text):\n    return ''.join(chr(ord(one) {} 2) for one in text)\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (UNSHIFTED, 1.0),  # only what was asked
        (HELPED + UNSHIFTED.partition("\n")[2], 1.0),  # everything again
        ('    return "".join(chr(ord(one) - 1) for one in text)\n', 1.0),  # only the body
        (BY_TWO.format("shifted", "+") + BY_TWO.format("unshifted", "-"), 1.0),  # its own helper
        (BY_TWO.format("unshifted", "-"), 0.0),
        ("def unshifted_too(text):\n    return text\n", 0.0),
        ('"""Mine."""\nfrom __future__ import annotations\n' + UNSHIFTED, 1.0),
    ],
)
def test_an_answer_has_the_prompts_helpers_unless_it_defines_them(
    answer: str, expected: float
) -> None:
    score, why = score_code(f"```python\n{answer}```", SHIFT)
    assert score == expected, why


def test_a_program_is_judged_by_what_it_writes() -> None:
    assert score_stdin("print(sum(map(int, input().split())))", SUMS) == (1.0, "")
    assert score_stdin("print(5)", SUMS) == (0.0, "test 2: it writes something else")
    with pytest.raises(SubspecError, match="no tests with input and output"):
        pairs_of(Item("livecodebench", "q", ("ask",), "stdin", ("{}",)))


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("2.50 yes", "2.5\nyes", True), ("1e3", "1000", True), ("-0", "0", True),
        ("nan", "nan", True), ("nan", "NaN", False), ("inf", "Infinity", False),
        ("sNaN", "1", False), ("2.5", "2.51", False), ("2.5 1", "2.5", False), ("a", "b", False),
    ],
)  # fmt: skip
def test_words_of_an_output_are_equal_as_text_or_as_finite_numbers(
    found: str, expected: str, same: bool
) -> None:
    tests = json.dumps([{"input": "", "output": expected}])
    item = Item("livecodebench", "q", ("ask",), "stdin", (tests,))
    assert score_stdin(f"print({found!r})", item)[0] == same


CALLED = (
    '[{"input": "[1, 2]\\n3", "output": "[3, 6]", "testtype": "functional"},'
    ' {"input": "[]\\n0\\n", "output": "[]", "testtype": "functional"}]'
)
TIMES = Item("livecodebench", "m", ("ask",), "calls", (CALLED,), entry_point="times")
METHOD = (
    "class Solution:\n    def times(self, every: List[int], by: int) -> List[int]:\n        {}\n"
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (METHOD.format("return [one * by for one in every]"), ""),
        (METHOD.format("return tuple(one * by for one in every)"), ""),
        (METHOD.format("print(7)\n        return list(map(partial(mul, by), every))"), ""),
        ("def times(every, by):\n    return [one * by for one in every]\n", ""),
        (
            "from __future__ import annotations\n" + METHOD.format("return [by * 1, by * 2]"),
            "test 2",
        ),
        (METHOD.format("exit(0)"), "test 1: it ended before its test"),
        (METHOD.format("return every") + "print([3, 6])\n", "test 1: AssertionError"),
        ("print([3, 6])", "test 1: NameError"),
    ],
)
def test_a_method_is_called_with_json_and_judged_by_what_it_returns(
    answer: str, expected: str
) -> None:
    usage = "\nUse it:\n```python\nprint(Solution().times([1], 2))\n```\n" if not expected else ""
    score, why = score_calls(f"```python\n{answer}```\n{usage}", TIMES)
    assert score == float(not expected) and expected in why, why
