"""The one way from what one part of the data says to what all of it says.

    E-step of each part → `Reduction.sum` of the expectations → M-step

Whatever touches data is passed as a function of a part. One process with all data at hand is the case
of one part, `Whole`; `pyro_em.reduction.over_parts` goes through parts one after the other, and a group
of processes has a part in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

P = TypeVar("P", covariant=True)
T = TypeVar("T")


class Reduction(Protocol[P]):
    """Goes through all parts, and makes one value of what a function says of each."""

    @property
    def is_whole(self) -> bool:
        """Whether the only part is all of the data."""
        ...

    def sum(self, of: Callable[[P], T]) -> T:
        """The sum over parts of a value that can be added; see `pyro_em.reduction.trees`.

        Args:
            of: From a part to its value.
        """
        ...

    def max(self, of: Callable[[P], T]) -> T:
        """The largest over parts, for each number of a value."""
        ...

    def any(self, of: Callable[[P], bool]) -> bool:
        """Whether it holds of any part; all parts are asked."""
        ...

    def each(self) -> Iterator[Reduction[P]]:
        """The parts one after the other, each as if it were all; of several processes side by side."""
        ...

    @property
    def number(self) -> int | None:
        """How many parts this process has, where it has gone through all of them before."""
        ...

    def from_first(self, make: Callable[[], Any]) -> Any:
        """A value that only the first process with parts makes, and all have."""
        ...

    def alike(self, value: T) -> T:
        """A value that each process has made, as the first one has it: numbers and tensors of it."""
        ...

    def gathered(self, make: Callable[[], Any]) -> list[Any]:
        """What each process makes; something small."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """A block that all processes leave together: what one of them raises in it is raised on all."""
        ...


class OneProcess(Reduction[P]):
    """What a reduction of one process says of all processes."""

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See `Reduction.from_first`."""
        return make()

    def alike(self, value: T) -> T:
        """See `Reduction.alike`."""
        return value

    def gathered(self, make: Callable[[], Any]) -> list[Any]:
        """See `Reduction.gathered`."""
        return [make()]

    def together(self) -> AbstractContextManager[None]:
        """See `Reduction.together`."""
        return nullcontext()


@dataclass(frozen=True, eq=False)
class Whole(OneProcess[P]):
    """All data in one part, at hand.

    Attributes:
        part: The part.
    """

    part: P

    @property
    def is_whole(self) -> bool:
        """See `Reduction.is_whole`."""
        return True

    def sum(self, of: Callable[[P], T]) -> T:
        """See `Reduction.sum`."""
        return of(self.part)

    def max(self, of: Callable[[P], T]) -> T:
        """See `Reduction.max`."""
        return of(self.part)

    def any(self, of: Callable[[P], bool]) -> bool:
        """See `Reduction.any`."""
        return of(self.part)

    def each(self) -> Iterator[Reduction[P]]:
        """See `Reduction.each`."""
        yield self

    @property
    def number(self) -> int:
        """See `Reduction.number`."""
        return 1
