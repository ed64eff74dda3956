"""What there is to choose from: our models with what they cost, our mechanisms with what they can.

Nothing is computed and no weight is allocated. Models are built on the meta device and run under
PyTorch's fake tensors, which carry shapes, types and the device "cpu", so that the operations are
those of a real run on a CPU. Needs no extra of the package.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UsageError, UserError, nearest
from timm_xformers.layers.factory import ATTENTION, attention_class
from timm_xformers.training.build import build_model, check_input

__all__ = [
    "Mechanism",
    "Model",
    "build_empty",
    "catalog",
    "count_params",
    "exact_when",
    "measure",
    "mechanisms",
    "our_models",
    "saved_bytes",
    "select",
]

# Shell pattern of names to where the mechanism equals softmax attention; the first match counts.
# Neighbours make two windows see each other. Tokens of local1d are those of the grid.
_EXACT_WHEN = {
    "softmax": "always",
    "performer_softmax_*": "in the limit of many features",
    "performer_*": "never",
    "nystrom_*_conv33": "never",
    "nystrom_*": "tokens <= {num_landmarks}",
    "hedgehog": "never",
    "agent_*": "never",
    "linformer_*": "tokens == {proj_len}, untrained",
    "local1d_*_shifted": "tokens <= {window_size}",
    "local1d_*": "tokens <= 2 * {window_size}",
    "local2d_*_shifted": "side <= {window_size}",
    "local2d_*": "side <= 2 * {window_size}",
    "fnet": "never",
}


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """A name of `timm_xformers.list_attention` and what it stands for."""

    name: str
    settings: dict[str, Any]
    # Condition on the number of tokens or the side of their grid, or "always", "never", ...
    exact_when: str
    # "any", "keys" (one row for all queries) or "none".
    masks: str
    causal: bool
    needs_fixed_grid: bool


@dataclasses.dataclass(frozen=True)
class Model:
    """A registered model and what it costs at one input size."""

    name: str
    attention: str
    img_size: int
    # Length of the sequence in the first block, prefix tokens included.
    tokens: int
    params: int
    # Billions of multiply-adds for one image forward: matrix products, convolutions and attention.
    # Element-wise operations, norms, pooling and the Fourier transform of fnet are not counted.
    gmacs: float
    batch_size: int
    # What autograd keeps for the backward pass of one float32 batch, weights left out.
    activation_mib: float
    # Tags of published weights, which are names of data sets.
    weights: tuple[str, ...]


def our_models() -> list[str]:
    """Names of models that this package registered with timm, in timm's order.

    ``retrofit`` is none of them: it stands for another name with replaced attention.
    """
    return [
        name
        for name in timm.list_models()
        if name != "retrofit"
        and timm.model_entrypoint(name).__module__.startswith("timm_xformers.")
    ]


def select(patterns: Sequence[str], known: Collection[str], kind: str) -> list[str]:
    """Names that match any of some shell patterns; all names if there is no pattern.

    Args:
        patterns: Matches of the first come first, each pattern's in the order of ``known``.
        known: Names to choose from.
        kind: What they name, for the message.

    Raises:
        UsageError: A pattern matches no name.
    """
    names: dict[str, None] = {}
    for pattern in patterns or ["*"]:
        matches = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            raise UsageError(
                f"No {kind} of ours matches {pattern!r}{nearest(pattern, known)}; names and "
                "patterns such as '*nystrom*' are allowed, and none at all lists everything."
            )
        names.update(dict.fromkeys(matches))
    return list(names)


def mechanisms(patterns: Sequence[str] = ()) -> list[Mechanism]:
    """Mechanisms by shell patterns over their names.

    Raises:
        UsageError: A pattern matches no name.
    """
    found = []
    for name in select(patterns, ATTENTION, "mechanism"):
        layer: Any = attention_class(name)
        found.append(
            Mechanism(
                name=name,
                settings=dict(ATTENTION[name][1]),
                exact_when=exact_when(name),
                masks=layer.masks,
                causal=layer.causal,
                needs_fixed_grid=layer.needs_fixed_grid,
            )
        )
    return found


def exact_when(name: str) -> str:
    """Where a named mechanism equals softmax attention."""
    plain = name.removesuffix("_dwc")
    rule = next(rule for key, rule in _EXACT_WHEN.items() if fnmatch.fnmatchcase(plain, key))
    if plain != name and rule != "never" and not rule.endswith("untrained"):
        rule += ", untrained"  # the convolution of the values starts at zero
    return rule.format(**ATTENTION[name][1])


def catalog(
    patterns: Sequence[str] = (),
    *,
    mechanism: str = "*",
    pretrained: bool = False,
    max_params: float = float("inf"),
    img_size: int | None = None,
    batch_size: int = 64,
    on_start: Callable[[str], None] = lambda name: None,
) -> tuple[list[Model], dict[str, str]]:
    """Measure models by shell patterns over their names.

    Args:
        patterns: See `select`.
        mechanism: Shell pattern over the name of the mechanism.
        pretrained: Leave models without published weights out.
        max_params: Leave larger models out.
        img_size: Side of the input; each model's own if None.
        batch_size: Images in the batch whose activations are measured.
        on_start: Called with each name before its turn, to show progress.

    Returns:
        The models, and for each name that does not take ``img_size`` or ``batch_size`` the reason.

    Raises:
        UsageError: No name or mechanism matches, or the filters leave nothing.
    """
    names = select(patterns, our_models(), "model")
    select([mechanism], ATTENTION, "mechanism")
    tags = _tags()
    models, refused = [], {}
    for name in names:
        if pretrained and name not in tags:
            continue
        on_start(name)
        model = build_empty(name)
        if not fnmatch.fnmatchcase(model.attn_layer, mechanism):
            continue
        reason = None
        try:
            if img_size is not None:
                model = build_empty(name, img_size)
            figures = measure(name, model, img_size, batch_size, tags.get(name, ()))
        except UserError as error:
            reason = " ".join(str(error.__cause__ or error).split())
        if count_params(model) > max_params:
            continue
        if reason is None:
            models.append(figures)
        else:
            refused[name] = reason
    if not models and not refused:
        raise UsageError(
            f"None of the {len(names)} matching models passes the filters on mechanism, weights "
            "and parameters; loosen one of them."
        )
    return models, refused


def build_empty(name: str, img_size: int | None = None, **kwargs: Any) -> Any:
    """A model whose parameters have shapes but neither values nor memory, on the meta device.

    Args:
        name: Name for timm.
        img_size: Side of the input.
        kwargs: Further arguments of the model.

    Raises:
        UserError: The model does not take ``img_size``.
    """
    with torch.device("meta"):
        return build_model(name, img_size=img_size, **kwargs)[0]


def count_params(model: nn.Module) -> int:
    """Number of trained values; buffers, such as random features, are not."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(
    name: str,
    model: Any,
    img_size: int | None = None,
    batch_size: int = 64,
    weights: tuple[str, ...] = (),
    in_chans: int | None = None,
) -> Model:
    """Run a model from `build_empty` once in training mode, on tensors without values.

    Models of timm have no name for their attention, and those without patches no tokens.

    Args:
        name: What to call it.
        model: The model.
        img_size: What it was built with.
        batch_size: Images in the batch.
        weights: Tags to list.
        in_chans: Colour channels it was built with, if others than its own.

    Raises:
        UserError: The model does not take such a batch.
    """
    expects = Preprocessing.of_model(model, img_size, in_chans)
    side, shape = expects.img_size, expects.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if img_size is not None:
            check_input(model, shape)
        counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        model.train()
        try:
            with counter:
                saved = saved_bytes(model, torch.empty(batch_size, *shape))
        except (AssertionError, LookupError, RuntimeError, ValueError) as error:
            # Batch normalisation of single values needs two images, for example.
            raise UserError(
                f"{name} does not take {batch_size} images of {side} pixels; use other sizes."
            ) from error
    prefix: int = getattr(model, "num_prefix_tokens", 0)
    patches: int = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    return Model(
        name=name,
        attention=getattr(model, "attn_layer", ""),
        img_size=side,
        tokens=patches + prefix,
        params=count_params(model),
        gmacs=counter.get_total_flops() / (2e9 * batch_size),
        batch_size=batch_size,
        activation_mib=saved / 2**20,
        weights=weights,
    )


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Memory that autograd holds between forward and backward.

    Counts each storage once, whole, since a view keeps all of it alive. The images count where a
    layer keeps them; parameters and buffers do not.

    Args:
        model: In the mode to be measured.
        images: (B, C, H, W).

    Returns:
        Bytes.
    """
    # PyTorch gives a living storage one Python object, so identity tells storages apart; fake ones
    # have no address.
    own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    known = {id(storage) for storage in own}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            kept[id(storage)] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())


def _tags() -> dict[str, tuple[str, ...]]:
    tags: dict[str, tuple[str, ...]] = {}
    for full_name in timm.list_pretrained():
        name, _, tag = full_name.partition(".")
        tags[name] = (*tags.get(name, ()), tag)
    return tags


def _fused_attention_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Operations of softmax(q k^T) v from shapes (B, H, N, D), (B, H, S, D) and (B, H, S, E)."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


# PyTorch 2.5 has no formula for the CPU's fused attention and would count nothing.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops
}
