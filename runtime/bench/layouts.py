"""Common benchmark data sets as data: location, fields of an item, prompt and judge. Contains none
of their items."""

from dataclasses import dataclass
from typing import Literal

# How an answer is scored; `scoring.py` has one function for each.
Judge = Literal[
    "none", "number", "math", "letter", "code", "stdin", "calls", "f1", "rouge", "class", "count",
    "edit",
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """hub: data set, configuration and split on the hub. prompt: template with the item's fields in
    braces. turns: field with the user's messages, in place of a prompt. reference: field that
    answers are judged by. choices: fields, or one list field, with options; the first one, or the
    one that the reference names, is correct. starter: prompt for items with starter code, whose
    method is called with each test's arguments. spread: field whose values are taken in equal
    numbers. first_line: only the answer's first line is judged. cut_middle: prompts too long for
    the context lose their middle."""

    hub: tuple[str, str | None, str]
    max_tokens: int
    prompt: str = ""
    starter: str = ""
    turns: str = ""
    reference: str = ""
    judge: Judge = "none"
    choices: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()  # id fields in order of preference; else the row's number
    spread: str = ""
    first_line: bool = False
    cut_middle: bool = False


NUMBER = "\n\nThink step by step. End with a line of the form: Answer: NUMBER"
MATH = "\n\nThink step by step. End with a line of the form: Answer: RESULT"
LETTER = "\n\n{options}\n\nThink step by step. End with a line of the form: Answer: LETTER"
PASSAGES = (
    "Read these passages and answer the question with a few words only, without a sentence.\n\n"
    "{context}\n\nQuestion: {input}"
)
SUMMARY = "Summarize this text in one page.\n\n{context}"
ASKED_SUMMARY = "Answer from this text in one or more sentences.\n\n{context}\n\n{input}"
EXAMPLES = "{context}\n{input}"


def longbench(
    name: str, prompt: str, judge: Judge, max_tokens: int, first_line: bool = False
) -> Layout:
    """Layout of a LongBench task, judged and truncated as by its eval.py, metrics.py and
    pred.py."""
    return Layout(
        ("THUDM/LongBench", name, "test"), max_tokens, prompt, reference="answers", judge=judge,
        keys=("_id",), first_line=first_line, cut_middle=True,
    )  # fmt: skip


LAYOUTS: dict[str, Layout] = {
    "mt-bench": Layout(
        ("HuggingFaceH4/mt_bench_prompts", None, "train"), 1024,
        turns="turns|prompt", keys=("question_id", "prompt_id"),
    ),
    "human-eval": Layout(
        ("openai/openai_humaneval", None, "test"), 768,
        "Complete this Python function. Give the whole function in one code block.\n\n"
        "```python\n{prompt}\n```",
        reference="test", judge="code", keys=("task_id",),
    ),
    "gsm8k": Layout(
        ("openai/gsm8k", "main", "test"), 512, "{question}" + NUMBER, reference="answer",
        judge="number",
    ),
    "alpaca": Layout(("tatsu-lab/alpaca", None, "train"), 512, "{instruction}\n\n{input}"),
    "cnn-dm": Layout(
        ("abisee/cnn_dailymail", "3.0.0", "test"), 256,
        "Summarize this article in three sentences.\n\n{article}",
        reference="highlights", judge="rouge", keys=("id",),
    ),
    "aime": Layout(
        ("HuggingFaceH4/aime_2024", None, "train"), 4096, "{problem}" + NUMBER,
        reference="answer", judge="number", keys=("id",),
    ),
    "gpqa": Layout(
        ("Idavidrein/gpqa", "gpqa_diamond", "train"), 2048, "{Question}" + LETTER, judge="letter",
        choices=(
            "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3",
        ),
        keys=("Record ID",),
    ),
    "math-500": Layout(
        ("HuggingFaceH4/MATH-500", None, "test"), 2048, "{problem}" + MATH, reference="answer",
        judge="math", keys=("unique_id",),
    ),
    "livecodebench": Layout(
        ("livecodebench/code_generation_lite", None, "test"), 2048,
        "Write a Python program that reads stdin and writes stdout. Give it in one code block."
        "\n\n{question_content}",
        "Complete this Python class. Give the whole class in one code block.\n\n"
        "{question_content}\n\n```python\n{starter_code}\n```",
        reference="public_test_cases", judge="stdin", keys=("question_id",),
    ),
    "mmlu-pro": Layout(
        ("TIGER-Lab/MMLU-Pro", None, "test"), 1024, "{question}" + LETTER, reference="answer",
        judge="letter", choices=("options",), keys=("question_id",), spread="category",
    ),
    **{
        name: longbench(name, PASSAGES, "f1", 32)
        for name in ("hotpotqa", "2wikimqa", "musique")
    },
    "narrativeqa": longbench("narrativeqa", PASSAGES, "f1", 128),
    "qasper": longbench("qasper", PASSAGES, "f1", 128),
    "multifieldqa_en": longbench("multifieldqa_en", PASSAGES, "f1", 64),
    "gov_report": longbench("gov_report", SUMMARY, "rouge", 512),
    "multi_news": longbench("multi_news", SUMMARY, "rouge", 512),
    "qmsum": longbench("qmsum", ASKED_SUMMARY, "rouge", 512),
    "trec": longbench("trec", EXAMPLES, "class", 64, first_line=True),
    "triviaqa": longbench("triviaqa", EXAMPLES, "f1", 32, first_line=True),
    "samsum": longbench("samsum", EXAMPLES, "rouge", 128, first_line=True),
    "passage_count": longbench(
        "passage_count",
        "How many different paragraphs are here? Answer with the number only.\n\n{context}",
        "count", 32,
    ),
    "passage_retrieval_en": longbench(
        "passage_retrieval_en",
        "Which paragraph does the summary belong to? Answer such as: Paragraph 3\n\n{context}"
        "\n\nSummary: {input}",
        "count", 32,
    ),
    "lcc": longbench("lcc", "Write the next line of this code, and nothing else.\n\n{context}",
                     "edit", 64),
    "repobench-p": longbench(
        "repobench-p", "Write the next line of this code, and nothing else.\n\n{context}{input}",
        "edit", 64,
    ),
}  # fmt: skip
BUILTIN = "builtin-mini"  # our own prompts, never under a data set's name
