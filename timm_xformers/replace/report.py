"""What a replacement changes in numbers: parameters, multiply-adds and activation memory.

Measured, not estimated: each layer runs on tensors without data (`FakeTensorMode`), PyTorch counts
the multiply-adds of matrix products and convolutions, and what autograd keeps is what a layer adds
to the memory of training.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from timm_xformers.layers.layout import token_grid
from timm_xformers.replace.forms import Form, TorchForm
from timm_xformers.replace.sites import Site, token_width

__all__ = ["Cost", "Replacement", "Row", "measure"]


@dataclass(frozen=True)
class Cost:
    """What one layer costs for one image: parameters, multiply-adds, bytes kept for backward."""

    parameters: int
    multiply_adds: int | None
    activation_bytes: int | None


@dataclass(frozen=True)
class Row:
    """One attention of the report.

    Attributes:
        block: Its number.
        name: Its name in the model.
        mechanism: The mechanism before.
        becomes: The mechanism now.
        replaced: Whether it was replaced.
        why: Why it was, or was not.
        before: What the layer cost, for one image.
        after: What it costs now.
    """

    block: int
    name: str
    mechanism: str
    becomes: str
    replaced: bool
    why: str
    before: Cost
    after: Cost


@dataclass(frozen=True)
class Replacement:
    """The report of `replace_attention`; prints as a table.

    Attributes:
        rows: One per attention of the model, in forward order.
        record: Arguments with which `replace_attention` makes the same again.
        num_tokens: N of the figures; None where the model does not tell, and nothing is measured.
    """

    rows: tuple[Row, ...]
    record: dict[str, Any]
    num_tokens: int | None

    def __str__(self) -> str:
        """A table with totals; figures are for one image."""
        head = ("block", "name", "attention", "parameters", "multiply-adds", "activations", "why")
        lines = [
            (
                str(row.block),
                row.name,
                _arrow(row.mechanism, row.becomes if row.replaced else row.mechanism),
                *_figures(row.before, row.after),
                ("replaced" if row.replaced else "kept") + f", {row.why}",
            )
            for row in self.rows
        ]
        replaced = sum(row.replaced for row in self.rows)
        total = _figures(_sum([r.before for r in self.rows]), _sum([r.after for r in self.rows]))
        lines.append(("", "all", f"{replaced} of {len(self.rows)} replaced", *total, ""))
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        table = [
            "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *lines)
        ]
        if self.num_tokens is None:
            table.append("The model does not tell its number of tokens, so nothing was counted.")
        else:
            table.append(
                f"Attention layers alone, one image of {self.num_tokens} tokens, before -> after: "
                "multiply-adds of products and convolutions; activations kept for training."
            )
        return "\n".join(table)


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _figures(before: Cost, after: Cost) -> tuple[str, str, str]:
    return (
        _arrow(_count(before.parameters), _count(after.parameters)),
        _arrow(_count(before.multiply_adds), _count(after.multiply_adds)),
        _arrow(_bytes(before.activation_bytes), _bytes(after.activation_bytes)),
    )


def _count(number: int | None) -> str:
    if number is None:
        return "?"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _bytes(number: int | None) -> str:
    if number is None:
        return "?"
    unit, size = ("MiB", 2**20) if number >= 2**20 else ("KiB", 2**10)
    return f"{number / size:.2f} {unit}"


def _sum(costs: list[Cost]) -> Cost:
    def add(name: str) -> Any:
        values = [getattr(cost, name) for cost in costs]
        return None if None in values else sum(values)

    return Cost(add("parameters"), add("multiply_adds"), add("activation_bytes"))


def measure(
    model: nn.Module, pairs: list[tuple[Site, Form | None, str]], record: dict[str, Any]
) -> Replacement:
    """The report on what `put_in` did."""
    length = num_tokens(model)
    turned = any(isinstance(getattr(part, "rope", None), nn.Module) for part in model.children())
    known: dict[tuple[str, ...], Cost] = {}

    def costs(layer: nn.Module) -> Cost:
        # The layer that stood there shares its parts with the new one, so this can wait till now.
        key = (
            repr(layer),
            *[f"{n} {tuple(p.shape)} {p.dtype}" for n, p in layer.named_parameters()],
        )
        if key not in known:
            known[key] = _cost(layer, length, turned)
        return known[key]

    rows = []
    for site, new, why in pairs:
        old = site.module
        before = costs(old)
        after = before if new is None else costs(new)
        becomes = site.mechanism if new is None else str(new.replacement["mechanism"])
        rows.append(
            Row(site.index, site.name, site.mechanism, becomes, new is not None, why, before, after)
        )
    return Replacement(tuple(rows), record, length)


def num_tokens(model: nn.Module) -> int | None:
    """Tokens of an image of the model's size."""
    found = token_grid(model)
    if found is not None:
        (rows, columns), prefix = found
        return rows * columns + prefix
    for part in model.modules():  # NaFlexViT: those of its positions
        grid = getattr(getattr(part, "embeds", None), "pos_embed_grid_size", None)
        if grid is not None:
            return int(prod(grid)) + int(getattr(part, "num_prefix_tokens", 0))
    return None


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of PyTorch's fused attention on CPUs, which its counter does not know."""
    B, H, N, D = q
    return int(2 * B * H * N * k[-2] * (D + v[-1]))


_ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}


def _cost(layer: nn.Module, length: int | None, turned: bool) -> Cost:
    """What a layer costs for one image of ``length`` tokens, ``turned`` by rotary positions."""
    parameters = sum(p.numel() for p in layer.parameters())
    width = token_width(layer, int(getattr(layer, "attn_dim", 0)))
    if length is None or width == 0:
        return Cost(parameters, None, None)
    try:
        with _without_hooks(layer):
            return Cost(parameters, *_run(layer, length, width, turned))
    except Exception:
        # The replacement stands by now. A layer that cannot run without data (with weights in
        # another form, or a hook that makes them) has no figures, and the table says "?".
        return Cost(parameters, None, None)


def _run(layer: nn.Module, length: int, width: int, turned: bool) -> tuple[int, int]:
    """Multiply-adds of a layer's forward, and bytes that autograd keeps of it."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    like = next(p for p in layer.parameters() if p.is_floating_point())
    kept: dict[int, int] = {}
    with FakeTensorMode():
        fakes = {
            name: torch.empty(
                t.shape, device=t.device, dtype=t.dtype, requires_grad=isinstance(t, nn.Parameter)
            )
            for name, t in tensors.items()
        }
        own = {t.untyped_storage()._cdata for t in fakes.values()}
        x = torch.empty(1, length, width, device=like.device, dtype=like.dtype, requires_grad=True)

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return t

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter,
        ):
            out = functional_call(layer, fakes, *_arguments(layer, x, turned))
            del out
    return counter.get_total_flops() // 2, sum(kept.values())


@contextmanager
def _without_hooks(layer: nn.Module) -> Iterator[None]:
    """A user's hooks must not see tensors without data."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    held = [(vars(part), {n: vars(part)[n] for n in names}) for part in layer.modules()]
    try:
        for table, _ in held:
            table.update({name: OrderedDict() for name in names})
        yield
    finally:
        for table, hooks in held:
            table.update(hooks)


def _arguments(layer: nn.Module, x: Tensor, turned: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a block calls its attention."""
    if isinstance(layer, TorchForm | nn.MultiheadAttention):
        return (x, x, x), {"need_weights": False}
    prefix = getattr(layer, "unturned", getattr(layer, "num_prefix_tokens", None))
    if turned and hasattr(layer, "rotate_half") and prefix is not None:
        return (x,), {"rope": x.new_empty(x.shape[1] - prefix, 2 * layer.head_dim)}  # type: ignore
    return (x,), {}
