"""subspec-plan as a person uses it: every option, and every way to get one wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import running
import torch
from brief import BRIEF_PLANNER, be_brief
from builders import PROFILE, build_artifact, random_checkpoint
from heads import EAGLE3_TOKENS, eagle3_checkpoints
from run_records import make_run
from safetensors.torch import load_file, save_file
from toys import make_spec

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import parse_size, size_argument
from subspec.artifacts.footprint import draft_head_bytes
from subspec.artifacts.format.codec import dump_json
from subspec.artifacts.format.prebuilt import find_prebuilt
from subspec.artifacts.format.store import Artifact, open_artifact, verify
from subspec.artifacts.native import cpp
from subspec.artifacts.plan import Tree
from subspec.artifacts.profile import Corrections
from subspec.artifacts.runs import append_run, plan_digest, read_runs
from subspec.planner.cli import main
from subspec.planner.machine.profiles import shapes_of
from subspec.planner.model.hub import DEMO
from subspec.planner.rehearse import learning
from subspec.planner.rehearse.calibration import shipped_samples
from subspec.planner.rehearse.corrections import MAX_FACTOR, MIN_FACTOR
from subspec.planner.rehearse.rehearsal import Effort
from subspec.planner.rehearse.replay import THRESHOLDS
from subspec.runtime import memory
from subspec.runtime.engine import Engine
from subspec.runtime.programs import kernel_sources


@dataclass(frozen=True)
class Ended:
    exit_code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two that wait for each other take minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; profile.json lies beside it."""
    (tmp_path / "profile.json").write_text(dump_json(PROFILE))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def plan(capsys: pytest.CaptureFixture[str], *words: object, known: bool = True) -> Ended:
    """The command in this process, `known`: for the machine of profile.json."""
    given = ["--model", "demo", "--vram", "9MB", *map(str, words)]
    given += ["--profile", "../profile.json"] if known and "--profile" not in given else []
    return run(capsys, *given)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Ended:
    capsys.readouterr()
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return Ended(code, said.out, said.err)


# A draft model


def test_a_draft_model_is_planned_into_the_artifact(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = replace(
        PROFILE, draft_model_layer=PROFILE.draft_layer,
        draft_model_attention=PROFILE.draft_attention, draft_model_head=PROFILE.draft_head,
    )  # fmt: skip
    (here.parent / "profile.json").write_text(dump_json(timed))
    words = ["--draft-model", "demo", "--method", "draft-model", "--vram", "20MB"]
    ended = plan(capsys, *words, "--out", "made", "--json")
    assert ended.exit_code == 0, ended.err
    said, artifact = json.loads(ended.out), open_artifact(Path("made"))
    assert said["decisions"]["method"] == artifact.plan.method == "draft-model"
    assert said["ledger"]["drafter"] > 0 < said["ledger"]["drafter_cache"]
    assert artifact.draft_model is not None and artifact.draft_model.vocab_size == 2048
    assert verify(Path("made")) > 0
    again = run(capsys, "--from", "made", "--context", "512", "--out", "beside", "--json")
    assert again.exit_code == 0, again.err
    beside = open_artifact(Path("beside"))
    assert beside.draft_model == artifact.draft_model and len(beside.plan.placements) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--draft-model", "other"], "has another vocabulary: token 7 is"),
        (["--draft-model", "nowhere/./"], "nowhere"),
        (["--method", "draft-model"], "needs a draft model"),
        (["--draft-model-weights", "exact"], "without --draft-model"),
        (["--draft-head", "own"], "the checkpoint has no head that drafts"),
        (["--draft-model", "demo"], "no timings of the draft model"),
    ],
)
def test_a_draft_model_that_will_not_do_is_refused_before_anything_is_built(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    shutil.copytree(DEMO, "other")
    text = json.loads((DEMO / "tokenizer.json").read_text())
    first, second = (t for t, n in text["model"]["vocab"].items() if n in (7, 8))
    text["model"]["vocab"] |= {first: 8, second: 7}
    (here / "other" / "tokenizer.json").write_text(json.dumps(text))
    ended = plan(capsys, *words, "--out", "made")
    assert ended.exit_code == 2 and said in ended.err and not Path("made").exists(), ended.err
    assert "hint: " in ended.err


# A draft head


def test_a_head_of_eagle_3_is_planned_into_the_artifact_and_drafts_what_is_said_without_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, head = eagle3_checkpoints(here / "models", torch.bfloat16, foreseen=True)
    words = ["--draft-head", head, "--method", "substitute", "--rehearse", "none", "--json"]
    ended = plan(capsys, "--model", model, *words, "--out", "made")
    assert ended.exit_code == 0, ended.err
    said, artifact = json.loads(ended.out), open_artifact(Path("made"))
    assert said["ledger"]["drafter"] == draft_head_bytes(artifact.spec) > EAGLE3_TOKENS * 128 * 2
    assert verify(Path("made")) > 0
    answers = []
    for how in (["--no-speculation"], ["--drafter", "eagle3"]):
        answer = running.run(capsys, "made", "--max-tokens", "16", *how, "Say something")
        assert answer.exit_code == 0, answer.err
        answers.append(answer.out)
    assert answers[0] == answers[1] != ""
    words[1] = "own"
    again = run(capsys, "--from", "made", *words, "--out", "beside")
    assert again.exit_code == 0, again.err
    assert open_artifact(Path("beside")).spec == artifact.spec
    (head / "config.json").write_text("{}")
    words[1] = head
    ended = plan(capsys, "--model", model, *words, "--out", "other")
    assert ended.exit_code == Exit.CORRUPT and "none are read by default" in ended.err
    assert ended.err.startswith("error: draft head head: config.json has no ")
    assert not Path("other").exists()


# What it writes


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    be_brief(monkeypatch)


@pytest.mark.slow
def test_the_demo_is_measured_planned_built_and_rehearsed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = planned_demo(here, capsys)
    acceptance, corrections = artifact.plan.acceptance, artifact.profile.corrections
    assert acceptance.num_answers() >= 10 and corrections.num_rounds > 50
    assert acceptance.margin(Tree(2, 6)) < 0.25 * acceptance.acceptance_length(Tree(2, 6))
    assert all(
        MIN_FACTOR < factor < MAX_FACTOR
        for factor in (corrections.draft, corrections.verify, corrections.plain)
    )


def test_the_demo_is_measured_planned_built_and_rehearsed_in_brief(
    here: Path, capsys: pytest.CaptureFixture[str], brief: None
) -> None:
    artifact = planned_demo(here, capsys)
    assert artifact.plan.acceptance.num_answers() >= 5
    assert artifact.profile.corrections.num_rounds > 5


def planned_demo(here: Path, capsys: pytest.CaptureFixture[str]) -> Artifact:
    """By the command, every step of it."""
    ended = plan(capsys, "--link-bandwidth", "40MB", known=False)
    assert (ended.exit_code, ended.out) == (0, "demo-9mb\n"), ended.err
    assert [path.name for path in here.iterdir()] == ["demo-9mb"]
    verify(here / "demo-9mb")
    artifact = open_artifact(here / "demo-9mb")
    assert artifact.plan.device == artifact.profile.device == "cpu"
    assert artifact.plan.budget_bytes == 9_000_000
    predicted = artifact.plan.predicted["plain"]  # for the slower link; the profile is as is
    assert predicted.stream_seconds == pytest.approx(predicted.streamed_bytes / 40e6)
    assert all(rate.bytes_per_second > 40e6 for rate in artifact.profile.link)
    assert "--link-bandwidth" in artifact.plan.reasons[0]
    acceptance = artifact.plan.acceptance
    assert acceptance.measured
    assert set(acceptance.kinds) <= {sample.kind for sample in shipped_samples()}
    assert len(acceptance.kinds) > 2
    widths = sorted({curve.width for curve in acceptance.curves})
    assert widths in ([1, 2], [1, 2, 4]), "as wide as a budget of 9 MB has room for in a batch"
    assert acceptance.thresholds == THRESHOLDS
    assert (
        2 < acceptance.acceptance_length(Tree(1, 6)) < acceptance.acceptance_length(Tree(2, 6)) < 7
    )
    budgets = [point.budget_bytes for point in artifact.plan.by_budget]
    assert budgets == sorted(set(budgets)) and {9_000_000, 9_900_000} <= set(budgets)
    assert artifact.plan.context in {point.context for point in artifact.plan.by_context}
    if shutil.which("g++") is not None:
        programs = [cpp.program(source) for source in kernel_sources(artifact.spec, artifact.plan)]
        assert programs and all(find_prebuilt(artifact, one) is not None for one in programs)
    return artifact


def test_a_plan_that_is_not_rehearsed_says_that_nothing_was_measured(
    here: Path, capsys: pytest.CaptureFixture[str], brief: None
) -> None:
    ended = plan(capsys, "--rehearse", "none", known=False)
    assert ended.exit_code == 0, ended.err
    artifact = open_artifact(here / "demo-9mb")
    assert not artifact.plan.acceptance.measured
    assert artifact.profile.corrections == Corrections() and artifact.plan.by_budget
    assert "rehearsing" not in ended.err and "timing rounds" not in ended.err
    if shutil.which("g++") is not None:
        programs = [cpp.program(source) for source in kernel_sources(artifact.spec, artifact.plan)]
        assert all(find_prebuilt(artifact, one) for one in programs)


@pytest.mark.parametrize("seconds", ["0.001", "12.5", "86400"])
def test_a_rehearsal_takes_the_seconds_that_it_is_given(
    seconds: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[float]()

    def watched(*given: object) -> None:
        [effort] = (one for one in given if isinstance(one, Effort))
        asked.append(sum(vars(effort).values()))
        raise SubspecError(Exit.HUB, "that is enough")

    monkeypatch.setattr(learning, "measure_acceptance", watched)
    build_artifact(DEMO, here / "there", width=2, depth=3)
    words = ("--from", "there", "--vram", "9MB", "--rehearse")
    assert run(capsys, *words, seconds).exit_code == Exit.HUB
    assert asked == [pytest.approx(float(seconds))]
    assert run(capsys, *words, "none").exit_code == 0
    assert not open_artifact(here / "there").plan.acceptance.measured


def test_another_machines_plan_is_built_without_running_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = plan(capsys, "--out", "there", "--json")
    assert ended.exit_code == 0, ended.err
    found = json.loads(ended.out)
    assert found["schema"] == "subspec.plan/1" and found["artifact"] == "there"
    artifact = open_artifact(here / "there")
    assert artifact.profile == PROFILE
    assert artifact.plan.machine == PROFILE.machine
    assert not artifact.plan.acceptance.measured
    assert not (here / "there" / "kernels").exists(), "this machine's would be of no use there"
    assert "subspec-run there" in ended.err


def test_a_dry_run_with_a_profile_needs_no_runtime_and_writes_nothing(here: Path) -> None:
    program = (
        "import sys; from subspec.planner.cli import main; main(sys.argv[1:]);"
        "print([name for name in sys.modules if name.startswith(('subspec.runtime', 'hqq'))])"
    )
    words = ["--model", "demo", "--vram", "9MB", "--profile", "../profile.json", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--width", "1", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert json.loads(answer)["artifact"] is None
    assert list(here.iterdir()) == []


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from subspec.planner.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'numpy', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr
    assert "--link-bandwidth SIZE" in done.stdout


def dry(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    ended = plan(capsys, *words, "--dry-run", "--json")
    assert ended.exit_code == 0, ended.err
    decisions: dict[str, object] = json.loads(ended.out)["decisions"]
    return decisions


def test_what_the_user_fixes_is_in_the_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--context", 200, "--width", 2, "--depth", 5, "--draft-min-probability", 0.3)
    found = dry(capsys, *words, "--method", "substitute", "--ram", "1GB", "--device", "cpu")
    assert (found["context"], found["method"], found["device"]) == (200, "substitute", "cpu")
    tree, reasons = found["tree"], found["reasons"]
    assert isinstance(tree, dict) and (tree["width"], tree["depth"]) == (2, 5)
    assert tree["min_path_probability"] == 0.3
    assert isinstance(reasons, list) and any(
        "path probability is below 0.3" in one for one in reasons
    )
    assert dry(capsys, "--method", "plain")["method"] == "plain"


def test_a_slower_link_is_planned_for_and_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(*words: object) -> float:
        fixed = ("--dry-run", "--json", "--method", "plain", "--encoding", "raw")
        ended = plan(capsys, *words, *fixed)
        found = json.loads(ended.out)
        said = any("40.00 MB/s" in reason for reason in found["decisions"]["reasons"])
        assert said == ("--link-bandwidth" in words)
        streamed, taken = map(found["predicted"].get, ("streamed_bytes", "stream_seconds"))
        return float(streamed / taken)

    assert rate("--link-bandwidth", "40MB") == pytest.approx(40e6)
    assert rate() > 400e6


def test_the_quantizer_may_be_the_reference_package(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hqq.core.quantize")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=2048, eos_token_id=2,
    )  # fmt: skip
    model = random_checkpoint(tmp_path / "model", config)
    for quantizer in ("hqq", "blocked"):
        words = ("--model", model, "--out", quantizer, "--quantizer", quantizer)
        assert plan(capsys, *words).exit_code == 0
    theirs, ours = (load_file(here / q / "substitutes.safetensors") for q in ("hqq", "blocked"))
    for name, own in ours.items():
        if name.endswith("codes"):
            assert (theirs[name] == own).float().mean() > 0.9
        else:
            scale, center = own.float().unbind(-1)
            their_scale, their_center = theirs[name].float().unbind(-1)
            assert torch.equal(scale, their_scale)
            assert ((center - their_center).abs() < 0.1 * scale).float().mean() > 0.9


def test_the_encoding_that_was_asked_for_is_in_the_plan(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry(capsys, "--encoding", "raw", "--width", 1)["residual_parts"] == 0
    assert dry(capsys, "--encoding", "residual", "--width", 1)["residual_parts"] == 43


def test_residuals_where_nothing_decodes_them_are_refused_with_the_way_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here.parent / "profile.json").write_text(
        dump_json(replace(PROFILE, residual_weights_per_second=0.0))
    )
    ended = plan(capsys, "--encoding", "residual")
    assert ended.exit_code == 8
    assert "no fast decoder" in ended.err and "hint: install a C++ compiler" in ended.err
    assert dry(capsys)["residual_parts"] == 0


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--vram", "9MB"], "demo-9mb"),
        (["--vram", "1GiB"], "demo-1gib"),
        (["--vram", "24GB"], "demo-24gb"),
        (["--vram", "9000001B"], "demo-9000001b"),
        (["--model", "../My Model/"], "my-model-9mb"),
        (["--model", "."], "here-9mb"),
    ],
)
def test_the_folder_is_named_after_model_and_size(
    words: list[str], name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "." in words:
        shutil.copytree(DEMO, here, dirs_exist_ok=True)
    shutil.copytree(DEMO, here.parent / "My Model")
    (here / name).mkdir()
    (here / name / "mine").touch()
    ended = plan(capsys, *words)
    assert (ended.exit_code, ended.err.splitlines()[0]) == (2, f"error: {name} exists already")


def test_what_a_person_should_know_of_a_model_is_said_before_it_is_measured(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DEMO, here / "model")
    (here / "model" / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    ended = plan(capsys, "--model", "model", "--dry-run")
    assert ended.exit_code == 0 and "note: repetition_penalty 1.3" in ended.err


def test_an_empty_folder_is_taken_for_the_artifact(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    before = (here / "empty").stat().st_ino
    (here / "empty" / "lost+found").mkdir()
    assert plan(capsys, "--out", "empty", "--method", "plain").exit_code == 0
    assert verify(here / "empty") > 0
    assert (here / "empty").stat().st_ino == before
    again = run(capsys, "--from", "empty", "--profile", "../profile.json")
    assert again.exit_code == 0, again.err
    assert verify(here / "empty") > 0


def test_an_artifact_is_replaced_only_if_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(capsys, "--method", "plain").exit_code == 0
    before = open_artifact(here / "demo-9mb").plan
    refused = plan(capsys)
    assert refused.exit_code == 2 and "--overwrite" in refused.err
    assert open_artifact(here / "demo-9mb").plan == before
    assert plan(capsys, "--overwrite").exit_code == 0
    assert open_artifact(here / "demo-9mb").plan != before
    assert [path.name for path in here.iterdir()] == ["demo-9mb"]


# What goes wrong


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--vram", "9mb"], 2, "'9mb' is not a size"),
        (["--vram", "0B"], 2, "expected 1 byte to 1 PiB"),
        (["--context", "5000"], 2, "more than the model's 4096 positions"),
        (["--context", "3"], 2, "'--context': 3 is not in the range"),
        (["--width", "0"], 2, "'--width': 0 is not in the range"),
        (["--draft-min-probability", "nan"], 2, "nan is not a number"),
        (["--width", "64", "--depth", "128"], 3, "has 8193 nodes, the widest batch-invariant pass"),
        (["--method", "magic"], 2, "'magic' is not one of"),
        (["--quantizer", "magic"], 2, "'magic' is not one of"),
        (["--link-bandwidth", "fast"], 2, "'fast' is not a size"),
        *[
            (["--rehearse", wrong], 2, f"'{wrong}' is neither none nor seconds up to 86400")
            for wrong in ("0", "-1", "nan", "inf", "90000", "", "None", "1e9", "1m", "off", "0.0")
        ],
        (["--revision", "main"], 2, "--revision main is for the hub"),
        (["--model", "./nowhere"], 2, "'./nowhere' does not exist"),
        (["--model", "nobody"], 2, "neither a folder nor a known model family"),
        (["--calibration", "nowhere.jsonl"], 2, "nowhere.jsonl is missing"),
        (["--calibration", str(DEMO / "config.json")], 2, "config.json line 1 is not valid JSON"),
        (["--calibrate", "there"], 2, "2 of --model REF, --from ARTIFACT and --calibrate ARTIFACT"),
        (["--reprofile"], 2, "--reprofile was given without --from"),
        (["--print-plan"], 2, "--print-plan was given without --from"),
        (["--profile", "nowhere.json"], 2, "--profile nowhere.json is not a file"),
        (["--profile", str(DEMO / "config.json")], 4, "config.json has an unknown key"),
        (["--profile", str(DEMO / "model.safetensors")], 4, "is not valid JSON"),
        (["--device", "cuda"], 2, "measured on cpu, --device says cuda"),
        (["--out", "a/" + "x" * 300], 2, "File name too long"),
        (["--out", "/dev/null/x"], 2, "cannot write in /dev/null"),
        (["--out", "../profile.json"], 2, "exists already"),
        (["--out", "../profile.json", "--overwrite"], 2, "is not an artifact"),
        (["--out", "..", "--overwrite"], 2, "is not an artifact"),
        (["prompt"], 2, "unexpected extra argument"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_a_code_and_leaves_nothing(
    words: list[str], code: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = plan(capsys, *words)
    assert ended.exit_code == code, ended.err
    said = [line for line in ended.err.splitlines() if line]
    assert said[0].startswith("error: ") and message in said[0]
    assert all(line.startswith("hint: ") for line in said[1:])
    assert ended.out == "" and list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--device", "gpu"], 2, "--device 'gpu' is not known"),
        (["--device", "cpu:0"], 2, "--device 'cpu:0' is not known"),
        (["--device", "cuda:x"], 2, "--device 'cuda:x' is not known"),
        (["--context", "5000"], 2, "more than the model's 4096 positions"),
        (["--method", "draft-model"], 2, "needs a draft model"),
        (["--draft-head", "own"], 2, "the checkpoint has no head that drafts"),
        (["--out", "/proc/x"], 2, "cannot write a test file"),
    ],
)
def test_a_wrong_argument_is_noticed_before_anything_is_timed(
    words: list[str], code: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = plan(capsys, *words, known=False)
    assert (ended.exit_code, message in ended.err) == (code, True), ended.err
    assert "layers" not in ended.err and list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "demo"], "--vram SIZE is missing"),
        (["--vram", "9MB"], "none of --model REF, --from ARTIFACT and --calibrate ARTIFACT given"),
        (["--calibrate", "there", "--reprofile"], "--reprofile was given without --from"),
        (["--calibrate", "there", "--profile", "x.json"], "--calibrate uses the recorded runs"),
        (["--calibrate", "there", "--calibration", "x"], "--calibrate uses the recorded runs"),
        (["--calibrate", "there", "--rehearse", "9"], "--calibrate uses the recorded runs"),
        (["--calibrate", "there", "--rehearse", "none"], "--calibrate uses the recorded runs"),
        (
            ["--model", "demo", "--vram", "9MB", "--profile", "x", "--rehearse", "9"],
            "--rehearse SECONDS does not apply",
        ),
        (
            ["--from", "there", "--calibration", "x", "--rehearse", "none"],
            "which --rehearse none skips",
        ),
        (["--calibrate", "there", "--encoding", "raw"], "the weights of an artifact stay"),
        (["--calibrate", "there"], "there is not a folder"),
    ],
)
def test_what_does_not_go_together_is_said(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(capsys, *words)
    assert ended.exit_code == 2 and message in ended.err, ended.err
    assert ended.out == "" and list(here.iterdir()) == []


# Several sequences


def test_sequences_that_are_asked_for_have_their_caches_in_the_plan(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("--context", 128, "--width", 1, "--method", "substitute")
    ledgers = []
    for words in ((), ("--sequences", 3)):
        out = f"out-{len(ledgers)}"
        assert plan(capsys, *fixed, *words, "--out", out).exit_code == 0
        planned = open_artifact(here / out).plan
        assert planned.num_sequences == planned.constraints.num_sequences == (3 if words else 1)
        ledgers.append(planned.placement("substitute").ledger)
        assert ledgers[-1].total_bytes <= planned.budget_bytes
    assert ledgers[1].cache == 3 * ledgers[0].cache > 0
    with Engine.open(here / "out-1") as engine:
        assert len({engine.new_sequence() for _ in range(3)}) == 3


# An artifact that is re-planned


@pytest.fixture
def there(here: Path) -> Artifact:
    """Of the demo, under a plan made by hand."""
    return build_artifact(DEMO, here / "there", width=2, depth=3)


def test_recorded_runs_are_folded_into_the_plan(
    there: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"plan": plan_digest(there.plan), "machine": there.plan.machine}
    for changes in (own, own, {**own, "machine": "another"}, {**own, "plan": "0" * 64}):
        append_run(there.path, make_run(**changes))
    ended = run(capsys, "--calibrate", "there", "--vram", "9MB", "--json")
    assert ended.exit_code == 0, ended.err
    after = open_artifact(there.path)
    verify(there.path)
    curves = after.plan.acceptance.curves  # the plan made by hand had none that was measured
    assert {(curve.kind, curve.num_answers) for curve in curves} == {("runs", 2)}
    [curve] = [curve for curve in curves if curve.width == 2]
    assert (curve.num_trees, curve.drafted, curve.accepted) == (8, (8, 8, 8), (6, 4, 4))
    corrections = after.profile.corrections
    assert corrections.num_rounds == 8 and corrections.draft != 1 and corrections.verify != 1
    assert (corrections.plain, corrections.prompt) != (1, 1)
    assert replace(after.profile, corrections=there.profile.corrections) == there.profile
    assert len(read_runs(there.path)) == 4
    assert json.loads(ended.out)["acceptance"]["measured"] is True


def test_an_artifact_without_runs_of_its_plan_says_how_to_get_some(
    there: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    append_run(there.path, make_run())
    before = (there.path / "plan.json").read_bytes()
    ended = run(capsys, "--calibrate", "there")
    assert ended.exit_code == 2
    assert "no record of a run of its plan on this machine (1 of others)" in ended.err
    assert 'hint: run it first: subspec-run there "your prompt"' in ended.err
    assert (there.path / "plan.json").read_bytes() == before


def test_calibrating_asks_again_for_what_was_asked_for(
    there: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(capsys, "--from", "there", "--vram", "9MB", "--context", 200, "--depth", 2,
                "--draft-min-probability", 0.3, "--sequences", 2)  # fmt: skip
    assert ended.exit_code == 0, ended.err
    planned = open_artifact(there.path).plan
    own = {"plan": plan_digest(planned), "machine": planned.machine}
    append_run(there.path, make_run(**own))
    assert run(capsys, "--calibrate", "there").exit_code == 0
    after = open_artifact(there.path).plan
    assert after.acceptance.kinds == ("runs",)
    assert (after.budget_bytes, after.context, after.tree.depth) == (9_000_000, 200, 2)
    assert after.constraints == planned.constraints
    assert after.constraints.min_path_probability == 0.3
    assert after.constraints.num_sequences == after.num_sequences == 2


def test_without_a_size_an_artifact_keeps_its_own(
    there: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "--from", "there", "--vram", "9200kB").exit_code == 2
    assert run(capsys, "--from", "there", "--vram", "9200KB").exit_code == 0
    ended = run(capsys, "--from", "there", "--print-plan")
    assert ended.exit_code == 0, ended.err
    assert json.loads(ended.out)["budget_bytes"] == 9_200_000


def test_acceptance_is_measured_on_prompts_of_ones_own(
    there: Artifact, here: Path, capsys: pytest.CaptureFixture[str], brief: None
) -> None:
    lines = ['{"kind": "sql", "text": "SELECT name FROM"}', '{"chat": "Write a poem"}']
    (here / "mine.jsonl").write_text("\n".join(lines))
    words = ("--from", "there", "--vram", "9MB", "--calibration", "mine.jsonl", "--out", "mine")
    ended = run(capsys, *words)
    assert (ended.exit_code, ended.out) == (0, "mine\n"), ended.err
    plan = open_artifact(here / "mine").plan
    assert plan.acceptance.measured
    assert set(plan.acceptance.kinds) == {"sql", "own"}
    assert not open_artifact(there.path).plan.acceptance.measured


def test_a_gpu_that_is_not_there_is_said(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ended = plan(capsys, "--device", "cuda:1", known=False)
    assert ended.exit_code == 5 and "torch finds no CUDA GPU" in ended.err


def test_a_cap_below_the_floor_names_the_smallest_that_works(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = plan(capsys, "--vram", "1MB", "--json")
    assert ended.exit_code == 3
    error = json.loads(ended.out)["error"]
    assert error["code"] == "infeasible" and error["exit"] == 3
    found = re.fullmatch(r"--vram ([\d.]+MB)", error["hint"])
    assert found is not None
    assert found[1] == size_argument(error["smallest_budget_bytes"])
    assert list(here.iterdir()) == []
    again = plan(capsys, "--vram", found[1], "--out", "floor")
    assert again.exit_code == 0, again.err
    smaller = f"{parse_size(found[1]) * 99 // 100}B"
    assert plan(capsys, "--vram", smaller, "--dry-run").exit_code == 3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "model")


def test_a_weight_that_is_not_a_number_is_named(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, model / "model.safetensors")
    ended = plan(capsys, "--model", model)
    assert ended.exit_code == 4
    assert "error: model.layers.3.mlp.up_proj.weight: 1 of" in ended.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LM"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act"),
        ("tokenizer.json", None, "has no tokenizer: neither"),
    ],
)
def test_a_model_that_is_not_ours_to_run_is_refused(
    file: str, change: dict[str, object] | None, message: str, model: Path, here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if change is None:
        (model / file).unlink()
    else:
        values = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**values, **change}))
    ended = plan(capsys, "--model", model)
    assert ended.exit_code == 8 and message in ended.err, ended.err
    assert list(here.iterdir()) == []


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`model` is org/name on a hub, whose cache is a new folder; the files that were fetched."""
    fetched: list[str] = []
    cached = model.parent / "hub" / ("0" * 40)
    cached.mkdir(parents=True)

    def snapshot_download(_repository: str, *, allow_patterns: list[str], **_: object) -> str:
        for path in model.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, cached / path.name)
                fetched.append(path.name)
        return str(cached)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", Mock())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize("option", ["--model", "--draft-model"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}', "GPT2LM"),
        ("tokenizer.json", "[]", "cannot be read by transformers"),
        ("tokenizer.json", None, "has no tokenizer"),
    ],
)
def test_what_is_refused_is_refused_before_its_weights_are_fetched(
    option: str, file: str, content: str | None, message: str, model: Path, hub: list[str],
    here: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (model / file).unlink()
    if content is not None:
        (model / file).write_text(content)
    ended = plan(capsys, option, "org/name")
    assert ended.exit_code in (Exit.UNSUPPORTED, Exit.CORRUPT) and message in ended.err, ended.err
    assert ("draft model org/name: " in ended.err) == (option == "--draft-model")
    assert "config.json" in hub and "model.safetensors" not in hub
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--context", "99999"], Exit.USAGE, "--context 99999 is more than the model's"),
        (["--draft-head", "own"], Exit.USAGE, "the checkpoint has no head that drafts"),
        (["--vram", "1MB"], Exit.INFEASIBLE, "the smallest plan needs"),
        (["--method", "substitute", "--vram", "3MB"], Exit.INFEASIBLE, "the smallest plan needs"),
        ([], Exit.RESOURCES, "of disk"),
    ],
)
def test_what_has_no_plan_or_no_room_is_refused_before_its_weights_are_fetched(
    words: list[str], code: Exit, message: str, hub: list[str], here: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shutil.disk_usage", lambda path: Mock(free=1000))
    for known in (True, False):  # the machine of a file, and this one
        ended = plan(capsys, "--model", "org/name", *words, known=known)
        assert ended.exit_code == code and message in ended.err, ended.err
        if code == Exit.USAGE:
            assert "measuring" not in ended.err
    assert "config.json" in hub and "model.safetensors" not in hub
    assert list(here.iterdir()) == []


def test_a_profile_of_another_model_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(PROFILE, shapes=shapes_of(make_spec()))
    (here.parent / "profile.json").write_text(dump_json(other))
    ended = plan(capsys, "--dry-run")
    assert ended.exit_code == Exit.USAGE and "the profile is of another model" in ended.err
    assert "8 layers of 256, vocabulary 2048" in ended.err and "hint: give the" in ended.err
    build_artifact(DEMO, here / "there", width=2, depth=3)
    again = run(capsys, "--from", "there", "--profile", "../profile.json")
    assert again.exit_code == Exit.USAGE and "another model" in again.err


def test_a_config_that_is_given_as_a_profile_is_told_from_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = plan(capsys, "--profile", DEMO / "config.json", "--dry-run")
    assert ended.exit_code == Exit.CORRUPT and "config.json" in ended.err
    assert "hint: give the profile.json of an artifact" in ended.err


def test_more_memory_than_is_free_costs_no_rehearsal_and_no_build(
    here: Path, capsys: pytest.CaptureFixture[str], brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is rehearsed in what is free, and planned for what was asked for; in too little it is not
    rehearsed."""
    enough = memory.free_host_bytes
    for free, runs in ((8_200_000, True), (2_000_000, False)):

        def taken(_: str, free: int = free) -> int:
            """From when the artifact is run."""
            monkeypatch.setattr(memory, "free_host_bytes", lambda: free)
            return free

        monkeypatch.setattr(memory, "free_host_bytes", enough)
        monkeypatch.setattr(learning, "free_memory_bytes", taken)
        ended = plan(capsys, "--link-bandwidth", "40MB", "--overwrite", known=False)
        assert ended.exit_code == 0, ended.err
        found = open_artifact(here / "demo-9mb").plan
        assert found.budget_bytes == 9_000_000 and found.by_budget
        assert found.acceptance.measured is runs
        said = "rehearsed within 7.95 MB" if runs else "the artifact was not run"
        assert f"note: {said}" in ended.err, ended.err


def test_the_weights_of_a_model_that_is_ours_to_run_are_fetched_once(
    hub: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(capsys, "--model", "org/name", "--out", "made").exit_code == 0
    assert hub.count("model.safetensors") == 1
    assert open_artifact(here / "made").spec.source.repository == "org/name"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_an_interrupted_build_leaves_nothing(number: int, code: int, here: Path) -> None:
    words = ["--model", "demo", "--vram", "9MB", "--width", "1", "--depth", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a busy machine would take its time
    command = [*BRIEF_PLANNER, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("rehearsing"):
                child.send_signal(number)
        assert child.wait() == code
    assert list(here.iterdir()) == []
