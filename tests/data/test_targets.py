"""Classes and marks: shares that are drawn, numbers that change, hashes that stay."""

import torch

from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.split import PilImages, Split
from timm_xformers.data.targets import images_by_class, renumber, strata, to_labels

MARKS = to_labels(
    [("cat", "dog"), ("dog",), (), ("cow", "dog"), ("dog", "cat")], ["cat", "cow", "dog"]
)


def test_marks_of_names():
    assert MARKS.tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 1]]
    assert images_by_class(MARKS, 3).tolist() == [2, 1, 4]
    assert to_labels(["dog", "cat"], ["cat", "cow", "dog"]).tolist() == [2, 0]


def test_an_image_counts_for_its_rarest_class_and_the_first_among_equals():
    assert strata(MARKS).tolist() == [0, 2, 3, 1, 0]
    assert strata(torch.tensor([[1.0, 1, 0], [0, 0, 1]])).tolist() == [0, 2]
    labels = torch.tensor([2, 0, 1])
    assert strata(labels) is labels


def test_the_same_share_of_a_rare_class_is_held_out():
    rng = torch.Generator().manual_seed(0)
    marks = (torch.rand(400, 3, generator=rng) < torch.tensor([0.05, 0.3, 0.9])).float()
    _, held = stratified_split(strata(marks), 0.25, "val")
    shares = marks[held].sum(0) / marks.sum(0)
    assert len(held) == 100
    assert abs(shares[0] - 0.25) < 0.05
    assert ((shares - 0.25).abs() < 0.06).all()


def test_other_numbers_leave_out_images_of_classes_without_one():
    marks, chosen = renumber(MARKS, torch.tensor([3, -1, 0]), 4)
    assert chosen.tolist() == [True, True, True, False, True]
    assert marks[chosen].tolist() == [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]


def test_the_hash_of_a_split_follows_its_marks():
    def digest(labels):
        images = PilImages([], range(len(labels)))
        return Split(images, torch.arange(len(labels)), labels, "L").digest()

    other = MARKS.clone()
    other[2, 1] = 1
    assert digest(MARKS) == digest(MARKS.clone()) != digest(other)
