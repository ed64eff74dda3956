"""The picture of what a model looks at, drawn of what the model saw."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_xformers import attention_map
from timm_xformers.cli import main
from timm_xformers.explaining import picture
from timm_xformers.explaining.picture import Seen, draw_maps, look
from timm_xformers.files import figures
from timm_xformers.predicting.predict import Guess


@pytest.fixture
def image(tmp_path):
    pixels = np.arange(12 * 8 * 3, dtype=np.uint8).reshape(8, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_maps_are_of_the_image_that_the_model_saw(finished_run, image):
    seen = look(str(finished_run), image)
    model = timm.create_model(f"local-dir:{finished_run / 'best'}", pretrained=True).eval()
    config = model.pretrained_cfg
    assert seen.pixels.shape == (1, 8, 8)
    assert seen.query == "class"
    assert list(seen.maps) == list(range(len(model.blocks)))
    mean, std = config["mean"][0], config["std"][0]
    images = ((seen.pixels.float() / 255 - mean) / std)[None]
    weights = attention_map(model, images, 0)[0].mean(dim=0)
    before = model.num_prefix_tokens
    torch.testing.assert_close(seen.maps[0].flatten(), weights[before:], atol=1e-6, rtol=0)
    assert seen.outside[0] == pytest.approx(float(weights[:before].sum()), abs=1e-6)
    with torch.no_grad():
        shares = model(images).softmax(-1)[0]
    assert seen.guess.label == int(shares.argmax())
    assert seen.guess.probability == pytest.approx(float(shares.max()), abs=1e-5)


def test_command_draws_and_says(finished_run, image, tmp_path, capsys):
    output = tmp_path / "maps.png"
    command = ["explain", str(finished_run), image, "--output", str(output)]
    assert main([*command, "--blocks", "0", "--query", "0,1", "--beside", str(finished_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{finished_run}: ")
    with Image.open(output) as drawn:
        assert drawn.height > drawn.width > 200


def test_weights_are_drawn_where_they_are(tmp_path, monkeypatch):
    figures_drawn = []
    monkeypatch.setattr(picture, "save", lambda figure, path: figures_drawn.append(figure))
    weights = torch.zeros(2, 4)
    weights[1, 2], weights[0, 0] = 0.5, -0.25
    pixels = torch.zeros(3, 8, 16, dtype=torch.uint8)
    row = Seen("m", pixels, Guess(0, "x$y", 0.5), (1, 2), {3: weights}, {3: 0.1})
    draw_maps(tmp_path / "a.png", [row])
    figure = figures_drawn[0]
    figure.canvas.draw()
    image, panel = figure.axes
    assert "block 3" in panel.get_title()
    assert "prefix tokens 10 %" in panel.get_title()
    assert r"x\$y" in image.get_title()
    drawn = panel.images[1]
    assert np.array_equal(drawn.get_array(), weights.numpy())
    assert drawn.get_clim() == (-0.5, 0.5)
    assert list(drawn.get_extent()) == [0, 16, 8, 0]
    (ring,) = panel.lines
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (10.0, 6.0)
    assert figures.save is not picture.save


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--blocks 7", 2, "block=7 is out of range"),
        ("--query 9,9", 2, "outside of the grid"),
        ("--query left", 2, "is not class, mean or ROW,COL"),
        ("--blocks all", 2, "are no numbers of blocks"),
    ],
)
def test_mistakes_are_one_sentence(arguments, code, words, finished_run, image, tmp_path, capsys):
    output = tmp_path / "m.png"
    command = ["explain", str(finished_run), image, *arguments.split(), "--output", str(output)]
    try:
        found = main(command)
    except SystemExit as end:
        found = end.code
    assert found == code
    assert words in capsys.readouterr().err
    assert not output.exists()


def test_what_cannot_be_read_or_drawn_is_said(finished_run, image, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    command = ["explain", str(finished_run), str(tmp_path / "text.png"), "--output", "m.png"]
    assert main(command) == 1
    assert "text.png is no image" in capsys.readouterr().err
    assert main(["explain", str(finished_run), image, "--output", "m.nothing"]) == 1
    assert "has no format" in capsys.readouterr().err
