"""Pictures in, classes out: as evaluation has them, from every kind of name and place."""

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import socketserver
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_xformers.cli import main
from timm_xformers.data.data import open_data
from timm_xformers.errors import UserError
from timm_xformers.predicting import images as pictures
from timm_xformers.predicting.classes import class_names
from timm_xformers.predicting.images import find_images, open_image
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
    assert err.startswith(
        "error: Cannot read 2 of 4 images: text.png is no image; cut.png cannot be decoded: "
    )
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


PNG = io.BytesIO()
Image.new("L", (8, 8), 200).save(PNG, "PNG")
PICTURE = PNG.getvalue()
HEAD = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {
    "/whole": HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE,
    "/a%20b.png": HEAD + b"Content-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE,
    "/%C3%BC.png?x=1&y=%20": HEAD + b"\r\n" + PICTURE,
    "/short": HEAD + b"Content-Length: 9999\r\n\r\n" + PICTURE[:40],
    "/chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
    "/cut-chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\nhello",
    "/garbage": b"\x00\x01 nothing of the kind\r\n\r\n",
    "/silence": b"",
    "/text": HEAD + b"Content-Length: 5\r\n\r\nhello",
    "/circle": b"HTTP/1.1 302 Found\r\nLocation: /circle\r\nContent-Length: 0\r\n\r\n",
    "/file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hosts\r\nContent-Length: 0\r\n\r\n",
}


@pytest.fixture
def strange_server():
    class Strange(socketserver.StreamRequestHandler):
        def handle(self):
            path = self.rfile.readline().split()[1].decode()
            if path != "/drop":
                self.wfile.write(ANSWERS.get(path, b""))
                return
            self.wfile.write(HEAD + b"\r\n")
            with contextlib.suppress(OSError):
                for _ in range(200):  # a byte now and then, so that no single wait is long
                    self.wfile.write(b"x")
                    time.sleep(0.05)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    with Server(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/whole", "/a b.png", "/a%20b.png", "/ü.png?x=1&y= "])
def test_addresses_as_people_write_them(strange_server, path):
    assert open_image(strange_server + path, "L").getpixel((0, 0)) == 200
    assert open_image(strange_server.replace("http", "HTTP") + path, "L").size == (8, 8)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/short", r"is cut off: 40 of 9999 bytes came|broke off"),
        ("/chunks", "cannot be fetched"),
        ("/cut-chunk", "cannot be fetched"),
        ("/garbage", "cannot be fetched"),
        ("/silence", "cannot be fetched"),
        ("/text", "is no image"),
        ("/circle", "the server answers 302"),
        ("/file", "the server answers 302"),
        ("/drop", "cannot be fetched .*(not there after|timed out)"),
    ],
)
def test_a_strange_answer_loses_no_other_picture(
    path, words, strange_server, finished_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(pictures, "WHOLE_TIMEOUT_S", 1)
    Image.new("L", (8, 8)).save(tmp_path / "here.png")
    names = [strange_server + path, "http://[::1", "http://\x00/", str(tmp_path / "here.png")]
    found = list(predict(str(finished_run), find_images(names)))
    assert re.search(words, found[0].reason)
    assert all("cannot be fetched" in entry.reason for entry in found[1:3])
    assert isinstance(found[3], Prediction)


def test_a_folder_is_read_as_in_training(finished_run, tmp_path):
    folder = tmp_path / "mixed"
    (folder / "sub" / ".ipynb_checkpoints").mkdir(parents=True)
    names = ["a.webp", "b.bmp", "sub/c.tif", "sub/d.PNG"]
    for name in (*names, "sub/.ipynb_checkpoints/e.png", "._f.png"):
        Image.new("L", (8, 8)).save(folder / name)
    (folder / "g.txt").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "sub" / "up").symlink_to(folder)
    assert find_images([str(folder)]) == [str(folder / name) for name in names]
    assert all(
        isinstance(p, Prediction) for p in predict(str(finished_run), [*find_images([str(folder)])])
    )
    with pytest.raises(UserError, match=r"pipe[.]png is no regular file"):
        find_images([str(folder / "pipe.png")])


def test_what_is_shown_is_turned_and_scaled(finished_run, tmp_path):
    """The same picture in three forms is the same picture to the model."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (8, 8), np.uint8)
    upright = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "c.png")
    found = list(predict(str(finished_run), [str(tmp_path / f"{name}.png") for name in "abc"]))
    assert found[0].classes == found[1].classes == found[2].classes
