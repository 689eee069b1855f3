"""subspec-run as a person meets it: answers, figures, refusals, signals, what it imports."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact
from running import QUESTION, Ended, Terminal, demo_artifact, opened, run, start

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import write_json, write_manifest
from subspec.artifacts.native import residual_cpu
from subspec.planner.model.hub import DEMO
from subspec.runtime import cli
from subspec.runtime.app import answer, opening
from subspec.runtime.app.folder import open_folder
from subspec.runtime.app.run_options import Options, arranged, check_options
from subspec.runtime.device import machine_name
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.text.tokenizer import ChatTokenizer, load_tokenizer

SLOW = ("--link-bandwidth", "15MB")  # a round takes a third of a second
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_artifact(tmp_path_factory.getbasetemp())


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# Prompts


def test_system_and_raw_change_what_the_model_reads(artifact: Path, capsys: Capture) -> None:
    text = load_tokenizer(artifact / "tokenizer")
    words = (artifact, "def f", "--json", "--max-tokens", 1)
    system = json.loads(run(capsys, *words, "--system", "Be brief.").out)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def f"}]
    assert system["prompt_token_ids"] == text.chat_ids(messages)
    raw = json.loads(run(capsys, *words, "--raw").out)
    assert raw["prompt_token_ids"] == text.tokenizer.encode("def f").ids


def test_a_model_without_a_template_says_that_it_continues(artifact: Path, capsys: Capture) -> None:
    text = load_tokenizer(artifact / "tokenizer")
    bare = ChatTokenizer(text.tokenizer, None, {}, False)
    opened_artifact = open_folder(artifact)
    ids = cli.prompt_ids(opened_artifact, bare, Options(), "def f")
    assert ids == text.tokenizer.encode("def f").ids
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("-",)])
def test_the_prompt_may_come_through_a_pipe(
    artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    pipe(monkeypatch, f"{QUESTION} é\n".encode())
    found = json.loads(run(capsys, artifact, *words, "--json", "--max-tokens", 1).out)
    expected = load_tokenizer(artifact / "tokenizer").chat_ids(
        [{"role": "user", "content": f"{QUESTION} é"}]
    )
    assert found["prompt_token_ids"] == expected


# Sampling


def test_log_probabilities_are_of_each_token_of_the_answer(artifact: Path, capsys: Capture) -> None:
    words = (artifact, QUESTION, "--json", "--max-tokens", 6, "--no-replan")
    found = json.loads(run(capsys, *words, "--logprobs", 2).out)
    assert [one["token_id"] for one in found["logprobs"]] == found["token_ids"]
    for one in found["logprobs"]:
        best, second = one["top"]
        assert best == {"token_id": one["token_id"], "logprob": one["logprob"]}  # it is greedy
        assert second["logprob"] <= best["logprob"] < 0
    alone = json.loads(run(capsys, *words, "--logprobs", 0).out)
    assert [one["top"] for one in alone["logprobs"]] == [[]] * 6
    assert json.loads(run(capsys, *words).out)["logprobs"] is None


def test_a_bias_forbids_a_token(artifact: Path, capsys: Capture) -> None:
    words = (artifact, QUESTION, "--json", "--max-tokens", 6, "--no-replan")
    first, *_ = json.loads(run(capsys, *words).out)["token_ids"]
    found = json.loads(run(capsys, *words, "--logit-bias", f"{first}=-100").out)
    assert first not in found["token_ids"]


# Refusals


def refused(ended: Ended, code: Exit, message: str, hint: str) -> None:
    assert ended.exit_code == code
    assert ended.out == ""
    first, _, second = ended.err.partition("\n\nhint: ")
    assert first.startswith("error: ") and "\n" not in first
    assert message in first and hint in second


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["--full"], Exit.USAGE, "--full was given without --check", "add --check"),
        (["--context", "99"], Exit.USAGE, "--context was given without --model", "add --model"),
        (["--sequences", "1"], Exit.USAGE, "--sequences was given without --model", "add --model"),
        (["--rehearse", "9"], Exit.USAGE, "--rehearse was given without --model", "add --model"),
        (["--draft-model", "x"], Exit.USAGE, "--draft-model was given without --model", "--model"),
        (["--drafter", "draft-model"], Exit.USAGE, "needs a draft model", "--draft-model REF"),
        (["--logprobs", "0"], Exit.USAGE, "--logprobs was given without --json", "add --json"),
        (["--model", "demo", "--vram", "9MB"], Exit.USAGE, "--model exclude each other", "leave"),
        (["--unpadded"], Exit.USAGE, "without --no-speculation", "add --no-speculation"),
        (["--no-speculation", "--drafter", "lookup"], Exit.USAGE, "exclude each other", "leave"),
        (["--window", "2"], Exit.USAGE, "without --verify lossy", "add --verify lossy"),
        (["--threshold", "0.5"], Exit.USAGE, "without --verify lossy", "add --verify lossy"),
        (["--threshold-method", "prob"], Exit.USAGE, "without --verify lossy", "add --verify"),
        (["--verify", "lossy", "--no-speculation"], Exit.USAGE, "exclude each other", "leave"),
        (["--verify", "lossy", "--threshold", "1.1"], Exit.USAGE, "1.1 is not in", "--help"),
        (["--verify", "lossy", "--threshold", "nan"], Exit.USAGE, "nan is not a number", "0.7"),
        (["--verify", "lossy", "--window", "-1"], Exit.USAGE, "-1 is not in", "--help"),
        (["--draft-temperature", "0"], Exit.USAGE, "0.0 is not in the range", "--help"),
        (["--draft-temperature", "1", "--no-speculation"], Exit.USAGE, "exclude each", "leave"),
        (["--draft-temperature", "1", "--drafter", "lookup"], Exit.USAGE, "no prob", "leave"),
        (["--verify", "near"], Exit.USAGE, "'near' is not one of", "--help"),
        (["--drafter", "medusa"], Exit.USAGE, "'medusa' is not one of", "--help"),
        (["--raw", "--system", "s"], Exit.USAGE, "exclude each other", "leave one out"),
        (["--chat", "--json"], Exit.USAGE, "exclude each other", "leave one out"),
        (["--chat", "--raw"], Exit.USAGE, "exclude each other", "leave one out"),
        (["--vram", "9MB", "--no-replan"], Exit.USAGE, "exclude each other", "leave one out"),
        (["--stats"], Exit.USAGE, "--stats and a PROMPT exclude each other", "leave one out"),
        (["--stats", "--chat"], Exit.USAGE, "exclude each other", "leave one out"),
        (["--stop", ""], Exit.USAGE, "--stop is empty", "text that ends"),
        (["--vram", "5mb"], Exit.USAGE, "'5mb' is not a size", "a small b means bits"),
        (["--vram", "-1GB"], Exit.USAGE, "'-1GB' is not a size", "a number and a unit"),
        (["--link-bandwidth", "fast"], Exit.USAGE, "'fast' is not a size", "a number and"),
        (["--top-p", "0"], Exit.USAGE, "0.0 is not in the range 0<x<=1", "--help"),
        (["--top-p", "nan"], Exit.USAGE, "nan is not a number", "0.7"),
        (["--temperature", "nan"], Exit.USAGE, "nan is not a number", "0.7"),
        (["--temperature", "-1"], Exit.USAGE, "-1.0 is not in the range", "--help"),
        (["--max-tokens", "0"], Exit.USAGE, "0 is not in the range x>=1", "--help"),
        (["--seed", "-1"], Exit.USAGE, "-1 is not in the range", "--help"),
        (["--min-p", "1.1"], Exit.USAGE, "1.1 is not in the range 0<=x<=1", "--help"),
        (["--min-p", "nan"], Exit.USAGE, "nan is not a number", "0.7"),
        (["--repetition-penalty", "0"], Exit.USAGE, "0.0 is not in the range x>0", "--help"),
        (["--repetition-penalty", "inf"], Exit.USAGE, "inf is not a number", "0.7"),
        (["--presence-penalty", "nan"], Exit.USAGE, "nan is not a number", "0.7"),
        (["--frequency-penalty", "-inf"], Exit.USAGE, "-inf is not a number", "0.7"),
        (["--logprobs", "21", "--json"], Exit.USAGE, "21 is not in the range 0<=x<=20", "--help"),
        *[
            (["--logit-bias", wrong], Exit.USAGE, f"'{wrong}' is not a token id and a", "198=-5")
            for wrong in ("5", "a=1", "5=", "=5", "-1=2", "5=nan", "5=inf", "5=1e9", "5=1=2", "")
        ],
        (["--logit-bias", "5=1", "--logit-bias", "5=2"], Exit.USAGE, "has a bias", "leave one"),
        (["--logit-bias", "2048=1"], Exit.USAGE, "token id 2048, expected 0 to 2047", "tokenizer"),
        (["--device", "tpu"], Exit.USAGE, "'tpu' is not a device", "cuda:1"),
        (["--device", "cuda"], Exit.WRONG_MACHINE, "the plan is for cpu", "plan again"),
    ],
)
def test_a_wrong_argument_is_one_sentence_a_hint_and_a_code(
    artifact: Path, capsys: Capture, words: list[str], code: Exit, message: str, hint: str
) -> None:
    prompt = [] if "--chat" in words else [QUESTION]
    ended = run(capsys, artifact, *prompt, *words)
    if "--json" in words:
        ended = Ended(ended.exit_code, "", ended.err)
    refused(ended, code, message, hint)


def test_an_artifact_or_a_model_with_its_budget_is_needed(capsys: Capture) -> None:
    refused(run(capsys), Exit.USAGE, "neither an ARTIFACT nor --model REF was given", "--vram 9MB")
    refused(run(capsys, "--model", "demo", "a"), Exit.USAGE, "without --vram", "add --vram")
    ended = run(capsys, "--model", "demo", "--vram", "9MB", "two", "words")
    refused(ended, Exit.USAGE, "an ARTIFACT, two, and --model exclude", "only in quotes")


def test_with_a_model_the_only_argument_is_the_prompt() -> None:
    options = Options(artifact="def f(", model="demo", vram=1)
    assert arranged(options) == Options(prompt="def f(", model="demo", vram=1)
    for fine in (Options("folder"), Options("folder", "def f("), Options(model="demo", vram=1)):
        assert arranged(fine) == fine
    check_options(Options(model="demo", vram=1, no_replan=True))


def test_the_options_of_sampling_reach_the_engine(artifact: Path) -> None:
    given = Options(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2,
        presence_penalty=-0.5, frequency_penalty=0.25, logit_bias=((5, -1.5), (7, 2.0)), seed=3,
        logprobs=2, as_json=True,
    )  # fmt: skip
    params = cli.answering(open_folder(artifact), given).params
    assert params.sampling == SamplingParams(
        0.5, 7, 0.9, 3, 0.1, 1.2, -0.5, 0.25, ((5, -1.5), (7, 2.0))
    )
    assert params.logprobs == 2
    plain = cli.answering(open_folder(artifact), Options()).params
    assert plain.sampling == SamplingParams() and plain.logprobs is None


def test_biases_are_read_as_pairs() -> None:
    command = cli.main.make_context(
        "subspec-run", ["x", "--logit-bias", "5=-1.5", "--logit-bias", "0=+100"]
    )
    assert command.params["logit_bias"] == ((5, -1.5), (0, 100.0))


def test_an_argument_that_is_not_utf8_is_refused(artifact: Path, capsys: Capture) -> None:
    broken = os.fsdecode(b"caf\xe9")
    refused(run(capsys, artifact, broken), Exit.USAGE, "not UTF-8", "convert")
    refused(run(capsys, artifact, "a", "--system", broken), Exit.USAGE, "not UTF-8", "convert")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the PROMPT is empty"),
        (b" \n\t\n", "the PROMPT is empty"),
        (b"abc \xff", "stdin is not UTF-8: invalid start byte at byte 4"),
        (b"x" * 101, "stdin has more than 100 B"),
    ],
)
def test_a_pipe_that_brings_no_prompt_is_refused(
    artifact: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    message: str,
) -> None:
    monkeypatch.setattr(cli, "MAX_PROMPT", 100)
    pipe(monkeypatch, data)
    refused(run(capsys, artifact), Exit.USAGE, message, "")


def test_an_empty_prompt_is_refused(artifact: Path, capsys: Capture) -> None:
    refused(run(capsys, artifact, "  "), Exit.USAGE, "the PROMPT is empty", "give some text")


def test_a_prompt_of_which_nothing_is_left_is_refused_with_a_hint_that_fits(artifact: Path) -> None:
    silent = ChatTokenizer(load_tokenizer(artifact / "tokenizer").tokenizer, "", {}, False)
    with pytest.raises(SubspecError, match="has 0 tokens: the model's chat template") as caught:
        cli.prompt_ids(open_folder(artifact), silent, Options(), "def f")
    assert caught.value.exit_code == Exit.USAGE and "--raw" in caught.value.hint


def test_a_prompt_that_does_not_fit_is_refused_before_the_weights_load(
    artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "Engine", None)
    ended = run(capsys, artifact, "word " * 400)
    refused(ended, Exit.USAGE, "tokens, the plan's context is 256", "--context")


def test_a_folder_that_is_no_artifact_is_refused_with_the_way_out(
    tmp_path: Path, capsys: Capture
) -> None:
    refused(run(capsys, tmp_path / "no", "a"), Exit.USAGE, "does not exist", "--model REF")
    refused(run(capsys, "org/name", "a"), Exit.USAGE, "does not exist", "--model org/name")
    refused(run(capsys, DEMO, "a"), Exit.USAGE, "is a checkpoint", f"--model {DEMO}")
    refused(run(capsys, __file__, "a"), Exit.USAGE, "is not a folder", "give the folder")
    refused(run(capsys, tmp_path, "a"), Exit.CORRUPT, "has no manifest.json", "subspec-plan")


def test_a_truncated_artifact_is_refused(copied: Path, capsys: Capture) -> None:
    os.truncate(copied / "exact.safetensors", 5000)
    refused(run(capsys, copied, "a"), Exit.CORRUPT, "exact.safetensors is 5000 bytes", "again")


def test_errors_are_objects_with_json(copied: Path, capsys: Capture) -> None:
    os.truncate(copied / "plan.json", 10)
    ended = run(capsys, copied, "a", "--json")
    found = json.loads(ended.out)
    assert found["schema"] == "subspec.error/1"
    assert set(found["error"]) == {"code", "exit", "message", "hint"}
    assert found["error"]["code"] == "corrupt" and found["error"]["exit"] == ended.exit_code == 4
    assert ended.err.startswith("error: plan.json")


def test_check_reads_the_structure_and_full_every_byte(copied: Path, capsys: Capture) -> None:
    quick, full = run(capsys, copied, "--check"), run(capsys, copied, "--check", "--full")
    assert quick.exit_code == full.exit_code == 0
    assert "structure is sound" in quick.err and "every byte matches" in full.err
    with open(copied / "exact.safetensors", "r+b") as file:
        file.seek(-10_000, os.SEEK_END)
        file.write(b"damage")
    assert run(capsys, copied, "--check").exit_code == 0
    ended = run(capsys, copied, "--check", "--full", "--json")
    assert ended.exit_code == Exit.CORRUPT
    assert "do not match their digest" in json.loads(ended.out)["error"]["message"]
    found = json.loads(run(capsys, copied, "--check", "--json").out)
    assert found["schema"] == "subspec.check/1" and found["ok"] and not found["full"]


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "SECONDS_BETWEEN_LINES", 0.0)
    opening.progress_line()("loading", 0.5)
    assert capsys.readouterr().err == "loading  50%\n"


@pytest.mark.parametrize(("kind", "said"), [("dumb", "loading  50%\n"), ("xterm", "\r\033[K")])
def test_progress_writes_over_its_line_only_where_a_terminal_can(
    kind: str, said: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(opening, "SECONDS_BETWEEN_LINES", 0.0)
    opening.progress_line()("loading", 0.5)
    assert capsys.readouterr().err.startswith(said)


# In a child, as it is started


IMPORTED = """
import sys
from subspec.runtime.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def imported_by(*words: object) -> set[str]:
    command = [sys.executable, "-c", IMPORTED, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(ended.stderr.splitlines()[-1].split())


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "transformers", "tokenizers", "jinja2", "rich", "huggingface_hub"}
    assert not heavy & imported_by("--help")


def test_statistics_import_no_torch(artifact: Path) -> None:
    assert not {"torch", "numpy", "tokenizers"} & imported_by(artifact, "--stats")


def test_a_run_imports_no_planner_and_no_compiler(artifact: Path) -> None:
    found = imported_by(artifact, "hi", "--max-tokens", 2)
    foreign = {"transformers", "hqq", "scipy", "accelerate", "datasets", "rich", "huggingface_hub"}
    assert "torch" in found
    assert not foreign & found
    for compiler in ("torch._dynamo", "torch._inductor", "sympy", "subspec.planner"):
        assert compiler not in found


def test_a_reader_that_goes_away_ends_the_run_in_silence(artifact: Path) -> None:
    with start(artifact, QUESTION, *SLOW) as child:
        assert len(opened(child.stdout).read(2)) == 2
        opened(child.stdout).close()
        said = opened(child.stderr).read().decode().splitlines()
    assert child.returncode == 0
    assert said == []


@pytest.mark.parametrize("after", [0.15, 0.4, 0.8])
def test_a_signal_at_any_moment_of_the_start_ends_the_run(artifact: Path, after: float) -> None:
    with start(artifact, QUESTION, *SLOW) as child:
        time.sleep(after)
        child.send_signal(signal.SIGHUP)
        assert b"Traceback" not in opened(child.stderr).read()
    assert child.returncode in (Exit.HANGUP, -signal.SIGHUP)  # the kernel's, before Python runs


def test_sigterm_ends_the_run_with_143_and_without_a_traceback(artifact: Path) -> None:
    with start(artifact, QUESTION, *SLOW) as child:
        assert len(opened(child.stdout).read(2)) == 2
        child.terminate()
        said = opened(child.stderr).read().decode().splitlines()
    assert child.returncode == Exit.TERMINATED
    assert said == []


def test_ctrl_c_ends_the_answer_with_its_figures_and_130(artifact: Path) -> None:
    with Terminal(artifact, QUESTION, *SLOW) as terminal:
        terminal.expect("def")
        terminal.interrupt()
        assert terminal.end() == Exit.INTERRUPTED
        answered, _, figures = terminal.screen.rpartition("\nprompt 24 tokens")
        assert "first token after" in figures and figures.endswith("MB\n")
        assert "^C" in answered and "Traceback" not in terminal.screen
        with pytest.raises(ProcessLookupError):  # nothing of it is left
            os.killpg(terminal.process.pid, 0)


def test_ctrl_c_while_loading_is_no_traceback(artifact: Path) -> None:
    with Terminal(artifact, QUESTION, "--link-bandwidth", "100KB") as terminal:
        terminal.expect("loading")
        terminal.send("\x03")
        terminal.send("\x03")  # in case the load was over and a round of a minute has begun
        assert terminal.end() == Exit.INTERRUPTED
        assert "Traceback" not in terminal.screen


def test_an_exhausted_gpu_is_a_sentence(
    artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(answer, "answer_prompt", exhausted)
    ended = run(capsys, artifact, QUESTION)
    assert ended.exit_code == Exit.RESOURCES
    assert "error: the GPU ran out of memory" in ended.err and "Traceback" not in ended.err


def test_kernels_that_are_missing_are_said_so(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build_artifact(DEMO, tmp_path / "artifact", "residual", resident_share=1.0)
    monkeypatch.setattr(residual_cpu, "unavailable", lambda: "there is no C++ compiler")
    ended = run(capsys, artifact.path, "def", "--raw", "--max-tokens", 2)
    assert ended.exit_code == 0
    assert "note: without the C++ kernels residuals decode a hundred times slower" in ended.err
    assert "there is no C++ compiler" in ended.err


def test_a_plan_from_disturbed_figures_is_said_so_once_the_machine_is_quieter(
    copied: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("def", "--raw", "--max-tokens", 1, "--no-replan")
    stored = open_folder(copied)
    machine = machine_name(torch.device("cpu"))
    plan = replace(stored.plan, machine=machine)

    def said(share: float, others_now: float, measured_on: str = machine) -> bool:
        profile = replace(stored.profile, machine=measured_on, background_cpu_share=share)
        write_json(copied, "plan.json", plan)
        write_json(copied, "profile.json", profile)
        listed = stored.manifest
        write_manifest(copied, listed.producer, listed.parts, listed.substitutes, {})
        monkeypatch.setattr(opening, "background_cpu_share", lambda start, end: others_now)
        ended = run(capsys, copied, *words)
        assert ended.exit_code == 0
        note = "note: other programs used 43% of the CPUs while this plan was measured"
        assert ended.err.count("other programs") == ended.err.count(note) <= 1
        if note in ended.err:
            assert f"subspec-plan --from {copied} --reprofile" in ended.err
        return note in ended.err

    assert said(0.43, 0.02)
    assert not said(0.43, 0.6), "measured again it would be no better"
    assert not said(0.1, 0.02)
    assert not said(0.43, 0.02, measured_on="another machine"), "planned again since then"
