"""Training against a teacher: to repair a model whose attention was replaced, or to learn from any.

Two parts of one run, both free of labels:

1. *Alignment* (``align_epochs``). Each layer of attention that differs from the teacher's is given
   what the teacher's layer is given, and learns its output; only these layers train. Errors are
   divided by the mean square of the teacher's output, so that all blocks weigh alike. Matching
   outputs rather than maps, and from the teacher's inputs, follows Hedgehog (arXiv:2402.04347) and
   "Copy the same, distill the difference" (arXiv:2609.35745).
2. *Outputs.* The whole network trains, on the teacher's final features (all tokens before the
   head) and logits; outputs of attention alone predict little of a network's (ViT-AdaLA,
   arXiv:2603.16063).

Where training leaves out tokens (``patch_drop_rate``), both leave out the same ones: the teacher's
exact attention is what costs most at long sequences.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UsageError
from timm_xformers.recipe import Recipe
from timm_xformers.replace import attention_sites
from timm_xformers.training.build import build_model, is_multi_label, weights_name
from timm_xformers.training.compiling import compile_model

__all__ = ["Teacher", "open_teacher", "relative_error"]

# What a layer of attention was called with.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Teacher:
    """A frozen model, and how a student learns from it.

    Attributes:
        model: The teacher, in evaluation mode.
        name: What to call its weights: a name, or a digest, never a path.
        preprocessing: What it expects of an image.
        num_classes: Width of its classifier.
        weights: Of the terms of the loss, by name (`Recipe.teacher_weights`).
        aligning: Whether the run is in its first part.
        answers: The classes that it gave the last batch, (B,), in the second part.
        compiled: Compile the teacher too, in the second part.
    """

    model: nn.Module
    name: str
    preprocessing: Preprocessing
    num_classes: int
    weights: dict[str, float]
    aligning: bool = False
    compiled: bool = False
    answers: Tensor = field(default_factory=lambda: torch.empty(0), init=False)
    _pairs: list[tuple[nn.Module, nn.Module]] = field(default_factory=list, init=False)
    _calls: dict[nn.Module, tuple[Call, Tensor]] = field(default_factory=dict, init=False)
    _hooks: list[Any] = field(default_factory=list, init=False)
    _outputs: Any = field(default=None, init=False)
    _kept: "_SharedPatchDropout | None" = field(default=None, init=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; empty if its weights name none."""
        model: Any = self.model
        names = tuple(model.pretrained_cfg.get("label_names") or ())
        return names if len(names) == self.num_classes else ()

    def sized(self, recipe: Recipe) -> Recipe:
        """A recipe that opens the data as the teacher takes images, where it has no wish."""
        return dataclasses.replace(
            recipe,
            img_size=recipe.img_size or self.preprocessing.img_size,
            in_chans=recipe.in_chans or self.preprocessing.in_chans,
            num_classes=self.num_classes if recipe.unlabelled else recipe.num_classes,
        )

    def fit(self, recipe: Recipe, student: Preprocessing, num_classes: int) -> Preprocessing:
        """What teacher and student expect of an image, which must be the same.

        Args:
            recipe: A student without weights of its own takes what the teacher expects.
            student: What the student expects.
            num_classes: Of the student.

        Raises:
            UsageError: They do not see the same, or know other classes.
        """
        own = self.preprocessing
        fixed = ["img_size", "in_chans"] + ["mean", "std"] * recipe.starts_pretrained
        for name in fixed:
            theirs, ours = getattr(own, name), getattr(student, name)
            if theirs != ours:
                raise UsageError(
                    f"The teacher takes images of {name}={theirs} and the model of {ours}, and "
                    f"both see the same ones; {self._remedy(name)}."
                )
        if self.num_classes != num_classes:
            raise UsageError(
                f"The teacher knows {self.num_classes} classes and the data has {num_classes}; "
                "fine-tune the teacher on this data first (timm-xformers train --model "
                f"{recipe.teacher}), choose its --classes, or learn from the pictures alone by "
                "--labels none."
            )
        return student if recipe.starts_pretrained else own

    @staticmethod
    def _remedy(name: str) -> str:
        if name in ("img_size", "in_chans"):
            return f"leave {name} out, or train a teacher at that {name} first"
        return "start from the teacher's own weights, or set pretrained=false"

    def begin(self, student: nn.Module) -> nn.Module:
        """Make ready for the present part.

        Args:
            student: The plain model.

        Returns:
            A module with the student's layers that `loss` takes, to be wrapped for training.

        Raises:
            UsageError: There is nothing to align.
        """
        if not self.aligning:
            outputs = _Outputs(self.model)
            self._outputs = compile_model(outputs) if self.compiled else outputs
            return _Outputs(student)
        self._pairs = _pair_layers(self.model, student)
        self._hooks = [
            layer.register_forward_hook(self._take, with_kwargs=True) for layer, _ in self._pairs
        ]
        return _Layers([layer for _, layer in self._pairs])

    def share_patch_dropout(self, student: nn.Module) -> None:
        """Let the teacher leave out the tokens that the student leaves out while it trains.

        Args:
            student: The plain model, built with ``patch_drop_rate``; its layer is replaced by one
                that both have.

        Raises:
            UsageError: One of them has no place where tokens are left out.
        """
        for name, model in (("model", student), ("teacher", self.model)):
            if type(getattr(model, "patch_drop", None)) not in (PatchDropout, nn.Identity):
                raise UsageError(
                    f"The {name} cannot leave out tokens as timm's ViT does, so patch_drop_rate "
                    "does not go with a teacher here; drop it."
                )
        own: Any = student.patch_drop
        self._kept = _SharedPatchDropout(own.prob, own.num_prefix_tokens)
        student.patch_drop = self.model.patch_drop = self._kept

    def end_alignment(self) -> None:
        """Go on to the second part, which `begin` then begins."""
        self.aligning = False
        for hook in self._hooks:
            hook.remove()
        self._pairs.clear()
        self._calls.clear()

    def _take(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        # Copied: a LayerScale in place may change it.
        self._calls[layer] = (args, kwargs), output.clone()

    def loss(
        self,
        wrapped: nn.Module,
        images: Tensor,
        targets: Tensor,
        criterion: nn.Module,
        accelerator: Accelerator,
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of a batch in the present part.

        Args:
            wrapped: What `begin` returned, as accelerate prepared it.
            images: Normalised and augmented, (B, C, H, W).
            targets: Of the labels' term: labels (B,), or (B, classes) after mixup.
            criterion: The labels' term.
            accelerator: Knows the precision.

        Returns:
            The loss, and the student's logits (B, classes); None while layers are aligned.
        """
        if self._kept is not None:
            self._kept.begin_step()
        with accelerator.autocast():
            if self.aligning:
                with torch.no_grad():
                    self.model.forward_features(images)  # type: ignore[operator]
                calls = [self._calls.pop(layer) for layer, _ in self._pairs]
                found = wrapped([call for call, _ in calls])
                wanted = [output for _, output in calls]
                errors = [relative_error(*pair) for pair in zip(found, wanted, strict=True)]
                return torch.stack(errors).mean(), None
            with torch.no_grad():
                wanted_features, wanted_logits = self._outputs(images)
                self.answers = wanted_logits.argmax(dim=-1)
            features, logits = wrapped(images)
        terms: dict[str, Callable[[], Tensor]] = {
            "features": lambda: relative_error(features, wanted_features),
            "logits": lambda: _divergence(logits.float(), wanted_logits.float()),
            "labels": lambda: criterion(logits.float(), targets),
        }
        parts = [weight * terms[name]() for name, weight in self.weights.items() if weight]
        return torch.stack(parts).sum(), logits


def open_teacher(recipe: Recipe) -> Teacher | None:
    """Build the teacher that a recipe names, if it names one.

    Raises:
        UserError: It is unknown, or has no weights.
    """
    if recipe.teacher is None:
        return None
    model, _ = build_model(recipe.teacher, pretrained=True)
    model.eval().requires_grad_(False)
    if is_multi_label(model):
        raise UsageError(
            f"teacher={recipe.teacher} gives an image several classes, and teachers are matched by "
            "softmax, for one; choose another."
        )
    for name in ("forward_features", "forward_head"):
        if not hasattr(model, name):
            raise UsageError(
                f"teacher={recipe.teacher} has no {name}, by which its features would be matched; "
                "use one of timm's image classifiers."
            )
    return Teacher(
        model=model,
        name=weights_name(recipe.teacher, model),
        preprocessing=Preprocessing.of_model(model),
        num_classes=int(model.num_classes),  # type: ignore[arg-type]
        weights=recipe.teacher_weights,
        aligning=recipe.align_epochs > 0,
        compiled=recipe.compile,
    )


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the mean square of what is wanted, in float32.

    Raises:
        UsageError: Their shapes differ; PyTorch would stretch one of them, or stop.
    """
    if found.shape != wanted.shape:
        theirs, ours = ("x".join(map(str, each.shape[1:])) for each in (wanted, found))
        raise UsageError(
            f"The teacher computes {theirs} for an image where the model computes {ours}, so they "
            "cannot be compared; use a teacher of the same width and tokens, or go by its logits "
            "alone: --set 'teacher_loss={features: 0}' align_epochs=0."
        )
    found, wanted = found.float(), wanted.float()
    # A teacher whose output is zero throughout leaves nothing to divide by.
    power = wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (found - wanted).square().mean() / power


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution, mean over images."""
    return F.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )


class _SharedPatchDropout(PatchDropout):
    """One layer of two models: the second to meet it keeps the tokens that the first kept."""

    def __init__(self, prob: float, num_prefix_tokens: int) -> None:
        super().__init__(prob, num_prefix_tokens)
        self.kept: Tensor | None = None  # places of tokens, (B, kept)

    def begin_step(self) -> None:
        # The teacher, in evaluation mode, leaves tokens out as well while the student trains.
        self.train()
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to (B, fewer, C) in training; the prefix tokens stay."""
        if not self.training or not self.prob:
            return x
        first = self.num_prefix_tokens
        patches = x[:, first:]
        if self.kept is None:
            count = max(1, int(patches.shape[1] * (1 - self.prob)))
            self.kept = torch.randn(patches.shape[:2], device=x.device).argsort(dim=1)[:, :count]
        index = self.kept.unsqueeze(-1).expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :first], patches.gather(1, index)], dim=1)


class _Layers(nn.Module):
    """Layers of attention side by side, each with a call of its own."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, calls: list[Call]) -> list[Tensor]:
        return [
            layer(*args, **kwargs) for layer, (args, kwargs) in zip(self.layers, calls, strict=True)
        ]


class _Outputs(nn.Module):
    """A model that returns what it computes before its head too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(images)
        return features, self.model.forward_head(features)


def _pair_layers(teacher: nn.Module, student: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Layers of attention at the same place, where the student's is another than the teacher's."""
    ours, theirs = attention_sites(student), attention_sites(teacher)
    if len(ours) != len(theirs):
        raise UsageError(
            f"The teacher has {len(theirs)} layers of attention and the model {len(ours)}, so they "
            "cannot be aligned; use align_epochs=0, or a teacher of the same architecture."
        )
    pairs = [
        (before.module, after.module)
        for before, after in zip(theirs, ours, strict=True)
        if _kind(before.module) != _kind(after.module)
    ]
    if not pairs:
        raise UsageError(
            "Every layer of attention is of the teacher's kind, so there is nothing to align; use "
            "align_epochs=0."
        )
    return pairs


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return type(layer), [(name, each.shape) for name, each in layer.state_dict().items()]
