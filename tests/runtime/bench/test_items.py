"""Items of every data set, from rows in its own layout; the rows are ours."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.items import Item, digest_of, items_of, rows_of
from subspec.runtime.bench.layouts import BUILTIN, LAYOUTS, Layout
from subspec.runtime.bench.records import AnswerRow
from subspec.runtime.bench.tasks import judged

LONGBENCH = {
    "input": "Who kept the light?", "context": "Anna kept the light.", "answers": ["Anna"],
    "length": 4, "dataset": "x", "language": "en", "all_classes": None, "_id": "a1",
}  # fmt: skip
# By task: a row of ours with the data set's fields, and an answer that is right.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "mt-bench": ({"question_id": 81, "category": "writing", "turns": ["Hi", "Again"]}, ""),
    "human-eval": (
        {"task_id": "T/0", "prompt": 'def add(a, b):\n    """Sum."""\n', "entry_point": "add",
         "canonical_solution": "    return a + b\n",
         "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n"},
        "```python\ndef add(a, b):\n    return a + b\n```",
    ),
    "gsm8k": ({"question": "2 bags of 6?", "answer": "2 * 6 = 12\n#### 12"}, "Answer: 12"),
    "alpaca": ({"instruction": "Say hi", "input": "", "output": "hi", "text": ""}, ""),
    "cnn-dm": ({"article": "A pier fell.", "highlights": "pier fell", "id": "c"}, "Pier fell."),
    "aime": ({"id": 1, "problem": "1 + 1", "solution": "", "answer": "2"}, "so\nAnswer: 2."),
    "gpqa": (
        {"Question": "Which?", "Correct Answer": "this", "Incorrect Answer 1": "that",
         "Incorrect Answer 2": "it", "Incorrect Answer 3": "none", "Record ID": "r"}, "",
    ),
    "math-500": (
        {"problem": "1/2?", "solution": "", "answer": "\\frac{1}{2}", "subject": "Algebra",
         "level": 1, "unique_id": "u"}, "It is $\\boxed{\\dfrac12}$.",
    ),
    "livecodebench": (
        {"question_title": "Sum", "question_content": "Add two numbers.", "question_id": "q",
         "starter_code": "", "public_test_cases": '[{"input": "2 3", "output": "5\\n"}]'},
        "```python\nprint(sum(map(int, input().split())))\n```",
    ),
    "mmlu-pro": (
        {"question_id": 7, "question": "Which?", "options": ["x", "y", "z"], "answer": "B",
         "answer_index": 1, "category": "law"}, "Answer: (B)",
    ),
}  # fmt: skip
RIGHT = {
    "f1": "Anna.", "rouge": "anna", "class": "Anna\n", "edit": "```\n# no\nAnna\n```",
}  # fmt: skip


def row_for(task: str, layout: Layout) -> tuple[dict[str, Any], str]:
    if task in ROWS:
        return ROWS[task]
    if layout.judge == "count":
        answer = "3" if task == "passage_count" else "Paragraph 3"
        return LONGBENCH | {"answers": [answer]}, answer
    return LONGBENCH, RIGHT[layout.judge]


def write(folder: Path, task: str, *rows: object) -> Path:
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def loaded(folder: Path, task: str) -> Item:
    [item] = items_of(task, write(folder, task, row_for(task, LAYOUTS[task])[0]), 5, seed=0)
    return item


def answer_to(item: Item, text: str) -> AnswerRow:
    return AnswerRow(
        "subspec.bench.answer/1", None, item.task, item.name, 0, text, (), "eos", None, "", None  # type: ignore[arg-type]
    )  # fmt: skip


def scored(item: Item, text: str) -> float | None:
    return judged(answer_to(item, text), item, execute=False).score


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_row_of_each_data_set_becomes_a_question_whose_right_answer_scores(
    task: str, tmp_path: Path
) -> None:
    layout = LAYOUTS[task]
    item = loaded(tmp_path, task)
    assert item.turns and all(item.turns) and "{" not in item.turns[0].replace("\\frac{", "")
    right = row_for(task, layout)[1] or f"Answer: {''.join(item.references)}"
    if layout.judge in ("none", "code", "stdin"):  # code is run only if somebody asks for it
        assert scored(item, right) is None
    else:
        assert scored(item, right) == 1.0
        assert scored(item, "") == 0.0
        assert (scored(item, "Answer: wholly unlike 99") or 0.0) < 0.5


METHOD = {
    "question_content": "Double it.", "question_id": "m", "starter_code":
    "class Solution:\n    def double(self, one: int) -> int:\n        ",
    "metadata": '{"func_name": "double"}',
    "public_test_cases": '[{"input": "2", "output": "4", "testtype": "functional"}]',
}  # fmt: skip


def test_starter_code_is_shown_and_its_method_is_what_is_judged(tmp_path: Path) -> None:
    [item] = items_of("livecodebench", write(tmp_path, "livecodebench", METHOD), 1, 0)
    assert (item.judge, item.entry_point) == ("calls", "double")
    assert "Double it." in item.turns[0] and METHOD["starter_code"] in item.turns[0]
    assert "stdin" not in item.turns[0]
    program = loaded(tmp_path, "livecodebench")
    assert (program.judge, program.entry_point) == ("stdin", "")


@pytest.mark.parametrize("metadata", [{}, {"metadata": "{}"}, {"metadata": '{"func_name": "a b"}'}])
def test_starter_code_without_the_name_of_its_method_is_refused(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    row = {key: value for key, value in METHOD.items() if key != "metadata"} | metadata
    with pytest.raises(SubspecError, match="lacks the field metadata with func_name"):
        items_of("livecodebench", write(tmp_path, "livecodebench", row), 1, 0)


def test_hidden_tests_of_many_megabytes_are_read_over_and_not_kept(tmp_path: Path) -> None:
    row = ROWS["livecodebench"][0] | {"private_test_cases": "x" * (17 << 20)}
    [found] = rows_of(
        "livecodebench", LAYOUTS["livecodebench"], write(tmp_path, "livecodebench", row)
    )
    assert found == ROWS["livecodebench"][0]


@pytest.mark.parametrize("task", ["triviaqa", "samsum", "trec"])
def test_of_answers_to_examples_only_the_first_line_is_judged(task: str, tmp_path: Path) -> None:
    classes = LONGBENCH | {"answers": ["City"], "all_classes": ["City", "Number"]}
    [item] = items_of(task, write(tmp_path, task, classes), 1, 0)
    assert scored(item, "\nCity\n\nPassage: a Number of towns") == 1.0
    assert scored(item, "Nothing\nCity") == 0.0
    assert scored(item, "City Number") == pytest.approx(0.5 if task == "trec" else 2 / 3)


@pytest.mark.parametrize("task", ["passage_count", "trec", "hotpotqa", "gsm8k", "mmlu-pro"])
@pytest.mark.parametrize("reference", [[], None])
def test_an_item_without_a_reference_is_answered_and_not_judged(
    task: str, reference: object, tmp_path: Path
) -> None:
    row = row_for(task, LAYOUTS[task])[0] | {LAYOUTS[task].reference: reference}
    [item] = items_of(task, write(tmp_path, task, row), 1, 0)
    found = judged(answer_to(item, "3"), item, execute=False)
    assert found.score is None and found.why == "the item has no reference"


def test_a_limited_number_of_items_is_spread_evenly_over_categories(tmp_path: Path) -> None:
    kinds = ["law"] * 90 + ["physics"] * 8 + ["history"] * 2
    rows = [
        ROWS["mmlu-pro"][0] | {"question_id": at, "category": kind} for at, kind in enumerate(kinds)
    ]
    data = write(tmp_path, "mmlu-pro", *rows)
    few, same, other = (items_of("mmlu-pro", data, 9, seed) for seed in (0, 0, 1))
    counts = Counter(kinds[int(item.name)] for item in few)
    assert counts["history"] == 2 and abs(counts["law"] - counts["physics"]) <= 1
    assert few == same != other
    assert items_of("mmlu-pro", data, 20, 0)[:9] == few
    assert len({item.name for item in items_of("mmlu-pro", data, 200, 0)}) == 100


def test_every_turn_of_a_conversation_is_asked(tmp_path: Path) -> None:
    assert loaded(tmp_path, "mt-bench").turns == ("Hi", "Again")
    hub = write(tmp_path, "mt-bench", {"prompt": ["One", "Two"], "prompt_id": 3})
    [item] = items_of("mt-bench", hub, 1, 0)
    assert (item.turns, item.name) == (("One", "Two"), "3")


def test_options_are_shuffled_by_the_item_and_not_by_its_place(tmp_path: Path) -> None:
    rows = [ROWS["gpqa"][0] | {"Record ID": f"r{n}"} for n in range(24)]
    every = items_of("gpqa", write(tmp_path, "gpqa", *rows), 24, seed=1)
    few = items_of("gpqa", write(tmp_path, "gpqa", *rows[:12]), 12, seed=1)
    by_name = {item.name: item for item in every}
    assert all(by_name[item.name] == item for item in few)
    assert {item.references[0] for item in every} == set("ABCD")
    for item in every:
        assert f"{item.references[0]}. this" in item.turns[0]


def test_items_with_one_id_are_told_apart(tmp_path: Path) -> None:
    rows = [ROWS["aime"][0] | {"id": name, "problem": name + str(n)}
            for n, name in enumerate(["x", "y", "x", "x"])]  # fmt: skip
    items = items_of("aime", write(tmp_path, "aime", *rows), 4, 0)
    found = {item.name: item.turns[0].split()[0] for item in items}
    assert found == {"x": "x0", "y": "y1", "x #2": "x2", "x #3": "x3"}


def test_the_digest_of_what_is_asked_depends_on_words_references_and_length() -> None:
    item = Item("t", "i", ("a", "b"), references=("c",))
    others = [replace(item, turns=("a",)), replace(item, references=("d",))]
    digests = [digest_of([one], 8) for one in (item, *others)]
    assert len({*digests, digest_of([item], 9)}) == 4
    assert digests[0] == digest_of([item], 8)


def test_the_choice_of_items_is_the_seeds(tmp_path: Path) -> None:
    data = write(tmp_path, "gsm8k", *(ROWS["gsm8k"][0] | {"question": str(n)} for n in range(50)))
    names = [[item.name for item in items_of("gsm8k", data, 5, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and len(set(names[0])) == 5


def test_our_own_prompts_are_there_and_have_their_own_name() -> None:
    items = items_of(BUILTIN, None, 100, 0)
    assert len(items) == 20 and max(len(item.turns) for item in items) == 2
    assert BUILTIN not in LAYOUTS


@pytest.mark.parametrize(
    ("line", "expected"),
    [("{}", "lacks the field answer"), ("[1]", "is not an object"), ("{", "is not JSON")],
)
def test_a_wrong_row_is_one_sentence(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "gsm8k.jsonl").write_text(line + "\n")
    with pytest.raises(SubspecError, match=expected) as error:
        items_of("gsm8k", tmp_path, 1, 0)
    assert error.value.exit_code == Exit.USAGE


def test_unknown_tasks_and_missing_files_are_refused(tmp_path: Path) -> None:
    for task, expected in (("gsm9k", "no task 'gsm9k'"), ("gsm8k", "cannot be read")):
        with pytest.raises(SubspecError, match=expected):
            items_of(task, tmp_path, 1, 0)


def test_the_hub_is_asked_through_datasets_for_what_the_table_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[object]()

    def load_dataset(*words: object, split: str) -> list[dict[str, Any]]:
        asked.append((*words, split))
        if words[0] == LAYOUTS["gpqa"].hub[0]:
            raise ValueError("gated\nmore")
        return [ROWS["gsm8k"][0]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "subspec.runtime.bench.hub_rows", raising=False)
    assert len(items_of("gsm8k", None, 5, 0)) == 1
    assert asked == [("openai/gsm8k", "main", "test")]
    with pytest.raises(SubspecError, match="cannot be loaded: gated$") as error:
        items_of("gpqa", None, 5, 0)
    assert error.value.exit_code == Exit.HUB
    monkeypatch.delitem(sys.modules, "subspec.runtime.bench.hub_rows")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "subspec.runtime.bench.hub_rows", raising=False)
    with pytest.raises(SubspecError, match="datasets, which is not installed") as error:
        items_of("gsm8k", None, 5, 0)
    assert "subspec[bench]" in error.value.hint
