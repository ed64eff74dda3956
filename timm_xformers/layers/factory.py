"""Mechanisms by name: ``"nystrom_l64"`` to a class for timm's attention slot.

timm's `VisionTransformer` takes a class with a fixed argument list, or a name from its table, so
each named setting is a real class with its numbers bound. `register` puts all of them into timm's
table; from then on ``timm.create_model("vit_base_patch16_224", attn_layer="nystrom_l64")`` works in
every family that takes ``attn_layer``.
"""

import copyreg
import difflib
import fnmatch
import functools
from collections.abc import Container
from functools import partialmethod
from typing import Any

from timm.layers import register_notrace_module
from torch import nn

from timm_xformers.layers.agent import AgentAttention
from timm_xformers.layers.fnet import FNetMixing
from timm_xformers.layers.heads import WITH_DWC, HeadsAttention
from timm_xformers.layers.hedgehog import HedgehogAttention
from timm_xformers.layers.linformer import LinformerAttention
from timm_xformers.layers.local import Local1dAttention, Local2dAttention
from timm_xformers.layers.nystrom import NystromAttention
from timm_xformers.layers.performer import KERNELS, PerformerAttention
from timm_xformers.layers.performer.learned import LearnedPerformerAttention
from timm_xformers.layers.softmax import SoftmaxAttention

__all__ = ["ATTENTION", "attention_class", "list_attention", "register"]

_FEATURES = (16, 32, 64, 128, 256)

# Name -> mechanism and the numbers that the name stands for.
ATTENTION: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "softmax": (SoftmaxAttention, {}),
    **{
        f"performer_{kernel}_m{m}": (PerformerAttention, {"kernel": kernel, "num_features": m})
        for kernel in KERNELS
        for m in _FEATURES
    },
    **{
        f"performer_learned_m{m}": (LearnedPerformerAttention, {"num_features": m})
        for m in _FEATURES
    },
    "hedgehog": (HedgehogAttention, {}),
    **{f"nystrom_l{n}": (NystromAttention, {"num_landmarks": n}) for n in (16, 32, 64, 128, 256)},
    **{
        f"nystrom_l{n}_conv33": (NystromAttention, {"num_landmarks": n, "conv_kernel": 33})
        for n in (16, 32, 64, 128, 256)
    },
    **{f"agent_a{n}": (AgentAttention, {"num_agents": n}) for n in (16, 49, 64, 144)},
    **{f"linformer_k{k}": (LinformerAttention, {"proj_len": k}) for k in (32, 64, 128, 256)},
    **{f"local1d_w{w}": (Local1dAttention, {"window_size": w}) for w in (16, 32, 64, 128, 256)},
    **{f"local2d_w{w}": (Local2dAttention, {"window_size": w}) for w in (4, 7, 8, 14, 16)},
    **{
        f"local1d_w{w}_shifted": (
            Local1dAttention,
            {"window_size": w, "neighbours": False, "shifted": True},
        )
        for w in (16, 32, 64, 128, 256)
    },
    **{
        f"local2d_w{w}_shifted": (
            Local2dAttention,
            {"window_size": w, "neighbours": False, "shifted": True},
        )
        for w in (4, 7, 8, 14, 16)
    },
}
# Each also with the convolution of the values on the grid, which FNet has no values for.
ATTENTION |= {
    f"{name}_dwc": (kind, {**fixed, "dwc": True}) for name, (kind, fixed) in ATTENTION.items()
}
ATTENTION["fnet"] = (FNetMixing, {})

# timm's graph extraction looks at subclasses too, so the bases cover every bound class. Control
# flow that depends on the number of tokens is theirs to keep.
register_notrace_module(HeadsAttention)
register_notrace_module(FNetMixing)


# Settings as sorted pairs, so that equal settings are one cache key.
_Settings = tuple[tuple[str, Any], ...]


class _BoundType(type):
    """Type of the bound classes, which pickle as the call that made them."""

    recipe: tuple[str, _Settings, type[nn.Module] | None]


def _unpickle(name: str, settings: _Settings, form: type[nn.Module] | None = None) -> Any:
    return attention_class(name, form, **dict(settings))


copyreg.pickle(_BoundType, lambda cls: (_unpickle, cls.recipe))


@functools.cache
def _bind(name: str, settings: _Settings, form: type[nn.Module] | None) -> type[nn.Module]:
    base, fixed = ATTENTION[name]
    numbers = {**fixed, **dict(settings)}
    init = partialmethod(base.__init__, **numbers)
    bases = (base,) if form is None else (form, base)
    bound: Any = _BoundType(
        name, bases, {"__init__": init, "__doc__": f"{base.__name__} {numbers}."}
    )
    bound.__module__ = __name__
    bound.recipe = (name, settings, form)
    if numbers.get("dwc") and issubclass(base, HeadsAttention):
        for key, value in WITH_DWC.items():  # models ask the class before they build it
            setattr(bound, key, value)
    made: type[nn.Module] = bound
    return made


def attention_class(
    name: str, form: type[nn.Module] | None = None, /, **settings: Any
) -> type[nn.Module]:
    """Class of a named mechanism, for ``VisionTransformer(attn_layer=...)``.

    Args:
        name: One of `list_attention`.
        form: A subclass of `HeadsAttention` whose methods go before the mechanism's: the way in
            and out of the attention of another family of models.
        **settings: Arguments of the mechanism's class that override or add to the name's numbers,
            such as ``num_features=110``.

    Returns:
        A class with the arguments of timm's `Attention`. Equal calls return the same class, and
        instances pickle.

    Raises:
        ValueError: Unknown name.
    """
    if name not in ATTENTION:
        raise ValueError(_unknown(name))
    hashable: Any = form
    return _bind(name, tuple(sorted(settings.items())), hashable)


def list_attention(pattern: str = "*") -> list[str]:
    """Names that ``attn_layer`` takes, optionally filtered by a shell pattern."""
    return [name for name in ATTENTION if fnmatch.fnmatchcase(name, pattern)]


def _unknown(name: object) -> str:
    near = difflib.get_close_matches(str(name), ATTENTION, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "for example nystrom_l64."
    return (
        f"Unknown attention {name!r}; {hint} timm_xformers.list_attention() lists all "
        f"{len(ATTENTION)} names."
    )


class _AttentionTable(dict[str, type[nn.Module]]):
    """timm's table, whose look-up names what is known instead of returning None."""

    def get(self, key: str, default: Any = None) -> Any:
        """Class of a name.

        Raises:
            ValueError: Unknown name.
        """
        if key not in self:
            raise ValueError(_unknown(key))
        return self[key]


def _refuse_attn_layer(block: type[nn.Module], own: Container[str]) -> None:
    """Make a block of timm's that takes ``attn_layer`` and ignores it say so.

    Args:
        block: Its attention is part of its own code.
        own: timm's names of attention layers, which stay as they are.
    """
    init = block.__init__

    @functools.wraps(init)
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        asked = kwargs.get("attn_layer")
        if (isinstance(asked, str) and asked not in own) or hasattr(asked, "mechanism"):
            raise ValueError(
                f"{block.__name__} computes its attention itself, so attn_layer={asked!r} cannot "
                "be honoured; use a model of timm's usual blocks, such as vit_tiny_patch16_224."
            )
        init(self, *args, **kwargs)

    block.__init__ = checked  # type: ignore[method-assign]


def register() -> None:
    """Put every named mechanism into timm's table; names that timm has are left alone."""
    from timm.models import vision_transformer

    table = vision_transformer.ATTN_LAYERS
    if isinstance(table, _AttentionTable):
        return
    for name in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
        if hasattr(vision_transformer, name):  # the second is younger than timm 1.0.26
            _refuse_attn_layer(getattr(vision_transformer, name), {*table})
    for name in ATTENTION:
        if name not in table:
            table[name] = attention_class(name)
    vision_transformer.ATTN_LAYERS = _AttentionTable(table)
