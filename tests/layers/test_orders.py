"""The faster order of a mechanism gives what its definition gives, and only where it may."""

import pytest
import torch
from torch import nn

from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.rotary import RotaryPositions

GRID = (8, 8)
CASES = [
    pytest.param("linformer_k32", {}, 1, id="linformer"),
    pytest.param("linformer_k32", {"qkv_bias": True, "attn_head_dim": 16}, 1, id="linformer-bias"),
    pytest.param("linformer_k32", {"share_kv": True, "qkv_bias": True}, 0, id="linformer-shared"),
    pytest.param(
        "linformer_k32",
        {"one_kv_head": True, "proj_len": 2, "num_heads": 2},
        1,
        id="linformer-one-head",
    ),
    pytest.param("local2d_w4_shifted", {"qkv_bias": True}, 0, id="windows"),
    pytest.param("local2d_w4_shifted", {"scale_norm": True}, 1, id="windows-class-token"),
    pytest.param("local2d_w4_shifted", {}, 5, id="windows-registers"),
    pytest.param("local1d_w16_shifted", {}, 1, id="windows-1d"),
]


def build(name, settings, prefix):
    torch.manual_seed(0)
    settings = {"num_heads": 4, "norm_layer": nn.LayerNorm, **settings}
    layer = attention_class(name)(32, dtype=torch.float64, **settings)
    if hasattr(layer, "set_layout"):
        layer.set_layout(GRID, prefix)
    for parameter in layer.parameters():  # initial projections of Linformer are nearly equal
        nn.init.normal_(parameter, std=0.3)
    rng = torch.Generator().manual_seed(1)
    return layer, torch.randn(2, prefix + 64, 32, generator=rng, dtype=torch.float64)


def run(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    rng = torch.Generator().manual_seed(2)
    upstream = torch.randn(out.shape, generator=rng, dtype=out.dtype)
    return out, torch.autograd.grad(out, [x, *layer.parameters()], upstream)


@pytest.mark.parametrize(("name", "settings", "prefix"), CASES)
def test_both_orders_agree(name, settings, prefix, monkeypatch):
    layer, x = build(name, settings, prefix)
    assert layer.mix_sooner(x) is not None
    fast, fast_grads = run(layer, x)
    monkeypatch.setattr(layer, "mix_sooner", lambda x: None)
    slow, slow_grads = run(layer, x)
    torch.testing.assert_close(fast, slow, atol=1e-11, rtol=1e-9)
    for ours, theirs in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["linformer_k32", "local2d_w4_shifted"])
@pytest.mark.parametrize("obstacle", ["qk_norm", "rope", "other projection"])
def test_what_depends_on_place_or_is_not_linear_keeps_the_definition(name, obstacle):
    layer, x = build(name, {"qk_norm": obstacle == "qk_norm"}, 0)
    if obstacle == "rope":
        layer.rope = RotaryPositions(8, GRID, 0, dtype=torch.float64)
    if obstacle == "other projection":
        layer.qkv = nn.Sequential(layer.qkv, nn.Tanh())
    assert layer.mix_sooner(x) is None
    assert layer(x).shape == x.shape


def test_linformer_takes_the_cheaper_order():
    layer, x = build("linformer_k32", {"proj_len": 64}, 0)
    assert layer.mix_sooner(x) is None, "as many slots as tokens"
    layer, x = build("linformer_k32", {"one_kv_head": True}, 0)
    assert layer.mix_sooner(x) is None, "one narrow head is cheaper to project first"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["linformer_k32", "local2d_w4_shifted"])
def test_the_early_order_keeps_what_tests_of_promises_hold(name):
    layer, x = build(name, {"qkv_bias": True}, 1)
    layer.eval()
    expected = layer(x)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    other = torch.cat([x[:1], 100 * x[1:]])
    assert torch.equal(layer(other)[0], expected[0]), "an image does not depend on its batch"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer.float()(x.float()).double()
    assert (narrow - expected).norm() / expected.norm() < 0.03
    assert layer.to("meta")(x.to("meta")).shape == x.shape


def test_windows_cut_early_drop_entries_of_the_map_in_training():
    layer, x = build("local2d_w4_shifted", {"attn_drop": 0.5}, 1)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
