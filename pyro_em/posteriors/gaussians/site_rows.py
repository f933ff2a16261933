"""The numbers of one site of a linear-Gaussian component, in the form in which blocks are solved.

A row y of a site has the mean b + C u and the covariance L Lᵀ. Whitened, L⁻¹ (y − b − C u), rows of all
sites are alike. What is missing has weight zero, a spread of one and a value of zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout

LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class SiteNumbers:
    """The numbers of one site. The first dimension is that of the discrete cells conditioned on.

    Attributes:
        value: The data; None for latents. # (rows, D)
        offset: The part of the mean that reads no latent. # (cells|1, rows|1, D)
        spread: Standard deviations, # (cells|1, rows|1, D); or with `is_matrix` a lower Cholesky factor
            of the covariance. # (cells|1, rows|1, D, D)
        coefficients: Of each term. # (cells|1, rows|1, D, q) each
        is_matrix: Whether the spread is a Cholesky factor.
        weight: How much each entry counts: its log density is multiplied by it. At 0 it is missing, and
            the value may be NaN. Of observed sites only; with `is_matrix` of whole rows, D = 1, unless
            `is_apart`. # (rows|1, D|1)
        is_apart: Whether entries of weight zero are independent of the others given the mean.
    """

    value: Tensor | None
    offset: Tensor
    spread: Tensor
    coefficients: tuple[Tensor, ...] = ()
    is_matrix: bool = False
    weight: Tensor | None = None
    is_apart: bool = False


@dataclass(frozen=True, eq=False)
class SiteRows:
    """One site, in float64.

    Attributes:
        coefficients: C, the terms beside each other, zero where a row reads nothing. # (·, ·, D, Q)
        spread: Standard deviations or Cholesky factors, one where the entry is missing.
        is_matrix: Which of the two.
        value: The data, zero where missing; None for latents. # (rows, D)
        offset: # (·, ·, D)
        weight: None if every entry counts once. # (rows|1, D|1)
        degenerate: Whether an entry that counts has no spread.
    """

    coefficients: Tensor
    spread: Tensor
    is_matrix: bool
    value: Tensor | None
    offset: Tensor
    weight: Tensor | None
    degenerate: bool

    @cached_property
    def whitened(self) -> Tensor:
        """L⁻¹ C. # (·, ·, D, Q)"""
        if not self.is_matrix:
            return self.coefficients / self.spread.unsqueeze(-1)
        if self.spread.shape[1] > 1:
            return torch.linalg.solve_triangular(self.spread, self.coefficients, upper=False)
        # One factor for all rows: their columns side by side, so that it is not copied for each.
        k, rows, D, Q = self.coefficients.shape
        beside = self.coefficients.transpose(1, 2).reshape(k, D, rows * Q)
        solved = torch.linalg.solve_triangular(self.spread[:, 0], beside, upper=False)
        return solved.reshape(solved.shape[0], D, rows, Q).transpose(1, 2)

    @property
    def deviations(self) -> Tensor:
        """Standard deviations, or the diagonal of the Cholesky factor. # (·, ·, D)"""
        return self.spread.diagonal(dim1=-2, dim2=-1) if self.is_matrix else self.spread

    def whiten(self, r: Tensor) -> Tensor:
        """L⁻¹ r. # (cells, rows, D)"""
        if not self.is_matrix:
            return r / self.spread
        if self.spread.shape[1] == 1:
            return torch.linalg.solve_triangular(self.spread[:, 0], r.mT, upper=False).mT
        columns = r.unsqueeze(-1)
        return torch.linalg.solve_triangular(self.spread, columns, upper=False).squeeze(-1)

    def weigh(self, x: Tensor) -> Tensor:
        """w x. # (cells, rows, D)"""
        return x if self.weight is None else x * self.weight

    def log_density(self, r: Tensor) -> Tensor:
        """log N(r | 0, L Lᵀ) of each row, weighted. # (cells, rows)"""
        terms = -0.5 * (self.whiten(r).square() + LOG_TWO_PI) - self.deviations.log()
        return self.weigh(terms).sum(-1)


def are_equal(a: SiteRows, b: SiteRows) -> bool:
    """Whether all numbers of two sites are the same."""
    pairs = (
        (a.coefficients, b.coefficients),
        (a.spread, b.spread),
        (a.value, b.value),
        (a.offset, b.offset),
        (a.weight, b.weight),
    )
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def rows_of_site(layout: BlockLayout, s: int, numbers: SiteNumbers) -> SiteRows:
    """The numbers of a site, laid out as its rows.

    Args:
        layout: The blocks.
        s: The number of the site.
        numbers: What is given.

    Raises:
        ValueError: If they do not fit the form of the site.
    """
    form, reading = layout.sites[s], layout.reads[s]
    if (numbers.value is None) != form.is_latent:
        raise ValueError(f"{form.name!r} must have a value if and only if it is observed.")
    if len(numbers.coefficients) != len(form.terms):
        raise ValueError(
            f"{form.name!r} has {len(form.terms)} terms, but {len(numbers.coefficients)} coefficients."
        )
    if form.is_latent and numbers.weight is not None:
        raise ValueError(f"{form.name!r} is a latent: only observed sites can be weighted.")
    offset, spread = numbers.offset.double(), numbers.spread.double()
    coefficients = beside([c.double() for c in numbers.coefficients], offset, form.width)
    if reading.present is not None:
        there = reading.present.unsqueeze(-2)
        coefficients = torch.where(there, coefficients, torch.zeros_like(coefficients))
    value, weight = numbers.value, numbers.weight
    if value is None:
        return SiteRows(coefficients, spread, numbers.is_matrix, None, offset, None, False)

    value = value.double()
    if weight is not None:
        weight = weight.double()
        if numbers.is_matrix and weight.shape[-1] != 1 and not numbers.is_apart:
            raise ValueError(f"{form.name!r} has a full covariance: weights must be of whole rows.")
        missing = weight == 0
        value = torch.where(missing, torch.zeros_like(value), value)
        if spread.shape[1] == 1:  # one spread for all rows counts if any of them does
            missing = missing.all(0, keepdim=True)
        if numbers.is_matrix:
            eye = torch.eye(form.width, dtype=spread.dtype, device=spread.device)
            whole = missing.all(-1, keepdim=True) if numbers.is_apart else missing
            spread = torch.where(whole.unsqueeze(-1), eye, spread)
        else:
            spread = torch.where(missing, torch.ones_like(spread), spread)
    diagonal = spread.diagonal(dim1=-2, dim2=-1) if numbers.is_matrix else spread
    degenerate = bool((diagonal == 0).any())
    return SiteRows(coefficients, spread, numbers.is_matrix, value, offset, weight, degenerate)


def beside(coefficients: list[Tensor], like: Tensor, width: int) -> Tensor:
    """The coefficients of all terms in one matrix. # (·, ·, D, Q)"""
    if not coefficients:
        return like.new_zeros(1, 1, width, 0)
    if len(coefficients) == 1:
        return coefficients[0]
    lead = torch.broadcast_shapes(*(c.shape[:2] for c in coefficients))
    return torch.cat([c.expand(*lead, *c.shape[2:]) for c in coefficients], -1)


def applied(C: Tensor, u: Tensor, rows: int | None = None) -> Tensor:
    """C u of each row. # (·, rows, D)"""
    if C.shape[-1] == 0:
        return u.new_zeros(1, u.shape[1] if rows is None else rows, C.shape[-2])
    if C.shape[1] == 1:
        return u @ C[:, 0].mT
    if min(C.shape[-2:]) == 1:
        return (C * u.unsqueeze(-2)).sum(-1)
    return (C @ u.unsqueeze(-1)).squeeze(-1)
