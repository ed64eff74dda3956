"""Layers call their modules once, with every token: hooks, pruning and BatchNorm rely on it."""

import inspect

import pytest
import timm
import timm.layers
import torch
from timm.layers import Attention
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.heads import HeadsAttention

NAMES = [
    "softmax",
    "performer_softmax_m16",
    "performer_exp_m16",
    "performer_relu_m64",
    "performer_gelu_m16",
    "performer_elu_m16",
    "performer_learned_m16",
    "nystrom_l16",
    "nystrom_l16_conv33",
    "linformer_k32",
    "local1d_w16",
    "local2d_w4",
    "local1d_w16_shifted",
    "local2d_w4_shifted",
    "softmax_dwc",
    "linformer_k32_dwc",
    "hedgehog",
    "agent_a16",
]
SOME = ["performer_softmax_m16", "performer_relu_m64", "nystrom_l16", "linformer_k32", "local2d_w4"]
# Queries, keys and values of some KiB, and of 37 MiB: more than an allocator keeps at hand. Between
# norms a few MiB are enough, for nothing goes around those.
SHAPES = [(1, 32, 4), (8, 32, 4), (128, 384, 4)]
PARTS = ("qkv", "q_norm", "k_norm", "dwc", "norm", "gate", "proj", "proj_drop")
FAMILIES = {
    "vix_performer_relu_m64": {"depth": 2},
    "vix_linformer": {"depth": 2},
    "vix_local2d_w8": {"depth": 2},
    "hybrid_vix_nystrom": {"depth": 2},
    "levip": {"depth": 2},
    "levin": {"depth": 2},
    "ccn_4_3x2_32": {"depth": 2},
    "ccp_4_3x2_32": {"depth": 2},
}


def build(name, dim=32, num_heads=4, **kwargs):
    torch.manual_seed(0)
    settings = {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm, **kwargs}
    layer = attention_class(name)(dim, num_heads, qkv_bias=True, **settings)
    if layer.needs_layout:
        layer.set_layout((8, 8), 1, depth=int(name.endswith("_shifted")))
    return layer


def watch(modules):
    """Sizes of what each of the named modules is called with, as lists that fill up."""
    seen = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _, args, __, name=name: seen[name].append(args[0].shape)
        )
    return seen


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("B", "dim", "heads"), SHAPES, ids=["1", "8", "128"])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "norms"])
@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_called_once_with_all_tokens(name, bare, B, dim, heads, training):
    own = {"qk_norm": False, "scale_norm": False} if bare else {"gated": True}
    dim = dim if bare else min(dim, 96)
    layer = build(name, dim, heads, **own).train(training)
    seen = watch({part: getattr(layer, part) for part in PARTS if getattr(layer, part) is not None})
    with torch.set_grad_enabled(training):
        out = layer(torch.randn(B, 65, dim))
    assert out.shape == (B, 65, dim)
    for part, sizes in seen.items():
        expected = (B, 65, dim)
        if part in ("q_norm", "k_norm"):
            expected = (B, heads, 65, dim // heads)
        assert sizes == [expected], part


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("B", [2, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_call_attention_and_batch_norm_once(name, B, training):
    model = timm.create_model(name, **FAMILIES[name]).train(training)
    modules = {}
    for path, module in model.named_modules():
        if isinstance(module, HeadsAttention):
            modules |= {f"{path}.{part}": getattr(module, part) for part in ("qkv", "norm", "proj")}
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            modules[path] = module
    seen = watch(modules)
    with torch.set_grad_enabled(training):
        model(torch.randn(B, *model.default_cfg["input_size"]))
    tokens = seen["blocks.0.attn.qkv"][0][1]
    for path, sizes in seen.items():
        assert len(sizes) == 1, path
        # A BatchNorm over tokens sees them in a row.
        assert sizes[0][0] in (B, B * tokens), path


def change_qkv(layer, how):
    if how == "pruned":
        prune.l1_unstructured(layer.qkv, "weight", 0.5)
    elif how == "weight_norm":
        weight_norm(layer.qkv)
    elif how == "spectral_norm":
        spectral_norm(layer.qkv)
    elif how == "parametrized":
        parametrizations.weight_norm(layer.qkv)
    elif how == "replaced":
        layer.qkv = nn.Sequential(layer.qkv, nn.Tanh())
    elif how == "hooked":
        layer.qkv.register_forward_hook(lambda _, args, out: 2 * out)
    else:
        layer.qkv.register_full_backward_hook(lambda _, given, got: tuple(2 * g for g in given))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("B", [40])
@pytest.mark.parametrize(
    "how",
    ["pruned", "weight_norm", "spectral_norm", "parametrized", "replaced", "hooked", "backward"],
)
@pytest.mark.parametrize("name", ["softmax", *SOME])
def test_what_changes_a_projection_is_obeyed_step_after_step(name, how, B):
    plain, changed = (
        build(name, dim=16, num_heads=2, qk_norm=False, scale_norm=False) for _ in range(2)
    )
    change_qkv(changed, how)
    x = torch.randn(B, 65, 16, requires_grad=True)
    optimizer = torch.optim.SGD(changed.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        changed(x).square().mean().backward()
        optimizer.step()
    plain.load_state_dict(
        {key: changed.state_dict().get(key, value) for key, value in plain.state_dict().items()}
    )
    # The projection's own result, put into the layer that was left alone.
    mixed = changed.eval()(x)
    plain.qkv = nn.Identity()
    plain.qkv.forward = lambda x: changed.qkv(x)
    torch.testing.assert_close(plain.eval()(x), mixed)


def test_backward_hooks_fire_with_gradients_of_the_whole_batch():
    for name in NAMES:
        layer, sizes = build(name, dim=16, num_heads=2), []
        layer.qkv.register_full_backward_hook(
            lambda _, got, given, s=sizes: s.append(given[0].shape)
        )
        layer(torch.randn(40, 65, 16, requires_grad=True)).sum().backward()
        assert sizes == [(40, 65, 48)], name


@pytest.mark.parametrize("name", NAMES)
def test_takes_the_arguments_of_timms_attention(name):
    timms = inspect.signature(Attention).parameters
    ours = inspect.signature(HeadsAttention).parameters
    if "gated" in timms:  # timm 1.0.31
        assert list(ours) == [*timms, "dwc"]
    for argument, parameter in timms.items():
        assert ours[argument].default == parameter.default, argument
        assert ours[argument].kind == parameter.kind, argument
    build(
        name,
        **{
            key: p.default
            for key, p in timms.items()
            if key not in ("dim", "num_heads", "qkv_bias")
        },
    )


@pytest.mark.skipif("gated" not in inspect.signature(Attention).parameters, reason="older timm")
def test_gates_are_those_of_timm():
    torch.manual_seed(0)
    theirs = Attention(32, 4, gated=True, qkv_bias=True, scale_norm=True, norm_layer=nn.LayerNorm)
    ours = build("softmax", gated=True, qk_norm=False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 17, 32)
    torch.testing.assert_close(ours(x), theirs(x))
    assert build("performer_relu_m64").gate is None
