"""What was read is what was written: SHA-256 of every weight, before a token depends on it.

hashlib lets go of the interpreter, so the digests are taken by threads beside the loading.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import CHUNK_BYTES, FileEntry, part_digest
from subspec.artifacts.format.tensors import TensorFile
from subspec.runtime.memory import bytes_of


class Digests:
    """Compares in the background; `finish` raises what was found. Few tensors wait at a time."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="subspec-digest")
        self._most_pending = 2 * num_threads
        self._pending: deque[Future[None]] = deque()

    def check_part(self, name: str, stored: Tensor, expected: str, substitute: str | None) -> None:
        """stored: uint8 on the host, the part's bytes, unchanged until `finish`; substitute: the
        digest of the matrix's substitute if this is a residual."""
        self._submit(name, expected, lambda: part_digest([bytes_of(stored)], substitute))

    def check_substitute(self, name: str, codes: Tensor, qparams: Tensor, expected: str) -> None:
        """codes uint8 and qparams bf16 on the host, as they are stored."""
        pieces = [bytes_of(codes.view(-1)), bytes_of(qparams.view(-1).view(codes.dtype))]
        self._submit(name, expected, lambda: part_digest(pieces, None))

    def check_file(self, path: Path, entry: FileEntry) -> None:
        """A whole file, in its chunks."""

        def digest(first: int) -> str:
            data = bytearray(min(CHUNK_BYTES, entry.num_bytes - first))
            with TensorFile(path) as file:
                file.read_into(memoryview(data), first)
            return hashlib.sha256(data).hexdigest()

        for index, expected in enumerate(entry.chunks):
            first = index * CHUNK_BYTES
            self._submit(entry.path, expected, lambda first=first: digest(first))  # type: ignore[misc]

    def finish(self) -> None:
        """Waits for what is under way. Raises SubspecError(CORRUPT)."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, name: str, expected: str, digest: Callable[[], str]) -> None:
        def compare() -> None:
            if digest() != expected:
                raise SubspecError(
                    Exit.CORRUPT,
                    f"{name} does not match its digest",
                    "copy or build the artifact again",
                )

        if len(self._pending) >= self._most_pending:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(compare))
