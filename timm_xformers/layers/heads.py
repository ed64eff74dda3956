"""What every mechanism shares: projections into heads, exact attention, precision.

`HeadsAttention` is timm's `Attention` with the softmax taken out: the same constructor arguments
and parameter names (``qkv, q_norm, k_norm, norm, gate, proj``), so that weights of exact attention
load into every mechanism. Each of these modules is called exactly once per forward pass, with all
tokens, whatever the mode and size: hooks, pruning, quantisation and norms over the batch rely on
it. A mechanism overrides `mix`, which begins at queries, keys and values.

Every mechanism also takes ``dwc=True``: a depthwise convolution of the values on the token grid,
added to what it mixes (`depthwise`).
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.layers.depthwise import GridConv, values_to_convolve
from timm_xformers.layers.masks import check_kind

__all__ = [
    "WITH_DWC",
    "HeadsAttention",
    "attend",
    "attention_map",
    "autocasts",
    "is_open",
    "may_fuse",
    "working_dtype",
]

_logger = logging.getLogger(__name__)

# What a mechanism can do no longer, or needs, once it convolves values on the grid. The masks of
# all mechanisms with heads include those over keys.
WITH_DWC: dict[str, Any] = {
    "convolves": True,
    "needs_layout": True,
    "needs_fixed_grid": True,
    "causal": False,
    "masks": "keys",
}


def working_dtype(dtype: torch.dtype, *, wide: bool) -> torch.dtype:
    """Type in which sums over tokens are safe.

    float16 overflows at 65,504, which a sum of 1,025 features reaches; bfloat16 has float32's
    range, so it is widened only where exponents need more than three digits (``wide``).
    """
    if dtype == torch.float16 or (wide and dtype == torch.bfloat16):
        return torch.float32
    return dtype


def is_open(length: object) -> bool:
    """Whether a number of tokens is left open in the graph that is being exported."""
    return isinstance(length, torch.SymInt)


def autocasts(device_type: str) -> bool:
    """Whether products on this device would be run in autocast's half precision."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def may_fuse() -> bool:
    """Whether timm allows PyTorch's fused attention; TorchScript cannot ask, and may."""
    allowed = True
    if not torch.jit.is_scripting():
        allowed = use_fused_attn()
    return allowed


def _forms_map(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether to form the map instead of calling PyTorch's fused attention.

    ``timm.layers.set_fused_attn(False)`` asks for it: for second derivatives, forward mode and
    maps. Small maps that a CPU trains in bfloat16 are faster: 22 times at 16 tokens, twice at 196,
    even at 512 (docs/speed.md, with AMX).
    """
    return not may_fuse() or (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
        and q.shape[-2] * k.shape[-2] <= 102_400  # 320 tokens; TorchScript reads no global number
    )


def attention_map(
    q: Tensor, k: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Weights softmax(q k^T / sqrt(D)) of exact attention, zero for a query without keys.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        attn_mask: As in `attend`.
        is_causal: As in `attend`.

    Returns:
        (B, H, N, S) in the type of ``q``; the softmax is float32 at least.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    wide = torch.promote_types(scores.dtype, torch.float32)
    if attn_mask is None:
        return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    opened, alive = _open_rows(attn_mask, scores.dtype)
    if opened.dtype == torch.bool:
        scores = scores.masked_fill(~opened, float("-inf"))
    else:
        scores = scores + opened
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) * alive


def _open_rows(attn_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mask with rows that hide every key opened, and the rows (..., N, 1) that do not."""
    check_kind(attn_mask)
    if attn_mask.dtype == torch.bool:
        alive = attn_mask.any(dim=-1, keepdim=True)
        return attn_mask | ~alive, alive
    bias = attn_mask.to(dtype)  # first: -1e9 is -inf in float16
    alive = (bias > float("-inf")).any(dim=-1, keepdim=True)
    return bias.masked_fill(~alive, 0.0), alive


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Exact attention, zero for a query all of whose keys are masked.

    PyTorch's fused kernels compute it, unless `timm.layers.set_fused_attn` forbids them or the map
    is small enough to be faster. They disagree about masked rows (zero or NaN, depending on version
    and backend), so these are opened before the call and cleared after it.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        attn_mask: None, or broadcastable to (B, H, N, S): bool (True = attend) or additive.
        dropout_p: Dropout probability on the map.
        is_causal: Let a token see itself and earlier ones only; overrides ``attn_mask``, as in
            timm.

    Returns:
        (B, H, N, E).
    """
    if _forms_map(q, k, v):
        weights = attention_map(q, k, attn_mask, is_causal).to(v.dtype)
        if dropout_p > 0.0:
            weights = F.dropout(weights, dropout_p)
        mixed: Tensor = weights @ v
        return mixed
    if is_causal:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    if attn_mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    opened, alive = _open_rows(attn_mask, q.dtype)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=opened, dropout_p=dropout_p)
    return x * alive


# The mask decides what is computed, which torch.fx cannot follow: it calls this as it is.
torch.fx.wrap("values_to_convolve")


class HeadsAttention(nn.Module):
    """Projections around a mixing rule: tokens (B, N, C) to (B, N, dim_out).

    Args:
        dim: Token width C.
        num_heads: Number of heads H.
        attn_head_dim: Width D of a head; ``dim // num_heads`` if None.
        dim_out: Width of the output; ``dim`` if None.
        qkv_bias: Give the joint query, key and value projection a bias.
        qk_norm: Normalise queries and keys per head with ``norm_layer``.
        scale_norm: Normalise the mixed tokens before the output projection.
        proj_bias: Give the output projection a bias.
        gated: Multiply the mixed tokens by sigmoid gates, a linear map of the tokens, before the
            output projection.
        attn_drop: Dropout probability on the attention map, where a mechanism has one.
        proj_drop: Dropout probability after the output projection.
        norm_layer: Constructor of the norms above.
        device: Where to create the parameters.
        dtype: Type of the parameters.
        dwc: Add a 3 x 3 depthwise convolution of the values on the token grid, zero at the start.
            The layer must be told the grid by `set_layout`, takes masks over keys only, and is
            never causal.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads`` and no ``attn_head_dim`` is given, a
            norm is asked for without ``norm_layer``, or ``attn_drop`` is set for a mechanism
            without a map.
    """

    # What a mechanism can do, as `timm-xformers models --attention` lists it.
    mechanism = "heads"
    has_map = True
    convolves = False
    needs_layout = False
    needs_fixed_grid = False
    causal = True
    masks = "any"  # or "keys" (one row for all queries), or "none"

    # Names of parts that exact attention has too: a checkpoint of it holds these and no others.
    exact_parts: frozenset[str] = frozenset({"qkv", "q_norm", "k_norm", "norm", "gate", "proj"})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dwc: bool = False,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(
                f"dim={dim} is not a multiple of num_heads={num_heads}; change one, or give "
                "attn_head_dim."
            )
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer; pass one, e.g. LayerNorm.")
        if attn_drop > 0 and not self.has_map:
            raise ValueError(
                f"{self.mechanism} attention has no map to drop entries of, so "
                f"attn_drop={attn_drop} cannot be honoured; use proj_drop."
            )
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = self.num_heads * self.head_dim
        self.grid_size: tuple[int, int] | None = None
        self.num_prefix_tokens = 0
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        make_norm: Callable[..., nn.Module] = norm_layer or nn.Identity
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **dd)
        self.q_norm = make_norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = make_norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        # Rotary positions, if a model sets them (layers/rotary.py).
        self.rope: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.dwc = GridConv(self.attn_dim, **dd) if dwc else None
        if dwc:
            for name, value in WITH_DWC.items():
                setattr(self, name, value)
        self.norm = make_norm(self.attn_dim, **dd) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **dd) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_layout(
        self, grid_size: tuple[int, int], num_prefix_tokens: int, depth: int = 0
    ) -> None:
        """Tell where tokens lie, and which block this is.

        Args:
            grid_size: Rows and columns of the token grid.
            num_prefix_tokens: Tokens before the grid.
            depth: Index of the block.
        """
        self.grid_size, self.num_prefix_tokens = grid_size, num_prefix_tokens

    def told_grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid.

        Raises:
            ValueError: Nobody has told them.
        """
        grid = self.grid_size
        if grid is None:
            option = " with dwc" if self.convolves else ""
            raise ValueError(
                f"{self.mechanism} attention{option} has not been told where tokens lie; call "
                "timm_xformers.set_token_layout(model) once, or set_layout(grid_size, "
                "num_prefix_tokens, depth) on each layer."
            )
        return grid

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) to queries, keys and values, (B, H, N, D) each."""
        # Three slices of the tokens' width: their gradients are put together in one copy, where
        # slices of a rearranged tensor would be rearranged back in another.
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, H * D) to (B, H, N, D)."""
        return torch.unflatten(x, -1, [self.num_heads, self.head_dim]).transpose(1, 2)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Queries, keys, values (B, H, N, D) to mixed values (B, H, N, D)."""
        raise NotImplementedError

    def mix_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """`mix`, heads side by side, and the convolution of the values: (B, N, H * D)."""
        mixed = self.mix(q, k, v, attn_mask, is_causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.dwc is not None:
            # Linformer may have one head of values for all.
            values = values_to_convolve(v, attn_mask, is_causal, self.num_heads)
            mixed = mixed + self.dwc(values, self.told_grid(), self.num_prefix_tokens)
        return mixed

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) to queries, keys and values as `mix` takes them, (B, H, N, D) each."""
        q, k, v = self.split(x)
        return self.rope(self.q_norm(q)), self.rope(self.k_norm(k)), v

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens (B, N, C).
            attn_mask: Bool (True = attend) or additive, broadcastable to (B, H, N, N). Mechanisms
                that never form the map take one row for all queries, (B, 1, 1, N).
            is_causal: Let a token see itself and earlier ones only.

        Returns:
            (B, N, dim_out).
        """
        # No name holds queries, keys and values: the output projection may have their memory.
        mixed = self.mix_tokens(*self.project(x), attn_mask, is_causal)
        return self.finish(x, mixed)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Mixed tokens (B, N, H * D) and the layer's input (B, N, C) to its output."""
        mixed = self.norm(mixed)
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(mixed))
        return out

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A checkpoint of exact attention knows nothing of features, projections or residual
        # convolutions: these keep their initial values, and the log says so. A checkpoint that
        # holds some of them and lacks others is damaged, and fails as usual. The convolution on the
        # grid is an option of exact attention too, so it may be lacking, or there, for itself.
        mine: dict[str, Tensor] = {}
        near: dict[str, Tensor] = {}
        holds_exact = False
        for name, value in self.state_dict().items():
            if name.split(".")[0] not in self.exact_parts:
                (near if name.startswith("dwc.") else mine)[name] = value
            elif prefix + name in state_dict:
                holds_exact = True
        if holds_exact:
            absent = []
            for own in (mine, near):
                if not any(prefix + name in state_dict for name in own):
                    absent += list(own)
            if absent:
                _logger.warning(
                    "The checkpoint has no %s for %s (%s attention); initial values are kept.",
                    ", ".join(absent),
                    prefix.rstrip(".") or "the layer",
                    self.mechanism,
                )
                state_dict.update({prefix + name: (mine | near)[name] for name in absent})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
