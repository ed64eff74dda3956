"""Pictures in, classes out: as evaluation has them, from every kind of name and place."""

import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_xformers.cli import main
from timm_xformers.data.data import open_data
from timm_xformers.predicting.classes import class_names
from timm_xformers.predicting.images import find_images
from timm_xformers.predicting.predict import Prediction, Unreadable, predict
from timm_xformers.recipe import load_recipe
from timm_xformers.records.results_json import Record


@pytest.fixture
def digits(tmp_path) -> Path:
    """All test images of the digits, named by number and label."""
    test = open_data(load_recipe("digits", {})).split("test")
    folder = tmp_path / "digits"
    folder.mkdir()
    for position in range(len(test)):
        label = int(test.labels[position])
        test.image(position).save(folder / f"{position:03d}-{label}.png")
    return folder


def test_accuracy_is_that_of_the_record(finished_run, digits):
    found = list(predict(str(finished_run), find_images([str(digits)])))
    right = sum(p.classes[0].name == Path(p.image).stem[-1] for p in found)
    record = Record.load(finished_run / "results.json")
    assert len(found) == record.test_images == 599
    assert 100 * right / 599 == pytest.approx(record.test_top1_percent, abs=1e-3)
    for prediction in found[:3]:
        shares = [guess.probability for guess in prediction.classes]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1 + 1e-6


def test_table_json_and_grid(finished_run, digits, capsys, tmp_path):
    images = sorted(map(str, digits.iterdir()))[:9]
    assert main(["predict", str(finished_run), *images, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in entries] == images
    assert set(entries[0]["classes"][0]) == {"label", "name", "probability"}

    command = ["predict", f"local-dir:{finished_run / 'best'}", *images, "--top-k", "2"]
    assert main([*command, "--grid", str(tmp_path / "g.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 * 3
    best = entries[0]["classes"][0]
    assert lines[:2] == [images[0], f"{100 * best['probability']:>8.2f} %  {best['name']}"]
    with Image.open(tmp_path / "g.png") as grid:
        pixels = np.asarray(grid.convert("L"))
    assert grid.width > grid.height > 200
    assert pixels.std() > 20
    assert main([*command, "--grid", str(tmp_path / "g.nothing")]) == 1
    assert "has no format" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_and_the_rest_is_answered(
    finished_run, digits, capsys, tmp_path
):
    good = sorted(map(str, digits.iterdir()))[:2]
    (tmp_path / "text.png").write_text("no image")
    cut = Path(good[0]).read_bytes()[:60]
    (tmp_path / "cut.png").write_bytes(cut)
    files = [good[0], "text.png", "cut.png", good[1]]
    assert main(["predict", str(finished_run), *files, "--json"]) == 1
    out, err = capsys.readouterr()
    assert [entry["image"] for entry in json.loads(out)] == good
    assert err.startswith("error: Cannot read 2 of 4 images: text.png is no image; cut.png ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_kind(mode, finished_run, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (30, 20)).save(path)
    (found,) = predict(str(finished_run), [str(path)])
    assert isinstance(found, Prediction)


def test_pictures_from_an_address(finished_run, digits, tmp_path):
    image = sorted(digits.iterdir())[0]

    class Pages(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=digits)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        names = [f"{base}/{image.name}", f"{base}/absent.png", str(image)]
        here, absent, same = predict(str(finished_run), find_images(names))
        server.shutdown()
    assert here.classes == same.classes
    assert absent == Unreadable(names[1], "the server answers 404 File not found")
    (gone,) = predict(str(finished_run), [names[0]])
    assert "cannot be fetched" in gone.reason


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("vix_sofmax here.png", 2, "nearest: vix_softmax"),
        ("cct_14_7x2_224 here.png", 1, "No pretrained weights exist"),
        ("cct_14_7x2_224 nowhere.png", 1, "nowhere.png does not exist"),
        ("cct_14_7x2_224 empty", 1, "empty holds no images"),
        ("local-dir:empty here.png", 1, "config.json is missing"),
    ],
)
def test_mistakes_are_one_sentence_and_a_code(arguments, code, words, capsys):
    Path("empty").mkdir()
    Image.new("L", (8, 8)).save("here.png")
    assert main(["predict", *arguments.split()]) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


class Named(torch.nn.Module):
    def __init__(self, num_classes, **config):
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"num_classes": num_classes, "architecture": "x", **config}
        self.default_cfg = self.pretrained_cfg


def test_class_names_are_the_weights_own_or_imagenets():
    assert class_names(Named(2, label_names=("cat", "dog"))) == [("cat", "dog")]
    assert class_names(Named(3, label_names=("cat", "dog"))) == []
    words, synsets = class_names(Named(1000))
    assert len(words) == len(synsets) == 1000
    assert words[0].startswith("tench")
    assert synsets[0] == "n01440764"


def test_classes_without_names_go_by_number(finished_run, digits, tmp_path):
    config = json.loads((finished_run / "best" / "config.json").read_text())
    del config["label_names"]
    folder = tmp_path / "nameless"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(finished_run / "best" / "model.safetensors", folder)
    (found,) = predict(str(folder), find_images([str(digits)])[:1])
    assert [guess.name for guess in found.classes] == [str(g.label) for g in found.classes]
