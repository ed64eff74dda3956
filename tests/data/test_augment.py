"""Batched augmentation: exact where it can be, individual, and repeatable."""

import pytest
import torch

from timm_xformers.data.augment import Augmentation, EpochAugmentation

SHAPE = (64, 3, 8, 10)


@pytest.fixture
def images():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 255


def epoch_of(seed=0, epoch=1, **strengths):
    return EpochAugmentation(Augmentation(**strengths), SHAPE[0], seed, epoch)


ALL = {
    "hflip": 0.5,
    "crop_pad": 1,
    "rotate_degrees": 10.0,
    "shear_degrees": 5.0,
    "zoom": 0.1,
    "re_prob": 0.5,
    "cutout": 5,
    "rand_augment": "trivial",
}


def apply(augmentation, images, positions):
    return augmentation.erase(augmentation.change(images, positions).float(), positions)


def test_off_is_the_identity(images):
    assert apply(epoch_of(), images, torch.arange(64)) is images


def test_a_sample_looks_the_same_in_any_batch(images):
    augmentation = epoch_of(**ALL)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))

    whole = apply(augmentation, images, torch.arange(64))
    parts = torch.cat([apply(epoch_of(**ALL), images[i], i) for i in order.split(7)])

    torch.testing.assert_close(parts, whole[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(ALL))
def test_each_transform_acts_differs_by_sample_epoch_and_seed(name, images):
    same = images[:1].expand(64, -1, -1, -1).contiguous()
    strengths = {name: ALL[name]}

    result = apply(epoch_of(**strengths), same, torch.arange(64))

    assert len({tuple(row.flatten().tolist()) for row in result}) > 1
    assert torch.equal(result, apply(epoch_of(**strengths), same, torch.arange(64)))
    for other in ({"epoch": 2}, {"seed": 1}):
        assert not torch.equal(
            result, apply(epoch_of(**other, **strengths), same, torch.arange(64))
        )


def test_flip_and_shift_move_whole_pixels(images):
    flipped = epoch_of(hflip=1.0).change(images, torch.arange(64))
    assert torch.equal(flipped, images.flip(-1))

    shifted = epoch_of(crop_pad=2).change(images, torch.arange(64))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, wide in zip(shifted, padded, strict=True):
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(image, wide[:, y : y + 8, x : x + 10])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 15  # of the 25 shifts, 64 images meet most


@pytest.mark.parametrize(
    "strengths", [{"hflip": 0.5}, {"crop_pad": 3}, {"hflip": 0.5, "crop_pad": 4}]
)
def test_indexing_is_what_sampling_does(images, strengths):
    positions = torch.arange(64)
    augmentation = epoch_of(**strengths)
    whole = images.to(torch.uint8)

    indexed = augmentation.change(whole, positions)

    assert indexed.dtype == torch.uint8
    sampled = augmentation._resample(whole.float(), positions)
    torch.testing.assert_close(indexed.float(), sampled, atol=1e-3, rtol=0)
    assert torch.equal(indexed, sampled.round().to(torch.uint8))


def test_what_was_added_later_leaves_the_earlier_draws(images):
    plain, full = epoch_of(hflip=0.5), epoch_of(hflip=0.5, cutout=3, rand_augment="n2-m9")
    assert torch.equal(plain.draws, full.draws)
    assert plain.draws[0, :3].tolist() == pytest.approx([0.79337, 0.60423, 0.23892], abs=1e-5)


def test_turn_keeps_a_turn_on_images_that_are_not_square():
    image = torch.zeros(1, 1, 9, 15)
    image[0, 0, 4, 11] = 1.0  # four pixels right of the centre
    augmentation = epoch_of(rotate_degrees=90.0)
    augmentation.draws = torch.full((1, 11), 0.5)
    augmentation.draws[0, 3] = 1.0  # the full turn

    turned = augmentation.change(image, torch.tensor([0]))

    row, column = divmod(int(turned[0, 0].argmax()), 15)
    assert column == 7
    assert abs(row - 4) == 4


def test_zoom_covers_both_directions_evenly():
    augmentation = epoch_of(zoom=0.5)
    inner = augmentation._inverse_affine(torch.arange(64), 8, 8)[:, 0, 0]
    assert inner.min() > 1 / 1.5 - 1e-6
    assert inner.max() < 1.5 + 1e-6
    assert (inner < 1).float().mean() == pytest.approx(0.5, abs=0.2)


def test_erasing_replaces_one_rectangle_of_some_images(images):
    erased = epoch_of(re_prob=0.5).erase(images + 1, torch.arange(64)) == 0
    hit = erased.flatten(1).any(dim=1)
    assert 15 < hit.sum() < 49
    for mask in erased[hit]:
        rows, columns = mask[0].any(dim=1), mask[0].any(dim=0)
        assert torch.equal(mask[0], rows[:, None] & columns[None])
        assert torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("side", [1, 3, 4, 99])
def test_cutout_blanks_one_square_around_a_pixel(images, side):
    blank = epoch_of(cutout=side).erase(images + 1, torch.arange(64)) == 0
    sizes = set()
    for mask in blank:
        rows, columns = mask[0].any(dim=1), mask[0].any(dim=0)
        assert torch.equal(mask[0], rows[:, None] & columns[None])
        assert torch.equal(mask[0], mask[2])
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert max(sizes) == (min(side, 8), min(side, 10))
    smallest = side - side // 2  # the rest lies outside
    assert min(sizes) >= (min(smallest, 8), min(smallest, 10))
