"""The steps of a loop by their pattern: names and dimensions of any number of members.

A group of a hundred thousand steps has as many names, and hardly anybody asks for one. Here they are
made when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, Self, TypeVar, overload

V = TypeVar("V")


@dataclass(frozen=True)
class Stem:
    """The name of a site at any step: what is before the step's number, and what after it."""

    before: str
    after: str = ""

    def at(self, t: int) -> str:
        """The name at a step."""
        return f"{self.before}{t}{self.after}"

    def step(self, name: str) -> int | None:
        """The step of a name; None if it is none of these.

        Example:
            >>> Stem("z_").step("z_12"), Stem("z_").step("z_012"), Stem("z_").step("w_1")
            (12, None, None)
        """
        end = len(name) - len(self.after)
        digits = name[len(self.before) : end]
        fits = digits.isdecimal() and (digits == "0" or digits[0] != "0")
        return int(digits) if fits and name == f"{self.before}{digits}{self.after}" else None


@dataclass(frozen=True)
class StepRead:
    """A latent of a loop that is read so many steps later."""

    stem: Stem
    lag: int


@dataclass(frozen=True)
class Stretch:
    """Steps of a loop that are members of one group, one after the other; or one site by itself.

    Attributes:
        name: The site's name.
        start: The first step.
        stop: The step after the last one.
        plates: Of each step.
        read: The latents that each step reads.
    """

    name: Stem | str
    start: int
    stop: int
    plates: tuple[str, ...]
    read: tuple[StepRead | str, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    def name_of(self, i: int) -> str:
        """The name of a member."""
        return self.name if isinstance(self.name, str) else self.name.at(self.start + i)

    def dims_of(self, i: int) -> tuple[str, ...]:
        """The names of a member's dimensions."""
        t = self.start + i
        own = (r if isinstance(r, str) else r.stem.at(t - r.lag) for r in self.read)
        return (*self.plates, *own)

    def index(self, name: str) -> int | None:
        """The place of a name among these; None if it is not there."""
        if isinstance(self.name, str):
            return 0 if name == self.name else None
        t = self.name.step(name)
        return t - self.start if t is not None and self.start <= t < self.stop else None


class _OfStretches(Sequence[V]):
    """One value for each member of some stretches."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.stretches = tuple(stretches)
        self._ends = tuple(accumulate(len(s) for s in self.stretches))

    def _of(self, stretch: Stretch, i: int) -> V:
        raise NotImplementedError

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> V: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[V]: ...

    def __getitem__(self, index: int | slice) -> V | Sequence[V]:
        if isinstance(index, slice):
            chosen = range(*index.indices(len(self)))
            if chosen == range(len(self)):
                return self
            if chosen and chosen.step == 1:
                return self._cut(chosen.start, chosen.stop)
            return tuple(self[i] for i in chosen)
        i = index + len(self) if index < 0 else index
        for stretch, end in zip(self.stretches, self._ends, strict=True):
            if 0 <= i < end:
                return self._of(stretch, i - end + len(stretch))
        raise IndexError(index)

    def _cut(self, begin: int, end: int) -> Self:
        """Some of them, one after the other."""
        out, at = [], 0
        for stretch in self.stretches:
            low, high = max(begin - at, 0), min(end - at, len(stretch))
            if low < high:
                start = stretch.start + low
                out.append(replace(stretch, start=start, stop=start + high - low))
            at += len(stretch)
        return type(self)(out)

    def __iter__(self) -> Iterator[V]:
        for stretch in self.stretches:
            for i in range(len(stretch)):
                yield self._of(stretch, i)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _OfStretches):
            if type(other) is not type(self) or len(other) != len(self):
                return False
            return self.stretches == other.stretches or tuple(self) == tuple(other)
        return isinstance(other, tuple) and tuple(self) == other

    def __hash__(self) -> int:
        return hash((len(self), self[0]))

    def __repr__(self) -> str:
        return repr(tuple(self))


class Members(_OfStretches[str]):
    """The names of the members."""

    def _of(self, stretch: Stretch, i: int) -> str:
        return stretch.name_of(i)

    def place(self, name: object) -> int | None:
        """The place of a name; None if it is not there."""
        if not isinstance(name, str):
            return None
        for stretch, end in zip(self.stretches, self._ends, strict=True):
            i = stretch.index(name)
            if i is not None:
                return end - len(stretch) + i
        return None

    def __contains__(self, name: object) -> bool:
        return self.place(name) is not None

    def index(self, name: Any, start: int = 0, stop: int | None = None) -> int:
        """The place of a name."""
        found = self.place(name)
        if found is None:
            raise ValueError(name)
        return found


class Dims(_OfStretches[tuple[str, ...]]):
    """The names of the members' dimensions: plates, then latents."""

    def _of(self, stretch: Stretch, i: int) -> tuple[str, ...]:
        return stretch.dims_of(i)


class Repeated(Sequence[V]):
    """One value so many times."""

    def __init__(self, value: V, number: int) -> None:
        self.value, self.number = value, number

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, index: int) -> V: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[V]: ...

    def __getitem__(self, index: int | slice) -> V | Sequence[V]:
        if isinstance(index, slice):
            return Repeated(self.value, len(range(*index.indices(self.number))))
        if not -self.number <= index < self.number:
            raise IndexError(index)
        return self.value

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Repeated):
            return self.number == other.number and bool(self.value == other.value)
        return isinstance(other, tuple) and tuple(self) == other

    __hash__ = None  # type: ignore[assignment]


class Later(Generic[V]):
    """A value that is made when it is asked for."""

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make

    @cached_property
    def value(self) -> V:
        """The value."""
        return self._make()

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.value,)


def _made(value: V) -> Later[V]:
    return Later(lambda: value)


class LaterDict(Mapping[str, V]):
    """A mapping that is made when it is asked for."""

    def __init__(self, make: Callable[[], Mapping[str, V]]) -> None:
        self._later = Later(make)

    def __getitem__(self, name: str) -> V:
        return self._later.value[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._later.value)

    def __len__(self) -> int:
        return len(self._later.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self._later.value),)


class LaterTuple(Sequence[V]):
    """A sequence that is made when it is asked for."""

    def __init__(self, make: Callable[[], tuple[V, ...]]) -> None:
        self._later = Later(make)

    @overload
    def __getitem__(self, index: int) -> V: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[V, ...]: ...

    def __getitem__(self, index: int | slice) -> V | tuple[V, ...]:
        return self._later.value[index]

    def __iter__(self) -> Iterator[V]:
        return iter(self._later.value)

    def __len__(self) -> int:
        return len(self._later.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, LaterTuple)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._later.value)

    def __repr__(self) -> str:
        return repr(self._later.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self._later.value),)
