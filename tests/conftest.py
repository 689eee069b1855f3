"""Tests that need a GPU are skipped where there is none; Ctrl-C works also in a background job."""

import os
import signal

import pytest

import subspec.artifacts  # noqa: F401  before any test imports torch: see there

# Of this process and its children, unless a test says otherwise: threads that wait for each other
# take minutes on a busy machine. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """A shell's background job ignores SIGINT, what nohup starts SIGHUP, and children would too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # takes seconds: only where a test asks for it

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
