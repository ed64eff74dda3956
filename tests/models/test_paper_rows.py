"""The eight ViX rows of arXiv:2107.02239, built by arguments, against its printed parameter counts.

The paper's column is what torchsummary 1.5.1 prints: the weights and biases of every hooked module
once per registration, without bare parameters (positions, class token, sequence projections). Its
Performer rows come from a library whose helper object holds the trunk a second time, so that every
module of the trunk is hooked, and counted, twice. One figure is misprinted by one digit.
"""

import contextlib
import io
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)

VIP = {"attn_kwargs": {"num_features": 110}, "qkv_bias": True, "mlp_ratio": 4.0}
VIN = {"attn_head_dim": 64, "mlp_ratio": 4.0}
# Printed: the paper's figure where it is not a misprint. All: the sum over parameters().
ROWS = {
    "ViT": SimpleNamespace(
        name="vix_softmax", arguments={"attn_head_dim": 64}, printed=792_586, all=923_914
    ),
    "ViP": SimpleNamespace(
        name="vix_performer_softmax_m128", arguments=VIP, printed=1_588_234, all=926_474
    ),
    "ViL": SimpleNamespace(
        name="vix_linformer", arguments={"mlp_ratio": 4.0}, printed=793_610, all=1_449_738
    ),
    "ViN": SimpleNamespace(name="vix_nystrom", arguments=VIN, printed=1_056_282, all=1_187_610),
    "hybrid ViT": SimpleNamespace(
        name="hybrid_vix_softmax",
        arguments={"attn_head_dim": 64, "stem_act": False},
        printed=885_322,  # the paper prints 885,332
        all=1_016_650,
    ),
    "hybrid ViP": SimpleNamespace(
        name="hybrid_vix_performer_softmax_m32",
        arguments={**VIP, "stem_act": False},
        printed=1_680_970,
        all=1_019_210,
    ),
    "hybrid ViL": SimpleNamespace(
        name="hybrid_vix_linformer",
        arguments={
            "attn_kwargs": {"one_kv_head": True, "share_kv": True},
            "mlp_ratio": 4.0,
            "stem_act": False,
        },
        printed=771_658,
        all=1_165_386,
    ),
    "hybrid ViN": SimpleNamespace(
        name="hybrid_vix_nystrom",
        arguments={**VIN, "stem_act": False},
        printed=1_149_018,
        all=1_280_346,
    ),
}
# Each counted once, the Performer trunks too.
ONCE = {"ViP": 795_146, "hybrid ViP": 887_882}


def build(row):
    return timm.create_model(ROWS[row].name, **ROWS[row].arguments).eval()


def weights_and_biases(module):
    return sum(
        p.numel()
        for n, p in module.named_parameters()
        if n.rsplit(".", 1)[-1] in ("weight", "bias")
    )


class TrunkHeldTwice(nn.Module):
    """The model of a row whose library registers the trunk under two parents."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.helper = model.blocks

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("row", ROWS)
def test_parameters_digit_for_digit(row):
    model = build(row)
    assert sum(p.numel() for p in model.parameters()) == ROWS[row].all
    count = weights_and_biases(model)
    if row in ONCE:
        assert count == ONCE[row]
        count += weights_and_biases(model.blocks)
    assert count == ROWS[row].printed
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("row", ROWS)
def test_torchsummary_prints_the_papers_figure(row):
    torchsummary = pytest.importorskip("torchsummary", reason="needs the extra test")
    model = build(row)
    if row in ONCE:
        model = TrunkHeldTwice(model)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        torchsummary.summary(model, (3, 32, 32), batch_size=1, device="cpu")
    printed = re.search(r"Total params: ([\d,]+)", out.getvalue())
    assert int(printed[1].replace(",", "")) == ROWS[row].printed
