"""Implied maps against explicit ones: our mechanisms, timm's layers and torchvision's."""

import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_xformers import attention_map
from timm_xformers.explaining.maps import token_layout
from timm_xformers.replace import attention_sites, replace_attention

ONE_OF_EACH = [
    *(f"performer_{kernel}_m16" for kernel in ("softmax", "relu", "exp", "gelu", "elu", "learned")),
    *("hedgehog", "agent_a16", "softmax_dwc", "nystrom_l16_dwc"),
    *("softmax", "nystrom_l16", "nystrom_l16_conv33", "linformer_k32"),
    *("local1d_w16", "local1d_w16_shifted", "local2d_w4", "local2d_w4_shifted"),
]
SUM_TO_ONE = ("softmax", "performer", "local")


def small(attention: str, **kwargs) -> nn.Module:
    """Two blocks, two heads of eight, 7 x 9 tokens behind a class token, weights spread."""
    torch.manual_seed(0)
    sizes = {"img_size": (7, 9), "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1}
    model = timm.create_model("vix_softmax", attn_layer=attention, **sizes, **kwargs).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def pictures(count: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 7, 9, generator=rng, dtype=torch.float64)


def whole_map(model: nn.Module, images: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every row, by mixing one token's values after the other; and the queries and keys."""
    layer = model.blocks[block].attn
    given = []
    hook = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        model(images)
        hook.remove()
        q, k, v = layer.project(given[0])
        columns, spread = [], []
        for token in range(v.shape[2]):
            one = torch.zeros_like(v)
            one[:, :, token] = 1.0
            mixed = torch.unflatten(layer.mix_tokens(q, k, one, None, False), -1, (2, 8))
            spread.append(float((mixed - mixed[..., :1]).abs().max()))
            columns.append(mixed.mean(dim=-1).transpose(1, 2))
    # What differs by channel counts by its mean.
    assert (max(spread) > 0.1) if layer.dwc is not None else (max(spread) < 1e-12)
    return torch.stack(columns, dim=-1), q, k  # (B, H, N, N)


@pytest.mark.parametrize("attention", ONE_OF_EACH)
def test_every_mechanism_by_its_own_linearity(attention):
    model, images = small(attention), pictures()
    expected, _, _ = whole_map(model, images, 1)
    for token in (0, 1, 40):
        found = attention_map(model, images, 1, token)
        assert found.shape == (2, 2, 64)
        torch.testing.assert_close(found, expected[:, :, token], atol=1e-12, rtol=0)
    mean = attention_map(model, images, 1, "mean")
    torch.testing.assert_close(mean, expected.mean(dim=2), atol=1e-12, rtol=0)
    if attention.startswith(SUM_TO_ONE) and not attention.endswith("_dwc"):
        torch.testing.assert_close(mean.sum(-1), torch.ones_like(mean[..., 0]), atol=1e-9, rtol=0)


def softmax_map(q, k, hidden=None):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(dim=-1)


def phi(x, omega, kernel, is_key):
    x = x * x.shape[-1] ** -0.25
    y = x @ omega.T
    norm = x.square().sum(-1, keepdim=True) / 2
    return {
        "softmax": lambda: (y - norm).exp(),
        "exp": lambda: y.exp(),
        "relu": lambda: y.relu() + 1e-3,
        "elu": lambda: F.elu(y) + 1.001,
    }[kernel]()


@pytest.mark.parametrize("kernel", ["softmax", "exp", "relu", "elu"])
def test_kernels_against_their_formula(kernel):
    model, images = small(f"performer_{kernel}_m16"), pictures()
    _, q, k = whole_map(model, images, 0)
    omega = model.blocks[0].attn.features
    weights = phi(q, omega, kernel, False) @ phi(k, omega, kernel, True).transpose(-2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    found = attention_map(model, images, 0, 7)
    torch.testing.assert_close(found, weights[:, :, 7], atol=1e-10, rtol=0)


def test_softmax_and_windows_against_their_formula():
    images = pictures()
    for attention in ("softmax", "local1d_w16", "local2d_w4_shifted"):
        model = small(attention)
        _, q, k = whole_map(model, images, 1)
        hidden = torch.zeros(64, 64, dtype=torch.bool)
        place = torch.arange(63)
        if attention == "local1d_w16":
            window = place // 16
            hidden[1:, 1:] = (window[:, None] - window).abs() > 1
        elif attention == "local2d_w4_shifted":  # block 1: moved by two rows and columns
            rows, cols = (place // 9 + 2) // 4, (place % 9 + 2) // 4
            hidden[1:, 1:] = (rows[:, None] != rows) | (cols[:, None] != cols)
        expected = softmax_map(q, k, hidden)
        for token in (0, 20, 63):
            found = attention_map(model, images, 1, token)
            torch.testing.assert_close(found, expected[:, :, token], atol=1e-12, rtol=0)
            assert (found == 0).any() == hidden[token].any()


def test_linformer_and_nystrom_against_their_formula():
    images = pictures()
    model = small("linformer_k32")
    _, q, k = whole_map(model, images, 0)
    layer = model.blocks[0].attn
    expected = softmax_map(q, layer.proj_k @ k) @ layer.proj_v
    found = attention_map(model, images, 0)
    torch.testing.assert_close(found, expected[:, :, 0], atol=1e-10, rtol=0)

    model = small("nystrom_l16_conv33", attn_kwargs={"pinv_steps": 40})
    _, q, k = whole_map(model, images, 0)
    marks = [x.unflatten(2, (16, 4)).mean(dim=3) for x in (q, k)]
    inverse = torch.linalg.pinv(softmax_map(*marks))
    expected = softmax_map(q, marks[1]) @ inverse @ softmax_map(marks[0], k)
    taps = model.blocks[0].attn.conv.weight.flatten(1)  # (H, 33)
    step = torch.arange(64)[None] - 30 + 16  # of token 30
    inside = (step >= 0) & (step < 33)
    expected = expected[:, :, 30] + taps[:, step[0].clamp(0, 32)] * inside
    found = attention_map(model, images, 0, 30)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


FAMILIES = {
    "vit_tiny_patch16_224": {"qk_norm": True},
    "vit_small_patch16_dinov3": {},  # rotary positions, registers
    "eva02_tiny_patch14_224": {},
    "beit_base_patch16_224": {"embed_dim": 32, "num_heads": 2},
    "vit_relpos_small_patch16_224": {},
    "vit_tiny_patch16_xp": {},  # parallel branches
}


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_layers_against_the_map_that_they_drop(name):
    kwargs = {"depth": 2, "num_classes": 2, **FAMILIES[name]}
    if name.endswith("_xp"):
        name = "vit_tiny_patch16_224"
        kwargs["block_fn"] = timm.models.vision_transformer.ParallelScalingBlock
    side = 56 if "patch14" in name else 64
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=side, **kwargs).double().eval()
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    layer = attention_sites(model)[1].module
    assert layer.fused_attn
    queries = (0, 3, (1, 2))
    found = [attention_map(model, images, 1, query) for query in queries]
    mean = attention_map(model, images, 1, "mean")
    assert layer.fused_attn
    layer.fused_attn = False
    maps = []
    layer.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    with torch.no_grad():
        model(images)
    prefix, (_, cols) = token_layout(model, (side, side), maps[0].shape[2])
    for token, weights in zip((0, 3, prefix + cols + 2), found, strict=True):
        torch.testing.assert_close(weights, maps[0][:, :, token], atol=1e-12, rtol=0)
    torch.testing.assert_close(mean, maps[0].mean(dim=2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["torchvision", "parallel", "dinov3"])
def test_replaced_layers_of_other_families(name):
    torch.manual_seed(0)
    if name == "torchvision":
        model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=2)
    elif name == "parallel":
        block = timm.models.vision_transformer.ParallelScalingBlock
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, block_fn=block)
    else:
        model = timm.create_model("vit_small_patch16_dinov3", img_size=32, depth=2)
    model = model.double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = attention_map(model, images, 1, (1, 1))
    replace_attention(model, "softmax")
    found = attention_map(model, images, 1, (1, 1))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    replace_attention(model, "performer_relu_m16")
    sums = attention_map(model, images, 1, (1, 1)).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-12, rtol=0)


def test_torchvision_against_its_joint_projection():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=2)
    model = model.double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    layer = model.encoder.layers[1].self_attention
    given = []
    hook = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    found = attention_map(model, images, 1)
    hook.remove()
    joint = F.linear(given[0], layer.in_proj_weight, layer.in_proj_bias)
    q, k, _ = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in joint.chunk(3, dim=-1))
    expected = softmax_map(q, k)
    torch.testing.assert_close(found, expected[:, :, 0], atol=1e-12, rtol=0)
    mean = attention_map(model, images, 1, "mean")
    torch.testing.assert_close(mean, expected.mean(dim=2), atol=1e-12, rtol=0)
    pixel = attention_map(model, images, 1, (1, 2))
    torch.testing.assert_close(pixel, expected[:, :, 7], atol=1e-12, rtol=0)


def test_queries_name_tokens():
    model, images = small("softmax"), pictures()
    by_class, by_place = attention_map(model, images, 0), attention_map(model, images, 0, (2, 3))
    assert torch.equal(by_class, attention_map(model, images, 0, 0))
    assert torch.equal(by_place, attention_map(model, images, 0, 1 + 2 * 9 + 3))


@pytest.mark.parametrize("attention", ["softmax", "nystrom_l16", "performer_relu_m16"])
def test_an_image_does_not_see_its_neighbours(attention):
    model, images = small(attention), pictures(3)
    alone = attention_map(model, images[1:2], 1)
    torch.testing.assert_close(attention_map(model, images, 1)[1:2], alone, atol=1e-13, rtol=0)


def state_of(model: nn.Module):
    return [
        (module.training, {*vars(module)}, [*module._forward_pre_hooks], [*module._forward_hooks])
        for module in model.modules()
    ]


@pytest.mark.parametrize("attention", ["softmax", "performer_relu_m16", "timm"])
def test_the_model_stays_as_it_was(attention):
    if attention == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, drop_rate=0.5)
        images = torch.randn(2, 3, 32, 32)
    else:
        model, images = small(attention, proj_drop_rate=0.5), pictures()
    model.train()
    model.blocks[0].eval()  # frozen by its owner
    seen = []
    model.blocks[1].attn.proj.register_forward_hook(lambda *args: seen.append(1))
    before = state_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    first = attention_map(model, images, 1)
    with torch.inference_mode():
        second = attention_map(model, images * 1, 1)
    with torch.no_grad():
        third = attention_map(model, images, 1)
        assert not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="out of range"):
        attention_map(model, images, 1, 1000)
    assert torch.is_grad_enabled()
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not first.requires_grad
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not seen
    model(images)
    assert seen


@pytest.mark.slow
def test_compiled_models():
    model, images = small("softmax"), pictures()
    expected = attention_map(model, images, 1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images)
    assert torch.equal(attention_map(compiled, images, 1), expected)
    model.blocks[1].compile(backend="eager")
    with torch.no_grad():
        model(images)
    assert torch.equal(attention_map(model, images, 1), expected)


def test_half_precision_models():
    model, images = small("softmax"), pictures()
    expected = attention_map(model, images, 1)
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        found = attention_map(model.to(dtype), images.to(dtype), 1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("attention", ["softmax", "performer_softmax_m16", "nystrom_l16"])
def test_no_map_is_formed(attention):
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.most = max([self.most, *sizes])
            return out

    model = timm.create_model("vix_softmax", attn_layer=attention, depth=1, in_chans=1)
    with Largest() as largest:
        attention_map(model, torch.randn(1, 1, 32, 32), 0)
    assert largest.most < 1025 * 1025


@pytest.mark.parametrize(
    ("name", "kwargs", "block", "query", "sentence"),
    [
        ("vix_mnist_nano", {}, 99, "class", "block=99 is out of range.* 0 to "),
        ("vix_mnist_nano", {}, -1, "class", "block=-1 is out of range"),
        ("vix_mnist_nano", {}, 0, 10**6, "query=1000000 is out of range; tokens are 0 to "),
        ("vix_mnist_nano", {}, 0, (0, 99), "outside of the grid; rows are 0 to "),
        ("vix_mnist_nano", {}, 0, "row", "query='row' is no query; use 'class', 'mean'"),
        ("ccp", {"depth": 1}, 0, "class", "CCX has no class token; ask for query='mean'"),
        ("vit_medium_patch16_reg1_gap_256", {"depth": 1}, 0, "class", "has no class token"),
        ("vix_fnet", {"depth": 1}, 0, "class", "blocks.0.attn is fnet, a Fourier transform"),
        ("swin_local_tiny", {}, 0, "class", "No map over all tokens .*: it attends in windows"),
        ("resnet18", {}, 0, "class", "ResNet has no attention"),
        ("xcit_nano_12_p16_224", {}, 0, "class", "No map over all tokens .*: it attends over ch"),
    ],
)
def test_what_has_no_map_is_said(name, kwargs, block, query, sentence):
    model = timm.create_model(name, **kwargs)
    images = torch.zeros(1, *model.default_cfg["input_size"])
    with pytest.raises(ValueError, match=sentence):
        attention_map(model, images, block, query)
