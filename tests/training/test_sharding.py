"""Shards on two CPU processes against whole models there; what shards cannot do is refused."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import timm
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from timm_xformers.errors import UsageError, UserError
from timm_xformers.records.results_csv import read_history
from timm_xformers.records.results_json import Record
from timm_xformers.training import sharding
from timm_xformers.training.session import open_session
from timm_xformers.training.stages import read_stages

from .test_distributed import ENV
from .test_resume import assert_same_run

SCRIPT = Path(__file__).with_name("run_sharded.py")
# 120 validation images are four batches of 32, and 599 test images nineteen: one process has more.
COMMON = {"trackers": "[]", "num_processes": "2", "batch_size": "32", "model_ema_decay": "0.9"}
VIT = {
    **COMMON,
    "model": "vit_tiny_patch16_224",
    "model_kwargs": "{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "epochs": "4",
    "crop_pad": "1",
    "mixup": "0.2",
    "drop_path_rate": "0.1",
    "layer_decay": "0.9",
    "grad_accum_steps": "2",
    "grad_checkpointing": "true",
    "clip_grad": "1",
}
# Random features are buffers, which the lower precision must reach as well.
PERFORMER = {
    **COMMON,
    "model": "vix_performer_softmax_m32",
    "model_kwargs": "{depth: 1, embed_dim: 32}",
    "epochs": "1",
    "limit": "128",
    "mixed_precision": "bf16",
}
# No blocks, and running statistics.
RESNET = {**COMMON, "model": "resnet10t", "img_size": "8", "epochs": "2", "limit": "256"}


def launch(output, settings, *, fsdp):
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    arguments += [f"--set=fsdp={str(fsdp).lower()}", f"--output={output}"]
    return [*torchrun(), "train", *arguments]


def torchrun():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node=2", str(SCRIPT)]


def run(command, folder):
    done = subprocess.run(
        command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "blocks"),
    [(VIT, 2), (PERFORMER, 1), (RESNET, 0)],
    ids=["vit", "performer", "resnet"],
)
def test_shards_learn_what_copies_learn(tmp_path, settings, blocks):
    said = run(launch("shards", settings, fsdp=True), tmp_path)
    # Model and averages in both processes: the root, the blocks and, in newer versions of
    # Accelerate, the last norm.
    lines = [line.split() for line in said.splitlines() if line.startswith("shards:")]
    assert len(lines) == 4
    shares = [float(words[1]) for words in lines]
    # Not quite halves: a position embedding has one row, which a single process holds.
    assert sum(shares) == pytest.approx(2, abs=0.01)
    assert max(shares) < 0.75
    assert {int(words[-2]) for words in lines} <= {blocks + 1, blocks + 2}
    run(launch("copies", settings, fsdp=False), tmp_path)

    one, two = (tmp_path / name for name in ("shards", "copies"))
    for left, right in zip(*(read_history(r / "results.csv") for r in (one, two)), strict=True):
        assert left.train_loss == pytest.approx(right.train_loss, abs=1e-4)
        assert left.val_loss == pytest.approx(right.val_loss, abs=1e-4)
    records = [Record.load(root / "results.json") for root in (one, two)]
    assert {record.test_images for record in records} == {599}
    assert len({record.params for record in records}) == 1
    assert len({record.recipe_hash for record in records}) == 1
    assert records[0].test_loss == pytest.approx(records[1].test_loss, abs=1e-3)
    assert {path.relative_to(one) for path in one.rglob("*")} == {
        path.relative_to(two) for path in two.rglob("*")
    }
    for part in ("best", "last"):
        left, right = (load_file(root / part / "model.safetensors") for root in (one, two))
        assert list(left) == list(right)
        for name, value in left.items():
            torch.testing.assert_close(value, right[name], atol=1e-4, rtol=1e-3)
    states = [torch.load(r / "last" / "training_state.pt", weights_only=True) for r in (one, two)]
    for key, entries in states[1]["optimizer"]["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(
                torch.as_tensor(states[0]["optimizer"]["state"][key][name]),
                torch.as_tensor(value),
                atol=1e-4,
                rtol=1e-2,
            )
    assert timm.create_model(f"local-dir:{one / 'best'}", pretrained=True) is not None


@pytest.mark.slow
@pytest.mark.parametrize("settings", [VIT, {**RESNET, "epochs": "8"}], ids=["vit", "resnet"])
def test_shards_stopped_by_a_signal_go_on_exactly(tmp_path, settings):
    run(launch("whole", settings, fsdp=True), tmp_path)
    process = subprocess.Popen(launch("cut", settings, fsdp=True), cwd=tmp_path, env=ENV)
    log = tmp_path / "cut" / "log.txt"
    deadline = time.monotonic() + 300
    while not (log.exists() and "epoch 1/" in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert not (tmp_path / "cut" / "results.json").exists()
    run([*torchrun(), "train", "--resume=cut"], tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_shards_need_several_accelerators(tiny):
    with pytest.raises(UsageError, match="processes with a GPU each, and this is 1 on cpu"):
        open_session(tiny(fsdp=True))
    assert os.environ.get("ACCELERATE_USE_FSDP") is None  # which would reach later runs


@pytest.mark.parametrize("name", ["torch", "accelerate"])
def test_old_libraries_are_refused(monkeypatch, name):
    monkeypatch.setattr(sharding, "compare_versions", lambda library, *_: library == name)
    with pytest.raises(UserError, match=rf"fsdp=true needs {name} \d\.[67]\.0 or later; update it"):
        sharding.make_plugin(cpu=True)


def accelerator_of(kind):
    plugin = types.SimpleNamespace(auto_wrap_policy=None, transformer_cls_names_to_wrap=None)
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    return types.SimpleNamespace(distributed_type=kind, state=state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": [{"epoch": 2, "img_size": 16}]}, "keeps one image size"),
        ({"channels_last": True}, "does not go with channels_last=true"),
        ({"compile": True}, "does not go with compile=true"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(tiny, settings, words):
    recipe = tiny(fsdp=True, **settings)
    with pytest.raises(UsageError, match=words):
        sharding.check_sharding(
            recipe, read_stages(recipe, 8), accelerator_of(DistributedType.FSDP)
        )


def test_other_batch_sizes_go_with_shards(tiny):
    recipe = tiny(fsdp=True, stages=[{"epoch": 2, "batch_size": 16}])
    sharding.check_sharding(recipe, read_stages(recipe, 8), accelerator_of(DistributedType.FSDP))


@pytest.mark.parametrize(
    ("fsdp", "kind"), [(False, DistributedType.FSDP), (True, DistributedType.MULTI_GPU)]
)
def test_accelerate_must_not_decide_otherwise(tiny, fsdp, kind):
    recipe = tiny(fsdp=fsdp)
    with pytest.raises(UsageError, match="let the recipe alone decide"):
        sharding.check_sharding(recipe, read_stages(recipe, 8), accelerator_of(kind))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("vit_tiny_patch16_224", ["Block"]),
        ("convnext_atto", ["ConvNeXtBlock"]),
        ("ccp_2_3x2_32", ["CCXBlock"]),
        ("resnet10t", []),
    ],
)
def test_blocks_are_found_in_the_model(model, names):
    accelerator = accelerator_of(DistributedType.FSDP)
    sharding._name_blocks(accelerator, timm.create_model(model))
    plugin = accelerator.state.fsdp_plugin
    assert plugin.transformer_cls_names_to_wrap == names
    assert (plugin.auto_wrap_policy is not None) == bool(names)


def test_processes_take_equal_turns():
    mine, batch = [torch.arange(3)], torch.zeros(1, dtype=torch.long)
    for images, turns in ((3, 1), (6, 1), (7, 2)):
        order = sharding.equal_turns(mine, images, batch_size=3, world_size=2)
        assert len(order) == turns
    assert torch.equal(order[1], batch)
    assert len(sharding.equal_turns([], 3, batch_size=3, world_size=2)) == 1
