"""Feasibility: the smallest budget with a plan, or with a draft; the error if nothing fits."""

from collections.abc import Callable
from dataclasses import replace

from subspec.artifacts.acceptance import Acceptance
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import format_size, short_size, size_argument
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import HostLedger, Plan
from subspec.artifacts.profile import Profile
from subspec.planner.solve.predict import Candidate, Proposer
from subspec.planner.solve.problem import (
    Problem,
    host_ledger,
    left_over,
    make_problem,
    smallest_draft,
    smallest_drafts,
    smallest_plain,
    smallest_plains,
    without_prompt_share,
)
from subspec.planner.solve.storage import Storage


def nothing_fits(problem: Problem) -> SubspecError:
    """The error of a problem without a plan, with the budget that has one."""
    budget, free = problem.budget_bytes, unlimited(problem)
    needed, kept = smallest_budget(problem), problem.storages[-1].residuals
    if smallest_of(problem) is None and smallest_of(free) is not None:
        return host_too_small(problem, least_host(free), needed)
    hint = f"--vram {size_argument(needed)}" if needed else ""
    fits = f"needs {format_size(needed)}" if needed else "does not exist on this machine"
    if needed and kept and not problem.profile.residual_weights_per_second:
        hint += ", or install a C++ compiler (g++): else residuals are decoded only while loading"
    message = f"the budget is {format_size(budget)}, the smallest plan {fits}"
    return SubspecError(Exit.INFEASIBLE, message, hint, smallest_budget_bytes=needed or None)


def host_too_small(problem: Problem, least: HostLedger, needed: int) -> SubspecError:
    """The error if a GPU's host has too little memory. least: the smallest host memory that a plan
    needs; needed: the smallest budget that has a plan in this host's memory, 0 if none has."""
    ram, takes = problem.constraints.ram_bytes, short_size(least.total_bytes)
    beside = f"beside {short_size(problem.budget_bytes)} of GPU memory"
    ways = [f"--vram {size_argument(needed)}"] if needed else []
    if ram is not None and least.total_bytes > ram:
        if least.checkpoints and problem.constraints.num_sequences > 1:
            ways.append("fewer --sequences")
        return SubspecError(
            Exit.INFEASIBLE,
            f"{beside} a plan takes {takes} of host memory ({least.parts}), "
            f"--ram is {short_size(ram)}",
            ", or ".join([f"--ram {size_argument(least.total_bytes)}", *ways]),
            smallest_budget_bytes=needed or None,
        )
    return SubspecError(
        Exit.INFEASIBLE,
        f"{beside} streamed weights and the embedding take {short_size(least.pinned_bytes)} of "
        f"pinned host memory, this process can pin {short_size(problem.profile.pinnable_bytes)}",
        ", or ".join(["a higher `ulimit -l`", "more memory for this container", *ways]),
        smallest_budget_bytes=needed or None,
    )


def unlimited(problem: Problem) -> Problem:
    """The problem with as much host memory as it wants."""
    profile = replace(problem.profile, pinnable_bytes=0)
    constraints = replace(problem.constraints, ram_bytes=None)
    return without_prompt_share(replace(problem, profile=profile, constraints=constraints))


def least_host(problem: Problem) -> HostLedger:
    """The smallest host memory that a plan for a GPU needs. The problem must have a plan."""
    needs_draft = problem.constraints.needs_draft
    some = smallest_drafts(problem) if needs_draft else smallest_plains(problem)
    found = list[HostLedger]()
    for one in some:
        streamed = one.storage.num_bytes - left_over(problem, one) + one.storage.largest_part
        taken = host_ledger(problem, one.method, max(0, streamed))
        if taken is not None and left_over(problem, one) >= 0:
            found.append(taken)
    return min(found, key=lambda taken: taken.total_bytes)


def smallest_of(problem: Problem) -> Candidate | None:
    """Candidate that needs the least memory of what the constraints allow; None if it does not
    fit."""
    return (smallest_draft if problem.constraints.needs_draft else smallest_plain)(problem)


def drafting_from(
    spec: ModelSpec,
    profile: Profile,
    plan: Plan,
    acceptance: Acceptance,
    stored: Storage | None = None,
    proposer: Proposer | None = None,
) -> int:
    """Bytes of the smallest budget in which a draft fits in the plan's context; 0: in none."""
    constraints = replace(plan.constraints, context=plan.context)
    problem = make_problem(
        spec, profile, plan.budget_bytes, constraints, acceptance, stored, proposer
    )
    return smallest_budget(problem, smallest_draft)


def smallest_budget(
    problem: Problem, smallest: Callable[[Problem], Candidate | None] = smallest_of
) -> int:
    """Bytes of the smallest budget that has a plan, to 0.1 %; 0 if none up to 8 TiB has."""
    bare = without_prompt_share(problem)

    def feasible(budget: int) -> bool:
        return smallest(replace(bare, budget_bytes=budget)) is not None

    low, high = 0, 1 << 43
    if not feasible(high):
        return 0
    while high - low > high // 1000 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high
