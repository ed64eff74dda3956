"""Images per second of our trainer and of timm's train.py, side by side.

Both sides are processes of their own with as many threads and workers, on the same image files, in
rounds whose order is shuffled. The figure is that of whole epochs without the first one, by each
side's own clock: from the request for the first batch to the end of the last update. train.py runs
with and without its prefetcher, and the faster of the two is what we are compared with.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import timm_xformers
from timm_xformers.data.data import open_data
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_csv import read_history
from timm_xformers.records.results_json import Record
from timm_xformers.records.run_folder import RunFolder
from tools.throughput_cases import (
    BATCH_SIZE,
    CASES,
    EPOCHS,
    our_settings,
    timm_settings,
)
from tools.throughput_report import (
    OURS,
    PEERS,
    Measurement,
    compare_case,
    markdown,
)

__all__ = ["Comparison", "Epoch", "timm_epochs"]

LINE = re.compile(
    r"Train: (?P<epoch>\d+) \[ *(?P<step>\d+)/(?P<steps>\d+) .*?"
    r"\([\d.]+s, +(?P<rate>[\d.]+)/s\).*Data: [\d.]+ \((?P<wait>[\d.]+)\)"
)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch by the clock of the side that trained it."""

    images: int
    seconds: float
    wait_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare.

    Attributes:
        train_py: timm's train.py, unmodified.
        data: Data set whose training images are used, by a name that recipes know.
        data_dir: Where it lies.
        output: Folder for ``throughput.md``, ``throughput.json`` and what the processes said.
        rounds: Measurements of every side.
        cases: Names of cases.
        steps: Batches of an epoch; None: as many as the case names.
        threads: Of either side.
        workers: Decoding processes of either side.
        seed: Of the runs and of their order.
    """

    train_py: Path
    data: str
    data_dir: Path | None
    output: Path
    rounds: int
    cases: Sequence[str]
    steps: int | None
    threads: int
    workers: int
    seed: int

    def run(self) -> Path:
        """Measure, and write what is known after every round.

        Returns:
            The Markdown file.

        Raises:
            UserError: A side failed; what it said is in the output folder.
        """
        if not self.train_py.is_file():
            raise UsageError(
                f"--train-py {self.train_py} does not exist; take train.py from timm's repository, "
                "at the tag of the installed timm."
            )
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise UsageError(f"{self.output} is not empty; choose another --output.")
        (self.output / "logs").mkdir(parents=True)
        order = random.Random(self.seed)
        found: list[Measurement] = []
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            # Beside a clone's train.py lies a timm of its own, which Python would import first.
            script = shutil.copyfile(self.train_py, work / "train.py")
            for number in range(1, self.rounds + 1):
                # The sides of a case follow each other, so that a round's ratio has one machine.
                for case in order.sample(list(self.cases), len(self.cases)):
                    images = self._images(work, case)
                    for side in order.sample([OURS, *PEERS], 1 + len(PEERS)):
                        found.append(self._measure(case, number, side, images, script))
                        print(_line(found[-1]), file=sys.stderr, flush=True)
                    self._write(found, Record.load(RunFolder(work / "ours").record))
        return self.output / "throughput.md"

    def _steps(self, case: str) -> int:
        return self.steps or CASES[case].steps

    def _images(self, work: Path, case: str) -> Path:
        """A folder with as many images as the case has in an epoch."""
        count = self._steps(case) * BATCH_SIZE
        root = work / f"images-{count}"
        if root.exists():
            return root
        recipe = Recipe(
            data=self.data,
            data_dir=None if self.data_dir is None else str(self.data_dir),
            val_fraction=0.0,
            in_chans=3,
            limit=count,
        )
        split = open_data(recipe, used=()).train
        if len(split) < count:
            raise UserError(
                f"{self.data} has {len(split)} training images, and {self._steps(case)} steps of "
                f"{BATCH_SIZE} need {count}; use fewer --steps or more data."
            )
        for position, label in enumerate(split.labels.tolist()):
            path = root / "train" / f"{label:04d}" / f"{position}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            split.image(position).save(path)
        return root

    def _measure(
        self, case: str, number: int, side: str, images: Path, script: Path
    ) -> Measurement:
        work = script.parent
        output = work / ("ours" if side == OURS else "theirs")
        shutil.rmtree(output, ignore_errors=True)
        shared: dict[str, Any] = {"workers": self.workers, "seed": self.seed}
        config = work / "config.yaml"
        if side == OURS:
            settings = our_settings(CASES[case], images, output, **shared)
            command = ["-m", "timm_xformers", "train", "--recipe", str(config)]
        else:
            shared["prefetcher"] = side == PEERS[0]
            settings = timm_settings(CASES[case], images, output, **shared)
            command = [str(script), "--config", str(config)]
        config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        log = self.output / "logs" / f"{case}-{number}-{side.replace(' --', '-')}.txt"
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                [sys.executable, *command],
                cwd=work,
                env=_environ(self.threads),
                stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode
        seconds = time.perf_counter() - start
        text = log.read_text(encoding="utf-8", errors="replace")
        if code:
            last = (text.strip() or "nothing").splitlines()[-1]
            raise UserError(f"{side} ended with code {code} in case {case}: {last} (all in {log}).")
        epochs = _our_epochs(output) if side == OURS else timm_epochs(text)
        if len(epochs) != EPOCHS:
            raise UserError(
                f"{side} reported {len(epochs)} whole epochs of {EPOCHS} in {log}; use a train.py "
                "of the installed timm's version."
            )
        measured = epochs[1:]
        duration = sum(epoch.seconds for epoch in measured)
        return Measurement(
            case=case,
            round=number,
            side=side,
            images_per_s=round(sum(epoch.images for epoch in measured) / duration, 1),
            data_wait_percent=round(100 * sum(e.wait_seconds for e in measured) / duration, 1),
            process_seconds=round(seconds, 2),
            load_before=load,
        )

    def _write(self, found: list[Measurement], record: Record) -> None:
        done = {entry.case for entry in found}
        result = {
            "created": record.created,
            "commit": record.commit,
            "versions": record.versions,
            "hardware": record.hardware,  # as our own process saw it, threads included
            "train_py_sha256": hashlib.sha256(self.train_py.read_bytes()).hexdigest(),
            "data": self.data,
            "batch_size": BATCH_SIZE,
            "workers": self.workers,
            "seed": self.seed,
            "rounds": self.rounds,
            "cases": {
                name: {
                    **dataclasses.asdict(CASES[name]),
                    "steps": self._steps(name),
                    **compare_case([entry for entry in found if entry.case == name]),
                }
                for name in self.cases
                if name in done
            },
            "measurements": [dataclasses.asdict(entry) for entry in found],
        }
        write_text(self.output / "throughput.json", json.dumps(result, indent=2) + "\n")
        write_text(self.output / "throughput.md", markdown(result))


def timm_epochs(text: str) -> list[Epoch]:
    """The whole epochs that train.py logged; an epoch without its last line is left out.

    Args:
        text: What it said. The averages of a line are over all batches of the epoch so far, and
            the rate in it has more digits than the time.
    """
    epochs = []
    for found in LINE.finditer(text):
        steps = int(found["steps"])
        if int(found["step"]) + 1 == steps:
            images = steps * BATCH_SIZE
            epochs.append(
                Epoch(images, images / float(found["rate"]), steps * float(found["wait"]))
            )
    return epochs


def _our_epochs(output: Path) -> list[Epoch]:
    rows = read_history(RunFolder(output).history)
    return [Epoch(row.train_images, row.train_seconds, row.wait_seconds) for row in rows]


def _environ(threads: int) -> dict[str, str]:
    root = str(Path(timm_xformers.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # train.py is told to stay on the CPU by its configuration, and we by these.
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }


def _line(entry: Measurement) -> str:
    return (
        f"round {entry.round}  {entry.case}  {entry.side}: {entry.images_per_s:.0f} images/s, "
        f"{entry.data_wait_percent:.0f} % waiting for data, {entry.process_seconds:.0f} s in all"
    )
