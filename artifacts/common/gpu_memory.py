"""GPU memory of this process, as the driver counts it."""

import os

import torch


def held_bytes(device: torch.device) -> int | None:
    """Bytes of this process on the GPU: context, kernels, libraries and allocations. None: unknown
    (nvidia-ml-py is not installed, or a container has process ids of its own)."""
    try:
        import pynvml
    except ImportError:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid  # NVML may number GPUs in another order
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    ours = (process.usedGpuMemory for process in processes if process.pid == os.getpid())
    return next(ours, None)
