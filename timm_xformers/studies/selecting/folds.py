"""One configuration trained on all folds but one, and measured on that one.

This is the unit of a selection: it starts from the beginning, looks at no test image, and its
result is one file, which is there whole or not at all.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.state import AcceleratorState

from timm_xformers.data.data import Data, open_data, refuse_unread
from timm_xformers.data.known_sets import KNOWN_SETS
from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.split import PilImages, Split, split_of
from timm_xformers.errors import DivergedError, UsageError, UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.recipe import Recipe, override
from timm_xformers.training.session import Session, open_session

__all__ = ["FoldResult", "Folds", "configuration_key", "open_fold", "open_folds", "run_fold"]

# Of the shuffle before the images are dealt out; folds depend on nothing but the labels.
SHUFFLE_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldResult:
    """What one configuration reached on one fold.

    Attributes:
        values: The configuration, by recipe key.
        fold: Counted from 1.
        state: ``complete``; ``pruned`` before the last epoch; ``diverged``, the loss being NaN
            or infinite; ``failed``, the model or its training could not be built.
        reason: Why it failed or diverged.
        epochs: Epochs trained.
        val_top1_percent: Accuracy on the fold after the last epoch, or after each one.
        val_loss: Cross-entropy on the fold, likewise.
        val_images: Images of the fold.
        train_images: Images of the other folds.
        params: Parameters of the model.
        seconds: Wall time, decoding included.
    """

    values: dict[str, Any]
    fold: int
    state: Literal["complete", "pruned", "diverged", "failed"]
    reason: str | None = None
    epochs: int = 0
    val_top1_percent: list[float] = dataclasses.field(default_factory=list)
    val_loss: list[float] = dataclasses.field(default_factory=list)
    val_images: int
    train_images: int
    params: int | None = None
    seconds: float

    def save(self, path: Path) -> None:
        """Write as JSON; after a crash the file is there whole or not at all."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> "FoldResult":
        """Read what `save` wrote.

        Raises:
            UserError: Something else is in the file.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged: {error}; delete it, and this part is done again."
            ) from error


@dataclasses.dataclass(frozen=True)
class Folds:
    """Training images, and which of them take turns to validate.

    Attributes:
        data: Of the recipe, all training images in one split.
        splits: Training and validation images for each fold.
    """

    data: Data
    splits: list[tuple[Split, Split]]

    def of(self, fold: int) -> Data:
        """The data for one fold, counted from 1; without test images."""
        train, val = self.splits[fold - 1]
        return dataclasses.replace(self.data, train=train, val=val, test=None)


def configuration_key(values: dict[str, Any]) -> str:
    """A short name for a configuration, the same in every process."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_folds(recipe: Recipe, count: int, *, decoded: bool = False) -> Folds:
    """Open the data and deal the training images out into ``count`` stratified folds.

    One fold holds out what training would hold out: the data's own validation images, or a share of
    val_fraction. ``decoded`` decodes small data sets now, once for all folds.

    Raises:
        UserError: The data is missing, or a class has too few images.
    """
    if recipe.multi_label:
        raise UsageError(
            "select deals images out by class and judges by top-1, for one class an image; drop "
            "multi_label, or compare runs of your own by report."
        )
    data = open_data(dataclasses.replace(recipe, val_fraction=0.0))
    train = data.train
    if decoded and recipe.data in KNOWN_SETS:  # small sets
        pixels = [train.image(position) for position in range(len(train))]
        images = PilImages(pixels, train.labels.tolist(), list(data.class_names))
        train = split_of(images, train.mode)
    if count == 1 and data.val is not None:
        return Folds(data, [(train, data.val)])
    if count == 1:
        pairs = [stratified_split(train.labels, recipe.val_fraction, "val")]
    else:
        from sklearn.model_selection import StratifiedKFold

        fewest = min(Counter(train.labels.tolist()).values())
        if fewest < count:
            raise UserError(
                f"A class has {fewest} training images, too few for folds={count}; lower folds."
            )
        splitter = StratifiedKFold(count, shuffle=True, random_state=SHUFFLE_SEED)
        labels = train.labels.numpy()
        pairs = [
            (torch.from_numpy(keep), torch.from_numpy(held))
            for keep, held in splitter.split(np.zeros(len(labels)), labels)
        ]
    return Folds(data, [(train.subset(keep), train.subset(held)) for keep, held in pairs])


def open_fold(recipe: Recipe, values: dict[str, Any], folds: Folds, fold: int) -> Session:
    """What one configuration on one fold works with.

    Each fold has a seed of its own, so that the deviation over folds covers the start as well; it
    is the same for all configurations.

    Raises:
        UserError: The configuration does not fit, or cannot be built.
    """
    chosen = override(recipe, values)
    refuse_unread(chosen, folds.data.in_memory)
    # Precision is a setting of the process in accelerate, and configurations may differ in it.
    AcceleratorState._reset_state(reset_partial_state=True)
    return open_session(dataclasses.replace(chosen, seed=recipe.seed + fold - 1), folds.of(fold))


def run_fold(
    recipe: Recipe,
    values: dict[str, Any],
    folds: Folds,
    fold: int,
    go_on: Callable[[int, float], bool] | None = None,
) -> FoldResult:
    """Train one configuration and measure it.

    The last epoch's figures count, since the final training on all images has nothing by which to
    choose an earlier one.

    Args:
        recipe: What all configurations share.
        values: What this one sets, by recipe key.
        folds: The images.
        fold: Which one validates, counted from 1.
        go_on: Told after each epoch: its number and the accuracy in percent; False prunes. None
            measures after the last epoch only, which saves time.

    Raises:
        UserError: The images cannot be read.
    """
    _stay_with_parent()
    start = time.perf_counter()
    train, val = folds.splits[fold - 1]
    top1: list[float] = []
    losses: list[float] = []
    params = None
    trained = 0

    def result(state: Any, error: UserError | None = None) -> FoldResult:
        return FoldResult(
            values=values,
            fold=fold,
            state=state,
            reason=None if error is None else str(error),
            epochs=trained,
            val_top1_percent=top1,
            val_loss=losses,
            val_images=len(val),
            train_images=len(train),
            params=params,
            seconds=round(time.perf_counter() - start, 2),
        )

    try:
        session = open_fold(recipe, values, folds, fold)
    except UserError as error:
        return result("failed", error)
    params = session.num_params
    epochs = session.recipe.epochs
    try:
        for epoch in range(1, epochs + 1):
            _, metrics = session.run_epoch(
                epoch,
                validate=go_on is not None or epoch == epochs,
                on_progress=lambda *_: _stay_with_parent(),
            )
            trained = epoch
            if metrics is None:
                continue
            percent = metrics.percents[metrics.headline.key]
            top1.append(percent)
            losses.append(metrics.loss)
            if go_on is not None and not go_on(epoch, percent) and epoch < epochs:
                return result("pruned")
    except DivergedError as error:
        return result("diverged", error)
    return result("complete")


def _stay_with_parent() -> None:
    """End a worker when the command that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)
