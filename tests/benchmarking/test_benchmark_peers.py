"""Other packages' layers give what ours give from equal weights, where they compute the same."""

import pytest
import torch

from timm_xformers.benchmarking.peers import PEERS, Dims, Unfit, build_peer, peers_of
from timm_xformers.layers.factory import attention_class

# Imports of other packages; their warnings are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
WIDE = Dims(dim=32, num_heads=2, head_dim=32, tokens=64)
EQUAL = Dims(dim=32, num_heads=2, head_dim=16, tokens=64)


def pair(package, name, dims, **layout):
    """Ours and theirs, with our projections in theirs; the peer's own layer beside it."""
    torch.manual_seed(0)
    peer = next(peer for peer in PEERS if peer.package == package)
    pytest.importorskip(peer.module, reason="needs the extra bench", exc_type=ImportError)
    ours = attention_class(name)(dims.dim, dims.num_heads, attn_head_dim=dims.head_dim)
    if layout:
        ours.set_layout(**layout)
    theirs = build_peer(package, name, dims)
    return ours, theirs, theirs.layer


@torch.no_grad()
def same(ours, theirs, dims, rtol):
    x = torch.randn(2, dims.tokens, dims.dim)
    expected = ours(x)
    error = (theirs(x) - expected).norm() / expected.norm()
    assert error < rtol


@torch.no_grad()
def copy_separate(ours, q, k, v, out):
    for linear, weight in zip((q, k, v), ours.qkv.weight.chunk(3), strict=True):
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.zero_()
    out.load_state_dict(ours.proj.state_dict())


@pytest.mark.parametrize(("kernel", "rtol"), [("relu", 2e-6), ("elu", 1e-5), ("softmax", 2e-2)])
def test_performer(kernel, rtol):
    ours, theirs, layer = pair("performer-pytorch", f"performer_{kernel}_m64", WIDE)
    copy_separate(ours, layer.to_q, layer.to_k, layer.to_v, layer.to_out)
    layer.fast_attention.projection_matrix.copy_(ours.features)
    same(ours, theirs, WIDE, rtol)  # softmax: they add 1e-4 to every feature


@pytest.mark.parametrize("name", ["nystrom_l16", "nystrom_l16_conv33"])
def test_nystrom(name):
    ours, theirs, layer = pair("nystrom-attention", name, WIDE)
    with torch.no_grad():
        layer.to_qkv.weight.copy_(ours.qkv.weight)
        layer.to_out[0].load_state_dict(ours.proj.state_dict())
        if ours.conv is not None:
            layer.res_conv.weight.copy_(ours.conv.weight)
    same(ours, theirs, WIDE, 2e-2)  # their inverse starts from a scale of the whole batch


def test_nystromformer():
    ours, theirs, layer = pair("transformers", "nystrom_l16_conv33", EQUAL)
    inner = layer.layer
    copy_separate(ours, inner.query, inner.key, inner.value, layer.proj)
    with torch.no_grad():
        inner.conv.weight.copy_(ours.conv.weight)
    same(ours, theirs, EQUAL, 2e-2)


def test_linformer():
    ours, theirs, layer = pair(
        "linformer", "linformer_k32", WIDE, grid_size=(8, 8), num_prefix_tokens=0
    )
    copy_separate(ours, layer.to_q, layer.to_k, layer.to_v, layer.to_out)
    with torch.no_grad():
        for name in ("proj_k", "proj_v"):
            getattr(ours, name).copy_(getattr(layer, name).T)
    same(ours, theirs, WIDE, 2e-6)


def test_local_1d():
    layout = {"grid_size": (1, WIDE.tokens), "num_prefix_tokens": 0}
    ours, theirs, layer = pair("local-attention", "local1d_w16", WIDE, **layout)
    with torch.no_grad():
        layer.qkv.load_state_dict(ours.qkv.state_dict())
        layer.proj.load_state_dict(ours.proj.state_dict())
    same(ours, theirs, WIDE, 2e-6)


@pytest.mark.parametrize("package", ["timm-swin", "natten"])
def test_windows(package):
    layout = {"grid_size": (8, 8), "num_prefix_tokens": 0}
    ours, theirs, layer = pair(package, "local2d_w4_shifted", EQUAL, **layout)
    inner = layer.attn if package == "timm-swin" else layer.layer
    with torch.no_grad():
        inner.qkv.load_state_dict(ours.qkv.state_dict())
        inner.proj.load_state_dict(ours.proj.state_dict())
        if package == "timm-swin":
            inner.relative_position_bias_table.zero_()
    same(ours, theirs, EQUAL, 2e-6)


def test_what_a_peer_cannot_do_is_a_reason():
    odd = Dims(dim=32, num_heads=2, head_dim=16, tokens=65)
    with pytest.raises(Unfit, match="65 tokens are no square grid of 4x4 windows"):
        build_peer("timm-swin", "local2d_w4_shifted", odd)
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    layer = build_peer("timm-swin", "local2d_w4_shifted", EQUAL)
    with pytest.raises(Unfit, match="without a mask"):
        layer(torch.randn(1, 64, 32), attn_mask=mask)


def test_a_missing_package_is_a_reason(monkeypatch):
    from timm_xformers.benchmarking import peers

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    peers._load.cache_clear()
    monkeypatch.setattr(peers.importlib, "import_module", missing)
    with pytest.raises(Unfit, match="not installed; pip install linformer"):
        build_peer("linformer", "linformer_k32", EQUAL)
    peers._load.cache_clear()


def test_names_have_the_peers_that_compute_them():
    def packages(name):
        return [peer.package for peer in peers_of(name)]

    assert packages("performer_softmax_m32") == ["performer-pytorch"]
    assert packages("performer_relu_m64") == ["performer-pytorch", "flash-linear-attention"]
    assert packages("performer_learned_m64") == []
    assert packages("local1d_w256") == ["local-attention"]
    assert packages("local1d_w256_shifted") == []
    assert packages("local2d_w8") == []
    assert packages("local2d_w8_shifted") == ["timm-swin", "natten"]
    assert packages("softmax") == packages("fnet") == []
