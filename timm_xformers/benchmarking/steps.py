"""What is timed: one pass of a module."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.benchmarking.settings import Point

__all__ = ["make_step"]


def make_step(
    module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, point: Point
) -> Callable[[], None]:
    """One pass of the kind that the point asks for.

    * ``forward``: under inference mode.
    * ``backward``: forward, and gradients of all weights, of a layer's tokens too.
    * ``train``: forward, cross-entropy, backward and an update by AdamW.

    Autocast has the point's type. The module is in the mode of the pass.
    """
    if point.task == "forward":

        def forward() -> None:
            with torch.inference_mode(), _autocast(point):
                module(x)

        return forward
    if point.task == "backward":
        sources: list[Tensor] = [p for p in parameters if p.requires_grad]
        if point.kind == "layer":
            x = x.requires_grad_()
            sources.append(x)

        def backward() -> None:
            with _autocast(point):
                out = module(x)
            # Not .backward(): that would add up gradients from call to call.
            torch.autograd.grad(out, sources, torch.ones_like(out), allow_unused=True)

        return backward
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(point):
            out = module(x)
        torch.autograd.backward(F.cross_entropy(out.float(), labels))
        optimizer.step()

    return train


def _autocast(point: Point) -> AbstractContextManager[object]:
    """Half precision as models are trained in it; layers are of that type themselves."""
    if point.kind == "layer" or point.dtype == "float32":
        return nullcontext()
    return torch.autocast(point.device, getattr(torch, point.dtype))
