"""Evaluation on any number of processes."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.data.data import Batches
from timm_xformers.data.sampling import eval_batches
from timm_xformers.training.sharding import equal_turns, is_sharded

__all__ = ["Metrics", "add_up", "evaluate_model"]


@dataclass(frozen=True)
class Metrics:
    """Figures over one split.

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

    @property
    def top1_percent(self) -> float:
        """Share of right answers."""
        return 100 * self.top1 / self.images

    @property
    def top5_percent(self) -> float:
        """Share of images whose five best classes hold the right one."""
        return 100 * self.top5 / self.images


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    data: Batches,
    batch_size: int,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
) -> Metrics:
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
    pairs: list[Tensor] = []
    num_classes = 0
    for turn, (images, labels) in enumerate(data.batches(order)):
        with accelerator.autocast():
            logits = model(images).float()
            taught = None if teacher is None else teacher(images).argmax(dim=-1)  # (B,)
        if turn >= mine:  # computed because the others needed this process
            break
        losses = F.cross_entropy(logits, labels, reduction="none")
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # (B, 5)
        hits = best == labels[:, None]
        pairs.append(torch.stack([labels, best[:, 0]]).cpu())  # (2, B)
        num_classes = logits.shape[-1]
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
    none = torch.zeros(2, 0, dtype=torch.long)
    cells = torch.cat(gather_object([torch.cat([none, *pairs], dim=1)]), dim=1)  # (2, images)
    width = max(gather_object([num_classes]))
    images_seen = int(sums[3])
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


def add_up(accelerator: Accelerator, sums: Tensor) -> Tensor:
    """Sums over all processes, on the CPU."""
    if accelerator.num_processes == 1:
        return sums
    total: Tensor = accelerator.reduce(sums.to(accelerator.device))
    return total.cpu()
