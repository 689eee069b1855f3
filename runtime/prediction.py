"""Which drafts a plan's predictions hold for, and the speed that it predicts: known before an
engine is open."""

from subspec.artifacts.plan import OF_HEADS, DrafterName, Method, Plan


def is_planned(
    method: Method, drafter: DrafterName | None, draft_temperature: float | None
) -> bool:
    """Return True if the plan's predictions hold for the drafter, lookup aside. draft_temperature:
    None: that of the plan's trees."""
    if drafter is not None and draft_temperature is not None:
        return False
    return drafter in (None, method, "substitute+lookup")


def predicted_speed(
    plan: Plan,
    method: Method,
    drafter: DrafterName | None,
    draft_temperature: float | None,
    padded: bool,
) -> float | None:
    """Tokens/s of an exact answer: the plan's prediction for this method, or the measured speed of
    a draft head. None for the padded twin and for other drafters and draft temperatures, which have
    no prediction."""
    of_head = plan.draft_head_result if draft_temperature is None else None
    if drafter in OF_HEADS and of_head is not None:
        return of_head.tokens_per_second
    is_twin = method == "plain" and padded
    if is_twin or not is_planned(method, drafter, draft_temperature):
        return None
    predicted = plan.predicted.get(method)
    return predicted.tokens_per_second if predicted else None
