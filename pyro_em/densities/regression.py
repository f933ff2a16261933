"""Rows of a Normal whose mean is a line in known covariates: mixtures of regressions.

    ℓ_k(y | x) = −½ (e_k / σ_k)² − log σ_k − ½ log 2π,     e_k = y − β_kᵀ x

With G = Σ r x xᵀ, m = Σ r e x, q = Σ r e² per component, weighted least squares for all coefficients
at once is δ = (Σ_k G_k / σ_k²)⁺ Σ_k m_k / σ_k², and the residual sum of squares at β + δ is
q − 2 δᵀm + δᵀG δ. Coefficients may be shared between components. Residuals do not cancel, as
products of uncentred data would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.densities.affine_rows import (
    AtCoefficients,
    Held,
    are_found_alone,
    as_coefficients,
    as_parameters,
    by_row,
    held,
    of_rows,
    products_of,
)
from pyro_em.densities.density import PlainRows
from pyro_em.densities.pairs import products, unfolding
from pyro_em.densities.ridge import Ridge, WithRidge
from pyro_em.distributions import bounds
from pyro_em.errors import Handover
from pyro_em.expanded import once_each
from pyro_em.graph.bindings.binding import Binding, whole_parameter
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.expectations.scatter import data_magnitude
from pyro_em.updates.regressions.designs import designs_of
from pyro_em.updates.regressions.pseudo_inverse import pseudo_solve
from pyro_em.updates.update import ClosedForm, LeastSquares, ParameterUpdate

Values = Mapping[str, Tensor]


_NORMAL = ("Normal", "LogNormal")  # of numbers, or of their logarithms

Features = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Fit(AtCoefficients):
    """Lines at some parameter values.

    Attributes:
        beta: All coefficients, one after the other. # (C,)
        slopes: Those of each component. # (K, d)
        sigma: Standard deviations. # (K, 1)
    """

    beta: Tensor
    slopes: Tensor
    sigma: Tensor


@dataclass(eq=False)
class Lines(PlainRows, WithRidge):
    """A Normal group with an affine mean, with its M-step.

    Attributes:
        x: Covariates, the same for all components. # (d, N)
        y: Data, less what no parameter reaches. # (K or 1, N)
        columns: Which coefficients they multiply. # (K, d)
        block: The parameters that the coefficients are, with their shapes and dtypes.
        scale: The parameter that is the standard deviation; None where it is known.
        sigma: Standard deviations that are known. # (K, 1)
        least: The smallest clear variance. # (K or 1, 1)
        is_shared: Whether all components have one standard deviation.
        full: The places of `unfolding`. # (d * d,)
        squares: Products of the covariates, where these are few; else None. # (P, N)
        base: What of a log density no parameter reaches: −log x of a LogNormal. # (N,)
    """

    x: Tensor
    y: Tensor
    columns: Tensor
    block: tuple[Held, ...]
    scale: Held | None
    sigma: Tensor
    least: Tensor
    is_shared: bool
    full: Tensor = field(init=False)
    squares: Tensor | None = field(init=False)
    base: Tensor | None = None

    def __post_init__(self) -> None:
        d = self.x.shape[0]
        self.full = unfolding(d, self.x.device)
        # Only few products are stored, so that memory stays within three times the data.
        self.squares = products_of(self.x) if d <= 4 else None

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        d, K = self.x.shape[0], self.columns.shape[0]
        return (0 if self.squares is not None else d * (d + 1) // 2) + 2 * K

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that are held."""
        names = [name for name, _, _ in self.block]
        return tuple(names if self.scale is None else [*names, self.scale[0]])

    def enter(self, values: Values) -> Fit:
        """The lines at parameter values."""
        beta = as_coefficients(self.block, values)
        sigma = self.sigma
        if self.scale is not None:
            sigma = values[self.scale[0]].reshape(-1, 1).to(torch.float64).expand(self.sigma.shape)
        return Fit(beta, beta[self.columns], sigma)

    def values(self, fit: Fit) -> dict[str, Tensor]:
        """The parameters of the lines."""
        out = as_parameters(self.block, fit.beta)
        if self.scale is not None:
            name, shape, dtype = self.scale
            sigma = fit.sigma[:1] if self.is_shared else fit.sigma
            out[name] = sigma.reshape(shape).to(dtype)
        return out

    def features(self, rows: slice, fit: Fit) -> Features:
        """Covariates, their products, residuals, and what no parameter reaches.

        # (d, rows), (P, rows), (K, rows), (rows,)
        """
        x = of_rows(self.x, rows)
        squares = products(x) if self.squares is None else self.squares[:, rows]
        base = None if self.base is None else self.base[rows]
        return x, squares, torch.addmm(self.y[:, rows], fit.slopes, x, alpha=-1), base

    def log_density(self, fit: Fit, features: Features, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        constant = -fit.sigma.log() - 0.5 * math.log(2 * math.pi)
        constant = constant if onto is None else constant + onto
        constant = constant if features[3] is None else constant + features[3]
        standard = features[2] / fit.sigma
        return torch.addcmul(constant, standard, standard, value=-0.5)

    def moments(self, fit: Fit, weights: Tensor, features: Features) -> Tensor:
        """Σ r x xᵀ, Σ r e x and Σ r e² of some rows. # (K, P + d + 1)"""
        x, squares, e, _ = features
        r = weights.to(torch.float64)
        weighted = r * e
        rest = (weighted * e).sum(1, keepdim=True)
        return torch.cat([r @ squares.T, weighted @ x.T, rest], 1)

    def about(self, before: Fit, now: Fit, moments: Tensor, mass: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`."""
        K, d = self.columns.shape
        P = d * (d + 1) // 2
        G = moments[:, :P][:, self.full].reshape(K, d, d)
        m, q = moments[:, P:-1], moments[:, -1:]
        delta = now.slopes - before.slopes
        along = (G @ delta.unsqueeze(-1)).squeeze(-1)
        moved = q + (delta * (along - 2 * m)).sum(1, keepdim=True)
        return torch.cat([moments[:, :P], m - along, moved], 1)

    def m_step(self, fit: Fit, moments: Tensor, mass: Tensor) -> tuple[Fit, Tensor]:
        """The maximiser, and by how much it raises the expected log joint, in nats.

        Args:
            fit: At the E-step.
            moments: As `moments` returns, summed. # (K, P + d + 1)
            mass: Σ r. # (K,)

        Raises:
            Handover: If a component has too little mass or fits its data exactly.
        """
        K, d = self.columns.shape
        P, C = d * (d + 1) // 2, len(fit.beta)
        G = moments[:, :P][:, self.full].reshape(K, d, d)
        m, q = moments[:, P:-1], moments[:, -1:]
        precision = fit.sigma**-2
        place = self.columns.unsqueeze(2) * C + self.columns.unsqueeze(1)
        gram = G.new_zeros(C * C).index_add_(
            0, place.reshape(-1), (G * precision.unsqueeze(-1)).reshape(-1)
        )
        moment = G.new_zeros(C).index_add_(0, self.columns.reshape(-1), (m * precision).reshape(-1))
        gram = gram.reshape(C, C)
        prior = None if self.ridge is None else self.ridge.curved(fit.beta)
        if prior is not None:
            gram, moment = gram + prior.curvature, moment + prior.gradient
        beta = fit.beta + pseudo_solve(gram, moment)
        beta = beta.to(self.block[0][2]).to(torch.float64)
        slopes = beta[self.columns]
        delta = (slopes - fit.slopes).unsqueeze(-1)
        curve = (delta.mT @ G @ delta).squeeze(-1)
        rest = q - 2 * (delta.squeeze(-1) * m).sum(1, keepdim=True) + curve  # (K, 1)
        each = mass.unsqueeze(-1)
        sigma = fit.sigma
        if self.scale is not None:
            if self.is_shared:
                variance = (rest.sum(0) / each.sum(0)).expand_as(sigma)
            else:
                variance = rest / each
            enough = float(mass.sum() if self.is_shared else mass.amin()) > 1.6
            if not (float((variance - self.least).amin()) > 0 and enough):
                raise Handover
            sigma = variance.sqrt()
            if self.scale[2] != torch.float64:
                sigma = sigma.to(self.scale[2]).to(torch.float64)
        if not bool(torch.isfinite(beta).all()):
            raise Handover
        gain = -each * (sigma / fit.sigma).log() - 0.5 * (rest * sigma**-2 - q * precision)
        total = gain.sum()
        if self.ridge is not None and prior is not None:
            total = total + self.ridge.curved(beta).value - prior.value
        return Fit(beta, slopes, sigma), total


def as_lines(
    g: int, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values, K: int
) -> Lines | None:
    """The lines of a group, with all of its parameters, or None.

    Args:
        g: A group whose members and plates are the rows.
        graph: The collapsed graph.
        updates: What was decided.
        values: Parameter values, for their shapes.
        K: Number of components.
    """
    group = graph.groups[g]
    if group.family is None or group.family.name not in _NORMAL or not group.observed:
        return None
    loc, spread = group.bindings["loc"], group.bindings["scale"]
    if loc.how != "affine" or group.event_dims:
        return None
    lead = 1 + group.n_plates
    rows = (len(group.members), *group.sizes[: group.n_plates])
    if not are_found_alone(loc.params, LeastSquares, g, "loc", graph, updates, values):
        return None
    block = updates[loc.params[0]].block
    offset = loc.constant
    parts = designs_of(loc, block, values, lead)
    x = parts[0][1]
    same = len(parts) in (1, K) and all(
        design is x or (design.shape == x.shape and torch.equal(design, x)) for _, design in parts
    )
    sizes = offset.shape[:lead]  # a covariate may be the same for all sequences, or at all steps
    if not same or tuple(group.value.shape[:lead]) != rows or len(x) != sizes.numel():
        return None
    scale, sigma = _spread(group, spread, graph, updates, values, K)
    if sigma is None:
        return None
    least = torch.zeros(1, 1, dtype=torch.float64, device=x.device)
    if scale is not None:
        magnitude = data_magnitude(updates[scale[0]], graph, values[scale[0]])
        least = (1e-6 * magnitude.to(torch.float64)).square().reshape(-1, 1)
        update = updates[scale[0]].update
        assert isinstance(update, ClosedForm)
        least = least.clamp(min=update.floor)
    which = torch.stack([c for c, _ in parts]).expand(K, -1)
    known = once_each(offset)
    y = group.value
    base: Tensor | None = None
    if group.family.name == "LogNormal":
        y = y.to(torch.float64).log()
        base = -y.reshape(-1)
    y = y - known if bool(known.any()) else y  # which many rows have no copy of
    y = y.to(torch.float64).movedim(lead, 0)
    y = y.reshape(len(y), -1)
    if len(y) > 1:
        noise = 8 * torch.finfo(loc.constant.dtype).eps * float(y.abs().max())
        y = y[:1].clone() if bool(((y - y[:1]).abs() <= noise).all()) else y
    return Lines(
        by_row(x, sizes, rows),
        y.contiguous(),
        which,
        tuple(held(p, values) for p in block),
        scale,
        sigma,
        least,
        scale is not None and math.prod(scale[1]) == 1,
        ridge=Ridge.of(block, graph, updates, values),
        base=base,
    )


def _spread(
    group: Group,
    binding: Binding,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    K: int,
) -> tuple[Held | None, Tensor | None]:
    """The parameter of the standard deviation, or what is known of it."""
    argument = group.arguments["scale"].detach()
    lead = 1 + group.n_plates
    if argument.shape[:lead].numel() != 1 or argument.shape[lead] not in (1, K):
        return None, None
    sigma = argument.reshape(-1, 1).to(torch.float64).expand(K, 1)
    if binding.how == "constant":
        return None, sigma
    name = whole_parameter(binding, values)
    if name is None or not isinstance(updates[name].update, ClosedForm):
        return None, None
    interval = bounds(graph.parameters[name].constraint)
    alone = sum(name in other.params for other in graph.groups) == 1
    if not alone or interval is None or interval[0] > 0 or interval[1] < math.inf:
        return None, None
    return held(name, values), sigma
