"""The folder of a study. What is finished is known by ``records/`` alone.

``records/`` holds the small files of finished runs and is what to commit; ``runs/`` the run
folders, which may be deleted when their record is there; ``locks/`` who is at work.
"""

import shutil
from pathlib import Path

from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import creating, write_file
from timm_xformers.recipe import load_recipe
from timm_xformers.records.find_runs import Run, find_runs
from timm_xformers.records.run_folder import RunFolder
from timm_xformers.studies.running.definition import PlannedRun, Study
from timm_xformers.studies.shared_folder import SharedFolder

__all__ = ["StudyFolder"]


class StudyFolder(SharedFolder):
    """Paths of a study, and what is finished in it.

    Attributes:
        root: The folder.
        records: Record and epochs of every finished run.
        runs: Run folders, and beside each what its process said.
        plan: What the arms were measured to take.
        costs: What `costs` measured.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records = root / "records"
        self.runs = root / "runs"
        self.plan = root / "plan.json"
        self.costs = root / "costs.json"

    def create(self) -> None:
        """Make the folders that are missing.

        Raises:
            UserError: One cannot be made.
        """
        with creating("folder"):
            for name in ("records", "runs", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)

    def run(self, run: PlannedRun) -> RunFolder:
        """Where a run is trained."""
        return RunFolder(self.runs / run.name)

    def record(self, run: PlannedRun) -> RunFolder:
        """Where its record is kept."""
        return RunFolder(self.records / run.name)

    def said(self, name: str) -> Path:
        """What the process of a run said."""
        return self.runs / f"{name}.out"

    def keep(self, run: PlannedRun) -> bool:
        """Put the record of a finished run with the others; whether there is one."""
        source, target = self.run(run), self.record(run)
        if not target.record.is_file() and source.record.is_file():
            target.root.mkdir(exist_ok=True)
            # The record comes last: it says that all is there.
            for old, new in ((source.history, target.history), (source.record, target.record)):
                with write_file(new) as fresh:
                    shutil.copyfile(old, fresh)
        return target.record.is_file()

    def finished(self, study: Study) -> tuple[dict[tuple[str, int], Run], list[str]]:
        """Records of the study's runs by `PlannedRun.key`, and what else lies there and why.

        Raises:
            UserError: A run has two records, its name belongs to another one, or the records come
                from different data.
        """
        wanted = {run.key: run for run in study.runs}
        found: dict[tuple[str, int], Run] = {}
        others = []
        runs, skipped = find_runs([self.records]) if self.records.is_dir() else ([], [])
        for run in runs:
            key = (str(run.record.recipe_hash), -1 if run.record.seed is None else run.record.seed)
            if key in found:
                raise UserError(
                    f"{found[key].source} and {run.source} are two records of "
                    f"{wanted[key].name}; remove one of them."
                )
            if key in wanted:
                found[key] = run
            else:
                others.append(
                    f"{run.source} is no run of {study.source} (recipe {key[0]}, seed {key[1]})"
                )
        others += [
            f"{entry.source} {entry.reason}"
            for entry in skipped
            if Path(entry.source) != self.records
        ]
        self._refuse_others_names(study, found)
        for data in study.data:
            digests = {run.record.data_digest for run in found.values() if run.record.data == data}
            if len(digests) > 1:
                raise UserError(
                    f"The records in {self.records} come from different images or labels of "
                    f"{data} (data_digest {', '.join(map(str, digests))}); keep those of one."
                )
        return found, others

    def _refuse_others_names(self, study: Study, found: dict[tuple[str, int], Run]) -> None:
        for run in study.runs:
            taken = self.record(run).record
            if taken.is_file() and run.key not in found:
                raise UsageError(
                    f"{taken} is not the record of {run.name} as {study.source} describes it "
                    f"(recipe {run.key[0]}); restore the file, or choose another --output."
                )
            begun = self.run(run).recipe
            if begun.is_file() and load_recipe(str(begun), {}).digest != run.key[0]:
                raise UsageError(
                    f"{begun.parent} was begun with another recipe than {study.source} has now; "
                    "restore the file, remove the folder, or choose another --output."
                )
