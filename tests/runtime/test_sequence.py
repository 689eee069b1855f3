"""Sequences of one engine: caches that are given and given back."""

import pytest
from builders import build_artifact

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.planner.model.hub import DEMO
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import GenerationParams


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("sequences") / "artifact"
    return build_artifact(DEMO, out, width=2, depth=3, num_sequences=2)


def test_a_sequence_that_is_closed_twice_gives_its_cache_back_once(artifact: Artifact) -> None:
    """Two sequences over one cache would write over each other's keys and values."""
    with Engine.open(artifact) as engine:
        with engine.new_sequence() as first:
            first.close()
        second, third = engine.new_sequence(), engine.new_sequence()
        first.close()
        assert second.cache is not third.cache
        with pytest.raises(SubspecError, match="all 2 sequences of the plan are in use") as caught:
            engine.new_sequence()
        assert caught.value.exit_code == Exit.RESOURCES


def test_a_cache_that_comes_back_is_empty_for_the_next_sequence(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        said = []
        for _ in range(3):
            with engine.new_sequence() as sequence:
                assert sequence.cache.length == 0
                rounds = sequence.generate([*range(40, 60)], GenerationParams(12))
                said.append([token for some in rounds for token in some])
        assert said[0] == said[1] == said[2]
