"""One EM step on sums over the data: which programs can have it, and how it goes.

The parameters are plain values here; nothing is written until somebody can look. Whatever is out of
the ordinary raises `Handover`, and the full step of `pyro_em.steps`, which stands on its own and is
this one's oracle in the tests, takes over from the last good values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em._pyro import Role
from pyro_em.compiled.chain import Chain, as_chain
from pyro_em.compiled.forms import expected_log_density, main_rule
from pyro_em.compiled.layout import (
    Arguments,
    arguments_of,
    collapsed,
    collapsed_updates,
    evaluate,
)
from pyro_em.compiled.rows import Rows, as_rows
from pyro_em.compiled.solve import Solver, solvers_of
from pyro_em.compiled.step import Handover, Sums
from pyro_em.families import Kind
from pyro_em.graph import FactorGraph
from pyro_em.m_step import ClosedForm, Fixed, ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Point:
    """Where a compiled run stands: values, the arguments that they make, the E-step there."""

    values: Values
    arguments: list[dict[str, Tensor]]
    sums: Sums

    @property
    def objective(self) -> float:
        """The log evidence in nats."""
        return self.sums.log_evidence


@dataclass(frozen=True, eq=False)
class Iteration:
    """A compiled EM step.

    Attributes:
        graph: The collapsed graph.
        kernel: The E-step.
        solvers: The M-step, locations first.
        evaluators: How arguments are computed, per group.
        reached: Groups whose density a closed form changes.
    """

    graph: FactorGraph
    kernel: Rows | Chain
    solvers: Sequence[Solver]
    evaluators: Sequence[Mapping[str, Arguments]]
    reached: tuple[int, ...]

    @torch.no_grad()
    def e_step(self, values: Values) -> Point:
        """The E-step at some values.

        Raises:
            Handover: If the full E-step has to look.
        """
        arguments = evaluate(self.evaluators, values)
        return Point(values, arguments, self.kernel.e_step(arguments))

    def tells_apart(self, at: Point) -> bool:
        """Whether the components differ in an argument of what is observed."""
        return any(
            _tells_apart(a, 1 + group.n_plates, 1 + len(group.sizes))
            for group, arguments in zip(self.graph.groups, at.arguments, strict=True)
            if group.observed and (group.mask is None or bool(group.mask.any()))
            for a in arguments.values()
            if a.is_floating_point()
        )

    @torch.no_grad()
    def m_step(self, at: Point) -> tuple[dict[str, Tensor], float]:
        """The M-step from an E-step.

        Returns:
            The new values, and by how much they raise the expected log joint, in nats.

        Raises:
            Handover: If the full M-step has to look.
        """
        before = [{n: _wide(a) for n, a in group.items()} for group in at.arguments]
        statistics = {
            g: {
                **{n: _wide(t) for n, t in s.items()},
                **{f"reference:{n}": a for n, a in before[g].items()},
            }
            for g, s in at.sums.statistics.items()
        }
        values, current = dict(at.values), [dict(a) for a in before]
        for solver in self.solvers:
            name = solver.update.name
            values[name] = solver.solve(statistics, current, values[name])
            for g, evaluators in enumerate(self.evaluators):
                for argument, evaluator in evaluators.items():
                    if name in evaluator.binding.params:
                        current[g][argument] = _wide(evaluator.evaluate(values))
        gain = 0.0
        for g in self.reached:
            family = self.graph.groups[g].family
            assert family is not None
            after = expected_log_density(family, statistics[g], current[g])
            gain += float(after - expected_log_density(family, statistics[g], before[g]))
        if not math.isfinite(gain):
            raise Handover
        return values, gain


def _tells_apart(argument: Tensor, first: int, dims: int) -> bool:
    """Whether an argument differs between values of a latent."""
    axes = [i for i in range(first, dims) if argument.shape[i] > 1]
    if not axes:
        return False
    low, high = argument.amin(axes), argument.amax(axes)
    return bool((high - low > 1e-6 * high.abs().clamp(min=1.0)).any())


def _wide(t: Tensor) -> Tensor:
    """Sums over many data are solved in float64, whatever the data are."""
    return t.to(torch.float64) if t.is_floating_point() else t


@torch.no_grad()
def compile_iteration(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> Iteration | None:
    """The compiled step of a static graph, or None where only the full step will do.

    Args:
        graph: A graph whose bindings are all static.
        updates: As decided.
        values: Parameter values, for their shapes.
    """
    exact = {n: u for n, u in updates.items() if isinstance(u.update, ClosedForm)}
    others = [u for n, u in updates.items() if n not in exact]
    if any(not isinstance(u.update, Fixed) for u in others) or not exact:
        return None
    if any(u.priors or u.kind is Kind.MEDIAN for u in exact.values()):
        return None
    for group in graph.groups:
        plain = all(not isinstance(s, Tensor) and s == 1.0 for s in group.scale)
        if group.role is Role.POINT or group.value_binding is not None or not plain:
            return None
        if group.family is None or any(
            b.how not in ("constant", "selection") for b in group.bindings.values()
        ):
            return None
        touched = set(exact).intersection(group.params)
        if touched and main_rule(group.family, group.arguments) is None:
            return None
    graph = collapsed(graph)
    kernel = as_chain(graph) or as_rows(graph)
    if kernel is None:
        return None
    graph = kernel.graph
    reached = tuple(g for g, group in enumerate(graph.groups) if set(exact) & set(group.params))
    own = collapsed_updates(updates, graph)
    evaluators = [arguments_of(group, values) for group in graph.groups]
    return Iteration(graph, kernel, solvers_of(own, graph, values), evaluators, reached)
