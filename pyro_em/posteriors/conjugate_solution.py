"""The posterior of a conjugate latent: of its prior's form, by its hyperparameters χ."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, eq=False)
class ConjugateSolution:
    """The posterior of a conjugate latent at parameters, for each state of the discrete latents.

    Attributes:
        kernel: The form of prior and posterior.
        prior: χ of the prior. # (elements or 1, cells or 1, P)
        distinct: χ of the posterior, of elements that are alike once. # (distinct, cells or 1, P)
        constants: Σ log base of each site, over the table. # (1, *sizes or 1s, *states or 1s) each
        place: Which of the distinct ones each element has; None where all are distinct. # (elements,)
        few: Of Gammas of which many have one shape which these are; None where that is not known.
        values: t(λ) where the latent has values, in place of a distribution. # (elements, 1, P)
    """

    kernel: PriorKernel
    prior: Tensor
    distinct: Tensor
    constants: tuple[Tensor, ...]
    place: Tensor | None = None
    values: Tensor | None = None
    few: Few | None = None

    def of_elements(self, distinct: Tensor) -> Tensor:
        """What was computed for distinct elements, for all. # (elements, ...)"""
        return distinct if self.place is None else distinct[self.place]

    @cached_property
    def chi(self) -> Tensor:
        """χ of the posterior. # (elements, cells or 1, P)"""
        return self.of_elements(self.distinct)

    @cached_property
    def log_evidence(self) -> Tensor:
        """A(χ') − A(χ) in nats. # (elements, cells or 1)"""
        if self.few is None:
            after = self.kernel.normaliser(self.distinct)
        else:
            after = gamma_normaliser(self.distinct, self.few)
        return self.of_elements(after - self.kernel.normaliser(self.prior))

    @cached_property
    def t(self) -> Tensor:
        """E[t] under the posterior. # (elements, cells or 1, P)"""
        if self.values is not None:
            return self.values
        if self.few is not None:
            return gamma_expected(self.distinct, self.few)
        return self.of_elements(self.kernel.expected(self.distinct))

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
