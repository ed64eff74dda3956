"""LeViX against timm's LeViT block; one normalisation for all; positions; refusals."""

import pytest
import timm
import torch
from timm.models.levit import LevitBlock
from torch import nn

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)
from timm_xformers.layers.positions import sinusoid

NAMES = ["levit_1stage", "levip", "levin", "levil"]


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"img_size": 8, "depth": 2, **kwargs}).eval()


def images(dtype=torch.float32):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def stir(model):
    """Away from the start, where every block is the identity."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_names_are_those_of_the_specification():
    assert set(timm.list_models("levi*")) >= set(NAMES)


def test_exact_block_is_timms_without_the_bias_per_distance():
    ours = stir(small("levit_1stage").double()).blocks[0]
    theirs = LevitBlock(
        128, 32, num_heads=4, attn_ratio=1.0, mlp_ratio=2.0, resolution=8, act_layer=nn.Hardswish
    )
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("attn.qkv")}
    for key, value in ours.attn.qkv.state_dict().items():
        # Ours has all queries, all keys, all values; timm's has them head by head.
        per_head = value.dim() > 0
        state[f"attn.qkv.{key}"] = (
            value.unflatten(0, (3, 4, 32)).transpose(0, 1).flatten(0, 2) if per_head else value
        )
    state["attn.attention_biases"] = torch.zeros(4, 64)
    theirs = theirs.double().eval()
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(2, 64, 128, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_all_four_have_the_same_norms_and_they_lie_everywhere():
    kinds = {
        name: [
            key
            for key, module in small(name).named_modules()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        ]
        for name in NAMES
    }
    assert all(keys == kinds["levit_1stage"] for keys in kinds.values())
    # Three convolutions, four maps in each of two blocks, the classifier.
    assert len(kinds["levit_1stage"]) == 3 + 2 * 4 + 1


@pytest.mark.parametrize("name", NAMES)
def test_blocks_start_as_the_identity(name):
    model = small(name)
    expected = model.patch_embed(images()) + model.pos_embed
    torch.testing.assert_close(model.forward_features(images()), expected)
    model.init_weights()
    expected = model.patch_embed(images()) + model.pos_embed
    torch.testing.assert_close(model.forward_features(images()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_position_reaches_the_model(name):
    learned = stir(small(name))
    weights = {k: v for k, v in learned.state_dict().items() if k != "pos_embed"}
    none = small(name, pos_embed="none")
    none.load_state_dict(weights, strict=True)
    sine = small(name, pos_embed="sine")
    sine.load_state_dict(weights, strict=True)  # fixed positions are not saved
    turned = small(name, pos_embed="none", rope=True)
    turned.load_state_dict(weights, strict=True)
    outputs = [model(images()) for model in (learned, none, sine, turned)]
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-4 for other in outputs[:i])
    torch.testing.assert_close(sine.pos_embed, sinusoid(64, 128))
    sine.set_input_size((8, 16))
    torch.testing.assert_close(sine.pos_embed, sinusoid(128, 128))
    assert none.pos_embed is None


def test_classifier_keeps_its_norm_and_mode():
    model = small("levip")
    model.reset_classifier(5)
    assert isinstance(model.head.bn, nn.BatchNorm1d)
    assert not model.head.training
    assert model(images()[:1]).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm": "some"}, ValueError, r"norm='some' is unknown; use all, attention, none"),
        ({"qk_norm": True}, TypeError, r"no place for qk_norm"),
        ({"attn_layer": "fnet"}, ValueError, r"fnet has none"),
        ({"pos_embed": "cosine"}, ValueError, r"use learn, sine or none"),
        ({"img_size": 9, "patch_size": 2}, ValueError, r"use 8 or 10"),
        ({"depht": 3}, TypeError, r"depht"),
    ],
)
def test_refusals_say_what_to_do(arguments, error, message):
    with pytest.raises(error, match=message):
        small("levip", **arguments)
