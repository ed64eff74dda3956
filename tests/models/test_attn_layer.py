"""Mechanisms by name in timm's own families."""

import pytest
import timm
import torch

import timm_xformers
import timm_xformers.models
from timm_xformers.layers.layout import complete_token_layout

# One setting of each mechanism; every name is built in tests/layers.
SETTINGS = [
    "softmax",
    "performer_softmax_m64",
    "performer_relu_m64",
    "performer_learned_m64",
    "nystrom_l64",
    "linformer_k64",
    "local1d_w64",
    "local2d_w7",
]
FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "flexivit_small",
    "vit_base_patch16_siglip_224",
]


def small(family, **kwargs):
    torch.manual_seed(0)
    narrow = {"embed_dim": 64, "num_heads": 4, "depth": 2, "num_classes": 10}
    model = timm.create_model(family, **{**narrow, **kwargs}).eval()
    complete_token_layout(model)
    return model


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_work_in_families_and_take_the_exact_weights(family, setting):
    exact, model = small(family), small(family, attn_layer=setting)
    model.load_state_dict(exact.state_dict(), strict=True)
    side = exact.patch_embed.img_size[0]
    x = torch.randn(1, 3, side, side)
    out = model(x)
    assert out.shape == (1, 10)
    if setting == "softmax":
        torch.testing.assert_close(out, exact(x), rtol=1e-4, atol=1e-5)


def test_pretrained_path_of_timm_takes_the_exact_weights(tmp_path):
    exact = small("deit_tiny_patch16_224")
    overlay = {"state_dict": exact.state_dict(), "num_classes": 10}
    model = small(
        "deit_tiny_patch16_224",
        attn_layer="linformer_k64",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
    )
    assert torch.equal(model.blocks[0].attn.qkv.weight, exact.blocks[0].attn.qkv.weight)


def test_exact_where_the_setting_covers_all_tokens():
    exact = small("vit_tiny_patch16_224")
    x = torch.randn(2, 3, 224, 224)
    for setting in ("nystrom_l256", "local1d_w256", "local2d_w14"):
        model = small("vit_tiny_patch16_224", attn_layer=setting)
        model.load_state_dict(exact.state_dict())
        torch.testing.assert_close(model(x), exact(x), rtol=1e-4, atol=1e-5)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"Unknown attention 'nystrom_64'; did you mean nystrom_l64"
    ):
        small("vit_tiny_patch16_224", attn_layer="nystrom_64")
    with pytest.raises(ValueError, match=r"list_attention\(\) lists all"):
        small("vit_tiny_patch16_224", attn_layer="zzz")


def test_timms_own_names_still_work():
    for name in ("", "attn", "diff"):
        assert small("vit_tiny_patch16_224", attn_layer=name)(torch.randn(1, 3, 224, 224)).shape


def test_names_are_listed_by_pattern():
    names = timm_xformers.list_attention()
    assert len(names) == len(set(names)) > 50
    assert timm_xformers.list_attention("nystrom_l64*") == ["nystrom_l64", "nystrom_l64_conv33"]


def test_layout_reaches_layers_of_timms_models():
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer="local2d_w4", img_size=(64, 128), depth=2, num_classes=10
    )
    x = torch.randn(1, 3, 64, 128)
    with pytest.raises(ValueError, match="set_token_layout"):
        model(x)
    assert timm_xformers.set_token_layout(model) == 2
    assert model(x).shape == (1, 10)
    with pytest.raises(ValueError, match=r"no patch_embed\.grid_size"):
        timm_xformers.set_token_layout(torch.nn.Linear(2, 2))


def test_fnet_says_why_it_takes_no_attention_weights():
    exact = small("vit_tiny_patch16_224")
    model = small("vit_tiny_patch16_224", attn_layer="fnet")
    with pytest.raises(RuntimeError, match="fnet, which has no projections"):
        model.load_state_dict(exact.state_dict())
