"""Newton's method for concave functions of few numbers: coefficients of linear predictors in an M-step.

    δ = (−∇²Q)⁺ ∇Q,    θ ← θ + t δ,    t = 1, ½, ¼, …  until Q rises.

The pseudo-inverse leaves directions that nothing determines where they are: a number that is added to
all logits of a row. The steps end where another would gain less than 1e-10 nats by the quadratic that
Newton's method solves; as the method converges quadratically, what is left after it is far below. Where
data are separated no maximum exists: the predictor goes on by one with each step, for ever less gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.updates.curved import Curved
from pyro_em.updates.pseudo_inverse import pseudo_solve

_STEPS = 200

_HALVINGS = 40

_GAIN = 1e-10  # nats

_SMALL = 1e-5  # nats: where Newton's steps are trusted to converge quadratically

_LEFT = 1e-20  # nats, of further steps that need not be made


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
) -> Climb:
    """The maximiser of a concave function; see the module's text.

    Args:
        of: From a place to the function with its derivatives.
        start: Where to begin. # (P,)
        slope_of: The same where second derivatives are not looked at, if that is cheaper: those of the
            place before serve where the last step is one of many digits.
    """
    here, begin = start, of(start)
    finite, reached = start, begin.value  # where derivatives were finite last
    now, last = begin, torch.zeros_like(start)
    curvature, is_fresh, before, expected = begin.curvature, True, 0.0, 0.0
    for _ in range(_STEPS):
        if not (_is_finite(now.gradient) and _is_finite(curvature)):
            return Climb(finite, reached - begin.value, last, True)
        finite, reached = here, now.value
        step = pseudo_solve(curvature, now.gradient, still=True)
        rise = torch.dot(now.gradient, step)
        gain, last = float(rise), step
        if not is_fresh and gain > 100 * expected + _GAIN:  # the place is not as was expected
            now, is_fresh = of(here), True
            curvature = now.curvature
            continue
        # Newton's steps converge quadratically: what the next two would gain.
        bend = gain / before**2 if before > 0 else math.inf
        following = bend * gain**2
        if not is_fresh or gain <= _GAIN or (gain <= _SMALL and following <= _LEFT):
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
            break
        here, now, is_fresh, expected = there, new, not is_last, following
        if is_fresh:
            curvature, before = now.curvature, gain if size == 1.0 else 0.0
    return Climb(here, now.value - begin.value, last, True)


def _is_finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t).all())
