"""A session: its memory is the ledger's, its cache is reused, its ends are clean."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import build_artifact, demo_checkpoint, random_checkpoint, replan
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Int4Kernel, Method
from subspec.planner.model.hub import DEMO
from subspec.runtime import decode
from subspec.runtime.decode import draft_pass
from subspec.runtime.draft.beam import DraftPass, TokenTree
from subspec.runtime.memory import FastMemory
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.session import Session, machine_name, needed_kernels

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


def test_levels_behind_the_end_of_the_text_are_not_judged(artifact: Artifact) -> None:
    depth = artifact.plan.tree.depth
    with Session(artifact) as session:
        tokens, left = run(session, PROMPT, 30), 29
        for judged, accepted in zip(session.stats.judged, session.stats.accepted, strict=True):
            assert judged == min(depth, left - 1) and accepted <= judged
            left -= accepted + 1
        assert session.stats.first_of_session and left == 0
        session.model.cache.roll_back(0)
        *_, last = session.generate(PROMPT, 30, Sampling(), frozenset([tokens[9]]))
        assert session.stats.judged[-1] == len(last) < depth
        assert not session.stats.first_of_session


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=str)
def test_drafts_that_end_early_change_no_token(
    width: int, settings: dict[str, float], artifact: Artifact
) -> None:
    said, levels = [], []
    for min_path_probability in (0.0, 0.5, 0.9):
        shape = {"width": width, "depth": 7, "verify_width": 24}
        with Session(
            replan(artifact, min_path_probability=min_path_probability, **shape)
        ) as session:
            said.append(run(session, PROMPT, 60, **settings))
            levels.append(session.stats.drafted_levels)
    assert said[0] == said[1] == said[2]
    assert levels[2] < levels[0], "none ended early"


def test_levels_that_were_drafted_are_counted_and_the_next_one_is_judged(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a draft ended early it is known that no further level was accepted."""
    depths = list[int]()

    def counted(model: decode.Model) -> DraftPass:
        real = draft_pass(model)

        def run(tree: TokenTree, nodes: Tensor) -> Tensor:
            depths.append(int(tree.depths[nodes[0]]))
            return real(tree, nodes)

        return run

    monkeypatch.setattr(decode, "draft_pass", counted)
    chosen = replan(artifact, width=2, depth=7, verify_width=16, min_path_probability=0.98)
    with Session(chosen) as session:
        left, early, before = 59, 0, 0
        for emitted in session.generate(PROMPT, 60, Sampling()):
            stats = session.stats
            assert stats.drafted_levels == len(depths)
            if not stats.accepted:  # the prompt's token
                continue
            room = min(7, left - 1)
            drafted = len(depths) - before
            assert depths[before:] == [*range(drafted)] and drafted <= room
            assert stats.judged[-1] == min(drafted + 1, room)
            assert stats.accepted[-1] <= drafted
            early += drafted < room
            left, before = left - len(emitted), len(depths)
        assert left == 0 and early > 3
        tokens = session.model.cache.tokens[len(PROMPT) :]
    ends = frozenset([tokens[25]])
    with Session(chosen) as session:
        *_, last = session.generate(PROMPT, 60, Sampling(), ends)
        assert session.stats.judged[-1] <= len(last), "nothing is known behind the end of the text"


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 30])
def test_no_level_is_drafted_that_the_answer_has_no_room_for(
    tokens: int, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each level takes a pass of the draft, and the exact model's own token has the last place."""
    depths = list[int]()

    def counted(model: decode.Model) -> DraftPass:
        real = draft_pass(model)

        def run(tree: TokenTree, nodes: Tensor) -> Tensor:
            depths.append(int(tree.depths[nodes[0]]))
            return real(tree, nodes)

        return run

    monkeypatch.setattr(decode, "draft_pass", counted)
    with Session(artifact) as session:
        assert len(run(session, PROMPT, tokens)) == tokens
        left, expected = tokens - 1, list[int]()
        for accepted in session.stats.accepted:
            expected += range(min(artifact.plan.tree.depth, left - 1))
            left -= accepted + 1
        assert (depths, left) == (expected, 0)


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


def test_the_name_of_a_machine_does_not_depend_on_what_a_session_sets() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    name = machine_name(cpu)
    try:
        torch.set_num_threads(threads + 1)
        assert machine_name(cpu) == name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no set of its own")
def test_the_name_of_a_machine_counts_the_cpus_that_the_process_may_use() -> None:
    usable = os.sched_getaffinity(0)
    assert f", {len(usable)} cpus; torch " in machine_name(torch.device("cpu"))
    try:
        os.sched_setaffinity(0, {min(usable)})
        assert ", 1 cpus; torch " in machine_name(torch.device("cpu"))
    finally:
        os.sched_setaffinity(0, usable)


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


@pytest.mark.parametrize(
    ("kernel", "residuals", "method", "sources"),
    [
        ("aten", (), "substitute", {"attention"}),
        ("aten", ("a part",), "plain", {"attention", "residual"}),
        ("w4a8", (), "plain", {"attention"}),
        ("w4a8", ("a part",), "plain", {"attention", "residual", "int4"}),
        ("w4a8", (), "substitute", {"attention", "int4", "draft_layers"}),
    ],
)
def test_only_kernels_that_the_method_calls_are_built(
    kernel: Int4Kernel, residuals: tuple[str, ...], method: Method, sources: set[str],
    artifact: Artifact,
) -> None:  # fmt: skip
    """Residuals are decoded over the layout of the 4-bit kernel, whoever drafts."""
    plan = replace(artifact.plan, int4_kernel=kernel, residuals=residuals)
    assert {source.stem for source, _ in needed_kernels(plan, method)} == sources


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fast_memory_is_zeros_and_is_given_back_whoever_still_knows_of_it() -> None:
    before = resident_bytes()
    memory = FastMemory(torch.device("cpu"), {"cache": 64 << 20, "resident": 5000, "guard": 9})
    known = memory.take("cache", 64 << 20)
    assert not known.any() and resident_bytes() - before > 60 << 20
    known.fill_(7)
    memory.release()
    assert resident_bytes() - before < 8 << 20
    assert memory.arena_bytes == (64 << 20) + 5000


def test_a_closed_session_leaves_room_for_the_next(artifact: Artifact) -> None:
    """Also while a variable still holds it, as after a `with`."""
    with Session(replan(artifact, context=4096)) as session:
        run(session, PROMPT, 4)
        arenas = session.memory.arena_bytes
        before = resident_bytes()
    assert before - resident_bytes() > 0.8 * arenas > 8 << 20
    assert session.peak.peak_bytes > arenas, "what it was is still known"
