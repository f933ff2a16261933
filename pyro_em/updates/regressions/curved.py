"""A function of some parameters at a place, with its derivatives: what Newton's method climbs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Curved:
    """A function of some parameters at a place, with its derivatives.

    Attributes:
        value: In nats. # ()
        gradient: # (P,)
        curvature: Minus the matrix of second derivatives. # (P, P)
    """

    value: Tensor
    gradient: Tensor
    curvature: Tensor

    def __add__(self, other: Curved) -> Curved:
        return Curved(
            self.value + other.value,
            self.gradient + other.gradient,
            self.curvature + other.curvature,
        )
