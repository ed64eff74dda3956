"""The points and contenders of a benchmark, and what does not fit together."""

import dataclasses
import fnmatch
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention

from timm_xformers.benchmarking.layers import build_sized, square_grid
from timm_xformers.benchmarking.peers import peers_of
from timm_xformers.benchmarking.settings import (
    BASELINE,
    FUSED,
    SHAPES,
    UNFUSED,
    Contender,
    Point,
    Settings,
    flags,
)
from timm_xformers.errors import UsageError, nearest
from timm_xformers.layers.factory import ATTENTION
from timm_xformers.layers.performer.triton.choice import shared_memory
from timm_xformers.layers.softmax import SoftmaxAttention
from timm_xformers.training.build import build_model, check_input

__all__ = ["baseline_of", "check", "contenders_of", "points_of"]


def check(settings: Settings) -> Settings:
    """Refuse what cannot be measured, before anything is.

    Returns:
        The settings, with a device if they had none.

    Raises:
        UsageError: In one sentence.
    """
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = dataclasses.replace(settings, device=device)
    for flag, field in flags().items():
        given = getattr(settings, field.name)
        known = field.metadata["choices"]
        for value in given if isinstance(given, tuple) else (given,):
            if known and value not in known:
                raise UsageError(
                    f"--{flag} {value!r} is unknown{nearest(value, known)}; choose from "
                    f"{', '.join(known)}."
                )
            if isinstance(value, int) and value < 1 and flag != "seed":
                raise UsageError(f"--{flag} {value} is out of range; use 1 or more.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU, and there is none; use --device cpu.")
    if "fused" in settings.modes and not shared_memory(device, 0 if device == "cuda" else None):
        raise UsageError(
            "--modes fused needs a GPU of compute capability 8.0 or more and Triton that works "
            "with it; use --modes eager compiled."
        )
    if device == "cpu" and "float16" in settings.dtypes:
        raise UsageError(
            "--dtypes float16 needs a GPU, which --device cuda asks for; use float32 or bfloat16."
        )
    if settings.models:
        _check_models(settings)
    else:
        _check_layers(settings)
    return settings


def _check_layers(settings: Settings) -> None:
    if "train" in settings.passes:
        raise UsageError("--passes train needs whole models; name some by --models, or drop it.")
    if settings.baseline is not None:
        raise UsageError(
            "--baseline chooses among --models; layers are compared with timm's exact attention."
        )
    known = [*ATTENTION, UNFUSED]
    for name in settings.contenders:
        if name not in known:
            raise UsageError(
                f"Unknown contender {name!r}{nearest(name, known)}; `timm-xformers models "
                f"--attention` lists all, beside {UNFUSED}."
            )
        if not name.startswith("local2d"):
            continue
        window = ATTENTION[name][1]["window_size"]
        for tokens in settings.tokens:
            try:
                side, _ = square_grid(tokens)
            except ValueError:
                raise UsageError(
                    f"{name} needs a square grid, which {tokens} tokens are not, with or without "
                    "class tokens; use --tokens 64, 196, 256, 1025 and the like, or drop it."
                ) from None
            if window > side:
                raise UsageError(
                    f"{name} has windows of {window}x{window}, which do not fit the {side}x{side} "
                    f"grid of {tokens} tokens; use {window * window} tokens or more, or drop it."
                )


def _check_models(settings: Settings) -> None:
    for name, size in itertools.product(settings.models, settings.img_sizes or (None,)):
        # Weights are built too: what fails must fail before anything is measured.
        model, expects = build_sized(name, size)
        check_input(model, expects.shape)
    if settings.baseline is not None and settings.baseline not in settings.models:
        raise UsageError(
            f"--baseline {settings.baseline!r} is none of the models measured"
            f"{nearest(settings.baseline, settings.models)}; add it to --models."
        )


def contenders_of(settings: Settings) -> list[Contender]:
    """Who takes part, the baseline first, every peer after what it is a peer of."""
    if settings.models:
        first = baseline_of(settings).name
        names = list(dict.fromkeys([first, *settings.models]))
        mechanism = {name: _mechanism(name) for name in names}
    else:
        names = list(dict.fromkeys([BASELINE, *settings.contenders]))
        mechanism = {name: name for name in names}
    found = []
    for name in names:
        packages = [peer.package for peer in peers_of(mechanism[name])] if settings.peers else []
        kernels = fnmatch.fnmatchcase(mechanism[name], FUSED)
        for package, mode in itertools.product(["", *packages], _modes(settings)):
            if mode != "fused" or (kernels and not package):
                found.append(Contender(name=name, peer=package, mode=mode))
    for title, record in settings.replacements:
        for mode in _modes(settings):
            found.append(Contender(name=names[0], mode=mode, replacement=record, title=title))
    return found


def _modes(settings: Settings) -> tuple[str, ...]:
    """Those asked for, and one for what has no kernels of ours."""
    return ("eager", "fused") if settings.modes == ("fused",) else settings.modes


def baseline_of(settings: Settings) -> Contender:
    """What everything is compared with: eager, unless only compiled code is measured."""
    mode = "eager" if "eager" in _modes(settings) else "compiled"
    if not settings.models:
        return Contender(name=BASELINE, mode=mode)
    exact = (name for name in settings.models if _is_exact(name))
    name = settings.baseline or next(exact, settings.models[0])
    return Contender(name=name, mode=mode)


def _mechanism(name: str) -> str:
    return str(getattr(_empty(name), "attn_layer", ""))


def _is_exact(name: str) -> bool:
    return any(isinstance(m, (Attention, SoftmaxAttention)) for m in _empty(name).modules())


def _empty(name: str) -> Any:
    with torch.device("meta"):
        return build_model(name)[0]


def points_of(settings: Settings) -> list[Point]:
    """Where they meet; points of one process follow each other."""
    dim, num_heads, head_dim = SHAPES[settings.shape]
    own = [settings.dim, settings.num_heads, settings.head_dim]
    dim, num_heads = settings.dim or dim, settings.num_heads or num_heads
    head_dim = settings.head_dim or head_dim
    shape = settings.shape if own == [None] * 3 else f"{dim}-{num_heads}x{head_dim}"
    layer: dict[str, Any] = {
        "kind": "layer",
        "shape": shape,
        "dim": dim,
        "num_heads": num_heads,
        "head_dim": head_dim,
    }
    sizes: Sequence[int] = sorted(set(settings.tokens))
    passes = settings.passes or ("forward", "backward")
    if settings.models:
        layer = {"kind": "model"}
        sizes = sorted(set(settings.img_sizes or (0,)))
        passes = settings.passes or ("forward", "train")
    return [
        Point(
            **layer,
            size=size,
            batch_size=settings.batch_size,
            task=task,
            dtype=dtype,
            device=settings.device or "cpu",
            threads=threads,
            allocator=allocator,
        )
        for allocator, threads, dtype, task, size in itertools.product(
            settings.allocators, settings.threads, settings.dtypes, passes, sizes
        )
    ]
