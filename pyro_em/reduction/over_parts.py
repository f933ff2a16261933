"""Parts one after the other: what has been added of one is kept, the part itself is let go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from pyro_em.reduction.reduction import OneProcess, Reduction, Whole
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
    _counted: list[int] = field(default_factory=list)

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
        return sum(of(part) for part in self._pass()) > 0

    def each(self) -> Iterator[Reduction[P]]:
        """See `Reduction.each`."""
        for part in self._pass():
            yield Whole(part)
            del part

    @property
    def number(self) -> int | None:
        """See `Reduction.number`."""
        return self._counted[-1] if self._counted else None

    def _pass(self) -> Iterator[P]:
        number = 0
        for part in self.parts():
            number += 1
            yield part
            del part
        self._counted[:] = [number]

    def _folded(self, of: Callable[[P], T], both: Callable[[T, T], T]) -> T:
        total: T | None = None
        for part in self._pass():
            own = of(part)
            total = own if total is None else both(total, own)
        assert total is not None
        return total
