"""What a run works with: data, devices, the model, and what updates it."""

import dataclasses
import math
from typing import Any

from accelerate import Accelerator

from timm_xformers.training.build import build_model, check_input
from timm_xformers.training.data import Batches, Data, make_batches, open_data
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.errors import UsageError
from timm_xformers.training.loop import Trainer
from timm_xformers.training.optim import (
    make_criterion,
    make_ema,
    make_mixup,
    make_optimizer,
    make_scheduler,
)
from timm_xformers.training.order import derive_seed, num_train_batches, seed_everything
from timm_xformers.training.preprocessing import Preprocessing
from timm_xformers.training.rawsplit import RawSplit
from timm_xformers.training.recipe import Recipe

__all__ = ["Session", "open_session"]


@dataclasses.dataclass(frozen=True)
class Session:
    """A recipe made real.

    Attributes:
        recipe: Where everything below comes from.
        data: Splits, not decoded.
        accelerator: Devices and processes.
        preprocessing: What the model expects of an image.
        model_args: Arguments that build the model again, by name.
        trainer: The model and what updates it.
        steps: Passes per process and epoch.
    """

    recipe: Recipe
    data: Data
    accelerator: Accelerator
    preprocessing: Preprocessing
    model_args: dict[str, Any]
    trainer: Trainer
    steps: int

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.trainer.model.parameters())

    def batches(self, split: RawSplit, *, training: bool = False) -> Batches:
        """Decode a split, or prepare to, for training (augmented) or evaluation."""
        return make_batches(
            split,
            self.recipe,
            self.preprocessing,
            in_memory=self.data.in_memory,
            training=training,
            device=self.accelerator.device,
        )


def open_session(recipe: Recipe, data: Data | None = None) -> Session:
    """Open the data, build the model and join the other processes.

    Args:
        recipe: The settings.
        data: Splits to use instead of those that the recipe names.

    Raises:
        UserError: Something the user can repair.
    """
    # Before the process group: a stream opened after it would be cut by rank.
    data = data or open_data(recipe)
    accelerator = make_accelerator(recipe.mixed_precision)
    steps = num_train_batches(len(data.train), recipe.batch_size, accelerator.num_processes)
    if steps == 0:
        raise UsageError(
            f"{len(data.train)} training images do not fill one batch of {recipe.batch_size} for "
            f"each of {accelerator.num_processes} processes; lower batch_size."
        )
    preprocessing, model_args, trainer = _make_trainer(recipe, data, accelerator, steps)

    return Session(
        recipe=recipe,
        data=data,
        accelerator=accelerator,
        preprocessing=preprocessing,
        model_args=model_args,
        trainer=trainer,
        steps=steps,
    )


def _make_trainer(
    recipe: Recipe, data: Data, accelerator: Accelerator, steps: int
) -> tuple[Preprocessing, dict[str, Any], Trainer]:
    img_size = recipe.img_size or data.img_size
    arguments: dict[str, Any] = {
        "in_chans": data.in_chans,
        "num_classes": data.num_classes,
        **recipe.model_kwargs,
    }
    if recipe.drop_path_rate:
        arguments["drop_path_rate"] = recipe.drop_path_rate
    seed_everything(derive_seed(recipe.seed, "model"))
    model, model_args = build_model(
        recipe.model, img_size=img_size, pretrained=recipe.pretrained, **arguments
    )
    # These are kept with the weights, and regularisation is not a property of weights.
    model_args.pop("drop_path_rate", None)
    preprocessing = Preprocessing.of_model(model, img_size, data.in_chans)
    if not recipe.pretrained:
        preprocessing = data.preprocess(preprocessing, recipe.normalize)
    check_input(model, preprocessing.shape)

    model.to(accelerator.device)
    optimizer = make_optimizer(model, recipe)
    scheduler = make_scheduler(
        optimizer, recipe, updates_per_epoch=math.ceil(steps / recipe.grad_accum_steps)
    )
    # Copied before accelerate replaces the model's forward method.
    ema = make_ema(model, recipe)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        optimizer=prepared,
        scheduler=scheduler,
        criterion=make_criterion(recipe),
        mixup=make_mixup(recipe, data.num_classes),
        ema=ema,
        clip_grad=recipe.clip_grad,
        grad_accum_steps=recipe.grad_accum_steps,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )
    return preprocessing, model_args, trainer
