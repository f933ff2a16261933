"""Draws of whole paths of a first-order chain, from its smoothed pairs.

Under the posterior a chain is a chain again:

    p(z_1, …, z_T | x) = γ_1(z_1) Π_t ξ_t(z_t, z_{t+1}) / γ_t(z_t),

so that a path is drawn forwards, each value by inverting the cumulative row of the one before. Many
draws meet all rows, which are then made together; few draws make those that they meet.

Source: Chib (1996), "Calculating posterior distributions and modal estimates in Markov mixture
models", whose draws go backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.messages.steps import smoothed_pairs
from pyro_em.posteriors.sampling import Codes, cumulative_rows


@dataclass(frozen=True, eq=False)
class Paths:
    """What the paths of a chain are drawn from.

    Attributes:
        names: The latents, in order of time.
        sizes: Of their plates.
        first: γ_1. # (B, K)
        pairs: ξ. # (T - 1, B, K, K)
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    first: Tensor
    pairs: Tensor

    @property
    def width(self) -> int:
        """Numbers that one draw holds at a time."""
        return max(self.first.numel(), len(self.names) * len(self.first))

    @cached_property
    def _moves(self) -> Tensor:
        """Cumulative shares of each next value given the one before. # (T - 1, B, K, K)"""
        return _shares(self.pairs)

    def draw(self, n: int, generator: torch.Generator | None) -> Codes:
        """Joint draws, as positions in the latents' supports: per latent # (n, *plates)."""
        B = len(self.first)
        level = torch.rand(
            (len(self.names), n, B, 1),
            dtype=torch.float64,
            device=self.first.device,
            generator=generator,
        )
        out = torch.empty(level.shape[:-1], dtype=torch.long, device=level.device)
        row = torch.arange(B, device=level.device)
        # torch's double precision numbers are below one, where every row ends.
        torch.sum(_shares(self.first) <= level[0], -1, out=out[0])
        are_many = n >= self.pairs.shape[-1]
        for t, rows in enumerate((self._moves if are_many else self.pairs).unbind(0)):
            met = rows[row, out[t]]
            torch.sum((met if are_many else _shares(met)) <= level[t + 1], -1, out=out[t + 1])
        return dict(zip(self.names, out.reshape(-1, n, *self.sizes).unbind(0), strict=True))


@torch.no_grad()
def paths_of(graph: FactorGraph, tables: Sequence[Tensor]) -> Paths | None:
    """What the paths of a graph that is a first-order chain are drawn from; None where it is none.

    Args:
        graph: The factors.
        tables: Log densities per group. # (members, *sizes)

    Returns:
        None also where messages lose what may matter.
    """
    found = smoothed_pairs(graph, tables)
    if found is None:
        return None
    sizes, gamma, xi = found
    return Paths(tuple(graph.latents), sizes, gamma[0], xi)


def _shares(weights: Tensor) -> Tensor:
    """Cumulative shares of rows of weights, which end at one; NaN in rows that are never met."""
    rows = cumulative_rows(weights)
    return rows.div_(rows[..., -1:].clone())
