"""The problem of Newton steps on sums where each part of the data has cells of its own.

Where an index of the rows chooses elements of parameters, as ``a[g]`` and ``b[g, z]`` do, the cells of
one part are not those of another, and sums over cells cannot be added. What a part says of the
coordinates can:

    Q(u) = Σ_parts Q_part(u),    ∇Q and ∇²Q likewise

so that each Newton step is one pass over the parts, and all elements are one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.linear_cells.blocks import Problem, There
from pyro_em.updates.linear_cells.coordinates import Coordinates
from pyro_em.updates.linear_cells.placed import places_of
from pyro_em.updates.sums.data_sums import DataSums
from pyro_em.updates.sums.differing import number_of


class PartedProblem:
    """Q as a function of coordinates, summed over parts when it is asked for.

    Args:
        size: How many coordinates there are.
        ask: Passes over the parts, and adds up what a function says of the problem of each.
    """

    def __init__(self, size: int, ask: Callable[[Callable[[Problem], list[Tensor]]], list[Tensor]]):
        self.size, self.ask = size, ask
        self._owner = torch.zeros(size, dtype=torch.long)
        self._mass: Tensor | None = None

    def maximum(self, u: Tensor) -> None:
        """It is searched for."""

    def derivatives(self, u: Tensor) -> There:
        """Q with its derivatives, of one block."""

        def of(problem: Problem) -> list[Tensor]:
            there = problem.derivatives(u)
            return [there.value, there.rounding, there.slope, there.curvature]

        return There(*self.ask(of))

    def masses(self) -> Tensor:
        """The weight behind each element; −1 where none reads it. # (elements,)"""
        if self._mass is None:

            def of(problem: Problem) -> list[Tensor]:
                mass = problem.masses()
                return [mass.clamp(min=0), (mass > -1).to(mass), problem.block_masses()]

            mass, often, self._total = self.ask(of)
            self._mass = torch.where(often > 0, mass, -1.0)
        return self._mass

    def block_masses(self) -> Tensor:
        """The weight behind the only block. # (1,)"""
        self.masses()
        return self._total

    def may_lack_data(self) -> bool:
        """Whether there may be elements that no datum reads."""
        return True

    def spread(self, of_blocks: Tensor) -> Tensor:
        """What belongs to slots, element by element. # (1, elements) to (elements,)"""
        return of_blocks[0]

    def spread_one(self, of_blocks: Tensor) -> Tensor:
        """What belongs to the block, element by element. # (1,) to (elements,)"""
        return of_blocks[self._owner]


def problem_of(part: DataSums, coordinates: Coordinates) -> Problem:
    """What one part poses, all elements in one problem.

    Args:
        part: The part, which has followed all moves.
        coordinates: The elements.
    """
    places = places_of(coordinates, part.graph, is_part=True)
    arguments = {g: part.graph.groups[g].evaluate_arguments(part.values) for g in places.groups}
    return places.at(part.feature_sums(places.groups), arguments, part.values)


def marks_of_cells(graph: FactorGraph, groups: Sequence[int]) -> Tensor:
    """Numbers that are the same for parts whose cells read the same elements, and their negatives.

    Args:
        graph: That of a part.
        groups: The groups whose cells are meant.

    Returns:
        # (2 * numbers,): where the largest of all parts are not each other's negatives, cells differ
    """
    found: list[float] = []
    for g in groups:
        for name, binding in graph.groups[g].bindings.items():
            found += [float(n) for n in binding.constant.shape[1:]]
            found.append(number_of(binding, graph.groups[g].arguments[name]))
    marks = torch.tensor(found, dtype=torch.float64)
    return torch.cat([marks, -marks])
