"""How trees grow: one, or several together. The models are lookup tables."""

import math
from collections.abc import Sequence

import pytest
import torch
from table_drafts import V, random_table, same, table_draft
from torch import Tensor

from subspec.artifacts.plan import Tree
from subspec.runtime.draft.beam import (
    Level,
    PartialTree,
    TokenTree,
    grow,
    levels,
    log_probability,
    narrowed,
    root_only,
    stops,
)


def one_tree(root: int, tree: Tree, padded: int, table: Tensor) -> TokenTree:
    [grown] = grow([torch.tensor([root])], [tree.depth], tree, padded, table_draft(table))
    return grown


def never(growing: PartialTree) -> bool:
    return False


def path_of(tree: TokenTree, node: int) -> list[int]:
    return tree.tokens[tree.ancestors[node]].tolist()  # type: ignore[no-any-return]


# ---- one tree -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 5])
def test_the_beam_holds_the_most_probable_paths_of_every_level(width: int) -> None:
    table, depth = random_table(1), 3
    tree = one_tree(4, Tree(width, depth), 24, table)
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


def test_a_tree_ends_early_when_its_paths_are_unlikely() -> None:
    flat, rule = torch.zeros(V, V), Tree(1, 9, min_path_probability=0.005)
    tree = one_tree(0, rule, 16, flat)
    assert tree.num_nodes == 1 + 3  # 1/11, 1/121, then 1/1331 is below: that level is the last
    assert tree.depths.tolist() == [0, 1, 2, 3, *(0,) * 12]
    start = root_only(torch.tensor([0]), 16)
    every = levels([start], [9], rule, table_draft(flat), lambda one: stops(rule, one.last))
    assert [[one.tree.num_nodes for one in level] for level in every] == [[2], [3], [4]]


def test_a_level_is_too_improbable_by_all_of_its_paths_together() -> None:
    level = Level(torch.arange(3), torch.tensor([0.1, 0.1, 0.1]).log())
    for threshold, expected in ((0.0, False), (0.29, False), (0.31, True)):
        assert stops(Tree(3, 5, min_path_probability=threshold), level) is expected


def test_the_probability_of_a_level_is_that_of_all_its_paths() -> None:
    level = Level(torch.tensor([1, 2]), torch.tensor([0.5, 0.25]).log())
    assert log_probability(level) == pytest.approx(math.log(0.75))
    assert log_probability(Level.of_root(torch.device("cpu"))) == 0.0


def test_whether_a_tree_ends_is_asked_of_its_last_level_before_the_next_one() -> None:
    asked = list[tuple[int, int]]()

    def ends(growing: PartialTree) -> bool:
        asked.append((growing.index, growing.tree.num_nodes))
        return growing.index == 0 and growing.tree.num_nodes > 3

    starts, tree = [root_only(root, 16) for root in ROOTS[:2]], Tree(2, 4)
    grown = list(levels(starts, [4, 3], tree, table_draft(*TABLES), ends))
    assert [[(one.index, one.tree.num_nodes) for one in level] for level in grown] == [
        [(0, 3), (1, 3)], [(0, 5), (1, 5)], [(1, 7)]
    ]  # fmt: skip
    assert asked == [(0, 3), (1, 3), (0, 5), (1, 5)], "a tree that is as deep as it may be is done"


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("num_rows", [10, 16, 24])
def test_a_tree_is_the_same_in_as_few_rows_as_it_has_nodes(width: int, num_rows: int) -> None:
    shape = Tree(width, 9 // width)
    got = narrowed(one_tree(4, shape, 24, random_table(2)), num_rows)
    assert same(got, one_tree(4, shape, num_rows, random_table(2)))
    assert len(got.tokens) == num_rows and got.ancestors.shape == (num_rows, num_rows)


@pytest.mark.parametrize("width", [1, 4])
def test_the_first_levels_of_a_tree_are_those_of_a_shallower_one(width: int) -> None:
    """All levels share their tensors: what a level says, it says before the next one is grown."""
    table, tree, num_levels = random_table(2), Tree(width, 5), 0
    start = root_only(torch.tensor([4]), 24)
    for num_levels, [one] in enumerate(levels([start], [5], tree, table_draft(table), never), 1):
        assert one.tree.num_nodes == 1 + width * num_levels
        assert same(one.tree, one_tree(4, Tree(width, num_levels), 24, table))
    assert num_levels == 5
    assert list(levels([start], [0], tree, table_draft(table), never)) == []


def test_a_level_is_drafted_only_when_it_is_asked_for() -> None:
    real, asked = table_draft(random_table(3)), list[int]()

    def draft(growing: Sequence[PartialTree]) -> Tensor:
        asked.append(int(growing[0].tree.depths[growing[0].last.nodes[0]]))
        return real(growing)

    grown = levels([root_only(torch.tensor([4]), 16)], [6], Tree(2, 6), draft, never)
    assert asked == []
    next(grown)
    next(grown)
    assert asked == [0, 1]


def test_depths_and_parents_describe_one_tree() -> None:
    tree = one_tree(5, Tree(4, 6), 40, random_table(5))
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[node])
        assert tree.depths[node] == tree.depths[parent] + 1
        expected = tree.ancestors[parent].clone()
        expected[node] = True
        assert torch.equal(tree.ancestors[node], expected)


# ---- several together ---------------------------------------------------------------------------

ROOTS = [torch.tensor([token]) for token in (4, 0, 10, 7)]
TABLES = [random_table(seed) for seed in (1, 2, 3, 4)]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("depths", [(5, 5, 5, 5), (2, 5, 0, 1), (0, 0, 0, 3), (0, 0, 0, 0)])
def test_trees_that_grow_together_are_those_that_grow_alone(
    width: int, depths: tuple[int, ...]
) -> None:
    together = grow(ROOTS, depths, Tree(width, 5), 24, table_draft(*TABLES))
    for index, depth in enumerate(depths):
        [alone] = grow([ROOTS[index]], [depth], Tree(width, 5), 24, table_draft(TABLES[index]))
        assert same(together[index], alone)
        assert together[index].num_nodes == 1 + width * depth


def test_a_tree_that_ends_early_leaves_the_others_growing() -> None:
    flat, sharp = torch.zeros(V, V), 50 * torch.eye(V).roll(1, 1)
    rule, tables = Tree(2, 4, min_path_probability=0.1), (sharp, flat, sharp)
    together = grow(ROOTS[:3], [4, 4, 3], rule, 16, table_draft(*tables))
    # 2/11 after the first level, 2/121 after the second
    assert [tree.num_nodes for tree in together] == [1 + 2 * 4, 1 + 2 * 2, 1 + 2 * 3]
    for index, depth in enumerate((4, 4, 3)):
        [alone] = grow([ROOTS[index]], [depth], rule, 16, table_draft(tables[index]))
        assert same(together[index], alone)


def test_one_pass_drafts_a_level_of_all_trees_that_still_grow() -> None:
    real, asked = table_draft(*TABLES), list[list[int]]()

    def draft(growing: Sequence[PartialTree]) -> Tensor:
        asked.append([one.index for one in growing])
        return real(growing)

    grow(ROOTS, [1, 3, 0, 2], Tree(2, 5), 24, draft)
    assert asked == [[0, 1, 3], [1, 3], [1]]


def test_the_root_is_not_asked_whether_it_is_probable() -> None:
    """The first level is drafted whatever the threshold; it is the last one where it is below."""
    rule = Tree(1, 4, min_path_probability=1.0)
    assert one_tree(3, rule, 8, torch.zeros(V, V)).num_nodes == 2


def test_no_sequences_grow_no_trees() -> None:
    assert grow([], [], Tree(2, 5), 16, table_draft()) == []
