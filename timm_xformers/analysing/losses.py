"""How far a model is from itself once some of its blocks mix tokens in another way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.data.targets import are_unlabelled
from timm_xformers.errors import UsageError
from timm_xformers.replace.replacing import put_in
from timm_xformers.replace.sites import attention_sites

__all__ = ["Assignment", "Loss", "Losses"]

# Mechanism by block; blocks that are not named stay as they are.
Assignment = Mapping[int, str]

# Token features of the original that are kept; images beyond count for logits alone.
MOST_FEATURE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Loss:
    """What an assignment costs, over the images.

    Attributes:
        feature_error: Norm of the change of the final features over theirs.
        kl: Mean divergence of the predicted classes from the original's, KL(original || changed),
            in nats.
        agreement: Images for which both predict the same class.
        right: Images whose label is predicted; None without labels.
        images: Images in all.
    """

    feature_error: float
    kl: float
    agreement: int
    right: int | None
    images: int

    @property
    def agreement_percent(self) -> float:
        """Share of images for which both predict the same class."""
        return 100 * self.agreement / self.images

    @property
    def top1_percent(self) -> float | None:
        """Accuracy; None without labels."""
        return None if self.right is None else 100 * self.right / self.images


class Losses:
    """A model, images, and the layers that could stand in its blocks.

    The layers share the model's weights. The model is in evaluation mode and as it was whenever no
    method runs.

    Args:
        model: A model of timm's, on its device.
        mechanisms: Names of `timm_xformers.list_attention`.
        batches: Normalised images (B, C, H, W) and labels (B,), on the same device; see
            `targets` for images without labels.
        feature_seed: Seed of what mechanisms draw.

    Raises:
        UsageError: A mechanism does not fit, or no block can be replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        mechanisms: Sequence[str],
        batches: Sequence[tuple[Tensor, Tensor]],
        feature_seed: int = 0,
    ) -> None:
        self.model = model.eval()
        self.batches = batches
        self.sites = attention_sites(model)
        self.blocks = [site.index for site in self.sites if site.refused is None]
        self.original = {site.index: site.module for site in self.sites}
        self.layers: dict[str, dict[int, nn.Module]] = {}
        if not self.blocks:
            why = {f"{site.name} {site.refused}" for site in self.sites} or {"no attention"}
            raise UsageError(f"No block of this model can be replaced: {'; '.join(sorted(why))}.")
        for mechanism in mechanisms:
            try:
                put_in(model, mechanism, blocks=self.blocks, feature_seed=feature_seed)
            except ValueError as error:
                raise UsageError(f"{mechanism} cannot be tried: {error}") from error
            now = attention_sites(model)
            self.layers[mechanism] = {number: now[number].module for number in self.blocks}
            self._put({})
        self.known: dict[frozenset[tuple[int, str]], Loss] = {}
        self.logits: list[Tensor] = []
        self.features: list[Tensor] = []
        self._remember()

    def of(self, assignment: Assignment) -> Loss:
        """Loss of the whole model with these mechanisms in these blocks; each is run once."""
        key = frozenset(assignment.items())
        if key not in self.known:
            self._put(assignment)
            try:
                self.known[key] = self._measure()
            finally:
                self._put({})
        return self.known[key]

    @torch.no_grad()
    def output_errors(self) -> dict[int, dict[str, float]]:
        """By block and mechanism: norm of the change of the attention's output over its norm.

        Each block gets the original model's tokens. Of a layer that is a whole block, the output is
        the block's.
        """
        off = {number: dict.fromkeys(self.layers, 0.0) for number in self.blocks}
        norms = dict.fromkeys(self.blocks, 0.0)

        def compare(number: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            hooks[number].remove()
            expected = _tensor(self.original[number](*args, **kwargs))
            norms[number] += _square(expected)
            for mechanism, layers in self.layers.items():
                found = _tensor(layers[number](*args, **kwargs))
                off[number][mechanism] += _square(found - expected)

        for images, _ in self.batches:
            hooks = {
                number: self.original[number].register_forward_pre_hook(
                    lambda module, args, kwargs, n=number: compare(n, args, kwargs),
                    with_kwargs=True,
                )
                for number in self.blocks
            }
            self.model(images)
        return {
            number: {name: (value / norms[number]) ** 0.5 for name, value in row.items()}
            for number, row in off.items()
        }

    def _put(self, assignment: Assignment) -> None:
        for number in self.blocks:
            name = assignment.get(number)
            layer = self.original[number] if name is None else self.layers[name][number]
            parent, _, child = self.sites[number].name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)

    @torch.no_grad()
    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Final features (B, ...) and logits (B, classes)."""
        model = self.model
        features: Tensor = model.forward_features(images)  # type: ignore[operator]
        logits: Tensor = model.forward_head(features)  # type: ignore[operator]
        return features, logits.float()

    def _remember(self) -> None:
        """What the original says, to compare with."""
        room = MOST_FEATURE_BYTES
        for images, _ in self.batches:
            features, logits = self._run(images)
            self.logits.append(logits)
            room -= features.numel() * features.element_size()
            if room >= 0 or not self.features:
                self.features.append(features)

    @property
    def feature_images(self) -> int:
        """Images whose final features are compared."""
        return sum(map(len, self.features))

    def _measure(self) -> Loss:
        off = norm = divergence = 0.0
        agreement = right = count = 0
        labelled = True
        for turn, (images, labels) in enumerate(self.batches):
            features, logits = self._run(images)
            if turn < len(self.features):
                off += _square(features - self.features[turn])
                norm += _square(self.features[turn])
            before, after = self.logits[turn].log_softmax(-1), logits.log_softmax(-1)
            divergence += float(F.kl_div(after, before, reduction="sum", log_target=True))
            guess = logits.argmax(dim=-1)
            agreement += int((guess == self.logits[turn].argmax(dim=-1)).sum())
            right += int((guess == labels).sum())
            count += len(labels)
            labelled = labelled and not are_unlabelled(labels)
        error = (off / norm) ** 0.5 if norm else 0.0
        found = right if labelled else None
        return Loss(error, max(0.0, divergence / count), agreement, found, count)


def _tensor(out: object) -> Tensor:
    """What a layer gives; torchvision's gives None beside it."""
    first = out[0] if isinstance(out, tuple) else out
    assert isinstance(first, Tensor)
    return first


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
