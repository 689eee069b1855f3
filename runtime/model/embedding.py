"""Embedding rows from slow memory, a row per token: the matrix never takes fast memory.

T = rows, V = vocabulary, H = hidden size
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError, not_read
from subspec.artifacts.format.tensors import StoredTensor
from subspec.runtime.memory import bytes_of, pinned_buffer, unpin

# tokens int64 [T] -> [T, H] in the checkpoint's dtype, on the tokens' device
EmbeddingRows = Callable[[Tensor], Tensor]


class FileRows:
    """Embedding rows on cpu: read from the artifact through the page cache, outside the budget."""

    def __init__(self, path: Path, stored: StoredTensor, dtype: torch.dtype) -> None:
        self._path = path
        self._offset = stored.offset
        self._row_size = stored.shape[1]
        self._dtype = dtype
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = torch.empty(len(tokens), self._row_size, dtype=self._dtype)
        size = self._row_size * self._dtype.itemsize
        view = bytes_of(rows.view(torch.uint8).view(-1))
        for index, token in enumerate(tokens.tolist()):
            piece = view[index * size : (index + 1) * size]
            try:
                count = os.preadv(self._descriptor, [piece], self._offset + token * size)
            except OSError as error:
                raise not_read(self._path.name, error) from None
            if count != size:
                raise SubspecError(
                    Exit.CORRUPT,
                    f"{self._path.name} ends within the embedding row of token {token}",
                    "copy or build the artifact again",
                )
        return rows

    def close(self) -> None:
        os.close(self._descriptor)


class MappedRows:
    """Embedding rows on cuda: the GPU gathers them from a pinned copy in host memory, so that a
    graph can capture it. `gather_on_host` is its plain twin."""

    def __init__(
        self, path: Path, stored: StoredTensor, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._raw = pinned_buffer(stored.num_bytes)
        try:
            with open(path, "rb") as file:
                file.seek(stored.offset)
                if file.readinto(bytes_of(self._raw)) != stored.num_bytes:
                    raise SubspecError(Exit.CORRUPT, f"{path.name} ends within the embedding")
            self.host = self._raw.view(dtype).view(stored.shape)
            self._mapped = mapped_on(self._raw, device).view(dtype).view(stored.shape)
        except BaseException:
            self.close()
            raise

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self._mapped)

    def close(self) -> None:
        unpin(self._raw)


def gather_on_host(host: Tensor, tokens: Tensor) -> Tensor:
    """Plain twin of MappedRows: host [V, H], tokens int64 [T] on any device -> [T, H] there."""
    return F.embedding(tokens.cpu(), host).to(tokens.device)


def mapped_on(host: Tensor, device: torch.device) -> Tensor:
    """The bytes of registered host memory, uint8 [n], as a tensor of the GPU: under unified
    addressing both have one address."""

    class Mapped:
        __cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(host.shape),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }

    return torch.as_tensor(Mapped(), device=device)
