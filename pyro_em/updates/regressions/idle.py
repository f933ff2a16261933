"""Directions of coefficients along which no predictor moves: a number added to all logits of a row.

There the curvature of an M-step is zero, and the sums that make it leave what rounding they have: an
eigenvalue of 1e-15 of the largest that is taken for a curvature would send a step anywhere. What the
predictors themselves do along a direction is known to many more digits,

    max |J v|  against  max |J| |v|,

for a curvature of 1e-15 moves them by 1e-8 of what it would without cancelling, and one of zero by
1e-16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_IDLE = 1e-11  # of what a direction would move if nothing cancelled

_SPANNED = 1e-9  # of a direction, which is left of it beside others

Moves = tuple[float, float]
"""By how much a direction moves the predictor of any cell, of a row of logits its differences, and by
how much it would if nothing cancelled."""


class Idle:
    """The idle directions that one climb has come across: each is asked of the data once.

    Example:
        >>> asked = Idle(lambda v: (float((v[0] + v[1]).abs()), float(v.abs().sum())))
        >>> asked(torch.tensor([1.0, -1.0, 0.0])), asked(torch.tensor([1.0, 1.0, 0.0]))
        (True, False)
    """

    def __init__(self, moves: Callable[[Tensor], Moves]) -> None:
        self._moves = moves
        self._found: list[Tensor] = []

    def __call__(self, direction: Tensor) -> bool:
        """Whether a direction moves no predictor. # (P,)"""
        rest = direction / torch.linalg.vector_norm(direction)
        for known in self._found:
            rest = rest - torch.dot(known, rest) * known
        left = torch.linalg.vector_norm(rest)
        if float(left) <= _SPANNED:
            return True
        moved, size = self._moves(direction)
        is_idle = moved <= _IDLE * size
        if is_idle:
            self._found.append(rest / left)
        return is_idle
