"""Mathematical results: extraction of the last box, and equivalence. Normalization follows
lm-eval's tasks minerva_math and hendrycks_math."""

import re
from fractions import Fraction

MAX_CHARACTERS = 200  # characters of a result
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# Notation and its replacement, applied in this order.
LOOKS = (
    ("\\\\", ";"),  # the end of a matrix' row
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("{,}", ","),
    ("−", "-"),
    ("~", " "),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    *((mark, "") for mark in ("°", "\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ")),
    *((mark, "") for mark in ("\\$", "$", "\\%", "%", "\\(", "\\)", "\\[", "\\]")),
)
TEXT = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}"
UNIT = re.compile(r"(?<=[\d})])\s*" + TEXT + r"(?:\^\{?\d\}?)?$")
NAME = re.compile(r"^[A-Za-z](?:\([A-Za-z]\))?=(?=[^=]*$)")  # x=, f(x)=
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+"
WHOLE = r"\d|\{-?\d+\}"  # an argument of \frac
VALUE = re.compile(rf"(-?)(?:\\frac({WHOLE})({WHOLE})|({NUMBER})(?:/(\d+))?)")


def boxed(text: str) -> str:
    r"""Return the content of the last \boxed{...}, with its own braces; "" if there is none. A box
    without braces ends with the formula or the word."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return ""
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0]
    depth = 0
    for at, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:at]
    return ""


def same_result(one: str, other: str) -> bool:
    """Return True if two results are equal as text or as numbers: decimal, with groups of three
    digits, or a fraction."""
    one, other = plain_math(one), plain_math(other)
    if one == other:
        return one != ""
    value = value_of(one)
    return value is not None and value == value_of(other)


def plain_math(text: str) -> str:
    """Normalize notation: remove marks around the result, units, "x =", space, and braces around a
    single character."""
    text = text.strip()[:MAX_CHARACTERS]
    for mark, plain in LOOKS:
        text = text.replace(mark, plain)
    text = text.lstrip(" *_").rstrip(" *_.")
    text = re.sub(TEXT, r"\1", UNIT.sub("", text))
    text = NAME.sub("", "".join(text.split()))
    text = re.sub(r"\{(\w)\}", r"\1", text)
    return re.sub(r"^\(([A-Z])\)$", r"\1", text)


def value_of(text: str) -> Fraction | None:
    """Return the number in a plain result; None if it is not a single number."""
    found = VALUE.fullmatch(text)
    if found is None:
        return None
    sign, above, below, number, divisor = found.groups()
    top = Fraction((above or number).strip("{}").replace(",", ""))
    bottom = int((below or divisor or "1").strip("{}"))
    return (-top if sign else top) / bottom if bottom else None
