"""The fastest plan over the 4-bit kernels of a profile, with its disk size and its speed in a full
context."""

from dataclasses import replace

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.formatting import number
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.footprint import substitutes_bytes
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Constraints, Plan
from subspec.artifacts.profile import Profile
from subspec.planner.solve.outlook import predict_for, speed_of
from subspec.planner.solve.predict import Proposer, full_usage
from subspec.planner.solve.search import search
from subspec.planner.solve.storage import Storage, artifact_bytes, storage_with


def fastest_plan(
    spec: ModelSpec,
    profile: Profile,
    budget_bytes: int,
    constraints: Constraints,
    acceptance: Acceptance,
    stored: Storage | None = None,
    proposer: Proposer | None = None,
) -> Plan:
    """Run `search` for each 4-bit kernel and return the fastest plan. A slower kernel may leave
    memory for weights that then need not stream."""
    found, refused = list[Plan](), list[SubspecError]()
    for one in profile.by_kernel:
        try:
            plan = search(spec, one, budget_bytes, constraints, acceptance, stored, proposer)
        except SubspecError as error:
            if error.exit_code != Exit.INFEASIBLE:
                raise
            refused.append(error)
        else:
            found.append(plan)
    if not found:
        raise min(refused, key=lambda error: error.smallest_budget_bytes or 1 << 62)
    fastest = max(found, key=speed_of)
    uses_kernel = fastest.method != "plain" or fastest.residuals
    if profile.other_kernels and uses_kernel:
        fastest = replace(fastest, reasons=(*fastest.reasons, why_kernel(spec, fastest, found)))
    return with_disk_and_full_context(spec, profile, fastest, stored, proposer)


def why_kernel(spec: ModelSpec, fastest: Plan, plans: list[Plan]) -> str:
    """Reason for the 4-bit kernel of the fastest of several plans."""
    name = fastest.int4_kernel
    sizes = f"its copy takes {short_size(substitutes_bytes(spec, name))}"
    others = [
        f"{number(speed_of(one))} with {one.int4_kernel}, whose copy takes "
        f"{short_size(substitutes_bytes(spec, one.int4_kernel))}"
        for one in plans
        if one is not fastest
    ]
    if not others:
        return f"the 4-bit kernel is {name}, {sizes}: with another one nothing fits the budget"
    speed = f"{number(speed_of(fastest))} tokens/s against {', '.join(others)}"
    return f"the 4-bit kernel is {name}, {sizes}: {speed}"


def with_disk_and_full_context(
    spec: ModelSpec, profile: Profile, plan: Plan, stored: Storage | None, proposer: Proposer | None
) -> Plan:
    """The plan with its disk size and its speed in a full context."""
    other = proposer.spec if proposer else None
    if stored is None:
        stored = storage_with(spec, plan.residuals)
    full = predict_for(spec, profile, plan, stored, plan.method, full_usage(plan.context), other)
    return replace(plan, disk_bytes=artifact_bytes(spec, stored, other), full_context=full)
