"""benchmarks/peers.py: what is made of the lines of a peer, and what a memory limit does."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from builders import build_artifact
from scripts import benchmark

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.model.hub import DEMO

LINES = (
    '{"prompt": 0, "at": 10.0}',
    '{"prompt": 0, "token": 5, "at": 12.0}',
    '{"prompt": 0, "token": 6, "at": 13.0}',
    '{"prompt": 0, "token": 7, "at": 14.0}',
    '{"prompt": 1, "at": 20.0}',  # no token within its time
    '{"prompt": 2, "at": 30.0}',
    '{"prompt": 2, "token": 8, "at": 31.0}',
    '{"prompt": 2, "token": 9, "at": 33.0}',
    '{"prompt": 2, "tok',
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("peers")


@pytest.fixture(scope="module")
def limits() -> ModuleType:
    return benchmark("memory_limit")


def test_what_came_before_a_peer_was_stopped_counts(script: ModuleType) -> None:
    answers = script.answers_of(LINES)
    assert answers == {
        0: script.Answer([5, 6, 7], first_token_seconds=2.0, decode_seconds=2.0),
        2: script.Answer([8, 9], first_token_seconds=1.0, decode_seconds=2.0),
    }
    assert script.tokens_per_second(answers) == 3 / 4
    assert script.answers_of([]) == {} and script.tokens_per_second({}) is None


def test_answers_are_compared_prompt_by_prompt_from_their_beginning(script: ModuleType) -> None:
    ours = {
        0: script.Answer([5, 6, 0, 7], 1.0, 1.0),
        1: script.Answer([1], 1.0, 0.0),
        2: script.Answer([8, 9, 4, 4], 1.0, 1.0),
    }
    found = script.result("peer", "1", 100, [50], script.answers_of(LINES), ours, "")
    assert (found.same_tokens, found.compared_tokens, found.num_tokens) == (4, 5, 5)
    assert found.ours_over_theirs == pytest.approx((6 / 2) / (3 / 4))
    assert found.first_token_seconds == 1.5
    nothing = script.result("other", "2", 100, [], {}, ours, "it has no such model")
    assert nothing.tokens_per_second is None and nothing.ours_over_theirs is None
    one, two = script.row(found), script.row(nothing)
    assert "4.00x" in one and "4 of 5; killed at 50 B" in one
    assert two.endswith("it has no such model")


def test_the_reason_of_a_failure_is_its_last_line_without_the_hint(script: ModuleType) -> None:
    said = "loading\nerror: the disk is full\n\nhint: delete something\n"
    assert script.last_line(said) == "the disk is full"
    assert script.last_line("") == ""
    assert script.why(script.Ended([], 3, False, False, "")) == "exit code 3"
    assert script.why(script.Ended([], -9, True, False, "x")) == "killed for memory"


def test_a_peer_that_does_not_exist_is_refused(script: ModuleType) -> None:
    assert [peer.name for peer in script.chosen("airllm, llama.cpp")] == ["airllm", "llama.cpp"]
    for names in ("", "llama", "airllm,,accelerate"):
        with pytest.raises(SubspecError, match="expected some of llama.cpp, accelerate, airllm"):
            script.chosen(names)


def test_an_artifact_of_another_checkpoint_is_refused(script: ModuleType, tmp_path: Path) -> None:
    artifact = build_artifact(DEMO, tmp_path / "artifact", "residual", width=1, depth=2)
    script.check_same_model(DEMO, artifact)
    other = tmp_path / "other"
    other.mkdir()
    for file in DEMO.iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = text.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')
        (other / file.name).write_bytes(text)
    with pytest.raises(SubspecError, match="was not made of") as refused:
        script.check_same_model(other, artifact)
    assert refused.value.exit_code == Exit.USAGE


@pytest.mark.parametrize(("takes", "killed"), [(8 << 20, False), (200 << 20, True)])
def test_a_process_that_takes_more_than_its_limit_is_killed_and_counted(
    limits: ModuleType, takes: int, killed: bool
) -> None:
    with limits.memory_group(64 << 20) as group:
        if group is None:
            pytest.skip("no cgroup may be made here")
        words = [sys.executable, "-c", f"bytearray({takes}).replace(b'a', b'b')"]
        done = subprocess.run(words, preexec_fn=group.enter)
        assert (done.returncode == -9, group.num_killed() > 0) == (killed, killed)
    assert not group.folder.exists()


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_counts_swap_too(limits: ModuleType, tmp_path: Path, version: int) -> None:
    assert not limits.set_limit(tmp_path, 1000)  # memory is not bounded there
    names = {
        1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        2: ("memory.max", "memory.swap.max"),
    }[version]
    for name in names:
        (tmp_path / name).touch()
    assert limits.set_limit(tmp_path, 1000)
    assert [(tmp_path / name).read_text() for name in names] == ["1000", ["1000", "0"][version - 1]]


def test_an_idle_interpreter_is_measured_without_what_this_process_holds(
    limits: ModuleType,
) -> None:
    held = bytes(300 << 20).replace(b"\0", b"a")
    assert 1 << 20 < limits.idle_bytes("pass") < len(held) // 2
