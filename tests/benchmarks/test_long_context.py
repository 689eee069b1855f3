"""benchmarks/long_context.py: a small model of each kind reads a text, and what follows it."""

import json
from types import ModuleType

import pytest
from brief import be_brief
from click.testing import CliRunner
from scripts import benchmark


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("long_context")


@pytest.mark.parametrize(
    "kind",
    ["hybrid", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("windows", "full"))],
)
def test_turns_after_a_text_have_the_answers_of_fresh_sequences(
    script: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_brief(monkeypatch)
    words = ["--kind", kind, "--tokens", "300", "--layers", "6", "--hidden", "256"]
    result = CliRunner().invoke(script.main, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert [turn["as_fresh"] for turn in found["turns"]] == [True] * 4
    assert found["turns"][0]["read_tokens"] == 300
    assert found["turns"][1]["read_tokens"] < 100
    assert found["peak_bytes"] <= found["ledger_bytes"]
