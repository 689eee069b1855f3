import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.folder import _is_mount_point, new_folder


def fill(folder: Path, text: str) -> None:
    """What makes a folder an artifact in the eyes of --overwrite, and one more level."""
    for name in ("manifest.json", "plan.json", "tokenizer/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def build(path: Path, text: str, overwrite: bool = False) -> None:
    with new_folder(path, overwrite) as folder:
        fill(folder, text)


def text_of(path: Path) -> str | None:
    """The text of a complete folder; None: there is none."""
    if not path.exists():
        return None
    texts = {file.read_text() for file in path.rglob("*.json")}
    assert len(texts) == 1 and len(list(path.rglob("*.json"))) == 3
    return texts.pop()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_takes_its_name_at_the_end_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "artifact"
    with new_folder(target, overwrite=False) as folder:
        fill(folder, "new")
        assert not target.exists() and folder.parent == target.parent
    assert text_of(target) == "new"
    assert names(target.parent) == ["artifact"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_takes_a_folder_and_a_note_says_so(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    build(tmp_path / "artifact", "new")
    assert text_of(tmp_path / "artifact") == "new"
    assert capsys.readouterr().err.count("two plannings at once are not kept apart") == 1


def test_only_a_folder_need_not_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, refused = os.fsync, stat.S_ISDIR

    def refusing(descriptor: int) -> None:
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    build(tmp_path / "artifact", "new")
    assert text_of(tmp_path / "artifact") == "new"
    refused = stat.S_ISREG
    with pytest.raises(OSError, match="Invalid argument"):
        build(tmp_path / "other", "new")
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    target = tmp_path / "artifact"
    if existing:
        build(target, "old")
    with pytest.raises(error), new_folder(target, overwrite=existing) as folder:
        fill(folder, "new")
        raise error
    assert text_of(target) == ("old" if existing else None)
    assert names(tmp_path) == (["artifact"] if existing else [])


def test_an_existing_artifact_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    with pytest.raises(SubspecError, match="exists already") as caught:
        build(target, "new")
    assert caught.value.exit_code == Exit.USAGE and "--overwrite" in caught.value.hint
    assert text_of(target) == "old"
    build(target, "new", overwrite=True)
    assert text_of(target) == "new"
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize("content", ["thesis.tex", "manifest.json", "plan.json"])
def test_a_folder_that_is_not_an_artifact_is_never_overwritten(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / content).write_text("precious")
    with pytest.raises(SubspecError, match="is not an artifact") as caught:
        build(tmp_path / "mine", "new", overwrite=True)
    assert caught.value.exit_code == Exit.USAGE
    assert (tmp_path / "mine" / content).read_text() == "precious"
    assert names(tmp_path) == ["mine"]


def test_a_file_is_never_overwritten_and_an_empty_folder_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SubspecError, match="is not an artifact"):
        build(tmp_path / "file", "new", overwrite=True)
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", "new", overwrite=True)
    assert text_of(tmp_path / "empty") == "new"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, "lost+found", "link"])
def test_an_empty_folder_is_filled_where_it_is(
    tmp_path: Path, content: str | None, overwrite: bool
) -> None:
    """It may be a mount point, or the one place where its owner may write."""
    target = tmp_path / "empty"
    target.mkdir()
    if content == "lost+found":
        (target / content).mkdir()
    if content == "link":
        (tmp_path / "link").symlink_to(target)
    before = target.stat().st_ino
    with new_folder(tmp_path / "link" if content == "link" else target, overwrite) as folder:
        fill(folder, "new")
        assert folder.parent == target and not (target / "manifest.json").exists()
    assert text_of(target) == "new" and target.stat().st_ino == before
    kept = ["lost+found"] if content == "lost+found" else []
    assert names(target) == [*kept, "manifest.json", "plan.json", "tokenizer"]
    assert names(tmp_path) == sorted(["empty", *(["link"] if content == "link" else [])])


@pytest.mark.parametrize("content", [".hidden", ".git", "thesis.tex"])
def test_a_folder_with_anything_in_it_is_not_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("precious")
    for overwrite, said in ((False, "exists already"), (True, "is not an artifact")):
        with pytest.raises(SubspecError, match=said) as caught:
            build(tmp_path, "new", overwrite)
        assert caught.value.hint == "choose another --out"
    assert names(tmp_path) == [content]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_an_empty_folder_empty(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error), new_folder(tmp_path, overwrite=False) as folder:
        fill(folder, "new")
        raise error
    assert names(tmp_path) == []


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder is a mount point."""
    monkeypatch.setattr("subspec.artifacts.format.folder._is_mount_point", lambda path: True)


@pytest.mark.usefixtures("mounted")
def test_an_artifact_in_a_mount_point_is_replaced_without_moving_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    build(target, "old")
    (target / "lost+found").mkdir()
    (target / "only_old").touch()
    before = target.stat().st_ino
    build(target, "new", overwrite=True)
    assert text_of(target) == "new" and target.stat().st_ino == before
    assert names(target) == ["lost+found", "manifest.json", "plan.json", "tokenizer"]


def test_a_mount_point_is_known_as_one(tmp_path: Path) -> None:
    assert _is_mount_point(Path("/proc"))
    assert not _is_mount_point(tmp_path)


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    build(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    build(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert text_of(tmp_path / "real") == "new"


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SubspecError, match="cannot write in") as caught:
        build(tmp_path / "file" / "artifact", "new")
    assert caught.value.exit_code == Exit.USAGE


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(SubspecError, match="No space left") as caught, new_folder(target, False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == Exit.RESOURCES
    assert names(tmp_path) == []


def test_other_system_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), new_folder(tmp_path / "artifact", False):
        raise ConnectionError


# Where the builder is killed: before which call of what, counted from the start of the block.
KILLS = {
    "at once": "die()",
    "half written": "(folder / 'manifest.json').write_text('ne'); die()",
    "written": "fill(folder); die()",
    "before syncing": "fill(folder); before(module, '_sync_tree', 1)",
    "while syncing": "fill(folder); before(module, '_sync', 3)",
    "before the first rename": "fill(folder); before(Path, 'rename', 1)",
    "between the renames": "fill(folder); before(Path, 'rename', 2)",
    "before removing the old one": "fill(folder); before(module.shutil, 'rmtree', 1)",
    "while removing the old one": "fill(folder); before(os, 'rmdir', 1)",
}
BUILDER = """
import os, signal, sys
from pathlib import Path
from subspec.artifacts.format import folder as module

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, count):
    original, calls = getattr(owner, name), []
    def counted(*arguments, **options):
        calls.append(name)
        return (die if len(calls) == count else original)(*arguments, **options)
    setattr(owner, name, counted)

def fill(folder):
    for name in ("manifest.json", "plan.json", "tokenizer/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("new")

with module.new_folder(Path(sys.argv[1]), overwrite=True) as folder:
    exec(sys.argv[2])
"""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwriting"])
@pytest.mark.parametrize("where", KILLS)
def test_a_kill_leaves_no_half_folder_and_the_next_build_cleans_up(
    tmp_path: Path, where: str, existing: bool
) -> None:
    target = tmp_path / "artifact"
    if existing:
        build(target, "old")
    command = [sys.executable, "-c", BUILDER, str(target), KILLS[where]]
    code = subprocess.run(command, timeout=60).returncode
    only_when_overwriting = where in list(KILLS)[-3:]
    assert code == (0 if only_when_overwriting and not existing else -signal.SIGKILL)
    left = text_of(target)  # also asserts that it is complete
    assert left in ((None, "old", "new") if existing else (None, "new"))
    if existing and left is None:
        with pytest.raises(SubspecError, match="exists already"):  # the next call has put it back
            build(target, "next", overwrite=False)
        assert text_of(target) == "old"
    build(target, "next", overwrite=True)
    assert text_of(target) == "next"
    assert names(tmp_path) == ["artifact"]


IN_PLACE = """
module._is_mount_point = lambda path: True
with module.new_folder(Path(sys.argv[1]), overwrite=True) as folder:
    exec(sys.argv[2])
"""


@pytest.mark.usefixtures("mounted")
@pytest.mark.parametrize("existing", [False, True], ids=["empty", "overwriting"])
@pytest.mark.parametrize("rename", range(1, 8))
def test_a_kill_among_the_renames_in_place_is_finished_or_undone_by_the_next_build(
    tmp_path: Path, rename: int, existing: bool
) -> None:
    target = tmp_path / "artifact"
    (target / "lost+found").mkdir(parents=True)
    if existing:
        build(target, "old")
    code = BUILDER.partition("\nwith module")[0] + IN_PLACE
    killing = f"fill(folder); before(Path, 'rename', {rename})"
    done = subprocess.run([sys.executable, "-c", code, str(target), killing], timeout=60)
    first_new = 5 if existing else 2  # the three old files move, then the folder's name changes
    assert done.returncode == (-signal.SIGKILL if rename < first_new + 3 else 0)
    expected = "new" if rename >= first_new else "old" if existing else None
    if expected is not None:
        with pytest.raises(SubspecError, match="exists already"):
            build(target, "next")
        assert text_of(target) == expected
    build(target, "next", overwrite=True)
    assert text_of(target) == "next"
    assert names(target) == ["lost+found", "manifest.json", "plan.json", "tokenizer"]


def test_a_second_builder_of_one_target_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with new_folder(target, overwrite=False) as folder:
        fill(folder, "first")
        with pytest.raises(SubspecError, match=f"another process, {os.getpid()}$") as caught:
            build(target, "second", overwrite=True)
        assert caught.value.exit_code == Exit.RESOURCES
        build(tmp_path / "other", "at the same time")
    assert text_of(target) == "first"
    assert names(tmp_path) == ["artifact", "other"]


def test_the_lock_of_a_killed_builder_is_free(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    waiting = "fill(folder); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(target), waiting],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(SubspecError, match=f"another process, {other.pid}$"):
            build(target, "mine")
        other.kill()
    assert other.returncode == -signal.SIGKILL and not target.exists()
    build(target, "mine")
    assert text_of(target) == "mine"
    assert names(tmp_path) == ["artifact"]
