"""Convolutional embedding for the hybrid models, in the place of timm's `PatchEmbed`.

Jeevan & Sethi, "Vision Xformers", 2021 (arXiv:2107.02239), section 3: three 3x3 convolutions. The
authors put nothing between them, which makes them one linear filter; here a ReLU stands between
unless it is switched off.
"""

from typing import Any, cast

import torch
from timm.layers import Format, nchw_to, to_2tuple
from torch import Tensor, nn

__all__ = ["ConvEmbed"]

# Strides of the three convolutions for each patch size they can stand for.
_STRIDES = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2)}


class ConvEmbed(nn.Module):
    """Three 3x3 convolutions from images (B, in_chans, H, W) to tokens (B, N, embed_dim).

    Args:
        img_size: Height and width.
        patch_size: Pixels per token and side: 1, 2, 4 or 8, by strides of the convolutions.
        in_chans: Image channels.
        embed_dim: Token width; the convolutions have a quarter, a half and all of it.
        bias: Give the convolutions a bias.
        act: Put a ReLU between them.
        strict_img_size: Refuse other image sizes.
        output_fmt: ``"NHWC"`` keeps the grid; None gives (B, N, embed_dim).
        dynamic_img_pad: Must be False; there is no padding to a whole patch.
        device: Where to create the parameters.
        dtype: Their type.

    Raises:
        ValueError: Another patch size, an image that it does not divide, or padding asked for.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        embed_dim: int = 128,
        *,
        bias: bool = True,
        act: bool = True,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise ValueError("The convolutional embedding does not pad; use dynamic_img_pad=False.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.strict_img_size = strict_img_size
        self.output_fmt = Format(output_fmt) if output_fmt else None
        self._set_patch_size(patch_size)
        self._set_img_size(img_size)
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=bias, **dd)
            for i, stride in enumerate(_STRIDES[self.patch_size[0]])
        )
        self.act = nn.ReLU() if act else nn.Identity()

    def _set_patch_size(self, patch_size: int | tuple[int, int]) -> None:
        size = to_2tuple(patch_size)
        if size[0] != size[1] or size[0] not in _STRIDES:
            raise ValueError(f"patch_size={patch_size} is not available; use 1, 2, 4 or 8.")
        self.patch_size: tuple[int, int] = size

    def _set_img_size(self, img_size: int | tuple[int, int]) -> None:
        size, patch = to_2tuple(img_size), self.patch_size[0]
        for side in size:
            if side % patch or side < patch:
                near = max(side - side % patch, patch)
                raise ValueError(
                    f"img_size={side} is not a multiple of patch_size={patch}; use {near} or "
                    f"{near + patch}."
                )
        self.img_size: tuple[int, int] = size
        self.grid_size = (size[0] // patch, size[1] // patch)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size, or the strides; the filters stay as they are."""
        if patch_size is not None:
            self._set_patch_size(patch_size)
            for conv, stride in zip(self.convs, _STRIDES[self.patch_size[0]], strict=True):
                cast(nn.Conv2d, conv).stride = (stride, stride)
        self._set_img_size(self.img_size if img_size is None else img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token and side."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, N, embed_dim), or a grid in ``output_fmt``."""
        H, W = x.shape[-2:]
        if self.strict_img_size:
            rows, cols = self.img_size
            hint = f"the model takes {rows} x {cols} images; resize, or call set_input_size()."
            torch._assert(rows == H, f"The image has {H} rows, but {hint}")
            torch._assert(cols == W, f"The image has {W} columns, but {hint}")
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i < 2:
                x = self.act(x)
        if self.output_fmt is None:
            return x.flatten(2).transpose(1, 2)
        grid: Tensor = nchw_to(x, self.output_fmt)
        return grid
