import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.codec import dump_json
from subspec.artifacts.format.store import (
    CHUNK_BYTES,
    FileEntry,
    PartEntry,
    SubstituteEntry,
    open_artifact,
    part_digest,
    read_manifest,
    verify,
    write_json,
    write_manifest,
)
from subspec.artifacts.format.tensors import ITEM_BYTES, write_header
from subspec.artifacts.model import (
    EMBEDDING,
    GROUP_SIZE,
    Attention,
    Block,
    Dense,
    LayerSpec,
    ModelSpec,
    NormStyle,
    Rope,
)
from subspec.artifacts.plan import Ledger, Placement, Plan, Point, Tree
from subspec.artifacts.profile import Corrections, LinkRate, Profile, Timing

Json = dict[str, Any]
Change = Callable[[Json], object]

ATTENTION = Attention(2, 1, 32, scale=32**-0.5, rope=Rope(10000.0, size=32), qkv_bias=True)


def layer_of(intermediate_size: int) -> LayerSpec:
    dense = Block(Dense(intermediate_size), "post_attention_layernorm")
    return LayerSpec((Block(ATTENTION, "input_layernorm"), dense))


TINY = ModelSpec(
    family="qwen2", dtype="bfloat16", hidden_size=64, vocab_size=128, max_positions=256,
    layers=(layer_of(128),) * 2, norm=NormStyle(1e-6), tie_word_embeddings=False,
)  # fmt: skip
LARGE = replace(TINY, hidden_size=4096, layers=(layer_of(11008),) * 32, vocab_size=32000)
WEIGHT_FILES = (
    "exact.safetensors", "resident.safetensors", "substitutes.safetensors",
    "embedding.safetensors",
)  # fmt: skip
FILES = ("manifest.json", "model.json", "plan.json", "profile.json", "tokenizer/tokenizer.json")


def make_plan(spec: ModelSpec) -> Plan:
    largest = max(part.padded_bytes for part in spec.parts)
    ledger = Ledger(staging=2 * largest)
    placement = Placement((spec.parts[0].name,), (), largest, 2, ledger)
    return Plan(
        device="cpu", machine="test", budget_bytes=2 * largest, context=128, num_sequences=1,
        method="substitute", tree=Tree(2, 3), verify_widths=(8,), prompt_widths=(8,),
        num_threads=1, int4_kernel="aten",
        prefill_chunk_tokens=64, placements={"substitute": placement, "plain": placement},
        residuals=(), predicted={},
        acceptance=Acceptance((Curve(2, 0.2, "code", 2, 9, (9, 5), (5, 3), 0.5),), measured=True),
        by_budget=(Point(2 * largest, 128, "substitute", 5.0),),
    )  # fmt: skip


def make_profile() -> Profile:
    timing = (Timing(1, 0.001),)
    return Profile(
        device="cpu", machine="test", num_threads=1, free_bytes=1 << 30, pinnable_bytes=0,
        overhead_bytes=0, link=(LinkRate(1 << 20, 1e9),), contended_link=0.8, contended_compute=0.9,
        digest_bytes_per_second=1e9, exact_layer=timing, fast_layer=timing, draft_layer=timing,
        exact_attention=timing, fast_attention=timing, draft_attention=timing, exact_head=timing,
        draft_head=timing, round_overhead_seconds=0.001, residual_weights_per_second=0.0,
        int4_kernel="aten", batch_invariant_widths=((8,),),
        corrections=Corrections(verify=1.25, num_rounds=40),
    )  # fmt: skip


def make_artifact(folder: Path, spec: ModelSpec, seed: int | None) -> None:
    """seed None: weights that are holes in a file, with made-up digests."""
    tensors: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
        "exact": [(part.name, "U8", (part.padded_bytes,)) for part in spec.parts],
        "resident": [(name, "BF16", shape) for name, shape in spec.resident_shapes.items()],
        "embedding": [(f"{EMBEDDING}.weight", "BF16", (spec.vocab_size, spec.hidden_size))],
        "substitutes": [],
    }
    for linear in spec.linears:
        rows, groups = linear.out_features, linear.in_features // GROUP_SIZE
        tensors["substitutes"] += [
            (f"{linear.name}.codes", "U8", (rows, linear.in_features // 2)),
            (f"{linear.name}.qparams", "BF16", (groups, rows, 2)),
        ]
    known, offsets = {}, {}
    for role, listed in tensors.items():
        name = f"{role}.safetensors"
        num_bytes = sum(ITEM_BYTES[dtype] * math.prod(shape) for _, dtype, shape in listed)
        with open(folder / name, "wb") as file:
            offsets[role] = write_header(file, listed)
            end = offsets[role] + num_bytes
            if seed is None:
                file.truncate(end)
                known[name] = FileEntry(name, role, end, ("0" * 64,) * -(-end // CHUNK_BYTES))
            else:
                file.write(random.Random(seed).randbytes(num_bytes))
    entries, offset = [], offsets["exact"]
    for part in spec.parts:
        entries.append(PartEntry(part.name, offset, part.num_bytes, "raw", "0" * 64))
        offset += part.padded_bytes
    write_json(folder, "model.json", spec)
    write_json(folder, "plan.json", make_plan(spec))
    write_json(folder, "profile.json", make_profile())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    drafts = tuple(SubstituteEntry(linear.name, "0" * 64) for linear in spec.linears)
    write_manifest(folder, "test", tuple(entries), drafts, known)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    make_artifact(folder, TINY, seed=1)
    return folder


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "artifact"))


def reseal(folder: Path, change: Change) -> None:
    """A manifest that lies, with the digest of the lie."""
    value = json.loads((folder / "manifest.json").read_text())
    del value["digest"]
    change(value)
    digest = hashlib.sha256(dump_json(value).encode()).hexdigest()
    (folder / "manifest.json").write_text(dump_json({**value, "digest": digest}))


def edit(folder: Path, name: str, change: Change) -> None:
    """A file that lies, in a manifest that agrees with it."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(dump_json(value))
    reseal_files(folder)


def reseal_files(folder: Path) -> None:
    """The same manifest over the files as they are by now."""
    listed = read_manifest(folder)
    write_manifest(folder, "test", listed.parts, listed.substitutes, {})


def refused(folder: Path, *words: str, code: Exit = Exit.CORRUPT) -> None:
    """By opening already, in time and in words."""
    start = time.monotonic()
    with pytest.raises(SubspecError) as caught:
        open_artifact(folder)
    assert time.monotonic() - start < 30  # an endless wait, not a slow machine
    assert caught.value.exit_code == code
    assert len(caught.value.message) < 600 and caught.value.message.isprintable()
    for word in words:
        assert word in caught.value.message


def in_files(path: str, **changes: Any) -> Change:
    """A change to the manifest's entry of a file."""
    return lambda value: next(f for f in value["files"] if f["path"] == path).update(changes)


def in_part(index: int, **changes: Any) -> Change:
    return lambda value: value["parts"][index].update(changes)


def test_what_was_written_is_what_opens(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert opened.spec == TINY and opened.plan == make_plan(TINY)
    assert opened.profile == make_profile()
    offsets = opened.part_entries()
    assert list(offsets) == [part.name for part in TINY.parts]
    size = sum(file.stat().st_size for file in artifact.rglob("*") if file.name != "manifest.json")
    assert verify(artifact) == size - (artifact / "tokenizer").stat().st_size


def test_opening_reads_headers_but_no_weights(tmp_path: Path) -> None:
    counter = Path("/proc/thread-self/io")
    if not counter.exists():
        pytest.skip("needs Linux's count of the bytes that a thread reads")
    make_artifact(tmp_path, LARGE, seed=None)
    assert (tmp_path / "exact.safetensors").stat().st_size > 8 << 30

    def bytes_read() -> int:
        return int(counter.read_text().split()[1])

    before = bytes_read()
    open_artifact(tmp_path)
    small = sum(f.stat().st_size for f in tmp_path.glob("*.json"))
    assert bytes_read() - before < small + 1_000_000  # four headers of below 300 kB


@pytest.mark.parametrize("name", (*FILES, *WEIGHT_FILES))
def test_one_changed_byte_anywhere_is_found(artifact: Path, name: str) -> None:
    pick = random.Random(name)
    original = (artifact / name).read_bytes()
    places = {0, 7, 8, len(original) - 1, *(pick.randrange(len(original)) for _ in range(100))}
    for place in sorted(places):
        changed = bytearray(original)
        changed[place] ^= pick.randrange(1, 256)
        (artifact / name).write_bytes(changed)
        with pytest.raises(SubspecError) as caught:
            verify(artifact)
        assert caught.value.exit_code in (Exit.CORRUPT, Exit.WRONG_MACHINE), place
    (artifact / name).write_bytes(original)
    verify(artifact)


@pytest.mark.parametrize("name", (*FILES, *WEIGHT_FILES))
def test_a_file_that_is_truncated_extended_or_gone_does_not_open(artifact: Path, name: str) -> None:
    path, short = artifact / name, name.rpartition("/")[2]
    original = path.read_bytes()
    for content in (original[:-1], original[: len(original) // 2], b"", original + b"\n"):
        path.write_bytes(content)
        refused(artifact, short)
    path.unlink()
    refused(artifact, short)


@pytest.mark.parametrize("name", FILES)
def test_a_byte_that_changed_in_a_file_that_is_read_whole_does_not_open(
    artifact: Path, name: str
) -> None:
    """A digit of a plan, a token's text: JSON of the same size that reads well."""
    original = (artifact / name).read_bytes()
    digit = next(place for place, one in enumerate(original) if one == ord("1"))
    (artifact / name).write_bytes(original[:digit] + b"2" + original[digit + 1 :])
    refused(artifact, name, "match its", "digest")


def test_a_tokenizer_that_is_far_too_large_is_refused_before_it_is_read(artifact: Path) -> None:
    file = artifact / "tokenizer" / "tokenizer.json"
    os.truncate(file, 1 << 40)
    reseal(artifact, in_files("tokenizer/tokenizer.json", num_bytes=1 << 40))
    refused(artifact, "tokenizer.json", "expected at most")


def test_a_file_of_another_artifact_is_found_by_verify(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    make_artifact(tmp_path / "other", TINY, seed=2)
    shutil.copy(tmp_path / "other" / "substitutes.safetensors", artifact)
    open_artifact(artifact)
    with pytest.raises(
        SubspecError, match=r"substitutes\.safetensors: bytes 0 to \d+ do not match"
    ):
        verify(artifact)


@pytest.mark.parametrize("chunks", [[], ["0" * 64] * 2])
def test_a_wrong_number_of_digests_is_found_by_verify(artifact: Path, chunks: list[str]) -> None:
    reseal(artifact, in_files("exact.safetensors", chunks=chunks))
    with pytest.raises(SubspecError, match="has 1 chunks, the manifest lists"):
        verify(artifact)


MANIFESTS = {
    "empty": b"",
    "a list": b"[]",
    "deep": b"[" * 1_000_000,
    "twice": b'{"format_version": "1.0", "format_version": "1.0"}',
    "NaN": b'{"format_version": NaN}',
    "too large a number": b'{"format_version": 1e400}',
    "too long a number": b'{"format_version": ' + b"9" * 5000 + b"}",
    "half a surrogate pair": b'{"format_version": "1.0", "producer": "\\ud800"}',
    "not UTF-8": b'{"format_version": "\xff"}',
    "byte order mark": b'\xef\xbb\xbf{"format_version": "1.0"}',
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_is_no_json_of_ours_is_refused(artifact: Path, content: bytes) -> None:
    (artifact / "manifest.json").write_bytes(content)
    refused(artifact, "manifest.json")


@pytest.mark.parametrize("name", FILES[:4])
def test_json_of_a_gigabyte_is_refused_unread(artifact: Path, name: str) -> None:
    os.truncate(artifact / name, 1 << 30)
    if name != "manifest.json":
        reseal(artifact, in_files(name, num_bytes=1 << 30))
    refused(artifact, name, str(1 << 30))


@pytest.mark.parametrize(
    "version", [None, 1, "1", "", "1.x", "-1.0", "\u00b2.0", "9" * 5000, "1.0 "]
)
def test_a_format_version_that_is_none_is_refused(artifact: Path, version: object) -> None:
    reseal(artifact, lambda value: value.update(format_version=version))
    refused(artifact, "format_version")


@pytest.mark.parametrize("version, hint", [("11.0", "upgrade subspec"), ("9.1", "build")])
def test_another_major_format_is_named(artifact: Path, version: str, hint: str) -> None:
    reseal(artifact, lambda value: value.update(format_version=version, files=version))
    with pytest.raises(SubspecError, match=version) as caught:
        open_artifact(artifact)
    assert caught.value.exit_code == Exit.WRONG_MACHINE and hint in caught.value.hint


def test_a_newer_minor_format_may_have_more_files_and_keys(artifact: Path) -> None:
    (artifact / "future.json").write_text("{}")
    for name in ("model.json", "plan.json", "profile.json"):
        edit(artifact, name, lambda value: value.update(future=1))
    refused(artifact, "model.json", "future")
    reseal(artifact, lambda value: value.update(format_version="10.7", future=[]))
    assert open_artifact(artifact).spec == TINY
    verify(artifact)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "C:\\x", "a\0b", "a" * 300, "Plan.json", "plan.json", "\u00e9.json",
     "tokenizer//tokenizer.json", "./plan.json", "tokenizer/../plan.json", "", ".", "a\x1b[31m"],
)  # fmt: skip
def test_a_file_name_that_is_not_plain_is_refused(artifact: Path, name: str) -> None:
    entry = {"path": name, "role": "x", "num_bytes": 0, "chunks": []}
    reseal(artifact, lambda value: value["files"].append(entry))
    refused(artifact, "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_regular_file_inside_is_refused_without_waiting(
    artifact: Path, tmp_path: Path, name: str
) -> None:
    path, outside = artifact / name, tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    refused(artifact, name, "leads out")
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda p: os.symlink("/dev/zero", p),
        lambda p: os.symlink(p, p),
    ):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        refused(artifact, "manifest.json" if name == "manifest.json" else "")


def test_a_linked_folder_is_refused_and_a_link_that_stays_inside_is_not(
    artifact: Path, tmp_path: Path
) -> None:
    (artifact / "tokenizer").rename(artifact / "real")
    (artifact / "tokenizer").symlink_to("real")
    open_artifact(artifact)
    (artifact / "real").rename(tmp_path / "outside")
    (artifact / "tokenizer").unlink()
    (artifact / "tokenizer").symlink_to(tmp_path / "outside")
    refused(artifact, "leads out")


PARTS: dict[str, Change] = {
    "beyond 2^64": in_part(-1, offset=1 << 64),
    "negative": in_part(0, offset=-4096),
    "unaligned": in_part(0, offset=1),
    "in the header": in_part(0, offset=0),
    "overlapping": lambda value: value["parts"][1].update(offset=value["parts"][0]["offset"]),
    "gap": in_part(-1, offset=1 << 20),
    "empty": in_part(0, num_bytes=0),
    "longer": in_part(0, num_bytes=1 << 62),
    "encoding": in_part(0, encoding="gzip"),
    "missing": lambda value: value["parts"].pop(),
    "twice": lambda value: value["parts"].append(value["parts"][0]),
    "one for two": lambda value: value["parts"].__setitem__(1, value["parts"][0]),
    "unknown": in_part(0, name="\x1b[31m" * 100),
    "out of order": lambda value: value["parts"].reverse(),
}


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS.keys())
def test_parts_that_are_not_the_models_are_refused(artifact: Path, change: Change) -> None:
    reseal(artifact, change)
    refused(artifact, "manifest.json")


def test_parts_beyond_the_end_of_their_file_are_refused(artifact: Path) -> None:
    with open(artifact / "exact.safetensors", "wb") as file:
        write_header(file, [("short", "U8", (4096,))])
        file.write(bytes(4096))
    reseal_files(artifact)
    refused(artifact, "exact.safetensors ends at byte 8192, its parts at")


def test_files_that_nobody_asked_for_are_ignored(artifact: Path) -> None:
    for name in ("__init__.py", "json.py", "weights.pkl", "kernel.so", "tokenizer/x.py"):
        (artifact / name).write_text("raise SystemExit('executed')")
    open_artifact(artifact)
    verify(artifact)


def test_a_moved_read_only_artifact_opens_and_stays_as_it_is(artifact: Path) -> None:
    moved = artifact.rename(artifact.parent / "another name")
    everything = [moved, *moved.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in everything]
    try:
        open_artifact(moved)
        verify(moved)
        assert sorted(moved.rglob("*")) == sorted(everything[1:])
        assert [
            (path, path.stat().st_mtime_ns, path.stat().st_size) for path in everything
        ] == before
    finally:
        for path in everything:
            path.chmod(0o755)


# Drafts that end early


def test_where_drafts_end_is_read_as_it_was_written_and_may_be_left_out(artifact: Path) -> None:
    edit(artifact, "plan.json", lambda plan: plan["tree"].update(min_path_probability=0.3))
    assert open_artifact(artifact).plan.tree.min_path_probability == 0.3
    edit(artifact, "plan.json", lambda plan: plan["tree"].pop("min_path_probability"))
    assert open_artifact(artifact).plan.tree.min_path_probability == 0.0


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["tree"].update(min_path_probability=-0.25),
        lambda plan: plan["tree"].update(min_path_probability=1.0),
        lambda plan: plan["tree"].update(min_path_probability="0.3"),
    ],
)
def test_drafts_that_end_where_none_can_are_refused(artifact: Path, change: Change) -> None:
    edit(artifact, "plan.json", change)
    refused(artifact, "plan.json")


def test_a_stop_that_is_no_number_is_refused(artifact: Path) -> None:
    edit(artifact, "plan.json", lambda plan: plan["tree"].update(min_path_probability=0.25))
    text = (artifact / "plan.json").read_text()
    assert text.count('"min_path_probability": 0.25') == 1
    for word in ("NaN", "Infinity", "1e999"):
        changed = text.replace('"min_path_probability": 0.25', f'"min_path_probability": {word}')
        (artifact / "plan.json").write_text(changed)
        reseal_files(artifact)
        refused(artifact, "plan.json")


def test_what_is_not_an_artifact_says_so(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is not a folder", code=Exit.USAGE)
    refused(tmp_path, "has no manifest.json")


def test_a_manifest_that_was_cut_short_is_not_listed_by_the_next_one(artifact: Path) -> None:
    (artifact / ".manifest.json.new").write_text("{")
    reseal_files(artifact)
    verify(artifact)


@pytest.mark.parametrize(
    "change",
    [
        in_part(0, encoding="residual"),
        in_part(0, encoding="residual", num_bytes=0),
        in_part(0, digest="0" * 63),
        in_part(0, digest="G" * 64),
        lambda value: value["substitutes"].pop(),
        lambda value: value["substitutes"][0].update(name="another"),
        lambda value: value["substitutes"][0].update(digest=""),
    ],
)
def test_a_part_or_substitute_that_cannot_be_is_refused(artifact: Path, change: Change) -> None:
    """A residual is smaller than its weights, a digest has 64 digits, no substitute is missing."""
    reseal(artifact, change)
    refused(artifact, "manifest.json")


def test_the_digest_of_a_residual_begins_with_that_of_its_substitute() -> None:
    draft, stored = "ab" * 32, b"stored bytes"
    assert part_digest([stored[:5], stored[5:]], None) == hashlib.sha256(stored).hexdigest()
    expected = hashlib.sha256(bytes.fromhex(draft) + stored).hexdigest()
    assert part_digest([stored], draft) == expected
