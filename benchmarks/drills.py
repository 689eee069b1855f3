"""Does the budget hold for the whole life of a process, by the kernel's own count?

    python benchmarks/drills.py [--folder build/drills] [--shapes small,widened,vocabulary]

Plans each shape on the CPU, then rehearses the artifact (`subspec-plan --from ... --calibration`)
and runs it (`subspec-run`), each in a process that may hold what an idle interpreter holds, plus
the budget, plus 64 MB: in a cgroup where this process may make one (a process that takes more is
killed), else by its largest resident set. Ends with one JSON line; exit code 1 if a drill failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from memory_limit import ALLOWANCE_BYTES, idle_bytes, memory_group

from subspec.artifacts.common.sizes import short_size

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def read_file(path):"
CALIBRATION = '{"kind": "code", "text": "def read_file(path):\\n    "}\n'


@dataclass(frozen=True)
class Shape:
    name: str
    budget: str
    make: Callable[[Path], str]  # in a folder -> what --model takes


@dataclass(frozen=True)
class Drill:
    shape: str
    command: str
    budget_bytes: int
    limit_bytes: int
    peak_bytes: int
    by: str  # "cgroup" or "VmHWM"
    holds: bool


def demo(folder: Path) -> str:
    return "demo"


def widened(folder: Path) -> str:
    """1.04 billion parameters with the demo model's behaviour."""
    out = folder / "widened"
    if not out.exists():
        script = ROOT / "benchmarks" / "widen.py"
        words = ["--hidden", "2048", "--layers", "22", "--out", str(out)]
        subprocess.run([sys.executable, str(script), *words], check=True)
    return str(out)


def vocabulary(folder: Path) -> str:
    """A small random model with a tied vocabulary of 151,936: the table has 155 MB."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    out = folder / "vocabulary"
    if not out.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(ROOT / "planner" / "demo-model" / name, out / name)
    return str(out)


SHAPES = (
    Shape("small", "9MB", demo),
    Shape("widened", "900MB", widened),
    Shape("vocabulary", "140MB", vocabulary),
)


def run(words: list[str], limit_bytes: int) -> tuple[int, int, str]:
    """A command within a limit -> its exit code, its largest resident set, how it was bounded."""
    with memory_group(limit_bytes) as group:
        child = subprocess.Popen(
            words,
            preexec_fn=group.enter if group else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert child.stderr is not None
        said = child.stderr.read().decode("utf-8", "replace")
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        print(said[-2000:], file=sys.stderr)
    return child.returncode, usage.ru_maxrss * 1024, "cgroup" if group else "VmHWM"


def drill(shape: Shape, folder: Path, idle_bytes: int) -> Iterator[Drill]:
    artifact = folder / f"{shape.name}-artifact"
    plan = [sys.executable, "-P", "-m", "subspec.planner.cli"]
    words = ["--model", shape.make(folder), "--vram", shape.budget, "--device", "cpu"]
    subprocess.run(
        [*plan, *words, "--context", "512", "--out", str(artifact), "--overwrite"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    budget = json.loads((artifact / "plan.json").read_text("utf-8"))["budget_bytes"]
    calibration = folder / "calibration.jsonl"
    calibration.write_text(CALIBRATION, "utf-8")
    runner = [str(Path(sys.executable).with_name("subspec-run")), str(artifact)]
    commands = {
        "rehearse": [*plan, "--from", str(artifact), "--calibration", str(calibration)],
        "run": [*runner, "--raw", PROMPT, "--max-tokens", "48", "--no-record", "--no-replan"],
    }
    limit = idle_bytes + budget + ALLOWANCE_BYTES
    for name, command in commands.items():
        code, peak, by = run(command, limit)
        yield Drill(shape.name, name, budget, limit, peak, by, code == 0 and peak <= limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/drills"))
    parser.add_argument("--shapes", default=",".join(shape.name for shape in SHAPES))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    idle = idle_bytes()
    print(f"an idle interpreter holds {short_size(idle)}")
    done = []
    for shape in SHAPES:
        if shape.name not in given.shapes.split(","):
            continue
        for one in drill(shape, given.folder, idle):
            done.append(one)
            above = one.peak_bytes - idle - one.budget_bytes
            print(
                f"{one.shape:<12}{one.command:<10}budget {short_size(one.budget_bytes):>9}, peak "
                f"{short_size(one.peak_bytes)}: idle + budget {above / 1e6:+.1f} MB, "
                f"{'holds' if one.holds else 'DOES NOT HOLD'} ({one.by})"
            )
    print(json.dumps({"idle_bytes": idle, "drills": [asdict(one) for one in done]}))
    return 0 if all(one.holds for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
