"""Limited-memory BFGS with a line search by the strong Wolfe conditions, on a flat vector.

    d = −H ∇f(x),    x ← x + t d

H comes from the last steps s and changes of the gradient y by the two-loop recursion; t satisfies
f(x + t d) ≤ f(x) + c₁ t ∇f(x)ᵀd and |∇f(x + t d)ᵀd| ≤ c₂ |∇f(x)ᵀd|. Where the decrease is lost in
rounding, slopes decide in its place. A trial point without a finite value is infinitely bad: the
search turns back before it.

It is no ``torch.optim.Optimizer``: to make one imports torch's compiler, which takes longer than most
fits.

Source: Nocedal and Wright (2006), "Numerical Optimization", algorithms 7.4 and 7.5 for the
direction, 3.5 and 3.6 for the search, equation 3.59 for its interpolation; Hager and Zhang (2005),
"A new conjugate gradient method with guaranteed descent and an efficient line search", SIAM Journal
on Optimization 16, section 4, for the conditions within rounding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[float, Tensor]]

_DECREASE = 1e-4  # c₁

_CURVATURE = 0.9  # c₂

_MEMORY = 20  # steps that H is made of

_TRIALS = 25  # points at which one search may look

_FLAT = 1e-11  # a gradient that counts as none

_NOTHING = 1e-15  # a step, or a gain, that counts as none

_SHORT = 1e-2  # a way, relative to x, on which values reveal their rounding

_NOISE = 0.05  # rounding of values at most: more than that is a jump


def minimise(function: Function, start: Tensor, steps: int) -> Tensor:
    """Lower a function until its gradient vanishes or nothing moves any more.

    Args:
        function: x ↦ f(x) and ∇f(x); where there is no value, one that is not finite.
        start: Where to begin. # (P,)
        steps: How many at most; about three times as many points are looked at.

    Returns:
        The last x. But for rounding, f is never above where it was before. # (P,)

    Example:
        >>> bowl = lambda x: (float(x @ x) / 2, x)
        >>> minimise(bowl, torch.tensor([3.0, -4.0]), 10).abs().max() < 1e-5
        tensor(True)
    """
    x, left = start, 3 * steps
    value, gradient = function(x)
    memory: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
    first = min(1.0, 1.0 / max(float(gradient.abs().sum()), 1e-300))
    for _ in range(steps):
        if not math.isfinite(value) or not _largest(gradient) > _FLAT or left <= 0:
            break
        direction = -_times_inverse_hessian(gradient, memory)
        slope = float(gradient @ direction)
        if not slope < -_NOTHING:
            break
        line = _Line(function, x, direction, _Trial(0.0, value, slope, gradient))
        found = line.search(first if not memory else 1.0)
        left -= line.trials
        if found.t == 0.0:
            break
        s, y = found.t * direction, found.gradient - gradient
        x = x + s
        if float(y @ s) > 1e-10 * float(s @ s):
            memory.append((s, y, 1.0 / float(y @ s)))
        gain, slopes = abs(value - found.value), (_largest(gradient), _largest(found.gradient))
        value, gradient = found.value, found.gradient
        is_lost = gain <= line.rounding and slopes[1] > 0.5 * slopes[0]
        if _largest(s) <= _NOTHING or gain < _NOTHING or is_lost:
            break
    return x


def _largest(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0


def _times_inverse_hessian(
    gradient: Tensor, memory: Iterable[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """H ∇f by the two-loop recursion, oldest step first in the memory; ∇f where it is empty."""
    q, weights, steps = gradient, [], list(memory)
    for s, y, rho in reversed(steps):
        weights.append(rho * float(s @ q))
        q = q - weights[-1] * y
    if steps:
        _, y, rho = steps[-1]
        q = q / (rho * float(y @ y))
    for (s, y, rho), weight in zip(steps, reversed(weights), strict=True):
        q = q + (weight - rho * float(y @ q)) * s
    return q


@dataclass(frozen=True, eq=False)
class _Trial:
    """A point on the line: its distance, value and slope along the line, and its gradient."""

    t: float
    value: float
    slope: float
    gradient: Tensor


class _Line:
    """The line x + t d, on which a step is searched.

    Attributes:
        rounding: What two equal values may differ by.
        trials: Points that were looked at.
    """

    def __init__(self, function: Function, x: Tensor, direction: Tensor, origin: _Trial) -> None:
        self.function, self.x, self.direction, self.origin = function, x, direction, origin
        self.rounding = 8 * torch.finfo(x.dtype).eps * max(1.0, abs(origin.value))
        self.reach = _largest(direction)
        self.trials = 0

    def search(self, first: float) -> _Trial:
        """A point that satisfies the conditions, or the best of those that decrease (3.5).

        Args:
            first: The distance at which to look first.
        """
        before, t = self.origin, first
        while self.trials < _TRIALS:
            trial = self._at(t)
            if not self._is_low(trial) or trial.value > before.value + self.rounding:
                return self._zoom(before, trial)
            if self._is_flat(trial):
                return trial
            if trial.slope >= 0:
                return self._zoom(trial, before)
            least, most = t + 0.01 * (t - before.t), 10 * t
            t = min(max(self._lowest(before, trial), least), most)
            before = trial
        return before

    def _at(self, t: float) -> _Trial:
        self.trials += 1
        value, gradient = self.function(self.x + t * self.direction)
        slope = float(gradient @ self.direction)
        self._learn_rounding(t, value, slope)
        return _Trial(t, value if math.isfinite(slope) else math.inf, slope, gradient)

    def _learn_rounding(self, t: float, value: float, slope: float) -> None:
        """Values that sum much larger numbers are less precise than they look.

        On a short way no value changes by more than its slopes explain.
        """
        change = abs(value - self.origin.value)
        is_short = t * self.reach <= _SHORT * max(1.0, _largest(self.x))
        explained = 2 * t * max(abs(slope), -self.origin.slope)
        if is_short and explained < change <= _NOISE:
            self.rounding = max(self.rounding, 2 * change)

    def _is_low(self, trial: _Trial) -> bool:
        """Whether the value has decreased enough for the distance; within rounding, the slope."""
        origin, slope = self.origin, self.origin.slope
        if trial.value <= origin.value + _DECREASE * trial.t * slope:
            return True
        within = trial.value <= origin.value + self.rounding
        return within and trial.slope <= (2 * _DECREASE - 1) * slope

    def _is_flat(self, trial: _Trial) -> bool:
        return abs(trial.slope) <= -_CURVATURE * self.origin.slope

    def _zoom(self, low: _Trial, high: _Trial) -> _Trial:
        """A point between one that decreases and one beyond a minimum (3.6)."""
        while self.trials < _TRIALS and abs(high.t - low.t) * self.reach > _NOTHING:
            width = high.t - low.t
            if math.isfinite(high.value):
                share = (self._lowest(low, high) - low.t) / width
                share = min(max(share, 0.1), 0.9)
            else:
                share = 0.5 if low.t > 0 else 0.1
            trial = self._at(low.t + share * width)
            if not self._is_low(trial) or trial.value > low.value + self.rounding:
                high = trial
                continue
            if self._is_flat(trial):
                return trial
            if trial.slope * width >= 0:
                high = low
            low = trial
        return low

    def _lowest(self, a: _Trial, b: _Trial) -> float:
        """Where the cubic through two points with their slopes is lowest (3.59).

        Where the values differ by rounding, where the straight line through the slopes vanishes.
        """
        width = b.t - a.t
        if abs(b.value - a.value) <= self.rounding:
            change = b.slope - a.slope
            share = -a.slope / change if change else 0.5
        else:
            d1 = a.slope + b.slope - 3 * (b.value - a.value) / width
            square = d1 * d1 - a.slope * b.slope
            d2 = math.copysign(math.sqrt(max(square, 0.0)), width)
            bottom = b.slope - a.slope + 2 * d2
            share = 1 - (b.slope + d2 - d1) / bottom if square >= 0 and bottom else 0.5
        return a.t + width * (share if math.isfinite(share) else 0.5)
