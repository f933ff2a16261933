"""Coefficients of linear predictors solved from sums over the data, in steps that run no model.

A predictor that is the same for all rows has sums over them. Where it reads covariates its sums are
kept row by row (of a chain's transitions: step by step), and Newton's method goes through those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pyro_em.errors import Handover
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.regressions.coefficients import coefficients, separated
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.idle import Moves
from pyro_em.updates.regressions.predictors import Predictor, predictors_of
from pyro_em.updates.update import ParameterUpdate


@dataclass(frozen=True, eq=False)
class CurveSolver:
    """Newton's method for one block of parameters, decided once and solved from sums.

    Attributes:
        block: The parameters.
        graph: The graph whose groups the sums are of.
        updates: What was decided per parameter.
    """

    block: tuple[str, ...]
    graph: FactorGraph
    updates: Mapping[str, ParameterUpdate]

    @property
    def adds(self) -> bool:
        """Whether sums of parts of the data add up: no predictor differs from row to row."""
        found = self._predictors()
        return all(n == 1 for p in found for n in p.binding.constant.shape[: p.lead])

    def solve(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]],
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The maximisers of the expected log joint in the block.

        Args:
            statistics: Expected statistics per group, with references.
            arguments: The current arguments per group.
            values: The current parameters.

        Raises:
            Handover: If the coefficients run off: an M-step through tables says so.
        """
        found = self._predictors()
        cells = [p.cells(statistics[p.group], arguments[p.group]) for p in found]

        def ask(new: Mapping[str, Tensor], *, bent: bool = True) -> Curved:
            at, pairs = {**values, **new}, zip(found, cells, strict=True)
            parts = [p.curved(c, self.block, at, bent=bent) for p, c in pairs]
            return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])

        def moves(step: Tensor) -> Moves:
            each = [p.moves(self.block, values, step) for p in found]
            return max(moved for moved, _ in each), max(size for _, size in each)

        reached = coefficients(
            ask, self.block, self.graph, values, self.updates, partial(ask, bent=False), moves
        )
        if not reached.is_settled:
            pairs = zip(found, cells, strict=True)
            far = max(p.furthest(c, self.block, values, reached.last) for p, c in pairs)
            if separated(self.block, self.graph, values, reached.last, far):
                raise Handover
        return reached.values

    def _predictors(self) -> list[Predictor]:
        """Those whose sums suffice; a dispersion needs rows, which its own density has."""
        found = predictors_of(self.graph, self.block)
        return [p for p in found if isinstance(p, Predictor)]
