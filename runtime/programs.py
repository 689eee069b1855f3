"""Programs that are compiled for a plan: C++ sources, torch's graphs, shapes that gemlite tunes."""

from collections.abc import Callable
from pathlib import Path

from subspec.artifacts.footprint import CATCH_UP_ROWS, MAX_PROPOSED
from subspec.artifacts.format.store import Artifact
from subspec.artifacts.model import ModelSpec
from subspec.artifacts.native import fp8_cpu, residual_cpu
from subspec.artifacts.plan import (
    WITH_DRAFT_MODEL,
    WITH_SUBSTITUTES,
    Method,
    Plan,
    tree_for,
)
from subspec.runtime.draft import compiled_layers, graph_pieces
from subspec.runtime.kernels import bf16, int4
from subspec.runtime.model import attention, delta_net

Kernel = tuple[Path, Callable[[], str | None]]  # its source, and why it cannot be used


def needed_kernels(spec: ModelSpec, plan: Plan, method: Method) -> list[Kernel]:
    """C++ kernels that decoding by `method` calls."""
    if plan.device != "cpu":
        return []
    found: list[Kernel] = [(attention.SOURCE, attention.unavailable)]
    if spec.dtype == "bfloat16" and not bf16.is_native():
        found.append((bf16.SOURCE, bf16.unavailable))
    if spec.delta_nets:
        found.append((delta_net.SOURCE, delta_net.unavailable))
    if any(name.partition("[")[0] not in spec.fp8 for name in plan.residuals):
        found.append((residual_cpu.SOURCE, residual_cpu.unavailable))
    if spec.fp8:
        found.append((fp8_cpu.SOURCE, fp8_cpu.unavailable))
    if plan.int4_kernel == "w4a8" and (plan.residuals or method != "plain"):
        found.append((int4.SOURCE, int4.unavailable))
    if plan.int4_kernel == "w4a8" and method != "plain":
        found.append((compiled_layers.SOURCE, compiled_layers.unavailable))
    return found


def kernel_sources(spec: ModelSpec, plan: Plan) -> list[Path]:
    """C++ sources for decoding by any of the plan's methods."""
    kernels = (one for method in plan.placements for one in needed_kernels(spec, plan, method))
    return list(dict.fromkeys(source for source, _ in kernels))


def graph_programs(plan: Plan, spec: ModelSpec) -> list[str]:
    """Names, on this machine, of the graphs that torch compiled for the plan's drafts."""
    if not plan.draft_graphs:
        return []
    return [graph_pieces.program(piece) for piece in graph_pieces.pieces_of(spec)]


def substitute_shapes(spec: ModelSpec) -> set[tuple[int, int]]:
    """Rows and columns of the substitutes."""
    return {(one.out_features, one.in_features) for one in spec.linears if one.has_substitute}


def draft_products(artifact: Artifact, method: Method) -> dict[tuple[int, int], int]:
    """Most rows of a product with 4-bit matrices of each shape, for any drafter that fits the
    method's memory. A draft model also reads texts."""
    found, most = dict[tuple[int, int], int](), most_draft_rows(artifact.plan, method)
    if method in WITH_SUBSTITUTES:
        found |= dict.fromkeys(substitute_shapes(artifact.spec), most)
    if method in WITH_DRAFT_MODEL and artifact.draft_model is not None:
        shapes = substitute_shapes(artifact.draft_model)
        found |= dict.fromkeys(shapes, max(most, CATCH_UP_ROWS))
    return found


def most_draft_rows(plan: Plan, method: Method) -> int:
    """Most rows of a pass over trees: for each sequence a level, and the tokens proposed below it.
    The planner also tries other trees in a plan's memory, which are no wider."""
    every, trees = range(1, plan.num_sequences + 1), plan.draft_of(method).trees
    return max(count * (tree_for(trees, count).width + MAX_PROPOSED) for count in every)
