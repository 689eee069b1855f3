"""Items of a data set: from local files in the data set's own layout, or from the hub."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.layouts import BUILTIN, LAYOUTS, Judge, Layout

OWN = Path(__file__).parent / "prompts.jsonl"
MAX_LINE = 1 << 30  # bytes; rows of LiveCodeBench have their hidden tests, of many megabytes
UNREAD = "private_test_cases"  # LiveCodeBench's hidden tests: nearly all of its gigabytes
MAX_ROWS = 200_000


@dataclass(frozen=True)
class Item:
    """One conversation to evaluate: the user's turns and the reference for its last answer.
    first_line, cut_middle: as in `Layout`."""

    task: str
    name: str
    turns: tuple[str, ...]
    judge: Judge = "none"
    references: tuple[str, ...] = ()
    max_tokens: int = 512
    entry_point: str = ""  # of the requested function
    given: str = ""  # code that the answer completes
    classes: tuple[str, ...] = ()  # trec's class names
    first_line: bool = False
    cut_middle: bool = False


def items_of(task: str, data: Path | None, most: int, seed: int) -> list[Item]:
    """Return at most `most` items, shuffled by `seed`. data: a folder with TASK.jsonl; None: the
    hub. Raises SubspecError."""
    if task == BUILTIN:
        rows: Sequence[dict[str, Any]] = list(local_rows(OWN))
        layout = Layout((BUILTIN, None, ""), 256, turns="turns")
    elif task in LAYOUTS:
        layout = LAYOUTS[task]
        rows = list(islice(rows_of(task, layout, data), MAX_ROWS))
    else:
        known = ", ".join((BUILTIN, *LAYOUTS))
        raise SubspecError(Exit.USAGE, f"there is no task {task!r}", f"the tasks are {known}")
    if not rows:
        where = "the hub" if data is None else data
        raise SubspecError(Exit.USAGE, f"{task} has no items in {where}", "give another --data")
    numbers, names = list(range(len(rows))), ids_of(layout, rows)
    random.Random(f"{seed} {task}").shuffle(numbers)
    if layout.spread:
        numbers = spread(numbers, [str(row.get(layout.spread)) for row in rows])
    return [item_of(task, layout, names[at], rows[at], seed) for at in numbers[:most]]


def spread(numbers: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """Reorder the numbers round-robin over their kinds. kinds: the kind of each number."""
    before = Counter[str]()
    place = dict[int, int]()
    for number in numbers:
        place[number] = before[kinds[number]]
        before[kinds[number]] += 1
    return sorted(numbers, key=place.__getitem__)


def rows_of(task: str, layout: Layout, data: Path | None) -> Iterable[dict[str, Any]]:
    if data is None:
        rows = rows_of_hub(task, layout)
    else:
        rows = local_rows(data / f"{task}.jsonl" if data.is_dir() else data)
    return ({key: value for key, value in row.items() if key != UNREAD} for row in rows)


def rows_of_hub(task: str, layout: Layout) -> Iterable[dict[str, Any]]:
    """Return a data set's rows from the hub. Raises SubspecError: USAGE without the extra [bench],
    HUB."""
    try:  # imported only for the hub: 1 s and 140 MB
        from subspec.runtime.bench.hub_rows import hub_rows
    except ImportError:
        raise SubspecError(
            Exit.USAGE,
            f"{task} of the hub needs the package datasets, which is not installed",
            "pip install 'subspec[bench]', or give local files: --data FOLDER",
        ) from None
    return hub_rows(task, layout)


def local_rows(file: Path) -> Iterable[dict[str, Any]]:
    """Yield the rows of a JSON Lines file. Raises SubspecError(USAGE)."""
    try:
        with open(file, "rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise wrong_row(file, number, f"it has more than {MAX_LINE} bytes")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise wrong_row(file, number, f"it is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise wrong_row(file, number, "it is not an object")
                yield row
    except OSError as error:
        raise SubspecError(
            Exit.USAGE,
            f"{file} cannot be read: {error.strerror}",
            "--data is a folder with TASK.jsonl, or a file; without it the hub is asked",
        ) from None


def wrong_row(file: Path, number: int, why: str) -> SubspecError:
    return SubspecError(Exit.USAGE, f"{file}, line {number}: {why}", "expected an object a line")


def ids_of(layout: Layout, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows' ids, or their numbers. Repeated ids get a counter: each answer belongs to
    one item."""
    seen, names = Counter[str](), list[str]()
    for number, row in enumerate(rows):
        given = (str(row[key]) for key in layout.keys if row.get(key) is not None)
        name = next(given, str(number))
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return names


def item_of(task: str, layout: Layout, name: str, row: dict[str, Any], seed: int) -> Item:
    """Convert a row to an item. Raises SubspecError(USAGE) if it lacks a field."""
    fields, references = dict(row), references_of(task, layout, row)
    method = method_of(task, row) if layout.starter else ""
    if layout.choices:
        options, right = options_of(layout, row, f"{seed} {task} {name}", references)
        fields["options"] = "\n".join(
            f"{letter}. {one}" for letter, one in zip(ascii_uppercase, options, strict=False)
        )
        references = (right,) if right else ()
    if layout.turns:
        turns = turns_of(task, layout, row)
    else:
        try:
            asked = layout.starter if method else layout.prompt
            turns = (asked.format_map(fields).strip(),)
        except KeyError as error:
            raise lacking(task, error.args[0]) from None
    classes = row.get("all_classes") if layout.judge == "class" else None
    return Item(
        task, name, turns, "calls" if method else layout.judge, references, layout.max_tokens,
        method or str(row.get("entry_point") or ""),
        str(row.get("prompt") or "") if layout.judge == "code" else "",
        tuple(map(str, classes)) if isinstance(classes, list) else (),
        layout.first_line, layout.cut_middle,
    )  # fmt: skip


def digest_of(items: Sequence[Item], max_tokens: int) -> str:
    """Digest of prompts, references and maximum answer length: rows that differ in any of these are
    not comparable."""
    asked = [[item.task, item.name, item.turns, item.references] for item in items]
    return hashlib.sha256(json.dumps([max_tokens, asked]).encode()).hexdigest()[:16]


def turns_of(task: str, layout: Layout, row: dict[str, Any]) -> tuple[str, ...]:
    fields = layout.turns.split("|")
    found = next((row[field] for field in fields if field in row), None)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise lacking(task, f"{fields[0]}, a list of texts")
    return tuple(found)


def references_of(task: str, layout: Layout, row: dict[str, Any]) -> tuple[str, ...]:
    if not layout.reference:
        return ()
    if layout.reference not in row:
        raise lacking(task, layout.reference)
    value = row[layout.reference]
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def method_of(task: str, row: dict[str, Any]) -> str:
    """Return the method that starter code begins, as in LeetCode's problems; "" if the item asks
    for a program. Raises SubspecError(USAGE)."""
    if not str(row.get("starter_code") or "").strip():
        return ""
    try:
        name = json.loads(row["metadata"])["func_name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str) or not name.isidentifier():
        raise lacking(task, "metadata with func_name, the method of its starter_code")
    return name


def options_of(
    layout: Layout, row: dict[str, Any], seed: str, references: tuple[str, ...]
) -> tuple[list[str], str]:
    """Return the options in display order, and the correct one's letter, "" if the item has
    none."""
    if len(layout.choices) == 1:  # as the data set orders them
        options = row.get(layout.choices[0])
        if not isinstance(options, list) or not 2 <= len(options) <= 10:
            raise lacking(layout.hub[0], f"{layout.choices[0]}, a list of 2 to 10")
        return [str(one) for one in options], "".join(references[:1]).strip()
    missing = next((one for one in layout.choices if one not in row), None)
    if missing is not None:
        raise lacking(layout.hub[0], missing)
    options = [str(row[one]).strip() for one in layout.choices]
    order = list(range(len(options)))
    random.Random(seed).shuffle(order)  # per item, so that it does not depend on other items
    return [options[at] for at in order], ascii_uppercase[order.index(0)]


def lacking(task: str, field: str) -> SubspecError:
    return SubspecError(
        Exit.USAGE, f"an item of {task} lacks the field {field}", "docs/bench.md has the layouts"
    )
