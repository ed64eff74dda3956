"""What a model takes pictures for."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UserError
from timm_xformers.predicting.classes import class_names
from timm_xformers.predicting.images import open_image
from timm_xformers.recipe import weights_of
from timm_xformers.training.build import build_model, check_input, is_multi_label

__all__ = ["Guess", "Looker", "Prediction", "Unreadable", "predict"]

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
class Mark(Guess):
    """One of a picture's classes, where it may have several; present from a probability of 0.5."""

    present: bool


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


def predict(
    name: str, images: Sequence[str], top_k: int | None = None
) -> Iterator[Prediction | Unreadable]:
    """Classify pictures, prepared as the weights expect them.

    Args:
        name: A name that timm has weights for, or a run folder.
        images: Files and addresses.
        top_k: Classes per picture; fewer if the model has fewer. None: 5, or all where a picture
            may have several classes.

    Yields:
        One entry per picture, in their order.

    Raises:
        UserError: There is no such model, or no weights for it.
    """
    looker = Looker(name)
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, BATCH_SIZE)):
        opened = [_read(image, looker) for image in batch]
        pixels = [value for value in opened if isinstance(value, Tensor)]
        guesses = iter(looker.guess(looker.scale(pixels), top_k) if pixels else ())
        for image, value in zip(batch, opened, strict=True):
            yield Prediction(image, next(guesses)) if isinstance(value, Tensor) else value


class Looker:
    """A trained model that looks at pictures, prepared as its weights expect them.

    Args:
        name: A name that timm has weights for, or a run folder.

    Raises:
        UserError: There is no such model, no weights for it, or no pictures of its kind.
    """

    def __init__(self, name: str) -> None:
        self.model, _ = build_model(weights_of(name), pretrained=True)
        self.expects = Preprocessing.of_model(self.model)
        if self.expects.in_chans not in (1, 3):
            raise UserError(
                f"{name} takes images with {self.expects.in_chans} channels, and pictures have 1 "
                "or 3; use another model."
            )
        self.multi_label = is_multi_label(self.model)
        check_input(self.model, self.expects.shape)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()
        count: Any = self.model.num_classes
        self.names = next(iter(class_names(self.model)), tuple(map(str, range(count))))

    def read(self, image: str) -> Tensor:
        """A picture cut and resized for the model, uint8 (C, H, W).

        Raises:
            UserError: It cannot be read; the message is the reason alone.
        """
        picture = open_image(image, "L" if self.expects.in_chans == 1 else "RGB")
        return self.expects.transform()(picture)

    def scale(self, pixels: Sequence[Tensor]) -> Tensor:
        """Pictures that were read as the model takes them, (B, C, H, W)."""
        mean = 255 * torch.tensor(self.expects.mean, device=self.device).view(-1, 1, 1)
        std = 255 * torch.tensor(self.expects.std, device=self.device).view(-1, 1, 1)
        return (torch.stack([*pixels]).to(self.device).float() - mean) / std

    @torch.inference_mode()
    def guess(self, images: Tensor, top_k: int | None) -> list[tuple[Guess, ...]]:
        """The likeliest classes of each image (B, C, H, W), likeliest first; see `predict`."""
        logits = self.model(images).float().cpu()  # (B, num_classes)
        shares = logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)
        count = shares.shape[1]
        best = shares.topk(min(top_k or (count if self.multi_label else 5), count), dim=-1)
        return [
            tuple(
                Mark(label, self.names[label], probability, probability >= 0.5)
                if self.multi_label
                else Guess(label, self.names[label], probability)
                for label, probability in zip(labels, probabilities, strict=True)
            )
            for labels, probabilities in zip(
                best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]


def _read(image: str, looker: Looker) -> Tensor | Unreadable:
    try:
        return looker.read(image)
    except UserError as error:
        return Unreadable(image, str(error))
