"""The artifacts that clients are tried with: checkpoints with a template that has tools, planned.
Standard library only."""

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DEMO = ROOT / "planner" / "demo-model"
# Both are forced to draft: they would fit, and what clients read of drafts is to be seen.
DRAFT = ("--method", "substitute", "--width", "2", "--depth", "6", "--rehearse", "3")
LONG = ("--context", "4096", "--sequences", "2", *DRAFT)
OPTIONS = {
    "demo": ("--vram", "45MB", *LONG),
    "smollm2": ("--vram", "480MB", *LONG),
}


def make_artifact(name: str, checkpoint: Path, binaries: Path, folder: Path) -> Path:
    """The artifact `folder`/`name`, planned unless it is there. checkpoint: what it is made from,
    but for its chat template."""
    artifact = folder / name
    if (artifact / "manifest.json").exists():
        return artifact
    copy = folder / f"{name}-checkpoint"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file():
            (copy / path.name).symlink_to(path.resolve())
    template = copy / "chat_template.jinja"  # goes before the one in tokenizer_config.json
    template.unlink(missing_ok=True)
    shutil.copyfile(HERE / "tools_template.jinja", template)
    command = [binaries / "subspec-plan", "--model", copy, "--device", "cpu", "--out", artifact]
    subprocess.run([*command, *OPTIONS[name], "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    return artifact
