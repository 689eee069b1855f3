"""Models with delta nets: their states follow the tokens whatever is drafted, cut, shared or taken
back. transformers' tokens, and drafts that change none: test_lossless.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, converted, random_checkpoint, replan
from families import config_of, family
from invariance import widths_here
from running import answer, generated
from torch import Tensor

from subspec.artifacts.footprint import CHECKPOINTS, TOKENS_BEHIND_CHECKPOINT, checkpoints_bytes
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method
from subspec.runtime import sequence as sequences
from subspec.runtime.draft.beam import root_only
from subspec.runtime.draft.delta_draft import run_draft
from subspec.runtime.draft.drafter import tree_nodes
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import whole_tree
from subspec.runtime.model import cache as caches
from subspec.runtime.model import net_state
from subspec.runtime.model.cache import Cache
from subspec.runtime.model.delta_net import DeltaInputs
from subspec.runtime.model.net_state import commit_nodes, run_tree, tensors_of
from subspec.runtime.model.paths import chain_paths
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.server.prefix_cache import PrefixCache

PROMPT = [3 + 7 * n % 2000 for n in range(100)]
OTHER = [5 + 11 * n % 1900 for n in range(70)]
CHAIN, TREE = {"width": 1, "depth": 7}, {"width": 3, "depth": 4}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(
    scope="module", params=["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("hybrid")
    config = config_of("qwen3_5_text")
    source = random_checkpoint(folder / "f32", config)
    if request.param == "bfloat16":
        source = converted(source, folder / "bf16", torch.bfloat16)
    settings: dict[str, Any] = {"num_sequences": 3, "context": 384}
    return build_artifact(source, folder / "artifact", **TREE, **settings)


def planned(artifact: Artifact, **settings: Any) -> Artifact:
    """Calls of all widths of a plan."""
    widths = widths_here(artifact.spec, "cpu", 15)
    settings = {"num_sequences": 3, "context": 384, "verify_widths": widths, **TREE, **settings}
    return replan(artifact, **settings)


def bits(cache: Cache) -> list[Tensor]:
    """What the cache holds of its tokens."""
    kept = [one[:, : cache.length].clone() for one in (*cache.keys, *cache.values)]
    states = [(net.committed.conv, net.committed.memory) for net in cache.nets]
    return kept + [one.clone() for state in states for one in state]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def read_alone(
    artifact: Artifact, tokens: list[int], prefill_chunk_tokens: int = 384
) -> list[Tensor]:
    plan = replace(artifact.plan, prefill_chunk_tokens=prefill_chunk_tokens)
    how = OpenOptions("plain")
    with Engine.open(replace(artifact, plan=plan), how) as engine, engine.new_sequence() as one:
        generated(one, tokens, GenerationParams(1))
        assert one.cache.length == len(tokens)
        return bits(one.cache)


def test_a_prompts_states_do_not_depend_on_its_pieces(artifact: Artifact) -> None:
    artifact = planned(artifact)
    expected = read_alone(artifact, [*PROMPT, *OTHER])
    for prefill_chunk_tokens in (16, 40, 152):
        assert equal(read_alone(artifact, [*PROMPT, *OTHER], prefill_chunk_tokens), expected)


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_what_answers_leave_is_what_reading_them_would_give(
    artifact: Artifact, shape: dict[str, int]
) -> None:
    artifact = planned(artifact, **shape)
    said = []
    for method in ("plain", "substitute"):
        with Engine.open(artifact, OpenOptions(method)) as engine:
            with engine.new_sequence() as sequence:
                said.append(generated(sequence, PROMPT, GenerationParams(40)))
                whole = [*PROMPT, *said[-1]]
                assert equal(bits(sequence.cache), read_alone(artifact, whole[:-1])), method
                again = [*whole, *OTHER]
                following = generated(sequence, again, GenerationParams(20))
                assert sequence.stats.cached_tokens == len(whole) - 1
            with engine.new_sequence() as fresh:
                assert generated(fresh, again, GenerationParams(20)) == following
    assert said[0] == said[1]


def test_a_round_that_is_cut_leaves_the_state_of_what_is_kept(artifact: Artifact) -> None:
    artifact = planned(artifact)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        whole = generated(sequence, PROMPT, GenerationParams(30))
        for count in (1, 2, 3, 5, 8):
            said = generated(sequence, PROMPT, GenerationParams(count))
            assert said == whole[:count]
            assert equal(bits(sequence.cache), read_alone(artifact, [*PROMPT, *said[:-1]]))


def test_several_turns_have_transformers_tokens(tmp_path: Path) -> None:
    import transformers

    values = family("qwen3_5_text", num_hidden_layers=4, full_attention_interval=2)
    config = transformers.AutoConfig.for_model(**values)
    folder = random_checkpoint(tmp_path / "model", config, seed=3)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    artifact = build_artifact(folder, tmp_path / "artifact", context=256, **TREE)
    text = PROMPT[:40]
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        for turn in range(3):
            expected = model.generate(
                torch.tensor([text]), max_new_tokens=16, do_sample=False, eos_token_id=None
            )[0, len(text) :].tolist()
            assert generated(sequence, text, GenerationParams(16)) == expected
            assert sequence.stats.cached_tokens == (len(text) - 21 if turn else 0)
            text = [*text, *expected, *OTHER[20 * turn : 20 * turn + 20]]


def test_states_go_back_to_checkpoints_bit_for_bit(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regenerated answer, an edited turn, one that goes far back, and one that keeps nothing."""
    for module in (sequences, caches):
        monkeypatch.setattr(module, "CHECKPOINT_TOKENS", 40)
    artifact = planned(artifact)
    params = GenerationParams(24)
    end = len(PROMPT) - TOKENS_BEHIND_CHECKPOINT
    edits = {
        "again": (PROMPT, end),
        "a longer one": ([*PROMPT, *OTHER], len(PROMPT) + 23),
        "its end is another": ([*PROMPT[:-4], 7, 8, 9], end),
        "edited": ([*PROMPT[:82], *OTHER], 80),
        "edited early": ([*PROMPT[:50], *OTHER], 40),
        "another": (OTHER, 0),
    }
    for name, (prompt, kept) in edits.items():
        with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
            said = generated(sequence, PROMPT, params)
            if name == "a longer one":
                prompt = [*PROMPT, *said, *OTHER]
            got = generated(sequence, prompt, params)
            assert sequence.stats.cached_tokens == kept, name
            kept_bits = bits(sequence.cache)
            with engine.new_sequence() as fresh:
                assert generated(fresh, prompt, params) == got, name
                assert equal(bits(fresh.cache), kept_bits), name


def test_checkpoints_are_few_and_those_of_a_long_text_lie_further_apart(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sequences, caches):
        monkeypatch.setattr(module, "CHECKPOINT_TOKENS", 16)
    artifact = planned(artifact)
    text = [3 + 13 * n % 1999 for n in range(340)]
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        for length in (60, 120, 180, 240, 300):
            generated(sequence, text[:length], GenerationParams(30))
            lengths = [one.length for one in sequence.cache.checkpoints]
            assert lengths == sorted(set(lengths)) and len(lengths) <= CHECKPOINTS
            assert len(lengths) + len(sequence.cache.unused) == CHECKPOINTS
        assert lengths[0] <= 150 and lengths[-1] >= 284
        assert max(b - a for a, b in zip([0, *lengths], lengths, strict=False)) <= 150
        held = [*sequence.cache.unused, *(one.states for one in sequence.cache.checkpoints)]
        tensors = [one for states in held for state in states for one in vars(state).values()]
        assert checkpoints_bytes(artifact.spec, 1) >= sum(one.nbytes for one in tensors)


def test_a_long_answer_leaves_the_checkpoint_at_the_end_of_its_prompt(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes more places of checkpoints than there is room for. Then it is asked for again, or a
    next turn has its end without what came before; and an answer that was cut off goes on."""
    for module in (sequences, caches):
        monkeypatch.setattr(module, "CHECKPOINT_TOKENS", 16)
    artifact = planned(artifact)
    end = len(PROMPT) - TOKENS_BEHIND_CHECKPOINT
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        said = generated(sequence, PROMPT, GenerationParams(120))
        late = sequence.cache.checkpoints[-1].length
        assert late >= len(PROMPT) + 120 - 16, "the last of the answer stays as well"
        for prompt, kept in (
            ([*PROMPT, *said[:-4], *OTHER[:9]], late),
            (PROMPT, end),
            (PROMPT, end),
            ([*PROMPT[:-3], *said[80:], *OTHER], end),
        ):
            got = generated(sequence, prompt, GenerationParams(90))
            assert sequence.stats.cached_tokens == kept
            with engine.new_sequence() as fresh:
                assert generated(fresh, prompt, GenerationParams(90)) == got
                assert equal(bits(fresh.cache), bits(sequence.cache))


def test_an_edited_question_is_read_from_the_end_of_the_answer_before_it(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after its own answer, which is a long one, and more than once."""
    for module in (sequences, caches):
        monkeypatch.setattr(module, "CHECKPOINT_TOKENS", 16)
    artifact = planned(artifact)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        said = generated(sequence, PROMPT, GenerationParams(30))
        before = [*PROMPT, *said]
        for prompt, kept in (
            ([*before, *OTHER], len(before) - 1),
            ([*before, *OTHER[:10], *PROMPT[:40]], len(before) - 1),
            ([*before, *OTHER[:10], *PROMPT[:40]], len(before) + 50 - TOKENS_BEHIND_CHECKPOINT),
            ([*before[:-1], *PROMPT[60:]], len(before) - 1),
        ):
            got = generated(sequence, prompt, GenerationParams(90))
            assert sequence.stats.cached_tokens == kept
            with engine.new_sequence() as fresh:
                assert generated(fresh, prompt, GenerationParams(90)) == got
                assert equal(bits(fresh.cache), bits(sequence.cache))


@pytest.mark.parametrize("method", ["plain", "substitute"])
def test_what_is_used_is_within_the_ledger(artifact: Artifact, method: Method) -> None:
    """Arenas, with the checkpoints of a CPU, and temporaries of prompts, rounds and drafts."""
    artifact = planned(artifact, verify_widths=None, context=384)
    with Engine.open(artifact, OpenOptions(method)) as engine:
        several = [engine.new_sequence() for _ in range(3)]
        for length, sequence in zip((300, 150, 200), several, strict=True):
            sequence.begin([3 + 7 * n % 2000 for n in range(length)], GenerationParams(20))
        while any(map(engine.is_active, several)):
            engine.step()
        ledger = engine.placement.ledger
        assert engine.peak.peak_bytes <= ledger.total_bytes
        assert engine.memory.arena_bytes == sum(
            size for purpose, size in ledger.arenas.items() if size
        )


def test_a_pass_that_fails_changes_no_state(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's, or a verification, in the middle of the layers."""
    artifact = planned(artifact)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        expected = generated(sequence, PROMPT, GenerationParams(20))
    real, calls = net_state.delta_net, 0

    def failing(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (2, 6, 12, 17):
            raise RuntimeError("a disk is gone")
        return real(*given)

    monkeypatch.setattr(net_state, "delta_net", failing)
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        sequence.begin(PROMPT, GenerationParams(20))
        problems = 0
        while engine.is_active(sequence):
            try:
                engine.step()
            except RuntimeError:
                problems += 1
        assert sequence.take_new_tokens() == expected and problems == 4


@pytest.mark.parametrize("work", ["copy_state", "commit_nodes"], ids=["a prompt", "a round"])
def test_a_commit_that_fails_ends_its_answer_and_leaves_nothing_to_go_on_from(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """The states of one delta net have been moved on then, and those of the others not."""
    artifact = planned(artifact)
    real, calls = getattr(caches, work), 0

    def failing(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        real(*given)

    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        sequence.begin(PROMPT, GenerationParams(20))
        said = list[int]()
        with monkeypatch.context() as broken, pytest.raises(MemoryError):
            broken.setattr(caches, work, failing)
            while engine.is_active(sequence):
                engine.step()
                said += sequence.take_new_tokens()
        assert not engine.is_active(sequence) and sequence.finish_reason is None
        again = [*PROMPT, *said]
        generated(sequence, again, GenerationParams(1))
        assert equal(bits(sequence.cache), read_alone(artifact, again))


@pytest.mark.parametrize("method", ["plain", "substitute"])
def test_sequences_together_get_the_tokens_that_they_get_alone(
    artifact: Artifact, method: str
) -> None:
    artifact = planned(artifact)
    how, prompts = SamplingParams(0.8, seed=5), [PROMPT, OTHER, [*OTHER[30:], *PROMPT]]
    with Engine.open(artifact, OpenOptions("plain")) as engine:
        alone = [answer(engine, prompt, 32, how) for prompt in prompts]
    with Engine.open(artifact, OpenOptions(method)) as engine:
        several = [engine.new_sequence() for _ in prompts]
        for sequence, prompt in zip(several, prompts, strict=True):
            sequence.begin(prompt, GenerationParams(32, how))
            engine.step()
        while any(map(engine.is_active, several)):
            engine.step()
        assert [sequence.take_new_tokens() for sequence in several] == alone
        for sequence, prompt, said in zip(several, prompts, alone, strict=True):
            expected = read_alone(artifact, [*prompt, *said[:-1]])
            assert equal(bits(sequence.cache), expected)


def test_the_fastest_plain_decoding_moves_the_states_on(artifact: Artifact) -> None:
    """Its bits are others; what it read as a prompt is reused."""
    how = OpenOptions("plain", padded=False)
    with Engine.open(planned(artifact), how) as engine, engine.new_sequence() as sequence:
        whole = [*PROMPT, *generated(sequence, PROMPT, GenerationParams(20))]
        before = bits(sequence.cache)
        again = generated(sequence, [*whole, 9], GenerationParams(20))
        assert sequence.stats.cached_tokens == len(PROMPT) - TOKENS_BEHIND_CHECKPOINT
        with engine.new_sequence() as fresh:
            assert generated(fresh, [*whole, 9], GenerationParams(20)) == again
    expected = read_alone(planned(artifact), whole[:-1])
    for mine, theirs in zip(before, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.1, atol=0.05)


def check_restored(engine: Engine, store: PrefixCache, prompt: list[int], usable: int) -> None:
    """A sequence continues from `usable` restored tokens with the bits of one that reads all."""
    prefix, count = store.longest(tuple(prompt[:-1]))
    assert prefix is not None and count == usable
    with engine.new_sequence() as other, engine.new_sequence() as fresh:
        generated(other, OTHER, GenerationParams(9))
        store.restore(prefix, count, other)
        got = generated(other, prompt, GenerationParams(20))
        assert other.stats.cached_tokens == usable
        assert generated(fresh, prompt, GenerationParams(20)) == got
        assert equal(bits(other.cache), bits(fresh.cache))


def test_the_server_brings_states_back_from_host_memory(artifact: Artifact) -> None:
    """All of a conversation, or without the thinking of its answer, or as far as it is shared."""
    with Engine.open(planned(artifact)) as engine:
        store = PrefixCache(1 << 30)
        with engine.new_sequence() as sequence:
            said = generated(sequence, PROMPT, GenerationParams(24))
            store.keep(sequence, 0)
            assert store.num_bytes > sum(one.nbytes for one in bits(sequence.cache))
        end = len(PROMPT) - TOKENS_BEHIND_CHECKPOINT
        for prompt, usable in (
            ([*PROMPT, *said, *OTHER], len(PROMPT) + 23),
            ([*PROMPT[:-2], *OTHER], end),
            (PROMPT, end),
        ):
            check_restored(engine, store, prompt, usable)
        assert store.longest(tuple(OTHER)) == (None, 0)


def test_the_server_keeps_where_a_long_answers_prompt_ended_and_the_turns_before_it(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer prefix takes the place of the shorter one, and reaches back as far; where there is
    little room the ends of prompts and answers are kept, and then the last one alone."""
    for module in (sequences, caches):
        monkeypatch.setattr(module, "CHECKPOINT_TOKENS", 32)
    with Engine.open(planned(artifact)) as engine:
        store = PrefixCache(1 << 30)
        with engine.new_sequence() as sequence:
            first = [*PROMPT, *generated(sequence, PROMPT, GenerationParams(40))]
            store.keep(sequence, 0)
            second = [*first, *OTHER]
            said = generated(sequence, second, GenerationParams(100))
            store.keep(sequence, 0)
            [prefix] = store._prefixes.values()
            assert len(prefix.checkpoints) == CHECKPOINTS
            kept = [len(first) - 1, len(second) - TOKENS_BEHIND_CHECKPOINT, len(prefix.tokens)]
            each = checkpoints_bytes(artifact.spec, 1) // CHECKPOINTS
            for missing, lengths in ((2, kept), (3, kept[1:]), (4, kept[2:])):
                tight = PrefixCache(store.num_bytes - missing * each + each // 2)
                tight.keep(sequence, 0)
                [small] = tight._prefixes.values()
                assert [one.length for one in small.checkpoints] == lengths
                assert small.num_bytes == tight.num_bytes
        for prompt, usable in (
            ([*second[:-3], *said[60:], *OTHER], kept[1]),
            (second, kept[1]),
            ([*first[:-1], *PROMPT[40:]], kept[0]),
        ):
            check_restored(engine, store, prompt, usable)


def test_no_other_conversation_goes_for_the_more_checkpoints_of_one(artifact: Artifact) -> None:
    text = [3 + 13 * n % 1999 for n in range(300)]
    with Engine.open(planned(artifact)) as engine, engine.new_sequence() as sequence:
        for length in (60, 120, 180, 240, 300):
            generated(sequence, text[:length], GenerationParams(1))
        large = PrefixCache(1 << 30)
        large.keep(sequence, 0)
        small = PrefixCache(1 << 30)
        other = engine.new_sequence()
        generated(other, OTHER, GenerationParams(40))
        small.keep(other, 0)
        store = PrefixCache(small.num_bytes + large.num_bytes - 1)
        store.keep(other, 0)
        store.keep(sequence, 0)
        assert [len(one.checkpoints) for one in store._prefixes.values()][1:] == [CHECKPOINTS - 1]


def test_a_draft_attends_to_what_the_rule_remembers(artifact: Artifact) -> None:
    """Level after level, to the rule's results in another order of sums; and what `commit` replays
    is what verification has kept."""
    with Engine.open(artifact) as engine, engine.new_sequence() as sequence:
        generated(sequence, PROMPT, GenerationParams(20))
        cache, [net, *_] = sequence.cache, sequence.cache.nets
        generator = torch.Generator().manual_seed(0)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like.dtype)

        tree = root_only(torch.tensor([5]), artifact.plan.verify_width)
        parents = torch.tensor([0, 0, 0, 0, 1, 1, 3, 4, 4, 6, 7, 7, 9])
        count = len(parents)
        tree.parents[:count] = parents
        for node, parent in enumerate(parents.tolist()):
            tree.ancestors[node] = tree.ancestors[parent] if node else False
            tree.ancestors[node, node] = True
        tree = replace(tree, num_nodes=count)
        inputs = DeltaInputs(*(noise(one) for one in tensors_of(net.nodes)))
        z = noise(torch.empty(len(tree.parents), net.updates.shape[0] * net.updates.shape[2]))
        z = z.to(inputs.qkv.dtype)
        exact, drafted = z.clone(), z.clone()
        before = net.committed.memory.clone()
        rows = whole_tree(tree, cache)
        assert rows.tree is not None
        run_tree(net, inputs, exact, rows.tree)
        for level in ([0], [1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]):
            nodes = torch.tensor(level)
            some = DeltaInputs(*(one[nodes] for one in tensors_of(inputs)))
            out = z[nodes]
            run_draft(net, some, out, tree_nodes(tree, nodes, cache.conv_kernel_size))
            drafted[nodes] = out
        close = {"rtol": 0.02, "atol": 0.02} if z.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(drafted[:count], exact[:count], **close)
        chain = torch.tensor([1, 2, 3, 4, 7, 10])  # one level, and then a node below the other
        out = z[chain]
        placed = replace(tree_nodes(tree, chain, cache.conv_kernel_size), num_together=3)
        some = DeltaInputs(*(one[chain] for one in tensors_of(inputs)))
        run_draft(net, some, out, placed)
        torch.testing.assert_close(out, drafted[chain])
        assert torch.equal(net.committed.memory, before)
        commit_nodes(net, torch.tensor([0, 3, 6, 9]), chain_paths(4, cache.conv_kernel_size))
        assert not torch.equal(net.committed.memory, before)
