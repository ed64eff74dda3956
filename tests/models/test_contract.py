"""Every registered name against timm's model contract."""

import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.optim import create_optimizer_v2

import timm_xformers.models  # registers the models where autoload is off

NAMES = [
    name
    for name in timm.list_models(exclude_filters="retrofit")  # another model: tests/replace
    if timm.models.model_entrypoint(name).__module__.startswith("timm_xformers.")
]
# One name for each mechanism, embedding and block: enough where only the code path matters.
KINDS = [
    "vix_softmax",
    "vix_performer_softmax_m32",
    "vix_performer_learned_m64",
    "vix_nystrom",
    "vix_linformer",
    "vix_local1d_w16",
    "vix_local2d_w4",
    "vix_fnet",
    "hybrid_vix_performer_relu_m64",
    "vix_tiny_patch16_224_nystrom_l64",
    "vix_mnist_nano",
    "levip",
    "levil",
    "ccn",
    "cct_2_3x2_32",
    "ccl_2_3x2_32",
    "swin_local_tiny",
    "swin_local1d_tiny",
]
FIXED_GRID = {"vix_linformer", "vix_local2d_w4", "levil", "ccl_2_3x2_32"}
HIERARCHICAL = {"swin_local_tiny", "swin_local1d_tiny"}
# Smallest sizes: image side, and arguments that make a model narrow or shallow.
SIZES = {
    "patch16": (64, {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "14_7x2": (32, {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "3x": (16, {"depth": 2}),
    "swin": (16, {"embed_dim": 32}),
    "": (8, {"depth": 2}),
}


def size_of(name):
    return next(size for part, (size, _) in SIZES.items() if part in name)


def narrow(name):
    return next(arguments for part, (_, arguments) in SIZES.items() if part in name)


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"img_size": size_of(name), **narrow(name), **kwargs})


def images(name, B=2, chans=None, size=None):
    side = size or size_of(name)
    chans = chans or get_pretrained_cfg(name).input_size[0]
    return torch.randn(B, chans, side, side, generator=torch.Generator().manual_seed(1))


def blocks_of(model):
    return model.layers[0].blocks if hasattr(model, "layers") else model.blocks


def test_names_are_found():
    assert len(NAMES) >= 68


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_and_parts(name):
    model = build(name, num_classes=7, in_chans=2)
    for parameter in model.parameters():  # away from branches that start at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    x = images(name, chans=2)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if not key.endswith(("qkv.bias", "score.bias")):  # a shift of all scores changes nothing
            assert parameter.grad.abs().sum() > 0, key
    model.eval()
    features = model.forward_features(x)
    if name in HIERARCHICAL:  # (B, H, W, C)
        assert features.shape == (2, *(side // 4 for side in model.patch_embed.grid_size), 128)
    else:
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        assert features.shape == (2, tokens, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert torch.equal(model(x), pre_logits)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_configuration_points_at_real_parts(name):
    cfg = get_pretrained_cfg(name)
    model = build(name)
    modules = dict(model.named_modules())
    assert isinstance(modules[cfg.first_conv], torch.nn.Conv2d)
    assert any(m is modules[cfg.classifier] for m in model.get_classifier().modules())
    assert modules[cfg.classifier].out_features == cfg.num_classes
    assert cfg.fixed_input_size
    assert cfg.license == "apache-2.0"
    assert model.attn_layer in timm_xformers.list_attention()
    names = {key for key, _ in model.named_parameters()}
    positions = {n for n in names if "pos_embed" in n or "cls_token" in n or "bias_table" in n}
    assert positions <= model.no_weight_decay()
    for coarse in (False, True):
        patterns = []
        for value in model.group_matcher(coarse).values():
            patterns += [
                p if isinstance(p, str) else p[0]
                for p in ([value] if isinstance(value, str) else value)
            ]
        unmatched = [n for n in names if not any(re.match(p, n) for p in patterns)]
        # timm puts these into a last group of their own.
        assert unmatched
        assert {n.split(".")[0] for n in unmatched} <= {"head", "attn_pool", "norm"}
    groups = create_optimizer_v2(
        model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7
    ).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("name", KINDS)
def test_one_step_lowers_the_loss_and_evaluation_repeats(name):
    model = build(name, num_classes=4)
    x, y = images(name, B=8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = torch.nn.functional.cross_entropy(model(x), y)
    before.backward()
    optimizer.step()
    assert torch.nn.functional.cross_entropy(model(x), y) < before
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", KINDS)
def test_intermediates_features_only_and_pruning(name):
    model = build(name).eval()
    x = images(name)
    indices = [0, 1]
    final, maps = model.forward_intermediates(x, indices=indices)
    torch.testing.assert_close(final, model.forward_features(x))
    extractor = build(name, features_only=True, out_indices=indices).eval()
    channels, reductions = extractor.feature_info.channels(), extractor.feature_info.reduction()
    first = model.patch_embed.feat_ratio()
    if name in HIERARCHICAL:
        assert (channels, reductions) == ([32, 64], [first, 2 * first])
    else:
        assert (channels, reductions) == ([model.embed_dim] * 2, [first] * 2)
    for ours, theirs, chans, stride in zip(extractor(x), maps, channels, reductions, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.shape == (2, chans, *(-(-side // stride) for side in x.shape[-2:]))
    assert model.prune_intermediate_layers([0]) == [0]
    pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[0])


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_does_not_change_results(name):
    model = build(name)
    x = images(name)
    first = next(model.parameters())
    plain = model(x)
    plain.sum().backward()
    grad = first.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(True)
    saved = model(x)
    saved.sum().backward()
    torch.testing.assert_close(saved, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.grad, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_other_image_sizes(name):
    side = size_of(name)
    model = build(name).eval()
    with pytest.raises(AssertionError, match=r"match model|takes"):
        model(images(name, size=2 * side))
    model.set_input_size((2 * side, side))
    x = images(name, size=2 * side)[..., :side]
    assert model(x).shape == (2, model.num_classes)
    assert model.patch_embed.grid_size[0] == 2 * model.patch_embed.grid_size[1]
    built = build(name, img_size=2 * side)
    assert built(images(name, size=2 * side)).shape == (2, built.num_classes)


@pytest.mark.parametrize("name", KINDS)
def test_dynamic_image_size_where_the_mechanism_allows(name):
    dynamic = {"strict_img_size": False} if name in HIERARCHICAL else {"dynamic_img_size": True}
    if name in FIXED_GRID:
        with pytest.raises(ValueError, match="dynamic_img_size=True cannot be honoured"):
            build(name, **dynamic)
        return
    fixed, model = build(name).eval(), build(name, **dynamic).eval()
    model.load_state_dict(fixed.state_dict())
    x = images(name)
    torch.testing.assert_close(model(x), fixed(x))
    wide = images(name, size=3 * size_of(name))[:, :, : 2 * size_of(name)]
    assert model(wide).shape == (2, model.num_classes)


@pytest.mark.parametrize("name", KINDS)
def test_weights_of_another_size_head_and_channels_load(name):
    source = build(name)
    state = source.state_dict()
    side = size_of(name)
    overlay = {"state_dict": state, "num_classes": source.num_classes}
    tuned = build(
        name,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=5,
        in_chans=4,
        img_size=2 * side,
    )
    assert tuned(images(name, chans=4, size=2 * side)).shape == (2, 5)
    last = [key for key, _ in blocks_of(tuned).named_parameters() if "mlp" in key][-1]
    assert torch.equal(blocks_of(tuned).state_dict()[last], blocks_of(source).state_dict()[last])
    # Sums over a slot survive interpolation, so a resampled projection is recognisable.
    if source.attn_layer.startswith("linformer"):
        key = "blocks.0.attn.proj_k"
        torch.testing.assert_close(
            tuned.state_dict()[key].sum(1), state[key].sum(1), rtol=3e-2, atol=0
        )


@pytest.mark.parametrize("name", KINDS)
def test_saved_folder_opens_with_the_same_result(name, tmp_path):
    model = build(name).eval()
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    again = timm.create_model(
        f"local-dir:{tmp_path / 'model'}", pretrained=True, img_size=size_of(name), **narrow(name)
    ).eval()
    x = images(name)
    assert torch.equal(again(x), model(x))


# The mechanisms pass through the same in tests/layers; here one model for each kind of trunk.
EXPORTED = {
    *("vix_mnist_nano", "hybrid_vix_performer_relu_m64"),  # ViX and its stem
    *("levip", "ccl_2_3x2_32", "swin_local1d_tiny"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in EXPORTED else pytest.mark.slow) for name in KINDS],
)
def test_export_compile_and_graph(name):
    model = build(name, **({} if name in HIERARCHICAL else {"depth": 1})).eval()
    x = images(name)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    nodes = timm.models.get_graph_node_names(model)[1]
    graph = timm.models.create_feature_extractor(model, [nodes[-1]])
    torch.testing.assert_close(graph(x)[nodes[-1]], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_onnx_agrees(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = build(name).eval()
    x = images(name)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_meta_device_then_weights(name):
    reference = build(name).eval()
    with torch.device("meta"):
        model = build(name)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu").eval()
    reinit_non_persistent_buffers(model)
    model.load_state_dict(reference.state_dict(), strict=True)
    x = images(name)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("name", KINDS)
def test_meta_device_then_initialisation(name):
    reference = build(name)
    with torch.device("meta"):
        model = build(name)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    for key, value in model.named_buffers():
        assert torch.equal(value, reference.get_buffer(key)), key
    assert model(images(name)).isfinite().all()
    assert not any(p.isnan().any() for p in model.parameters())
    if "pos_embed" in dict(model.named_parameters()):
        assert abs(model.pos_embed.detach().std() / model.pos_embed_std - 1) < 0.2


def test_misspelt_argument_fails():
    with pytest.raises(TypeError, match="depht"):
        build("vix_softmax", depht=3)
