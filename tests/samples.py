"""Proofs over many cases: a quick sample of them runs each time, the others with the slow tests."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def sampled(step: int, *axes: Iterable[Any]) -> list[Any]:
    """The product of the axes, for parametrize: every `step`-th case is quick, the others are slow.
    The quick ones meet every value of each axis."""
    values = [list(axis) for axis in axes]
    indices = list(product(*(range(len(axis)) for axis in values)))
    met = [len({case[place] for case in indices[::step]}) for place in range(len(values))]
    assert met == [len(axis) for axis in values], f"a step of {step} meets {met} values"
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if index % step else [])
        for index, case in enumerate(product(*values))
    ]
