"""Newton's method for concave functions of few numbers: coefficients of linear predictors in an M-step.

    δ = (−∇²Q)⁺ ∇Q,    θ ← θ + t δ,    t = 1, ½, ¼, …  until Q rises.

The pseudo-inverse leaves directions that nothing determines where they are: a number that is added to
all logits of a row. The steps end where another would gain less than 1e-10 nats by the quadratic that
Newton's method solves; as the method converges quadratically, what is left after it is far below. Where
data are separated no maximum exists: the predictor goes on by one with each step, for ever less gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.updates.predictors import Curved
from pyro_em.updates.pseudo_inverse import pseudo_solve

_STEPS = 200

_HALVINGS = 40

_GAIN = 1e-10  # nats


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


def climb(of: Callable[[Tensor], Curved], start: Tensor) -> Climb:
    """The maximiser of a concave function; see the module's text.

    Args:
        of: From a place to the function with its derivatives.
        start: Where to begin. # (P,)
    """
    here, begin = start, of(start)
    now, last = begin, torch.zeros_like(start)
    gain = torch.zeros_like(begin.value)
    for _ in range(_STEPS):
        if not (_is_finite(now.gradient) and _is_finite(now.curvature)):
            return Climb(start, torch.zeros_like(gain), last, True)
        step = pseudo_solve(now.curvature, now.gradient)
        rise = torch.dot(now.gradient, step)
        last = step
        if float(rise) <= _GAIN:
            size = float(step.abs().amax()) if len(step) else 0.0
            settled = size <= 1e-3 * float(here.abs().amax()) if len(step) else True
            if settled or float(rise) <= 0:
                return Climb(here + step, now.value - begin.value + rise / 2, last, True)
            return Climb(here, now.value - begin.value, last, False)
        rounding = 8 * torch.finfo(now.value.dtype).eps * now.value.abs().clamp(min=1.0)
        size = 1.0
        for _ in range(_HALVINGS):
            there = here + size * step
            new = of(there)
            if bool(new.value >= now.value + 1e-4 * size * rise - rounding):
                break
            size /= 2
        else:
            break
        here, now = there, new
    return Climb(here, now.value - begin.value, last, True)


def _is_finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t).all())
