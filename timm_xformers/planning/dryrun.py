"""What a recipe would cost: a few real steps, measured and multiplied. Nothing is written."""

import dataclasses
import time
from collections.abc import Sequence

import torch

from timm_xformers.recipe import Recipe, dump_yaml
from timm_xformers.training.devices import emulation_note
from timm_xformers.training.loop import EpochSums
from timm_xformers.training.metrics import evaluate_model
from timm_xformers.training.session import Session, open_session
from timm_xformers.training.stages import Stage, stage_of
from timm_xformers.training.trackers import tracker_names

__all__ = ["dry_run", "measure_steps"]

# The first steps allocate and, perhaps, compile.
WARM_UP_STEPS, MEASURED_STEPS = 2, 6


def dry_run(recipe: Recipe, reasons: Sequence[str] = ()) -> str:
    """Describe a run without starting it.

    Args:
        recipe: The settings.
        reasons: Why settings that nobody chose are as they are.

    Returns:
        The resolved recipe as YAML, and as comments the parameters, the steps and the time that
        the measured steps amount to.

    Raises:
        UserError: What `train` would refuse.
    """
    tracker_names(recipe)  # refused here as when training
    session = open_session(recipe)
    processes = session.accelerator.num_processes
    lines = [
        *reasons,
        *session.replaced.splitlines(),
        f"{session.num_params:,} parameters, {session.initial_weights}, "
        f"{session.data.num_classes} classes",
        f"{len(session.data.train)} training images, {processes} process"
        f"{'es' if processes > 1 else ''} on {session.accelerator.device.type}",
    ]
    total = 0.0
    for stage, last in _spans(session, recipe):
        session.enter(stage.epoch)
        step, evaluation = measure_steps(session, stage)
        steps = session.steps_in(stage.epoch)
        seconds = (last - stage.epoch + 1) * (steps * step + evaluation)
        total += seconds
        side = session.preprocessing.img_size
        part = ", alignment" if session.trainer.aligning else ""
        lines.append(
            f"epochs {stage.epoch} to {last}{part}: {side} x {side} pixels, {steps} steps of "
            f"{stage.batch_size * processes} images, {1e3 * step:.1f} ms each "
            f"({stage.batch_size * processes / step:.0f} images/s), {_clock(seconds)} with "
            "validation"
        )
    note = emulation_note(recipe.mixed_precision, session.accelerator.device)
    lines += [note] if note else []
    lines.append(f"about {_clock(total)} in all, from {MEASURED_STEPS} measured steps a stage")
    return dump_yaml(dataclasses.asdict(recipe)) + "".join(f"# {line}\n" for line in lines).rstrip(
        "\n"
    )


def _spans(session: Session, recipe: Recipe) -> list[tuple[Stage, int]]:
    """Each run of epochs alike, as a stage that begins with the first, and the last epoch."""
    starts = {stage.epoch for stage in session.stages} | {recipe.align_epochs + 1}
    first = sorted(epoch for epoch in starts if epoch <= recipe.epochs)
    ends = [epoch - 1 for epoch in first[1:]] + [recipe.epochs]
    return [
        (dataclasses.replace(stage_of(session.stages, epoch), epoch=epoch), end)
        for epoch, end in zip(first, ends, strict=False)
    ]


def measure_steps(session: Session, stage: Stage) -> tuple[float, float]:
    """Seconds of a training step, and of a validation pass over all validation images.

    Args:
        session: A session that has entered the stage.
        stage: The stage.
    """
    batch = stage.batch_size * session.accelerator.num_processes
    for steps in (WARM_UP_STEPS, MEASURED_STEPS):
        chosen = torch.arange(steps * batch) % len(session.data.train)
        data = session.batches(session.data.train.subset(chosen), training=True)
        stats = session.trainer.train_epoch(
            data, stage.epoch, lambda *_: None, lambda _: None, EpochSums()
        )
    val = session.data.val
    if val is None:
        return stats.seconds / steps, 0.0
    some = val.subset(torch.arange(min(len(val), MEASURED_STEPS * batch)))
    images = session.batches(some)
    start = time.perf_counter()
    evaluate_model(
        session.trainer.best_weights, images, session.recipe.batch_size, session.accelerator
    )
    per_image = (time.perf_counter() - start) / len(some)
    return stats.seconds / steps, per_image * len(val)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
