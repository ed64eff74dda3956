"""timm's ``register_model``, except that a name which exists already is left to its owner."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from timm.models import is_model, model_entrypoint
from timm.models import register_model as register_with_timm
from torch import nn

from timm_xformers.registration import warn

__all__ = ["register_model", "register_models"]

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


def register_models(
    module: str, create: Callable[..., nn.Module], models: Mapping[str, tuple[str, str]]
) -> None:
    """Register an entry point for each model of a table, as a function of the family's module.

    Args:
        module: Name of that module, which holds ``default_cfgs``.
        create: Called with the model's name, its mechanism, ``pretrained`` and more arguments.
        models: By name the mechanism, and what the model is in a sentence.
    """
    for name, (attention, words) in models.items():
        fn: Any = _entry_point(create, name, attention)
        fn.__name__ = fn.__qualname__ = name
        fn.__module__, fn.__doc__ = module, words
        fn.__annotations__["return"] = create.__annotations__["return"]
        setattr(sys.modules[module], name, register_model(fn))


def _entry_point(
    create: Callable[..., nn.Module], name: str, attention: str
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, attention, pretrained, **kwargs)

    return entry_point
