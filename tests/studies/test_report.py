"""Comparisons: what counts as the same, the figures over seeds, and what is left out and why."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats

from timm_xformers.cli import main
from timm_xformers.recipe import Recipe
from timm_xformers.records.find_runs import Run, find_runs, read_record
from timm_xformers.records.results_csv import EpochRow, write_history
from timm_xformers.studies.comparing import report as report_module
from timm_xformers.studies.comparing.groups import group_runs, sort_groups
from timm_xformers.studies.comparing.report import report

from ..made_records import BASE, record

SHIPPED = Path(__file__).resolve().parents[2] / "results"


def runs(*records):
    return [Run(f"run{number}", entry) for number, entry in enumerate(records)]


def write_run(root, entry, val=(90.0, 95.0)):
    root.mkdir(parents=True)
    entry.save(root / "results.json")
    Recipe().save(root / "recipe.yaml")
    rows = [
        EpochRow(n, 1e-3, 1.0, 80.0, 0.5, value, 99.0, 5.0, 500, 0.1)
        for n, value in enumerate(val, 1)
    ]
    write_history(root / "results.csv", rows)
    return root


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, by name of the file."""
    figures = {}
    original = Figure.savefig

    def save(figure, path, **kwargs):
        figures[Path(path).name.rpartition("-")[2]] = figure  # written under another name
        original(figure, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(report_module, "plot_report", lambda *args: {})


def test_mean_deviation_and_interval_of_three_seeds():
    values = [96.0, 97.0, 98.5]
    (group,) = group_runs(
        runs(*(record(seed=seed, test_top1_percent=v) for seed, v in enumerate(values)))
    )
    top1 = group.score("test")
    expected = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
    assert top1.mean == pytest.approx(97.16667, abs=1e-4)
    assert top1.deviation == pytest.approx(stats.tstd(values))
    assert (top1.low, top1.high) == (pytest.approx(expected[0]), 100.0)
    assert expected[1] > 100
    assert top1.method == "t"


def test_single_run_has_its_wilson_interval():
    (group,) = group_runs(runs(BASE))
    top1 = group.score("test")
    assert dataclasses.astuple(top1) == (96.0, None, 94.0, 97.5, "Wilson")
    assert group_runs(runs(record(test_top1_percent=None)))[0].score("test") is None


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"model_kwargs": {"depth": 2}},
        {"data": "mnist"},
        {"recipe_hash": "abd"},
        {"epochs": 3},
        {"num_processes": 2},
        {"test_images": 600},
    ],
)
def test_groups_differ_in_anything_but_the_seed(change):
    groups = group_runs(runs(BASE, record(seed=1, **change)))
    assert len(groups) == 2
    assert len({(group.label, group.record.data) for group in groups}) == 2


def test_seed_commit_place_and_time_do_not_make_a_group():
    others = record(seed=1, commit=None, versions={}, hardware={}, created="x", seconds=1.0)
    (group,) = group_runs(runs(BASE, others))
    assert group.seeds == [0, 1]
    assert group.mean("seconds") == 5.5


def test_labels_say_what_differs_between_recipes():
    recipes = [{"opt": opt, "lr": 1.0, "seed": seed} for seed, opt in enumerate(("adamw", "muon"))]
    found = [
        Run(str(number), record(recipe_hash=str(number)), (), recipe)
        for number, recipe in enumerate(recipes)
    ]
    assert [group.label for group in group_runs(found)] == ["m, opt=adamw", "m, opt=muon"]
    unknown = [found[0], dataclasses.replace(found[1], settings={})]
    assert [group.label for group in group_runs(unknown)] == [
        "m, recipe_hash=0",
        "m, recipe_hash=1",
    ]


def test_labels_say_what_sets_namesakes_apart():
    groups = group_runs(
        runs(
            BASE,
            record(model_kwargs={"depth": 2, "num_heads": 4}),
            record(model="n", epochs=3),
            record(model="n", recipe_hash="abd"),
            record(model="n", recipe_hash="0123456789"),
        )
    )
    assert {group.label for group in groups} == {
        "m",
        "m, depth=2 num_heads=4",
        "n, epochs=3, recipe_hash=abc",
        "n, epochs=2, recipe_hash=abd",
        "n, epochs=2, recipe_hash=01234567",
    }


def test_order_depends_on_figures_alone():
    members = runs(
        record(model="a", test_top1_percent=90.0, val_top1_percent=99.0, params=3, seconds=2.0),
        record(model="b", test_top1_percent=92.0, params=1, seconds=3.0, peak_memory_mib=None),
        record(model="c", test_top1_percent=None, params=2, seconds=1.0, peak_memory_mib=900.0),
        record(model="d", test_top1_percent=92.0, params=4, seconds=4.0),
    )
    orders = {
        ("accuracy", "test"): "bdac",
        ("accuracy", "val"): "abcd",
        ("params", "test"): "bcad",
        ("seconds", "test"): "cabd",
        ("memory", "test"): "cadb",
        ("name", "test"): "abcd",
    }
    for (by, metric), expected in orders.items():
        for found in (members, members[::-1]):
            groups = sort_groups(group_runs(found), by, metric)
            assert "".join(group.label for group in groups) == expected, by


def test_report_over_folders_and_files(tmp_path, drawn, capsys):
    for seed, top1 in ((0, 96.0), (1, 97.0)):
        write_run(tmp_path / "runs" / f"a{seed}", record(seed=seed, test_top1_percent=top1))
    other = record(model="b", test_top1_percent=98.0, seconds=200.0, params=50_000)
    write_run(tmp_path / "runs" / "study" / "b", other, val=(80.0, 85.0))
    # The same run once more, as a line of a file, and one that is only there.
    only = record(model="c", kind="evaluate", seed=None, epochs=None, peak_memory_mib=None)
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in (other, only)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n\n")

    assert main(["report", "runs", "records.jsonl", "--output", "out"]) == 0
    said = capsys.readouterr()
    assert said.out == "4 runs in 3 groups are compared in out/report.md\n"
    assert said.err == ""

    text = (tmp_path / "out" / "report.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| model", "| ---", "| `b`", "| `m`", "| `c`"]
    assert rows[3][4:7] == ["2 (0 1)", "96.50 ± 0.71", "90.15 to 100.00 *t*"]
    assert rows[4][3:7] == ["-", "1", "96.00", "94.00 to 97.50 *W*"]
    assert "Versions: torch 2.15.0. Hardware: cpu one, cores 2." in text
    assert "Mind" not in text

    groups = read_csv(tmp_path / "out" / "report.csv")
    assert [(row["label"], row["runs"], row["seeds"]) for row in groups] == [
        ("b", "1", "0"),
        ("m", "2", "0 1"),
        ("c", "1", ""),
    ]
    assert groups[1]["test_top1_mean_percent"] == "96.5"
    assert groups[1]["test_top1_method"] == "t"
    each = read_csv(tmp_path / "out" / "runs.csv")
    assert [row["source"] for row in each] == [
        "runs/study/b", "runs/a0", "runs/a1", "records.jsonl:2",
    ]  # fmt: skip
    assert json.loads(each[0]["versions"]) == {"torch": "2.15.0"}

    assert set(drawn) == {
        "accuracy_seconds.png", "accuracy_params.png", "accuracy_memory.png",
        "validation_curves.png",
    }  # fmt: skip
    names = {name: {t.get_text() for t in fig.axes[0].texts} for name, fig in drawn.items()}
    assert names["accuracy_params.png"] == {"b", "m", "c"}
    assert names["accuracy_seconds.png"] == names["accuracy_memory.png"] == {"b", "m"}
    axes = drawn["accuracy_params.png"].axes[0]
    assert axes.get_xscale() == "log"
    ticks = {label.get_text() for label in axes.get_xticklabels()}
    assert {"1,000", "2,000", "5,000", "10,000", "20,000", "50,000"} <= ticks
    (line, *_) = drawn["validation_curves.png"].axes[0].lines
    assert list(line.get_ydata()) == [80.0, 85.0]
    for name in drawn:
        assert f"({name})" in text


def test_runs_of_one_epoch_have_no_curves(tmp_path, drawn):
    run = write_run(tmp_path / "run", record(), val=(90.0,))
    report([run], tmp_path / "out")
    assert set(drawn) == {"accuracy_params.png", "accuracy_seconds.png", "accuracy_memory.png"}
    assert "validation_curves" not in (tmp_path / "out" / "report.md").read_text()


def test_val_metric_and_stale_plots(tmp_path, drawn):
    entry = record(test_top1_percent=None, test_top1_interval_percent=None, test_images=None)
    run = write_run(tmp_path / "run", entry)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "accuracy_memory.png").write_text("old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    report([run], tmp_path / "out")
    assert set(drawn) == {"validation_curves.png"}  # there is no test accuracy
    assert not (tmp_path / "out" / "accuracy_memory.png").exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    report([run], tmp_path / "out", metric="val")
    assert len(drawn) == 4
    assert drawn["accuracy_memory.png"].axes[0].get_ylabel().startswith("Validation")


def test_report_into_a_run_folder_leaves_the_run_alone(tmp_path):
    run = write_run(tmp_path / "run", BASE)
    (run / "curves.png").write_text("the run's")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    report([run], run)
    assert all((run / name).read_bytes() == content for name, content in before.items())


def test_mixed_circumstances_are_said(tmp_path, no_pictures):
    lines = [
        record(),
        record(seed=1, hardware={"cpu": "two", "cores": 2}, versions={"torch": "2.14.0"}),
        record(seed=1, created="later", commit=None),
        record(model="n", data="mnist"),
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(dataclasses.asdict(entry)) for entry in lines))
    text = report([path], tmp_path / "out").path.read_text()
    assert "mixed hardware, so times and memory do not compare: cpu one (3), two (1)" in text
    assert "mixed versions, so times may not compare: torch 2.14.0 (1), 2.15.0 (3)" in text
    assert "mixed commits, so the code was not the same: commit 01234567 (3), unknown (1)" in text
    assert "accuracies on digits, mnist do not compare" in text
    assert "`m` has seed 1 more than once" in text
    assert "Hardware: cores 2." in text


def test_shipped_records_make_a_report(tmp_path, no_pictures):
    done = report([SHIPPED], tmp_path / "out")
    assert done.skipped == []
    of_default = [group for group in done.groups if group.label.startswith("hybrid_vix_performer")]
    assert max(len(group.runs) for group in of_default) == 3


@pytest.mark.parametrize("count", [12, 13])
def test_names_do_not_cover_each_other(tmp_path, drawn, count):
    entries = [
        record(
            model=f"a_rather_long_name_of_a_model_{number}",
            kind="evaluate",  # and no memory: one picture
            peak_memory_mib=None,
            params=1000 + number,
            test_top1_percent=96 + number % 3 * 0.01,  # all in three heights
        )
        for number in range(count)
    ]
    path = tmp_path / "r.json"
    path.write_text(json.dumps([dataclasses.asdict(entry) for entry in entries]))
    report([path], tmp_path / "out")
    figure = drawn["accuracy_params.png"]
    axes = figure.axes[0]
    if count == 13:
        assert list(axes.texts) == []
        assert len(axes.get_legend().get_texts()) == 13
        return
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leader
    assert len(boxes) == 12
    for number, box in enumerate(boxes):
        assert box.count_overlaps(boxes[number + 1 :]) == 0
        assert box.count_overlaps([axes.bbox]) == 0
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_what_runs_left_out_is_said_and_one_run_is_singular(tmp_path, no_pictures, capsys):
    odd = record(skipped_images=1, data_notes=["left out: 2 hidden folders"])
    write_run(tmp_path / "a", odd)
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "1 run in 1 group is compared in report/report.md\n"
    text = (tmp_path / "report" / "report.md").read_text()
    line = "left out: 2 hidden folders; left out: 1 image that cannot be read.\n"
    assert text.startswith("# 1 run in 1 group\n")
    assert f"**Mind:** of the data of `m`: {line}" in text

    write_run(tmp_path / "b", record(model="n"))  # with nothing to say
    assert main(["report", "a", "b"]) == 0
    assert (tmp_path / "report" / "report.md").read_text().count("of the data of") == 1


def test_damaged_and_unfinished_runs_are_listed_with_the_reason(tmp_path, no_pictures, capsys):
    good = write_run(tmp_path / "runs" / "good", BASE)
    cut = write_run(tmp_path / "runs" / "cut", BASE)
    (cut / "results.json").write_text((cut / "results.json").read_text()[:100])
    unfinished = write_run(tmp_path / "runs" / "unfinished", BASE)
    (unfinished / "results.json").unlink()
    torn = write_run(tmp_path / "runs" / "torn", record(seed=1))
    (torn / "results.csv").write_text("epoch,lr\n1,x\n")
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "config.json").write_text('{"architecture": "vit"}')
    wrong = dataclasses.asdict(BASE) | {"test_top1_percent": "96"}
    (tmp_path / "runs" / "r.jsonl").write_text(f'{{"kind": 1}}\n{json.dumps(wrong)}\n{{"ki')
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "void").mkdir()

    assert main(["report", "runs", "absent", "notes.txt", "void"]) == 0
    said = capsys.readouterr()
    assert said.out == "2 runs in 1 group are compared in report/report.md\n"
    lines = dict(
        line.removeprefix("left out: ").split(" ", 1) for line in said.err.strip().splitlines()
    )
    assert "is damaged" in lines.pop("runs/cut")
    assert lines.pop("runs/unfinished") == (
        "is not finished: 2 epochs are done; timm-xformers train --resume runs/unfinished"
    )
    assert lines.pop("runs/r.jsonl:1").startswith("lacks model, model_kwargs")
    assert "test_top1_percent='96'" in lines.pop("runs/r.jsonl:2")
    assert "is not JSON" in lines.pop("runs/r.jsonl:3")
    assert lines.pop("absent") == "does not exist"
    assert "neither a run folder nor" in lines.pop("notes.txt")
    assert lines.pop("void") == "holds no run and no record"
    assert lines == {}
    text = (tmp_path / "report" / "report.md").read_text()
    assert "- `absent` does not exist" in text
    found, _ = find_runs([good, torn])
    assert [len(run.rows) for run in found] == [2, 0]


def test_nothing_usable_is_one_sentence(tmp_path, capsys):
    (tmp_path / "void").mkdir()
    assert main(["report", "void", "absent"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no finished run to compare: void holds no run" in said
    assert not (tmp_path / "report").exists()
    write_run(tmp_path / "run", BASE)
    (tmp_path / "file").write_text("")
    assert main(["report", "run", "--output", "file"]) == 2
    assert "file is a file; choose a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "is not a record"),
        ({"model": "m"}, "is not a record"),
        ({"kind": "train"}, "lacks model"),
        ({"kind": "guess"}, "kind='guess'"),
        ({"params": True}, "params=True"),
        ({"params": 1.5}, r"params=1\.5"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"test_top1_interval_percent": [1.0]}, "test_top1_interval_percent"),
        ({"versions": None}, "versions=None"),
    ],
)
def test_records_are_checked(values, words):
    whole = dataclasses.asdict(BASE)
    if isinstance(values, dict) and "model" not in values and values != {"kind": "train"}:
        values = whole | values
    with pytest.raises(ValueError, match=words):
        read_record(values)


def test_records_of_other_versions_are_read():
    values = dataclasses.asdict(BASE)
    del values["step_ms"], values["peak_memory_mib"]  # from before they were kept
    assert read_record(values | {"energy_j": 3}) == record(step_ms=None, peak_memory_mib=None)
