"""Every setting of a run: typed fields with bounds, read from YAML and the command line.

Precedence: command line over recipe file over the defaults below. Reading imports no torch, so that
a mistake in a recipe is reported at once.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from timm_xformers.errors import UsageError, nearest
from timm_xformers.files.atomic import write_text

__all__ = [
    "NO_INFLUENCE",
    "Recipe",
    "find_settings",
    "load_recipe",
    "override",
    "parse_assignments",
    "read_settings",
    "shipped_recipes",
    "shipped_spaces",
]

T = TypeVar("T")

# Settings that do not shape the result.
NO_INFLUENCE = (
    *("seed", "output", "data_dir", "download"),
    *("num_workers", "num_processes", "fsdp", "checkpoint_minutes", "trackers"),
)

# Fields that came after the first published hashes: at these values they are left out of a hash.
CAME_LATER = {"patch_drop_rate": 0.0, "labels": None}

# Those of accelerate whose packages are called like the tracker.
TRACKERS = ("tensorboard", "wandb", "mlflow", "aim", "comet_ml", "clearml", "dvclive")


def _bounded(
    default: T,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    choices: Sequence[str] = (),
) -> T:
    """A dataclass field whose values `Recipe` checks against a range or a list of words."""
    metadata: dict[str, Any] = {
        "low": low,
        "high": high,
        "open_low": open_low,
        "choices": tuple(choices),
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one run. Zero switches a technique off wherever it can be off."""

    # Name for timm.create_model, or local-dir:FOLDER, hf-hub:OWNER/NAME.
    model: str = "hybrid_vix_performer_softmax_m32"
    # Further arguments of the model, such as {patch_size: 4}.
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Start from the model's published weights instead of random ones.
    pretrained: bool = False

    # digits, mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet, folder, or a timm scheme such
    # as hfds/NAME.
    data: str = "digits"
    # Where the data set lies; digits needs none.
    data_dir: str | None = None
    # Where the labels stand, if not in the names of folders: a CSV file of image and class for a
    # folder of images, or a column of a Hub data set. null: class folders, or the usual column.
    labels: str | None = None
    # Names of the splits; null looks for the usual ones.
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None
    # Let torchvision download the set into data_dir if it is not there.
    download: bool = False
    # Classes to keep, by name or label; they are numbered anew in this order. null: all.
    classes: list[Any] | None = None
    # Use at most so many training images, the same share of every class and the same ones for
    # every seed; validation and test images stay all. null: all.
    limit: int | None = _bounded(None, low=1)
    # Images that cannot be read: stop and name them, or leave them out and say so.
    unreadable: str = _bounded("error", choices=("error", "skip"))
    # Decode everything once to uint8 and augment in batches; null: if that takes at most 1 GiB.
    in_memory: bool | None = None
    # Whose mean and standard deviation the pixels are scaled by: the data's, or those that the
    # model's configuration names; pretrained weights always get theirs.
    normalize: str = _bounded("data", choices=("data", "model"))
    # Side of the square input in pixels; null: the data set's own, or the model's.
    img_size: int | None = _bounded(None, low=1)
    # Colour channels; null: as the data set has them.
    in_chans: int | None = _bounded(None, low=1)
    # Width of the classifier; null: as many as the data set has classes.
    num_classes: int | None = _bounded(None, low=2)
    # Stratified share of the training set that chooses the best epoch; 0: keep the last epoch.
    val_fraction: float = _bounded(0.1, low=0.0, high=0.5)

    epochs: int = _bounded(30, low=1)
    # Images per process and pass.
    batch_size: int = _bounded(64, low=1)
    # Other image sides, batch sizes and shares of left-out tokens from an epoch on, for growing
    # images, such as [{epoch: 1, img_size: 14, batch_size: 256}, {epoch: 21, img_size: 28}].
    stages: list[dict[str, float]] = dataclasses.field(default_factory=list)
    # Passes whose gradients are averaged before one update.
    grad_accum_steps: int = _bounded(1, low=1)
    # Name of a timm optimiser, and further arguments of it, such as {betas: [0.9, 0.95]}.
    opt: str = "adamw"
    opt_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    lr: float = _bounded(1e-3, low=0.0, open_low=True)
    weight_decay: float = _bounded(0.05, low=0.0)
    # Factor on the learning rate from each layer to the one before it; 1: the same for all.
    layer_decay: float = _bounded(1.0, low=0.0, high=1.0, open_low=True)
    # timm's schedule, stepped at every update, and further arguments of it.
    sched: str = _bounded(
        "cosine", choices=("cosine", "tanh", "poly", "step", "multistep", "wsd", "none")
    )
    sched_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    warmup_epochs: float = _bounded(1.0, low=0.0)
    min_lr: float = _bounded(1e-6, low=0.0)

    # Label smoothing.
    smoothing: float = _bounded(0.0, low=0.0, high=0.9)
    # Beta parameters of mixup and CutMix.
    mixup: float = _bounded(0.0, low=0.0)
    cutmix: float = _bounded(0.0, low=0.0)
    # Largest norm of the gradient.
    clip_grad: float = _bounded(0.0, low=0.0)
    drop_path_rate: float = _bounded(0.0, low=0.0, high=0.9)
    # Share of an image's tokens, others at every step, that training leaves out: 0.5 halves the
    # work of a step. For models that can do without the rest of the grid.
    patch_drop_rate: float = _bounded(0.0, low=0.0, high=0.9)
    # Decay per update of averaged weights, which are then the ones evaluated and kept in best/.
    model_ema_decay: float = _bounded(0.0, low=0.0, high=0.99999)
    mixed_precision: str = _bounded("no", choices=("no", "bf16", "fp16"))
    # Keep images and filters with the channels last, which convolutions like.
    channels_last: bool = False
    # Recompute activations in the backward pass instead of keeping them.
    grad_checkpointing: bool = False
    # Compile the model by torch.compile: a minute or more at first, faster steps then.
    compile: bool = False

    # Augmentation in both paths: probabilities of a horizontal flip and of an erased rectangle.
    hflip: float = _bounded(0.0, low=0.0, high=1.0)
    re_prob: float = _bounded(0.0, low=0.0, high=1.0)
    # In memory only: largest shift in pixels, turn and shear in degrees, and zoom as a share (0.1:
    # between 1 / 1.1 and 1.1).
    crop_pad: int = _bounded(0, low=0)
    rotate_degrees: float = _bounded(0.0, low=0.0, high=180.0)
    shear_degrees: float = _bounded(0.0, low=0.0, high=60.0)
    zoom: float = _bounded(0.0, low=0.0, high=1.0)
    # In memory too: side in pixels of a square that is cut out of every image, and a policy for
    # colours and shapes: trivial, n2-m9 (two operations of strength 9 of 30) and the like, or
    # autoaugment-cifar10.
    cutout: int = _bounded(0, low=0)
    rand_augment: str | None = None
    # From files only: smallest share of the image that a random crop keeps, strength of colour
    # jitter, and a policy in timm's notation, such as rand-m9-mstd0.5.
    min_crop_area: float = _bounded(0.5, low=0.0, high=1.0, open_low=True)
    color_jitter: float = _bounded(0.0, low=0.0)
    auto_augment: str | None = None

    # Processes that the run must have; null: as many as the launcher started.
    num_processes: int | None = _bounded(None, low=1)
    # Shard weights, gradients and the optimiser's state over the processes (FSDP2), for models that
    # do not fit one device; needs several processes with a GPU each.
    fsdp: bool = False
    # Save the state of a run within an epoch too, whenever so many minutes have passed since it
    # was last saved; 0: only after each epoch.
    checkpoint_minutes: float = _bounded(10.0, low=0.0)
    # Processes that decode images when they come from files; at most one a core is started.
    num_workers: int = _bounded(2, low=0)
    seed: int = _bounded(0, low=0)
    # Where figures go besides the run folder; null: TensorBoard if it is installed, []: nowhere.
    trackers: list[str] | None = dataclasses.field(default=None, metadata={"choices": TRACKERS})
    # Run folder; null: runs/MODEL-DATA-N.
    output: str | None = None

    def __post_init__(self) -> None:
        """Check types and bounds.

        Raises:
            UsageError: The first field that does not fit, with what it allows.
        """
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check(field, hints[field.name], getattr(self, field.name))
        _check_stages(self)
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

    @property
    def digest(self) -> str:
        """Hash of what shapes the result, equal for runs that differ in seed, paths or workers."""
        values = dataclasses.asdict(self)
        for name, hint in typing.get_type_hints(type(self)).items():
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
        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
        write_text(path, text)


def _check(field: "dataclasses.Field[Any]", hint: Any, value: Any) -> None:
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    kind = typing.get_origin(kind) or kind
    if value is None and optional:
        return
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        allowed = {
            int: "a whole number",
            float: "a number",
            str: "text",
            bool: "true or false",
            list: "a list such as [name, name]",
        }
        allowed_text = allowed.get(kind, "a mapping such as {name: value}")
        raise UsageError(
            f"{field.name}={value!r} has the wrong type; it takes {allowed_text}"
            f"{' or null' if optional else ''}."
        )
    if isinstance(value, dict):
        for key in value:
            if not str(key).isidentifier():
                raise UsageError(
                    f"{field.name} has the key {str(key)!r}, which is no name; in YAML a space "
                    "follows the colon: {patch_size: 4}."
                )
    bounds = field.metadata
    for word in value if kind is list else [value]:
        if bounds.get("choices") and word not in bounds["choices"]:
            raise UsageError(
                f"{field.name}={word!r} is unknown; use {', '.join(bounds['choices'])}."
            )
    if "low" in bounds and kind in (int, float):
        low, high = bounds["low"], bounds["high"]
        below = value <= low if bounds["open_low"] else value < low
        if below or value > high or not math.isfinite(value):
            words = [f"above {low:g}" if bounds["open_low"] else f"at least {low:g}"]
            words += [f"at most {high:g}"] if high < math.inf else []
            raise UsageError(f"{field.name}={value!r} is out of range; use {' and '.join(words)}.")


def _check_stages(recipe: Recipe) -> None:
    known = {"epoch": recipe.epochs, "img_size": math.inf, "batch_size": math.inf}
    before = 0
    for entry in recipe.stages:
        for key, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
            whole = type(value) is int and 1 <= value <= known.get(key, 0)
            share = key == "patch_drop_rate" and type(value) in (int, float) and 0 <= value <= 0.9
            if not (whole or share):
                raise UsageError(
                    f"stages has {key}={value!r}; an entry takes epoch (1 to {recipe.epochs}), "
                    "img_size, batch_size and patch_drop_rate (0 to 0.9), such as "
                    "{epoch: 1, img_size: 14}."
                )
        if entry.get("epoch", 0) <= before:
            raise UsageError(
                f"stages has {entry} after epoch {before}; each entry names its first epoch, in "
                "rising order."
            )
        before = int(entry["epoch"])
        if (recipe.mixup or recipe.cutmix) and entry.get("batch_size", 2) % 2:
            raise UsageError(f"stages has {entry}, and mixup needs an even batch_size.")


def load_recipe(source: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """Build a recipe from a file and values that go over it.

    Args:
        source: Path of a YAML file, or the name of a shipped recipe; None takes the defaults.
        overrides: Field names to values; ``model_kwargs.patch_size`` reaches into a mapping.

    Raises:
        UsageError: No such recipe, an unknown key, a value of the wrong type or out of range.
    """
    values = {}
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
    for key, value in overrides.items():
        name, _, entry = key.partition(".")
        if entry:
            known = values.get(name) or {}
            values[name] = {**known, entry: value} if isinstance(known, dict) else known
        else:
            values[name] = value

    names = [field.name for field in dataclasses.fields(Recipe)]
    for key in values:
        if key not in names:
            raise UsageError(
                f"The recipe has no setting {key!r}{nearest(str(key), names)}; "
                f"known are {', '.join(names)}."
            )
    hints = typing.get_type_hints(Recipe)
    return Recipe(**{key: _coerce(key, value, hints[key]) for key, value in values.items()})


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``key=value`` texts into overrides; values are YAML."""
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text!r} is not of the form key=value, such as lr=0.001.")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {text!r}: the value is not YAML; quote it.") from error
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"{path} is not a YAML file: {detail}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings; write lines 'key: value'.")
    return values


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Undo two surprises of YAML 1.1: 1e-3 is text to it, and no is false."""
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            return value
    if float in kinds and type(value) is int:
        return float(value)
    if name == "mixed_precision" and value is False:
        return "no"
    return value
