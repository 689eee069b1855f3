"""Trees with looked-up tokens are the trees that a draft model grows alone, in fewer passes."""

from collections.abc import Sequence

import pytest
import torch
from table_drafts import V, random_table, same, table_draft
from torch import Tensor

from subspec.artifacts.footprint import MAX_PROPOSED
from subspec.artifacts.plan import Tree
from subspec.runtime.draft import beam, hierarchical
from subspec.runtime.draft.beam import DraftPass, PartialTree, TokenTree
from subspec.runtime.draft.lookup import as_text

PADDED = 64


def counted(draft_pass: DraftPass) -> tuple[DraftPass, list[int]]:
    """The pass, and the rows of each of its calls."""
    calls: list[int] = []

    def run(growing: Sequence[PartialTree]) -> Tensor:
        calls.append(sum(len(one.last.nodes) for one in growing))
        for one in growing:
            check_rows(one)
        return draft_pass(growing)

    return run, calls


def check_rows(one: PartialTree) -> None:
    """Every row has a slot, and sees itself and what is above it."""
    tree = one.tree
    assert (one.last.nodes < tree.num_nodes).all()
    for node in one.last.nodes.tolist():
        seen = tree.ancestors[node].nonzero().flatten().tolist()
        assert seen[0] == 0 and seen[-1] == node and len(seen) == tree.depths[node] + 1
        assert node == 0 or seen[-2] == tree.parents[node]


def chain_table() -> Tensor:
    """Token t is followed by t + 1, nearly always."""
    return torch.eye(V).roll(1, dims=1) * 20


def grown(
    texts: Sequence[list[int]], tree: Tree, tables: Sequence[Tensor], depth: int
) -> tuple[list[TokenTree], list[int]]:
    draft_pass, calls = counted(table_draft(*tables))
    roots = [torch.tensor(text[-1:]) for text in texts]
    trees = hierarchical.grow(
        roots, [depth] * len(texts), hierarchical.looked_up([as_text(text) for text in texts]),
        tree, PADDED, draft_pass,
    )  # fmt: skip
    return trees, calls


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_where_nothing_is_found_the_tree_is_that_of_the_plain_twin(
    width: int, least: float
) -> None:
    tree, tables = Tree(width, 6, 0.5, least), [random_table(1), random_table(2)]
    found, _ = grown([[3], [5]], tree, tables, 6)
    roots = [torch.tensor([3]), torch.tensor([5])]
    expected = beam.grow(roots, [6, 6], tree, PADDED, table_draft(*tables))
    for one, other in zip(found, expected, strict=True):
        assert one.num_levels == other.num_levels
        if one.num_proposed == 0:
            assert same(one, other)


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_is_the_one_that_the_draft_model_would_have_drafted(seed: int) -> None:
    """Whatever the text says: looked-up tokens only save passes."""
    table, tree = random_table(seed), Tree(1, 12)
    root = torch.tensor([seed])
    [expected] = beam.grow([root], [12], tree, PADDED, table_draft(table))
    said = expected.tokens[:9].tolist()
    for text in ([*said, *said[:4]], [*said[:3], 0, 1, *said[:3]], [seed], said[:1]):
        [alone] = beam.grow([torch.tensor(text[-1:])], [12], tree, PADDED, table_draft(table))
        [one], calls = grown([text], tree, [table], 12)
        assert same(one, alone) and one.num_nodes == 13
        assert len(calls) == one.num_levels - one.num_proposed


def test_tokens_that_the_draft_model_agrees_with_cost_one_pass() -> None:
    text = [*range(V), *range(4)]
    for width in (1, 3):
        [one], calls = grown([text], Tree(width, 8), [chain_table()], 8)
        assert one.num_levels == 8 and one.num_nodes == 1 + 8 * width
        # Four are known to have stood before; with the next one it is again as many, and more.
        assert calls[0] == 1 + 4 and len(calls) == 2 and one.num_proposed == 6
        path = one.tokens[one.ancestors[one.num_nodes - width]].tolist()
        assert path == [3, 4, 5, 6, 7, 8, 9, 10, 0]


def test_a_token_that_is_not_the_likeliest_is_not_followed() -> None:
    text = [0, 1, 2, 9, 9, 9, 0, 1, 2]
    [one], calls = grown([text], Tree(2, 3), [chain_table()], 3)
    assert calls[0] == 1 + 2 and one.num_proposed == 0 and len(calls) == 3
    assert 3 in one.tokens[1:3].tolist()


def test_several_trees_grow_together_with_what_each_has_looked_up() -> None:
    texts = [[*range(V), *range(4)], [7], [0, 1, 2, 9, 9, 9, 0, 1, 2]]
    tree = Tree(2, 6)
    tables = [chain_table(), random_table(3), chain_table()]
    together, calls = grown(texts, tree, tables, 6)
    for text, table, one in zip(texts, tables, together, strict=True):
        [alone], _ = grown([text], tree, [table], 6)
        nodes = slice(one.num_nodes)
        assert torch.equal(one.tokens[nodes], alone.tokens[nodes])
        assert one.num_proposed == alone.num_proposed
    assert len(calls) == 6


@pytest.mark.parametrize("depth", range(1, 6))
def test_a_tree_is_no_deeper_than_asked_for_and_no_pass_larger_than_its_memory(depth: int) -> None:
    text = [*range(V), *range(V)] * 5
    [one], calls = grown([text], Tree(1, 40), [chain_table()], depth)
    assert one.num_levels == depth == one.num_nodes - 1
    [one], calls = grown([text], Tree(1, 60), [chain_table()], 60)
    assert one.num_levels == 60 and max(calls) == 1 + MAX_PROPOSED
