"""Local windows: timm's Swin where they fit, a masked full map where not, and what they reach."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FeaturePyramidNetwork

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)
from timm_xformers.layers import Local1dAttention, Local2dAttention
from timm_xformers.models.swin_local import FlatWindowBlock, GridWindowBlock, fit_bias

NAMES = ["swin_local_tiny", "swin_local1d_tiny"]
GRIDS = [(8, 8), (7, 7), (14, 14), (5, 11), (9, 4)]


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def make_block(kind, grid, shifted):
    torch.manual_seed(0)
    block = kind(
        dim=16,
        input_resolution=grid,
        num_heads=2,
        window_size=(4, 4),
        shift_size=(2, 2) if shifted else (0, 0),
    )
    nn.init.normal_(block.attn.relative_position_bias_table)
    return block.double().eval()


def places(kind, grid):
    """Row and column of each token; the flattened map has one row."""
    if kind in (FlatWindowBlock, Local1dAttention):
        return torch.stack([torch.zeros(grid[0] * grid[1]).long(), torch.arange(grid[0] * grid[1])])
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1)


def same_window(kind, grid, shifted):
    """Who sees whom, from the definition: windows start at multiples of w, or w / 2 later."""
    flat = kind in (FlatWindowBlock, Local1dAttention)
    tokens = grid[0] * grid[1]
    sides = (1, tokens) if flat else grid
    sizes = (1, min(16, tokens)) if flat else tuple(min(4, n) for n in grid)
    together = torch.ones(tokens, tokens, dtype=torch.bool)
    for place, side, size in zip(places(kind, grid), sides, sizes, strict=True):
        shift = size // 2 if shifted and side > size else 0
        number = (place - shift).div(size, rounding_mode="floor")
        together &= number.unsqueeze(1) == number
    return together


def reach(module, grid, token, dim=16):
    """Tokens that the output at one token depends on."""
    flat = isinstance(module, Local2dAttention) or all(
        isinstance(m, Local2dAttention) for m in module.children()
    )
    x = torch.randn(1, grid[0] * grid[1], dim, dtype=torch.float64, requires_grad=True)
    out = module(x if flat else x.reshape(1, *grid, dim)).reshape(-1, dim)
    (grad,) = torch.autograd.grad(out[token].square().sum(), x)
    return grad[0].abs().sum(-1) > 0


def layers(kind, grid):
    """A layer, and the same with its shifted successor."""
    if issubclass(kind, GridWindowBlock):
        pair = [make_block(kind, grid, False), make_block(kind, grid, True)]
    else:
        window = 16 if kind is Local1dAttention else 4
        pair = [kind(16, 2, window_size=window, neighbours=False, shifted=True) for _ in range(2)]
        for depth, layer in enumerate(pair):
            layer.double().set_layout(grid, 0, depth)
    return pair[0], nn.Sequential(*pair)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "kind", [GridWindowBlock, FlatWindowBlock, Local2dAttention, Local1dAttention]
)
def test_local_after_one_layer_and_across_borders_after_two(kind, grid):
    one, two = layers(kind, grid)
    first, second = same_window(kind, grid, False), same_window(kind, grid, True)
    after_two = (second.double() @ first.double()) > 0
    tokens = grid[0] * grid[1]
    crossed = False
    for token in {0, 3, tokens // 2, tokens - 1}:
        assert torch.equal(reach(one, grid, token), first[token])
        assert torch.equal(reach(two, grid, token), after_two[token])
        crossed |= bool((after_two[token] & ~first[token]).any())
    assert crossed


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", [GridWindowBlock, FlatWindowBlock])
def test_block_equals_a_masked_full_map(kind, grid, shifted):
    block = make_block(kind, grid, shifted)
    attn = block.attn
    tokens = grid[0] * grid[1]
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    q, k, v = attn.qkv(block.norm1(x)).reshape(2, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
    mask = same_window(kind, grid, shifted)
    place = places(kind, grid)
    height, width = attn.window_size
    away = place.unsqueeze(2) - place.unsqueeze(1)
    entry = (away[0] + height - 1) * (2 * width - 1) + away[1] + width - 1
    bias = attn.relative_position_bias_table[
        entry.clamp(0, attn.relative_position_bias_table.shape[0] - 1)
    ]
    scores = q @ k.mT * 8**-0.5 + bias.permute(2, 0, 1)
    mixed = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    y = x + attn.proj(mixed.transpose(1, 2).flatten(2))
    y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x.reshape(2, *grid, 16)).flatten(1, 2), y)


@pytest.mark.parametrize("name", NAMES)
def test_small_and_equal_in_cost(name):
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    flops = []
    for other in (model, build(NAMES[0])):
        with FlopCounterMode(display=False) as counter:
            other(torch.zeros(1, 3, 32, 32))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    ours, grid = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, build(NAMES[0])))
    assert ours.keys() == grid.keys()
    unlike = {k for k in ours if ours[k] != grid[k]}
    assert all(k.endswith("relative_position_bias_table") for k in unlike)


def test_grid_windows_equal_timms_swin_where_they_fit():
    ours = build("swin_local_tiny", img_size=64).double()
    theirs = timm.models.SwinTransformer(
        img_size=64,
        patch_size=2,
        num_classes=10,
        embed_dim=64,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        window_size=4,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.double().eval()(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [28, 26, 18, 8])
def test_images_that_windows_do_not_divide(name, side):
    model = build(name, img_size=side, in_chans=1)
    x = torch.randn(3, 1, side, side)
    maps = model.forward_intermediates(x, intermediates_only=True)
    expected = [side // 2, -(-side // 4), -(-side // 8)]
    assert [m.shape[-1] for m in maps] == expected
    together, alone = model(x), torch.cat([model(image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(together, alone)
    grown = build(name, img_size=32, in_chans=1)
    grown.set_input_size((side, side))
    grown.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(grown(x), together)


@pytest.mark.parametrize("name", NAMES)
def test_any_image_size_gives_the_same_as_the_size_built_for(name):
    fixed, free = build(name, img_size=28), build(name, strict_img_size=False)
    free.load_state_dict(fixed.state_dict(), strict=True)
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(free(x), fixed(x))


@pytest.mark.parametrize("name", NAMES)
def test_windows_keep_their_size_and_distances_their_bias(name):
    model = build(name, img_size=16)  # 8, 4 and 2 tokens to a side
    last = model.layers[2].blocks[0].attn
    near = last.relative_position_bias_table.detach().clone()
    small = last.window_size
    first = model.layers[0].blocks[1].window_size
    model.set_input_size((64, 64))
    assert model.layers[0].blocks[1].window_size == first
    assert max(last.window_size) > max(small)
    again = fit_bias(last.relative_position_bias_table, last.window_size, small)
    torch.testing.assert_close(again, near)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("name", NAMES)
def test_windows_can_be_changed(name):
    model, built = build(name), build(name, window_size=[2, (4, 2), 4])
    model.set_input_size(window_size=[2, (4, 2), 4])
    built.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), built(x))


def test_bias_entries_belong_to_distances():
    distance = torch.stack(torch.meshgrid(torch.arange(-2, 3), torch.arange(-1, 2), indexing="ij"))
    table = distance.reshape(2, -1).T  # windows of 3 x 2
    grown = fit_bias(table, (3, 2), (4, 4)).reshape(7, 7, 2)
    assert grown[3, 3].tolist() == [0, 0]
    assert grown[0, 0].tolist() == [-2, -1]
    assert grown[5, 4].tolist() == [2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_other_sizes_load(name):
    small = build(name, img_size=16)
    overlay = {"state_dict": small.state_dict(), "num_classes": 10}
    model = build(name, pretrained=True, pretrained_cfg_overlay=overlay)
    grown = build(name, img_size=16)
    grown.set_input_size((32, 32))
    for key, value in grown.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_checkpoint_of_an_unknown_window_is_refused():
    state = build("swin_local_tiny", img_size=16).state_dict()
    key = "layers.2.blocks.0.attn.relative_position_bias_table"
    state[key] = state[key][:8]
    with pytest.raises(ValueError, match=r"has 8 entries, which is not a square window"):
        build(
            "swin_local_tiny",
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "num_classes": 10},
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_segmentation_head_learns_on_the_features(name):
    """Every stage brought to the first one's size, one convolution to classes."""
    body = build(name, features_only=True, img_size=28)
    info = body.feature_info
    assert (info.channels(), info.reduction()) == ([64, 128, 256], [2, 4, 8])
    head = nn.Conv2d(sum(info.channels()), 5, 1)
    x = torch.randn(4, 3, 28, 28)
    target = torch.randint(0, 5, (4, 14, 14))

    def loss():
        maps = body(x)
        assert [m.shape[1] for m in maps] == info.channels()
        sizes = [-(-28 // stride) for stride in info.reduction()]
        assert [m.shape[-1] for m in maps] == sizes
        grown = [F.interpolate(m, size=(14, 14), mode="bilinear") for m in maps]
        return F.cross_entropy(head(torch.cat(grown, dim=1)), target)

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in (*body.parameters(), *head.parameters()):
            parameter -= 0.001 * (0 if parameter.grad is None else parameter.grad)
    assert loss() < before


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_pyramid_for_detection_fits(name):
    body = build(name, features_only=True, img_size=64, out_indices=(1, 2))
    assert body.feature_info.channels() == [128, 256]
    pyramid = FeaturePyramidNetwork(body.feature_info.channels(), 32)
    maps = dict(zip(("4", "8"), body(torch.randn(1, 3, 64, 64)), strict=True))
    levels = pyramid(maps)
    assert {k: v.shape for k, v in levels.items()} == {"4": (1, 32, 16, 16), "8": (1, 32, 8, 8)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"img_size": 29}, ValueError, r"img_size=29 is not a multiple of patch_size=2; use 28 or"),
        ({"window_size": (4, 4)}, ValueError, r"not one for each of 3 stages; give one number"),
        ({"depht": 3}, TypeError, r"depht"),
    ],
)
def test_refusals_say_what_to_do(arguments, error, message):
    with pytest.raises(error, match=message):
        build("swin_local_tiny", **arguments)
