"""What an operation on simulated tensors does, and what a GPU would refuse."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from simcuda.kernels import FORMS, KERNELS, attention
from simcuda.private import is_composite, storage_key, tree_leaves, tree_map
from simcuda.simulation import (
    CaptureError,
    MixedDevices,
    Race,
    Simulation,
    Unpinned,
    accesses,
    active,
    where,
)
from simcuda.tensors import SimTensor, is_sim, raw

# They give numbers, or shapes that depend on numbers: the host waits.
READ_BACK = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::is_nonzero",
    "aten::item", "aten::repeat_interleave.Tensor", "aten::bincount", "aten::nonzero_static_",
}  # fmt: skip
NOT_ON_CUDA = {
    "aten::mm": (torch.int64, torch.int32, torch.uint8, torch.int8),
    "aten::addmm": (torch.int64, torch.int32),
    "aten::bmm": (torch.int64, torch.int32),
}
FEW_KERNELS = (torch.uint16, torch.uint32, torch.uint64)
# Even a number of the host may not be among these operations' tensors.
TAKES_NO_NUMBER = {
    "aten::index", "aten::index_put_", "aten::index_copy_", "aten::gather", "aten::scatter",
    "aten::index_select", "aten::embedding", "aten::mm",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put"}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
MAKES_NOTHING = {
    "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty_strided",
}  # fmt: skip
MOVES_BETWEEN_DEVICES = {"aten::lift_fresh", "aten::lift", "aten::detach", "aten::alias"}


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    with active().lock:
        return run(active(), func, args, kwargs)


def run(simulation: Simulation, func: Any, args: Any, kwargs: Any) -> Any:
    name: str = func._schema.name
    leaves = tree_leaves((args, kwargs))
    sims = [one for one in leaves if is_sim(one)]
    asked = kwargs.get("device")
    if asked is None and name == "aten::to":
        asked = next((one for one in leaves if isinstance(one, torch.device)), None)
    if asked is not None:
        asked = torch.device(asked)
        if asked.type == "cuda":
            asked = simulation.device_of(asked)
    if not sims and (asked is None or asked.type != "cuda"):
        return func(*args, **kwargs)
    if name == "aten::scaled_dot_product_attention":
        return attention(simulation, func, args, kwargs)
    if name == "aten::to":
        return moved(simulation, func, args, kwargs)
    if name not in MOVES_BETWEEN_DEVICES and is_composite(func.name()):
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    simulation.operations[name] += 1
    device = sims[0].device if sims else asked
    check_capture(simulation, device)
    for one in sims:
        if one.device != device:
            raise MixedDevices(f"{name}: {[some.device for some in sims]} at {where()}")
    stream = simulation.current(device.index)
    if name == "aten::_to_copy" and asked is not None and (asked.type == "cpu" or not sims):
        return copied_across(simulation, func, args, kwargs, asked, stream)
    if name == "aten::copy_":
        return copied_into(simulation, func, args, kwargs, stream)
    check_operands(simulation, name, args, leaves, sims, device, stream)
    if reads_back(name, args):
        return read_back(simulation, func, args, kwargs, device, stream)
    if asked is not None and asked.type == "cpu":
        raise MixedDevices(f"{name} to the host at {where()}")
    return computed(simulation, func, args, kwargs, sims, device, stream)


def check_capture(simulation: Simulation, device: torch.device) -> None:
    graph = simulation.capturing
    if graph is not None and simulation.current(device.index) is not graph.stream:
        raise CaptureError(
            f"runs beside the capture on {graph.stream.device}, with tensors of {device}: "
            f"the graph stays empty, at {where()}"
        )


def check_operands(
    simulation: Simulation, name: str, args: Any, leaves: Any, sims: Any, device: Any, stream: Any
) -> None:
    """Raises for what CUDA does not compute. Only numbers without a dimension may be the host's."""
    hosts = [one for one in leaves if isinstance(one, torch.Tensor) and not is_sim(one)]
    if name == "aten::index_put_" and len(hosts) == 1 and hosts[0] is args[2] and not args[2].dim():
        simulation.wait("number from the host (index_put_)", stream)
        hosts = []
    for one in hosts if sims else []:
        if one.dim() > 0 or name in TAKES_NO_NUMBER:
            shape = tuple(one.shape)
            raise MixedDevices(f"{name}: host tensor {shape} with {device} at {where()}")
    for one in sims:
        if one.dtype in NOT_ON_CUDA.get(name, ()) or (
            one.dtype in FEW_KERNELS and "view" not in name
        ):
            raise RuntimeError(f"{name} is not implemented on CUDA for {one.dtype} at {where()}")


def reads_back(name: str, args: Any) -> bool:
    if name in READ_BACK:
        return True
    masks = (torch.bool, torch.uint8)
    return name in INDEXING and any(i is not None and i.dtype in masks for i in args[1])


def read_back(
    simulation: Simulation, func: Any, args: Any, kwargs: Any, device: Any, stream: Any
) -> Any:
    name = func._schema.name
    simulation.check_not_capturing(name)
    sims = [one for one in tree_leaves((args, kwargs)) if is_sim(one)]
    simulation.step(stream, name, sims, [])
    simulation.wait(name, stream)
    if simulation.back.type == "meta" and name == "aten::_local_scalar_dense":
        return 0
    out = func(*tree_map(raw, args), **tree_map(raw, kwargs))
    if not isinstance(out, torch.Tensor):
        return out
    simulation.add_storage(out, device, stream)
    return SimTensor(out, device)


def moved(simulation: Simulation, func: Any, args: Any, kwargs: Any) -> Any:
    """aten::to of any signature."""
    names = [one.name for one in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    x, other = given["self"], given.get("other")
    dtype = given.get("dtype") or (x if other is None else other).dtype
    target = torch.device(given.get("device") or (x if other is None else other).device)
    if target.type == "cuda":
        target = simulation.device_of(target)
    if dtype == x.dtype and target == x.device and not given.get("copy"):
        return x
    settings = {"dtype": dtype, "device": target, "non_blocking": given.get("non_blocking", False)}
    return run(simulation, torch.ops.aten._to_copy.default, (x,), settings)


def copied_across(
    simulation: Simulation, func: Any, args: Any, kwargs: Any, target: torch.device, stream: Any
) -> Any:
    """To or from the host."""
    simulation.check_not_capturing("a copy between host and device")
    [source], has_bytes = args, simulation.back.type == "cpu"
    if target.type == "cpu":
        shape, dtype = source.shape, kwargs.get("dtype") or source.dtype
        inner = {**kwargs, "device": "cpu"}
        out = func(raw(source), **inner) if has_bytes else torch.zeros(shape, dtype=dtype)
        simulation.step(stream, "copy to the host", [source], [])
        simulation.wait("copy to the host", stream)
        return out
    made = func(source, **{**kwargs, "device": simulation.back})
    if storage_key(made) == storage_key(source):
        made = made.clone()
    simulation.add_storage(made, target, stream)
    out = SimTensor(made, target)
    simulation.step(stream, "copy from the host", [], [out])
    if not (kwargs.get("non_blocking") and simulation.is_pinned(source)):
        simulation.wait("copy from the host", stream)
    return out


def copied_into(simulation: Simulation, func: Any, args: Any, kwargs: Any, stream: Any) -> Any:
    target, source, *more = args
    non_blocking = more[0] if more else kwargs.get("non_blocking", False)
    graph, has_bytes = simulation.capturing, simulation.back.type == "cpu"
    if is_sim(target) and is_sim(source):
        ranges = accesses([source], [target])
        if graph is not None:
            graph.record(func, (target.inner, source.inner), {}, None, ranges, "aten::copy_")
            return target
        func(target.inner, source.inner)
        simulation.step(stream, "copy_", [source], [target])
        return target
    simulation.check_not_capturing("a copy between host and device")
    if is_sim(target):
        if non_blocking and not simulation.is_pinned(source):
            raise Unpinned(f"an asynchronous copy of memory that is not pinned at {where()}")
        if has_bytes:
            func(target.inner, source)
        simulation.step(stream, "copy from the host", [], [target])
        if not non_blocking:
            simulation.wait("copy from the host", stream)
        return target
    if non_blocking:
        raise Race(f"a copy to the host that nobody waits for at {where()}")
    simulation.step(stream, "copy to the host", [source], [])
    simulation.wait("copy to the host", stream)
    return func(target, source.inner) if has_bytes else target.zero_()


def computed(
    simulation: Simulation, func: Any, args: Any, kwargs: Any, sims: Any, device: Any, stream: Any
) -> Any:
    """Runs on the tensors behind, or is recorded."""
    name, graph = func._schema.name, simulation.capturing
    inner_args = tree_map(raw, args)
    inner_kwargs = {
        key: simulation.back if key == "device" and value is not None else raw(value)
        for key, value in kwargs.items()
    }
    call = KERNELS.get(name, func)
    if simulation.back.type == "meta":
        call = FORMS.get(name, func)
    written = written_by(func, args, kwargs)
    if name in PRODUCTS and graph is None:
        simulation.take_workspace(device.index, stream)
    if graph is not None and written:
        graph.record(call, inner_args, inner_kwargs, None, accesses(sims, written), name)
        return written[0] if len(written) == 1 else tuple(written)
    if graph is not None:
        result = recorded_result(simulation, call, func, inner_args, inner_kwargs)
    else:
        result = call(*inner_args, **inner_kwargs)
    known = {storage_key(one.inner) for one in sims}
    by_inner = {id(one.inner): one for one in sims}
    made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]

    def wrap(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        if id(one) in by_inner:
            return by_inner[id(one)]
        if storage_key(one) not in known:
            simulation.add_storage(one, device, stream)
        return SimTensor(one, device)

    wrapped = tree_map(wrap, result)
    if not written and any(storage_key(one) in known for one in made):
        return wrapped  # a view
    outputs = [one for one in tree_leaves(wrapped) if is_sim(one)]
    reads = [one for one in sims if not any(one is other for other in written)]
    if graph is not None:
        ranges = accesses(reads, outputs + written)
        graph.record(call, inner_args, inner_kwargs, result, ranges, name)
    elif name not in MAKES_NOTHING:
        simulation.step(stream, name, reads, [*outputs, *written])
    return wrapped


def written_by(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Which of its arguments an operation writes."""
    found = list[Any]()
    for index, name in written_formals(func):
        given = args[index] if index < len(args) else kwargs.get(name)
        found += [one for one in tree_leaves(given) if is_sim(one)]
    return found


@cache
def written_formals(func: Any) -> list[tuple[int, str]]:
    return [
        (index, one.name)
        for index, one in enumerate(func._schema.arguments)
        if one.alias_info is not None and one.alias_info.is_write
    ]


def recorded_result(
    simulation: Simulation, call: Callable[..., Any], func: Any, args: Any, kwargs: Any
) -> Any:
    """A capture runs nothing: shapes alone, and poison for numbers. Views are views."""
    returns = func._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if is_view or simulation.back.type == "meta":
        return call(*args, **kwargs)

    def form(one: Any) -> Any:
        return one.to("meta") if isinstance(one, torch.Tensor) else one

    settings = {
        key: torch.device("meta") if key == "device" and value is not None else form(value)
        for key, value in kwargs.items()
    }
    try:
        shapes = FORMS.get(func._schema.name, call)(*tree_map(form, args), **settings)
    except NotImplementedError:
        shapes = call(*args, **kwargs)
    return tree_map(poison, shapes)


def poison(one: Any) -> Any:
    if not isinstance(one, torch.Tensor):
        return one
    out = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype)
    if out.is_floating_point():
        return out.fill_(float("nan"))
    return out.fill_(0 if out.dtype == torch.bool else 0x55)
