"""What one stream of the exact weights takes: trees that share calls of batch-invariant widths."""

import pytest
import torch
from builders import make_plan
from toys import make_spec

from subspec.artifacts.plan import Plan
from subspec.planner.solve.storage import raw_storage
from subspec.runtime.draft.beam import TokenTree, root_only
from subspec.runtime.exact_pass import pad_trees


def plan_of(*widths: int) -> Plan:
    return make_plan(make_spec(), storage=raw_storage(make_spec()), verify_widths=widths)


def drafts(plan: Plan, *num_nodes: int) -> list[TokenTree]:
    root = torch.tensor([3])
    trees = [root_only(root, plan.verify_width) for _ in num_nodes]
    for tree, count in zip(trees, num_nodes, strict=True):
        object.__setattr__(tree, "num_nodes", count)
    return trees


@pytest.mark.parametrize(
    ("num_nodes", "calls", "rows"),
    [
        ((1,), (4,), [4]),
        ((5,), (8,), [8]),
        ((3, 4), (8,), [4, 4]),
        ((3, 6), (16,), [10, 6]),
        ((16, 16), (16, 16), [16, 16]),
        ((16, 3), (16, 4), [16, 4]),
        ((9, 9, 9), (16, 16), [14, 9, 9]),
    ],
)
def test_trees_share_the_calls_of_one_verification(
    num_nodes: tuple[int, ...], calls: tuple[int, ...], rows: list[int]
) -> None:
    plan = plan_of(4, 8, 16)
    trees, got = pad_trees(plan, drafts(plan, *num_nodes))
    assert tuple(got) == calls and [len(tree.tokens) for tree in trees] == rows
    assert [tree.num_nodes for tree in trees] == list(num_nodes)


def test_what_has_no_room_for_fuller_calls_is_verified_tree_by_tree() -> None:
    plan = plan_of(5, 7, 100)
    some = [root_only(torch.tensor([3]), 5), root_only(torch.tensor([4]), 5)]
    some = [TokenTree(t.tokens, t.parents, t.ancestors, t.depths, 4) for t in some]
    trees, calls = pad_trees(plan, some)
    assert calls == [5, 5] and [len(tree.tokens) for tree in trees] == [5, 5]
