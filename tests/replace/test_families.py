"""Every family: exact attention equals the original on its weights; a refusal changes nothing."""

import pytest
import torch

from tests.replace.families import FAMILIES, REFUSED, draw, images
from timm_xformers.replace import attention_sites, replace_attention, restore_attention


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_attention_equals_the_original(name):
    model = draw(FAMILIES[name])
    x = images(model)
    before = model(x)
    weights = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    sites = attention_sites(model)
    classes = [type(site.module) for site in sites]
    report = replace_attention(model, "softmax")
    assert [row.replaced for row in report.rows] == [True] * len(sites)
    assert len(sites) >= 2
    assert all(type(s.module) not in classes for s in attention_sites(model))
    after = model(x)
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)

    kept = dict(model.named_parameters())
    assert kept.keys() == weights.keys()
    for n, (parameter, value) in weights.items():
        assert kept[n] is parameter, n
        assert torch.equal(parameter, value), n

    used = torch.autograd.grad(before.square().sum(), kept.values(), allow_unused=True)
    ours = torch.autograd.grad(after.square().sum(), kept.values(), allow_unused=True)
    for n, theirs, own in zip(kept, used, ours, strict=True):
        assert (theirs is None) == (own is None), n
        if own is not None:
            torch.testing.assert_close(own, theirs, atol=1e-9, rtol=1e-9)

    assert restore_attention(model) == len(sites)
    assert [type(site.module) for site in attention_sites(model)] == classes
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_mechanism_trains(name):
    model = draw(FAMILIES[name])
    x = images(model)
    before = model(x)
    replace_attention(model, "performer_learned_m16")
    out = model(x)
    assert out.shape == before.shape
    assert out.isfinite().all()
    assert not torch.allclose(out, before)
    (out.square().sum()).backward()
    for n, parameter in model.named_parameters():
        if "feature_net" in n:
            assert parameter.grad.abs().sum() > 0, n
    restore_attention(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_and_left_alone(name):
    build, words = REFUSED[name]
    model = build()
    modules = {n: id(m) for n, m in model.named_modules()}
    state = {n: (id(v), v.clone()) for n, v in model.state_dict(keep_vars=True).items()}
    draws = torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        replace_attention(model, "performer_softmax_m16")
    assert torch.equal(torch.get_rng_state(), draws)
    assert {n: id(m) for n, m in model.named_modules()} == modules
    now = model.state_dict(keep_vars=True)
    assert now.keys() == state.keys()
    assert all(id(now[n]) == i and torch.equal(now[n], v) for n, (i, v) in state.items())
