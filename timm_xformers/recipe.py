"""Every setting of a run: typed fields with bounds, read from YAML and the command line.

Precedence: command line over recipe file over the defaults below. Reading imports no torch, so that
a mistake in a recipe is reported at once. ``timm-xformers recipe`` prints what is said here.
"""

# ruff: noqa: RUF009  (fields made by a function of ours)

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_xformers.errors import UsageError, nearest
from timm_xformers.files.atomic import write_text
from timm_xformers.files.yaml_text import dump_yaml, parse_yaml

__all__ = [
    "NO_INFLUENCE",
    "NO_LABELS",
    "Recipe",
    "allowed",
    "find_settings",
    "load_recipe",
    "override",
    "parse_assignments",
    "read_settings",
    "shipped_recipes",
    "shipped_spaces",
    "weights_of",
]

# Settings that do not shape the result.
NO_INFLUENCE = (
    *("seed", "output", "data_dir", "download"),
    *("num_workers", "num_processes", "fsdp", "checkpoint_minutes", "trackers"),
)
# Fields that came after the first published hashes: at these values they are left out of a hash.
CAME_LATER: dict[str, Any] = {
    "patch_drop_rate": 0.0,
    "labels": None,
    "multi_label": False,
    "loss": "cross_entropy",
    "class_weights": None,
    "max_steps": None,
    "max_seconds": None,
    "replace": {},
    "teacher": None,
    "align_epochs": 0,
    "teacher_loss": {},
}
# The value of ``labels`` for images without any.
NO_LABELS = "none"
# Terms of the loss against a teacher, and their weights where `teacher_loss` does not say others.
TEACHER_TERMS = {"features": 1.0, "logits": 1.0, "labels": 0.0}
# Arguments of timm.create_model that settings of their own decide, or that no recipe may set.
NOT_MODEL_KWARGS = (
    *("img_size", "in_chans", "num_classes", "pretrained", "drop_path_rate"),
    *("checkpoint_path", "model_name", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
    *("scriptable", "exportable", "no_jit"),
)
# Those of accelerate whose packages are called like the tracker.
TRACKERS = ("tensorboard", "wandb", "mlflow", "aim", "comet_ml", "clearml", "dvclive")
LARGEST = 2**31 - 1
# Values that one setting may hold, and how deep they may lie in each other.
MOST_VALUES, DEEPEST = 10_000, 20


def _setting(
    default: Any,
    meaning: str,
    *,
    low: float = -math.inf,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field with its meaning, checked against a range (``above``: an open end) or words."""
    if high is None:
        high = LARGEST if isinstance(low, int) else math.inf
    metadata = {
        "meaning": meaning,
        "low": low if above is None else above,
        "high": high,
        "open_low": above is not None,
        "choices": tuple(choices),
    }
    if isinstance(default, (dict, list)):
        kind: Any = type(default)
        return dataclasses.field(default_factory=kind, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one run. Zero switches a technique off wherever it can be off."""

    model: str = _setting(
        "hybrid_vix_performer_softmax_m32",
        "Name for timm.create_model, local-dir:FOLDER, hf-hub:OWNER/NAME, or a run folder.",
    )
    model_kwargs: dict[str, Any] = _setting(
        {}, "Further arguments of the model, such as {patch_size: 4} or {attn_layer: nystrom_l64}."
    )
    pretrained: bool | None = _setting(
        None,
        "Start from the model's published weights. null: if the name carries some: a tag "
        "(NAME.TAG), a folder or the Hub.",
    )

    replace: dict[str, Any] = _setting(
        {},
        "Attention to put in the place of the model's own, weights kept: arguments of "
        "timm_xformers.replace_attention, such as {mechanism: performer_softmax_m64, blocks: 2-10}."
        " {}: none.",
    )
    teacher: str | None = _setting(
        None,
        "Model whose final features and logits training matches, named like model: what model was "
        "before replace, or another. Its weights stay. null: training goes by labels.",
    )
    align_epochs: int = _setting(
        0,
        "With a teacher: first so many of the epochs, or that share of a budget, match only the "
        "output of each layer of attention that differs from the teacher's, given the teacher's "
        "input; only these layers train. The schedule runs anew in each of the two parts.",
        low=0,
    )
    teacher_loss: dict[str, Any] = _setting(
        {},
        "Weights of the terms of the loss against a teacher: features (squared error over the "
        "teacher's mean square), logits (Kullback-Leibler divergence) and labels (loss). {}: "
        "{features: 1, logits: 1, labels: 0}, which reads no labels.",
    )

    data: str = _setting(
        "digits",
        "digits, mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet, folder, or a timm scheme "
        "such as hfds/NAME.",
    )
    data_dir: str | None = _setting(None, "Where the data set lies; digits needs none.")
    labels: str | None = _setting(
        None,
        "Where the labels stand, if not in the names of folders: a CSV file of image and class for "
        "a folder of images, or a column of a Hub data set. null: class folders, or the usual "
        "column. none: nowhere; a teacher then says what is right.",
    )
    multi_label: bool = _setting(
        False,
        "Several classes an image, or none: from a label file with a column of 0 and 1 for each "
        "class, or with one column of names and bars, semicolons, commas or spaces between them. "
        "Needs loss=bce.",
    )
    train_split: str | None = _setting(None, "Name of the split. null: the usual ones are tried.")
    val_split: str | None = _setting(None, "Name of the split. null: the usual ones are tried.")
    test_split: str | None = _setting(
        None,
        "Name of the split. null: the usual ones are tried; none: the test set is not read.",
    )
    download: bool = _setting(
        False, "Let torchvision download the set into data_dir if it is not there."
    )
    classes: list[Any] | None = _setting(
        None, "Classes to keep, by name or label, numbered anew in this order. null: all."
    )
    limit: int | None = _setting(
        None,
        "Most training images to use, the same share of every class and the same ones for every "
        "seed; validation and test images stay all. null: all.",
        low=1,
    )
    unreadable: str = _setting(
        "error",
        "Images that cannot be read: stop and name them, or leave them out and say so.",
        choices=("error", "skip"),
    )
    in_memory: bool | None = _setting(
        None,
        "Decode everything once to uint8 and augment in batches. null: if that takes at most 1 "
        "GiB.",
    )
    normalize: str = _setting(
        "data",
        "Whose mean and standard deviation the pixels are scaled by: the data's, or those of the "
        "model's configuration; pretrained weights always get theirs.",
        choices=("data", "model"),
    )
    img_size: int | None = _setting(
        None,
        "Side of the square input in pixels. null: the data set's own, or the model's.",
        low=1,
        high=16384,
    )
    in_chans: int | None = _setting(None, "Colour channels. null: as the data set has them.", low=1)
    num_classes: int | None = _setting(
        None, "Width of the classifier. null: as many as the data set has classes.", low=2
    )
    val_fraction: float = _setting(
        0.1,
        "Stratified share of the training set that chooses the best epoch. 0: keep the last epoch.",
        low=0.0,
        high=0.5,
    )

    epochs: int = _setting(
        30,
        "Passes over the training images. 0, with replace alone: the model is measured and kept as "
        "it is.",
        low=0,
    )
    max_steps: int | None = _setting(
        None,
        "End after so many optimiser updates, wherever in an epoch; the schedule ends there.",
        low=1,
    )
    max_seconds: float | None = _setting(
        None,
        "End after so many processor seconds of training, summed over threads; the schedule "
        "follows the time used. Two such runs are not equal to the bit.",
        above=0.0,
    )
    batch_size: int = _setting(64, "Micro-batch: images per process and forward pass.", low=1)
    stages: list[dict[str, float]] = _setting(
        [],
        "Progressive resizing: other image sides, batch sizes and patch_drop_rate from an epoch on,"
        " such as [{epoch: 1, img_size: 14, batch_size: 256}, {epoch: 21, img_size: 28}].",
    )
    grad_accum_steps: int = _setting(
        1, "Micro-batches whose gradients are averaged before one update.", low=1
    )
    opt: str = _setting("adamw", "Name of a timm optimiser.")
    opt_kwargs: dict[str, Any] = _setting(
        {}, "Further arguments of it, such as {betas: [0.9, 0.95]}."
    )
    lr: float = _setting(1e-3, "Peak learning rate.", above=0.0)
    weight_decay: float = _setting(0.05, "Weight decay.", low=0.0)
    layer_decay: float = _setting(
        1.0,
        "Factor on the learning rate from each layer to the one before it. 1: the same for all.",
        above=0.0,
        high=1.0,
    )
    sched: str = _setting(
        "cosine",
        "timm's learning-rate schedule, stepped at every update.",
        choices=("cosine", "tanh", "poly", "step", "multistep", "wsd", "none"),
    )
    sched_kwargs: dict[str, Any] = _setting({}, "Further arguments of the schedule.")
    warmup_epochs: float = _setting(1.0, "Epochs of linear warm-up.", low=0.0)
    min_lr: float = _setting(1e-6, "Learning rate at the end of the schedule.", low=0.0)

    loss: str = _setting(
        "cross_entropy",
        "Training loss: cross-entropy, or bce, binary cross-entropy of each class against the "
        "rest (sigmoid), as in timm's --bce-loss.",
        choices=("cross_entropy", "bce"),
    )
    class_weights: str | dict[str, Any] | None = _setting(
        None,
        "Factor of each class on the training loss: balanced (images / (classes * images of the "
        "class)), or a mapping such as {cat: 2, dog: 1}, where classes left out have 1. With "
        "multi_label on the loss of images that have the class; balanced: images without it over "
        "images with it.",
    )
    smoothing: float = _setting(
        0.0, "Label smoothing; with multi_label of each mark, towards a half.", low=0.0, high=0.9
    )
    mixup: float = _setting(0.0, "Beta parameter of mixup.", low=0.0)
    cutmix: float = _setting(0.0, "Beta parameter of CutMix.", low=0.0)
    clip_grad: float = _setting(0.0, "Largest norm of the gradient.", low=0.0)
    drop_path_rate: float = _setting(0.0, "Stochastic depth.", low=0.0, high=0.9)
    patch_drop_rate: float = _setting(
        0.0,
        "Share of an image's tokens, others at every step, that training leaves out: 0.5 halves "
        "the work of a step. For models that can do without the rest of the grid.",
        low=0.0,
        high=0.9,
    )
    model_ema_decay: float = _setting(
        0.0,
        "Decay per update of averaged weights, which are then evaluated and kept in best/.",
        low=0.0,
        high=0.99999,
    )
    mixed_precision: str = _setting(
        "no", "Precision of the forward pass.", choices=("no", "bf16", "fp16")
    )
    channels_last: bool = _setting(False, "Memory format channels_last, which convolutions like.")
    grad_checkpointing: bool = _setting(
        False, "Recompute activations in the backward pass instead of keeping them."
    )
    compile: bool = _setting(
        False, "Use torch.compile: a minute or more at first, faster steps then."
    )

    hflip: float = _setting(0.0, "Probability of a horizontal flip.", low=0.0, high=1.0)
    re_prob: float = _setting(0.0, "Probability of random erasing.", low=0.0, high=1.0)
    crop_pad: int = _setting(
        0, "In memory only: largest random shift in pixels.", low=0, high=16384
    )
    rotate_degrees: float = _setting(
        0.0, "In memory only: largest rotation in degrees.", low=0.0, high=180.0
    )
    shear_degrees: float = _setting(
        0.0, "In memory only: largest shear in degrees.", low=0.0, high=60.0
    )
    zoom: float = _setting(
        0.0,
        "In memory only: largest zoom as a share (0.1: between 1 / 1.1 and 1.1).",
        low=0.0,
        high=1.0,
    )
    cutout: int = _setting(
        0, "In memory only: side in pixels of a square cut out of each image.", low=0, high=16384
    )
    rand_augment: str | None = _setting(
        None,
        "In memory only: policy for colours and shapes: trivial, n2-m9 (two operations of strength "
        "9 of 30) and the like, or autoaugment-cifar10.",
    )
    min_crop_area: float = _setting(
        0.5,
        "From files only: smallest share of the image that a random crop keeps.",
        above=0.0,
        high=1.0,
    )
    color_jitter: float = _setting(
        0.0, "From files only: strength of colour jitter.", low=0.0, high=10.0
    )
    auto_augment: str | None = _setting(
        None, "From files only: a policy in timm's notation, such as rand-m9-mstd0.5."
    )

    num_processes: int | None = _setting(
        None, "Processes that the run must have. null: as many as the launcher started.", low=1
    )
    fsdp: bool = _setting(
        False,
        "Shard weights, gradients and optimiser state over the processes (FSDP2), for models that "
        "do not fit one device; needs several processes with a GPU each.",
    )
    checkpoint_minutes: float = _setting(
        10.0,
        "Save the state within an epoch too, whenever so many minutes have passed since it was "
        "last saved. 0: only after each epoch.",
        low=0.0,
    )
    num_workers: int = _setting(
        2, "Worker processes that decode image files; at most one a core is started.", low=0
    )
    seed: int = _setting(0, "Seed of everything random.", low=0, high=2**63 - 1)
    trackers: list[str] | None = _setting(
        None,
        "Where figures go besides the run folder. null: TensorBoard if it is installed; []: "
        "nowhere.",
        choices=TRACKERS,
    )
    output: str | None = _setting(None, "Run folder. null: runs/MODEL-DATA-N.")

    def __post_init__(self) -> None:
        """Check types and bounds.

        Raises:
            UsageError: The first field that does not fit, with what it allows.
        """
        hints = _hints()
        for field in dataclasses.fields(self):
            _check(field, hints[field.name], getattr(self, field.name))
        for name in self.model_kwargs:
            if name in NOT_MODEL_KWARGS:
                instead = f"write {name}=..." if name in hints else "name the weights by model"
                raise UsageError(f"model_kwargs may not hold {name}; {instead} instead.")
        _check_stages(self)
        _check_class_weights(self.class_weights)
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UsageError(
                f"batch_size={self.batch_size} is odd, and mixup and cutmix pair the images of a "
                "batch; use an even batch_size."
            )
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"warmup_epochs={self.warmup_epochs:g} is longer than epochs={self.epochs}; "
                "lower it."
            )
        if self.min_lr > self.lr and self.sched != "none":
            raise UsageError(
                f"min_lr={self.min_lr:g}, where the schedule ends, is above lr={self.lr:g}; lower "
                "min_lr."
            )
        if self.max_steps and self.max_seconds:
            raise UsageError("max_steps and max_seconds are two budgets; use one of them.")
        _check_multi_label(self)
        _check_teacher(self)
        _check_unlabelled(self)

    @property
    def unlabelled(self) -> bool:
        """Whether the images come without labels."""
        return self.labels == NO_LABELS

    @property
    def starts_pretrained(self) -> bool:
        """Whether training starts from weights: as ``pretrained`` says, else as the name does."""
        if self.pretrained is not None:
            return self.pretrained
        prefix, colon, _ = self.model.partition(":")
        return prefix in ("local-dir", "hf-hub") if colon else "." in self.model

    @property
    def teacher_weights(self) -> dict[str, float]:
        """Weight of each term of the loss against a teacher."""
        return {name: float(value) for name, value in (TEACHER_TERMS | self.teacher_loss).items()}

    @property
    def digest(self) -> str:
        """Hash of what shapes the result, equal for runs that differ in seed, paths or workers."""
        values = dataclasses.asdict(self) | {"pretrained": self.starts_pretrained}
        for name, hint in _hints().items():
            if hint is float:
                values[name] = float(values[name])  # 1 and 1.0 are one setting
        for name in NO_INFLUENCE:
            del values[name]
        if self.labels is not None:
            values["labels"] = Path(self.labels).name  # wherever the file lies
        for name, off in CAME_LATER.items():
            if values[name] == off:
                del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write every field as YAML."""
        write_text(path, dump_yaml(dataclasses.asdict(self)))


# What a value of each type is called in messages.
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list such as [name, name]",
    dict: "a mapping such as {name: value}",
    type(None): "null",
}


def _kinds(hint: Any) -> list[Any]:
    """Types that an annotation allows, without what they hold."""
    union = isinstance(hint, types.UnionType)
    return [typing.get_origin(k) or k for k in (typing.get_args(hint) if union else (hint,))]


def _range(bounds: Mapping[str, Any]) -> str:
    low, high = bounds["low"], bounds["high"]
    parts = []
    if low > -math.inf:
        parts.append(f"above {low:g}" if bounds["open_low"] else f"at least {low:g}")
    if high < math.inf:
        parts.append(f"at most {high:.10g}")
    return " and ".join(parts)


def allowed(field: "dataclasses.Field[Any]") -> str:
    """What a setting takes, in words: types, range, choices."""
    kinds = _kinds(_hints()[field.name])
    words = " or ".join(WORDS[kind] for kind in kinds)
    if choices := field.metadata["choices"]:
        return f"{words}: {', '.join(choices)}"
    if bounds := _range(field.metadata):
        return f"{words}, {bounds}"
    return words


def _check(field: "dataclasses.Field[Any]", hint: Any, value: Any) -> None:
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return
    accepted = tuple({*kinds, int} if float in kinds else kinds)
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join(WORDS[kind] for kind in kinds)
        raise UsageError(f"{field.name}={_short(value)} has the wrong type; it takes {words}.")
    _check_plain(field.name, value)
    if isinstance(value, dict) and field.name != "class_weights":
        for key in value:
            if not key.isidentifier():
                raise UsageError(
                    f"{field.name} has the key {key!r}, which is no name; in YAML a space follows "
                    "the colon: {patch_size: 4}."
                )
    bounds = field.metadata
    for word in value if isinstance(value, list) else [value]:
        if bounds["choices"] and word not in bounds["choices"]:
            raise UsageError(
                f"{field.name}={_short(word)} is unknown; use {', '.join(bounds['choices'])}."
            )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = bounds["low"], bounds["high"]
        below = value <= low if bounds["open_low"] else value < low
        if below or value > high or not math.isfinite(value):
            raise UsageError(
                f"{field.name}={_short(value)} is out of range; use a number "
                f"{_range(bounds) or 'that is finite'}."
            )


def _check_plain(name: str, value: Any) -> None:
    """Refuse what JSON has no word for, endless structures and numbers beyond 64 bits."""
    pending, count = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise UsageError(f"{name} holds too many values, or too deep; settings are short.")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise UsageError(f"{name} has the key {_short(key)}, which is no text.")
            pending += [(each, depth + 1) for each in item.values()]
        elif isinstance(item, (list, tuple)):
            pending += [(each, depth + 1) for each in item]
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise UsageError(f"{name}={_short(item)} is out of range; use at most 2^63 - 1.")
        elif isinstance(item, str) and "\0" in item:
            raise UsageError(f"{name}={_short(item)} has a null character; drop it.")
        elif not isinstance(item, (str, int, float, type(None))):
            raise UsageError(
                f"{name} holds {_short(item)}, which is neither text nor a number; quote it."
            )


def _check_stages(recipe: Recipe) -> None:
    known = {"epoch": recipe.epochs, "img_size": 16384, "batch_size": LARGEST}
    before = 0
    for entry in recipe.stages:
        for key, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
            whole = type(value) is int and 1 <= value <= known.get(key, 0)
            share = key == "patch_drop_rate" and type(value) in (int, float) and 0 <= value <= 0.9
            if not (whole or share):
                raise UsageError(
                    f"stages has {key}={_short(value)}; an entry takes epoch (1 to "
                    f"{recipe.epochs}), img_size, batch_size and patch_drop_rate (0 to 0.9), such "
                    "as {epoch: 1, img_size: 14}."
                )
        if entry.get("epoch", 0) <= before:
            raise UsageError(
                f"stages has {entry} after epoch {before}; each entry names its first epoch, in "
                "rising order."
            )
        before = int(entry["epoch"])
        if (recipe.mixup or recipe.cutmix) and entry.get("batch_size", 2) % 2:
            raise UsageError(f"stages has {entry}, and mixup needs an even batch_size.")


def _check_teacher(recipe: Recipe) -> None:
    """Refuse what has no meaning with a teacher, or without one."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    if recipe.teacher is None:
        for name in ("align_epochs", "teacher_loss"):
            if getattr(recipe, name):
                raise UsageError(f"{name} is about a teacher, and there is none; set teacher=NAME.")
        return
    for name, value in recipe.teacher_loss.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in TEACHER_TERMS or not number or not 0 <= value < math.inf:
            raise UsageError(
                f"teacher_loss has {name}: {_short(value)}; it takes weights of at least 0 for "
                f"{', '.join(TEACHER_TERMS)}."
            )
    if recipe.align_epochs > recipe.epochs:
        raise UsageError(
            f"align_epochs={recipe.align_epochs} is more than epochs={recipe.epochs}, of which "
            "they are the first; lower it."
        )
    if not any(recipe.teacher_weights.values()):
        raise UsageError("teacher_loss has the weight 0 for all terms; raise one.")
    if not recipe.teacher_weights["labels"]:
        for name in ("loss", "class_weights", "smoothing"):
            if getattr(recipe, name) != defaults[name]:
                raise UsageError(
                    f"{name} is about the labels, which have the weight 0 with a teacher; drop it, "
                    "or set teacher_loss.labels=1."
                )
    if recipe.fsdp:
        raise UsageError("A teacher does not go with fsdp=true; use fsdp=false.")
    if any("img_size" in entry for entry in recipe.stages):
        raise UsageError(
            "A teacher has one image size, so stages may change batch_size and patch_drop_rate "
            "only; drop img_size."
        )


def _check_multi_label(recipe: Recipe) -> None:
    """Refuse what takes each image for one of one class."""
    if not recipe.multi_label:
        return
    if recipe.loss != "bce":
        raise UsageError(
            f"loss={recipe.loss} is for one class an image, and multi_label=true for several; use "
            "loss=bce."
        )
    if recipe.classes is not None:
        raise UsageError(
            "classes keeps the images of some classes, which multi_label=true does not; drop it, "
            "or leave columns out of the label file."
        )
    if recipe.teacher is not None:
        raise UsageError(
            "A teacher is matched by softmax, for one class an image; drop teacher, or multi_label."
        )


def _check_unlabelled(recipe: Recipe) -> None:
    """Refuse what needs labels where there are none."""
    if not recipe.unlabelled:
        return
    if recipe.teacher is not None and recipe.teacher_weights["labels"]:
        raise UsageError(
            "teacher_loss gives the labels a weight, and labels=none says that there are none; "
            "leave that term out, or name a file of labels."
        )
    if recipe.classes is not None:
        raise UsageError("classes goes by labels, and labels=none says there are none; drop it.")


def _check_class_weights(weights: str | dict[str, Any] | None) -> None:
    if isinstance(weights, str) and weights != "balanced":
        raise UsageError(
            f"class_weights={_short(weights)} is unknown; use balanced, or a mapping such as "
            "{cat: 2, dog: 1}."
        )
    for name, value in weights.items() if isinstance(weights, dict) else ():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise UsageError(
                f"class_weights has {name}: {_short(value)}; use a number above 0 for each class."
            )


def _short(value: Any) -> str:
    """A value as Python writes it, cut to what fits a sentence."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 19 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def load_recipe(source: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """Build a recipe from a file and values that go over it.

    Args:
        source: Path of a YAML file, or the name of a shipped recipe; None takes the defaults.
        overrides: Field names to values; ``model_kwargs.patch_size`` reaches into a mapping.

    Raises:
        UsageError: No such recipe, an unknown key, a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    if source is not None:
        values = read_settings(find_settings(source, shipped_recipes(), "recipe"))
    return _build(values, overrides)


def override(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with other values, given as to `load_recipe`.

    Raises:
        UsageError: An unknown key, a value of the wrong type or out of range.
    """
    return _build(dataclasses.asdict(recipe), values)


def _build(values: dict[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if "epochs" in overrides:
        _shorten(values, values.get("epochs", Recipe.epochs), overrides["epochs"])
    for key, value in overrides.items():
        name, _, entry = str(key).partition(".")
        if entry:
            known = values.get(name) or {}
            values[name] = {**known, entry: value} if isinstance(known, dict) else known
        else:
            values[key] = value
    for key in values:
        if key not in fields:
            raise UsageError(
                f"The recipe has no setting {_short(key)}{nearest(str(key), fields)}; an argument "
                f"of the model is set as model_kwargs.{str(key)[:40]}, and `timm-xformers recipe` "
                "explains all settings."
            )
    hints = _hints()
    return Recipe(**{key: _coerce(key, value, hints[key]) for key, value in values.items()})


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Recipe)


def _shorten(values: dict[str, Any], before: Any, after: Any) -> None:
    """Fit what a recipe says in epochs into fewer of them, where it would not fit."""
    if not (type(before) is type(after) is int and 0 <= after < before):
        return
    stages, warmup = values.get("stages"), values.get("warmup_epochs", Recipe.warmup_epochs)
    if isinstance(aligned := values.get("align_epochs"), int):
        values["align_epochs"] = round(aligned * after / before)
    if isinstance(warmup, (int, float)) and warmup > after:
        values["warmup_epochs"] = warmup * after / before
    try:
        if stages and max(entry["epoch"] for entry in stages) > after:
            moved = [{**e, "epoch": 1 + (e["epoch"] - 1) * after // before} for e in stages]
            # Of those that begin together, the last one holds.
            values["stages"] = list({entry["epoch"]: entry for entry in moved}.values())
    except (KeyError, TypeError):  # refused when it is checked
        pass


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``key=value`` texts into overrides; values are YAML."""
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(
                f"--set {_short(text)} is not of the form key=value, such as lr=0.001."
            )
        values[key] = parse_yaml(value, f"--set {_short(text)}")
    return values


def shipped_recipes() -> dict[str, Path]:
    """Recipes by name: from the installed package, else from the checkout it runs from."""
    return _shipped("*.yaml")


def shipped_spaces() -> dict[str, Path]:
    """What recipes are selected from, by name; see `timm_xformers.studies.selecting.space`."""
    return _shipped("spaces/*.yaml")


def _shipped(pattern: str) -> dict[str, Path]:
    package = Path(str(importlib.resources.files("timm_xformers")))
    for folder in (package / "recipes", package.parent / "train_scripts" / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob(pattern))}
    return {}


def find_settings(source: str, shipped: Mapping[str, Path], kind: str) -> Path:
    """The file that a name or a path means.

    Args:
        source: Path of a YAML file, or a shipped name.
        shipped: Files by name.
        kind: What it is, in one word for the message.

    Raises:
        UsageError: It is neither.
    """
    if source in shipped:
        return shipped[source]
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"No {kind} {source!r}: neither a file nor a shipped name{nearest(source, shipped)}; "
            f"shipped are {', '.join(shipped)}."
        )
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """Read a mapping from YAML.

    Raises:
        UsageError: The file is damaged or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a YAML file: {error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings; write lines 'key: value'.")
    return values


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Whole numbers as numbers, the word that YAML takes for false, a run folder as its weights."""
    if float in (typing.get_args(hint) or (hint,)) and type(value) is int:
        return float(value) if abs(value) < 2**64 else value
    if name == "mixed_precision" and value is False:
        return "no"
    if name == "class_weights" and isinstance(value, dict):
        return {str(key): factor for key, factor in value.items()}  # labels are names too
    return weights_of(value) if name in ("model", "teacher") and isinstance(value, str) else value


def weights_of(name: str) -> str:
    """A model's name as timm takes it: a run folder, or a folder of weights, becomes local-dir."""
    if ":" not in name and "\0" not in name:
        for folder in (Path(name) / "best", Path(name)):
            if (folder / "config.json").is_file():
                return f"local-dir:{folder.resolve()}"
    return name
