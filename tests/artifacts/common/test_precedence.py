"""Options that do not go together: the higher source's count, the lower source's do not."""

from pathlib import Path

import click
import pytest
from commands import printed

from subspec.artifacts.common.configuration import Configured
from subspec.artifacts.common.errors import Exit
from subspec.artifacts.common.precedence import Rules
from subspec.planner.cli import RULES as OF_PLAN
from subspec.planner.cli import main as plan
from subspec.runtime.bench.cli import main as bench
from subspec.runtime.cli import main as run
from subspec.runtime.server.cli import main as serve

Capture = pytest.CaptureFixture[str]
CLASSIC = "model: demo\nvram: 9MB\ndraft-model: demo\ndraft-model-weights: exact\nencoding: raw\n"


def lost(out: str) -> dict[str, str]:
    """What --print-config says is overridden, by what."""
    lines = [line for line in out.splitlines() if ", overridden by " in line]
    assert all(line.startswith("# ") for line in lines)  # a file with them says what counts
    return {line[2:].partition(":")[0]: line.partition(", overridden by ")[2] for line in lines}


@pytest.mark.parametrize(
    ("command", "text", "line", "expected"),
    [
        (run, "verify: lossy\nthreshold: 0.2\n", "--verify exact", {"threshold": "verify"}),
        (run, "threshold: 0.2\n", "--verify lossy", {}),
        (
            run, "verify: lossy\nwindow: 2\n", "--no-speculation",
            {"verify": "no-speculation", "window": "no-speculation"},
        ),
        (run, "no-speculation: true\n", "--verify lossy", {"no-speculation": "verify"}),
        (run, "no-speculation: true\n", "--verify exact", {}),
        (
            run, "no-speculation: true\nunpadded: true\n", "--drafter lookup",
            {"no-speculation": "drafter", "unpadded": "drafter"},
        ),
        (
            run, "no-speculation: yes\nunpadded: yes\n", "--speculation",
            {"unpadded": "no-speculation"},
        ),
        (run, "json: true\nlogprobs: 2\n", "--no-json", {"logprobs": "json"}),
        (run, "json: true\nlogprobs: 2\n", "--chat", {"json": "chat", "logprobs": "chat"}),
        (
            run, "model: demo\nvram: 9MB\ncontext: 99\n", "there prompt",
            {"model": "ARTIFACT", "context": "ARTIFACT"},
        ),
        (run, "model: demo\nvram: 9MB\n", "prompt", {}),
        (run, "vram: 9MB\n", "--no-replan", {"vram": "no-replan"}),
        (run, "no-replan: true\n", "--vram 9MB", {"no-replan": "vram"}),
        (run, "model: demo\nvram: 9MB\n", "--no-replan", {}),
        (
            run, "model: demo\nvram: 9MB\n", "there prompt --no-replan",
            {"model": "ARTIFACT", "vram": "no-replan"},
        ),
        (serve, "model: demo\nvram: 9MB\n", "there", {"model": "ARTIFACT"}),
        (plan, "model: demo\nvram: 9MB\n", "--from there", {"model": "from"}),
        (
            plan, CLASSIC, "--calibrate there",
            dict.fromkeys(("model", "draft-model", "draft-model-weights", "encoding"), "calibrate"),
        ),
        (
            plan, "from: there\nreprofile: yes\n", "--model demo",
            {"from": "model", "reprofile": "model"},
        ),
        (plan, "model: demo\ndraft-head: own\n", "--from there", {"model": "from"}),
        (
            plan, "model: demo\ndraft-head: x/y\n", "--from there",
            {"model": "from", "draft-head": "from"},
        ),
        (plan, "rehearse: 9\n", "--profile x.json", {"rehearse": "profile"}),
        (plan, "rehearse: none\n", "--profile x.json", {}),
        (plan, "rehearse: none\n", "--calibration x.json", {"rehearse": "calibration"}),
        (plan, "rehearse: 9\n", "--calibration x.json", {}),
    ],
)  # fmt: skip
def test_what_the_command_line_excludes_of_a_file_does_not_count(
    command: click.Command,
    text: str,
    line: str,
    expected: dict[str, str],
    capsys: Capture,
    tmp_path: Path,
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    code, out, err = printed(capsys, command, "--config", file, *line.split(), "--print-config")
    assert code == 0, err
    assert lost(out) == {key: f"{by} of the command line" for key, by in expected.items()}


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("no-speculation: true\n", "tasks --drafter lookup", {"no-speculation": "drafter"}),
        ("drafter: lookup\n", "trace --draft-temperature 0.2", {"drafter": "draft-temperature"}),
        ("verify: lossy\nwindows: 1,2\n", "sweep --verify exact", {"windows": "verify"}),
        ("method: plain\n", "sweep --verify lossy", {"method": "verify"}),
        ("method: lookup\n", "sweep --verify lossy", {}),
    ],
)
def test_the_commands_of_subspec_bench_have_rules_too(
    text: str, line: str, expected: dict[str, str], capsys: Capture, tmp_path: Path
) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text(text)
    code, out, err = printed(capsys, bench, *line.split(), "--config", file, "--print-config")
    assert code == 0, err
    assert lost(out) == {key: f"{by} of the command line" for key, by in expected.items()}


def test_what_is_overridden_overrides_nothing(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("verify: lossy\n")
    monkeypatch.setenv("SUBSPEC_RUN_NO_SPECULATION", "1")
    _, out, _ = printed(capsys, run, "--config", file, "--print-config")
    assert lost(out) == {"verify": "no-speculation of the environment"}
    _, out, _ = printed(capsys, run, "--config", file, "--drafter", "lookup", "--print-config")
    assert lost(out) == {"no-speculation": "drafter of the command line"}


def test_the_command_gets_defaults_for_what_does_not_count(tmp_path: Path) -> None:
    got = dict[str, object]()
    options = [
        click.Option(["--loud"], is_flag=True),
        click.Option(["--quiet"], is_flag=True),
        click.Option(["--level"], type=int, default=3),
    ]
    rules = Rules(needs=(("level", "loud"),), excludes=(("loud", "quiet"),))
    command = Configured("subspec-x", rules=rules, params=list(options), callback=got.update)
    file = tmp_path / "x.yaml"
    file.write_text("loud: true\nlevel: 7\n")
    command.main(["--config", str(file), "--quiet"])
    assert got == {"loud": False, "quiet": True, "level": 3}


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("no-speculation: true\ndrafter: lookup\n", "there", "exclude each other"),
        ("threshold: 0.2\n", "there", "--threshold was given without --verify lossy"),
        ("seed: 1\n", "there --no-speculation --drafter lookup", "exclude each other"),
        ("drafter: lookup\n", "there --unpadded", "--unpadded was given without --no-speculation"),
    ],
)
def test_what_one_source_contradicts_itself_in_stays_an_error(
    capsys: Capture, tmp_path: Path, text: str, line: str, expected: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    code, _, err = printed(capsys, run, "--config", file, *line.split())
    assert code == Exit.USAGE and expected in err


# By the name in Python: how the command line says it.
WORDS = {
    "model": "--model demo", "source": "--from there", "calibrate": "--calibrate there",
    "print_plan": "--print-plan", "reprofile": "--reprofile", "draft_model": "--draft-model demo",
    "draft_model_weights": "--draft-model-weights exact", "draft_head": "--draft-head x/y",
    "encoding": "--encoding raw", "quantizer": "--quantizer hqq", "revision": "--revision main",
    "profile": "--profile there", "calibration": "--calibration prompts",
    "rehearse": "--rehearse 9",
}  # fmt: skip


@pytest.mark.parametrize("pair", [*OF_PLAN.needs, *OF_PLAN.excludes], ids="-".join)
def test_every_rule_of_subspec_plan_is_one_that_it_has_a_sentence_for(
    pair: tuple[str, str], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").write_text('{"kind": "code", "text": "def "}\n')  # nothing else is there
    said = dict(WORDS)
    if pair == ("calibration", "rehearse"):
        said["rehearse"] = "--rehearse none"
    given = [pair[0]] if pair in OF_PLAN.needs else list(pair)
    if not {"model", "source", "calibrate"} & set(given):
        given.append("source" if pair[1] == "model" else "model")
    words = " ".join(said[one] for one in given).split()
    code, _, err = printed(capsys, plan, *words, "--vram", "9MB", "--device", "cpu")
    assert code == Exit.USAGE
    assert all(said[one].split()[0] in err for one in pair), err
