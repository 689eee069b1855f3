"""Check that Triton kernels can run on a GPU: all code that is about to use them calls
`unavailable`.

Triton is imported only then.
"""

from functools import cache
from importlib.util import find_spec

import torch

MIN_CAPABILITY = (8, 0)  # of our kernels: products of bf16 and tf32


@cache
def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on the CUDA device, or None if they can.

    Starts Triton's driver, which compiles a library in C unless it is in Triton's cache: that needs
    a C compiler, Python.h, and libcuda where the linker finds it.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, some)) for some in (capability, MIN_CAPABILITY))
        return f"the GPU has compute capability {have}, and {need} is needed"
    try:
        from triton.runtime.driver import driver

        with torch.cuda.device(device):
            driver.active.utils  # noqa: B018  made when it is first asked for
    except Exception as error:  # of whatever kind: assertions, the compiler's exit code, the loader
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"triton cannot start: {lines[-1]}"
    return None
