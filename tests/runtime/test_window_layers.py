"""Whole models whose layers with windows keep only those: answers are as if they kept all."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, converted, random_checkpoint
from families import config_of
from running import answer, generated

from subspec.artifacts import footprint
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Placement
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import int4
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams, Stats
from subspec.runtime.server.prefix_cache import PrefixCache

CASES = {
    "gemma3": {"case": "gemma3_text, as the hub has it", "num_hidden_layers": 3},
    "gemma4": {"case": "gemma4_text, keys are values in layers of other heads"},
    "mistral": {"case": "mistral, sliding window"},
}
TREES = {"gemma3": (2, 5), "gemma4": (1, 9), "mistral": (3, 3)}
CONTEXT = 512  # of which layers with windows of 20 tokens keep 128, and have room for 320
SEEDED = SamplingParams(temperature=0.8, top_k=0, top_p=0.95, seed=7)


@pytest.fixture(scope="module", autouse=True)
def short_texts() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "TOKENS_BEHIND_WINDOW", 8)
        yield


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 2040, (num_tokens,), generator=generator).tolist()


def checkpoint(case: str, folder: Path) -> Path:
    return random_checkpoint(folder, config_of(**CASES[case]))


def artifact_of(case: str, source: Path, folder: Path, **settings: Any) -> Artifact:
    width, depth = TREES[case]
    made = build_artifact(source, folder, width=width, depth=depth, context=CONTEXT, **settings)
    assert all(one.ledger.windows for one in made.plan.placements.values())
    return made


def keeping_all(artifact: Artifact) -> Artifact:
    """The same plan with memory for every token in every layer."""

    def whole(one: Placement) -> Placement:
        larger = one.ledger.cache + 2 * one.ledger.windows
        return replace(one, ledger=replace(one.ledger, windows=0, cache=larger))

    placements = {method: whole(one) for method, one in artifact.plan.placements.items()}
    return replace(artifact, plan=replace(artifact.plan, placements=placements))


@pytest.mark.parametrize("case", ["gemma3", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_f32_tokens_far_beyond_the_windows_equal_transformers(case: str, tmp_path: Path) -> None:
    import transformers

    folder = checkpoint(case, tmp_path / "checkpoint")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompt_of(384)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    artifact = artifact_of(case, folder, tmp_path / "artifact")
    for method in artifact.plan.placements:
        with Engine.open(artifact, OpenOptions(method)) as engine:
            sequence = engine.new_sequence()
            assert generated(sequence, prompt, GenerationParams(60)) == expected, method
            assert sequence.cache.windows is not None and sequence.cache.windows.base > 128


def bf16_artifact(case: str, folder: Path, **settings: Any) -> Artifact:
    source = converted(checkpoint(case, folder / "f32"), folder / "bf16", torch.bfloat16)
    return artifact_of(case, source, folder / "artifact", **settings)


@pytest.mark.parametrize(
    "case",
    ["gemma4", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gemma3", "mistral"))],
)
def test_turns_that_reuse_a_cache_say_what_fresh_ones_say(case: str, tmp_path: Path) -> None:
    """Of a bf16 draft in a batch: a next turn, the same prompt again, and a turn that was edited
    further back than the windows are kept."""
    artifact = bf16_artifact(case, tmp_path, num_sequences=2, resident_share=1.0)
    text, said, reused = prompt_of(350), list[tuple[list[int], int, list[int]]](), list[int]()
    with Engine.open(artifact) as engine:
        sequence, other = engine.new_sequence(), engine.new_sequence()
        other.begin(prompt_of(300, seed=5), GenerationParams(150))
        for kept, more, count in ((350, 0, 40), (390, 20, 60), (350, 0, 20), (90, 200, 30)):
            text = text[:kept] + prompt_of(more, seed=more)
            tokens = generated(sequence, text, GenerationParams(count, SEEDED))
            said.append((text, count, tokens))
            reused.append(sequence.stats.cached_tokens)
            text = text + tokens
    assert reused[1] >= 388 and reused[3] == 0
    with Engine.open(keeping_all(artifact), OpenOptions("plain")) as engine:
        assert engine.new_sequence().cache.windows is None
        for prompt, count, tokens in said:
            assert tokens == answer(engine, prompt, count, SEEDED)
    assert len(set(said[0][2])) > 3


def stats_of(artifact: Artifact, captured: bool) -> Stats:
    with Engine.open(artifact) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, SubstituteDrafter)
        if captured:
            drafter = replace(drafter, capture=lambda action: action)
        engine.model = replace(engine.model, drafter=drafter)
        sequence = engine.new_sequence()
        generated(sequence, prompt_of(350), GenerationParams(120))
        assert bool(drafter.captured) == captured
        return sequence.stats


@pytest.mark.skipif(int4.unavailable() is not None, reason="no compiler")
def test_a_compiled_draft_is_the_same_where_all_is_kept(tmp_path: Path) -> None:
    artifact = bf16_artifact("mistral", tmp_path, int4_kernel="w4a8", resident_share=1.0)
    few, every = stats_of(artifact, False), stats_of(keeping_all(artifact), False)
    assert few.accepted == every.accepted and few.drafted == every.drafted
    assert sum(few.accepted) > 10


def test_captured_levels_follow_windows_that_move(tmp_path: Path) -> None:
    """On a CPU a capture is the action itself, over tensors that stay where they are."""
    artifact = bf16_artifact("gemma3", tmp_path, resident_share=1.0)
    launched, captured = stats_of(artifact, False), stats_of(artifact, True)
    assert captured.accepted == launched.accepted and sum(captured.accepted) > 10


def test_idle_prefixes_come_back_with_their_windows(tmp_path: Path) -> None:
    artifact = bf16_artifact("gemma4", tmp_path, resident_share=1.0)
    prefixes, prompt = PrefixCache(64 << 20), prompt_of(350)
    with Engine.open(artifact) as engine:
        sequence = engine.new_sequence()
        text = [*prompt, *generated(sequence, prompt, GenerationParams(30, SEEDED))]
        held = sequence.cache.length
        prefixes.keep(sequence, 0)
        spec = artifact.spec
        whole = sum(footprint.kv_bytes(spec, one, held) for one in spec.attentions)
        assert 0 < prefixes.num_bytes < whole * 0.8
        generated(sequence, prompt_of(100, seed=3), GenerationParams(5))
        nothing = tuple(prompt[:100])
        assert prefixes.longest(nothing) == (None, 0)
        following = [*text, *prompt_of(20, seed=4)]
        prefix, count = prefixes.longest(tuple(following))
        assert prefix is not None and count == held
        prefixes.restore(prefix, count, sequence)
        got = generated(sequence, following, GenerationParams(30, SEEDED))
        assert sequence.stats.cached_tokens == held
        sequence.close()
        assert got == answer(engine, following, 30, SEEDED)
