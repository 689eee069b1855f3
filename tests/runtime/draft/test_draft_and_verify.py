"""The tree: how it grows, and which of it a target accepts. The models are lookup tables."""

import pytest
import torch
from torch import Tensor

from subspec.artifacts.plan import Tree
from subspec.runtime.draft.beam import TokenTree, grow, levels, root_only
from subspec.runtime.verify import accept, walk

V = 11  # vocabulary


def table_draft(table: Tensor):  # type: ignore[no-untyped-def]
    """A draft whose logits depend on the node's token only: row t of `table` [V, V]."""
    return lambda tree, nodes: table[tree.tokens[nodes]]


def random_table(seed: int, sharpness: float = 3.0) -> Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * sharpness


def random_tree(seed: int, width: int, depth: int, padded: int = 40) -> TokenTree:
    root = torch.tensor([seed % V])
    return grow(root, Tree(width, depth), padded, table_draft(random_table(seed)))


@pytest.mark.parametrize("width", [1, 3, 5])
def test_the_beam_holds_the_most_probable_paths_of_every_level(width: int) -> None:
    table, depth = random_table(1), 3
    tree = grow(torch.tensor([4]), Tree(width, depth), 24, table_draft(table))
    log_probability = table.log_softmax(-1)
    beam: list[tuple[float, list[int]]] = [(0.0, [4])]
    for level in range(1, depth + 1):
        every = [
            (score + log_probability[path[-1], token].item(), [*path, token])
            for score, path in beam
            for token in range(V)
        ]
        beam = sorted(every, reverse=True)[:width]
        first = 1 + width * (level - 1)
        paths = [path_of(tree, node) for node in range(first, first + width)]
        assert paths == [path for _, path in beam]


def path_of(tree: TokenTree, node: int) -> list[int]:
    return tree.tokens[tree.ancestors[node]].tolist()  # type: ignore[no-any-return]


def test_a_tree_ends_early_when_its_paths_are_unlikely() -> None:
    flat = torch.zeros(V, V)
    tree = grow(torch.tensor([0]), Tree(1, 9, min_path_probability=0.005), 16, table_draft(flat))
    assert tree.num_nodes == 1 + 3  # 1/11, 1/121, then 1/1331 is below: that level is the last
    assert tree.depths.tolist() == [0, 1, 2, 3, *(0,) * 12]
    every = levels(torch.tensor([0]), Tree(1, 9, min_path_probability=0.005), 16, table_draft(flat))
    assert [grown.num_nodes for grown, _ in every] == [2, 3, 4]


@pytest.mark.parametrize("width", [1, 4])
def test_the_first_levels_of_a_tree_are_those_of_a_shallower_one(width: int) -> None:
    """All levels share their tensors: what a level says, it says before the next one is grown."""
    root, draft, num_levels = torch.tensor([4]), table_draft(random_table(2)), 0
    for num_levels, (tree, _) in enumerate(levels(root, Tree(width, 5), 24, draft), 1):
        alone = grow(root, Tree(width, num_levels), 24, draft)
        assert tree.num_nodes == 1 + width * num_levels
        for found, expected in (
            (tree.tokens, alone.tokens),
            (tree.parents, alone.parents),
            (tree.depths, alone.depths),
            (tree.ancestors, alone.ancestors),
        ):
            assert torch.equal(found, expected)
    assert num_levels == 5
    assert list(levels(root, Tree(width, 0), 24, draft)) == []


def test_a_level_is_drafted_only_when_it_is_asked_for() -> None:
    table, asked = random_table(3), list[int]()

    def draft(tree: TokenTree, nodes: Tensor) -> Tensor:
        asked.append(int(tree.depths[nodes[0]]))
        return table[tree.tokens[nodes]]

    grown = levels(torch.tensor([4]), Tree(2, 6), 16, draft)
    assert asked == []
    next(grown)
    next(grown)
    assert asked == [0, 1]


def test_depths_and_parents_describe_one_tree() -> None:
    tree = random_tree(5, width=4, depth=6)
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[node])
        assert tree.depths[node] == tree.depths[parent] + 1
        expected = tree.ancestors[parent].clone()
        expected[node] = True
        assert torch.equal(tree.ancestors[node], expected)


@pytest.mark.parametrize("seed", range(60))
def test_acceptance_on_the_device_equals_the_walk_from_the_root(seed: int) -> None:
    width, depth = 1 + seed % 5, 1 + seed % 7
    tree = random_tree(seed, width, depth)
    generator = torch.Generator().manual_seed(seed)
    choices = torch.randint(V, (40,), generator=generator)
    for node in range(1, tree.num_nodes):  # a target that likes the draft: long paths happen
        if torch.rand(1, generator=generator) < 0.7:
            choices[tree.parents[node]] = tree.tokens[node]
    verdict, asked = accept(tree, choices, depth), list[tuple[int, int]]()

    def choose(node: int, level: int) -> int:
        asked.append((node, level))
        return int(choices[node])

    walked = walk(tree, choose, depth)
    expected = walked.emitted()
    assert verdict.emitted() == expected
    path = verdict.path[: len(expected)].tolist()
    assert walked.path.tolist() == path + [0] * (depth + 1 - len(path))
    assert asked == [(node, level) for level, node in enumerate(path)], "no other choice is made"
    assert [tree.depths[node] for node in path] == list(range(len(expected)))
    assert tree.tokens[path[1:]].tolist() == expected[:-1]


def test_a_target_that_never_agrees_still_emits_its_own_token() -> None:
    tree = random_tree(3, width=2, depth=4)
    children = set(tree.tokens[1:3].tolist())
    other = next(token for token in range(V) if token not in children)
    assert accept(tree, torch.full((40,), other), 4).emitted() == [other]


def test_padding_rows_are_never_accepted() -> None:
    root = torch.tensor([6])
    choices = torch.full((16,), 6)  # padding rows carry the root's token
    assert accept(root_only(root, 16), choices, 5).emitted() == [6]
