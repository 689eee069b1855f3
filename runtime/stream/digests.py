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
from subspec.artifacts.format.tensors import open_regular
from subspec.runtime.memory import bytes_of

PIECE_BYTES = 1 << 20  # of a file that are read at a time


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

    def check_file(self, path: Path, entry: FileEntry) -> None:
        """A whole file, in its chunks; what of it is read stays in the page cache."""

        def digest(first: int) -> str:
            found, piece = hashlib.sha256(), bytearray(PIECE_BYTES)
            with open_regular(path) as file:
                file.seek(first)
                left = min(CHUNK_BYTES, entry.num_bytes - first)
                while left > 0 and (count := file.readinto(memoryview(piece)[:left])):
                    found.update(memoryview(piece)[:count])
                    left -= count
            return found.hexdigest()

        for index, expected in enumerate(entry.chunks):
            first = index * CHUNK_BYTES
            self._submit(entry.path, expected, lambda first=first: digest(first))  # type: ignore[misc]

    def submit(self, work: Callable[[], None]) -> None:
        """Other work that reads and compares, beside what is checked."""
        if len(self._pending) >= self._most_pending:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work))

    def finish(self) -> None:
        """Waits for what is under way. Raises SubspecError(CORRUPT)."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, name: str, expected: str, digest: Callable[[], str]) -> None:
        def compare() -> None:
            compare_digest(name, digest(), expected)

        self.submit(compare)


def compare_digest(name: str, found: str, expected: str) -> None:
    """Raises SubspecError(CORRUPT)."""
    if found != expected:
        raise SubspecError(
            Exit.CORRUPT, f"{name} does not match its digest", "copy or build the artifact again"
        )
