"""The manifest: one entry for each tag, and what timm is to know of it.

It is read whenever timm is imported, so this module needs the standard library alone and looks at
weights no further than whether their file is there.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "MANIFEST_FILE",
    "MAX_BYTES",
    "TAGS",
    "Weights",
    "best_tag",
    "read_manifest",
    "with_weights",
]

FOLDER = Path(__file__).resolve().parent
MANIFEST_FILE = "manifest.json"
MAX_BYTES = 8 * 2**20
# Data sets that give tags, the most general first: a name without a tag means its first one.
TAGS = ("cifar10", "cifar100", "mnist", "digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What is known of one tag.

    Attributes:
        name: ``MODEL.TAG``; the tag is the data set that trained it.
        file: The float16 safetensors beside the manifest. Tags of models that are the same function
            on their images have the same.
        bytes: Size of the file.
        sha256: Its hash.
        license: Of the weights, as an SPDX name.
        hf_hub_id: Where they lie too, for a package without the file.
        input_size: (C, H, W).
        num_classes: Width of the classifier.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        crop_pct: Share of the image's short side that evaluation keeps.
        interpolation: Resampling of images of another size.
        label_names: By label.
        test_images: Images of the test split.
        test_top1_percent: Accuracy on them of the weights in the file.
        test_top1_interval_percent: Its 95 % Wilson interval.
        recipe_hash: Of the recipe that trained them.
        seed: Seed of that run.
        logits: What the model says of `check_images` (3, num_classes).
    """

    name: str
    file: str
    bytes: int
    sha256: str
    license: str
    hf_hub_id: str | None = None
    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    label_names: tuple[str, ...]
    test_images: int
    test_top1_percent: float
    test_top1_interval_percent: tuple[float, float]
    recipe_hash: str
    seed: int
    logits: tuple[tuple[float, ...], ...]

    @property
    def model(self) -> str:
        """Name of the architecture."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """Name of the data set."""
        return self.name.partition(".")[2]

    @property
    def card(self) -> str:
        """The tag that the file is called by, which has the card and the record of its test."""
        return self.file.removesuffix(".safetensors")

    @property
    def path(self) -> Path:
        """Where the package keeps the file."""
        return FOLDER / self.file

    @property
    def source(self) -> dict[str, str]:
        """Where timm is to load from; empty if there is nothing to load."""
        if self.path.is_file():
            return {"file": str(self.path)}
        return {} if self.hf_hub_id is None else {"hf_hub_id": self.hf_hub_id}

    def config(self) -> dict[str, Any]:
        """The fields of timm's `PretrainedCfg` that these weights decide."""
        return {
            **self.source,
            "input_size": self.input_size,
            "num_classes": self.num_classes,
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "label_names": self.label_names,
            "license": self.license,
        }


def read_manifest(folder: Path = FOLDER) -> dict[str, Weights]:
    """Entries by name, in the order of `TAGS` for each model.

    Args:
        folder: Where the manifest lies.
    """
    text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    entries = [
        Weights(name=name, **{key: _frozen(value) for key, value in entry.items()})
        for name, entry in json.loads(text).items()
    ]
    entries.sort(key=lambda weights: (weights.model, TAGS.index(weights.tag)))
    return {weights.name: weights for weights in entries}


def with_weights(configs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the tags that can be loaded to timm's configurations of a family.

    timm takes the first tag with weights for the bare name's configuration. That is right where the
    weights take the same images and give as many classes. Else a bare name without weights would
    become a model for other images as soon as somebody trains one, so it keeps its own; with
    ``pretrained=True`` it means `best_tag` all the same.

    Args:
        configs: By name of a model.

    Returns:
        By name or ``NAME.TAG``, for timm's ``generate_default_cfgs``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, plain in configs.items():
        tagged = {weights.name: {**plain, **weights.config()} for weights in _loadable(name)}
        best = next(iter(tagged.values()), plain)
        alike = all(best[key] == plain[key] for key in ("input_size", "num_classes"))
        # timm's mark for the default is an asterisk; it leaves a bare name.
        found |= (tagged or {name: plain}) if alike else {**tagged, f"{name}.*": plain}
    return found


def best_tag(name: str) -> str | None:
    """The tag that a bare name with ``pretrained=True`` means; None if none can be loaded."""
    return next((weights.tag for weights in _loadable(name)), None)


def _loadable(name: str) -> list[Weights]:
    return [entry for entry in _packaged().values() if entry.model == name and entry.source]


@functools.cache
def _packaged() -> dict[str, Weights]:
    return read_manifest()


def _frozen(value: Any) -> Any:
    """Lists of JSON as tuples, which is what timm and a frozen class keep."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
