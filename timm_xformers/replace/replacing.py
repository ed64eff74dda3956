"""Mechanisms into live models and out again, in place and all or nothing."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import nn

from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.layout import NeedsLayout, set_token_layout, takes_any_size, token_grid
from timm_xformers.layers.performer import PerformerAttention
from timm_xformers.replace.forms import BiasForm, Form, ParallelForm
from timm_xformers.replace.plan import KEEP, Choice, block_numbers, block_words, read_plan
from timm_xformers.replace.report import Replacement, measure
from timm_xformers.replace.sites import BIASED, Site, attention_sites, form_of, token_width

__all__ = ["put_in", "replace_attention", "replacement_of", "restore_attention"]


def replace_attention(
    model: nn.Module,
    mechanism: str | Mapping[str, str | Mapping[str, Any]],
    *,
    blocks: str | Iterable[int] | None = None,
    keep_weights: bool = True,
    feature_seed: int = 0,
    relative_bias: str = "refuse",
    img_size: int | tuple[int, int] | None = None,
    **settings: Any,
) -> Replacement:
    """Replace the attention of a live model, in place; where anything is refused, nothing changes.

    A new layer holds the submodules and parameters of the one that stood there, the same objects
    under the same names. Checkpoints of the original model load, and optimisers keep their
    references; what a mechanism has of its own (random features, convolutions) is new.

    Args:
        model: A model of timm, torchvision (``vit_*``) or this package.
        mechanism: One of `timm_xformers.list_attention`, or names by blocks, such as
            ``{"0-1,11": "exact", "2-10": "performer_softmax_m64"}``; ``"exact"`` keeps a block as
            it is. In place of a name, ``{"name": ..., **settings}`` gives it settings of its own.
        blocks: Which ones (``"0-1,11"``, ``"2-"`` or numbers), in the order of `attention_sites`;
            all if None.
        keep_weights: Keep the projections and norms; False draws them anew, as timm's ViTs start.
        feature_seed: Seed of everything that is drawn; layer i draws with ``1000 * seed + i``.
        relative_bias: ``"refuse"`` attention with a bias per pair of tokens (BEiT), or ``"drop"``
            the bias.
        img_size: Size of the images, for windows and sequence projections in a model that takes
            any size; it takes this one only from then on.
        **settings: Arguments of the mechanism, such as ``num_features=110``.

    Returns:
        The report; ``print`` shows it as a table.

    Raises:
        ValueError: A layer that cannot be replaced, named with the reason; blocks, mechanisms or
            settings that do not exist; or what a mechanism cannot honour (dropout on a map that it
            does not have, a grid that nobody knows).
    """
    pairs = put_in(
        model,
        mechanism,
        blocks=blocks,
        keep_weights=keep_weights,
        feature_seed=feature_seed,
        relative_bias=relative_bias,
        img_size=img_size,
        **settings,
    )
    return measure(model, pairs, replacement_of(model) or {})


def put_in(
    model: nn.Module,
    mechanism: str | Mapping[str, str | Mapping[str, Any]],
    *,
    blocks: str | Iterable[int] | None = None,
    keep_weights: bool = True,
    feature_seed: int = 0,
    relative_bias: str = "refuse",
    img_size: int | tuple[int, int] | None = None,
    **settings: Any,
) -> list[tuple[Site, Form | None, str]]:
    """`replace_attention` without the measurements of its report.

    Returns:
        Each attention as it was, what replaced it, and why it was kept.
    """
    if relative_bias not in ("refuse", "drop"):
        raise ValueError(f"relative_bias={relative_bias!r} is unknown; use refuse or drop.")
    sites = attention_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no attention to replace.")
    plan = read_plan(mechanism, blocks, len(sites), feature_seed, settings)
    chosen = {n: choice for n, choice in plan.items() if choice.mechanism != KEEP}
    _refuse(model, [sites[n] for n in chosen], relative_bias, keep_weights)
    made = {number: _make(sites[number], choice) for number, choice in chosen.items()}
    size = None if img_size is None else (int(to_2tuple(img_size)[0]), int(to_2tuple(img_size)[1]))
    _check_layout(model, list(made.values()), size)
    # Nothing is refused from here on.
    if size is not None:
        _fix_size(model, size)
    layout = _layout(model)
    for number, layer in made.items():
        layer.replacement |= {"relative_bias": "drop"} if isinstance(layer, BiasForm) else {}
        layer.replacement |= {"img_size": list(size)} if size else {}
        if layout is not None and isinstance(layer, NeedsLayout):
            layer.set_layout(*layout, layer.site_index)
        if not keep_weights:
            _draw_projections(layer)
        _swap(model, sites[number].module, layer)
    _note(model)
    asked = ["as asked" if number in plan else "not asked for" for number in range(len(sites))]
    return [(site, made.get(site.index), asked[site.index]) for site in sites]


def restore_attention(model: nn.Module, blocks: str | Iterable[int] | None = None) -> int:
    """Put the original layers back, with the weights that they share as these are now.

    Args:
        model: A model with layers of `replace_attention`.
        blocks: Which ones, as there; all if None.

    Returns:
        The number of layers put back.

    Raises:
        ValueError: Blocks that do not exist.
    """
    sites = attention_sites(model)
    numbers = block_numbers(blocks, len(sites)) if sites else []
    forms = [m for n in numbers if isinstance(m := sites[n].module, Form)]
    for form in forms:
        original = form.give_back()
        if isinstance(original, NeedsLayout) and (layout := _layout(model)) is not None:
            original.set_layout(*layout, form.site_index)
        _swap(model, form, original)
    if forms:
        _note(model)
    return len(forms)


def replacement_of(model: nn.Module) -> dict[str, Any] | None:
    """Arguments with which `replace_attention` makes a model's replacements again, as JSON has it.

    None if nothing is replaced. Weights are not part of it.
    """
    layers = {s.index: m for s in attention_sites(model) if isinstance(m := s.module, Form)}
    if not layers:
        return None
    seeds = {layer.replacement["feature_seed"] for layer in layers.values()}
    record: dict[str, Any] = {"mechanism": {}, "feature_seed": min(seeds)}
    groups: list[tuple[Any, list[int]]] = []
    for index, layer in layers.items():
        made = layer.replacement
        asked: Any = made["mechanism"]
        own = dict(made["settings"])
        if len(seeds) > 1:
            own["feature_seed"] = made["feature_seed"]
        if own:
            asked = {"name": asked, **own}
        for name in ("relative_bias", "img_size"):
            if name in made:
                record[name] = made[name]
        same = next((numbers for known, numbers in groups if known == asked), None)
        if same is None:
            groups.append((asked, [index]))
        else:
            same.append(index)
    record["mechanism"] = {block_words(numbers): asked for asked, numbers in groups}
    return record


def _refuse(model: nn.Module, sites: list[Site], relative_bias: str, keep_weights: bool) -> None:
    """Raise if a layer cannot be replaced."""
    shared = any(
        getattr(part, name, None) is not None
        for part in model.modules()
        for name in ("rel_pos_bias", "shared_rel_pos")
    )
    refused: list[tuple[str, str, str]] = []
    for site in sites:
        reason = site.refused
        if reason is None and not site.name:
            reason = "is the model itself; pass the model around it"
        if reason is None and issubclass(form_of(site), BiasForm) and relative_bias != "drop":
            own = [
                getattr(site.original, n, None) for n in ("relative_position_bias_table", "rel_pos")
            ]
            if shared or any(bias is not None for bias in own):
                reason = BIASED
        if reason is None and not keep_weights and issubclass(form_of(site), ParallelForm):
            reason = "shares its projections with the MLP, so keep_weights=False cannot be honoured"
        if reason is not None:
            refused.append((site.name, site.kind, reason))
    if refused:
        name, kind, reason = refused[0]
        more = f" ({len(refused)} layers are refused; nothing was changed)"
        raise ValueError(f"{name or type(model).__name__} ({kind}) {reason}.{more}")


def _make(site: Site, choice: Choice) -> Form:
    """The new layer for a site, which the model does not know yet."""
    old = site.module.give_back() if isinstance(site.module, Form) else site.module
    cls = cast("type[Form]", attention_class(choice.mechanism, form_of(site), **choice.settings))
    dropout = getattr(old, "attn_drop", None)
    attn_drop = float(dropout.p if isinstance(dropout, nn.Dropout) else getattr(old, "dropout", 0))
    if attn_drop > 0 and not cls.has_map:
        raise ValueError(
            f"{site.name} drops entries of its attention map (p={attn_drop}), and "
            f"{choice.mechanism} attention has none; set its attn_drop.p to 0 first."
        )
    like = next((p for p in old.parameters() if p.is_floating_point()), None)
    if like is None:
        raise ValueError(
            f"{site.name} has no floating-point weights; replace before the model is quantised."
        )
    seed = 1000 * choice.feature_seed + site.index
    with torch.random.fork_rng(devices=[]):  # the caller's draws stay as they would be
        torch.manual_seed(seed)
        try:
            layer = cls(
                token_width(old, site.num_heads * site.head_dim),
                site.num_heads,
                attn_head_dim=site.head_dim,
                attn_drop=attn_drop,
                device="meta" if like.is_meta else "cpu",
                dtype=like.dtype,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{site.name}: {error}") from error
    if layer.qkv.out_features != 3 * layer.attn_dim:
        raise ValueError(
            f"{site.name}: the settings {choice.settings} of {choice.mechanism} change the "
            "projections of queries, keys and values, which are the model's; leave them out."
        )
    if isinstance(layer, PerformerAttention):
        layer.redraw(seed)
    layer.to(like.device)
    layer.adopt(old)
    layer.site_index = site.index
    layer.replacement = {
        "mechanism": choice.mechanism,
        "settings": choice.settings,
        "feature_seed": choice.feature_seed,
    }
    return layer


def _draw_projections(layer: Form) -> None:
    """Draw what stands around a mechanism as timm's ViTs start."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1000 * layer.replacement["feature_seed"] + layer.site_index)
        for name, parameter in layer.named_parameters():
            part, _, rest = name.partition(".")
            if part not in layer.exact_parts or (rest and "norm" in part):
                continue
            if parameter.dim() > 1:
                parameter.copy_(trunc_normal_(torch.empty(parameter.shape), std=0.02))
            else:
                parameter.zero_()
        for norm in (layer.q_norm, layer.k_norm, layer.norm):
            reset: Any = getattr(norm, "reset_parameters", None)
            if reset is not None:
                reset()


def _needs_grid(layer: nn.Module) -> bool:
    return bool(getattr(layer, "needs_fixed_grid", False) or getattr(layer, "needs_layout", False))


def _check_layout(model: nn.Module, layers: list[Form], size: tuple[int, int] | None) -> None:
    """Raise where a layer needs to know how tokens lie, and the model cannot tell."""
    needing = [layer for layer in layers if _needs_grid(layer)]
    fixed = [layer for layer in needing if layer.needs_fixed_grid]
    found = token_grid(model)
    if size is not None and not fixed:
        raise ValueError(
            f"No mechanism asked for is built for one size, so img_size={size} says nothing; leave "
            "it out."
        )
    if not needing:
        return
    name = needing[0].mechanism
    dropping = [m for m in model.modules() if "PatchDropout" in type(m).__name__]
    if any(getattr(m, "prob", 0) > 0 for m in dropping):
        raise ValueError(
            f"{name} attention needs every token in its place, and the model drops patches "
            "(patch_drop_rate); build the model without."
        )
    if found is None:
        if fixed or _layout(model) is None:
            raise ValueError(
                f"{(fixed or needing)[0].mechanism} attention is built for one grid of tokens, and "
                f"{type(model).__name__} has none that is the same for all images; use nystrom, "
                "performer or softmax attention."
            )
        return
    if not fixed:
        return
    if takes_any_size(model) and size is None:
        raise ValueError(
            f"{fixed[0].mechanism} attention is built for one grid of tokens, and the model takes "
            "images of any size (dynamic_img_size=True); give the one that it shall take: "
            "img_size=..."
        )
    host = _host(model)
    if size is not None and not takes_any_size(model):
        own = tuple(getattr(getattr(host, "patch_embed", None), "img_size", size))
        if own != size:
            raise ValueError(
                f"img_size={size} differs from the model's {own}; call "
                f"model.set_input_size({size}) first."
            )


def _host(model: nn.Module) -> nn.Module | None:
    """The part of a model that holds the grid of tokens."""
    for part in model.modules():
        if getattr(getattr(part, "patch_embed", None), "grid_size", None) is not None:
            return part
    return None


def _layout(model: nn.Module) -> tuple[tuple[int, int], int] | None:
    """Grid and prefix tokens; a nominal grid where every image has its own (NaFlexViT)."""
    found = token_grid(model)
    if found is None:
        for part in model.modules():
            if hasattr(part, "embeds") and hasattr(part, "num_prefix_tokens"):
                return (1, 1), int(part.num_prefix_tokens)  # type: ignore[arg-type]
    return found


def _fix_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Make a model that takes images of any size take this one only."""
    host: Any = _host(model)
    if host is not None and takes_any_size(model):
        host.set_input_size(img_size=size)
        host.patch_embed.strict_img_size = True


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


class _Resize:
    """A model's ``set_input_size`` that tells the new layers too. An object, so that it pickles."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        host: Any = self.host
        type(host).set_input_size(host, *args, **kwargs)
        set_token_layout(host)


def _note(model: nn.Module) -> None:
    """Make the model's own notes say what it is now: how to resize, how to build it again."""
    record = replacement_of(model)
    host: Any = _host(model)
    told = [m for m in model.modules() if isinstance(m, Form) and _needs_grid(m)]
    if host is not None and hasattr(type(host), "set_input_size"):
        if told:
            host.set_input_size = _Resize(host)
        else:
            vars(host).pop("set_input_size", None)
            if getattr(host, "dynamic_img_size", False):
                host.patch_embed.strict_img_size = False
    for part in model.modules():
        config: Any = getattr(part, "pretrained_cfg", None)
        if not isinstance(config, dict) or "architecture" not in config:
            continue
        args = dict(getattr(part, "_model_args", {}))
        if record is None:
            config = {**config, "architecture": args.pop("architecture", config["architecture"])}
            args.pop("replacement", None)
        else:
            args.setdefault("architecture", config["architecture"])
            args["replacement"] = record
            config = {**config, "architecture": "retrofit"}
        holder: Any = part
        holder.pretrained_cfg = holder.default_cfg = config
        holder._model_args = args  # what timm's save_for_hf writes beside the weights
        return
