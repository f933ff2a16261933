"""What a run of EM is made of: its settings, its path and where it stands."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyro_em.fitting.results.history import EMStatus, EMStep
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.fitting.steps.point import LeftPoint, Point, TracedPoint, Values
from pyro_em.fitting.steps.progress import Bar
from pyro_em.fitting.steps.schemes import Secant
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import restore, snapshot, values_of

if TYPE_CHECKING:
    from pyro_em.fitting.steps.guarded import Guarded


class Keeper(Protocol):
    """Keeps where runs stand, so that another process can go on from there."""

    def after_step(self, em: Guarded, run: EMRun) -> None:
        """Called after each complete step of a run, when callbacks have seen it."""
        ...

    def at_rest(self, em: Guarded, run: EMRun) -> None:
        """Called where the steps of a run end, before the param store gets its values."""
        ...

    def at_fork(self, em: Guarded, run: EMRun) -> None:
        """Called where the path of a run begins to depend on ``max_steps`` or ``tol``."""
        ...


@dataclass(frozen=True, eq=False)
class Settings:
    """What all starts of one fit share.

    Attributes:
        max_steps: Steps at most.
        tol: Estimated remaining gain at which to stop, in nats.
        callbacks: Called with each step; one that returns True stops the run.
        bar: The progress bar.
        begin: When the fit began, for the steps' seconds.
        acceleration: None, ``"auto"`` or the name of a scheme (`pyro_em.fitting.steps.schemes`).
        verify: Whether a fresh trace of the model confirms the first step of a run.
        keeper: Keeps where runs stand; None where nobody asked for it.
    """

    max_steps: int
    tol: float
    callbacks: Sequence[Callable[[EMStep], Any]]
    bar: Bar
    begin: float
    acceleration: str | None = None
    verify: bool = True
    keeper: Keeper | None = None


@dataclass(frozen=True, eq=False)
class Cycle:
    """Where an accelerated run stands in its cycles of extrapolation.

    Attributes:
        start: Where the present cycle began.
        best: The best point seen.
        longest: The longest extrapolation that is tried, in steps of EM.
        num_steps: Complete steps of the run.
        first: The point after the first step of the cycle; None before.
        gain: What the cycle before gained or promises of the next ones, in nats.
        rounding: Gains that are rounding, in nats.
        secants: Of the cycles before, the newest first, as many as the scheme looks at.
        is_over: Whether plain steps are due.
    """

    start: Point
    best: Point
    longest: float
    num_steps: int
    first: Point | None = None
    gain: float = math.inf
    rounding: float = 0.0
    secants: tuple[Secant, ...] = ()
    is_over: bool = False


class Seen:
    """A snapshot of parameters, to see whether a caller has written others since.

    Args:
        program: The model with its data.
        parameters: A snapshot of the parameters.
    """

    def __init__(self, program: Program, parameters: Mapping[str, Tensor]) -> None:
        self.program, self.parameters = program, parameters

    def is_changed(self) -> bool:
        """Whether a parameter has another value now."""
        now = self.program.graph.parameters
        return not all(torch.equal(now[n].unconstrained, v) for n, v in self.parameters.items())


@dataclass(frozen=True, eq=False)
class Held:
    """What the param store holds.

    Attributes:
        values: The constrained values that were read from it or written into it last.
        unconstrained: What it holds of them.
    """

    values: Values
    unconstrained: Mapping[str, Tensor]


@dataclass(eq=False)
class EMRun:
    """One start: its name in words, its path and where it stands.

    Attributes:
        parameters: Unconstrained values at the last step that was recorded.
        status: Why it ended.
        message: More about the status.
        last: The point after the last complete step; None before any E-step.
        entering: The objective entering each complete step, in nats.
        after: The bound after the M-step of each, in nats.
        initial_values: Constrained values where it began, whose zeros are structural.
        verified: Unconstrained values that a fresh trace of the model confirmed last on these data:
            after the first step, or where a run begins that is verified later; None before.
        verified_at: How many steps were complete there.
        verifies_later: Whether the first verification waits for some steps, and is one with that at
            the end of a run that has no more (`pyro_em.fitting.steps.verified_steps`).
        plain_from: The first step since which all have been plain steps on the same data.
        seen: The recorded parameters, to notice where a caller has written others.
        recorded: The point whose parameters ``parameters`` holds.
        name: How it began, in words.
        began_symmetric: Whether no argument told the components apart where it began.
        is_replaced: Whether another candidate has replaced it.
        verify_at: How many steps were complete when the data were last read anew.
        is_resumed: Whether it goes on where another process left it.
        judges: Whether the last step is one that the stopping rule looks at.
        stretch: How many steps were complete where the present plain steps of an accelerated run began.
        cycle: Where it stands in its cycles of extrapolation.
        rest: Where it stood when its steps ended, as its keeper keeps it.
        fork: Where its path began to depend on ``max_steps`` or ``tol``, likewise.
    """

    parameters: dict[str, Tensor]
    status: EMStatus = EMStatus.MAX_STEPS
    message: str = ""
    last: Point | None = None
    entering: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    initial_values: dict[str, Tensor] = field(default_factory=dict)
    verified: dict[str, Tensor] | None = None
    verified_at: int = 0
    verifies_later: bool = False
    plain_from: int = 0
    seen: Seen | None = None
    recorded: Point | None = None
    name: str = ""
    began_symmetric: bool = False
    is_replaced: bool = False
    verify_at: int = 0
    is_resumed: bool = False
    judges: bool = False
    stretch: int | None = None
    cycle: Cycle | None = None
    rest: Any = None
    fork: Any = None

    def plain_path(self) -> list[float]:
        """The last objectives that plain EM steps entered, enough for the stopping rule."""
        return self.entering[max(self.plain_from, self.num_steps - 7) :]

    @property
    def num_steps(self) -> int:
        """Complete steps."""
        return len(self.entering)

    @property
    def objective(self) -> float:
        """The bound at the last complete step; nan if there is none."""
        return math.nan if self.last is None else self.last.objective

    @property
    def held(self) -> Held | None:
        """What the param store holds while nobody writes it, where that is known."""
        at = self.recorded
        if not isinstance(at, (TracedPoint, SumsPoint)):
            return None
        return Held(at.values, self.parameters)

    def values(self, program: Program) -> Values:
        """The constrained values that the param store holds after the last step was recorded."""
        at = self.last
        # Where nobody sees steps, the last one has its E-step at what the store holds.
        is_of_store = self.verifies_later and at is self.recorded
        if is_of_store and isinstance(at, (TracedPoint, SumsPoint)):
            return at.values
        return values_of(program.graph.parameters)

    def take(self, entering: float, bound: float, point: Point) -> None:
        """Record a complete step: the objective entering it, the bound after its M-step, its end."""
        before, index = self.last, len(self.after)
        try:
            self.judges = True
            self.entering.append(entering)
            self.after.append(bound)
            self.last = point
        except KeyboardInterrupt:  # half a step is no step
            self.last = before
            self.truncate(index)
            raise

    def truncate(self, num_steps: int) -> None:
        """Forget the steps after the first ``num_steps``."""
        del self.entering[num_steps:], self.after[num_steps:]

    def copied(self) -> EMRun:
        """The same run as it stands now, with a path of its own."""
        out = copy.copy(self)
        out.entering, out.after = list(self.entering), list(self.after)
        return out

    def record(self, program: Program, point: Point) -> None:
        """Remember parameters and E-step of the last complete step."""
        self.parameters = snapshot(program.graph.parameters)
        self.last = self.recorded = point
        self.seen = Seen(program, self.parameters)

    def leave(self) -> None:
        """Keep parameters, path and objective, and let the tables of the last E-step go."""
        self.seen = None
        if self.last is not None and not isinstance(self.last, LeftPoint):
            self.last = self.recorded = LeftPoint.of(self.last)

    def note_verified(self) -> None:
        """Remember that the recorded parameters are what a fresh trace confirms."""
        self.verified, self.verified_at = self.parameters, self.num_steps

    def go_back(self, program: Program) -> None:
        """Return to the last parameters that were verified."""
        assert self.verified is not None
        restore(program.graph.parameters, self.verified)
        self.truncate(self.verified_at)
        self.verifies_later = False
        self.plain_from = self.verify_at
        self.message = ""


def best_of(runs: Sequence[EMRun]) -> EMRun:
    """The best evidence among sound starts; a degenerate one only where there is no other."""
    usable = [r for r in runs if r.last is not None]
    sound = [r for r in usable if r.status not in (EMStatus.DEGENERATE, EMStatus.UNBOUNDED)]
    return max(sound or usable, key=lambda r: r.objective)
