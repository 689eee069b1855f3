"""Scores of answers against worked examples."""

import pytest

from subspec.runtime.bench.scoring import (
    boxed,
    code_of,
    final_answer,
    longest_common,
    score_class,
    score_count,
    score_edit,
    score_f1,
    score_letter,
    score_math,
    score_number,
    score_rouge,
)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("2 and 2\nAnswer: 1,234", "#### 1234", 1),
        ("the answer is 12.0", "12", 1),
        ("12 apples, 3 left.\nAnswer: 3 apples", "12", 0),
        ("it is 7", "7", 1),
        ("", "7", 0),
        ("Answer: -5", "-5", 1),
    ],
)
def test_numbers(text: str, reference: str, expected: float) -> None:
    assert score_number(text, [reference]) == expected


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        (r"thus \boxed{\frac{3}{4}}", r"\frac34", 1),
        (r"Answer: $x^2$", "x^2", 1),
        ("Answer: 0.50", "0.5", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{\text{east}}", "east", 1),
        ("Answer: 3", "4", 0),
        ("", "4", 0),
    ],
)
def test_results(text: str, reference: str, expected: float) -> None:
    assert score_math(text, [reference]) == expected


def test_the_last_box_with_its_own_braces() -> None:
    assert boxed(r"\boxed{1} and \boxed{a{b}c}") == "a{b}c"
    assert boxed(r"\boxed{open") == boxed("none") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Answer: C", 1), ("Answer: (C).", 1), ("It is A.\nAnswer: B", 0), ("I take C", 1), ("", 0)],
)
def test_letters(text: str, expected: float) -> None:
    assert score_letter(text, ["C"]) == expected


def test_words_in_common() -> None:
    assert score_f1("The red house!", ["a red house"]) == 1
    assert score_f1("red house", ["red", "blue"]) == pytest.approx(2 / 3)
    assert score_rouge("a b c d", ["a c d e"]) == pytest.approx(0.75)
    assert longest_common("abcbdab", "bdcaba") == 4
    assert score_f1("", ["x"]) == score_rouge("", ["x"]) == 0


def test_classes_counts_and_lines_of_code() -> None:
    assert score_class("Type: City\nother", ["city"]) == 1
    assert score_count("3 or 4", ["3"]) == 0.5
    assert score_edit("    return x\n", ["return x"]) == 1
    assert 0 < score_edit("return y", ["return x"]) < 1


def test_the_last_block_of_python_counts_and_an_open_one_too() -> None:
    assert (
        code_of("```python\na\n```\nbetter:\n```python\nb\n```\nit writes\n```\n5\n6\n```\n")
        == "b\n"
    )
    assert code_of("see\n```\na\n```\n```\nlonger\n```\n") == "longer\n"
    assert code_of("```py\nx = 1") == "x = 1"
    assert code_of("plain") == "plain"


def test_the_last_block_that_defines_the_function_counts() -> None:
    first, second = "def f(a):\n    return a\n", "async def f(a):\n    return 2\n"
    usage = "print(f(1))\n" * 5 + "print(fan(1))\n"
    text = "".join(f"```python\n{one}```\nthen\n" for one in (first, second, usage))
    assert code_of(text, "f") == second
    assert code_of(text.replace("async def f", "def fan"), "f") == first
    assert code_of(text, "g") == code_of(text) == usage


@pytest.mark.parametrize(
    "text",
    [
        "``` python\n{}```",
        "```Python \n{}```\n",
        "1. So:\n\n   ```python\n{}   ```\n",
        "- ```python\n{}  ```\n",
        "```python title=f.py\n{}```",
        "Use ```f``` so:\n```\n{}```",
    ],
)
def test_a_fence_may_have_spaces_an_indent_and_windows_line_ends(text: str) -> None:
    code = 'def f():\n    return "```"  # a fence\n'
    indented = "".join(f"   {line}\n" for line in code.splitlines())
    for body in (code, indented):
        answer = text.format(body)
        assert code_of(answer, "f") == code_of(answer.replace("\n", "\r\n"), "f") == code
    assert code_of("```python\nreturn 1```") == "return 1"


def test_the_final_answer_is_the_last_one_or_the_last_line() -> None:
    assert final_answer("Answer: 1\nso\nANSWER: 2\n") == "2"
    assert final_answer("one\ntwo\n") == "two"
