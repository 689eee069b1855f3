"""Digest checks: SHA-256 of every weight that is read, before a token depends on it.

hashlib releases the GIL, so threads compute the digests while weights are loaded.
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

PIECE_BYTES = 1 << 20  # of a file, read at a time


class Digests:
    """Background checks; `finish` raises the first error. The queue of checks is bounded."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="subspec-digest")
        self._most_pending = 2 * num_threads
        self._pending: deque[Future[None]] = deque()

    def check_part(self, name: str, stored: Tensor, expected: str, substitute: str | None) -> None:
        """Check a part. stored: uint8 [bytes] on the host, unchanged until `finish`; substitute:
        the digest of the matrix's substitute if this is a residual."""
        self._submit(name, expected, lambda: part_digest([bytes_of(stored)], substitute))

    def check_file(self, path: Path, entry: FileEntry) -> None:
        """Check every chunk of a file, which is left in the page cache."""

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
        """Run other work that reads and compares in the same threads."""
        while len(self._pending) >= self._most_pending:
            self._take_result()
        self._pending.append(self._pool.submit(work))

    def finish(self) -> None:
        """Wait for all checks. Raises SubspecError(CORRUPT) for a mismatch."""
        while self._pending:
            self._take_result()

    def _take_result(self) -> None:
        """Wait for the oldest check. It stays pending if it fails, or if waiting is interrupted."""
        self._pending[0].result()
        self._pending.popleft()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, name: str, expected: str, digest: Callable[[], str]) -> None:
        def compare() -> None:
            compare_digest(name, digest(), expected)

        self.submit(compare)


def compare_digest(name: str, found: str, expected: str) -> None:
    """Raise SubspecError(CORRUPT) if a digest is not the expected one."""
    if found != expected:
        raise SubspecError(
            Exit.CORRUPT, f"{name} does not match its digest", "copy or build the artifact again"
        )
