"""Rotary positions of the token grid, for queries and keys of any mechanism that has them.

Su et al., "RoFormer", 2021 (arXiv:2104.09864), in the axial 2-D form that timm provides: half of a
head turns with the row, half with the column.
"""

import torch
from timm.layers import RotaryEmbeddingCat
from torch import Tensor, nn

__all__ = ["RotaryPositions"]


class RotaryPositions(nn.Module):
    """Turn (B, H, N, D) by the position of each token; prefix tokens stay as they are.

    Args:
        head_dim: Head width D.
        grid_size: Rows and columns of the token grid.
        num_prefix_tokens: Tokens before the grid.

    Raises:
        ValueError: ``head_dim`` is not a multiple of 4.
    """

    def __init__(
        self,
        head_dim: int,
        grid_size: tuple[int, int],
        num_prefix_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                f"Rotary positions turn pairs along two axes: head_dim={head_dim} must be a "
                f"multiple of 4, e.g. {head_dim + 4 - head_dim % 4}."
            )
        self.num_prefix_tokens = num_prefix_tokens
        # Positions count tokens (in_pixels=False), as for language; a longer grid turns further.
        self.embed = RotaryEmbeddingCat(
            head_dim,
            in_pixels=False,
            feat_shape=list(grid_size),
            ref_feat_shape=None,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Queries or keys (B, H, N, D) to the same shape and type."""
        prefix, grid = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        sine, cosine = self.embed.get_embed().chunk(2, dim=-1)
        # timm's function would write the batch size into files of TorchScript's ONNX exporter.
        crossed = torch.stack([-grid[..., 1::2], grid[..., ::2]], dim=-1).flatten(-2)
        turned = grid * cosine + crossed * sine
        return torch.cat([prefix, turned.to(x.dtype)], dim=2)
