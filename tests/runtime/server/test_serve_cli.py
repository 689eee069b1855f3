"""subspec-serve as a person meets it before it serves: refusals, keys, what is missing."""

import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from running import demo_artifact

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.app import planned_model
from subspec.runtime.app.planned_model import ModelRequest
from subspec.runtime.server import cli
from subspec.runtime.server.cli import main
from subspec.runtime.server.serve_options import Options, api_keys

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *words: str, artifact: str | None = "artifact") -> str:
    """What is said to somebody who gives these words; the exit code must be that of usage."""
    with pytest.raises(SystemExit) as ended:
        main([*([artifact] if artifact else []), *words])
    assert ended.value.code == Exit.USAGE
    said = capsys.readouterr().err
    assert re.search("^error: ", said, re.MULTILINE)
    return said


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBSPEC_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_machines_are_let_in_only_with_a_key(capsys: Capture, host: str) -> None:
    said = refused(capsys, "--host", host)
    assert "there is no API key" in said and "--insecure-no-auth" in said
    assert "artifact does not exist" in refused(capsys, "--host", host, "--insecure-no-auth")


def test_a_key_of_the_environment_is_one(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBSPEC_API_KEY", "secret")
    assert "artifact does not exist" in refused(capsys, "--host", "0.0.0.0")


def test_keys_are_lines_of_printable_ascii(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert api_keys(file, None) == ("one", "two")
    assert api_keys(file, "three") == ("three", "one", "two")
    assert api_keys(None, None) == ()
    for content, variable in ((b"\n", None), (b"a b", None), (b"\xff", None), (b"", "x")):
        file.write_bytes(content)
        with pytest.raises(SubspecError) as error:
            api_keys(file, variable)
        assert error.value.exit_code == Exit.USAGE
    with pytest.raises(SubspecError):
        api_keys(None, " ")  # meant to be a key: nobody may be let in without one
    with pytest.raises(SubspecError, match="No such file"):
        api_keys(tmp_path / "none", None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--port", "65536"], "65536 is not in the range"),
        (["--queue", "-1"], "-1 is not in the range"),
        (["--sequences", "0"], "0 is not in the range"),
        (["--shutdown-timeout", "nan"], "nan is not a number"),
        (["--cors-origin", "example.org"], "is not an origin"),
        (["--cors-origin", "https://example.org/path"], "is not an origin"),
        (["--model-name", "a\nb"], "is not a name"),
        (["--prefix-cache", "5mb"], "'5mb' is not a size"),
        (["--log-format", "xml"], "'xml' is not one of"),
        (["--vram", "5MB", "--no-replan"], "exclude each other"),
        (["--context", "99"], "--context was given without --model"),
        (["--threshold", "0.5"], "--threshold was given without --verify lossy"),
        (["--verify", "lossy", "--no-speculation"], "exclude each other"),
        (["--rehearse", "none"], "--rehearse was given without --model"),
        (["--model", "demo", "--vram", "9MB"], "an ARTIFACT, artifact, and --model exclude"),
    ],
)
def test_a_wrong_option_is_one_sentence(capsys: Capture, words: list[str], expected: str) -> None:
    assert expected in refused(capsys, *words)


def test_a_model_needs_a_budget_and_something_must_be_served(capsys: Capture) -> None:
    assert "neither an ARTIFACT nor --model REF" in refused(capsys, artifact=None)
    said = refused(capsys, "--model", "demo", artifact=None)
    assert "--model was given without --vram" in said and "hint: add --vram" in said


def test_what_a_person_fixes_is_passed_to_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[ModelRequest]()

    def plan(request: ModelRequest) -> Path:
        asked.append(request)
        return Path("planned")

    monkeypatch.setattr(planned_model, "planned_model", plan)
    options = Options(model="demo", vram=9_000_000)
    given = replace(
        options, context=200, sequences=2, device="cpu", link_bandwidth=5, rehearse="none"
    )
    for one in (options, given):
        assert cli.planned_folder(one) == Path("planned")
    assert asked == [
        ModelRequest("demo", 9_000_000),
        ModelRequest("demo", 9_000_000, "cpu", 200, 2, 5, "none"),
    ]


def test_more_sequences_than_planned_are_refused_where_nothing_may_be_re_planned(
    capsys: Capture, tmp_path: Path
) -> None:
    words = ("--sequences", "3", "--no-replan", "--port", "0")
    said = refused(capsys, *words, artifact=str(demo_artifact(tmp_path)))
    assert "--sequences 3, but the plan has memory for 1" in said
    assert "hint: subspec-plan --from " in said and said.endswith(" --sequences 3\n")


def test_without_the_extra_it_says_what_to_install(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "fastapi" else object())
    said = refused(capsys)
    assert "needs fastapi, which is not installed" in said
    assert "hint: pip install 'subspec[serve]'" in said


def test_a_port_that_is_taken_is_said_so() -> None:
    from subspec.runtime.server.serving import address_of, listen

    with listen("127.0.0.1", 0) as first:
        assert address_of(first).startswith("http://127.0.0.1:")
        port = first.getsockname()[1]
        with pytest.raises(SubspecError, match=f"cannot listen on 127.0.0.1 port {port}") as error:
            listen("127.0.0.1", port)
        assert error.value.exit_code == Exit.RESOURCES and "--port 0" in error.value.hint
    with pytest.raises(SubspecError, match="cannot listen on no.such.host.invalid"):
        listen("no.such.host.invalid", 0)
    if socket.has_ipv6:
        try:
            with listen("::1", 0) as six:
                assert address_of(six).startswith("http://[::1]:")
        except SubspecError:
            pytest.skip("no IPv6 here")
