"""The E-step of a homogeneous hidden Markov chain by forward and backward messages.

A graph is a chain if its latents z_0, z_1, … share their plates, one group of equal tables couples
each to the next, and every other factor reads at most one of them. With γ_t = α_t β_t and

    ξ(i, j) = Σ_t α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j) / c_t ,

γ and ξ are the posterior marginals and the expected transitions (Rabiner 1989, eqs. 27 and 37).

A sequence that is weighted (``poutine.scale``) counts as often as its weight says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import checked, scattered
from pyro_em.densities.features import Cells, cells
from pyro_em.densities.layout import Layout
from pyro_em.densities.theta import At, Theta
from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.posteriors.block import Component
from pyro_em.posteriors.chains.chain_shape import ChainShape, shape_of_chain, why_no_chain
from pyro_em.posteriors.chains.chain_weights import sequence_weights
from pyro_em.posteriors.chains.sequence_block import SequenceBlock
from pyro_em.posteriors.chains.step_groups import StepGroups, mask_of
from pyro_em.posteriors.chains.symbols import Symbols
from pyro_em.posteriors.messages.forward_backward import smooth, wants_lanes
from pyro_em.posteriors.quick import Outline
from pyro_em.updates.expectations.statistics import (
    NATURAL,
    Expectation,
    Key,
    group_sums,
    known_statistics,
)


@dataclass(eq=False)
class Chain(SequenceBlock):
    """The chain that a graph is.

    Attributes:
        graph: The collapsed graph.
        couples: The group of transitions.
        transitions: Their table, where they are linear.
        of_steps: All other groups.
        T: Its length.
        K: Its number of states.
        fixed: T(x) of the transitions, where no argument changes it and they are not linear.
        often: How often each sequence counts; once where None. # (B,)
        symbols: What is seen, where it is symbols alone.
        weight: How much each transition counts: masked ones do not. # (B or 1, T - 1 or 1)
    """

    graph: FactorGraph
    couples: int
    transitions: Cells | None
    of_steps: StepGroups
    T: int
    K: int
    fixed: Statistics | None
    often: Tensor | None
    component: Component = field(init=False)
    theta: Theta = field(init=False)
    columns: Tensor = field(init=False)
    B: int = field(init=False)
    symbols: Symbols | None = field(init=False)
    weight: Tensor | None = field(init=False)

    name: ClassVar[str] = "chain"
    words: ClassVar[str] = "chain kernel, by forward and backward messages"

    @classmethod
    def glance(cls, latents: Mapping[str, Latent]) -> Finding | None:
        """See `pyro_em.posteriors.quick.QuickBlock.glance`."""
        return why_no_chain(latents)

    @classmethod
    def outline(cls, component: Component) -> Outline[Self] | Finding:
        """See `pyro_em.posteriors.quick.QuickBlock.outline`."""
        graph = component.graph
        shape = shape_of_chain(graph)
        if isinstance(shape, Finding):
            return shape
        often = sequence_weights(graph)
        if isinstance(often, Finding):
            return often
        return Outline(graph, shape.eligible(graph), partial(cls.of, graph, shape, often))

    @classmethod
    def of(
        cls, graph: FactorGraph, shape: ChainShape, often: Tensor | None, layout: Layout
    ) -> Self | Finding:
        """The kernel of a chain, still without its parameters, or why there is none.

        Args:
            graph: A collapsed graph.
            shape: Its shape.
            often: How often each sequence counts.
            layout: How its groups are evaluated.
        """
        groups, couples = graph.groups, shape.couples
        first = next(iter(graph.latents.values()))
        T, K = len(graph.latents), first.size
        B = torch.Size(graph.dim_size(p) for p in first.plates).numel()
        lanes = wants_lanes(B, K, groups[0].value.device)
        sizes = dict.fromkeys(shape.unary, K)
        of_steps = StepGroups.of(graph, shape.unary, shape.free, sizes, layout, T, lanes)
        if isinstance(of_steps, Finding):
            return of_steps
        transitions, fixed = None, None
        if couples in layout.linears:
            transitions = cells(groups[couples], *layout.linears[couples])
        else:
            fixed = known_statistics(groups[couples])
        return cls(graph, couples, transitions, of_steps, T, K, fixed, often)

    def __post_init__(self) -> None:
        self.B = self.of_steps.B
        parts = self.of_steps.columns
        parts += [] if self.transitions is None else [self.transitions.columns]
        device = self.graph.groups[0].value.device
        self.columns = torch.cat([torch.empty(0, dtype=torch.long, device=device), *parts])
        self.symbols = None if self.often is not None else Symbols.of(self.of_steps, self.T, self.K)
        self.weight = self._weight()

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a step's mass underflows or vanishes, or was lost.
        """
        eta = None if at.natural is None else at.natural.eta
        sums: dict[Key, Statistics] = {}
        if self.symbols is not None and eta is not None:
            likelihood, top = self.symbols.likelihood(eta)
            gamma, xi, log_evidence = smooth(likelihood, self._transition(at, eta), self.weight)
            entries = self.symbols.counts(gamma)
        else:
            features = self.of_steps.features(at)  # both halves of the E-step need them
            likelihood, top = self._likelihood(at, features)
            transition = self._transition(at, eta)
            gamma, xi, log_evidence = smooth(likelihood, transition, self.weight, self.often)
            entries, gain = self._sums(at, features, gamma, sums)
            top = top + gain
        if self.transitions is not None:
            entries.append(self.transitions.counts(xi.reshape(-1)))
        else:  # the mask is in the weights already
            couples, K = self.graph.groups[self.couples], self.K
            counts = xi.reshape(1, *(1,) * couples.n_plates, K, K)
            arguments = at.arguments[self.couples]
            sums[self.couples] = group_sums(couples, counts, arguments, self.fixed, masked=True)
        evidence = checked(log_evidence.to(top) + top, gamma, float(self.B * self.T))
        if entries:
            assert eta is not None
            sums[NATURAL] = {"features": scattered(eta, self.columns, entries)}
        return Expectation(evidence + self.of_steps.base, sums)

    def _likelihood(self, at: At, features: Mapping[int, object]) -> tuple[Tensor, Tensor]:
        """Likelihoods over their maxima, and the sum of the maxima's logarithms. # (B, T, K)"""
        log_l = self._log_likelihood(at, features)
        tops = log_l.amax(0)
        top = tops.sum() if self.often is None else (tops * self.often).sum()
        return log_l.sub_(tops).exp_().permute(2, 1, 0), top

    def _sums(
        self,
        at: At,
        features: Mapping[int, object],
        gamma: Tensor,
        sums: dict[Key, Statistics],
    ) -> tuple[list[Tensor], Tensor | float]:
        """Sums of the groups beside transitions; see `StepGroups.sums`."""
        mass = gamma.permute(2, 1, 0)  # (K, T, B)
        weighted = mass if self.often is None else mass * self.often
        return self.of_steps.sums(at, features, lambda _: weighted, sums)

    def _log_likelihood(self, at: At, features: Mapping[int, object]) -> Tensor:
        """Log densities that read one state, summed per step. # (K, T, B)"""
        out: Tensor | None = None
        for g, table in self.of_steps.tables(at, features):
            out = self.of_steps.add(out, g, table, self.T)
        assert out is not None
        return out

    def _transition(self, at: At, eta: Tensor | None) -> Tensor:
        """Transition probabilities. # (K, K)"""
        if self.transitions is not None and eta is not None:
            return self.transitions.table(eta).exp_().reshape(self.K, self.K)
        couples = self.graph.groups[self.couples]
        assert couples.family is not None
        log_a = couples.family.log_prob(couples.value, at.arguments[self.couples])
        return log_a.reshape(self.K, self.K).to(torch.float64).exp()

    def _weight(self) -> Tensor | None:
        couples, often = self.graph.groups[self.couples], self.often
        weight = None if often is None else often.unsqueeze(1)
        if couples.mask is None:
            return weight
        mask = mask_of(couples).T.to(torch.float64)
        return mask if weight is None else mask * weight
