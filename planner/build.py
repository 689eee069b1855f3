"""Plan + checkpoint -> artifact folder: quantised, repacked, proven, under a temporary name first.

One matrix at a time: peak memory stays near two of them, whatever the model's size.
"""

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.model import (
    GROUP_SIZE,
    PAGE_BYTES,
    Linear,
    ModelSpec,
    Part,
    is_streamable,
    linears,
    parts,
    resident_tensors,
)
from subspec.artifacts.plan import Plan
from subspec.artifacts.profile import Profile
from subspec.artifacts.sizes import format_size
from subspec.artifacts.store import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    Artifact,
    FileEntry,
    Manifest,
    PartEntry,
    new_folder,
    write_json,
    write_manifest,
)
from subspec.artifacts.tensors import TensorFile, write_header
from subspec.planner.checkpoint import Checkpoint, CheckpointTensor, check_tied_head
from subspec.planner.costs import model_bytes, substitutes_bytes
from subspec.planner.explain import render_readme, render_report
from subspec.planner.quantize import Substitute
from subspec.planner.tokenizer_files import TokenizerFiles

SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PRODUCER = f"subspec {version('subspec')}"

Quantizer = Callable[[Tensor, torch.device | str], Substitute]
Progress = Callable[[str, float], None]
Replan = Callable[[Artifact], Plan]


def build(
    checkpoint: Checkpoint,
    tokenizer: TokenizerFiles,
    plan: Plan,
    profile: Profile,
    out: Path,
    overwrite: bool,
    quantizer: Quantizer,
    replan: Replan,
    progress: Progress,
) -> Plan:
    """Writes the artifact `out`. `replan` may improve the plan once the weights can be run; what it
    returns is stored, and returned. An error leaves nothing behind."""
    spec = checkpoint.spec
    check_space(spec, out)
    check_tied_head(checkpoint)
    with new_folder(out, overwrite) as folder:
        known, entries = write_weights(folder, checkpoint, quantizer, progress)
        write_tokenizer(folder, tokenizer)
        write_json(folder, "model.json", spec)
        write_json(folder, "profile.json", profile)
        unfinished = Manifest(FORMAT_VERSION, PRODUCER, (), entries)
        plan = replan(Artifact(folder, unfinished, spec, plan, profile))
        write_plan(folder, spec, plan, profile)
        copy_license(checkpoint.folder, folder)
        progress("writing the manifest", 1.0)
        write_manifest(folder, PRODUCER, entries, known)
    return plan


def write_plan(folder: Path, spec: ModelSpec, plan: Plan, profile: Profile) -> None:
    """plan.json and the pages that people read."""
    write_json(folder, "plan.json", plan)
    (folder / "README.md").write_text(render_readme(spec, plan), encoding="utf-8")
    (folder / "report.html").write_text(render_report(spec, plan, profile), encoding="utf-8")


def check_space(spec: ModelSpec, out: Path) -> None:
    needed = int((model_bytes(spec) + substitutes_bytes(spec)) * 1.02) + (1 << 20)
    parent = next(folder for folder in (out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise SubspecError(
            Exit.RESOURCES,
            f"the artifact needs {format_size(needed)} of disk, {parent} has {format_size(free)}",
            "free space, or choose another --out",
        )


def write_weights(
    folder: Path, checkpoint: Checkpoint, quantizer: Quantizer, progress: Progress
) -> tuple[dict[str, FileEntry], tuple[PartEntry, ...]]:
    """The three weight files, each matrix read once. Returns their digests and the parts' places."""
    spec = checkpoint.spec
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = HashedFile(folder, "exact.safetensors")
    substitutes = HashedFile(folder, "substitutes.safetensors")
    write_header(exact, exact_header(spec))
    write_header(substitutes, substitutes_header(spec))
    places = [part for part in parts(spec)]
    entries = []
    every = linears(spec)
    for index, linear in enumerate(every):
        progress("quantising and packing", index / len(every))
        if not linear.has_substitute:
            continue
        weight = read_weight(checkpoint, source_name(spec, linear))
        if is_streamable(spec, linear):
            own = [part for part in places if part.linear.name == linear.name]
            entries += [write_part(exact, part, weight) for part in own]
            prove_parts(exact, own, entries[-len(own) :], weight)
        write_substitute(substitutes, linear, weight, quantizer, device)
    resident = HashedFile(folder, "resident.safetensors")
    dtype = SAFETENSORS_DTYPES[spec.dtype]
    shapes = resident_tensors(spec)
    write_header(resident, ((name, dtype, shape) for name, shape in shapes.items()))
    for name in shapes:
        resident.write(raw_bytes(read_weight(checkpoint, name)))
    files = (exact, substitutes, resident)
    return {file.name: file.finish() for file in files}, tuple(entries)


def exact_header(spec: ModelSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    """One U8 slab per layer, in execution order; the head's parts are the last slab."""
    sizes: dict[int, int] = {}
    for part in parts(spec):
        sizes[part.linear.layer] = sizes.get(part.linear.layer, 0) + part.padded_bytes
    return [(f"layers.{layer}", "U8", (size,)) for layer, size in sizes.items()]


def substitutes_header(spec: ModelSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for linear in linears(spec):
        if linear.has_substitute:
            n, k = linear.out_features, linear.in_features
            found.append((f"{linear.name}.codes", "U8", (n, k // 2)))
            found.append((f"{linear.name}.scale", "F16", (n, k // GROUP_SIZE)))
            found.append((f"{linear.name}.zero", "F16", (n, k // GROUP_SIZE)))
    return found


def source_name(spec: ModelSpec, linear: Linear) -> str:
    """The checkpoint tensor of a matrix; a tied head is the embedding."""
    if linear.kind == "head" and spec.tied_head:
        return "model.embed_tokens.weight"
    return f"{linear.name}.weight"


def write_part(file: "HashedFile", part: Part, weight: Tensor) -> PartEntry:
    offset = file.num_bytes
    file.write(raw_bytes(weight[part.first_row : part.first_row + part.num_rows]))
    file.write(bytes(part.padded_bytes - part.num_bytes))
    assert offset % PAGE_BYTES == 0
    return PartEntry(part.name, offset, part.num_bytes)


def prove_parts(
    file: "HashedFile", own: list[Part], entries: list[PartEntry], weight: Tensor
) -> None:
    """What was written is read back and compared with the checkpoint's bytes."""
    file.flush()
    with TensorFile(file.path) as written:
        for part, entry in zip(own, entries, strict=True):
            got = bytearray(part.num_bytes)
            written.read_into(memoryview(got), entry.offset)
            expected = raw_bytes(weight[part.first_row : part.first_row + part.num_rows])
            if got != expected:
                raise SubspecError(
                    Exit.RESOURCES,
                    f"{part.name} was read back from {file.path} with other bytes than written",
                    "check the disk",
                )


def write_substitute(
    file: "HashedFile", linear: Linear, weight: Tensor, quantizer: Quantizer, device: str
) -> None:
    try:
        substitute = quantizer(weight, device)
    except SubspecError as error:
        raise SubspecError(
            error.exit_code, f"{linear.name}.weight: {error.message}", error.hint
        ) from None
    for tensor in (substitute.codes, substitute.scale, substitute.zero):
        file.write(raw_bytes(tensor))


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """A checkpoint tensor on the host, in its own dtype."""
    stored: CheckpointTensor = checkpoint.tensors[name]
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
    with TensorFile(stored.file) as file:
        file.read_into(memoryview(raw.numpy().data), stored.offset)
    dtype: torch.dtype = getattr(torch, checkpoint.spec.dtype)
    return raw.view(dtype).view(stored.shape)


def raw_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    target = folder / "tokenizer"
    target.mkdir()
    shutil.copyfile(files.tokenizer_json, target / "tokenizer.json")
    if files.chat_template is not None:
        (target / "chat_template.jinja").write_text(files.chat_template, encoding="utf-8")
    write_json(target, "generation_config.json", files.generation_config)
    settings = {
        "special_tokens": files.special_tokens,
        "begins_with_bos": bool(files.add_bos_token),
    }
    write_json(target, "settings.json", settings)


def copy_license(source: Path, folder: Path) -> None:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class HashedFile:
    """A file written front to back, its chunk digests taken on the way."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.path = folder / name
        self.num_bytes = 0
        self._file = open(self.path, "wb")
        self._hash = hashlib.sha256()
        self._chunks: list[str] = []

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        while view:
            room = CHUNK_BYTES - self.num_bytes % CHUNK_BYTES
            piece, view = view[:room], view[room:]
            self._hash.update(piece)
            self._file.write(piece)
            self.num_bytes += len(piece)
            if self.num_bytes % CHUNK_BYTES == 0:
                self._end_chunk()
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> FileEntry:
        if self.num_bytes % CHUNK_BYTES:
            self._end_chunk()
        self._file.close()
        return FileEntry(self.name, self.name.partition(".")[0], self.num_bytes, tuple(self._chunks))

    def _end_chunk(self) -> None:
        self._chunks.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
