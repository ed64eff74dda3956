"""Optuna's trials: as many as asked for, none lost, the same whether or not interrupted."""

import pytest

from timm_xformers.errors import UserError
from timm_xformers.studies.selecting import search as search_module
from timm_xformers.studies.selecting.folds import FoldResult, open_folds
from timm_xformers.studies.selecting.ranking import best_of
from timm_xformers.studies.selecting.search import Search
from timm_xformers.studies.selecting.selection import _summaries, select
from timm_xformers.studies.selecting.space import Space
from timm_xformers.studies.selecting.trials import _open_study, work_on_trials

optuna = pytest.importorskip("optuna", reason="the search extra is not installed")

DRAWN = Space(
    search={
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "batch_size": {"low": 16, "high": 64, "step": 16, "log": False},
        "opt": {"choices": ["adam", "adamw"]},
    },
    folds=2,
    trials=12,  # ten are drawn at random before the sampler learns
    pruner="none",
)
COARSE = Space(search={"opt": {"choices": ["adam", "adamw"]}}, folds=2, trials=6, pruner="none")


class Killed(BaseException):
    """What a test raises where a process would die."""


class Arithmetic:
    """In place of training: an accuracy that follows from the values, epoch by epoch."""

    def __init__(self):
        self.done = []
        self.die_at = set()

    def __call__(self, recipe, values, folds, fold, go_on=None):
        if len(self.done) in self.die_at:
            self.die_at.remove(len(self.done))
            raise Killed
        final = 90 - 100 * abs(values.get("lr", 0.01) - 0.01) - (values["opt"] == "adam") * 5 + fold
        curve = [final - 10 * left for left in range(recipe.epochs - 1, -1, -1)]
        state, seen = "complete", []
        for epoch, top1 in enumerate(curve, start=1):
            seen.append(top1)
            if go_on is not None and not go_on(epoch, top1) and epoch < recipe.epochs:
                state = "pruned"
                break
        self.done.append((tuple(values.values()), fold, state))
        return FoldResult(
            values=values,
            fold=fold,
            state=state,
            val_top1_percent=seen,
            val_loss=[1.0] * len(seen),
            epochs=len(seen),
            val_images=10,
            train_images=20,
            params=1,
            seconds=0.0,
        )


@pytest.fixture
def pretend(monkeypatch):
    stand_in = Arithmetic()
    monkeypatch.setattr(search_module, "run_fold", stand_in)
    return stand_in


@pytest.fixture
def start(tiny, tmp_path):
    """Open a search in a folder, as `select` does it."""

    def start(name, space, **values):
        search = Search(tiny(**values), space, tmp_path / name)
        folds = open_folds(search.recipe, space.folds)
        search.create(folds, lambda: None)
        return search, folds

    return start


def trials_of(search):
    return [(t.number, t.params, t.state.name, t.values) for t in _open_study(search)[0].trials]


def test_interrupted_search_makes_the_trials_of_an_undisturbed_one(start, pretend):
    search, folds = start("undisturbed", DRAWN)
    work_on_trials(search, folds)
    undisturbed = list(pretend.done)
    assert len(undisturbed) == 24
    assert {state for _, _, state, _ in trials_of(search)} == {"COMPLETE"}

    other, folds = start("killed", DRAWN)
    pretend.done.clear()
    pretend.die_at = {1, 21}
    for _ in range(2):
        with pytest.raises(Killed):
            work_on_trials(other, folds)
    work_on_trials(other, folds)

    assert pretend.done == undisturbed
    assert trials_of(other) == trials_of(search)
    assert best_of(_summaries(other)) == best_of(_summaries(search))


def test_death_between_storing_and_starting_a_trial(start, pretend, monkeypatch):
    from timm_xformers.studies.selecting import trials

    def die(*_):
        raise Killed

    search, folds = start("undisturbed", COARSE)
    work_on_trials(search, folds)
    other, folds = start("killed", COARSE)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "_run_trial", die)
        with pytest.raises(Killed):
            work_on_trials(other, folds)
    assert [state for _, _, state, _ in trials_of(other)] == ["RUNNING"]
    work_on_trials(other, folds)
    assert trials_of(other) == trials_of(search)


def test_a_trial_in_other_hands_is_left_alone(start, pretend, monkeypatch):
    search, folds = start("shared", COARSE)
    waits = []

    def wait(seconds):
        waits.append(trials_of(search)[0][2])
        held.__exit__(None, None, None)

    from timm_xformers.studies.selecting import trials

    trials._add_trial(_open_study(search)[0], search)
    held = search.claim("trial-0")
    assert held.__enter__()
    monkeypatch.setattr(trials.time, "sleep", wait)
    work_on_trials(search, folds)
    assert waits == ["RUNNING"]  # all others were done by then
    assert [state for _, _, state, _ in trials_of(search)] == ["COMPLETE"] * 6


def test_configurations_drawn_again_are_not_trained_again(start, pretend):
    search, folds = start("coarse", COARSE)
    work_on_trials(search, folds)
    assert len(pretend.done) == 4  # two configurations, two folds
    assert len(trials_of(search)) == 6
    assert [summary.number for summary in _summaries(search)] == [1, 2]


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruned_configurations_cannot_win(start, pretend, pruner):
    import dataclasses

    search, folds = start("pruned", dataclasses.replace(DRAWN, pruner=pruner), epochs=4)
    work_on_trials(search, folds)
    states = [state for _, _, state, _ in trials_of(search)]
    assert {"COMPLETE", "PRUNED"} == set(states)
    summaries = _summaries(search)
    best = best_of(summaries)
    assert best.complete
    assert best.top1_percent == max(s.top1_percent for s in summaries if s.complete)
    assert [s.complete for s in summaries] == [state == "COMPLETE" for state in states]


def test_search_trains_and_combinations_that_do_not_fit_fail_alone(tiny):
    space = Space(
        search={"model_kwargs.embed_dim": {"choices": [16, 32, 33]}},
        folds=2,
        trials=4,
        pruner="median",
    )
    search, best = select(tiny(output="chosen", seed=1), space, final=False)
    assert best.values["model_kwargs.embed_dim"] in (16, 32)
    states = {t[1]["model_kwargs.embed_dim"]: t[2] for t in trials_of(search)}
    assert states.pop(33) == "FAIL"
    assert set(states.values()) == {"COMPLETE"}
    assert "failed in fold 1: Cannot build vit_tiny_patch16_224" in search.markdown.read_text()


def test_damaged_study_is_named(start):
    search, folds = start("damaged", COARSE)
    search.database.write_bytes(b"SQLite format 3\0" + b"x" * 2000)
    with pytest.raises(UserError, match=r"Cannot open .*study\.db"):
        work_on_trials(search, folds)
