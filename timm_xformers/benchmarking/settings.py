"""What a benchmark is asked to measure. No torch: the command line reads this."""

from dataclasses import dataclass, field
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
        "tokens": [64, 196, 256, 1024, 4096],
        "batch_size": 2,
        "allocators": ["default", "tuned"],
        "rounds": 7,
        "limit_seconds": 12.0,
    },
    # How time and memory grow, our own layers beside exact attention.
    "growth": {
        "contenders": [
            "performer_relu_m64",
            "performer_softmax_m32",
            "nystrom_l64_conv33",
            "linformer_k256",
            "local1d_w256",
            "local2d_w8_shifted",
            "local2d_w8",
        ],
        "tokens": [1024, 4096, 16384],
        "batch_size": 1,
        "limit_seconds": 20.0,
        "peers": False,
    },
    # Does it run at all, in a minute.
    "quick": {
        "tokens": [64, 256, 1024],
        "batch_size": 2,
        "rounds": 3,
    },
    # Eager, compiled and fused against flash attention, within ten minutes on one GPU.
    "gpu": {
        "contenders": ["performer_relu_m64", "performer_softmax_m64"],
        "shape": "S64",
        "tokens": [256, 1024, 4096],
        "batch_size": 64,
        "dtypes": ["bfloat16", "float32"],
        "modes": ["eager", "compiled", "fused"],
        "device": "cuda",
        "limit_seconds": 12.0,
        "peers": False,
        "memory_tokens": [1024],
    },
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, in the order of the output.

    Attributes:
        output: Folder to create.
        contenders: Names of mechanisms, for layers; the baseline is always there.
        models: Names of timm models; whole models are measured instead of layers if there are any.
        replacements: Titles and, as JSON, arguments of `replace_attention`: the baseline model is
            measured with each of them, too.
        baseline: The model to compare with; None: the first one with exact attention, else the
            first.
        peers: Measure other packages' forms of the same mechanisms too.
        shape: One of `SHAPES`.
        dim: Token width C instead of the shape's.
        num_heads: Heads H instead of the shape's.
        head_dim: Width D of a head instead of the shape's.
        tokens: Sequence lengths of layers.
        img_sizes: Sides of the models' inputs; None: each model's own.
        batch_size: Sequences or images.
        passes: Of `PASSES`.
        modes: Of `MODES`.
        dtypes: Of `DTYPES`: the type of a layer, autocast of a model.
        device: ``cpu`` or ``cuda``; None: the GPU if there is one.
        threads: Numbers of threads, each in a process of its own.
        allocators: Of `ALLOCATORS`.
        rounds: Of every point.
        min_ms: A contender is called in a round as often as this takes.
        limit_seconds: A point ends after so long, but not before three rounds.
        memory: Measure peak memory.
        memory_tokens: Lengths at which memory is measured; None: all.
        seed: Of weights, inputs and order.
    """

    output: Path
    contenders: tuple[str, ...] = CONTENDERS
    models: tuple[str, ...] = ()
    replacements: tuple[tuple[str, str], ...] = ()
    baseline: str | None = None
    peers: bool = True
    shape: str = "S32"
    dim: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    tokens: tuple[int, ...] = (64, 196, 256, 1025, 4096)
    img_sizes: tuple[int, ...] | None = None
    batch_size: int = 8
    passes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    device: str | None = None
    threads: tuple[int, ...] = (1,)
    allocators: tuple[str, ...] = ("default",)
    rounds: int = 7
    min_ms: float = 30.0
    limit_seconds: float = 120.0
    memory: bool = True
    memory_tokens: tuple[int, ...] | None = None
    seed: int = 0


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
