"""The way in and out of attention, one form per family of models that it comes from.

A replaced layer is a mechanism joined with such a form (`attention_class(name, form)`). The form
takes over the submodules and parameters of the layer that stood there, the same objects under the
same names: checkpoints of the original load, and optimisers keep their references. It projects as
the original did, and is called as the original was.
"""

import logging
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.layers.heads import HeadsAttention

__all__ = ["BiasForm", "Form", "ParallelForm", "RotaryForm", "TorchForm"]

_logger = logging.getLogger(__name__)


class Form(HeadsAttention):
    """A mechanism around the parts of timm's `Attention`, or of a layer of this package.

    Attributes:
        original: The module that stood here. No submodule: what this layer took over are the same
            objects, and the rest waits for `give_back`.
        replacement: What made this layer: ``mechanism``, ``settings``, ``feature_seed``.
        site_index: Number of the attention in the model.
    """

    original: nn.Module
    replacement: dict[str, Any]
    site_index: int

    def adopt(self, original: nn.Module) -> None:
        """Take over an original's parts; called once, after the mechanism's constructor."""
        for name in ("qkv", "proj"):  # the original's, by its own names, take their place
            del self._modules[name]
        given = {**original._modules, **original._parameters}
        given = {name: part for name, part in given.items() if name not in self.left_out(original)}
        for name, part in given.items():
            setattr(self, name, part)
        self.exact_parts = (self.exact_parts | given.keys()) - {"dwc"}
        for name, value in vars(original).items():
            if "_hook" in name or name == "training":
                vars(self)[name] = value  # the same tables, so that the hooks' handles still work
        vars(self)["original"] = original  # past nn.Module, which would register it

    def left_out(self, original: nn.Module) -> set[str]:
        """Names of the original's parts that have no place here."""
        if isinstance(original, HeadsAttention):
            kept = original.exact_parts | {"rope", "attn_drop", "proj_drop"}
            if self.dwc is not None:
                kept |= {"dwc"}
            return {*original._modules, *original._parameters} - kept
        return set()

    def give_back(self) -> nn.Module:
        """The original, with what this layer took over as it is now."""
        original = self.original
        tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (self._modules, original._modules),
            (self._parameters, original._parameters),
        ]
        for mine, theirs in tables:
            for name in theirs.keys() & mine.keys():
                theirs[name] = mine[name]
        like = next(iter(self.parameters()))
        for name in self.left_out(original) & original._modules.keys():
            getattr(original, name).to(like)
        alone = original._parameters.keys() - self._parameters.keys()
        for part in [original._parameters[name] for name in alone]:
            if part is not None:
                part.data = part.data.to(like)
        for name, buffer in original._buffers.items():
            if buffer is not None:
                original._buffers[name] = buffer.to(
                    like.device, like.dtype if buffer.is_floating_point() else buffer.dtype
                )
        original.training = self.training
        return original

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for part in self.left_out(self.original):
            names = [
                n for n in state_dict if n == prefix + part or n.startswith(f"{prefix}{part}.")
            ]
            for name in names:
                del state_dict[name]
                _logger.warning("%s is left out: %s has no place for it.", name, self.mechanism)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RotaryForm(Form):
    """A mechanism around timm's `AttentionRope` or `EvaAttention`.

    Queries and keys are turned as there: half or interleaved, prefix tokens left as they are, by
    angles that come with each call.
    """

    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: Tensor | None
    v_bias: Tensor

    def adopt(self, original: nn.Module) -> None:
        """Take over an original's parts."""
        super().adopt(original)
        for name in ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias"):
            if not hasattr(self, name):
                setattr(self, name, None)
        self.groups = int(getattr(original, "num_kv_groups", 1))
        self.unturned = int(getattr(original, "num_prefix_tokens", 0))
        self.rotate_half = bool(getattr(original, "rotate_half", False))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) to queries (B, H, N, D), keys and values (B, H or fewer, N, D)."""
        if self.qkv is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            qkv = self.qkv(x)
            if self.q_bias is not None:  # keys have none
                bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
                qkv = qkv + bias
            q, k, v = qkv.chunk(3, dim=-1)
        heads = [torch.unflatten(t, -1, [-1, self.head_dim]).transpose(1, 2) for t in (q, k, v)]
        return heads[0], heads[1], heads[2]

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) to queries, keys and values as `mix` takes them, (B, H, N, D) each."""
        q, k, v = self.split(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turn(q, rope).to(v.dtype), self._turn(k, rope).to(v.dtype)
        if self.groups > 1:  # a key and value head serves so many query heads
            k = k.repeat_interleave(self.groups, dim=1)
            v = v.repeat_interleave(self.groups, dim=1)
        return q, k, v

    def _turn(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, grid = x[:, :, : self.unturned], x[:, :, self.unturned :]
        return torch.cat([prefix, apply_rot_embed_cat(grid, rope, half=self.rotate_half)], dim=2)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C), their angles in ``rope``, to (B, N, C)."""
        q, k, v = self.project(x, rope)
        return self.finish(x, self.mix_tokens(q, k, v, attn_mask, is_causal))


class BiasForm(RotaryForm):
    """A mechanism around attention with a relative bias (BEiT, ViT-RelPos), without the bias."""

    def left_out(self, original: nn.Module) -> set[str]:
        """Names of the biases."""
        return {"relative_position_bias_table", "rel_pos"}

    # The biases wait in the original; a model that changes its size resizes them there.

    @property
    def rel_pos(self) -> Any:
        """The bias of ViT-RelPos, which is not applied."""
        return getattr(self.original, "rel_pos", None)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resize the bias of BEiT, which is not applied, to a grid of so many rows and columns."""
        original: Any = self.original
        original.set_window_size(window_size)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        shared_rel_pos_bias: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens (B, N, C) to (B, N, C); a bias that all blocks share is left out too."""
        q, k, v = self.project(x)
        return self.finish(x, self.mix_tokens(q, k, v, None, False))


class TorchForm(Form):
    """A mechanism around PyTorch's `MultiheadAttention` in torchvision's blocks."""

    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Module

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) to queries, keys and values, (B, H, N, D) each."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Mixed tokens (B, N, C) to the output."""
        out: Tensor = self.out_proj(self.norm(mixed))
        return out

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Mix tokens (B, N, C), given three times as torchvision does, to (B, N, C) and None.

        Raises:
            ValueError: Other keys than queries, a mask, or maps are asked for.
        """
        if key is not query or value is not query:
            raise ValueError(
                "This layer mixes the tokens of one sequence; pass the same tensor as query, key "
                "and value."
            )
        if need_weights or attn_mask is not None or key_padding_mask is not None or is_causal:
            raise ValueError(
                f"{self.mechanism} attention in a torchvision model takes no masks and returns no "
                "maps; pass need_weights=False and no mask."
            )
        q, k, v = self.project(query)
        return self.finish(query, self.mix_tokens(q, k, v, None, False)), None


class ParallelForm(Form):
    """A mechanism in timm's `ParallelScalingBlock`, whose MLP stands beside the attention.

    The block's code holds the attention, so this layer is the whole block.
    """

    in_split: list[int]
    in_norm: nn.Module
    in_proj: nn.Module
    mlp_act: nn.Module
    mlp_drop: nn.Module
    mlp_bias: Tensor | None
    out_proj: nn.Module | None
    attn_out_proj: nn.Module
    mlp_out_proj: nn.Module
    ls: nn.Module
    drop_path: nn.Module

    def adopt(self, original: nn.Module) -> None:
        """Take over a block's parts."""
        super().adopt(original)
        self.in_split = list(original.in_split)  # type: ignore[arg-type]
        for name in ("mlp_bias", "out_proj", "attn_out_proj", "mlp_out_proj"):
            if not hasattr(self, name):
                setattr(self, name, getattr(original, name, None))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projection's part for the attention (B, N, 3 H D) to three of (B, H, N, D)."""
        q, k, v = x.chunk(3, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The block's tokens (B, N, C) to the same, its residual and MLP included."""
        joint = self.in_proj(self.in_norm(x))
        hidden, joint = joint.split([self.in_split[0], sum(self.in_split[1:])], dim=-1)
        q, k, v = self.project(joint)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        hidden = self.mlp_drop(self.mlp_act(hidden))
        mixed = self.norm(self.mix_tokens(q, k, v, attn_mask, is_causal))
        if self.out_proj is not None:
            y = self.out_proj(torch.cat([mixed, hidden], dim=-1))
        else:
            y = self.attn_out_proj(mixed) + self.mlp_out_proj(hidden)
        out: Tensor = x + self.drop_path(self.ls(y))
        return out
