"""Tell attention layers how the tokens of their model lie.

A layer in timm's attention slot is not told which tokens are class tokens, how many rows and
columns the others form, nor which block it belongs to. Windows of the grid, windows that are
shifted in every second block, and sequence projections need it.
"""

from typing import Any, Protocol, runtime_checkable

from torch import nn

__all__ = [
    "NeedsLayout",
    "check_grid",
    "complete_token_layout",
    "set_token_layout",
    "takes_any_size",
    "token_grid",
]


@runtime_checkable
class NeedsLayout(Protocol):
    """A layer that depends on the arrangement of tokens."""

    def set_layout(
        self, grid_size: tuple[int, int], num_prefix_tokens: int, depth: int = 0
    ) -> None:
        """Take the rows and columns of the grid, the tokens before it and the block's index."""


def check_grid(num_tokens: int, grid_size: tuple[int, int], num_prefix_tokens: int) -> None:
    """Raise where tokens (B, N, C) do not fill the grid that a layer was told."""
    rows, cols = grid_size
    if num_prefix_tokens + rows * cols != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens do not fill a grid of {rows} x {cols} and {num_prefix_tokens} "
            "prefix tokens; set the layout with set_token_layout(model) or set_input_size(), and "
            "leave no token out."
        )


def set_token_layout(model: nn.Module) -> int:
    """Hand a model's token grid to every layer that needs it; call again after a change of size.

    Args:
        model: A vision transformer of timm's kind, with ``patch_embed.grid_size`` and
            ``num_prefix_tokens``, or of torchvision's.

    Returns:
        The number of layers told.

    Raises:
        ValueError: The model has no token grid, or takes images of any size
            (``dynamic_img_size=True``) with a mechanism that is built for one grid.
    """
    found = token_grid(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no patch_embed.grid_size and num_prefix_tokens to read a "
            "token layout from; call set_layout(grid_size, num_prefix_tokens) on its layers."
        )
    layers = [m for m in model.modules() if isinstance(m, NeedsLayout)]
    if takes_any_size(model):
        for layer in layers:
            if getattr(layer, "needs_fixed_grid", False):
                option = " with dwc" if getattr(layer, "convolves", False) else ""
                raise ValueError(
                    f"{getattr(layer, 'mechanism', 'this')} attention{option} is built for one "
                    "grid of tokens, so dynamic_img_size=True cannot be honoured; build with "
                    "img_size=..."
                )
    for depth, layer in enumerate(layers):
        # A replaced layer knows its place: those around it may be of other packages.
        layer.set_layout(*found, getattr(layer, "site_index", depth))
    return len(layers)


def token_grid(model: nn.Module) -> tuple[tuple[int, int], int] | None:
    """Rows and columns of a model's token grid, and the tokens before it; None if it has none.

    Args:
        model: A vision transformer of timm's or torchvision's kind, or a model around one.
    """
    part: Any
    for part in model.modules():
        grid = getattr(getattr(part, "patch_embed", None), "grid_size", None)
        prefix = getattr(part, "num_prefix_tokens", None)
        if grid is not None and prefix is not None:
            return (int(grid[0]), int(grid[1])), int(prefix)
        if type(part).__module__ == "torchvision.models.vision_transformer" and hasattr(
            part, "image_size"
        ):
            side = part.image_size // part.patch_size
            return (side, side), 1
    return None


def takes_any_size(model: nn.Module) -> bool:
    """Whether a model takes images of any size (timm's ``dynamic_img_size``)."""
    for part in model.modules():
        if getattr(part, "dynamic_img_size", False):
            return not getattr(getattr(part, "patch_embed", None), "strict_img_size", False)
    return False


def complete_token_layout(model: nn.Module) -> int:
    """Call `set_token_layout` if a layer cannot run without and nobody has told it yet.

    For code that builds any model by name, such as our trainer. Layers that only profit from a
    layout are left as they are, since it decides the shape of their weights. Result and failures
    are those of `set_token_layout`.
    """
    waiting = any(
        getattr(layer, "needs_layout", False) and getattr(layer, "grid_size", None) is None
        for layer in model.modules()
    )
    return set_token_layout(model) if waiting else 0
