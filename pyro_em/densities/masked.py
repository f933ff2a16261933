"""Independent features of rows with missing entries, by one matrix product for all rows.

With s = 1 where an entry is seen, ℓ is linear in (s, s x', s x'²):

    ℓ_k = Σ_i s_i (−½ log 2π − log σ_ki − μ'_ki² / 2σ_ki²)
          + s_i x'_i μ'_ki / σ_ki² − s_i x'_i² / 2σ_ki².
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.gaussian import FEW_CELLS, Gaussian
from pyro_em.families.family import Statistics


@dataclass(frozen=True, eq=False)
class AtFeatures:
    """Components of independent features at some arguments.

    Attributes:
        mean: μ'. # (K, D)
        scale: σ. # (K, D)
        linear: Coefficients of (s, s x', s x'²); None where the square would cancel. # (K, 3 D)
        size: As of `pyro_em.densities.gaussian.Prepared`.
    """

    mean: Tensor
    scale: Tensor
    linear: Tensor | None
    size: float


@dataclass(eq=False)
class Masked(Gaussian):
    """The rows of a group of Normal sites with masked entries and component-wise arguments.

    Attributes:
        x: x', a tensor of its own: NaN where an entry is missing before, zero there afterwards.
        seen: Which entries are seen. # (D, N)
    """

    seen: Tensor = field(init=False)

    def __post_init__(self) -> None:
        missing = torch.isnan(self.x)
        self.x.masked_fill_(missing, 0.0)
        self.seen = missing.logical_not_()
        low, high = torch.aminmax(self.x, dim=1)
        known = self.given_reach2
        self.reach2 = torch.maximum(high, -low).square() if known is None else known
        if self.width * self.x.shape[1] <= FEW_CELLS:
            self.stored = self._features_of(slice(None))

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return 3 * self.x.shape[0]

    def prepare(self, arguments: Mapping[str, Tensor]) -> Any:
        """Coefficients at some arguments."""
        D = self.x.shape[0]
        mean = self._each(self._shift(arguments["loc"]))
        scale = arguments["scale"].to(torch.float64)
        scale = self._each(scale.reshape(-1, scale.shape[-1]).expand(-1, D))
        precision = scale**-2
        size = D**0.5 * float((precision * self.reach2).max())
        if not size <= self.limit:
            return AtFeatures(mean, scale, None, 0.0)
        constant = -0.5 * (mean * mean * precision + math.log(2 * math.pi)) - scale.log()
        linear = torch.cat([constant, mean * precision, -0.5 * precision], 1)
        return AtFeatures(mean, scale, linear, size)

    def features(self, rows: slice, p: Any = None) -> Any:
        """(s, s x', s x'²). # (3 D, rows)"""
        return self._features_of(rows) if self.stored is None else self.stored[:, rows]

    def _features_of(self, rows: slice) -> Tensor:
        x = self.x[:, rows]
        return torch.cat([self.seen[:, rows].to(x.dtype), x, x * x])

    def log_density(self, p: Any, features: Tensor, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, from their features, added to what is there. # (K, rows)"""
        if p.linear is not None:
            if onto is None:
                return p.linear @ features
            return torch.addmm(onto.to(torch.float64), p.linear, features)
        D = self.x.shape[0]
        seen = features[:D]
        out = -(p.scale.log() + 0.5 * math.log(2 * math.pi)) @ seen
        for k, (mean, scale) in enumerate(zip(p.mean, p.scale, strict=True)):
            z = (features[D : 2 * D] - mean.unsqueeze(-1)) / scale.unsqueeze(-1) * seen
            out[k] -= 0.5 * (z * z).sum(0)
        return out if onto is None else out + onto

    def moments(self, p: Any, weights: Tensor, features: Tensor) -> Tensor:
        """Σ r s, Σ r s d, Σ r s d² of some rows; d is x', or x' − μ'. # (K, 3 D)"""
        weights = weights.to(torch.float64)
        if p.linear is not None:
            return weights @ features.T
        D, out = self.x.shape[0], []
        for w, mean in zip(weights, p.mean, strict=True):
            weighted = features[:D] * w
            d = features[D : 2 * D] - mean.unsqueeze(-1)
            each = (weighted, weighted * d, weighted * d * d)
            out.append(torch.cat([t.sum(-1) for t in each]))
        return torch.stack(out)

    def over_rows(self, p: Any, moments: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`."""
        return moments

    def about(self, before: Any, now: Any, moments: Tensor, mass: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`; each entry counts where it was seen."""
        weight, first, second = moments.chunk(3, -1)
        step = self._point(now) - self._point(before)
        moved = second - 2 * step * first + weight * step**2
        return torch.cat([weight, first - weight * step, moved], 1)

    def _point(self, p: Any) -> Tensor:
        """What moments are taken about, of x'. # (K, D)"""
        mean: Tensor = p.mean
        return mean if p.linear is None else torch.zeros_like(mean)

    def correction(self, p: Any, moments: Tensor, mass: Tensor) -> Tensor | float:
        """Nothing: all is computed in float64."""
        return 0.0

    def statistics(
        self, p: Any, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics about its location, from moments about another point."""
        weight, first, second = moments.chunk(3, -1)
        mu = self._each(self._shift(arguments["loc"]))
        if p.linear is None:  # about the location already, up to its rounding
            mu = mu - p.mean
        deviation = first - weight * mu
        square = second - 2 * mu * first + weight * mu**2
        return self._shaped({"deviation": deviation, "square": square, "weight": weight})
