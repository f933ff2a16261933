"""What a look knows of the loops over indices: their steps, the places in them, and the look itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

ALIGNED, EVENTS, PLAIN = "aligned", "events", "plain"


_FEW = 61  # steps of a long loop whose looks go by values

EARLIER = "<earlier>"  # the tag of what comes from steps before those that a step may read


current_series: ContextVar[Series | None] = ContextVar("series", default=None)


class NotVectorized(BaseException):
    """A body that no index tensor can serve; says why. No `Exception`: a model might catch those.

    An empty reason is one that is no matter of the user's: a loop does as well.
    """


@dataclass(frozen=True)
class Place:
    """Where in a loop a site was met.

    Attributes:
        loop: The loop's name.
        first: The step, where it was an integer; else None.
        shift: Of an index tensor arange(shift, …); else None.
        before: The name up to the index; of an integer step the whole name.
        after: The name after it.
    """

    loop: str
    first: int | None
    shift: int | None
    before: str
    after: str = ""

    def at(self, t: int) -> str:
        """The site's name at a step."""
        return f"{self.before}{t}{self.after}"


@dataclass(eq=False)
class Loop:
    """One loop as a run met it.

    Attributes:
        name: As given; the name of its plate.
        size: Its steps.
        history: How many steps back its body reads.
        dim: The dimension of its steps, from the right.
        plates: Sizes of the plates of its first steps, by dimension.
        events: The most event dimensions that a site of its first steps has.
        shift: Of the run that is made now; None at an integer.
        step: The integer of the run that is made now.
        is_done: Whether its last run came to an end.
        chosen: The later steps that are looked at, counted from the first of them; None for all.
    """

    name: str
    size: int
    history: int
    dim: int = 0
    plates: dict[int, int] = field(default_factory=dict)
    events: int = 0
    shift: int | None = None
    step: int = 0
    is_done: bool = False
    chosen: Tensor | None = None

    @property
    def rest(self) -> int:
        """How many steps the index tensors have."""
        return self.size - self.history if self.chosen is None else len(self.chosen)

    def steps(self) -> Tensor:
        """The later steps that index tensors have, counted from the first of them."""
        return torch.arange(self.rest) if self.chosen is None else self.chosen

    def place(self, t: int) -> int:
        """Where a later step is in index tensors."""
        if self.chosen is None:
            return t - self.history
        return int(torch.searchsorted(self.chosen, t - self.history))

    @property
    def form(self) -> tuple[int, int, int]:
        """What must be the same in every run."""
        return self.size, self.history, self.dim


@dataclass(eq=False)
class Series:
    """The loops of a model's runs, while they run over index tensors.

    Attributes:
        way: `ALIGNED`: an index has the meaning that an integer would have at each step, and steps
            are the leftmost dimension; `EVENTS`: the same, and the last dimensions of what it looks
            up are those of an event, even where they may be a plate's; `PLAIN`: it is a tensor of
            one dimension like any other, and steps are where the model says.
        few: Whether part of the steps of a long loop will do.
        is_known: Whether it is known what carries values on: no other site is shown that does not
            count.
        steps: Integers to run over instead, by loop.
        disturbed: Whether the body runs once more, over steps out of order, before the runs that
            carry values on, and all that it computes is tagged: what counts must not notice.
        loops: By name.
        places: Of the sites inside, by name.
        by_numbers: Whether sizes did not tell how something is laid out: numbers have to.
        is_hopeless: Whether the body decides something for all steps at once, so that no way of
            reading indices serves.
    """

    way: str = ALIGNED
    few: bool = False
    is_known: bool = False
    steps: Mapping[str, tuple[int, ...]] | None = None
    disturbed: bool = False
    loops: dict[str, Loop] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    by_numbers: bool = False
    is_hopeless: bool = False
    _run: Any = None
    _met: set[str] = field(default_factory=set)

    @property
    def was_met(self) -> set[str]:
        """Names of the loops that the last run has begun."""
        return self._met

    def enter(self, name: str, size: int, history: int) -> Loop:
        """A loop begins."""
        run = next((m for m in _PYRO_STACK if isinstance(m, TraceMessenger)), None)
        if run is not self._run or run is None:
            self._run, self._met = run, set()
        if name in self._met:
            raise NotVectorized(f"two loops are called '{name}'")
        self._met.add(name)
        loop = Loop(name, size, history)
        if self.few and loop.rest > 4 * _FEW:
            ends, third = loop.rest - 1, _FEW // 3
            inner = torch.linspace(third, ends - third, _FEW - 2 * third).long()
            first = torch.arange(third)
            loop.chosen = torch.cat([first, inner, ends - first.flip(0)])
        return loop

    @property
    def is_cut(self) -> bool:
        """Whether part of the steps of any loop was looked at."""
        return any(loop.chosen is not None for loop in self.loops.values())

    def leave(self, loop: Loop) -> None:
        """A loop ends."""
        loop.is_done = True
        known = self.loops.setdefault(loop.name, loop)
        if known.form != loop.form:
            raise NotVectorized(f"loop '{loop.name}' differs from run to run")

    def carried_on(self, names: Collection[str]) -> dict[str, list[str]]:
        """Of some sites of all later steps, the sites that each is where the step after it reads it."""
        return {name: self._carried_on(name) for name in names}

    def _carried_on(self, name: str) -> list[str]:
        place = self.places.get(name)
        if place is None or place.shift != self.loops[place.loop].history:
            return []
        stem = (place.loop, place.before, place.after)
        return [
            n
            for n, p in self.places.items()
            if n != name and p.shift is not None and (p.loop, p.before, p.after) == stem
        ]

    def require_ends(self) -> None:
        """Refuse a loop that was left before its end."""
        left = [n for n in self._met if n not in self.loops]
        if left:
            raise NotVectorized(f"loop '{left[0]}' was left before its end")


@contextmanager
def vectorizing(series: Series | None) -> Iterator[None]:
    """A block in which loops run over index tensors, as ``series`` says; over integers where None."""
    token = current_series.set(series)
    try:
        yield
    finally:
        current_series.reset(token)
