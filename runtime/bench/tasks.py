"""`subspec-bench tasks`: answers and judges items of data sets one by one, for accuracy, acceptance
and speed."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.formatting import duration
from subspec.artifacts.format.store import Artifact
from subspec.runtime.bench.items import Item, digest_of
from subspec.runtime.bench.layouts import Judge
from subspec.runtime.bench.prompting import prompt_of, reasoning_marks, reasoning_of, without_middle
from subspec.runtime.bench.records import (
    AnswerRow,
    Key,
    Setting,
    append_row,
    costs_of,
    replace_answers,
    rows_to_resume,
    setting_of,
)
from subspec.runtime.bench.sandbox import (
    NOT_ISOLATED,
    isolation,
    score_calls,
    score_code,
    score_stdin,
)
from subspec.runtime.bench.scoring import score_text
from subspec.runtime.bench.throughput import warm_up
from subspec.runtime.engine import Engine
from subspec.runtime.lossy import Lossy
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams, Stats
from subspec.runtime.text.reasoning import reasoning_length
from subspec.runtime.text.streaming import TextStream
from subspec.runtime.text.tokenizer import ChatTokenizer

RUN: tuple[Judge, ...] = ("code", "stdin", "calls")  # judges that run a program


@dataclass(frozen=True)
class Asking:
    """Options for answering items. max_tokens: None: each task's own. execute: run generated code.
    lossy: rule that accepts drafts; None: exact. enable_thinking: None: the chat template's
    default."""

    temperature: float = 0.0
    seed: int = 0
    max_tokens: int | None = None
    execute: bool = False
    lossy: Lossy | None = None
    enable_thinking: bool | None = None

    def params(
        self, most: int, artifact: Artifact, logprobs: int | None = None
    ) -> GenerationParams:
        """Generation parameters of an answer of at most `most` tokens."""
        sampling = SamplingParams(self.temperature, seed=self.seed)
        ends = frozenset(artifact.spec.eos_token_ids)
        return GenerationParams(most, sampling, ends, logprobs=logprobs, lossy=self.lossy)


def answered_items(
    engine: Engine,
    tokenizer: ChatTokenizer,
    items: Sequence[Item],
    how: Asking,
    out: Path | None,
    notify: Callable[[str], None],
) -> list[AnswerRow]:
    """Return the rows of all items. out: file of results to append to; its answers are not
    repeated. Raises SubspecError: USAGE if that file is of other prompts or settings."""
    setting = setting_of(engine, how.temperature, how.seed, how.lossy, how.enable_thinking)
    done = rows_to_resume(out, AnswerRow, setting) if out else []
    rows = {row.key: row for row in done}
    if how.execute and any(item.judge in RUN for item in items) and not isolation():
        notify(NOT_ISOLATED)
    if out is not None and done:
        notify(f"{len(done)} turns are in {out} already")
        check_asked(rows, items, how, out)
        if how.execute:
            rows |= judged_later(rows, items, out, notify)
    left = [item for item in items if (item.task, item.name, len(item.turns) - 1) not in rows]
    if left:
        warm_up(engine, opening_of(tokenizer, left[0]))
    started = time.monotonic()
    for number, item in enumerate(left):
        rest = (time.monotonic() - started) / number * (len(left) - number) if number else None
        about = f", about {duration(rest)} left" if rest else ""
        place = len(items) - len(left) + number + 1
        notify(f"{place} of {len(items)}{about}: {item.task} {item.name}")
        for row in answered(engine, tokenizer, item, how, setting):
            try:
                if how.execute and to_run(row, item):
                    row = run(row, item, notify)
            finally:  # answers are expensive: kept without a score if interrupted
                if out is not None and row.key not in rows:
                    append_row(out, row)
            rows[row.key] = row
    asked = {(item.task, item.name) for item in items}
    return [row for row in rows.values() if (row.task, row.item) in asked]


def asked_of(item: Item, how: Asking) -> str:
    return digest_of([item], how.max_tokens or item.max_tokens)


def opening_of(tokenizer: ChatTokenizer, item: Item) -> list[int]:
    """The item's first prompt."""
    return tokenizer.chat_ids([{"role": "user", "content": item.turns[0]}])


def seed_of(item: Item, seed: int) -> int:
    """Seed of an item's sampling. A common seed would give all answers the same noise, token by
    token, but intervals assume independence."""
    digest = hashlib.sha256(f"{seed} {item.task} {item.name}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def check_asked(
    rows: Mapping[Key, AnswerRow], items: Sequence[Item], how: Asking, out: Path
) -> None:
    """Raise SubspecError(USAGE) if a row's prompts or maximum length differ from its item's. Rows
    without a digest are assumed to match."""
    for item in items:
        turns = [rows.get((item.task, item.name, turn)) for turn in range(len(item.turns))]
        if any(row is not None and row.asked not in ("", asked_of(item, how)) for row in turns):
            raise SubspecError(
                Exit.USAGE,
                f"{out} has an answer to {item.task} {item.name} with another prompt, reference "
                "or --max-tokens",
                "give another --out, or the --data and --max-tokens of that run",
            )


def judged_later(
    rows: Mapping[Key, AnswerRow],
    items: Sequence[Item],
    out: Path,
    notify: Callable[[str], None],
) -> dict[Key, AnswerRow]:
    """Judge rows whose code an earlier run did not run. They are replaced in `out`, also after an
    interruption."""
    found = dict[Key, AnswerRow]()
    try:
        for item in items:
            row = rows.get((item.task, item.name, len(item.turns) - 1))
            if row is not None and to_run(row, item):
                notify(f"running the code of {item.task} {item.name}")
                found[row.key] = run(row, item, notify)
    finally:
        if found:
            replace_answers(out, found)
    return found


def to_run(row: AnswerRow, item: Item) -> bool:
    """Return True for an item's last answer if its code was not run."""
    last = row.turn == len(item.turns) - 1
    return last and row.score is None and item.judge in RUN


def run(row: AnswerRow, item: Item, notify: Callable[[str], None]) -> AnswerRow:
    found = judged(row, item, execute=True)
    if found.score is None:
        notify(found.why)
    return found


def answered(
    engine: Engine, tokenizer: ChatTokenizer, item: Item, how: Asking, setting: Setting
) -> Iterator[AnswerRow]:
    """Yield a row per turn, with code not run yet. All turns share one sequence, so that only new
    tokens are prefilled."""
    most, digest = how.max_tokens or item.max_tokens, asked_of(item, how)
    context = engine.plan.context
    params = replace(how, seed=seed_of(item, how.seed)).params(most, engine.artifact)
    reasoning, shown = reasoning_of(tokenizer), reasoning_marks(tokenizer)
    messages = list[dict[str, str]]()
    with engine.new_sequence() as sequence:
        for turn, asked in enumerate(item.turns):
            messages.append({"role": "user", "content": asked})
            prompt = prompt_of(tokenizer, messages, how.enable_thinking)
            if item.cut_middle:  # reserves the maximum answer length, at most half
                room = max(context - most, context // 2)
                prompt = without_middle(prompt, tokenizer, messages, how.enable_thinking, room)
            if len(prompt.ids) >= context:
                nothing = too_long(item, setting, len(prompt.ids), context)
                yield replace(nothing, asked=digest)
                return
            stream = TextStream(sequence, tokenizer, prompt.ids, params, shown=shown)
            for _ in stream:
                pass
            row = AnswerRow(
                "subspec.bench.answer/1",
                setting,
                item.task,
                item.name,
                turn,
                stream.text,
                tuple(stream.token_ids),
                sequence.finish_reason or "",
                None,
                prompt.cut,
                costs_of(sequence.stats, engine.peak.peak_bytes),
                digest,
                reasoning_length(stream.text, reasoning, prompt.in_reasoning),
            )
            messages.append({"role": "assistant", "content": row.answer or row.text})
            last = turn == len(item.turns) - 1
            yield judged(row, item, execute=False) if last else row


def too_long(item: Item, setting: Setting, size: int, context: int) -> AnswerRow:
    """The row of an item whose prompt does not fit: it counts as a missing answer."""
    nothing = costs_of(Stats(setting.method, prompt_tokens=size), 0)
    why = f"the prompt's {size} tokens do not fit the context of {context}"
    return AnswerRow(
        "subspec.bench.answer/1", setting, item.task, item.name, len(item.turns) - 1, "", (),
        "too long", None if item.judge == "none" else 0.0, why, nothing,
    )  # fmt: skip


def judged(row: AnswerRow, item: Item, execute: bool) -> AnswerRow:
    if item.judge == "none":
        return row
    if row.text and not row.answer:
        return replace(row, score=0.0, why=because(row, "there is no answer after the reasoning"))
    if item.judge in RUN:
        if not execute:
            return replace(row, why="code was not run: --execute-code")
        score_of = {"code": score_code, "stdin": score_stdin, "calls": score_calls}[item.judge]
        try:
            score, why = score_of(row.answer, item)
        except SubspecError as error:  # not the answer's fault; the run continues
            return replace(row, why=f"not judged: {error.message}")
        return replace(row, score=score, why=why)
    if not item.references:
        return replace(row, why=because(row, "the item has no reference"))
    return replace(row, score=score_text(row.answer, item))


def because(row: AnswerRow, why: str) -> str:
    """The reason for a score, after remarks on the prompt."""
    return f"{row.why}; {why}" if row.why else why
