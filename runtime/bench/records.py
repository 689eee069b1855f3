"""Measurements of subspec-bench as rows of JSON Lines files. Each row is flushed to disk before the
next one, so that an interrupted run can resume."""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.replace_file import replace_file
from subspec.artifacts.format.codec import load_dataclass, parse_json
from subspec.artifacts.plan import DrafterName, Method
from subspec.artifacts.runs import plan_digest
from subspec.runtime.device import driver_version, machine_name
from subspec.runtime.engine import Engine
from subspec.runtime.lossy import Lossy
from subspec.runtime.sequence import Stats

MAX_RECORDS = 1 << 30  # bytes of a file
BEGINNING = b'{"schema": "subspec.bench.'  # beginning of each line written by append_row
# Fields that are constant within one run of `speed` or `sweep`.
SAME_IN_A_RUN = (
    "artifact", "num_weights", "machine", "torch", "python", "link_bandwidth", "subspec", "driver",
)  # fmt: skip
Row = TypeVar("Row")
Key = tuple[str, str, int]  # of an answer: task, item, turn


@dataclass(frozen=True)
class Setting:
    """Conditions of a measurement; rows with equal settings can be combined."""

    artifact: str  # the folder's name
    num_weights: int  # of its matrices
    plan: str  # its digest
    machine: str
    torch: str
    python: str
    method: Method
    drafter: DrafterName | None  # None: nothing was drafted
    padded: bool
    budget_bytes: int
    context: int
    width: int
    depth: int
    temperature: float
    seed: int
    link_bandwidth: int | None  # limit in bytes per second
    # Absent in older rows:
    draft_temperature: float | None = None  # as requested; None: that of the plan's trees
    lossy: Lossy | None = None  # None: exact answers
    enable_thinking: bool | None = None  # the chat template's argument; None: its default
    subspec: str = ""  # its version
    weight_bytes: int = 0  # of the matrices, as the checkpoint has them
    # Bytes per second in the plan's profile; None: it is of another machine.
    measured_link_bandwidth: int | None = None
    driver: str = ""  # of the GPU; "": none, or unknown

    @property
    def label(self) -> str:
        """The drafter, with a draft temperature or lossy rule."""
        parts = [self.drafter_label]
        if self.draft_temperature is not None:
            parts.append(f"draft temperature {self.draft_temperature:g}")
        if self.lossy is not None:
            parts.append(str(self.lossy))
        return ", ".join(parts)

    @property
    def drafter_label(self) -> str:
        """The draft's tree; or "plain", or "plain twin", which gives the draft's exact bits."""
        if self.drafter is None:
            return "plain twin" if self.padded else "plain"
        tree = f"{self.width}x{self.depth}"
        if self.drafter == "draft-model":
            return f"{tree} of the draft model"
        return self.drafter.replace("substitute", tree)


@dataclass(frozen=True)
class Costs:
    """Costs of one answer, or of one row of a table."""

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    draft_seconds: float
    verify_seconds: float
    stream_wait_seconds: float
    streamed_bytes: int  # while decoding
    peak_bytes: int  # of fast memory, so far
    drafted: tuple[int, ...]  # levels, by round
    accepted: tuple[int, ...]  # tokens of them, by round
    lossy_tokens: int = 0  # of the answer, that differ from the exact model's

    @property
    def decode_seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds


@dataclass(frozen=True)
class SpeedRow:
    """One row of `speed`: tokens/s of each repetition."""

    schema: Literal["subspec.bench.speed/1"]
    setting: Setting
    test: str  # pp128, tg64, with "@ d256" for tokens already in the cache
    tokens_per_second: tuple[float, ...]
    accepted_per_round: float
    streamed_bytes_per_token: float
    peak_bytes: int


@dataclass(frozen=True)
class AnswerRow:
    """One turn of one item of `tasks`. score: None: not judged, or its code was not to be run."""

    schema: Literal["subspec.bench.answer/1"]
    setting: Setting
    task: str
    item: str
    turn: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    score: float | None
    why: str
    costs: Costs
    # Digest of the item's turns, references and maximum length; "": an older row
    asked: str = ""
    reasoning_characters: int = 0  # of `text`, before the answer

    @property
    def answer(self) -> str:
        """The text after the reasoning, which is judged."""
        return self.text[self.reasoning_characters :]

    @property
    def key(self) -> Key:
        return self.task, self.item, self.turn


@dataclass(frozen=True)
class SweepRow:
    """One point of `sweep`: the same prompts under one setting."""

    schema: Literal["subspec.bench.sweep/1"]
    setting: Setting
    predicted_tokens_per_second: float | None
    answers: tuple[Costs, ...]
    asked: str = ""  # digest of the prompts and of the maximum length


ALL_OF_A_SETTING = tuple(one.name for one in fields(Setting))
KINDS: dict[str, type[SpeedRow] | type[AnswerRow] | type[SweepRow]] = {
    "subspec.bench.speed/1": SpeedRow,
    "subspec.bench.answer/1": AnswerRow,
    "subspec.bench.sweep/1": SweepRow,
}


def setting_of(
    engine: Engine,
    temperature: float = 0.0,
    seed: int = 0,
    lossy: Lossy | None = None,
    enable_thinking: bool | None = None,
) -> Setting:
    plan, spec, profile = engine.plan, engine.artifact.spec, engine.artifact.profile
    tree = plan.draft_of(engine.method).tree
    machine = machine_name(engine.device)
    return Setting(
        artifact=engine.artifact.path.resolve().name,
        num_weights=sum(one.num_weights for one in spec.linears),
        plan=plan_digest(plan),
        machine=machine,
        torch=torch.__version__,
        python=platform.python_version(),
        method=engine.method,
        drafter=engine.drafter,
        padded=engine.padded,
        budget_bytes=plan.budget_bytes,
        context=plan.context,
        width=tree.width,
        depth=tree.depth,
        temperature=temperature,
        seed=seed,
        link_bandwidth=round(engine.link_bandwidth) if engine.link_bandwidth else None,
        enable_thinking=enable_thinking,
        subspec=version("subspec"),
        weight_bytes=sum(part.plain_bytes for part in spec.parts),
        measured_link_bandwidth=(
            round(max(one.bytes_per_second for one in profile.link))
            if profile.machine == machine
            else None
        ),
        driver=driver_version(engine.device),
        draft_temperature=engine.draft_temperature,
        lossy=lossy,
    )


def costs_of(stats: Stats, peak_bytes: int) -> Costs:
    return Costs(
        stats.prompt_tokens,
        stats.generated_tokens,
        stats.time_to_first_token_seconds,
        stats.draft_seconds,
        stats.verify_seconds,
        stats.stream_wait_seconds,
        stats.streamed_bytes,
        peak_bytes,
        stats.drafted,
        stats.accepted,
        stats.lossy_tokens,
    )


def line_of(row: SpeedRow | AnswerRow | SweepRow) -> bytes:
    return (json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n").encode()


def append_row(file: Path, row: SpeedRow | AnswerRow | SweepRow) -> None:
    """Append a row and flush it to disk. Raises SubspecError(RESOURCES)."""
    with writing(file), open(file, "ab") as opened:
        opened.write(line_of(row))
        opened.flush()
        os.fsync(opened.fileno())


def replace_answers(file: Path, answers: Mapping[Key, AnswerRow]) -> None:
    """Replace answers by key and flush them to disk. If this is interrupted or raises
    SubspecError(RESOURCES), the file is unchanged."""
    rows = (
        answers.get(row.key, row) if isinstance(row, AnswerRow) else row for row in read_rows(file)
    )
    with writing(file):
        replace_file(file.resolve(), b"".join(map(line_of, rows)))  # keeps a symbolic link


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Raise OSError of the block as SubspecError(RESOURCES)."""
    try:
        yield
    except OSError as error:
        message = f"{file} cannot be written: {error.strerror}"
        raise SubspecError(Exit.RESOURCES, message, "give another --out") from None


def read_rows(file: Path) -> list[SpeedRow | AnswerRow | SweepRow]:
    """Read the rows of a file. Blank lines and a row truncated at the end are skipped. Raises
    SubspecError: USAGE if the file is missing or does not end like a result file, CORRUPT for an
    invalid line."""
    try:
        if (size := file.stat().st_size) > MAX_RECORDS:
            raise SubspecError(Exit.USAGE, f"{file} has {size} bytes, expected at most a gigabyte")
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise SubspecError(Exit.USAGE, f"{file} cannot be read: {error.strerror}") from None
    cut = lines[-1].strip()
    if not (cut.startswith(BEGINNING) or BEGINNING.startswith(cut)):
        raise SubspecError(
            Exit.USAGE,
            f"{file}, line {len(lines)} has no newline and is not the beginning of a row",
            "name another, one that subspec-bench wrote with -o jsonl or --out",
        )
    return [
        row_of(line, f"{file}, line {number}")
        for number, line in enumerate(lines[:-1], 1)
        if line.strip()
    ]


def row_of(line: bytes, where: str) -> SpeedRow | AnswerRow | SweepRow:
    value = parse_json(line, where)
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema not in KINDS:
        raise SubspecError(
            Exit.CORRUPT,
            f"{where} has the schema {schema!r}, expected one of {', '.join(KINDS)}",
            "name a file that subspec-bench wrote with -o jsonl or --out",
        )
    row: SpeedRow | AnswerRow | SweepRow = load_dataclass(KINDS[schema], value, where)
    return row


def rows_to_resume(
    file: Path,
    kind: type[Row],
    setting: Setting,
    same: Sequence[str] = ALL_OF_A_SETTING,
) -> list[Row]:
    """Return the rows that an interrupted run has written, and remove its truncated line. Raises
    SubspecError as `read_rows`, and USAGE if the fields `same` of their settings differ from
    `setting`; the file is then unchanged."""
    if not file.exists():
        return []
    found = read_rows(file)
    for other in {row.setting for row in found if isinstance(row, kind)}:
        changed = [
            f"{name} {getattr(other, name)!r} instead of {getattr(setting, name)!r}"
            for name in same
            if getattr(other, name) != getattr(setting, name)
        ]
        if changed:
            raise SubspecError(
                Exit.USAGE,
                f"{file} was measured with {', '.join(changed)}",
                "give another --out, or the options of that run",
            )
    with open(file, "r+b") as opened:  # without the truncated row
        end = opened.read().rfind(b"\n") + 1
        opened.truncate(end)
    return list(of_kind(found, kind))


def of_kind(rows: Sequence[object], kind: type[Row]) -> Iterator[Row]:
    return (row for row in rows if isinstance(row, kind))


def by_task(rows: Sequence[AnswerRow]) -> dict[tuple[Setting, str], list[AnswerRow]]:
    """Group rows by setting and task, in order of appearance."""
    found = dict[tuple[Setting, str], list[AnswerRow]]()
    for row in rows:
        found.setdefault((row.setting, row.task), []).append(row)
    return found
