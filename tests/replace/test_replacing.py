"""What a replaced model can do: save, load, pickle, compile, export, resize, be replaced again."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_xformers
from tests.replace.families import FAMILIES, WIDE, draw, images, named
from timm_xformers.layers.heads import HeadsAttention
from timm_xformers.replace import (
    attention_sites,
    replace_attention,
    replacement_of,
    restore_attention,
)

VIT = named("vit_tiny_patch16_224")
# Settings that mean something on a grid of 2 x 3.
WINDOWS = {"name": "local2d_w4", "window_size": 1}
PROJECTED = {"name": "linformer_k32", "proj_len": 4}
MIXED = {"0": "exact", "1": {"name": "performer_softmax_m16", "num_features": 12}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_report_says_what_was_done_and_prints():
    model = VIT()
    report = replace_attention(model, {"1": "nystrom_l16"})
    kept, replaced = report.rows
    assert (kept.replaced, kept.why, kept.becomes) == (False, "not asked for", "exact")
    assert (replaced.replaced, replaced.mechanism, replaced.becomes) == (
        True,
        "exact",
        "nystrom_l16",
    )
    assert kept.before == kept.after == replaced.before
    N, C, H = 7, 32, 2
    assert report.num_tokens == N
    products = N * C * 3 * C + 2 * N * N * C + N * C * C
    assert kept.before.multiply_adds == products
    assert kept.before.parameters == 4 * C * C + 4 * C
    # Tokens, projections (three views of one), mixed values, and one number per query of the
    # fused attention.
    exact = 4 * (N * C + 3 * N * C + N * C + H * N)
    assert abs(kept.before.activation_bytes - exact) <= 4 * N * C
    table = str(report).splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["0", "1"]
    assert "1 of 2 replaced" in table[3]
    assert "7 tokens" in table[4]


def test_figures_follow_the_mechanism():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=512)
    (row,) = replace_attention(model, "performer_relu_m64").rows
    N, C, H, m = 1025, 192, 3, 64
    joint = 4 * N * C * C
    assert row.before.multiply_adds == joint + 2 * N * N * C
    # Queries and keys to features, features to sums and back; the normaliser beside.
    linear = 2 * N * H * m * 64 + 2 * N * H * m * 64
    assert linear <= row.after.multiply_adds - joint <= 1.1 * linear


@pytest.mark.parametrize("name", ["vit", "dinov3", "eva02-unfused", "torchvision", "vix"])
def test_pickles_and_copies(name):
    model = draw(FAMILIES[name])
    replace_attention(model, MIXED)
    x = images(model)
    after = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), after)
        assert replacement_of(again) == replacement_of(model)
        first = attention_sites(again)[1].module
        shared = dict(again.named_parameters()).values()
        assert all(any(p is q for q in shared) for p in first.original.parameters())
        restore_attention(again)
        assert replacement_of(again) is None


def test_record_makes_the_same_again():
    torch.manual_seed(0)
    one = draw(VIT)
    other = copy.deepcopy(one)
    replace_attention(one, {"0": "performer_learned_m16"}, feature_seed=3)
    report = replace_attention(one, {"1": "performer_softmax_m16"}, num_features=5)
    record = json.loads(json.dumps(report.record))
    assert record == replacement_of(one)
    assert record["mechanism"]["1"] == {
        "name": "performer_softmax_m16",
        "num_features": 5,
        "feature_seed": 0,
    }
    draws = torch.get_rng_state()
    again = replace_attention(other, **record)
    assert torch.equal(torch.get_rng_state(), draws)
    assert again.record == record
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_layers_draw_their_own_features():
    model = VIT()
    replace_attention(model, "performer_softmax_m16", feature_seed=2)
    layers = [site.module for site in attention_sites(model)]
    other = timm.create_model("vix_performer_softmax_m16", **WIDE, patch_size=16, feature_seed=2)
    for layer, block in zip(layers, other.blocks, strict=True):
        assert torch.equal(layer.features, block.attn.features)


@pytest.mark.parametrize("name", ["vit", "dinov3", "vix"])
def test_saved_model_loads_by_its_folder(name, tmp_path):
    model = FAMILIES[name]().eval()
    replace_attention(model, MIXED)
    x = images(model).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
        wanted = model(x)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), wanted)
    assert replacement_of(again) == replacement_of(model)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    assert len(features.feature_info.channels()) >= 1
    assert any(isinstance(m, HeadsAttention) for m in features.modules())
    small = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7, in_chans=1)
    assert small(x[:, :1]).shape == (2, 7)


def test_restored_model_saves_as_what_it_was(tmp_path):
    model = VIT().eval()
    replace_attention(model, MIXED)
    restore_attention(model)
    save_for_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == (
        "vit_tiny_patch16_224"
    )
    assert type(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).blocks[1].attn) is type(
        model.blocks[1].attn
    )


def test_retrofit_needs_to_know_what_it_is():
    with pytest.raises(ValueError, match="needs architecture"):
        timm.create_model("retrofit")
    with pytest.raises(ValueError, match="no model of timm"):
        timm.create_model("retrofit", architecture="vit_of_nobody", replacement=MIXED)


def test_checkpoints_of_the_original_load(caplog):
    original = draw(VIT)
    state = copy.deepcopy(original.state_dict())
    model = draw(VIT)
    replace_attention(model, "performer_softmax_m16")
    model.load_state_dict({name: value + 1 for name, value in state.items()})
    assert "has no features" in caplog.text
    assert all(torch.equal(model.state_dict()[n], v + 1) for n, v in state.items())


@pytest.mark.parametrize("name", ["dinov3", "torchvision"])
def test_compiles_and_exports(name):
    model = draw(FAMILIES[name]).float()
    replace_attention(model, "nystrom_l16")
    x = images(model).float()
    wanted = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["nystrom_l16", "hedgehog", "performer_relu_m16_dwc"])
def test_inductor_gives_values_and_gradients(mechanism):
    model = VIT().float().train()
    replace_attention(model, mechanism)
    x = images(model).float()
    wanted = model(x)
    wanted.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = torch.compile(model)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    for name, gradient in gradients.items():
        off = (model.get_parameter(name).grad - gradient).norm()
        assert off <= 1e-4 * gradient.norm() + 1e-7, name


def test_hooks_stay():
    model = VIT()
    calls = []
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    x = images(model).float()
    replace_attention(model, "softmax")
    model(x)
    restore_attention(model)
    model(x)
    handle.remove()
    model(x)
    assert len(calls) == 2


@pytest.mark.parametrize("mechanism", [WINDOWS, PROJECTED, "softmax_dwc"], ids=str)
@pytest.mark.parametrize("name", ["vit", "eva02", "torchvision", "vix"])
def test_layers_are_told_the_grid(name, mechanism):
    model = draw(FAMILIES[name])
    replace_attention(model, {"all": mechanism})
    x = images(model)
    assert model(x).isfinite().all()
    if name == "torchvision":
        return
    patch = model.patch_embed.patch_size[0]
    for again in (model, copy.deepcopy(model)):
        again.set_input_size((4 * patch, 2 * patch))
        out = again(torch.randn(1, 3, 4 * patch, 2 * patch, dtype=torch.float64))
        assert out.isfinite().all()
        assert attention_sites(again)[0].module.grid_size == (4, 2)


def test_model_of_any_size_takes_one():
    model = draw(FAMILIES["dinov3"])
    with pytest.raises(ValueError, match="img_size="):
        replace_attention(model, {"all": WINDOWS})
    report = replace_attention(model, {"all": WINDOWS}, img_size=(64, 32))
    assert report.record["img_size"] == [64, 32]
    model(torch.randn(1, 3, 64, 32, dtype=torch.float64))
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(torch.randn(1, 3, 32, 64, dtype=torch.float64))
    restore_attention(model)
    model(torch.randn(1, 3, 32, 64, dtype=torch.float64))


def test_naflex_masks_keys_and_has_no_grid():
    model = timm.create_model(
        "naflexvit_base_patch16_gap",
        **{k: v for k, v in WIDE.items() if k != "img_size"},
        use_key_only_attn_mask=True,
    ).double()
    with pytest.raises(ValueError, match="same for all images"):
        replace_attention(model, {"all": WINDOWS})
    replace_attention(model, "performer_softmax_m16")
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, 6, 768, generator=generator, dtype=torch.float64)
    places = torch.tensor([[[y, x] for y in range(2) for x in range(3)]])
    whole = model(patches, patch_coord=places, patch_valid=torch.ones(1, 6, dtype=torch.bool))
    padded = model(
        torch.cat([patches, 9 + patches[:, :2]], dim=1),
        patch_coord=torch.cat([places, places[:, :2]], dim=1),
        patch_valid=torch.tensor([[True] * 6 + [False] * 2]),
    )
    torch.testing.assert_close(padded, whole, atol=1e-10, rtol=0)


def test_relative_bias_is_left_out_on_request():
    build = named("beit_base_patch16_224")
    model = draw(build)
    table = "blocks.0.attn.relative_position_bias_table"
    before = model.state_dict()
    out = model(images(model))
    replace_attention(model, "softmax", relative_bias="drop")
    assert before.keys() - model.state_dict().keys() == {table, table.replace("0", "1")}
    assert replacement_of(model)["relative_bias"] == "drop"
    without = draw(build)
    for block in without.blocks:
        block.attn.relative_position_bias_table.data.zero_()
    torch.testing.assert_close(model(images(model)), without(images(model)), atol=1e-12, rtol=0)
    model.load_state_dict(before)  # the bias is left out of the checkpoint, too
    restore_attention(model)
    assert torch.equal(model(images(model)), out)


# timm resizes the table in ways that PyTorch warns of.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_biases_wait_and_follow_the_size(name):
    model, untouched = draw(named(name)), draw(named(name))
    replace_attention(model, "nystrom_l16", relative_bias="drop")
    for each in (model, untouched):
        each.set_input_size((64, 32))
    x = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    assert not torch.allclose(model(x), untouched(x))
    restore_attention(model)
    assert torch.equal(model(x), untouched(x))


def test_new_weights_on_request():
    model, kept = draw(VIT), draw(VIT)
    replace_attention(model, "softmax", blocks=[1], keep_weights=False)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, kept.get_parameter(n))}
    assert changed == {
        f"blocks.1.attn.{n}.{p}" for n in ("qkv", "proj") for p in ("weight", "bias")
    }
    assert 0.015 < model.blocks[1].attn.qkv.weight.std() < 0.025


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mechanism": "nystrom"}, "Unknown attention"),
        ({"mechanism": "softmax", "blocks": "0-2"}, "Block 2 does not exist"),
        ({"mechanism": "softmax", "blocks": "one"}, "cannot be read"),
        ({"mechanism": "softmax", "blocks": "1-0"}, "backwards"),
        ({"mechanism": "softmax", "blocks": []}, "No block"),
        ({"mechanism": {"0-1": "softmax", "1": "exact"}}, "named twice"),
        ({"mechanism": {"0": "softmax"}, "blocks": "0"}, "leave out blocks"),
        ({"mechanism": "softmax", "num_features": 3}, "takes num_features"),
        ({"mechanism": {"0": {"name": "softmax", "kernel": "relu"}}}, "no setting kernel"),
        ({"mechanism": "softmax", "qkv_bias": True}, "takes qkv_bias"),
        ({"mechanism": "linformer_k32", "one_kv_head": True}, "change the projections"),
        ({"mechanism": "performer_softmax_m16", "num_features": 0}, "blocks.0.attn: num_features"),
        ({"mechanism": "fnet"}, "no queries"),
        ({"mechanism": "softmax", "relative_bias": "keep"}, "refuse or drop"),
        ({"mechanism": {"0": WINDOWS}, "img_size": 64}, "set_input_size"),
        ({"mechanism": "softmax", "img_size": 64}, "says nothing"),
        ({"mechanism": "softmax", "feature_seed": -1}, "whole number"),
    ],
)
def test_what_cannot_be_is_refused(asked, words):
    model = VIT()
    attentions = [site.module for site in attention_sites(model)]
    with pytest.raises(ValueError, match=words):
        replace_attention(model, **asked)
    assert [site.module for site in attention_sites(model)] == attentions


def test_dropout_on_a_map_and_dropped_patches_are_refused():
    with pytest.raises(ValueError, match=r"attn_drop\.p to 0"):
        replace_attention(VIT_DROP(), "nystrom_l16")
    replace_attention(VIT_DROP(), "softmax")
    with pytest.raises(ValueError, match="patch_drop_rate"):
        replace_attention(named("vit_tiny_patch16_224", patch_drop_rate=0.5)(), "local1d_w16")


VIT_DROP = named("vit_tiny_patch16_224", attn_drop_rate=0.1)


def test_public_names():
    assert timm_xformers.replace_attention is replace_attention
    assert timm_xformers.restore_attention is restore_attention
