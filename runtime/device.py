"""The device that a model is opened on, and its name in plans."""

from contextlib import ExitStack

import torch

from subspec.artifacts.common.cpu_load import usable_cpus
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.plan import Placement, Plan
from subspec.runtime.kernels.linear import check_capability


def open_device(
    plan: Plan, placement: Placement, device: str | None, stack: ExitStack
) -> torch.device:
    """Return the plan's device; `device` may select one of several GPUs. Limits torch's share of
    its memory until the stack is closed."""
    chosen = torch.device(device or plan.device)
    if chosen.type != plan.device:
        raise SubspecError(
            Exit.WRONG_MACHINE,
            f"the plan is for {plan.device}, but --device {device} was given",
            f"plan again with --device {device}",
        )
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise SubspecError(
                Exit.WRONG_MACHINE,
                "the plan is for a CUDA GPU and torch finds none",
                "plan again with --device cpu",
            )
        chosen = torch.device("cuda", chosen.index or 0)
        if chosen.index >= torch.cuda.device_count():
            raise SubspecError(
                Exit.WRONG_MACHINE,
                f"--device {chosen}, but there are {torch.cuda.device_count()} GPUs",
                "count them from 0",
            )
        check_capability(chosen)
        torch.cuda.set_device(chosen)
        restrict_cuda_kernels()
        torch.cuda.empty_cache()  # other code's cache would count against the budget
        # What torch may allocate: the budget less the context, which torch does not count.
        ours = plan.budget_bytes - placement.ledger.overhead
        total = torch.cuda.get_device_properties(chosen).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, ours / total), chosen)
        stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0, chosen)
    return chosen


def restrict_cuda_kernels() -> None:
    """Restrict the kernels that torch may choose on GPUs, in this process.

    Products of 16-bit numbers are added up in f32. Else cuBLAS may round partial sums to 16 bits
    where it divides a long sum among thread blocks, which depends on the number of rows. Drafts'
    attention may use only kernels that take any shape at once: cuDNN makes a plan for each new
    number of rows and slots, up to 37 ms of the host (huggingface/transformers#48163), and both
    change from prompt to prompt.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def machine_name(device: torch.device) -> str:
    """Name of what a plan's costs and a result's bits depend on; constant in a process."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{instruction_sets()}, {usable_cpus()} cpus"
    return f"{device.type}: {name}; torch {torch.__version__}"


def driver_version(device: torch.device) -> str:
    """Version of the GPU's driver, from NVML; empty without a GPU or nvidia-ml-py."""
    if device.type != "cuda":
        return ""
    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return ""


def instruction_sets() -> str:
    """Instruction sets of the CPU by which torch and oneDNN choose products, each of which adds in
    an order of its own."""
    found = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_avx512_bf16_supported():
        found.append("bf16")
    if torch.cpu._is_amx_tile_supported():
        found.append("AMX")
    return "+".join(found)
