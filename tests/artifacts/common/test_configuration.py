"""Where the values of options come from, and how a configuration file is refused."""

import re
import subprocess
from pathlib import Path

import click
import pytest
from commands import printed

from subspec.artifacts.common import configuration
from subspec.artifacts.common.configuration import (
    Configured,
    configured,
    flags_of,
    opposite,
    variable_name,
)
from subspec.artifacts.common.errors import Exit
from subspec.planner.cli import main as plan
from subspec.runtime import cli as run_cli
from subspec.runtime.app import planner_command
from subspec.runtime.bench.cli import main as bench
from subspec.runtime.cli import main as run
from subspec.runtime.server.cli import main as serve

assert isinstance(bench, click.Group)
COMMANDS: tuple[click.Command, ...] = (plan, run, serve)
EVERY = [*COMMANDS, *bench.commands.values()]
METHODS = Path(__file__).parents[3] / "examples" / "methods"
Capture = pytest.CaptureFixture[str]


def origins(out: str) -> dict[str, tuple[str, str]]:
    """By option: what --print-config says of it."""
    rows = [re.fullmatch(r"(?:# )?([a-z-]+): ?(.*?) *# (.*)", line) for line in out.splitlines()]
    return {row[1]: (row[2], row[3]) for row in rows if row is not None}


def test_the_command_line_precedes_the_environment_the_file_and_the_default(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("top-k: 1\nseed: 2\nmax-tokens: 3\n")
    monkeypatch.setenv("SUBSPEC_RUN_SEED", "20")
    monkeypatch.setenv("SUBSPEC_RUN_MAX_TOKENS", "30")
    words = ("--config", file, "--max-tokens", 300, "--print-config")
    code, out, _ = printed(capsys, run, *words)
    found = origins(out)
    assert code == 0
    assert found["min-p"] == ("0.0", "default")
    assert found["top-k"] == ("1", "the configuration file")
    assert found["seed"] == ("20", "the environment's SUBSPEC_RUN_SEED")
    assert found["max-tokens"] == ("300", "the command line")


@pytest.mark.parametrize("command", COMMANDS, ids=[str(c.name) for c in COMMANDS])
def test_every_option_has_a_key_and_a_variable(command: click.Command, capsys: Capture) -> None:
    code, out, _ = printed(capsys, command, "--print-config")
    assert code == 0
    assert set(origins(out)) == set(configured(command))
    for key, option in configured(command).items():
        assert option.envvar == f"{command.name}_{key}".upper().replace("-", "_")


@pytest.mark.parametrize("command", bench.commands)
def test_a_command_of_subspec_bench_prints_its_configuration_without_an_artifact(
    command: str, capsys: Capture
) -> None:
    code, out, err = printed(capsys, bench, command, "--print-config")
    assert (code, err) == (0, "") and "# default" in out
    code, _, err = printed(capsys, bench, command)
    assert code == Exit.USAGE and "Missing argument" in err


@pytest.mark.parametrize("command", EVERY, ids=[str(c.name) for c in EVERY])
def test_every_flag_has_an_opposite_which_is_no_other_option(command: click.Command) -> None:
    assert isinstance(command, Configured)
    names = {one for option in command.params for one in option.opts}
    for key, option in flags_of(command).items():
        other = opposite(f"--{key}")
        assert other not in names and opposite(other) == f"--{key}"
        context = click.Context(command)
        found, _, _ = command.make_parser(context).parse_args([f"--{key}", other])
        assert found[option.name] is False
        assert other not in command.get_help(context)


@pytest.mark.parametrize("lower", ["file", "environment"])
def test_a_flag_that_is_true_elsewhere_is_taken_back_on_the_command_line(
    lower: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("no-replan: true\nraw: true\n" if lower == "file" else "")
    if lower == "environment":
        monkeypatch.setenv("SUBSPEC_RUN_NO_REPLAN", "1")
        monkeypatch.setenv("SUBSPEC_RUN_RAW", "1")
    words = ("--config", file, "--print-config")
    found = origins(printed(capsys, run, *words)[1])
    assert found["no-replan"][0] == found["raw"][0] == "true"
    found = origins(printed(capsys, run, *words, "--replan", "--no-raw")[1])
    assert found["no-replan"] == found["raw"] == ("false", "the command line")


@pytest.mark.parametrize("word", ["--no-speculation=false", "--speculation=true"])
def test_a_flag_with_a_value_is_told_its_opposite(capsys: Capture, word: str) -> None:
    code, _, err = printed(capsys, run, "artifact", word)
    other = opposite(word.partition("=")[0])
    assert code == Exit.USAGE and f"does not take a value.\n\nhint: {other} is its opposite" in err


def test_a_misspelt_variable_is_named_with_the_one_that_is_meant(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBSPEC_RUN_MAX_TOKEN", "5")
    code, _, err = printed(capsys, run, "--print-config")
    meant = "did you mean SUBSPEC_RUN_MAX_TOKENS?"
    assert code == 0
    assert err == (
        "note: the environment variable SUBSPEC_RUN_MAX_TOKEN is not an option of subspec-run; "
        f"{meant}\n"
    )
    assert printed(capsys, serve, "--print-config")[2] == ""


def test_variables_of_all_commands_of_subspec_bench_are_known(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBSPEC_BENCH_SPEED_REPETITIONS", "2")
    monkeypatch.setenv("SUBSPEC_BENCH_TASKS_CONFIG", "")
    assert printed(capsys, bench, "tasks", "--print-config")[2] == ""
    monkeypatch.setenv("SUBSPEC_BENCH_TASK_SEED", "2")
    err = printed(capsys, bench, "tasks", "--print-config")[2]
    assert "did you mean SUBSPEC_BENCH_TASKS_SEED?" in err


def test_null_in_a_file_sets_nothing(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("drafter: null\nvram: ~\nstop: Null\nseed: ~\nsystem: 'null'\n")
    monkeypatch.setenv("SUBSPEC_RUN_SEED", "20")
    code, out, _ = printed(capsys, run, "--config", file, "--print-config")
    found = origins(out)
    assert code == 0
    assert found["drafter"] == found["vram"] == found["stop"] == ("", "default")
    assert found["seed"] == ("20", "the environment's SUBSPEC_RUN_SEED")
    assert found["system"] == ('"null"', "the configuration file")


def test_what_print_config_prints_is_a_file_that_says_the_same(
    capsys: Capture, tmp_path: Path
) -> None:
    words = ["--vram", "24GiB", "--stop", "a, b", "--stop", "#\n😀", "--raw"]
    words += [
        "--logit-bias",
        "7=-1",
        "--system",
        "yes",
        "--link-bandwidth",
        "1.50GB",
        "--rehearse",
        "none",
    ]
    first = printed(capsys, run, *words, "--print-config")[1]
    file = tmp_path / "again.yaml"
    file.write_text(first)
    again = printed(capsys, run, "--config", file, "--print-config")[1]
    values = {key: value for key, (value, _) in origins(first).items()}
    assert values == {key: value for key, (value, _) in origins(again).items()}
    assert values["vram"] == "24GiB" and values["system"] == "yes" and values["raw"] == "true"


def test_a_file_gives_what_the_same_command_line_gives(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = list[object]()
    monkeypatch.setattr(run_cli, "check_options", got.append)
    monkeypatch.setattr(run_cli, "chosen_folder", lambda _: click.get_current_context().exit())
    file = tmp_path / "run.yaml"
    file.write_text("vram: 2MB\nstop: [x, 'y z']\nraw: on\nlogit-bias: 5=-1\nmodel: demo\n")
    line = "--vram 2MB --stop x --raw --logit-bias 5=-1 --model demo --stop".split()
    printed(capsys, run, "--config", file, "hello")
    printed(capsys, run, *line, "y z", "hello")
    assert len(got) == 2 and got[0] == got[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n", "line 1: 'a' is not an option"),
        ("\nmax_tokens: 1\n", "hint: did you mean max-tokens?"),
        ("config: x.yaml\n", "'config' is not an option"),
        ("max-tokens: four\n", "max-tokens is 'four', expected a whole number from 1"),
        ("top-p: 0\n", "top-p is '0', expected a number above 0 to 1"),
        ("temperature: .nan\n", "temperature is '.nan', expected a number from 0 to 100"),
        ("top-k: [1]\n", "top-k is a list, expected a whole number from 0"),
        ("top-k: {a: 1}\n", "top-k is a mapping"),
        ("stop: [[a]]\n", "stop is a list of lists, expected text, or a list of them"),
        ("raw: maybe\n", "raw is 'maybe', expected true or false"),
        ("vram: 8gb\n", "vram is '8gb', expected SIZE\n\nhint: a small b means bits"),
        ("system:\n", "system is empty"),
        ("stop: [a, null]\n", "stop is a list with null, expected text, or a list of them"),
        ("seed: ~\nseed: 2\n", "line 2: seed is there twice"),
        ("seed: 1\nseed: 2\n", "line 2: seed is there twice"),
        ("seed: !!python/object/apply:os.system [x]\n", "seed is a list"),
        ("seed: !!int 3\n", "seed is a value with a YAML tag"),
        ("[1]: 2\n", "line 1: a key is not text"),
        ("- seed\n", "has no keys"),
        ("seed: [1\n", "is not YAML"),
        ("seed: 1\n---\nseed: 2\n", "is not YAML"),
        ("seed: \x01\n", "is not YAML"),
        ("a: " + "[" * 30_000, "is nested too deep"),
        ("#" * 70_000, "has more than 65536 bytes"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_it(
    capsys: Capture, tmp_path: Path, text: str | bytes, expected: str
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = printed(capsys, run, "--config", file, "artifact", "prompt")
    assert (code, out) == (Exit.USAGE, "")
    assert expected in err and str(file) in err and err.startswith("error: ")


def test_files_that_are_missing_or_empty(capsys: Capture, tmp_path: Path) -> None:
    code, _, err = printed(capsys, run, "--config", tmp_path / "no.yaml", "a", "b")
    assert code == Exit.USAGE and "no.yaml cannot be read" in err
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert printed(capsys, run, "--config", tmp_path / "empty.yaml", "--print-config")[0] == 0


def test_a_wrong_value_in_the_environment_names_its_variable(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBSPEC_SERVE_PORT", "http")
    code, _, err = printed(capsys, serve, "artifact")
    assert code == Exit.USAGE and "environment's SUBSPEC_SERVE_PORT: 'http'" in err


def test_errors_are_objects_also_if_a_file_asks_for_them(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "json.yaml"
    file.write_text("json: true\n")
    code, out, _ = printed(capsys, run, "--config", file, tmp_path / "no-artifact", "x")
    assert code == Exit.USAGE and out.startswith('{"schema": "subspec.error/1"')


def test_a_planner_that_a_command_starts_sees_only_what_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUBSPEC_PLAN_CONTEXT", "17")
    monkeypatch.setenv("KEPT", "1")
    seen = dict[str, str]()

    def run_child(*_: object, environment: dict[str, str], **__: object) -> object:
        seen.update(environment)
        return subprocess.CompletedProcess([], 0, b"{}", b"")

    monkeypatch.setattr(planner_command, "run_child", run_child)
    planner_command.run_planner(["--model", "demo"])
    assert "KEPT" in seen and "SUBSPEC_PLAN_CONTEXT" not in seen


def test_names_of_variables_follow_the_command() -> None:
    option = click.Option(["--no-speculation", "plain"])
    assert variable_name("subspec-bench speed", option) == "SUBSPEC_BENCH_SPEED_NO_SPECULATION"
    command = Configured("subspec-x", params=[option], callback=lambda **_: None)
    assert list(configured(command)) == ["no-speculation"]
    assert configuration.NOT_CONFIGURED == ("config", "print-config", "help", "version")


@pytest.mark.parametrize("file", sorted(METHODS.glob("*.yaml")), ids=lambda file: str(file.stem))
def test_each_example_is_accepted_by_the_command_that_it_names(file: Path, capsys: Capture) -> None:
    first = file.read_text("utf-8").splitlines()[0]
    named = re.match(r"# (subspec-\w+)((?: \w+)*) --config examples/methods/([\w.]+)", first)
    assert named is not None and named[3] == file.name
    command = next(one for one in (*COMMANDS, bench) if one.name == named[1])
    words = (*named[2].split(), "--config", file, "--print-config")
    code, out, err = printed(capsys, command, *words)
    assert code == 0, err
    assert "the configuration file" in out


def test_every_example_is_in_the_table_of_methods() -> None:
    table = (METHODS / "README.md").read_text("utf-8")
    named = set(re.findall(r"\| `(\w+\.yaml)` \|", table))
    assert named == {file.name for file in METHODS.glob("*.yaml")}
