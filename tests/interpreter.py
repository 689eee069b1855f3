"""Triton's interpreter, where it can run all of our kernels."""

from importlib.util import find_spec

import pytest
from packaging.version import Version

OLDEST = "3.7"


def is_too_old() -> bool:
    if find_spec("triton") is None:
        return False  # tests of kernels say so themselves
    import triton

    return Version(triton.__version__) < Version(OLDEST)


needs_interpreter = pytest.mark.skipif(
    is_too_old(),
    reason=f"before {OLDEST} Triton's interpreter ends loops by arrays, which numpy refuses",
)
