"""The same parts, seen as something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from pyro_em.reduction.reduction import Reduction

Q = TypeVar("Q")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SeenAs(Reduction[Q]):
    """A reduction over what a function makes of each part.

    Attributes:
        over: The parts.
        to: From a part to what takes its place, made whenever the part is visited.

    Example:
        >>> from pyro_em.reduction.over_parts import OverParts
        >>> SeenAs(OverParts(lambda: iter([1, 2])), float).sum(lambda x: x / 2)
        1.5
    """

    over: Reduction[Any]
    to: Callable[[Any], Q]

    @property
    def is_whole(self) -> bool:
        """See `Reduction.is_whole`."""
        return self.over.is_whole

    def sum(self, of: Callable[[Q], T]) -> T:
        """See `Reduction.sum`."""
        return self.over.sum(lambda part: of(self.to(part)))

    def max(self, of: Callable[[Q], T]) -> T:
        """See `Reduction.max`."""
        return self.over.max(lambda part: of(self.to(part)))

    def any(self, of: Callable[[Q], bool]) -> bool:
        """See `Reduction.any`."""
        return self.over.any(lambda part: of(self.to(part)))

    def each(self) -> Iterator[Reduction[Q]]:
        """See `Reduction.each`."""
        for one in self.over.each():
            yield SeenAs(one, self.to)
            del one

    @property
    def number(self) -> int | None:
        """See `Reduction.number`."""
        return self.over.number

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See `Reduction.from_first`."""
        return self.over.from_first(make)

    def alike(self, value: T) -> T:
        """See `Reduction.alike`."""
        return self.over.alike(value)

    def gathered(self, make: Callable[[], Any]) -> list[Any]:
        """See `Reduction.gathered`."""
        return self.over.gathered(make)

    def together(self) -> AbstractContextManager[None]:
        """See `Reduction.together`."""
        return self.over.together()
