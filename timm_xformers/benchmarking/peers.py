"""Other forms of our mechanisms beside ours, from a module that ``--peers`` names.

The module's ``PEERS`` hold a `Peer` for each form. In a clone of our repository, `tools.peers` has
those of other packages.
"""

import fnmatch
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from timm_xformers.errors import UsageError
from timm_xformers.layers.factory import ATTENTION

__all__ = ["Dims", "Peer", "Unfit", "build_peer", "load_peers", "peers_of"]


class Unfit(ValueError):
    """A package that does not do what is asked for; the message is the reason in its report."""


@dataclass(frozen=True)
class Dims:
    """Sizes of a layer.

    Attributes:
        dim: Token width C.
        num_heads: Heads H.
        head_dim: Width D of a head.
        tokens: Sequence length N.
    """

    dim: int
    num_heads: int
    head_dim: int
    tokens: int

    @property
    def inner(self) -> int:
        """Width of all heads."""
        return self.num_heads * self.head_dim

    def need_full_width(self) -> None:
        """Raise `Unfit` unless all heads together are as wide as the tokens."""
        if self.inner != self.dim:
            raise Unfit("its heads together are as wide as the tokens")

    def grid_side(self, window: int) -> int:
        """Side of the square grid, which windows must divide.

        Raises:
            Unfit: They do not.
        """
        side = int(self.tokens**0.5 + 0.5)
        if side * side != self.tokens or side % window:
            raise Unfit(f"{self.tokens} tokens are no square grid of {window}x{window} windows")
        return side


@dataclass(frozen=True)
class Peer:
    """A package's form of some mechanisms.

    Attributes:
        package: Name to install, and name in the report.
        module: Name to import.
        names: Shell pattern of our names.
        same: What it has in common with ours, and what not.
        build: Makes the layer, callable as timm calls attention, from sizes, our name's numbers,
            and the imported module.
    """

    package: str
    module: str
    names: str
    same: str
    build: Callable[[Dims, dict[str, Any], Any], nn.Module]


@functools.cache
def load_peers(module: str) -> tuple[Peer, ...]:
    """What a module offers.

    Raises:
        UsageError: It cannot be imported, or offers nothing.
    """
    try:
        found: tuple[Peer, ...] = tuple(importlib.import_module(module).PEERS)
    except (AttributeError, ImportError) as error:
        raise UsageError(
            f"--peers {module} cannot be used ({error}); name a module that has PEERS, such as "
            "tools.peers in a clone of our repository."
        ) from error
    return found


def peers_of(module: str, name: str) -> list[Peer]:
    """What a module offers for a named mechanism."""
    return [peer for peer in load_peers(module) if fnmatch.fnmatchcase(name, peer.names)]


def build_peer(module: str, package: str, name: str, dims: Dims) -> nn.Module:
    """A package's form of a mechanism, in float32 on the CPU, callable as timm calls attention.

    Raises:
        Unfit: It is not installed, or not able to.
    """
    peer = next(peer for peer in peers_of(module, name) if peer.package == package)
    return peer.build(dims, ATTENTION[name][1], _load(peer.module, package))


@functools.cache
def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise Unfit(f"not installed; pip install {package}") from error
        raise Unfit(f"its import fails: {' '.join(str(error).split())}") from error
