"""Exported files give the model's logits, at any batch size, and hold no folder of this machine."""

import json
from importlib.util import find_spec

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_xformers.cli import main
from timm_xformers.errors import UserError
from timm_xformers.exporting import export as module
from timm_xformers.exporting.export import export, sheet_of
from timm_xformers.exporting.int8 import quantize_weights

NAME = "vix_softmax.digits"
FORMATS = [
    pytest.param(
        ".onnx",
        marks=pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs the extra export"),
    ),
    ".pt2",
    pytest.param(
        ".xml",
        marks=pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO"),
    ),
]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(module, "TIMED_SECONDS", 1e-6)


def reload(path):
    """The file as a function of images."""
    if path.suffix == ".pt2":
        return torch.export.load(str(path)).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.fixture(scope="module", params=FORMATS)
def done(request, tmp_path_factory):
    """A model's file that takes any batch size; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TIMED_SECONDS", 1e-6)
        return export(NAME, tmp_path_factory.mktemp("done") / f"model{request.param}")


def test_file_gives_the_models_logits_at_any_batch_size(done):
    path = done.path
    assert path.name == f"model{path.suffix}"
    assert done.batch_sizes == [1, 2, 5]
    assert done.difference < 1e-5
    assert done.same_answer_percent == 100
    assert done.images_per_s > 0 < done.model_images_per_s
    assert {entry.name for entry in path.parent.iterdir()} >= {path.name, sheet_of(path).name}
    assert not list(path.parent.glob(".txf-*"))
    if path.suffix == ".xml":
        return
    model = timm.create_model(NAME, pretrained=True).eval()
    images = torch.randn(7, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(reload(path)(images), model(images), atol=1e-4, rtol=1e-4)


def test_int8_is_smaller_and_close(done, tmp_path):
    small = export(NAME, tmp_path / f"small{done.path.suffix}", batch_size=2, int8=True)
    assert small.megabytes < 0.75 * done.megabytes
    assert done.difference < 1e-5 < small.difference < module.CLOSE_INT8


def test_int8_keeps_each_row_within_half_a_step():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        weight[3] *= 1000
        layer.weight.copy_(weight)
    assert quantize_weights(layer) == 64 * 32
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - weight).abs() <= step / 2 + 1e-7 * weight.abs()).all()
    assert layer.parametrizations.weight.original.dtype == torch.int8
    assert quantize_weights(nn.Sequential(nn.Linear(4, 4))) == 0


def test_run_folder_from_the_command_line(finished_run, tmp_path, capsys):
    path = tmp_path / "new" / "nano.pt2"
    command = ["export", str(finished_run), "--output", str(path), "--batch-size", "3"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{path}: ExportedProgram" in said
    assert "any batch size" not in said
    assert "at batch 3" in said
    sheet = json.loads(sheet_of(path).read_text())
    assert sheet["input"] == ["batch", 1, 8, 8]
    assert sheet["label_names"] == list(map(str, range(10)))
    assert str(tmp_path).encode() not in path.read_bytes()
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "words", "code", "said"),
    [
        (NAME, ["--output", "a.txt"], 2, "end it in one of .onnx, .pt2, .xml"),
        (NAME, ["--output", "a.pt2", "--opset", "18"], 2, "--opset is ONNX's"),
        (NAME, ["--output", "a", "--int8"], 2, "--int8 is for files"),
        ("no_such_model", ["--output", "a.pt2"], 2, "Unknown model"),
        ("vix_softmax", ["--output", "a.pt2", "--img-size", "0"], 2, "not a whole number"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(
    tmp_path, monkeypatch, capsys, model, words, code, said
):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(["export", model, *words])
    except SystemExit as end:  # argparse's
        found = end.code
    assert found == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_takes_colours_and_names_classes_once(finished_run, tmp_path):
    folder = tmp_path / "colours"
    export(f"local-dir:{finished_run / 'best'}", folder, in_chans=3)
    grey = timm.create_model(f"local-dir:{finished_run / 'best'}", pretrained=True).eval()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images.repeat(1, 3, 1, 1)), grey(images))
    config = json.loads((folder / "config.json").read_text())
    # transformers passes num_classes and model_args to one call, and reads labels from the top.
    assert config["num_classes"] == 10
    assert "num_classes" not in config["model_args"]
    assert config["model_args"]["in_chans"] == config["pretrained_cfg"]["input_size"][0] == 3
    assert len(config["pretrained_cfg"]["mean"]) == 3
    assert config["label_names"] == list(map(str, range(10)))


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_transformers_gives_the_same_logits(finished_run, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    for source, name in ((f"local-dir:{finished_run / 'best'}", "run"), (NAME, "tag")):
        export(source, tmp_path / name, in_chans=3)
        theirs = AutoModelForImageClassification.from_pretrained(tmp_path / name).eval()
        ours = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        pixels = AutoImageProcessor.from_pretrained(tmp_path / name)(
            Image.new("RGB", (20, 10), (200, 30, 0)), return_tensors="pt"
        )["pixel_values"]
        with torch.no_grad():
            torch.testing.assert_close(theirs(pixels).logits, ours(pixels))
        assert theirs.config.id2label[3] == "3"


def test_a_file_with_other_logits_is_not_kept(tmp_path, monkeypatch):
    def wrong(model, example, path, free, opset):
        path.write_bytes(b"")
        return lambda images: model(images) + 1

    monkeypatch.setitem(module._WRITERS, ".pt2", wrong)
    with pytest.raises(UserError, match="differ from the model's"):
        export(NAME, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_an_exporter_that_fails_is_named_with_a_way_on(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such\noperator")

    monkeypatch.setitem(module._WRITERS, ".pt2", fails)
    with pytest.raises(UserError, match=r"\(RuntimeError: no such operator\); try a fixed"):
        export(NAME, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
