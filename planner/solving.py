"""Plan requests, the inputs of the solver, and solving.

Heavy imports wait until they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.plan import Constraints, Method, Plan, head_of, method_of
from subspec.artifacts.profile import Profile

if TYPE_CHECKING:
    from subspec.artifacts.acceptance import Acceptance
    from subspec.artifacts.format.store import Artifact
    from subspec.artifacts.model import ModelSpec
    from subspec.planner.rehearse.calibration import Sample
    from subspec.planner.rehearse.corrections import PredictFor
    from subspec.planner.solve.predict import Proposer
    from subspec.planner.solve.storage import Storage

Notify = Callable[[str], None]


def no_notify(line: str) -> None:
    """A `notify` that keeps silent."""


@dataclass(frozen=True)
class PlanRequest:
    """The user's request for a plan, without the model or artifact that it is for."""

    budget_bytes: int
    constraints: Constraints = Constraints()
    device: str | None = None  # None: a GPU if there is one
    link_bandwidth: int | None = None  # plan as if the link gave so many bytes a second at most
    known_profile: Profile | None = None  # of a machine that is not measured, nor run on
    samples: "tuple[Sample, ...] | None" = None  # that acceptance is measured on; None: our own
    rehearse: float | None = None  # seconds that a rehearsal takes at most; 0: none; None: usual


@dataclass(frozen=True)
class PlanInputs:
    """Inputs of the solver."""

    request: PlanRequest
    spec: "ModelSpec"
    profile: Profile  # of the link as it is, whatever it is to be slowed to
    acceptance: "Acceptance"  # of the substitutes' trees
    stored: "Storage | None" = None  # how an artifact has the weights; None: the search chooses
    proposer: "Proposer | None" = None  # a draft model

    @property
    def slowed(self) -> Profile:
        """The profile under the request's link bandwidth."""
        from subspec.planner.machine.profiles import under_link

        return under_link(self.profile, self.request.link_bandwidth)

    @property
    def draft_model(self) -> "ModelSpec | None":
        return self.proposer.spec if self.proposer else None

    def constrained(self, constraints: Constraints) -> "PlanInputs":
        return replace(self, request=replace(self.request, constraints=constraints))

    def with_acceptance(self, method: Method, acceptance: "Acceptance") -> "PlanInputs":
        """The inputs with the acceptance of a method's trees: the substitutes' or the draft
        model's."""
        if method == "substitute":
            return replace(self, acceptance=acceptance)
        assert self.proposer is not None
        return replace(self, proposer=replace(self.proposer, acceptance=acceptance))


def inputs_from_model(
    request: PlanRequest, spec: "ModelSpec", profile: Profile, draft_model: "ModelSpec | None"
) -> PlanInputs:
    """Inputs for a model without an artifact: nothing is measured yet. Raises SubspecError(USAGE)
    for a profile of another model."""
    from subspec.planner.machine.profiles import check_shapes
    from subspec.planner.solve.search import PRIOR, unknown_proposer

    check_shapes(profile, spec, draft_model)
    return PlanInputs(request, spec, profile, PRIOR, proposer=unknown_proposer(draft_model))


def inputs_from_artifact(
    request: PlanRequest, artifact: "Artifact", profile: Profile
) -> PlanInputs:
    """Inputs for an artifact, with its plan's measurements; its weights stay as they are. Raises
    SubspecError(USAGE) for a profile of another model."""
    from subspec.planner.machine.profiles import check_shapes
    from subspec.planner.solve.search import unknown_proposer
    from subspec.planner.solve.storage import Storage

    check_shapes(profile, artifact.spec, artifact.draft_model)
    plan, proposer = artifact.plan, unknown_proposer(artifact.draft_model)
    if proposer is not None and "draft-model" in plan.drafts:
        proposer = replace(proposer, acceptance=plan.drafts["draft-model"].acceptance)
    checked = plan.drafts.get("substitute+draft-model")
    if proposer is not None and checked is not None and checked.hierarchical_cost:
        proposer = replace(proposer, hierarchical_cost=checked.hierarchical_cost)
    stored = Storage(tuple(artifact.stored_parts()))
    return PlanInputs(request, artifact.spec, profile, plan.acceptance, stored, proposer)


def solve(inputs: PlanInputs) -> Plan:
    """Solve for the fastest plan. Raises SubspecError: INFEASIBLE if nothing fits, UNSUPPORTED for
    what this machine cannot do."""
    from subspec.planner.solve.fastest import fastest_plan

    request = inputs.request
    plan = fastest_plan(
        inputs.spec, inputs.slowed, request.budget_bytes, request.constraints, inputs.acceptance,
        inputs.stored, inputs.proposer,
    )  # fmt: skip
    if request.link_bandwidth is None:
        return plan
    reason = f"planned for a link limited to {short_size(request.link_bandwidth)}/s"
    return replace(plan, reasons=(f"{reason}: --link-bandwidth", *plan.reasons))


def solve_if_feasible(inputs: PlanInputs) -> Plan | None:
    """Solve for the fastest plan; None if nothing fits."""
    try:
        return solve(inputs)
    except SubspecError as error:
        if error.exit_code != Exit.INFEASIBLE:
            raise
        return None


def with_sweeps(inputs: PlanInputs, plan: Plan) -> Plan:
    """The plan with predictions for other budgets and contexts."""
    from subspec.planner.solve.feasible import drafting_from
    from subspec.planner.solve.outlook import with_outlook

    request = inputs.request

    def best(budget: int, context: int) -> Plan:
        fixed = replace(request.constraints, context=context)
        asked = replace(request, budget_bytes=budget, constraints=fixed)
        return solve(replace(inputs, request=asked))

    most = inputs.spec.max_positions
    if set(plan.placements) != {"plain"}:
        return with_outlook(plan, best, most)
    begins = drafting_from(
        inputs.spec, inputs.slowed, plan, inputs.acceptance, inputs.stored, inputs.proposer
    )
    return with_outlook(plan, best, most, begins)


def with_known_drafter(plan: Plan, before: Plan) -> Plan:
    """Carry the default drafter that a rehearsal on this machine has chosen over to a plan that was
    not rehearsed, unless its constraints exclude that. The speed of a draft head is not carried
    over to another budget or context."""
    head, own, drafter = before.draft_head_result, plan.placements.get("substitute"), before.drafter
    has_head = own is not None and own.ledger.drafter > 0
    if plan.machine != before.machine:
        return plan
    if head is not None and has_head:
        alike = (plan.budget_bytes, plan.context) == (before.budget_bytes, before.context)
        if head.tree.num_nodes <= plan.verify_width and head.tree.width <= plan.tree.width:
            found = head if alike else replace(head, tokens_per_second=None)
            plan = replace(plan, draft_head_result=found)
    asked = plan.constraints
    if (asked.method, asked.width, asked.depth) != (None, None, None) or drafter is None:
        return plan
    fits = method_of(drafter) == plan.method and (head_of(drafter) is None or has_head)
    return replace(plan, drafter=drafter) if fits else plan


def predictor_for(inputs: PlanInputs, plan: Plan) -> "PredictFor":
    """Predictor of the plan for a usage, without corrections and without the one-time check of
    digests."""
    from subspec.planner.rehearse.corrections import without_corrections
    from subspec.planner.solve.outlook import predict_for

    assert inputs.stored is not None
    spec, stored, other = inputs.spec, inputs.stored, inputs.draft_model
    bare = replace(without_corrections(inputs.slowed), digest_bytes_per_second=0.0)
    return lambda method, usage: predict_for(spec, bare, plan, stored, method, usage, other)


# A machine that is busy


def with_load(profile: Profile, others: float, notify: Notify) -> Profile:
    """The profile with the share of the CPUs that other programs used during a rehearsal; notifies
    unless it was under load before."""
    busier = replace(profile, background_cpu_share=max(profile.background_cpu_share, others))
    if not profile.under_load:
        notify_if_under_load(busier, notify)
    return busier


def notify_if_under_load(profile: Profile, notify: Notify) -> None:
    if profile.under_load:
        notify(
            f"note: other programs used {profile.background_cpu_share:.0%} of the CPUs while this "
            "machine was measured: the predicted speed is too low and another plan may be faster; "
            "when they have ended, measure again (subspec-plan --from ARTIFACT --reprofile)"
        )
