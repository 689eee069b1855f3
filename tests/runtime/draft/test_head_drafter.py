"""Drafting with a draft head: what is emitted is what plain decoding emits, whoever drafts."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from builders import build_artifact
from heads import defined, head_checkpoints
from running import generated
from safetensors.torch import load_file

from subspec.artifacts.format.checks import HEAD_FILE
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Tree
from subspec.runtime.draft import hierarchical
from subspec.runtime.draft.beam import Level, PartialTree, root_only
from subspec.runtime.draft.draft_head import logits_from, read_from
from subspec.runtime.draft.drafter import DecodeState
from subspec.runtime.draft.head_drafter import HeadDrafter
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import causal_rows
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.model.attention import attend_batch_invariant
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.model.transformer import embed, forward_hidden
from subspec.runtime.sequence import GenerationParams

PLAIN = OpenOptions("plain")
LAYOUTS = "mtp", "eagle", "eagle3"
CASES = [(layout, dtype) for layout in LAYOUTS for dtype in ("bfloat16", "float32")]
GREEDY, SEEDED = SamplingParams(), SamplingParams(temperature=0.7, top_k=0, top_p=0.95, seed=5)
PROMPTS = [list(range(3, 40)), list(range(900, 1040))]
NUM_TOKENS = 14


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    layout, dtype = request.param
    folder = tmp_path_factory.mktemp(layout)
    source, head = head_checkpoints(layout, folder, getattr(torch, dtype), foreseen=True)
    return build_artifact(
        source, folder / "artifact", "residual", draft_head=head, width=2, depth=4, context=320,
        resident_share=0.3, num_sequences=3, drafts_with_head=True,
    )  # fmt: skip


def drafting(artifact: Artifact) -> OpenOptions:
    """By its head."""
    assert artifact.spec.draft_head is not None
    return OpenOptions(drafter=artifact.spec.draft_head.layout)


def turns_of(engine: Engine) -> list[list[int]]:
    """Three answers of one sequence: to a prompt, to what it said and more, and to another prompt
    with the same beginning."""
    with engine.new_sequence() as sequence:
        params = GenerationParams(NUM_TOKENS)
        first = generated(sequence, PROMPTS[0], params)
        second = generated(sequence, [*PROMPTS[0], *first, 5, 6, 7], params)
        return [first, second, generated(sequence, [*PROMPTS[0], *first[:9], 400, 401], params)]


def test_tokens_are_those_of_plain_decoding_alone_in_company_and_after_roll_back(
    artifact: Artifact,
) -> None:
    answers, accepted = [], 0
    for options in (PLAIN, drafting(artifact)):
        with Engine.open(artifact, options) as engine, ExitStack() as stack:
            found = turns_of(engine)
            both = [stack.enter_context(engine.new_sequence()) for _ in PROMPTS]
            for sequence, prompt, sampling in zip(both, PROMPTS, (GREEDY, SEEDED), strict=True):
                sequence.begin(prompt, GenerationParams(NUM_TOKENS, sampling))
            while engine.step():
                pass
            found += [sequence.take_new_tokens() for sequence in both]
            accepted = sum(sum(sequence.stats.accepted) for sequence in both)
            answers.append(found)
            assert engine.peak.peak_bytes <= engine.plan.budget_bytes
            if options != PLAIN:
                unused = [len(engine.memory._free[name]) for name in ("drafter", "drafter_cache")]
                assert unused == [0, 0]
    assert answers[0] == answers[1]
    assert answers[1][0] == answers[1][-2], "the same prompt, alone and in a batch"
    assert accepted > 4


def test_a_draft_is_that_of_a_head_that_reads_the_whole_text_anew(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was read in pieces, accepted, rolled back and said before."""
    if artifact.spec.dtype != "float32":
        pytest.skip("compared with plain arithmetic")
    seen = list[tuple[list[int], list[int]]]()
    with Engine.open(artifact, drafting(artifact)) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, HeadDrafter)
        real = HeadDrafter.draft

        def watched(self: HeadDrafter, states: Sequence[DecodeState]) -> object:
            trees = real(self, states)
            for state, tree in zip(states, trees, strict=True):
                if tree.num_levels:
                    text = [*state.cache.tokens, state.root]
                    seen.append((text, sorted(tree.tokens[1:3].tolist())))
            return trees

        monkeypatch.setattr(HeadDrafter, "draft", watched)
        turns_of(engine)
        with engine.new_sequence() as sequence, torch.inference_mode():
            for text, drafted in seen[::3]:
                assert best_two(engine, sequence.cache, text) == drafted
    assert len(seen) > 8


def best_two(engine: Engine, cache: Cache, text: list[int]) -> list[int]:
    """By the definition of the head, from the exact model's hidden states."""
    model, spec = engine.model, engine.artifact.spec
    cache.roll_back(0)
    rows = causal_rows(cache, torch.tensor(text[:-1]), attend_batch_invariant)
    reads, calls = spec.eagle3.reads if spec.eagle3 else (), gemm_ranges([len(text) - 1])
    _, x = forward_hidden(model.weights, model.exact, [rows], calls, reads=reads)
    assert model.head is not None
    hidden, embedded = read_from(model.head, x), embed(model.weights, torch.tensor(text[1:]))
    last = defined(spec, load_file(engine.artifact.path / HEAD_FILE), embedded, hidden)[-1:]
    assert isinstance(model.drafter, HeadDrafter)
    logits = logits_from(model.head, model.drafter.substitutes.head, last.float())
    return sorted(logits[0].float().topk(2).indices.tolist())


def test_a_proposed_chain_is_what_the_head_drafts_alone_whatever_was_proposed_before(
    artifact: Artifact,
) -> None:
    """As far as it is probable, and behind other tokens as if it had said them."""
    lengths = list[int]()
    with Engine.open(artifact, drafting(artifact)) as engine, torch.inference_mode():
        drafter = engine.model.drafter
        assert isinstance(drafter, HeadDrafter)
        with engine.new_sequence() as sequence:
            for _ in sequence.generate(PROMPTS[0], GenerationParams(NUM_TOKENS)):
                states = [replace(sequence.state, max_tokens=9)]
                [alone] = replace(drafter, trees=(Tree(1, 4),)).draft(states)
                drafted = alone.tokens[1:5].tolist()
                propose = drafter.proposals(states)
                [found] = propose([behind(states[0], drafter, [])], [4])
                assert found == drafted[: len(found)]
                lengths.append(len(found))
                for path in (drafted[:2], [*drafted[:1], 9, 11], [12]):
                    one = behind(states[0], drafter, path)
                    assert propose([one], [2]) == drafter.proposals(states)([one], [2])
    assert max(lengths) > 2


def behind(state: DecodeState, drafter: HeadDrafter, path: list[int]) -> PartialTree:
    """A tree whose last level ends a chain of these tokens."""
    root = torch.tensor([state.root])
    start = PartialTree(0, root_only(root, drafter.verify_width), Level.of_root(root.device))
    one = hierarchical.with_guess(start, path, width=1)
    return replace(one, last=Level(one.last.nodes[-1:], one.last.scores))
