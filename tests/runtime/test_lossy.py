"""Lossy acceptance by its published rule, on trees written out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from subspec.artifacts.common.errors import SubspecError
from subspec.runtime.decode import verify
from subspec.runtime.draft.beam import TokenTree
from subspec.runtime.draft.drafter import DecodeState
from subspec.runtime.lossy import Lossy, LossyVerification, accept

V = 16
ALL = Lossy("prob", 0.0, 0)


def tree_of(parents: list[int], tokens: list[int]) -> TokenTree:
    """Nodes after their parents; two rows of padding."""
    size = len(tokens) + 2
    ancestors = torch.eye(size, dtype=torch.bool)
    ancestors[:, 0].fill_(True)
    depths = torch.zeros(size, dtype=torch.int64)
    for node in range(1, len(tokens)):
        ancestors[node] |= ancestors[parents[node]]
        depths[node] = depths[parents[node]] + 1
    return TokenTree(
        torch.tensor([*tokens, 0, 0]), torch.tensor([*parents, 0, 0]), ancestors, depths,
        len(tokens), int(depths.max()),
    )  # fmt: skip


def logits_of(rows: list[dict[int, float]]) -> Tensor:
    """Probabilities of some tokens; the others share what is left."""
    found = torch.zeros(len(rows) + 2, V, dtype=torch.float64)
    for row, known in zip(found, rows, strict=False):
        row += (1 - sum(known.values())) / (V - len(known))
        for token, probability in known.items():
            row[token] = probability
    return found.log()


def accepted(
    parents: list[int],
    tokens: list[int],
    rows: list[dict[int, float]],
    rule: Lossy,
    end_tokens: frozenset[int] = frozenset(),
) -> LossyVerification:
    logits = logits_of(rows)
    return accept(tree_of(parents, tokens), logits.argmax(-1).tolist(), logits, rule, end_tokens)


# A chain 1 2 3 4 5: at its root the exact model would say 9 (0.6), then 2, 3, 4, 5 and 6.
CHAIN = ([0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5])
ROWS = [{9: 0.6, 1: 0.35}, *({token: 0.9} for token in (2, 3, 4, 5, 6))]


def test_a_wrong_token_is_kept_where_enough_of_what_follows_is_right() -> None:
    for window in (0, 3, 4):
        found = accepted(*CHAIN, ROWS, Lossy("prob", 0.3, window))
        assert found == LossyVerification([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [0])
    assert accepted(*CHAIN, ROWS, Lossy("prob", 0.3, 5)) == LossyVerification([0], [9], [])


def test_the_probability_gate_asks_what_the_exact_model_thinks_of_the_token() -> None:
    assert accepted(*CHAIN, ROWS, Lossy("prob", 0.35 - 1e-9, 4)).lossy == [0]
    assert accepted(*CHAIN, ROWS, Lossy("prob", 0.36, 4)).lossy == []


def test_the_entropy_gate_asks_how_spread_the_exact_models_probabilities_are() -> None:
    rest = (1 - 0.95) / (V - 2)
    entropy = -0.6 * math.log(0.6) - 0.35 * math.log(0.35) - (V - 2) * rest * math.log(rest)
    share = entropy / math.log(V)
    assert accepted(*CHAIN, ROWS, Lossy("entropy", share + 1e-6, 4)).lossy == [0]
    assert accepted(*CHAIN, ROWS, Lossy("entropy", share - 1e-6, 4)).lossy == []


def test_with_a_threshold_that_nothing_passes_it_is_exact_acceptance() -> None:
    rows = [{1: 0.9}, {2: 0.9}, {7: 0.9}, {4: 0.9}, {5: 0.9}, {6: 0.9}]
    assert accepted(*CHAIN, rows, Lossy("prob", 1.0, 0)) == LossyVerification(
        [0, 1, 2], [1, 2, 7], []
    )
    assert accepted(*CHAIN, rows, Lossy("entropy", 0.0, 0)).tokens == [1, 2, 7]


def test_a_longer_lossy_path_beats_a_shorter_exact_one() -> None:
    """Children 1 (the exact model's own, nothing below it is) and 2, below which 3 4 are."""
    parents, tokens = [0, 0, 0, 2, 3], [0, 1, 2, 3, 4]
    rows = [{1: 0.6, 2: 0.3}, {8: 0.9}, {3: 0.9}, {4: 0.9}, {5: 0.9}]
    assert accepted(parents, tokens, rows, Lossy("prob", 0.2, 2)).tokens == [2, 3, 4, 5]
    assert accepted(parents, tokens, rows, Lossy("prob", 0.2, 3)).tokens == [1, 8]


def test_of_paths_of_one_length_the_exact_one_is_kept_or_else_the_likelier() -> None:
    parents, tokens = [0, 0, 0, 0], [0, 1, 2, 3]
    rows = [{2: 0.5, 3: 0.3, 1: 0.1}, {8: 0.9}, {8: 0.9}, {8: 0.9}]
    assert accepted(parents, tokens, rows, ALL) == LossyVerification([0, 2], [2, 8], [])
    rows[0] = {9: 0.5, 3: 0.3, 1: 0.1, 2: 0.05}
    assert accepted(parents, tokens, rows, ALL) == LossyVerification([0, 3], [3, 8], [0])


def test_several_wrong_tokens_may_be_kept_if_each_passes() -> None:
    rows = [{9: 0.5, 1: 0.4}, {2: 0.9}, {8: 0.5, 3: 0.4}, {4: 0.9}, {5: 0.9}, {6: 0.9}]
    found = accepted(*CHAIN, rows, Lossy("prob", 0.3, 1))
    assert (found.tokens, found.lossy) == ([1, 2, 3, 4, 5, 6], [0, 2])
    # Below 1 only one node is agreed with, one below the other.
    assert accepted(*CHAIN, rows, Lossy("prob", 0.3, 2)).tokens == [9]


def test_nothing_below_an_end_token_counts() -> None:
    """A child 1, which the exact model says, and 15, which it does not and which ends the answer,
    with six nodes below that are all right."""
    parents, tokens = [0, 0, 0, 2, 3, 4, 5, 6, 7], [0, 1, 15, 2, 3, 4, 5, 6, 7]
    rows = [{1: 0.99, 15: 0.005}, {8: 0.9}, *({token: 0.9} for token in (2, 3, 4, 5, 6, 7, 8))]
    assert accepted(parents, tokens, rows, Lossy()).tokens == [15, 2, 3, 4, 5, 6, 7, 8]
    end = frozenset({15})
    assert accepted(parents, tokens, rows, Lossy(), end) == LossyVerification([0, 1], [1, 8], [])
    # One that needs nothing right after it may end the answer, and as a path of one node.
    rows[0] = {9: 0.6, 15: 0.35, 1: 0.01}
    found = accepted(parents, tokens, rows, Lossy("prob", 0.3, 0), end)
    assert (found.path, found.tokens[0], found.lossy) == ([0, 2], 15, [0])


def test_an_end_token_that_the_exact_model_says_ends_what_is_right() -> None:
    """Below 1 the chain goes on rightly for one node, 2, at which the answer ends."""
    end = frozenset({2})
    for window, kept in ((1, [1, 2]), (2, [])):
        found = accepted(*CHAIN, ROWS, Lossy("prob", 0.3, window), end)
        assert found.tokens[:-1] == kept and found.path == [0, 1, 2][: len(kept) + 1]


def test_a_verification_knows_the_answers_end_tokens() -> None:
    parents, tokens = [0, 0, 0, 2, 3, 4, 5, 6, 7], [0, 1, 15, 2, 3, 4, 5, 6, 7]
    rows = [{1: 0.99, 15: 0.005}, {8: 0.9}, *({token: 0.9} for token in (2, 3, 4, 5, 6, 7, 8))]
    cache: Any = SimpleNamespace(length=0, device=torch.device("cpu"))
    state = DecodeState(cache, 0, 20, lossy=Lossy(), end_tokens=frozenset({15}))
    done = verify(tree_of(parents, tokens), logits_of(rows), state)
    assert (done.new_tokens, done.lossy, done.path.tolist()) == ([1, 8], [], [0, 1])


@pytest.mark.parametrize("wrong", [{"threshold": -0.1}, {"threshold": 1.1}, {"window": -1}])
@pytest.mark.parametrize("known", ["expected"])
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, float], known: str) -> None:
    with pytest.raises(SubspecError, match=known):
        Lossy(**wrong)  # type: ignore[arg-type]
