"""What a recipe would cost: a few real steps, measured and multiplied. Nothing is written."""

import dataclasses
import time
from collections.abc import Sequence

import torch

from timm_xformers.files.yaml_text import dump_yaml
from timm_xformers.recipe import Recipe
from timm_xformers.training.devices import emulation_note
from timm_xformers.training.loop import EpochSums
from timm_xformers.training.session import Session, open_session
from timm_xformers.training.stages import Stage, stage_of
from timm_xformers.training.trackers import tracker_names

__all__ = ["Cost", "StageCost", "dry_run", "estimate", "measure_steps"]

# The first steps allocate and, perhaps, compile.
WARM_UP_STEPS, MEASURED_STEPS = 2, 6


@dataclasses.dataclass(frozen=True)
class StageCost:
    """Measured steps of a stage, in seconds of wall and of processor time.

    Attributes:
        first: Its first epoch.
        last: Its last epoch, unless a budget ends the run before.
        img_size: Side of the images in pixels.
        batch_size: Images of a step, all processes together.
        steps: Of an epoch.
        step: Wall and processor seconds of a step.
        validation: The same of a pass over all validation images.
        aligning: Whether these epochs align the new layers of a retrofit.
    """

    first: int
    last: int
    img_size: int
    batch_size: int
    steps: int
    step: tuple[float, float]
    validation: tuple[float, float]
    aligning: bool = False


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run takes until its epochs or its budget end.

    Attributes:
        stages: Those that it enters.
        steps: Micro-batches.
        epochs: Begun.
        seconds: Wall time with validation, but without the test set and start-up.
        cpu_seconds: Processor time of all threads in it.
    """

    stages: list[StageCost]
    steps: int
    epochs: int
    seconds: float
    cpu_seconds: float


def estimate(session: Session) -> Cost:
    """Measure a few steps of every stage and multiply. The session is spoilt for training."""
    recipe = session.recipe
    measured = [_measure_stage(session, *span) for span in _spans(session, recipe)]
    steps = epoch = 0
    spent = [0.0, 0.0]  # wall, processor
    trained = 0.0  # processor seconds without validation, which the budget counts
    entered = []
    for stage in measured:
        entered.append(stage)
        for epoch in range(stage.first, stage.last + 1):
            now = stage.steps
            if recipe.max_steps:
                now = min(now, recipe.max_steps * recipe.grad_accum_steps - steps)
            if recipe.max_seconds:
                now = min(now, -int(-(recipe.max_seconds - trained) // stage.step[1]))
            steps += now
            trained += now * stage.step[1]
            for kind in (0, 1):
                spent[kind] += now * stage.step[kind] + stage.validation[kind]
            if now < stage.steps:
                return Cost(entered, steps, epoch, *spent)
    return Cost(entered, steps, epoch, *spent)


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
    cost = estimate(session)
    for stage in cost.stages:
        seconds = stage.steps * stage.step[0] + stage.validation[0]
        part = ", alignment" if stage.aligning else ""
        lines.append(
            f"epochs {stage.first} to {stage.last}{part}: {stage.img_size} x {stage.img_size} "
            f"pixels, {stage.steps} steps of {stage.batch_size} images, "
            f"{1e3 * stage.step[0]:.1f} ms each ({stage.batch_size / stage.step[0]:.0f} images/s), "
            f"{_clock((stage.last - stage.first + 1) * seconds)} with validation"
        )
    if recipe.max_steps or recipe.max_seconds:
        budget = f"max_steps={recipe.max_steps}"
        if recipe.max_seconds:
            budget = f"max_seconds={recipe.max_seconds:g}"
        lines.append(f"{budget}: ends after {cost.steps} steps, in epoch {cost.epochs}")
    note = emulation_note(recipe.mixed_precision, session.accelerator.device)
    lines += [note] if note else []
    lines.append(
        f"about {_clock(cost.seconds)} in all, {_clock(cost.cpu_seconds)} of processor time, from "
        f"{MEASURED_STEPS} measured steps a stage"
    )
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


def _measure_stage(session: Session, stage: Stage, last: int) -> StageCost:
    session.enter(stage.epoch)
    step, validation = measure_steps(session, stage)
    return StageCost(
        first=stage.epoch,
        last=last,
        img_size=session.preprocessing.img_size,
        batch_size=stage.batch_size * session.accelerator.num_processes,
        steps=session.steps_in(stage.epoch),
        step=step,
        validation=validation,
        aligning=bool(session.trainer.aligning),
    )


def measure_steps(
    session: Session, stage: Stage
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Wall and processor seconds of a training step, and of a pass over all validation images.

    The session has entered the stage.
    """
    batch = stage.batch_size * session.accelerator.num_processes
    trainer = session.trainer
    budgets = trainer.max_steps, trainer.max_seconds
    trainer.max_steps = trainer.max_seconds = None  # or a small one would end the measurement
    for steps in (WARM_UP_STEPS, MEASURED_STEPS):
        chosen = torch.arange(steps * batch) % len(session.data.train)
        data = session.batches(session.data.train.subset(chosen), training=True)
        stats = trainer.train_epoch(data, stage.epoch, lambda *_: None, lambda _: None, EpochSums())
    trainer.max_steps, trainer.max_seconds = budgets
    step = stats.seconds / steps, stats.cpu_seconds / steps
    val = session.data.val
    if val is None:
        return step, (0.0, 0.0)
    some = val.subset(torch.arange(min(len(val), MEASURED_STEPS * batch)))
    images = session.batches(some)
    start, cpu_start = time.perf_counter(), time.process_time()
    session.evaluate(images)
    share = len(val) / len(some)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return step, (share * wall, share * cpu)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
