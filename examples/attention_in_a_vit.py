"""Put an efficient mechanism into a timm ViT that you already have, and time both.

Run it:  python examples/attention_in_a_vit.py --img-size 512
"""

import argparse
import time

import timm
import torch
from torch import nn


def build(attention: str | None, img_size: int, pretrained: bool) -> nn.Module:
    """A ViT-Tiny in 8x8 patches; None is timm's own exact attention."""
    arguments = {} if attention is None else {"attn_layer": attention}
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=img_size, patch_size=8, pretrained=pretrained, **arguments
    ).eval()


def milliseconds(model: nn.Module, images: torch.Tensor) -> float:
    """The fastest of three passes."""
    times = []
    with torch.inference_mode():
        model(images)
        for _ in range(3):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Time exact and efficient attention with the same weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", default="performer_relu_m64")
    parser.add_argument("--img-size", type=int, default=256)
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights (network)")
    args = parser.parse_args()
    images = torch.randn(1, 3, args.img_size, args.img_size)
    exact = build(None, args.img_size, args.pretrained)
    model = build(args.attention, args.img_size, args.pretrained)
    # The parameters have timm's names, so the weights of the exact model load. What they compute
    # is another function now: fine-tune before you use it.
    model.load_state_dict(exact.state_dict())
    print(f"{(args.img_size // 8) ** 2:,} tokens")
    print(f"exact: {milliseconds(exact, images):.0f} ms")
    print(f"{args.attention}: {milliseconds(model, images):.0f} ms")


if __name__ == "__main__":
    main()
