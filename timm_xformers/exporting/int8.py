"""Weights as int8 with one scale per output row, multiplied out when they are used.

Activations stay as they are, so nothing has to be calibrated. Files shrink to about a quarter; it
is not for speed.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["quantize_weights"]

# Below, scales and code outweigh what is saved.
FEWEST_VALUES = 1024


class _Scaled(nn.Module):
    """int8 (out, ...) times a scale per row."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to compute with."""
        return weight.to(self.scale.dtype) * self.scale


def quantize_weights(model: nn.Module) -> int:
    """Store the weights of linear layers and convolutions as int8, in place.

    Returns:
        How many values became int8.
    """
    count = 0
    for layer in model.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight.numel() < FEWEST_VALUES:
            continue
        weight = layer.weight.detach()
        largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
        scale = largest.clamp_min(torch.finfo(weight.dtype).tiny) / 127
        stored = (weight / scale).round().to(torch.int8)  # in [-127, 127]
        layer.weight = nn.Parameter(stored, requires_grad=False)
        parametrize.register_parametrization(layer, "weight", _Scaled(scale), unsafe=True)
        count += weight.numel()
    return count
