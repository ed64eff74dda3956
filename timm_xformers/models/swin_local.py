"""Local windows in a hierarchy: of the grid (Swin) or, at equal cost, of the flattened sequence.

Liu et al., "Swin Transformer", 2021 (arXiv:2103.14030): windows of the grid, shifted by half a
window in every second block, a learned bias per distance, 2x2 patches merged between stages. The
model is timm's `SwinTransformer`; ``swin_local1d_tiny`` cuts the same number of tokens into windows
of the map read row by row, so that the pair compares 2-D structure and nothing else.

Departures from timm's Swin, for maps that windows do not divide (28x28 images): padding is masked
instead of attended, tokens from opposite borders are told apart where they really lie, and a side
is halved upwards between stages.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers import calculate_drop_path_rates, register_notrace_module, to_2tuple
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    get_relative_position_index,
)
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter_fn
from torch import Tensor, nn

from timm_xformers.layers.tokenizer import check_img_size
from timm_xformers.layers.windows import merge, partition, window_mask
from timm_xformers.models._cfg import default_configs, small_image_cfg
from timm_xformers.models._register import register_model
from timm_xformers.models._trunk import build

__all__ = ["SwinLocal"]


def fit_bias(table: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Bias per distance for windows of another size.

    Distances keep their entries; longer ones take that of the longest known. (timm stretches the
    table, so that what was learned for neighbours would apply two tokens away.)

    Args:
        table: ((2 h - 1) * (2 w - 1), H) for windows (h, w).
        old_size: (h, w).
        new_size: Rows and columns of the new windows.

    Returns:
        The table of the new windows.
    """
    table = table.reshape(2 * old_size[0] - 1, 2 * old_size[1] - 1, -1)
    for axis in (0, 1):
        old, new = old_size[axis] - 1, new_size[axis] - 1
        distance = torch.arange(-new, new + 1, device=table.device)
        table = table.index_select(axis, distance.clamp(-old, old) + old)
    return table.flatten(0, 1)


class GridWindowBlock(SwinTransformerBlock):
    """timm's Swin block with exact masks: a map (B, H, W, C) to the same.

    Arguments are those of timm's block.
    """

    input_resolution: tuple[int, int]

    def set_input_size(
        self,
        feat_size: tuple[int, int],
        window_size: tuple[int, int],
        always_partition: bool | None = None,
    ) -> None:
        """Take a map of other rows and columns."""
        attn: Any = self.attn
        keep = self.always_partition if always_partition is None else always_partition
        rows, cols = window_size if keep else map(min, feat_size, window_size)
        if attn.window_size != (rows, cols):
            table = attn.relative_position_bias_table
            fitted = fit_bias(table.data, attn.window_size, (rows, cols))
            attn.relative_position_bias_table = nn.Parameter(fitted)
            attn.window_size, attn.window_area = (rows, cols), rows * cols
            index = get_relative_position_index(rows, cols).to(table.device)
            attn.register_buffer("relative_position_index", index, persistent=False)
        super().set_input_size(feat_size, window_size, always_partition)

    def get_attn_mask(
        self,
        x: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """Who may not attend to whom: additive (windows, w, w), or None where everybody may."""
        rows, cols = self.input_resolution
        if x is not None:
            rows, cols = x.shape[1], x.shape[2]
            device, dtype = x.device, x.dtype
        shifted = self.shift_size[0] + self.shift_size[1] > 0
        if not shifted and rows % self.window_size[0] + cols % self.window_size[1] == 0:
            return None
        ids = torch.arange(rows * cols, device=device).reshape(1, rows, cols, 1)
        ids = partition(ids, self.window_size, self.shift_size, -1.0)
        ids = ids.reshape(-1, ids.shape[3])  # (windows, w), -1 for padding
        seen = window_mask(ids, cols, self.window_size, shifted)
        # What padding sees is thrown away; it sees all, so that no row is empty.
        seen = seen | (ids < 0).unsqueeze(2)
        return torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(~seen, float("-inf"))

    def _attn(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        # timm's attention cannot reshape nothing. (Sizes in a graph of torch.fx are symbols.)
        images: Any = x
        if torch.jit.is_scripting():
            if x.shape[0] == 0:
                return x
        elif not isinstance(images, torch.fx.Proxy) and x.shape[0] == 0:
            return x
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        windows = partition(x, self.window_size, self.shift_size, 0.0)  # (B, nh, nw, w, C)
        mixed = self.attn(windows.reshape(-1, self.window_area, C), mask)
        return merge(mixed.reshape(windows.shape), (H, W), self.window_size, self.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same; timm's own cannot reshape an empty batch."""
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class FlatWindowBlock(GridWindowBlock):
    """The same block on windows of the flattened map: (B, H, W, C) to the same.

    timm's block sees the map as one row. The bias has one entry per distance along the sequence.

    Args:
        input_resolution: Rows and columns of the map.
        window_size: Rows and columns of the window of equal cost.
        shift_size: (0, 0), or anything else for half a window.
        **kwargs: Other arguments of timm's block.
    """

    def __init__(
        self,
        *,
        input_resolution: tuple[int, int],
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        **kwargs: Any,
    ) -> None:
        length = window_size[0] * window_size[1]
        shift: Any = (0, length // 2 if any(shift_size) else 0)  # typed as one number in timm
        super().__init__(
            input_resolution=(1, input_resolution[0] * input_resolution[1]),
            window_size=(1, length),
            shift_size=shift,
            **kwargs,
        )

    def set_input_size(
        self,
        feat_size: tuple[int, int],
        window_size: tuple[int, int],
        always_partition: bool | None = None,
    ) -> None:
        """Take a map of other rows and columns."""
        tokens, length = feat_size[0] * feat_size[1], window_size[0] * window_size[1]
        super().set_input_size((1, tokens), (1, length), always_partition)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same."""
        B, H, W, C = x.shape
        x = x.reshape(B, 1, H * W, C)
        # Not by super().forward, which TorchScript cannot call.
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(B, H, W, C)


# Sizes decide what is padded, which torch.fx cannot follow: it calls these as they are.
torch.fx.wrap("merge")
torch.fx.wrap("partition")
register_notrace_module(GridWindowBlock)  # sizes of windows decide what is padded
register_notrace_module(FlatWindowBlock)


def _per_stage(
    window_size: int | Sequence[int | tuple[int, int]], stages: int
) -> list[tuple[int, int]]:
    if isinstance(window_size, int):
        return [(window_size, window_size)] * stages
    if len(window_size) != stages:
        raise ValueError(
            f"window_size={window_size} is not one for each of {stages} stages; give one number "
            "for all, or a list."
        )
    return [to_2tuple(size) for size in window_size]


class SwinLocal(SwinTransformer):
    """Swin transformer whose windows are of the grid or of the flattened map: images to logits.

    Args:
        flatten: Cut windows out of the map read row by row.
        window_size: Side of the windows, or (rows, columns) per stage. Flattened windows have as
            many tokens. Windows keep their size when the image changes; maps smaller than a window
            are one.
        **kwargs: As all others, arguments of timm's `SwinTransformer`, with defaults for images of
            32 pixels.

    Raises:
        ValueError: An image that the patches do not divide, or windows for other stages.
        TypeError: An argument that nobody has.
    """

    window_sizes: list[tuple[int, int]]

    def __init__(
        self,
        *,
        flatten: bool = False,
        window_size: int | Sequence[int | tuple[int, int]] = 4,
        depths: Sequence[int] = (2, 2, 2),
        num_heads: Sequence[int] = (2, 4, 8),
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        **kwargs: Any,
    ) -> None:
        for name in kwargs.keys() - inspect.signature(SwinTransformer).parameters.keys():
            raise TypeError(f"SwinLocal has no argument {name}.")  # older releases swallow it
        check_img_size(img_size, patch_size)
        self.window_sizes = _per_stage(window_size, len(depths))
        common: dict[str, Any] = {
            "head_dim": head_dim,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "norm_layer": norm_layer,
        }
        sizes: dict[str, Any] = {"window_size": self.window_sizes}
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            drop_path_rate=drop_path_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            **sizes,
            **common,
            **kwargs,
        )
        side = "1d" if flatten else "2d"
        tokens = self.window_sizes[0][0] * (self.window_sizes[0][1] if flatten else 1)
        self.attn_layer = f"local{side}_w{tokens}_shifted"
        make_block: Callable[..., nn.Module] = FlatWindowBlock if flatten else GridWindowBlock
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        weight = next(self.patch_embed.parameters())
        for index, stage in enumerate(self._stages()):
            window = self.window_sizes[index]
            stage.blocks = nn.Sequential(
                *(
                    make_block(
                        dim=block.dim,
                        input_resolution=self._map_size(index),
                        num_heads=num_heads[index],
                        window_size=window,
                        shift_size=(window[0] // 2, window[1] // 2) if number % 2 else (0, 0),
                        always_partition=block.always_partition,
                        dynamic_mask=block.dynamic_mask,
                        proj_drop=proj_drop_rate,
                        attn_drop=attn_drop_rate,
                        drop_path=rates[index][number],
                        device=weight.device,
                        dtype=weight.dtype,
                        **common,
                    )
                    for number, block in enumerate(stage.blocks)
                )
            )
        self.init_weights(needs_reset=False)

    def _stages(self) -> list[Any]:
        return list(self.layers.children())

    def _map_size(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map: halves, rounded up."""
        embed: Any = self.patch_embed
        rows, cols = embed.grid_size
        return -(-rows // 2**stage), -(-cols // 2**stage)

    def set_input_size(  # type: ignore[override]
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
        window_size: int | Sequence[int | tuple[int, int]] | None = None,
    ) -> None:
        """Change the image or patch size; windows keep theirs unless others are given."""
        embed: Any = self.patch_embed
        img_size = img_size or embed.img_size
        check_img_size(img_size, patch_size or embed.patch_size)
        if window_size is not None:
            self.window_sizes = _per_stage(window_size, len(self.window_sizes))
        # Older releases of timm take one pair for all stages; the loop below sets them apart.
        per_stage = hasattr(self, "_ref_window_sizes")
        sizes: dict[str, Any] = {
            "window_size": self.window_sizes if per_stage else self.window_sizes[0]
        }
        super().set_input_size(img_size, patch_size, **sizes)
        for index, stage in enumerate(self._stages()):
            for block in stage.blocks:  # older releases also halve sides downwards
                block.set_input_size(self._map_size(index), self.window_sizes[index])


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Fit a checkpoint to the model: timm's repairs, and biases of windows of other sizes.

    Raises:
        ValueError: A bias that is not of a square window, nor of the model's.
    """
    state_dict = state_dict.get("model", state_dict)
    biases = {}
    for name, module in model.named_modules():
        key = f"{name}.attn.relative_position_bias_table"
        if not isinstance(module, GridWindowBlock) or key not in state_dict:
            continue
        table, new_size = state_dict[key], module.attn.window_size
        entries = table.shape[0]
        if entries == module.attn.relative_position_bias_table.shape[0]:
            biases[key] = table
            continue
        side = int(entries**0.5 + 0.5)
        old_size = (1, entries) if isinstance(module, FlatWindowBlock) else (side, side)
        if old_size[0] * old_size[1] != entries or entries % 2 == 0:
            raise ValueError(
                f"{key} has {entries} entries, which is not a square window; load it at its own "
                "img_size, then call set_input_size()."
            )
        biases[key] = fit_bias(table, ((old_size[0] + 1) // 2, (old_size[1] + 1) // 2), new_size)
    others = {name: value for name, value in state_dict.items() if name not in biases}
    return {**swin_filter_fn(others, model), **biases}


_cfg = partial(
    small_image_cfg,
    pool_size=(4, 4),
    first_conv="patch_embed.proj",
    classifier="head.fc",
    paper_ids="arXiv:2103.14030",
    paper_name="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
)


default_cfgs = default_configs({"swin_local_tiny": _cfg(), "swin_local1d_tiny": _cfg()})


def _swin_local(variant: str, flatten: bool, pretrained: bool, **kwargs: Any) -> SwinLocal:
    defaults = {
        "flatten": flatten,
        "embed_dim": 64,
        "weight_init": "moco",  # timm's name for Xavier
    }
    stages = len(kwargs.get("depths", (2, 2, 2)))
    kwargs.setdefault("out_indices", tuple(range(stages)))
    return build(SwinLocal, variant, pretrained, defaults, checkpoint_filter_fn, **kwargs)


@register_model
def swin_local_tiny(pretrained: bool = False, **kwargs: Any) -> SwinLocal:
    """Swin with 4x4 windows of the grid in three stages of two blocks, 16x16 tokens first."""
    return _swin_local("swin_local_tiny", False, pretrained, **kwargs)


@register_model
def swin_local1d_tiny(pretrained: bool = False, **kwargs: Any) -> SwinLocal:
    """The same model with windows of 16 tokens of the flattened map."""
    return _swin_local("swin_local1d_tiny", True, pretrained, **kwargs)
