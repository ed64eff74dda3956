"""When the fused kernels are chosen; whether they are right, `agreement` shows in processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_xformers.layers.performer import PerformerAttention, orthogonal_directions
from timm_xformers.layers.performer.triton import choice, fits

HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[4]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def start(command, **environ):
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command],
        env={**inherited, "PYTHONPATH": paths, **environ},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
    )


def agree(tier, name="agreement.py", **environ):
    command = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", tier, str(HERE / name)]
    result = start(command, **environ)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@needs_triton
def test_in_the_interpreter():
    agree("not slow", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter_at_length():
    agree("slow", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_through_the_compiler():
    agree("slow", name="compiled.py")


@pytest.mark.gpu
def test_on_a_gpu():
    agree("slow or not slow")


@pytest.fixture
def arguments(monkeypatch):
    """A case that the kernels take, were there a GPU."""
    monkeypatch.setattr(choice, "MIN_TOKENS", 34)
    monkeypatch.setattr(choice, "shared_memory", lambda *device: 2**17)
    monkeypatch.setattr(choice, "use_fused_attn", lambda experimental: experimental)
    q, k, v = torch.randn(3, 2, 2, 17, 32).unbind(0)
    return {
        "q": q,
        "k": k,
        "v": v,
        "projection": orthogonal_directions(16, 32, seed=0),
        "attn_mask": None,
        "is_causal": False,
    }


def test_what_the_kernels_take(arguments, monkeypatch):
    assert fits(**arguments)
    assert fits(**{**arguments, "attn_mask": torch.ones(2, 1, 1, 17, dtype=torch.bool)})
    q, k, v = (arguments[name] for name in "qkv")
    wide = orthogonal_directions(128, 32, seed=0)
    narrow = {name: arguments[name].bfloat16() for name in "qkv"}
    assert fits(**{**arguments, **narrow, "projection": wide})
    others = [
        {"is_causal": True},
        {"q": q.double(), "k": k.double()},
        {"v": v.double()},
        {"q": q.bfloat16()},
        {"q": q[..., :24], "k": k[..., :24]},
        {"v": v[..., :20]},
        {"projection": wide},
        {**narrow, "projection": orthogonal_directions(129, 32, seed=0)},
        {"projection": torch.randn(16, 32).requires_grad_()},
        {"attn_mask": torch.ones(2, 2, 1, 17, dtype=torch.bool)},
        {"attn_mask": torch.ones(17, 17, dtype=torch.bool)},
        {"attn_mask": torch.zeros(2, 1, 1, 17).requires_grad_()},
        {"q": q[:1], "k": k[:1], "v": v[:1]},
    ]
    for other in others:
        assert not fits(**{**arguments, **other}), other.keys()
    monkeypatch.setattr(choice, "shared_memory", lambda *device: 16 * 32 * 36 - 1)
    assert not fits(**arguments)
    monkeypatch.setattr(choice, "shared_memory", lambda *device: 0)
    assert not fits(**arguments)


def test_never_on_the_cpu_or_another_device():
    choice.shared_memory.cache_clear()
    assert not choice.shared_memory("meta", None)
    assert not choice.shared_memory("mps", 0)
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert not choice.shared_memory("cpu", None)


def test_old_gpus_stay_plain(monkeypatch):
    choice.shared_memory.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not choice.shared_memory("cuda", 0)


def test_without_triton_plain_pytorch_runs_in_silence(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "timm_xformers.layers.performer.triton.blocks", raising=False)
    monkeypatch.delattr("timm_xformers.layers.performer.triton.blocks", raising=False)
    monkeypatch.setattr(choice, "MIN_TOKENS", 1)
    choice.shared_memory.cache_clear()
    layer = PerformerAttention(32, 2, num_features=16)
    assert layer(torch.randn(2, 17, 32)).shape == (2, 17, 32)
    assert not choice.shared_memory("cpu", None)
    assert not caplog.records
    choice.shared_memory.cache_clear()
