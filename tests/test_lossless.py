"""Lossless is a test, not a claim: the exact model's tokens, drafted or not, alone or not."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_artifact, converted, demo_checkpoint, random_checkpoint, replan
from families import FAMILIES, PROMPT_TOKENS, SIZES, config_of
from invariance import widths_here
from running import answer, generated

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding
from subspec.artifacts.plan import BatchDraft, DrafterName, Int4Kernel, Method, Plan, Tree
from subspec.planner.model.hub import DEMO
from subspec.runtime import decode
from subspec.runtime.draft.beam import TokenTree
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels import int4
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams, Sequence
from subspec.runtime.text.tokenizer import load_tokenizer

GREEDY = SamplingParams()
SEEDED = SamplingParams(temperature=0.8, top_k=0, top_p=0.95, seed=7)
SAMPLINGS = {"greedy": GREEDY, "seeded": SEEDED}
ENCODINGS: tuple[Encoding, ...] = ("raw", "residual")
METHODS: tuple[Method, ...] = ("plain", "substitute")
LOOKUPS: tuple[DrafterName, ...] = ("lookup", "substitute+lookup")
FASTEST: Int4Kernel = "aten" if int4.unavailable() else "w4a8"
# tree width, depth, share of the exact weights that is resident, how they are stored, the kernel
# that drafts, and the path probability below which a draft ends early
DraftPlan = tuple[int, int, float, Encoding, Int4Kernel, float]
PLANS: list[DraftPlan] = [
    (1, 7, 0.0, "residual", FASTEST, 0.0),
    (1, 24, 0.5, "raw", "aten", 0.0),
    (3, 10, 1.0, "residual", "aten", 0.0),
    (8, 3, 0.5, "residual", FASTEST, 0.0),
    (2, 1, 0.0, "raw", FASTEST, 0.0),
    (4, 7, 0.3, "residual", FASTEST, 0.0),
    (3, 10, 0.5, "raw", FASTEST, 0.6),
    (1, 31, 0.5, "residual", FASTEST, 0.1),
    (4, 7, 1.0, "raw", FASTEST, 0.97),
]
MAX_NODES = 32
NUM_PROMPTS = 40
NUM_TOKENS, MANY_TOKENS = 32, 96  # in the quick tests, and in the slow one

Answer = Callable[[int, SamplingParams, int], list[int]]  # of a prompt, as so many tokens


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Two that wait for each other on a busy machine take minutes."""
    torch.set_num_threads(1)


# Against transformers


@pytest.mark.parametrize("case", FAMILIES)
def test_f32_tokens_equal_transformers_greedy_decoding(case: str, tmp_path: Path) -> None:
    import transformers

    config = config_of(case)
    folder = random_checkpoint(tmp_path / "checkpoint", config)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 2040, (PROMPT_TOKENS,), generator=generator).tolist()
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    for encoding in ENCODINGS:
        artifact = build_artifact(
            folder, tmp_path / encoding, encoding, width=2, depth=5, context=128
        )
        for method in METHODS if encoding == "residual" else METHODS[1:]:
            with Engine.open(artifact, OpenOptions(method)) as engine:
                assert answer(engine, prompt, 30, GREEDY) == expected, f"{encoding}, {method}"


# Speculation on = off


LAYERS_THAT_DIFFER = [case for case in FAMILIES if case.startswith(("gemma", "qwen3_5"))]


@pytest.mark.parametrize("case", LAYERS_THAT_DIFFER)
def test_a_bf16_draft_of_layers_that_differ_never_changes_the_tokens(
    case: str, tmp_path: Path
) -> None:
    config = config_of(case)
    folder = converted(
        random_checkpoint(tmp_path / "f32", config), tmp_path / "bf16", torch.bfloat16
    )
    prompt = torch.arange(3, 3 + PROMPT_TOKENS).tolist()
    settings: dict[str, Any] = {"width": 3, "depth": 4, "context": 128, "resident_share": 0.3}
    artifact = build_artifact(
        folder, tmp_path / "artifact", "residual", int4_kernel=FASTEST, **settings
    )
    for sampling in SAMPLINGS.values():
        answers = []
        for method in METHODS:
            with Engine.open(artifact, OpenOptions(method)) as engine:
                answers.append(answer(engine, prompt, 40, sampling))
        assert answers[0] == answers[1]
        # A random model whose head is its embedding says the last token again.
        assert artifact.spec.tie_word_embeddings or len(set(answers[0])) > 3


# Of f32 the quick tests are those against transformers above.
@pytest.fixture(
    scope="module", params=["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def demos(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Encoding, Artifact]:
    """The demo model, its exact weights stored either way."""
    folder = tmp_path_factory.mktemp("demo")
    source = demo_checkpoint(folder / "model", getattr(torch, request.param))
    return {encoding: build_artifact(source, folder / encoding, encoding) for encoding in ENCODINGS}


@pytest.fixture(scope="module")
def widths(demos: dict[Encoding, Artifact]) -> tuple[int, ...]:
    """A verification is padded to one of these."""
    return widths_here(demos["raw"].spec, "cpu", MAX_NODES)


@pytest.fixture(scope="module")
def prompts(demos: dict[Encoding, Artifact]) -> list[list[int]]:
    text = load_tokenizer(demos["raw"].path / "tokenizer")
    # A text that nobody edits, so that a failure is found again.
    source = (Path(__file__).parent / "code_text.txt").read_text("utf-8")
    pieces = [source[at : at + 60 + at % 90] for at in range(0, len(source), 131)]
    chats = [
        f"Write the Python function {name}: {what}"
        for name, what in (("read_file", "Read a file."), ("join", "Join two paths."))
    ]
    ids = [text.chat_ids([{"role": "user", "content": chat}]) for chat in chats]
    return (ids + [text.plain_ids(piece) for piece in pieces])[:NUM_PROMPTS]


@pytest.fixture(scope="module")
def plain_answer(
    demos: dict[Encoding, Artifact], prompts: list[list[int]], widths: tuple[int, ...]
) -> Answer:
    """What the plain twin emits for a prompt, alone, with everything resident and raw."""
    artifact = replan(demos["raw"], resident_share=1.0, verify_widths=widths)
    known = dict[tuple[int, SamplingParams], list[int]]()

    def known_answer(index: int, sampling: SamplingParams, num_tokens: int) -> list[int]:
        if len(known.get((index, sampling), ())) < num_tokens:
            with Engine.open(artifact, OpenOptions("plain")) as engine:
                known[index, sampling] = answer(engine, prompts[index], num_tokens, sampling)
        return known[index, sampling][:num_tokens]

    return known_answer


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_speculation_gives_the_tokens_of_plain_decoding(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    widths: tuple[int, ...],
    plain_answer: Answer,
    plan: DraftPlan,
    sampling: str,
) -> None:
    """A prompt for each plan; the slow test below gives every prompt to every plan."""
    mine = range(PLANS.index(plan), PLANS.index(plan) + 1)
    with Engine.open(planned(demos, plan, widths), OpenOptions("substitute")) as engine:
        for index in mine:
            got = answer(engine, prompts[index], NUM_TOKENS, SAMPLINGS[sampling])
            assert got == plain_answer(index, SAMPLINGS[sampling], NUM_TOKENS), f"prompt {index}"


def test_drafts_that_end_early_are_verified_in_several_widths(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    widths: tuple[int, ...],
    plain_answer: Answer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which widths there are depends on the processor, and so does how many prompts it takes until
    rounds of an answer have had several of them."""
    seen, real = set[int](), decode.pad_trees

    def counted(plan: Plan, drafts: Many[TokenTree]) -> tuple[list[TokenTree], list[int]]:
        trees, calls = real(plan, drafts)
        seen.update(calls)
        return trees, calls

    monkeypatch.setattr(decode, "pad_trees", counted)
    for plan in (one for one in PLANS if one[-1]):
        seen.clear()
        own = PLANS.index(plan)
        with Engine.open(planned(demos, plan, widths)) as engine:
            for index in (*range(own, NUM_PROMPTS), *range(own)):
                got = answer(engine, prompts[index], NUM_TOKENS, GREEDY)
                assert got == plain_answer(index, GREEDY, NUM_TOKENS), f"{plan}, prompt {index}"
                if len(seen) >= min(2, len(widths)):
                    break
        assert len(seen) >= min(2, len(widths)), plan


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_speculation_gives_the_tokens_of_plain_decoding_for_every_prompt_and_plan(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    widths: tuple[int, ...],
    plain_answer: Answer,
    plan: DraftPlan,
    sampling: str,
) -> None:
    with Engine.open(planned(demos, plan, widths), OpenOptions("substitute")) as engine:
        for index, prompt in enumerate(prompts):
            got = answer(engine, prompt, MANY_TOKENS, SAMPLINGS[sampling])
            assert got == plain_answer(index, SAMPLINGS[sampling], MANY_TOKENS), f"prompt {index}"


def twice(prompt: list[int]) -> list[int]:
    """A prompt whose answer has something to look up."""
    return [*prompt, *prompt]


@pytest.mark.parametrize(
    "plan", [PLANS[0], pytest.param(PLANS[3], marks=pytest.mark.slow), PLANS[6]], ids=str
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_looked_up_tokens_never_change_the_answer(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    widths: tuple[int, ...],
    plan: DraftPlan,
    sampling: str,
) -> None:
    artifact, how = planned(demos, plan, widths), SAMPLINGS[sampling]
    params, given = GenerationParams(NUM_TOKENS, how), [twice(one) for one in prompts[2:5]]
    with Engine.open(artifact, OpenOptions("plain")) as engine:
        expected = [answer(engine, prompt, NUM_TOKENS, how) for prompt in given]
    for drafter in LOOKUPS:
        num_proposed = 0
        with Engine.open(artifact, OpenOptions(drafter=drafter)) as engine:
            for prompt, known in zip(given, expected, strict=True):
                with engine.new_sequence() as sequence:
                    assert generated(sequence, prompt, params) == known, drafter
                    num_proposed += sum(sequence.stats.proposed)
        assert num_proposed > 0, drafter


def test_a_chain_of_levels_is_the_same_with_and_without_looked_up_tokens(
    demos: dict[Encoding, Artifact], prompts: list[list[int]], widths: tuple[int, ...]
) -> None:
    """The substitute's own choice has the same bits in a pass of one row and of several."""
    artifact = planned(demos, (1, 12, 0.5, "raw", FASTEST, 0.0), widths)
    found = []
    for drafter in (None, LOOKUPS[-1]):
        how = OpenOptions(drafter=drafter)
        with Engine.open(artifact, how) as engine, engine.new_sequence() as sequence:
            generated(sequence, twice(prompts[3]), GenerationParams(NUM_TOKENS))
            found.append((sequence.stats.drafted, sequence.stats.accepted))
    assert found[0] == found[1]


# Alone = in a batch


@pytest.mark.parametrize(
    ("opened", "share", "threshold", "by_batch_size"),
    [
        (OpenOptions("substitute"), 0.0, 0.0, ()),
        (OpenOptions("substitute"), 0.0, 0.0, (BatchDraft(Tree(1, 5), 0.0),)),
        (OpenOptions("substitute"), 1.0, 0.9, ()),
        (OpenOptions("plain"), 0.0, 0.0, ()),
        pytest.param(OpenOptions(drafter="lookup"), 0.0, 0.0, (), marks=pytest.mark.slow),
        (OpenOptions(drafter="substitute+lookup"), 0.0, 0.0, (BatchDraft(Tree(1, 5), 0.0),)),
    ],
    ids=[
        "drafted, streamed",
        "drafted with fewer nodes in a batch",
        "drafted till improbable, resident",
        "plain, streamed",
        "looked up",
        "drafted and looked up",
    ],
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sequences_that_come_and_go_get_the_tokens_that_they_get_alone(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    widths: tuple[int, ...],
    plain_answer: Answer,
    sampling: str,
    opened: OpenOptions,
    share: float,
    threshold: float,
    by_batch_size: tuple[BatchDraft, ...],
) -> None:
    """One begins while others decode, one ends early, one is closed in the middle and its cache
    goes to another, one is used for a second turn."""
    how = SAMPLINGS[sampling]
    alone = [plain_answer(index, how, NUM_TOKENS) for index in range(4)]
    encoding: Encoding = "raw" if share else "residual"
    artifact = replan(
        demos[encoding], width=2, depth=7, resident_share=share, verify_widths=widths,
        int4_kernel=FASTEST, num_sequences=3, min_path_probability=threshold,
    )  # fmt: skip
    artifact = replace(artifact, plan=replace(artifact.plan, by_batch_size=by_batch_size))
    whole, short = (GenerationParams(count, how) for count in (NUM_TOKENS, 16))
    with Engine.open(artifact, opened) as engine:
        first, second = engine.new_sequence(), engine.new_sequence()
        first.begin(prompts[0], whole)
        step(engine, 2)
        second.begin(prompts[1], whole)
        step(engine, 2)
        third = engine.new_sequence()
        early = next(i for i, token in enumerate(alone[2]) if i > 8 and token not in alone[2][:i])
        third.begin(prompts[2], GenerationParams(NUM_TOKENS, how, frozenset([alone[2][early]])))
        step(engine, 2)
        begun = second.take_new_tokens()
        second.close()
        fourth = engine.new_sequence()
        assert fourth.cache is second.cache
        fourth.begin(prompts[3], whole)
        finish(engine, first, third, fourth)
        assert begun == alone[1][: len(begun)] and 3 < len(begun) < NUM_TOKENS
        assert third.take_new_tokens() == alone[2][: early + 1] and third.finish_reason == "eos"
        assert (first.take_new_tokens(), fourth.take_new_tokens()) == (alone[0], alone[3])

        again = [*prompts[2], *alone[2][: early + 1], *prompts[3]]
        third.begin(again, short)
        fourth.begin(prompts[3], whole)  # the last token of the prompt is read once more
        step(engine, 3)
        fourth.close()
        finish(engine, third)
        second_turn = third.take_new_tokens()
    with Engine.open(artifact, OpenOptions("plain")) as engine, engine.new_sequence() as lone:
        ends = frozenset([alone[2][early]])
        assert [*generated(lone, prompts[2], GenerationParams(NUM_TOKENS, how, ends))]
        assert generated(lone, again, short) == second_turn


def test_sequences_may_differ_in_sampling_and_in_length(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    widths: tuple[int, ...],
    plain_answer: Answer,
) -> None:
    artifact = replan(
        demos["residual"], width=3, depth=5, verify_widths=widths, int4_kernel=FASTEST,
        num_sequences=3, context=1024, min_path_probability=0.5,
    )  # fmt: skip
    long = [5 + i % 900 for i in range(900)]
    with Engine.open(artifact) as engine:
        alone = answer(engine, long, 20, SEEDED)
    with Engine.open(artifact) as engine:
        sequences = [engine.new_sequence() for _ in range(3)]
        sequences[0].begin(prompts[0], GenerationParams(NUM_TOKENS, GREEDY))
        sequences[1].begin(prompts[0], GenerationParams(NUM_TOKENS, SEEDED))
        sequences[2].begin(long, GenerationParams(20, SEEDED))
        finish(engine, *sequences)
        assert [one.take_new_tokens() for one in sequences] == [
            plain_answer(0, GREEDY, NUM_TOKENS), plain_answer(0, SEEDED, NUM_TOKENS), alone
        ]  # fmt: skip


# Sampling


def test_sampled_output_is_distributed_as_the_target(tmp_path: Path) -> None:
    """Chi-square over two sampled tokens, the second one verified behind a draft; vocabulary 16."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "qwen2",
        **{**SIZES, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
           "vocab_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    )  # fmt: skip
    folder = random_checkpoint(tmp_path / "checkpoint", config)
    artifact = build_artifact(
        folder, tmp_path / "artifact", width=3, depth=2, context=64, resident_share=1.0
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, temperature, draws = [3, 7, 1, 12], 1.5, 600

    def target(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        best = logits.topk(4).indices
        cut = torch.full_like(logits, float("-inf")).scatter(0, best, logits[best])
        return (cut / temperature).softmax(-1)

    first = target(prompt)
    expected = torch.stack([first[t] * target([*prompt, t]) for t in range(16)]).flatten()
    counts = torch.zeros(256, dtype=torch.float64)
    with Engine.open(artifact, OpenOptions("substitute")) as engine:
        for seed in range(draws):
            one, two = answer(engine, prompt, 2, SamplingParams(temperature, top_k=4, seed=seed))
            counts[one * 16 + two] += 1
    assert counts[expected == 0].sum() == 0
    likely = expected * draws >= 5  # the others are one cell together
    got = torch.cat((counts[likely], counts[~likely].sum()[None]))
    wanted = torch.cat((expected[likely], expected[~likely].sum()[None])) * draws
    statistic = ((got - wanted) ** 2 / wanted.clamp_min(1e-9)).sum().item()
    assert statistic < 50  # at most 16 degrees of freedom: p < 3e-5; the seeds are fixed


def test_the_padded_width_does_not_change_bf16_tokens_much(tmp_path: Path) -> None:
    """Other widths may round otherwise: the promise is per plan. Most tokens agree all the same."""
    artifact = build_artifact(DEMO, tmp_path / "artifact")
    prompt = load_tokenizer(artifact.path / "tokenizer").plain_ids("def main():\n    ")
    texts = []
    for width in (8, 64):
        with Engine.open(replan(artifact, verify_widths=(width,)), OpenOptions("plain")) as engine:
            texts.append(answer(engine, prompt, 32, GREEDY))
    assert texts[0][:8] == texts[1][:8]


def planned(demos: dict[Encoding, Artifact], plan: DraftPlan, widths: tuple[int, ...]) -> Artifact:
    width, depth, share, encoding, kernel, min_path_probability = plan
    return replan(
        demos[encoding],
        width=width,
        depth=depth,
        resident_share=share,
        verify_widths=widths,
        int4_kernel=kernel,
        min_path_probability=min_path_probability,
    )


def step(engine: Engine, num_rounds: int) -> None:
    for _ in range(num_rounds):
        engine.step()


def finish(engine: Engine, *sequences: Sequence) -> None:
    while any(one.finish_reason is None for one in sequences):
        engine.step()
