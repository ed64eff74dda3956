"""Fine-tune packaged weights on a folder of pictures, in plain PyTorch.

`timm-xformers train` does the same with augmentation, checkpoints and reports; this shows what is
underneath. Run it:  python examples/fine_tune_pictures.py FOLDER, with FOLDER/CLASS/IMAGE inside.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder


def main() -> None:
    """Train on 80 % of the pictures, and print the accuracy on the others after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="ccn_4_3x2_32.cifar10")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("fine_tuned.pt"))
    args = parser.parse_args()
    torch.manual_seed(0)

    pictures = ImageFolder(args.folder)
    model = timm.create_model(args.model, pretrained=True, num_classes=len(pictures.classes))
    pictures.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    train, test = random_split(pictures, [0.8, 0.2])
    batches = DataLoader(train, batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)

    for epoch in range(1, args.epochs + 1):
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.inference_mode():
            for images, labels in DataLoader(test, batch_size=64):
                correct += int((model(images).argmax(dim=1) == labels).sum())
        print(f"epoch {epoch}: {100 * correct / len(test):.1f} % of {len(test)} held-out pictures")

    torch.save({"classes": pictures.classes, "weights": model.state_dict()}, args.output)
    print(f"Saved {args.output}.")


if __name__ == "__main__":
    main()
