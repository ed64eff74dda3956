"""Selection: what is compared with what, by which rule, and that nothing is done twice."""

import csv
import dataclasses
import os
import re

import pytest
import torch

from timm_xformers.data.data import open_data
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.results_json import Record
from timm_xformers.studies.selecting import search as search_module
from timm_xformers.studies.selecting.folds import FoldResult, open_fold, open_folds
from timm_xformers.studies.selecting.ranking import (
    best_of,
    plot_selection,
    summarize,
    write_markdown,
)
from timm_xformers.studies.selecting.search import Search
from timm_xformers.studies.selecting.selection import select
from timm_xformers.studies.selecting.space import Space

GRID = Space(grid=[{"lr": [3e-3], "model_kwargs.depth": [1, 2]}], folds=2)


@pytest.fixture(autouse=True)
def _no_pictures(request):
    if not request.node.name.startswith("test_plot"):
        request.getfixturevalue("quick_pictures")


def fold_result(values, fold, top1=50.0, loss=1.0, params=10, state="complete"):
    return FoldResult(
        values=values,
        fold=fold,
        state=state,
        val_top1_percent=[top1],
        val_loss=[loss],
        epochs=1,
        val_images=10,
        train_images=20,
        params=params,
        seconds=1.0,
    )


@pytest.fixture
def pretend(monkeypatch):
    """Replace training by arithmetic; collects what was asked for."""
    asked = []

    def run_fold(recipe, values, folds, fold, go_on=None):
        asked.append((values["lr"], fold))
        return fold_result(values, fold, top1=90 - abs(values["lr"] - 0.01) * 100 + fold)

    monkeypatch.setattr(search_module, "run_fold", run_fold)
    return asked


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log_lines(search):
    return re.findall(r"(configuration \d+/\d+ fold \d+)/", search.log.read_text())


# Folds


def test_folds_share_out_the_training_images_by_class(tiny):
    folds = open_folds(tiny(), 3)
    train = folds.data.train
    assert len(train) == 1198
    held = torch.cat([val.rows for _, val in folds.splits])
    assert sorted(held.tolist()) == sorted(train.rows.tolist())
    for kept, val in folds.splits:
        assert not set(kept.rows.tolist()) & set(val.rows.tolist())
        assert len(kept) + len(val) == len(train)
        share = val.labels.bincount() / train.labels.bincount()
        assert (share - 1 / 3).abs().max() < 0.02


def test_folds_depend_on_the_data_alone(tiny):
    one = open_folds(tiny(), 3)
    other = open_folds(
        tiny(seed=5, epochs=9, val_fraction=0.3, model="vix_softmax"), 3, decoded=True
    )
    for (_, first), (_, second) in zip(one.splits, other.splits, strict=True):
        for place in range(0, len(first), 50):
            assert first.image(place).tobytes() == second.image(place).tobytes()
        assert first.labels.tolist() == second.labels.tolist()


def test_one_fold_is_what_training_holds_out(tiny):
    ((train, val),) = open_folds(tiny(val_fraction=0.2), 1).splits
    data = open_data(tiny(val_fraction=0.2))
    assert train.rows.tolist() == data.train.rows.tolist()
    assert val.rows.tolist() == data.val.rows.tolist()


def test_no_test_image_is_within_reach_of_a_fold(tiny):
    folds = open_folds(tiny(), 2)
    assert folds.data.test is not None
    session = open_fold(tiny(), {"lr": 0.1}, folds, 2)
    assert session.data.test is None
    assert (session.recipe.lr, session.recipe.seed) == (0.1, 1)


def test_a_class_with_too_few_images_is_named(tiny):
    with pytest.raises(UserError, match="training images, too few for folds=500"):
        open_folds(tiny(), 500)


# The rule


def ranked(*triples):
    """Best place among (top-1 of two folds, loss, params)."""
    configurations = [{"lr": float(place)} for place in range(len(triples))]
    results = [
        [fold_result(values, fold, top1[fold - 1], loss, params) for fold in (1, 2)]
        for values, (top1, loss, params) in zip(configurations, triples, strict=True)
    ]
    return best_of(summarize(configurations, results, 2)).number


def test_rule_mean_then_loss_then_parameters_then_order():
    assert ranked(((50, 60), 1.0, 5), ((40, 71), 2.0, 9)) == 2
    assert ranked(((50, 60), 1.0, 5), ((40, 70), 0.5, 9)) == 2
    assert ranked(((50, 60), 1.0, 5), ((40, 70), 1.0, 4)) == 2
    assert ranked(((50, 60), 1.0, 5), ((40, 70), 1.0, 5)) == 1


@pytest.mark.parametrize("state", ["diverged", "failed", "pruned"])
def test_only_complete_configurations_can_win(state):
    configurations = [{"lr": 1.0}, {"lr": 2.0}, {"lr": 3.0}]
    results = [
        [fold_result(configurations[0], fold, 50.0) for fold in (1, 2)],
        [
            fold_result(configurations[1], 1, 99.0),
            fold_result(configurations[1], 2, 99.0, state=state),
        ],
        [fold_result(configurations[2], 1, 98.0)],
    ]
    summaries = summarize(configurations, results, 2)
    assert best_of(summaries).number == 1
    assert best_of(summaries[1:]) is None


def test_mean_and_deviation(tmp_path):
    values = {"lr": 0.1}
    results = [fold_result(values, fold, top1) for fold, top1 in enumerate((50.0, 53.0, 56.0), 1)]
    (summary,) = summarize([values], [results], 3)
    assert (summary.top1_percent, summary.top1_deviation) == (53.0, 3.0)
    write_markdown(tmp_path / "s.md", Recipe(), [summary], summary, None)
    row = "| 1 | **lr 0.1 (best)** | 10 | 53.00 ± 3.00 | 1.0000 ± 0.0000 | 50.00 53.00 56.00 | 1 |"
    assert row in (tmp_path / "s.md").read_text().splitlines()


def test_plot_takes_many_configurations_and_one_fold(tmp_path):
    configurations = [{"lr": place / 10} for place in range(60)]
    results = [[fold_result(values, 1, values["lr"])] for values in configurations]
    summaries = summarize(configurations, results, 1)
    plot_selection(tmp_path / "s.png", Recipe(), summaries, best_of(summaries))
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


# The whole


def test_grid_leaves_tables_a_recipe_and_a_tested_model(tiny):
    search, best = select(tiny(output="chosen", seed=3), GRID)

    rows = rows_of(search.csv)
    assert len(rows) == 4
    assert [(row["configuration"], row["fold"]) for row in rows[:3]] == [
        ("1", "1"),
        ("1", "2"),
        ("2", "1"),
    ]
    assert {row["val_images"] for row in rows} == {"599"}
    means = {
        number: sum(float(r["val_top1_percent"]) for r in rows if r["configuration"] == number) / 2
        for number in "12"
    }
    assert str(best.number) == max(means, key=means.get)
    chosen = load_recipe(str(search.best), {})
    assert (chosen.lr, chosen.model_kwargs["depth"]) == tuple(best.values.values())
    assert (chosen.val_fraction, chosen.seed, chosen.epochs) == (0.0, 3, 2)
    record = Record.load(search.final / "results.json")
    assert record.recipe_hash == chosen.digest
    assert (record.val_images, record.test_images) == (None, 599)
    text = search.markdown.read_text()
    assert f"**{record.test_top1_percent:.2f} %** of 599 test images" in text
    assert search.plot.read_bytes().startswith(b"\x89PNG")

    # The same call again finds everything done.
    before = {path: path.stat().st_mtime_ns for path in search.final.rglob("*")}
    csv_before = search.csv.read_bytes()
    select(tiny(output="chosen", seed=3), GRID)
    assert log_lines(search) == [f"configuration {c}/2 fold {f}" for c in (1, 2) for f in (1, 2)]
    assert before == {path: path.stat().st_mtime_ns for path in search.final.rglob("*")}
    assert csv_before == search.csv.read_bytes()


def test_one_fold_equals_training_on_the_rest(tiny):
    from timm_xformers.training.train import train

    space = Space(grid=[{"lr": [2e-3]}], folds=1)
    search, best = select(tiny(output="chosen"), space, final=False)
    _, record = train(tiny(lr=2e-3, output="run"))
    history = rows_of(search.root.parent / "run" / "results.csv")
    assert best.fold_top1_percent == [float(history[-1]["val_top1_percent"])]
    assert best.fold_losses == [float(history[-1]["val_loss"])]
    assert record.test_images


def test_only_what_is_missing_is_done(tiny, pretend):
    space = Space(grid=[{"lr": [0.01, 0.02]}], folds=3)
    search, _ = select(tiny(output="chosen"), space, final=False)
    assert len(pretend) == 6
    before = search.csv.read_bytes()
    search.result_path({"lr": 0.02}, 2).unlink()
    select(tiny(output="chosen"), space, final=False)
    assert pretend[6:] == [(0.02, 2)]
    assert search.csv.read_bytes() == before


def test_loss_that_is_no_number_is_a_result(tiny):
    space = Space(grid=[{"lr": [1e-3, 1e30], "opt": ["adam"]}], folds=1)
    search, best = select(tiny(output="chosen"), space, final=False)
    assert best.values["lr"] == 1e-3
    assert [row["state"] for row in rows_of(search.csv)] == ["complete", "diverged"]
    assert "diverged in fold 1: The loss became" in search.markdown.read_text()


def test_nothing_complete_is_an_error(tiny):
    space = Space(grid=[{"lr": [1e30], "opt": ["adam"]}], folds=1)
    with pytest.raises(UserError, match=r"No configuration finished all folds.*The loss became"):
        select(tiny(output="chosen"), space)


def test_grid_is_built_before_anything_is_written(tiny, tmp_path):
    space = Space(grid=[{"model_kwargs.embed_dim": [32, 33]}], folds=2)
    with pytest.raises(UserError, match=r"Configuration 2 \(model_kwargs.embed_dim=33\)"):
        select(tiny(output="chosen"), space)
    space = Space(grid=[{"color_jitter": [0.0, 0.1]}], folds=2)
    with pytest.raises(UsageError, match="color_jitter works only from files"):
        select(tiny(output="chosen"), space)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_search_is_refused(tiny, pretend, tmp_path):
    space = Space(grid=[{"lr": [0.01, 0.02]}], folds=2)
    select(tiny(output="chosen"), space, final=False)
    for recipe, other in (
        (tiny(epochs=5), space),
        (tiny(seed=1), space),
        (tiny(), dataclasses.replace(space, folds=3)),
    ):
        with pytest.raises(UsageError, match="chosen holds another search"):
            select(dataclasses.replace(recipe, output="chosen"), other, final=False)
    # Where the data lies and how it is read is free.
    select(tiny(output="chosen", num_workers=0), space, final=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="mine is not empty"):
        select(tiny(output="mine"), space)


def test_damaged_result_is_named(tiny, pretend):
    space = Space(grid=[{"lr": [0.01]}], folds=2)
    search, _ = select(tiny(output="chosen"), space, final=False)
    path = search.result_path({"lr": 0.01}, 2)
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match=rf"{path.name} is damaged.*delete it"):
        select(tiny(output="chosen"), space, final=False)


def test_claims_exclude_each_other(tmp_path):
    search = Search(Recipe(), GRID, tmp_path)
    (tmp_path / "locks").mkdir()
    with search.claim("a") as first, search.claim("a") as second, search.claim("b") as third:
        assert (first, second, third) == (True, False, True)
    with search.claim("a") as again:
        assert again


def test_launchers_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="use --workers, and no launcher"):
        select(tiny(), GRID)


def test_result_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    fold_result({"lr": 1.0}, 1).save(path)
    assert FoldResult.load(path) == fold_result({"lr": 1.0}, 1)

    def fail(*_, **__):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        fold_result({"lr": 2.0}, 1).save(path)
    assert FoldResult.load(path).values == {"lr": 1.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]
