"""The record and its figures."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from timm_xformers.records.results_csv import EpochRow, read_history, write_history
from timm_xformers.records.results_json import Record, environment, split_fields, wilson_interval
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.metrics import Metrics

from ..made_records import record

RESULTS = Path(__file__).resolve().parents[2] / "results"
# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
NEWCOMBE = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("right", "total", "low", "high"), NEWCOMBE)
def test_wilson_interval_as_published(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(total - right, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_ends_exactly():
    assert wilson_interval(0, 50)[0] == 0.0
    assert wilson_interval(50, 50)[1] == 1.0


def test_record_survives_json(tmp_path):
    metrics = Metrics(0.123456789, top1=589, top5=599, images=599, confusion=torch.eye(10))
    made = record(
        kind="evaluate",
        model_kwargs={"patch_size": 4},
        **split_fields("test", metrics),
        **environment(make_accelerator("no")),
    )
    made.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json") == made
    assert made.test_top1_percent == 98.3306
    assert made.test_top5_percent == 100
    assert made.test_loss == 0.12346
    assert made.peak_memory_mib > 10


def test_records_from_before_a_field_was_added_are_read(tmp_path):
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            (tmp_path / "r.json").write_text(line)
            found = Record.load(tmp_path / "r.json")
            assert found.peak_memory_mib > 0
            assert (found.step_ms is None) == ("step_ms" not in json.loads(line))


def test_history_survives_csv(tmp_path):
    rows = [
        EpochRow(1, 1e-3, 2.0, 10.0, None, None, None, 0.1, 100, 0.01),
        EpochRow(2, 0.1 + 0.2, 1 / 3, 20.0, 1.5, 30.0, 80.0, 0.1, 100, 0.01),
    ]
    write_history(tmp_path / "h.csv", rows)
    assert read_history(tmp_path / "h.csv") == rows
    assert read_history(tmp_path / "absent.csv") == []
    header = (tmp_path / "h.csv").read_text().splitlines()[0].split(",")
    fields = [field.name for field in dataclasses.fields(EpochRow)]
    several = [name for name in fields if any(w in name for w in ("map", "f1", "agreement"))]
    assert header == [name for name in fields if name not in several]
    marked = [
        dataclasses.replace(
            row,
            **dict.fromkeys(["train_top1_percent", "val_top1_percent", "val_top5_percent"]),
            **dict.fromkeys(several, 1 / 7),
        )
        for row in rows
    ]
    write_history(tmp_path / "h.csv", marked)
    assert read_history(tmp_path / "h.csv") == marked
    assert "top1" not in (tmp_path / "h.csv").read_text()
