"""One draw from a guide: its terms, and importance weights from several.

    log (1/S) Σ_s w_s,   w_s = Π_terms exp(term),

per element of the data plate where every draw is local to it. A scale (sample weights, a batch that
stands for all data) multiplies the logarithm of the mean, not the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.sites import Role, frames_of


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a drawn bound, in nats.

    Attributes:
        site: The site, as in the pair's trace; several where latents were summed.
        role: What the site stands for; None for an exact sum over latents.
        dims: The plate of each dimension; empty where it belongs to none.
        value: Scaled and masked; log q enters with a minus sign. # (*dims,)
        scale: What ``value`` was multiplied by; None where sites with different ones were summed.
    """

    site: str
    role: Role | None
    dims: tuple[str, ...]
    value: Tensor
    scale: Tensor | float | None = 1.0


@dataclass(frozen=True, eq=False)
class Weight:
    """q(y = k): the weight of a run in which the guide's sites y are held at k.

    The runs of all k together are one draw of the bound, in which y is summed. A term outside the
    plates of a site does not depend on it: it counts the same in each run.

    Attributes:
        parts: Per site its plates, its probability there, and the number of its values.
            # plates, (*plates,), K

    Example:
        >>> w = Weight(((("n",), torch.tensor([0.2, 0.7]), 2),))
        >>> w.over(("n", "m")), w.over(("m",))
        (tensor([[0.2000],
                [0.7000]]), 0.5)
    """

    parts: tuple[tuple[tuple[str, ...], Tensor, int], ...] = ()

    def over(self, dims: Sequence[str]) -> Tensor | float:
        """The weight of each cell of a tensor over some plates. # (*dims or 1s)"""
        out: Tensor | float = 1.0
        for plates, probability, size in self.parts:
            if not set(plates) <= set(dims):
                out = out / size
                continue
            p = probability.permute([plates.index(d) for d in dims if d in plates])
            sizes = iter(p.shape)
            out = out * p.reshape([next(sizes) if d in plates else 1 for d in dims])
        return out

    def weigh(self, value: Tensor, dims: Sequence[str]) -> Tensor:
        """A tensor over some plates times the weight; zero where that is zero."""
        if not self.parts:
            return value
        return self.over(dims) * self.possible(value, dims)

    def possible(self, value: Tensor, dims: Sequence[str]) -> Tensor:
        """A tensor with zeros where the weight is zero: what never happens may be impossible."""
        w = self.over(dims)
        return torch.where(w == 0, 0.0, value) if isinstance(w, Tensor) else value

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return math.prod(size for _, _, size in self.parts)


@dataclass(frozen=True, eq=False)
class Particle:
    """One draw from the guide, and the bound there.

    Attributes:
        terms: What the bound is the sum of.
        scores: Per drawn site that cannot be reparameterised log q, masked and not scaled.
        values: What was drawn.
        graph: The factor graph at the draw, where latents were summed.
        log_q: log q of the whole draw in nats.
        baselines: The users' baseline options of the sites in ``scores``.
        weight: The weight of the draw where values of the guide are enumerated; ``terms`` have it.
        cost: Minus the sum of all terms, where it was added up without them. # ()
    """

    terms: Sequence[Term]
    scores: Mapping[str, Term]
    values: Mapping[str, Tensor]
    graph: FactorGraph | None = None
    log_q: float = 0.0
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weight: Weight = Weight()
    cost: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Minus the bound, in nats."""
        return -self.bound if self.cost is None else self.cost

    @property
    def bound(self) -> Tensor:
        """The sum of all terms: one unbiased draw of the ELBO in nats."""
        if self.cost is not None:
            return -self.cost
        sums = [t.value.sum() for t in self.terms]
        device = next((s.device for s in sums if s.device.type != "cpu"), sums[0].device)
        first, *others = (s.to(device) for s in sums)
        return sum(others, first)

    def along(self, plate: str) -> tuple[Tensor | None, Tensor]:
        """The bound per element of a plate, and the sum of what is outside it.

        Returns:
            Values per element (None if nothing is inside), and the rest. # (size,), ()
        """
        inside: Tensor | None = None
        outside = torch.zeros((), dtype=torch.float64)
        for t in self.terms:
            value = t.value.to(torch.float64)
            if plate in t.dims:
                part = _onto_rows(value, t.dims, plate)
                inside = part if inside is None else inside + part
            else:
                outside = outside.to(value.device) + value.sum()
        return inside, outside


@dataclass(frozen=True, eq=False)
class LogWeights:
    """Logarithms of importance weights.

    Attributes:
        values: log w. # (S, N), or (S,) where the draws are not local to rows
        scale: What multiplies the logarithm of the mean weight of each row. # (N,) or ()
        outside: What is outside the rows, averaged over the draws. # ()
    """

    values: Tensor
    scale: Tensor
    outside: Tensor

    def bound(self) -> Tensor:
        """The importance-weighted bound in nats."""
        rows = torch.logsumexp(self.values, 0) - math.log(len(self.values))
        return (self.scale * rows).sum() + self.outside


def log_weights(particles: Sequence[Particle], plate: str | None, is_local: bool) -> LogWeights:
    """Importance weights of some draws, per row where the draws are local to rows.

    Args:
        particles: Draws of one bound, without analytic terms.
        plate: The data plate.
        is_local: Whether every latent is drawn anew for each of its elements.

    Raises:
        UsageError: If terms that belong to one weight have different scales.
    """
    if plate is not None and is_local and all(_is_inside(p, plate) for p in particles):
        rows = torch.stack([_unscaled_rows(p, plate) for p in particles])
        scale = _row_scale(particles[0], plate, rows.shape[1]).to(rows)
        outside = torch.stack([p.along(plate)[1] for p in particles]).mean()
        return LogWeights(rows, scale, outside)
    scales = {_number(t.scale) for t in particles[0].terms}
    if len(scales) != 1 or math.isnan(next(iter(scales))):
        raise UsageError(
            message(
                "importance weights",
                "the sites of one weight have different scales.",
                "a scale multiplies the logarithm of a mean weight; with global draws, or a batch "
                "that stands for all data, there is no such mean",
                [
                    "use all data at once, without batch_size or poutine.scale",
                    "use the ELBO: em.elbo, strategy='exact'",
                ],
            )
        )
    scale_all = torch.tensor(scales.pop(), dtype=torch.float64)
    totals = torch.stack([p.bound.to(torch.float64) for p in particles])
    scale_all = scale_all.to(totals.device)
    return LogWeights(totals / scale_all, scale_all, torch.zeros_like(scale_all))


def _number(scale: Tensor | float | None) -> float:
    """A scale that is one number; nan where it is not."""
    if scale is None or (isinstance(scale, Tensor) and scale.numel() > 1):
        return math.nan
    return float(scale)


def _is_inside(particle: Particle, plate: str) -> bool:
    """Whether everything that is drawn or random is inside the plate."""
    random = (Role.GUIDE, Role.SAMPLED, None)
    return all(plate in t.dims for t in particle.terms if t.role in random)


def _unscaled_rows(particle: Particle, plate: str) -> Tensor:
    total: Tensor | None = None
    for t in particle.terms:
        if plate not in t.dims:
            continue
        if t.scale is None:
            raise UsageError(_different_scales(t.site))
        part = _onto_rows((t.value / t.scale).to(torch.float64), t.dims, plate)
        total = part if total is None else total + part
    assert total is not None
    return total


def _row_scale(particle: Particle, plate: str, size: int) -> Tensor:
    """The one scale of each row."""
    scale_of_rows: Tensor | None = None
    for t in particle.terms:
        if plate not in t.dims:
            continue
        scale = torch.as_tensor(t.scale, dtype=torch.float64)
        axis = t.dims.index(plate)
        if scale.dim():
            full = scale.expand(t.value.shape).movedim(axis, 0).reshape(size, -1)
            if not bool((full == full[:, :1]).all()):
                raise UsageError(_different_scales(t.site))
            row = full[:, 0]
        else:
            row = scale.expand(size)
        if scale_of_rows is not None and not bool((row.to(scale_of_rows) == scale_of_rows).all()):
            raise UsageError(_different_scales(t.site))
        scale_of_rows = row
    assert scale_of_rows is not None
    return scale_of_rows


def _different_scales(site: str) -> str:
    return message(
        f"site '{site}'",
        "its poutine.scale differs from that of other sites of the same row.",
        "a sample weight stands for replicated rows: latent, guide and data together",
        ["put model and guide under one poutine.scale per row"],
    )


def _onto_rows(value: Tensor, dims: Sequence[str], plate: str) -> Tensor:
    axes = [i for i, d in enumerate(dims) if d != plate]
    return value.sum(axes) if axes else value


def dims_of(site: Mapping[str, Any], value: Tensor) -> tuple[str, ...]:
    """The plate of each dimension of a site's log density; empty where there is none."""
    by_dim = {f.dim: name for name, f in frames_of(site).items()}
    return tuple(by_dim.get(d, "") for d in range(-value.dim(), 0))


def is_reparameterised(site: Mapping[str, Any]) -> bool:
    """Whether draws of a site carry the gradient of its parameters."""
    return bool(getattr(site["fn"], "has_rsample", False))
