"""What is made of rows: tables, CSV, pairs, the page. These rows are made by hand."""

import csv
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.cli import main
from subspec.runtime.bench.csv_columns import (
    Columns,
    as_csv,
    speed_columns,
    sweep_columns,
    task_columns,
)
from subspec.runtime.bench.page import page
from subspec.runtime.bench.paired import compare
from subspec.runtime.bench.records import (
    AnswerRow,
    Costs,
    Setting,
    SpeedRow,
    SweepRow,
    append_row,
    line_of,
    read_rows,
)
from subspec.runtime.bench.tables import (
    as_markdown,
    compared_table,
    names_of,
    speed_table,
    sweep_table,
    task_table,
)
from subspec.runtime.device import driver_version

SETTING = Setting(
    artifact="name-8gb", num_weights=4_950_000, plan="a" * 64, machine="cpu: AVX2, 2 cpus",
    torch="2.8", python="3.11", method="substitute", drafter="substitute", padded=True,
    budget_bytes=8 * 10**9, context=256, width=1, depth=32, temperature=0.0, seed=0,
    link_bandwidth=None, subspec="0.1.0", weight_bytes=9_900_000,
)  # fmt: skip
COSTS = Costs(10, 8, 0.14, 0.5, 1.5, 0.4, 905_220, 2_740_000, (4, 4, 2), (3, 0, 1))


def answer(name: str, setting: Setting = SETTING, score: float | None = 1.0) -> AnswerRow:
    return AnswerRow(
        "subspec.bench.answer/1", setting, "gsm8k", name, 0, "x", (1, 2, 3), "eos", score, "",
        COSTS, "digest",
    )  # fmt: skip


def speed(setting: Setting = SETTING, rates: tuple[float, ...] = (253.0, 247.0)) -> SpeedRow:
    return SpeedRow("subspec.bench.speed/1", setting, "tg64", rates, 1.5, 905.22, 2_740_000)


def point(setting: Setting = SETTING) -> SweepRow:
    return SweepRow("subspec.bench.sweep/1", setting, None, (COSTS, COSTS))


# Files


def test_a_page_that_cannot_be_written_is_a_lack_of_resources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    append_row(tmp_path / "a.jsonl", speed())

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(SystemExit) as ended:
        main.main(["report", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "b.html")])
    assert ended.value.code == Exit.RESOURCES
    assert "b.html cannot be written: No space left on device" in capsys.readouterr().err


# Pairs


def test_turns_that_were_asked_otherwise_are_left_out_and_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, b = [answer(name) for name in "1234"], [answer(name) for name in "1234"]
    b[3] = replace(b[3], asked="other", token_ids=(1, 2))
    found = compare(a, b)
    assert (found.turns, found.identical, found.left_out) == (3, 3, 1)
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file, rows in zip(files, (a, b), strict=True):
        file.write_bytes(b"".join(map(line_of, rows)))
    main.main(["compare", *map(str, files)])
    said = capsys.readouterr()
    assert "1 of 4 turns of the same items are left out" in said.err
    assert "left out (other prompt, reference or length)" in said.out and "3/3" in said.out
    older = [replace(row, asked="") for row in b]
    assert compare(a, older).left_out == 0  # whose rows say nothing of it are believed


def test_files_that_were_asked_otherwise_are_not_compared() -> None:
    a = [answer(name) for name in "1234"]
    b = [replace(row, asked="of another length", setting=replace(SETTING, seed=1)) for row in a]
    with pytest.raises(SubspecError, match="all 4 common turns differ in prompt") as error:
        compare(a, b)
    assert error.value.exit_code == Exit.USAGE and "--max-tokens" in error.value.hint
    assert "identical turns" not in page([("a", a), ("b", b)])


def test_differences_that_are_all_zero_are_said_to_be_and_are_no_interval() -> None:
    rows = [answer(name) for name in "1234"]
    table = as_markdown(compared_table(compare(rows, rows)))
    assert table.count("0 in every pair") == 2 and "[0, 0]" not in table
    worse = [*rows[:3], replace(rows[3], score=0.0)]
    assert "0 in every pair" not in compared_table(compare(rows, worse)).rows[4][1]


# Tables


def test_one_value_has_no_interval_in_any_table() -> None:
    tables = (
        speed_table([speed(rates=(253.0,))]), task_table([answer("1")]),
        sweep_table([replace(point(), answers=(COSTS,))]),
        compared_table(compare([answer("1")], [answer("1")])),
    )  # fmt: skip
    for table in tables:
        cells = [cell for row in table.rows for cell in row]
        assert not any("±" in cell or "[" in cell for cell in cells), cells


def test_twenty_right_answers_do_not_promise_the_next_one() -> None:
    table = task_table([answer(str(n)) for n in range(20)])
    assert dict(zip(table.columns, table.rows[0], strict=True))["score"] == "100.0 [83.9, 100.0]"


def test_tables_have_size_and_parameters_as_llama_bench_does() -> None:
    for table in (speed_table([speed()]), sweep_table([point()])):
        cells = dict(zip(table.columns, table.rows[0], strict=True))
        assert (cells["size"], cells["params"]) == ("9.90 MB", "4.95 million")
    older = speed_table([speed(replace(SETTING, weight_bytes=0))])
    assert older.rows[0][1] == "-"


WORDS = {
    "label", "artifact", "plan", "machine", "torch", "python", "method", "drafter", "padded",
    "subspec", "driver", "test", "task",
}  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (speed_columns, [speed(), speed(rates=(253.0,))]),
        (task_columns, [answer("1"), answer("2", score=0.0), answer("1", SETTING, None)]),
        (sweep_columns, [point()]),
    ],
    ids=["speed", "tasks", "sweep"],
)
def test_csv_has_one_number_in_a_cell(
    columns: Callable[[Sequence[Any]], Columns], rows: list[Any]
) -> None:
    found = list(csv.DictReader(io.StringIO(as_csv(columns(rows)))))
    assert found
    for row in found:
        assert row["num_weights"] == "4950000" and row["weight_bytes"] == "9900000"
        assert row["peak_bytes"] == "2740000" and row["label"] == "1x32"
        for name, cell in row.items():
            assert name in WORDS or cell == "" or float(cell) >= 0, name


def test_csv_has_means_and_what_is_around_them_in_columns_of_their_own() -> None:
    several, once = speed_columns([speed(), speed(rates=(253.0,))])
    assert (several["tokens_per_second"], several["repeats"]) == (250.0, 2)
    assert several["tokens_per_second_stdev"] == pytest.approx(18**0.5)
    assert once["tokens_per_second_stdev"] is None
    [row] = task_columns([answer(str(n)) for n in range(20)])
    assert (row["items"], row["judged"], row["score"]) == (20, 20, 1.0)
    assert row["score_low"] == pytest.approx(0.839, abs=1e-3)
    assert row["decode_tokens_per_second"] == pytest.approx(3.5)
    assert row["first_token_seconds"] == pytest.approx(0.14)
    [unjudged] = task_columns([answer("1", score=None)])
    assert list(unjudged) == list(row) and unjudged["score"] is None


# Names of settings


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"link_bandwidth": 25 * 10**8}, "link 2.50 GB/s"),
        ({"machine": "cuda: H200"}, "cuda: H200"),
        ({"seed": 3}, "seed 3"),
        ({"plan": "b" * 64}, "plan bbbbbbbbbbbb"),
        ({"plan": "b" * 64, "budget_bytes": 6 * 10**9}, "6.00 GB"),
        ({"subspec": "0.2.0"}, "subspec 0.2.0"),
        ({"driver": "550.54"}, "driver 550.54"),
    ],
)
def test_settings_are_named_by_what_they_differ_in(changed: dict[str, Any], said: str) -> None:
    other = replace(SETTING, **changed)
    names = names_of([SETTING, other, SETTING])
    assert names[other] == f"1x32, {said}" != names[SETTING]
    for made in (answer, speed, point):
        rows = [made("1", SETTING), made("1", other)] if made is answer else [
            made(SETTING), made(other)
        ]  # type: ignore[operator]  # fmt: skip
        html = page([("rows.jsonl", rows)])
        assert f">{names[SETTING]}</span>" in html and f">{names[other]}</span>" in html


def test_a_name_is_short_where_nothing_else_differs() -> None:
    plain = replace(SETTING, method="plain", drafter=None, plan="b" * 64, width=1, depth=0)
    assert list(names_of([SETTING, plain]).values()) == ["1x32", "plain twin"]
    cells = speed_table([speed(), speed(replace(SETTING, budget_bytes=10**9))]).rows
    assert [row[5] for row in cells] == ["1x32", "1x32"]  # the budget has a column


# The page


def test_a_report_replaces_nothing_but_an_older_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, out, notes = (tmp_path / name for name in ("a.jsonl", "page.html", "notes.html"))
    append_row(file, speed())
    notes.write_text("<!DOCTYPE html>\n<p>call Anna</p>\n")
    for kept in (file, notes):
        before = kept.read_bytes()
        with pytest.raises(SystemExit) as end:
            main.main(["report", str(file), "--out", str(kept)])
        assert end.value.code == Exit.USAGE and kept.read_bytes() == before
        assert "exists already and is not a page of subspec-bench report" in capsys.readouterr().err
    for content in (None, "", "cut off"):
        if content is not None:
            out.write_text(out.read_text()[:1000] if content else "")
        main.main(["report", str(file), "--out", str(out)])
        assert out.read_text().rstrip().endswith("</html>")
    with pytest.raises(SystemExit):
        main.main(["report", str(file), "--out", str(tmp_path)])
    assert "is not a file" in capsys.readouterr().err


def test_the_page_says_what_measured() -> None:
    setting = replace(SETTING, measured_link_bandwidth=2 * 10**9, driver="550.54")
    html = page([("rows.jsonl", [speed(setting)])])
    assert "link not limited (measured 2.00 GB/s), driver 550.54, by subspec 0.1.0" in html


def test_the_driver_is_what_nvml_says_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, fails = torch.device("cuda"), type("NVMLError", (Exception,), {})

    def broken() -> None:
        raise fails

    paper = SimpleNamespace(
        NVMLError=fails, nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "550.54"
    )
    monkeypatch.setitem(sys.modules, "pynvml", paper)  # type: ignore[arg-type]
    assert driver_version(cuda) == "550.54" and driver_version(torch.device("cpu")) == ""
    paper.nvmlInit = broken
    assert driver_version(cuda) == ""
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    assert driver_version(cuda) == ""


# Files of rows


def test_blank_lines_in_a_file_of_rows_say_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    line = line_of(speed())
    for text in (b"\n" + line + b"\n\r\n" + line, line + b"  \n" + line + b" "):
        file.write_bytes(text)
        assert read_rows(file) == [speed(), speed()]


def test_rows_of_older_versions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    older = replace(SETTING, subspec="", weight_bytes=0)
    line = line_of(speed(older)).decode()
    for field in ('"subspec": "", ', '"weight_bytes": 0, ', '"measured_link_bandwidth": null, '):
        assert field in line
        line = line.replace(field, "")
    file.write_text(line.replace(', "driver": ""', ""))
    assert read_rows(file) == [speed(older)] and "driver" not in file.read_text()
