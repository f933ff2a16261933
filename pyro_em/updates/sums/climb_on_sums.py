"""Parameters without a closed form, by a climb of the expected log joint on sums over the data.

    θ ← argmax Σ_g ℓ_g(S_g, a_g(θ)),     S_g = Σ_cells q T(x)

Where a density is told by its sums, a climb asks for functions of few numbers: the data are gone
through once, for the sums, however many points it looks at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from pyro_em.errors import Handover
from pyro_em.families.family import Statistics, expected_log_density
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.sites import Role
from pyro_em.updates.decisions.decision import groups_reached
from pyro_em.updates.expectations.statistics import as_float64
from pyro_em.updates.gradients.gradient import maximise
from pyro_em.updates.sums.summed_objective import is_told_by_sums
from pyro_em.updates.update import Gradient, ParameterUpdate

Values = Mapping[str, Tensor]


class Evaluator(Protocol):
    """How one argument follows from parameters."""

    def evaluate(self, values: Values) -> Tensor:
        """The argument at parameter values."""
        ...


def climbs(graph: FactorGraph, update: ParameterUpdate) -> bool:
    """Whether sums over the data are all that the climb of a parameter needs.

    Args:
        graph: The factor graph.
        update: What was decided for the parameter.
    """
    if not isinstance(update.update, Gradient) or update.update.optimizer is not None:
        return False
    reached = [graph.groups[g] for g in groups_reached(graph, {update.name})]
    return bool(reached) and all(
        group.role is not Role.POINT
        and not group.edges
        and is_told_by_sums(group, group.arguments)
        and not any(_differs(group, name) for name in group.bindings)
        for group in reached
    )


def _differs(group: Group, name: str) -> bool:
    """Whether an argument differs between elements of plates, of which sums know nothing."""
    return any(n > 1 for n in group.outlines[name].shape[1 : 1 + group.n_plates])


@dataclass(frozen=True, eq=False)
class ClimbSolver:
    """The climb of all parameters of one update, decided once and made on sums over the data.

    Attributes:
        block: The parameters.
        update: How they climb.
        graph: The graph whose groups the sums are of.
        evaluators: How arguments follow from parameters, per group.
    """

    block: tuple[str, ...]
    update: Gradient
    graph: FactorGraph
    evaluators: Sequence[Mapping[str, Evaluator]]

    def solve(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]],
        values: Values,
    ) -> dict[str, Tensor]:
        """The parameters at the end of the climb.

        Args:
            statistics: Expected statistics per group, with references.
            arguments: The current arguments per group.
            values: The current parameters.

        Raises:
            Handover: If the expected log joint rises without end: an M-step through tables says so.
        """
        # Steps on sums are made in inference mode, whose tensors know no derivatives.
        with torch.inference_mode(False), torch.enable_grad():
            fixed = {name: v.clone() for name, v in values.items()}
            groups = [g for g in groups_reached(self.graph, set(self.block)) if g in statistics]
            known = {g: {n: t.clone() for n, t in statistics[g].items()} for g in groups}
            held = {g: {n: t.clone() for n, t in arguments[g].items()} for g in groups}
            moved = [self._apart(name, fixed[name]) for name in self.block]

            def objective(new: Values) -> Tensor:
                at = {**fixed, **new}
                parts = [self._expected(g, known[g], held[g], at) for g in groups]
                return reduce(add, parts)

            weight = max([1.0, *(float(s["weight"].sum()) for s in known.values())])
            runaway = maximise(moved, objective, self.update, {}, weight)
            if runaway is not None:
                raise Handover
            return {p.name: p.transform(p.unconstrained).detach() for p in moved}

    def _apart(self, name: str, value: Tensor) -> TracedParameter:
        """A parameter of its own at a value, which the climb may write into."""
        p = self.graph.parameters[name]
        return replace(p, unconstrained=p.inverse(value).detach().clone(), leaf=value)

    def _expected(
        self, g: int, statistics: Statistics, held: Mapping[str, Tensor], values: Values
    ) -> Tensor:
        group = self.graph.groups[g]
        assert group.family is not None
        now = dict(held)
        for name, binding in group.bindings.items():
            if not set(self.block).isdisjoint(binding.params):
                now[name] = as_float64(self.evaluators[g][name].evaluate(values))
        return expected_log_density(group.family, statistics, now)
