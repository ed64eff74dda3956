"""Convolutional embeddings in the place of timm's `PatchEmbed`: images to a grid of tokens.

`ConvEmbed`: Jeevan & Sethi, "Vision Xformers", 2021 (arXiv:2107.02239), section 3: three 3x3
convolutions. The authors put nothing between them, which makes them one linear filter; here a ReLU
stands between unless it is taken out.

`ConvTokenizer`: Hassani et al., "Escaping the big data paradigm with compact transformers", 2021
(arXiv:2104.05704), section 3.3: convolution, ReLU and max-pooling, once or more.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Format, nchw_to, to_2tuple
from torch import Tensor, nn

__all__ = ["ConvEmbed", "ConvTokenizer", "GridEmbed", "check_img_size"]

# Strides of the three convolutions for each patch size they can stand for.
_STRIDES = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2)}


def check_img_size(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Refuse what timm would cut off without a word.

    Raises:
        ValueError: Patches do not divide the image.
    """
    for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if side % patch or side < patch:
            near = max(side - side % patch, patch)
            raise ValueError(
                f"img_size={side} is not a multiple of patch_size={patch}; use {near} or "
                f"{near + patch}."
            )


class GridEmbed(nn.Module):
    """What timm asks of an embedding, around a map from images to (B, C, rows, columns).

    A subclass gives `embed`, `dynamic_feat_size` and `feat_ratio`.

    Args:
        strict_img_size: Refuse other image sizes than the one set.
        output_fmt: ``"NHWC"`` keeps the grid; None gives (B, N, C).
        dynamic_img_pad: Must be False; convolutions do not fill up to a whole patch.

    Raises:
        ValueError: Padding asked for.
    """

    def __init__(
        self,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise ValueError("The convolutional embedding does not pad; use dynamic_img_pad=False.")
        self.strict_img_size = strict_img_size
        self.output_fmt = Format(output_fmt) if output_fmt else None

    def _set_img_size(self, img_size: int | tuple[int, int]) -> None:
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, C, rows, columns)."""
        raise NotImplementedError

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image size."""
        raise NotImplementedError

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token and side."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, N, C), or a grid in ``output_fmt``."""
        H, W = x.shape[-2:]
        if self.strict_img_size:
            rows, cols = self.img_size
            hint = f"the model takes {rows} x {cols} images; resize, or call set_input_size()."
            torch._assert(rows == H, f"The image has {H} rows, but {hint}")
            torch._assert(cols == W, f"The image has {W} columns, but {hint}")
        x = self.embed(x)
        if self.output_fmt is None:
            return x.flatten(2).transpose(1, 2)
        grid: Tensor = nchw_to(x, self.output_fmt)
        return grid


class ConvEmbed(GridEmbed):
    """Three 3x3 convolutions from images (B, in_chans, H, W) to tokens (B, N, embed_dim).

    Args:
        img_size: Height and width.
        patch_size: Pixels per token and side: 1, 2, 4 or 8, by strides of the convolutions.
        in_chans: Image channels.
        embed_dim: Token width; the convolutions have a quarter, a half and all of it.
        bias: Give plain convolutions a bias.
        act_layer: What stands between them.
        conv_layer: Constructor of a convolution, such as timm's ``ConvNorm``; None takes a plain
            one.
        device: Where to create the parameters.
        dtype: Their type.
        **grid: Arguments of `GridEmbed`.

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
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        conv_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **grid: Any,
    ) -> None:
        super().__init__(**grid)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if conv_layer is None:
            conv_layer, dd["bias"] = nn.Conv2d, bias
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        self.convs = nn.ModuleList(
            conv_layer(widths[i], widths[i + 1], 3, padding=1, **dd) for i in range(3)
        )
        # One each: what attributes outputs to inputs (DeepLift) follows a module, not its calls.
        self.acts = nn.ModuleList([act_layer(), act_layer(), nn.Identity()])
        self.set_input_size(img_size, patch_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size, or the strides; the filters stay as they are."""
        if patch_size is not None:
            size = to_2tuple(patch_size)
            if size[0] != size[1] or size[0] not in _STRIDES:
                raise ValueError(f"patch_size={patch_size} is not available; use 1, 2, 4 or 8.")
            self.patch_size: tuple[int, int] = size
            convs = [m for m in self.convs.modules() if isinstance(m, nn.Conv2d)]
            for conv, stride in zip(convs, _STRIDES[size[0]], strict=True):
                conv.stride = (stride, stride)
        size, patch = to_2tuple(self.img_size if img_size is None else img_size), self.patch_size[0]
        check_img_size(size, patch)
        self._set_img_size(size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token and side."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, embed_dim, rows, columns)."""
        for conv, act in zip(self.convs, self.acts):  # noqa: B905  (TorchScript has no strict)
            x = act(conv(x))
        return x


class ConvTokenizer(GridEmbed):
    """Convolution, ReLU, max-pooling, repeated: images (B, in_chans, H, W) to (B, N, embed_dim).

    Args:
        img_size: Height and width.
        in_chans: Image channels.
        embed_dim: Token width.
        num_convs: Number of repetitions; all but the last have ``hidden_chans`` channels.
        kernel_size: Side of a filter, odd.
        stride: Stride of a convolution.
        pool_stride: Stride of the 3x3 pooling.
        hidden_chans: Channels between.
        device: Where to create the parameters.
        dtype: Their type.
        **grid: Arguments of `GridEmbed`.

    Raises:
        ValueError: Padding asked for.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        embed_dim: int = 128,
        *,
        num_convs: int = 2,
        kernel_size: int = 3,
        stride: int = 1,
        pool_stride: int = 2,
        hidden_chans: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **grid: Any,
    ) -> None:
        super().__init__(**grid)
        widths = [in_chans, *[hidden_chans] * (num_convs - 1), embed_dim]
        self.strides = (stride, pool_stride)
        self.convs = nn.ModuleList(
            nn.Conv2d(
                widths[i],
                widths[i + 1],
                kernel_size,
                stride,
                padding=kernel_size // 2,
                bias=False,
                device=device,
                dtype=dtype,
            )
            for i in range(num_convs)
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(3, pool_stride, padding=1) for _ in self.convs)
        self.acts = nn.ModuleList(nn.ReLU() for _ in self.convs)
        self.init_weights()
        self.set_input_size(img_size)

    def init_weights(self) -> None:
        """Draw the filters for the ReLUs that follow them."""
        for conv in self.convs.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size; there are no patches."""
        if patch_size is not None:
            raise ValueError(
                f"patch_size={patch_size} means nothing to this tokenizer, whose strides are "
                "fixed at construction; leave it out."
            )
        self._set_img_size(self.img_size if img_size is None else img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token and side."""
        ratio = (self.strides[0] * self.strides[1]) ** len(self.convs)
        return ratio if as_scalar else (ratio, ratio)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image size."""
        rows, cols = img_size
        for _ in range(len(self.convs)):
            for stride in self.strides:  # with half the filter as padding, sides are divided up
                rows, cols = (rows - 1) // stride + 1, (cols - 1) // stride + 1
        return rows, cols

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, embed_dim, rows, columns)."""
        for conv, pool, act in zip(self.convs, self.pools, self.acts):  # noqa: B905
            # The paper's order is ReLU, then pooling. A maximum and ReLU commute, in values and in
            # gradients, and this way round ReLU has a quarter of the work.
            x = act(pool(conv(x)))
        return x
