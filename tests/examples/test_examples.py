"""Each file of examples/ runs and does what it says."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder as a program, and return what it printed."""
    monkeypatch.chdir(tmp_path)

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_every_example_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in source for path in EXAMPLES.iterdir() if path.is_file())


def test_add_a_mechanism(run):
    loss = re.fullmatch(r"LinearAttention: loss (\d\.\d{3})\n", run("add_a_mechanism.py"))
    assert 0.5 < float(loss[1]) < 2.5  # about log(3) for three classes


def test_attention_in_a_vit(run):
    out = run("attention_in_a_vit.py", "--img-size", "64", "--attention", "nystrom_l16")
    assert re.fullmatch(r"64 tokens\nexact: \d+ ms\nnystrom_l16: \d+ ms\n", out)


def test_fine_tune_pictures(run):
    for number, colour in enumerate(["red", "green", "blue"] * 10):
        folder = Path("pictures", colour)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
    out = run("fine_tune_pictures.py", "pictures", "--epochs", "4")
    assert "epoch 4: 100.0 % of 6 held-out pictures" in out
    saved = torch.load("fine_tuned.pt", weights_only=True)
    assert saved["classes"] == ["blue", "green", "red"]


def test_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    space: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(cells):
        exec(compile(code, f"cell {number}", "exec"), space)
    shares = [float(share) for share in re.findall(r"([\d.]+) % of", capsys.readouterr().out)]
    assert len(shares) == 2
    assert shares[0] > 90  # trained weights
    assert shares[1] > 80  # fifteen updates of trained weights
