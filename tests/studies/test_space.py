"""Spaces: grids in order, ranges of one kind, and one clear sentence for every mistake."""

import re

import pytest
import yaml

from timm_xformers.errors import UsageError
from timm_xformers.recipe import Recipe, load_recipe, shipped_spaces
from timm_xformers.studies.selecting.space import load_space


@pytest.fixture
def load(tmp_path):
    def load(text, recipe=None):
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return load_space(str(path), recipe or Recipe())

    return load


def test_grid_is_every_combination_and_the_last_key_changes_fastest(load):
    space = load("grid: {lr: [1e-3, 0.1], model_kwargs.depth: [2, 3]}\nfolds: 3\n")
    assert space.configurations() == [
        {"lr": 0.001, "model_kwargs.depth": 2},  # 1e-3 is text to YAML 1.1
        {"lr": 0.001, "model_kwargs.depth": 3},
        {"lr": 0.1, "model_kwargs.depth": 2},
        {"lr": 0.1, "model_kwargs.depth": 3},
    ]
    assert space.keys == ["lr", "model_kwargs.depth"]
    assert space.folds == 3


def test_several_grids_are_joined_without_repetition(load):
    space = load("grid:\n- {lr: [0.1, 0.2]}\n- {lr: [0.2, 0.3]}\n- {opt: [sgd], lr: [0.1]}\n")
    assert space.configurations() == [
        {"lr": 0.1},
        {"lr": 0.2},
        {"lr": 0.3},
        {"opt": "sgd", "lr": 0.1},
    ]
    assert space.keys == ["lr", "opt"]


def test_ranges_are_whole_or_real(load):
    space = load(
        "trials: 7\npruner: hyperband\nsearch:\n"
        "  lr: {low: 1e-4, high: 1e-2, log: true}\n"
        "  weight_decay: {low: 0, high: 1}\n"
        "  batch_size: {low: 16, high: 64, step: 16}\n"
        "  model_kwargs.depth: {low: 1, high: 3}\n"
        "  opt: {choices: [sgd, adamw]}\n"
    )
    assert space.search == {
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "weight_decay": {"low": 0.0, "high": 1.0, "log": False},
        "batch_size": {"low": 16, "high": 64, "step": 16, "log": False},
        "model_kwargs.depth": {"low": 1, "high": 3, "log": False},
        "opt": {"choices": ["sgd", "adamw"]},
    }
    assert (space.trials, space.pruner) == (7, "hyperband")
    assert isinstance(space.search["weight_decay"]["low"], float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grids: {lr: [1.0]}", "no setting 'grids' (nearest: grid"),
        ("folds: 3", "needs either grid or search"),
        ("grid: {lr: [1.0]}\nsearch: {lr: {choices: [1.0]}}", "needs either grid or search"),
        ("grid: {lr: [1.0]}\ntrials: 3", "A grid is tried in full"),
        ("grid: {lr: [1.0]}\nfolds: 0", "folds=0 is out of range"),
        ("grid: {lr: [1.0]}\nfolds: true", "folds=True is out of range"),
        ("grid: [lr]", "grid='lr' is no mapping"),
        ("grid: {lr: 0.1}", "grid: lr=0.1 is no list"),
        ("grid: {lr: []}", "lr=[] is no list"),
        ("grid: {lr: [0.1, -1]}", "above 0"),
        ("grid: {learning_rate: [0.1]}", "no setting 'learning_rate'"),
        ("grid: {seed: [0, 1]}", "seed cannot vary"),
        ("grid: {data: [mnist, digits]}", "data cannot vary"),
        ("search: {lr: 0.1}", "search: lr=0.1 is no distribution"),
        ("search: {lr: {low: 0.1}}", "is no range"),
        ("search: {lr: {low: 0.2, high: 0.1}}", "is no range"),
        ("search: {lr: {low: 0, high: 1, log: true}}", "is no range"),
        ("search: {lr: {low: 0.1, high: 1, log: 2}}", "is no range"),
        ("search: {lr: {low: 0.1, high: .inf}}", "is no range"),
        ("search: {hflip: {low: 0.1, high: 2}}", "hflip=2.0 is out of range"),
        ("search: {lr: {low: 0.1, high: 1, choices: [1]}}", "is no distribution"),
        ("search: {lr: {low: 0.1, height: 1}}", "is no distribution"),
        ("search: {lr: {choices: []}}", "a list of plain values"),
        ("search: {opt_kwargs: {choices: [{a: 1}]}}", "a list of plain values"),
        ("search: {opt: {choices: [3]}}", "opt=3 has the wrong type"),
        ("search: {lr: {choices: [0.1]}}\npruner: mean", "use median, hyperband, none"),
        ("search: {lr: {choices: [0.1]}}\ntrials: 0", "trials=0 is out of range"),
        ("search: {epochs: {low: 2, high: 4}}", "epochs cannot be searched"),
    ],
)
def test_mistakes_are_named(load, text, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        load(text)


def test_epochs_can_be_searched_without_pruning(load):
    assert load("search: {epochs: {low: 2, high: 4}}\npruner: none").search["epochs"]["high"] == 4


def test_one_fold_needs_a_share_to_hold_out(load):
    with pytest.raises(UsageError, match="val_fraction, which is 0"):
        load("grid: {lr: [0.1]}\nfolds: 1", Recipe(val_fraction=0.0))


def test_shipped_spaces_fit_the_recipes_of_their_names():
    assert "mnist_study" in shipped_spaces()
    for name, path in shipped_spaces().items():
        space = load_space(name, load_recipe(name, {}))
        assert space.keys
        assert yaml.safe_load(path.read_text())["folds"] == space.folds
