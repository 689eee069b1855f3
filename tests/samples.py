"""Proofs over many cases: a quick sample of them runs each time, the others with the slow tests."""

import random
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def sampled(*axes: Iterable[Any]) -> list[Any]:
    """The product of the axes, for parametrize. A few cases, always the same, are quick, and meet
    every value of each axis; the others are slow."""
    values = [list(axis) for axis in axes]
    cases = list(product(*(range(len(axis)) for axis in values)))
    quick, met = set[tuple[int, ...]](), set[tuple[int, int]]()
    for case in random.Random(0).sample(cases, len(cases)):
        own = set(enumerate(case))
        if not own <= met:
            quick.add(case)
            met |= own
    return [
        pytest.param(
            *(axis[index] for axis, index in zip(values, case, strict=True)),
            marks=[] if case in quick else [pytest.mark.slow],
        )
        for case in cases
    ]
