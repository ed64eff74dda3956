"""Every registered name against timm's model contract."""

import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, save_for_hf
from timm.optim import create_optimizer_v2

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)

NAMES = [
    name
    for name in timm.list_models()
    if timm.models.model_entrypoint(name).__module__.startswith("timm_xformers.")
]
# One name for each mechanism and embedding: enough where only the code path matters.
KINDS = [
    "vix_softmax",
    "vix_performer_softmax_m32",
    "vix_performer_learned_m64",
    "vix_nystrom",
    "vix_linformer",
    "vix_local1d_w64",
    "vix_local2d_w8",
    "vix_fnet",
    "hybrid_vix_performer_relu_m64",
    "vix_tiny_patch16_224_nystrom_l64",
]
FIXED_GRID = {"vix_linformer", "vix_local2d_w8"}


def size_of(name):
    return 64 if "patch16" in name else 8


def build(name, **kwargs):
    torch.manual_seed(0)
    kwargs = {"img_size": size_of(name), "depth": 2, **kwargs}
    if "patch16" in name:
        kwargs = {"embed_dim": 96, "num_heads": 3, **kwargs}
    return timm.create_model(name, **kwargs)


def images(name, B=2, chans=3, size=None):
    side = size or size_of(name)
    return torch.randn(B, chans, side, side, generator=torch.Generator().manual_seed(1))


def test_names_are_found():
    assert len(NAMES) >= 34


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_and_parts(name):
    model = build(name, num_classes=7, in_chans=1)
    x = images(name, chans=1)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if not key.endswith("qkv.bias"):
            assert parameter.grad.abs().sum() > 0, key
    model.eval()
    features = model.forward_features(x)
    assert features.shape == (2, model.patch_embed.num_patches + 1, model.num_features)
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
    assert modules[cfg.classifier] is model.get_classifier()
    assert modules[cfg.classifier].out_features == cfg.num_classes
    assert cfg.fixed_input_size
    assert cfg.license == "apache-2.0"
    names = {key for key, _ in model.named_parameters()}
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay() & names
    for coarse in (False, True):
        patterns = []
        for value in model.group_matcher(coarse).values():
            patterns += [
                p if isinstance(p, str) else p[0]
                for p in ([value] if isinstance(value, str) else value)
            ]
        unmatched = [n for n in names if not any(re.match(p, n) for p in patterns)]
        assert set(unmatched) == {"head.weight", "head.bias"}  # timm adds them as the last group
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
    grid = model.patch_embed.grid_size
    final, maps = model.forward_intermediates(x, indices=[0, 1])
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, model.embed_dim, *grid)] * 2
    extractor = build(name, features_only=True, out_indices=[0, 1]).eval()
    assert extractor.feature_info.channels() == [model.embed_dim] * 2
    assert extractor.feature_info.reduction() == [model.patch_embed.feat_ratio()] * 2
    for ours, theirs in zip(extractor(x), maps, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.prune_intermediate_layers([0]) == [0]
    pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[0])


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_does_not_change_results(name):
    model = build(name)
    x = images(name)
    plain = model(x)
    plain.sum().backward()
    grad = model.cls_token.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(True)
    saved = model(x)
    saved.sum().backward()
    torch.testing.assert_close(saved, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.cls_token.grad, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_other_image_sizes(name):
    side = size_of(name)
    model = build(name).eval()
    with pytest.raises(AssertionError, match=r"match model|takes"):
        model(images(name, size=2 * side))
    model.set_input_size((2 * side, side))
    x = torch.randn(1, 3, 2 * side, side)
    assert model(x).shape == (1, model.num_classes)
    assert model.patch_embed.grid_size[0] == 2 * model.patch_embed.grid_size[1]
    built = build(name, img_size=2 * side)
    assert built(images(name, size=2 * side)).shape == (2, built.num_classes)


@pytest.mark.parametrize("name", KINDS)
def test_dynamic_image_size_where_the_mechanism_allows(name):
    if name in FIXED_GRID:
        with pytest.raises(ValueError, match="dynamic_img_size=True cannot be honoured"):
            build(name, dynamic_img_size=True)
        return
    fixed, model = build(name).eval(), build(name, dynamic_img_size=True).eval()
    model.load_state_dict(fixed.state_dict())
    x = images(name)
    torch.testing.assert_close(model(x), fixed(x))
    side = size_of(name)
    assert model(torch.randn(1, 3, 2 * side, 3 * side)).shape == (1, model.num_classes)


@pytest.mark.parametrize("name", KINDS)
def test_weights_of_another_size_head_and_channels_load(name):
    source = build(name)
    state = source.state_dict()
    side = size_of(name)
    overlay = {"state_dict": state, "num_classes": source.num_classes}
    tuned = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=5,
        in_chans=1,
        img_size=2 * side,
        depth=2,
        **({"embed_dim": 96, "num_heads": 3} if "patch16" in name else {}),
    )
    assert tuned(torch.randn(1, 1, 2 * side, 2 * side)).shape == (1, 5)
    last = "blocks.1.mlp.fc2.weight"
    assert torch.equal(tuned.state_dict()[last], state[last])
    # Sums over a slot survive interpolation, so a resampled projection is recognisable.
    if name == "vix_linformer":
        key = "blocks.0.attn.proj_k"
        torch.testing.assert_close(
            tuned.state_dict()[key].sum(1), state[key].sum(1), rtol=3e-2, atol=0
        )


@pytest.mark.parametrize("name", KINDS)
def test_saved_folder_opens_with_the_same_result(name, tmp_path):
    model = build(name).eval()
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    extra = {"depth": 2, **({"embed_dim": 96, "num_heads": 3} if "patch16" in name else {})}
    again = timm.create_model(
        f"local-dir:{tmp_path / 'model'}", pretrained=True, img_size=size_of(name), **extra
    ).eval()
    x = images(name)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", KINDS)
def test_export_compile_and_graph(name):
    model = build(name, depth=1).eval()
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
    model = build(name, depth=1).eval()
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
    assert abs(model.pos_embed.detach().std() / model.pos_embed_std - 1) < 0.2


def test_misspelt_argument_fails():
    with pytest.raises(TypeError, match="depht"):
        build("vix_softmax", depht=3)
