"""Captured levels against the plain twin. On a CPU a capture is the action itself: what is tested
is that replaying it, on tensors that stay where they are, grows the same trees."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import build_artifact, replan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import DrafterName, Tree
from subspec.planner.model.hub import DEMO
from subspec.runtime.draft import beam
from subspec.runtime.draft.beam import DraftPass, PartialTree, TokenTree
from subspec.runtime.draft.drafter import SubstituteDrafter, tree_rows
from subspec.runtime.draft.graphs import Action, DraftGraphs, PassesOver, make_graphs, rounded_up
from subspec.runtime.draft.graphs import grow as grow_all
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.model.attention import attend
from subspec.runtime.model.cache import Cache, TreeSlots
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.verify import accept

CPU = torch.device("cpu")
V, W = 11, 24
LOOKING_UP: tuple[DrafterName, ...] = ("substitute", "substitute+lookup")


def graphs_of(tree: Tree, num_sequences: int = 1) -> DraftGraphs:
    return make_graphs(tree, W, num_sequences, CPU, capture=lambda action: action)


def grow(
    graphs: DraftGraphs, root: Tensor, depth: int, cache: Cache, passes: PassesOver
) -> TokenTree:
    """Of one sequence."""
    [grown] = grow_all(graphs, [root], [depth], [cache], passes)
    return grown


def cache_of(length: int, slots: int = 2048) -> Cache:
    return Cache((torch.zeros(1, slots, 1),), (torch.zeros(1, slots, 1),), tokens=[0] * length)


def lengths_count(behind: Sequence[TreeSlots]) -> DraftPass:
    """Logits of the node's token and depth, and of how many tokens are committed."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(6)) * 3

    def run(growing: Sequence[PartialTree]) -> Tensor:
        rows = []
        for one in growing:
            tree, nodes = one.tree, one.last.nodes
            shift = behind[one.index].length + tree.depths[nodes]
            rows.append(table[(tree.tokens[nodes] + shift) % V])
        return torch.cat(rows)

    return run


def plainly(tree: Tree, root: Tensor, depth: int, cache: Cache) -> TokenTree:
    """By the plain twin."""
    [grown] = all_plainly(tree, [root], [depth], [cache])
    return grown


def all_plainly(
    tree: Tree, roots: Sequence[Tensor], depths: Sequence[int], caches: Sequence[Cache]
) -> list[TokenTree]:
    slots = [cache.tree_slots(W) for cache in caches]
    return beam.grow(roots, depths, tree, W, lengths_count(slots))


def same(got: TokenTree, expected: TokenTree) -> bool:
    nodes = slice(got.num_nodes)
    pairs = [
        (got.tokens, expected.tokens),
        (got.parents, expected.parents),
        (got.depths, expected.depths),
        (got.ancestors, expected.ancestors),
    ]
    assert got.num_nodes == expected.num_nodes
    return all(torch.equal(one[nodes], other[nodes]) for one, other in pairs)


@pytest.mark.parametrize("width", [1, 4])
def test_replayed_levels_are_those_of_the_plain_twin(width: int) -> None:
    tree = Tree(width, 5, temperature=0.5)
    graphs = graphs_of(tree)
    for turn, (length, depth) in enumerate([(3, 5), (9, 5), (14, 2), (15, 0), (20, 4), (500, 5)]):
        cache, root = cache_of(length), torch.tensor([turn])
        expected = plainly(tree, root, depth, cache)
        assert same(grow(graphs, root, depth, cache, lengths_count), expected)
    assert list(graphs.replays) == [64, 640] and graphs.problem is None


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("min_path_probability", [0.4, 0.6, 0.8])
def test_a_draft_that_ends_early_ends_where_the_plain_twin_does(
    width: int, min_path_probability: float
) -> None:
    tree, shapes = Tree(width, 5, 1.0 if width == 1 else 2.0, min_path_probability), set[int]()
    graphs = graphs_of(tree)
    for turn in range(60):
        length, depth = 3 + 5 * turn, turn % 7 and 5
        cache, root = cache_of(length), torch.tensor([turn % V])
        expected = plainly(tree, root, depth, cache)
        assert same(grow(graphs, root, depth, cache, lengths_count), expected)
        shapes.add((expected.num_nodes - 1) // width)
    assert len(graphs.replays) < 10 and graphs.problem is None
    assert len(shapes - {0, 5}) > 1, "trees of one depth prove little"


@pytest.mark.parametrize("min_path_probability", [0.0, 0.6])
def test_replayed_levels_of_several_sequences_are_those_of_the_plain_twin(
    min_path_probability: float,
) -> None:
    """Of other lengths and depths, and with other ends."""
    tree, ends = Tree(2, 5, 2.0, min_path_probability), set[tuple[int, ...]]()
    graphs = graphs_of(tree, num_sequences=3)
    for turn in range(40):
        caches = [cache_of(length) for length in (3 + turn, 90 - turn, 40 + turn % 7)]
        roots = [torch.tensor([(turn + index) % V]) for index in range(3)]
        depths = [5, turn % 6, 5 if turn % 4 else 3]
        expected = all_plainly(tree, roots, depths, caches)
        grown = grow_all(graphs, roots, depths, caches, lengths_count)
        assert all(same(*pair) for pair in zip(grown, expected, strict=True))
        ends.add(tuple(one.num_levels for one in expected))
    assert len(graphs.replays) == 1 and graphs.problem is None
    assert len(ends) > 5, "trees of one depth prove little"


def test_a_replayed_draft_runs_no_level_that_it_does_not_keep() -> None:
    ran = list[int]()

    def passes(behind: Sequence[TreeSlots]) -> DraftPass:
        real = lengths_count(behind)

        def run(growing: Sequence[PartialTree]) -> Tensor:
            ran.append(int(growing[0].tree.depths[growing[0].last.nodes[0]]))
            return real(growing)

        return run

    graphs = graphs_of(Tree(2, 5, 0.5, 0.5))
    for turn in range(40):
        ran.clear()
        grown = grow(graphs, torch.tensor([turn % V]), 5, cache_of(3 + turn % 20), passes)
        if turn:  # the first round captures
            assert ran == [*range((grown.num_nodes - 1) // 2)]


def test_the_first_round_of_a_length_is_not_replayed() -> None:
    """It builds the kernels that a capture would otherwise have to build."""
    captured: list[object] = []

    def capture(action):  # type: ignore[no-untyped-def]
        captured.append(action)
        return action

    graphs = make_graphs(Tree(2, 3), W, 1, CPU, capture)
    grow(graphs, torch.tensor([1]), 3, cache_of(5), lengths_count)
    assert len(captured) == 2 and list(graphs.replays) == [64]
    grow(graphs, torch.tensor([1]), 3, cache_of(6), lengths_count)
    assert len(captured) == 2


def test_only_what_has_run_is_captured() -> None:
    """A first level has one row, the others have more: other kernels."""
    captured: list[object] = []

    def capture(action):  # type: ignore[no-untyped-def]
        captured.append(action)
        return action

    graphs = make_graphs(Tree(2, 3), W, 1, CPU, capture)
    for depth, expected in ((0, 0), (1, 0), (2, 2)):
        grow(graphs, torch.tensor([1]), depth, cache_of(5), lengths_count)
        assert len(captured) == expected
    flat = make_graphs(Tree(2, 1), W, 1, CPU, capture)
    for _ in range(2):  # the second time it is replayed
        grown = grow(flat, torch.tensor([1]), 1, cache_of(5), lengths_count)
        assert grown.num_nodes == 3 and len(captured) == 3


def test_where_a_capture_fails_levels_go_on_kernel_by_kernel() -> None:
    tries: list[object] = []

    def capture(action):  # type: ignore[no-untyped-def]
        tries.append(action)
        raise RuntimeError("CUDA error: operation not permitted\nCompile with X")

    graphs = make_graphs(Tree(2, 3), W, 1, CPU, capture)
    for length in (5, 6, 700):
        cache, root = cache_of(length), torch.tensor([length % V])
        expected = plainly(Tree(2, 3), root, 3, cache)
        assert same(grow(graphs, root, 3, cache, lengths_count), expected)
    assert len(tries) == 1
    assert graphs.problem == "CUDA graphs cannot be captured: CUDA error: operation not permitted"


def test_live_slots_are_rounded_up_to_few_numbers_and_by_a_quarter_at_most() -> None:
    every = {live: rounded_up(live) for live in range(64, 32769, 64)}
    assert all(live <= up <= max(1.25 * live, live + 63) for live, up in every.items())
    assert len(set(every.values())) <= 32
    assert [rounded_up(live) for live in (64, 65, 512, 576, 1088)] == [64, 128, 512, 640, 1280]


class Operations(TorchDispatchMode):
    """Names of what runs while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


# A number read back, a number brought to the device, numbers of a list: a capture fails at each,
# and outside of one each waits for the GPU.
WAIT = {"_local_scalar_dense.default", "where.ScalarOther", "where.ScalarSelf", "where.Scalar",
        "lift_fresh.default", "nonzero.default", "masked_select.default"}  # fmt: skip


@pytest.mark.parametrize("width", [1, 3])
def test_a_level_its_rows_and_acceptance_wait_for_nothing(width: int) -> None:
    cache, root = cache_of(70), torch.tensor([3])
    rows = []

    def passes(behind: Sequence[TreeSlots]) -> DraftPass:
        def run(growing: Sequence[PartialTree]) -> Tensor:
            nodes = growing[0].last.nodes
            rows.append(tree_rows(growing[0].tree, nodes, cache, behind[0], attend))
            return logits[nodes]

        return run

    logits = torch.randn(W, V, generator=torch.Generator().manual_seed(1))
    graphs, choices = graphs_of(Tree(width, 4)), logits.argmax(-1)
    grow(graphs, root, 4, cache, passes)
    first, following = graphs.replays[128]
    with Operations() as seen:
        first()
        following()
        verification = accept(replace(graphs.buffers[0].grown, num_nodes=1 + 2 * width), choices, 4)
    assert seen.names & {"topk.default", "index_put_.default", "masked_fill_.Scalar"}
    assert not seen.names & WAIT, "see the comment above"
    assert len(verification.tokens()) >= 1 and len(rows) > 4


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_artifact(DEMO, tmp_path_factory.mktemp("graphs") / "artifact", context=512)


@pytest.mark.parametrize("shape", [(1, 8, 0.0), (4, 5, 0.0), (3, 8, 0.9)], ids=str)
def test_an_answer_is_the_same_with_and_without_graphs(
    shape: tuple[int, int, float], artifact: Artifact
) -> None:
    width, depth, min_path_probability = shape
    chosen = replan(
        artifact, width=width, depth=depth, context=512, min_path_probability=min_path_probability
    )
    said, accepted = [], []
    for captured in (False, True):
        with Engine.open(chosen) as engine, engine.new_sequence() as sequence:
            drafter = engine.model.drafter
            assert isinstance(drafter, SubstituteDrafter)
            if captured:
                drafter = replace(drafter, capture=lambda action: action)
                engine.model = replace(engine.model, drafter=drafter)
            rounds = sequence.generate([*range(40, 60)], GenerationParams(150))
            said.append([token for some in rounds for token in some])
            accepted.append((sequence.stats.accepted, sequence.stats.drafted_levels))
            if captured:
                [graphs] = drafter.captured.values()
                assert len(graphs.replays) > 1, "the answer outgrew the first live slots"
    assert said[0] == said[1] and accepted[0] == accepted[1]


def test_each_company_has_graphs_of_its_own(artifact: Artifact) -> None:
    """As many sequences in all of them as the plan has."""
    prompts = [[*range(40, 60)], [*range(90, 120)], [*range(60, 72)]]
    sizes = (10, 60, 30)
    chosen = replan(artifact, width=2, depth=4, num_sequences=3)
    said: list[list[list[int]]] = []
    for together in (False, True):
        with Engine.open(chosen) as engine:
            drafter = engine.model.drafter
            assert isinstance(drafter, SubstituteDrafter)
            drafter = replace(drafter, capture=lambda action: action)
            engine.model = replace(engine.model, drafter=drafter)
            sequences = [engine.new_sequence() for _ in prompts]
            answers: list[list[int]] = [[] for _ in prompts]
            if not together:
                for index, sequence in enumerate(sequences):
                    for some in sequence.generate(prompts[index], GenerationParams(60)):
                        answers[index] += some
                assert list(drafter.captured) == [(sequence.cache,) for sequence in sequences]
            else:
                for sequence, prompt, size in zip(sequences, prompts, sizes, strict=True):
                    sequence.begin(prompt, GenerationParams(size))
                companies = list[tuple[Cache, ...]]()
                while any(sequence.finish_reason is None for sequence in sequences):
                    engine.step()
                    companies += [one for one in drafter.captured if one not in companies]
                    assert sum(map(len, drafter.captured)) <= 3
                assert [len(one) for one in companies] == [3, 2, 1]
                assert all(one.replays for one in drafter.captured.values())
                answers = [sequence.take_new_tokens() for sequence in sequences]
            said.append(answers)
    assert [alone[:size] for alone, size in zip(said[0], sizes, strict=True)] == said[1]


def test_levels_are_replayed_where_the_text_repeats_nothing(artifact: Artifact) -> None:
    chosen, replayed = replan(artifact, width=2, depth=4), list[bool]()

    def capture(action: Action) -> Action:
        def replay() -> None:
            replayed.append(True)
            action()

        return replay

    said, rounds = [], set[tuple[bool, bool]]()
    for name in LOOKING_UP:
        with Engine.open(chosen, OpenOptions(drafter=name)) as engine:
            drafter = engine.model.drafter
            assert isinstance(drafter, SubstituteDrafter)
            engine.model = replace(engine.model, drafter=replace(drafter, capture=capture))
            with engine.new_sequence() as sequence:
                answer = []
                for some in sequence.generate([*range(40, 60)], GenerationParams(120)):
                    answer += some
                    if name != "substitute" and sequence.stats.proposed:
                        rounds.add((bool(replayed), sequence.stats.proposed[-1] > 0))
                    replayed.clear()
        said.append(answer)
    assert said[0] == said[1]
    assert (True, False) in rounds and (False, True) in rounds and (True, True) not in rounds


def test_graphs_are_for_gpus(artifact: Artifact) -> None:
    with Engine.open(artifact) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        assert drafter.capture is None and engine.missing_graphs_reason is None


def test_why_levels_are_not_captured_is_told(artifact: Artifact) -> None:
    def refuse(action: object) -> Any:
        raise RuntimeError("CUDA error: no memory")

    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        engine.model = replace(engine.model, drafter=replace(drafter, capture=refuse))
        list(sequence.generate([*range(40, 60)], GenerationParams(20)))
        assert (
            engine.missing_graphs_reason == "CUDA graphs cannot be captured: CUDA error: no memory"
        )
