"""YAML of version 1.2 as settings use it: read safely, written so that it reads back the same."""

import copy
import functools
import re
from collections.abc import Mapping
from typing import Any

import yaml

from timm_xformers.errors import UsageError

__all__ = ["dump_yaml", "parse_yaml"]


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2, where 1e-3 is one, 010 is ten and 1:30 is text.

    Dates are text too; aliases, by which a small file can hold a billion values, and keys given
    twice are refused.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not read", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                mark = node.start_mark
                raise yaml.MarkedYAMLError(None, None, f"{key!r} is given twice", mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")
_OURS = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag[len(_OURS) :] in ("bool", "null")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_OURS}int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        f"{_OURS}float", re.compile(f"({_NUMBER.pattern})$"), list("-+.0123456789")
    )
_Loader.add_constructor(f"{_OURS}int", lambda loader, node: int(node.value))


@functools.lru_cache
def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def parse_yaml(text: str, whence: str) -> Any:
    """What a text holds.

    Args:
        text: YAML.
        whence: Where it came from, in words for the message.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return copy.deepcopy(_parse(text))
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"{whence} is not YAML that can be read: {detail[:200]}") from error
    except (ValueError, RecursionError, OverflowError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{whence} is not YAML that can be read: {type(error).__name__}, a value is too long, "
            "too deep or malformed."
        ) from error


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Settings as YAML that is read back as the same values."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
