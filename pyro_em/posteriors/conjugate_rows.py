"""Conjugate latents of many rows on sums: one pass over the rows gives all that an M-step reads.

    log p(x) = Σ_i w_i (A(χ + Δ_i) − A(χ)) + const,    Σ_i w_i E[t_i],

for every element i of a latent under one prior χ, where Δ_i is what its data add. Parameters of the
prior alone are updated; what the data add is computed anew in each pass, some rows at a time, so that
nothing of the data's length is held between two of them. The posterior of each element is computed
when somebody asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, Handover
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugate_cells import rows_of
from pyro_em.posteriors.conjugate_slices import Collected, RowSlices, weights_of
from pyro_em.posteriors.conjugate_totals import Totals, totals
from pyro_em.posteriors.gaussian_steps import for_updates
from pyro_em.reduction.reduction import Whole
from pyro_em.tracing.encoding import DERIVED
from pyro_em.tracing.parameters import TracedParameter, values_of, write_unconstrained
from pyro_em.updates.conjugate_beliefs import wide
from pyro_em.updates.data_sums import DataSums
from pyro_em.updates.m_step import MStepState, m_step_over
from pyro_em.updates.newton_on_sums import AtEdge
from pyro_em.updates.running_sums import ModelSums, PlainSums, Summable
from pyro_em.updates.statistics import Expectation
from pyro_em.updates.update import ClosedForm, Fixed, NewtonOnSums, ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Summed(Expectation):
    """The evidence with what an M-step reads.

    Attributes:
        model: The sums of the latents' sites.
    """

    model: ModelSums | None = None


@dataclass(frozen=True, eq=False)
class AtValues:
    """Parameter values, and the E-step there once it has been made.

    Attributes:
        values: Constrained values by name.
        expectation: The E-step.
    """

    values: Values
    expectation: list[Summed] = field(default_factory=list, metadata=DERIVED)


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

    def e_step(self, values: Values) -> tuple[float, PlainSums]:
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
        return float(evidence) + self.constant, PlainSums(sums, wide(arguments))


@dataclass(frozen=True, eq=False)
class ConjugateTheta:
    """The parameters of conjugate latents' priors, and their M-step.

    Attributes:
        graph: That of an M-step; parameters of its own.
        updates: What was decided per parameter.
        latents: The latents.
        summable: Says which sites are read.
    """

    graph: FactorGraph
    updates: Mapping[str, ParameterUpdate]
    latents: tuple[Latent, ...]
    summable: Summable
    evaluators: tuple[()] = ()

    def enter(self, values: Values) -> AtValues:
        """Parameter values in the form of the E-step."""
        return AtValues(dict(values))

    def values(self, at: AtValues) -> dict[str, Tensor]:
        """The parameters by name, in memory of their own."""
        return {name: value.clone() for name, value in at.values.items()}

    def log_prior(self, at: AtValues) -> float:
        """No parameter has a prior."""
        return 0.0

    def e_step(self, at: AtValues) -> Summed:
        """The evidence, and the sums of all latents.

        Raises:
            Handover: If the step through tables has to look.
        """
        if not at.expectation:
            total, groups, masses = 0.0, {}, {}
            for latent in self.latents:
                evidence, groups[latent.number] = latent.e_step(at.values)
                masses[latent.number] = latent.weight
                total += evidence
            if not abs(total) < math.inf:
                raise Handover
            at.expectation.append(Summed(total, {}, model=ModelSums(groups, masses, {})))
        return at.expectation[0]

    def m_step(self, at: AtValues, expectation: Summed) -> tuple[AtValues, float]:
        """The maximiser, and the gain in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        assert expectation.model is not None
        for name, parameter in self.graph.parameters.items():
            write_unconstrained(parameter, at.values[name])
        nothing = [torch.zeros(()) for _ in self.graph.groups]
        arguments = [dict(g.arguments) for g in self.graph.groups]
        data = DataSums(self.graph, {}, nothing, arguments, _no_densities, at.values)
        graph, running = self.summable.standing_for(expectation.model, data)
        try:
            m_step_over(lambda: Whole(running), graph, running.updates, MStepState(), expand=False)
        except (DegenerateError, AtEdge) as error:
            raise Handover from error
        after = AtValues(values_of(graph.parameters))
        return after, self.e_step(after).log_evidence - expectation.log_evidence


@dataclass(frozen=True, eq=False)
class ConjugateRows:
    """Conjugate latents of many rows.

    Attributes:
        theta: The parameters with their steps.
    """

    theta: ConjugateTheta
    name: str = "conjugate"
    words: str = "conjugate latents, on sums over rows"

    def e_step(self, at: AtValues) -> Summed:
        """The E-step at some parameters."""
        return self.theta.e_step(at)


def conjugate_rows(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> ConjugateRows | None:
    """The kernel of a model of conjugate latents whose priors alone have parameters; None of others.

    Args:
        graph: Of the E-step.
        updates: What was decided per parameter.
        values: Parameter values.
    """
    moved = {n for n, u in updates.items() if not isinstance(u.update, Fixed)}
    exact = (ClosedForm, NewtonOnSums, Fixed)
    if not moved or not all(isinstance(u.update, exact) and not u.priors for u in updates.values()):
        return None
    if not all(isinstance(g.nested, ConjugateBlock) for g in graph.groups):
        return None
    own = for_updates(graph)
    begin, found = len(graph.groups), []
    for group in graph.groups:
        block = group.nested
        assert isinstance(block, ConjugateBlock)
        if not _may_be(block):
            return None
        begin += len(block.groups)
        found.append((block, begin - len(block.groups)))
    plate = next((p for block, _ in found for p in block.groups[0].dims[0]), "")
    numbers = {number for _, number in found}
    summable = Summable.of(own, updates, plate, set(range(len(own.groups))) - numbers, values, {})
    if not isinstance(summable, Summable) or not numbers.issuperset(summable.plain):
        return None
    if summable.lines or summable.solved:
        return None
    latents = [_latent(block, number) for block, number in found]
    if any(latent is None for latent in latents):
        return None
    parameters = {n: _own(p) for n, p in own.parameters.items()}
    theta = ConjugateTheta(
        replace(own, parameters=parameters),
        updates,
        tuple(latent for latent in latents if latent is not None),
        replace(summable, graph=replace(own, parameters=parameters)),
    )
    return ConjugateRows(theta)


def _may_be(block: ConjugateBlock) -> bool:
    """Whether a latent has one prior, and no parameter reaches what the data say of it."""
    first, children = block.groups[0], block.groups[1:]
    if block.scope or block.apart or first.family is None or not first.is_static:
        return False
    chi = block.kernel.chi(wide(first.arguments))
    if rows_of(chi, first, 1).shape[:2] != (1, 1):
        return False
    fixed = all(not g.params and g.is_static and g.value_binding is None for g in children)
    return fixed and block.count > 1


def _latent(block: ConjugateBlock, number: int) -> Latent | None:
    """A latent with the sums over its elements; None where its rows cannot be told apart."""
    source = RowSlices.of(block) or Collected.of(block)
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


def _own(parameter: TracedParameter) -> TracedParameter:
    """The same parameter in memory that steps may write."""
    return replace(parameter, unconstrained=parameter.unconstrained.detach().clone())


def _no_densities(*_: object) -> dict[int, Tensor]:
    raise Handover  # no parameter is updated by a gradient
