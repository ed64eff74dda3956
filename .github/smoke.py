"""What must work wherever the package is installed: registration, two models, packaged weights."""

import timm
import torch

for name, shape in (("vix_performer_relu_m64", (2, 3, 16, 16)), ("ccn_4_3x2_32", (2, 3, 32, 32))):
    assert timm.is_model(name), f"{name} is not registered"
    model = timm.create_model(name, img_size=shape[-1], num_classes=4)
    loss = model(torch.randn(shape)).logsumexp(dim=-1).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters()), f"{name} has no gradients"
assert timm.create_model("ccn_4_3x2_32.cifar10", pretrained=True).num_classes == 10
print(
    f"timm {timm.__version__}, torch {torch.__version__}: registration, two models and weights work"
)
