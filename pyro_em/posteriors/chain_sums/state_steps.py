"""Gaussian chains whose steps are alike, on sums over steps: EM without a look at single sites.

Parameters are one vector θ; the matrices of the chains, the sums of an E-step and the maximisers of an
M-step are a few operations of numpy each, and none for each step of the series but in the filter and
smoother (`pyro_em.posteriors.filters.kalman`). Whatever is out of the ordinary is handed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import Finding, Handover
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.chain_sums.compiled_m_step import CompiledMStep
from pyro_em.posteriors.chain_sums.kept_kernels import Decided, decided
from pyro_em.posteriors.chain_sums.state_arguments import Numbers, Unlike
from pyro_em.posteriors.chain_sums.state_joined import joined
from pyro_em.posteriors.chain_sums.state_matrices import (
    DEVIATION,
    TRANSITION,
    ChainMatrices,
    ChainNumbers,
)
from pyro_em.posteriors.chain_sums.state_regression import Regression
from pyro_em.posteriors.chain_sums.state_sites import Site, site_of
from pyro_em.posteriors.chain_sums.state_spreads import Limits, Spreads
from pyro_em.posteriors.chain_sums.state_sums import States, sums_of
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.posteriors.filters.kalman import log_evidence
from pyro_em.posteriors.filters.state_space import Smoothed, SmoothedArrays
from pyro_em.posteriors.states.gaussian_chain import GaussianChain
from pyro_em.tracing.encoding import DERIVED
from pyro_em.updates.expectations.statistics import Expectation
from pyro_em.updates.regressions.expansion import centred_latents
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Solved(Expectation):
    """The evidence with the states behind it.

    Attributes:
        found: Of each component, numbers and the smoother's results.
    """

    found: tuple[tuple[ChainNumbers, Smoothed | SmoothedArrays], ...] = ()


@dataclass(frozen=True, eq=False)
class AtTheta:
    """Parameters as a vector, and the E-step there once it has been made.

    Attributes:
        theta: # (parameters,)
        others: Parameters that no chain reads, by name.
        expectation: The E-step.
    """

    theta: Numbers
    others: Values
    expectation: list[Solved] = field(default_factory=list, metadata=DERIVED)


@dataclass(frozen=True, eq=False)
class ChainTheta:
    """The parameters of chains and their M-step.

    Attributes:
        start: All parameters when the kernel was made, for shapes and types.
        begins: Where each that a chain reads begins in θ.
        size: Numbers in θ.
        chains: The matrices of each component.
        spreads: Closed forms of spreads.
        decided: What holds for other data, too: least squares of coefficients, and places of numbers.
    """

    start: Values
    begins: Mapping[str, int]
    size: int
    chains: tuple[ChainMatrices, ...]
    spreads: Spreads
    decided: Decided

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Those of all components."""
        return tuple(s for c in self.chains for s in c.sites)

    def enter(self, values: Values) -> AtTheta:
        """Parameter values in the form of the E-step."""
        others = {n: v for n, v in values.items() if n not in self.begins}
        return AtTheta(_vector(values, self.begins, self.size), others)

    def values(self, at: AtTheta) -> dict[str, Tensor]:
        """The parameters by name, in memory of their own."""
        out = {}
        for name, like in self.start.items():
            if name in self.begins:
                begin = self.begins[name]
                own = torch.from_numpy(at.theta[begin : begin + like.numel()].copy())
                out[name] = own.reshape(like.shape).to(like)
            else:
                out[name] = at.others[name].clone()
        return out

    def log_prior(self, at: AtTheta) -> float:
        """No parameter has a prior."""
        return 0.0

    def e_step(self, at: AtTheta) -> Solved:
        """The evidence, and the states of all chains.

        Raises:
            Handover: If the step through tables has to look.
        """
        if not at.expectation:
            at.expectation.append(self._e_step(at.theta))
        return at.expectation[0]

    def _e_step(self, theta: Numbers) -> Solved:
        total, found = 0.0, []
        try:
            with np.errstate(all="ignore"):
                for matrices in self.chains:
                    own = _clear(matrices.at(theta))
                    states = own.smoothed()
                    total += float(states.log_evidence.sum()) + own.constant
                    found.append((own, states))
        except np.linalg.LinAlgError as error:
            raise Handover from error
        if not abs(total) < math.inf:
            raise Handover
        return Solved(total, {}, found=tuple(found))

    def log_evidence(self, at: AtTheta) -> float:
        """The evidence alone, in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        total = 0.0
        try:
            with np.errstate(all="ignore"):
                for matrices in self.chains:
                    own = matrices.at(at.theta)
                    total += float(log_evidence(_clear(own).space).numpy().sum()) + own.constant
        except np.linalg.LinAlgError as error:
            raise Handover from error
        if not abs(total) < math.inf:
            raise Handover
        return total

    def m_step(self, at: AtTheta, expectation: Solved) -> tuple[AtTheta, float]:
        """The maximiser, and the gain in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        try:
            with np.errstate(all="ignore"):
                theta = self._maximiser(at.theta, expectation)
        except np.linalg.LinAlgError as error:
            raise Handover from error
        if not bool(np.isfinite(theta).all()):
            raise Handover
        after = AtTheta(theta, at.others)
        return after, self.e_step(after).log_evidence - expectation.log_evidence

    @cached_property
    def _compiled(self) -> CompiledMStep | None:
        found = self.decided.compiled
        return None if found is None else found.on(self.chains, self.spreads)

    def _maximiser(self, theta: Numbers, e: Solved) -> Numbers:
        if all(own.is_compiled for own, _ in e.found) and self._compiled is not None:
            found = self._compiled.maximiser(theta, e.found)
            if found is not None:
                return found
        return self._by_numpy(theta, e)

    def _by_numpy(self, theta: Numbers, e: Solved) -> Numbers:
        numbers, sums = [], []
        for matrices, (own, found) in zip(self.chains, e.found, strict=True):
            dynamics = matrices.dynamics.numpy()
            smoothed = found if isinstance(found, Smoothed) else found.tensors
            states = States.of(smoothed, own.arrays[TRANSITION], dynamics)
            for site, n, kinds in zip(matrices.sites, own.sites, matrices.kinds, strict=True):
                numbers.append(n)
                sums.append(sums_of(site, n, states, kinds))
        regression = self.decided.regression
        step = regression.step(numbers, sums)
        second = [regression.moved(i, s, step) for i, s in enumerate(sums)]
        out = theta.copy()
        out[regression.unknowns] += step[:-1]
        where, new = self.spreads.solve(theta, second)
        out[where] = new
        return out


def _clear(own: ChainNumbers) -> ChainNumbers:
    """The same chains, each of whose data has noise.

    Raises:
        Handover: If one has none.
    """
    if not own.arrays[DEVIATION].min() > 0:
        raise Handover
    return own


def _vector(values: Values, begins: Mapping[str, int], size: int) -> Numbers:
    """Parameters as one vector of double precision."""
    out = np.empty(size)
    for name, begin in begins.items():
        value = values[name].detach()
        out[begin : begin + value.numel()] = value.reshape(-1).to("cpu", torch.float64).numpy()
    return out


@dataclass(frozen=True, eq=False)
class ChainSums:
    """Gaussian chains whose steps are alike.

    Attributes:
        theta: Parameters, sums and their steps.
    """

    theta: ChainTheta
    name: str = "Kalman"
    words: str = "Kalman filter and smoother, on sums over steps"

    def e_step(self, at: AtTheta) -> Solved:
        """The E-step at some parameters."""
        return self.theta.e_step(at)


def chain_sums(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> ChainSums | Finding | None:
    """The kernel of a model whose Gaussian latents are chains with alike steps.

    Args:
        graph: Of the E-step.
        updates: What was decided per parameter.
        values: Parameter values.

    Returns:
        The kernel, or why there is none; None where no latents are chains.
    """
    blocks = [g.nested for g in graph.groups if isinstance(g.nested, GaussianChain)]
    if not blocks:
        return None
    try:
        return _chain_sums(graph, blocks, updates, values)
    except Unlike as found:
        return Finding("model", str(found))


def _chain_sums(
    graph: FactorGraph,
    blocks: Sequence[GaussianChain],
    updates: Mapping[str, ParameterUpdate],
    values: Values,
) -> ChainSums:
    beside = [g for g in graph.groups if not isinstance(g.nested, GaussianChain)]
    if beside:
        raise Unlike(f"'{beside[0].members[0]}' is no part of a chain")
    for name, u in updates.items():
        if not isinstance(u.update, ClosedForm | LeastSquares | Fixed):
            raise Unlike(f"the update of '{name}' is a gradient")
        if u.priors or (isinstance(u.update, ClosedForm) and u.update.floor > 0):
            raise Unlike(f"'{name}' has a prior or a floor")
    if all(isinstance(u.update, Fixed) for u in updates.values()):
        raise Unlike("no parameter is updated")
    if any(b.scope for b in blocks):
        raise Unlike("discrete latents decide about Gaussian ones")
    if centred_latents(for_updates(graph), updates):
        raise Unlike("a latent's spread may be learned as a coefficient, too")
    read = dict.fromkeys(p for b in blocks for g in b.groups for p in g.params)
    shapes = {name: values[name].shape for name in read}
    sizes = [shape.numel() for shape in shapes.values()]
    begins = dict(zip(read, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True)) if read else {}
    size = sum(sizes)
    limits = Limits.of(graph, updates, begins, size)

    def decide() -> Decided:
        return _decided(graph, blocks, updates, values, begins, limits)

    found = decided(blocks, updates, shapes, decide)
    start = {n: v.clone() for n, v in values.items()}
    spreads = found.spreads.within(limits)
    return ChainSums(ChainTheta(start, begins, size, found.on(blocks), spreads, found))


def _decided(
    graph: FactorGraph,
    blocks: Sequence[GaussianChain],
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    begins: Mapping[str, int],
    limits: Limits,
) -> Decided:
    """Matrices and M-step of chains; see `chain_sums`.

    Raises:
        Unlike: If there are none.
    """
    shapes = {name: values[name].shape for name in begins}
    size = len(limits.low)
    theta = _vector(values, begins, size)
    chains, members, sites = [], [], list[Site]()
    for group, block in zip(graph.groups, blocks, strict=True):
        layout = block.chains
        own = joined(
            [
                site_of(g, stack, layout.form.chains, begins)
                for g, stack in zip(block.groups, layout.stacks, strict=True)
            ]
        )
        numbers = block.numbers(group.evaluate_arguments(values))
        chains.append(ChainMatrices.of(layout, own, numbers.space, theta))
        members.append(tuple(stacks for _, stacks in own))
        sites += [site for site, _ in own]
    free = [
        begins[n] + np.arange(values[n].numel())
        for n, u in updates.items()
        if isinstance(u.update, LeastSquares)
    ]
    none = np.empty(0, dtype=np.int64)
    return Decided(
        tuple(b.chains for b in blocks),
        tuple(matrices.on([None] * len(matrices.sites)) for matrices in chains),
        tuple(members),
        Regression.of(sites, np.concatenate([none, *free]), size),
        Spreads.of(sites, updates, begins, shapes, limits),
    )
