"""Efficient-attention models for timm, registered with timm as soon as the package is installed.

PyTorch loads this module at the end of every ``import torch`` (see `registration`), so it stays
light: neither torch nor timm is imported here, and public names resolve on first use.
"""

from __future__ import annotations

from timm_xformers import registration

TYPE_CHECKING = False  # typing's own flag costs an import; type checkers know this spelling
if TYPE_CHECKING:
    from timm_xformers.explaining.maps import attention_map
    from timm_xformers.layers.factory import list_attention
    from timm_xformers.layers.layout import set_token_layout
    from timm_xformers.layers.performer import redraw_features
    from timm_xformers.replace import (
        attention_sites,
        replace_attention,
        replacement_of,
        restore_attention,
    )
    from timm_xformers.transformers_attention import register_attention_functions

__version__ = "0.2.0"

__all__ = [
    "__version__",
    "attention_map",
    "attention_sites",
    "list_attention",
    "redraw_features",
    "register_attention_functions",
    "replace_attention",
    "replacement_of",
    "restore_attention",
    "set_token_layout",
]

# Where each public name lives; the import above for type checkers lists the same names.
_LAZY = {
    "attention_map": "timm_xformers.explaining.maps",
    "attention_sites": "timm_xformers.replace",
    "list_attention": "timm_xformers.layers.factory",
    "redraw_features": "timm_xformers.layers.performer",
    "register_attention_functions": "timm_xformers.transformers_attention",
    "replace_attention": "timm_xformers.replace",
    "replacement_of": "timm_xformers.replace",
    "restore_attention": "timm_xformers.replace",
    "set_token_layout": "timm_xformers.layers.layout",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, those not yet imported included."""
    return sorted({*globals(), *_LAZY})


registration.install()
