"""Parameter values in the form in which E-steps and M-steps on sums compute with them.

    parameter values → `At` → E-step of a block → `Expectation` → M-step → `At` → …

What the M-step solves is what the next E-step reads, so that nothing is computed twice. Whatever is
out of the ordinary raises `Handover`: a step through tables of all cells judges it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor

from pyro_em.densities.components import owned
from pyro_em.densities.density import IMPOSSIBLE, KeepsRows, NormalRows, NormalSolver, PreparedRows
from pyro_em.densities.gaussian import Gaussian
from pyro_em.densities.layout import Layout
from pyro_em.densities.medians import LaplaceRows
from pyro_em.densities.natural import Naturals, State
from pyro_em.densities.predicted import Predicted
from pyro_em.densities.priors import LogPrior, log_prior, may_have_priors, point_groups
from pyro_em.densities.regression import Lines
from pyro_em.densities.ridge import WithPrior
from pyro_em.densities.tying import Arguments, arguments_of
from pyro_em.densities.vector_regression import VectorLines
from pyro_em.errors import DegenerateError, Finding, Handover, TooFar
from pyro_em.families.family import Statistics, expected_log_density
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.closed_forms.closed_form import Solver, solvers_of
from pyro_em.updates.expectations.statistics import NATURAL, Expectation, as_float64
from pyro_em.updates.regressions.curves import CurveSolver
from pyro_em.updates.regressions.least_squares import LineSolver
from pyro_em.updates.regressions.predictors import Predictor, predictors_of
from pyro_em.updates.sums.climb_on_sums import ClimbSolver
from pyro_em.updates.sums.newton_on_sums import AtEdge, Further, NewtonSolver
from pyro_em.updates.update import Gradient, LeastSquares, Newton, NewtonOnSums, ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class At:
    """The parameter values of an E-step, in the form in which it computes with them.

    Attributes:
        natural: Simplex rows, probabilities and rates; None where there are none.
        components: Per Normal group that has parameters of its own.
        values: The parameters in neither of these.
        arguments: Of the groups that neither evaluates.
        prepared: Per Normal group what its rows are evaluated with.
        log_prior: Log density of the parameters outside ``natural``, in nats.
    """

    natural: State | None
    components: Mapping[int, Any]
    values: Mapping[str, Tensor]
    arguments: Mapping[int, Mapping[str, Tensor]]
    prepared: Mapping[int, Any]
    log_prior: Tensor | float = 0.0

    @property
    def eta(self) -> Tensor:
        """Logarithms and rates of linear groups."""
        assert self.natural is not None
        return self.natural.eta


@dataclass(frozen=True, eq=False)
class Theta:
    """All parameters of a collapsed graph, and their M-step from sums over the data.

    Attributes:
        graph: The collapsed graph.
        normals: Normal groups whose rows are evaluated by matrix products.
        naturals: Simplex rows, probabilities and rates; None where there are none.
        owned: The M-step of Normal groups with parameters of their own.
        solvers: The M-step of all other parameters, locations first.
        evaluators: How arguments are computed, per group.
        others: Groups whose arguments the E-step or a solver reads.
        reached: Those of them whose density a solver changes.
        prior: The log density of point estimates.
    """

    graph: FactorGraph
    normals: Mapping[int, NormalRows]
    naturals: Naturals | None
    owned: Mapping[int, NormalSolver]
    solvers: Sequence[Solver | LineSolver | CurveSolver | NewtonSolver | ClimbSolver]
    evaluators: Sequence[Mapping[str, Arguments]]
    others: tuple[int, ...]
    reached: tuple[int, ...]
    prior: LogPrior

    @cached_property
    def adds(self) -> bool:
        """Whether sums of parts of the data add up.

        Where arguments differ from row to row the sums of a group are kept row by row.
        """
        if any(isinstance(rule, KeepsRows) for rule in self.normals.values()):
            return False
        lines = {n for s in self.solvers if isinstance(s, LineSolver) for n in s.block}
        reached = [g for g in self.reached if lines.intersection(self.graph.groups[g].mean_params)]
        by_row = any(
            size != 1
            for g in reached
            for size in self.evaluators[g]["loc"].shape[: 1 + self.graph.groups[g].n_plates]
        )
        apart = [g for g in self.reached if g not in self.normals and self._differs(g)]
        solvers = [s for s in self.solvers if isinstance(s, CurveSolver)]
        return not by_row and not apart and all(s.adds for s in solvers)

    def _differs(self, g: int) -> bool:
        """Whether an argument of a group differs between elements of its plates."""
        end = 1 + self.graph.groups[g].n_plates
        return any(n != 1 for a in self.evaluators[g].values() for n in a.shape[1:end])

    @property
    def has_prior(self) -> bool:
        """Whether a parameter has a prior."""
        if self.prior.counts is not None or self.prior.rest:
            return True
        return any(isinstance(d, WithPrior) and d.in_prior for d in self.owned.values())

    @torch.no_grad()
    def enter(self, values: Values) -> At:
        """Parameter values in the form of the E-step.

        Raises:
            Handover: If an E-step through tables has to judge.
        """
        natural = None if self.naturals is None else self.naturals.enter(values)
        components = {g: density.enter(values) for g, density in self.owned.items()}
        in_vectors = self._held
        rest = {name: v for name, v in values.items() if name not in in_vectors}
        return self._at(natural, components, rest)

    @cached_property
    def _held(self) -> frozenset[str]:
        names = set() if self.naturals is None else set(self.naturals.solved)
        for density in self.owned.values():
            names |= set(density.params)
        return frozenset(names)

    def _at(self, natural: State | None, components: Mapping[int, Any], rest: Values) -> At:
        arguments = {
            g: {name: a.evaluate(rest) for name, a in self.evaluators[g].items()}
            for g in self.others
        }
        prepared = {g: c.prepared for g, c in components.items()}
        for g, rule in self.normals.items():
            if g not in prepared:
                prepared[g] = cast(PreparedRows, rule).prepare(arguments[g])
        log_prior = self.prior.of_rest(rest) if self.prior.rest else 0.0
        return At(natural, components, rest, arguments, prepared, log_prior)

    @torch.no_grad()
    def values(self, at: At) -> dict[str, Tensor]:
        """All parameters by name."""
        out = dict(at.values)
        if self.naturals is not None and at.natural is not None:
            out |= self.naturals.values(at.natural)
        for g, density in self.owned.items():
            out |= density.values(at.components[g])
        # Steps are made in inference mode, which costs less; who reads values must not notice.
        return {name: v.clone() if v.is_inference() else v for name, v in out.items()}

    def log_prior(self, at: At) -> float:
        """Log density of point estimates, in nats.

        Raises:
            Handover: If a point estimate is impossible.
        """
        total = float(at.log_prior)
        if self.prior.counts is not None:
            total = float(at.log_prior + self.prior.of_natural(at.natural))
        for g, density in self.owned.items():
            if isinstance(density, WithPrior) and density.in_prior:
                total += float(density.log_prior(at.components[g]))
        if not abs(total) < IMPOSSIBLE:
            raise Handover
        return total

    def m_step(self, at: At, expectation: Expectation) -> tuple[At, float]:
        """The M-step from the sums of an E-step.

        Returns:
            The new parameters, and by how much they raise the expected log joint, in nats.

        Raises:
            Handover: If an M-step through tables has to judge.
        """
        gains: list[Tensor | float] = []
        sums = expectation.sums
        natural = at.natural
        if self.naturals is not None and natural is not None and NATURAL in sums:
            features = sums[NATURAL]["features"]
            if self.prior.counts is not None:
                features = features + self.prior.counts
                if not float(features[: self.naturals.size].amin()) >= 0:
                    raise Handover  # no mode inside
            natural, gain = self.naturals.m_step(natural, features)
            gains.append(gain)
        components = {}
        for g, density in self.owned.items():
            components[g], gain = density.m_step(
                at.components[g], sums[g]["moments"], sums[g]["mass"]
            )
            gains.append(gain)
        if self.solvers:
            try:
                rest, gain = self._solve(at, expectation)
            except DegenerateError as error:
                raise Handover from error
            gains.append(gain)
            after = self._at(natural, components, rest)
            if self.prior.rest:
                gains.append(after.log_prior - at.log_prior)
        else:
            prepared = {**at.prepared, **{g: c.prepared for g, c in components.items()}}
            after = At(natural, components, at.values, at.arguments, prepared, at.log_prior)
        total = float(reduce(add, gains))
        if not math.isfinite(total):
            raise Handover
        return after, total

    def _solve(self, at: At, expectation: Expectation) -> tuple[dict[str, Tensor], Tensor]:
        """The parameters outside the vectors, one after the other, and their gain in nats."""
        before = {g: {n: as_float64(a) for n, a in at.arguments[g].items()} for g in self.others}
        statistics = {}
        for g in self.reached:
            rule, sums = self.normals.get(g), expectation.sums[g]
            if rule is not None:
                sums = cast(PreparedRows, rule).statistics(
                    at.prepared[g], sums["moments"], sums["mass"], at.arguments[g]
                )
            references = {f"reference:{n}": a for n, a in before[g].items()}
            statistics[g] = {**{n: as_float64(t) for n, t in sums.items()}, **references}
        values, current = dict(at.values), {g: dict(a) for g, a in before.items()}
        for solver in self.solvers:
            if isinstance(solver, LineSolver | CurveSolver | NewtonSolver):
                if isinstance(solver, NewtonSolver):
                    new = self._newton(solver, statistics, current, values)
                else:
                    new = solver.solve(statistics, current, values)
                if not all(bool(torch.isfinite(v).all()) for v in new.values()):
                    raise Handover
            elif isinstance(solver, ClimbSolver):
                new = solver.solve(statistics, current, values)
                if not all(bool(torch.isfinite(v).all()) for v in new.values()):
                    raise Handover
            else:
                name = solver.update.name
                value, empty = solver.solve(statistics, current, values[name])
                if empty and not solver.kind.form.is_row:
                    raise Handover  # the M-step through tables names an empty component
                new = {name: value}
            values |= new
            for g in self.reached:
                for argument, evaluator in self.evaluators[g].items():
                    if new.keys() & set(evaluator.binding.params):
                        current[g][argument] = as_float64(evaluator.evaluate(values))
        gains = []
        for g in self.reached:
            family = self.graph.groups[g].family
            assert family is not None
            gains.append(expected_log_density(family, statistics[g], current[g]))
            gains.append(-expected_log_density(family, statistics[g], before[g]))
        return values, torch.stack([gain.to(torch.float64) for gain in gains]).sum()

    def _newton(
        self,
        solver: NewtonSolver,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]],
        values: Values,
    ) -> dict[str, Tensor]:
        try:
            new, empty = solver.solve(statistics, arguments, values)
        except AtEdge as error:
            raise Handover from error  # the M-step through tables names the row
        except Further as error:
            raise TooFar from error  # it goes through the data as often as it takes
        if any(empty.values()):
            raise Handover  # and an empty component
        return new


def theta_of(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    layout: Layout,
    normals: Mapping[int, NormalRows],
) -> Theta | Finding:
    """The M-step on sums of a collapsed graph, or the reason why it needs tables.

    Args:
        graph: A collapsed graph, as the block holds it.
        updates: Collapsed updates.
        values: Parameter values, for their shapes.
        layout: How groups are evaluated.
        normals: Normal groups whose rows the block evaluates by matrix products.
    """
    vector = layout.naturals
    components: dict[int, NormalSolver] = {}
    for g, rule in normals.items():
        solver: NormalSolver | None = None
        if isinstance(rule, (Lines, VectorLines, Predicted, LaplaceRows)):
            solver = rule
        elif type(rule) is Gaussian:
            solver = owned(g, rule, graph, updates, values)
        if solver is not None:
            components[g] = solver
    apart = {*layout.linears, *components, *point_groups(graph)}
    others = tuple(g for g in range(len(graph.groups)) if g not in apart)
    natural = frozenset(() if vector is None else vector.params)
    owning = {name for c in components.values() for name in c.params}
    rest = {name: u for name, u in updates.items() if name not in natural | owning}
    for name, u in rest.items():
        if u.kind is not None and u.needs_data:
            return Finding(f"parameter '{name}'", f"'{name}' is a {u.kind.value}, which is no sum")
    with_prior = (c.in_prior for c in components.values() if isinstance(c, WithPrior))
    known = {name for names in with_prior for name in names}
    for name in owning:
        if updates[name].priors and name not in known:
            return Finding(
                f"parameter '{name}'", f"'{name}' has a prior, and covariates: no kernel"
            )
    prior = log_prior(graph, updates, values, vector, known)
    if prior is None:
        return Finding("priors", "a prior adds no constant to the sums")
    for name, u in updates.items():
        is_known = isinstance(u.update, LeastSquares | Newton) or name in known
        if u.priors and not is_known and not may_have_priors(u, graph, name in natural):
            return Finding(f"parameter '{name}'", f"'{name}' has a prior and an upper bound")
    blocks = dict.fromkeys(u.block for u in rest.values() if isinstance(u.update, LeastSquares))
    curved = dict.fromkeys(u.block for u in rest.values() if isinstance(u.update, Newton))
    for block in curved:
        what = ""
        if updates[block[0]].is_mixed:
            what = f"sites of different kinds read '{block[0]}': no kernel"
        elif not all(isinstance(p, Predictor) for p in predictors_of(graph, block)):
            what = f"'{block[0]}' and a dispersion need more than rows of one site: no kernel"
        if what:
            return Finding(f"parameter '{block[0]}'", what)
    lines: list[LineSolver | CurveSolver] = [LineSolver(block, graph, updates) for block in blocks]
    lines += [CurveSolver(block, graph, updates) for block in curved]
    closed = solvers_of(rest, graph, values)
    joint = dict.fromkeys(u.block for u in rest.values() if isinstance(u.update, NewtonOnSums))
    newton = [NewtonSolver(block, graph) for block in joint]
    climbed: dict[Gradient, list[str]] = {}
    for name, u in rest.items():
        if isinstance(u.update, Gradient):
            climbed.setdefault(u.update, []).append(name)
    evaluators = [arguments_of(group, values) for group in graph.groups]
    climbs = [ClimbSolver(tuple(names), u, graph, evaluators) for u, names in climbed.items()]
    solvers: list[Solver | LineSolver | CurveSolver | NewtonSolver | ClimbSolver]
    solvers = [*lines, *closed, *newton, *climbs]
    solved = {name for line in lines for name in line.block} | {s.update.name for s in closed}
    solved |= {name for block in joint for name in block}
    solved |= {name for names in climbed.values() for name in names}
    reached = tuple(g for g in others if solved.intersection(graph.groups[g].params))
    return Theta(graph, normals, vector, components, solvers, evaluators, others, reached, prior)
