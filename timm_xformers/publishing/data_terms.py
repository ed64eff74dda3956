"""What cards say of well-known data sets."""

import dataclasses

__all__ = ["DATA_SETS", "DataSet", "describe"]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set in words.

    Attributes:
        title: What people call it.
        hub_id: Its name on the Hub; None if it has none that is its authors'.
        images: What its images are.
        cite: Whose it is.
        limits: What a classifier of it is no good for.
    """

    title: str
    hub_id: str | None
    images: str
    cite: str
    limits: str


DATA_SETS = {
    "digits": DataSet(
        title="Optical Recognition of Handwritten Digits",
        hub_id=None,
        images="1,797 of them come with scikit-learn, 8x8 grey pixels each; a third, drawn by "
        "class once and for all, is the test set",
        cite="Alpaydin and Kaynak, UCI Machine Learning Repository, 1998",
        limits="Digits must be centred, fill the image, be bright on dark and be averaged down to "
        "8x8 pixels as in the data set; photographs of digits are not.",
    ),
    "mnist": DataSet(
        title="MNIST",
        hub_id="ylecun/mnist",
        images="70,000 handwritten digits of 28x28 grey pixels, 10,000 of them the test set",
        cite="LeCun, Cortes and Burges, The MNIST database of handwritten digits, 1998",
        limits="Digits must be centred by mass, bright on dark and scaled as in the data set.",
    ),
    "fashion_mnist": DataSet(
        title="Fashion-MNIST",
        hub_id="zalando-datasets/fashion_mnist",
        images="70,000 articles of clothing of 28x28 grey pixels, 10,000 of them the test set",
        cite="Xiao, Rasul and Vollgraf, arXiv:1708.07747, 2017",
        limits="Articles must be cut out, bright on dark; photographs with people are not.",
    ),
    "cifar10": DataSet(
        title="CIFAR-10",
        hub_id="uoft-cs/cifar10",
        images="60,000 colour photographs of 32x32 pixels in ten classes, 10,000 of them the test "
        "set",
        cite="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        limits="Ten classes of whole objects at 32x32 pixels; anything else is forced into one of "
        "them, and some test images have near copies among the training images.",
    ),
    "cifar100": DataSet(
        title="CIFAR-100",
        hub_id="uoft-cs/cifar100",
        images="60,000 colour photographs of 32x32 pixels in a hundred classes, 10,000 of them the "
        "test set",
        cite="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        limits="A hundred classes of whole objects at 32x32 pixels; anything else is forced into "
        "one of them, and some test images have near copies among the training images.",
    ),
    "tiny_imagenet": DataSet(
        title="Tiny ImageNet",
        hub_id=None,
        images="120,000 colour photographs of 64x64 pixels in 200 classes of ImageNet",
        cite="Stanford CS231n; images of Deng et al., ImageNet, 2009",
        limits="The classes are few of ImageNet's, at 64x64 pixels.",
    ),
}


def describe(name: str) -> DataSet:
    """Words for a data set, also for one that nobody here knows."""
    plain = DataSet(
        title=name,
        hub_id=None,
        images=f"the data set {name}",
        cite="",
        limits="It knows the classes and the kind of images it was trained on, nothing else.",
    )
    return DATA_SETS.get(name, plain)
