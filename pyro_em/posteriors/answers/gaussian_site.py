"""One Gaussian latent of a posterior: its moments and its marginal, and how two covary.

Given the discrete latents it is Gaussian. Where discrete values change it, the moments are those of the
mixture, with the probabilities of the values as weights,

    E[h] = Σ_k w_k m_k,     Cov(h) = Σ_k w_k (S_k + (m_k − E[h]) (m_k − E[h])ᵀ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.globs import listed
from pyro_em.graph.factors import Group
from pyro_em.posteriors.gaussians.integrated import Integrated
from pyro_em.posteriors.scales.scaled_gaussian import ScaledGaussian
from pyro_em.updates.expectations.gaussian_rows import event_shape


@dataclass(frozen=True, eq=False)
class GaussianSite:
    """One Gaussian latent of a posterior.

    Attributes:
        group: Its site.
        place: The number of the graph's group that integrates it.
        number: Its number among the sites of that group's block.
        first: The number of its first element among those of that site.
        solution: The posterior of the block.
        plates: For each batch dimension of the site, the plate's name or None.
        batch: The sizes of these.
        weights: The probability of each combination of discrete values, for each of its elements;
            None where there is one combination. # (cells, elements)
        scope: The discrete latents that make them up.
    """

    group: Group
    place: int
    number: int
    first: int
    solution: Integrated
    plates: tuple[str | None, ...]
    batch: tuple[int, ...]
    weights: Tensor | None
    scope: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The site's name."""
        return self.group.members[0]

    @property
    def event(self) -> torch.Size:
        """The shape of one event, ``to_event`` included."""
        return event_shape(self.group)

    @property
    def width(self) -> int:
        """How many numbers that is."""
        return self.event.numel()

    @property
    def dtype(self) -> torch.dtype:
        """That of the latent's values."""
        return self.group.value.dtype

    @property
    def elements(self) -> Tensor:
        """The numbers of its elements. # (*batch,)"""
        count = math.prod(self.batch)
        own = torch.arange(count, device=self.group.value.device).reshape(self.batch)
        return own + self.first

    @property
    def own(self) -> slice:
        """The places of its elements."""
        return slice(self.first, self.first + math.prod(self.batch))

    def means(self) -> Tensor:
        """The mean of each element under each combination. # (cells, elements, D)"""
        return self.solution.mean(self.number)[:, self.own]

    def mean(self) -> Tensor:
        """E[h]. # (*batch, *event)"""
        mixed = _mixed(self.means(), self.weights)
        return mixed.reshape((*self.batch, *self.event)).to(self.dtype)

    def covariances(self) -> Tensor:
        """The covariance of each element under each combination. # (cells, elements, D, D)"""
        each = self.elements.reshape(-1)
        return self.solution.covariance_of(self.number, each, self.number, each)

    def marginal(self) -> Any:
        """A distribution over the batch; see `Posterior.marginal`."""
        mean = self.means().transpose(0, 1)  # (elements, cells, D)
        own = self.solution
        tails = own.tails(self.number) if isinstance(own, ScaledGaussian) else None
        if tails is not None:
            student = self._student(*tails)
            return student if self.weights is None else self._mixture(student)
        covariance = self.covariances().transpose(0, 1)
        if self.weights is None:
            mean, covariance = mean[:, 0], covariance[:, 0]
        lead = (*self.batch, *mean.shape[1:-1])
        # Variances of zero are answers too: no argument is validated.
        part: Any
        if self.event:
            tril = factors_of(covariance).reshape(*lead, *covariance.shape[-2:])
            part = dist.MultivariateNormal(
                mean.reshape(*lead, -1).to(self.dtype),
                scale_tril=tril.to(self.dtype),
                validate_args=False,
            )
        else:
            deviation = covariance[..., 0, 0].clamp(min=0).sqrt().reshape(lead)
            loc = mean.reshape(lead).to(self.dtype)
            part = dist.Normal(loc, deviation.to(self.dtype), validate_args=False)
        return part if self.weights is None else self._mixture(part)

    def _mixture(self, part: Any) -> Any:
        """A distribution over the batch and the discrete values, of whatever value."""
        assert self.weights is not None
        shape = (*self.batch, self.solution.cells)
        weights = self.weights.T.reshape(shape)
        chosen = dist.Categorical(probs=weights.to(self.dtype))
        return dist.MixtureSameFamily(chosen, part, validate_args=False)

    def _student(self, degrees: Tensor, factor: Tensor) -> Any:
        """The same where the precision is itself unknown.

        Args:
            degrees: Of freedom. # (cells or 1, elements of the site, D or 1)
            factor: Of the covariance where the precision is at its mean. # the same
        """
        solution = self.solution
        assert isinstance(solution, ScaledGaussian)
        each = self.elements.reshape(-1)
        spread = solution.spread_of(self.number, each, self.number, each)
        mean, cells, width = self.means(), solution.cells, self.width
        number = self.weights is None
        lead = self.batch if number else (*self.batch, cells)

        def laid(t: Tensor, *tail: int) -> Tensor:
            t = t.expand(cells, *t.shape[1:]).transpose(0, 1)
            t = t[:, 0] if number else t
            return t.reshape((*lead, *tail)).to(self.dtype)

        degrees, factor = degrees[:, each], factor[:, each]
        if self.event and degrees.shape[-1] == 1 and width > 1:
            tril = factors_of(spread * factor.unsqueeze(-1))
            scale = laid(tril, width, width)
            return dist.MultivariateStudentT(laid(degrees), laid(mean, width), scale)
        deviation = (factor * spread.diagonal(dim1=-2, dim2=-1)).clamp(min=0).sqrt()
        tail = (width,) if self.event else ()
        degrees = degrees.expand(*degrees.shape[:2], width)
        out = dist.StudentT(laid(degrees, *tail), laid(mean, *tail), laid(deviation, *tail))
        return out.to_event(1) if self.event else out

    def chosen(self, by_cell: Tensor, cells: Tensor | None) -> Tensor:
        """What belongs to the discrete values of each element. # (n, *batch, *event)

        Args:
            by_cell: # (n, cells, elements, D)
            cells: The number of the combination. # (n, elements)
        """
        if cells is None:
            out = by_cell[:, 0]
        else:
            at = cells[:, None, :, None].expand(-1, 1, by_cell.shape[2], by_cell.shape[3])
            out = by_cell.gather(1, at)[:, 0]
        return out.reshape(-1, *self.batch, *self.event).to(self.dtype)


def covariance(a: GaussianSite, b: GaussianSite) -> Tensor:
    """The covariance of the elements of two sites; see `Posterior.covariance`."""
    shape = _common(a, b)
    first = a.elements.expand(shape).reshape(-1)
    second = b.elements.expand(shape).reshape(-1)
    tails = [(site.width,) if site.event else () for site in (a, b)]
    form = (*shape, *tails[0], *tails[1])
    dtype = torch.promote_types(a.dtype, b.dtype)
    if a.place == b.place:
        out = a.solution.covariance_of(a.number, first, b.number, second)
    else:  # given the discrete latents they are independent
        out = first.new_zeros((1, *first.shape, a.width, b.width), dtype=torch.float64)
    if a.weights is not None and b.weights is not None:
        if a.scope != b.scope:
            raise UsageError(_two_scopes(a, b))
        weights = a.weights[:, first - a.first]
        u = a.solution.mean(a.number)[:, first]
        v = b.solution.mean(b.number)[:, second]
        u, v = u - _mixed(u, weights), v - _mixed(v, weights)
        mixed = _mixed(out + u.unsqueeze(-1) * v.unsqueeze(-2), weights)
    else:
        mixed = out[0]
    return mixed.reshape(form).to(dtype)


def _two_scopes(a: GaussianSite, b: GaussianSite) -> str:
    return message(
        f"covariance('{a.name}', '{b.name}')",
        f"'{a.name}' depends on discrete {listed(a.scope)}, and '{b.name}' on {listed(b.scope)}.",
        "their covariance needs the joint distribution of all these",
        ["draw jointly (sample(n), em.predictive), and take the covariance of the draws"],
    )


def _mixed(x: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_k w_k x_k. # (elements, ...)

    Args:
        x: # (cells, elements, ...)
        weights: # (cells, elements or 1)
    """
    if weights is None:
        return x[0]
    return (weights.reshape(*weights.shape, *(1,) * (x.dim() - 2)) * x).sum(0)


def _common(a: GaussianSite, b: GaussianSite) -> torch.Size:
    """The batch dimensions of two sites together.

    Raises:
        UsageError: If two plates share a dimension, so that no element belongs to one of the other.
    """
    n = max(len(a.plates), len(b.plates))
    for d in range(-n, 0):
        both = [s.plates[d] for s in (a, b) if -d <= len(s.plates) and s.plates[d] is not None]
        if len(set(both)) > 1:
            raise UsageError(
                message(
                    f"covariance('{a.name}', '{b.name}')",
                    f"'{a.name}' is in plate '{both[0]}', and '{b.name}' in plate '{both[1]}'.",
                    "the elements of two plates of one dimension do not belong to each other",
                    [
                        "ask for sites of the same plates",
                        "draw jointly (sample(n), em.predictive), and take the covariance of the draws",
                    ],
                )
            )
    return torch.Size(torch.broadcast_shapes(a.batch, b.batch))


def factors_of(covariance: Tensor) -> Tensor:
    """Lower factors of covariances, which may be singular. # (..., D, D)"""
    cholesky, failed = torch.linalg.cholesky_ex(covariance)
    if not bool(failed.any()):
        return cholesky
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    upper = torch.linalg.qr(root.mT).R  # root rootᵀ = Rᵀ R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return torch.where((failed != 0)[..., None, None], (upper * sign.unsqueeze(-1)).mT, cholesky)
