"""A Plan as the table or the pages that a person reads."""

from subspec.artifacts.model import ModelSpec
from subspec.artifacts.plan import Plan
from subspec.artifacts.profile import Profile


def render_readme(spec: ModelSpec, plan: Plan) -> str:
    return f"# {spec.source.repository}\n"


def render_report(spec: ModelSpec, plan: Plan, profile: Profile) -> str:
    return "<!doctype html>\n"


def plan_lines(spec: ModelSpec, plan: Plan) -> list[str]:
    return []
