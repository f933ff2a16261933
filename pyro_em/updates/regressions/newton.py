"""Newton's method for concave functions of few numbers: coefficients of linear predictors in an M-step.

    δ = (−∇²Q)⁺ ∇Q,    θ ← θ + t δ,    t = 1, ½, ¼, …  until Q rises.

The pseudo-inverse leaves directions that nothing determines where they are: a number that is added to
all logits of a row. The steps end where another would gain less than 1e-10 nats by the quadratic that
Newton's method solves; as the method converges quadratically, what is left after it is far below. Where
data are separated no maximum exists: the predictor goes on by one with each step, for ever less gain.

Far from the maximum a predictor may be so large that its curvature is zero where its slope is not (a
covariate in years, at a start of another unit): Newton's method knows no step along such directions.
There the slope itself is followed, to where it changes its sign.

Values of float32 data are rounded by more than a step may gain. A step that has to be cut to a small
part, and then gains nothing that counts, is the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.idle import Idle, Moves
from pyro_em.updates.regressions.pseudo_inverse import pseudo_solve

_STEPS = 200

_HALVINGS = 40

_SHORT = 1 / 16  # of a step: where that gains nothing that counts, it is the rounding of values

_GAIN = 1e-10  # nats

_SMALL = 1e-5  # nats: where Newton's steps are trusted to converge quadratically

_LEFT = 1e-20  # nats, of further steps that need not be made

_ENDLESS = 1e60  # nats: more than any step gains

_STEEP = 1e-6  # of the function, which a slope that no curvature bounds would change with its place

_GROWTH = 8.0  # from one length to the next along such a slope

_LENGTHS = 60  # that are tried


@dataclass(frozen=True, eq=False)
class Climb:
    """Where Newton's method ends.

    Attributes:
        place: # (P,)
        gain: By how much the function has risen, in nats. # ()
        last: The last step. # (P,)
        is_settled: Whether the last step is small beside the place.
    """

    place: Tensor
    gain: Tensor
    last: Tensor
    is_settled: bool


def climb(
    of: Callable[[Tensor], Curved],
    start: Tensor,
    slope_of: Callable[[Tensor], Curved] | None = None,
    moves: Callable[[Tensor], Moves] | None = None,
) -> Climb:
    """The maximiser of a concave function; see the module's text.

    Args:
        of: From a place to the function with its derivatives.
        start: Where to begin. # (P,)
        slope_of: The same where second derivatives are not looked at, if that is cheaper: those of the
            place before serve where the last step is one of many digits.
        moves: What a direction does to the predictors that the function is of; None where each counts.
    """
    here, begin = start, of(start)
    is_idle = None if moves is None else Idle(moves)
    finite, reached = start, begin.value  # where derivatives were finite last
    now, last = begin, torch.zeros_like(start)
    curvature, is_fresh, before, expected = begin.curvature, True, 0.0, 0.0
    for _ in range(_STEPS):
        if not (_is_finite(now.gradient) and _is_finite(curvature)):
            return Climb(finite, reached - begin.value, last, True)
        finite, reached = here, now.value
        step = pseudo_solve(curvature, now.gradient, still=True, is_idle=is_idle)
        rise = torch.dot(now.gradient, step)
        gain, last = min(float(rise), _ENDLESS), step  # where curvature is next to zero
        if not is_fresh and gain > 100 * expected + _GAIN:  # the place is not as was expected
            now, is_fresh = of(here), True
            curvature = now.curvature
            continue
        # Newton's steps converge quadratically: what the next two would gain.
        bend = gain / before**2 if before > 0 else math.inf
        following = bend * gain**2
        if not is_fresh or gain <= _GAIN or (gain <= _SMALL and following <= _LEFT):
            is_lost = gain < -_GAIN  # in the rounding of a curvature of many magnitudes
            left = now.gradient if is_lost else now.gradient - curvature @ step
            further = _beyond(of, here, now, left) if is_fresh else None
            if further is not None:
                here, now = further
                curvature, before = now.curvature, 0.0
                continue
            if is_lost:
                break
            furthest = float(step.abs().max()) if len(step) else 0.0
            if gain <= 0 or furthest <= 1e-3 * float(here.abs().max()):
                return Climb(here + step, now.value - begin.value + rise / 2, last, True)
            return Climb(here, now.value - begin.value, last, False)
        is_last = slope_of is not None and following * bend * gain <= _LEFT
        looks = slope_of if slope_of is not None and is_last else of
        rounding = 8 * torch.finfo(now.value.dtype).eps * now.value.abs().clamp(min=1.0)
        size = 1.0
        for _ in range(_HALVINGS):
            there = here + size * step
            new = looks(there)
            if bool(new.value >= now.value + 1e-4 * size * rise - rounding):
                break
            size /= 2
        else:
            further = _beyond(of, here, now, now.gradient)
            if further is None:
                break
            here, now = further
            curvature, is_fresh, before = now.curvature, True, 0.0
            continue
        is_noise = size < _SHORT and not bool(new.value - now.value > _GAIN)
        here, now, is_fresh, expected = there, new, not is_last, following
        if is_noise:
            break
        if is_fresh:
            curvature, before = now.curvature, gain if size == 1.0 else 0.0
    return Climb(here, now.value - begin.value, last, True)


def _beyond(
    of: Callable[[Tensor], Curved], here: Tensor, now: Curved, slope: Tensor
) -> tuple[Tensor, Curved] | None:
    """The best place along a slope that no curvature bounds, and the function there.

    Returns:
        None where the slope is within rounding, or nothing higher is found.
    """
    if not len(slope):
        return None
    steepest, size = float(slope.abs().max()), max(float(here.abs().max()), 1e-3)
    if not steepest * size > _STEEP * max(1.0, abs(float(now.value))):
        return None
    low, high, best = 0.0, None, None
    t = 1e-6 * size / steepest
    for _ in range(_LENGTHS):
        there = of(here + t * slope)
        rises = bool(torch.isfinite(there.value)) and float(torch.dot(there.gradient, slope)) > 0
        if rises:
            low = t
        else:
            high = t
        if bool(there.value > (now.value if best is None else best[1].value)):
            best = here + t * slope, there
        if high is None:
            t *= _GROWTH
        elif high - low > 1e-12 * high:
            t = 0.5 * (low + high)
        else:
            break
    return best


def _is_finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t).all())
