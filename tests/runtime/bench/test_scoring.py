"""Scores of answers against worked examples."""

import pytest

from subspec.runtime.bench.math_results import boxed
from subspec.runtime.bench.scoring import (
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
        ("Answer: −5", "-5", 1),
        ("Answer: 18\n\nPlease note that this answer assumes 2 eggs.", "18", 1),
        ("Answer: 18 dollars for 2 days", "18", 1),
        ("**Final answer:** 2 * 9 = $18$ for 2 days", "18", 1),
        ("The answer is: 18\nIt took 2 days.", "18", 1),
        ("Answer:\n\n18\n\nin 2 days", "18", 1),
        ("So the answer is **18** for 2 days, not 3.", "18", 1),
        (r"It is $\boxed{18}$ after 2 days.", "18", 1),
        ("Answer: 1,23", "123", 0),
        ("Answer: 2,000,000 people", "2000000", 1),
        ("7 eggs. I hope this answers your 2 questions about 7", "7", 1),
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
        ("**Answer: 4**", "4", 1),
        ("Answer: **4**", "4", 1),
        ("**Answer:** $4$", "4", 1),
        ("### Final Answer\n\n**Answer:**\n\n$$\n4\n$$", "4", 1),
        (r"Answer: \(\frac{3}{4}\)", r"\frac{3}{4}", 1),
        (r"\boxed{90^{\circ}}", r"90^\circ", 1),
        ("Answer: 90°", r"90^\circ", 1),
        ("Answer: 0.5", r"\frac{1}{2}", 1),
        ("Answer: 1/2", r"\frac{1}{2}", 1),
        ("Answer: 0.33", r"\frac{1}{3}", 0),
        ("Answer: −1/2", r"\frac{-1}{2}", 1),
        (r"\boxed{-\frac12}", r"\frac{-1}{2}", 1),
        (r"\boxed{\frac{72}9}", "8", 1),
        (r"\boxed{2\frac{3}{4}}", r"\frac{23}{4}", 0),
        (r"\boxed{\frac{1}{0}}", "0", 0),
        (r"Answer: \$5", "5", 1),
        (r"\boxed{5\text{ cm}}", "5", 1),
        (r"\boxed{5\,\mathrm{cm}^2}", "5", 1),
        ("5", r"5\text{ cm}", 1),
        ("Answer: x=5", "5", 1),
        ("Answer: $f(x) = 2x$", "2x", 1),
        ("Answer: $x = 5, y = 3$", "3", 0),
        (r"so $\boxed 3$", "3", 1),
        (r"so $\fbox{3}$", "3", 1),
        (r"Answer: \sqrt2", r"\sqrt{2}", 1),
        ("Answer: x^{2}", "x^2", 1),
        ("Answer: x^{23}", "x^23", 0),
        ("Answer: A", r"\text{(A)}", 1),
        (r"\boxed{\text{(A)}}", "A", 1),
        (r"\boxed{1,23}", "12,3", 0),
        (r"\boxed{2,3}", "23", 0),
        (r"\boxed{2,3}", "2, 3", 1),
        (r"\boxed{(1,234)}", "(1, 234)", 1),
        (r"\boxed{12{,}345}", "12345", 1),
        (r"\boxed{12,\!345.5}", "12345.50", 1),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
        (r"\boxed{\begin{pmatrix}1\\-2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 0),
        ("Answer: 1e999999999", "3", 0),
        ("Answer: 2*3", "23", 0),
    ],
)
def test_results(text: str, reference: str, expected: float) -> None:
    assert score_math(text, [reference]) == expected


def test_the_last_box_with_its_own_braces() -> None:
    assert boxed(r"\boxed{1} and \boxed{a{b}c}") == "a{b}c"
    assert boxed(r"\boxed{open") == boxed("none") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: C", 1),
        ("Answer: (C).", 1),
        ("It is A.\nAnswer: B", 0),
        ("I take C", 1),
        ("", 0),
        ("Answer: C\n\nI hope this answers your question.", 1),
        ("Answer: C\n\nB would be an answer to A.", 1),
        ("Answer: c", 1),
        ("answer: (c)", 1),
        ("**Answer:** c) because a is wrong", 1),
        ("Answer: a dog, so C", 1),
        ("Answer: Option C", 1),
        ("The correct answer is: **C**. I am sure.", 1),
        ("I'd say the answer is C. I am sure.", 1),
        (r"Answer: $\boxed{\text{C}}$", 1),
        (r"It has \boxed{12} legs: C", 1),
        ("Answer: B\nas the answer is not C", 0),
    ],
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
    assert score_class("Type: City\nother", ["City"]) == 1
    assert score_count("3 or 4", ["3"]) == 0.5
    assert score_edit("    return x\n", ["return x"]) == 1
    assert 0 < score_edit("return y", ["return x"]) < 1


CLASSES = ["City", "Country", "Other location", "location", "Number"]


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [
        ("Type: City", "City", 1),
        ("City or Country", "City", 0.5),
        ("Country", "City", 0),
        ("the capacity of a Number", "City", 0),
        (", ".join(CLASSES), "City", 0.2),
        ("Other location", "Other location", 1),
        ("Other location", "location", 0.5),
    ],
)
def test_an_answer_that_names_several_classes_shares_its_score(
    text: str, right: str, expected: float
) -> None:
    assert score_class(text, [right], CLASSES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n```python\n\n# next\nreturn x\n```", 1),
        ("// next\nreturn x", 1),
        ("see `x` # the next one\n    return x\nreturn y", 1),
        ("Here is the next line:\n\nreturn x", 0.27),
    ],
)
def test_a_line_of_code_is_the_first_without_marks_of_comments_and_fences(
    text: str, expected: float
) -> None:
    assert score_edit(text, ["return x"]) == pytest.approx(expected, abs=0.01)


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
