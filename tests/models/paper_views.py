"""Our models, cut into the modules of the libraries that the ViX paper was run with.

The paper's columns are what torchsummary prints: it hooks every module but the root and plain
containers, and adds up, for each call, the weights and biases of the module and the elements of its
output. The figures therefore depend on how a library cuts a model into modules (a dropout that
drops nothing is a module; a relu that is a function is not), and on nothing else.

A view takes the projections, norms and convolutions of one of our models, wires them with the
formulas of the paper, in full and without shortcuts, and puts a module wherever the library has
one. It must print the paper's figures and compute what our model computes.
"""

import torch
from timm.models.levit import LinearNorm
from torch import nn
from torch.nn import functional as F

from timm_xformers.layers import (
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
    SoftmaxAttention,
)


def project(layer, x):
    """A projection of our attention, with LeViT's norm on channels where it has one."""
    if isinstance(layer, nn.Sequential):  # LeViT's output: a non-linearity first
        return project(layer.ln, layer.act(x))
    if isinstance(layer, LinearNorm):
        return layer.bn(layer.linear(x).mT).mT
    return layer(x)


def heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, N, D)


class Reorder(nn.Module):
    """A rearrangement that is a module in the libraries."""

    def forward(self, x):
        return x.contiguous()


class Attention(nn.Module):
    """Base of the library's attentions: our projections around `mix`."""

    def __init__(self, attn):
        super().__init__()
        self.qkv, self.out = attn.qkv, attn.proj
        self.num_heads, self.scale = attn.num_heads, attn.head_dim**-0.5
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = (heads(y, self.num_heads) for y in project(self.qkv, x).chunk(3, dim=-1))
        x = self.mix(q, k, v).transpose(1, 2).flatten(2)
        return self.drop(project(self.out, x))


class Exact(Attention):
    def __init__(self, attn):
        super().__init__(attn)
        self.attend = nn.Softmax(dim=-1)

    def mix(self, q, k, v):
        return self.attend(q @ k.mT * self.scale) @ v


class FastAttention(nn.Module):
    """Positive random features: the map phi(q) phi(k)^T, each row over its sum."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def phi(self, x):
        x = x * x.shape[-1] ** -0.25
        return (x @ self.features.mT - x.square().sum(-1, keepdim=True) / 2).exp()

    def forward(self, q, k, v):
        weight = self.phi(q) @ self.phi(k).mT
        return weight / weight.sum(-1, keepdim=True) @ v


class Performer(Attention):
    def __init__(self, attn):
        super().__init__(attn)
        self.fast = FastAttention(attn.features)

    def mix(self, q, k, v):
        return self.fast(q, k, v)


class Linformer(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.qkv, self.out = attn.qkv, attn.proj
        self.num_heads, self.width = attn.num_heads, attn.head_dim * attn.num_heads
        self.kv_heads, self.scale = attn.kv_heads, attn.head_dim**-0.5
        self.proj_k = attn.proj_k
        self.proj_v = attn.proj_k if attn.proj_v is None else attn.proj_v
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = self.qkv(x)
        q, kv = y[..., : self.width], y[..., self.width :]
        k, v = (kv, kv) if self.proj_v is self.proj_k else kv.chunk(2, dim=-1)
        k, v = self.proj_k @ heads(k, self.kv_heads), self.proj_v @ heads(v, self.kv_heads)
        weight = self.drop((heads(q, self.num_heads) @ k.mT * self.scale).softmax(-1))
        return self.out((weight @ v).transpose(1, 2).flatten(2))


class Nystrom(Attention):
    """The library fills the sequence up in front to a multiple of the landmarks.

    Our layer takes segments of unequal length instead, so what is mixed here is the sequence
    without its filling; the projections see all of it, for the sake of the size.
    """

    def __init__(self, attn):
        super().__init__(attn)
        self.landmarks, self.conv = attn.num_landmarks, attn.conv

    def forward(self, x):
        self.filled = -x.shape[1] % self.landmarks
        return super().forward(F.pad(x, (0, 0, self.filled, 0)))[:, self.filled :]

    def mix(self, q, k, v):
        residual = self.conv(v)
        q, k, v = (y[:, :, self.filled :] for y in (q, k, v))
        q_marks, k_marks = (
            torch.stack([part.mean(2) for part in y.tensor_split(self.landmarks, 2)], 2)
            for y in (q, k)
        )
        kernel_1 = (q @ k_marks.mT * self.scale).softmax(-1)
        kernel_2 = (q_marks @ k_marks.mT * self.scale).softmax(-1)
        kernel_3 = (q_marks @ k.mT * self.scale).softmax(-1)
        z = kernel_2.mT / kernel_2.sum(-2, keepdim=True).amax(-1, keepdim=True)
        one = torch.eye(self.landmarks, dtype=z.dtype)
        for _ in range(6):
            az = kernel_2 @ z
            z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
        return F.pad(kernel_1 @ (z @ (kernel_3 @ v)), (0, 0, self.filled, 0)) + residual


VIEWS = {
    SoftmaxAttention: Exact,
    PerformerAttention: Performer,
    LinformerAttention: Linformer,
    NystromAttention: Nystrom,
}


def view_of(attn):
    return next(view for kind, view in VIEWS.items() if isinstance(attn, kind))(attn)


class FeedForward(nn.Module):
    def __init__(self, mlp, last_drop):
        super().__init__()
        self.first, self.act, self.second = mlp.fc1, mlp.act, mlp.fc2
        self.drop = nn.Dropout(0.0)
        self.last_drop = nn.Dropout(0.0) if last_drop else None

    def forward(self, x):
        x = self.second(self.drop(self.act(self.first(x))))
        return x if self.last_drop is None else self.last_drop(x)


class Wrapped(nn.Module):
    """A module around others, whose output counts once more."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Residuals(nn.Module):
    """A trunk: x + branch(x), one branch after the other."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


class HeldTwice(nn.Module):
    """The Performer library's encoder, whose helper for redrawing holds the trunk once more."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.helper = Wrapped(trunk)  # never called

    def forward(self, x):
        return self.trunk(x)


def vix_trunk(model):
    mechanism = type(view_of(model.blocks[0].attn))
    branches = []
    for block in model.blocks:
        feed = FeedForward(block.mlp, last_drop=mechanism is Exact)
        if mechanism is Performer:
            feed = Wrapped(feed)  # feeds in chunks
        branches += [Wrapped(block.norm1, view_of(block.attn)), Wrapped(block.norm2, feed)]
    trunk = Residuals(branches)
    if mechanism is Performer:
        return HeldTwice(trunk)
    return Wrapped(trunk) if mechanism is Linformer else trunk


class ViXView(nn.Module):
    def __init__(self, model):
        super().__init__()
        embed = model.patch_embed
        self.convs = embed.convs if hasattr(embed, "convs") else nn.ModuleList([embed.proj])
        self.pixels = len(self.convs) == 1
        self.reorder = Reorder()
        self.cls_token, self.pos_embed = model.cls_token, model.pos_embed
        self.trunk = vix_trunk(model)
        # Only the wrapper of the exact model has a dropout behind the positions.
        exact = isinstance(model.blocks[0].attn, SoftmaxAttention)
        self.drop = nn.Dropout(0.0) if exact else None
        self.latent, self.norm, self.head = nn.Identity(), model.norm, model.head

    def forward(self, x):
        if self.pixels:
            x = self.reorder(x)
        for conv in self.convs:
            x = conv(x)
        if not self.pixels:
            x = self.reorder(x)
        x = x.flatten(2).mT
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        if self.drop is not None:
            x = self.drop(x)
        x = self.trunk(x)
        return self.head(self.norm(self.latent(x[:, 0])))


class LeViXView(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.convs = model.patch_embed.convs
        branches = []
        for block in model.blocks:
            attention = view_of(block.attn)
            if isinstance(attention, Performer | Linformer):  # libraries that know no maps
                attention = Wrapped(Reorder(), attention)
            branches += [attention, FeedForward(block.mlp, last_drop=True)]
        self.trunk = Residuals(branches)
        self.pool, self.reorder, self.head = nn.AdaptiveAvgPool1d(1), Reorder(), model.head

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        x = self.trunk(x.flatten(2).mT)
        return self.head(self.reorder(self.pool(x.mT).squeeze(-1)))


class Tokenizer(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.convs, self.act, self.pool = embed.convs, embed.acts[0], embed.pools[0]
        self.flat = nn.Flatten(2)

    def forward(self, x):
        for conv in self.convs:
            x = self.pool(self.act(conv(x)))
        return self.flat(x).mT


class EncoderLayer(nn.Module):
    """CCT's layer: the second norm lies in front of the second residual; gelu is a function."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.attention, self.norm2 = block.norm1, view_of(block.attn), block.norm2
        self.first, self.second = block.mlp.fc1, block.mlp.fc2
        self.drop_path, self.drop1, self.drop2 = nn.Identity(), nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        x = self.norm2(x + self.drop_path(self.attention(self.norm1(x))))
        y = self.second(self.drop1(F.gelu(self.first(x))))
        return x + self.drop_path(self.drop2(y))


class Classifier(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.pos_embed, self.drop = model.pos_embed, nn.Dropout(0.0)
        self.layers = nn.ModuleList(EncoderLayer(block) for block in model.blocks)
        self.norm, self.score, self.head = model.norm, model.attn_pool.score, model.head

    def forward(self, x):
        x = self.drop(x + self.pos_embed)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head((self.score(x).softmax(dim=1).mT @ x).squeeze(1))


class CCXView(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.tokenizer, self.classifier = Tokenizer(model.patch_embed), Classifier(model)

    def forward(self, x):
        return self.classifier(self.tokenizer(x))


def read(view, size=(3, 32, 32)):
    """Our own reading of a module tree, by torchsummary's rules.

    Returns:
        Leaf count, and size in MiB: the image, twice all outputs, the parameters, 4 bytes each.
    """
    parameters = elements = 0

    def count(module, _, output):
        nonlocal parameters, elements
        own = dict(module.named_parameters(recurse=False))
        parameters += sum(own[name].numel() for name in ("weight", "bias") if name in own)
        elements += output[0].numel()

    handles = []

    def hook(module):
        if module is not view and not isinstance(module, nn.Sequential | nn.ModuleList):
            handles.append(module.register_forward_hook(count))

    view.apply(hook)  # which comes to a module once for every parent
    view(torch.zeros(1, *size))
    for handle in handles:
        handle.remove()
    numbers = size[0] * size[1] * size[2] + 2 * elements + parameters
    return parameters, numbers * 4 / 2**20
