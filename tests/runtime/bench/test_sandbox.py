"""Generated programs run within limits, and what they may not do ends them."""

import os
from pathlib import Path

import pytest

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime.bench import sandbox
from subspec.runtime.bench.items import Item
from subspec.runtime.bench.sandbox import run_program, score_code, score_stdin, stdin_tests

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
    if "setrlimit" in program and os.getuid() == 0 and not sandbox.alone():
        pytest.skip("root may raise its limits where there is no namespace")
    ran = run_program(program)
    assert not ran.ok and expected in ran.said


def test_a_program_that_does_not_end_is_ended_with_its_children() -> None:
    ran = run_program("import os, time\nos.fork()\ntime.sleep(60)", seconds=1)
    assert not ran.ok and ran.said == "it ran for more than 1 s"


def test_a_program_has_no_network_where_that_can_be_taken_away() -> None:
    if not sandbox.alone():
        pytest.skip("this user may make no namespaces")
    ran = run_program("import socket; socket.create_connection(('127.0.0.1', 9), 1)")
    assert not ran.ok and "unreachable" in ran.said


def test_its_folder_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_program("open('left', 'w').write('x')").ok
    assert not list(tmp_path.iterdir())


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
        stdin_tests(Item("livecodebench", "q", ("ask",), "stdin", ("{}",)))
