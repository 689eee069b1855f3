"""The artifact folder: write, open, check. docs/format.md describes it for other readers."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.checks import HEAD_FILE, check_headers, check_plan, check_spec
from subspec.artifacts.format.codec import dump_json, load_dataclass, parse_json
from subspec.artifacts.format.folder import MANIFEST
from subspec.artifacts.format.tensors import open_regular, read_header
from subspec.artifacts.model import (
    PAGE_BYTES,
    Encoding,
    ModelSpec,
    StoredPart,
    padded,
)
from subspec.artifacts.plan import Plan
from subspec.artifacts.profile import Profile
from subspec.artifacts.runs import RUNS

# Readers refuse another major version. They accept a newer minor version, which may have added
# files, and top-level keys of JSON files.
FORMAT_VERSION = "10.0"
VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})", re.ASCII)
CHUNK_BYTES = 64 << 20
MAX_JSON = 8 << 20
NEW_MANIFEST = f".{MANIFEST}.new"
REQUIRED = (
    "model.json", "plan.json", "profile.json",
    "substitutes.safetensors", "exact.safetensors", "resident.safetensors",
    "embedding.safetensors", "tokenizer/tokenizer.json",
)  # fmt: skip
DRAFT_MODEL = "draft_model"  # folder of a smaller model that drafts
DRAFT_MODEL_FILES = (
    "model.json", "substitutes.safetensors", "resident.safetensors", "embedding.safetensors",
)  # fmt: skip
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
TOKENIZER_FILES = (
    "tokenizer/tokenizer.json", "tokenizer/settings.json", "tokenizer/chat_template.jinja",
)  # fmt: skip
MAX_TOKENIZER = 128 << 20  # bytes of its largest file; the largest known has 35 MB
FILE_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", re.ASCII)
AGAIN = "copy or build the artifact again"

T = TypeVar("T")
Buffer = bytes | memoryview


@dataclass(frozen=True)
class FileEntry:
    path: str  # relative, "/" between folders
    role: str
    num_bytes: int
    chunks: tuple[str, ...]  # SHA-256 of each 64 MiB, hexadecimal


@dataclass(frozen=True)
class PartEntry:
    """Place of one Part in exact.safetensors."""

    name: str
    offset: int  # from the beginning of the file; a multiple of PAGE_BYTES
    num_bytes: int  # without the padding up to the next page
    encoding: Encoding
    digest: str  # part_digest of these bytes


@dataclass(frozen=True)
class SubstituteEntry:
    """The substitute of one matrix. Its residuals decode correctly only with this one."""

    name: str  # of the linear
    # SHA-256 of its codes, then its qparams, then the scales of an FP8 matrix; hexadecimal
    digest: str


@dataclass(frozen=True)
class Manifest:
    format_version: str
    producer: str
    files: tuple[FileEntry, ...]
    parts: tuple[PartEntry, ...]
    substitutes: tuple[SubstituteEntry, ...]
    draft_model_substitutes: tuple[SubstituteEntry, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """An opened folder, of which only JSON and headers have been read."""

    path: Path
    manifest: Manifest
    spec: ModelSpec
    plan: Plan
    profile: Profile
    draft_model: ModelSpec | None = None  # a smaller model, whose files are in a folder of its own

    def part_entries(self) -> dict[str, PartEntry]:
        return {entry.name: entry for entry in self.manifest.parts}

    def stored_parts(self) -> list[StoredPart]:
        """The exact weights as they are stored, in execution order."""
        return [
            StoredPart(part, entry.encoding, entry.num_bytes)
            for part, entry in zip(self.spec.parts, self.manifest.parts, strict=True)
        ]


# Writing


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(dump_json(value), encoding="utf-8")


def write_manifest(
    folder: Path,
    producer: str,
    part_entries: tuple[PartEntry, ...],
    substitutes: tuple[SubstituteEntry, ...],
    known: dict[str, FileEntry],
    draft_model_substitutes: tuple[SubstituteEntry, ...] = (),
) -> Manifest:
    """Write the manifest: every file of `folder` except the run records, with its digests. `known`
    avoids hashing large files twice."""
    files = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in (MANIFEST, NEW_MANIFEST, RUNS):
            files.append(known.get(name) or file_entry(folder, name))
    manifest = Manifest(
        FORMAT_VERSION, producer, tuple(files), part_entries, substitutes, draft_model_substitutes
    )
    text = dump_json(_sealed(asdict(manifest)))
    temporary = folder / NEW_MANIFEST
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)
    return manifest


def file_entry(folder: Path, name: str) -> FileEntry:
    with open_regular(folder / name) as file:
        chunks = tuple(hashlib.sha256(data).hexdigest() for data in _chunks(file))
        size = os.fstat(file.fileno()).st_size
    return FileEntry(name, name.partition("/")[0].partition(".")[0], size, chunks)


def part_digest(stored: Iterable[Buffer], substitute_digest: str | None) -> str:
    """SHA-256 of a part's stored bytes, hexadecimal. For a residual the digest of its substitute is
    hashed first, so that neither can be exchanged alone."""
    found = hashlib.sha256(bytes.fromhex(substitute_digest) if substitute_digest else b"")
    for piece in stored:
        found.update(piece)
    return found.hexdigest()


def _sealed(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "digest": hashlib.sha256(dump_json(body).encode()).hexdigest()}


# Opening


def open_artifact(path: Path) -> Artifact:
    """Open an artifact with a structural check of JSON, sizes and headers; reads no weights.

    Raises SubspecError: USAGE if `path` is not a folder, WRONG_MACHINE for another format version,
    else CORRUPT.
    """
    if not path.is_dir():
        raise SubspecError(Exit.USAGE, f"{path} is not a folder", "give the folder of an artifact")
    if not (path / MANIFEST).exists():
        raise SubspecError(
            Exit.CORRUPT,
            f"{path} has no {MANIFEST}: not an artifact, or an unfinished one",
            "make one with subspec-plan --model REF --vram SIZE",
        )
    manifest = read_manifest(path)
    _check_files(path, manifest)
    newer = _version(manifest.format_version) > _version(FORMAT_VERSION)
    _check_tokenizer(path, manifest)
    spec = _load(ModelSpec, _read_json(path, manifest, "model.json"), "model.json", newer)
    plan = _load(Plan, _read_json(path, manifest, "plan.json"), "plan.json", newer)
    profile = _load(Profile, _read_json(path, manifest, "profile.json"), "profile.json", newer)
    check_spec(spec)
    if spec.draft_head is not None and HEAD_FILE not in {entry.path for entry in manifest.files}:
        raise _corrupt(f"{MANIFEST} does not list {HEAD_FILE}")
    if not spec.quantized:
        raise _corrupt("model.json says that no matrix has a substitute: only a draft model's may")
    check_headers(path, spec)
    _check_parts(path, manifest, spec)
    _check_substitutes(manifest.substitutes, spec)
    artifact = Artifact(path, manifest, spec, plan, profile)
    if f"{DRAFT_MODEL}/model.json" in {entry.path for entry in manifest.files}:
        artifact = replace(artifact, draft_model=_open_draft_model(path, manifest, newer))
    check_plan(spec, artifact.stored_parts(), plan, artifact.draft_model is not None)
    return artifact


def _open_draft_model(path: Path, manifest: Manifest, newer: bool) -> ModelSpec:
    _require(manifest, [f"{DRAFT_MODEL}/{name}" for name in DRAFT_MODEL_FILES])
    where = f"{DRAFT_MODEL}/model.json"
    spec: ModelSpec = _load(ModelSpec, _read_json(path, manifest, where), where, newer)
    check_spec(spec)
    if spec.fp8 or spec.draft_head is not None:
        raise _corrupt(f"{where} has weights in FP8, or a head for the next but one token")
    check_headers(path / DRAFT_MODEL, spec)
    _check_substitutes(manifest.draft_model_substitutes, spec)
    return spec


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the folder `path` and check its own digest, but no other file."""
    text = _read_small(path, MANIFEST)
    value = parse_json(text, MANIFEST)
    if not isinstance(value, dict):
        raise _corrupt(f"{MANIFEST} is not an object")
    version, ours = _version(value.get("format_version")), _version(FORMAT_VERSION)
    if version[0] != ours[0]:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"the artifact has format {value['format_version']}, "
            f"this program reads {FORMAT_VERSION}",
            "upgrade subspec" if version > ours else "build the artifact again",
        )
    value.pop("digest", None)
    # Compared as text, so that every byte of the file counts, spaces and order included.
    if dump_json(_sealed(value)).encode() != text:
        raise _corrupt(f"{MANIFEST} does not match its own digest")
    return _load(Manifest, value, MANIFEST, version > ours)


def verify(path: Path) -> int:
    """Check every byte of every listed file; returns the number of bytes. Raises SubspecError."""
    artifact = open_artifact(path)
    total = 0
    for entry in artifact.manifest.files:
        with open_regular(path / entry.path) as file:
            digests = tuple(hashlib.sha256(data).hexdigest() for data in _chunks(file))
        if len(digests) != len(entry.chunks):
            raise _corrupt(
                f"{entry.path} has {len(digests)} chunks, the manifest lists {len(entry.chunks)}"
            )
        for index, (got, expected) in enumerate(zip(digests, entry.chunks, strict=True)):
            if got != expected:
                first = index * CHUNK_BYTES
                last = min(first + CHUNK_BYTES, entry.num_bytes)
                raise _corrupt(f"{entry.path}: bytes {first} to {last} do not match their digest")
        total += entry.num_bytes
    return total


def _check_files(path: Path, manifest: Manifest) -> None:
    """Every listed file exists with its size, under a portable and unique name."""
    names: set[str] = set()
    for entry in manifest.files:
        if not _is_file_name(entry.path) or entry.path.lower() == RUNS:  # it grows
            raise _corrupt(f"{MANIFEST} names a file {entry.path[:200]!r}")
        if entry.path.lower() in names:
            raise _corrupt(f"{MANIFEST} lists {entry.path} twice")
        names.add(entry.path.lower())
        _check_inside(path, entry.path)
        with open_regular(path / entry.path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != entry.num_bytes:
            raise _corrupt(f"{entry.path} is {size} bytes, the manifest says {entry.num_bytes}")
    _require(manifest, REQUIRED)


def _check_tokenizer(path: Path, manifest: Manifest) -> None:
    """Raises SubspecError(CORRUPT) unless its files have their digests: tokens depend on them."""
    for entry in manifest.files:
        if entry.path not in TOKENIZER_FILES:
            continue
        if entry.num_bytes > MAX_TOKENIZER:
            raise _corrupt(
                f"{entry.path} is {entry.num_bytes} bytes, expected at most {MAX_TOKENIZER}"
            )
        if file_entry(path, entry.path).chunks != entry.chunks:
            raise _corrupt(f"{entry.path} does not match its digest")


def _require(manifest: Manifest, names: Iterable[str]) -> None:
    listed = {entry.path for entry in manifest.files}
    for name in names:
        if name not in listed:
            raise _corrupt(f"{MANIFEST} does not list {name}")


def _check_parts(path: Path, manifest: Manifest, spec: ModelSpec) -> None:
    """The parts are this model's, in execution order, without gaps (the runtime reads neighbours at
    once) and within the data of exact.safetensors."""
    tensors = read_header(path / "exact.safetensors").values()
    offset = min((tensor.offset for tensor in tensors), default=0)
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=0)
    expected = spec.parts
    if len(manifest.parts) != len(expected):
        raise _corrupt(
            f"{MANIFEST} lists {len(manifest.parts)} parts, the model has {len(expected)}"
        )
    for entry, part in zip(manifest.parts, expected, strict=True):
        residual = entry.encoding == part.residual_encoding
        fits = (
            part.can_be_residual and 0 < entry.num_bytes < part.plain_bytes
            if residual
            else entry.encoding == part.plain_encoding and entry.num_bytes == part.plain_bytes
        )
        placed = entry.name == part.name and entry.offset == offset and offset % PAGE_BYTES == 0
        if not (fits and placed):
            size = f"{'less than ' if residual else ''}{part.plain_bytes} bytes"
            raise _corrupt(
                f"{MANIFEST} lists the part {entry.name[:200]!r}, {entry.encoding}, "
                f"{entry.num_bytes} bytes at {entry.offset}, expected {part.name}, {size} at "
                f"{offset}, a multiple of {PAGE_BYTES}"
            )
        _check_digest(entry.name, entry.digest)
        offset += padded(entry.num_bytes)
    if offset > end:
        raise _corrupt(f"exact.safetensors ends at byte {end}, its parts at {offset}")


def _check_substitutes(substitutes: tuple[SubstituteEntry, ...], spec: ModelSpec) -> None:
    expected = [linear.name for linear in spec.linears if linear.has_substitute]
    if [entry.name for entry in substitutes] != expected:
        raise _corrupt(f"{MANIFEST} lists other substitutes than the model's {len(expected)}")
    for entry in substitutes:
        _check_digest(entry.name, entry.digest)


def _check_digest(name: str, digest: str) -> None:
    if DIGEST.fullmatch(digest) is None:
        raise _corrupt(f"{MANIFEST}: the digest of {name[:200]!r} is {digest[:80]!r}")


def _version(text: Any) -> tuple[int, int]:
    match = VERSION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise _corrupt(f"{MANIFEST}: format_version is {str(text)[:60]!r}, expected two numbers")
    return int(match[1]), int(match[2])


def _load(kind: type[T], value: Any, where: str, newer: bool) -> T:
    """Value from JSON -> `kind`; unknown keys of a newer minor format are ignored."""
    if newer and isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        value = {key: item for key, item in value.items() if key in known}
    return load_dataclass(kind, value, where)


def _read_small(path: Path, name: str) -> bytes:
    _check_inside(path, name)
    with open_regular(path / name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON:
            raise _corrupt(f"{name} is {size} bytes, expected at most {MAX_JSON}")
        return file.read()


def _read_json(path: Path, manifest: Manifest, name: str) -> Any:
    """The value of a listed file, whose bytes are compared with its digest."""
    text = _read_small(path, name)
    chunks = {entry.path: entry.chunks for entry in manifest.files}[name]
    if chunks != (hashlib.sha256(text).hexdigest(),):
        raise _corrupt(f"{name} does not match its digest")
    return parse_json(text, name)


def _is_file_name(name: str) -> bool:
    """Portable ASCII path: no drive, no backslash, no `.` or `..`."""
    return (
        len(name) <= 255
        and FILE_NAME.fullmatch(name) is not None
        and not {".", ".."} & set(name.split("/"))
    )


def _check_inside(path: Path, name: str) -> None:
    if not Path(os.path.realpath(path / name)).is_relative_to(os.path.realpath(path)):
        raise _corrupt(f"{name} is a link that leads out of {path}")


def _corrupt(message: str) -> SubspecError:
    return SubspecError(Exit.CORRUPT, message, AGAIN)


def _chunks(file: Any) -> Iterator[bytes]:
    while data := file.read(CHUNK_BYTES):
        yield data
