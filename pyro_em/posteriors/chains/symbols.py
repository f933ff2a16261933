"""Chains of which nothing but symbols is seen: likelihoods from a table of symbols, and their counts.

With s_t the symbol of step t, ℓ_t(k) = exp(η[s_t, k]) is one of few rows, and the symbols' expected
counts are N(s, k) = Σ_{t: s_t = s} γ_t(k): a row is taken, or added to, for each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pyro_em.densities.features import Cells, Lookup
from pyro_em.posteriors.chains.step_groups import StepGroups


@dataclass(frozen=True, eq=False)
class Symbols:
    """The symbols of all steps and the initial distribution; `Symbols.of` makes one.

    Attributes:
        lookup: Which symbol each step of each sequence has.
        initial: Tables of the first state.
        first: The symbols of the first steps. # (B,)
        T: Steps.
        B: Sequences.
        K: States.
    """

    lookup: Lookup
    initial: tuple[Cells, ...]
    first: Tensor
    T: int
    B: int
    K: int

    @classmethod
    def of(cls, groups: StepGroups, T: int, K: int) -> Self | None:
        """The symbols of a chain; None where something else is seen, or masked.

        Args:
            groups: The groups of the chain beside its transitions.
            T: Steps.
            K: States.
        """
        whole = [g for g, steps in groups.steps.items() if steps is None]
        if len(whole) != 1 or whole[0] not in groups.lookups or groups.known or groups.free:
            return None
        for g in groups.steps:
            starts = g in groups.cells and groups.first[g] and groups.graph.groups[g].mask is None
            if g != whole[0] and not starts:
                return None
        lookup = groups.lookups[whole[0]]
        first = lookup.index[: groups.B]
        return cls(lookup, tuple(groups.cells.values()), first, T, groups.B, K)

    def likelihood(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Likelihoods over their maxima, and the sum of the maxima's logarithms. # (B, T, K)"""
        lookup = self.lookup
        table = lookup.table(eta)
        tops = table.amax(1, keepdim=True)
        likelihood = (table - tops).exp_().index_select(0, lookup.index)
        top = torch.dot(lookup.often, tops.squeeze(1))
        if self.initial:
            row = table.index_select(0, self.first)
            for cell in self.initial:
                row = row + cell.table(eta)
            own = row.amax(1, keepdim=True)
            likelihood[: self.B] = (row - own).exp_()
            top = top + (own - tops.index_select(0, self.first)).sum()
        return likelihood.reshape(self.T, self.B, self.K).permute(1, 0, 2), top

    def counts(self, gamma: Tensor) -> list[Tensor]:
        """Expected counts from posterior marginals, as `StepGroups.columns` has their elements of η.

        Args:
            gamma: # (B, T, K)
        """
        starts = gamma[:, 0].sum(0)
        rows = gamma.permute(1, 0, 2).reshape(-1, self.K)
        return [*(cell.counts(starts) for cell in self.initial), self.lookup.counts(rows)]
