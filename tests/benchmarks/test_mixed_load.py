"""benchmarks/mixed_load.py: what counts as a wrong answer."""

import random
import socket
from collections import Counter
from types import SimpleNamespace

import pytest
from scripts import benchmark


@pytest.mark.parametrize("how", ["whole", "streamed"])
def test_an_answer_that_never_comes_is_wrong(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("mixed_load")
    seconds = iter([0.0, 2.0])  # a request is begun at the first, and none at the second
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    counts, wrong, chance = Counter[str](), list[str](), random.Random(0)
    chance.choice = lambda some: how if "left" in some else some[0]  # type: ignore[method-assign, assignment]
    known = [("/v1/completions", {"prompt": "x"}, "y")]
    with socket.socket() as taken:  # bound, so that nobody else can listen there, as it does not
        taken.bind(("127.0.0.1", 0))
        nobody = script.Served(SimpleNamespace(), taken.getsockname()[1], None)
        script.client(nobody, known, 1.0, chance, counts, wrong)
    assert len(wrong) == counts[how] == 1
    assert "ConnectionRefusedError" in wrong[0]
