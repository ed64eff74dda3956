"""What updates the weights: timm's optimisers, schedules, losses, mixing and averaged weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import timm.optim
import timm.optim.muon
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_xformers.data.targets import are_marks, images_by_class
from timm_xformers.errors import UsageError, nearest
from timm_xformers.recipe import Recipe
from timm_xformers.training.devices import emulates_bf16

__all__ = [
    "MarkLoss",
    "Mix",
    "make_criterion",
    "make_ema",
    "make_mixup",
    "make_optimizer",
    "make_scheduler",
    "renew_optimizer",
]


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Create timm's optimiser, with its groups for weight decay and layer decay."""
    known = [str(name) for name in timm.optim.list_optimizers()]
    if recipe.opt not in known:
        raise UsageError(
            f"Unknown optimiser opt={recipe.opt!r}{nearest(recipe.opt, known)}; "
            "timm.optim.list_optimizers() has all names."
        )
    layer_decay = recipe.layer_decay if recipe.layer_decay < 1 else None
    options: dict[str, Any] = dict(recipe.opt_kwargs)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=layer_decay,
            **options,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"opt={recipe.opt} with opt_kwargs={options}: {error}") from error
    if isinstance(optimizer, timm.optim.Muon):
        _orthogonalise_in(
            torch.float32 if emulates_bf16(next(model.parameters()).device) else torch.bfloat16
        )
    return optimizer


def _orthogonalise_in(dtype: torch.dtype) -> None:
    """Set what timm's Muon computes its Newton-Schulz iteration in, for this process.

    That is bfloat16, whatever the device, and no argument changes it. Where bfloat16 is emulated,
    these small products would take as long as the rest of the step; in float32, a fiftieth.
    """
    timm.optim.muon.zeropower_via_newtonschulz = functools.partial(_NEWTON_SCHULZ, dtype=dtype)


_NEWTON_SCHULZ = timm.optim.muon.zeropower_via_newtonschulz


def renew_optimizer(
    old: Optimizer, before: dict[str, nn.Parameter], model: nn.Module, recipe: Recipe
) -> Optimizer:
    """Create the optimiser again for a model some of whose parameters were replaced.

    The new one knows what the old one knew of parameters, by name, whose shape did not change.
    """
    new = make_optimizer(model, recipe)
    for name, parameter in model.named_parameters():
        if parameter.shape == before[name].shape and before[name] in old.state:
            new.state[parameter] = old.state[before[name]]
    return new


def make_scheduler(
    optimizer: Optimizer, recipe: Recipe, updates_per_epoch: int
) -> Scheduler | None:
    """Create timm's schedule, a function of the number of updates; None keeps the rate."""
    if not recipe.epochs:
        return None
    # timm warms up from 1e-5, which would be a step down for a smaller rate.
    options: dict[str, Any] = {
        "warmup_lr": min(1e-5, recipe.lr),
        "warmup_epochs": recipe.warmup_epochs,
        "min_lr": recipe.min_lr,
        **recipe.sched_kwargs,
    }
    total = recipe.epochs * updates_per_epoch

    def create(optimizer: Optimizer) -> Scheduler | None:
        scheduler: Scheduler | None
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.sched,
            num_epochs=recipe.epochs,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **options,
        )
        return scheduler

    try:
        # Tried on nothing first: some arguments fail only when the schedule is asked for a rate.
        if trial := create(torch.optim.SGD([torch.zeros(1, requires_grad=True)], recipe.lr)):
            for step in (0, 1, total // 2, total):
                trial.step_update(step)
        scheduler = create(optimizer)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"sched={recipe.sched} with sched_kwargs={options}: {error}") from error
    return scheduler


# Images and labels of a batch, before and after they are mixed.
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_mixup(recipe: Recipe, num_classes: int) -> Mix | None:
    """Create timm's mixup and CutMix; the labels they return are soft.

    Smoothing is included, but for marks, which the loss smooths.
    """
    if not (recipe.mixup or recipe.cutmix):
        return None
    if recipe.multi_label:
        return _mix_marks(recipe)
    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


def _mix_marks(recipe: Recipe) -> Mix:
    """The same for marks (B, classes): timm mixes numbers of images, and shares of these, marks."""
    mixup: Any = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, label_smoothing=0.0
    )

    def mix(images: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        mixup.num_classes = len(images)
        images, shares = mixup(images, torch.arange(len(images), device=images.device))  # (B, B)
        return images, shares @ marks

    return mix


class MarkLoss(nn.BCEWithLogitsLoss):
    """Binary cross-entropy of marks (B, classes), each moved towards a half by smoothing.

    Args:
        smoothing: 1 becomes 1 - smoothing / 2, and 0 becomes smoothing / 2.
        pos_weight: Factor of each class where an image has it (classes,).
    """

    def __init__(self, smoothing: float, pos_weight: Tensor | None) -> None:
        super().__init__(pos_weight=pos_weight)
        self.smoothing = smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Mean loss of logits (B, classes)."""
        return super().forward(input, target + self.smoothing * (0.5 - target))


def make_criterion(
    recipe: Recipe, labels: Tensor, class_names: Sequence[str], num_classes: int
) -> nn.Module:
    """The training loss that fits the labels: classes, the soft labels of mixup, or marks.

    Args:
        recipe: Names the loss.
        labels: Of the training images, (N,) or marks (N, classes), by which classes are balanced.
        class_names: By label; empty if unknown.
        num_classes: Width of the classifier.

    Raises:
        UsageError: ``class_weights`` names a class that is not there.
    """
    weights = _class_weights(recipe.class_weights, labels, class_names, num_classes)
    mixed = bool(recipe.mixup or recipe.cutmix)
    if are_marks(labels):
        return MarkLoss(recipe.smoothing, weights)
    if recipe.loss == "bce":
        smoothing = 0.0 if mixed else recipe.smoothing  # else in the labels already
        return BinaryCrossEntropy(smoothing, weight=weights)
    if weights is not None:
        smoothing = 0.0 if mixed else recipe.smoothing
        return nn.CrossEntropyLoss(weights, label_smoothing=smoothing)
    if mixed:
        return SoftTargetCrossEntropy()  # type: ignore[no-untyped-call]
    if recipe.smoothing:
        return LabelSmoothingCrossEntropy(recipe.smoothing)  # type: ignore[no-untyped-call]
    return nn.CrossEntropyLoss()


def _class_weights(
    asked: str | dict[str, Any] | None,
    labels: Tensor,
    class_names: Sequence[str],
    num_classes: int,
) -> Tensor | None:
    if asked is None:
        return None
    if isinstance(asked, str):  # balanced
        counts = images_by_class(labels, num_classes).float()
        if are_marks(labels):
            return (len(labels) - counts).clamp_min(1) / counts.clamp_min(1)
        return len(labels) / ((counts > 0).sum() * counts.clamp_min(1))
    numbers = {str(label): label for label in range(num_classes)}
    numbers |= {name: label for label, name in enumerate(class_names)}
    weights = torch.ones(num_classes)
    for name, factor in asked.items():
        if name not in numbers:
            raise UsageError(
                f"class_weights names {name!r}, which is no class{nearest(name, numbers)}; use "
                "names of classes, or labels."
            )
        weights[numbers[name]] = factor
    return weights


def make_ema(model: nn.Module, recipe: Recipe) -> ModelEmaV3 | None:
    """Averaged weights; their decay warms up, else a short run would average its random start."""
    if not recipe.model_ema_decay:
        return None
    return ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=True)
