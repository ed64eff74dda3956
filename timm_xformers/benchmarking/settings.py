"""What a benchmark is asked to measure. No torch: the command line reads this."""

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = [
    "ALLOCATORS",
    "BASELINE",
    "CONTENDERS",
    "DTYPES",
    "FUSED",
    "MODES",
    "PASSES",
    "PRESETS",
    "SHAPES",
    "UNFUSED",
    "Contender",
    "Point",
    "Settings",
    "flags",
]

PASSES = ("forward", "backward", "train")
# PyTorch's operations as they are, through torch.compile, and our GPU kernels at any length.
MODES = ("eager", "compiled", "fused")
# Names of the mechanisms that have such kernels, as a shell pattern.
FUSED = "performer_[!l]*"
DTYPES = ("float32", "bfloat16", "float16")
ALLOCATORS = ("default", "tuned")
# Exact attention through timm's own layer, by PyTorch's fused kernels and with the map formed.
BASELINE, UNFUSED = "softmax", "softmax_unfused"
CONTENDERS = (
    UNFUSED,
    "performer_relu_m64",
    "performer_softmax_m32",
    "nystrom_l64_conv33",
    "linformer_k256",
    "local1d_w256",
    "local2d_w8_shifted",
)
# Name -> token width, heads, width of a head.
SHAPES = {"S32": (128, 4, 32), "S64": (128, 4, 64), "B16": (384, 6, 64)}
# Name -> settings that go under those of the command line.
PRESETS: dict[str, dict[str, Any]] = {
    # The README's table and plots: both allocators, within ten minutes on two cores.
    "readme": {
        "tokens": (64, 196, 256, 1024, 4096),
        "batch_size": 2,
        "allocators": ("default", "tuned"),
        "rounds": 7,
        "limit_seconds": 12.0,
    },
    # How time and memory grow, our own layers beside exact attention.
    "growth": {
        "contenders": (
            "performer_relu_m64",
            "performer_softmax_m32",
            "nystrom_l64_conv33",
            "linformer_k256",
            "local1d_w256",
            "local2d_w8_shifted",
            "local2d_w8",
        ),
        "tokens": (1024, 4096, 16384),
        "batch_size": 1,
        "limit_seconds": 20.0,
        "peers": False,
    },
    # Does it run at all, in a minute.
    "quick": {
        "tokens": (64, 256, 1024),
        "batch_size": 2,
        "rounds": 3,
    },
    # Eager, compiled and fused against flash attention, within ten minutes on one GPU.
    "gpu": {
        "contenders": ("performer_relu_m64", "performer_softmax_m64"),
        "shape": "S64",
        "tokens": (256, 1024, 4096),
        "batch_size": 64,
        "dtypes": ("bfloat16", "float32"),
        "modes": ("eager", "compiled", "fused"),
        "device": "cuda",
        "limit_seconds": 12.0,
        "peers": False,
        "memory_tokens": (1024,),
    },
}


def _flag(
    default: Any, kind: type[Any], meaning: str, *, flag: str = "", choices: Sequence[str] = ()
) -> Any:
    """A field that a flag of the command line sets, by words of a type, of ``choices`` if any."""
    metadata = {"kind": kind, "meaning": meaning, "flag": flag, "choices": tuple(choices)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, in the order of the output; the flags say what each field means.

    Attributes:
        output: Folder to create.
        replacements: Titles and, as JSON, arguments of `replace_attention`: the baseline model is
            measured with each of them, too.
        peers: Measure other packages' forms of the same mechanisms too.
        min_ms: A contender is called in a round as often as this takes.
        memory: Measure peak memory.
    """

    output: Path
    contenders: tuple[str, ...] = _flag(
        CONTENDERS,
        str,
        f"mechanisms to time as layers, default {' '.join(CONTENDERS)}; the baseline, exact "
        "attention, is always timed too",
    )
    models: tuple[str, ...] = _flag((), str, "whole models instead of layers, by timm names")
    replacements: tuple[tuple[str, str], ...] = ()
    baseline: str | None = _flag(
        None, str, "model that speed-ups are relative to; default the first exact one"
    )
    peers: bool = True
    shape: str = _flag(
        "S32",
        str,
        f"of {', '.join(SHAPES)}; default S32: 128 wide, 4 heads of 32",
        choices=tuple(SHAPES),
    )
    dim: int | None = _flag(None, int, "token width, instead of the shape's")
    num_heads: int | None = _flag(None, int, "number of heads, instead of the shape's")
    head_dim: int | None = _flag(None, int, "width of a head, instead of the shape's")
    tokens: tuple[int, ...] = _flag(
        (64, 196, 256, 1025, 4096),
        int,
        "sequence lengths of layers, default 64 196 256 1025 4096",
    )
    img_sizes: tuple[int, ...] | None = _flag(
        None, int, "image sizes of models in pixels, default each model's own", flag="img-size"
    )
    batch_size: int = _flag(8, int, "sequences or images, default 8")
    passes: tuple[str, ...] = _flag(
        (),
        str,
        f"of {' '.join(PASSES)} (train: forward, backward and AdamW); default forward backward "
        "for layers, forward train for models",
        choices=PASSES,
    )
    modes: tuple[str, ...] = _flag(
        ("eager",),
        str,
        f"of {' '.join(MODES)} (fused: our Triton kernels, which the other modes do not use); "
        "default eager",
        choices=MODES,
    )
    dtypes: tuple[str, ...] = _flag(
        ("float32",),
        str,
        f"of {' '.join(DTYPES)}, models by autocast; default float32",
        choices=DTYPES,
    )
    device: str | None = _flag(
        None, str, "cpu or cuda; default the GPU if there is one", choices=("cpu", "cuda")
    )
    threads: tuple[int, ...] = _flag(
        (1,), int, "CPU threads, default 1, timed by CPU time; more, by wall clock"
    )
    allocators: tuple[str, ...] = _flag(
        ("default",),
        str,
        f"settings of glibc's allocator, of {' '.join(ALLOCATORS)}",
        flag="allocator",
        choices=ALLOCATORS,
    )
    rounds: int = _flag(
        7, int, "repetitions, default 7; in each, every contender runs once, in random order"
    )
    min_ms: float = 30.0
    limit_seconds: float = _flag(
        120.0, float, "time limit of a setting, after three rounds; default 120"
    )
    memory: bool = True
    memory_tokens: tuple[int, ...] | None = _flag(
        None, int, "lengths whose peak memory is measured, default all"
    )
    seed: int = _flag(0, int, "of weights, inputs and order, default 0")


def flags() -> dict[str, Field[Any]]:
    """Fields that flags of the command line set, by flag."""
    return {
        known.metadata["flag"] or known.name.replace("_", "-"): known
        for known in fields(Settings)
        if "flag" in known.metadata
    }


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What takes part.

    Attributes:
        name: Mechanism or model of ours or timm's.
        peer: Package whose form of the mechanism takes its place; empty: none.
        mode: One of `MODES`.
        title: What to call it instead of its name.
        kwargs: Further arguments of a model.
        replacement: Arguments of `replace_attention`, as JSON, for a model; empty: none.
    """

    name: str
    peer: str = ""
    mode: str = "eager"
    title: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    replacement: str = ""

    @property
    def kind(self) -> str:
        """What its colour stands for: a mechanism, a model or a replacement."""
        return self.title or self.name

    @property
    def label(self) -> str:
        """Name for people; no two contenders of a point share it."""
        if self.title:
            return self.title
        name = f"{self.peer}: {self.name}" if self.peer else self.name
        return name if self.mode == "eager" else f"{name}, {self.mode}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where contenders meet: one set of rounds. Fields are as in `Settings`, but one of each.

    Attributes:
        kind: ``layer`` or ``model``; models have no shape.
        size: Tokens of a layer; side of a model's input, or 0 for its own.
        task: One of `PASSES`.
    """

    kind: str
    shape: str = ""
    dim: int = 0
    num_heads: int = 0
    head_dim: int = 0
    size: int
    batch_size: int
    task: str
    dtype: str
    device: str
    threads: int
    allocator: str
