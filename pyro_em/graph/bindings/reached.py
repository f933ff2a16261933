"""An argument of a distribution that parameters reach, as each way of binding it reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_em.graph.bindings.nodes import Point


@dataclass(frozen=True, eq=False)
class Reached:
    """The argument with all that is known before anybody has read how.

    Attributes:
        point: Where it is in its autograd graph.
        top: Which element of it each cell of the compact layout is.
        constant: Its value in that layout.
        names: The parameters that reach it.
        leaves: The leaf tensor of each.
        plates: How many of the first dimensions are plates.
        max_cells: The most numbers of a Jacobian to hold.
    """

    point: Point
    top: Tensor
    constant: Tensor
    names: Sequence[str]
    leaves: Mapping[str, Tensor]
    plates: int
    max_cells: int
