"""Processes, devices, precision and memory of a run."""

import ctypes
import sys

import torch
from accelerate import Accelerator

from timm_xformers.errors import UserError
from timm_xformers.training.sharding import make_plugin

__all__ = ["emulates_bf16", "emulation_note", "make_accelerator"]

# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h, in bytes.
MALLOC_OPTIONS = {-3: 1 << 30, -1: (1 << 31) - 1, -2: 1 << 26}


def make_accelerator(mixed_precision: str, *, fsdp: bool = False) -> Accelerator:
    """Join the processes that the launcher started; arguments are settings of a recipe.

    Raises:
        UserError: The precision or the shards need devices that are not there.
    """
    found = torch.cuda.is_available() or torch.xpu.is_available()
    found = found or torch.backends.mps.is_available()
    if mixed_precision == "fp16" and not found:
        raise UserError("mixed_precision=fp16 needs a GPU, and there is none; use bf16 or no.")
    # Without a GPU, accelerate joins several processes only if it is told to stay on the CPU.
    plugin = make_plugin(cpu=not found) if fsdp else None
    if not found:
        _keep_freed_memory()
    return Accelerator(cpu=not found, mixed_precision=mixed_precision, fsdp_plugin=plugin)


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of large tensors instead of handing it back after each operation.

    Otherwise every activation is mapped anew and cleared page by page, at a fifth of the memory's
    speed. The process stays at its peak, which the next step needs again anyway.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in MALLOC_OPTIONS.items():
            libc.mallopt(option, value)


def emulates_bf16(device: torch.device) -> bool:
    """Whether computing in bf16 is many times slower than in float32 there."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def emulation_note(mixed_precision: str, device: torch.device) -> str | None:
    """What to know before computing in bf16 on a processor that has no instructions for it."""
    if mixed_precision != "bf16" or not emulates_bf16(device):
        return None
    return (
        "This processor has no bf16 instructions: convolutions and products in bf16 are emulated, "
        "many times slower than mixed_precision=no."
    )
