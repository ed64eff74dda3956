"""Batches cut into slices give what whole ones give."""

import pytest
import torch

from timm_xformers.layers import slices
from timm_xformers.layers.factory import attention_class

NAMES = ["softmax", "performer_relu_m16", "performer_softmax_m16", "nystrom_l16_conv33"]
NAMES += ["linformer_k32", "local1d_w16", "local2d_w4"]
IMAGE = 50 * 3 * 32 * 8  # bytes of an image's queries, keys and values below


@pytest.fixture
def small(monkeypatch):
    """Two images and a half are too large, a slice holds two."""
    monkeypatch.setattr(slices, "_large", 5 * IMAGE // 2)
    monkeypatch.setattr(slices, "_SLICE", 2 * IMAGE)


def run(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_whole_batch(name, small, monkeypatch):
    torch.manual_seed(0)
    layer = attention_class(name)(32, num_heads=4, qkv_bias=True).double()
    x = torch.randn(7, 50, 32, dtype=torch.float64)
    assert [len(part) for part in slices.cut_batch(x, 96)] == [2, 2, 2, 1]
    cut = run(layer, x)
    monkeypatch.setattr(slices, "_large", slices._LARGE)
    assert len(slices.cut_batch(x, 96)) == 1
    for ours, whole in zip(cut, run(layer, x), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-12, rtol=1e-9)


def test_only_where_it_helps(small):
    x = torch.randn(7, 50, 32, dtype=torch.float64)
    assert len(slices.cut_batch(x[:2], 96)) == 1
    assert len(slices.cut_batch(x.to("meta"), 96)) == 1
    # An image that is larger than a slice stays whole, and shapes without images or tokens pass.
    assert [len(part) for part in slices.cut_batch(x, 9600)] == [1] * 7
    assert len(slices.cut_batch(x[:0], 96)) == len(slices.cut_batch(x[:, :0], 96)) == 1
    compiled = torch.compile(lambda x: len(slices.cut_batch(x, 96)) * x, backend="eager")
    torch.testing.assert_close(compiled(x), x)


def test_batches_stay_whole_where_freed_memory_is_kept(small):
    x = torch.randn(7, 50, 32, dtype=torch.float64)
    slices.keep_batches_whole()
    assert len(slices.cut_batch(x, 96)) == 1
