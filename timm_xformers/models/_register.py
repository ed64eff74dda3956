"""timm's ``register_model``, except that a name which exists already is left to its owner."""

from collections.abc import Callable
from typing import TypeVar

from timm.models import is_model, model_entrypoint
from timm.models import register_model as register_with_timm
from torch import nn

from timm_xformers.registration import warn

__all__ = ["register_model"]

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])


def register_model(fn: EntryPoint) -> EntryPoint:
    """Register an entry point with timm under its name, unless the name is taken.

    timm would overwrite the model of that name. We warn and leave it, and ``fn`` can still be
    called where it is defined. Reloading the module that owns a name registers it anew.

    Args:
        fn: Entry point ``(pretrained=False, **kwargs)``; its module holds ``default_cfgs``.

    Returns:
        ``fn``, unchanged.
    """
    name = fn.__name__
    if is_model(name):
        owner = model_entrypoint(name).__module__
        if owner != fn.__module__:
            warn(
                f"timm already has a model {name!r} from {owner}, which stays. "
                f"Ours is not registered; call {fn.__module__}.{name} instead."
            )
            return fn
    register_with_timm(fn)
    return fn
