"""What is compiled for a plan: C++ sources, torch's graphs, shapes that gemlite tunes."""

from collections.abc import Callable
from pathlib import Path

from subspec.artifacts.model import ModelSpec
from subspec.artifacts.native import fp8_cpu, residual_cpu
from subspec.artifacts.plan import Method, Plan, tree_for
from subspec.runtime.draft import compiled_layers, graph_pieces
from subspec.runtime.kernels import bf16, int4
from subspec.runtime.model import attention, delta_net

Kernel = tuple[Path, Callable[[], str | None]]  # its source, and why it cannot be used


def needed_kernels(spec: ModelSpec, plan: Plan, method: Method) -> list[Kernel]:
    """What decoding by `method` calls."""
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
    """What is compiled for decoding by any of the plan's methods."""
    kernels = (one for method in plan.placements for one in needed_kernels(spec, plan, method))
    return list(dict.fromkeys(source for source, _ in kernels))


def graph_programs(plan: Plan, spec: ModelSpec) -> list[str]:
    """What torch compiled for the plan's drafts, as it is named on this machine."""
    if not plan.draft_graphs:
        return []
    return [graph_pieces.program(piece) for piece in graph_pieces.pieces_of(spec)]


def substitute_shapes(spec: ModelSpec) -> set[tuple[int, int]]:
    """Rows and columns of the substitutes."""
    return {(one.out_features, one.in_features) for one in spec.linears if one.has_substitute}


def draft_rows(plan: Plan, method: Method) -> set[int]:
    """Rows of a draft's passes: each sequence has its root or a level."""
    every, trees = range(1, plan.num_sequences + 1), plan.draft_of(method).trees
    return {count * width for count in every for width in (1, tree_for(trees, count).width)}
