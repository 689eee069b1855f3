"""All of torch's private names that the simulated device uses, for torch 2.11 to 2.13."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map"]

GUARD = Path(__file__).with_name("guard.cpp")
BUILT = Path(__file__).parents[2] / "build" / "simcuda"

no_torch_function = torch._C._disabled_torch_function_impl
# In the module where torch's own `graphs.py` of this project calls it.
END_ALLOCATE_TO_POOL = (torch._C, "_cuda_endAllocateToPool")


def wrapper_of(cls: type, inner: torch.Tensor, device: torch.device) -> Any:
    """A tensor of `cls` that says it is on `device`, of the shape of `inner`."""
    with torch.inference_mode(False):  # an inference tensor cannot be changed outside of the mode
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=False,
        )


def storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@cache
def is_composite(name: str) -> bool:
    """Whether an operation is made of others, on every device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "CompositeImplicitAutograd") and not has(name, "CPU")


@contextmanager
def no_lifting() -> Iterator[None]:
    """torch.tensor(..., device="cuda") makes a host tensor and copies it, as the copy is seen."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def built_guard() -> Path:
    """guard.cpp as a library, built once for this torch."""
    from torch.utils.cpp_extension import include_paths

    key = sha256(GUARD.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target = BUILT / f"guard-{key}.so"
    if target.exists():
        return target
    BUILT.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        made = Path(folder) / "guard.so"
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", abi, *includes, str(GUARD)]
        subprocess.run(["g++", *flags, libraries, "-lc10", "-o", str(made)], check=True)
        made.replace(target)
    return target
