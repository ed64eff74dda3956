"""What every mechanism promises, whatever its formula: one table, the same tests for all."""

import copy
import pickle

import pytest
import torch

from timm_xformers.layers.factory import ATTENTION, attention_class

# One named setting of each kind that has code of its own.
NAMES = [
    "softmax",
    "performer_softmax_m32",
    "performer_exp_m32",
    "performer_relu_m32",
    "performer_gelu_m32",
    "performer_elu_m32",
    "performer_learned_m32",
    "hedgehog",
    "nystrom_l16",
    "nystrom_l16_conv33",
    "agent_a16",
    "linformer_k32",
    "local1d_w16",
    "local2d_w4",
    "softmax_dwc",
    "fnet",
]
# They take seconds to trace, and run code that the names beside them run.
SLOW_TO_TRACE = {f"performer_{kernel}_m32" for kernel in ("exp", "gelu", "elu")} | {"nystrom_l16"}
WITH_HEADS = [name for name in NAMES if name != "fnet"]
ANY_ORDER = ["softmax", "hedgehog", *(n for n in NAMES if n.startswith("performer"))]
CAUSAL = [n for n in WITH_HEADS if n in ANY_ORDER or n.startswith("local")]
PAIRWISE = ["softmax", *(n for n in WITH_HEADS if n.startswith("local"))]


def tell(layer, N):
    """Some have to know the grid: here a square behind as many prefix tokens as are left."""
    if getattr(layer, "needs_layout", False):
        side = int(N**0.5)
        layer.set_layout((side, side), N - side * side)
    return layer


def build(name, dim=32, num_heads=4, *, N=50, **kwargs):
    torch.manual_seed(0)
    return tell(attention_class(name)(dim, num_heads, **kwargs), N)


def tokens(N, B=2, dim=32, seed=0, dtype=torch.float32):
    return torch.randn(B, N, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def key_mask(kind, B, N):
    """None, right padding, or padding beside one image that is masked entirely."""
    if kind == "none":
        return None
    mask = torch.ones(B, 1, 1, N, dtype=torch.bool)
    mask[0, ..., (N + 1) // 2 :] = False
    if kind == "one-image-masked":
        mask[-1] = False
    return mask


@pytest.mark.parametrize("kind", ["none", "one-image-masked"])  # the second has padding, too
@pytest.mark.parametrize("N", [1, 17, 197, pytest.param(1025, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1e-3, pytest.param(1.0, marks=pytest.mark.slow), 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WITH_HEADS)
def test_finite_forward_and_backward(name, dtype, scale, N, kind):
    layer = build(name, N=N).to(dtype)
    rng = torch.Generator().manual_seed(1)
    q, k, v = (
        (scale * torch.randn(2, 4, N, 8, generator=rng)).to(dtype).requires_grad_()
        for _ in range(3)
    )
    out = layer.mix(q, k, v, key_mask(kind, 2, N), False)
    assert out.dtype == dtype
    assert out.isfinite().all()
    # Loss scaling, as float16 training has it: values of 1e3 times a unit gradient, summed over
    # tokens for a weight, pass 65,504 by their true size.
    upstream = torch.randn(out.shape, generator=rng) / max(scale, 1.0)
    out.backward(upstream.to(dtype))
    for tensor in (q, k, v, *layer.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    if kind == "one-image-masked" and "conv" not in name:
        assert (out[-1] == 0).all(), "a query without keys gives zeros"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_finite_under_autocast(name, dtype, scale):
    layer = build(name, N=65)
    x = (scale * tokens(65)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    (out.float() / max(scale, 1.0)).square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (x, *layer.parameters()) if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_near_float32(name, dtype):
    layer = build(name, N=65).eval()
    x = tokens(65)
    with torch.no_grad():
        wide = layer(x)
        with torch.autocast("cpu", dtype=dtype):
            narrow = layer(x).float()
    assert (narrow - wide).norm() / wide.norm() < 0.03


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name, training):
    layer = build(name).train(training)
    x = tokens(50, B=3)
    other = x.clone()
    other[1:] = 100 * tokens(50, B=2, seed=9)
    assert torch.equal(layer(x)[0], layer(other)[0])


@pytest.mark.parametrize("name", NAMES)
def test_batch_of_one_agrees_and_repeats_bit_for_bit(name):
    layer = build(name).eval()
    x = tokens(50, B=7)
    out = layer(x)
    assert torch.equal(out, layer(x))
    torch.testing.assert_close(out[:1], layer(x[:1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ANY_ORDER)
def test_permuting_tokens_permutes_the_result(name):
    layer = build(name).double().eval()
    x = tokens(37, dtype=torch.float64)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))


@pytest.mark.parametrize(
    "name", ["nystrom_l16", "agent_a16", "linformer_k32", "local1d_w16", "fnet"]
)
def test_the_others_do_depend_on_order(name):
    layer = build(name).double().eval()
    x = tokens(50, dtype=torch.float64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert (layer(x)[:, order] - layer(x[:, order])).abs().max() > 1e-3


@pytest.mark.parametrize("name", WITH_HEADS)
def test_masked_tokens_never_reach_the_others(name):
    layer = build(name).double().eval()
    x = tokens(50, dtype=torch.float64)
    mask = key_mask("padding", 2, 50)
    keep = mask[:, 0, 0].unsqueeze(-1)
    changed = torch.where(keep, x, 7 * tokens(50, seed=5, dtype=torch.float64))
    torch.testing.assert_close(
        layer(x, attn_mask=mask) * keep, layer(changed, attn_mask=mask) * keep
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_hides_the_future(name):
    layer = build(name).double().eval()
    x = tokens(50, dtype=torch.float64)
    changed = x.clone()
    changed[:, 30:] = tokens(20, seed=5, dtype=torch.float64)
    a, b = layer(x, is_causal=True), layer(changed, is_causal=True)
    torch.testing.assert_close(a[:, :30], b[:, :30])
    assert (a[:, 30:] - b[:, 30:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in NAMES if n not in CAUSAL])
def test_the_others_refuse_to_be_causal(name):
    with pytest.raises(ValueError, match="is_causal"):
        build(name)(tokens(17), is_causal=True)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PAIRWISE])
def test_mechanisms_without_a_map_refuse_masks_of_pairs(name):
    with pytest.raises(ValueError, match=r"attn_mask"):
        build(name, N=17)(tokens(17), attn_mask=torch.ones(2, 1, 17, 17, dtype=torch.bool))


@pytest.mark.parametrize("name", WITH_HEADS)
def test_every_parameter_gets_a_gradient(name):
    layer = build(name, qkv_bias=True)
    layer(tokens(50)).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        if key != "qkv.bias":  # a bias on keys cancels in softmax, up to rounding
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_takes_the_arguments_of_timms_slot(name):
    layer = build(
        name,
        N=17,
        dim=40,
        num_heads=5,
        qkv_bias=True,
        qk_norm=True,
        scale_norm=True,
        proj_bias=False,
        proj_drop=0.1,
        norm_layer=torch.nn.LayerNorm,
    )
    assert layer(tokens(17, dim=40)).shape == (2, 17, 40)
    with pytest.raises(TypeError):
        build(name, num_head=4)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_head_dim_is_free_of_dim(name):
    layer = build(name, N=17, attn_head_dim=16, dim_out=24)
    assert layer.qkv.out_features == 3 * 4 * 16
    assert layer(tokens(17)).shape == (2, 17, 24)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_loads_weights_of_exact_attention_and_says_what_it_kept(name, caplog):
    exact = build("softmax", qkv_bias=True)
    layer = build(name, qkv_bias=True)
    own = {k for k in layer.state_dict() if k not in exact.state_dict()}
    torch.nn.init.ones_(exact.qkv.weight)
    torch.nn.ModuleDict({"attn": layer}).load_state_dict(
        {f"attn.{k}": v for k, v in exact.state_dict().items()}, strict=True
    )
    assert torch.equal(layer.qkv.weight, exact.qkv.weight)
    assert ("initial values are kept" in caplog.text) == bool(own)
    assert all(key in caplog.text for key in own)


def test_a_checkpoint_with_some_of_the_own_parts_missing_is_refused():
    layer = build("linformer_k32")
    damaged = layer.state_dict()
    del damaged["proj_v"]
    with pytest.raises(RuntimeError, match="proj_v"):
        layer.load_state_dict(damaged)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    layer = build(name, N=17).eval()
    x = tokens(17)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))


def test_bound_classes_are_shared_and_take_overrides():
    assert attention_class("nystrom_l64") is attention_class("nystrom_l64")
    layer = attention_class("performer_softmax_m64", num_features=110)(32, 4)
    assert layer.features.shape == (110, 8)
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    with pytest.raises(
        ValueError, match=r"Unknown attention 'nystrom_64'; did you mean nystrom_l64"
    ):
        attention_class("nystrom_64")


# The option is the same code for every mechanism (test_depthwise.py).
@pytest.mark.parametrize("name", [n for n in ATTENTION if not n.endswith("_dwc")])
def test_every_name_builds_and_runs(name):
    layer = build(name, N=65)
    if name.endswith("_shifted"):
        layer.set_layout((8, 8), 1, depth=1)
    assert layer(tokens(65)).shape == (2, 65, 32)


@pytest.mark.parametrize("name", NAMES)
def test_fx_graphs_and_batches_of_no_images(name):
    layer = build(name).eval()
    graph = torch.fx.symbolic_trace(layer, {"attn_mask": None, "is_causal": False})
    for B in (2, 3):
        torch.testing.assert_close(graph(tokens(50, B)), layer(tokens(50, B)))
    x = tokens(50, B=0).requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 50, 32)


# A trace is of one length by its nature, and says so.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NAMES)
def test_script_and_trace(name):
    layer = build(name).eval()
    x = tokens(50)
    expected = layer(x)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)


# Models of these are compiled in tests/models.
IN_MODELS = {"softmax", "performer_relu_m32", "linformer_k32", "local1d_w16"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in SLOW_TO_TRACE | IN_MODELS else ())
        for n in NAMES
    ],
)
def test_compiled_whole(name):
    """Exported they are in test_transforms, at any batch size."""
    layer = build(name).eval()
    x = tokens(50)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_then_reset(name):
    with torch.device("meta"):
        layer = tell(attention_class(name)(32, 4), 17)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(2, 17, 32, device="meta")).shape == (2, 17, 32)
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    reference = build(name)
    for key, value in layer.named_buffers():
        assert torch.equal(value, reference.get_buffer(key)), key
    assert layer(tokens(17)).isfinite().all()
