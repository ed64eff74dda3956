"""Studies: what a file may say, what counts as finished, and every figure against its record."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from timm_xformers.cli import main
from timm_xformers.errors import UsageError, UserError
from timm_xformers.planning.catalog import build_empty
from timm_xformers.records.find_runs import Run
from timm_xformers.records.results_csv import EpochRow, write_history
from timm_xformers.records.results_json import Record, wilson_interval
from timm_xformers.studies.comparing import report_plots
from timm_xformers.studies.comparing.groups import Group, difference
from timm_xformers.studies.running import costs as costs_module
from timm_xformers.studies.running import matrix
from timm_xformers.studies.running import plan as plan_module
from timm_xformers.studies.running.definition import load_study
from timm_xformers.studies.running.folder import StudyFolder
from timm_xformers.studies.running.plan import plan_key, read_plan
from timm_xformers.training.signals import Stopped
from timm_xformers.training.stages import read_stages

ROOT = Path(__file__).resolve().parents[2]
FILE = """
title: Two ways
question: Which?
recipe: {epochs: 2, trackers: [], model_kwargs: {patch_size: 2, depth: 1}}
data: digits
seeds: [0, 1, 2]
baseline: exact
arms:
  - {name: exact, model: vix_softmax}
  - {name: sketch, model: vix_softmax, model_kwargs: {attn_layer: linformer_k64}}
"""
TOP1 = {"exact": [95.0, 96.0, 94.5], "sketch": [93.0, 95.5, 93.0]}


def record_of(run, top1=95.0, **values):
    right = round(top1 * 599 / 100)
    ends = [round(100 * end, 2) for end in wilson_interval(right, 599)]
    return Record(
        **{
            "kind": "train",
            "model": run.recipe.model,
            "model_kwargs": run.recipe.model_kwargs,
            "params": 1000 if run.arm == "exact" else 2000,
            "data": run.data,
            "img_size": 8,
            "in_chans": 1,
            "num_classes": 10,
            "val_images": 120,
            "val_top1_percent": 90.0,
            "val_top1_interval_percent": [84.0, 94.0],
            "test_images": 599,
            "test_top1_percent": top1,
            "test_top1_interval_percent": ends,
            "data_digest": "d",
            "epochs": 2,
            "recipe_hash": run.recipe.digest,
            "seed": run.seed,
            "batch_size": 64,
            "num_processes": 1,
            "mixed_precision": "no",
            "cpu_seconds": 10.0 + run.seed,
            "seconds": 30.0,
            "images_per_s": 100.0,
            "commit": "0123456789",
            "versions": {"torch": "2.15.0"},
            "hardware": {"cpu": "one", "threads": 1},
            "created": "2026-01-01",
        }
        | values
    )


def write_record(folder, run, **values):
    target = folder.record(run)
    target.root.mkdir(parents=True)
    rows = [EpochRow(n, 1e-3, 1.0, 80.0, 0.5, 80.0 + n, 99.0, 5.0, 500, 0.1, 4.0) for n in (1, 2)]
    write_history(target.history, rows)
    record_of(run, **values).save(target.record)


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.yaml").write_text(FILE)
    return load_study(Path("study.yaml"))


@pytest.fixture
def complete(study):
    """All records of the study, in folder ``out``."""
    folder = StudyFolder(Path("out"))
    for run in study.runs:
        write_record(folder, run, top1=TOP1[run.arm][run.seed])
    return folder


# The file


def test_runs_are_the_seeds_of_all_arms_in_turn(study):
    assert [run.name for run in study.runs][:3] == ["exact-s0", "sketch-s0", "exact-s1"]
    sketch = study.runs[1].recipe
    assert sketch.model_kwargs == {"patch_size": 2, "depth": 1, "attn_layer": "linformer_k64"}
    assert (sketch.seed, sketch.data, sketch.epochs, sketch.output) == (0, "digits", 2, None)
    # A seed does not change what a record is bound to, and everything else does.
    assert len({run.recipe.digest for run in study.runs}) == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title: Two ways", "titel: x", r"'titel', which a study does not know \(nearest: title"),
        ("title: Two ways", "title: [1]", "title is no text"),
        ("baseline: exact", "", "lacks baseline"),
        ("baseline: exact", "baseline: exac", r"'exac' is none of the arms \(nearest: exact"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", r"seeds=\[0, 0\] does not fit"),
        ("seeds: [0, 1, 2]", "seeds: 3", "seeds=3 does not fit"),
        ("seeds: [0, 1, 2]", "seeds: [0, -1]", "seed=-1 is out of range"),
        ("data: digits", "data: []", r"data=\[\] does not fit"),
        ("epochs: 2", "epochs: -1", "epochs=-1 is out of range"),
        ("epochs: 2", "epochs: 0", "sets epochs=0, and a study trains"),
        ("epochs: 2", "epocs: 2", "no setting 'epocs'"),
        ("epochs: 2", "seed: 2", "the recipe sets seed"),
        ("epochs: 2", "model: vix_fnet", "the recipe sets model"),
        (
            "epochs: 2",
            "img_size: 9, stages: [{epoch: 1, img_size: 8}]",
            "sets img_size=9, and its stages train at 8 pixels",
        ),
        ("epochs: 2", "base: digit", r"No recipe 'digit'.*nearest: digits"),
        ("  - {name: exact, model: vix_softmax}", "  - {name: exact}", "arm 1 names no model"),
        ("name: sketch,", "name: exact,", "two arms are called exact"),
        ("name: sketch,", "name: a/b,", "arm 2 is called 'a/b'"),
        ("name: sketch,", "lr: 1e-3,", "arm 2 has 'lr'; arms differ in model and model_kwargs"),
        (", model_kwargs: {attn_layer: linformer_k64}", "", "exact and sketch are the same"),
        ("model_kwargs: {attn_layer: linformer_k64}", "model_kwargs: [1]", "is no mapping"),
        ("attn_layer: linformer_k64", "img_size: 8", "model_kwargs may not hold img_size"),
        ("name: sketch,", "name: sketch, seeds: [],", r"seeds of sketch=\[\] does not fit"),
        ("name: sketch,", "name: sketch, published: 55,", "published=55 of sketch does not fit"),
        (
            "name: sketch,",
            "name: sketch, published: {percent: 155, what: x},",
            "published=.* of sketch does not fit",
        ),
        ("title: Two ways", "base: no.yaml", "base='no.yaml' is no file"),
        ("title: Two ways", "base: s.yaml", "its base s.yaml has a base of its own"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, old, new, words, capsys):
    assert old in FILE
    (tmp_path / "s.yaml").write_text(FILE.replace(old, new))
    assert main(["study", "s.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(words, said)


def test_several_data_sets_are_told_apart_and_need_their_folders(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(FILE.replace("data: digits", "data: [digits, mnist]"))
    names = [run.name for run in load_study(Path("s.yaml")).runs]
    assert names[:4] == ["exact-digits-s0", "sketch-digits-s0", "exact-mnist-s0", "sketch-mnist-s0"]
    assert main(["study", "s.yaml", "--data-dir", "x"]) == 2
    assert "write NAME=FOLDER, with one of digits, mnist" in capsys.readouterr().err


def test_arms_may_have_seeds_of_their_own(tmp_path):
    text = FILE.replace("seeds: [0, 1, 2]", "seeds: [1]")
    (tmp_path / "s.yaml").write_text(text.replace("name: sketch,", "name: sketch, seeds: [0, 1],"))
    study = load_study(Path("s.yaml"))
    assert [run.name for run in study.runs] == ["exact-s1", "sketch-s1", "sketch-s0"]
    assert [run.name for run in plan_module._one_seed(study)] == ["exact-s1", "sketch-s1"]


def test_a_study_over_another_changes_what_it_names(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "s.yaml").write_text("base: ../s.yaml\nrecipe: {epochs: 4}\n")
    (tmp_path / "s.yaml").write_text(FILE)
    here, there = load_study(Path("s.yaml")), load_study(Path("below/s.yaml"))
    assert there.recipe == dataclasses.replace(here.recipe, epochs=4)
    assert (there.arms, there.seeds, there.title) == (here.arms, here.seeds, here.title)
    assert {run.key for run in here.runs}.isdisjoint(run.key for run in there.runs)


COMMITTED = sorted(path.parent for path in (ROOT / "results").rglob("study.yaml"))
# What a study at another budget may change: how long is trained, and what follows from that.
BUDGET = {"epochs", "limit", "max_steps", "max_seconds", "stages", "warmup_epochs"}


def label(folder):
    return "_".join(folder.relative_to(ROOT / "results").parts)


@pytest.mark.parametrize("folder", COMMITTED, ids=label)
def test_committed_studies_can_be_read(folder):
    study = load_study(folder / "study.yaml")
    assert study.runs
    assert study.question
    assert study.protocol or label(folder) == "digits_study"


@pytest.mark.parametrize("folder", COMMITTED, ids=label)
def test_every_arm_of_a_committed_study_can_be_built_at_every_size(folder):
    """And leaves out tokens only if it can."""
    study = load_study(folder / "study.yaml")
    for arm in study.arms:
        for stage in read_stages(study.recipe, study.recipe.img_size):
            kwargs = study.recipe.model_kwargs | arm.model_kwargs
            if stage.patch_drop_rate:
                kwargs |= {"patch_drop_rate": stage.patch_drop_rate}
            assert build_empty(arm.model, stage.img_size or 32, **kwargs)


@pytest.mark.parametrize(
    "folder", [f for f in COMMITTED if f.name not in ("gpu", "digits_study")], ids=label
)
def test_the_form_for_a_gpu_differs_in_budget_alone(folder):
    here, there = (load_study(path / "study.yaml") for path in (folder, folder / "gpu"))
    own, other = (dataclasses.asdict(study.recipe) for study in (here, there))
    assert {name for name in own if own[name] != other[name]} <= BUDGET
    assert own != other
    words = {"source", "title", "protocol", "recipe", "runs"}
    for field in dataclasses.fields(here):
        if field.name not in words:
            assert getattr(here, field.name) == getattr(there, field.name), field.name


def test_study_1_is_the_one_that_was_frozen():
    study = load_study(ROOT / "results" / "study1" / "study.yaml")
    assert study.runs[0].key == ("a1ac7808c3c50d63", 0)
    assert len(study.runs) == 45


# What is finished


def test_records_alone_tell_what_is_finished(study, complete, tmp_path):
    found, others = complete.finished(study)
    assert set(found) == {run.key for run in study.runs}
    assert others == []
    # Wherever they lie, and under whatever name.
    lines = [json.dumps(dataclasses.asdict(run.record)) for run in found.values()]
    other = StudyFolder(tmp_path / "elsewhere")
    other.records.mkdir(parents=True)
    (other.records / "all.jsonl").write_text("\n".join(lines))
    assert set(other.finished(study)[0]) == set(found)


def test_records_of_others_are_left_out_with_the_reason(study, complete):
    run = study.runs[0]
    write_record(complete, dataclasses.replace(run, name="other"), recipe_hash="abc")
    _, others = complete.finished(study)
    assert others == ["out/records/other is no run of study.yaml (recipe abc, seed 0)"]


def test_records_that_do_not_fit_are_refused(study, complete):
    run = study.runs[0]
    write_record(complete, dataclasses.replace(run, name="again"), created="later")
    with pytest.raises(UserError, match="two records of exact-s0"):
        complete.finished(study)
    record_of(run, data_digest="e", seed=7).save(complete.records / "again" / "results.json")
    assert len(complete.finished(study)[0]) == 6
    record_of(run, data_digest="e").save(complete.records / "exact-s0" / "results.json")
    with pytest.raises(UserError, match="different images or labels of digits"):
        complete.finished(study)
    record_of(run, recipe_hash="abc").save(complete.records / "exact-s0" / "results.json")
    with pytest.raises(UsageError, match=r"not the record of exact-s0 as study\.yaml describes"):
        complete.finished(study)


def test_run_folder_of_another_recipe_is_refused(study):
    folder = StudyFolder(Path("out"))
    begun = folder.run(study.runs[0])
    begun.root.mkdir(parents=True)
    dataclasses.replace(study.runs[0].recipe, lr=0.5).save(begun.recipe)
    with pytest.raises(UsageError, match="was begun with another recipe"):
        folder.finished(study)


# The work


class Process:
    """Ends at once."""

    def __init__(self, code):
        self.exitcode = code
        self.sentinel, writing = os.pipe()
        os.close(writing)

    def is_alive(self):
        return False

    def terminate(self):
        pass

    kill = join = terminate


@pytest.fixture
def pretend(monkeypatch):
    """Training becomes a record; collects the runs, and fails those in ``failing``."""
    asked, failing = [], {}

    def start(said, threads, work, *args):
        said.touch()
        if work is matrix.measure_plan:
            study, root, _, threads = args
            plan = {plan_key(r, threads): {"params": 1, "cpu_seconds": 36.0} for r in study.runs}
            StudyFolder(root).plan.write_text(json.dumps(plan))
            return Process(0)
        run, root = args
        asked.append(run.name)
        if run.name in failing:
            said.write_text(f"before\nerror: {failing[run.name]}\n")
            return Process(1)
        folder = StudyFolder(root).run(run)
        folder.root.mkdir(exist_ok=True)
        write_history(folder.history, [])
        record_of(run).save(folder.record)
        return Process(0)

    monkeypatch.setattr(matrix, "_start", start)
    return asked, failing


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_every_run_is_trained_once_and_its_record_kept(study, pretend, workers, capsys):
    asked, _ = pretend
    out = ["study", "study.yaml", "--output", "out", "--workers", str(workers), "--threads", "1"]
    assert main(out) == 0
    assert asked == [run.name for run in study.runs]
    said = capsys.readouterr()
    assert "6 of 6 runs are left, about 0.06 core-hours with 1 thread a run" in said.err
    assert "5 of 6 runs are finished, about 0.01 core-hours are left" in said.err
    assert said.out == "All 6 runs are finished; their records are in out/records\n"
    folder = StudyFolder(Path("out"))
    for run in study.runs:  # the record suffices
        assert folder.record(run).history.is_file()
    shutil.rmtree(folder.runs)
    asked.clear()
    assert main(out) == 0
    assert asked == []


def test_failing_arm_is_named_and_the_others_go_on(study, pretend, capsys):
    asked, failing = pretend
    failing["exact-s1"] = "The loss became nan"
    assert main(["study", "study.yaml", "--output", "out"]) == 1
    said = capsys.readouterr().err
    assert "exact-s1: FAILED, the others go on: The loss became nan" in said
    assert said.splitlines()[-1].startswith("error: 1 of 6 runs failed")
    assert len(asked) == 6
    asked.clear()
    failing.clear()
    assert main(["study", "study.yaml", "--output", "out"]) == 0
    assert asked == ["exact-s1"]


def test_run_in_other_hands_is_waited_for(study, pretend, monkeypatch):
    asked, _ = pretend
    folder = StudyFolder(Path("out"))
    folder.create()
    held = folder.claim("exact-s0")
    assert held.__enter__()

    def finish(seconds):
        if "exact-s0" not in asked:
            write_record(folder, study.runs[0])
            held.__exit__(None, None, None)

    monkeypatch.setattr(matrix.time, "sleep", finish)
    assert main(["study", "study.yaml", "--output", "out"]) == 0
    assert asked == [run.name for run in study.runs[1:]]


def test_signal_ends_the_call_and_starts_nothing_more(study, pretend, monkeypatch):
    asked, _ = pretend
    original = matrix._claim

    def claim(*args):
        os.kill(os.getpid(), 15)
        return original(*args)

    monkeypatch.setattr(matrix, "_claim", claim)
    with pytest.raises(Stopped):
        matrix.run_study(study, Path("out"), {}, workers=1, threads=1)
    assert asked == ["exact-s0"]


def test_arm_that_cannot_be_built_is_found_before_the_start(tmp_path):
    text = FILE.replace("attn_layer: linformer_k64", "attn_layer: no_such").replace(
        "patch_size: 2", "patch_size: 4"
    )
    (tmp_path / "s.yaml").write_text(text)
    study = load_study(Path("s.yaml"))
    folder = StudyFolder(Path("out"))
    folder.create()
    matrix.measure_plan(study, Path("out"), {}, 1)
    exact, sketch = (read_plan(folder)[plan_key(run, 1)] for run in study.runs[:2])
    assert exact["steps"] == 2 * 16
    # Steps and the passes over the validation images; the file has one digit of the sum.
    assert exact["cpu_seconds"] + 0.05 > 2 * 16 * exact["step_ms"] / 1e3 > 0
    assert "no_such" in sketch["refused"]


# Differences


def group_of(name, values, study):
    runs = [run for run in study.runs if run.arm == name]
    records = [record_of(run, top1) for run, top1 in zip(runs, values, strict=False)]
    return Group(name, tuple(Run(str(r.seed), r) for r in records))


def test_differences_are_paired_by_seed(study):
    exact, sketch = (group_of(name, TOP1[name], study) for name in ("exact", "sketch"))
    gap = difference(sketch, exact, "test")
    paired = stats.ttest_rel(TOP1["sketch"], TOP1["exact"])
    low, high = paired.confidence_interval(0.95)
    gaps = np.subtract(TOP1["sketch"], TOP1["exact"])
    assert gap.mean == pytest.approx(gaps.mean())
    assert gap.deviation == pytest.approx(gaps.std(ddof=1))
    assert (gap.low, gap.high) == pytest.approx((low, high))
    # A seed that one of them lacks takes no part.
    short = Group("short", sketch.runs[:2])
    assert difference(short, exact, "test").mean == pytest.approx(gaps[:2].mean())
    # A seed run twice is not paired at all.
    assert difference(Group("twice", (*sketch.runs, sketch.runs[0])), exact, "test") is None


def test_single_seed_has_newcombes_interval(study):
    """The example of the paper: 56 of 70 against 48 of 80 is 0.2, 0.0524 to 0.3339."""

    def run(right, images):
        ends = [100 * end for end in wilson_interval(right, images)]
        values = {"test_images": images, "test_top1_interval_percent": ends}
        record = record_of(study.runs[0], **values)
        return Run("x", dataclasses.replace(record, test_top1_percent=100 * right / images))

    gap = difference(Group("a", (run(56, 70),)), Group("b", (run(48, 80),)), "test")
    assert gap.method == "Newcombe"
    assert gap.deviation is None
    assert (gap.mean, gap.low, gap.high) == pytest.approx((20.0, 5.24, 33.39), abs=0.005)


def test_front_holds_what_nothing_beats():
    places = [(3.0, 90.0), (1.0, 80.0), (2.0, 79.0), (4.0, 90.0), (1.0, 70.0), (5.0, 91.0)]
    assert report_plots._front(places) == [(1.0, 80.0), (3.0, 90.0), (5.0, 91.0)]


# The page


def check_page(text, table, records):
    """Recompute every figure of a page's accuracies from the records, by other means."""
    by_arm = {}
    for record, arm in records:
        by_arm.setdefault(arm, {})[record["seed"]] = record
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    heads = next(cells for cells in lines if cells[0] == "arm")
    gap = next(at for at, head in enumerate(heads) if head.startswith("above "))
    rows = [cells for cells in lines if cells[0].startswith("`")]
    assert rows
    baseline = next(row[0].split("`")[1] for row in rows if "(baseline)" in row[0])
    for row, line in zip(rows, table, strict=True):
        arm = row[0].split("`")[1]
        assert line["arm"] == arm
        own = by_arm.get(arm, {})
        values = [own[seed]["test_top1_percent"] for seed in sorted(own)]
        if not values:
            assert "missing" in row[2]
            continue
        expected = f"{np.mean(values):.2f}"
        if len(values) > 1:
            expected += f" ± {np.std(values, ddof=1):.2f}"
            low, high = stats.t.interval(
                0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
            )
            assert row[3] == f"{max(low, 0):.2f} to {min(high, 100):.2f} *t*"
        assert row[2] == expected
        shared = [seed for seed in sorted(own) if seed in by_arm[baseline]]
        if arm != baseline and len(shared) > 1:
            gaps = [
                own[s]["test_top1_percent"] - by_arm[baseline][s]["test_top1_percent"]
                for s in shared
            ]
            assert row[gap] == f"{np.mean(gaps):+.2f} ± {np.std(gaps, ddof=1):.2f}"
            low, high = stats.t.interval(
                0.95, len(gaps) - 1, loc=np.mean(gaps), scale=stats.sem(gaps)
            )
            assert row[gap + 1] == f"{low:+.2f} to {high:+.2f} *t*"
        seconds = [own[seed]["cpu_seconds"] for seed in own]
        assert row[-1] == f"{np.mean(seconds):,.0f}"


def test_page_says_what_the_records_hold(study, complete, monkeypatch):
    monkeypatch.setattr(report_plots, "save", lambda figure, path: path.touch())
    assert main(["study", "study.yaml", "--output", "out", "--report", "page.md"]) == 0
    text = Path("page.md").read_text()
    with Path("page/table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    records = [
        (dataclasses.asdict(run.record), arm.arm)
        for arm in study.runs
        for run in [complete.finished(study)[0][arm.key]]
    ]
    check_page(text, table, records)
    assert "# Two ways" in text
    assert "not told apart: `sketch`" in text
    assert "not complete" not in text.lower()
    assert "Speed and memory have not been measured." in text
    pictures = re.findall(r"\]\(page/(\S+\.png)\)", text)
    assert sorted(pictures) == sorted(path.name for path in Path("page").glob("*.png"))
    assert {"accuracy_seconds.png", "validation_curves.png", "validation_seconds.png"} <= {
        *pictures
    }
    # From the records alone, and the same again.
    main(["study", "study.yaml", "--output", "out", "--report", "page.md"])
    assert Path("page.md").read_text() == text


@pytest.mark.parametrize("folder", COMMITTED, ids=label)
def test_figures_of_committed_pages_are_those_of_their_records(folder):
    page = label(folder)
    if not (folder / "records").is_dir():
        assert not (ROOT / "docs" / f"{page}.md").exists()
        return
    study = load_study(folder / "study.yaml")
    names = {run.key: run.arm for run in study.runs}
    read = [json.loads(path.read_text()) for path in folder.glob("records/*/results.json")]
    records = [(record, names[record["recipe_hash"], record["seed"]]) for record in read]
    with (ROOT / "docs" / page / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    check_page((ROOT / "docs" / f"{page}.md").read_text(), table, records)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for picture in re.findall(rf"\]\({page}/(\S+\.png)\)", text):
        assert (ROOT / "docs" / page / picture).is_file()


def test_published_figures_have_a_column_and_are_called_landmarks(study, complete, no_pictures):
    text = FILE.replace("name: sketch,", 'name: sketch, published: {percent: 91.5, what: "X, 9"},')
    Path("study.yaml").write_text(text)
    assert main(["study", "study.yaml", "--output", "out", "--report"]) == 0
    page = Path("out/study.md").read_text()
    heads, _, exact, sketch = (
        line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|"
    )
    at = heads.index("published")
    assert (exact[at], sketch[at]) == ("-", "91.50 (X, 9)")
    assert "landmarks, not comparisons" in page
    assert "Every figure above, but for those of others, is computed" in page


def test_what_is_missing_is_shown_and_not_pooled(study, tmp_path, no_pictures):
    folder = StudyFolder(Path("out"))
    for run in study.runs[:3]:  # exact of seeds 0 and 1, sketch of seed 0
        write_record(folder, run, top1=TOP1[run.arm][run.seed])
    assert main(["study", "study.yaml", "--output", "out", "--report"]) == 0
    text = Path("out/study.md").read_text()
    assert "**Not complete: 3 of 6 runs are finished.**" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert "| 0 1, 2 missing | 95.50 ± 0.71 |" in rows[0]
    assert "| 0, 1 2 missing | 93.00 |" in rows[1]
    assert "*N* |" in rows[1]
    assert "Missing: `exact` seed 2; `sketch` seed 1 2." in text


def test_page_without_records_is_refused(study, capsys):
    assert main(["study", "study.yaml", "--output", "out", "--report"]) == 1
    assert "There is no record of study.yaml in out/records yet" in capsys.readouterr().err
    assert main(["study", "study.yaml", "--report", "page.html"]) == 2


@pytest.fixture
def no_pictures(monkeypatch):
    from timm_xformers.studies.running import page

    monkeypatch.setattr(page, "plot_report", lambda *args: [])


# Costs


@pytest.fixture
def clockwork(monkeypatch):
    """Measurement becomes figures by arm and task; collects the points."""
    points = []

    def measure(kind, work, effort, log):
        for point, contenders in work:
            points.append((kind, point, contenders))
            if kind == "memory":
                yield {"peak_mib": 10.0 if contenders[0].title == "exact" else 5.0}
                continue
            factor = 2.0 if point.task == "train" else 1.0
            seconds = {
                c.title: {"cpu": [factor * (i + 1.0) * jitter for jitter in (0.99, 1.0, 1.01)]}
                for i, c in enumerate(contenders)
            }
            yield {"seconds": seconds, "left_out": {}}

    monkeypatch.setattr(costs_module, "measure", measure)
    monkeypatch.setattr(costs_module.torch.cuda, "is_available", lambda: False)
    return points


def test_costs_are_measured_side_by_side_for_the_input_of_the_records(
    study, complete, clockwork, no_pictures
):
    command = ["study", "study.yaml", "--output", "out"]
    assert main([*command, "--costs"]) == 0
    kinds = [(kind, point.task, [c.title for c in who]) for kind, point, who in clockwork]
    both = ["exact", "sketch"]
    assert kinds == [
        ("time", "train", both),
        ("time", "forward", both),
        ("memory", "train", ["exact"]),
        ("memory", "train", ["sketch"]),
    ]
    point, contenders = clockwork[0][1:]
    assert (point.size, point.batch_size, point.threads) == (8, 64, 1)
    assert contenders[1].kwargs == {
        "patch_size": 2,
        "depth": 1,
        "attn_layer": "linformer_k64",
        "in_chans": 1,
        "num_classes": 10,
    }
    content = json.loads(Path("out/costs.json").read_text())
    assert {"hardware", "versions", "commit", "created"} <= content.keys()
    sketch = content["data"]["digits"]["arms"]["sketch"]
    assert sketch["train_img_s"][0] == 16.0
    assert sketch["train_ratio"] == [0.5, 0.5, 0.5]
    assert sketch["peak_mib"] == 5.0
    # 17 tokens of width 128: what a hand counts of one block, its projections apart.
    assert sketch["gmacs"] > 0
    assert main([*command, "--report"]) == 0
    text = Path("out/study.md").read_text()
    assert "| 16 (x 0.50) | 32 (x 0.50) | 5 |" in text
    # Of an arm that has changed since, nothing is shown.
    Path("study.yaml").write_text(FILE.replace("linformer_k64", "linformer_k256"))
    changed = load_study(Path("study.yaml"))
    assert set(costs_module.read_costs(complete, changed)["data"]["digits"]["arms"]) == {"exact"}


def test_costs_need_a_record(study, capsys):
    assert main(["study", "study.yaml", "--output", "out", "--costs"]) == 1
    assert "No run on digits is finished" in capsys.readouterr().err


# The real thing


@pytest.mark.slow
def test_killed_study_ends_like_an_undisturbed_one(tmp_path):
    """Killed with its processes, then without them; each time the same call goes on."""
    text = FILE.replace("seeds: [0, 1, 2]", "seeds: [0, 1]").replace(
        "epochs: 2,", "epochs: 12, checkpoint_minutes: 0.01,"
    )
    (tmp_path / "s.yaml").write_text(text)
    study = load_study(tmp_path / "s.yaml")

    def start(output):
        command = [sys.executable, "-m", "timm_xformers", "study", "s.yaml", "--workers", "2"]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (tmp_path / f"{output}.err").open("a") as err:
            return subprocess.Popen(
                [*command, "--threads", "1", "--output", output],
                cwd=tmp_path,
                env=environ,
                stderr=err,
                stdout=err,
                start_new_session=True,
            )

    def wait_for(words, count):
        path, limit = tmp_path / "killed.err", time.monotonic() + 240
        while path.read_text().count(words) < count:
            assert time.monotonic() < limit, path.read_text()[-2000:]
            time.sleep(0.05)

    first = start("killed")
    wait_for("epoch 2/12", 1)
    first.kill()  # its processes see to themselves
    first.wait()
    second = start("killed")
    wait_for("Going on", 2)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    assert start("killed").wait(timeout=400) == 0
    assert start("undisturbed").wait(timeout=400) == 0

    def outcome(output):
        found, others = StudyFolder(tmp_path / output).finished(study)
        assert others == []
        return {
            key: (run.record.val_loss, run.record.test_loss, [row.train_loss for row in run.rows])
            for key, run in found.items()
        }

    assert outcome("killed") == outcome("undisturbed")
    assert len(outcome("killed")) == 4
    log = (tmp_path / "killed" / "log.txt").read_text()
    for run in study.runs:
        assert len(re.findall(f"{run.name}: test top-1", log)) == 1, "a run ended twice"


@pytest.mark.slow
def test_costs_of_real_models(complete, monkeypatch):
    effort = {"rounds": 3, "min_ms": 1.0, "limit_seconds": 60.0, "seed": 0}
    monkeypatch.setattr(costs_module, "EFFORT", effort)
    assert main(["study", "study.yaml", "--output", "out", "--costs"]) == 0
    arms = json.loads(Path("out/costs.json").read_text())["data"]["digits"]["arms"]
    for arm in arms.values():
        assert arm["train_img_s"][0] < arm["infer_img_s"][0]
        assert arm["peak_mib"] > 0
    assert arms["exact"]["train_ratio"] == [1.0, 1.0, 1.0]
