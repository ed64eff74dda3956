"""Figures without computing equal those of real runs and of hand counts; facts equal behaviour."""

import re

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_xformers.errors import UsageError
from timm_xformers.layers.factory import ATTENTION, attention_class
from timm_xformers.planning.catalog import (
    build_empty,
    catalog,
    measure,
    mechanisms,
    our_models,
    saved_bytes,
    select,
)

ONE_OF_EACH = [
    "vix_softmax",
    "vix_performer_softmax_m32",
    "vix_performer_relu_m64",
    "vix_performer_learned_m64",
    "vix_nystrom",
    "vix_linformer",
    "vix_local1d_w64",
    "vix_local2d_w8",
    "vix_fnet",
    "hybrid_vix_softmax",
]


def attention_flops(q, k, v, *args, out_shape=None, **kwargs):
    B, H, N, D = q
    return 2 * B * H * N * k[2] * (D + v[3])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_figures_equal_those_of_a_real_run(name):
    figures = measure(name, build_empty(name, 12), 12, batch_size=3)
    model = timm.create_model(name, img_size=12).train()
    images = torch.randn(3, 3, 12, 12)
    assert figures.activation_mib * 2**20 == saved_bytes(model, images)
    # Some versions of PyTorch (2.5, 2.14) do not count the CPU's fused attention by themselves.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention_flops}) as counter:
        model(images)
    assert figures.gmacs == counter.get_total_flops() / 6e9
    assert figures.params == sum(p.numel() for p in model.parameters())
    assert figures.tokens == model.forward_features(images).shape[1] == 145
    assert figures.attention in ATTENTION


@pytest.mark.parametrize("img_size", [None, 16])
def test_multiply_adds_equal_a_hand_count(img_size):
    figures = measure("vix_softmax", build_empty("vix_softmax", img_size), img_size, batch_size=2)
    pixels, width, hidden = (img_size or 32) ** 2, 128, 256
    N = pixels + 1
    projections = 4 * N * width**2
    attention = 2 * N**2 * width
    mlp = 2 * N * width * hidden
    embedding, head = 3 * pixels * width, 10 * width
    by_hand = 4 * (projections + attention + mlp) + embedding + head
    assert figures.gmacs == pytest.approx(by_hand / 1e9, rel=1e-12)


def test_saved_bytes_equal_a_hand_count():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))
    images = torch.zeros(2, 3, 2, 2)
    # The input, and the relu's output, which two layers keep; no weight, though the second is kept.
    assert saved_bytes(model, images) == 4 * (2 * 12 + 2 * 7)
    assert saved_bytes(nn.BatchNorm2d(3), images) == 4 * (2 * 12 + 3 + 3)  # mean and deviation
    assert saved_bytes(model.requires_grad_(False), images) == 0


def test_memory_grows_linearly_with_the_batch():
    name = "vix_performer_softmax_m32"
    # With one image some transposed maps need no copy, so a line starts at two.
    two, three, six = (
        measure(name, build_empty(name, 8), 8, batch_size).activation_mib * 2**20
        for batch_size in (2, 3, 6)
    )
    assert six - three == 3 * (three - two) > 0
    # What does not depend on the batch, such as scaled random features, is next to nothing.
    assert two == pytest.approx(2 * (three - two), rel=0.01)


@pytest.mark.slow
def test_every_model_is_measured():
    models, refused = catalog()
    assert [model.name for model in models] == our_models()
    assert refused == {}
    assert all(m.gmacs > 0 and m.activation_mib > 0 and m.tokens > 1 for m in models)


def test_selection_is_a_union_in_the_order_of_the_patterns():
    known = ["a1", "a2", "b1", "b2"]
    assert select([], known, "model") == known
    assert select(["b*", "*1", "a2"], known, "model") == ["b1", "b2", "a1", "a2"]
    with pytest.raises(UsageError, match=r"No model of ours matches 'b3' \(nearest: b2, b1\)"):
        select(["a1", "b3"], known, "model")


def test_filters(monkeypatch):
    tagged = ["vix_softmax.digits", "vix_softmax.mnist", "vit_tiny_patch16_224.x"]
    monkeypatch.setattr(timm, "list_pretrained", lambda: tagged)
    patterns = ["vix_softmax", "vix_local2d_w8", "hybrid_vix_softmax"]

    def names(**filters):
        return [model.name for model in catalog(patterns, img_size=8, **filters)[0]]

    assert names(mechanism="local*") == ["vix_local2d_w8"]
    assert names(pretrained=True) == ["vix_softmax"]
    assert names(max_params=538_890) == ["vix_softmax", "vix_local2d_w8"]
    assert catalog(["vix_softmax"], img_size=8)[0][0].weights == ("digits", "mnist")
    with pytest.raises(UsageError, match=r"None of the 3 matching models passes"):
        names(max_params=1000)
    with pytest.raises(UsageError, match=r"No mechanism of ours matches 'nystorm\*' \(nearest: "):
        names(mechanism="nystorm*")


def test_models_that_refuse_a_size_give_their_reason():
    models, refused = catalog(["vix_softmax", "vix_tiny*_nystrom_l64"], img_size=20)
    assert [(model.name, model.img_size, model.tokens) for model in models] == [
        ("vix_softmax", 20, 401)
    ]
    reason = "img_size=20 is not a multiple of patch_size=16; use 16 or 32."
    assert refused == {"vix_tiny_patch16_224_nystrom_l64": reason}


def test_a_batch_that_cannot_be_normalised_is_a_reason(monkeypatch):
    def build(name, **arguments):
        model = timm.create_model(name)
        model.head = nn.BatchNorm1d(128)
        return model, arguments

    monkeypatch.setattr("timm_xformers.planning.catalog.build_model", build)
    models, refused = catalog(["vix_softmax"], batch_size=1)
    assert not models
    assert "Expected more than 1 value per channel" in refused["vix_softmax"]


def layer_of(name, tokens=50):
    torch.manual_seed(0)
    layer = attention_class(name)(32, 4).eval()
    if hasattr(layer, "set_layout"):
        prefix = tokens - int(tokens**0.5) ** 2
        side = int(tokens**0.5)
        layer.set_layout((side, side), prefix, 1)
    return layer


def accepts(layer, **arguments):
    try:
        layer(torch.randn(2, 50, 32), **arguments)
    except ValueError:
        return False
    return True


# Of each mechanism one name with the option, which is the same code for all.
NAMES = [name for name in ATTENTION if not name.endswith("_dwc")]
NAMES += ["softmax_dwc", "performer_softmax_m16_dwc", "performer_learned_m16_dwc"]
NAMES += ["hedgehog_dwc", "nystrom_l16_dwc", "agent_a16_dwc", "linformer_k32_dwc"]
NAMES += ["local1d_w16_dwc", "local2d_w4_dwc"]


@pytest.mark.parametrize("entry", mechanisms(NAMES), ids=lambda entry: entry.name)
def test_facts_about_mechanisms_equal_their_behaviour(entry):
    layer = layer_of(entry.name)
    keys = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    pairs = torch.ones(2, 1, 50, 50, dtype=torch.bool)
    assert accepts(layer, is_causal=True) == entry.causal
    assert accepts(layer, attn_mask=keys) == (entry.masks in ("any", "keys"))
    assert accepts(layer, attn_mask=pairs) == (entry.masks == "any")
    # A layer with a layout takes no other number of tokens exactly if it needs a fixed grid.
    try:
        layer(torch.randn(2, 65, 32))
    except ValueError:
        assert entry.needs_fixed_grid
    else:
        assert not entry.needs_fixed_grid
    settings = dict(entry.settings)
    assert settings.pop("dwc", False) == (getattr(layer, "dwc", None) is not None)
    assert all(getattr(layer, key, value) == value for key, value in settings.items())


def is_exact(name, tokens):
    layer, exact = layer_of(name, tokens), layer_of("softmax")
    weights = layer.state_dict()
    exact.load_state_dict({key: weights[key] for key in exact.state_dict()})
    # Large tokens make a map that is far from uniform.
    x = 3 * torch.randn(1, tokens, 32)
    return torch.allclose(layer(x), exact(x), atol=1e-4)


BOUNDED = [entry for entry in mechanisms(NAMES) if re.search(r"\d", entry.exact_when)]
# Larger settings of a mechanism run the same code.
SMALL = [entry for entry in BOUNDED if max(map(int, re.findall(r"\d+", entry.exact_when))) <= 32]


@pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)
def test_exact_up_to_the_stated_size_and_not_beyond(entry):
    unit, _, limit = re.match(r"(\w+) (<=|==) ([\d* ]+)", entry.exact_when).groups()
    bound = eval(limit)
    if entry.name.startswith("local1d"):
        # Layouts are square; windows of the sequence must cover all of it.
        side = int(bound**0.5)
        within, beyond = side**2, (side + 1) ** 2
    else:
        within, beyond = (bound**2, (bound + 1) ** 2) if unit == "side" else (bound, bound + 1)
    assert is_exact(entry.name, within)
    assert not is_exact(entry.name, beyond)


def test_the_others_are_always_exact_or_never():
    words = {entry.name: entry.exact_when for entry in mechanisms(NAMES) if entry not in BOUNDED}
    limit = "in the limit of many features"
    assert set(words.values()) == {
        "always", "never", limit, "always, untrained", f"{limit}, untrained"
    }  # fmt: skip
    for name, word in words.items():
        if name != "fnet":  # has no weights to compare with
            assert is_exact(name, 16) == word.startswith("always"), name
