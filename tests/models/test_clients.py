"""What other people's tools do with models: graphs, exporters, offloading, devices, no images."""

import io

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch._subclasses import FakeTensorMode

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)
from timm_xformers.models import ccx, levix, swin_local, vix, vix_nano

NAMES = [name for family in (vix, levix, ccx, swin_local, vix_nano) for name in family.default_cfgs]
# One model of each mechanism and family.
KINDS = [
    "vix_softmax",
    "vix_performer_softmax_m16",
    "vix_performer_relu_m16",
    "vix_performer_learned_m64",
    "vix_local1d_w16",
    "vix_local2d_w4",
    "vix_fnet",
    "hybrid_vix_nystrom",
    "vix_linformer",
    "vix_mnist_nano",
    "levip",
    "levil",
    "ccn_2_3x2_32",
    "ccl_2_3x2_32",
    "swin_local_tiny",
    "swin_local1d_tiny",
]


def build(name, depth=2, **kwargs):
    torch.manual_seed(0)
    # Every second block's windows are shifted.
    depth = (
        {"depths": (2, 2)}
        if name.startswith("swin")
        else {"depth": 2 if "local" in name else depth}
    )
    if name.startswith("swin"):
        depth["num_heads"] = (2, 4)
    return timm.create_model(name, **{**depth, **kwargs}).eval()


def images(name, B=2):
    size = get_pretrained_cfg(name).input_size
    return torch.randn(B, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_no_images_has_no_logits(name):
    model = build(name)
    for training in (False, True):
        # BatchNorm has no statistics of nothing, in timm's models neither.
        if training and name.startswith("levi"):
            continue
        x = images(name, B=0).requires_grad_()
        out = model.train(training)(x)
        assert out.shape == (0, model.num_classes)
        out.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", KINDS)
def test_graphs_of_torch_fx_compute_the_same(name):
    model = build(name, depth=1)
    graph = torch.fx.symbolic_trace(
        model, concrete_args={"attn_mask": None, "is_causal": False} if has_masks(model) else None
    )
    for B in (2, 3):
        x = images(name, B)
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("name", KINDS)
def test_torchvisions_feature_extractor_takes_them(name):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = build(name, depth=1)
    node = extraction.get_graph_node_names(model)[1][-1]
    extractor = extraction.create_feature_extractor(model, [node]).eval()
    x = images(name)
    torch.testing.assert_close(extractor(x)[node], model(x))


def has_masks(model):
    return hasattr(model, "blocks")


EXPORTED = {"vix_softmax", "vix_local1d_w16", "hybrid_vix_nystrom"}


@pytest.mark.filterwarnings("ignore")  # the exporter is deprecated, and warns of many things
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=() if name in EXPORTED else pytest.mark.slow)
        for name in KINDS
        if name != "vix_fnet"  # the exporter has no Fourier transform
        for options in ([{}, {"rope": True}] if name == "vix_softmax" else [{}])
    ],
)
def test_files_of_the_torchscript_exporter_take_any_batch(name, options):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    model, file = build(name, exportable=True, **options), io.BytesIO()
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    torch.onnx.export(
        model,
        (images(name, 1),),
        file,
        dynamo=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes=axes,
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for B in (1, 5):
        x = images(name, B)
        (out,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vix_linformer", "ccl_2_3x2_32", "hybrid_vix_nystrom", "levil"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_arrive(name, where, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra train")
    model = build(name)
    with torch.no_grad():
        expected = model(images(name))
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(images(name)), expected)


# The other names run the same code with other numbers.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in NAMES],
)
def test_nothing_stays_on_the_cpu_when_a_model_moves(name):
    model = build(name, depth=1)
    with FakeTensorMode():
        for module in model.modules():
            for key, value in list(module._parameters.items()):
                if value is not None:
                    there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    module._parameters[key] = nn.Parameter(there)
            for key, value in list(module._buffers.items()):
                if value is not None:
                    there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    module._buffers[key] = there
        size = get_pretrained_cfg(name).input_size
        out = model(torch.empty(2, *size, device="cuda"))
    assert out.device.type == "cuda"
    assert out.shape == (2, model.num_classes)


@pytest.mark.parametrize("name", ["hybrid_vix_softmax", "levit_1stage", "cct_4_3x2_32"])
def test_an_activation_stands_in_one_place(name):
    # DeepLift and other hooks on activations keep one pair of input and output per module.
    model, calls = build(name), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ReLU | nn.GELU | nn.Hardswish | nn.MaxPool2d):
            calls[path] = 0

            def count(module, args, out, path=path):
                calls[path] += 1

            module.register_forward_hook(count)
    model(images(name))
    assert set(calls.values()) == {1}, calls
