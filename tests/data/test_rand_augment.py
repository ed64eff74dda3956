"""Policies: torchvision's spaces, even draws, and one group per operation."""

import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import InterpolationMode

from timm_xformers.data.rand_augment import (
    NAMES,
    SIGNED,
    EpochPolicy,
    _space,
    check_policy,
)
from timm_xformers.errors import UsageError

POLICIES = ["trivial", "n2-m9", "n1-m30", "autoaugment-cifar10", "autoaugment-imagenet"]
IMAGES = torch.randint(
    0, 256, (200, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("n2-m9", RandAugment()._augmentation_space(31, (32, 40))),
        ("trivial", TrivialAugmentWide()._augmentation_space(31)),
        ("autoaugment-cifar10", AutoAugment()._augmentation_space(10, (32, 40))),
    ],
)
def test_strengths_are_those_of_torchvision(text, space):
    ours = _space(text, 32, 40)
    for name, (levels, signed) in space.items():
        row = NAMES.index(name)
        assert torch.equal(ours[row], levels.double().expand(ours.shape[1])), name
        assert bool(SIGNED[row]) is signed, name


def test_translation_stays_within_small_images():
    assert _space("trivial", 8, 28)[NAMES.index("TranslateX")].max() == 28
    assert _space("trivial", 8, 28)[NAMES.index("TranslateY")].max() == 8


@pytest.mark.parametrize("text", POLICIES)
def test_batch_equals_torchvision_image_by_image(text):
    policy = EpochPolicy(text, 200, 0, 1)
    positions = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    ops, strengths = policy.choices(positions, 32, 40)

    changed = policy.apply(IMAGES[positions], positions)

    apart = 0
    for row, position in enumerate(positions.tolist()):
        expected = IMAGES[position]
        for op, strength in zip(ops[row].tolist(), strengths[row].tolist(), strict=True):
            expected = _apply_op(expected, NAMES[op], strength, InterpolationMode.NEAREST, None)
        # Sources halfway between two pixels, which few round strengths have.
        apart += not torch.equal(changed[row], expected)
    assert apart <= 2


@pytest.mark.parametrize("text", POLICIES)
def test_any_batch_any_order_any_type_gives_the_same_images(text):
    positions = torch.arange(200)
    before = IMAGES.clone()
    whole = EpochPolicy(text, 200, 3, 2).apply(IMAGES, positions)
    assert torch.equal(IMAGES, before)

    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    again = EpochPolicy(text, 200, 3, 2)
    parts = torch.cat([again.apply(IMAGES[i].float() + 0.2, i) for i in order.split(7)])

    assert torch.equal(parts, whole[order])
    for seed, epoch in ((4, 2), (3, 3)):
        assert not torch.equal(EpochPolicy(text, 200, seed, epoch).apply(IMAGES, positions), whole)


def test_every_operation_is_drawn_evenly_with_both_signs():
    ops, strengths = EpochPolicy("n2-m15", 14_000, 0, 1).choices(torch.arange(14_000), 32, 32)
    counts = ops.flatten().bincount(minlength=len(NAMES))
    assert counts[NAMES.index("Invert")] == 0
    assert counts[:14].min() > 1_800
    assert counts[:14].max() < 2_200
    for row in SIGNED.nonzero()[:, 0].tolist():
        negative = (strengths[ops == row] < 0).float().mean()
        assert negative == pytest.approx(0.5, abs=0.05)


def test_autoaugment_follows_its_probabilities():
    ops, _ = EpochPolicy("autoaugment-cifar10", 50_000, 0, 1).choices(torch.arange(50_000), 32, 32)
    expected = torch.zeros(len(NAMES))
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert len(policies) == 25
    for pair in policies:
        for name, probability, _ in pair:
            expected[NAMES.index(name)] += probability / 25
            expected[NAMES.index("Identity")] += (1 - probability) / 25
    counts = ops.flatten().bincount(minlength=len(NAMES)) / 50_000
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)


def test_grey_images_are_changed_too():
    grey = IMAGES[:, :1]
    changed = EpochPolicy("trivial", 200, 0, 1).apply(grey, torch.arange(200))
    assert changed.shape == grey.shape
    assert (changed != grey).flatten(1).any(dim=1).float().mean() > 0.6


@pytest.mark.parametrize("text", ["n0-m9", "n2-m31", "trivail", "rand-m9-mstd0.5", ""])
def test_unknown_policies_are_refused(text):
    with pytest.raises(UsageError, match="rand_augment="):
        check_policy(text)


@pytest.mark.parametrize("text", POLICIES)
def test_known_policies_are_accepted(text):
    check_policy(text)
