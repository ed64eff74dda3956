"""A mechanism per block under a budget of time or memory.

The loss of a set of blocks is not the sum of the losses of its blocks: errors of the first blocks
change what later ones see. So every set that counts is run on the images. From each mechanism in
all blocks, and from the best mechanism for each block alone, blocks go back to the original one
by one: of the `TRIED` that hurt most alone, the one that helps most, as long as the budget
holds. The best end is then improved block by block with the other mechanisms.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from timm_xformers.analysing.losses import Assignment, Losses
from timm_xformers.errors import UsageError
from timm_xformers.replace.plan import block_words

__all__ = ["Budget", "Costs", "Proposal", "mapping_of", "propose", "read_budget"]

TRIED = 3


@dataclass(frozen=True)
class Budget:
    """How many times as fast, or in how many times less memory, a model shall run.

    Attributes:
        kind: ``time`` or ``memory``.
        factor: At least so many times.
    """

    kind: str
    factor: float

    def __str__(self) -> str:
        """As the command line has it."""
        return f"{'memory:' if self.kind == 'memory' else ''}{self.factor:g}x"


def read_budget(text: str) -> Budget:
    """Read ``2x``, ``1.5x`` or ``memory:2x``.

    Raises:
        UsageError: It is none of these.
    """
    found = re.fullmatch(r"(?:(time|memory):)?(\d+(?:\.\d+)?)x", text)
    if found is None or float(found[2]) <= 0:
        raise UsageError(
            f"--budget {text!r} is none; write how many times as fast, such as 2x, or memory:2x "
            "for half of the memory."
        )
    return Budget(found[1] or "time", float(found[2]))


@dataclass(frozen=True)
class Costs:
    """Seconds or MiB of one forward pass, measured for one mechanism in all blocks.

    Attributes:
        kind: ``time`` or ``memory``.
        original: Of the model as it is.
        whole: By mechanism.
        count: Blocks that were replaced.
    """

    kind: str
    original: float
    whole: Mapping[str, float]
    count: int

    def gain(self, assignment: Assignment) -> float:
        """How many times less an assignment should take.

        Time is saved block by block. The peak of memory is that of the block which takes most.
        """
        used = [*assignment.values()]
        if self.kind == "memory":
            peaks = [self.whole[name] for name in used]
            peaks += [self.original] if len(used) < self.count else []
            return self.original / max(peaks)
        saved = sum((self.original - self.whole[name]) / self.count for name in used)
        return self.original / max(self.original - saved, 1e-12)


@dataclass(frozen=True)
class Proposal:
    """What came out.

    Attributes:
        assignment: Mechanism by block.
        gain: What `Costs` expects of it.
        met: Whether that is within the budget.
    """

    assignment: dict[int, str]
    gain: float
    met: bool


def propose(losses: Losses, costs: Costs, factor: float, most_exact: int) -> Proposal:
    """Search.

    Args:
        losses: What sets of blocks lose; the search asks for few hundred at most.
        costs: What they cost.
        factor: Of the budget.
        most_exact: Blocks that may stay as they are.

    Returns:
        The set of least divergence found within the budget; where none is, the cheapest one.
    """
    whole = [dict.fromkeys(losses.blocks, name) for name in costs.whole]
    best_alone = {
        number: min(costs.whole, key=lambda name: losses.of({number: name}).kl)
        for number in losses.blocks
    }
    starts = [start for start in [*whole, best_alone] if costs.gain(start) >= factor]
    if not starts:
        cheapest = max(whole, key=costs.gain)
        losses.of(cheapest)
        return Proposal(cheapest, costs.gain(cheapest), False)
    ends = [_relax(losses, costs, factor, most_exact, start) for start in starts]
    best = min(ends, key=lambda end: losses.of(end).kl)
    for number in losses.blocks:
        others = [{**best, number: name} for name in costs.whole]
        kept = {block: name for block, name in best.items() if block != number}
        if len(losses.blocks) - len(kept) <= most_exact:
            others.append(kept)
        allowed = [other for other in others if costs.gain(other) >= factor]
        best = min([best, *allowed], key=lambda one: losses.of(one).kl)
    return Proposal(dict(sorted(best.items())), costs.gain(best), True)


def _relax(
    losses: Losses, costs: Costs, factor: float, most_exact: int, start: dict[int, str]
) -> dict[int, str]:
    now = start
    while len(losses.blocks) - len(now) < most_exact:
        hurting = sorted(now, key=lambda n: losses.of({n: now[n]}).kl, reverse=True)
        options = [
            {number: name for number, name in now.items() if number != left}
            for left in hurting[:TRIED]
        ]
        options = [option for option in options if costs.gain(option) >= factor]
        best = min([now, *options], key=lambda one: losses.of(one).kl)
        if best is now:
            break
        now = best
    return now


def mapping_of(assignment: Assignment) -> dict[str, str]:
    """The same as `replace_attention` takes it: ``{"0-1,11": "nystrom_l64"}``."""
    names = dict.fromkeys(assignment.values())
    return {block_words(n for n, own in assignment.items() if own == name): name for name in names}
