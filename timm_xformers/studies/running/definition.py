"""What a study compares: arms, data sets and seeds under one recipe, in one YAML file.

::

    title: Attention mechanisms at one trunk
    question: Which mechanism is worth its cost?  # Markdown, as protocol and conclusions
    recipe: {base: cifar10, epochs: 4}  # settings of a run; base names what they go over
    data: cifar10  # or a list
    seeds: [0, 1, 2]
    baseline: softmax
    arms:
      - {name: softmax, model: vix_softmax}
      - {name: nystrom, model: vix_nystrom, model_kwargs: {attn_layer: nystrom_l64}}
      - {name: f, model: vix_fnet, seeds: [0], published: {percent: 50, what: "9 epochs"}}

``base: FILE`` names another study, from the folder of this one, that the file goes over, setting by
setting within the recipe: the same comparison at another budget.

A run is recognised by the hash of its recipe and its seed, so records stay bound to the file: what
shapes a result cannot change without that the run is another one.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_xformers.errors import UsageError, nearest
from timm_xformers.recipe import Recipe, load_recipe, override, read_settings
from timm_xformers.studies.comparing.groups import Metric

__all__ = ["Arm", "PlannedRun", "Study", "load_study"]

TEXTS = ("title", "question", "protocol", "conclusions")
NEEDED = ("recipe", "data", "seeds", "baseline", "arms")
# Settings of a recipe that a study sets for each run.
OWN = ("model", "data", "data_dir", "seed", "output", "num_processes", "download")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the models compared.

    Attributes:
        name: For people and files.
        model: Name for timm.
        model_kwargs: Go over those of the recipe.
        seeds: Of its runs.
        published: What others reached: ``percent``, and ``what`` of, with its budget. {}: nothing.
    """

    name: str
    model: str
    model_kwargs: dict[str, Any]
    seeds: list[int]
    published: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """An arm on a data set with a seed.

    Attributes:
        name: Of its folder.
        arm: Name of the arm.
        data: Name of the data set.
        seed: Of everything random.
        recipe: All of its settings but the places of its data and its folder.
    """

    name: str
    arm: str
    data: str
    seed: int
    recipe: Recipe

    @property
    def key(self) -> tuple[str, int]:
        """By what its record is known: what shapes the result, and the seed."""
        return self.recipe.digest, self.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A checked file.

    Attributes:
        source: The file.
        title: Of the page.
        question: Markdown, before anything else.
        protocol: Markdown, beside what follows from the recipe.
        conclusions: Markdown, what people say of the figures.
        recipe: What all runs share.
        data: Names of data sets.
        seeds: Of the arms that name none of their own.
        baseline: Name of the arm that the others are compared with.
        arms: In the order of work.
        runs: All of them, in the order of work: the first seed of all arms, then the second.
    """

    source: Path
    title: str
    question: str
    protocol: str
    conclusions: str
    recipe: Recipe
    data: list[str]
    seeds: list[int]
    baseline: str
    arms: list[Arm]
    runs: list[PlannedRun]

    @property
    def metric(self) -> Metric:
        """Whose accuracy is compared: ``test``, or ``val`` if the test set is not read."""
        return "val" if self.recipe.test_split == "none" else "test"


def load_study(path: Path) -> Study:
    """Read a file and check it.

    Raises:
        UsageError: What is missing, unknown or does not fit, in one sentence.
    """
    if not path.is_file():
        raise UsageError(f"There is no study {path}; name a YAML file of arms, seeds and a recipe.")
    values = _over_base(read_settings(path), path)
    known = ("base", *TEXTS, *NEEDED)
    for key in values:
        if key not in known:
            raise UsageError(
                f"{path} has {key!r}, which a study does not know{nearest(str(key), known)}; "
                f"known are {', '.join(known)}."
            )
    missing = [name for name in NEEDED if name not in values]
    if missing:
        raise UsageError(
            f"{path} lacks {', '.join(missing)}; a study needs {', '.join(NEEDED)}, such as "
            "seeds: [0, 1, 2]."
        )
    for name in TEXTS:
        if not isinstance(values.get(name, ""), str):
            raise UsageError(f"{path}: {name} is no text; quote it.")
    recipe = _recipe(values["recipe"], path)
    data = values["data"]
    data = _distinct(data if isinstance(data, list) else [data], str, "data", "digits", path)
    seeds = _distinct(values["seeds"], int, "seeds", "[0, 1, 2]", path)
    arms = _arms(values["arms"], seeds, path)
    names = [arm.name for arm in arms]
    if values["baseline"] not in names:
        raise UsageError(
            f"{path}: baseline={values['baseline']!r} is none of the arms"
            f"{nearest(str(values['baseline']), names)}; use one of {', '.join(names)}."
        )
    every_seed = dict.fromkeys([*seeds, *(seed for arm in arms for seed in arm.seeds)])
    runs = [
        _run(recipe, arm, name, seed, data)
        for seed in every_seed
        for name in data
        for arm in arms
        if seed in arm.seeds
    ]
    seen: dict[tuple[str, int], PlannedRun] = {}
    for run in runs:
        other = seen.setdefault(run.key, run)
        if other is not run:
            raise UsageError(
                f"{path}: the arms {other.arm} and {run.arm} are the same training; drop one."
            )
    return Study(
        source=path,
        **{name: values.get(name, "").strip() for name in TEXTS} | {"title": _title(values, path)},
        recipe=recipe,
        data=data,
        seeds=seeds,
        baseline=values["baseline"],
        arms=arms,
        runs=runs,
    )


def _over_base(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a file says, over what the study says that it names as its base."""
    if "base" not in values:
        return values
    base = path.parent / str(values["base"])
    if not base.is_file():
        raise UsageError(
            f"{path}: base={values['base']!r} is no file; name another study from {path.parent}."
        )
    below = read_settings(base)
    if "base" in below:
        raise UsageError(f"{path}: its base {base} has a base of its own; name that one.")
    recipes = below.get("recipe", {}), values.get("recipe", {})
    if all(isinstance(recipe, dict) for recipe in recipes):
        values = {**values, "recipe": {**recipes[0], **recipes[1]}}
    return {**below, **values}


def _title(values: Mapping[str, Any], path: Path) -> str:
    return " ".join(values.get("title", "").split()) or f"Study {path.stem}"


def _recipe(values: Any, path: Path) -> Recipe:
    if not isinstance(values, dict):
        raise UsageError(
            f"{path}: recipe={values!r} is no mapping; write {{base: NAME, epochs: 4}} or lines "
            "'epochs: 4' below recipe."
        )
    settings = dict(values)
    base = settings.pop("base", None)
    for name in OWN:
        if name in settings:
            raise UsageError(
                f"{path}: the recipe sets {name}, which a study sets for each run; name models "
                "under arms, data sets under data, seeds under seeds, and folders by --data-dir "
                "and --output."
            )
    recipe = load_recipe(None if base is None else str(base), settings)
    if recipe.multi_label:
        raise UsageError(
            f"{path}: the recipe sets multi_label, and a study compares top-1, of one class an "
            "image; train runs of your own, and compare them by report."
        )
    if not recipe.epochs:
        raise UsageError(f"{path}: the recipe sets epochs=0, and a study trains; use 1 or more.")
    sides = [entry["img_size"] for entry in recipe.stages if "img_size" in entry]
    if sides and "img_size" in settings:
        raise UsageError(
            f"{path}: the recipe sets img_size={recipe.img_size}, and its stages train at "
            f"{', '.join(map(str, sides))} pixels; drop img_size, or add stages: []."
        )
    return dataclasses.replace(recipe, data_dir=None, output=None, num_processes=None)


def _distinct(values: Any, kind: type, name: str, example: str, path: Path) -> list[Any]:
    if (
        not isinstance(values, list)
        or not values
        or not all(type(value) is kind for value in values)
        or len(set(values)) < len(values)
    ):
        raise UsageError(
            f"{path}: {name}={values!r} does not fit; write {name}: {example}, each once."
        )
    return values


def _arms(values: Any, seeds: list[int], path: Path) -> list[Arm]:
    if not isinstance(values, list) or not values:
        raise UsageError(f"{path}: arms is no list; write lines '- {{name: a, model: NAME}}'.")
    arms: list[Arm] = []
    known = [field.name for field in dataclasses.fields(Arm)]
    for number, entry in enumerate(values, start=1):
        if not isinstance(entry, dict) or "model" not in entry:
            raise UsageError(
                f"{path}: arm {number} names no model; write {{name: a, model: NAME}}."
            )
        for key in entry:
            if key not in known:
                raise UsageError(
                    f"{path}: arm {number} has {key!r}; arms differ in model and model_kwargs "
                    f"alone (known are {', '.join(known)}). Settings belong to the recipe, and "
                    "`timm-xformers select` compares recipes."
                )
        name, kwargs = entry.get("name", entry["model"]), entry.get("model_kwargs", {})
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UsageError(
                f"{path}: arm {number} is called {name!r}; use letters, digits, dots, dashes and "
                "underscores."
            )
        if not isinstance(kwargs, dict):
            raise UsageError(
                f"{path}: model_kwargs of {name} is no mapping; write {{patch_size: 4}}."
            )
        if name in [arm.name for arm in arms]:
            raise UsageError(f"{path}: two arms are called {name}; give each a name of its own.")
        own = _distinct(entry.get("seeds", seeds), int, f"seeds of {name}", "[0, 1, 2]", path)
        published = _published(entry.get("published", {}), name, path)
        arms.append(Arm(name, entry["model"], kwargs, own, published))
    return arms


def _published(values: Any, name: str, path: Path) -> dict[str, Any]:
    found = values if isinstance(values, dict) else {"": values}
    percent, what = found.get("percent"), found.get("what")
    number = isinstance(percent, (int, float)) and not isinstance(percent, bool)
    fits = found.keys() == {"percent", "what"} and isinstance(what, str) and number
    if found and not (fits and 0 <= float(found["percent"]) <= 100):
        raise UsageError(
            f"{path}: published={values!r} of {name} does not fit; write {{percent: 55.67, what: "
            '"ViT, 40 epochs"}.'
        )
    return found


def _run(recipe: Recipe, arm: Arm, data: str, seed: int, sets: list[str]) -> PlannedRun:
    changes = {
        "model": arm.model,
        "model_kwargs": recipe.model_kwargs | arm.model_kwargs,
        "data": data,
        "seed": seed,
    }
    where = f"-{re.sub(r'[^A-Za-z0-9._-]+', '_', data)}" if len(sets) > 1 else ""
    name = f"{arm.name}{where}-s{seed}"
    return PlannedRun(name, arm.name, data, seed, override(recipe, changes))
