"""Add an attention mechanism of your own to timm's vision transformers.

Linear attention with the feature map elu(x) + 1 (Katharopoulos et al., arXiv:2006.16236, eq. 5).
Run it:  python examples/add_a_mechanism.py
"""

import timm
import torch
from timm.layers import Attention
from torch import Tensor
from torch.nn import functional as F


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix values by phi(q) . phi(k): queries, keys and values (B, H, N, D) to (B, H, N, D)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = k.transpose(-2, -1) @ v  # (B, H, D, D): keys meet values first, so no (N, N) map
    norm = q @ k.sum(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
    return q @ context / norm.clamp_min(1e-6)


class LinearAttention(Attention):
    """timm's attention, with its arguments and parameter names, mixing by `linear_attention`."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix tokens: (B, N, C) to (B, N, C)."""
        if attn_mask is not None or is_causal:
            raise ValueError("Linear attention takes no mask.")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
        x = linear_attention(self.q_norm(q), self.k_norm(k), v)
        x = self.norm(x.transpose(1, 2).reshape(batch, tokens, -1))
        return self.proj_drop(self.proj(x))


def main() -> None:
    """Build a model with it, check it against the quadratic sum, and take one training step."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 50, 8, dtype=torch.float64)
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    expected = weights / weights.sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(linear_attention(q, k, v), expected)

    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer=LinearAttention, img_size=64, depth=2, num_classes=3
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    optimizer.step()
    print(f"{type(model.blocks[0].attn).__name__}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
