"""A model by name, with every way that can fail turned into one sentence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from timm_xformers.data.data import Data
from timm_xformers.data.preprocessing import Preprocessing, input_size
from timm_xformers.errors import UsageError, UserError, nearest
from timm_xformers.files.atomic import MANIFEST_FILE, find_damage, sha256_of
from timm_xformers.files.text import one_line
from timm_xformers.layers.layout import complete_token_layout
from timm_xformers.recipe import Recipe
from timm_xformers.replace import replace_attention

__all__ = [
    *("MULTI_LABEL", "build_for", "build_model", "check_input"),
    *("is_multi_label", "replace_in", "weights_name"),
]

# Among the notes of a model's configuration, where images may have several classes; the word is
# transformers'.
MULTI_LABEL = "multi_label_classification"

# What models raise at arguments, weights and inputs that do not fit them.
FAILURES = (
    *(AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(ArithmeticError, MemoryError),
)


def build_model(
    name: str,
    *,
    img_size: int | None = None,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a model through timm.

    Args:
        name: Registered name, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
        img_size: Side of the input; left out for models that take any size.
        pretrained: Load the weights that belong to the name.
        checkpoint: File with other weights for it.
        kwargs: Further arguments of the model.

    Returns:
        The model, and all arguments that build it again from its architecture's name.

    Raises:
        UserError: The name is unknown, the arguments do not fit or the weights do not load.
    """
    _check_name(name, pretrained=pretrained)
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"There is no checkpoint {checkpoint}; name a .safetensors or .pth file.")
    path = "" if checkpoint is None else str(checkpoint)
    given = _stored_arguments(name) | kwargs | {"img_size": img_size}
    # timm drops None before it looks at the name; so do we, to store what was used.
    arguments = {key: value for key, value in given.items() if value is not None}
    try:
        try:
            model = timm.create_model(
                name, pretrained=pretrained, checkpoint_path=path, **arguments
            )
        except TypeError as error:
            # Convolutional families take any size and no such argument.
            if "'img_size'" not in str(error):
                raise
            del arguments["img_size"]
            model = timm.create_model(
                name, pretrained=pretrained, checkpoint_path=path, **arguments
            )
        complete_token_layout(model)  # windows in timm's models
    except SafetensorError as error:
        raise UserError(
            f"The weights of {name} are cut off or damaged ({one_line(error)}); bring them again."
        ) from error
    except FAILURES as error:
        words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(f"Cannot build {name}({words}): {one_line(error)}") from error
    return model, arguments


def build_for(
    recipe: Recipe, data: Data | None = None, **arguments: Any
) -> tuple[nn.Module, Preprocessing]:
    """The model of a recipe, at the size that this asks for or the data has, and what it expects.

    Without either, its weights decide. Further arguments and failures are those of `build_model`.
    """
    side = input_size(recipe.img_size, None if data is None else data.img_size)
    model, _ = build_model(recipe.model, img_size=side, **arguments)
    return model, Preprocessing.of_model(model, side, arguments.get("in_chans"))


def replace_in(
    model: Any, settings: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Replace attention in a model, which from then on is timm's name ``retrofit``.

    Args:
        model: From `build_model`; changed in place.
        settings: Arguments of `replace_attention`.
        arguments: Those that built the model.

    Returns:
        Arguments that build the replaced model by the name ``retrofit``, and a table of what was
        replaced.

    Raises:
        UsageError: The settings do not fit the model.
    """
    before = model.pretrained_cfg["architecture"]
    try:
        replacement = replace_attention(model, **settings)
    except (TypeError, ValueError) as error:
        words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise UsageError(f"Cannot replace attention ({words}): {one_line(error)}") from error
    # A model of the name retrofit keeps the architecture that it had before.
    made = {"architecture": before, **arguments, "replacement": replacement.record}
    return made, str(replacement)


def weights_name(name: str, model: Any) -> str:
    """What to call the weights that a name carries: no path of a folder."""
    prefix, _, folder = name.partition(":")
    config = model.pretrained_cfg
    if prefix == "local-dir":
        found = [Path(folder) / name for name in ("model.safetensors", "pytorch_model.bin")]
        digest = next((sha256_of(path)[:12] for path in found if path.is_file()), "unknown")
        return f"a local {config.get('architecture')} (SHA-256 {digest})"
    if prefix == "hf-hub" or "." in name:
        return name
    return f"{name}.{config.get('tag')}"


def is_multi_label(model: Any) -> bool:
    """Whether a model's weights say that an image may have several classes."""
    return MULTI_LABEL in (model.pretrained_cfg.get("notes") or ())


def check_input(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Try an input (C, H, W) on the CPU, so that one that does not fit is known at once.

    Raises:
        UserError: With the reason.
    """
    height = shape[1]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    # timm's patch embedding cuts the rest off without a word.
    if isinstance(side, int) and height % side:
        low = height // side * side
        choices = f"{low} or {low + side}" if low else str(side)
        raise UsageError(
            f"img_size={height} is not a multiple of patch_size={side}; use {choices}."
        )
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    except FAILURES as error:
        raise UserError(
            f"The model does not take images of {'x'.join(map(str, shape))}: {one_line(error)}"
        ) from error
    finally:
        model.train(mode)


def _check_name(name: str, *, pretrained: bool) -> None:
    prefix, colon, rest = name.partition(":")
    if colon and prefix == "local-dir":
        if not (Path(rest) / "config.json").is_file():
            raise UserError(
                f"{rest} holds no model: config.json is missing; name a folder such as RUN/best."
            )
        # Folders of ours have a manifest, by which flipped bits are found that would still load.
        listed = pretrained and (Path(rest) / MANIFEST_FILE).is_file()
        if listed and (damage := find_damage(Path(rest))):
            raise UserError(f"{rest} is damaged ({damage}); restore it, or train again.")
    elif not colon and not timm.is_model(name):
        known = timm.list_models()
        raise UsageError(
            f"Unknown model {name!r}{nearest(name.partition('.')[0], known)}; "
            "timm.list_models() has all names."
        )


def _stored_arguments(name: str) -> dict[str, Any]:
    """What a saved folder says about its model; the weights made from it must say it again."""
    prefix, _, folder = name.partition(":")
    if prefix != "local-dir":
        return {}
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    odd = _odd_entry(config)
    if odd is not None:
        raise UserError(f"{path} is no configuration of timm's: {odd}; write the folder again.")
    return dict(config.get("model_args") or {})


def _odd_entry(config: Any) -> str | None:
    """What in a config.json is not as timm and we read it; None if all is."""
    if not isinstance(config, dict):
        return "it holds no mapping"
    if not isinstance(config.get("architecture"), str):
        return "architecture names no model"
    expected = {"num_classes": int, "model_args": dict, "pretrained_cfg": dict}
    for name, kind in (expected | {"label_names": (list, dict)}).items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{name}={str(value)[:40]!r} is of the wrong kind"
    if (config.get("num_classes") or 0) < 0:
        return f"num_classes={config['num_classes']} is below 0"
    source = config.get("pretrained_cfg") or {}
    size = source.get("input_size")
    if size is not None and not (
        isinstance(size, list) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
    ):
        return f"input_size={str(size)[:40]!r} is no list of channels, height and width"
    for name in ("mean", "std"):
        values = source.get(name)
        values = values if isinstance(values, list) else [values]
        if not all(v is None or isinstance(v, (int, float)) for v in values):
            return f"{name}={str(source[name])[:40]!r} is no list of numbers"
    return None
