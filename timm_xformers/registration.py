"""Make ``import timm`` alone list our models.

timm has no plugin mechanism, but PyTorch calls every entry point of the group ``torch.backends`` at
the end of ``import torch``, and timm imports torch before it imports ``timm.models``. `install` is
such an entry point: it puts a finder in front of the import system that answers for the one name
``timm.models`` and imports the plugin modules as soon as that package has been executed.

Plugins are the modules named in the entry-point group ``timm.models``, whoever ships them, and our
own, which is loaded also where the metadata is missing (vendored copies, frozen applications).

Nothing here may break ``import torch`` or ``import timm``: an error becomes one warning. The module
runs in every process that imports torch, hence the standard library only, imported where needed.
One case is out of its hands: metadata without this module, as after moving a checkout that was
installed with ``pip install -e``. Then ``import torch`` fails and names timm_xformers; cure it with
``pip install -e`` in the new place, or with ``pip uninstall timm-xformers``.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own flag costs an import; type checkers know this spelling
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["install", "warn"]

_TARGET = "timm.models"
_GROUP = "timm.models"  # what plugins declare; by design the name of what they extend
_OURS = "timm_xformers.models"
# Holds a finder's plugin names and marks it, so that two packages with this hook share one finder.
_PLUGINS = "timm_models_plugins"


def install() -> None:
    """Register our models with timm: now if ``timm.models`` is there, else when it is imported.

    Never raises; calling it again changes nothing. It leaves a ``timm.models`` that is just being
    imported alone: the plugins follow from our finder, or from the caller that imports it.
    """
    try:
        finders = [finder for finder in sys.meta_path if hasattr(finder, _PLUGINS)]
        if not finders:
            finders = [_Finder()]
            sys.meta_path.insert(0, finders[0])
        plugins: list[str] = getattr(finders[0], _PLUGINS)
        if _OURS not in plugins:
            plugins.append(_OURS)
        module = sys.modules.get(_TARGET)
        if module is not None and not _is_initialising(module):
            _load_plugins(plugins)
    except Exception as error:
        warn(
            f"timm_xformers could not hook into `import timm` ({_describe(error)}). "
            "Both work on; `import timm_xformers.models` registers its models."
        )


def warn(message: str) -> None:
    """Give a RuntimeWarning; where warnings are errors (``-W error``), a line on stderr instead.

    The raised warning would end somebody's ``import timm`` for a fault of ours.
    """
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Exception:
        from contextlib import suppress

        with suppress(Exception):  # stderr may be None or closed
            sys.stderr.write(f"RuntimeWarning: {message}\n")


class _Finder:
    """Meta path finder that wraps the loader of ``timm.models`` and answers for nothing else."""

    def __init__(self) -> None:
        setattr(self, _PLUGINS, [])

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, with our loader around theirs."""
        if name != _TARGET:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    loader: Any = _Loader(spec.loader, getattr(self, _PLUGINS))
                    spec.loader = loader
                return spec
        return None


class _Loader:
    """The original loader, with one step more after the module has been executed."""

    def __init__(self, original: Any, plugins: list[str]) -> None:
        self._original = original
        self._plugins = plugins

    def __getattr__(self, name: str) -> object:
        # Whoever looks the spec up without importing asks for get_code, get_resource_reader, ...
        return getattr(self._original, name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module as its own loader would, then import the plugins."""
        module.__loader__ = self._original
        if module.__spec__ is not None:
            module.__spec__.loader = self._original
        is_reload = hasattr(module, "register_model")  # then the registry keeps its entries
        before = () if is_reload else set(sys.modules)
        self._original.exec_module(module)
        _load_plugins(self._plugins, before)


def _load_plugins(plugins: Sequence[str], before: Collection[str] = ()) -> None:
    """Import every plugin module, turning a failure into one warning about that plugin.

    Args:
        plugins: Module names to import besides those of the entry-point group.
        before: Modules that existed before this ``timm.models`` did. A plugin among them registered
            with a timm that is gone, and importing it again would do nothing.
    """
    from importlib import import_module
    from importlib.metadata import entry_points

    names = dict.fromkeys(plugins)
    try:
        names.update(dict.fromkeys(point.module for point in entry_points(group=_GROUP)))
    except Exception as error:  # another distribution's damaged metadata
        warn(f"timm_xformers could not look for other packages with models ({_describe(error)}).")
    for name in names:
        cached = sys.modules.get(name)
        if cached is not None and name in before and not _is_initialising(cached):
            warn(
                f"{name} was imported for an earlier import of timm, so that this one lacks its "
                "models. Restart Python, or remove it from sys.modules together with timm."
            )
            continue
        try:
            import_module(name)
        except Exception as error:
            package = name.partition(".")[0]
            warn(
                f"{name} could not be imported, so timm does not list all of its models "
                f"({_describe(error)}). timm itself works. Repair or uninstall {package}; "
                f"`import {name}` shows where it fails."
            )


def _is_initialising(module: ModuleType) -> bool:
    # The import system's own flag; without it a circular import looks like a finished module.
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
