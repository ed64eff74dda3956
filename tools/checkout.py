"""Where a checkout keeps weights, records and what is generated from them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml

import timm_xformers
from timm_xformers.errors import UsageError
from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.find_runs import find_runs, read_record
from timm_xformers.records.results_json import Record
from timm_xformers.records.run_folder import plain_name

__all__ = ["Checkout", "this_checkout"]


@dataclasses.dataclass(frozen=True)
class Checkout:
    """Paths below the repository's root."""

    root: Path

    @property
    def weights(self) -> Path:
        """Weights and their manifest."""
        return self.root / "timm_xformers" / "weights"

    @property
    def cards(self) -> Path:
        """One Markdown file per tag."""
        return self.root / "model_cards"

    @property
    def results(self) -> Path:
        """Records."""
        return self.root / "results"

    @property
    def readme(self) -> Path:
        """Holds a table of few results."""
        return self.root / "README.md"

    @property
    def models_page(self) -> Path:
        """Holds the table of models, below the command that prints it."""
        return self.root / "docs" / "models.md"

    @property
    def results_page(self) -> Path:
        """Holds the best result of each data set."""
        return self.root / "docs" / "results.md"

    @property
    def records_page(self) -> Path:
        """Holds all results."""
        return self.root / "docs" / "records.md"

    @property
    def speed_page(self) -> Path:
        """How fast layers and models are."""
        return self.root / "docs" / "speed.md"

    @property
    def speed(self) -> Path:
        """What was measured for it, a folder for each part."""
        return self.root / "docs" / "speed"

    @property
    def retrofit_page(self) -> Path:
        """What replaced attention keeps of a teacher's accuracy."""
        return self.root / "docs" / "retrofit_study.md"

    def retrofits(self) -> list[Path]:
        """Folders with its records, one a data set."""
        return sorted(path.parent for path in (self.results / "retrofit").glob("*/teacher.json"))

    @property
    def notes(self) -> Path:
        """Words and figures for the table that no record has."""
        return self.results / "notes.yaml"

    def studies(self) -> list[tuple[Path, Path]]:
        """Folders of studies with records, and the page of each: ``a/b`` has ``docs/a_b.md``."""
        folders = sorted(path.parent for path in self.results.rglob("study.yaml"))
        pages = ["_".join(folder.relative_to(self.results).parts) for folder in folders]
        return [
            (folder, self.root / "docs" / f"{page}.md")
            for folder, page in zip(folders, pages, strict=True)
            if (folder / "records").is_dir()
        ]

    def card(self, name: str) -> Path:
        """The card of a tag."""
        return self.cards / f"{name}.md"

    def float16_record(self, name: str) -> Path:
        """The test of a tag's float16 weights."""
        return self.results / "weights" / f"{name}.json"

    def stored_recipe(self, recipe_hash: str, recipe: Recipe | None = None) -> Path:
        """The settings behind a recipe hash, as they were then: MODEL.DATA.HASH.yaml.

        Args:
            recipe_hash: Decides alone.
            recipe: Names the file if there is none yet.
        """
        folder = self.results / "recipes"
        found = next(folder.glob(f"*.{recipe_hash}.yaml"), None)
        names = ("MODEL", "DATA") if recipe is None else (recipe.model, recipe.data)
        return found or folder / ".".join([*map(plain_name, names), f"{recipe_hash}.yaml"])

    def load_float16_record(self, name: str) -> Record:
        """Read what `float16_record` names."""
        return read_record(json.loads(self.float16_record(name).read_text(encoding="utf-8")))

    def load_recipe(self, recipe_hash: str) -> Recipe:
        """Read what `stored_recipe` names."""
        return load_recipe(str(self.stored_recipe(recipe_hash)), {})

    def load_calibration(self, name: str) -> dict[str, float] | None:
        """What `tools.calibration` found of a tag; None if it was not measured."""
        path = self.results / "calibration.json"
        if not path.is_file():
            return None
        weights: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))[
            "weights"
        ]
        return weights.get(name)

    def load_notes(self) -> dict[str, Any]:
        """Read the notes."""
        notes: dict[str, Any] = yaml.safe_load(self.notes.read_text(encoding="utf-8"))
        return notes

    def training_records(self) -> dict[str, list[Record]]:
        """Records of runs by data set, as they were written down."""
        return {
            path.stem: [run.record for run in find_runs([path])[0]]
            for path in sorted(self.results.glob("*.jsonl"))
        }

    def is_released(self) -> bool:
        """Whether a version has been released: then tags stay as they are."""
        changelog = (self.root / "CHANGELOG.md").read_text(encoding="utf-8")
        return re.search(r"^## \[?\d", changelog, flags=re.MULTILINE) is not None


def this_checkout() -> Checkout:
    """The checkout that the package runs from.

    Raises:
        UsageError: It is installed, and an installed package is not written to.
    """
    package = Path(timm_xformers.__file__).resolve().parent
    checkout = Checkout(package.parent)
    if not checkout.results.is_dir():
        raise UsageError(
            f"The package in {package} is no checkout, and only a checkout takes weights; run "
            "this in a clone, or use --output."
        )
    return checkout
