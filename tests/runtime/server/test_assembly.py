"""What a server says of itself before its engine is open."""

from pathlib import Path
from typing import Any

import pytest
from running import demo_artifact

from subspec.artifacts.format.store import open_artifact
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.server.assembly import model_info
from subspec.runtime.server.serve_options import Options


@pytest.mark.parametrize(
    ("given", "speed"),
    [
        ({}, 50.0),
        ({"drafter": "substitute+lookup"}, 50.0),
        ({"drafter": "lookup"}, None),
        ({"draft_temperature": 0.2}, None),
        ({"no_speculation": True}, None),  # the padded twin
        ({"verify": "lossy"}, None),
    ],
    ids=str,
)
def test_a_server_claims_the_speed_that_the_plan_predicts_for_its_options(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any], speed: float | None
) -> None:
    options = Options(**given)
    artifact = open_artifact(demo_artifact(Path(tmp_path_factory.getbasetemp())))
    model = model_info(artifact, options, "a-name")
    assert (model.predicted_tokens_per_second, model.lossy) == (speed, options.lossy)
    how = OpenOptions(options.method, options.drafter, draft_temperature=options.draft_temperature)
    with Engine.open(artifact, how) as engine:
        of_exact = engine.predicted_tokens_per_second
    assert (None if options.lossy else of_exact) == speed, "the engine's own"
