"""SQUAREM: fewer EM steps, by extrapolating along two of them.

With θ1 = EM(θ0), θ2 = EM(θ1), r = θ1 − θ0 and v = (θ2 − θ1) − r, in the unconstrained space,

    θ' = θ0 − 2 α r + α² v,     α = −‖r‖ / ‖v‖     (scheme S3; α = −1 is θ2)

θ' is where the next cycle starts if the evidence there is not more than a slack below the best seen
(a strict guard costs several times the steps); otherwise α moves half-way to −1, and then θ2 is
taken. Coordinates that are not finite (a probability of zero) are left to EM. The last steps of a fit
are always plain ones, and only they can stop it.

Source: Varadhan and Roland (2008), "Simple and globally convergent methods for accelerating the
convergence of any EM algorithm", Scandinavian Journal of Statistics 35(2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.errors import DataError, DegenerateError, Handover
from pyro_em.fitting.em_map import EMMap, values_at
from pyro_em.fitting.guarded import Guarded, Step
from pyro_em.fitting.point import Point, SumsPoint, Values
from pyro_em.fitting.result import EMStatus
from pyro_em.fitting.run import Cycle, Run, Settings
from pyro_em.plan.program import Program

PLAIN_STEPS = 8


_SLACK = 0.5

# The errors of a point, or of an M-step from it, that no cycle can use: plain steps judge it.
_UNUSABLE = (DataError, DegenerateError, torch.linalg.LinAlgError, ValueError)


def accelerate(
    em: Guarded, settings: Settings, run: Run, r: int, shown: Callable[[Step], bool]
) -> EMStatus | None:
    """Cycles of SQUAREM from where a run stands, until plain steps are due.

    They are due when the gain that a plain step promises is small, when few steps are left, or when
    something has to be judged by a plain step. The run's last point is the best one seen.

    Args:
        em: The map.
        settings: What all starts share.
        run: Its steps and where it stands.
        r: The start's number.
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
        settings.bar.update(r, after.objective)
        return shown(Step(before, bound, after))

    stopped: EMStatus | None = None
    try:
        while stopped is None and not run.cycle.is_over:
            stopped = _half(em, settings, run, step_of, note)
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


def _half(
    em: Guarded,
    settings: Settings,
    run: Run,
    step_of: EMMap,
    note: Callable[[Point, float, Point], bool],
) -> EMStatus | None:
    """One of the two steps of a cycle; returns why the run is over, if it is."""
    cycle, eps = run.cycle, em.program.graph.eps
    assert cycle is not None
    if cycle.first is None:
        are_few = run.num_steps + 2 + PLAIN_STEPS > settings.max_steps
        if are_few or cycle.gain <= max(settings.tol, cycle.rounding):
            _end(em, settings, run)
            return None
        values, bound = _m_step(step_of, cycle.start)
        first = _e_step(step_of, values)
        stops = note(cycle.start, bound, first)
        run.cycle = replace(cycle, first=first, num_steps=run.num_steps)
    else:
        start, first = cycle.start, cycle.first
        second, bound = _m_step(step_of, first)
        best = _better(cycle.best, first)
        run.cycle = replace(cycle, best=best)
        theta = Unconstrained(em.program, second)
        u = [theta.vector(v) for v in (values_at(start), values_at(first), second)]
        extrapolated, alpha, ratio = _extrapolate(u, cycle.longest)
        gain = first.objective - start.objective
        promised = gain * ratio**2 / (1 - ratio**2)
        rounding = 8 * eps * abs(start.objective)
        reached = _accepted(step_of, theta, second, u, extrapolated, alpha, best.objective)
        longest = 4 * cycle.longest if -alpha >= cycle.longest else cycle.longest
        stops = note(first, bound, reached)
        run.cycle = Cycle(
            reached,
            _better(best, reached),
            longest,
            run.num_steps,
            gain=max(gain, promised),
            rounding=rounding,
        )
    changed = bool(settings.callbacks) and em.program.is_changed()
    if stops or changed:
        # Plain steps read the model anew, where a callback has written data.
        last = run.cycle.first or run.cycle.best
        run.cycle = replace(run.cycle, best=_better(run.cycle.best, last), is_over=changed)
    return EMStatus.STOPPED if stops else None


def _end(em: Guarded, settings: Settings, run: Run) -> None:
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


def _e_step(em: EMMap, values: Values) -> Point:
    """The E-step at some values.

    Raises:
        Handover: If there is no usable one.
    """
    try:
        return em.e_step(values)
    except _UNUSABLE as error:
        raise Handover from error


def _m_step(em: EMMap, point: Point) -> tuple[Values, float]:
    """The values after the M-step from a point, and the bound there.

    Raises:
        Handover: If there is no usable one.
    """
    try:
        return em.m_step(point)
    except _UNUSABLE as error:
        raise Handover from error


def _better(a: Point, b: Point) -> Point:
    return b if b.objective >= a.objective else a


class Unconstrained:
    """All parameters as one vector of real numbers.

    Args:
        program: The model with its data.
        like: Values, for their shapes and dtypes.
    """

    def __init__(self, program: Program, like: Values) -> None:
        self.program, self.like = program, like

    def vector(self, values: Values) -> Tensor:
        """From constrained values."""
        parts = []
        for name, value in values.items():
            constraint = self.program.graph.parameters[name].constraint
            inverse = transform_to(constraint).inv(value.to(torch.float64))
            parts.append(inverse.reshape(-1))
        return torch.cat(parts)

    def values(self, vector: Tensor) -> dict[str, Tensor]:
        """Back from a vector."""
        out, begin = {}, 0
        for name, value in self.like.items():
            transform = transform_to(self.program.graph.parameters[name].constraint)
            shape = transform.inverse_shape(value.shape)
            end = begin + math.prod(shape)
            out[name] = transform(vector[begin:end].reshape(shape)).to(value.dtype)
            begin = end
        return out


def _extrapolate(u: list[Tensor], longest: float) -> tuple[Tensor, float, float]:
    """θ', its α, and ‖θ2 − θ1‖ / ‖θ1 − θ0‖, an estimate of EM's rate."""
    finite = torch.isfinite(torch.stack(u)).all(0)
    zero = torch.zeros_like(u[0])
    r = torch.where(finite, u[1] - u[0], zero)
    step = torch.where(finite, u[2] - u[1], zero)
    v = step - r
    size, bend = float(r.norm()), float(v.norm())
    ratio = min(float(step.norm()) / size, 1 - 1e-9) if size > 0 else 0.0
    alpha = -min(max(size / bend, 1.0), longest) if bend > 0 else -1.0
    return _along(u, alpha), alpha, ratio


def _along(u: list[Tensor], alpha: float) -> Tensor:
    finite = torch.isfinite(torch.stack(u)).all(0)
    r = u[1] - u[0]
    moved = u[0] - 2 * alpha * r + alpha**2 * (u[2] - u[1] - r)
    return torch.where(finite, moved, u[2])


def _accepted(
    em: EMMap,
    theta: Unconstrained,
    second: Values,
    u: list[Tensor],
    extrapolated: Tensor,
    alpha: float,
    best: float,
) -> Point:
    """The extrapolated point if the evidence there will do, one half as far, or plain θ2."""
    for _ in range(2):
        if alpha >= -1:
            break
        try:
            values = theta.values(extrapolated)
            if all(bool(torch.isfinite(v).all()) for v in values.values()):
                there = _e_step(em, values)
                if there.objective >= best - _SLACK:
                    return there
        except Handover:
            pass
        alpha = (alpha - 1) / 2
        extrapolated = _along(u, alpha)
    return _e_step(em, second)
