"""What a model calls its classes."""

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from timm_xformers.files.text import plain

__all__ = ["class_names"]


def class_names(model: Any) -> list[tuple[str, ...]]:
    """Names by label, in each vocabulary that is known for a timm model; none: nobody names them.

    The first is the one to show: the weights' own names, or ImageNet's in words. ImageNet's classes
    also go by the numbers of WordNet, as its folders do.
    """
    count: int = model.num_classes
    own = model.pretrained_cfg.get("label_names") or ()
    if len(own) == count:
        return [tuple(plain(str(name)) for name in own)]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info: Any = ImageNetInfo(subset)
        if info.num_classes() == count:
            texts = (info.index_to_description, info.index_to_label_name)
            return [tuple(text(label) for label in range(count)) for text in texts]
    return []
