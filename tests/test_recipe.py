"""Recipes: precedence, YAML's surprises, and one clear sentence for every mistake."""

import dataclasses
import re
from pathlib import Path

import pytest

from timm_xformers.errors import UsageError
from timm_xformers.recipe import (
    Recipe,
    load_recipe,
    parse_assignments,
    shipped_recipes,
)

ROOT = Path(__file__).parents[1]


def test_command_line_goes_over_file_goes_over_defaults(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("lr: 0.5\nepochs: 7\nmodel_kwargs: {patch_size: 4, depth: 2}\n")

    recipe = load_recipe(str(path), {"epochs": 3, "model_kwargs.depth": 1})

    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.5, 3, Recipe().batch_size)
    assert recipe.model_kwargs == {"patch_size": 4, "depth": 1}


def test_saved_recipe_reads_back(tmp_path):
    recipe = Recipe(lr=2e-4, model_kwargs={"a": [1, 2]}, mixed_precision="no", img_size=None)
    recipe.save(tmp_path / "r.yaml")
    assert load_recipe(str(tmp_path / "r.yaml"), {}) == recipe


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("lr=1e-3", "lr", 0.001),  # text to YAML 1.1
        ("lr=1", "lr", 1.0),
        ("mixed_precision=no", "mixed_precision", "no"),  # false to YAML 1.1
        ("img_size=null", "img_size", None),
        ("opt_kwargs={betas: [0.9, 0.95]}", "opt_kwargs", {"betas": [0.9, 0.95]}),
    ],
)
def test_values_as_people_write_them(text, field, value):
    assert getattr(load_recipe(None, parse_assignments([text])), field) == value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 1}, "no setting 'learning_rate'"),
        ({"batchsize": 1}, "nearest: batch_size"),
        ({"lr": "fast"}, "lr='fast' has the wrong type; it takes a number"),
        ({"epochs": 2.5}, "epochs=2.5 has the wrong type; it takes a whole number"),
        ({"epochs": True}, "wrong type"),
        ({"img_size": "big"}, "a whole number or null"),
        ({"model_kwargs": 3}, "a mapping"),
        ({"classes": "cat,dog"}, "a list such as [name, name] or null"),
        ({"unreadable": "replace"}, "use error, skip"),
        ({"limit": 0}, "at least 1"),
        ({"cutout": -1}, "at least 0"),
        ({"model_kwargs": {"patch_size:4": None}}, "a space follows the colon"),
        ({"trackers": "wandb"}, "takes a list such as [name, name] or null"),
        ({"trackers": ["tensorbord"]}, "trackers='tensorbord' is unknown; use tensorboard, wandb"),
        ({"lr": 0}, "above 0"),
        ({"lr": float("nan")}, "out of range"),
        ({"val_fraction": 0.9}, "at least 0 and at most 0.5"),
        ({"sched": "cosinus"}, "use cosine"),
        ({"mixup": 0.2, "batch_size": 33}, "even batch_size"),
        ({"epochs": 1, "warmup_epochs": 3}, "warmup_epochs=3 is longer than epochs=1"),
    ],
)
def test_mistakes_are_named(values, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        load_recipe(None, values)


@pytest.mark.parametrize("text", ["lr", "=3", "lr=[1"])
def test_assignments_must_be_key_and_value(text):
    with pytest.raises(UsageError, match="--set"):
        parse_assignments([text])


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "", "a: [1\n", "!!python/name:os.system x"])
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(str(path), {})


def test_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(UsageError, match="nearest: digits"):
        load_recipe("digit", {})


def test_every_shipped_recipe_loads_and_says_what_it_costs():
    shipped = shipped_recipes()
    assert {"digits", "digits_pixels", "mnist"} <= set(shipped)
    for name, path in shipped.items():
        load_recipe(name, {})
        head = path.read_text().split("\n\n")[0]
        for word in ("Command:", "Hardware:", "Time:", "Expected"):
            assert word in head, f"{path.name} lacks {word}"
        assert "TODO" not in head, f"{path.name} has figures to fill in"


def test_digest_ignores_seed_and_paths_alone():
    base = Recipe()
    for change in (
        {"seed": 1},
        {"output": "x"},
        {"data_dir": "y"},
        {"num_workers": 0},
        {"trackers": []},
    ):
        assert dataclasses.replace(base, **change).digest == base.digest
    assert dataclasses.replace(base, lr=0.1).digest != base.digest


def test_hashes_of_published_recipes_stay():
    stored = sorted((ROOT / "results" / "recipes").glob("*.yaml"))
    assert stored
    assert [load_recipe(str(path), {}).digest for path in stored] == [path.stem for path in stored]
    # A field that came later is in the hash once it is used.
    assert load_recipe(str(stored[0]), {"patch_drop_rate": 0.5}).digest != stored[0].stem
