"""Recipes: precedence, YAML's surprises, and one clear sentence for every mistake."""

import dataclasses
import re
from pathlib import Path

import pytest

from timm_xformers.errors import UsageError
from timm_xformers.planning.catalog import build_empty
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


@pytest.mark.parametrize(
    ("name", "channels", "classes", "params"),
    [
        ("cifar100", 3, 100, 493_997),
        ("tiny_imagenet", 3, 200, 506_897),
        ("fashion_mnist", 1, 10, 280_783),
        # Of a standard build of each geometry, as are those of the source.
        ("vit_cifar10_256", 3, 10, 3_191_562),
        ("vit_cifar10_768", 3, 4, 85_221_124),
        ("mnist_nano", 1, 10, 1_530),
        ("lra_image", 1, 10, 166_410),
        ("lra_pathfinder", 1, 2, 165_890),
    ],
)
def test_models_of_recipes_have_the_parameters_that_are_said(name, channels, classes, params):
    """At every size that a stage trains at, but for the positions."""
    recipe = load_recipe(name, {})
    last = {"fashion_mnist": 28, "mnist_nano": 28}.get(name, 32)
    for side in [*(stage["img_size"] for stage in recipe.stages), last]:
        kwargs = {**recipe.model_kwargs, "in_chans": channels, "num_classes": classes}
        model = build_empty(recipe.model, side, **kwargs)
    assert sum(p.numel() for p in model.parameters()) == params
    head = shipped_recipes()[name].read_text().split("\n\n")[0]
    if "parameters" in head:
        assert f"{params:,} parameters" in " ".join(head.replace("#", "").split())


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
    hashes = [path.stem.rpartition(".")[2] for path in stored]
    assert [load_recipe(str(path), {}).digest for path in stored] == hashes
    # A field that came later is in the hash once it is used.
    assert load_recipe(str(stored[0]), {"patch_drop_rate": 0.5}).digest != hashes[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs=1:30", "epochs='1:30' has the wrong type"),  # sixty times one and thirty to 1.1
        ("grad_accum_steps=3e38", "takes a whole number"),
        ("seed=" + "9" * 400, "seed=a number of more than 19 digits"),
        ("seed=" + "9" * 5000, "a value is too long"),
        ("lr=" + "9" * 400, "out of range"),
        ("lr=1e400", "out of range"),
        ("crop_pad=9223372036854775808", "out of range"),
        ("crop_pad=9223372036854775807", "at most 16384"),
        ("model_kwargs=" + "[" * 5000, "too deep"),
        ("model_kwargs.a=" + "[" * 40 + "]" * 40, "too deep"),
        ("model_kwargs.a=[" + "0," * 20_000 + "]", "too many values"),
        ("classes=[&a [1, 1], *a]", "aliases"),
        ("model_kwargs={a: 1, a: 2}", "'a' is given twice"),
        ("model_kwargs={a: !!timestamp 2020-01-01}", "neither text nor a number"),
        ("model_kwargs={1: 2}", "has the key 1"),
        ("model_kwargs.img_size=8", "write img_size=... instead"),
        ("model_kwargs.num_classes=8", "write num_classes=... instead"),
        ("model_kwargs.pretrained=true", "write pretrained=... instead"),
        ("model_kwargs.drop_path_rate=1.5", "write drop_path_rate=... instead"),
        ("drop_path_rate=1.5", "at most 0.9"),
        ("min_lr=0.1", "min_lr=0.1, where the schedule ends, is above lr=0.001"),
        ("attn_layer=nystrom_l64", "model_kwargs.attn_layer"),
        ("class_weights=equal", "use balanced, or a mapping"),
        ("class_weights={cat: 0}", "a number above 0"),
        ("output=a\\0b", "null character"),
    ],
)
def test_values_that_no_run_can_have(text, words):
    if text.startswith("output"):
        overrides = {"output": "a\0b"}  # YAML itself refuses it
        with pytest.raises(UsageError, match=words):
            load_recipe(None, overrides)
        return
    with pytest.raises(UsageError, match=re.escape(words)):
        load_recipe(None, parse_assignments([text]))


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("epochs=010", "epochs", 10),  # eight to YAML 1.1
        ("model_kwargs.x=2020-01-01", "model_kwargs", {"x": "2020-01-01"}),
        ("class_weights={7: 2}", "class_weights", {"7": 2}),
        ("output='1e3'", "output", "1e3"),
        ("output=010x", "output", "010x"),
    ],
)
def test_values_are_read_as_written_and_come_back_from_the_file(tmp_path, text, field, value):
    recipe = load_recipe(None, parse_assignments([text]))
    assert getattr(recipe, field) == value
    recipe.save(tmp_path / "r.yaml")
    assert load_recipe(str(tmp_path / "r.yaml"), {}) == recipe


def test_aliases_by_the_million_are_refused_at_once(tmp_path):
    lines = ["a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="aliases"):
        load_recipe(str(tmp_path / "r.yaml"), {})


def test_fewer_epochs_shorten_what_nobody_asked_for(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "epochs: 30\nwarmup_epochs: 3\n"
        "stages: [{epoch: 1, img_size: 8}, {epoch: 11, img_size: 16}, {epoch: 21, batch_size: 4}]\n"
    )
    whole = load_recipe(str(path), {})
    assert load_recipe(str(path), {"epochs": 25}).stages == whole.stages  # they fit
    short = load_recipe(str(path), {"epochs": 6})
    assert [entry["epoch"] for entry in short.stages] == [1, 3, 5]
    assert short.warmup_epochs == 3
    one = load_recipe(str(path), {"epochs": 1})
    assert one.stages == [{"epoch": 1, "batch_size": 4}]
    assert one.warmup_epochs == pytest.approx(0.1)
    with pytest.raises(UsageError, match="stages has epoch=11"):  # asked for
        load_recipe(str(path), {"epochs": 6, "stages": whole.stages})


@pytest.mark.parametrize(
    ("model", "asked", "starts"),
    [
        ("vix_softmax", None, False),
        ("vix_softmax.digits", None, True),
        ("vix_softmax.digits", False, False),
        ("hf-hub:me/model", None, True),
        ("local-dir:/some/where", None, True),
        ("vix_softmax", True, True),
    ],
)
def test_names_that_carry_weights_mean_them(model, asked, starts):
    recipe = Recipe(model=model, pretrained=asked)
    assert recipe.starts_pretrained is starts
    assert recipe.digest == Recipe(model=model, pretrained=starts).digest


def test_every_setting_says_what_it_means():
    for field in dataclasses.fields(Recipe):
        assert field.metadata["meaning"].endswith("."), field.name
