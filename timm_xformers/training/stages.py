"""Growing images: the side and the batch size that each epoch has.

Small images first make long sequences affordable. At the start of a stage the model's positions and
sequence projections are interpolated, the optimiser keeps what it knows of all other weights, and
the choice of the best epoch starts anew, since only weights of the last size are of use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from timm_xformers.training.recipe import Recipe

__all__ = ["Stage", "read_stages", "stage_of"]


@dataclass(frozen=True)
class Stage:
    """What holds from an epoch on.

    Attributes:
        epoch: The first one.
        img_size: Side of the square input in pixels; None where the model's own is used.
        batch_size: Images per process and pass.
    """

    epoch: int
    img_size: int | None
    batch_size: int


def read_stages(recipe: Recipe, img_size: int | None) -> tuple[Stage, ...]:
    """Stages of a recipe, the first from epoch 1.

    Args:
        recipe: Its ``stages`` say what changes; ``batch_size`` and ``img_size`` hold elsewhere.
        img_size: Side of the input where no stage says another.
    """
    stages = [Stage(1, img_size, recipe.batch_size)]
    for entry in recipe.stages:
        stage = Stage(
            entry["epoch"],
            entry.get("img_size", img_size),
            entry.get("batch_size", recipe.batch_size),
        )
        if stage.epoch == 1:
            stages.clear()
        stages.append(stage)
    return tuple(stages)


def stage_of(stages: Sequence[Stage], epoch: int) -> Stage:
    """The stage that an epoch belongs to; epoch 0, the state before all, to the first."""
    return [stage for stage in stages if stage.epoch <= max(epoch, 1)][-1]
