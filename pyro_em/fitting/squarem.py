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

import torch
from torch import Tensor

from pyro_em.errors import DataError, DegenerateError, Handover
from pyro_em.fitting.em_map import EMMap, Values, as_step, settle
from pyro_em.fitting.em_on_sums import Iteration
from pyro_em.fitting.result import EMStatus
from pyro_em.fitting.run import Deferred, Iterate, Run, Settings
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import values_of

PLAIN_STEPS = 8


_SLACK = 0.5


def accelerate(
    program: Program, settings: Settings, run: Run, iteration: Iteration | None, r: int
) -> None:
    """Cycles of SQUAREM from the run's last iterate, until plain steps are due.

    They are due when the gain that a plain step promises is small, when few steps are left, or when
    something has to be judged by a full step. The run is left at the best iterate seen.

    Args:
        program: The model with its data.
        settings: What all starts share.
        run: Its steps and parameters.
        iteration: The compiled step, or None.
        r: The start's number.
    """
    assert run.last is not None
    if iteration is None and isinstance(run.last, Deferred):
        run.last = run.last.judged()
    values: Values = values_of(program.graph.parameters)
    if isinstance(run.last, Deferred):
        values = run.last.point.values
    else:
        iteration = None
    em = EMMap(program, iteration)
    eps = program.graph.eps
    at, best = (values, run.last), (values, run.last)
    longest = 1.0
    try:
        while run.num_steps + 2 + PLAIN_STEPS <= settings.max_steps:
            start, last = at
            first, bound = em.m_step(last)
            reached = em.e_step(first)
            if _record(program, settings, run, last, bound, reached, r):
                best = _better(best, (first, reached))
                return
            gain = reached.objective - last.objective
            second, bound = em.m_step(reached)
            best = _better(best, (first, reached))
            u = [em.unconstrained(v) for v in (start, first, second)]
            extrapolated, alpha, ratio = _extrapolate(u, longest)
            promised = gain * ratio**2 / (1 - ratio**2)
            small = max(settings.tol, 8 * eps * abs(last.objective))
            at = _accepted(em, second, u, extrapolated, alpha, best[1].objective)
            longest = 4 * longest if -alpha >= longest else longest
            if _record(program, settings, run, reached, bound, at[1], r):
                best = _better(best, at)
                return
            best = _better(best, at)
            if gain <= small and promised <= small:
                return
    except (Handover, DataError, DegenerateError):
        return
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
    finally:
        settle(program, run, best[0], lambda: best[1])
        run.plain_from = run.num_steps


def _better(a: tuple[Values, Iterate], b: tuple[Values, Iterate]) -> tuple[Values, Iterate]:
    return b if b[1].objective >= a[1].objective else a


def _record(
    program: Program,
    settings: Settings,
    run: Run,
    before: Iterate,
    bound: float,
    after: Iterate,
    r: int,
) -> bool:
    """Note one step; returns whether the cycle is over: a callback asked to stop, or wrote data."""
    run.entering.append(before.objective)
    run.after.append(bound)
    settings.bar.update(r, after.objective)
    if settings.callbacks:
        step = as_step(program, run.num_steps - 1, before, bound, settings.begin)
        if any(callback(step) is True for callback in settings.callbacks):
            run.status = EMStatus.STOPPED
            return True
        return program.is_changed()  # plain steps read the model anew
    return False


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
    em: EMMap, second: Values, u: list[Tensor], extrapolated: Tensor, alpha: float, best: float
) -> tuple[Values, Iterate]:
    """The extrapolated point if the evidence there will do, one half as far, or plain θ2."""
    for _ in range(2):
        if alpha >= -1:
            break
        try:
            values = em.constrained(extrapolated, second)
            if all(bool(torch.isfinite(v).all()) for v in values.values()):
                there = em.e_step(values)
                if there.objective >= best - _SLACK:
                    return values, there
        except Handover:
            pass
        alpha = (alpha - 1) / 2
        extrapolated = _along(u, alpha)
    return second, em.e_step(second)
