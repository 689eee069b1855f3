"""benchmarks/mixed_load.py: what counts as a wrong answer."""

import random
import socket
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from scripts import benchmark


@pytest.mark.parametrize("how", ["whole", "streamed"])
def test_an_answer_that_never_comes_is_wrong(how: str) -> None:
    script = benchmark("mixed_load")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    nobody = script.Served(SimpleNamespace(), port, None)
    counts, wrong, chance = Counter[str](), list[str](), random.Random(0)
    chance.choice = lambda some: how if "left" in some else some[0]  # type: ignore[method-assign, assignment]
    known = [("/v1/completions", {"prompt": "x"}, "y")]
    script.client(nobody, known, time.monotonic() + 0.05, chance, counts, wrong)
    assert len(wrong) == counts[how] > 0
    assert "ConnectionRefusedError" in wrong[0]
