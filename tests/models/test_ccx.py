"""CCX: the CCT paper's counts, the authors' checkpoints, positions, pooling, refusals."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)
from timm_xformers.layers import ConvTokenizer, SeqPool
from timm_xformers.layers.positions import sinusoid

GEOMETRIES = ["2_3x2", "4_3x2", "6_3x1", "7_3x1"]
EXPECTED = {
    *("cct", "ccp", "ccn", "ccl"),
    *(f"cc{letter}_{geometry}_32" for letter in "tpnl" for geometry in GEOMETRIES),
    *(f"cc{letter}_14_7x2_224" for letter in "tpn"),
}
# All parameters, ten classes unless said.
COUNTS = [
    ("cct_2_3x2_32", {}, 283_723),
    ("cct_4_3x2_32", {}, 482_123),
    ("cct_6_3x1_32", {}, 3_233_803),
    ("cct_6_3x1_32", {"num_convs": 2}, 3_326_923),
    ("cct_7_3x1_32", {}, 3_760_139),
    ("cct_7_3x1_32", {"num_classes": 100}, 3_783_269),
    ("cct_7_3x1_32", {"num_convs": 2}, 3_853_259),
    (
        "cct_7_3x1_32",
        {"img_size": 224, "conv_kernel": 7, "conv_stride": 2, "num_convs": 2, "num_classes": 102},
        4_573_735,
    ),
    ("cct_14_7x2_224", {}, 22_367_273),
    ("cct_14_7x2_224", {"img_size": 384}, 22_513_193),
]


def small(name="cct_2_3x2_32", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"img_size": 16, **kwargs}).eval()


def images(dtype=torch.float32):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


def published_weights(depth=2, dim=128, mlp_ratio=1, tokens=16):
    """A checkpoint by the authors' names, with random values."""
    rng = torch.Generator().manual_seed(2)
    hidden = dim * mlp_ratio
    shapes = {
        "tokenizer.conv_layers.0.0.weight": (64, 3, 3, 3),
        "tokenizer.conv_layers.1.0.weight": (dim, 64, 3, 3),
        "classifier.positional_emb": (1, tokens, dim),
        "classifier.attention_pool.weight": (1, dim),
        "classifier.attention_pool.bias": (1,),
        "classifier.norm.weight": (dim,),
        "classifier.norm.bias": (dim,),
        "classifier.fc.weight": (10, dim),
        "classifier.fc.bias": (10,),
    }
    for i in range(depth):
        block = f"classifier.blocks.{i}"
        shapes |= {
            f"{block}.pre_norm.weight": (dim,),
            f"{block}.pre_norm.bias": (dim,),
            f"{block}.self_attn.qkv.weight": (3 * dim, dim),
            f"{block}.self_attn.proj.weight": (dim, dim),
            f"{block}.self_attn.proj.bias": (dim,),
            f"{block}.norm1.weight": (dim,),
            f"{block}.norm1.bias": (dim,),
            f"{block}.linear1.weight": (hidden, dim),
            f"{block}.linear1.bias": (hidden,),
            f"{block}.linear2.weight": (dim, hidden),
            f"{block}.linear2.bias": (dim,),
        }
    return {
        name: torch.randn(shape, generator=rng, dtype=torch.float64) / math.prod(shape[1:]) ** 0.5
        for name, shape in shapes.items()
    }


def published_forward(state, x, num_heads=2, depth=2):
    """The CCT paper's model, written down from its formulas on the authors' names."""
    for i in range(2):
        x = F.conv2d(x, state[f"tokenizer.conv_layers.{i}.0.weight"], padding=1)
        x = F.max_pool2d(x.relu(), 3, 2, 1)
    x = x.flatten(2).mT + state["classifier.positional_emb"]
    dim = x.shape[-1]

    def norm(x, name):
        return F.layer_norm(
            x,
            (dim,),
            state[f"classifier.{name}.weight"],
            state[f"classifier.{name}.bias"],
            eps=1e-6,  # the authors have torch's 1e-5, our blocks timm's
        )

    for i in range(depth):
        block = f"classifier.blocks.{i}"
        qkv = F.linear(norm(x, f"blocks.{i}.pre_norm"), state[f"{block}.self_attn.qkv.weight"])
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        out = F.linear(
            mixed.transpose(1, 2).flatten(2),
            state[f"{block}.self_attn.proj.weight"],
            state[f"{block}.self_attn.proj.bias"],
        )
        x = norm(x + out, f"blocks.{i}.norm1")
        hidden = F.linear(x, state[f"{block}.linear1.weight"], state[f"{block}.linear1.bias"])
        x = x + F.linear(
            F.gelu(hidden), state[f"{block}.linear2.weight"], state[f"{block}.linear2.bias"]
        )
    x = norm(x, "norm")
    score = F.linear(
        x, state["classifier.attention_pool.weight"], state["classifier.attention_pool.bias"]
    )
    pooled = (score.softmax(1).mT @ x).squeeze(1)
    return F.linear(pooled, state["classifier.fc.weight"], state["classifier.fc.bias"])


def test_names_are_those_of_the_specification():
    assert set(timm.list_models("cc*")) >= EXPECTED


@pytest.mark.parametrize(("name", "arguments", "count"), COUNTS)
def test_parameters_of_the_cct_paper(name, arguments, count):
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "trainer's"])
@pytest.mark.parametrize("positions", ["learn", "sine"])
def test_the_authors_checkpoints_load_and_mean_the_same(positions, wrap):
    state = published_weights()
    if positions == "sine":
        state["classifier.positional_emb"] = sinusoid(16, 128).double()
    published = {f"module.{k}": v for k, v in state.items()} if wrap else state
    model = timm.create_model(
        "cct_2_3x2_32",
        img_size=16,
        pos_embed=positions,
        pretrained=True,
        pretrained_cfg_overlay={
            "state_dict": {"state_dict": published} if wrap else published,
            "num_classes": 10,
        },
    )
    x = images(torch.float64)
    out = model.double().eval()(x)
    # Weights pass through float32 when they are loaded.
    torch.testing.assert_close(out, published_forward(state, x), rtol=1e-5, atol=1e-5)


def test_the_authors_checkpoints_load_at_another_size_and_for_other_classes():
    overlay = {"state_dict": published_weights(), "num_classes": 10}
    arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 3}
    model = timm.create_model("cct_2_3x2_32", img_size=32, **arguments)
    assert model.pos_embed.shape == (1, 64, 128)
    mean = overlay["state_dict"]["classifier.positional_emb"].mean(1).float()
    torch.testing.assert_close(model.pos_embed.mean(1), mean, rtol=0, atol=0.05)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("letter", "pnl")
def test_exact_weights_load_into_every_letter(letter):
    exact = small("cct_2_3x2_32")
    model = small(f"cc{letter}_2_3x2_32")
    model.load_state_dict(exact.state_dict(), strict=True)
    out = model(images())
    assert out.shape == (2, 10)
    if letter != "p":  # 16 tokens: no more than landmarks or projected keys
        model.eval()
        assert out.isfinite().all()


def test_sinusoid_is_the_authors_formula():
    table = sinusoid(7, 10)[0].double()
    for p in range(7):
        for i in range(10):
            angle = p / 10000 ** (2 * (i // 2) / 10)
            value = math.sin(angle) if i % 2 == 0 else math.cos(angle)
            assert abs(table[p, i] - value) < 1e-6


def test_positions_reach_the_model():
    sine, none = small(pos_embed="sine"), small(pos_embed="none")
    torch.testing.assert_close(sine.pos_embed, sinusoid(16, 128))
    assert "pos_embed" not in sine.state_dict()
    assert "pos_embed" not in dict(sine.named_parameters())
    assert none.pos_embed is None
    none.load_state_dict(sine.state_dict(), strict=True)
    assert (sine(images()) - none(images())).abs().max() > 1e-3
    assert abs(small().pos_embed.detach().std() - 0.2) < 0.02


def test_positions_are_interpolated_to_other_sizes():
    model = small()
    model.pos_embed.data = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 4, 128).flatten(1, 2)
    model.set_input_size((32, 16))
    rows = model.pos_embed.detach().reshape(8, 4, 128)[:, 0, 0]
    assert rows.shape == (8,)
    assert (rows.diff() > 0).all(), "twice as many rows, in the same order"
    assert model(torch.randn(1, 3, 32, 16)).shape == (1, 10)


def test_pooling_is_a_convex_combination_with_the_scores_weights():
    torch.manual_seed(0)
    pool = SeqPool(6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    weight = torch.stack(
        [(x[b] @ pool.score.weight[0] + pool.score.bias).softmax(0) for b in (0, 1)]
    )
    torch.testing.assert_close(pool(x), torch.einsum("bn,bnc->bc", weight, x))


def test_pooling_can_be_changed_and_is_the_features_end():
    model = small()
    model.reset_classifier(4, "avg")
    assert model.attn_pool is None
    assert model(images()).shape == (2, 4)
    assert small(global_pool="avg").attn_pool is None


@pytest.mark.parametrize("side", [7, 15, 16, 28, 32, 33])
@pytest.mark.parametrize("settings", [(1, 3, 1, 2), (2, 3, 1, 2), (2, 7, 2, 2), (3, 3, 1, 1)])
def test_tokenizer_knows_its_grid(side, settings):
    convs, kernel, stride, pool = settings
    tokens = ConvTokenizer(
        img_size=(side, 2 * side),
        embed_dim=8,
        hidden_chans=4,
        num_convs=convs,
        kernel_size=kernel,
        stride=stride,
        pool_stride=pool,
    )
    grid = tokens.embed(torch.zeros(1, 3, side, 2 * side))
    assert grid.shape[-2:] == tokens.grid_size
    assert tokens.num_patches == grid.shape[-2] * grid.shape[-1]
    assert tokens.feat_ratio() == (stride * pool) ** convs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patch_size": 4}, TypeError, r"no place for patch_size"),
        ({"init_values": 1e-5}, TypeError, r"no place for init_values"),
        ({"dynamic_img_pad": True}, ValueError, r"does not pad"),
        ({"attn_layer": "nystrom_l17"}, ValueError, r"Unknown attention 'nystrom_l17'"),
        ({"depht": 3}, TypeError, r"depht"),
    ],
)
def test_refusals_say_what_to_do(arguments, error, message):
    with pytest.raises(error, match=message):
        small(**arguments)


def test_changing_patches_is_refused():
    with pytest.raises(ValueError, match="patch_size=2 means nothing to this tokenizer"):
        small().set_input_size(patch_size=2)
