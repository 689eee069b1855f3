"""A draft model never changes the answer, keeps up with its texts, and fits its ledger."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, converted, random_checkpoint, replan
from families import SIZES, config_of
from invariance import widths_here
from running import answer, generated

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.footprint import CATCH_UP_ROWS
from subspec.artifacts.format.store import DRAFT_MODEL, Artifact, open_artifact, verify
from subspec.artifacts.model import Source
from subspec.artifacts.plan import WITH_DRAFT_MODEL, BatchDraft, Method, Tree
from subspec.planner.model.hub import DEMO, Resolved
from subspec.planner.planning import DraftModelRef
from subspec.runtime.draft.draft_model import DraftModel, DraftModelDrafter
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import int4
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

KERNEL = "aten" if int4.unavailable() else "w4a8"
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
NUM_TOKENS = 14


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def small_checkpoint(folder: Path, **changes: object) -> Path:
    """A random model with the demo's tokenizer: its drafts are hardly ever accepted."""
    import transformers

    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = transformers.AutoConfig.for_model("qwen3", **{**sizes, **heads, **changes})
    return random_checkpoint(folder, config)


def as_drafting(folder: Path, quantized: bool = True) -> DraftModelRef:
    return DraftModelRef(Resolved(folder, Source("test/small")), quantized)


@pytest.fixture(scope="module", params=["itself, bf16", "a random one, f32 as it is"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The demo model with a draft model that is nearly always right, or wrong."""
    folder = tmp_path_factory.mktemp("drafted")
    if request.param == "itself, bf16":
        return build_artifact(DEMO, folder / "artifact", "residual", as_drafting(DEMO))
    other = as_drafting(small_checkpoint(folder / "small"), quantized=False)
    target = converted(DEMO, folder / "model", torch.float32)
    return build_artifact(target, folder / "artifact", "raw", other)


@pytest.fixture(scope="module")
def prompts(artifact: Artifact) -> list[list[int]]:
    text = load_tokenizer(artifact.path / "tokenizer")
    said = "def read_file(path):\n", "import os\nclass Node(object):"
    return [text.plain_ids(one) for one in said]


def planned(artifact: Artifact, **settings: object) -> Artifact:
    widths = widths_here(artifact.spec, "cpu", 32)
    usual: dict[str, object] = {"width": 2, "depth": 5, "int4_kernel": KERNEL, "context": 256}
    return replan(artifact, verify_widths=widths, **{**usual, **settings})


@pytest.mark.parametrize("sampling", [SamplingParams(), SEEDED], ids=["greedy", "seeded"])
def test_a_draft_model_gives_the_tokens_of_plain_decoding(
    artifact: Artifact, prompts: list[list[int]], sampling: SamplingParams
) -> None:
    made = planned(artifact, resident_share=0.3)
    with Engine.open(made, OpenOptions("plain")) as engine:
        expected = [answer(engine, prompt, NUM_TOKENS, sampling) for prompt in prompts]
    for method in WITH_DRAFT_MODEL:
        with Engine.open(made, OpenOptions(method)) as engine:
            assert [answer(engine, p, NUM_TOKENS, sampling) for p in prompts] == expected, method


@pytest.mark.parametrize("method", WITH_DRAFT_MODEL)
def test_sequences_with_a_draft_model_get_in_company_what_they_get_alone(
    artifact: Artifact, prompts: list[list[int]], method: Method
) -> None:
    """One begins later, one is closed and its caches go to another, one has a second turn that
    goes back within the first."""
    made = planned(artifact, num_sequences=2)
    draft = replace(made.plan.drafts[method], by_batch_size=(BatchDraft(Tree(1, 4), 1.0),))
    made = replace(made, plan=replace(made.plan, drafts={**made.plan.drafts, method: draft}))
    params = GenerationParams(NUM_TOKENS)
    again = [*prompts[0], *prompts[1][3:]]
    with Engine.open(made, OpenOptions("plain")) as engine:
        given = (prompts[0], prompts[1], prompts[0][1:], again)
        alone = [answer(engine, prompt, NUM_TOKENS) for prompt in given]
    with Engine.open(made, OpenOptions(method)) as engine:
        first, second = engine.new_sequence(), engine.new_sequence()
        first.begin(prompts[0], params)
        engine.step()
        second.begin(prompts[1], params)
        engine.step()
        engine.step()
        second.close()
        third = engine.new_sequence()
        third.begin(prompts[0][1:], params)
        while first.finish_reason is None or third.finish_reason is None:
            engine.step()
        assert (first.take_new_tokens(), third.take_new_tokens()) == (alone[0], alone[2])
        assert generated(first, again, params) == alone[3]
        assert generated(first, prompts[1], params) == alone[1]


@pytest.mark.parametrize("method", WITH_DRAFT_MODEL)
def test_a_draft_model_and_its_temporaries_fit_the_ledger(
    artifact: Artifact, method: Method
) -> None:
    """A text that is read in several passes, too."""
    made = planned(artifact, width=4, depth=5, context=512)
    ledger = made.plan.placement(method).ledger
    assert ledger.drafter > 0 and ledger.drafter_cache > 0
    with Engine.open(made, OpenOptions(method)) as engine:
        answer(engine, [3 + i % 700 for i in range(3 * CATCH_UP_ROWS + 5)], 12)
        for purpose in ("drafter", "drafter_cache"):  # nothing is left of what is its own
            with pytest.raises(AssertionError, match="ledger has 0"):
                engine.memory.take(purpose, 1)
        arenas = sum(ledger.arenas.values())
        assert engine.peak.peak_bytes - arenas <= ledger.workspace + ledger.guard


def test_without_residuals_a_draft_model_alone_needs_no_substitutes(artifact: Artifact) -> None:
    ledgers = {m: planned(artifact).plan.placement(m).ledger for m in WITH_DRAFT_MODEL}
    coded = any(part.is_residual for part in artifact.stored_parts())
    assert bool(ledgers["draft-model"].substitutes) == coded
    assert ledgers["substitute+draft-model"].substitutes > 0


def test_a_cache_of_a_draft_model_follows_its_text(artifact: Artifact) -> None:
    """Whatever happened to it: each draft is that of an engine that has read nothing else."""
    made = planned(artifact)
    with Engine.open(made, OpenOptions("draft-model")) as engine:
        drafter = engine.model.drafter
        assert isinstance(drafter, DraftModelDrafter)
        with engine.new_sequence() as sequence:
            for prompt in ([5, 6, 7, 8], [5, 6, 9], [*range(20, 60)], [5, 6, 7]):
                list(sequence.generate(prompt, GenerationParams(3)))
                mine = drafter.model.caches[sequence.cache]
                assert mine.tokens == sequence.cache.tokens[: mine.length]
                drafted = chain(drafter.model, sequence)
                mine.roll_back(0)
                assert drafted == chain(drafter.model, sequence)


def chain(model: DraftModel, sequence: object) -> list[int]:
    cache = sequence.cache  # type: ignore[attr-defined]
    [(token, _)] = model.continued([model.caches[cache]], [[*cache.tokens, 3]])
    return [token]


def test_a_draft_model_with_delta_nets_drafts_alone(tmp_path: Path) -> None:
    config = config_of("qwen3_5_text")
    hybrid = random_checkpoint(tmp_path / "hybrid", config)
    bf16 = converted(hybrid, tmp_path / "bf16", torch.bfloat16)
    made = planned(build_artifact(DEMO, tmp_path / "artifact", "raw", as_drafting(bf16)))
    prompt = [*range(30, 60)]
    with Engine.open(made, OpenOptions("plain")) as engine:
        expected = answer(engine, prompt, NUM_TOKENS)
    with Engine.open(made, OpenOptions("draft-model")) as engine:
        assert answer(engine, prompt, NUM_TOKENS) == expected
        assert answer(engine, prompt[:-3], NUM_TOKENS) != expected
        assert answer(engine, prompt, NUM_TOKENS) == expected
    with pytest.raises(SubspecError, match="delta nets") as failed:
        Engine.open(made, OpenOptions(drafter="substitute+draft-model"))
    assert failed.value.exit_code == Exit.UNSUPPORTED


def test_what_a_draft_model_proposes_is_checked_by_a_model_with_delta_nets(tmp_path: Path) -> None:
    config = config_of("qwen3_5_text")
    hybrid = random_checkpoint(tmp_path / "hybrid", config)
    bf16 = converted(hybrid, tmp_path / "bf16", torch.bfloat16)
    made = planned(build_artifact(bf16, tmp_path / "artifact", "raw", as_drafting(DEMO)))
    prompt, said = [*range(30, 60)], []
    for method in ("plain", *WITH_DRAFT_MODEL):
        with Engine.open(made, OpenOptions(method)) as engine:
            said.append([answer(engine, prompt[:end], NUM_TOKENS) for end in (30, 27)])
    assert said[0] == said[1] == said[2]


def test_a_draft_model_of_fewer_or_more_rows_says_only_tokens_of_the_model(tmp_path: Path) -> None:
    for rows in (1500, 2200):
        small = small_checkpoint(tmp_path / f"small-{rows}", vocab_size=rows)
        made = planned(build_artifact(DEMO, tmp_path / f"{rows}", "raw", as_drafting(small)))
        size = made.spec.vocab_size
        for method in WITH_DRAFT_MODEL:
            with Engine.open(made, OpenOptions(method)) as engine, engine.new_sequence() as one:
                list(one.generate([size - 1, 7, 8, size - 2], GenerationParams(8)))
                model = model_of(engine)
                logits = model.continued([model.caches[one.cache]], [[size - 1, 7, size - 3]])
                assert logits[0][0] < min(rows, size)


def model_of(engine: Engine) -> DraftModel:
    drafter = engine.model.drafter
    if isinstance(drafter, DraftModelDrafter):
        return drafter.model
    proposals = drafter.proposals  # type: ignore[union-attr]
    found: DraftModel = proposals.__self__
    return found


def test_a_damaged_draft_model_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(artifact.path, copied)
    verify(copied)
    name = "resident" if artifact.draft_model and not artifact.draft_model.quantized else None
    path = copied / DRAFT_MODEL / f"{name or 'substitutes'}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    damaged = replace(open_artifact(copied), plan=planned(artifact).plan)
    with pytest.raises(SubspecError, match="does not match its digest") as failed:
        Engine.open(damaged, OpenOptions("draft-model"))
    assert failed.value.exit_code == Exit.CORRUPT
    with Engine.open(damaged, OpenOptions("plain")):
        pass


def test_a_drafter_that_is_not_there_is_refused_with_a_hint(artifact: Artifact) -> None:
    without = replace(artifact, draft_model=None)
    with pytest.raises(SubspecError, match="needs a draft model") as failed:
        Engine.open(without, OpenOptions(drafter="draft-model"))
    assert failed.value.exit_code == Exit.USAGE and "--draft-model" in failed.value.hint
