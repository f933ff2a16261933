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
from pyro_em.densities.features import Cells, Lookup, cells
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
    symbols: Lookup | None = field(init=False)

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
        parts = self.of_steps.columns
        parts += [] if self.transitions is None else [self.transitions.columns]
        device = self.graph.groups[0].value.device
        self.columns = torch.cat([torch.empty(0, dtype=torch.long, device=device), *parts])
        self.symbols = self._only_symbols()

    def _only_symbols(self) -> Lookup | None:
        """The symbols of a chain that has nothing else but an initial distribution."""
        own = self.of_steps
        whole = [g for g, steps in own.steps.items() if steps is None]
        if len(whole) != 1 or whole[0] not in own.lookups or self.often is not None:
            return None
        rest = [g for g in own.steps if g != whole[0]]
        plain = all(
            g in own.cells and own.first[g] and self.graph.groups[g].mask is None for g in rest
        )
        return own.lookups[whole[0]] if plain else None

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a step's mass underflows or vanishes, or was lost.
        """
        couples, K, often = self.graph.groups[self.couples], self.K, self.often
        features = self.of_steps.features(at)  # both halves of the E-step need them
        if self.symbols is None:
            log_l = self._log_likelihood(at, features)
            tops = log_l.amax(0)
            likelihood = log_l.sub_(tops).exp_().permute(2, 1, 0)
            top = tops.sum() if often is None else (tops * often).sum()
        else:
            likelihood, top = self._likelihood_of_symbols(at, self.symbols)
        gamma, xi, log_evidence = smooth(
            likelihood, self._transition(at), self._weight(), self.often
        )
        mass = gamma.permute(2, 1, 0)  # (K, T, B)
        weighted = mass if often is None else mass * often
        sums: dict[Key, Statistics] = {}
        entries, gain = self.of_steps.sums(at, features, lambda _: weighted, sums)
        if self.transitions is not None:
            entries.append(self.transitions.counts(xi.reshape(-1)))
        else:  # the mask is in the weights already
            counts = xi.reshape(1, *(1,) * couples.n_plates, K, K)
            arguments = at.arguments[self.couples]
            sums[self.couples] = group_sums(couples, counts, arguments, self.fixed, masked=True)
        log_evidence = log_evidence.to(top) + top + gain
        evidence = checked(log_evidence, gamma, float(self.B * self.T)) + self.of_steps.base
        if entries:
            sums[NATURAL] = {"features": scattered(at.eta, self.columns, entries)}
        return Expectation(evidence, sums)

    def _log_likelihood(self, at: At, features: Mapping[int, object]) -> Tensor:
        """Log densities that read one state, summed per step. # (K, T, B)"""
        out: Tensor | None = None
        for g, table in self.of_steps.tables(at, features):
            out = self.of_steps.add(out, g, table, self.T)
        assert out is not None
        return out

    def _likelihood_of_symbols(self, at: At, symbols: Lookup) -> tuple[Tensor, Tensor]:
        """Likelihoods over their maxima, and the sum of the maxima's logarithms. # (B, T, K)"""
        table = symbols.table(at.eta)
        tops = table.amax(1, keepdim=True)
        likelihood = symbols.rows((table - tops).exp_())
        top = torch.dot(symbols.often, tops.squeeze(1))
        if self.of_steps.cells:  # the initial distribution
            first = symbols.index[: self.B]
            row = table.index_select(0, first)
            for cell in self.of_steps.cells.values():
                row = row + cell.table(at.eta)
            own = row.amax(1, keepdim=True)
            likelihood[: self.B] = (row - own).exp_()
            top = top + (own - tops.index_select(0, first)).sum()
        return likelihood.reshape(self.T, self.B, self.K).permute(1, 0, 2), top

    def _transition(self, at: At) -> Tensor:
        """Transition probabilities. # (K, K)"""
        if self.transitions is not None:
            return self.transitions.table(at.eta).exp_().reshape(self.K, self.K)
        couples = self.graph.groups[self.couples]
        assert couples.family is not None
        log_a = couples.family.log_prob(couples.value, at.arguments[self.couples])
        return log_a.reshape(self.K, self.K).to(torch.float64).exp()

    def _weight(self) -> Tensor | None:
        """How much each transition counts: masked ones do not. # (B or 1, T - 1 or 1)"""
        couples, often = self.graph.groups[self.couples], self.often
        weight = None if often is None else often.unsqueeze(1)
        if couples.mask is None:
            return weight
        mask = mask_of(couples).T.to(torch.float64)
        return mask if weight is None else mask * weight
