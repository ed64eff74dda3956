"""The sixteen rows of arXiv:2107.02239, built by arguments, against its printed columns.

``printed`` is the paper's parameter column but for two figures misprinted by one digit, ``size``
its size column in MB; both are outputs of torchsummary 1.5.1 on modules cut as in the paper's
libraries (paper_views.py). ``all`` is the sum over parameters(): the column leaves out bare
parameters (positions, class token, sequence projections) and counts Performer trunks twice.
"""

import contextlib
import io
import re
from typing import Any, NamedTuple

import pytest
import timm
import torch

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)

from .paper_views import CCXView, LeViXView, ViXView, read


class Row(NamedTuple):
    name: str
    arguments: dict[str, Any]
    printed: int
    size: float
    all: int


FEATURES = {"attn_kwargs": {"num_features": 110}, "qkv_bias": True}
ONE_KV_HEAD = {"attn_kwargs": {"one_kv_head": True, "share_kv": True}}
VIT = {"attn_head_dim": 64}
VIP = {**FEATURES, "mlp_ratio": 4.0}
VIN = {"attn_head_dim": 64, "mlp_ratio": 4.0}
HYBRID = {"stem_act": False}
LEVIT = {"norm": "attention", "stem_act": False, "act_layer": "gelu", "pos_embed": "none"}
LEVIP = {**LEVIT, "norm": "none"}
CCN = {"num_heads": 8, "attn_head_dim": 32}

ROWS = {
    "ViT": Row("vix_softmax", VIT, 792_586, 222.40, 923_914),
    "ViP": Row("vix_performer_softmax_m128", VIP, 1_588_234, 218.30, 926_474),
    "ViL": Row("vix_linformer", {"mlp_ratio": 4.0}, 793_610, 106.16, 1_449_738),
    "ViN": Row("vix_nystrom", VIN, 1_056_282, 124.64, 1_187_610),
    # The paper prints 885,332.
    "hybrid ViT": Row("hybrid_vix_softmax", VIT | HYBRID, 885_322, 224.48, 1_016_650),
    "hybrid ViP": Row(
        "hybrid_vix_performer_softmax_m32", VIP | HYBRID, 1_680_970, 220.38, 1_019_210
    ),
    "hybrid ViL": Row(
        "hybrid_vix_linformer",
        ONE_KV_HEAD | HYBRID | {"mlp_ratio": 4.0},
        771_658,
        100.80,
        1_165_386,
    ),
    "hybrid ViN": Row("hybrid_vix_nystrom", VIN | HYBRID, 1_149_018, 126.72, 1_280_346),
    "LeViT": Row("levit_1stage", LEVIT, 624_970, 213.15, 624_970),
    # The paper prints 662,410, which would make 77.29 MB of its 77.14.
    "LeViP": Row("levip", LEVIP | FEATURES, 622_410, 77.14, 622_410),
    "LeViL": Row("levil", LEVIP | ONE_KV_HEAD, 506_186, 69.69, 768_330),
    "LeViN": Row("levin", LEVIT, 625_498, 89.15, 625_498),
    "CCT": Row("cct", {}, 905_547, 225.47, 1_036_619),
    "CCP": Row("ccp", FEATURES, 907_083, 101.48, 1_038_155),
    "CCL": Row("ccl", ONE_KV_HEAD, 790_859, 94.04, 1_184_075),
    "CCN": Row("ccn", CCN, 1_168_747, 118.48, 1_299_819),
}


def build(row, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(ROWS[row].name, **ROWS[row].arguments, **kwargs).eval()


def view(row, model):
    kinds = {"V": ViXView, "h": ViXView, "L": LeViXView, "C": CCXView}
    return kinds[row[0]](model).eval()


@pytest.mark.parametrize("row", ROWS)
def test_parameters_and_size_digit_for_digit(row):
    model = build(row)
    assert sum(p.numel() for p in model.parameters()) == ROWS[row].all
    parameters, size = read(view(row, model))
    assert parameters == ROWS[row].printed
    assert f"{size:.2f}" == f"{ROWS[row].size:.2f}"


@pytest.mark.parametrize("row", ROWS)
def test_torchsummary_prints_the_papers_figures(row):
    torchsummary = pytest.importorskip("torchsummary", reason="needs the extra test")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        torchsummary.summary(view(row, build(row)), (3, 32, 32), batch_size=1, device="cpu")
    parameters = re.search(r"Total params: ([\d,]+)", out.getvalue())[1]
    size = re.search(r"Estimated Total Size \(MB\): ([\d.]+)", out.getvalue())[1]
    assert int(parameters.replace(",", "")) == ROWS[row].printed
    assert float(size) == ROWS[row].size


@pytest.mark.parametrize("row", ROWS)
def test_the_model_computes_what_the_papers_modules_compute(row):
    model = build(row, img_size=16).double()
    for parameter in model.parameters():  # away from zeros and from identities at the start
        parameter.data += 0.05 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), view(row, model)(x), rtol=1e-6, atol=1e-7)
