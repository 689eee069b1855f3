"""Plan + checkpoint -> artifact folder, built under a temporary name."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress
from subspec.artifacts.common.sizes import format_size
from subspec.artifacts.format.folder import new_folder, place_of
from subspec.artifacts.format.store import (
    DRAFT_MODEL,
    FORMAT_VERSION,
    Artifact,
    Manifest,
    open_artifact,
    write_json,
    write_manifest,
)
from subspec.artifacts.format.tensors import keep_uncompressed
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Plan
from subspec.artifacts.profile import Profile
from subspec.artifacts.runs import Run, carry_runs, read_runs
from subspec.planner.build.weights import Quantizer, write_draft_model, write_weights
from subspec.planner.model.checkpoint import Checkpoint
from subspec.planner.model.tokenizer_files import TokenizerFiles
from subspec.planner.report.explain import render_readme, render_report
from subspec.planner.solve.storage import artifact_bytes, storage_with

PRODUCER = f"subspec {version('subspec')}"

# exFAT and some file systems in user space; a file of another user; a file with very many links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
DISK_MARGIN = 1.02  # sizes of residuals are estimates
COPIED_BYTES = 16 << 20  # at a time

Improve = Callable[[Artifact], tuple[Plan, Profile]]


def build(
    checkpoint: Checkpoint,
    tokenizer: TokenizerFiles,
    plan: Plan,
    profile: Profile,
    out: Path,
    overwrite: bool,
    quantizer: Quantizer,
    improve: Improve,
    progress: Progress,
    draft_model: Checkpoint | None = None,
) -> Plan:
    """Write the artifact `out` and return its plan. `improve` is called when the weights can be
    run: it may return a better plan and a corrected profile, which are stored. An error leaves
    nothing behind. Raises SubspecError."""
    spec = checkpoint.spec
    check_space(spec, plan, draft_model.spec if draft_model else None, out)
    with no_empty_parents(out), new_folder(out, overwrite) as folder:
        written = write_weights(folder, checkpoint, plan.residuals, quantizer, progress)
        write_tokenizer(folder, tokenizer)
        write_json(folder, "model.json", spec)
        write_json(folder, "profile.json", profile)
        unfinished = Manifest(
            FORMAT_VERSION,
            PRODUCER,
            tuple(written.files.values()),
            written.parts,
            written.substitutes,
        )
        artifact = Artifact(folder, unfinished, spec, plan, profile)
        if draft_model is not None:
            artifact = with_draft_model(artifact, draft_model, quantizer, progress)
        plan, profile = improve(artifact)
        write_json(folder, "profile.json", profile)
        write_plan(folder, spec, plan, profile)
        copy_license(checkpoint.folder, folder)
        progress("writing the manifest", 1.0)
        known = {entry.path: entry for entry in artifact.manifest.files}
        drafting = artifact.manifest.draft_model_substitutes
        write_manifest(folder, PRODUCER, written.parts, written.substitutes, known, drafting)
        open_artifact(folder)  # an artifact that cannot be opened is not published
    return plan


def with_draft_model(
    artifact: Artifact, checkpoint: Checkpoint, quantizer: Quantizer, progress: Progress
) -> Artifact:
    """The unfinished artifact with a draft model, written into its folder."""
    written = write_draft_model(artifact.path, checkpoint, quantizer, progress)
    write_json(artifact.path / DRAFT_MODEL, "model.json", checkpoint.spec)
    copy_license(checkpoint.folder, artifact.path / DRAFT_MODEL)
    manifest = replace(
        artifact.manifest,
        files=(*artifact.manifest.files, *written.files.values()),
        draft_model_substitutes=written.substitutes,
    )
    return replace(artifact, manifest=manifest, draft_model=checkpoint.spec)


def rebuild(artifact: Artifact, plan: Plan, profile: Profile, out: Path, overwrite: bool) -> None:
    """Write the artifact with another plan to `out`: its own folder, or one beside it. The weights
    are linked, and copied only where the file system has no links; run records are kept only in
    their own folder. Raises SubspecError: USAGE if `out` is on another disk, RESOURCES if there is
    no room for copies."""
    rewritten = {"plan.json", "profile.json", "README.md", "report.html"}
    kept = [entry for entry in artifact.manifest.files if entry.path not in rewritten]
    with no_empty_parents(out), new_folder(out, overwrite) as folder:
        for index, entry in enumerate(kept):
            source, target = artifact.path / entry.path, folder / entry.path
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(source, target)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise SubspecError(
                        Exit.USAGE,
                        f"{entry.path} cannot be linked into {out}: {error.strerror}",
                        f"choose an --out on the disk of {artifact.path}",
                    ) from None
                check_room(sum(other.num_bytes for other in kept[index:]), out)
                copy_weights(source, target)
        write_json(folder, "profile.json", profile)
        here = [run for run in read_runs(artifact.path) if run.machine == profile.machine]
        write_plan(folder, artifact.spec, plan, profile, here)
        listed = artifact.manifest
        known = {entry.path: entry for entry in kept}
        write_manifest(
            folder, listed.producer, listed.parts, listed.substitutes, known,
            listed.draft_model_substitutes,
        )  # fmt: skip
        open_artifact(folder)
        if out.resolve() == artifact.path.resolve():
            carry_runs(artifact.path, folder)


def copy_weights(source: Path, target: Path) -> None:
    with open(source, "rb") as file, open(target, "wb") as copy:
        keep_uncompressed(copy.fileno())
        shutil.copyfileobj(file, copy, COPIED_BYTES)


@contextmanager
def no_empty_parents(out: Path) -> Iterator[None]:
    """Remove the folders that were created for `out` if the block raises an error."""
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not empty: another process uses it
                parent.rmdir()
        raise


def write_plan(
    folder: Path, spec: ModelSpec, plan: Plan, profile: Profile, runs: Sequence[Run] = ()
) -> None:
    """Write plan.json, README.md and report.html. runs: recorded runs, which the report compares
    with predictions."""
    write_json(folder, "plan.json", plan)
    (folder / "README.md").write_text(render_readme(spec, plan), encoding="utf-8")
    report = render_report(spec, plan, profile, runs)
    (folder / "report.html").write_text(report, encoding="utf-8")


def check_space(spec: ModelSpec, plan: Plan, draft_model: ModelSpec | None, out: Path) -> None:
    """Raise SubspecError(RESOURCES) if the disk of `out` has too little space for the weights as
    the plan stores them."""
    stored = storage_with(spec, plan.residuals)
    check_room(int(artifact_bytes(spec, stored, draft_model) * DISK_MARGIN) + (1 << 20), out)


def check_room(needed: int, out: Path) -> None:
    parent = place_of(out)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise SubspecError(
            Exit.RESOURCES,
            f"the artifact needs {format_size(needed)} of disk, {parent} has {format_size(free)}",
            "free space, or choose another --out",
        )


def write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    target = folder / "tokenizer"
    target.mkdir()
    (target / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
    if files.chat_template is not None:
        (target / "chat_template.jinja").write_text(files.chat_template, encoding="utf-8")
    write_json(target, "generation_config.json", files.generation_config)
    settings = {
        "special_tokens": files.special_tokens,
        "begins_with_bos": files.begins_with_bos,
    }
    write_json(target, "settings.json", settings)


def copy_license(source: Path, folder: Path) -> None:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
