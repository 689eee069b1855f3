"""Which of a tree a target accepts: on the device, and step by step from the root."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from subspec.artifacts.plan import Tree
from subspec.runtime.draft.beam import PartialTree, TokenTree, grow, root_only
from subspec.runtime.verify import accept, accept_sequentially

V = 11  # vocabulary


def random_tree(seed: int, width: int, depth: int, padded: int = 40) -> TokenTree:
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * 3

    def draft(growing: Sequence[PartialTree]) -> Tensor:
        [one] = growing
        return table[one.tree.tokens[one.last.nodes]]

    [grown] = grow([torch.tensor([seed % V])], [depth], Tree(width, depth), padded, draft)
    return grown


@pytest.mark.parametrize("seed", range(60))
def test_acceptance_on_the_device_equals_the_walk_from_the_root(seed: int) -> None:
    width, depth = 1 + seed % 5, 1 + seed % 7
    tree = random_tree(seed, width, depth)
    generator = torch.Generator().manual_seed(seed)
    choices = torch.randint(V, (40,), generator=generator)
    for node in range(1, tree.num_nodes):  # a target that likes the draft: long paths happen
        if torch.rand(1, generator=generator) < 0.7:
            choices[tree.parents[node]] = tree.tokens[node]
    verification, asked = accept(tree, choices, depth), list[tuple[int, int]]()

    def choose(node: int, level: int) -> int:
        asked.append((node, level))
        return int(choices[node])

    walked = accept_sequentially(tree, choose, depth)
    expected = walked.tokens()
    assert verification.tokens() == expected
    path = verification.path[: len(expected)].tolist()
    assert walked.path.tolist() == path + [0] * (depth + 1 - len(path))
    assert asked == [(node, level) for level, node in enumerate(path)], "no other choice is made"
    assert [tree.depths[node] for node in path] == list(range(len(expected)))
    assert tree.tokens[path[1:]].tolist() == expected[:-1]


def test_a_target_that_never_agrees_still_emits_its_own_token() -> None:
    tree = random_tree(3, width=2, depth=4)
    children = set(tree.tokens[1:3].tolist())
    other = next(token for token in range(V) if token not in children)
    assert accept(tree, torch.full((40,), other), 4).tokens() == [other]


def test_padding_rows_are_never_accepted() -> None:
    root = torch.tensor([6])
    choices = torch.full((16,), 6)  # padding rows carry the root's token
    assert accept(root_only(root, 16), choices, 5).tokens() == [6]


def test_a_tree_that_is_less_deep_than_the_plans_is_accepted_as_far_as_it_goes() -> None:
    tree = random_tree(8, width=2, depth=2)
    path = tree.ancestors[tree.num_nodes - 1].nonzero().flatten()
    choices = torch.zeros(40, dtype=torch.int64)
    choices[path[:-1]] = tree.tokens[path[1:]]
    choices[path[-1]] = 9
    expected = [*tree.tokens[path[1:]].tolist(), 9]
    assert accept(tree, choices, 6).tokens() == expected
    assert accept_sequentially(tree, lambda node, level: int(choices[node]), 6).tokens() == expected
