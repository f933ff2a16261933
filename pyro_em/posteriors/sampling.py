"""Exact posterior draws, all at once: the contraction backwards.

Eliminating the latents in an order z_1, …, z_L leaves before each elimination a table over z_i and
the latents that are still there, so that

    p(z | x) = Π_i p(z_i | z_{i+1}, …, z_L, x),   each factor a row of the table, normalised.

Draws go through the tables from the last to the first; a row is looked up for every draw and every
element of the plates, and the value found by inverting its cumulative distribution. This is the
forward-filtering backward-sampling of hidden Markov models, for any plated graph.

Source: Koller and Friedman (2009), "Probabilistic Graphical Models", section 9.3; Chib (1996) for
chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.contraction import log_sum_exp
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import Tables, forward

AT_ONCE = 2**22  # elements of one latent that are drawn together

Codes = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Conditional:
    """p(latent | latents eliminated after it), as cumulative rows.

    Attributes:
        latent: The latent that is drawn.
        plates: The latent's plates.
        given: The latents that are drawn before it.
        cumulative: Cumulative weights, one row per cell of plates and given. # (cells, K)
    """

    latent: str
    plates: tuple[str, ...]
    given: tuple[str, ...]
    cumulative: Tensor


@torch.no_grad()
def conditionals(
    graph: FactorGraph, plan: ContractionPlan, log_densities: Tables
) -> list[Conditional]:
    """The conditionals of all latents, in the order in which they are drawn.

    Args:
        graph: The factors.
        plan: From `contraction_of`.
        log_densities: Per group. # (members, *sizes)
    """
    found: list[Conditional] = []
    names = iter(plan.eliminations)

    def remember(table: Tensor) -> Tensor:
        dims = next(names)
        top = table.amax(-1, keepdim=True)
        weights = (table - torch.where(torch.isfinite(top), top, 0.0)).exp()
        rows = cumulative_rows(weights.reshape(-1, weights.shape[-1]))
        plates = tuple(d for d in dims[:-1] if d in plan.plates)
        given = tuple(d for d in dims[:-1] if d not in plan.plates)
        found.append(Conditional(dims[-1], plates, given, rows))
        return log_sum_exp(table)

    forward(graph, plan, log_densities, remember)
    return found[::-1]


def cumulative_rows(weights: Tensor) -> Tensor:
    """Cumulative sums of rows of weights, equal across elements of weight zero.

    Args:
        weights: Non-negative. # (..., K)

    Example:
        >>> cumulative_rows(torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]))
        tensor([[0., 1., 1., 4., 4.]])
    """
    # Summed in parallel, as on a GPU, rounding can move the sum across a zero.
    return torch.where(weights > 0, weights.cumsum(-1), 0.0).cummax(-1).values


def levels_of(
    shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Uniform numbers, each below one: torch's of double precision are.

    Args:
        shape: Of them.
        device: Where they are.
        generator: Source of randomness; torch's global state if None.
    """
    return torch.rand(tuple(shape), dtype=torch.float64, device=device, generator=generator)


def pick(cumulative: Tensor, rows: Tensor, levels: Tensor) -> Tensor:
    """Draw an element of a row of weights, for each of many rows; never one of weight zero.

    Args:
        cumulative: From `cumulative_rows`. # (R, K)
        rows: Which row each draw is from.
        levels: A uniform number for each, below one: its product with a row's sum is below the sum.

    Returns:
        Positions in the rows, in the shape of ``rows``.
    """
    flat, width = cumulative.reshape(-1), cumulative.shape[-1]
    base = rows * width
    level = levels * flat[base + (width - 1)].to(torch.float64)
    # The first position whose cumulative weight exceeds the level, by bisection.
    low = torch.zeros_like(rows)
    high = torch.full_like(rows, width - 1)
    for _ in range(max(0, math.ceil(math.log2(width)))):
        middle = (low + high) // 2
        beyond = flat[base + middle] > level
        high = torch.where(beyond, middle, high)
        low = torch.where(beyond, low, torch.minimum(middle + 1, high))
    return low


class Draws(Protocol):
    """What joint draws of all latents are made of."""

    @property
    def width(self) -> int:
        """Numbers that one draw holds at a time."""
        ...

    def draw(self, n: int, generator: torch.Generator | None) -> Codes:
        """Positions in the latents' supports: per latent # (n, *plates)."""
        ...


@dataclass(frozen=True, eq=False)
class Conditionals:
    """Draws by the conditional of each latent.

    Attributes:
        graph: The factors.
        found: In the order in which the latents are drawn.
    """

    graph: FactorGraph
    found: Sequence[Conditional]

    @property
    def width(self) -> int:
        """Cells of the largest latent."""
        sizes = (math.prod(self.graph.dim_size(p) for p in c.plates) for c in self.found)
        return max(sizes, default=1)

    def draw(self, n: int, generator: torch.Generator | None) -> Codes:
        """Joint draws, one latent after the other."""

        def levels(c: Conditional) -> Tensor:
            shape = (n, *(self.graph.dim_size(p) for p in c.plates))
            return levels_of(shape, c.cumulative.device, generator)

        return self.at(levels, n)

    def at(self, levels: Callable[[Conditional], Tensor], n: int) -> Codes:
        """The draws at uniform numbers.

        Args:
            levels: Those of a latent, asked for in the order in which latents are drawn. # (n, *plates)
            n: Number of draws.
        """
        codes: dict[str, Tensor] = {}
        for c in self.found:
            rows = _cells(self.graph, c.plates, c.given, codes, n)
            codes[c.latent] = pick(c.cumulative, rows, levels(c))
        return codes


def draw_codes(
    draws: Draws, n: int, generator: torch.Generator | None
) -> Iterator[tuple[int, Codes]]:
    """Joint draws in portions of bounded size, as positions in the latents' supports.

    Args:
        draws: What they are made of.
        n: Number of draws.
        generator: Source of randomness.

    Yields:
        The number of draws in the portion, and per latent their positions. # (portion, *plates)
    """
    portion = max(1, AT_ONCE // max(1, draws.width))
    for start in range(0, n, portion):
        size = min(portion, n - start)
        yield size, draws.draw(size, generator)


def _cells(
    graph: FactorGraph, plates: Sequence[str], latents: Sequence[str], codes: Codes, n: int
) -> Tensor:
    """Flat places in a table over plates and latents, one per draw and cell of the plates."""
    sizes = [graph.dim_size(p) for p in plates]
    device = graph.groups[0].value.device
    places = torch.arange(math.prod(sizes), device=device).reshape(1, *sizes)
    for name in latents:
        latent = graph.latents[name]
        shape = [s if p in latent.plates else 1 for p, s in zip(plates, sizes, strict=True)]
        places = places * latent.size + codes[name].reshape(n, *shape)
    return places.expand(n, *sizes)


def draw_cells(
    graph: FactorGraph,
    plan: ContractionPlan,
    log_densities: Tables,
    n: int,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """How often n joint draws met each factor's cells.

    Args:
        graph: The factors.
        plan: From `contraction_of`.
        log_densities: Per group. # (members, *sizes)
        n: Number of draws.
        generator: Source of randomness.

    Returns:
        Per group relative frequencies, times the factor's scale. # (members, *sizes)
    """
    draws = Conditionals(graph, conditionals(graph, plan, log_densities))
    totals = [torch.zeros_like(t, dtype=torch.float64) for t in log_densities]
    for size, codes in draw_codes(draws, n, generator):
        for group, total in zip(graph.groups, totals, strict=True):
            for dims, cells in zip(group.dims, total, strict=True):
                plates, latents = dims[: group.n_plates], dims[group.n_plates :]
                if not latents:
                    cells += size
                    continue
                met = _cells(graph, plates, latents, codes, size).reshape(-1)
                cells += torch.bincount(met, minlength=cells.numel()).reshape(cells.shape)
    return [
        torch.stack([cells * (s / n) for cells, s in zip(total, group.scale, strict=True)])
        for group, total in zip(graph.groups, totals, strict=True)
    ]


def codes_of(graph: FactorGraph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The places of values in the supports of the latents.

    Args:
        graph: The factors.
        values: By the names in the graph. # (*leading, *batch, *event)

    Returns:
        # (*leading, *plates)
    """
    out = {}
    for name, z in graph.latents.items():
        event = z.support.dim() - 1
        value = values[name].unsqueeze(values[name].dim() - event)
        same = value == z.support
        same = same.flatten(same.dim() - event).all(-1) if event else same
        sizes = [graph.dim_size(p) for p in z.plates]
        lead = same.shape[: same.dim() - 1 - len(z.batch_dims)]
        out[name] = same.long().argmax(-1).reshape((*lead, *sizes))
    return out
