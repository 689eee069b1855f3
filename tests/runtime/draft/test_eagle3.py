"""A head of EAGLE-3: what it reads and computes against the definition, written out."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from builders import build_artifact
from heads import EAGLE3_READS, EAGLE3_TOKENS, defined, eagle3_checkpoints
from running import generated
from safetensors.torch import load_file

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.checks import HEAD_FILE
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import ModelSpec
from subspec.runtime.draft.draft_head import (
    OUTSIDE,
    HeadWeights,
    logits_from,
    make_head,
    next_hidden,
    read_from,
)
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.exact_pass import causal_rows
from subspec.runtime.kernels.linear import gemm_ranges
from subspec.runtime.load import check_token_ids
from subspec.runtime.model.attention import attend, attend_batch_invariant
from subspec.runtime.model.cache import Cache, make_cache
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.model.transformer import forward_hidden, make_shared, make_tables
from subspec.runtime.sequence import GenerationParams

SLOTS = 64
EAGLE3 = OpenOptions(drafter="eagle3")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[False, True], ids=["as published", "of speculators"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eagle3")
    eagle3_checkpoints(folder, torch.float32, speculators=request.param)
    return folder


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return build_artifact(
        folder / "model", folder / "artifact", draft_head=folder / "head", drafts_with_head=True
    )


def head_of(artifact: Artifact, embedding: torch.Tensor) -> HeadWeights:
    spec = artifact.spec
    small = {name: torch.ones(shape) for name, shape in spec.resident_shapes.items()}
    tables = make_tables(spec, SLOTS, torch.float32, torch.clone)
    shared = make_shared(spec, embedding.__getitem__, small, tables, torch.float32, torch.clone)
    return make_head(shared, load_file(artifact.path / HEAD_FILE))


def empty_cache(head: HeadWeights) -> Cache:
    return make_cache(head.decoder.spec, SLOTS, lambda shape, dtype: torch.zeros(shape))


def random_text(spec: ModelSpec, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An embedding table, tokens, and the streams that the head reads of them."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(spec.vocab_size, spec.hidden_size, generator=generator)
    tokens = torch.randint(spec.vocab_size, (count,), generator=generator)
    return table, tokens, torch.randn(count, 3 * spec.hidden_size, generator=generator)


def test_it_computes_what_the_definition_says_in_any_number_of_pieces(artifact: Artifact) -> None:
    spec, tensors = artifact.spec, load_file(artifact.path / HEAD_FILE)
    table, tokens, streams = random_text(spec, 9)
    hidden = (streams.double() @ tensors["fc.weight"].double().T).float()
    expected = defined(spec, tensors, table[tokens], hidden)
    head = head_of(artifact, table)
    for sizes in ([9], [4, 1, 4]):
        cache, found = empty_cache(head), []
        for some, read in zip(tokens.split(sizes), streams.split(sizes), strict=True):
            rows = causal_rows(cache, some, attend)
            found.append(next_hidden(head, [rows], read_from(head, read)))
            cache.commit(some.tolist())
        torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-4, atol=1e-4)


def test_further_levels_take_what_it_returned_as_it_is(artifact: Artifact) -> None:
    """Neither its norm nor the fusion comes between."""
    spec, tensors = artifact.spec, load_file(artifact.path / HEAD_FILE)
    table, tokens, streams = random_text(spec, 9)
    head = head_of(artifact, table)
    cache, known = empty_cache(head), read_from(head, streams[:6])
    returned = next_hidden(head, [causal_rows(cache, tokens[:6], attend)], known)
    cache.commit(tokens[:6].tolist())
    for end in (7, 8, 9):
        known = torch.cat((known, returned[-1:]))
        last = tokens[end - 1 : end]
        returned = next_hidden(head, [causal_rows(cache, last, attend)], returned[-1:])
        cache.commit(last.tolist())
        expected = defined(spec, tensors, table[tokens[:end]], known)[-1:]
        torch.testing.assert_close(returned.double(), expected, rtol=1e-4, atol=1e-4)


def test_its_logits_are_of_its_own_tokens_and_all_others_are_far_below(artifact: Artifact) -> None:
    spec, tensors = artifact.spec, load_file(artifact.path / HEAD_FILE)
    hidden = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(2))
    x = hidden.double()
    normed = x / (x.square().mean(-1, keepdim=True) + spec.norm.epsilon).sqrt()
    own = normed * tensors["norm.weight"] @ tensors["lm_head.weight"].double().T

    def no_substitute(*_: object) -> torch.Tensor:
        raise AssertionError("the model's head is asked")

    found = logits_from(head_of(artifact, torch.empty(0)), no_substitute, hidden)
    assert found.shape == (5, spec.vocab_size) and found.dtype == torch.bfloat16
    ids = tensors["token_ids"]
    torch.testing.assert_close(found[:, ids].double(), own, rtol=1e-2, atol=1e-2)
    found[:, ids] = OUTSIDE
    assert len(ids) == EAGLE3_TOKENS and bool((found == found[0, 0]).all()) and found[0, 0] < -1e29
    assert bool(found.float().log_softmax(-1).isfinite().all())


def test_it_reads_the_stream_before_the_layers_that_it_names(
    folder: Path, artifact: Artifact
) -> None:
    """As transformers counts hidden states: that of 0 is the embedding."""
    import transformers

    text = list(range(40, 60))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "f32", dtype=torch.float32)
    streams = list[torch.Tensor]()
    model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0][0]))
    with torch.inference_mode():
        said = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        expected = torch.cat((said[1][0], said[2][0], streams[0]), dim=1)  # 3: behind the last
        with Engine.open(artifact, OpenOptions("plain")) as engine, engine.new_sequence() as one:
            rows = causal_rows(one.cache, torch.tensor(text), attend_batch_invariant)
            calls, weights = gemm_ranges([len(text)]), engine.model.weights
            _, found = forward_hidden(
                weights, engine.model.exact, [rows], calls, reads=EAGLE3_READS
            )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@dataclass
class Bounded:
    """In turns a token that the head has logits of, and one that it has none of."""

    inside: torch.Tensor  # bool [V]
    said: list[int] = field(default_factory=list)

    def allowed(self) -> torch.Tensor:
        return self.inside if len(self.said) % 2 else ~self.inside

    def push(self, token: int) -> None:
        self.said.append(token)

    def rollback(self, num_tokens: int) -> None:
        del self.said[len(self.said) - num_tokens :]


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.9, seed=5)], ids=str
)
def test_tokens_that_it_has_no_logits_of_are_said_where_a_constraint_wants_them(
    artifact: Artifact, sampling: SamplingParams
) -> None:
    ids = load_file(artifact.path / HEAD_FILE)["token_ids"]
    inside = torch.zeros(artifact.spec.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    answers = []
    for how in (OpenOptions("plain"), EAGLE3):
        with Engine.open(artifact, how) as engine, engine.new_sequence() as sequence:
            params = GenerationParams(12, sampling, constraint=Bounded(inside))
            answers.append(generated(sequence, list(range(40, 60)), params))
    assert answers[0] == answers[1]
    assert inside[answers[0]].tolist() == [False, True] * 6


def test_ids_that_are_not_different_tokens_are_refused_before_they_are_used() -> None:
    for wrong in ([0, 5, 2048], [-1, 3], [4, 4]):
        with pytest.raises(SubspecError, match="not different tokens of 2048") as raised:
            check_token_ids(torch.tensor(wrong), 2048)
        assert raised.value.exit_code == Exit.CORRUPT
    check_token_ids(torch.tensor([2047, 0]), 2048)
