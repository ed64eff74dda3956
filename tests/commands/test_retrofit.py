"""``timm-xformers retrofit``: the recipe it makes, and one run from the command to the weights."""

import argparse
import json

import pytest
import timm

from timm_xformers.cli import main
from timm_xformers.commands import retrofit
from timm_xformers.recipe import load_recipe


def recipe_of(*words):
    parser = argparse.ArgumentParser()
    retrofit.add_arguments(parser)
    return retrofit._recipe(parser.parse_args(words))


def test_model_is_its_own_teacher_and_the_data_says_how_to_augment():
    recipe = recipe_of("vix_softmax.digits", "--mechanism", "nystrom_l16", "--blocks", "1-2")
    assert recipe.model == recipe.teacher == "vix_softmax.digits"
    assert recipe.replace == {"mechanism": "nystrom_l16", "blocks": "1-2"}
    assert recipe.starts_pretrained
    assert 0 < recipe.align_epochs < recipe.epochs
    own, digits = load_recipe("retrofit", {}), load_recipe("digits", {})
    assert recipe.rotate_degrees == digits.rotate_degrees > 0
    assert (recipe.lr, recipe.mixup) == (own.lr, own.mixup)


def test_settings_and_flags_go_over_what_the_command_fills_in():
    recipe = recipe_of(
        *("vix_softmax.digits", "--mechanism", '{"0,3": softmax, "1-2": performer_softmax_m64}'),
        *("--set", "replace.num_features=110", "teacher=vix_softmax.mnist", "zoom=0"),
        *("--epochs", "6", "--align-epochs", "1"),
    )
    assert recipe.replace == {
        "mechanism": {"0,3": "softmax", "1-2": "performer_softmax_m64"},
        "num_features": 110,
    }
    assert (recipe.teacher, recipe.zoom) == ("vix_softmax.mnist", 0)
    assert (recipe.epochs, recipe.align_epochs) == (6, 1)


@pytest.mark.parametrize(("epochs", "aligned"), [(6, 2), (3, 1), (1, 0), (0, 0)])
def test_fewer_epochs_keep_the_share_of_alignment(epochs, aligned):
    recipe = recipe_of("vix_softmax.digits", "--mechanism", "softmax", "--epochs", str(epochs))
    assert recipe.align_epochs == aligned
    assert recipe.warmup_epochs <= epochs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("retrofit vix_softmax.digits", "needs --mechanism NAME"),
        ("retrofit vix_softmax.digit --mechanism softmax", "vix_softmax.digit"),
        ("retrofit vix_softmax.digits --mechanism performer", "Cannot replace attention"),
        ("retrofit vix_softmax.digits --mechanism softmax --set fsdp=true", "fsdp=false"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(words, said, capsys):
    assert main(words.split()) in (1, 2)
    assert said in capsys.readouterr().err


def test_dry_run_measures_both_parts_and_writes_nothing(tmp_path, capsys):
    words = "retrofit vix_softmax.digits --mechanism performer_softmax_m16 --dry-run"
    assert main([*words.split(), "--epochs", "3", "--limit", "100", "--batch-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "# epochs 1 to 1, alignment: 8 x 8 pixels, 25 steps of 4 images" in said
    assert "# epochs 2 to 3: 8 x 8 pixels" in said
    assert not list(tmp_path.iterdir())


def test_from_the_command_to_weights_by_name(tmp_path, capsys):
    words = "retrofit vix_softmax.digits --mechanism softmax --epochs 0 --output run"
    assert main([*words.split(), "--set", "trackers=[]"]) == 0
    assert "Results are in run" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    # Exact attention in the place of exact attention: nothing is lost.
    assert record["test_agreement_percent"] == 100.0
    assert record["test_top1_percent"] == record["test_teacher_top1_percent"] > 95
    assert record["teacher"] == "vix_softmax.digits"
    assert timm.create_model("local-dir:run/best", pretrained=True).num_classes == 10
    assert main(["evaluate", "run", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test_top1_percent"] == record["test_top1_percent"]
