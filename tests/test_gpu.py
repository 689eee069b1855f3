"""The CUDA path: skipped without a GPU, run by `make gpu-check`; `make test-simulated-gpu` runs it
on the simulated device, with shorter answers."""

import time
from pathlib import Path

import pytest
import torch
from builders import build_artifact, converted, random_checkpoint, replan
from families import config_of
from heads import eagle3_checkpoints, eagle_checkpoints
from interpreter import needs_interpreter
from invariance import widths_here
from running import answer, generated
from simcuda.simulation import is_active

from subspec.artifacts.footprint import packed_bytes
from subspec.artifacts.format.packing import pack_nibbles
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.plan import Method
from subspec.planner.model.hub import DEMO
from subspec.runtime.draft.drafter import SubstituteDrafter
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.kernels.linear import int4_product, int4_product_plainly, pack
from subspec.runtime.model.sampling import SamplingParams
from subspec.runtime.sequence import GenerationParams
from subspec.runtime.stream.link import HostLink
from subspec.runtime.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.gpu
PROMPTS = ("def read_file(path):\n", "class Cache:\n", "import os\n")


def tokens(count: int) -> int:
    """Of an answer: few on the simulated device, which is slow."""
    return count // 12 if is_active() else count


@pytest.fixture(scope="module", params=["raw", "residual"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("gpu") / "artifact"
    return build_artifact(DEMO, out, request.param, device="cuda", context=512)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.8, seed=3)], ids=str
)
@pytest.mark.parametrize(
    "plan", [(1, 24, 0.0, 0.3), (6, 5, 0.5, 0.0), (8, 3, 1.0, 0.0), (4, 12, 0.5, 0.9)], ids=str
)
def test_speculation_gives_the_tokens_of_plain_decoding_on_cuda(
    artifact: Artifact, plan: tuple[int, int, float, float], sampling: SamplingParams
) -> None:
    """Each verification as wide as its draft needs, in the widths of one group of the GPU's."""
    width, depth, share, threshold = plan
    widths = widths_here(artifact.spec, "cuda", 1 + width * depth)
    text = load_tokenizer(artifact.path / "tokenizer")
    said, prompts = [], PROMPTS[:1] if is_active() else PROMPTS
    for method in ("substitute", "plain"):
        chosen = replan(
            artifact, width=width, depth=depth, resident_share=share, verify_widths=widths,
            context=512, device="cuda", min_path_probability=threshold,
        )  # fmt: skip
        with Engine.open(chosen, OpenOptions(method)) as engine:  # type: ignore[arg-type]
            for prompt in prompts:
                said.append(answer(engine, text.plain_ids(prompt), tokens(96), sampling))
    assert said[: len(prompts)] == said[len(prompts) :]


@pytest.mark.parametrize("method", ["substitute", "plain"])
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParams(), marks=pytest.mark.slow),
        SamplingParams(temperature=0.8, seed=3),
    ],
    ids=str,
)
def test_three_sequences_get_the_tokens_that_each_gets_alone_on_cuda(
    artifact: Artifact, sampling: SamplingParams, method: Method
) -> None:
    text = load_tokenizer(artifact.path / "tokenizer")
    ids = [text.plain_ids(prompt) for prompt in PROMPTS]
    chosen = replan(
        artifact, width=2, depth=7, context=512, device="cuda",
        verify_widths=widths_here(artifact.spec, "cuda", 15), num_sequences=3,
        min_path_probability=0.8,
    )  # fmt: skip
    with Engine.open(chosen, OpenOptions(method)) as engine:
        alone = [answer(engine, prompt, tokens(64), sampling) for prompt in ids]
        sequences = [engine.new_sequence() for _ in ids]
        for sequence, prompt in zip(sequences, ids, strict=True):
            sequence.begin(prompt, GenerationParams(tokens(64), sampling))
            engine.step()
        while engine.step():
            pass
        assert [sequence.take_new_tokens() for sequence in sequences] == alone


@pytest.mark.parametrize("shape", [(1, 8), (6, 5)], ids=str)
def test_captured_levels_draft_what_single_kernels_do(
    artifact: Artifact, shape: tuple[int, int]
) -> None:
    """Long enough for a second set of graphs. ATen's kernel gives the same bits every time."""
    if is_active() and any(one.encoding == "residual" for one in artifact.stored_parts()):
        pytest.skip("it takes long, and a draft reads no residual")
    chosen = replan(artifact, width=shape[0], depth=shape[1], context=512, device="cuda")
    said, accepted = [], []
    num_tokens = 48 if is_active() else 200
    for graphs in (False, True):
        with (
            Engine.open(chosen, OpenOptions(graphs=graphs)) as engine,
            engine.new_sequence() as sequence,
        ):
            said.append(generated(sequence, [*range(40, 60)], GenerationParams(num_tokens)))
            accepted.append(sequence.stats.accepted)
            assert engine.missing_graphs_reason is None
            assert isinstance(engine.model.drafter, SubstituteDrafter)
            captured = engine.model.drafter.captured.get((sequence.cache,))
            assert captured is None if not graphs else captured and len(captured.replays) > 1
    assert said[0] == said[1] and accepted[0] == accepted[1]


@needs_interpreter
def test_a_model_with_delta_nets_gives_its_plain_tokens_on_cuda(tmp_path: Path) -> None:
    """From captured levels as well."""
    # Small: Triton's interpreter is slow.
    config = config_of("qwen3_5_text", num_hidden_layers=2, full_attention_interval=2)
    source = random_checkpoint(tmp_path / "f32", config)
    source = converted(source, tmp_path / "bf16", torch.bfloat16)
    built = build_artifact(source, tmp_path / "artifact", device="cuda")
    chosen = replan(built, width=3, depth=2, device="cuda")
    said = []
    ways = (OpenOptions("plain"), OpenOptions(graphs=False), OpenOptions())
    for how in ways:
        with Engine.open(chosen, how) as engine:
            said.append(answer(engine, [*range(40, 50)], tokens(60)))
            assert how.method == "plain" or engine.missing_graphs_reason is None
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("layout", ["eagle", "eagle3"])
def test_a_draft_head_gives_the_plain_tokens_on_cuda(layout: str, tmp_path: Path) -> None:
    """Its kernels are launched one by one."""
    made = eagle_checkpoints if layout == "eagle" else eagle3_checkpoints
    source, head = made(tmp_path, torch.bfloat16, foreseen=True)
    built = build_artifact(
        source, tmp_path / "artifact", draft_head=head, width=2, depth=3, device="cuda",
        drafts_with_head=True,
    )  # fmt: skip
    said = []
    for how in (OpenOptions("plain"), OpenOptions(drafter=layout)):  # type: ignore[arg-type]
        with Engine.open(built, how) as engine:
            said.append(answer(engine, [*range(40, 50)], tokens(96)))
    assert said[0] == said[1]


@pytest.mark.parametrize("kernel", ["aten", "gemlite"])
@pytest.mark.parametrize("rows", [1, 6, 8])
@pytest.mark.parametrize("columns", [512, 192])  # 192: whole groups, but no whole 128 columns
def test_the_cuda_4_bit_kernels_agree_with_their_plain_twin(
    kernel: str, rows: int, columns: int
) -> None:
    if kernel == "gemlite":
        pytest.importorskip("gemlite")
    generator = torch.Generator().manual_seed(0)
    codes = pack_nibbles(torch.randint(16, (256, columns), dtype=torch.uint8, generator=generator))
    scale = torch.rand(columns // 64, 256, generator=generator) * 0.01 + 0.001
    zero_point = (torch.rand(columns // 64, 256, generator=generator) * 15 - 7) * scale
    qparams = torch.stack((scale, zero_point), dim=-1).bfloat16()
    sizes = packed_bytes(256, columns, kernel)  # type: ignore[arg-type]
    room = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    weight = pack(codes, qparams, kernel, *room)  # type: ignore[arg-type]
    x = torch.randn(rows, columns, generator=generator).bfloat16()
    got = int4_product(x.cuda(), weight).float().cpu()
    expected = int4_product_plainly(x, codes, qparams)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-2


@pytest.mark.real_gpu
def test_planning_the_demo_model_for_cuda_measures_it(tmp_path: Path) -> None:
    from subspec.planner.cli import main

    out = tmp_path / "artifact"
    arguments = ["--model", "demo", "--vram", "2GB", "--device", "cuda", "--out", str(out)]
    main(arguments, standalone_mode=False)
    assert (out / "manifest.json").exists()


@pytest.mark.real_gpu
def test_a_slowed_link_takes_the_time_that_was_asked_for(tmp_path: Path) -> None:
    """Not the copy's own beside it."""
    block_bytes, count, asked = 16 << 20, 32, 2e9
    path = tmp_path / "weights"
    path.write_bytes(bytes(block_bytes))
    slots = [torch.empty(block_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    link = HostLink(path, [(0, block_bytes)], slots, asked)
    try:
        started = time.perf_counter()
        for index in range(count):
            link.begin(index % 2, 0, block_bytes)
            link.release(index % 2)
        torch.cuda.synchronize()
        taken = time.perf_counter() - started
    finally:
        link.close()
    assert taken == pytest.approx(count * block_bytes / asked, rel=0.15)
