"""One EM step on sums over the data: which programs can have it, and how it goes.

The parameters are plain values here; nothing is written until somebody can look. Whatever is out of
the ordinary raises `Handover`, and the full step of `pyro_em.fitting.em_map`, which stands on its
own and is this one's oracle in the tests, takes over from the last good values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.components import owned
from pyro_em.densities.density import IMPOSSIBLE, NormalSolver
from pyro_em.densities.gaussian import Gaussian
from pyro_em.densities.natural import Naturals, State, naturals
from pyro_em.densities.priors import LogPrior, log_prior, may_have_priors, point_groups
from pyro_em.densities.regression import Lines, as_lines
from pyro_em.densities.theta import At
from pyro_em.densities.tying import Arguments, arguments_of, collapsed, collapsed_updates
from pyro_em.errors import Handover
from pyro_em.families.family import expected_log_density
from pyro_em.graph.factors import FactorGraph
from pyro_em.plan.eligibility import _can_compile
from pyro_em.posteriors.chain import Chain, as_chain, shape_of_chain
from pyro_em.posteriors.mixture import Rows, as_rows, distinct, row_weights, shape_of_rows
from pyro_em.tracing.sites import Role
from pyro_em.updates.closed_form import Solver, solvers_of
from pyro_em.updates.statistics import Sums
from pyro_em.updates.update import LeastSquares, ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Point:
    """Where a compiled run stands: the parameters, and the E-step there."""

    iteration: Iteration
    at: At
    sums: Sums
    log_prior: float = 0.0

    @property
    def log_evidence(self) -> float:
        """log p(x; θ) in nats."""
        return self.sums.log_evidence

    @property
    def objective(self) -> float:
        """What EM raises: the log evidence plus the log prior, in nats."""
        return self.sums.log_evidence + self.log_prior

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return self.iteration.values(self.at)


@dataclass(frozen=True, eq=False)
class Iteration:
    """A compiled EM step.

    Attributes:
        graph: The collapsed graph.
        kernel: The E-step.
        naturals: The M-step of simplex rows, probabilities and rates; None where there are none.
        owned: The M-step of Normal groups with parameters of their own.
        solvers: The M-step of all other parameters, locations first.
        evaluators: How arguments are computed, per group.
        others: Groups whose arguments the E-step or a solver reads.
        reached: Those of them whose density a solver changes.
        prior: Of point-estimated latents.
    """

    graph: FactorGraph
    kernel: Rows | Chain
    naturals: Naturals | None
    owned: Mapping[int, NormalSolver]
    solvers: Sequence[Solver]
    evaluators: Sequence[Mapping[str, Arguments]]
    others: tuple[int, ...]
    reached: tuple[int, ...]
    prior: LogPrior

    @torch.no_grad()
    def enter(self, values: Values) -> At:
        """Parameter values in the form of the E-step.

        Raises:
            Handover: If the full E-step has to look.
        """
        natural = None if self.naturals is None else self.naturals.enter(values)
        components = {g: own.enter(values) for g, own in self.owned.items()}
        held = self._held()
        rest = {name: v for name, v in values.items() if name not in held}
        return self._at(natural, components, rest)

    def _held(self) -> frozenset[str]:
        names = set() if self.naturals is None else set(self.naturals.solved)
        for own in self.owned.values():
            names |= set(own.params)
        return frozenset(names)

    def _at(self, natural: State | None, components: Mapping[int, Any], rest: Values) -> At:
        arguments = {
            g: {name: a.evaluate(rest) for name, a in self.evaluators[g].items()}
            for g in self.others
        }
        prepared = {g: c.prepared for g, c in components.items()}
        for g, rule in self.kernel.normals.items():
            if g not in prepared and isinstance(rule, Gaussian):
                prepared[g] = rule.prepare(arguments[g])
        return At(natural, components, rest, arguments, prepared, self.prior.of_rest(rest))

    @torch.no_grad()
    def values(self, at: At) -> dict[str, Tensor]:
        """All parameters by name."""
        out = dict(at.values)
        if self.naturals is not None and at.natural is not None:
            out |= self.naturals.values(at.natural)
        for g, own in self.owned.items():
            out |= own.values(at.components[g])
        # Steps are made in inference mode, which costs less; who reads values must not notice.
        return {name: v.clone() if v.is_inference() else v for name, v in out.items()}

    @torch.inference_mode()
    def e_step(self, at: At) -> Point:
        """The E-step at some parameters.

        Raises:
            Handover: If the full E-step has to look.
        """
        sums = self.kernel.e_step(at)
        log_prior = float(at.log_prior + self.prior.of_natural(at.natural))
        if not abs(log_prior) < IMPOSSIBLE:
            raise Handover
        return Point(self, at, sums, log_prior)

    def tells_apart(self, point: Point) -> bool:
        """Whether the components differ in an argument of what is observed."""
        return any(
            _tells_apart(a.evaluate(point.values), 1 + group.n_plates, 1 + len(group.sizes))
            for group, evaluators in zip(self.graph.groups, self.evaluators, strict=True)
            if group.observed
            and group.role is not Role.POINT
            and (group.mask is None or bool(group.mask.any()))
            for a in evaluators.values()
            if a.dtype.is_floating_point
        )

    @torch.inference_mode()
    def m_step(self, point: Point) -> tuple[At, float]:
        """The M-step from an E-step.

        Returns:
            The new parameters, and by how much they raise the expected log joint, in nats.

        Raises:
            Handover: If the full M-step has to look.
        """
        at, sums, gains = point.at, point.sums, []
        natural = at.natural
        if self.naturals is not None and natural is not None and sums.features is not None:
            features = sums.features
            if self.prior.counts is not None:
                features = features + self.prior.counts
                if not float(features[: self.naturals.size].amin()) >= 0:
                    raise Handover  # no mode inside
            natural, gain = self.naturals.m_step(natural, features)
            gains.append(gain)
        components = {}
        for g, own in self.owned.items():
            components[g], gain = own.m_step(at.components[g], *sums.moments[g])
            gains.append(gain)
        after = at
        if self.solvers:
            rest, gain = self._solve(at, sums)
            gains.append(gain)
            after = self._at(natural, components, rest)
            if self.prior.rest:
                gains.append(after.log_prior - at.log_prior)
        else:
            prepared = {**at.prepared, **{g: c.prepared for g, c in components.items()}}
            after = replace(at, natural=natural, components=components, prepared=prepared)
        total = float(gains[0] if len(gains) == 1 else torch.stack(gains).sum())
        if not math.isfinite(total):
            raise Handover
        return after, total

    def _solve(self, at: At, sums: Sums) -> tuple[dict[str, Tensor], Tensor]:
        """Parameters that no vector holds, one after the other, and what they gain."""
        before = {g: {n: _wide(a) for n, a in at.arguments[g].items()} for g in self.others}
        statistics = {}
        for g in self.reached:
            rule = self.kernel.normals.get(g)
            if not isinstance(rule, Gaussian):
                own = sums.statistics[g]
            else:
                own = rule.statistics(at.prepared[g], *sums.moments[g], at.arguments[g])
            references = {f"reference:{n}": a for n, a in before[g].items()}
            statistics[g] = {**{n: _wide(t) for n, t in own.items()}, **references}
        values, current = dict(at.values), {g: dict(a) for g, a in before.items()}
        for solver in self.solvers:
            name = solver.update.name
            values[name] = solver.solve(statistics, current, values[name])
            for g in self.reached:
                for argument, evaluator in self.evaluators[g].items():
                    if name in evaluator.binding.params:
                        current[g][argument] = _wide(evaluator.evaluate(values))
        gains = []
        for g in self.reached:
            family = self.graph.groups[g].family
            assert family is not None
            gains.append(expected_log_density(family, statistics[g], current[g]))
            gains.append(-expected_log_density(family, statistics[g], before[g]))
        return values, torch.stack([gain.to(torch.float64) for gain in gains]).sum()


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
    if not _can_compile(graph, updates):
        return None
    graph = collapsed(graph)
    chain = shape_of_chain(graph)
    rows = shape_of_rows(graph) if chain is None else None
    repeats: Tensor | None = None
    if rows is not None:
        weight = row_weights(graph, rows)
        if weight is None:
            return None
        graph, repeats = distinct(graph, rows, weight)
    elif not all(group.is_unscaled for group in graph.groups):
        return None
    shape = chain or rows
    if shape is None:
        return None
    own = collapsed_updates(updates, graph)
    found = naturals(graph, own, values, shape.eligible(graph))
    layout, linears = found if found is not None else (None, {})
    K = next(iter(graph.latents.values())).size
    lines = {
        g: line
        for g in range(len(graph.groups))
        if (line := as_lines(g, graph, updates, values, K)) is not None
    }
    kernel: Rows | Chain | None = None
    if chain is not None:
        kernel = as_chain(graph, chain, linears, lines)
    elif rows is not None:
        kernel = as_rows(graph, rows, repeats, linears, lines)
    if kernel is None:
        return None
    components: dict[int, NormalSolver] = {}
    for g, rule in kernel.normals.items():
        solver: NormalSolver | None = None
        if isinstance(rule, Lines):
            solver = rule
        elif isinstance(rule, Gaussian):
            solver = owned(g, rule, graph, own, values)
        if solver is not None:
            components[g] = solver
    apart = {*linears, *components, *point_groups(graph)}
    others = tuple(g for g in range(len(graph.groups)) if g not in apart)
    held = frozenset(() if layout is None else layout.params)
    held |= {name for c in components.values() for name in c.params}
    rest = {name: u for name, u in own.items() if name not in held}
    if any(isinstance(u.update, LeastSquares) for u in rest.values()):
        return None
    if any(own[name].priors for c in components.values() for name in c.params):
        return None
    natural = frozenset() if layout is None else layout.params
    prior = log_prior(graph, own, values, layout)
    if prior is None or not all(may_have_priors(u, graph, n in natural) for n, u in own.items()):
        return None
    solvers = solvers_of(rest, graph, values)
    solved = {s.update.name for s in solvers}
    reached = tuple(g for g in others if solved.intersection(graph.groups[g].params))
    evaluators = [arguments_of(group, values) for group in graph.groups]
    keep_freed_memory()
    return Iteration(graph, kernel, layout, components, solvers, evaluators, others, reached, prior)


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB of freed memory, once per process.

    glibc gives the end of the heap back to the system where more is free than twice the largest
    block that was mapped and freed so far, and each page that is taken again costs a fault: between
    a sixth and a third of the time where steps make some MB of temporaries. One block just below
    the limit of 32 MiB, freed before it is touched, raises what is kept. Other C libraries take no
    notice.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
