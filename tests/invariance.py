"""Widths of verifications in which this machine gives a row the same bits."""

from dataclasses import replace
from functools import cache

import torch
from builders import PROFILE

from subspec.artifacts.model import ModelSpec
from subspec.planner.machine.microbench import Bench
from subspec.planner.solve.problem import padded_widths


@cache
def groups_here(spec: ModelSpec, device: str) -> tuple[tuple[int, ...], ...]:
    return Bench(spec, torch.device(device)).batch_invariant_widths()


def widths_here(spec: ModelSpec, device: str, num_nodes: int) -> tuple[int, ...]:
    """What a plan on this machine would pad drafts of up to `num_nodes` nodes to."""
    groups = groups_here(spec, device)
    found = padded_widths(replace(PROFILE, batch_invariant_widths=groups), num_nodes)
    assert found is not None
    return found
