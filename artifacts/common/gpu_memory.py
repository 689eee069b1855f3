"""What this process holds of a GPU, by the driver's own count."""

import os

import torch


def held_bytes(device: torch.device) -> int | None:
    """Context, kernels, libraries and whatever was allocated. None: the driver does not tell ours
    from others' (nvidia-ml-py is not installed; a container, whose process ids are its own)."""
    try:
        import pynvml
    except ImportError:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid  # indices may be another order's
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    ours = (process.usedGpuMemory for process in processes if process.pid == os.getpid())
    return next(ours, None)
