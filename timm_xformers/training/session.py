"""What a run works with: data, devices, the model, what updates it; and one epoch of it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform
from timm.layers import PatchDropout
from torch import nn
from torch.optim import Optimizer

from timm_xformers.data.data import Batches, Data, make_batches, open_data
from timm_xformers.data.preprocessing import Preprocessing, input_size
from timm_xformers.data.sampling import derive_seed, num_train_batches, seed_everything
from timm_xformers.data.split import Split
from timm_xformers.errors import DivergedError, UsageError
from timm_xformers.layers.layout import NeedsLayout, set_token_layout
from timm_xformers.recipe import Recipe
from timm_xformers.training.build import build_model, check_input, replace_in, weights_name
from timm_xformers.training.compiling import compile_model
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.loop import EpochStats, EpochSums, Trainer
from timm_xformers.training.metrics import AnyMetrics, evaluate_model
from timm_xformers.training.optim import (
    make_criterion,
    make_ema,
    make_mixup,
    make_optimizer,
    make_scheduler,
    renew_optimizer,
)
from timm_xformers.training.sharding import check_sharding, prepare_sharded, shard_averages
from timm_xformers.training.stages import Stage, read_stages, stage_of
from timm_xformers.training.teacher import Teacher, open_teacher

__all__ = ["Session", "open_session"]


@dataclasses.dataclass
class Session:
    """A recipe made real.

    Attributes:
        recipe: Where everything below comes from.
        data: Splits, not decoded.
        accelerator: Devices and processes.
        stages: Image sides and batch sizes by epoch.
        stage: The present one.
        preprocessing: What the model expects of an image.
        model_args: Arguments that build the model again, by name.
        initial_weights: Where training starts from: ``random weights`` or ``from NAME``.
        trainer: The model and what updates it.
        replaced: Table of the attention that the recipe replaced; empty if it replaced none.
    """

    recipe: Recipe
    data: Data
    accelerator: Accelerator
    stages: tuple[Stage, ...]
    stage: Stage
    preprocessing: Preprocessing
    model_args: dict[str, Any]
    initial_weights: str
    trainer: Trainer
    replaced: str = ""
    _opened: dict[str, Batches | None] = dataclasses.field(default_factory=dict, init=False)

    @property
    def model_name(self) -> str:
        """What to call the model in records: no path of a folder."""
        model: Any = self.trainer.model
        if self.recipe.model.startswith("local-dir:") or self.recipe.replace:
            return str(model.pretrained_cfg.get("architecture"))
        return self.recipe.model

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The model's further arguments for records; of replaced attention, what replaced it."""
        own = ("architecture", "replacement") if self.recipe.replace else ()
        return {name: self.model_args[name] for name in own} | self.recipe.model_kwargs

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.trainer.model.parameters())

    def steps_in(self, epoch: int) -> int:
        """Micro-batches per process in an epoch."""
        batch_size = stage_of(self.stages, epoch).batch_size
        return num_train_batches(len(self.data.train), batch_size, self.accelerator.num_processes)

    def steps_through(self, epoch: int) -> int:
        """Micro-batches per process from the start to the end of an epoch."""
        ends = [*(stage.epoch for stage in self.stages[1:]), epoch + 1]
        return sum(
            max(min(end, epoch + 1) - stage.epoch, 0) * self.steps_in(stage.epoch)
            for stage, end in zip(self.stages, ends, strict=True)
        )

    def enter(self, epoch: int) -> bool:
        """Bring the model to the stage of an epoch.

        Returns:
            Whether the size of the images changed.
        """
        stage, before = stage_of(self.stages, epoch), self.stage
        self.stage = stage
        self.trainer.batch_size = stage.batch_size
        if self.trainer.is_aligned(epoch):
            self.end_alignment()
            self.trainer.step_schedule(epoch, 0, self.steps_in(epoch))
        if any(each.patch_drop_rate for each in self.stages):
            _leave_out(self.trainer.model, stage.patch_drop_rate)
        if stage.img_size is None or stage.img_size == before.img_size:
            return False
        side = stage.img_size
        self.preprocessing = dataclasses.replace(self.preprocessing, img_size=side)
        if "img_size" in self.model_args:
            self.model_args["img_size"] = side
        self._opened.clear()
        self._resize(side)
        self.trainer.step_schedule(max(epoch, 1), 0, self.steps_in(epoch))
        return True

    def end_alignment(self) -> None:
        """Go on from single layers to the whole model, with a new optimiser and schedule."""
        trainer, accelerator = self.trainer, self.accelerator
        assert trainer.teacher is not None
        trainer.teacher.end_alignment()
        optimizer = make_optimizer(trainer.model, self.recipe)
        trainer.scheduler = make_scheduler(optimizer, self.recipe, trainer.updates_per_epoch)
        accelerator.free_memory()
        trained = trainer.teacher.begin(trainer.model)
        trainer.wrapped, trainer.optimizer = _prepare(accelerator, trained, optimizer, self.recipe)

    def _resize(self, side: int) -> None:
        trainer, accelerator = self.trainer, self.accelerator
        model: Any = trainer.model
        before = dict(model.named_parameters())
        accelerator.unwrap_model(trainer.wrapped, keep_fp32_wrapper=False)
        averaged: list[Any] = [] if trainer.ema is None else [trainer.ema.module]
        for sized in (model, *averaged):
            if hasattr(sized, "set_input_size"):  # convolutional families take any size
                sized.set_input_size(img_size=(side, side))
                _renew_layout(sized)
        optimizer: Any = trainer.optimizer
        renewed = renew_optimizer(optimizer.optimizer, before, model, self.recipe)
        trainer.scheduler = make_scheduler(renewed, self.recipe, trainer.updates_per_epoch)
        accelerator.free_memory()
        trainer.wrapped, trainer.optimizer = _prepare(accelerator, model, renewed, self.recipe)

    def opened(self, name: str) -> Batches | None:
        """Batches of ``train`` (augmented), ``val`` or ``test`` at the present size, made once."""
        if name not in self._opened:
            split = getattr(self.data, name)
            training = name == "train"
            self._opened[name] = None if split is None else self.batches(split, training=training)
        return self._opened[name]

    def run_epoch(
        self,
        epoch: int,
        *,
        validate: bool = True,
        on_progress: Callable[[int, float, float | None, float], None] | None = None,
        on_update: Callable[[Callable[[], EpochSums]], None] | None = None,
        sums: EpochSums | None = None,
    ) -> tuple[EpochStats, AnyMetrics | None]:
        """Train what is left of an epoch, at its stage, and measure on the validation images.

        Args:
            epoch: Counted from 1.
            validate: Measure, if there are validation images.
            on_progress: As in `Trainer.train_epoch`, likewise below.
            on_update: Called between updates.
            sums: Of the batches that are done.

        Raises:
            DivergedError: The training or the validation loss is NaN or infinite.
        """
        self.enter(epoch)
        train, val = self.opened("train"), self.opened("val")
        assert train is not None
        stats = self.trainer.train_epoch(train, epoch, on_progress, on_update, sums)
        if val is None or not validate:
            return stats, None
        metrics = self.evaluate(val)
        if not math.isfinite(metrics.loss):
            raise DivergedError(
                f"The validation loss became {metrics.loss} after epoch {epoch}; lower lr or set "
                "clip_grad=1. The best weights so far are kept."
            )
        return stats, metrics

    def evaluate(self, images: Batches) -> AnyMetrics:
        """Measure the weights that would be kept, by the labels, or without any by the teacher."""
        teacher = self.trainer.teacher
        return evaluate_model(
            self.trainer.best_weights,
            images,
            self.recipe.batch_size,
            self.accelerator,
            teacher.model if teacher is not None and self.data.unlabelled else None,
        )

    def batches(self, split: Split, *, training: bool = False) -> Batches:
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
    if recipe.epochs == 0 and not recipe.replace:
        raise UsageError("epochs=0 trains nothing and is for replace alone; use at least 1.")
    _check_auto_augment(recipe.auto_augment)
    teacher = open_teacher(recipe)
    if recipe.unlabelled and teacher is None:
        raise UsageError(
            "labels=none leaves nothing to learn but from a teacher; set teacher=NAME, as retrofit "
            "does, or name a file of labels."
        )
    # Before the process group: a stream opened after it would be cut by rank.
    data = data or open_data(recipe if teacher is None else teacher.sized(recipe))
    if teacher is not None and data.unlabelled:
        data = dataclasses.replace(data, class_names=teacher.class_names)
    accelerator = make_accelerator(recipe.mixed_precision, fsdp=recipe.fsdp)
    if recipe.num_processes not in (None, accelerator.num_processes):
        raise UsageError(
            f"num_processes={recipe.num_processes} was asked for and {accelerator.num_processes} "
            "joined; start them with torchrun --nproc_per_node N, since accelerate launch --cpu "
            "starts one."
        )
    if recipe.max_seconds and accelerator.num_processes > 1:
        raise UsageError("max_seconds is for one process; use max_steps.")
    known = data.img_size if teacher is None else teacher.preprocessing.img_size
    stages = read_stages(recipe, input_size(recipe.img_size, known))
    check_sharding(recipe, stages, accelerator)
    for stage in stages:
        if len(data.train) < stage.batch_size * accelerator.num_processes:
            raise UsageError(
                f"{len(data.train)} training images do not fill one batch of {stage.batch_size} "
                f"for each of {accelerator.num_processes} processes; lower batch_size."
            )
    # The unit of the schedule is an epoch of the last stage.
    steps = num_train_batches(len(data.train), stages[-1].batch_size, accelerator.num_processes)
    preprocessing, model_args, replaced, trainer = _make_trainer(
        recipe,
        data,
        accelerator,
        stages[0],
        steps,
        # The model is built for the largest share of any stage, and refuses it if it must.
        max(stage.patch_drop_rate for stage in stages),
        teacher,
    )
    return Session(
        recipe=recipe,
        data=data,
        accelerator=accelerator,
        stages=stages,
        stage=stages[0],
        preprocessing=preprocessing,
        model_args=model_args,
        initial_weights=_initial_weights(recipe, trainer.model),
        trainer=trainer,
        replaced=replaced,
    )


def _check_auto_augment(policy: str | None) -> None:
    """Try a policy here: timm takes some that fail only now and then, in a worker."""
    if policy is None:
        return
    image = Image.new("RGB", (16, 16))
    try:
        transform = create_transform((3, 16, 16), is_training=True, auto_augment=policy)
        for _ in range(200):
            transform(image)
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"auto_augment={policy!r} does not work in timm: {error}; use one such as "
            "rand-m9-mstd0.5, original or augmix-m3."
        ) from error


def _initial_weights(recipe: Recipe, model: Any) -> str:
    if not recipe.starts_pretrained:
        return "random weights"
    return f"from {weights_name(recipe.model, model)}"


def _make_trainer(
    recipe: Recipe,
    data: Data,
    accelerator: Accelerator,
    stage: Stage,
    steps: int,
    patch_drop_rate: float,
    teacher: Teacher | None,
) -> tuple[Preprocessing, dict[str, Any], str, Trainer]:
    img_size = stage.img_size
    arguments: dict[str, Any] = {
        "in_chans": data.in_chans,
        "num_classes": data.num_classes,
        **recipe.model_kwargs,
    }
    if recipe.drop_path_rate:
        arguments["drop_path_rate"] = recipe.drop_path_rate
    if patch_drop_rate:
        arguments["patch_drop_rate"] = patch_drop_rate
    seed_everything(derive_seed(recipe.seed, "model"))
    model, model_args = build_model(
        recipe.model, img_size=img_size, pretrained=recipe.starts_pretrained, **arguments
    )
    if patch_drop_rate:  # else model_kwargs may have a share of their own
        _leave_out(model, stage.patch_drop_rate)
    # These are kept with the weights, and regularisation is not a property of weights.
    for name in ("drop_path_rate", "patch_drop_rate"):
        model_args.pop(name, None)
    replaced = ""
    if recipe.replace:
        model_args, replaced = replace_in(model, recipe.replace, model_args)
    preprocessing = Preprocessing.of_model(model, img_size, data.in_chans)
    if teacher is not None:
        preprocessing = teacher.fit(recipe, preprocessing, data.num_classes)
        if patch_drop_rate:
            teacher.share_patch_dropout(model)
    elif not recipe.starts_pretrained:
        preprocessing = data.preprocess(preprocessing, recipe.normalize)
    check_input(model, preprocessing.shape)

    for each in (model,) if teacher is None else (model, teacher.model):
        if not recipe.fsdp:  # else the model goes there in parts
            each.to(accelerator.device)
        if recipe.channels_last:
            each.to(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        _checkpoint_blocks(model, recipe.model)
    optimizer = make_optimizer(model, recipe)
    updates_per_epoch = math.ceil(steps / recipe.grad_accum_steps)
    scheduler = make_scheduler(optimizer, recipe, updates_per_epoch)
    # Copied before accelerate replaces the model's forward method.
    ema = make_ema(model, recipe)
    trained = model if teacher is None else teacher.begin(model)
    wrapped, prepared = _prepare(accelerator, trained, optimizer, recipe)
    if recipe.fsdp and ema is not None:
        shard_averages(accelerator, ema)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        optimizer=prepared,
        scheduler=scheduler,
        criterion=make_criterion(recipe, data.train.labels, data.class_names, data.num_classes).to(
            accelerator.device
        ),
        mixup=make_mixup(recipe, data.num_classes),
        ema=ema,
        clip_grad=recipe.clip_grad,
        grad_accum_steps=recipe.grad_accum_steps,
        batch_size=stage.batch_size,
        updates_per_epoch=updates_per_epoch,
        channels_last=recipe.channels_last,
        seed=recipe.seed,
        total_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        max_seconds=recipe.max_seconds,
        teacher=teacher,
        align_epochs=recipe.align_epochs,
        multi_label=data.multi_label,
        unlabelled=data.unlabelled,
    )
    return preprocessing, model_args, replaced, trainer


def _prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, recipe: Recipe
) -> tuple[nn.Module, Optimizer]:
    if recipe.fsdp:
        wrapped, prepared = prepare_sharded(accelerator, model, optimizer)
    else:
        wrapped, prepared = accelerator.prepare(model, optimizer)
    compiled: Any = compile_model(wrapped) if recipe.compile else wrapped
    return compiled, prepared


def _renew_layout(model: Any) -> None:
    """Tell layers in timm's attention slot the new grid, if they were told the old one."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    layers = [layer for layer in model.modules() if isinstance(layer, NeedsLayout)]
    if grid and any(getattr(layer, "grid_size", None) not in (None, grid) for layer in layers):
        set_token_layout(model)


def _leave_out(model: Any, share: float) -> None:
    """Let training leave out a share of the tokens, if the model was built to."""
    if isinstance(layer := getattr(model, "patch_drop", None), PatchDropout):
        layer.prob = share


def _checkpoint_blocks(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise UsageError(
            f"{name} cannot recompute its activations; use grad_checkpointing=false."
        ) from error
