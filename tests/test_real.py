"""A real model, SmolLM2-135M-Instruct: its tokens are transformers', a draft never changes them.

Its linear weights were 4 bits once, so its residuals are shorter and its drafts better than those
of a model that was never quantised; what is exact does not depend on that.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.plan import Constraints
from subspec.planner.model.hub import resolve
from subspec.planner.planning import PlanRequest, plan_model
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.text.tokenizer import load_tokenizer

MODEL = Path("build/smollm2")
QUESTIONS = (
    "Why do cats purr?",
    "Write a Python function that counts the words of a text.",
    "Was ist der Unterschied zwischen Wetter und Klima?",
)
NUM_TOKENS = 48

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODEL.is_dir(), reason="make test-real makes the model"),
]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Under three fifths of its weights, without a rehearsal: trees as published."""
    folder, dtype = tmp_path_factory.mktemp("real"), getattr(torch, request.param)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((MODEL / name).read_bytes())
    budget = int(0.6 * sum(weight.nbytes for weight in model.parameters()))
    constraints = Constraints(context=512, width=2, depth=12, min_path_probability=0.2)
    asked = PlanRequest(budget, constraints, "cpu", rehearse=0)
    plan_model(asked, resolve(str(folder / "model")), folder / "artifact")
    return open_artifact(folder / "artifact")


def decoded(artifact: Artifact, options: OpenOptions, sampling: SamplingParams) -> list[list[int]]:
    text = load_tokenizer(artifact.path / "tokenizer")
    params = GenerationParams(NUM_TOKENS, sampling, frozenset(artifact.spec.eos_token_ids))
    found = []
    with Engine.open(artifact, options) as engine:
        for question in QUESTIONS:
            prompt = text.chat_ids([{"role": "user", "content": question}])
            with engine.new_sequence() as sequence:
                found.append([t for some in sequence.generate(prompt, params) for t in some])
    return found


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, seed=3)])
def test_a_draft_never_changes_the_tokens_of_a_real_model(
    artifact: Artifact, sampling: SamplingParams
) -> None:
    plain, drafted = (
        decoded(artifact, OpenOptions(method), sampling) for method in ("plain", "substitute")
    )
    assert drafted == plain and all(plain)


def test_a_real_models_tokens_in_f32_are_those_of_transformers(artifact: Artifact) -> None:
    if artifact.spec.dtype != "float32":
        pytest.skip("in bf16 the order of sums decides near-ties")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    text = load_tokenizer(artifact.path / "tokenizer")
    for question, ours in zip(
        QUESTIONS, decoded(artifact, OpenOptions("substitute"), SamplingParams()), strict=True
    ):
        prompt = torch.tensor([text.chat_ids([{"role": "user", "content": question}])])
        theirs = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS,
            do_sample=False, pad_token_id=0, eos_token_id=list(artifact.spec.eos_token_ids),
        )[0, prompt.shape[1] :]  # fmt: skip
        assert ours == theirs.tolist()
