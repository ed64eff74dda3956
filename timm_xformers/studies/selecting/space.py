"""What a selection chooses from: lists of values, or ranges that Optuna draws from.

A space is a YAML file with either ``grid``, a mapping of recipe keys to lists of values (or a list
of such mappings, for values that only go together), or ``search``, a mapping of recipe keys to
``{low, high}`` with ``log: true`` if wanted, or ``{choices: [...]}``. Keys such as
``model_kwargs.depth`` reach into a mapping of the recipe.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Mapping
from typing import Any

from timm_xformers.errors import UsageError, nearest
from timm_xformers.recipe import (
    Recipe,
    find_settings,
    override,
    read_settings,
    shipped_spaces,
)

__all__ = ["Space", "load_space"]

PRUNERS = ("median", "hyperband", "none")
# Configurations are compared on the same images under the same conditions: these belong to the
# data, to the machine, or to chance.
FIXED = (
    "data",
    "data_dir",
    "train_split",
    "val_split",
    "test_split",
    "download",
    "in_memory",
    "in_chans",
    "num_classes",
    "val_fraction",
    "num_workers",
    "seed",
    "output",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """A checked space.

    Attributes:
        grid: Values by recipe key; of each mapping, every combination. Empty with ``search``.
        search: Distributions by recipe key, for Optuna. Empty with ``grid``.
        folds: Parts of the training images that take turns as validation images; 1: one part, as
            large as the recipe's val_fraction.
        trials: How many configurations Optuna draws.
        pruner: How Optuna stops a configuration that falls behind: median, hyperband or none.
    """

    grid: list[dict[str, list[Any]]] = dataclasses.field(default_factory=list)
    search: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    folds: int = 5
    trials: int = 20
    pruner: str = "median"

    @property
    def keys(self) -> list[str]:
        """Recipe keys that vary, in the order of the file."""
        return list(dict.fromkeys(itertools.chain(*self.grid, self.search)))

    def configurations(self) -> list[dict[str, Any]]:
        """The grid's configurations, as values by recipe key; the last key changes fastest."""
        every = [
            dict(zip(part, values, strict=True))
            for part in self.grid
            for values in itertools.product(*part.values())
        ]
        return [values for place, values in enumerate(every) if values not in every[:place]]


def load_space(source: str, recipe: Recipe) -> Space:
    """Read a space and check it against the recipe that it varies.

    Args:
        source: Path of a YAML file, or the name of a shipped space.
        recipe: What keeps the keys that the space leaves alone.

    Raises:
        UsageError: No such file, an unknown key, or a value that the recipe does not take.
    """
    settings = read_settings(find_settings(source, shipped_spaces(), "space"))
    names = [field.name for field in dataclasses.fields(Space)]
    for key in settings:
        if key not in names:
            raise UsageError(
                f"A space has no setting {key!r}{nearest(str(key), names)}; "
                f"known are {', '.join(names)}."
            )
    if bool(settings.get("grid")) == bool(settings.get("search")):
        raise UsageError(f"{source} needs either grid or search, with at least one recipe key.")
    if settings.get("grid") and {"trials", "pruner"} & settings.keys():
        raise UsageError("A grid is tried in full; drop trials and pruner, or use search.")
    for name in ("folds", "trials"):
        value = settings.get(name, 1)
        if type(value) is not int or value < 1:
            raise UsageError(f"{name}={value!r} is out of range; use a whole number from 1 on.")
    pruner = settings.get("pruner", Space.pruner)
    if pruner not in PRUNERS:
        raise UsageError(f"pruner={pruner!r} is unknown; use {', '.join(PRUNERS)}.")

    if settings.get("grid"):
        grid = settings["grid"]
        parts = [_grid(part, recipe) for part in (grid if isinstance(grid, list) else [grid])]
        space = Space(**{**settings, "grid": parts})
    else:
        search = _mapping(settings["search"], "search")
        space = Space(
            **{
                **settings,
                "search": {key: _distribution(key, search[key], recipe) for key in search},
            }
        )
        if space.pruner != "none" and "epochs" in space.search:
            raise UsageError(
                "Pruning compares configurations after as many epochs, so epochs cannot be "
                "searched with it; drop epochs, or add pruner: none."
            )
    if space.folds == 1 and not recipe.val_fraction:
        raise UsageError("folds=1 holds out the recipe's val_fraction, which is 0; raise one.")
    return space


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{name}={value!r} is no mapping; write lines 'lr: ...' below {name}.")
    for key in map(str, value):
        if key.partition(".")[0] in FIXED:
            raise UsageError(
                f"{key} cannot vary: configurations are compared on the same images, and luck is "
                "not chosen; set it in the recipe. Models are compared over seeds by "
                "`timm-xformers study`."
            )
    return value


def _grid(value: Any, recipe: Recipe) -> dict[str, list[Any]]:
    part = _mapping(value, "grid")
    for key, values in part.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"grid: {key}={values!r} is no list; write {key}: [value, ...].")
    return {key: [_as_read(key, value, recipe) for value in part[key]] for key in part}


def _as_read(key: str, value: Any, recipe: Recipe) -> Any:
    """The value as the recipe takes it: 1e-3 is text to YAML."""
    changed = override(recipe, {key: value})
    return value if "." in key else getattr(changed, key)


def _distribution(key: str, value: Any, recipe: Recipe) -> dict[str, Any]:
    """One entry of ``search``, its numbers of one kind and its values checked."""
    known = {"low", "high", "log", "step", "choices"}
    if (
        not isinstance(value, dict)
        or not value.keys() <= known
        or ("choices" in value) == bool({"low", "high"} & value.keys())
    ):
        raise UsageError(
            f"search: {key}={value!r} is no distribution; write {{low: 1e-4, high: 1e-2, log: "
            "true}, {low: 2, high: 8, step: 2} or {choices: [a, b]}."
        )
    if "choices" in value:
        choices = value["choices"]
        plain = (bool, int, float, str, type(None))
        if (
            len(value) > 1
            or not isinstance(choices, list)
            or not choices
            or not all(isinstance(choice, plain) for choice in choices)
        ):
            raise UsageError(
                f"search: {key}={value!r}: choices is a list of plain values, and nothing goes "
                "with it."
            )
        return {"choices": [_as_read(key, choice, recipe) for choice in choices]}
    return _range(key, value, recipe)


def _range(key: str, value: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    log = value.get("log", False)
    given = {name: entry for name, entry in value.items() if name != "log"}
    try:
        if not isinstance(log, bool) or any(isinstance(entry, bool) for entry in given.values()):
            raise TypeError
        bounds = {name: float(entry) for name, entry in given.items()}  # 1e-3 is text to YAML
        low, high, step = bounds["low"], bounds["high"], bounds.get("step", 1.0)
        in_order = low <= high and step > 0 and all(map(math.isfinite, bounds.values()))
        if not in_order or (log and (low <= 0 or "step" in bounds)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"search: {key}={dict(value)!r} is no range; low is at most high, log is true or "
            "false, and log needs low above 0 and no step."
        ) from None
    is_float = typing.get_type_hints(Recipe).get(key) is float
    if not is_float and all(type(value[name]) is int for name in bounds):
        bounds = {name: int(entry) for name, entry in bounds.items()}
    for name in ("low", "high"):
        override(recipe, {key: bounds[name]})
    return {**bounds, "log": log}
