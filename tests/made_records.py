"""A record of a run, made by hand."""

import dataclasses
from typing import Any

from timm_xformers.records.results_json import Record

BASE = Record(
    kind="train",
    model="m",
    model_kwargs={},
    params=1000,
    data="digits",
    img_size=8,
    in_chans=1,
    num_classes=10,
    val_images=120,
    val_top1_percent=95.0,
    val_top1_interval_percent=[90.0, 98.0],
    test_images=599,
    test_top1_percent=96.0,
    test_top1_interval_percent=[94.0, 97.5],
    epochs=2,
    best_epoch=2,
    recipe_hash="abc",
    seed=0,
    batch_size=64,
    num_processes=1,
    mixed_precision="no",
    seconds=10.0,
    images_per_s=100.0,
    data_wait_percent=1.0,
    step_ms=5.0,
    peak_memory_mib=1000.0,
    commit="0123456789abcdef",
    versions={"torch": "2.15.0"},
    hardware={"cpu": "one", "cores": 2},
    created="2026-01-01",
)


def record(**values: Any) -> Record:
    """The record with other values."""
    return dataclasses.replace(BASE, **values)
