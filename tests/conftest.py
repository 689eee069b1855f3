"""Tests that need a GPU are skipped where there is none, or run on a simulated one; Ctrl-C works
also in a background job; folders are where the product has nothing to say about them."""

import mmap
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import subspec.artifacts  # noqa: F401  before any test imports torch: see there
from subspec.artifacts.common.user_cache import cache_problem

# Of this process and its children, unless a test says otherwise: threads that wait for each other
# take minutes on a busy machine. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulated-cuda", action="store_true", help="run the tests of GPUs on a simulated one"
    )


def pytest_configure(config: pytest.Config) -> None:
    """A shell's background job ignores SIGINT, what nohup starts SIGHUP, and children would too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Engines would say on stderr that weights are read through the page cache, or that compiled
    # kernels are not kept; tests compare all that is said there.
    if refuses_direct_reads(tempfile.gettempdir()):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")
    if cache_problem("kernels") is not None:
        own = tempfile.mkdtemp(prefix="subspec-cache-")
        config.add_cleanup(lambda: shutil.rmtree(own, ignore_errors=True))
        os.environ["XDG_CACHE_HOME"] = own  # of xdist's processes too
    if config.getoption("--simulated-cuda"):
        from simcuda.device import simulated  # torch, and seconds: only where it is asked for

        stack = ExitStack()
        stack.enter_context(simulated())
        config.add_cleanup(stack.close)


def refuses_direct_reads(folder: str) -> bool:
    """Some file systems do when a file is opened, as tmpfs of Linux before 6.6 does, some when it
    is read."""
    with tempfile.NamedTemporaryFile(dir=folder) as file, mmap.mmap(-1, mmap.PAGESIZE) as page:
        file.write(page)
        file.flush()
        try:
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return True
        try:
            return os.preadv(descriptor, [page], 0) < len(page)
        except OSError:
            return True
        finally:
            os.close(descriptor)


@pytest.fixture(autouse=True)
def same_handler_of_interrupts() -> Iterator[None]:
    """A command that leaves after Ctrl-C ignores the next one: right for a process, not for one of
    tests, whose later children would wait for ever for the one that they are sent."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The file that takes longest comes first, so that two processes end together.
    items.sort(key=lambda item: item.path.name != "test_lossless.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # takes seconds: only where a test asks for it

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    elif config.getoption("--simulated-cuda"):
        for item in marked:
            if item.get_closest_marker("real_gpu"):
                item.add_marker(pytest.mark.skip(reason="a simulated GPU cannot show it"))
            else:
                item.add_marker(pytest.mark.usefixtures("nothing_found"))


@pytest.fixture
def nothing_found() -> object:
    """On the simulated GPU: no race, and no host memory stays pinned."""
    from simcuda.simulation import active

    active().races.clear()
    yield
    assert not active().races
    assert not active().registered
