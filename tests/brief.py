"""A machine measured and a plan rehearsed as briefly as can be: for what the numbers do not matter
to."""

import sys
from functools import partial
from pathlib import Path

import pytest

from subspec.artifacts.profile import LinkRate
from subspec.planner.machine import measure
from subspec.planner.machine.timing import Effort as MeasuringEffort
from subspec.planner.rehearse import calibration, learning, rehearsal
from subspec.planner.rehearse.rehearsal import Effort

# One sample of everything.
HASTY = MeasuringEffort(
    passes=1,
    fewest_samples=1,
    action_seconds=0.0,
    stream_seconds=0.0,
    place_seconds=0.0,
    least_link_bytes=4 << 20,
    most_link_bytes=4 << 20,
    compiles_graphs=False,
)
BRIEF_PLAN = """
import sys
sys.path.insert(0, sys.argv[1])
import pytest, subspec.artifacts
from brief import be_brief
from subspec.planner.cli import main
be_brief(pytest.MonkeyPatch())
main(sys.argv[2:])
"""
# subspec-plan in a process of its own, with `be_brief`.
BRIEF_PLANNER = (sys.executable, "-c", BRIEF_PLAN, str(Path(__file__).parent))
# Learning ends with the five answers: a limit in seconds would be another on a busy machine. So
# rounds have some seconds, for a few even there.
BRIEF = Effort(acceptance_seconds=60.0, time_seconds=4.0, plain_seconds=1.0)


def be_brief(patch: pytest.MonkeyPatch) -> None:
    """Planning in this process measures hastily, and rehearses briefly one prompt of each kind. The
    disk is said to be fast: one sample of a busy one would decide what is planned."""
    one_of_each = tuple(calibration.in_turns(calibration.shipped_samples())[:5])
    patch.setattr(measure, "measure", partial(measure.measure, effort=HASTY))
    patch.setattr(measure, "measure_link", lambda tier, size, effort: LinkRate(size, 500e6))
    patch.setattr(rehearsal, "ANSWER_TOKENS", 24)
    patch.setattr(learning, "effort_of", lambda _: BRIEF)
    patch.setattr(learning, "shipped_samples", lambda: one_of_each)
