"""The plan's arithmetic against hand counts and limits; its costs against real tensors."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_xformers.cli import main
from timm_xformers.errors import UsageError
from timm_xformers.planning.catalog import saved_bytes
from timm_xformers.planning.scaling import (
    Cluster,
    Costs,
    Job,
    all_reduce_seconds,
    costs_of,
    estimate,
    render,
)
from tools.scaling_check import Prediction, render_check

SCRIPTS = Path(__file__).resolve().parents[2] / "train_scripts"
# 1e9 parameters' worth of nothing: numbers that are easy to follow.
COSTS = Costs("m", 224, params=2**28, gmacs=10.0, activation_mib=32.0, fixed_mib=512.0)
JOB = Job(
    epochs=10, train_images=64_000, val_images=3000, kb_per_image=100, batch_size=100, ema=True
)
CLUSTER = Cluster(
    peak_tflops=100,
    utilisation=0.6,
    gpus_per_node=4,
    node_gb_s=100,
    network_gb_s=10,
    latency_us=0,
    price_per_gpu_hour=2,
    cores_per_gpu=1e6,
    decode_img_s=100,
    storage_mb_s=1e9,
)


def test_one_gpu_equals_a_hand_count():
    (row,) = estimate(COSTS, JOB, CLUSTER, [1])
    # 6 * 10e9 * 100 operations at 6e13 a second; validation takes a third for each image.
    assert row.compute_ms == pytest.approx(100)
    assert row.all_reduce_ms == 0
    assert row.gpu_img_s == row.img_s == pytest.approx(1000)
    assert row.bound_by == "GPU"
    assert row.cores == pytest.approx(10)
    assert row.storage_mb_s == pytest.approx(100)
    assert row.hours == pytest.approx(10 * (64 + 1) / 3600)
    assert row.cost == pytest.approx(2 * row.hours)
    # 1 GiB each: weights, gradients, two moments, averaged weights; 512 + 100 * 32 MiB.
    assert row.memory_gib == pytest.approx(5 + 3712 / 1024)


def test_all_reduce_equals_a_hand_count():
    gradients = 4 * 2**28
    assert all_reduce_seconds(gradients, 1, CLUSTER) == 0
    assert all_reduce_seconds(gradients, 2, CLUSTER) == pytest.approx(gradients / 100e9)
    assert all_reduce_seconds(gradients, 4, CLUSTER) == pytest.approx(1.5 * gradients / 100e9)
    assert all_reduce_seconds(gradients, 8, CLUSTER) == pytest.approx(1.75 * gradients / 10e9)
    slow = dataclasses.replace(CLUSTER, latency_us=50)
    assert all_reduce_seconds(0, 8, slow) == pytest.approx(400e-6)
    one, eight = estimate(COSTS, JOB, CLUSTER, [1, 8])
    assert eight.all_reduce_ms == pytest.approx(1.75 * gradients / 10e6)
    assert eight.compute_ms == one.compute_ms
    assert eight.gpu_img_s == pytest.approx(800e3 / (eight.compute_ms + eight.all_reduce_ms))
    assert eight.memory_gib == pytest.approx(one.memory_gib + 1)  # buckets


def test_free_communication_scales_perfectly_and_costs_the_same():
    free = dataclasses.replace(CLUSTER, node_gb_s=1e12, network_gb_s=1e12)
    rows = estimate(COSTS, JOB, free, [1, 2, 4, 8, 16, 32, 64])
    for row in rows:
        assert row.img_s == pytest.approx(1000 * row.gpus)
        assert row.cost == pytest.approx(rows[0].cost, rel=1e-6)
        assert row.global_batch_size == 100 * row.gpus


def test_the_slowest_sets_the_pace():
    few = dataclasses.replace(CLUSTER, cores_per_gpu=2)
    one, four = estimate(COSTS, JOB, few, [1, 4])
    assert [one.bound_by, four.bound_by] == ["decoding", "decoding"]
    assert [one.img_s, four.img_s] == [200, 800]
    assert one.gpu_img_s == pytest.approx(1000)  # what they could take stays as it was
    assert one.hours == pytest.approx(10 * (64_000 + 3000) / 200 / 3600)
    slow = dataclasses.replace(CLUSTER, storage_mb_s=50)
    (row,) = estimate(COSTS, JOB, slow, [4])
    assert [row.bound_by, row.img_s, row.storage_mb_s] == ["storage", 500, 50]


@pytest.mark.parametrize("field", [f.name for f in (*dataclasses.fields(Cluster),)])
def test_every_figure_of_the_cluster_is_read(field):
    tight = dataclasses.replace(CLUSTER, latency_us=1, cores_per_gpu=5, storage_mb_s=60)
    before = [dataclasses.asdict(row) for c in (CLUSTER, tight) for row in estimate(COSTS, JOB, c)]
    after = []
    for cluster in (CLUSTER, tight):
        value = getattr(cluster, field)
        changed = dataclasses.replace(cluster, **{field: value / 2 or 1000})
        if field == "gpus_per_node":
            changed = dataclasses.replace(cluster, gpus_per_node=2)
        after += [dataclasses.asdict(row) for row in estimate(COSTS, JOB, changed)]
    assert after != before


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Job)])
def test_every_figure_of_the_job_is_read(field):
    value = getattr(JOB, field)
    changed = dataclasses.replace(
        JOB, **{field: not value if value in (True, False) else value // 2}
    )
    assert estimate(COSTS, changed, CLUSTER) != estimate(COSTS, JOB, CLUSTER)


def test_impossible_figures_are_refused():
    with pytest.raises(UsageError, match="utilisation=0 must be more than 0"):
        estimate(COSTS, JOB, dataclasses.replace(CLUSTER, utilisation=0))
    with pytest.raises(UsageError, match="do not fill one batch of 64000 for each of 2 GPUs"):
        estimate(COSTS, dataclasses.replace(JOB, batch_size=64_000), CLUSTER)


@pytest.mark.parametrize(
    "name",
    ["vix_softmax", pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow), "resnet18"],
)
def test_costs_equal_those_of_real_tensors(name):
    side = 16 if name == "vix_softmax" else 32
    costs = costs_of(name, side, bf16=False)
    arguments = {} if name == "resnet18" else {"img_size": side}
    model = timm.create_model(name, **arguments).train()
    assert costs.params == sum(p.numel() for p in model.parameters())
    kept = [saved_bytes(model, torch.randn(n, 3, side, side)) / 2**20 for n in (8, 24)]
    assert costs.activation_mib == pytest.approx((kept[1] - kept[0]) / 16)
    assert costs.fixed_mib + 8 * costs.activation_mib == pytest.approx(kept[0])


def test_mixed_precision_keeps_less_of_images_and_copies_of_weights():
    half, full = (costs_of("test_vit", 64, bf16=bf16) for bf16 in (True, False))
    assert 0.5 * full.activation_mib < half.activation_mib < 0.75 * full.activation_mib
    assert half.gmacs == full.gmacs
    assert full.fixed_mib < 0.1
    assert half.fixed_mib == pytest.approx(2 * half.params / 2**20, rel=0.1)


def test_command_prints_the_table(capsys):
    arguments = ["plan", "--model", "vix_softmax", "--img-size", "16", "--epochs", "2", "--no-ema"]
    assert main([*arguments, "--float32", "--peak-tflops", "0.1"]) == 0
    said = capsys.readouterr()
    rows = estimate(
        costs_of("vix_softmax", 16, bf16=False), Job(epochs=2, ema=False), Cluster(peak_tflops=0.1)
    )
    assert said.out.strip() == render(rows)
    assert len(said.out.splitlines()) == 9
    assert "utilisation=0.35" in said.err
    assert main([*arguments, "--batch-size", "0"]) == 2
    assert main(["plan", "--model", "vix_softmaxx"]) != 0


def test_every_figure_has_a_flag_and_the_script_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling_plan.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPTS / "scaling_plan.py"), run_name="__main__")
    said = capsys.readouterr().out
    fields = {f.name for kind in (Job, Cluster) for f in dataclasses.fields(kind)}
    for name in fields - {"ema"}:
        assert f"--{name.replace('_', '-')}" in said, json.dumps(name)


def test_errors_of_predictions_are_signed():
    assert Prediction("step", "ms", 110, 100).error_percent == pytest.approx(10)
    text = render_check([Prediction("step", "ms", 90, 100)], 50.0, 80.0)
    assert "| step | 90.0 ms | 100.0 ms | -10 % |" in text
