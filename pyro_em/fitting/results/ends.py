"""Where several starts of one fit ended, and how many of them where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_em.fitting.results.history import EMStatus


_SAME = 1e-2  # nats within which two ends count as one

_SHOWN = 4


@dataclass(frozen=True)
class End:
    """Where one start ended.

    Attributes:
        start: How it began, in words.
        objective: Its last objective in nats (the log evidence, with the log prior); nan for none.
        status: Why it ended.
        num_steps: Its steps.
        has_collapsed: Whether an update was degenerate, or there was none.
    """

    start: str
    objective: float
    status: EMStatus
    num_steps: int
    has_collapsed: bool = False


def ends_in_words(ends: Sequence[End]) -> str:
    """How many starts ended where, best first, and how they began.

    Example:
        >>> from pyro_em import EMStatus
        >>> done = EMStatus.CONVERGED
        >>> ends = [End("random points", -180.2, done, 30), End("random hard", -186.6, done, 40)]
        >>> ends_in_words([*ends, End("random points", -180.2, done, 35)])
        '3 runs: 2 ended at -180.200 (random points 2), 1 at -186.600 (random hard 1)'
    """
    broken = sum(e.has_collapsed for e in ends)
    sound = sorted(
        (e for e in ends if not e.has_collapsed), key=lambda e: e.objective, reverse=True
    )
    groups: list[list[End]] = []
    for end in sound:
        if groups and groups[-1][0].objective - end.objective <= _SAME:
            groups[-1].append(end)
        else:
            groups.append([end])
    parts = []
    for i, group in enumerate(groups[:_SHOWN]):
        kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(e.start for e in group).items())
        ended = " ended" * (i == 0)
        parts.append(f"{len(group)}{ended} at {group[0].objective:.3f} ({kinds})")
    rest = sum(len(g) for g in groups[_SHOWN:])
    if rest:
        parts.append(f"{rest} lower, down to {groups[-1][-1].objective:.3f}")
    if broken:
        parts.append(f"{broken} collapsed")
    return f"{len(ends)} runs: {', '.join(parts)}"
