"""The posterior of a conjugate latent: of its prior's form, by its hyperparameters χ.

What is asked of many elements is computed some rows at a time, which stay in the cache; between two
steps the sums Σ Δχ are kept, and none of what parameters change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import (
    Few,
    PriorKernel,
    gamma_expected,
    gamma_normaliser,
)
from pyro_em.updates.expectations.conjugate_beliefs import MANY_ROWS, slices_of


@dataclass(frozen=True, eq=False)
class ConjugateSolution:
    """The posterior of a conjugate latent at parameters, for each state of the discrete latents.

    Attributes:
        kernel: The form of prior and posterior.
        prior: χ of the prior. # (elements or 1, cells or 1, P)
        added: Σ Δχ, of elements that are alike once. # (distinct, cells or 1, P)
        constants: Σ log base of each site, over the table. # (1, *sizes or 1s, *states or 1s) each
        place: Which of the distinct ones each element has; None where all are distinct. # (elements,)
        few: Of Gammas of which many have one shape which these are; None where that is not known.
        given: χ that stands in the place of the posterior's. # (elements, cells or 1, P)
        values: t(λ) where the latent has values, in place of a distribution. # (elements, 1, P)
    """

    kernel: PriorKernel
    prior: Tensor
    added: Tensor
    constants: tuple[Tensor, ...]
    place: Tensor | None = None
    few: Few | None = None
    given: Tensor | None = None
    values: Tensor | None = None

    @property
    def count(self) -> int:
        """How many elements the latent has."""
        if self.place is not None:
            return len(self.place)
        return max(len(self.prior), len(self.added)) if self.given is None else len(self.given)

    def _distinct(self, rows: slice) -> Tensor:
        """χ of the posterior, of elements that are alike once. # (rows, cells or 1, P)"""
        if self.given is not None:
            return self.given[rows]
        prior = self.prior if len(self.prior) == 1 else self.prior[rows]
        return prior + (self.added if len(self.added) == 1 else self.added[rows])

    @property
    def chi(self) -> Tensor:
        """χ of the posterior. # (elements, cells or 1, P)"""
        distinct = self._distinct(slice(None))
        return distinct if self.place is None else distinct[self.place]

    @property
    def log_evidence(self) -> Tensor:
        """A(χ') − A(χ) in nats. # (elements, cells or 1)"""
        before, normaliser = self.kernel.normaliser(self.prior), self.kernel.normaliser
        if self.place is not None:
            return (normaliser(self._distinct(slice(None))) - before)[self.place]
        few = self.few
        lgamma = None if few is None else self._shapes(few).lgamma()

        def of_rows(rows: slice) -> Tensor:
            chi = self._distinct(rows)
            if few is None or lgamma is None:
                after = normaliser(chi)
            else:
                after = gamma_normaliser(chi, lgamma[few.place[rows]])
            return after - (before if len(before) == 1 else before[rows])

        return self._of_all(of_rows)

    @cached_property
    def t(self) -> Tensor:
        """E[t] under the posterior. # (elements, cells or 1, P)"""
        if self.values is not None:
            return self.values
        if self.place is not None:
            return self.expected()(slice(None))[self.place]
        return self._of_all(self.expected())

    def expected(self) -> Callable[[slice], Tensor]:
        """What gives E[t] of some elements, those that are alike once. # (rows, cells or 1, P)"""
        few = self.few
        if few is not None:
            digamma = self._shapes(few).digamma()
            return lambda rows: gamma_expected(self._distinct(rows), digamma[few.place[rows]])
        return lambda rows: self.kernel.expected(self._distinct(rows))

    def _shapes(self, few: Few) -> Tensor:
        """Those that Gammas under one prior have, each once. # (few, 1)"""
        return self.prior[..., 0] + self.added[few.first][..., 0]

    def _of_all(self, of_rows: Callable[[slice], Tensor]) -> Tensor:
        """What is computed for some rows, for all; at once where somebody wants gradients."""
        count = self.count
        first = of_rows(slice(0, MANY_ROWS))
        if count <= MANY_ROWS:
            return first
        if first.requires_grad:
            return of_rows(slice(None))
        out = first.new_empty((count, *first.shape[1:]))
        out[:MANY_ROWS] = first
        for rows in slices_of(count)[1:]:
            out[rows] = of_rows(rows)
        return out

    def entropy(self) -> Tensor:
        """In nats, −inf of values. # (elements, cells or 1)"""
        chi, t = self.chi, self.t
        if self.values is not None:
            return torch.full_like(t[..., 0], -math.inf)
        return self.kernel.normaliser(chi) - (chi * t).sum(-1) - self.kernel.base(t)

    def is_of(self, other: object) -> bool:
        """Whether it is the posterior that another one is."""
        if self is other or not isinstance(other, ConjugateSolution) or self.values is not None:
            return self is other
        return self.chi.shape == other.chi.shape and bool((self.chi == other.chi).all())
