"""Gated delta nets: the rule against its definition in f64, and what speculation needs of it: a
row's bits depend on its path alone."""

import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import Build, built
from torch import Tensor

from subspec.artifacts.footprint import delta_net_scratch_bytes
from subspec.runtime.model import delta_net as net
from subspec.runtime.model import rounded
from subspec.runtime.model.delta_net import (
    DeltaInputs,
    DeltaState,
    DeltaWeights,
    End,
)
from subspec.runtime.model.paths import Paths, chain_paths, tree_paths

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Shape = tuple[int, int, int, int, int]  # G, J, E, F, K
Function = Callable[..., Tensor]
SHAPES: list[Shape] = [(2, 4, 8, 12, 4), (1, 3, 16, 32, 4), (3, 3, 12, 8, 3), (2, 2, 5, 70, 1)]


BUILDS = {
    "native": Build((), ""),
    "avx512f": Build(("-march=haswell", "-mavx512f"), "avx512f"),
    "avx2": Build(("-march=haswell",), "avx2"),
    "sse2": Build(("-march=x86-64",), "sse2"),
}


@pytest.fixture(scope="module", params=BUILDS)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """delta_net_in_cpp() as it is, and as built for other instruction sets."""
    with built(BUILDS[request.param], tmp_path_factory.mktemp("cache")):
        assert net.unavailable() is None
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """A test may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What delta_net() calls: the compiled one, and without a compiler its plain twin."""
    if request.param == "plain":
        monkeypatch.setattr(net, "unavailable", lambda: "there is none")


def layer(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[DeltaWeights, DeltaState]:
    num_keys, num_values, key_size, value_size, conv_kernel_size = shape
    channels = 2 * num_keys * key_size + num_values * value_size
    generator = torch.Generator().manual_seed(seed)

    def some(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    weights = DeltaWeights(
        conv=some(channels, 1, conv_kernel_size).to(dtype),
        decay_log=some(num_values),
        step_bias=some(num_values).to(dtype),
        norm=some(value_size).to(dtype),
        epsilon=1e-6,
    )
    state = DeltaState(
        some(conv_kernel_size - 1, channels).to(dtype), some(num_values, key_size, value_size)
    )
    return weights, state


def rows(shape: Shape, dtype: torch.dtype, count: int) -> tuple[DeltaInputs, Tensor]:
    num_keys, num_values, key_size, value_size, _ = shape
    generator = torch.Generator().manual_seed(count)
    channels = 2 * num_keys * key_size + num_values * value_size
    sizes = (channels, num_values, num_values, num_values * value_size)
    qkv, b, a, z = (torch.randn(count, size, generator=generator).to(dtype) for size in sizes)
    return DeltaInputs(qkv, b, a), z


def picked(inputs: DeltaInputs, some: Sequence[int]) -> DeltaInputs:
    return DeltaInputs(*(tensor[list(some)] for tensor in vars(inputs).values()))


def copied(state: DeltaState) -> DeltaState:
    return DeltaState(state.conv.clone(), state.memory.clone())


def equal(one: DeltaState, other: DeltaState) -> bool:
    return torch.equal(one.conv, other.conv) and torch.equal(one.memory, other.memory)


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Zeros of either sign are not the same."""
    of_size = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.contiguous().view(of_size), other.contiguous().view(of_size))


def random_tree(count: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(-1, row) for row in range(count)]


def path_to(parents: Sequence[int], row: int) -> list[int]:
    return [*path_to(parents, parents[row]), row] if row >= 0 else []


def one_by_one(
    weights: DeltaWeights, state: DeltaState, inputs: DeltaInputs, z: Tensor
) -> tuple[Tensor, DeltaState]:
    """Rows of a chain, each in a pass of its own -> their outputs, and the state behind them."""
    state, found, conv_kernel_size = copied(state), [], weights.conv.shape[-1]
    for row in range(len(z)):
        some = picked(inputs, [row])
        given = (weights, state, chain_paths(1, conv_kernel_size), some, z[row : row + 1])
        found.append(net.delta_net(*given))
        net.commit(weights, state, chain_paths(1, conv_kernel_size), some)
    return torch.cat(found), state


def defined(
    weights: DeltaWeights, state: DeltaState, inputs: DeltaInputs, z: Tensor
) -> tuple[Tensor, Tensor]:
    """A chain as the paper and the models' definition have it, in f64 -> outputs and memory."""
    memory = state.memory.double()
    num_heads, key_size, value_size = memory.shape
    before = torch.cat((state.conv, inputs.qkv)).double()
    mixed = F.conv1d(before.t(), weights.conv.double(), groups=before.shape[1]).t()
    of_keys = (before.shape[1] - num_heads * value_size) // 2
    q, k, v = F.silu(mixed).split((of_keys, of_keys, num_heads * value_size), dim=1)
    repeats = num_heads * key_size // of_keys
    q, k = (x.unflatten(1, (-1, key_size)).repeat_interleave(repeats, 1) for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    beta = inputs.b.double().sigmoid()
    log_decay = -weights.decay_log.double().exp() * F.softplus(
        inputs.a.double() + weights.step_bias.double()
    )
    found = []
    for t in range(len(z)):
        memory = memory * log_decay[t].exp()[:, None, None]
        error = v[t].view(num_heads, value_size) - torch.einsum("jef,je->jf", memory, k[t])
        memory = memory + torch.einsum("je,jf->jef", k[t], error * beta[t][:, None])
        found.append(torch.einsum("jef,je->jf", memory, q[t]) * key_size**-0.5)
    out = torch.stack(found)
    out = out / (out.square().mean(-1, keepdim=True) + weights.epsilon).sqrt()
    gate = F.silu(z.double()).view(out.shape)
    return (out * weights.norm.double() * gate).flatten(1), memory


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_is_what_the_definition_says(shape: Shape) -> None:
    weights, state = layer(shape, torch.float32)
    inputs, z = rows(shape, torch.float32, 9)
    out, memory = defined(weights, state, inputs, z)
    got, after = one_by_one(weights, state, inputs, z)
    torch.testing.assert_close(got.double(), out, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(after.memory.double(), memory, rtol=1e-4, atol=2e-5)
    assert torch.equal(after.conv, torch.cat((state.conv, inputs.qkv))[9:])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_tree_has_the_bits_that_its_path_has_row_by_row(
    shape: Shape, dtype: torch.dtype
) -> None:
    weights, state = layer(shape, dtype)
    unread = copied(state)
    for seed, count in enumerate((1, 2, 5, 11)):
        inputs, z = rows(shape, dtype, count)
        parents = random_tree(count, seed)
        out = net.delta_net(weights, state, tree_paths(parents, shape[-1]), inputs, z)
        for row in range(count):
            path = path_to(parents, row)
            alone, _ = one_by_one(weights, state, picked(inputs, path), z[path])
            assert torch.equal(alone[-1], out[row])
    assert equal(state, unread)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_kept_path_leaves_the_state_of_a_prompt_with_its_tokens(
    shape: Shape, dtype: torch.dtype
) -> None:
    weights, state = layer(shape, dtype)
    inputs, z = rows(shape, dtype, 20)
    _, expected = one_by_one(weights, state, inputs, z)
    committed = copied(state)
    for first, count in ((0, 1), (1, 5), (6, 2), (8, 12)):
        paths = chain_paths(count, shape[-1])
        net.commit(weights, committed, paths, picked(inputs, range(first, first + count)))
    assert equal(committed, expected)


@pytest.mark.usefixtures("kernel")
def test_a_prompt_in_pieces_has_the_bits_of_one_and_leaves_states_on_its_way() -> None:
    shape = SHAPES[0]
    weights, state = layer(shape, torch.bfloat16)
    inputs, z = rows(shape, torch.bfloat16, 30)
    expected, _ = one_by_one(weights, state, inputs, z)
    _, halfway = one_by_one(weights, state, picked(inputs, range(12)), z[:12])
    live, mark, found = copied(state), copied(state), []
    for first, end in ((0, 5), (5, 30)):
        some = range(first, end)
        ends = [End(end - first - 1, live)]
        if first <= 11 < end:
            ends.append(End(11 - first, mark))
        given = (chain_paths(len(some), shape[-1]), picked(inputs, some), z[first:end])
        found.append(net.delta_net(weights, live, *given, ends))
    assert torch.equal(torch.cat(found), expected)
    assert equal(mark, halfway)
    committed = copied(state)
    net.commit(weights, committed, chain_paths(30, shape[-1]), inputs)
    assert equal(live, committed)


@pytest.mark.usefixtures("kernel")
def test_rows_beyond_the_paths_are_padding_and_become_zeros() -> None:
    shape = SHAPES[0]
    weights, state = layer(shape, torch.bfloat16)
    inputs, z = rows(shape, torch.bfloat16, 8)
    paths = tree_paths([-1, 0, 0], shape[-1])
    out = net.delta_net(weights, state, paths, inputs, z)
    few = net.delta_net(weights, state, paths, picked(inputs, range(3)), z[:3])
    assert torch.equal(out[:3], few) and not out[3:].any()


LARGE: Shape = (4, 8, 64, 64, 4)  # worth several threads


def leaves(
    given: tuple[DeltaWeights, DeltaState, Paths, DeltaInputs, Tensor], function: Function
) -> list[Tensor]:
    """The outputs, and the states behind the first and the last row."""
    _, state, paths, _, _ = given
    ends = [End(row, copied(state)) for row in (0, len(paths) - 1)]
    out = function(*given, ends)
    return [out, *(tensor for end in ends for tensor in (end.state.conv, end.state.memory))]


@pytest.mark.usefixtures("build", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_one_has_the_bits_of_the_plain_twin(dtype: torch.dtype) -> None:
    for shape, count in zip((*SHAPES, LARGE), (9, 1, 40, 5, 37), strict=True):
        weights, state = layer(shape, dtype)
        inputs, z = rows(shape, dtype, count)
        for paths in (
            tree_paths(random_tree(count, 3), shape[-1]),
            chain_paths(count, shape[-1]),
        ):
            given = weights, state, paths, inputs, z
            expected = leaves(given, net.delta_net_in_torch)
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                got = leaves(given, net.delta_net_in_cpp)
                assert all(map(equal_bits, got, expected))


@pytest.mark.usefixtures("build", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_commit_has_the_bits_of_a_pass_that_is_read(dtype: torch.dtype) -> None:
    """Compiled, and by the plain twin: all that it leaves out is what q reads."""
    for shape, count in zip((*SHAPES, LARGE), (9, 1, 40, 5, 37), strict=True):
        weights, state = layer(shape, dtype)
        inputs, z = rows(shape, dtype, count)
        paths, expected = chain_paths(count, shape[-1]), copied(state)
        net.delta_net_in_torch(weights, state, paths, inputs, z, [End(count - 1, expected)])
        plain = copied(state)
        net.commit_in_parts(weights, plain, paths, inputs, net.walk)
        assert equal_bits(plain.memory, expected.memory) and equal_bits(plain.conv, expected.conv)
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            compiled = copied(state)
            net.commit_in_cpp(weights, compiled, paths, inputs)
            assert equal_bits(compiled.memory, expected.memory)
            assert equal_bits(compiled.conv, expected.conv)


@pytest.mark.usefixtures("build")
def test_tensors_stored_in_f32_are_not_rounded() -> None:
    shape = SHAPES[0]
    weights, state = layer(shape, torch.float32)
    _, state = layer(shape, torch.bfloat16)
    inputs, z = rows(shape, torch.bfloat16, 6)
    given = weights, state, chain_paths(6, shape[-1]), inputs, z
    assert equal_bits(net.delta_net_in_cpp(*given, []), net.delta_net_in_torch(*given, []))


@pytest.mark.usefixtures("build", "threads")
def test_it_stays_within_its_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    edge, allocated, empty = 4096, list[Tensor](), torch.empty

    def with_edges(size: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        if not isinstance(size, int):
            return empty(size, dtype=dtype)
        allocated.append(torch.full((size + 2 * edge,), 0xA5, dtype=dtype))
        return allocated[-1][edge : edge + size]

    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for shape in (*SHAPES, LARGE):
            weights, state = layer(shape, torch.bfloat16)
            inputs, z = rows(shape, torch.bfloat16, 33)
            given = weights, state, tree_paths(random_tree(33, 1), shape[-1]), inputs, z
            expected = net.delta_net_in_cpp(*given, [])
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", with_edges)
                got = net.delta_net_in_cpp(*given, [])
            assert equal_bits(got, expected)
            around = torch.cat((allocated[-1][:edge], allocated[-1][-edge:]))
            assert bool((around == 0xA5).all())


def test_scratch_is_for_each_thread_and_slot() -> None:
    assert delta_net_scratch_bytes(1, 32, 32, 4, 0) == 4 * (36 * 96 + 32 * 34)
    assert delta_net_scratch_bytes(3, 32, 64, 4, 5) == 4 * 3 * (36 * 128 + 32 * 66 + 5 * 2048)


def test_a_chain_is_a_tree() -> None:
    for conv_kernel_size in (1, 3, 4):
        chain, tree = (
            chain_paths(6, conv_kernel_size),
            tree_paths([-1, 0, 1, 2, 3, 4], conv_kernel_size),
        )
        assert all(torch.equal(getattr(chain, n), getattr(tree, n)) for n in ("windows", "sources"))
        assert torch.equal(chain.slots, tree.slots) and chain.num_slots == tree.num_slots == 1


def test_a_beam_needs_a_slot_for_each_of_its_rows_and_no_more() -> None:
    parents = [-1, *(0,) * 4, *range(1, 5), *range(5, 9)]
    assert tree_paths(parents, 4).num_slots <= 5


def test_square_roots_are_correctly_rounded_wherever_a_number_stands() -> None:
    x = torch.cat((torch.rand(5000), torch.rand(5000) * 1e30, torch.rand(5000) * 1e-30))
    assert rounded.square_root(x).tolist() == [f32(math.sqrt(one)) for one in x.tolist()]


def f32(x: float) -> float:
    found: float = struct.unpack("f", struct.pack("f", x))[0]
    return found


@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus", "exp_of_negative"])
def test_functions_of_rounded_operations_are_those_of_torch_wherever_a_number_stands(
    name: str,
) -> None:
    x = torch.cat((torch.linspace(-130, 90, 4001), torch.tensor([0.0, -0.0, 1e-30, float("nan")])))
    if name == "exp_of_negative":
        x = -x.abs()
    function = getattr(rounded, name)
    plain = getattr(torch, {"exp_of_negative": "exp"}.get(name, name), None) or getattr(F, name)
    got = function(x)
    torch.testing.assert_close(
        got.double(), plain(x.double()), rtol=1e-5, atol=1e-35, equal_nan=True
    )
    assert torch.equal(got[:-1], torch.stack([function(one) for one in x[:-1]]))
    assert torch.equal(got[:-1].repeat(5), function(x[:-1].repeat(5)))
