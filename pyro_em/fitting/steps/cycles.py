"""Accelerated EM: cycles of two EM maps, a proposal beyond them, and a guard.

With u1 = EM(u0) and u2 = EM(u1) a scheme (`pyro_em.fitting.steps.schemes`) proposes where EM is going
to. The next cycle starts at the first proposal whose evidence is not more than the scheme's slack below
the best seen, or at u2. A proposal costs an E-step, whose M-step is the first of the next cycle; one
that is not kept is a step of the run like all others, and leads nowhere. The last steps of a fit are
always plain ones, and only they can stop it; the best point seen is where they begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from pyro_em.errors import DataError, DegenerateError, Handover
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps.coordinates import Unconstrained
from pyro_em.fitting.steps.em_map import EMMap, values_at
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.fitting.steps.guarded import Guarded, Step
from pyro_em.fitting.steps.point import Point, Values
from pyro_em.fitting.steps.run import Cycle, EMRun, Settings
from pyro_em.fitting.steps.schemes import Proposals, Scheme, Secant, Triple

PLAIN_STEPS = 8

# The errors of a point, or of an M-step from it, that no cycle can use: plain steps judge it.
_UNUSABLE = (DataError, DegenerateError, torch.linalg.LinAlgError, ValueError)


def accelerate(
    em: Guarded,
    settings: Settings,
    run: EMRun,
    r: int,
    scheme: Scheme,
    shown: Callable[[Step], bool],
) -> EMStatus | None:
    """Cycles of a scheme from where a run stands, until plain steps are due.

    They are due when the gain that a plain step promises is small, when few steps are left, or when
    something has to be judged by a plain step. The run's last point is the best one seen.

    Args:
        em: The map.
        settings: What all starts share.
        run: Its steps and where it stands.
        r: The start's number.
        scheme: Makes the proposals.
        shown: Shows a step to callbacks; returns whether one asks to stop.

    Returns:
        Why the run is over; None where plain steps are due.
    """
    assert run.last is not None
    step_of, last = _map_of(em, settings, run.last if run.cycle is None else run.cycle.start)
    if run.cycle is None:
        run.cycle = Cycle(last, last, 1.0, run.num_steps)

    def note(before: Point, bound: float, after: Point) -> bool:
        """Record one step; returns whether a callback asked to stop."""
        run.take(before.objective, bound, after)
        if settings.callbacks:
            run.record(em.program, after)
        settings.bar.update(r, after.objective)
        return shown(Step(before, bound, after))

    cycles = _Cycles(em, settings, run, scheme, step_of, note)
    stopped: EMStatus | None = None
    try:
        while stopped is None and not run.cycle.is_over:
            stopped = cycles.half()
            if settings.keeper is not None and stopped is None and not run.cycle.is_over:
                settings.keeper.after_step(em, run)
    except Handover:
        run.cycle = replace(run.cycle, is_over=True)
    except KeyboardInterrupt:
        run.truncate(run.cycle.num_steps)
        stopped = EMStatus.INTERRUPTED
    run.last = run.cycle.best
    if stopped is EMStatus.STOPPED:
        run.cycle = None
    return stopped


class _Cycles:
    """Cycles of one run; where they stand is in the run.

    Args:
        em: The map of the fit.
        settings: What all starts share.
        run: The run.
        scheme: Makes the proposals.
        step_of: The map to extrapolate along.
        note: Records one step; returns whether a callback asked to stop.
    """

    def __init__(
        self,
        em: Guarded,
        settings: Settings,
        run: EMRun,
        scheme: Scheme,
        step_of: EMMap,
        note: Callable[[Point, float, Point], bool],
    ) -> None:
        self.em, self.settings, self.run, self.scheme = em, settings, run, scheme
        self.step_of, self.note = step_of, note

    def half(self) -> EMStatus | None:
        """One of the two EM maps of a cycle; returns why the run is over, if it is."""
        em, settings, run, cycle = self.em, self.settings, self.run, self.run.cycle
        assert cycle is not None
        if cycle.first is None:
            most = 2 + self.scheme.tries  # E-steps of a cycle
            are_few = run.num_steps + most + PLAIN_STEPS > settings.max_steps
            if are_few or cycle.gain <= max(settings.tol, cycle.rounding):
                _end(em, settings, run)
                return None
            with _handing_over():
                values, bound = self.step_of.m_step(cycle.start)
                first = self.step_of.e_step(values)
            stops = self.note(cycle.start, bound, first)
            run.cycle = replace(cycle, first=first, num_steps=run.num_steps)
        else:
            stops = self._second(cycle, cycle.first)
        changed = bool(settings.callbacks) and em.program.is_changed()
        if stops or changed:
            # Plain steps read the model anew, where a callback has written data.
            assert run.cycle is not None
            last = run.cycle.first or run.cycle.best
            run.cycle = replace(run.cycle, best=_better(run.cycle.best, last), is_over=changed)
        return EMStatus.STOPPED if stops else None

    def _second(self, cycle: Cycle, first: Point) -> bool:
        """The second EM map and what is proposed beyond; whether a callback asked to stop."""
        run, start = self.run, cycle.start
        with _handing_over():
            second, bound = self.step_of.m_step(first)
        best = _better(cycle.best, first)
        run.cycle = replace(cycle, best=best)
        theta = Unconstrained(self.em.program, second)
        at = Triple(*(theta.vector(v) for v in (values_at(start), values_at(first), second)))
        secant = at.secant()
        secants = (secant, *cycle.secants)[: self.scheme.secants]
        found = self._proposals(at, secants, cycle.longest)
        gain = first.objective - start.objective
        rounding = 8 * self.em.program.graph.eps * abs(start.objective)
        allowed = max(self.scheme.slack, rounding)
        reached, stops, rejected = self._guarded(
            first, bound, theta, found, second, best.objective - allowed
        )
        ratio = _ratio(secant)
        run.cycle = Cycle(
            reached,
            _better(best, reached),
            found.rejected if rejected else found.kept,
            run.num_steps,
            gain=max(gain, gain * ratio**2 / (1 - ratio**2)),
            rounding=rounding,
            secants=secants,
        )
        return stops

    def _proposals(self, at: Triple, secants: tuple[Secant, ...], limit: float) -> Proposals:
        """The proposals of the first process, where there are several: theirs may be rounded."""
        data = self.em.data
        if data is None:
            return self.scheme.proposals(at, secants, limit)
        made: Proposals = data.over.from_first(lambda: self.scheme.proposals(at, secants, limit))
        return made

    def _guarded(
        self,
        before: Point,
        bound: float,
        theta: Unconstrained,
        found: Proposals,
        second: Values,
        least: float,
    ) -> tuple[Point, bool, bool]:
        """The first proposal whose evidence will do, or the second point of the cycle.

        Args:
            before: The point of the E-step before.
            bound: The bound after its M-step.
            theta: Coordinates.
            found: What is proposed.
            second: The values of the second point.
            least: What the evidence has to be at least.

        Returns:
            The point, whether a callback asked to stop, and whether a proposal was not kept.
        """
        rejected = False
        for vector in found.points:
            there = self._tried(theta.values(vector))
            if there is not None:
                stops = self.note(before, bound, there)
                if there.objective >= least or stops:
                    return there, stops, rejected
                before, bound = there, there.objective  # no M-step follows
            rejected = True
        with _handing_over():
            there = self.step_of.e_step(second)
        return there, self.note(before, bound, there), rejected

    def _tried(self, values: Values) -> Point | None:
        """The E-step at proposed values; None where it has none, or no evidence."""
        if not all(bool(torch.isfinite(v).all()) for v in values.values()):
            return None
        try:
            there = self.step_of.e_step(values)
        except (Handover, *_UNUSABLE):
            return None
        return there if math.isfinite(there.objective) else None


def _ratio(secant: Secant) -> float:
    """‖u2 − u1‖ / ‖u1 − u0‖, an estimate of EM's rate."""
    size = float(secant.d.norm())
    return min(float(secant.v.norm()) / size, 1 - 1e-9) if size > 0 else 0.0


def _end(em: Guarded, settings: Settings, run: EMRun) -> None:
    """Plain steps are due, because of ``max_steps`` or ``tol``."""
    assert run.cycle is not None
    if settings.keeper is not None:
        settings.keeper.at_fork(em, run)
    run.cycle = replace(run.cycle, is_over=True)


def _map_of(em: Guarded, settings: Settings, last: Point) -> tuple[EMMap, Point]:
    """The map to extrapolate along: on sums, where nobody watches and the point is one of sums."""
    quick = em.program.compiled and not settings.callbacks
    if em.quick is not None and quick and isinstance(last, SumsPoint):
        return em.quick, last
    if isinstance(last, SumsPoint):
        return em.sound, em.sound.judged(last)
    return em.sound, last


@contextmanager
def _handing_over() -> Iterator[None]:
    """A step of which plain steps are the judge where there is nothing usable.

    Raises:
        Handover: In place of an error of a point, or of an M-step from it.
    """
    try:
        yield
    except _UNUSABLE as error:
        raise Handover from error


def _better(a: Point, b: Point) -> Point:
    return b if b.objective >= a.objective else a
