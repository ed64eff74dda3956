"""Maps of any mechanism: how much the values of each token count in the output of another.

Every mechanism here and exact attention are linear in the values, o_i = sum_j w_ij v_j per head.
So w_ij is the derivative of o_i by v_j, whether or not the mechanism forms a map: one
vector-Jacobian product gives the weights of all tokens for one query, in the time and memory of a
backward pass through the layer, without a map of N x N.

What depends on the channel, a depthwise convolution of the values (``dwc``), is part of the map by
its mean over the channels of a head. What comes behind the mixing (norm, gate, projection) is not
part of it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from timm_xformers.layers.fnet import FNetMixing
from timm_xformers.layers.heads import HeadsAttention
from timm_xformers.replace.sites import Site, attention_sites

__all__ = ["Query", "attention_map", "has_class_token", "token_layout"]

Query = int | str | tuple[int, int]


class _Found(Exception):
    """Ends a forward pass with the weights that it was run for, (B, H, N)."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights


def attention_map(model: nn.Module, images: Tensor, block: int, query: Query = "class") -> Tensor:
    """Weight of each token in the output of a block's attention, whatever the mechanism.

    The model runs up to that block, in evaluation mode; its modes, hooks and gradients stay as they
    are.

    Args:
        model: A model with attention of ours, of timm's usual kinds or of torchvision's.
        images: As the model takes them, (B, C, H, W).
        block: Number of the attention, as `attention_sites` counts.
        query: Whose output: ``"class"`` (the class token), ``"mean"`` (the average over all
            tokens), the number of a token, or (row, column) of the token grid.

    Returns:
        (B, H, N), float32 at least, prefix tokens first. Weights of exact attention, of windows and
        of positive features sum to one and are not negative. Nyström's and Linformer's need be
        neither, and convolutions of the values add what they add.

    Raises:
        ValueError: There is no such block or token, or the attention has no weights of tokens.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    sites = attention_sites(model)
    kind = type(model).__name__
    if not sites:
        raise ValueError(f"{kind} has no attention that a map could be taken of.")
    if not 0 <= block < len(sites):
        raise ValueError(
            f"block={block} is out of range: the attention of this {kind} has numbers 0 to "
            f"{len(sites) - 1}."
        )
    name, layer = sites[block].name, sites[block].module
    read = _reader(sites[block])
    forward = layer.forward
    size = (int(images.shape[-2]), int(images.shape[-1]))

    def found(*args: Any, **kwargs: Any) -> Tensor:
        def choose(num_tokens: int) -> int | None:
            return _position(model, size, query, num_tokens)

        raise _Found(read(layer, forward, choose, *args, **kwargs))

    # Outside of inference mode, whose tensors have no derivatives.
    with torch.inference_mode(False), torch.no_grad(), _uncompiled(), _evaluating(model):
        try:
            with _instead(layer, "forward", found):
                model(images.clone() if images.is_inference() else images)
        except _Found as end:
            return end.weights
    raise ValueError(f"The model does not run {name} for these images; choose another block.")


def token_layout(
    model: nn.Module, size: tuple[int, int], num_tokens: int
) -> tuple[int, tuple[int, int]]:
    """How the tokens of a model lie.

    Args:
        model: As in `attention_map`.
        size: Height and width of its input.
        num_tokens: Tokens that its attention sees.

    Returns:
        Tokens before the grid, and the rows and columns of the grid.

    Raises:
        ValueError: The tokens form no grid that the model tells of.
    """
    prefix = _num_prefix_tokens(model)
    embed = getattr(model, "patch_embed", getattr(model, "embeds", None))
    grids = [getattr(embed, "grid_size", None)]
    patch: Any = getattr(embed, "patch_size", getattr(model, "patch_size", None))
    if patch is not None:  # first: of two grids with as many tokens, that of the image
        rows, cols = patch if isinstance(patch, tuple) else (patch, patch)
        grids.insert(0, (-(-size[0] // rows), -(-size[1] // cols)))
    for grid in grids:
        if grid is not None and prefix + grid[0] * grid[1] == num_tokens:
            return prefix, (int(grid[0]), int(grid[1]))
    raise ValueError(
        f"{num_tokens} tokens do not form a grid that {type(model).__name__} tells of; name the "
        "query by the number of its token."
    )


def has_class_token(model: nn.Module) -> bool:
    """Whether the first token is a class token: there is more before the grid than registers."""
    return _num_prefix_tokens(model) > int(getattr(model, "num_reg_tokens", 0))


def _num_prefix_tokens(model: nn.Module) -> int:
    """Tokens before the grid; torchvision's models have a class token and do not count it."""
    return int(getattr(model, "num_prefix_tokens", hasattr(model, "class_token")))


def _position(model: nn.Module, size: tuple[int, int], query: Query, num_tokens: int) -> int | None:
    """Number of the token that is asked for; None for the mean of all."""
    if query == "mean":
        return None
    if query == "class":
        if not has_class_token(model):
            raise ValueError(
                f"This {type(model).__name__} has no class token; ask for query='mean', the number "
                "of a token, or (row, column) of the grid."
            )
        return 0
    if isinstance(query, int):
        if not 0 <= query < num_tokens:
            raise ValueError(f"query={query} is out of range; tokens are 0 to {num_tokens - 1}.")
        return query
    if not isinstance(query, tuple) or len(query) != 2:
        raise ValueError(
            f"query={query!r} is no query; use 'class', 'mean', the number of a token, or (row, "
            "column) of the grid."
        )
    prefix, (rows, cols) = token_layout(model, size, num_tokens)
    row, col = query
    if not (0 <= row < rows and 0 <= col < cols):
        raise ValueError(
            f"query={query} is outside of the grid; rows are 0 to {rows - 1}, columns 0 to "
            f"{cols - 1}."
        )
    return prefix + row * cols + col


def _pull(mixed: Tensor, values: Tensor, query: int | None) -> Tensor:
    """Derivative of a query's mixed values by all values, (B, H, N, D) each: (B, H, N)."""
    cotangent = torch.ones_like(mixed)
    if query is not None:
        cotangent[:, :, :query] = 0.0
        cotangent[:, :, query + 1 :] = 0.0
    # All channels at once: a channel of the output depends on its own channel of the values.
    (slopes,) = torch.autograd.grad(mixed, values, cotangent)
    weights = _wide(slopes).mean(dim=-1)
    return weights / mixed.shape[2] if query is None else weights


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


_Choose = Callable[[int], int | None]


def _reader(site: Site) -> Callable[..., Tensor]:
    """What gives a layer's weights, (B, H, N), for the arguments of its forward.

    Raises:
        ValueError: It has none.
    """
    if isinstance(site.module, HeadsAttention):
        return _read_ours
    if isinstance(site.module, FNetMixing):
        raise ValueError(
            f"{site.name} is fnet, a Fourier transform over tokens and channels: it has no values "
            "to weigh and treats all images alike; choose a block or a model with attention."
        )
    if site.kind == "torch MultiheadAttention":
        return _read_torch
    if not site.kind.startswith("timm "):
        raise ValueError(
            f"No map over all tokens can be taken of {site.name} ({site.kind}): it {site.refused}."
        )
    return _read_timm


def _read_ours(
    layer: HeadsAttention, forward: Any, choose: _Choose, *args: Any, **kwargs: Any
) -> Tensor:
    """From the values to the mixed tokens of `HeadsAttention.mix_tokens`."""
    mix_tokens = layer.mix_tokens

    def instead(q: Tensor, k: Tensor, v: Tensor, *masks: Any) -> Tensor:
        # Heads that share their values have a weight each.
        values = v.expand(-1, layer.num_heads, -1, -1).clone().requires_grad_()
        with torch.enable_grad():
            mixed = mix_tokens(q, k, values, *masks)  # (B, N, H * D)
            mixed = torch.unflatten(mixed, -1, [layer.num_heads, -1]).transpose(1, 2)
            raise _Found(_pull(mixed, values, choose(values.shape[2])))

    try:
        with _instead(layer, "mix_tokens", instead):
            forward(*args, **kwargs)
    except _Found as found:
        return found.weights
    raise ValueError(f"{type(layer).__name__} does not call mix_tokens.")


class _FusedCall(TorchFunctionMode):
    """Ends a forward pass at its call of PyTorch's fused attention."""

    def __init__(self, choose: _Choose) -> None:
        super().__init__()
        self.choose = choose

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        with torch.enable_grad():
            values = v.clone().requires_grad_()
            mixed = func(q, k, values, *args[3:], **(kwargs or {}))
            raise _Found(_pull(mixed, values, self.choose(values.shape[2])))


def _read_timm(
    layer: nn.Module, forward: Any, choose: _Choose, *args: Any, **kwargs: Any
) -> Tensor:
    """Exact attention at its call of PyTorch's, behind rotations, with masks and biases."""
    try:
        with _instead(layer, "fused_attn", True), _FusedCall(choose):
            forward(*args, **kwargs)
    except _Found as found:
        return found.weights
    raise ValueError(f"{type(layer).__name__} does not call scaled_dot_product_attention.")


def _read_torch(
    layer: nn.MultiheadAttention,
    forward: Any,
    choose: _Choose,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **kwargs: Any,
) -> Tensor:
    """PyTorch's module gives its map, here of the asked rows alone."""
    axis = 1 if layer.batch_first else 0
    position = choose(key.shape[axis])
    rows = query if position is None else query.narrow(axis, position, 1)
    wanted = kwargs | {"need_weights": True, "average_attn_weights": False}
    weights: Tensor = forward(rows, key, value, **wanted)[1]  # (B, H, rows, N)
    return _wide(weights).mean(dim=2)


@contextlib.contextmanager
def _instead(owner: nn.Module, name: str, value: object) -> Iterator[None]:
    """Give one module another attribute or method for a while."""
    own = vars(owner)
    before = own.get(name, own)  # itself: there is none of its own
    own[name] = value
    try:
        yield
    finally:
        if before is own:
            del own[name]
        else:
            own[name] = before


def _uncompiled() -> contextlib.AbstractContextManager[object]:
    """Parts of a model that are compiled run as they were written (from torch 2.6 on)."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        eager: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    return contextlib.nullcontext()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
