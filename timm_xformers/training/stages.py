"""Progressive resizing: the image side, the batch size and the patch dropout of each epoch.

Small images, and parts of images, make long sequences affordable. At the start of a stage the
model's positions and sequence projections are interpolated, the optimiser keeps what it knows of
all other weights, and the choice of the best epoch starts anew, since only weights of the last size
are of use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from timm_xformers.recipe import Recipe

__all__ = ["Stage", "read_stages", "sides", "stage_of"]


@dataclass(frozen=True)
class Stage:
    """What holds from an epoch on.

    Attributes:
        epoch: The first one.
        img_size: Side of the square input in pixels; None where the model's own is used.
        batch_size: Micro-batch, images per process.
        patch_drop_rate: Share of an image's tokens that training leaves out.
    """

    epoch: int
    img_size: int | None
    batch_size: int
    patch_drop_rate: float = 0.0


def read_stages(recipe: Recipe, img_size: int | None) -> tuple[Stage, ...]:
    """Stages of a recipe, the first from epoch 1.

    Args:
        recipe: Its ``stages`` say what changes; its own ``batch_size``, ``patch_drop_rate`` and
            ``img_size`` hold elsewhere.
        img_size: Side of the input where no stage says another.
    """
    stages = [Stage(1, img_size, recipe.batch_size, recipe.patch_drop_rate)]
    for entry in recipe.stages:
        side = entry.get("img_size", img_size)
        stage = Stage(
            int(entry["epoch"]),
            None if side is None else int(side),
            int(entry.get("batch_size", recipe.batch_size)),
            entry.get("patch_drop_rate", recipe.patch_drop_rate),
        )
        if stage.epoch == 1:
            stages.clear()
        stages.append(stage)
    return tuple(stages)


def sides(stages: Sequence[Stage]) -> list[int | None]:
    """Sides of the input in the order of the stages, each once."""
    return list(dict.fromkeys(stage.img_size for stage in stages))


def stage_of(stages: Sequence[Stage], epoch: int) -> Stage:
    """The stage that an epoch belongs to; epoch 0, the state before all, to the first."""
    return [stage for stage in stages if stage.epoch <= max(epoch, 1)][-1]
