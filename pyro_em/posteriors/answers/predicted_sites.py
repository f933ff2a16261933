"""What is predicted of observed sites whose entries are not all seen.

Given the discrete latents and what the site reads of Gaussian ones, y = b + C h + ε, ε ~ N(0, R).
Entries s of a row that are seen tell of the others by their noise too: with G = R_{·s} R_{ss}⁻¹

    y | y_s = b + G (y_s − b_s) + (C − G C_s) h + ε',     Cov(ε') = R − G R_{s·}.

Seen entries are themselves then. What is not normal is predicted by its distribution in each cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.answers.data_steps import ObservedSite
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.gaussian_predictions import known_data, value_rows
from pyro_em.posteriors.answers.gaussian_site import factors_of
from pyro_em.posteriors.answers.normal_mixtures import NormalsByCell
from pyro_em.updates.expectations.gaussian_rows import event_shape, rows_of, tril_rows

_MATRICES = ("scale_tril", "covariance_matrix", "precision_matrix")


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of all latents.

    Attributes:
        n: How many.
        codes: The places of discrete latents' values in their supports. # (n, *plates)
        solved: By group, those of its Gaussian latents. # (n, cells, elements, q) each
        reads: What rows read of these, for the next who asks; by group and number there.
    """

    n: int
    codes: Mapping[str, Tensor]
    solved: Mapping[int, Sequence[Tensor]]
    reads: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def read(self, faces: GaussianFaces, g: int, i: int) -> Tensor:
        """What the rows of the sites of one group read. # (n, cells, rows, Q)

        Args:
            faces: The latents.
            g: The number of the graph's group.
            i: The number of the sites' group in its block.
        """
        if (g, i) not in self.reads:
            solution = known_data(faces.solved[g])
            self.reads[g, i] = solution.read_of_draws(i, self.solved[g])
        return self.reads[g, i]


class PredictedSite(Protocol):
    """One observed site, predicted."""

    @property
    def is_normal(self) -> bool:
        """Whether each entry is a mixture of normals, whose quantiles are known."""
        ...

    def mean(self) -> Tensor:
        """The mean of each entry. # (rows, D)"""
        ...

    def quantile(self, p: float) -> Tensor:
        """A quantile of each entry, if it is normal. # (rows, D)"""
        ...

    def draw(self, draws: Draws) -> Tensor:
        """Draws given those of the latents, from torch's random state. # (n, rows, D)"""
        ...


@dataclass(frozen=True, eq=False)
class NormalSite:
    """A site of normal entries.

    Attributes:
        coefficients: C. # (cells, rows, D, Q)
        offset: b. # (cells, rows, D)
        noise: R. # (cells, rows, D, D)
        read_mean: The mean of what each row reads. # (cells, rows, Q)
        read_covariance: # (cells, rows, Q, Q)
        weights: The probability of each cell; None where there is one. # (cells, rows)
        faces: The latents.
        site: The site.
    """

    coefficients: Tensor
    offset: Tensor
    noise: Tensor
    read_mean: Tensor
    read_covariance: Tensor
    weights: Tensor | None
    faces: GaussianFaces
    site: ObservedSite

    @property
    def is_normal(self) -> bool:
        """It is."""
        return True

    @property
    def _rows(self) -> NormalsByCell:
        C = self.coefficients
        mean = self.offset + (C @ self.read_mean.unsqueeze(-1)).squeeze(-1)
        covariance = C @ self.read_covariance @ C.mT + self.noise
        return NormalsByCell(mean, covariance.diagonal(dim1=-2, dim2=-1), self.weights)

    def mean(self) -> Tensor:
        """See `PredictedSite`."""
        return self._rows.moments()[0]

    def quantile(self, p: float) -> Tensor:
        """See `PredictedSite`."""
        return self._rows.quantile(p)

    def draw(self, draws: Draws) -> Tensor:
        """See `PredictedSite`."""
        each = self.offset.unsqueeze(0)
        site = self.site
        if site.number is not None:
            read = draws.read(self.faces, site.group, site.number)[:, :, site.rows]
            each = each + (self.coefficients @ read.unsqueeze(-1)).squeeze(-1)
        root = factors_of(self.noise)
        normal = torch.randn(draws.n, *self.offset.shape, dtype=root.dtype, device=root.device)
        each = each + (root @ normal.unsqueeze(-1)).squeeze(-1)
        return _of_cells(each, _cells(self.faces, site, draws))


@dataclass(frozen=True, eq=False)
class OtherSite:
    """A site of one distribution in each cell of discrete latents.

    Attributes:
        fn: Batch dimensions are those of the site's plates and cells, then those of ``to_event``.
        weights: The probability of each cell. # (*sizes)
        seen: What was observed, NaN where nothing was. # (rows, D)
        faces: The latents.
        site: The site.
    """

    fn: Any
    weights: Tensor
    seen: Tensor
    faces: GaussianFaces
    site: ObservedSite

    @property
    def is_normal(self) -> bool:
        """It is not."""
        return False

    def probs(self) -> Tensor | None:
        """The probabilities of a Categorical's codes. # (rows, …, K)"""
        if not isinstance(self.fn, torch.distributions.Categorical):
            return None
        group = self.site.of
        probs = self.fn.probs.expand(*group.sizes, *event_shape(group), -1)
        mixed = self._mixed(probs)
        codes = torch.arange(mixed.shape[-1], device=mixed.device)
        hot = (self.seen.unsqueeze(-1) == codes).to(mixed.dtype).reshape(mixed.shape)
        unseen = self.seen.isnan().reshape(*mixed.shape[:-1], 1)
        return torch.where(unseen, mixed, hot)

    def mean(self) -> Tensor:
        """See `PredictedSite`."""
        group = self.site.of
        whole = self.fn.mean.expand(*group.sizes, *event_shape(group))
        mixed = self._mixed(whole).reshape(self.seen.shape)
        return torch.where(self.seen.isnan(), mixed.to(self.seen.dtype), self.seen)

    def quantile(self, p: float) -> Tensor:
        """It is not normal."""
        raise NotImplementedError

    def draw(self, draws: Draws) -> Tensor:
        """See `PredictedSite`."""
        group = self.site.of
        shape = torch.Size([*group.sizes, *event_shape(group)])
        drawn = self.fn.expand(shape).sample(torch.Size([draws.n]))
        drawn = drawn.reshape(draws.n, len(self.seen), -1, self.seen.shape[1])
        chosen = _of_cells(drawn.transpose(1, 2), _cells(self.faces, self.site, draws))
        return torch.where(self.seen.isnan(), chosen.to(self.seen.dtype), self.seen)

    def _mixed(self, table: Tensor) -> Tensor:
        """Σ over cells of weight × table. # (*plates, …)"""
        group = self.site.of
        weights = self.weights.reshape(*group.sizes, *(1,) * (table.dim() - len(group.sizes)))
        axes = tuple(range(group.n_plates, len(group.sizes)))
        return (weights * table).sum(axes) if axes else weights * table


def predicted_site(
    faces: GaussianFaces, site: ObservedSite, arguments: Mapping[str, Tensor]
) -> PredictedSite | None:
    """What is predicted of an observed site; None where its distribution is none that is known here.

    Args:
        faces: The latents of a posterior.
        site: The site.
        arguments: Those of its group, at the parameters of the posterior.
    """
    group = site.alone
    own = {a: site.of_member(t) for a, t in arguments.items()}
    if group.family is None or not group.is_unscaled:
        return None
    kinds = (torch.distributions.Normal, torch.distributions.MultivariateNormal)
    cls = getattr(dist, group.distribution, None)
    if cls is None:
        return None
    if issubclass(cls, kinds) and group.distribution in ("Normal", "MultivariateNormal"):
        return _normal_site(faces, site, group, own)
    if site.number is not None or not _is_given(cls, own):
        return None
    fn = cls(**{a: t[0] for a, t in own.items()}, validate_args=False)
    if fn.event_shape or len(fn.batch_shape) != len(group.sizes) + len(event_shape(group)):
        return None
    weights = faces.cells[site.group][site.member].to(torch.float64)
    return OtherSite(fn, weights, value_rows(group), faces, site)


def _normal_site(
    faces: GaussianFaces, site: ObservedSite, group: Group, arguments: Mapping[str, Tensor]
) -> NormalSite:
    if any(a in arguments for a in _MATRICES):
        tril = tril_rows(group, arguments)
        R = tril @ tril.mT
    else:
        R = rows_of(group, arguments["scale"]).to(torch.float64).square().diag_embed()
    weights: Tensor | None
    if site.number is None:
        b = rows_of(group, arguments["loc"]).to(torch.float64)
        rows = torch.Size(group.sizes[: group.n_plates]).numel()
        table = faces.cells[site.group][site.member].to(torch.float64).reshape(rows, -1)
        weights = None if table.shape[1] == 1 else table.T
        cells = table.shape[1]
        C = b.new_zeros(1, 1, b.shape[-1], 0)
        mean, covariance = b.new_zeros(cells, rows, 0), b.new_zeros(cells, rows, 0, 0)
    else:
        solution = known_data(faces.solved[site.group])
        both = faces.solved[site.group].coefficients(site.number)
        both = both if both.shape[1] == 1 else both[:, site.rows]
        C, b = both[..., :-1], both[..., -1]
        mean, covariance = (t[:, site.rows] for t in solution.moments(site.number))
        cells, rows = mean.shape[:2]
        weights = faces.weights(site.group, site.number)
        weights = None if weights is None else weights[:, site.rows]
    D = b.shape[-1]
    C = C.expand(cells, rows, D, -1)
    b, R = b.expand(cells, rows, D), R.expand(cells, rows, D, D)
    C, b, R = _given_seen(C, b, R, value_rows(group))
    return NormalSite(C, b, R, mean, covariance, weights, faces, site)


def _given_seen(C: Tensor, b: Tensor, R: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C, b and R given the entries of a row that are seen. The value: NaN where not. # (rows, D)"""
    seen = ~value.isnan()
    if not bool(seen.any()):
        return C, b, R
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    inverse = torch.linalg.inv(torch.where(both, R, eye))
    G = (R * seen.unsqueeze(-2)) @ (inverse * both)
    error = torch.where(seen, value - b, torch.zeros_like(b))
    offset = b + (G @ error.unsqueeze(-1)).squeeze(-1)
    alone = seen.unsqueeze(-1)
    C = torch.where(alone, torch.zeros_like(C), C - G @ C)
    offset = torch.where(seen, value, offset)
    left = R - G @ R
    left = torch.where(alone | seen.unsqueeze(-2), torch.zeros_like(left), left)
    return C, offset, (left + left.mT) / 2


def _is_given(cls: Any, arguments: Mapping[str, Tensor]) -> bool:
    """Whether these are all arguments that a distribution needs."""
    known = set(cls.arg_constraints)
    either = known & {"probs", "logits"}
    given = set(arguments)
    return given <= known and known - given <= either and (not either or bool(either & given))


def _of_cells(by_cell: Tensor, cells: Tensor | None) -> Tensor:
    """What belongs to the discrete values of each row. # (n, rows, D)

    Args:
        by_cell: # (n, cells, rows, D)
        cells: # (n, rows)
    """
    if cells is None:
        return by_cell[:, 0]
    at = cells[:, None, :, None].expand(-1, 1, -1, by_cell.shape[-1])
    return by_cell.gather(1, at)[:, 0]


def _cells(faces: GaussianFaces, site: ObservedSite, draws: Draws) -> Tensor | None:
    """The combination of discrete values of each row of a site. # (n, rows)"""
    if site.number is not None:
        cells = faces.cells_of_rows(site.group, site.number, draws.codes, draws.n)
        return None if cells is None else cells[:, site.rows]
    return _cells_of_factor(faces.graph, site, draws)


def _cells_of_factor(graph: FactorGraph, site: ObservedSite, draws: Draws) -> Tensor | None:
    group = site.of
    dims, n = site.of.dims[site.member], group.n_plates
    if len(dims) == n:
        return None
    place = torch.zeros((draws.n, *group.sizes[:n]), dtype=torch.long, device=group.value.device)
    for z, states in zip(dims[n:], group.sizes[n:], strict=True):
        own = graph.latents[z].plates
        shape = [s if p in own else 1 for p, s in zip(dims[:n], group.sizes[:n], strict=True)]
        place = place * states + draws.codes[z].reshape(draws.n, *shape)
    return place.reshape(draws.n, -1)
