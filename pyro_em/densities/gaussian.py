"""Gaussian components by matrix products over features of the data.

With x' = x − c centred once, log N(x | μ, Σ) is linear in the features (x'_i, x'_i x'_j):

    ℓ_k(x) = h_k + (Λ_k μ'_k)ᵀ x' − ½ Σ_ij Λ_kij x'_i x'_j,     Λ = Σ⁻¹

so that one product gives all log densities and one all moments. Many features cost more than they
save: beyond 24 dimensions the data are whitened instead, see `pyro_em.densities.whitened`.

The expanded square cancels like (|x'| / σ)². Where that would cost more than a few digits the whitened
form is taken too, which does not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.pairs import unfolding, upper_pairs, with_products
from pyro_em.densities.plain_rows import count_of_rows
from pyro_em.densities.whitened import Scaled, Whitened, block_size, is_near
from pyro_em.families.family import Statistics
from pyro_em.graph.all_data import AllData, Centre
from pyro_em.graph.factors import Group

_MANY = 24

FEW_CELLS = 2**20

_BLOCK = 2**13

_LIMIT = {torch.float64: 1e4, torch.float32: 1e3}


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _places(D: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """What all rows of D features share: ``upper``, ``flat``, ``full`` and ``halved`` of `Gaussian`."""
    i, j = upper_pairs(D, device)
    halved = torch.where(i == j, -0.5, -1.0).to(torch.float64)
    return (i, j), i * D + j, unfolding(D, device), halved


@dataclass(frozen=True, eq=False)
class Prepared:
    """The components at some arguments.

    Attributes:
        linear: Coefficients of the features; None where the data are whitened. # (K, P)
        constant: h. # (K, 1)
        white: How the data are whitened.
        wide: The first two in float64. # (K, P), (K, 1)
        size: The largest term of the expanded square, times √D: what its rounding is relative to.
        lost: What rounding took from the first two; None where it took nothing. # (K, P), (K, 1)
    """

    linear: Tensor | None
    constant: Tensor
    white: Whitened | Scaled | None = None
    wide: tuple[Tensor, Tensor] | None = None
    size: float = 0.0
    lost: tuple[Tensor, Tensor] | None = None

    def part(self, cells: slice) -> Prepared:
        """Some of the components."""
        white = None if self.white is None else self.white.part(cells)
        wide = None if self.wide is None else (self.wide[0][cells], self.wide[1][cells])
        linear = None if self.linear is None else self.linear[cells]
        lost = None if self.lost is None else (self.lost[0][cells], self.lost[1][cells])
        return Prepared(linear, self.constant[cells], white, wide, self.size, lost)

    @property
    def mean(self) -> Tensor | None:
        """What moments are taken about, of x'; None for zero. # (K, D)"""
        return None if self.white is None else self.white.point


@dataclass(eq=False)
class Gaussian:
    """The rows of a group of Gaussian sites with component-wise arguments.

    Attributes:
        x: Centred data. # (D, N)
        centre: c. # (D,)
        diagonal: Whether features are independent given the component.
        spread: Name of the argument that holds the covariance.
        K: Components.
        scalar: Whether each datum is a number (no ``to_event``).
        lead: Dimensions of the group before the component's: members and plates.
        given_reach2: The same as ``reach2`` of all data, where these are a part of them. # (D,)
        reach2: The largest square of each centred feature. # (D,)
        upper: The pairs of `upper_pairs`. # (P,) each
        flat: Where they are among all D * D elements of a matrix. # (P,)
        full: The places of `unfolding`. # (D * D,)
        halved: What the coefficient of each pair is of its element of Λ: −½ on the diagonal, else −1.
        stored: The features of all rows, where the data are few; else None. # (P, N)
    """

    x: Tensor
    centre: Tensor
    diagonal: bool
    spread: str
    K: int
    scalar: bool
    lead: int
    given_reach2: Tensor | None = None
    reach2: Tensor = field(init=False)
    upper: tuple[Tensor, Tensor] = field(init=False)
    flat: Tensor = field(init=False)
    full: Tensor = field(init=False)
    halved: Tensor = field(init=False)
    stored: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        D = self.x.shape[0]
        if self.given_reach2 is None:
            low, high = torch.aminmax(self.x, dim=1)
            self.reach2 = torch.maximum(high, -low).to(torch.float64).square()
        else:
            self.reach2 = self.given_reach2
        self.upper, self.flat, self.full, self.halved = _places(D, self.x.device)
        # Of few data they are made once; of many, per chunk is as fast and keeps memory small.
        if self.width * self.x.shape[1] <= FEW_CELLS:
            self.stored = self._features(self.x)

    @property
    def form(self) -> GaussianForm:
        """The same without its data."""
        return GaussianForm(self.diagonal, self.spread, self.K, self.scalar, self.lead)

    @property
    def limit(self) -> float:
        """How large a term of the expanded square may be."""
        return _LIMIT.get(self.x.dtype, 1e3)

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        D = self.x.shape[0]
        if self.diagonal:
            return 2 * D
        return D + D * (D + 1) // 2 if D <= _MANY else D + 2 * self.K * block_size(D)

    def prepare(self, arguments: Mapping[str, Tensor]) -> Prepared:
        """Coefficients at some arguments."""
        D, spread = self.x.shape[0], arguments[self.spread].to(torch.float64)
        if self.diagonal:
            root = spread.reshape(-1, 1 if self.scalar else spread.shape[-1]).expand(-1, D)
        else:
            root = spread.reshape(-1, D, D)
            root = root if self.spread == "scale_tril" else torch.linalg.cholesky(root)
        return self.prepare_at(self._each(self._shift(arguments["loc"])), root)

    def prepare_at(self, mu: Tensor, root: Tensor) -> Prepared:
        """Coefficients at centred means and roots of the spread.

        Args:
            mu: μ'. # (K, D)
            root: Standard deviations, or Cholesky factors. # (K or 1, D) or (K or 1, D, D)
        """
        D, dtype = self.x.shape[0], self.x.dtype
        half_log_2pi = 0.5 * D * math.log(2 * math.pi)
        if self.diagonal:
            sigma = self._each(root)
            precision = sigma**-2
            log_det = sigma.log().sum(-1, keepdim=True)
            size = D**0.5 * float((precision * self.reach2).max())
            if not size <= self.limit:
                scaled = Scaled(sigma.to(dtype), mu.to(dtype))
                return self._whitened(scaled, log_det)
            along = precision * mu
            squares = -0.5 * precision
        else:
            log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
            size = math.inf
            if D <= _MANY:
                precision = torch.cholesky_inverse(root)
                size = float((precision.diagonal(dim1=-2, dim2=-1) * self.reach2).max())
                size *= D**0.5
            if not size <= self.limit:
                eye = torch.eye(D, dtype=torch.float64, device=root.device)
                whiten = self._each(torch.linalg.solve_triangular(root, eye, upper=False))
                near = dtype == torch.float64 and is_near(self.reach2, root.square().sum(-1))
                return self._whitened(Whitened(whiten.to(dtype), mu.to(dtype), near), log_det)
            along = torch.bmm(self._each(precision), mu.unsqueeze(-1)).squeeze(-1)
            pairs = precision.reshape(-1, D * D).index_select(1, self.flat)
            squares = self._each(pairs * self.halved)
        constant = torch.add(log_det, (along * mu).sum(-1, keepdim=True), alpha=0.5)
        constant = torch.rsub(constant, -half_log_2pi)
        linear = torch.cat([along, squares], -1)
        wide = (linear, constant)
        if dtype == torch.float64:
            return Prepared(linear, constant, wide=wide, size=size)
        rounded = (linear.to(dtype), constant.to(dtype))
        lost = (linear - rounded[0], constant - rounded[1])
        return Prepared(*rounded, wide=wide, size=size, lost=lost)

    def _shift(self, loc: Tensor) -> Tensor:
        """μ' = μ − c. # (K or 1, D)"""
        rows = loc.reshape(-1, 1 if self.scalar else loc.shape[-1])
        return rows.to(torch.float64) - self.centre

    def _each(self, t: Tensor) -> Tensor:
        """Shared between components or not: one row per component."""
        return t if len(t) == self.K else t.expand(self.K, *t.shape[1:])

    def _whitened(self, white: Whitened | Scaled, log_det: Tensor) -> Prepared:
        half_log_2pi = 0.5 * self.x.shape[0] * math.log(2 * math.pi)
        constant = self._each(-(log_det + half_log_2pi))
        return Prepared(None, constant.to(self.x.dtype), white)

    def log_density(self, p: Prepared, features: Tensor, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, from their features, added to what is there. # (K, rows)"""
        constant = p.constant if onto is None else p.constant + onto.to(p.constant.dtype)
        if p.linear is not None:
            return torch.addmm(constant, p.linear, features)
        assert p.white is not None
        return p.white.squares(features[: self.x.shape[0]]).mul_(-0.5).add_(constant)

    def features(self, rows: slice, p: Prepared | None = None) -> Tensor:
        """x' and its products; x' alone in many dimensions. # (P, rows)"""
        if self.stored is not None:
            return self.stored[:, rows]
        return self._features(self.x[:, rows])

    def _features(self, x: Tensor) -> Tensor:
        if not self.diagonal and x.shape[0] > _MANY:
            return x
        if self.diagonal:
            return torch.cat([x, x * x])
        return with_products(x)

    def moments(self, p: Prepared, weights: Tensor, features: Tensor) -> Tensor:
        """Σ r d and Σ r d dᵀ of some rows, in float64, so that they can be added; see `over_rows`.

        About zero, d = x', or about each component's mean; see `Prepared.mean`.
        """
        weights = weights.to(features.dtype)  # another group may be finer or coarser
        if p.white is None:
            return (weights @ features.T).to(torch.float64)
        return p.white.moments(weights, features[: self.x.shape[0]])

    def over_rows(self, p: Prepared, moments: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`. # (K, P)"""
        return moments if p.white is None else p.white.over_rows(moments, self.flat)

    def about(self, before: Any, now: Any, moments: Tensor, mass: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`."""
        D, step = self.x.shape[0], self._point(now) - self._point(before)
        first, second, each = moments[:, :D], moments[:, D:], mass.unsqueeze(-1)
        i, j = (range(D), range(D)) if self.diagonal else self.upper
        cross = step[:, i] * first[:, j] + first[:, i] * step[:, j]
        moved = second - cross + each * step[:, i] * step[:, j]
        return torch.cat([first - each * step, moved], 1)

    def _point(self, p: Prepared) -> Tensor:
        """What moments are taken about, of x'. # (K, D)"""
        if p.mean is None:
            return self.centre.new_zeros(self.K, self.x.shape[0])
        return p.mean.to(torch.float64)

    def correction(self, p: Prepared, moments: Tensor, mass: Tensor) -> Tensor | float:
        """What rounded coefficients cost the log evidence, to first order, in nats."""
        if p.lost is None:
            return 0.0
        linear, constant = p.lost
        return (moments * linear).sum() + (mass * constant.squeeze(-1)).sum()

    def statistics(
        self, p: Prepared, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics about its location, from moments about another point."""
        D = self.x.shape[0]
        mu = self._each(self._shift(arguments["loc"]))
        if p.mean is not None:  # about the location already, up to its rounding
            mu = mu - p.mean.to(torch.float64)
        first = moments[:, :D]
        deviation = first - mass.unsqueeze(-1) * mu
        if self.diagonal:
            square = moments[:, D:] - 2 * mu * first + mass.unsqueeze(-1) * mu**2
            if self.scalar:
                return self._shaped(
                    {"deviation": deviation[:, 0], "square": square[:, 0], "weight": mass}
                )
            weight = mass.unsqueeze(-1).expand(-1, D)
            return self._shaped({"deviation": deviation, "square": square, "weight": weight})
        second = moments[:, D:].index_select(1, self.full).reshape(self.K, D, D)
        cross = first.unsqueeze(-1) * mu.unsqueeze(-2)
        outer = mass[:, None, None] * (mu.unsqueeze(-1) * mu.unsqueeze(-2))
        square = second - cross - cross.mT + outer
        return self._shaped({"deviation": deviation, "square": square, "weight": mass})

    def _shaped(self, statistics: Statistics) -> Statistics:
        return {name: t.reshape(*(1,) * self.lead, *t.shape) for name, t in statistics.items()}


@dataclass(frozen=True)
class GaussianForm:
    """What a `Gaussian` is whatever its data are; the attributes are the same as there."""

    diagonal: bool
    spread: str
    K: int
    scalar: bool
    lead: int

    def on(self, value: Tensor, known: Centre | None = None) -> Gaussian:
        """The rows of some data.

        Args:
            value: The data of a group. # (members, *sizes or 1s, *event)
            known: Their centre, where they are a part of all data.
        """
        x = value.reshape(math.prod(value.shape[: self.lead]), -1)
        mean = x.mean(0, dtype=torch.float64) if known is None else known.mean
        centre = mean.to(x.dtype)
        reach2 = None if known is None else known.reach2
        own = (self.diagonal, self.spread, self.K, self.scalar, self.lead)
        if len(x) <= _BLOCK:
            rows = (x - centre).T.contiguous()
            return Gaussian(rows, centre.to(torch.float64), *own, reach2)
        rows = x.new_empty(x.shape[1], x.shape[0])
        for begin in range(0, len(x), _BLOCK):  # what is transposed stays in the cache
            end = begin + _BLOCK
            torch.sub(x[begin:end].T, centre.unsqueeze(-1), out=rows[:, begin:end])
        return Gaussian(rows, centre.to(torch.float64), *own, reach2)


def as_gaussian(group: Group, K: int, all_data: AllData | None = None) -> Gaussian | None:
    """The rule of Gaussian sites whose arguments differ between components only, or None.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        K: Number of components.
        all_data: What is known of all data, where the group holds a part of them.
    """
    if group.family is None or not group.observed or group.elements is not None:
        return None
    lead = 1 + group.n_plates
    if count_of_rows(group) is None:
        return None
    event = group.value.shape[lead + 1 :]
    form: GaussianForm | None = None
    if group.family.name == "MultivariateNormal" and len(event) == 1 and not group.event_dims:
        spread = next(n for n in group.arguments if n != "loc")
        if spread in ("covariance_matrix", "scale_tril"):
            form = GaussianForm(False, spread, K, False, lead)
    elif group.family.name == "Normal" and len(event) == group.event_dims <= 1:
        form = GaussianForm(True, "scale", K, group.event_dims == 0, lead)
    if form is None:
        return None
    centre = None if all_data is None else all_data.centres.get(group.members[0])
    return form.on(group.value, centre)
