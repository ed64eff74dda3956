"""Mechanisms by name in timm's own families."""

import pytest
import timm
import torch
from timm.models import save_for_hf, vision_transformer

import timm_xformers
import timm_xformers.models
from timm_xformers.errors import UserError
from timm_xformers.layers.layout import complete_token_layout
from timm_xformers.layers.softmax import SoftmaxAttention
from timm_xformers.training.build import build_model

# One setting of each mechanism; every name is built in tests/layers.
SETTINGS = [
    "softmax",
    "performer_softmax_m64",
    "performer_relu_m64",
    "performer_learned_m64",
    "hedgehog",
    "nystrom_l64",
    "agent_a49",
    "linformer_k64",
    "local1d_w64",
    "local2d_w7_dwc",
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
    both = ["nystrom_l64", "nystrom_l64_conv33"]
    assert timm_xformers.list_attention("nystrom_l64*") == [*both, *(f"{n}_dwc" for n in both)]


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


@pytest.mark.parametrize("setting", ["local1d_w16", "local2d_w4", "local2d_w4_shifted"])
def test_windows_are_those_of_the_true_grid_or_refused(setting):
    # 225 tokens: 15 rows of 15, or a class token and 14 rows of 16.
    x = torch.randn(1, 3, 224, 256)
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer=setting, depth=2, dynamic_img_size=True
    )
    with pytest.raises(ValueError, match="not been told where tokens lie"):
        model(x)
    if setting.startswith("local2d"):
        with pytest.raises(ValueError, match="dynamic_img_size=True cannot be honoured"):
            timm_xformers.set_token_layout(model)
    model = small("vit_tiny_patch16_224", attn_layer=setting, img_size=(224, 256))
    told = [block.attn.arrange(225) for block in model.blocks]
    rows = (1, 224) if setting.startswith("local1d") else (14, 16)
    assert [(grid, prefix) for grid, _, _, prefix in told] == [(rows, 1)] * 2
    shifts = [shift for _, _, shift, _ in told]
    assert shifts == [(0, 0), (2, 2) if setting.endswith("shifted") else (0, 0)]
    assert model(x).shape == (1, 10)


def test_the_trainer_tells_windows_their_grid_and_leaves_others_alone():
    options = {"depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 3, "img_size": 32}
    model, _ = build_model("vit_tiny_patch16_224", attn_layer="local2d_w4_shifted", **options)
    assert [block.attn.grid_size for block in model.blocks] == [(2, 2)] * 2
    model, _ = build_model("vit_tiny_patch16_224", attn_layer="linformer_k32", **options)
    assert model.blocks[0].attn.proj_k.shape == (32, 256)
    with pytest.raises(UserError, match="dynamic_img_size=True cannot be honoured"):
        build_model(
            "vit_tiny_patch16_224", attn_layer="local2d_w4", dynamic_img_size=True, **options
        )


@pytest.mark.parametrize("setting", ["nystrom_l64", "fnet", SoftmaxAttention])
@pytest.mark.parametrize("block", ["ParallelScalingBlock", "DiffParallelScalingBlock"])
def test_blocks_that_would_ignore_the_mechanism_refuse_it(block, setting):
    kind = getattr(vision_transformer, block, None)
    if kind is None:
        pytest.skip(f"this timm has no {block}")
    with pytest.raises(ValueError, match=rf"{block} computes its attention itself"):
        small("vit_tiny_patch16_224", block_fn=kind, attn_layer=setting)
    assert small("vit_tiny_patch16_224", block_fn=kind)(torch.randn(1, 3, 224, 224)).shape


def test_a_trained_linformer_survives_the_layout_and_its_folder(tmp_path):
    model = small("vit_tiny_patch16_224", attn_layer="linformer_k64")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj_k += 0.1 * torch.randn_like(block.attn.proj_k)
    x = torch.randn(2, 3, 224, 224)
    before = model(x)
    timm_xformers.set_token_layout(model)
    torch.testing.assert_close(model(x), before)
    args = {"attn_layer": "linformer_k64", "embed_dim": 64, "num_heads": 4, "depth": 2}
    save_for_hf(model, tmp_path / "m", model_args=args, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    torch.testing.assert_close(again(x), before)
