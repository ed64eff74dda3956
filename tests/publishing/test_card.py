"""Cards: what repeats a run works anywhere, and nothing of this machine is in them."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from timm_xformers.cli import main
from timm_xformers.publishing.card import changed_settings, reproduction
from timm_xformers.publishing.finished_run import open_finished, public, public_settings
from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.results_json import Record
from timm_xformers.weights import read_manifest
from tools.checkout import this_checkout

CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_command_of_a_card_is_the_run_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)\n```$", text, flags=re.DOTALL | re.MULTILINE)
    words = shlex.split(block)
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["timm-xformers", "train"]
    if given["--recipe"] == "recipe.yaml":
        (settings,) = re.findall(r"^```yaml\n(.*?)```$", text, flags=re.DOTALL | re.MULTILINE)
        Path("recipe.yaml").write_text(settings, encoding="utf-8")
    changes = {"model": given["--model"]} if "--model" in given else {}
    entry = read_manifest()[path.stem]
    assert load_recipe(given["--recipe"], changes).digest == entry.recipe_hash
    assert int(given["--seed"]) == entry.seed


def test_settings_of_a_card_are_the_recipe():
    for entry in read_manifest().values():
        recipe = this_checkout().load_recipe(entry.recipe_hash)
        again = Recipe(**yaml.safe_load(changed_settings(recipe)))
        assert again.digest == recipe.digest == entry.recipe_hash


def test_a_recipe_of_ones_own_travels_with_the_card(finished_run):
    run = open_finished(finished_run)
    recipe = dataclasses.replace(run.recipe, lr=0.123)
    where, command = reproduction(run.record, recipe, " elsewhere")
    assert (where, command.split()[3]) == (" elsewhere", "recipe.yaml")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("local-dir:/home/me/run/best", "local-dir:PATH"),
        ("local-dir:run/best", "local-dir:PATH"),
        ("/home/me/a.pth", "PATH"),
        ("~/a.pth", "PATH"),
        ("../a.pth", "PATH"),
        (r"C:\Users\me\a.pth", "PATH"),
        ("file:///home/me", "file://PATH"),
        ({"file": "weights/a.pth", "depth": 2}, {"file": "PATH", "depth": 2}),
        ({"a": [{"b": "/home/me"}]}, {"a": [{"b": "PATH"}]}),
        ("hf-hub:me/model", "hf-hub:me/model"),
        ("torch/cifar10", "torch/cifar10"),
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        (1.5, 1.5),
        (None, None),
    ],
)
def test_paths_are_not_published(value, shown):
    assert public(value) == shown


@pytest.mark.parametrize(
    ("notes", "skipped", "said"),
    [
        (
            ["left out: 3 hidden folders"],
            2,
            "left out: 3 hidden folders; left out: 2 images that cannot be read.",
        ),
        (None, 0, None),  # as earlier versions wrote it
    ],
)
def test_what_a_run_left_out_is_on_its_card(run_copy, capsys, notes, skipped, said):
    record = Record.load(run_copy / "results.json")
    dataclasses.replace(record, data_notes=notes, skipped_images=skipped).save(
        run_copy / "results.json"
    )
    assert main(["publish", str(run_copy), "me/nano", "--dry-run"]) == 0
    _, words, after = capsys.readouterr().out.partition("Of these images the run said: ")
    assert bool(words) == (said is not None)
    assert after.startswith(said or "")


def started_from(run, **changes):
    """The run as if it had begun elsewhere."""
    dataclasses.replace(
        Recipe(**yaml.safe_load((run / "recipe.yaml").read_text())), **changes
    ).save(run / "recipe.yaml")
    record = Record.load(run / "results.json")
    dataclasses.replace(record, model=changes["model"]).save(run / "results.json")
    return run


@pytest.mark.parametrize(
    ("changes", "base_model"),
    [
        ({"model": "local-dir:/home/me/secret/best"}, None),
        ({"model": "hf-hub:owner/name@v1"}, "owner/name"),
        (
            {"model": "vit_tiny_patch16_224", "pretrained": True},
            "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        ),
    ],
)
def test_dry_run_names_licence_and_source_and_no_folder(run_copy, capsys, changes, base_model):
    run = started_from(run_copy, **changes)
    assert main(["publish", str(run), "me/nano", "--dry-run", "--license", "cc-by-nc-4.0"]) == 0
    said = capsys.readouterr().out
    assert "The card says licence cc-by-nc-4.0" in said
    assert "secret" not in said
    card = ModelCard(said[said.index("---\n") :])
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.base_model == base_model
    assert "Fine-tuned from" in card.text


def test_recipe_and_record_have_no_folder(run_copy):
    run = open_finished(started_from(run_copy, model="local-dir:/home/me/secret/best"))
    assert "secret" not in json.dumps(public_settings(run.recipe))


def test_licence_must_be_a_name(finished_run, capsys):
    assert main(["publish", str(finished_run), "me/nano", "--dry-run", "--license", "A B"]) == 2
    assert "--license 'A B' is no name" in capsys.readouterr().err


def test_five_guesses_of_three_classes_are_no_figure(run_copy, capsys):
    path = run_copy / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_classes": 3}))
    assert main(["publish", str(run_copy), "me/x", "--dry-run", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert "Top-1 accuracy" in said
    assert "Top-5 accuracy" not in said
