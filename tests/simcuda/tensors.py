"""Tensors of the simulated device: wrappers around host tensors that the host cannot reach."""

from typing import Any

import torch
from simcuda.private import no_torch_function, storage_key, wrapper_of
from simcuda.simulation import HostAccess, active, where


class SimTensor(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "SimTensor":
        made: SimTensor = wrapper_of(cls, inner, device)
        made.inner = inner
        return made

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        raise HostAccess(f"data_ptr of GPU memory at {where()}")

    def numpy(self, **_: object) -> Any:
        raise HostAccess(f"numpy of GPU memory at {where()}")

    def untyped_storage(self) -> Any:
        return SimStorage(self)

    def tolist(self) -> Any:
        return self.cpu().tolist()  # one copy, as torch has it

    def __repr__(self, **_: object) -> str:
        return f"SimTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


class SimStorage:
    """What the project asks of a storage."""

    def __init__(self, tensor: SimTensor) -> None:
        self._tensor = tensor

    @property
    def _cdata(self) -> int:
        return storage_key(self._tensor.inner)

    def nbytes(self) -> int:
        return self._tensor.inner.untyped_storage().nbytes()

    def resize_(self, size: int) -> None:
        assert size == 0
        active().forget(self._cdata)
        self._tensor.inner.untyped_storage().resize_(0)


def is_sim(value: object) -> bool:
    return isinstance(value, SimTensor)


def raw(value: Any) -> Any:
    """The host tensor behind a simulated one; anything else as it is."""
    return value.inner if isinstance(value, SimTensor) else value
