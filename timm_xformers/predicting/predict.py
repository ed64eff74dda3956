"""What a model takes pictures for."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UserError
from timm_xformers.predicting.classes import class_names
from timm_xformers.predicting.images import open_image
from timm_xformers.recipe import weights_of
from timm_xformers.training.build import build_model, check_input

__all__ = ["Guess", "Prediction", "Unreadable", "predict"]

BATCH_SIZE = 32


@dataclass(frozen=True)
class Guess:
    """One class for one picture.

    Attributes:
        label: Its number.
        name: Its name; the number where nobody says one.
        probability: As the model has it.
    """

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """A picture and its likeliest classes, likeliest first."""

    image: str
    classes: tuple[Guess, ...]


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be read, and why."""

    image: str
    reason: str


def predict(name: str, images: Sequence[str], top_k: int = 5) -> Iterator[Prediction | Unreadable]:
    """Classify pictures, prepared as the weights expect them.

    Args:
        name: A name that timm has weights for, or a run folder.
        images: Files and addresses.
        top_k: Classes per picture; fewer if the model has fewer.

    Yields:
        One entry per picture, in their order.

    Raises:
        UserError: There is no such model, or no weights for it.
    """
    model, _ = build_model(weights_of(name), pretrained=True)
    expects = Preprocessing.of_model(model)
    if expects.in_chans not in (1, 3):
        raise UserError(
            f"{name} takes images with {expects.in_chans} channels, and pictures have 1 or 3; use "
            "another model."
        )
    check_input(model, expects.shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    count: Any = model.num_classes
    names = next(iter(class_names(model)), tuple(map(str, range(count))))
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, BATCH_SIZE)):
        opened = [_read(image, expects) for image in batch]
        pixels = [value for value in opened if isinstance(value, Tensor)]
        guesses = iter(_guess(model, pixels, expects, device, top_k, names) if pixels else ())
        for image, value in zip(batch, opened, strict=True):
            yield Prediction(image, next(guesses)) if isinstance(value, Tensor) else value


def _read(image: str, expects: Preprocessing) -> Tensor | Unreadable:
    try:
        picture = open_image(image, "L" if expects.in_chans == 1 else "RGB")
    except UserError as error:
        return Unreadable(image, str(error))
    return expects.transform()(picture)  # uint8 (C, H, W)


@torch.inference_mode()
def _guess(
    model: nn.Module,
    pixels: list[Tensor],
    expects: Preprocessing,
    device: torch.device,
    top_k: int,
    names: Sequence[str],
) -> list[tuple[Guess, ...]]:
    mean = 255 * torch.tensor(expects.mean, device=device).view(-1, 1, 1)
    std = 255 * torch.tensor(expects.std, device=device).view(-1, 1, 1)
    images = (torch.stack(pixels).to(device).float() - mean) / std  # (B, C, H, W)
    shares = model(images).float().softmax(dim=-1).cpu()  # (B, num_classes)
    best = shares.topk(min(top_k, shares.shape[1]), dim=-1)
    return [
        tuple(
            Guess(label, names[label], probability)
            for label, probability in zip(labels, probabilities, strict=True)
        )
        for labels, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
