"""Gaussian components of rows with missing entries, by few and large matrix products.

Rows that have seen the same coordinates share, for each component, one factor of Σ (see
`pyro_em.incomplete`). With y = x' − μ', zero where missing, and u = L_o⁻¹ y,

    ℓ = −½ ‖u‖² − log det L_o − (D_o / 2) log 2π,
    Σ r E[d],   E[d] = y + L_mo u,      Σ r E[d dᵀ] = Σ r E[d] E[d]ᵀ + Σ_p m_p Cov_p,

where p runs over the patterns and m_p = Σ r. Patterns of about as many rows are evaluated together.
Where the square does not cancel, ℓ is linear in the features (x'_i, x'_i x'_j) of what is seen, as for
complete rows: one product gives the log densities of a pattern's rows, another their moments. What is
missing is completed in these: with A = I_o + L_mo L_o⁻¹, Σ r E[d] = A Σ r y and
Σ r E[d] E[d]ᵀ = A (Σ r y yᵀ) Aᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.gaussian import FEW_CELLS, Gaussian
from pyro_em.densities.pairs import unfolding, upper_pairs, with_products
from pyro_em.families.family import Statistics
from pyro_em.incomplete import Patterns, conditional, covariance_of, most_patterns, patterns_of

_CHUNK = 2**18  # numbers of a chunk of rows in all (`pyro_em.posteriors.mixtures.mixture`)

_FEWEST_ROWS, _MOST_ROWS = 2**13, 2**15  # of a chunk

_MATRICES = 2**16  # numbers in one kind of matrix of some patterns

_MANY_ROWS = 2**10  # of a chunk from which on all chunks are laid out together

_ROWS_OF_A_PATTERN = 32  # in a chunk, from which on its calls cost little


@dataclass(frozen=True, eq=False)
class Factors:
    """What rows of some patterns are evaluated with.

    Attributes:
        whiten: L_o⁻¹. # (u, K or 1, D, D)
        gain: L_mo. # (u, K or 1, D, D)
        left: Cov[x | x_o]. # (u, K or 1, D, D)
        constant: −log det L_o − (D_o / 2) log 2π. # (u, K or 1, 1)
    """

    whiten: Tensor
    gain: Tensor
    left: Tensor
    constant: Tensor

    def of(self, own: Tensor) -> Factors:
        """Those of some of the patterns."""
        return Factors(self.whiten[own], self.gain[own], self.left[own], self.constant[own])


@dataclass(frozen=True, eq=False)
class AtPatterns:
    """The components at some arguments.

    Attributes:
        mean: μ'. # (K, D)
        covariance: Σ. # (K or 1, D, D)
        factors: Of all patterns, where they are few.
        size: As of `pyro_em.densities.gaussian.Prepared`.
        linear: Coefficients of the features for each pattern; None where rows are whitened. # (U, K, P)
        constant: What goes with them. # (U, K, 1)
        complete: A, which gives E[d] from y. # (U, K or 1, D, D)
        left: Cov[x | x_o]. # (U, K or 1, D, D)
    """

    mean: Tensor
    covariance: Tensor
    factors: Factors | None
    size: float = 0.0
    linear: Tensor | None = None
    constant: Tensor | None = None
    complete: Tensor | None = None
    left: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of some patterns: their factors, their places, y and u.

    Attributes:
        own: The patterns. # (u,)
        factors: Theirs; None where they are made again when they are needed.
        constant: As there. # (u, K or 1, 1)
        rows: Places in the chunk, filled up by its end. # (u, rows)
        y: x' − μ', zero where missing. # (u, K, D, rows)
        white: u. # (u, K, D, rows)
    """

    own: Tensor
    factors: Factors | None
    constant: Tensor
    rows: Tensor
    y: Tensor
    white: Tensor


@dataclass(frozen=True, eq=False)
class _White:
    """u of some rows.

    Attributes:
        rows: How many they are.
        batches: Those of patterns of about as many rows together.
    """

    rows: int
    batches: list[_Batch]


@dataclass(frozen=True, eq=False)
class _Features:
    """Features of some rows, by their patterns.

    Attributes:
        rows: How many they are.
        batches: Patterns # (u,), places filled up by the end # (u, rows), features # (u, P, rows).
    """

    rows: int
    batches: list[tuple[Tensor, Tensor, Tensor]]


@dataclass(eq=False)
class Incomplete(Gaussian):
    """The rows of a group of IncompleteMultivariateNormal sites with component-wise arguments.

    Its ``x``, NaN where nothing is seen, is made its own: zero is written there.

    Attributes:
        patterns: Which entries of each row are seen.
    """

    patterns: Patterns = field(init=False)
    _kept: dict[tuple[int, int], _Features] = field(init=False)
    _layouts: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        seen = torch.isnan(self.x).logical_not_()
        found, self._layouts = patterns_of(seen.T), {}
        self.patterns = Patterns(found.seen, found.of_row.to(torch.int32))  # kept through a fit
        self.x = self.x.to(torch.float64).masked_fill_(~seen, 0.0)
        self._kept = {}
        if self.given_reach2 is None:
            low, high = self.x.aminmax(dim=1)
            self.reach2 = torch.maximum(low.square(), high.square())
        else:
            self.reach2 = self.given_reach2
        i, j = self.upper = upper_pairs(len(self.x), self.x.device)
        self.full = unfolding(len(self.x), self.x.device)
        self.halved = torch.where(i == j, -0.5, -1.0).to(torch.float64)

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        # Many rows at once where there are many patterns, of which each costs calls and coefficients;
        # fewer where their whitening is large.
        rows = min(max(_FEWEST_ROWS, _ROWS_OF_A_PATTERN * len(self.patterns.seen)), _MOST_ROWS)
        return max(_CHUNK // rows, self.K * max(0, self.x.shape[0] - 16) // 2)

    def prepare(self, arguments: Mapping[str, Tensor]) -> Any:
        """Coefficients at some arguments."""
        D = self.x.shape[0]
        covariance = covariance_of({self.spread: arguments[self.spread]}).reshape(-1, D, D)
        mean = self._each(self._shift(arguments["loc"]))
        few = len(self.patterns.seen) <= most_patterns(len(covariance), D)
        if not few:
            return AtPatterns(mean, covariance, None)
        precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        size = D**0.5 * float((precision.diagonal(dim1=-2, dim2=-1) * self.reach2).max())
        if not size <= self.limit:
            return AtPatterns(mean, covariance, self._factors(covariance, self.patterns.seen))
        return self._linear(mean, covariance, size)

    def _linear(self, mean: Tensor, covariance: Tensor, size: float) -> AtPatterns:
        """Coefficients of the features, and what completes their sums, for all patterns."""
        parts = self.patterns.seen.split(self._patterns_at_once)
        each = [self._coefficients(mean, covariance, seen) for seen in parts]
        found = each[0] if len(each) == 1 else [torch.cat(t) for t in zip(*each, strict=True)]
        return AtPatterns(mean, covariance, None, size, *found)

    @property
    def _patterns_at_once(self) -> int:
        """Of how many patterns matrices are computed together: a dozen of each are held meanwhile."""
        return max(1, _MATRICES // (self.K * self.x.shape[0] ** 2))

    def _coefficients(
        self, mean: Tensor, covariance: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last fields of `AtPatterns` for some patterns. # from (u, D)"""
        D = self.x.shape[0]
        seen = seen.unsqueeze(1)
        both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
        eye = torch.eye(D, dtype=torch.float64, device=self.x.device)
        root = torch.linalg.cholesky(torch.where(both, covariance, eye))
        precision = torch.cholesky_inverse(root) * both
        along = (precision @ mean.unsqueeze(-1)).squeeze(-1)
        squares = precision[..., self.upper[0], self.upper[1]] * self.halved
        linear = torch.cat([along, squares.expand(*along.shape[:-1], -1)], -1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        constant = log_det + 0.5 * math.log(2 * math.pi) * seen.sum(-1, keepdim=True)
        constant = -constant - 0.5 * (along * mean).sum(-1, keepdim=True)
        slopes = covariance @ precision  # of what is missing on what is seen
        complete = torch.where(seen.unsqueeze(-1), eye * both, slopes)
        rest = (~seen).unsqueeze(-1) & (~seen).unsqueeze(-2)
        left = (covariance - slopes @ covariance) * rest
        return linear, constant, complete, left

    def _factors(self, covariance: Tensor, seen: Tensor) -> Factors:
        both = seen.unsqueeze(1).expand(-1, len(covariance), -1)
        found = conditional(covariance.expand(len(seen), *covariance.shape), both)
        constant = -found.log_det - 0.5 * math.log(2 * math.pi) * seen.sum(-1, keepdim=True)
        return Factors(found.whiten, found.gain, found.covariance, constant.unsqueeze(-1))

    def features(self, rows: slice, p: Any = None) -> Any:
        """Features of some rows, or u, pattern by pattern; see `_Features` and `_White`."""
        begin, end, _ = rows.indices(self.x.shape[1])
        if p.linear is not None:
            return self._products(begin, end, len(p.covariance))
        D, u = self.x.shape[0], []
        x = torch.cat([self.x[:, begin:end], self.x.new_zeros(D, 1)], 1)
        for own, at in self._layout(begin, end, len(p.covariance)):
            if p.factors is None:
                factors = self._factors(p.covariance, self.patterns.seen[own])
            else:
                factors = p.factors.of(own)
            seen = self.patterns.seen[own].to(x.dtype)[:, None, :, None]
            y = (x[:, at].transpose(0, 1).unsqueeze(1) - p.mean.unsqueeze(-1)).mul_(seen)
            kept = None if p.factors is None else factors
            u.append(_Batch(own, kept, factors.constant, at, y, factors.whiten @ y))
        return _White(end - begin, u)

    def _products(self, begin: int, end: int, matrices: int) -> _Features:
        """x' and its products of some rows; of few data they are made once."""
        if (begin, end) in self._kept:
            return self._kept[begin, end]
        D, out = self.x.shape[0], []
        x = torch.cat([self.x[:, begin:end], self.x.new_zeros(D, 1)], 1)
        for own, at in self._layout(begin, end, matrices):
            phi = with_products(x[:, at].flatten(1))
            out.append((own, at, phi.unflatten(1, at.shape).transpose(0, 1).contiguous()))
        found = _Features(end - begin, out)
        if (D + len(self.halved)) * self.x.shape[1] <= FEW_CELLS:
            self._kept[begin, end] = found
        return found

    def _layout(self, begin: int, end: int, matrices: int) -> list[tuple[Tensor, Tensor]]:
        """The patterns of some rows, and the places of these; see `Patterns.batches`."""
        if (begin, end) not in self._layouts:
            rows, step = self.x.shape[1], max(end - begin, 1)
            # Those of all chunks together: what is small and stays, made between what is large and
            # goes, would leave holes in the heap that the large blocks of the next chunk do not fit.
            is_first = begin == 0 and step >= _MANY_ROWS
            for first in range(0, rows, step) if is_first else (begin,):
                last = min(first + step, rows)
                part = Patterns(self.patterns.seen, self.patterns.of_row[first:last])
                batches = part.batches(most_patterns(matrices, self.x.shape[0]))
                self._layouts[first, last] = [(own, at.to(torch.int32)) for own, at in batches]
        return self._layouts[begin, end]

    def log_density(self, p: Any, features: Any, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, from their features, added to what is there. # (K, rows)"""
        n = features.rows
        out = self.x.new_empty(self.K, n + 1)
        if p.linear is not None:
            for own, at, phi in features.batches:
                log_p = torch.baddbmm(p.constant[own], p.linear[own], phi)
                out[:, at] = log_p.transpose(0, 1)
        else:
            for b in features.batches:
                log_p = b.constant - 0.5 * b.white.square().sum(2)
                out[:, b.rows] = log_p.transpose(0, 1)
        out = out[:, :n]
        return out if onto is None else out + onto

    def moments(self, p: Any, weights: Tensor, features: Any) -> Tensor:
        """Sums of some rows, in float64.

        Returns:
            Σ r E[d] and Σ r E[d dᵀ] with d = x' − μ' # (K, D + D²); of features those of each pattern,
            with its Σ r # (K, U (P + 1)), of which ``over_rows`` makes the same.
        """
        weights = torch.cat([weights.to(torch.float64), self.x.new_zeros(self.K, 1)], 1)
        if p.linear is not None:
            U, _, P = p.linear.shape
            sums = self.x.new_zeros(self.K, U, P + 1)
            for own, at, phi in features.batches:
                r = weights[:, at].transpose(0, 1)  # (u, K, rows)
                part = torch.cat([r @ phi.mT, r.sum(-1, keepdim=True)], -1)
                sums[:, own] = part.transpose(0, 1)
            return sums.flatten(1)
        D = self.x.shape[0]
        first = self.x.new_zeros(self.K, D)
        second = self.x.new_zeros(self.K, D, D)
        for b in features.batches:
            r = weights[:, b.rows].transpose(0, 1).unsqueeze(2)  # (u, K, 1, rows)
            factors = b.factors or self._factors(p.covariance, self.patterns.seen[b.own])
            d = b.y + factors.gain @ b.white
            weighted = d * r
            first += weighted.sum((0, 3))
            left = r.sum(-1, keepdim=True) * factors.left
            second += (weighted @ d.mT + left).sum(0)
        return torch.cat([first, second.flatten(1)], 1)

    def over_rows(self, p: Any, moments: Tensor) -> Tensor:
        """Σ r E[d] and Σ r E[d dᵀ]; other rows have other patterns. # (K, D + D²)"""
        if p.linear is None:
            return moments
        first, second = self._completed(p, moments)
        return torch.cat([first, second.flatten(1)], 1)

    def about(self, before: Any, now: Any, moments: Tensor, mass: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`; what is missing stays as it was completed."""
        D, step = self.x.shape[0], now.mean - before.mean
        first, second = moments[:, :D], moments[:, D:].unflatten(-1, (D, D))
        cross = step.unsqueeze(-1) * first.unsqueeze(-2)
        each = mass[:, None, None] * step.unsqueeze(-1) * step.unsqueeze(-2)
        moved = second - cross - cross.mT + each
        return torch.cat([first - mass.unsqueeze(-1) * step, moved.flatten(1)], 1)

    def _completed(self, p: AtPatterns, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Σ r E[d] and Σ r E[d dᵀ] from the sums of features over the rows of each pattern."""
        assert p.linear is not None and p.complete is not None and p.left is not None
        D, P = self.x.shape[0], p.linear.shape[-1]
        all_sums = moments.unflatten(-1, (-1, P + 1)).transpose(0, 1)  # (U, K, P + 1)
        parts = (all_sums, self.patterns.seen, p.complete, p.left)
        first = self.x.new_zeros(self.K, D)
        second = self.x.new_zeros(self.K, D, D)
        for sums, seen, complete, left in zip(
            *(t.split(self._patterns_at_once) for t in parts), strict=True
        ):
            total, mass = sums[..., :D], sums[..., P:]
            mu = p.mean * seen.to(sums.dtype).unsqueeze(1)
            squares = sums[..., D:P][..., self.full].unflatten(-1, (D, D))
            cross = total.unsqueeze(-1) * mu.unsqueeze(-2)
            outer = mass.unsqueeze(-1) * mu.unsqueeze(-1) * mu.unsqueeze(-2)
            squares = squares - cross - cross.mT + outer
            first += (complete @ (total - mass * mu).unsqueeze(-1)).squeeze(-1).sum(0)
            second += (complete @ squares @ complete.mT + mass.unsqueeze(-1) * left).sum(0)
        return first, second

    def correction(self, p: Any, moments: Tensor, mass: Tensor) -> Tensor | float:
        """Nothing: all is computed in float64."""
        return 0.0

    def statistics(
        self, p: Any, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics about its location."""
        D = self.x.shape[0]
        first, square = moments[:, :D], moments[:, D:].reshape(-1, D, D)
        return self._shaped({"deviation": first, "square": square, "weight": mass})
