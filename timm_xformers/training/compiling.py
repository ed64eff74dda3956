"""torch.compile, less an optimisation of GCC's that makes its kernels wrong."""

import platform
from typing import Any

import torch
from torch import nn

__all__ = ["compile_model"]

# GCC 12.2 at -O3, tuned for a processor it does not know by name, miscompiles the transposition of
# bfloat16 in kernels with AVX-512: compiled gradients of attention at 64 tokens were NaN, or
# wrong ones, where plain ones were right. PyTorch vectorises its loops itself and turns GCC's loop
# vectoriser off for the same reason; this is the same for its other vectoriser.
SAFE_FLAG = "-fno-tree-slp-vectorize"


def compile_model(model: nn.Module, *, dynamic: bool | None = None) -> Any:
    """`torch.compile`, ``dynamic`` as there, with kernels that can be trusted on this processor."""
    return torch.compile(model, dynamic=dynamic, options=_options())


def _options() -> dict[str, Any] | None:
    # AVX-512 is x86's, and other processors have other defaults than -march=native.
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    # Imported here: the compiler takes a second to import.
    from torch._inductor import config, cpp_builder, exc

    march = getattr(config.cpp, "march", "")  # older PyTorch has no place for a flag
    if march == "" or SAFE_FLAG in (march or ""):
        return None
    try:
        if not cpp_builder.is_gcc():
            return None
    except exc.InvalidCxxCompiler:  # none there, and a model on a GPU may need none
        return None
    # The setting becomes -march=TEXT, and more flags may stand behind a blank.
    return {"cpp.march": f"{march or 'native'} {SAFE_FLAG}"}
