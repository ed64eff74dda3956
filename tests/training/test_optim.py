"""What the optimiser is told beyond timm's defaults."""

import pytest
import timm.optim.muon
import torch

from timm_xformers.training import optim
from timm_xformers.training.session import open_session


@pytest.mark.parametrize("emulated", [True, False])
def test_muon_computes_in_what_the_processor_has(tiny, monkeypatch, emulated):
    monkeypatch.setattr(optim, "emulates_bf16", lambda device: emulated)
    products = []
    original = torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *a, **k: (products.append(a[0].dtype), original(*a, **k))[1]
    )
    before = timm.optim.muon.zeropower_via_newtonschulz
    try:
        session = open_session(tiny(opt="muon"))
        for parameter in session.trainer.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        session.trainer.optimizer.step()
    finally:
        timm.optim.muon.zeropower_via_newtonschulz = before
    assert set(products) == {torch.float32 if emulated else torch.bfloat16}
