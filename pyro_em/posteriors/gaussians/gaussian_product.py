"""A product of Gaussians that a user gave, in place of the posterior of Gaussian latents.

Elements of different sites, and different elements of one site, are independent under it. It has the
same moments to offer as the posterior, so that bounds and M-steps take either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.arguments import shown
from pyro_em.distributions import unwrap
from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import Group
from pyro_em.posteriors.gaussians.integrated import Blocks, Solution
from pyro_em.updates.expectations.gaussian_rows import event_shape
from pyro_em.updates.expectations.linear_moments import LinearMoments, linear_moments

_LOG_TWO_PI_E = 1 + math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class GaussianProduct:
    """See the module's text. Latents are named by the number of their site; everything is float64.

    Attributes:
        at: The posterior at the parameters of the moment: what the sites' means are made of.
        means: Of each latent. # (n, q)
        covariances: Of each element. # (n, q, q)
    """

    at: Solution
    means: Mapping[int, Tensor]
    covariances: Mapping[int, Tensor]

    @property
    def layout(self) -> Blocks:
        """Blocks and places."""
        return self.at.layout

    @property
    def cells(self) -> int:
        """Combinations of discrete values."""
        return self.at.cells

    def coefficients(self, site: int) -> Tensor:
        """(C, b), of which the mean of a site is made. # (cells|1, rows|1, D, Q + 1)"""
        return self.at.coefficients(site)

    def is_of(self, other: object) -> bool:
        """Whether it is the posterior that another one is."""
        return self is other

    def mean(self, latent: int) -> Tensor:
        """# (cells, n, q)"""
        return self.means[latent].expand(self.cells, -1, -1)

    def covariance_of(
        self, latent_a: int, elements_a: Tensor, latent_b: int, elements_b: Tensor
    ) -> Tensor:
        """Covariance of pairs of elements. # (cells, m, q_a, q_b)"""
        return self._covariance(latent_a, elements_a, latent_b, elements_b).expand(
            self.cells, -1, -1, -1
        )

    def _covariance(self, a: int, of_a: Tensor, b: int, of_b: Tensor) -> Tensor:
        if a != b:
            width = self.means[b].shape[-1]
            return self.means[a].new_zeros(len(of_a), self.means[a].shape[-1], width)
        same = (of_a == of_b) & (of_a >= 0)
        found = self.covariances[a][of_a.clamp(min=0)]
        return torch.where(same[:, None, None], found, torch.zeros_like(found))

    def entropy(self) -> Tensor:
        """Of each block, −inf at a variance of zero. # (cells, blocks)"""
        layout = self.layout
        out = self.at.log_evidence.new_zeros(layout.blocks)
        for latent, covariance in self.covariances.items():
            each = 0.5 * (torch.logdet(covariance) + covariance.shape[-1] * _LOG_TWO_PI_E)
            out = out.index_add(0, layout.block_of_element(latent), each)
        return out.expand(self.cells, -1).clone()

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draws of all latents. # (n, cells, elements, q) each, in the order of sites"""
        out = []
        for latent, mean in self.means.items():
            values, vectors = torch.linalg.eigh(self.covariances[latent])
            root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
            shape = (n, self.cells, *mean.shape)
            z = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
            out.append(mean + (root @ z.unsqueeze(-1)).squeeze(-1))
        return out

    def linear_moments(self, site: int, diagonal: bool = False) -> LinearMoments:
        """Moments of the residuals and of φ = (unknowns that the mean reads, 1)."""
        rows = self.layout.sites[site].rows
        mean = self.at.read_of(site, self.means).unsqueeze(0)
        covariance = self.at.read_covariance(site, self.covariances)
        own = self.means.get(site)
        residual = self.at.residual_at(site, mean, own)
        C = self.at.counted_coefficients(site)
        cross = -(C @ covariance)
        spread = -cross @ C.mT
        if own is not None:
            spread = spread + self.covariances[site]
        if diagonal:
            second = spread.diagonal(dim1=-2, dim2=-1) + residual.square()
        else:
            second = spread + residual.unsqueeze(-1) * residual.unsqueeze(-2)
        cells = torch.broadcast_shapes(residual.shape[:1], cross.shape[:1])[0]
        lead = (cells, rows)
        return linear_moments(
            mean.expand(cells, -1, -1),
            covariance.expand(*lead, *covariance.shape[-2:]),
            residual.expand(*lead, -1),
            cross.expand(*lead, *cross.shape[-2:]),
            second.expand(*lead, *second.shape[2:]),
            diagonal,
        )


def drawn_from_prior(at: Solution, generator: torch.Generator) -> GaussianProduct:
    """Values drawn from the prior of Gaussian latents, as known ones.

    Args:
        at: Their posterior at the parameters of the moment.
        generator: The source of randomness, on the CPU.
    """
    # Whatever the discrete latents are: a start need not be likely.
    means = {i: h[0] for i, h in at.prior_draw(generator).items()}
    none = {i: m.new_zeros(*m.shape, m.shape[-1]) for i, m in means.items()}
    return GaussianProduct(at, means, none)


def moments_given(
    group: Group, batch: tuple[int, ...], given: Any, where: str = "q"
) -> tuple[Tensor, Tensor]:
    """The moments of a distribution that a user gave for a latent, element by element.

    Args:
        group: The latent's site.
        batch: The sizes of its batch dimensions.
        given: A Normal, MultivariateNormal or Delta, with any number of ``to_event``.
        where: The argument that it is.

    Returns:
        # (n, q), (n, q, q)

    Raises:
        UsageError: If it is another distribution, or of another shape.
    """
    name, event = group.members[0], event_shape(group)
    kind = "" if not isinstance(given, torch.distributions.Distribution) else _kind(given)
    if not kind:
        raise UsageError(
            message(
                f"{where}['{name}']",
                f"it is {shown(given)}, and '{name}' is a Gaussian latent.",
                "probabilities are those of discrete latents",
                [
                    f"give a distribution: {{'{name}': Normal(mean, scale)}}, or a MultivariateNormal"
                ],
            )
        )
    device = group.value.device
    n, q = math.prod(batch), event.numel()
    base = unwrap(given)[0]
    try:
        if kind == "Normal":
            mean, variance = _over(base.loc, batch, event), _over(base.scale.square(), batch, event)
            covariance = variance.reshape(n, q).diag_embed()
        elif kind == "Delta":
            mean = _over(base.v, batch, event)
            covariance = mean.new_zeros(n, q, q)
        else:
            if len(event) != 1:
                raise RuntimeError
            mean = _over(base.loc, batch, event)
            covariance = _over(base.covariance_matrix, batch, torch.Size([q, q])).reshape(n, q, q)
    except RuntimeError:
        shape = (*given.batch_shape, *given.event_shape)
        raise UsageError(
            message(
                f"{where}['{name}']",
                f"its shape is {tuple(shape)}; {(*batch, *event)} was expected.",
                "plates first, left to right, and independent of each other; then the event",
            )
        ) from None
    return mean.reshape(n, q).to(device), covariance.to(device)


def _kind(given: Any) -> str:
    base, _, masks = unwrap(given)
    name = type(base).__name__
    return name if name in ("Normal", "MultivariateNormal", "Delta") and not masks else ""


def _over(t: Tensor, batch: tuple[int, ...], event: torch.Size) -> Tensor:
    return t.detach().to(torch.float64).expand((*batch, *event))
