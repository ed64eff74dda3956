"""What is asked of `replace_attention`, read and checked: a mechanism and settings per block."""

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.heads import HeadsAttention

__all__ = ["KEEP", "Choice", "block_numbers", "block_words", "read_plan"]

# The word for a block that stays as it is.
KEEP = "exact"

# What comes from the layer that stood there.
_GIVEN = frozenset(inspect.signature(HeadsAttention.__init__).parameters) - {"dwc"}


@dataclass(frozen=True)
class Choice:
    """A mechanism, its settings beside those of the name, and the seed of what it draws."""

    mechanism: str
    settings: dict[str, Any] = field(default_factory=dict)
    feature_seed: int = 0


def block_numbers(blocks: str | Iterable[int] | None, count: int) -> list[int]:
    """Read ``"0-1,11"``, ``"2-"``, ``"all"`` or numbers: sorted indices below ``count``.

    Raises:
        ValueError: No such words, a number that is no block, or none at all.
    """
    if blocks is None or blocks == "all":
        return list(range(count))
    if isinstance(blocks, str):
        numbers = [n for part in blocks.split(",") for n in _range(part.strip(), blocks, count)]
    else:
        numbers = list(blocks)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(
                f"Block {number!r} does not exist: the model has blocks 0 to {count - 1}."
            )
    if not numbers:
        raise ValueError('No block is named; give numbers such as "0-1,11", or None for all.')
    return sorted(set(numbers))


def _range(words: str, given: str, count: int) -> range:
    first, dash, last = words.partition("-")
    if not first.isdecimal() or (last and not last.isdecimal()):
        raise ValueError(
            f'blocks={given!r} cannot be read; write numbers and ranges from 0, such as "0-1,11" '
            'or "2-", or "all".'
        )
    end = int(last) if last else (count - 1 if dash else int(first))
    if end < int(first):
        raise ValueError(f"blocks={given!r} has a range that runs backwards: {words}.")
    return range(int(first), end + 1)


def block_words(numbers: Iterable[int]) -> str:
    """Numbers as `block_numbers` reads them: ``[0, 1, 11]`` to ``"0-1,11"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def read_plan(
    mechanism: str | Mapping[str, str | Mapping[str, Any]],
    blocks: str | Iterable[int] | None,
    count: int,
    feature_seed: int,
    settings: Mapping[str, Any],
) -> dict[int, Choice]:
    """What each named block is to become.

    Raises:
        ValueError: A block named twice or not there, an unknown mechanism, a setting that none of
            them takes, or one that cannot be written to a record.
        TypeError: ``mechanism`` is neither a name nor a mapping.
    """
    if isinstance(mechanism, str):
        mechanism = {block_words(block_numbers(blocks, count)): mechanism}
    elif not isinstance(mechanism, Mapping):
        raise TypeError(
            f"mechanism is {type(mechanism).__name__}; give a name such as "
            '"performer_softmax_m64", or names by blocks: {"0-1,11": "softmax", "2-10": ...}.'
        )
    elif blocks is not None:
        raise ValueError("mechanism names the blocks already; leave out blocks.")
    plan: dict[int, Choice] = {}
    unused = set(settings)
    for words, asked in mechanism.items():
        choice, used = _choice(asked, feature_seed, settings)
        unused -= used
        for number in block_numbers(words, count):
            if number in plan:
                raise ValueError(f"Block {number} is named twice; name each block once.")
            plan[number] = choice
    if unused:
        raise ValueError(f"No mechanism asked for takes {', '.join(sorted(unused))}; leave it out.")
    return plan


def _choice(
    asked: str | Mapping[str, Any], feature_seed: int, settings: Mapping[str, Any]
) -> tuple[Choice, set[str]]:
    """A choice, and the settings for all that it takes."""
    own = {} if isinstance(asked, str) else dict(asked)
    name = asked if isinstance(asked, str) else own.pop("name", None)
    seed = own.pop("feature_seed", feature_seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"feature_seed={seed!r} must be a whole number from 0, e.g. 0.")
    if name == KEEP:
        return Choice(KEEP), set()
    cls = attention_class(str(name))
    if not issubclass(cls, HeadsAttention):
        raise ValueError(
            f"{name} has no queries, keys and values, so it cannot take over a layer's weights; "
            "build a model with it instead, e.g. vix_fnet."
        )
    takes = _arguments(cls) - _GIVEN - {"feature_seed"}
    if wrong := own.keys() - takes:
        raise ValueError(
            f"{name} has no setting {', '.join(sorted(wrong))}; it takes "
            f"{', '.join(sorted(takes)) or 'none'}."
        )
    used = takes & settings.keys()
    own |= {key: settings[key] for key in used}
    try:
        json.dumps(own)
    except (TypeError, ValueError):
        raise ValueError(
            f"Settings {own} cannot be written to a record; use numbers, words and truth values."
        ) from None
    return Choice(str(name), own, seed), used


def _arguments(cls: type[HeadsAttention]) -> set[str]:
    """Names that the constructors of a mechanism take, down to `HeadsAttention`'s."""
    names: set[str] = set()
    for part in cls.__mro__:
        init = vars(part).get("__init__")
        if inspect.isfunction(init):
            names |= {
                p.name
                for p in inspect.signature(init).parameters.values()
                if p.kind is not p.VAR_KEYWORD
            }
        if part is HeadsAttention:
            break
    return names
