"""Optuna's share of a selection: which configuration is tried next, and which one stops early.

A study keeps a trial whose process was killed as running for ever. Here each running trial is
claimed by a lock, so one that nobody claims is known at once, and it is taken over, not failed: its
configuration is stored with it, its finished folds are files.

What trial n tries follows from the seed, n, and the trials before it that have ended. So one worker
makes the same trials however often it is interrupted; several workers see each other's trials in an
order that chance decides.
"""

import contextlib
import statistics
import time
import warnings
from typing import Any

from timm_xformers.data.sampling import derive_seed
from timm_xformers.errors import UserError
from timm_xformers.studies.selecting.folds import Folds
from timm_xformers.studies.selecting.search import Search
from timm_xformers.studies.shared_folder import POLL_SECONDS

__all__ = ["tried", "work_on_trials"]

STUDY = "selection"


def tried(search: Search) -> list[dict[str, Any]]:
    """Configurations in the order of their first trial."""
    found: list[dict[str, Any]] = []
    for trial in _open_study(search)[0].get_trials(deepcopy=False):
        values = _values(search, trial.params)
        if values not in found:
            found.append(values)
    return found


def work_on_trials(search: Search, folds: Folds) -> None:
    """Try configurations until there are as many as wanted and all have ended.

    Raises:
        UserError: The images cannot be read.
    """
    study, storage = _open_study(search)
    while True:
        found = _run_one(study, storage, search, folds)
        if found is None:
            return
        if not found:
            time.sleep(POLL_SECONDS)


def _run_one(study: Any, storage: Any, search: Search, folds: Folds) -> bool | None:
    """Run an abandoned trial or a new one.

    Returns:
        True if there was one; False if all that is left is in the hands of others; None if nothing
        is left.
    """
    with contextlib.ExitStack() as held:
        # Creating a trial and claiming it is one step to the others.
        with search.claim("trials", wait=True):
            trials = study.get_trials(deepcopy=False)
            left = [trial.number for trial in trials if not trial.state.is_finished()]
            if len(trials) < search.space.trials:
                left.append(len(trials))
            mine = (n for n in left if held.enter_context(search.claim(f"trial-{n}")))
            number = next(mine, None)
            if number == len(trials):
                _add_trial(study, search)
        if number is None:
            return False if left else None
        # Whoever held it may have finished it since the list was read.
        if not study.get_trials(deepcopy=False)[number].state.is_finished():
            _run_trial(study, storage, search, folds, number)
        return True


def _add_trial(study: Any, search: Search) -> None:
    """Store the next trial with its configuration, in one step.

    The sampler looks at a copy in memory and is seeded for this trial alone: what it draws does not
    depend on what this process drew before.
    """
    import optuna

    trials = study.get_trials(deepcopy=False)
    seed = derive_seed(search.recipe.seed, "trial", len(trials)) % 2**32
    copy = optuna.create_study(
        study_name=STUDY,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=_pruner(search),
    )
    copy.add_trials(trials)
    drawn = copy.ask(_distributions(search))
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=drawn.params,
            distributions=drawn.distributions,
        )
    )


def _run_trial(study: Any, storage: Any, search: Search, folds: Folds, number: int) -> None:
    import optuna

    study_id = storage.get_study_id_from_name(STUDY)
    trial = optuna.trial.Trial(
        study, storage.get_trial_id_from_study_id_trial_number(study_id, number)
    )
    values = _values(search, trial.params)
    # By whoever had it before; a second report would be refused.
    reported = set(study.get_trials(deepcopy=False)[number].intermediate_values)
    name = f"trial {number + 1}"
    prunes = search.space.pruner != "none"
    top1: list[float] = []
    for fold in range(1, search.space.folds + 1):

        def go_on(epoch: int, top1_percent: float, fold: int = fold) -> bool:
            step = (fold - 1) * search.recipe.epochs + epoch
            if step not in reported:
                trial.report(top1_percent, step)
            return not trial.should_prune()

        # Another trial may have drawn the same configuration: its results are ours.
        with search.claim(search.result_path(values, fold).stem, wait=True):
            result = search.result(values, fold)
            if result is None:
                result = search.run(name, values, folds, fold, go_on if prunes else None)
            elif prunes:
                for epoch, top1_percent in enumerate(result.val_top1_percent, start=1):
                    go_on(epoch, top1_percent)
        if result.state != "complete":
            states = optuna.trial.TrialState
            study.tell(number, state=states.PRUNED if result.state == "pruned" else states.FAIL)
            return
        top1.append(result.val_top1_percent[-1])
    study.tell(number, statistics.fmean(top1))


def _open_study(search: Search) -> tuple[Any, Any]:
    """The study, and the storage that it is kept in."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{search.database}",
            engine_kwargs={"connect_args": {"timeout": 60}},  # seconds that writers wait in line
        )
        study = optuna.create_study(
            study_name=STUDY,
            storage=storage,
            direction="maximize",
            pruner=_pruner(search),
            load_if_exists=True,
        )
        return study, storage
    except Exception as error:
        # Whatever a damaged file makes sqlite, alembic or Optuna raise, the cause is the same.
        raise UserError(
            f"Cannot open {search.database}: {' '.join(str(error).split())[:200]}; delete it: the "
            "finished folds are kept beside it."
        ) from error


def _pruner(search: Search) -> Any:
    import optuna

    if search.space.pruner == "median":
        return optuna.pruners.MedianPruner()
    if search.space.pruner == "hyperband":
        most = search.space.folds * search.recipe.epochs
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=most)
    return optuna.pruners.NopPruner()


def _distributions(search: Search) -> dict[str, Any]:
    from optuna import distributions

    found: dict[str, Any] = {}
    for key, entry in search.space.search.items():
        if "choices" in entry:
            found[key] = distributions.CategoricalDistribution(entry["choices"])
            continue
        whole = isinstance(entry["low"], int)
        kind: Any = distributions.IntDistribution if whole else distributions.FloatDistribution
        with warnings.catch_warnings():
            # A range that its step does not divide is cut, with a warning; so be it.
            warnings.simplefilter("ignore")
            options = {"step": entry["step"]} if "step" in entry else {}
            found[key] = kind(entry["low"], entry["high"], log=entry["log"], **options)
    return found


def _values(search: Search, params: dict[str, Any]) -> dict[str, Any]:
    """A trial's parameters in the order of the space."""
    return {key: params[key] for key in search.space.search}
