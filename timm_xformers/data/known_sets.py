"""Data sets that have a short name: where they lie, what they hold and what cards say of them."""

import dataclasses

__all__ = ["KNOWN_SETS", "KnownSet", "describe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownSet:
    """A data set.

    Attributes:
        title: What people call it.
        hub_id: Its name on the Hub; None if it has none that is its authors'.
        images: What its images are.
        cite: Whose it is.
        limits: What a classifier of it is no good for.
        licence: What its authors or its page on the Hub allow; empty where they say nothing.
        layout: Folder that torchvision looks for; None if it does not read this set.
        in_chans: Colour channels.
        img_size: Side in pixels; None: unknown.
        mean: Per channel over the training images in [0, 1].
        std: Per channel over the training images in [0, 1].
    """

    title: str
    hub_id: str | None = None
    images: str
    cite: str = ""
    limits: str
    licence: str = ""
    layout: str | None = None
    in_chans: int = 3
    img_size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


KNOWN_SETS = {
    "digits": KnownSet(
        title="Optical Recognition of Handwritten Digits",
        images="1,797 of them come with scikit-learn, 8x8 grey pixels each; a third, drawn by "
        "class once and for all, is the test set",
        cite="Alpaydin and Kaynak, UCI Machine Learning Repository, 1998",
        limits="Digits must be centred, fill the image, be bright on dark and be averaged down to "
        "8x8 pixels as in the data set; photographs of digits are not.",
        licence="CC BY 4.0",
        in_chans=1,
        img_size=8,
        mean=(0.3047,),
        std=(0.3761,),
    ),
    "mnist": KnownSet(
        title="MNIST",
        hub_id="ylecun/mnist",
        images="70,000 handwritten digits of 28x28 grey pixels, 10,000 of them the test set",
        cite="LeCun, Cortes and Burges, The MNIST database of handwritten digits, 1998",
        limits="Digits must be centred by mass, bright on dark and scaled as in the data set.",
        licence="CC BY-SA 3.0",
        layout="MNIST/raw",
        in_chans=1,
        img_size=28,
        mean=(0.1307,),
        std=(0.3081,),
    ),
    "fashion_mnist": KnownSet(
        title="Fashion-MNIST",
        hub_id="zalando-datasets/fashion_mnist",
        images="70,000 articles of clothing of 28x28 grey pixels, 10,000 of them the test set",
        cite="Xiao, Rasul and Vollgraf, arXiv:1708.07747, 2017",
        limits="Articles must be cut out, bright on dark; photographs with people are not.",
        licence="MIT",
        layout="FashionMNIST/raw",
        in_chans=1,
        img_size=28,
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "cifar10": KnownSet(
        title="CIFAR-10",
        hub_id="uoft-cs/cifar10",
        images="60,000 colour photographs of 32x32 pixels in ten classes, 10,000 of them the test "
        "set",
        cite="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        limits="Ten classes of whole objects at 32x32 pixels; anything else is forced into one of "
        "them, and some test images have near copies among the training images.",
        layout="cifar-10-batches-py",
        img_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": KnownSet(
        title="CIFAR-100",
        hub_id="uoft-cs/cifar100",
        images="60,000 colour photographs of 32x32 pixels in a hundred classes, 10,000 of them the "
        "test set",
        cite="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        limits="A hundred classes of whole objects at 32x32 pixels; anything else is forced into "
        "one of them, and some test images have near copies among the training images.",
        layout="cifar-100-python",
        img_size=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "tiny_imagenet": KnownSet(
        title="Tiny ImageNet",
        images="120,000 colour photographs of 64x64 pixels in 200 classes of ImageNet",
        cite="Stanford CS231n; images of Deng et al., ImageNet, 2009",
        limits="The classes are few of ImageNet's, at 64x64 pixels.",
        licence="for research and teaching, not for trade (ImageNet's terms)",
        img_size=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    ),
}


def describe(name: str) -> KnownSet:
    """Words for a data set, also for one that nobody here knows."""
    unknown = KnownSet(
        title=name,
        images="pictures in a folder" if name == "folder" else f"the data set {name}",
        limits="It knows the classes and the kind of images it was trained on, nothing else.",
    )
    return KNOWN_SETS.get(name, unknown)
