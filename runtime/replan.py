"""Another plan for an artifact while it is opened: subspec-plan as a command solves it.

The runtime imports nothing of the planner, and the artifact's folder is not touched.
"""

import subprocess
import sys
from dataclasses import replace

from subspec.artifacts.checks import check_plan
from subspec.artifacts.codec import load_dataclass, parse_json
from subspec.artifacts.errors import Exit, SubspecError
from subspec.artifacts.plan import Plan
from subspec.artifacts.store import Artifact

PLANNER = (sys.executable, "-m", "subspec.planner.cli")


def planned_anew(
    artifact: Artifact, vram: int, device: str | None, link_bandwidth: int | None
) -> Artifact:
    """The same weights under a plan for `vram` bytes, and for a link of no more than
    `link_bandwidth` bytes a second. Raises the planner's own SubspecError."""
    command = [*PLANNER, "--from", str(artifact.path), "--vram", f"{vram}B", "--print-plan"]
    command += ["--device", device] if device else []
    command += ["--link-bandwidth", f"{link_bandwidth}B"] if link_bandwidth else []
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        raise planners_error(ended.returncode, ended.stderr)
    plan: Plan = load_dataclass(Plan, parse_json(ended.stdout, "the new plan"), "the new plan")
    check_plan(artifact.spec, artifact.stored_parts(), plan)
    return replace(artifact, plan=plan)


def planners_error(code: int, said: str) -> SubspecError:
    """What subspec-plan wrote on stderr, as an error of ours: `error: …` and `hint: …`."""
    lines = said.splitlines()
    found = {
        word: next((x.removeprefix(f"{word}: ") for x in lines if x.startswith(f"{word}: ")), "")
        for word in ("error", "hint")
    }
    known = code in {int(one) for one in Exit} and found["error"]
    return SubspecError(
        Exit(code) if known else Exit.UNEXPECTED,
        found["error"] or f"subspec-plan ended with code {code}: {(lines or [''])[-1][:300]}",
        found["hint"],
    )
