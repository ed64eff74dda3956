"""The nano model: the study's counts, its formulas, its double softmax."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)
from timm_xformers.layers.positions import sinusoid


def nano(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vix_mnist_nano", **kwargs).double().eval()


def images():
    rng = torch.Generator().manual_seed(1)
    return torch.rand(2, 1, 28, 28, generator=rng, dtype=torch.float64)


def reference(state, x, depth):
    """The study's model, head by head on slices of four channels."""
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 49, 16)
    tokens = F.linear(
        patches, state["patch_embed.proj.weight"].reshape(8, 16), state["patch_embed.proj.bias"]
    )
    x = torch.cat([state["cls_token"].expand(2, 1, 8), tokens], dim=1) + sinusoid(50, 8).double()
    for i in range(depth):
        part = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if f"blocks.{i}." in k}
        y = F.layer_norm(x, (8,), part["norm1.weight"], part["norm1.bias"], eps=1e-6)
        mixed = []
        for head in range(2):
            piece = y[..., 4 * head : 4 * head + 4]
            q, k, v = (
                F.linear(
                    piece, part["attn.qkv.weight"][kind, head], part["attn.qkv.bias"][kind, head]
                )
                for kind in range(3)
            )
            mixed.append((q @ k.mT / 2).softmax(-1) @ v)
        x = x + torch.cat(mixed, dim=-1)
        y = F.layer_norm(x, (8,), part["norm2.weight"], part["norm2.bias"], eps=1e-6)
        y = F.gelu(F.linear(y, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = x + F.linear(y, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
    return F.linear(x[:, 0], state["head.weight"], state["head.bias"])


@pytest.mark.parametrize(
    ("depth", "mlp_ratio", "count"), [(2, 2, 1_098), (2, 4, 1_642), (3, 2, 1_530), (3, 4, 2_346)]
)
def test_counts_and_formulas_of_the_study(depth, mlp_ratio, count):
    model = nano(depth=depth, mlp_ratio=mlp_ratio)
    assert sum(p.numel() for p in model.parameters()) == count
    torch.testing.assert_close(
        model(images()), reference(model.state_dict(), images(), depth), rtol=1e-6, atol=1e-7
    )


def test_class_token_starts_as_in_the_study():
    token = nano().cls_token.detach()
    assert token.min() >= 0
    assert token.max() <= 1
    assert token.std() > 0.1


def test_double_softmax_is_off_and_bounds_the_loss_where_it_is_on():
    plain, doubled = nano(), nano(double_softmax=True)
    doubled.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(doubled(images()), plain(images()).softmax(-1))
    certain = 1e3 * torch.eye(10, dtype=torch.float64)
    target = torch.arange(10)
    bound = -math.log(math.e / (math.e + 9))
    assert bound == pytest.approx(1.4612, abs=1e-4)
    assert F.cross_entropy(certain.softmax(-1), target) == pytest.approx(bound)
    assert F.cross_entropy(certain.softmax(-1), target.roll(1)) == pytest.approx(bound + 1)


def test_any_mechanism_takes_the_slices():
    for mechanism in ("performer_relu_m16", "nystrom_l16", "local2d_w4"):
        model = nano(attn_layer=mechanism)
        assert model(images()).shape == (2, 10)
