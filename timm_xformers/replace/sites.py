"""Where a model has attention, of which kind, and what cannot be replaced for which reason."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from timm.layers import Attention, AttentionRope
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from torch import nn

from timm_xformers.layers.fnet import FNetMixing
from timm_xformers.layers.heads import HeadsAttention
from timm_xformers.replace.forms import BiasForm, Form, ParallelForm, RotaryForm, TorchForm

__all__ = ["BIASED", "Site", "attention_sites", "form_of", "token_width"]


@dataclass(frozen=True)
class Site:
    """One attention of a model.

    Attributes:
        index: Its number in forward order, from 0; what ``blocks`` counts.
        name: Its name in the model, such as ``"blocks.3.attn"``.
        module: The layer.
        kind: Family that it comes from, such as ``"timm Attention"``.
        mechanism: A name of `timm_xformers.list_attention`, or ``"exact"`` where nobody replaced.
        num_heads: H; 0 where unknown.
        head_dim: D; 0 where unknown.
        refused: Why it cannot be replaced, or None.
    """

    index: int
    name: str
    module: nn.Module
    kind: str
    mechanism: str
    num_heads: int
    head_dim: int
    refused: str | None = None

    @property
    def original(self) -> nn.Module:
        """The layer that stood here before anything was replaced."""
        return self.module.original if isinstance(self.module, Form) else self.module


# What the refusal of a relative bias says; `relative_bias="drop"` lifts it.
BIASED = (
    "adds a bias for the relative position of each pair of tokens, which no mechanism without a "
    'map can apply; keep the block ("exact"), or leave the bias out with relative_bias="drop"'
)

_KINDS: dict[type[nn.Module], tuple[str, type[Form]]] = {
    Attention: ("timm Attention", Form),
    AttentionRope: ("timm AttentionRope", RotaryForm),
    eva.EvaAttention: ("timm EvaAttention", RotaryForm),
    beit.Attention: ("timm BEiT attention", BiasForm),
    vision_transformer_relpos.RelPosAttention: ("timm RelPosAttention", BiasForm),
    vision_transformer.ParallelScalingBlock: ("timm ParallelScalingBlock", ParallelForm),
}

# Why others cannot be replaced, by the name of their class, with its module where that is general.
_REASONS = {
    "ClassAttn": "lets the class token alone ask",
    "ClassAttention": "lets the class token alone ask",
    "CrossCovarianceAttn": "attends over channels, so its cost is linear in tokens already",
    "DiffAttention": "subtracts one map from another",
    "DiffParallelScalingBlock": "subtracts one map from another",
    "GlobalSubSampleAttn": "attends to a map of fewer keys",
    "MaskUnitAttention": "pools its queries and attends in mask units",
    "MultiScaleAttention": "pools queries, keys or values",
    "MultiheadAttention": "is PyTorch's layer, which is replaced in torchvision's models only",
    "TalkingHeadAttn": "mixes the maps of its heads before and after the softmax",
    "WindowAttention": "attends in windows, so its cost is linear in tokens already",
    "XCA": "attends over channels, so its cost is linear in tokens already",
    "levit.Attention": "adds a bias per distance and has norms inside its maps",
    "maxxvit.Attention2d": "attends in windows and grids with a relative bias",
    "maxxvit.AttentionCl": "attends in windows and grids with a relative bias",
    "vision_transformer_sam.Attention": "adds a relative bias and attends to a map, in windows too",
}
_LOOKS_LIKE_ATTENTION = re.compile(r"Attn|Attention|^XCA$|^LiteMLA$|^SHSA$|^DiffParallelScaling")


def attention_sites(model: nn.Module) -> list[Site]:
    """Every attention of a model, in forward order, with the reason where it must stay.

    Layers that pool tokens by attention are not counted.
    """
    sites: list[Site] = []
    seen: set[str] = set()  # names below sites
    parents = dict(model.named_modules())
    for name, module in parents.items():
        above = name
        while above and above not in seen:
            above = above.rpartition(".")[0]
        if above:
            continue
        parent = parents[name.rpartition(".")[0]]
        if not _is_site(module):
            continue
        seen.add(name)
        sites.append(_site(len(sites), name, module, parent))
    return sites


def _is_site(module: nn.Module) -> bool:
    if isinstance(module, (HeadsAttention, FNetMixing)) or _known(module) is not None:
        return True
    name = type(module).__name__
    if not _LOOKS_LIKE_ATTENTION.search(name) or "Pool" in name:
        return False
    # A block is named after its attention too.
    return not any(_is_site(part) for part in list(module.modules())[1:])


def _site(index: int, name: str, module: nn.Module, parent: nn.Module) -> Site:
    source = module.original if isinstance(module, Form) else module
    kind, mechanism, refused = "", "exact", None
    if isinstance(module, (HeadsAttention, FNetMixing)):
        mechanism = getattr(type(module), "recipe", (module.mechanism,))[0]
    if isinstance(source, HeadsAttention):
        kind = "timm_xformers"
        if _shape(source) != (3 * source.attn_dim,):
            refused = "shares keys or values between heads"
    elif isinstance(source, FNetMixing):
        kind, refused = "timm_xformers", "is fnet, which has no queries, keys and values"
    elif (known := _known(source)) is not None:
        kind = _KINDS[known][0]
    elif isinstance(source, nn.MultiheadAttention) and type(parent).__module__.startswith(
        "torchvision."
    ):
        kind = "torch MultiheadAttention"
    else:
        cls = type(source)
        kind = f"{cls.__module__.removeprefix('timm.models.')}.{cls.__qualname__}"
        refused = _REASONS.get(kind) or _REASONS.get(
            cls.__name__, "computes attention in a way of its own"
        )
    heads = int(getattr(module, "num_heads", 0) or 0)
    return Site(index, name, module, kind, mechanism, heads, _head_dim(module, heads), refused)


def _shape(layer: HeadsAttention) -> tuple[int, ...]:
    features = getattr(layer.qkv, "out_features", None)
    return (3 * layer.attn_dim,) if features is None else (features,)


def _known(module: nn.Module) -> type[nn.Module] | None:
    """The class of the table that a module is, or derives from without another forward."""
    for cls in _KINDS:
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return cls
    return None


def _head_dim(module: nn.Module, heads: int) -> int:
    if (width := getattr(module, "head_dim", None)) is not None:
        return int(width)
    joint: Callable[..., object] | None = getattr(module, "qkv", None)
    features = getattr(joint, "out_features", 0)
    return features // (3 * heads) if heads else 0


def form_of(site: Site) -> type[Form]:
    """The form for what stands at a site that is not refused, a replaced layer included."""
    if isinstance(site.original, nn.MultiheadAttention):
        return TorchForm
    known = _known(site.original)
    return Form if known is None else _KINDS[known][1]


def token_width(layer: nn.Module, otherwise: int) -> int:
    """Width C of a layer's tokens, or another number where it does not say."""
    for name in ("qkv", "q_proj", "in_proj"):
        width = getattr(getattr(layer, name, None), "in_features", None)
        if width is not None:
            return int(width)
    return int(getattr(layer, "embed_dim", otherwise))
