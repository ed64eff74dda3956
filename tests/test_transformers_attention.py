"""Our mechanisms as attention functions of transformers, beside its eager attention."""

import pytest
import torch

import timm_xformers

transformers = pytest.importorskip("transformers", reason="needs pip install transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
MODELS = {
    "ViT": {},
    "DeiT": {},
    "Dinov2": {},
    "Dinov2WithRegisters": {"num_register_tokens": 3},
    "DINOv3ViT": {"num_register_tokens": 2},
    "CLIPVision": {},
    "SiglipVision": {},
}
# 16 tokens and at most 4 before them: these cover all of them.
EXACT = ["softmax", "nystrom_l32", "local1d_w16"]


@pytest.fixture(scope="module", autouse=True)
def names():
    return timm_xformers.register_attention_functions()


def build(kind, attention="eager", **values):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **MODELS[kind], **values})
    model = getattr(transformers, f"{kind}Model")._from_config(
        config, attn_implementation=attention
    )
    return model.eval()


def images(B=2, side=32, width=None):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, side, width or side, generator=rng)


def last(model, x, **kwargs):
    with torch.no_grad():
        return model(pixel_values=x, **kwargs).last_hidden_state


@pytest.mark.parametrize("kind", MODELS)
def test_exact_settings_equal_eager_and_the_others_do_not(kind, names):
    model, x = build(kind), images()
    expected = last(model, x)
    for name in EXACT:
        model.set_attn_implementation(name)
        torch.testing.assert_close(last(model, x), expected, atol=1e-4, rtol=1e-4)
    for name in ("performer_softmax_m64", "performer_relu_m16", "nystrom_l16"):
        model.set_attn_implementation(name)
        out = last(model, x)
        assert out.isfinite().all()
        if name != "nystrom_l16" or kind != "SiglipVision":  # 16 tokens, 16 landmarks
            assert (out - expected).abs().max() > 1e-5
    model.set_attn_implementation("eager")
    assert torch.equal(last(model, x), expected)


def test_names_are_those_without_weights_and_without_a_grid(names):
    assert {"softmax", "performer_exp_m64", "nystrom_l64", "local1d_w64"} <= set(names)
    assert not [
        name
        for name in names
        if name.startswith(("fnet", "linformer", "hedgehog", "agent", "local2d", "performer_le"))
        or name.endswith(("_dwc", "_conv33", "_shifted"))
    ]
    with pytest.raises(ValueError, match=r"linformer_k64.*is not supported"):
        build("ViT", "linformer_k64")


@pytest.mark.parametrize("kind", MODELS)
def test_windows_leave_class_and_register_tokens_global(kind):
    """A patch reaches its window, the one before, and every token that is no patch."""
    model = build(kind, "local1d_w16", num_hidden_layers=1, image_size=64, patch_size=4)
    x = images(1, 64)
    changed = x.clone()
    changed[..., -4:, -4:] += 1.0  # the last of 256 patches
    moved = (last(model, x) - last(model, changed)).abs().amax(dim=-1)[0] > 1e-6
    prefix = len(moved) - 256
    assert moved.tolist() == [True] * prefix + [False] * 224 + [True] * 32


def test_a_saved_model_computes_the_same_when_loaded_by_name(tmp_path):
    model, x = build("ViT", "performer_softmax_m32"), images()
    expected = last(model, x)
    model.save_pretrained(tmp_path)
    again = transformers.ViTModel.from_pretrained(
        tmp_path, attn_implementation="performer_softmax_m32"
    ).eval()
    assert torch.equal(last(again, x), expected)
    assert torch.equal(
        timm_xformers.transformers_attention._directions(32, 8, torch.device("cpu")),
        timm_xformers.layers.attention_class("performer_softmax_m32")(32, 4).features,
    )


@pytest.mark.parametrize("name", [*EXACT, "nystrom_l16", "performer_relu_m16"])
def test_masks_over_keys_are_honoured(name):
    model = build("ViT", name)
    keep = torch.ones(2, 17, dtype=torch.long)
    keep[0, 9:] = 0
    x = images()
    changed = x.clone()
    changed[0, :, 16:] = 5.0  # patches 8 to 15 of the first image, all left out
    out, other = (last(model, y, attention_mask=keep)[:, :9] for y in (x, changed))
    torch.testing.assert_close(out, other, atol=1e-5, rtol=0)
    assert (out[0] - last(model, x)[0, :9]).abs().max() > 1e-4
    if name in EXACT:
        eager = build("ViT")
        torch.testing.assert_close(
            out, last(eager, x, attention_mask=keep)[:, :9], atol=1e-4, rtol=1e-4
        )


def test_text_models_are_causal_or_refuse():
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=20, eos_token_id=49,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPTextModel._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(0, 49, (2, 20))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        model.set_attn_implementation("softmax")
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, expected)
        for name in ("nystrom_l16", "performer_relu_m16"):
            model.set_attn_implementation(name)
            with pytest.raises(ValueError, match="pass one row for all queries"):
                model(input_ids=ids)


def test_what_cannot_be_honoured_is_refused():
    x = images()
    for name in ("nystrom_l16", "performer_relu_m16"):
        model = build("ViT", name, attention_probs_dropout_prob=0.1)
        assert last(model, x).isfinite().all()
        with pytest.raises(ValueError, match=r"attention dropout of 0\.1 cannot be honoured"):
            last(model.train(), x)
    model = build("ViT", "softmax", attention_probs_dropout_prob=0.5).train()
    assert not torch.equal(last(model, x), last(model, x))
    with pytest.raises(ValueError, match="output_attentions=True cannot be honoured"):
        last(model, x, output_attentions=True)
    attention = transformers.AttentionInterface()["local1d_w16"]
    q = torch.randn(1, 2, 17, 8)
    with pytest.raises(ValueError, match="does not for model_type=None"):
        attention(torch.nn.Identity(), q, q, q, None)
    with pytest.raises(ValueError, match="17 queries for 5 keys"):
        attention(torch.nn.Identity(), q, q[:, :, :5], q[:, :, :5], None)
    with pytest.raises(ValueError, match="hands softcap to its attention"):
        attention(torch.nn.Identity(), q, q, q, None, softcap=30.0)


def test_scaling_and_shared_heads_are_honoured():
    q, k, v = (torch.randn(2, heads, 17, 8) for heads in (4, 2, 2))
    attention = transformers.AttentionInterface()
    expected = (
        torch.softmax(q @ k.repeat_interleave(2, 1).mT * 0.1, -1) @ v.repeat_interleave(2, 1)
    ).transpose(1, 2)
    for name in ("softmax", "nystrom_l32"):
        out, weights = attention[name](torch.nn.Identity(), q, k, v, None, scaling=0.1)
        assert weights is None
        torch.testing.assert_close(out, expected)


def test_trains_and_compiles():
    model, x = build("DINOv3ViT", "performer_relu_m16"), images()
    model(pixel_values=x).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "layer.0.attention" in n)
    expected = last(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(last(compiled, x), expected)
