"""subspec-serve as a person meets it before it serves: refusals, keys, what is missing."""

import socket
from pathlib import Path

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server import cli
from subspec.runtime.server.cli import api_keys, main

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *words: str) -> str:
    """What is said to somebody who gives these words; the exit code must be that of usage."""
    with pytest.raises(SystemExit) as ended:
        main(["artifact", *words])
    assert ended.value.code == Exit.USAGE
    said = capsys.readouterr().err
    assert said.startswith("error: ")
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
    ],
)
def test_a_wrong_option_is_one_sentence(capsys: Capture, words: list[str], expected: str) -> None:
    assert expected in refused(capsys, *words)


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
