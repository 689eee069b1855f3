"""A session: its memory is the ledger's, its cache is reused, its ends are clean."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, demo_checkpoint, random_checkpoint, replan

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.store import Artifact
from subspec.planner.hub import DEMO
from subspec.runtime.sampling import Sampling
from subspec.runtime.session import Session

PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_artifact(DEMO, tmp_path_factory.mktemp("session") / "artifact")


def run(session: Session, prompt: list[int], tokens: int, **settings: object) -> list[int]:
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    return [token for some in session.generate(prompt, tokens, sampling) for token in some]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "plan",
    [
        {"width": 1, "depth": 7, "resident_share": 0.0, "context": 256},
        {"width": 8, "depth": 3, "resident_share": 0.6, "context": 1024},
        {"width": 4, "depth": 14, "resident_share": 1.0, "context": 512},
    ],
    ids=str,
)
def test_measured_memory_stays_within_the_ledger(
    dtype: torch.dtype, plan: dict[str, float], tmp_path: Path
) -> None:
    """Arenas are the ledger's by construction; temporaries are measured over the widest passes:
    a prompt of the whole context, and sampling."""
    folder = demo_checkpoint(tmp_path / "model", dtype)
    artifact = replan(build_artifact(folder, tmp_path / "artifact"), **plan)
    context = int(plan["context"])
    for method in ("substitute", "plain"):
        with Session(artifact, method=method) as session:  # type: ignore[arg-type]
            prompt = [5 + i % 1000 for i in range(context - 2)]
            run(session, prompt, 2, temperature=0.8, top_p=0.9, top_k=40)
            ledger = session.placement.ledger
            unused = {name: arena.numel() for name, arena in session.memory._free.items()}
            assert max(unused.values()) == 0, f"the ledger grants more than is used: {unused}"
            temporaries = session.peak.peak_bytes - session.memory.arena_bytes
            assert temporaries <= ledger["workspace"]
            assert session.peak.peak_bytes <= artifact.plan.budget_bytes
            assert temporaries >= 0.4 * ledger["workspace"], "the estimate wastes memory"


def test_odd_shapes_and_biases_stay_within_the_ledger_too(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=96, intermediate_size=168, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, vocab_size=2050, attention_bias=True, mlp_bias=True,
        max_position_embeddings=512,
    )  # fmt: skip
    folder = random_checkpoint(tmp_path / "model", config)
    with Session(build_artifact(folder, tmp_path / "artifact", width=2, depth=3)) as session:
        run(session, PROMPT, 20)
        temporaries = session.peak.peak_bytes - session.memory.arena_bytes
        assert temporaries <= session.placement.ledger["workspace"]


@pytest.mark.parametrize("method", ["substitute", "plain"])
def test_a_prompt_that_continues_the_last_one_reuses_its_prefix(
    artifact: Artifact, method: str
) -> None:
    with Session(artifact, method=method) as session:  # type: ignore[arg-type]
        answer = run(session, PROMPT, 20)
        longer = [*PROMPT, *answer, 11, 12, 13]
        run(session, longer, 5)
        assert session.stats.reused_tokens == len(PROMPT) + len(answer) - 1
        run(session, [*PROMPT[:10], 99], 5)
        assert session.stats.reused_tokens == 10


def test_reuse_gives_the_same_tokens_with_and_without_speculation(artifact: Artifact) -> None:
    turns = [PROMPT, [20, 21, 22], [30, 31, 32, 33]]
    said = []
    for method in ("substitute", "plain"):
        with Session(replan(artifact, width=2, depth=7, verify_width=16), method=method) as session:  # type: ignore[arg-type]
            history: list[int] = []
            for turn in turns:
                history += turn
                history += run(session, history, 24)
        said.append(history)
    assert said[0] == said[1]


def test_generation_ends_at_an_end_of_text_inside_an_accepted_block(artifact: Artifact) -> None:
    with Session(artifact) as session:
        tokens = run(session, PROMPT, 30)
        end = tokens[9]
        session.model.cache.roll_back(0)
        ended = [
            token
            for some in session.generate(PROMPT, 30, Sampling(), frozenset([end]))
            for token in some
        ]
        assert ended == tokens[: tokens.index(end) + 1]
        assert session.model.cache.tokens == [*PROMPT, *ended[:-1]]


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_exactly_as_many_tokens_as_asked_for(artifact: Artifact, tokens: int) -> None:
    with Session(artifact) as session:
        assert len(run(session, PROMPT, tokens)) == tokens
        assert session.stats.generated_tokens == tokens


def test_the_context_is_filled_to_its_last_token(artifact: Artifact) -> None:
    with Session(replan(artifact, context=64, width=4, depth=7)) as session:
        assert len(run(session, PROMPT, 1000)) == 64 - len(PROMPT)
        assert len(run(session, PROMPT + [7] * 23, 1000)) == 1


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(artifact: Artifact) -> None:
    with Session(replan(artifact, context=64)) as session:
        with pytest.raises(SubspecError, match="64 tokens, expected 1 to 63") as caught:
            run(session, [5] * 64, 1)
        assert caught.value.exit_code == Exit.USAGE
        assert len(run(session, PROMPT, 3)) == 3


def test_a_long_prompt_streams_the_weights_once(artifact: Artifact) -> None:
    with Session(replan(artifact, context=1024, resident_share=0.0)) as session:
        before = session.model.exact.streamed_bytes
        run(session, [5 + i % 900 for i in range(1000)], 1)
        everything = session.artifact.path / "exact.safetensors"
        assert session.model.exact.streamed_bytes - before <= everything.stat().st_size


def test_prompts_in_several_streams_give_the_same_tokens(artifact: Artifact) -> None:
    prompt = [5 + i % 900 for i in range(200)]
    answers = []
    for prefill_tokens in (256, 64):
        plan = replace(artifact.plan, prefill_tokens=prefill_tokens)
        with Session(replace(artifact, plan=plan)) as session:
            answers.append(run(session, prompt, 10))
    assert answers[0] == answers[1]


def test_a_plan_for_a_gpu_says_so_where_there_is_none(artifact: Artifact) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SubspecError) as caught:
        Session(replan(artifact, device="cuda"))
    assert caught.value.exit_code == Exit.WRONG_MACHINE


def test_a_budget_larger_than_the_free_memory_is_refused_before_loading(
    artifact: Artifact,
) -> None:
    placement = artifact.plan.substitute
    assert placement is not None
    huge = replace(placement, ledger={**placement.ledger, "guard": 1 << 50})
    plan = replace(artifact.plan, substitute=huge)
    with pytest.raises(SubspecError) as caught:
        Session(replace(artifact, plan=plan))
    assert caught.value.exit_code == Exit.RESOURCES


def test_the_unpadded_baseline_gives_plain_tokens(artifact: Artifact) -> None:
    """It rounds otherwise, so later tokens may differ; the first ones must not."""
    with Session(artifact, method="plain", padded=False) as session:
        fast = run(session, PROMPT, 8)
    with Session(artifact, method="plain") as session:
        assert run(session, PROMPT, 8)[:4] == fast[:4]
