"""Every setting is read: changing it changes what one epoch of training leaves."""

import dataclasses

import pytest
import torch

from timm_xformers.data.sampling import seed_everything
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe
from timm_xformers.training.loop import EpochSums
from timm_xformers.training.session import open_session

ON_DIGITS = {
    "model": "deit_tiny_distilled_patch16_224",
    "model_kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "img_size": 12,
    "in_chans": 3,
    "normalize": "model",
    "num_classes": 12,
    "val_fraction": 0.2,
    "epochs": 3,
    "batch_size": 48,
    "grad_accum_steps": 3,
    "opt": "sgd",
    "opt_kwargs": {"betas": [0.8, 0.9]},
    "lr": 1e-3,
    "weight_decay": 0.5,
    "layer_decay": 0.5,
    "sched": "poly",
    "sched_kwargs": {"k_decay": 2.0},
    "warmup_epochs": 0.5,
    "min_lr": 1e-3,
    "smoothing": 0.1,
    "mixup": 0.5,
    "cutmix": 0.5,
    "clip_grad": 0.01,
    "drop_path_rate": 0.5,
    "patch_drop_rate": 0.5,
    "model_ema_decay": 0.9,
    "mixed_precision": "bf16",
    "stages": [{"epoch": 1, "img_size": 12, "batch_size": 32}],
    "hflip": 0.5,
    "re_prob": 0.5,
    "crop_pad": 1,
    "rotate_degrees": 10.0,
    "shear_degrees": 10.0,
    "zoom": 0.2,
    "cutout": 3,
    "rand_augment": "n1-m9",
    "classes": [3, 5, 7],
    "limit": 700,
    "max_steps": 5,
    "loss": "bce",
    "class_weights": {"3": 5.0},
    "seed": 1,
}
ON_FILES = {
    "hflip": 0.5,
    "re_prob": 0.5,
    "min_crop_area": 0.1,
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5",
    "train_split": "test",
    "in_memory": True,
}
# Fields whose effect other tests show.
ELSEWHERE = {
    "labels",  # tests/data
    "multi_label",  # test_multi_label
    "max_seconds",  # test_start_and_end
    "data", "data_dir", "val_split", "test_split", "download",  # test_data
    "unreadable",  # test_readable
    "output", "pretrained",  # test_train
    "replace", "teacher", "align_epochs", "teacher_loss",  # test_teacher
    "trackers",  # test_trackers
    "num_workers",  # test_data: must not change a result
    "checkpoint_minutes",  # test_resume: must not change a result
    "num_processes",  # test_train
    "fsdp",  # test_sharding: must not change a result
    "channels_last", "grad_checkpointing", "compile",  # test_stages: hardly change a result
}  # fmt: skip


def train_epoch(session, batches):
    session.trainer.train_epoch(batches, 1, lambda *_: None, lambda _: None, EpochSums())


def fingerprint(recipe):
    """Weights that an epoch leaves, in one number each for shape and value."""
    run = open_session(recipe)
    train_epoch(run, run.batches(run.data.train, training=True))
    parameters = list(run.trainer.best_weights.parameters())
    values = torch.cat([parameter.detach().double().flatten() for parameter in parameters])
    return len(values), float(values.sum()), float(values.abs().sum())


@pytest.fixture
def base(tiny):
    """Without a warm-up, which would fill the one epoch and hide the schedule."""
    return lambda **values: tiny(**{"warmup_epochs": 0.0, **values})


@pytest.fixture(scope="module")
def known():
    return {}


def test_every_field_is_under_test():
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert names == ON_DIGITS.keys() | ON_FILES.keys() | ELSEWHERE


@pytest.mark.parametrize("field", list(ON_DIGITS))
def test_setting_has_an_effect(base, known, field):
    if "digits" not in known:
        known["digits"] = fingerprint(base())
        assert known["digits"] == fingerprint(base())
    changed = fingerprint(base(**{field: ON_DIGITS[field]}))
    assert changed != known["digits"]


@pytest.mark.parametrize("field", list(ON_FILES))
def test_setting_has_an_effect_on_files(tiny, image_folder, field):
    base = tiny(
        data="folder",
        data_dir=str(image_folder),
        in_memory=False,
        img_size=16,
        batch_size=2,
        num_workers=0,
    )
    changed = {field: ON_FILES[field]}
    if field == "train_split":  # the same images in two roles are refused
        changed["test_split"] = "train"
    assert fingerprint(dataclasses.replace(base, **changed)) != fingerprint(base)


def test_accumulated_passes_equal_one_large_pass(tiny):
    results = []
    for batch_size, passes in ((64, 1), (16, 4)):
        run = open_session(tiny(batch_size=batch_size, grad_accum_steps=passes, val_fraction=0.0))
        train_epoch(run, run.batches(run.data.train.subset(torch.arange(128)), training=True))
        assert run.trainer.updates == 2
        results.append(list(run.trainer.model.state_dict().values()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_last_group_of_an_epoch_is_averaged_over_its_own_size(tiny):
    run = open_session(tiny(batch_size=16, grad_accum_steps=4))
    norms = []
    original = run.trainer.optimizer.step
    run.trainer.optimizer.step = lambda: (
        norms.append(run.trainer.model.head.bias.grad.norm().item()),
        original(),
    )
    one_image_80_times = run.data.train.subset(torch.zeros(80, dtype=torch.long))
    run.trainer.optimizer.param_groups[0]["lr"] = run.trainer.optimizer.param_groups[1]["lr"] = 0.0
    run.trainer.scheduler = None
    train_epoch(run, run.batches(one_image_80_times, training=True))
    assert len(norms) == 2  # four passes, then one
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_wrong_names_and_arguments_are_refused_in_one_sentence(tiny):
    seed_everything(0)
    cases = [
        ({"model": "vit_tiny_patch16_225"}, "nearest: vit_tiny_patch16_224"),
        ({"model": "local-dir:nowhere"}, "config.json is missing"),
        ({"model_kwargs": {"patch_sizes": 4}}, "Cannot build vit_tiny_patch16_224"),
        ({"img_size": 10}, "img_size=10 is not a multiple of patch_size=4; use 8 or 12"),
        ({"opt": "adamv"}, "nearest: adam"),
        ({"opt_kwargs": {"beta": 1}}, "opt_kwargs="),
        ({"sched_kwargs": {"speed": 1}}, "sched_kwargs="),
        ({"batch_size": 2000}, "do not fill one batch of 2000"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
    ]
    if torch.cuda.is_available():
        cases.pop()
    for values, words in cases:
        with pytest.raises((UserError, UsageError), match=words):
            open_session(tiny(**values))
