"""What is particular to ViX: names, positions, rotary option, timm's weights, refusals."""

import pytest
import timm
import torch

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)

SIZES = (16, 32, 64, 128, 256)
EXPECTED = {
    "vix_softmax",
    *(f"vix_performer_{kernel}_m{m}" for kernel in ("softmax", "relu") for m in SIZES),
    *(f"vix_performer_{kernel}_m64" for kernel in ("exp", "gelu", "elu", "learned")),
    "vix_nystrom",
    "vix_linformer",
    *(f"vix_local1d_w{w}" for w in (16, 64, 256)),
    *(f"vix_local2d_w{w}" for w in (4, 8, 16)),
    "vix_fnet",
    "hybrid_vix_softmax",
    "hybrid_vix_performer_relu_m64",
    "hybrid_vix_performer_softmax_m32",
    "hybrid_vix_nystrom",
    "hybrid_vix_linformer",
    *(
        f"vix_{size}_patch16_224_{mechanism}"
        for size in ("tiny", "small", "base")
        for mechanism in ("performer_relu_m64", "performer_softmax_m64", "nystrom_l64")
    ),
}
ROTARY = [
    "vix_softmax",
    "vix_performer_softmax_m32",
    "vix_performer_learned_m64",
    "vix_nystrom",
    "vix_linformer",
    "vix_local1d_w64",
    "vix_local2d_w8",
    "hybrid_vix_nystrom",
]


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"img_size": 8, "depth": 2, **kwargs}).eval()


def test_names_are_those_of_the_specification():
    assert set(timm.list_models("*vix*")) >= EXPECTED


def test_named_model_is_what_it_says():
    model = timm.create_model("vix_performer_softmax_m32")
    attention = model.blocks[0].attn
    assert (model.embed_dim, len(model.blocks), attention.num_heads) == (128, 4, 4)
    assert (attention.head_dim, attention.num_features) == (32, 32)
    assert model.blocks[0].mlp.fc1.out_features == 256
    assert model.pos_embed.shape == (1, 1025, 128)
    assert attention.qkv.bias is None
    features = {block.attn.features.flatten()[0].item() for block in model.blocks}
    assert len(features) == 4, "each layer has its own random features"


@pytest.mark.parametrize("side", [4, 8, 16])
def test_windows_are_shifted_in_every_second_block_and_come_in_pairs(side):
    grid = timm.create_model(f"vix_local2d_w{side}")
    flat = timm.create_model(f"vix_local1d_w{side * side}")
    assert [block.attn.shift for block in grid.blocks] == [0, side // 2] * 2
    assert [block.attn.shift for block in flat.blocks] == [0, side * side // 2] * 2


def test_positions_have_unit_variance_by_default():
    assert abs(timm.create_model("vix_softmax").pos_embed.detach().std() - 1.0) < 0.02
    assert abs(small("vix_softmax", pos_embed_std=0.02).pos_embed.detach().std() - 0.02) < 0.002


def test_feature_seed_is_the_models_own():
    one, two = small("vix_performer_relu_m16"), small("vix_performer_relu_m16", feature_seed=3)
    assert not torch.equal(one.blocks[0].attn.features, two.blocks[0].attn.features)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_reach_every_mechanism(name):
    plain, turned = small(name).double(), small(name, rope=True).double()
    with torch.no_grad():  # queries and keys of a trained model's size
        for block in plain.blocks:
            block.attn.qkv.weight *= 10
    turned.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert (plain(x) - turned(x)).abs().max() > 1e-6
    turned.float().set_input_size((16, 16))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.jit.script(turned)(x), turned(x))


def test_rotary_scores_depend_on_distance_alone():
    attention = small("vix_softmax", rope=True).double().blocks[0].attn
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64).unbind(0)
    every = torch.ones(1, 1, 65, 1, dtype=torch.float64)
    scores = (attention.rope(q * every) @ attention.rope(k * every).mT)[0, 0, 1:, 1:]
    scores = scores.reshape(8, 8, 8, 8)  # from (row, column) to (row, column)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[4, 4, 6, 7])
    assert (scores[0, 0, 2, 3] - scores[0, 0, 3, 2]).abs() > 1e-6


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_weights_of_timms_vit_load_unchanged(size):
    torch.manual_seed(0)
    theirs = timm.create_model(f"vit_{size}_patch16_224", img_size=96, depth=3).eval()
    x = torch.randn(2, 3, 96, 96)
    for mechanism in ("performer_relu_m64", "performer_softmax_m64", "nystrom_l64"):
        ours = timm.create_model(f"vix_{size}_patch16_224_{mechanism}", img_size=96, depth=3).eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        if mechanism == "nystrom_l64":  # 37 tokens are fewer than 64 landmarks: exact
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{"attn_layer": "softmax"}, {"attn_kwargs": {"num_landmarks": 197}}],
    ids=["exact", "as many landmarks as tokens"],
)
def test_outputs_are_timms_at_full_size_where_the_mechanism_is_exact(arguments):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224").eval()
    name = "vix_tiny_patch16_224_nystrom_l64"
    # The published path: timm hands its weights to our filter.
    overlay = {"state_dict": theirs.state_dict(), "num_classes": 1000}
    ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_hybrid_strides_stand_for_patches():
    for patch in (1, 2, 4, 8):
        model = small("hybrid_vix_softmax", img_size=16, patch_size=patch)
        assert model.patch_embed.grid_size == (16 // patch, 16 // patch)
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 10)
    with pytest.raises(ValueError, match="patch_size=3 is not available; use 1, 2, 4 or 8"):
        small("hybrid_vix_softmax", img_size=15, patch_size=3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "vix_softmax",
            {"img_size": 30, "patch_size": 4},
            r"img_size=30 is not a multiple of patch_size=4; use 28 or 32",
        ),
        ("hybrid_vix_softmax", {"img_size": 30, "patch_size": 4}, r"use 28 or 32"),
        ("vix_fnet", {"rope": True}, r"fnet has no queries and keys"),
        (
            "vix_softmax",
            {"rope": True, "attn_head_dim": 30},
            r"head_dim=30 must be a multiple of 4",
        ),
        (
            "vix_softmax",
            {"rope": True, "dynamic_img_size": True},
            r"rotary positions is built for one grid",
        ),
        ("vix_local1d_w64", {"patch_drop_rate": 0.1}, r"needs every token in its place"),
        ("vix_performer_relu_m16", {"attn_drop_rate": 0.1}, r"attn_drop=0.1 cannot be honoured"),
        ("vix_softmax", {"attn_layer": "nystrm_l64"}, r"did you mean nystrom_l64"),
    ],
)
def test_refusals_say_what_to_do(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(name, **arguments)


def test_tokens_that_training_leaves_in_keep_their_order():
    model = timm.create_model("vix_nystrom", img_size=8, patch_drop_rate=0.5)
    places = torch.arange(65.0).reshape(1, 65, 1)
    kept = model.patch_drop(places).flatten()
    assert len(kept) == 33
    assert torch.equal(kept, kept.sort().values)
    assert kept[0] == 0
    assert torch.equal(model.eval().patch_drop(places), places)


def test_linformer_refuses_other_lengths_after_a_change_by_hand():
    model = small("vix_linformer")
    with pytest.raises(ValueError, match="for 65 tokens and got 50"):
        model.blocks(torch.randn(1, 50, 128))
