"""Qwen3.5-27B as its config says, in 24 GB: memory, pieces of a long prompt, where its checkpoints
lie, and the first token. Tensors are torch's meta ones: they have shapes and no bytes."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import ACCEPTANCE, make_profile

from subspec.artifacts.acceptance import ONE_TOKEN
from subspec.artifacts.footprint import (
    CHECKPOINTS,
    cache_slots,
    checkpoints_bytes,
    model_bytes,
    text_bytes,
)
from subspec.artifacts.model import ModelSpec, Source
from subspec.artifacts.plan import Constraints, Plan, Usage
from subspec.artifacts.profile import LinkRate, Profile, Timing
from subspec.planner.model.config import read_config
from subspec.planner.solve.predict import Candidate, passes_of, predict
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import raw_storage
from subspec.runtime.exact_pass import tokens_that_fit
from subspec.runtime.model import cache as caches
from subspec.runtime.model.net_state import make_net_states
from subspec.runtime.sequence import GenerationParams, Sequence

BUDGET = 24 * 10**9
CONFIG = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_text", "dtype": "bfloat16", "hidden_size": 5120,
        "intermediate_size": 17408, "num_hidden_layers": 64, "full_attention_interval": 4,
        "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "vocab_size": 248320,
        "max_position_embeddings": 262144, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "attn_output_gate": True, "mamba_ssm_dtype": "float32",
        "eos_token_id": 248044,
        "rope_parameters": {
            "rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default",
            "mrope_section": [11, 11, 10], "mrope_interleaved": True,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("27b")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return read_config(folder, Source("Qwen/Qwen3.5-27B"))


@pytest.fixture(scope="module")
def profile() -> Profile:
    """A card of 1 TB/s on PCIe 4, roughly."""
    return make_profile(
        device="cuda",
        overhead_bytes=500 << 20,
        link=(LinkRate(1 << 20, 20e9), LinkRate(128 << 20, 25e9)),
        exact_layer=(Timing(1, 1e-3), Timing(64, 1.2e-3)),
        fast_layer=(Timing(1, 1e-3), Timing(128, 1.5e-3)),
        residual_weights_per_second=1e11,
    )


@pytest.fixture(scope="module")
def plan(spec: ModelSpec, profile: Profile) -> Plan:
    return search(spec, profile, BUDGET, Constraints(context=40_000), ACCEPTANCE)


def test_fast_and_host_memory_have_a_ledger_each(
    spec: ModelSpec, plan: Plan, profile: Profile
) -> None:
    assert model_bytes(spec) == pytest.approx(53.8e9, rel=1e-3)
    assert checkpoints_bytes(spec, 1) == pytest.approx(CHECKPOINTS * 153.9e6, rel=1e-3)
    assert text_bytes(spec, 1) == 64 << 10
    ledger, host = plan.placement(plan.method).ledger, plan.host_ledger
    assert plan.method == "substitute" and ledger.total_bytes <= BUDGET
    keys_values = text_bytes(spec, cache_slots(40_000, plan.verify_width))
    nodes = plan.verify_width * 48 * 53_632
    assert ledger.cache - keys_values == pytest.approx(2 * 153.9e6 + nodes, rel=1e-3)
    assert host is not None and host.checkpoints == checkpoints_bytes(spec, 1)
    assert host.streamed == plan.predicted["substitute"].streamed_bytes
    assert host.embedding == 2 * 248320 * 5120
    several = Constraints(context=8_000, num_sequences=4)
    other = search(spec, profile, BUDGET, several, ACCEPTANCE).host_ledger
    assert other is not None and other.checkpoints == checkpoints_bytes(spec, 4) > 3e9


def test_the_first_token_of_a_longer_prompt_is_said_to_come_later(
    spec: ModelSpec, plan: Plan, profile: Profile
) -> None:
    candidate = Candidate(raw_storage(spec), None, plan.verify_widths, None, "plain")

    def first_token(num_tokens: int) -> float:
        usage = Usage(num_tokens, 256)
        passes = passes_of(
            spec, profile, None, plan.verify_widths, ONE_TOKEN, plan.prefill_chunk_tokens, usage
        )
        said = predict(profile, candidate, passes, 20 * 10**9, ONE_TOKEN, 0, usage)
        return said.time_to_first_token_seconds

    seconds = [first_token(count) for count in (128, 2_000, 8_000, 32_000)]
    assert seconds == sorted(set(seconds)) and 0 < seconds[0] < seconds[-1] < 600
    assert plan.prefill_chunk_tokens < 32_000, "which takes two streams of the weights"


@pytest.fixture
def sequence(spec: ModelSpec, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Sequence:
    def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(caches, "in_host_memory", take)
    monkeypatch.setattr(caches, "commit_nodes", lambda *given: None)
    shapes = spec.resident_shapes.items()
    tensors = {name: take(shape, torch.float32) for name, shape in shapes}
    nets = make_net_states(spec, plan.verify_width, tensors, take)
    slots = cache_slots(plan.context, plan.verify_width)
    engine: Any = SimpleNamespace(
        plan=plan,
        artifact=SimpleNamespace(spec=spec),
        method="plain",
        padded=True,
        num_prefill_chunks=0,
        check_open=lambda: None,
        add=lambda sequence: None,
        remove=lambda sequence: None,
    )
    return Sequence(engine, caches.make_cache(spec, slots, take, nets))


def read(sequence: Sequence, plan: Plan, prompt: list[int]) -> list[int]:
    """The sizes of its pieces."""
    sequence.begin(prompt, GenerationParams())
    pieces = list[int]()
    while unread := sequence.unread:
        pieces.append(tokens_that_fit(plan, len(unread), plan.prefill_chunk_tokens))
        chunk = sequence.next_chunk(pieces[-1])
        sequence.cache.stops(chunk.checkpoints_at)
        sequence.cache.commit(list(chunk.tokens))
    return pieces


def decode(sequence: Sequence, num_tokens: int) -> list[int]:
    """By twenty a round; what is said."""
    said = [*range(100_000, 100_000 + num_tokens)]
    path = torch.arange(20, device="meta")
    for first in range(0, num_tokens, 20):
        sequence.cache.commit_path(path, said[first : first + 20])
    return said


def lengths(sequence: Sequence) -> list[int]:
    return [one.length for one in sequence.cache.checkpoints]


def test_a_prompt_of_32000_tokens_is_read_in_two_pieces_with_checkpoints_all_along(
    sequence: Sequence, plan: Plan
) -> None:
    prompt = [*range(32_000)]
    assert len(read(sequence, plan, prompt)) == 2
    assert sequence.cache.length == 32_000
    held = lengths(sequence)
    assert held[-1] == 31_984 and len(held) == CHECKPOINTS
    assert max(b - a for a, b in zip([0, *held], held, strict=False)) <= 10_240


@pytest.mark.parametrize(
    ("num_prompt", "num_said"), [(30_000, 1_000), (1_000, 9_000), (20_000, 12_000)]
)
def test_what_lies_before_the_ends_of_prompts_and_answers_is_not_read_again(
    sequence: Sequence, plan: Plan, num_prompt: int, num_said: int
) -> None:
    prompt = [*range(num_prompt)]
    read(sequence, plan, prompt)
    said = decode(sequence, num_said)
    assert num_prompt - 16 in lengths(sequence)
    assert sequence.cache.length - lengths(sequence)[-1] < 2048 + 20, "of an answer that is cut off"

    def reused(following: list[int]) -> int:
        read(sequence, plan, following)
        return sequence.stats.cached_tokens

    whole = [*prompt, *said]
    question, other = [*range(200_000, 200_300)], [*range(210_000, 210_100)]
    assert reused([*whole, *question]) == len(whole), "the next turn"
    decode(sequence, 5_000)
    assert reused([*whole, *question]) == len(whole) + 284, "its answer again"
    decode(sequence, 5_000)
    assert reused([*whole, *question[:30], *other]) == len(whole), "its question, edited"
    decode(sequence, 5_000)
    assert reused([*whole, *other]) == len(whole), "and once more"
    assert len(lengths(sequence)) + len(sequence.cache.unused) == CHECKPOINTS
    assert reused([*prompt[:-9], *other]) <= num_prompt - 16, "far back"
