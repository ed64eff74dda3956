"""Random settings: each is refused in a sentence, or trains. The seed is fixed."""

import dataclasses
import random

import pytest
from accelerate.state import AcceleratorState, GradientState

from timm_xformers.cli import main
from timm_xformers.recipe import Recipe

# Any of these may be tried for any setting; what is valid for one is nonsense for another.
ODD = [
    *("null", "true", "''", "x", "no", "-1", "0", "1", "2", "3.5", "1e308", "-0.0", ".nan", ".inf"),
    *("9223372036854775808", "9" * 400, "[]", "{}", "[1]", "[x, y]", "{a: 1}", "{a: {b: [1]}}"),
    *("2020-01-01", "010", "1:30", "1e-3", "'a/b'", "!!set {a}", "&a [*a]", "../x", "ü", "[[[1]]]"),
]
# Values that get further, for settings whose odd values are refused early.
TELLING = {
    "model_kwargs": ["{attn_layer: nystrom_l4}", "{drop_rate: 1.5}", "{depth: 0}", "{embed_dim: 7}",
                     "{num_heads: 0}", "{patch_size: 3}", "{qkv_bias: x}", "{attn_layer: x}"],
    "opt": ["lamb", "muon", "sgd", "adafactor", "lookahead_adam", "kron"],
    "opt_kwargs": ["{betas: [2, 3]}", "{betas: x}", "{eps: -1}", "{momentum: 0.9}", "{foreach: 3}"],
    "sched": ["tanh", "poly", "step", "multistep", "wsd", "none"],
    "sched_kwargs": ["{warmup_lr: x}", "{cycle_mul: 0}", "{decay_milestones: x}", "{k_decay: -1}",
                     "{decay_epochs: 0}", "{min_lr: 5}", "{cooldown_epochs: 3}"],
    "stages": ["[{epoch: 1, img_size: 12}]", "[{epoch: 1, patch_drop_rate: 0.5}]",
               "[{epoch: 1, batch_size: 3}]", "[{epoch: 1, img_size: 9}]", "[{epoch: 1.0}]"],
    "classes": ["[1, 2]", "[1, 1]", "[3]", "[x, 1]", "[-1, 2]"],
    "rand_augment": ["trivial", "n2-m9", "n99-m9", "n2-m99", "autoaugment-cifar10", "n-1-m3"],
    "auto_augment": ["v0", "original", "rand-m9-mstd0.5", "rand-mx", "augmix-m3"],
    "normalize": ["data", "model"], "unreadable": ["skip", "error"],
    "loss": ["bce", "cross_entropy"], "class_weights": ["balanced", "{3: 2}", "{3: x}", "{z: 1}"],
    "img_size": ["12", "7", "4", "16"], "batch_size": ["7", "8", "2000"], "epochs": ["3"],
    "mixed_precision": ["bf16", "fp16"], "num_workers": ["5"], "lr": ["1e30", "1e-30"],
    "in_chans": ["3", "4"], "num_classes": ["12", "3"], "layer_decay": ["0.5", "1e-9"],
    "crop_pad": ["3", "100"], "cutout": ["9", "100"], "max_steps": ["1", "2147483647"],
    "max_seconds": ["1e-9", "1e9"], "clip_grad": ["1e-9"], "model_ema_decay": ["0.9"],
    "teacher": ["vix_softmax.digits"], "align_epochs": ["1"], "teacher_loss": ["{labels: 1}"],
    "replace": ["{mechanism: nystrom_l16}", "{mechanism: x}", "{mechanism: softmax, blocks: 7}"],
    "trackers": ["[wandb]", "[tensorboard]"], "grad_accum_steps": ["3", "2147483647"],
}  # fmt: skip
# The network, another launcher, minutes of compilation, or a choice of its own.
LEFT_OUT = {"model", "data", "data_dir", "download", "compile", "output", "labels"}
BASE = [
    *("train", "--model", "vit_tiny_patch16_224", "--output", "run", "--set"),
    *("model_kwargs={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}", "trackers=[]"),
    *("limit=24", "batch_size=8", "epochs=1", "warmup_epochs=0", "num_workers=0", "max_steps=2"),
]


def draws(count):
    rng = random.Random(20_240_601)
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in LEFT_OUT]
    for number in range(count):
        chosen = rng.sample(names, rng.choice([1, 1, 2, 3]))
        if number < len(names):  # every key at least once
            chosen[0] = names[number]
        settings = [f"{n}={rng.choice(rng.choice([ODD, TELLING.get(n, ODD)]))}" for n in chosen]
        yield settings


def is_huge(setting):
    """Valid, but beyond this test: 2^31 workers, a side of 16,384 pixels."""
    name, _, value = setting.partition("=")
    try:
        return name in ("num_workers", "img_size", "max_steps") and float(value) > 64
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("settings", list(draws(300)), ids=lambda settings: " ".join(settings)[:80])
def test_a_sentence_or_a_result(settings, capsys, monkeypatch, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if any(map(is_huge, settings)):
        pytest.skip("too large to run here")
    code = main([*BASE, *settings])
    said = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "Traceback" not in said.err
    if code:
        assert said.err.splitlines()[-1].startswith("error: ")
        assert len(said.err.splitlines()[-1]) < 1000
    else:
        assert "Results are in run" in said.out
        assert (tmp_path / "run" / "results.json").exists()


def test_the_draws_reach_every_setting():
    reached = {setting.partition("=")[0] for settings in draws(300) for setting in settings}
    assert reached == {field.name for field in dataclasses.fields(Recipe)} - LEFT_OUT
