"""Lossless is a test, not a claim: the exact model's tokens, with and without a draft."""

from pathlib import Path

import pytest
import torch
from builders import build_artifact, demo_checkpoint, random_checkpoint, replan

from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import Encoding
from subspec.artifacts.plan import Int4Kernel
from subspec.planner.model.hub import DEMO
from subspec.runtime.kernels import int4
from subspec.runtime.model.sampling import Sampling
from subspec.runtime.session import Session
from subspec.runtime.text.tokenizer import load_tokenizer

NUM_PROMPTS, NUM_TOKENS = 40, 96
GREEDY = Sampling()
SEEDED = Sampling(temperature=0.8, top_k=0, top_p=0.95, seed=7)
ENCODINGS: tuple[Encoding, ...] = ("raw", "residual")
FASTEST: Int4Kernel = "aten" if int4.unavailable() else "w4a8"
# tree width, depth, share of the exact weights that is resident, how they are stored, and the
# kernel that drafts, and what a draft ends early below
DraftPlan = tuple[int, int, float, Encoding, Int4Kernel, float]
PLANS: list[DraftPlan] = [
    (1, 7, 0.0, "residual", FASTEST, 0.0),
    (1, 24, 0.5, "raw", "aten", 0.0),
    (3, 10, 1.0, "residual", "aten", 0.0),
    (8, 3, 0.5, "residual", FASTEST, 0.0),
    (2, 1, 0.0, "raw", FASTEST, 0.0),
    (4, 7, 0.3, "residual", FASTEST, 0.0),
    (3, 10, 0.5, "raw", FASTEST, 0.9),
]
VERIFY_WIDTH = 32


def tiny(family: str, **settings: object) -> tuple[str, dict[str, object]]:
    common = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    return family, {**common, **settings}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2, 7 heads to 1, tied": tiny(
        "qwen2", hidden_size=448, num_attention_heads=7, num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "qwen2, untied, windows on the upper layers": tiny(
        "qwen2", num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True,
        sliding_window=24, max_window_layers=1,
    ),
    "qwen3, head size not hidden / heads": tiny(
        "qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=48, attention_bias=True,
    ),
    "llama 3 rope, every bias": tiny(
        "llama", num_attention_heads=4, num_key_value_heads=4, attention_bias=True, mlp_bias=True,
        rope_parameters=LLAMA3_ROPE,
    ),
    "llama, yarn rope": tiny(
        "llama", num_attention_heads=2, num_key_value_heads=1,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                         "original_max_position_embeddings": 64},
    ),
    "mistral, sliding window": tiny(
        "mistral", num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=20,
    ),
    "llama, shapes that 4 bits do not take": tiny(
        "llama", hidden_size=96, intermediate_size=168, num_attention_heads=3,
        num_key_value_heads=3, vocab_size=2050,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_tokens_equal_transformers_greedy_decoding(family: str, tmp_path: Path) -> None:
    import transformers

    model_type, settings = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    folder = random_checkpoint(tmp_path / "checkpoint", config)
    artifacts = [
        build_artifact(folder, tmp_path / encoding, encoding, width=2, depth=5, context=160)
        for encoding in ENCODINGS
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(3, 2048, (40 + seed,), generator=generator).tolist()
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for artifact in artifacts:
            for method in ("plain", "substitute"):
                assert decode(artifact, method, prompt, GREEDY, 60) == expected, method


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def demos(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Encoding, Artifact]:
    """The demo model, its exact weights stored either way."""
    folder = tmp_path_factory.mktemp("demo")
    source = demo_checkpoint(folder / "model", getattr(torch, request.param))
    return {encoding: build_artifact(source, folder / encoding, encoding) for encoding in ENCODINGS}


@pytest.fixture(scope="module")
def prompts(demos: dict[Encoding, Artifact]) -> list[list[int]]:
    text = load_tokenizer(demos["raw"].path / "tokenizer")
    source = (Path(__file__).parent / "builders.py").read_text()
    pieces = [source[at : at + 60 + at % 90] for at in range(0, len(source), 131)]
    chats = [
        f"Write the Python function {name}: {what}"
        for name, what in (("read_file", "Read a file."), ("join", "Join two paths."))
    ]
    ids = [text.chat_ids([{"role": "user", "content": chat}]) for chat in chats]
    return (ids + [text.plain_ids(piece) for piece in pieces])[:NUM_PROMPTS]


@pytest.fixture(scope="module")
def plain_tokens(
    demos: dict[Encoding, Artifact], prompts: list[list[int]]
) -> dict[Sampling, list[list[int]]]:
    """What the plain twin emits, everything resident and raw."""
    artifact = replan(demos["raw"], resident_share=1.0, verify_width=VERIFY_WIDTH)
    with Session(artifact, method="plain") as session:
        return {
            sampling: [run(session, prompt, sampling, NUM_TOKENS) for prompt in prompts]
            for sampling in (GREEDY, SEEDED)
        }


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_speculation_gives_the_tokens_of_plain_decoding(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    plain_tokens: dict[Sampling, list[list[int]]],
    plan: DraftPlan,
    sampling: Sampling,
) -> None:
    """The plans share the prompts out; the slow test below gives every prompt to every plan."""
    mine = range(PLANS.index(plan), NUM_PROMPTS, len(PLANS))
    assert_same_tokens(demos, prompts, plain_tokens, plan, sampling, mine)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_speculation_gives_the_tokens_of_plain_decoding_for_every_prompt_and_plan(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    plain_tokens: dict[Sampling, list[list[int]]],
    plan: DraftPlan,
    sampling: Sampling,
) -> None:
    assert_same_tokens(demos, prompts, plain_tokens, plan, sampling, range(NUM_PROMPTS))


def assert_same_tokens(
    demos: dict[Encoding, Artifact],
    prompts: list[list[int]],
    plain_tokens: dict[Sampling, list[list[int]]],
    plan: DraftPlan,
    sampling: Sampling,
    chosen: range,
) -> None:
    width, depth, share, encoding, kernel, min_path_probability = plan
    artifact = replan(
        demos[encoding],
        width=width,
        depth=depth,
        resident_share=share,
        verify_width=VERIFY_WIDTH,
        int4_kernel=kernel,
        min_path_probability=min_path_probability,
    )
    with Session(artifact, method="substitute") as session:
        for index in chosen:
            got = run(session, prompts[index], sampling, NUM_TOKENS)
            assert got == plain_tokens[sampling][index], f"prompt {index}"


def test_sampled_output_is_distributed_as_the_target(tmp_path: Path) -> None:
    """Chi-square over two sampled tokens, the second one verified behind a draft; vocabulary 16."""
    import transformers

    model_type, settings = tiny(
        "qwen2", hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=16,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **settings)
    folder = random_checkpoint(tmp_path / "checkpoint", config)
    artifact = build_artifact(folder, tmp_path / "artifact", width=3, depth=2, context=64)
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
    with Session(artifact, method="substitute") as session:
        for seed in range(draws):
            one, two = run(session, prompt, Sampling(temperature, top_k=4, seed=seed), 2)
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
    texts = [
        decode(replan(artifact, verify_width=width), "plain", prompt, GREEDY, 32)
        for width in (8, 64)
    ]
    assert texts[0][:8] == texts[1][:8]


def decode(
    artifact: Artifact, method: str, prompt: list[int], sampling: Sampling, tokens: int
) -> list[int]:
    with Session(artifact, method=method) as session:  # type: ignore[arg-type]
        return run(session, prompt, sampling, tokens)


def run(session: Session, prompt: list[int], sampling: Sampling, tokens: int) -> list[int]:
    session.model.cache.roll_back(0)
    return [token for some in session.generate(prompt, tokens, sampling) for token in some]
