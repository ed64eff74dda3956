"""Growing images, and settings that save time or memory without changing what is learned."""

import dataclasses
import json
import re
import signal

import pytest
import timm
import torch
import yaml

from timm_xformers.cli import main
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import load_recipe
from timm_xformers.training import train as train_module
from timm_xformers.training.build import build_model
from timm_xformers.training.loop import EpochSums
from timm_xformers.training.session import open_session
from timm_xformers.training.signals import Stopped
from timm_xformers.training.stages import Stage, read_stages, stage_of
from timm_xformers.training.train import resume, train

from .test_resume import BUSY, assert_same_run

GROWING = {
    "img_size": 16,
    "epochs": 3,
    "stages": [{"epoch": 1, "img_size": 8, "batch_size": 128}, {"epoch": 2, "batch_size": 64}],
}


def test_stages_fill_in_what_they_do_not_say(tiny):
    recipe = tiny(**{**GROWING, "epochs": 9, "batch_size": 32})
    stages = read_stages(recipe, 16)
    assert stages == (Stage(1, 8, 128), Stage(2, 16, 64))
    halves = tiny(epochs=2, patch_drop_rate=0.5, stages=[{"epoch": 2, "patch_drop_rate": 0}])
    assert [stage.patch_drop_rate for stage in read_stages(halves, 8)] == [0.5, 0]
    assert [stage_of(stages, epoch).img_size for epoch in (0, 1, 2, 9)] == [8, 8, 16, 16]
    assert read_stages(tiny(), None) == (Stage(1, None, 64),)
    later = tiny(epochs=5, stages=[{"epoch": 3, "batch_size": 16}])
    assert read_stages(later, 8) == (Stage(1, 8, 64), Stage(3, 8, 16))


def test_model_grows_and_what_is_kept_has_the_last_size(tiny, tmp_path):
    folder, record = train(tiny(output="run", **GROWING))
    model = timm.create_model(f"local-dir:{folder.best}", pretrained=True)
    assert model.patch_embed.img_size == (16, 16)
    assert json.loads((folder.best / "config.json").read_text())["model_args"]["img_size"] in (
        16,
        [16, 16],
    )
    assert record.img_size == 16
    assert record.best_epoch >= 2


def tokens_seen(session, batches, epoch):
    counts = set()
    hook = session.trainer.model.blocks[0].register_forward_pre_hook(
        lambda _, inputs: counts.add(inputs[0].shape[1])
    )
    session.enter(epoch)
    session.trainer.train_epoch(batches, epoch, lambda *_: None, lambda _: None, EpochSums())
    hook.remove()
    return counts


def test_share_of_tokens_by_stage(tiny, tmp_path):
    settings = {
        "patch_drop_rate": 0.5,
        "epochs": 3,
        "stages": [
            {"epoch": 2, "patch_drop_rate": 0.25},
            {"epoch": 3, "patch_drop_rate": 0},
        ],
    }
    session = open_session(tiny(**settings))
    batches = session.batches(session.data.train.subset(torch.arange(128)), training=True)
    # A class token and 2x2 patches.
    assert [tokens_seen(session, batches, epoch) for epoch in (1, 2, 3)] == [{3}, {4}, {5}]
    folder, _ = train(tiny(output="run", **settings))
    assert "patch_drop_rate" not in (folder.best / "config.json").read_text()


def test_a_later_stage_that_leaves_tokens_out(tiny):
    session = open_session(tiny(epochs=2, stages=[{"epoch": 2, "patch_drop_rate": 0.5}]))
    batches = session.batches(session.data.train.subset(torch.arange(128)), training=True)
    assert [tokens_seen(session, batches, epoch) for epoch in (1, 2)] == [{5}, {3}]


def test_a_share_among_the_models_arguments_is_left_alone(tiny):
    kwargs = {**tiny().model_kwargs, "patch_drop_rate": 0.5}
    session = open_session(tiny(model_kwargs=kwargs))
    batches = session.batches(session.data.train.subset(torch.arange(128)), training=True)
    assert tokens_seen(session, batches, 1) == {3}


def test_models_that_need_every_token_say_so(tiny):
    with pytest.raises(UserError, match=r"needs every token in its place, so patch_drop_rate=0\.5"):
        open_session(tiny(model="vix_local2d_w8", patch_drop_rate=0.5))
    with pytest.raises(UserError, match="needs every token in its place"):
        open_session(tiny(model="vix_linformer", model_kwargs={}, patch_drop_rate=0.5))
    with pytest.raises(UserError, match=r"Cannot build swin_local_tiny.*patch_drop_rate"):
        open_session(tiny(model="swin_local_tiny", model_kwargs={}, patch_drop_rate=0.5))


def test_weights_state_and_schedule_carry_over(tiny):
    session = open_session(tiny(**GROWING, model_ema_decay=0.9))
    trainer = session.trainer
    data = session.batches(session.data.train, training=True)
    trainer.train_epoch(data, 1, lambda *_: None, lambda _: None, EpochSums())
    model = trainer.model
    weight, bias = model.blocks[0].mlp.fc1.weight, model.head.bias.detach().clone()
    moment = trainer.optimizer.state[weight]["exp_avg"].clone()
    small = model.pos_embed.detach().clone()
    rate = trainer.optimizer.param_groups[0]["lr"]

    assert session.enter(2)
    assert not session.enter(3)
    assert model.pos_embed.shape == (1, 17, 32)
    assert model.pos_embed.shape == trainer.ema.module.pos_embed.shape
    torch.testing.assert_close(
        model.pos_embed[:, 1:].mean(), small[:, 1:].mean(), atol=1e-3, rtol=0
    )
    assert torch.equal(model.head.bias, bias)
    assert torch.equal(trainer.optimizer.state[weight]["exp_avg"], moment)
    assert model.pos_embed not in trainer.optimizer.state
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    updated = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert updated == {id(p) for p in model.parameters()}
    # Four updates of the first epoch count as eight, as many as those of the others have.
    assert session.steps_in(1) * 2 == session.steps_in(2)
    assert trainer.updates_per_epoch == session.steps_in(2)


@pytest.mark.parametrize(
    "update", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_cut_on_either_side_of_the_change_goes_on_exactly(tiny, monkeypatch, tmp_path, update):
    settings = {**BUSY, **GROWING, "img_size": 16, "checkpoint_minutes": 1e-9}
    train(tiny(output="whole", **settings))  # 2 updates of 256 images, then 4 of 128
    original = train_module._Run.save

    def save_and_stop(run, reached=None):
        original(run, reached)
        if run.session.trainer.updates == update:
            raise Stopped("here", signal.SIGTERM)

    monkeypatch.setattr(train_module._Run, "save", save_and_stop)
    with pytest.raises(Stopped):
        train(tiny(output="cut", **settings))
    monkeypatch.setattr(train_module._Run, "save", original)
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"epoch": 9}], r"stages has epoch=9; an entry takes epoch \(1 to 2\)"),
        ([{"size": 9}], r"stages has size=9; an entry takes"),
        ([{"epoch": 1, "img_size": 0}], r"stages has img_size=0"),
        ([{"img_size": 8}], r"after epoch 0; each entry names its first epoch, in rising order"),
        ([{"epoch": 2}, {"epoch": 2}], r"after epoch 2; each entry names"),
        ([3], r"stages has =3"),
        ([{"epoch": 1, "patch_drop_rate": 1}], r"stages has patch_drop_rate=1; an entry takes"),
        ([{"epoch": 1, "img_size": 8.5}], r"stages has img_size=8.5"),
    ],
)
def test_wrong_stages_are_refused(tiny, stages, message):
    with pytest.raises(UsageError, match=message):
        tiny(stages=stages)


def test_stage_too_large_for_the_data_is_refused(tiny):
    with pytest.raises(UsageError, match="do not fill one batch of 5000"):
        open_session(tiny(stages=[{"epoch": 2, "batch_size": 5000}]))


@pytest.mark.parametrize(
    "settings",
    [
        {"channels_last": True},
        {"grad_checkpointing": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_faster_or_smaller_is_the_same(tiny, monkeypatch, settings):
    called = []
    for owner, name in (
        (timm.models.VisionTransformer, "set_grad_checkpointing"),
        (torch, "compile"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, _o=original, _n=name, **k: (called.append(_n), _o(*a, **k))[1]
        )
    results = []
    for values in ({}, settings):
        session = open_session(tiny(**values))
        data = session.batches(session.data.train.subset(torch.arange(128)), training=True)
        session.trainer.train_epoch(data, 1, lambda *_: None, lambda _: None, EpochSums())
        results.append([p.detach().clone() for p in session.trainer.model.parameters()])
        last = session.trainer.model.patch_embed.proj.weight
        assert (
            last.is_contiguous(memory_format=torch.channels_last) or "channels_last" not in values
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-2)
    expected = {"grad_checkpointing": "set_grad_checkpointing", "compile": "compile"}
    assert set(called) == {expected[name] for name in settings if name in expected}


def test_model_that_cannot_recompute_is_refused(tiny, monkeypatch):
    def refuse(self, enable=True):
        raise AssertionError("not supported")

    monkeypatch.setattr(timm.models.VisionTransformer, "set_grad_checkpointing", refuse)
    with pytest.raises(UsageError, match="cannot recompute its activations; use grad_checkp"):
        open_session(tiny(grad_checkpointing=True))


def test_dry_run_measures_every_stage_and_writes_nothing(tiny, tmp_path, capsys):
    recipe = tiny(**GROWING, checkpoint_minutes=3.0, limit=None)
    recipe.save(tmp_path / "r.yaml")
    assert main(["train", "--recipe", "r.yaml", "--dry-run", "--set", "lr=0.002"]) == 0
    said = capsys.readouterr().out
    resolved = load_recipe(None, yaml.safe_load(said))
    assert resolved == dataclasses.replace(recipe, lr=0.002)
    assert "# epochs 1 to 1: 8 x 8 pixels, 8 steps of 128 images" in said
    assert "# epochs 2 to 3: 16 x 16 pixels, 16 steps of 64 images" in said
    assert re.search(r"# about 0:0\d:\d\d in all", said)
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    assert main(["train", "--resume", "x", "--dry-run"]) == 2


@pytest.mark.parametrize("name", ["local2d_w4_shifted", "local1d_w16_shifted", "linformer_k32"])
def test_layers_in_timms_slot_are_told_each_grid(tiny, name):
    kwargs = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "attn_layer": name}
    stages = [{"epoch": 1, "img_size": 8}, {"epoch": 2, "img_size": 16}]
    recipe = tiny(
        model_kwargs=kwargs,
        stages=stages,
        limit=40,
        batch_size=20,
        test_split="none",
        output="run",
    )
    folder, record = train(recipe)
    assert record.img_size == 16
    model, _ = build_model(f"local-dir:{folder.best}", pretrained=True)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
