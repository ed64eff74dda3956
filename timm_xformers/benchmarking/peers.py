"""Other packages' forms of our mechanisms, as layers on tokens (B, N, C).

What a user would otherwise pick. Each entry of `PEERS` says what it has in common with ours and
what it does differently; with equal weights those that compute the same give the same, which
tests/benchmarking/test_benchmark_peers.py shows where the packages are installed.
"""

import fnmatch
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.layers.factory import ATTENTION

__all__ = ["PEERS", "Dims", "Peer", "Unfit", "build_peer", "installed", "peers_of"]


class Unfit(ValueError):
    """A package that does not do what is asked for; the message is the reason in its report."""


@dataclass(frozen=True)
class Dims:
    """Sizes of a layer.

    Attributes:
        dim: Token width C.
        num_heads: Heads H.
        head_dim: Width D of a head.
        tokens: Sequence length N.
    """

    dim: int
    num_heads: int
    head_dim: int
    tokens: int

    @property
    def inner(self) -> int:
        """Width of all heads."""
        return self.num_heads * self.head_dim

    def need_full_width(self) -> None:
        """Raise `Unfit` unless all heads together are as wide as the tokens."""
        if self.inner != self.dim:
            raise Unfit("its heads together are as wide as the tokens")

    def grid_side(self, window: int) -> int:
        """Side of the square grid, which windows must divide.

        Raises:
            Unfit: They do not.
        """
        side = int(self.tokens**0.5 + 0.5)
        if side * side != self.tokens or side % window:
            raise Unfit(f"{self.tokens} tokens are no square grid of {window}x{window} windows")
        return side


@dataclass(frozen=True)
class Peer:
    """A package's form of some mechanisms.

    Attributes:
        package: Name to install, and name in the report.
        module: Name to import.
        names: Shell pattern of our names.
        same: What it has in common with ours, and what not.
        build: Makes the layer from sizes, our name's numbers, and the imported module.
    """

    package: str
    module: str
    names: str
    same: str
    build: Callable[[Dims, dict[str, Any], Any], nn.Module]


class _InSlot(nn.Module):
    """A layer that is called as timm calls attention, without a mask.

    Args:
        layer: The package's.
        proj: Output projection, where the layer has none.
        side: Side of the grid, for a layer on (B, H, W, C).
    """

    def __init__(
        self, layer: nn.Module, proj: nn.Module | None = None, side: int | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.proj = proj or nn.Identity()
        self.side = side

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise Unfit("peers are measured without a mask")
        if self.side is not None:
            x = torch.unflatten(x, 1, [self.side, self.side])
        out: Any = self.layer(x)
        out = out[0] if isinstance(out, tuple) else out
        mixed: Tensor = self.proj(out if self.side is None else out.flatten(1, 2))
        return mixed


class _Projected(nn.Module):
    """Our projections around a rule for (B, H, N, D)."""

    def __init__(self, dims: Dims, rule: nn.Module) -> None:
        super().__init__()
        self.dims = dims
        self.qkv = nn.Linear(dims.dim, 3 * dims.inner, bias=False)
        self.rule = rule
        self.proj = nn.Linear(dims.inner, dims.dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.dims.num_heads, self.dims.head_dim)
        x = self.rule(*qkv.permute(2, 0, 3, 1, 4).unbind(0))  # (B, H, N, D)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(B, N, self.dims.inner))
        return out


class _SwinWindows(nn.Module):
    """Swin's layer on unshifted windows of a grid."""

    def __init__(self, dims: Dims, window: int) -> None:
        super().__init__()
        self.window = window
        self.side = dims.grid_side(window)
        attn: Any = WindowAttention(
            dims.dim,
            dims.num_heads,
            head_dim=dims.head_dim,
            window_size=window,
            qkv_bias=False,
        )
        attn.fused_attn = True  # off by default in timm, and faster
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        count, w = self.side // self.window, self.window
        x = x.view(B, count, w, count, w, C).transpose(2, 3)  # (B, rows, columns, w, w, C)
        x = self.attn(x.reshape(-1, w * w, C))
        return x.view(B, count, count, w, w, C).transpose(2, 3).reshape(B, N, C)


def _performer(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    kernels: dict[str, Any] = {
        "relu": nn.ReLU(),
        "exp": torch.exp,
        "elu": lambda x: F.elu(x) + 1,
        "gelu": nn.GELU(),
    }
    kernel = numbers["kernel"]
    return module.SelfAttention(
        dims.dim,
        heads=dims.num_heads,
        dim_head=dims.head_dim,
        nb_features=numbers["num_features"],
        generalized_attention=kernel != "softmax",
        kernel_fn=kernels.get(kernel, nn.ReLU()),
    )


def _nystrom(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    conv = numbers.get("conv_kernel", 0)
    return module.NystromAttention(
        dims.dim,
        dim_head=dims.head_dim,
        heads=dims.num_heads,
        num_landmarks=numbers["num_landmarks"],
        residual=conv > 0,
        residual_conv_kernel=conv or 33,
    )


def _nystromformer(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    landmarks = numbers["num_landmarks"]
    dims.need_full_width()
    if dims.tokens % landmarks:
        raise Unfit(f"{dims.tokens} tokens are no multiple of {landmarks} landmarks")
    config = module.NystromformerConfig(
        hidden_size=dims.dim,
        num_attention_heads=dims.num_heads,
        num_landmarks=landmarks,
        segment_means_seq_len=dims.tokens,
        conv_kernel_size=numbers.get("conv_kernel") or None,
        attention_probs_dropout_prob=0.0,
    )
    code = importlib.import_module("transformers.models.nystromformer.modeling_nystromformer")
    return _InSlot(code.NystromformerSelfAttention(config), nn.Linear(dims.dim, dims.dim))


def _linformer(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    sizes = {"k": numbers["proj_len"], "heads": dims.num_heads, "dim_head": dims.head_dim}
    return module.LinformerSelfAttention(dims.dim, dims.tokens, **sizes)


def _local1d(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    rule = module.LocalAttention(
        window_size=numbers["window_size"],
        look_backward=1,
        look_forward=1,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    return _Projected(dims, rule)


def _swin(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    return _SwinWindows(dims, numbers["window_size"])


def _natten(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    window = numbers["window_size"]
    side = dims.grid_side(window)
    dims.need_full_width()
    layer = module.NeighborhoodAttention2D(
        embed_dim=dims.dim,
        num_heads=dims.num_heads,
        kernel_size=window,
        stride=window,
        qkv_bias=False,
    )
    return _InSlot(layer, side=side)


def _fla(dims: Dims, numbers: dict[str, Any], module: Any) -> Any:
    kernel = numbers["kernel"]
    if kernel not in ("relu", "elu"):
        raise Unfit(f"it has no {kernel} kernel")
    if numbers["num_features"] != dims.head_dim:
        raise Unfit(
            f"it has no random features: its state is as wide as a head, {dims.head_dim}, and "
            f"{numbers['num_features']} were asked for"
        )
    return module.LinearAttention(
        hidden_size=dims.dim,
        expand_k=dims.inner / dims.dim,
        expand_v=dims.inner / dims.dim,
        num_heads=dims.num_heads,
        feature_map=kernel,
        output_norm="identity",
        do_feature_map_norm=True,
    )


PEERS = (
    Peer(
        "performer-pytorch",
        "performer_pytorch",
        "performer_[!l]*",
        "same m, kernel, heads and biases; softmax and exp stabilised and floored in its own way, "
        "gelu not lifted above 0",
        _performer,
    ),
    Peer(
        "nystrom-attention",
        "nystrom_attention",
        "nystrom_*",
        "same landmarks, six steps, convolution and biases; pads with zeros where landmarks do not "
        "divide the tokens, scales its inverse by the whole batch, and iterates where ours is "
        "exact (tokens up to the landmarks)",
        _nystrom,
    ),
    Peer(
        "transformers",
        "transformers",
        "nystrom_*",
        "Nystromformer's layer and an output projection: same landmarks, six steps and "
        "convolution; has query, key and value biases, scales its inverse by the whole batch",
        _nystromformer,
    ),
    Peer(
        "linformer",
        "linformer",
        "linformer_*",
        "same k, heads and biases, two projections for all heads",
        _linformer,
    ),
    Peer(
        "local-attention",
        "local_attention",
        "local1d_w*[0-9]",
        "same window and one neighbour on each side, inside the same projections; without rotary "
        "positions; attends to the zeros with which it fills the last window",
        _local1d,
    ),
    Peer(
        "timm-swin",
        "timm",
        "local2d_*_shifted",
        "timm's WindowAttention, both unshifted: same windows and biases; adds relative positions",
        _swin,
    ),
    Peer(
        "natten",
        "natten",
        "local2d_*_shifted",
        "kernel = stride = window, which is the same unshifted windows",
        _natten,
    ),
    Peer(
        "flash-linear-attention",
        "fla.layers",
        "performer_[re]*",
        "no random features but the kernel itself, as wide as a head, and causal: the nearest it "
        "has, not the same",
        _fla,
    ),
)


def peers_of(name: str) -> list[Peer]:
    """Packages with a form of a named mechanism."""
    return [peer for peer in PEERS if fnmatch.fnmatchcase(name, peer.names)]


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those that are; ``timm-swin`` has none of its own."""
    found = {}
    for package in sorted(packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def build_peer(package: str, name: str, dims: Dims) -> nn.Module:
    """A package's form of a mechanism, in float32 on the CPU, callable as timm calls attention.

    Raises:
        Unfit: It is not installed, or not able to.
    """
    peer = next(peer for peer in peers_of(name) if peer.package == package)
    return _InSlot(peer.build(dims, ATTENTION[name][1], _load(peer.module, package)))


@functools.cache
def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise Unfit(f"not installed; pip install {package}") from error
        raise Unfit(f"its import fails: {' '.join(str(error).split())}") from error
