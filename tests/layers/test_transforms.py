"""PyTorch's other tools on every mechanism: torch.func, higher derivatives, checkpoints, export."""

import functools

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from timm_xformers import set_token_layout
from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.performer import PerformerAttention, cpu_blocks

NAMES = [
    "softmax",
    "performer_softmax_m16",
    "performer_exp_m16",
    "performer_relu_m16",
    "performer_gelu_m16",
    "performer_elu_m16",
    "performer_learned_m16",
    "hedgehog",
    "nystrom_l16",
    "nystrom_l16_conv33",
    "agent_a16",
    "linformer_k32",
    "local1d_w16",
    "local2d_w4",
    "local2d_w4_shifted",
    "softmax_dwc",
    "fnet",
]
# PyTorch has no batching rule for its fused attention, and takes one call after another.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
# They run code that the names beside them run.
SLOW_TO_EXPORT = {f"performer_{kernel}_m16" for kernel in ("exp", "gelu", "elu")} | {"nystrom_l16"}
POSITIVE = [name for name in NAMES if "relu" in name or "gelu" in name or "elu" in name]
BLOCKED = [*POSITIVE, "performer_softmax_m16"]


@pytest.fixture
def sizes(request, monkeypatch):
    """What is small enough for the plain form, or what goes in blocks."""
    if request.param == "large":
        for name in ("LEAST_FEATURES", "LEAST_FEATURES_NO_GRAD", "LEAST_EXPONENTIALS"):
            monkeypatch.setattr(cpu_blocks, name, 0)
        monkeypatch.setattr(cpu_blocks, "PIECE_FEATURES", 1)
    return request.param


@pytest.fixture
def unfused():
    """PyTorch's fused attention has no second derivative and no forward mode."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = attention_class(name)(8, 2, dtype=torch.float64, **kwargs)
    if getattr(layer, "needs_layout", False):
        layer.set_layout((5, 5), 0, depth=1)
    return layer


def tokens(B=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(B, 25, 8, generator=rng, dtype=torch.float64)


def cases(large, names=NAMES):
    """Every name at the small size; at the large one those that go in blocks there."""
    pairs = [*((name, "small") for name in names), *((name, "large") for name in large)]
    return pytest.mark.parametrize(("name", "sizes"), pairs, indirect=["sizes"])


@cases(POSITIVE)
def test_reverse_mode(name, sizes):
    layer, x = build(name), tokens().requires_grad_()
    if sizes == "large":
        assert layer.form(x) == "cpu_blocks"
    out = layer(x)
    upstream = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(vjp(layer, x.detach())[1](upstream)[0], expected)
    jacobian = jacrev(lambda x: layer(x)[:, :2].sum(dim=(1, 2)))(x.detach())
    rows = torch.autograd.functional.jacobian(lambda x: layer(x)[:, :2].sum(dim=(1, 2)), x.detach())
    torch.testing.assert_close(jacobian, rows)
    out = layer(x)
    many = torch.randn(3, *out.shape, dtype=out.dtype)
    (batched,) = torch.autograd.grad(out, x, many, is_grads_batched=True, retain_graph=True)
    for given, found in zip(many, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(out, x, given, retain_graph=True)[0], found)


@cases(BLOCKED)
def test_vmap_over_inputs_and_over_models(name, sizes):
    layers = [build(name, seed) for seed in range(3)]
    for seed, layer in enumerate(layers):
        if hasattr(layer, "redraw"):
            layer.redraw(seed)
    batches = torch.stack([tokens(seed=seed) for seed in range(3)])
    for layer in layers[:1]:
        expected = torch.stack([layer(x) for x in batches])
        torch.testing.assert_close(vmap(layer, randomness="error")(batches), expected)
    if name == "fnet":  # nothing to stack
        return
    weights, buffers = stack_module_state(layers)

    def call(weights, buffers, x):
        return functional_call(layers[0], (weights, buffers), (x,))

    expected = torch.stack([layer(batches[0]) for layer in layers])
    torch.testing.assert_close(vmap(call, (0, 0, None))(weights, buffers, batches[0]), expected)
    expected = torch.stack([layer(x) for layer, x in zip(layers, batches, strict=True)])
    torch.testing.assert_close(vmap(call)(weights, buffers, batches), expected)


@cases(BLOCKED, names=NAMES[:-1])
def test_gradients_per_sample(name, sizes):
    layer, x = build(name), tokens(3)
    weights = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(weights, image):
        return (
            functional_call(layer, (weights, dict(layer.named_buffers())), (image[None],))
            .square()
            .sum()
        )

    found = vmap(grad(loss), (None, 0))(weights, x)
    for index, image in enumerate(x):
        layer.zero_grad()
        layer(image[None]).square().sum().backward()
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(found[key][index], parameter.grad)


@cases(BLOCKED)
def test_forward_mode_and_second_derivatives(name, sizes, unfused):
    if name in POSITIVE and sizes == "large":
        set_fused_attn(True)  # blocks have rules of their own
    layer, x, along = build(name), tokens(), tokens(seed=1)
    out, moved = jvp(layer, (x,), (along,))
    step = 1e-6
    numeric = (layer(x + step * along) - layer(x - step * along)) / (2 * step)
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close(moved, numeric, atol=1e-7, rtol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, along))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved)

    rest = tokens(1, seed=2)[:, 1:]

    def first(x):
        given = torch.cat([x[None, None], rest], dim=1)
        return layer(given)[0].square().sum()

    given = x[0, 0]
    torch.testing.assert_close(jacfwd(first)(given), jacrev(first)(given))
    twice = hessian(first)(given)
    torch.testing.assert_close(twice, torch.autograd.functional.hessian(first, given))
    torch.testing.assert_close(twice, jacrev(jacrev(first))(given))


@pytest.mark.parametrize("everything", [False, True], ids=["products", "all"])
@cases(BLOCKED)
def test_selective_checkpoints(name, everything, sizes):
    layer, x = build(name), tokens().requires_grad_()
    layer(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]

    def policy(ctx, operation, *args, **kwargs):
        kept = everything or "mm" in str(operation)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    x.grad = None
    layer.zero_grad()
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(layer, x, use_reentrant=False, context_fn=context)
    out.square().sum().backward()
    for found, other in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW_TO_EXPORT else ()) for n in NAMES]
)
def test_export_with_a_free_batch(name, training):
    layer = build(name).train(training)
    batch = torch.export.Dim.AUTO if training else torch.export.Dim("batch", min=1, max=64)
    with torch.set_grad_enabled(training):
        program = torch.export.export(layer, (tokens(2),), dynamic_shapes=({0: batch},)).module()
    for B in (1, 3, 40):
        torch.testing.assert_close(program(tokens(B)), layer(tokens(B)))


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("performer_relu_m64", True),
        ("nystrom_l16", True),
        ("local1d_w16", False),
        *(
            pytest.param(name, training, marks=pytest.mark.slow)
            for name in (None, "softmax", "performer_softmax_m16", "fnet")
            for training in (False, True)
        ),
    ],
)
def test_export_with_free_batch_height_and_width(name, training):
    """As timm's own ViT, the first case, exports with ``dynamic_img_size``."""
    slot = {} if name is None else {"attn_layer": name}
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=8, num_heads=2, patch_size=4, img_size=32,
        dynamic_img_size=True, **slot,
    ).train(training)  # fmt: skip
    set_token_layout(model)
    # Not below what two windows or all landmarks cover: there, both compute the exact map.
    low = {"nystrom_l16": 4, "local1d_w16": 6}.get(name, 2)
    rows, cols = (4 * torch.export.Dim(side, min=low, max=64) for side in ("rows", "cols"))
    free = {0: torch.export.Dim("batch", min=1, max=64), 2: rows, 3: cols}
    with torch.set_grad_enabled(training):
        program = torch.export.export(model, (torch.randn(2, 3, 32, 24),), dynamic_shapes=(free,))
    exported = program.module()
    for shape in ((1, 3, 32, 32), (3, 3, 40, 24)):
        x = torch.randn(*shape)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_with_a_free_batch(name):
    layer = build(name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for B in (2, 3, 40):
        x, other = (tokens(B).requires_grad_() for _ in range(2))
        out, expected = compiled(x), layer(other)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected.detach())


@pytest.mark.parametrize("sizes", ["small", "large"], indirect=True)
def test_parts_left_out_of_a_projection_still_run(sizes):
    """Offloading and quantisation swap modules: nothing reads their weights past them."""
    for name in NAMES[:-1]:
        layer = build(name)
        x = tokens()
        expected = layer(x)
        for part in ("qkv", "proj"):
            setattr(layer, part, nn.Sequential(getattr(layer, part)))
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", ["vix_performer_relu_m64", "vix_performer_softmax_m32"])
def test_features_as_frozen_parameters(name):
    """What the documentation says for Opacus, which refuses modules with buffers."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=8, depth=2, num_classes=3).eval()
    state, x = model.state_dict(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    for layer in model.modules():
        if isinstance(layer, PerformerAttention):
            features = layer.features
            del layer.features
            layer.features = nn.Parameter(features, requires_grad=False)
    assert not list(model.buffers())
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    model.load_state_dict(state)
    model(x).sum().backward()
    assert model.blocks[0].attn.features.grad is None
