"""The contenders as modules with an input: layers and whole models."""

import json
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from timm_xformers.benchmarking.peers import Dims, Unfit, build_peer
from timm_xformers.benchmarking.settings import BASELINE, UNFUSED, Contender, Point
from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.heads import HeadsAttention
from timm_xformers.layers.layout import NeedsLayout
from timm_xformers.replace.replacing import put_in
from timm_xformers.training.build import build_model

__all__ = ["build_contender", "build_sized", "square_grid"]


def build_contender(contender: Contender, point: Point, seed: int) -> tuple[nn.Module, Tensor]:
    """Make a contender and its input on the point's device; its mode is the caller's to see to.

    Returns:
        The module, a layer in the point's type or a model in float32, and tokens (B, N, C) or
        images (B, C, H, W).

    Raises:
        Unfit: A peer that is not installed or not able to.
    """
    torch.manual_seed(seed)
    module: Any
    if point.kind == "layer":
        dtype = getattr(torch, point.dtype)
        module = _layer(contender, point).to(point.device, dtype)
        shape: tuple[int, ...] = (point.batch_size, point.size, point.dim)
    else:
        dtype = torch.float32
        module, expects = build_sized(contender.name, point.size, **contender.kwargs)
        if contender.replacement:
            put_in(module, **json.loads(contender.replacement))
        if contender.peer:
            _replace_attention(module, contender.peer)
        module = module.to(point.device)
        shape = (point.batch_size, *expects.shape)
    rng = torch.Generator().manual_seed(seed)
    return module, torch.randn(shape, generator=rng).to(point.device, dtype)


def build_sized(name: str, size: int | None, **kwargs: Any) -> tuple[Any, Preprocessing]:
    """A model for images of a side in pixels, its own if 0 or None, and the input it expects."""
    model = build_model(name, img_size=size or None, **kwargs)[0]
    return model, Preprocessing.of_model(model, size or None, kwargs.get("in_chans"))


def square_grid(tokens: int) -> tuple[int, int]:
    """Side of a square grid and the tokens before it.

    Raises:
        ValueError: 0, 1, 2, 4 or 5 prefix tokens do not leave a square.
    """
    for prefix in (0, 1, 2, 4, 5):
        side = int((tokens - prefix) ** 0.5 + 0.5)
        if side > 0 and side * side == tokens - prefix:
            return side, prefix
    raise ValueError(f"{tokens} tokens are not a square grid with 0, 1, 2, 4 or 5 prefix tokens.")


def _layer(contender: Contender, point: Point) -> Any:
    if contender.peer:
        dims = Dims(point.dim, point.num_heads, point.head_dim, point.size)
        return build_peer(contender.peer, contender.name, dims)
    kwargs: dict[str, Any] = {"num_heads": point.num_heads, "attn_head_dim": point.head_dim}
    if contender.name in (BASELINE, UNFUSED):
        exact: Any = Attention(point.dim, **kwargs)
        exact.fused_attn = contender.name == BASELINE
        return exact
    made: Any = attention_class(contender.name)
    if not issubclass(made, HeadsAttention):  # FNet has no heads
        kwargs = {}
    layer: Any = made(point.dim, **kwargs)
    if isinstance(layer, NeedsLayout):
        two_dimensional = made.needs_fixed_grid and made.mechanism != "linformer"
        side, prefix = square_grid(point.size) if two_dimensional else (0, 0)
        # Depth 0: windows in their places, as in every other block.
        layer.set_layout((side, side) if side else (1, point.size), prefix, 0)
    return layer


def _replace_attention(model: Any, package: str) -> None:
    """Put a package's form of the model's mechanism in its place."""
    if model.attn_layer.startswith("local2d"):
        raise Unfit("it does not shift the windows of every second block")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, HeadsAttention):
                continue
            own: Any = child
            extras = (own.q_norm, own.k_norm, own.rope, own.norm)
            if own.qkv.bias is not None or not all(isinstance(m, nn.Identity) for m in extras):
                raise Unfit("the model's attention has biases, norms or rotary positions")
            dims = Dims(own.qkv.in_features, own.num_heads, own.head_dim, tokens)
            setattr(parent, name, build_peer(package, model.attn_layer, dims))
