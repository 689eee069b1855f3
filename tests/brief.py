"""A machine measured and a plan rehearsed as briefly as can be: for what the numbers do not matter
to."""

from functools import partial

import pytest

from subspec.planner.machine import measure
from subspec.planner.machine.timing import Effort as MeasuringEffort
from subspec.planner.rehearse import calibration, rehearsal
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
)
BRIEF = Effort(num_tokens=40)


def be_brief(patch: pytest.MonkeyPatch) -> None:
    """Planning in this process measures hastily, and rehearses briefly one prompt of each kind."""
    one_of_each = tuple(calibration.in_turns(calibration.shipped_samples())[:5])
    patch.setattr(measure, "measure", partial(measure.measure, effort=HASTY))
    patch.setattr(rehearsal, "rehearse", partial(rehearsal.rehearse, effort=BRIEF))
    patch.setattr(calibration, "shipped_samples", lambda: one_of_each)
