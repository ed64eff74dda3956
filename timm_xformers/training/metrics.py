"""Evaluation on any number of processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.data.data import Batches
from timm_xformers.data.sampling import eval_batches
from timm_xformers.data.targets import are_marks, are_unlabelled
from timm_xformers.errors import UsageError
from timm_xformers.files.tables import write_csv
from timm_xformers.records.confusion import class_rows, plot_confusion, write_class_rows
from timm_xformers.records.headline import AGREEMENT, MAP, TOP1
from timm_xformers.records.run_folder import RunFolder
from timm_xformers.training.sharding import equal_turns, is_sharded

__all__ = [
    *("AgreementMetrics", "AnyMetrics", "MarkMetrics", "Metrics", "add_up", "evaluate_model"),
    "write_classes",
]


@dataclass(frozen=True)
class Metrics:
    """Figures over one split whose images have one class each.

    Attributes:
        loss: Mean cross-entropy.
        top1: Images whose best class is right.
        top5: Images whose five best classes hold the right one.
        images: Images seen.
        confusion: Images by label (rows) and best class (columns), sparse and coalesced (C, C), on
            the CPU: at most one entry per image, however many classes there are.
        agreed: Images whose best class is the teacher's; None without a teacher, likewise below.
        teacher_top1: Images whose best class the teacher gets right.
    """

    loss: float
    top1: int
    top5: int
    images: int
    confusion: Tensor = field(compare=False, repr=False)
    agreed: int | None = None
    teacher_top1: int | None = None

    headline = TOP1

    @property
    def score(self) -> float:
        """What chooses the best epoch: right answers."""
        return self.top1

    @property
    def percents(self) -> dict[str, float]:
        """Shares of the images, as records call them."""
        counts = {
            "top1": self.top1,
            "top5": self.top5,
            "agreement": self.agreed,
            "teacher_top1": self.teacher_top1,
        }
        return {k: 100 * count / self.images for k, count in counts.items() if count is not None}


@dataclass(frozen=True)
class MarkMetrics:
    """Figures over one split whose images may have several classes, as scikit-learn defines them.

    A class is given from a probability of 0.5. Means over classes are of those that some image here
    has: the others have no precision.

    Attributes:
        loss: Mean binary cross-entropy over images and classes.
        images: Images seen.
        f1_micro_percent: F1 over all marks together.
        by_class: For each class (C,) the columns of per_class.csv: images that have it, and of its
            marks average precision, precision, recall and F1 in percent.
    """

    loss: float
    images: int
    f1_micro_percent: float
    by_class: Mapping[str, NDArray[Any]] = field(compare=False, repr=False)

    headline = MAP

    @property
    def score(self) -> float:
        """What chooses the best epoch: mAP in percent."""
        return self.percents["map"]

    @property
    def percents(self) -> dict[str, float]:
        """Mean average precision, and F1 over all marks and as a mean over classes."""
        there = self.by_class["images"] > 0
        precision, f1 = (
            self.by_class[name] for name in ("average_precision_percent", "f1_percent")
        )
        return {
            "map": float(precision[there].mean()),
            "f1_micro": self.f1_micro_percent,
            "f1_macro": float(f1[there].mean()),
        }


@dataclass(frozen=True)
class AgreementMetrics:
    """Figures over one split whose images have no labels: how far a model is from its teacher.

    Attributes:
        loss: Mean Kullback-Leibler divergence from the teacher's classes, in nats.
        agreed: Images whose best class is the teacher's.
        images: Images seen.
    """

    loss: float
    agreed: int
    images: int

    headline = AGREEMENT

    @property
    def score(self) -> float:
        """What chooses the best epoch: the teacher's answers."""
        return self.agreed

    @property
    def percents(self) -> dict[str, float]:
        """Share of the images, as records call it."""
        return {"agreement": 100 * self.agreed / self.images}


AnyMetrics = Metrics | MarkMetrics | AgreementMetrics


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    data: Batches,
    batch_size: int,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
) -> AnyMetrics:
    """Evaluate a model on every image of a split exactly once.

    Each process takes every n-th batch and the sums are added up, so no image is seen twice, which
    padding to equal shares would do.

    Args:
        model: Plain model, or a sharded one: processes have different numbers of batches, and one
            that is wrapped in another way waits for the others in every forward pass.
        data: The split.
        batch_size: Images per forward pass and process.
        accelerator: Devices and processes.
        teacher: Compared with the model image by image, if there is one.

    Raises:
        UsageError: The images have no labels, and there is no teacher to say what is right.
    """
    order = eval_batches(
        len(data),
        batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    mine = len(order)
    if is_sharded(model):
        order = equal_turns(order, len(data), batch_size, accelerator.num_processes)
    if accelerator.num_processes > 1:
        # Those of batch normalisation have gone apart since the last evaluation; the first
        # process's are the ones that are saved.
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64)
    seen: list[Tensor] = []
    num_classes, unlabelled = 0, False
    for turn, (images, labels) in enumerate(data.batches(order)):
        with accelerator.autocast():
            logits = model(images).float()
            wanted = None if teacher is None else teacher(images).float()
        if turn >= mine:  # computed because the others needed this process
            break
        num_classes = logits.shape[-1]
        if are_marks(labels):
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
            sums[0] += float(loss.cpu().double().sum())
            sums[3] += len(labels)
            seen.append(torch.stack([labels, logits]).cpu())  # (2, B, C)
            continue
        taught = None if wanted is None else wanted.argmax(dim=-1)  # (B,)
        if are_unlabelled(labels):
            if wanted is None or taught is None:
                raise UsageError(
                    "The images have no labels, by which a model could be judged; name them by "
                    "--labels FILE.csv, or put each class into a folder of its own."
                )
            labels, losses = taught, _divergences(logits, wanted)
            unlabelled = True
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # (B, 5)
        hits = best == labels[:, None]
        seen.append(torch.stack([labels, best[:, 0]]).cpu())  # (2, B)
        values = [
            float(losses.cpu().double().sum()),
            int(hits[:, 0].sum()),
            int(hits.sum()),
            len(labels),
            0 if taught is None else int((best[:, 0] == taught).sum()),
            0 if taught is None else int((labels == taught).sum()),
        ]
        sums += torch.tensor(values, dtype=torch.float64)
    sums = add_up(accelerator, sums)
    # Objects, since the processes have different numbers of images.
    gathered = gather_object([torch.cat(seen, dim=1) if seen else None])
    cells = torch.cat([each for each in gathered if each is not None], dim=1)  # (2, images, ...)
    width = max(gather_object([num_classes]))
    images_seen = int(sums[3])
    if any(gather_object([unlabelled])):
        return AgreementMetrics(float(sums[0]) / images_seen, int(sums[4]), images_seen)
    if cells.dim() == 3:
        return measure_marks(float(sums[0]) / images_seen, *cells.double().numpy())
    return Metrics(
        loss=float(sums[0]) / images_seen,
        top1=int(sums[1]),
        top5=int(sums[2]),
        images=images_seen,
        confusion=torch.sparse_coo_tensor(
            cells, torch.ones_like(cells[0]), (width, width), check_invariants=True
        ).coalesce(),
        agreed=None if teacher is None else int(sums[4]),
        teacher_top1=None if teacher is None else int(sums[5]),
    )


def _divergences(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's classes, for each image (B,)."""
    found, wanted = logits.log_softmax(-1), wanted.log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)


def measure_marks(loss: float, marks: NDArray[Any], logits: NDArray[Any]) -> MarkMetrics:
    """Figures of marks and logits, each (images, C)."""
    from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

    images = marks.sum(0).astype(int)
    names = ("average_precision", "precision", "recall", "f1")
    figures, micro = np.full((4, len(images)), np.nan), np.nan
    if np.isfinite(logits).all():  # else there are none
        given = logits >= 0  # a probability of 0.5
        figures[1:] = precision_recall_fscore_support(marks, given, zero_division=0)[:3]
        micro = f1_score(marks, given, average="micro", zero_division=0)
        for n in images.nonzero()[0]:
            # By logits: far out, probabilities are all the same in float32.
            figures[0, n] = average_precision_score(marks[:, n], logits[:, n])
    columns = {f"{name}_percent": 100 * each for name, each in zip(names, figures, strict=True)}
    return MarkMetrics(loss, len(marks), 100 * float(micro), {"images": images, **columns})


def write_classes(
    folder: RunFolder, metrics: AnyMetrics, class_names: Sequence[str], title: str
) -> None:
    """Write per_class.csv and, where an image has one class, confusion.png; of labels alone."""
    if isinstance(metrics, AgreementMetrics):
        return
    if isinstance(metrics, Metrics):
        write_class_rows(folder.per_class, class_rows(metrics.confusion, class_names))
        plot_confusion(folder.confusion, metrics.confusion, class_names, title)
        return
    table = {key: values.tolist() for key, values in metrics.by_class.items()}
    write_csv(
        folder.per_class,
        [
            {"label": label, "class_name": name}
            | {k: None if v[label] != v[label] else round(v[label], 2) for k, v in table.items()}
            for label, name in enumerate(class_names)
        ],
    )


def add_up(accelerator: Accelerator, sums: Tensor) -> Tensor:
    """Sums over all processes, on the CPU."""
    if accelerator.num_processes == 1:
        return sums
    total: Tensor = accelerator.reduce(sums.to(accelerator.device))
    return total.cpu()
