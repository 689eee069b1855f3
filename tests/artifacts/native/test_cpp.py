"""C++ sources become libraries: once, in private, and with a sentence where that fails."""

import ctypes
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from subspec.artifacts.common import user_cache
from subspec.artifacts.common.user_cache import user_cache_dir
from subspec.artifacts.native import cpp, residual_cpu


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing loaded; afterwards as if nothing had been."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    user_cache._held.cache_clear()
    cpp.library.cache_clear()
    yield tmp_path
    cpp.library.cache_clear()
    user_cache._held.cache_clear()


def fake_compiler(folder: Path, script: str) -> str:
    """A program that runs `script`, with the output as $last."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\necho >>{folder}/builds\nfor last; do :; done\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that a fake compiler may hand out; built in a second, without optimisation."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("built") / "library.so"
    flags = [flag for flag in cpp.FLAGS if flag != "-O3"]
    cpp._run(["g++", *flags, str(residual_cpu.SOURCE), "-o", str(path)])
    return path


def test_without_a_compiler_it_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    reason = residual_cpu.unavailable()
    assert reason is not None and "no-such-compiler" in reason and "\n" not in reason


def test_what_the_compiler_complains_about_is_passed_on(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo a warning >&2; echo 'a.cpp:1: error: no such luck' >&2; exit 1"
    monkeypatch.setenv("CXX", fake_compiler(fresh, script))
    reason = residual_cpu.unavailable()
    assert reason is not None and "a.cpp:1: error: no such luck" in reason
    assert not (fresh / "cache").exists()


def test_a_linkers_reason_goes_before_the_compilers_word_that_it_failed(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status"
    )
    monkeypatch.setenv("CXX", fake_compiler(fresh, f"echo '{said}' >&2; exit 1"))
    reason = residual_cpu.unavailable()
    assert reason == "compiler failed: ld: final link failed: No space left on device"


def test_what_cannot_be_loaded_is_reported(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, 'echo nonsense >"$last"'))
    reason = residual_cpu.unavailable()
    assert reason is not None and "loaded" in reason


def test_what_was_kept_and_cannot_be_loaded_is_built_again(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'cp {built} "$last"'))
    folder = user_cache_dir("kernels")
    assert folder is not None
    kept = folder / cpp.library_name(residual_cpu.SOURCE)
    kept.write_bytes(b"nonsense")
    assert residual_cpu.unavailable() is None
    assert kept.stat().st_size == built.stat().st_size


def test_what_is_kept_needs_no_compiler(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'cp {built} "$last"'))
    assert residual_cpu.unavailable() is None
    cpp.library.cache_clear()
    (fresh / "compiler").unlink()
    assert residual_cpu.unavailable() is None


def test_it_is_built_once_into_a_private_folder(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'cp {built} "$last"'))
    for _ in range(2):
        assert residual_cpu.unavailable() is None
        cpp.library.cache_clear()
    folder = fresh / "cache" / "subspec" / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    assert len((fresh / "builds").read_text()) == 1
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-g"))  # other flags, other file
    assert residual_cpu.unavailable() is None
    assert len((fresh / "builds").read_text()) == 2 and len([*folder.iterdir()]) == 2


def test_a_change_in_what_a_source_includes_is_another_library(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'cp {built} "$last"'))
    source, header, deeper = (fresh / name for name in ("a.cpp", "b.hpp", "c.hpp"))
    source.write_text('#include <algorithm>\n  # include "b.hpp"  // and that c\n')
    header.write_text('#pragma once\n#include "c.hpp"\n')
    deeper.write_text('#include "b.hpp"\n')  # a circle ends too

    def builds() -> int:
        cpp.library.cache_clear()
        assert cpp.unavailable(source, lambda library: None) is None
        return len((fresh / "builds").read_text())

    assert builds() == builds() == 1
    deeper.write_text('#include "b.hpp"\nconstexpr int ROWS = 16;\n')
    assert builds() == builds() == 2
    header.unlink()
    cpp.library.cache_clear()
    reason = cpp.unavailable(source, lambda library: None)
    assert reason is not None and "b.hpp" in reason


def test_several_builds_at_once_do_not_disturb_each_other(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'sleep 0.1; cp {built} "$last"'))
    reasons: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: reasons.append(residual_cpu.unavailable()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [None] * 4
    assert len([*(fresh / "cache" / "subspec" / "kernels").iterdir()]) == 1


def test_a_cache_that_others_may_write_to_or_that_cannot_be_is_not_used(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'cp {built} "$last"'))
    folder = fresh / "cache" / "subspec" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert residual_cpu.unavailable() is None
    assert [*folder.iterdir()] == []
    cpp.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert residual_cpu.unavailable() is None


def test_a_cache_on_a_disk_without_programs_keeps_a_library_and_memory_loads_it(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounted noexec: the loader is refused there."""
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'cp {built} "$last"'))
    load = ctypes.CDLL

    def refusing(path: str) -> ctypes.CDLL:
        if path.startswith(str(fresh)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refusing)
    for _ in range(2):
        assert residual_cpu.unavailable() is None
        cpp.library.cache_clear()
        user_cache._held.cache_clear()  # as at the next start
    assert len((fresh / "builds").read_text()) == 1


def test_where_nothing_can_be_kept_a_library_is_built_once_in_a_process(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh, f'cp {built} "$last"'))
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    with cpp.build_ahead([residual_cpu.SOURCE]):
        assert residual_cpu.unavailable() is None
    cpp.library.cache_clear()
    assert residual_cpu.unavailable() is None
    assert len((fresh / "builds").read_text()) == 1


def test_a_build_that_is_not_waited_for_ends_with_all_its_processes_and_files(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As g++ does: a driver that waits for another program.
    monkeypatch.setenv("CXX", fake_compiler(fresh, f"sleep 60 & echo $! >{fresh}/started; wait"))
    with cpp.build_ahead([residual_cpu.SOURCE]):
        while not ((fresh / "started").exists() and (fresh / "started").read_text()):
            time.sleep(0.01)
    started = int((fresh / "started").read_text())
    limit = time.monotonic() + 10  # until whoever adopted it has noticed
    while time.monotonic() < limit and is_running(started):
        time.sleep(0.01)
    assert not is_running(started)
    assert not (fresh / "cache").exists()


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
