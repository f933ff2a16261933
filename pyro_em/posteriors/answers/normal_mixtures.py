"""Mixtures of normals for each entry of a row: moments and quantiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 80  # of a bracket of quantiles, past the last bit of a double


@dataclass(frozen=True, eq=False)
class NormalsByCell:
    """Rows y that are normal given the values of discrete latents.

    Attributes:
        mean: # (cells, rows, D)
        variance: # (cells, rows, D)
        weights: The probability of each cell; None where there is one. # (cells, rows)
    """

    mean: Tensor
    variance: Tensor
    weights: Tensor | None = None

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each entry. # (rows, D) each"""
        if self.weights is None:
            return self.mean[0], self.variance[0]
        weights = self.weights.unsqueeze(-1)
        mean = (weights * self.mean).sum(0)
        return mean, (weights * (self.variance + (self.mean - mean).square())).sum(0)

    def quantile(self, p: float) -> Tensor:
        """What each entry stays below with probability p. # (rows, D)

        Example:
            >>> two = torch.tensor([[[-1.0]], [[1.0]]], dtype=torch.float64)
            >>> rows = NormalsByCell(two, torch.ones_like(two), torch.full_like(two[..., 0], 0.5))
            >>> abs(rows.quantile(0.5).item()) < 1e-9
            True
        """
        z = torch.special.ndtri(self.mean.new_tensor(p, dtype=torch.float64))
        deviation = self.variance.clamp(min=0).sqrt()
        each = self.mean + z * deviation
        if self.weights is None:
            return each[0]
        # The quantile of a mixture lies between those of its components.
        low, high = each.amin(0), each.amax(0)
        weights = self.weights.unsqueeze(-1)
        safe = deviation.clamp(min=torch.finfo(deviation.dtype).tiny)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = (weights * torch.special.ndtr((middle - self.mean) / safe)).sum(0) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2
