"""The option ``dwc`` of every mechanism, against a sum over neighbours written out."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

import timm_xformers
from timm_xformers.layers.depthwise import grid_convolution
from timm_xformers.layers.factory import attention_class

NAMES = [
    "softmax_dwc",
    "performer_softmax_m32_dwc",
    "performer_relu_m32_dwc",
    "performer_learned_m32_dwc",
    "hedgehog_dwc",
    "nystrom_l16_conv33_dwc",
    "agent_a16_dwc",
    "linformer_k32_dwc",
    "local1d_w16_dwc",
    "local2d_w4_shifted_dwc",
]
GRID, PREFIX = (6, 9), 2
N = PREFIX + GRID[0] * GRID[1]


def build(name, *, trained=True, **kwargs):
    torch.manual_seed(0)
    layer = attention_class(name, **kwargs)(32, 4, qkv_bias=True).eval()
    layer.set_layout(GRID, PREFIX, depth=1)
    if trained:
        with torch.no_grad():
            layer.dwc.weight.normal_()
    return layer


def tokens(B=2, dtype=torch.float32, seed=0):
    return torch.randn(B, N, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def neighbours(x, weight, grid, prefix):
    """The sum itself, token by token: x (B, N, C), weight (C, 1, 3, 3)."""
    rows, cols = grid
    out = [torch.zeros_like(x[:, 0])] * prefix
    for row in range(rows):
        for col in range(cols):
            near = torch.zeros_like(x[:, 0])
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= row + dy < rows and 0 <= col + dx < cols:
                        token = x[:, prefix + (row + dy) * cols + col + dx]
                        near = near + token * weight[:, 0, dy + 1, dx + 1]
            out.append(near)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 4)], ids=str)
@pytest.mark.parametrize(("B", "C"), [(1, 8), (7, 3), (0, 8)])
def test_values_and_gradients_are_those_of_the_sum(grid, prefix, B, C):
    rng = torch.Generator().manual_seed(0)
    shapes = (B, prefix + grid[0] * grid[1], C), (C, 1, 3, 3)
    x, weight = (
        torch.randn(s, generator=rng, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    fast, slow = grid_convolution(x, weight, grid, prefix), neighbours(x, weight, grid, prefix)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn(fast.shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(fast, (x, weight), upstream),
        torch.autograd.grad(slow, (x, weight), upstream),
    )


@pytest.mark.parametrize("name", NAMES)
def test_changes_nothing_at_the_start_and_adds_the_sum_later(name):
    plain = build(name.removesuffix("_dwc"), trained=False)
    layer = build(name, trained=False)
    layer.load_state_dict({**layer.state_dict(), **plain.state_dict()})
    x = tokens()
    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.dwc.weight.grad.abs().min() > 0, "zero, but trained"
    with torch.no_grad():
        layer.dwc.weight.normal_()
        v = layer.project(x)[2].expand(-1, 4, -1, -1).transpose(1, 2).flatten(2)
        near = neighbours(v, layer.dwc.weight, GRID, PREFIX)
        expected = plain(x) + F.linear(near, layer.proj.weight)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_one_head_of_values_for_all_has_filters_for_each():
    layer = build("linformer_k32_dwc", one_kv_head=True)
    q, k, v = layer.project(tokens())
    assert v.shape[1] == 1
    near = layer.mix_tokens(q, k, v, None, False) - layer.mix(q, k, v, None, False).transpose(
        1, 2
    ).flatten(2)
    expected = neighbours(v[:, 0].repeat(1, 1, 4), layer.dwc.weight, GRID, PREFIX)
    torch.testing.assert_close(near, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_left_out_count_as_zero(name, additive):
    layer = build(name).double()
    x = tokens(dtype=torch.float64)
    keep = torch.rand(2, 1, 1, N, generator=torch.Generator().manual_seed(3)) > 0.4
    mask = torch.zeros(keep.shape).masked_fill(~keep, -1e9) if additive else keep
    kept = keep[:, 0, 0].unsqueeze(-1)
    changed = torch.where(kept, x, 7 * tokens(dtype=torch.float64, seed=5))
    out = layer(x, attn_mask=mask)
    torch.testing.assert_close(out * kept, layer(changed, attn_mask=mask) * kept)
    assert (out - layer(x)).abs().max() > 1e-3, "the mask matters"
    none = layer(x, attn_mask=torch.zeros_like(keep))
    assert none.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_honoured_is_refused(name):
    layer, x = build(name), tokens()
    with pytest.raises(ValueError, match="is_causal=True cannot be honoured"):
        layer(x, is_causal=True)
    with pytest.raises(ValueError, match="pass one row for all queries"):
        layer(x, attn_mask=torch.ones(2, 1, N, N, dtype=torch.bool))
    if name != "linformer_k32_dwc":  # whose projection is for one length, and says so first
        with pytest.raises(ValueError, match="do not fill a grid of 6 x 9 and 2 prefix tokens"):
            layer(x[:, 1:])
    untold = attention_class(name)(32, 4)
    with pytest.raises(ValueError, match="has not been told where tokens lie"):
        untold(x)
    assert untold.needs_layout
    assert not attention_class(name).causal


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    layer, x = build(name), tokens()
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            narrow = layer(x).float()
        assert (narrow - expected).norm() / expected.norm() < 0.03
        narrow = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert narrow.dtype == dtype
        assert (narrow.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_graphs_hold_the_filters():
    layer, x = build("softmax_dwc"), tokens()
    expected = layer(x)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (tokens(3),), dynamic_shapes=({0: batch},))
    torch._dynamo.reset()
    for graph in (
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.fx.symbolic_trace(layer),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        program.module(),
    ):
        torch.testing.assert_close(graph(x), expected)


def test_weights_of_layers_without_it_load_and_the_log_says_so(caplog):
    exact, performer = build("softmax", trained=False), build("performer_relu_m32", trained=False)
    near, both = build("softmax_dwc"), build("performer_relu_m32_dwc", trained=False)
    for given, lacking in ((exact, "features, dwc.weight"), (performer, "dwc.weight")):
        caplog.clear()
        both.load_state_dict(given.state_dict())
        assert f"has no {lacking} for the layer" in caplog.text
        assert torch.equal(both.qkv.weight, given.qkv.weight)
        assert (both.dwc.weight == 0).all()
    caplog.clear()
    both.load_state_dict(near.state_dict())
    assert "has no features for" in caplog.text
    assert torch.equal(both.dwc.weight, near.dwc.weight)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*dwc\.weight"):
        exact.load_state_dict(near.state_dict())


@pytest.mark.parametrize("weight_init", ["", "jax", "moco"])
def test_in_a_model_of_timm(weight_init):
    small = {"img_size": (32, 64), "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 3}
    torch.manual_seed(0)
    exact = timm.create_model("vit_tiny_patch16_224", **small).eval()
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer="softmax_dwc", weight_init=weight_init, **small
    ).eval()
    timm_xformers.set_token_layout(model)
    model.load_state_dict(exact.state_dict())
    x = torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(model(x), exact(x))
    assert all((block.attn.dwc.weight == 0).all() for block in model.blocks)
    assert model.blocks[0].attn.grid_size == (2, 4)


def test_in_a_model_of_ours():
    small = {"depth": 2, "num_classes": 3, "attn_kwargs": {"dwc": True}}
    torch.manual_seed(0)
    model = timm.create_model("vix_nystrom", img_size=32, **small).eval()
    with torch.no_grad():
        model.blocks[0].attn.dwc.weight.normal_()
    model.set_input_size((16, 48))
    assert model(torch.randn(1, 3, 16, 48)).shape == (1, 3)
    dwc = r"convolution of the values \(dwc\)"
    with pytest.raises(ValueError, match=rf"{dwc} is built for one grid.*dynamic_img_size=True"):
        timm.create_model("vix_nystrom", dynamic_img_size=True, **small)
    with pytest.raises(ValueError, match=rf"{dwc} needs every token.*patch_drop_rate=0.5"):
        timm.create_model("vix_softmax", patch_drop_rate=0.5, **small)


def test_grids_that_change_are_refused_in_models_of_timm():
    small = {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 3}
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer="softmax_dwc", dynamic_img_size=True, **small
    )
    with pytest.raises(ValueError, match="softmax attention with dwc has not been told"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="softmax attention with dwc is built for one grid"):
        timm_xformers.set_token_layout(model)
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer="softmax_dwc", patch_drop_rate=0.5, **small
    )
    timm_xformers.set_token_layout(model)
    with pytest.raises(ValueError, match="leave no token out"):
        model.train()(torch.randn(1, 3, 32, 32))


def test_fnet_has_no_values():
    with pytest.raises(ValueError, match="fnet mixes tokens without values"):
        attention_class("fnet", dwc=True)(32)
    assert "fnet_dwc" not in timm_xformers.list_attention()
