"""The artifact folder: write, open, check. docs/format.md describes it for other readers."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from subspec.artifacts.codec import dump_json, load_dataclass, parse_json
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import (
    GROUP_SIZE,
    PAGE_BYTES,
    ModelSpec,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.plan import Plan
from subspec.artifacts.profile import Profile
from subspec.artifacts.sizes import short_size
from subspec.artifacts.tensors import open_regular, read_header

FORMAT_VERSION = "1.0"  # major: readers refuse a newer one; minor: readers carry on
CHUNK_BYTES = 64 << 20
LARGEST_JSON = 32 << 20
MANIFEST = "manifest.json"
REQUIRED = (
    "model.json", "plan.json", "profile.json",
    "substitutes.safetensors", "exact.safetensors", "resident.safetensors",
    "tokenizer/tokenizer.json",
)  # fmt: skip


@dataclass(frozen=True)
class FileEntry:
    path: str  # relative, "/" between folders
    role: str
    num_bytes: int
    chunks: tuple[str, ...]  # SHA-256 of each 64 MiB, hexadecimal


@dataclass(frozen=True)
class PartEntry:
    """Where one Part lies in exact.safetensors."""

    name: str
    offset: int  # from the beginning of the file; a multiple of PAGE_BYTES
    num_bytes: int  # without the padding up to the next page
    encoding: str = "raw"  # the checkpoint's bytes


@dataclass(frozen=True)
class Manifest:
    format_version: str
    producer: str
    files: tuple[FileEntry, ...]
    parts: tuple[PartEntry, ...]


@dataclass(frozen=True)
class Artifact:
    """An opened folder. Nothing but JSON and headers has been read."""

    path: Path
    manifest: Manifest
    spec: ModelSpec
    plan: Plan
    profile: Profile

    def part_offsets(self) -> dict[str, PartEntry]:
        return {entry.name: entry for entry in self.manifest.parts}


# Writing


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its name at the end of the block.

    An error or a kill leaves `path` as it was. Left-over temporary folders of dead builds are
    removed by the next build.
    """
    if path.exists() and not overwrite:
        raise SubspecError(Exit.USAGE, f"{path} exists already", "add --overwrite or another --out")
    if path.exists() and not (path / MANIFEST).is_file() and any_entry(path):
        raise SubspecError(
            Exit.USAGE, f"{path} exists and is not an artifact", "choose another --out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.building-*"):
        if not _alive(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)
    temporary = path.parent / f".{path.name}.building-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if path.exists():
            old = path.parent / f".{path.name}.replaced-{os.getpid()}"
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def any_entry(path: Path) -> bool:
    return not path.is_dir() or next(path.iterdir(), None) is not None


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(dump_json(value), encoding="utf-8")


def write_manifest(
    folder: Path, producer: str, part_entries: tuple[PartEntry, ...], known: dict[str, FileEntry]
) -> Manifest:
    """Lists every file of `folder` with its digests; `known` saves hashing large files twice."""
    files = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = file.relative_to(folder).as_posix()
        files.append(known.get(name) or file_entry(folder, name))
    manifest = Manifest(FORMAT_VERSION, producer, tuple(files), part_entries)
    text = dump_json(_sealed(manifest))
    temporary = folder / f".{MANIFEST}.new"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)
    return manifest


def file_entry(folder: Path, name: str) -> FileEntry:
    with open_regular(folder / name) as file:
        chunks = tuple(hashlib.sha256(data).hexdigest() for data in _chunks(file))
        size = os.fstat(file.fileno()).st_size
    return FileEntry(name, name.partition("/")[0].partition(".")[0], size, chunks)


def _sealed(manifest: Manifest) -> dict[str, Any]:
    body = asdict(manifest)
    return {**body, "digest": hashlib.sha256(dump_json(body).encode()).hexdigest()}


# Opening


def open_artifact(path: Path) -> Artifact:
    """Structural check: JSON, sizes and headers; reads no weights. Raises SubspecError."""
    if not path.is_dir():
        raise SubspecError(Exit.USAGE, f"{path} is not a folder", "give the folder of an artifact")
    if not (path / MANIFEST).exists():
        raise SubspecError(
            Exit.CORRUPT,
            f"{path} has no {MANIFEST}: not an artifact, or one that was never finished",
            "make one with subspec-plan --model REF --vram SIZE",
        )
    manifest = read_manifest(path)
    for entry in manifest.files:
        _check_name(entry.path)
        with open_regular(path / entry.path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != entry.num_bytes:
            raise SubspecError(
                Exit.CORRUPT,
                f"{entry.path} is {size} bytes, the manifest says {entry.num_bytes}",
                "copy or build the artifact again",
            )
    listed = {entry.path for entry in manifest.files}
    for name in REQUIRED:
        if name not in listed:
            raise SubspecError(Exit.CORRUPT, f"{MANIFEST} does not list {name}")
    spec = _load(path, "model.json", ModelSpec)
    plan = _load(path, "plan.json", Plan)
    profile = _load(path, "profile.json", Profile)
    _check_weights(path, manifest, spec)
    _check_plan(spec, plan)
    return Artifact(path, manifest, spec, plan, profile)


def read_manifest(path: Path) -> Manifest:
    text = _read_small(path / MANIFEST)
    value = parse_json(text, MANIFEST)
    if not isinstance(value, dict):
        raise SubspecError(Exit.CORRUPT, f"{MANIFEST} is not an object")
    version = value.get("format_version")
    if not isinstance(version, str) or not version.partition(".")[0].isdigit():
        raise SubspecError(Exit.CORRUPT, f"{MANIFEST}: format_version is {version!r}")
    if int(version.partition(".")[0]) > int(FORMAT_VERSION.partition(".")[0]):
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"the artifact has format {version}, this program reads {FORMAT_VERSION}",
            "upgrade subspec",
        )
    value.pop("digest", None)
    manifest = load_dataclass(Manifest, value, MANIFEST)
    if dump_json(_sealed(manifest)).encode() != text:
        raise SubspecError(
            Exit.CORRUPT,
            f"{MANIFEST} does not match its own digest",
            "copy or build the artifact again",
        )
    return manifest


def verify(path: Path) -> int:
    """Complete check: every byte of every listed file. Returns the bytes read."""
    artifact = open_artifact(path)
    total = 0
    for entry in artifact.manifest.files:
        with open_regular(path / entry.path) as file:
            digests = tuple(hashlib.sha256(data).hexdigest() for data in _chunks(file))
        for index, (got, expected) in enumerate(zip(digests, entry.chunks, strict=True)):
            if got != expected:
                first = index * CHUNK_BYTES
                last = min(first + CHUNK_BYTES, entry.num_bytes)
                raise SubspecError(
                    Exit.CORRUPT,
                    f"{entry.path}: bytes {first} to {last} do not match their digest",
                    "copy or build the artifact again",
                )
        total += entry.num_bytes
    return total


def _check_weights(path: Path, manifest: Manifest, spec: ModelSpec) -> None:
    """The headers hold what the spec calls for, and every part lies inside its file."""
    resident = read_header(path / "resident.safetensors")
    for name, shape in resident_tensors(spec).items():
        stored = resident.get(name)
        if stored is None or stored.shape != shape:
            got = "nothing" if stored is None else list(stored.shape)
            raise SubspecError(
                Exit.CORRUPT, f"resident.safetensors: {name} is {got}, expected {list(shape)}"
            )
    substitutes = read_header(path / "substitutes.safetensors")

    for linear in linears(spec):
        if not linear.has_substitute:
            continue
        n, k = linear.out_features, linear.in_features
        shapes = {"codes": (n, k // 2), "scale": (n, k // GROUP_SIZE), "zero": (n, k // GROUP_SIZE)}
        for suffix, shape in shapes.items():
            stored = substitutes.get(f"{linear.name}.{suffix}")
            if stored is None or stored.shape != shape:
                got = "nothing" if stored is None else list(stored.shape)
                raise SubspecError(
                    Exit.CORRUPT,
                    f"substitutes.safetensors: {linear.name}.{suffix} is {got}, "
                    f"expected {list(shape)}",
                )
    size = next(e.num_bytes for e in manifest.files if e.path == "exact.safetensors")
    read_header(path / "exact.safetensors")
    entries = {entry.name: entry for entry in manifest.parts}
    for part in parts(spec):
        entry = entries.get(part.name)
        if entry is None:
            raise SubspecError(Exit.CORRUPT, f"{MANIFEST} does not list the part {part.name}")
        inside = 0 <= entry.offset and entry.offset + part.padded_bytes <= size
        if entry.num_bytes != part.num_bytes or entry.offset % PAGE_BYTES or not inside:
            raise SubspecError(
                Exit.CORRUPT,
                f"{MANIFEST}: part {part.name} is {entry.num_bytes} bytes at {entry.offset}, "
                f"expected {part.num_bytes} at a multiple of {PAGE_BYTES} below {size}",
            )


def _check_plan(spec: ModelSpec, plan: Plan) -> None:
    names = {part.name for part in parts(spec)}
    largest = max((part.padded_bytes for part in parts(spec)), default=0)
    for label, placement in (("substitute", plan.substitute), ("plain", plan.plain)):
        if placement is None:
            continue
        for name in placement.resident:
            if name not in names:
                raise SubspecError(Exit.CORRUPT, f"plan.json: {label} places an unknown {name!r}")
        streams = len(set(placement.resident)) < len(names)
        if streams and (placement.num_slots < 2 or placement.block_bytes < largest):
            raise SubspecError(
                Exit.CORRUPT,
                f"plan.json: {label} has {placement.num_slots} slots of "
                f"{placement.block_bytes} bytes, expected 2 or more of {largest}",
            )
        if placement.total_bytes > plan.budget_bytes or min(placement.ledger.values()) < 0:
            raise SubspecError(
                Exit.CORRUPT,
                f"plan.json: {label} adds up to {short_size(placement.total_bytes)}, "
                f"more than its budget of {short_size(plan.budget_bytes)}",
            )
    tree = plan.tree
    sane = (
        1 <= tree.width <= 256
        and 0 <= tree.depth <= 1024
        and tree.num_nodes <= plan.verify_width <= 4096
        and 1 <= plan.context <= spec.max_positions
        and 1 <= plan.num_threads <= 1024
        and 1 <= plan.prefill_chunk <= 65536
    )
    if not sane or (plan.method == "substitute" and plan.substitute is None):
        raise SubspecError(
            Exit.CORRUPT,
            f"plan.json: tree {tree.width}x{tree.depth}, verify width {plan.verify_width}, context "
            f"{plan.context}, {plan.num_threads} threads do not go together",
        )


def _load(path: Path, name: str, kind: type) -> Any:
    return load_dataclass(kind, parse_json(_read_small(path / name), name), name)


def _read_small(file_path: Path) -> bytes:
    with open_regular(file_path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_JSON:
            raise SubspecError(
                Exit.CORRUPT,
                f"{file_path.name} is {size} bytes, expected at most {LARGEST_JSON}",
            )
        return file.read()


def _check_name(name: str) -> None:
    pure = PurePosixPath(name)
    fine = (
        name == pure.as_posix()
        and not pure.is_absolute()
        and ".." not in pure.parts
        and not any(c in name for c in "\\:\0")
        and 0 < len(name) <= 255
    )
    if not fine:
        raise SubspecError(Exit.CORRUPT, f"{MANIFEST} names a file {name[:200]!r}")


def _chunks(file: Any) -> Iterator[bytes]:
    while data := file.read(CHUNK_BYTES):
        yield data


def _alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
