"""Our mechanisms by name in models of transformers: ``attn_implementation="nystrom_l64"``.

transformers looks an attention function up by its name and hands it queries, keys and values. So
what works there is every mechanism without parameters of its own that can do without the token
grid: ``softmax``, ``performer_*`` but the learned ones, ``nystrom_l*`` without convolution, and
``local1d_w*`` without shift, where the kind of model tells how many class and register tokens come
first. The others have weights, or need the grid, which no attention function is told.

A name means one function for good, so that a model that was trained with it computes the same in
every process: random features are those of seed 0 for the layer's head width, the same for all
layers, as in `attention_class`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from timm_xformers.layers.factory import ATTENTION
from timm_xformers.layers.local import Local1dAttention, local_attention
from timm_xformers.layers.masks import refuse_causal
from timm_xformers.layers.nystrom import NystromAttention, nystrom_attention
from timm_xformers.layers.performer import (
    PerformerAttention,
    orthogonal_directions,
    performer_attention,
)
from timm_xformers.layers.softmax import SoftmaxAttention, softmax_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        "Attention functions for transformers need it, 5.24 or later; install it by "
        "pip install 'timm-xformers[transformers]'."
    ) from error

__all__ = ["register_attention_functions"]

FEATURE_SEED = 0

# Tokens before the grid, by the model_type of a configuration; register tokens come on top.
_CLASS_TOKENS = {
    "clip_vision_model": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
    "vit": 1,
}

# What other functions take, and would change the result.
_FOREIGN = ("position_bias", "s_aux", "sinks", "sliding_window", "softcap")


def register_attention_functions() -> list[str]:
    """Make our mechanisms known to transformers, from then on and for every model.

    ``AutoModel.from_pretrained(..., attn_implementation="nystrom_l64")`` and
    ``model.set_attn_implementation("nystrom_l64")`` then take the names returned. Call it in every
    process that loads such a model.

    Returns:
        The names.

    Raises:
        ImportError: transformers is not installed.
    """
    names = [name for name, (kind, numbers) in ATTENTION.items() if _fits(kind, numbers)]
    for name in names:
        AttentionInterface.register(name, _function(name))
        AttentionMaskInterface.register(name, _keys_mask)
    return names


def _fits(kind: type, numbers: dict[str, Any]) -> bool:
    plain = not numbers.keys() & {"conv_kernel", "dwc", "shifted"}
    return plain and kind in (
        SoftmaxAttention,
        PerformerAttention,
        NystromAttention,
        Local1dAttention,
    )


def _keys_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers makes of a user's mask: one row for all queries where that says it all."""
    if mask_function is bidirectional_mask_function:
        return None if attention_mask is None else attention_mask[:, None, None, :].bool()
    kwargs["allow_is_causal_skip"] = False  # an attention function may not know that it is causal
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        **kwargs,
    )
    return mask


def _function(name: str) -> Callable[..., tuple[Tensor, None]]:
    """The attention function of a name, with transformers' signature."""
    kind, numbers = ATTENTION[name]

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Queries, keys, values (B, H, N, D) to (B, N, H, D), and no map."""
        _refuse(name, kind, query, key, dropout, kwargs)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # a head of keys and values for several of queries
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if scaling is not None:  # ours divide by sqrt(D)
            query = query * (scaling * query.shape[-1] ** 0.5)
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        causal = causal and attention_mask is None  # else the mask says it
        if kind is SoftmaxAttention:
            out = softmax_attention(query, key, value, attention_mask, causal, dropout)
        elif kind is PerformerAttention:
            omega = _directions(numbers["num_features"], query.shape[-1], query.device)
            kernel = numbers["kernel"]
            out = performer_attention(query, key, value, omega, kernel, attention_mask, causal)
        elif kind is NystromAttention:
            refuse_causal(causal, name)
            landmarks = numbers["num_landmarks"]
            out = nystrom_attention(query, key, value, landmarks, attn_mask=attention_mask)
        else:
            prefix = _prefix_tokens(name, module)
            out = local_attention(
                query,
                key,
                value,
                grid_size=(1, query.shape[2] - prefix),
                window_size=(1, numbers["window_size"]),
                num_prefix_tokens=prefix,
                attn_mask=attention_mask,
                is_causal=causal,
                dropout_p=dropout,
            )
        return out.transpose(1, 2).contiguous(), None

    attention.__name__ = attention.__qualname__ = name
    return attention


def _refuse(
    name: str, kind: type, query: Tensor, key: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{name} gives no attention maps to transformers, so output_attentions=True cannot be "
            'honoured; use attn_implementation="eager" for them.'
        )
    foreign = [argument for argument in _FOREIGN if kwargs.get(argument) is not None]
    if foreign:
        raise ValueError(
            f"This model hands {', '.join(foreign)} to its attention, which {name} does not know; "
            'use attn_implementation="eager" or "sdpa".'
        )
    if dropout > 0 and kind in (PerformerAttention, NystromAttention):
        raise ValueError(
            f"{name} has no map to drop entries of, so an attention dropout of {dropout} cannot be "
            "honoured; set attention_dropout (attention_probs_dropout_prob) to 0 in the "
            "configuration."
        )
    if kind is not SoftmaxAttention and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name} mixes the tokens of one sequence and got {query.shape[2]} queries for "
            f"{key.shape[2]} keys; use softmax for attention to another sequence or to a cache."
        )


def _prefix_tokens(name: str, module: torch.nn.Module) -> int:
    config: Any = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in _CLASS_TOKENS:
        raise ValueError(
            f"{name} has to know how many class and register tokens come first, and does not for "
            f"model_type={model_type!r}; it does for {', '.join(_CLASS_TOKENS)}. Use a nystrom or "
            "performer mechanism."
        )
    registers: int = getattr(config, "num_register_tokens", None) or 0
    return _CLASS_TOKENS[model_type] + registers


_DRAWN: dict[tuple[int, int, str], Tensor] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _directions(num_features: int, head_dim: int, device: torch.device) -> Tensor:
    """Directions (m, D) of the features: drawn once, the same in every process."""
    key = (num_features, head_dim, str(device))
    if key not in _DRAWN:
        drawn = orthogonal_directions(num_features, head_dim, FEATURE_SEED).to(device)
        if isinstance(drawn, FakeTensor):
            raise RuntimeError(
                "Random features cannot be drawn while a model is exported; run it once before."
            )
        _DRAWN[key] = drawn
    return _DRAWN[key]
