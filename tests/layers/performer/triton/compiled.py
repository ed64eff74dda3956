"""The fused kernels through Triton's compiler for an H200, which needs no GPU.

Run by test_triton.py, in a process of its own without the interpreter. What the compiler asks
for must stay under the bounds by which `choice` lets a layer take the kernels.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_xformers.layers.performer.triton import backward, choice, forward, operators

pytestmark = pytest.mark.slow
KERNELS = [
    forward.key_states,
    forward.merge_states,
    forward.mix,
    backward.query_grad,
    backward.key_grad,
]
INPUTS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
FLOATS = ("projection", "bias", "partial", "state", "d_state")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Not known to be a multiple of anything, as when a model is run.
COUNTS = ("H", "N", "S", "chunk", "splits", "bias_b")
# Bytes of registers that may spill to memory, per thread: a fifth of 255 registers, which the
# gradient of gelu in float32 comes near.
SPILLS = 208


def compiled(kernel, dtype, static):
    """A kernel as the first call with such arguments builds it."""
    options = {name: static[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in static:
            signature[name] = "constexpr"
            constants[place,] = static[name]
            continue
        kind = "*fp32" if name in FLOATS else "i32"
        signature[name] = POINTERS[dtype] if name in INPUTS else kind
        if name == "scale":
            signature[name] = "fp32"
        elif name not in COUNTS:
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled(made):
    """Bytes of local memory per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


@pytest.mark.parametrize("feature", ["softmax", "relu", "gelu"])
@pytest.mark.parametrize(
    ("dtype", "D", "m"),
    [
        (torch.bfloat16, 32, 32),
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 64, 110),
        (torch.bfloat16, 128, 128),
        (torch.float16, 64, 64),
        (torch.float32, 32, 64),
        (torch.float32, 64, 64),
    ],
    ids=str,
)
def test_sizes_that_layers_take_fit_the_device(dtype, D, m, feature):
    tokens = torch.empty(1, 1, 1, D, dtype=dtype)
    static = operators._static(tokens, tokens, torch.empty(m, D), feature)
    _, each = choice.LIMITS_BF16 if dtype == torch.bfloat16 else choice.LIMITS
    bound = min(choice.H200_SHARED, choice.padded(m) * D * each)
    for kernel in KERNELS:
        made = compiled(kernel, dtype, static)
        assert made.metadata.shared <= bound, kernel.fn.__name__
        assert spilled(made) <= SPILLS, kernel.fn.__name__
