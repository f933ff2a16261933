"""Parts one after the other: what has been added of one is kept, the part itself is let go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from pyro_em.reduction.reduction import OneProcess
from pyro_em.reduction.trees import added, larger

P = TypeVar("P", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class OverParts(OneProcess[P]):
    """Goes through parts that are made one after the other, and anew in each pass.

    Attributes:
        parts: Makes the parts of one pass; at least one.

    Example:
        >>> over = OverParts(lambda: iter([1.0, 2.0, 4.0]))
        >>> over.sum(lambda x: {"x": x, "xx": x * x}), over.max(lambda x: x)
        ({'x': 7.0, 'xx': 21.0}, 4.0)
    """

    parts: Callable[[], Iterable[P]]

    @property
    def is_whole(self) -> bool:
        """See `Reduction.is_whole`."""
        return False

    def sum(self, of: Callable[[P], T]) -> T:
        """See `Reduction.sum`."""
        return self._folded(of, added)

    def max(self, of: Callable[[P], T]) -> T:
        """See `Reduction.max`."""
        return self._folded(of, larger)

    def any(self, of: Callable[[P], bool]) -> bool:
        """See `Reduction.any`."""
        return sum(of(part) for part in self.parts()) > 0

    def _folded(self, of: Callable[[P], T], both: Callable[[T, T], T]) -> T:
        total: T | None = None
        for part in self.parts():
            own = of(part)
            total = own if total is None else both(total, own)
        assert total is not None
        return total
