"""How an image becomes a model's input: a property of the weights, so it travels with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

__all__ = ["Preprocessing", "input_size"]


def input_size(*wanted: int | None, model: nn.Module | str | None = None) -> int | None:
    """Side of the square input in pixels: the one answer for all commands.

    Args:
        wanted: Sizes by rank: what the user asks for, then what the data set has. None: no wish.
        model: A timm model, or its name, whose weights' size holds where there is no wish.

    Returns:
        The size; None where there is no wish and nothing is known of the model.
    """
    asked = next((size for size in wanted if size is not None), None)
    if asked is not None or model is None:
        return asked
    if isinstance(model, str):
        config = get_pretrained_cfg(model)
        return None if config is None else int(config.input_size[1])
    return int(resolve_model_data_config(model)["input_size"][1])  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Preprocessing:
    """Size, channels and normalisation.

    Attributes:
        img_size: Side of the square input in pixels.
        in_chans: Colour channels.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        crop_pct: Share of the image's short side that evaluation keeps.
        interpolation: Resampling of images of another size.
    """

    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    @classmethod
    def of_model(
        cls, model: nn.Module, img_size: int | None = None, in_chans: int | None = None
    ) -> "Preprocessing":
        """What a model's weights were trained with, unless it was built for other inputs."""
        config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        channels = in_chans or config["input_size"][0]
        side = input_size(img_size, model=model)
        assert side is not None
        return cls(
            img_size=side,
            in_chans=channels,
            mean=_per_channel(config["mean"], channels),
            std=_per_channel(config["std"], channels),
            crop_pct=config["crop_pct"],
            interpolation=config["interpolation"],
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one input."""
        return self.in_chans, self.img_size, self.img_size

    @property
    def size_fields(self) -> dict[str, Any]:
        """Side and channels of one input, as fields of recipes and records."""
        return {"img_size": self.img_size, "in_chans": self.in_chans}

    def transform(self) -> Callable[[Any], Tensor]:
        """The evaluation transform: PIL image to uint8 (C, H, W), not yet normalised."""
        transform: Callable[[Any], Tensor] = create_transform(
            self.shape,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            normalize=False,
        )
        return transform


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The values, or their average if they were made for another number of channels."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
