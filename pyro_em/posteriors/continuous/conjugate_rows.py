"""Conjugate latents of many rows on sums: one pass over the rows gives all that an M-step reads.

    log p(x) = Σ_i w_i (A(χ + Δ_i) − A(χ)) + const,    Σ_i w_i E[t_i],

for every element i of a latent under one prior χ, where Δ_i is what its data add. That is computed
anew in each pass, some rows at a time, so that nothing of the data's length is held between two of
them. Where parameters reach the sites below the latent, too, their sums are taken in the same pass,
with the latent at its mean. The posterior of each element is computed when somebody asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.errors import Handover
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.at_values import (
    AtValues,
    Values,
    no_densities,
    with_own_parameters,
)
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_cells import rows_of
from pyro_em.posteriors.conjugates.conjugate_slices import CollectedElements, RowSlices, weights_of
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.conjugates.conjugate_totals import Totals, totals
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.posteriors.continuous.summed_theta import Summed, SummedTheta
from pyro_em.posteriors.gaussians.gaussian import piece
from pyro_em.updates.decisions.decision import groups_reached
from pyro_em.updates.expectations.conjugate_beliefs import wide
from pyro_em.updates.regressions.line_sums import LineSite
from pyro_em.updates.sums.data_sums import DataSums
from pyro_em.updates.sums.model_sums import GroupSums, ModelSums, PlainSums
from pyro_em.updates.sums.summable import Summable
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, NewtonOnSums, ParameterUpdate


@dataclass(frozen=True, eq=False)
class Latent:
    """A conjugate latent of many elements under one prior.

    Attributes:
        block: The latent with the sites that read it.
        number: That of its own site among the groups of an M-step.
        totals: Its evidence and expected statistics, without the constant.
        weight: How many elements count.
        constant: Σ w log base in nats.
    """

    block: ConjugateBlock
    number: int
    totals: Totals
    weight: float
    constant: float

    def e_step(self, values: Values) -> tuple[float, ModelSums]:
        """The log evidence in nats, and the sums of the latent's own site."""
        group, kernel = self.block.groups[0], self.block.kernel
        arguments = group.evaluate_arguments(values)
        chi = kernel.chi(wide(arguments))
        evidence, t = self.totals.at(chi.reshape(-1, chi.shape[-1])[0])
        mean = (t / self.weight).reshape((1,) * (1 + len(group.sizes)) + t.shape)
        mass = t.new_full((1,) * (1 + len(group.sizes)), self.weight)
        family = group.family
        assert family is not None
        varying = (False,) * mass.dim()
        value = mass.new_zeros(()).expand(mass.shape)
        sums = family.expected_statistics(mass, value, {}, varying, kernel.statistics(mean))
        own = {self.number: PlainSums(sums, wide(arguments))}
        return float(evidence) + self.constant, ModelSums(own, {self.number: self.weight}, {})


@dataclass(frozen=True, eq=False)
class MovingLatent:
    """A conjugate latent, read by sites with parameters of their own.

    Attributes:
        slices: The latent with the sites that read it, some rows at a time.
        number: That of its own site among the groups of an M-step; those of the others follow.
        graph: That of an M-step, of all rows.
        updates: What was decided per parameter.
        summable: How its sites are added up; None before that is known.
    """

    slices: RowSlices
    number: int
    graph: FactorGraph
    updates: Mapping[str, ParameterUpdate]
    summable: Summable | None = None

    def e_step(self, values: Values) -> tuple[float, ModelSums]:
        """The log evidence in nats, and the sums of its sites."""
        total, sums = torch.zeros((), dtype=torch.float64), None
        for part in self.slices.parts():
            evidence, data = self.of_part(part, values)
            total = total + evidence
            assert self.summable is not None
            own = self.summable.on(data.graph, self.updates).sums(data)
            sums = own if sums is None else sums + own
        assert sums is not None
        return float(total), sums

    def of_part(self, part: ConjugateBlock, values: Values) -> tuple[Tensor, DataSums]:
        """The log evidence of some rows in nats, and what an M-step asks of them."""
        arguments = {
            piece(g.members[0], a): t
            for g in part.groups
            for a, t in g.evaluate_arguments(values).items()
        }
        each = [part.of_site(i, arguments) for i in range(len(part.groups))]
        added = [part.added(i, each[i]) for i in part.summed]
        constants = [part.onto_table(i, part.bases(i, each[i])) for i in part.summed]
        chi = rows_of(part.kernel.chi(wide(each[0])), part.groups[0], 1)
        total = sum(added[1:], added[0])
        solution = ConjugateSolution(part.kernel, chi, total, tuple(constants))
        table = part.table(solution)
        counts = torch.ones_like(table) if part.weight is None else part.weight.expand(table.shape)
        groups, weights = list(self.graph.groups), [table.new_zeros(())] * len(self.graph.groups)
        known = [dict(g.arguments) for g in groups]
        for g, (site, own) in enumerate(part.believed(solution, arguments, counts), self.number):
            groups[g], weights[g], known[g] = site, own, dict(site.arguments)
        graph = replace(self.graph, groups=tuple(groups))
        evidence = (counts * table).sum()
        return evidence, DataSums(graph, {}, weights, known, no_densities, values)

    def with_sums(self, values: Values) -> MovingLatent | None:
        """The same that knows how its sites are added up; None where they are no sums of one size."""
        graph = self.of_part(self.slices.parts()[0], values)[1].graph
        sites = range(self.number, self.number + len(self.slices.block.groups))
        outside = set(range(len(graph.groups))).difference(sites)
        differing = {
            g: frozenset(a for a, t in graph.groups[g].arguments.items() if t.shape[1] > 1)
            for g in sites
        }
        plate = self.slices.block.plates[0]
        found = Summable.of(graph, self.updates, plate, outside, values, differing)
        if not isinstance(found, Summable) or found.solved:
            return None
        return replace(self, summable=found)


@dataclass(frozen=True, eq=False)
class ConjugateTheta(SummedTheta):
    """The parameters of conjugate latents and of the sites that read them, and their M-step.

    Attributes:
        latents: The latents.
    """

    latents: tuple[Latent | MovingLatent, ...]

    def e_step(self, at: AtValues[Summed]) -> Summed:
        """The evidence, and the sums of all latents.

        Raises:
            Handover: If the step through tables has to look.
        """
        if not at.expectation:
            total, groups, masses = 0.0, dict[int, GroupSums](), dict[int, float]()
            for latent in self.latents:
                evidence, own = latent.e_step(at.values)
                total += evidence
                groups.update(own.groups)
                masses.update(own.masses)
            if not abs(total) < math.inf:
                raise Handover
            at.expectation.append(Summed(total, {}, model=ModelSums(groups, masses, {})))
        return at.expectation[0]


@dataclass(frozen=True, eq=False)
class ConjugateRows:
    """Conjugate latents of many rows.

    Attributes:
        theta: The parameters with their steps.
    """

    theta: ConjugateTheta
    name: str = "conjugate"
    words: str = "conjugate latents, on sums over rows"

    def e_step(self, at: AtValues[Summed]) -> Summed:
        """The E-step at some parameters."""
        return self.theta.e_step(at)


def conjugate_rows(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> ConjugateRows | None:
    """The kernel of a model whose latents are conjugate, each under one prior; None of others.

    Args:
        graph: Of the E-step.
        updates: What was decided per parameter.
        values: Parameter values.
    """
    moved = {n for n, u in updates.items() if not isinstance(u.update, Fixed)}
    exact = (ClosedForm, LeastSquares, NewtonOnSums, Fixed)
    if not moved or not all(isinstance(u.update, exact) and not u.priors for u in updates.values()):
        return None
    if not all(isinstance(g.nested, ConjugateBlock) for g in graph.groups):
        return None
    own = with_own_parameters(for_updates(graph))
    begin, latents = len(graph.groups), list[Latent | MovingLatent]()
    for group in graph.groups:
        block = group.nested
        assert isinstance(block, ConjugateBlock)
        latent = _latent(block, begin, own, updates, values) if _may_be(block) else None
        if latent is None:
            return None
        latents.append(latent)
        begin += len(block.groups)
    summable = _together(own, updates, latents)
    if summable is None:
        return None
    return ConjugateRows(ConjugateTheta(own, updates, summable, tuple(latents)))


def _may_be(block: ConjugateBlock) -> bool:
    """Whether a latent has one prior, and the sites below it follow from parameters."""
    first, children = block.groups[0], block.groups[1:]
    if block.scope or block.apart or first.family is None or not first.is_static:
        return False
    chi = block.kernel.chi(wide(first.arguments))
    if rows_of(chi, first, 1).shape[:2] != (1, 1):
        return False
    static = all(g.is_static and g.value_binding is None and not g.raw_params for g in children)
    return static and block.count > 1


def _latent(
    block: ConjugateBlock,
    number: int,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
) -> Latent | MovingLatent | None:
    """A latent with the sums over its elements; None where its rows cannot be told apart."""
    slices = RowSlices.of(block)
    if any(g.params for g in block.groups[1:]):
        if slices is None:
            return None
        return MovingLatent(slices, number, graph, updates).with_sums(values)
    source = slices or CollectedElements.of(block)
    if source is None:
        return None
    weight = float(block.count)
    if block.weight is not None:
        assert isinstance(source, RowSlices)
        weight = sum(float(w.sum()) for w in map(weights_of, source.parts()) if w is not None)
    if not weight > 0:
        return None
    return Latent(
        block, number, totals(block.kernel, source), weight, float(source.constants(block))
    )


def _together(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    latents: Sequence[Latent | MovingLatent],
) -> Summable | None:
    """All sites that an M-step reads, as they are added up; None where there are others."""
    plain, lines, groups = list[int](), dict[int, LineSite](), list(graph.groups)
    regressed = dict(updates)
    for latent in latents:
        if isinstance(latent, Latent):
            plain.append(latent.number)
            continue
        own = latent.summable
        assert own is not None
        plain += own.plain
        lines |= own.lines
        for g in own.lines:
            groups[g] = own.graph.groups[g]
        regressed |= {n: u for n, u in own.updates.items() if isinstance(u.update, LeastSquares)}
    moved = {n for n, u in updates.items() if not isinstance(u.update, Fixed)}
    touched = groups_reached(graph, moved)
    plain = [g for g in plain if g in touched]
    if set(touched) != {*plain, *lines}:
        return None
    whole = replace(graph, groups=tuple(groups))
    return Summable(whole, regressed, tuple(plain), lines, tuple(touched), ())
