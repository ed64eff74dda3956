"""What a training run would cost on 1 to 64 GPUs: time, memory, data rate and money.

One update of n GPUs, each with B images of a model of P parameters and M multiply-adds an image:

- Arithmetic: 6 M B operations (2 for a multiply-add, and backward costs twice forward), at a share
  of the GPU's peak. Recomputed activations make it 8 M B.
- Gradients: a ring all-reduce sends and receives 2 (n - 1) / n * 4 P bytes on every GPU, over the
  slowest link of the ring: the one within a machine, or the network. It is added to the arithmetic
  in full, although most of it can be hidden behind the backward pass.
- Memory: weights, gradients and AdamW's two moments in float32 are 16 P bytes, averaged weights 4 P
  and, on several GPUs, the buckets of the all-reduce 4 P; what autograd keeps grows with B.
- Images: the slowest of the GPUs, the cores that decode and the storage sets the pace.

Every rate is an assumption to be replaced by one's own; see docs/scaling.md for how far such
predictions were off where they could be measured.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from timm_xformers.errors import UsageError
from timm_xformers.files.tables import column_table
from timm_xformers.planning.catalog import build_empty, measure

__all__ = ["Cluster", "Costs", "Job", "Row", "all_reduce_seconds", "costs_of", "estimate", "render"]

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
BYTES_PER_VALUE = 4
MAY_BE_ZERO = ("val_images", "latency_us", "price_per_gpu_hour")


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one model costs at one input size.

    Attributes:
        name: The model.
        img_size: Side of the input in pixels.
        params: Trained values.
        gmacs: Billions of multiply-adds for one image forward.
        activation_mib: What autograd keeps of one image.
        fixed_mib: What it keeps whatever the batch: under mixed precision, copies of the weights.
    """

    name: str
    img_size: int
    params: int
    gmacs: float
    activation_mib: float
    fixed_mib: float


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines, by figures of which each is an assumption.

    Attributes:
        peak_tflops: Trillions of operations a second that one GPU can do at most.
        utilisation: Share of them that training reaches.
        gpus_per_node: GPUs in one machine.
        node_gb_s: Billions of bytes a second that one GPU sends within its machine.
        network_gb_s: The same between machines.
        latency_us: Microseconds that an all-reduce costs beside its bytes, for each GPU in it.
        price_per_gpu_hour: In any currency.
        cores_per_gpu: CPU cores that decode for each GPU.
        decode_img_s: Images that one of them decodes and augments a second.
        storage_mb_s: Millions of bytes a second that the storage gives to all machines together.
    """

    peak_tflops: float = 989.0
    utilisation: float = 0.35
    gpus_per_node: int = 8
    node_gb_s: float = 300.0
    network_gb_s: float = 40.0
    latency_us: float = 20.0
    price_per_gpu_hour: float = 3.0
    cores_per_gpu: float = 16.0
    decode_img_s: float = 100.0
    storage_mb_s: float = 10_000.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained on; the defaults are ImageNet-1k.

    Attributes:
        epochs: Epochs.
        train_images: Training images.
        val_images: Validation images, seen once an epoch.
        kb_per_image: Thousands of bytes of an image's file.
        batch_size: Images per GPU and update.
        ema: Whether averaged weights are kept.
        grad_checkpointing: Whether activations are computed again; their memory is then not known
            and left at what it is without.
    """

    epochs: int = 300
    train_images: int = 1_281_167
    val_images: int = 50_000
    kb_per_image: float = 115.4
    batch_size: int = 128
    ema: bool = True
    grad_checkpointing: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """The plan for one number of GPUs.

    Attributes:
        gpus: GPUs.
        global_batch_size: Images of one update.
        compute_ms: Arithmetic of an update.
        all_reduce_ms: Its all-reduce.
        gpu_img_s: Training images a second that all GPUs together could take.
        cores: CPU cores, in all machines together, that could decode so many.
        img_s: What they get, if decoding or storage is slower.
        bound_by: Which of them is the slowest: ``GPU``, ``decoding`` or ``storage``.
        storage_mb_s: Millions of bytes a second that are read.
        hours: The whole run, with validation.
        cost: GPU hours times their price.
        memory_gib: On each GPU.
    """

    gpus: int
    global_batch_size: int
    compute_ms: float
    all_reduce_ms: float
    gpu_img_s: float
    cores: float
    img_s: float
    bound_by: str
    storage_mb_s: float
    hours: float
    cost: float
    memory_gib: float


def costs_of(name: str, img_size: int | None = None, *, bf16: bool = True) -> Costs:
    """Measure a model without computing.

    Args:
        name: Any timm model.
        img_size: Side of the input; the model's own if None.
        bf16: Whether it runs under mixed precision. What is kept then follows the CPU's list of
            operations; the GPU's differs in details.

    Raises:
        UserError: The model does not exist or take such images.
    """
    kept = []
    for batch_size in (8, 16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            figures = measure(name, build_empty(name, img_size), img_size, batch_size)
        kept.append(figures.activation_mib)
    per_image = (kept[1] - kept[0]) / 8
    return Costs(
        name=name,
        img_size=figures.img_size,
        params=figures.params,
        gmacs=figures.gmacs,
        activation_mib=per_image,
        fixed_mib=max(0.0, kept[0] - 8 * per_image),
    )


def all_reduce_seconds(num_bytes: float, gpus: int, cluster: Cluster) -> float:
    """Time of a ring all-reduce of so many bytes."""
    if gpus == 1:
        return 0.0
    slowest = cluster.node_gb_s
    if gpus > cluster.gpus_per_node:
        slowest = min(slowest, cluster.network_gb_s)
    sent = 2 * (gpus - 1) / gpus * num_bytes
    return sent / (1e9 * slowest) + 1e-6 * cluster.latency_us * gpus


def estimate(
    costs: Costs, job: Job, cluster: Cluster, gpu_counts: Sequence[int] = GPU_COUNTS
) -> list[Row]:
    """The arithmetic for several numbers of GPUs, each with the same batch per GPU.

    Raises:
        UsageError: A figure that must be positive is not, or the batch exceeds the data.
    """
    for holder in (job, cluster):
        for field in dataclasses.fields(holder):
            value = getattr(holder, field.name)
            if not isinstance(value, bool) and value <= 0 and field.name not in MAY_BE_ZERO:
                raise UsageError(f"{field.name}={value} must be more than 0.")
    return [_row(costs, job, cluster, gpus) for gpus in gpu_counts]


def _row(costs: Costs, job: Job, cluster: Cluster, gpus: int) -> Row:
    steps = job.train_images // (job.batch_size * gpus)
    if not steps:
        raise UsageError(
            f"{job.train_images} training images do not fill one batch of {job.batch_size} for "
            f"each of {gpus} GPUs; lower batch_size."
        )
    rate = 1e12 * cluster.peak_tflops * cluster.utilisation
    forward = 2e9 * costs.gmacs / rate  # of one image
    passes = 4 if job.grad_checkpointing else 3
    compute = passes * forward * job.batch_size
    gradients = BYTES_PER_VALUE * costs.params
    reduce = all_reduce_seconds(gradients, gpus, cluster)
    limits = {
        "GPU": job.batch_size * gpus / (compute + reduce),
        "decoding": gpus * cluster.cores_per_gpu * cluster.decode_img_s,
        "storage": 1e3 * cluster.storage_mb_s / job.kb_per_image,
    }
    bound_by = min(limits, key=lambda name: limits[name])
    img_s = limits[bound_by]
    feeding = min(limits["decoding"], limits["storage"])
    validation = max(forward / gpus, 1 / feeding) * job.val_images
    epoch = steps * job.batch_size * gpus / img_s + validation
    hours = job.epochs * epoch / 3600
    copies = 4 + job.ema + (gpus > 1)  # weights, gradients, two moments
    activations = costs.fixed_mib + costs.activation_mib * job.batch_size
    return Row(
        gpus=gpus,
        global_batch_size=job.batch_size * gpus,
        compute_ms=1e3 * compute,
        all_reduce_ms=1e3 * reduce,
        gpu_img_s=limits["GPU"],
        cores=limits["GPU"] / cluster.decode_img_s,
        img_s=img_s,
        bound_by=bound_by,
        storage_mb_s=img_s * job.kb_per_image / 1e3,
        hours=hours,
        cost=hours * gpus * cluster.price_per_gpu_hour,
        memory_gib=copies * gradients / 2**30 + activations / 2**10,
    )


def render(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    columns: dict[str, Callable[[Row], str]] = {
        "GPUs": lambda r: f"{r.gpus}",
        "global batch": lambda r: f"{r.global_batch_size:,}",
        "arithmetic ms": lambda r: f"{r.compute_ms:.1f}",
        "all-reduce ms": lambda r: f"{r.all_reduce_ms:.1f}",
        "GPUs take images/s": lambda r: f"{r.gpu_img_s:,.0f}",
        "cores for it": lambda r: f"{r.cores:,.0f}",
        "images/s": lambda r: f"{r.img_s:,.0f}",
        "bound by": lambda r: r.bound_by,
        "MB/s read": lambda r: f"{r.storage_mb_s:,.0f}",
        "hours": lambda r: f"{r.hours:,.1f}",
        "cost": lambda r: f"{r.cost:,.0f}",
        "GiB per GPU": lambda r: f"{r.memory_gib:.1f}",
    }
    return "\n".join(column_table(columns, rows, "r"))
