"""How far an answer is right: 0 to 1, from its text and the reference. Nothing is executed here."""

import re
import string
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from subspec.runtime.bench.layouts import Judge

# Of a code block: its language and its lines. A fence may be indented, stand in a list, or follow
# the last line.
BLOCK = re.compile(
    r"^[^`\n]*```[ \t]*([^\s`]*)[^`\n]*\n(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
PYTHON = ("python", "python3", "py")  # languages of a block
ANSWER = re.compile(r"answer\s*(?:is)?\s*[:=]?\s*(.+)", re.IGNORECASE)
NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
LETTER = re.compile(r"\(?\b([A-J])\b\)?")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
LONGEST_MATH = 200  # characters of a result


def code_of(text: str, defines: str = "") -> str:
    """The last code block of an answer that defines a function, the last one of Python, or the last
    one; without any, all of it. Models correct themselves, so that LiveCodeBench takes the last one
    too, but often end with how a function is called or with what a program writes."""
    blocks = [(language.lower(), textwrap.dedent(code))
              for language, code in BLOCK.findall(text.replace("\r\n", "\n"))]  # fmt: skip
    every = [code for _, code in blocks]
    defining = [code for code in every if defines and definition_of(defines).search(code)]
    of_python = [code for language, code in blocks if language in PYTHON]
    return (defining or of_python or every or [text])[-1]


def definition_of(name: str) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]*(?:async +)?def +{re.escape(name)}\b", re.MULTILINE)


def final_answer(text: str) -> str:
    """What follows the last "answer:"; without one, the last line."""
    said = ANSWER.findall(text)
    lines = text.strip().splitlines()
    return str(said[-1]).strip() if said else lines[-1] if lines else ""


def numbers(text: str) -> list[float]:
    return [float(one.replace(",", "")) for one in NUMBER.findall(text)]


def score_number(text: str, references: Sequence[str]) -> float:
    """The number of the final answer; gsm8k's references end with "#### NUMBER"."""
    said = numbers(final_answer(text)) or numbers(text)
    wanted = numbers(references[0].rpartition("####")[2])
    return float(bool(said and wanted) and said[-1] == wanted[-1])


def score_math(text: str, references: Sequence[str]) -> float:
    """The boxed or the final result, as text or as a number."""
    said, wanted = (
        plain_math(boxed(one) or other)
        for one, other in ((text, final_answer(text)), (references[0], references[0]))
    )
    if said == wanted:
        return float(wanted != "")
    as_numbers = [numbers(one) for one in (said, wanted)]
    whole = [len(one) == 1 and NUMBER.fullmatch(text) for one, text in
             zip(as_numbers, (said, wanted), strict=True)]  # fmt: skip
    return float(all(whole) and as_numbers[0] == as_numbers[1])


def boxed(text: str) -> str:
    r"""What the last \boxed{...} holds, with its own braces; "" if there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + 7 : at]
    return ""


def plain_math(text: str) -> str:
    """Without what only changes how a result looks."""
    text = text.strip().strip("$").rstrip(".")[:LONGEST_MATH]
    for mark in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", "$", "\\%", "%", "^\\circ", " "):
        text = text.replace(mark, "")
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = text.replace("dfrac", "frac").replace("tfrac", "frac")
    return re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)


def score_letter(text: str, references: Sequence[str]) -> float:
    """The first letter after "answer:"; without one the last of all, as "I" is a letter too."""
    after = ANSWER.findall(text)
    said = LETTER.findall(after[-1])[:1] if after else LETTER.findall(text)[-1:]
    return float(said == [references[0].strip()])


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def score_f1(text: str, references: Sequence[str]) -> float:
    return max((overlap(words(text), words(one)) for one in references), default=0.0)


def overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of words."""
    return f_score(sum((Counter(said) & Counter(wanted)).values()), len(said), len(wanted))


def score_rouge(text: str, references: Sequence[str]) -> float:
    """ROUGE-L's F1 over words."""
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


def score_class(text: str, references: Sequence[str]) -> float:
    """The class is the first line of the answer, or the only one that it names."""
    first = (text.strip().splitlines() or [""])[0].lower()
    return max((float(one.lower() in first) for one in references), default=0.0)


def score_count(text: str, references: Sequence[str]) -> float:
    """The share of the answer's numbers that are right."""
    said, wanted = numbers(text), numbers(references[0])
    return sum(one == wanted[-1] for one in said) / len(said) if said and wanted else 0.0


def score_paragraph(text: str, references: Sequence[str]) -> float:
    return score_count(text, references)


def score_edit(text: str, references: Sequence[str]) -> float:
    """Similarity of the answer's first line of code and the reference."""
    lines = [line for line in code_of(text).splitlines() if line.strip()]
    first = next((one for one in lines if not one.lstrip().startswith(("#", "//"))), "")
    return max(
        (SequenceMatcher(None, first.strip(), one.strip(), False).ratio() for one in references),
        default=0.0,
    )


SCORES: dict[Judge, Callable[[str, Sequence[str]], float]] = {
    "number": score_number,
    "math": score_math,
    "letter": score_letter,
    "f1": score_f1,
    "rouge": score_rouge,
    "class": score_class,
    "count": score_count,
    "paragraph": score_paragraph,
    "edit": score_edit,
}
