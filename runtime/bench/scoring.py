"""Scores of answers, 0 to 1, from text and reference. Executes nothing."""

import re
import string
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from subspec.runtime.bench.items import Item
from subspec.runtime.bench.layouts import Judge
from subspec.runtime.bench.math_results import boxed, same_result

# A code block: its language and lines. A fence may be indented, in a list, or follow
# the last line.
BLOCK = re.compile(
    r"^[^`\n]*```[ \t]*([^\s`]*)[^`\n]*\n(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
PYTHON = ("python", "python3", "py")  # languages of a block
OPENING = r"(?:[\s*_$]|\\[(\[])*"  # of bold text and formulas; the answer may be on the next line
ANSWER_LINE = re.compile(
    r"^[^\w\n]*(?:the )?(?:final |correct )?answer[^\w\n:]*(?:is[^\w\n:]*)?:" + OPENING + "(.+)",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER_IN_SENTENCE = re.compile(
    r"\banswer\b[*_ ]*(?:is\b[*_ ]*[:=]?|[:=])" + OPENING + "(.+)", re.IGNORECASE
)
NUMBER = re.compile(r"-?\d*\.?\d+")
GROUPED = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!,?\d)")  # 1,234 but not a list
LETTER = re.compile(r"\b([A-J])\b")
FIRST_LETTER = re.compile(r"\W*([A-J])\s*(?:[^\w\s'’]|$)", re.IGNORECASE)  # c, (c), C. Paris
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def code_of(text: str, defines: str = "") -> str:
    """Return the answer's last code block that defines a function, else the last one of Python,
    else the last one, else all of the text. Models correct themselves, so LiveCodeBench too takes
    the last block, but they often end with usage or output."""
    blocks = [(language.lower(), textwrap.dedent(code))
              for language, code in BLOCK.findall(text.replace("\r\n", "\n"))]  # fmt: skip
    every = [code for _, code in blocks]
    defining = [code for code in every if defines and definition_of(defines).search(code)]
    of_python = [code for language, code in blocks if language in PYTHON]
    return (defining or of_python or every or [text])[-1]


def definition_of(name: str) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]*(?:async +)?def +{re.escape(name)}\b", re.MULTILINE)


def final_answer(text: str) -> str:
    """Return the stated answer; if there is none, the last line."""
    lines = text.strip().splitlines()
    return said_answer(text) or (lines[-1] if lines else "")


def said_answer(text: str) -> str:
    """Return the text after the last line "Answer:", else the last box, else the text after the
    last "answer is" within a sentence, else ""."""
    lines: list[str] = ANSWER_LINE.findall(text)
    if lines:
        return boxed(lines[-1]) or lines[-1]
    sentences: list[str] = ANSWER_IN_SENTENCE.findall(text)
    return boxed(text) or (sentences[-1] if sentences else "")


def numbers(text: str) -> list[float]:
    text = GROUPED.sub(lambda found: found[0].replace(",", ""), text.replace("−", "-"))
    return [float(one) for one in NUMBER.findall(text)]


def score_number(text: str, references: Sequence[str]) -> float:
    """Compare the answer's first number after its last "="; without a stated answer, the text's
    last number. gsm8k's references end with "#### NUMBER"."""
    said = numbers(said_answer(text).rpartition("=")[2])[:1] or numbers(text)[-1:]
    wanted = numbers(references[0].rpartition("####")[2])[-1:]
    return float(bool(said) and said == wanted)


def score_math(text: str, references: Sequence[str]) -> float:
    """Compare the boxed or final result as text or as a number."""
    return float(
        same_result(boxed(text) or final_answer(text), boxed(references[0]) or references[0])
    )


def score_letter(text: str, references: Sequence[str]) -> float:
    """Compare the answer's first letter or first capital one; without a stated answer, the text's
    last capital letter."""
    answer = said_answer(text)
    if first := FIRST_LETTER.match(answer):
        said = [first[1].upper()]
    else:
        said = LETTER.findall(answer)[:1] or LETTER.findall(text)[-1:]
    return float(said == [references[0].strip()])


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def score_f1(text: str, references: Sequence[str]) -> float:
    return max((overlap(words(text), words(one)) for one in references), default=0.0)


def overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of words."""
    return f_score(sum((Counter(said) & Counter(wanted)).values()), len(said), len(wanted))


def score_rouge(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 over words."""
    said = text.lower().translate(PUNCTUATION).split()
    found = 0.0
    for one in references:
        wanted = one.lower().translate(PUNCTUATION).split()
        found = max(found, f_score(longest_common(said, wanted), len(said), len(wanted)))
    return found


def f_score(common: int, num_said: int, num_wanted: int) -> float:
    return 2 * common / (num_said + num_wanted) if common else 0.0


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for one in a:
        before = 0
        for at, other in enumerate(b, 1):
            kept = row[at]
            row[at] = before + 1 if one == other else max(row[at], row[at - 1])
            before = kept
    return row[-1]


def score_class(text: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return 1/n if the text names n classes, the correct one included. Classes whose name is part
    of the correct one's do not count."""
    named = {one for one in (*classes, *references) if one in text}
    found = (
        1 / sum(one == right or one not in right for one in named)
        for right in references
        if right in named
    )
    return max(found, default=0.0)


def score_count(text: str, references: Sequence[str]) -> float:
    """Share of the answer's numbers that are correct."""
    said, wanted = numbers(text), numbers(references[0])
    return sum(one == wanted[-1] for one in said) / len(said) if said and wanted else 0.0


def score_edit(text: str, references: Sequence[str]) -> float:
    """Similarity of the reference and the answer's first line, ignoring comment marks and
    fences."""
    lines = (line.strip() for line in text.splitlines() if not re.search("`|#|//", line))
    first = next((line for line in lines if line), "")
    return max(
        (SequenceMatcher(None, first, one.strip(), False).ratio() for one in references),
        default=0.0,
    )


def score_text(text: str, item: Item) -> float:
    """Score an answer to an item with references whose code is not run."""
    if item.first_line:
        text = (text.strip().splitlines() or [""])[0]
    if item.judge == "class":
        return score_class(text, item.references, item.classes)
    return SCORES[item.judge](text, item.references)


SCORES: dict[Judge, Callable[[str, Sequence[str]], float]] = {
    "number": score_number,
    "math": score_math,
    "letter": score_letter,
    "f1": score_f1,
    "rouge": score_rouge,
    "count": score_count,
    "edit": score_edit,
}
