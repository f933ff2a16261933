"""Rows of vectors whose mean is a line in known covariates: multivariate regressions, autoregressions.

    ℓ_k(y | x) = −½ ‖L_k⁻¹ e_k‖² − log |L_k| − ½ D log 2π,     e_k = y − B_k x,     Σ_k = L_k L_kᵀ

With G = Σ r x xᵀ, m = Σ r e xᵀ and q = Σ r e eᵀ of each component, the coefficients move by δ with

    (Σ_k Jᵀ (Λ_k ⊗ G_k) J) δ = Σ_k Jᵀ vec(Λ_k m_k),

where J says which coefficient stands where in B_k; where each stands in one place only Λ cancels,
δ = m G⁺. The scatter about the new lines is q − δ mᵀ − m δᵀ + δ G δᵀ. Nothing of the size of the data
is kept, and residuals do not cancel, as products of uncentred data would.
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
    common_covariates,
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
from pyro_em.graph.bindings.binding import PRODUCT, whole_matrices
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.expectations.scatter import data_magnitude
from pyro_em.updates.regressions.designs import designs_of
from pyro_em.updates.regressions.pseudo_inverse import pseudo_solve, solve_each
from pyro_em.updates.update import ClosedForm, LeastSquares, ParameterUpdate

Values = Mapping[str, Tensor]

Features = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class VectorFit(AtCoefficients):
    """Lines at some parameter values.

    Attributes:
        beta: All coefficients, one after the other. # (C,)
        slopes: B of each component. # (K, D, d)
        spread: Covariances, or their factors, or standard deviations: as the parameter is.
            # (K, D, D) or (K, D)
        root: Cholesky factors, or standard deviations. # (K, D, D) or (K, D)
        whitener: Their inverses. # like root
        log_det: log |L|. # (K, 1)
    """

    beta: Tensor
    slopes: Tensor
    spread: Tensor
    root: Tensor
    whitener: Tensor
    log_det: Tensor


@dataclass(eq=False)
class VectorLines(PlainRows, WithRidge):
    """A group of vectors with an affine mean, with its M-step.

    Attributes:
        x: Covariates, the same for all entries of the vectors. # (d, N)
        y: Data, less what no parameter reaches. # (D, N)
        columns: Which coefficients they multiply. # (K, D, d)
        block: The parameters that the coefficients are, with their shapes and dtypes.
        argument: The argument that is the spread.
        scale: The parameter that is the spread; None where it is known.
        known: Spreads, where they are known. # (K, D, D) or (K, D)
        least: The smallest clear variance. # (K or 1, D)
        is_shared: Whether all components have one spread.
        is_factor: Whether the spread's parameter is a factor A of covariances A Aᵀ.
        is_apart: Whether each coefficient stands in one place only.
        full: The places of `unfolding`. # (d * d,)
        squares: Products of the covariates, where these are few; else None. # (P, N)
    """

    x: Tensor
    y: Tensor
    columns: Tensor
    block: tuple[Held, ...]
    argument: str
    scale: Held | None
    known: Tensor
    least: Tensor
    is_shared: bool
    is_factor: bool = False
    is_apart: bool = field(init=False)
    full: Tensor = field(init=False)
    squares: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        d = self.x.shape[0]
        self.full = unfolding(d, self.x.device)
        self.squares = products_of(self.x) if d <= 4 else None
        self.is_apart = self.ridge is None and len(self.columns.unique()) == self.columns.numel()

    @property
    def diagonal(self) -> bool:
        """Whether entries are independent given the component."""
        return self.argument == "scale"

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        (K, D, d) = self.columns.shape
        return (0 if self.squares is not None else d * (d + 1) // 2) + 2 * K * D

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that are held."""
        names = [name for name, _, _ in self.block]
        return tuple(names if self.scale is None else [*names, self.scale[0]])

    def enter(self, values: Values) -> VectorFit:
        """The lines at parameter values."""
        beta = as_coefficients(self.block, values)
        spread = self.known
        if self.scale is not None:
            own = values[self.scale[0]].to(torch.float64)
            own = PRODUCT.forward(own) if self.is_factor else own
            spread = own.reshape(-1, *self.known.shape[1:]).expand(self.known.shape)
        return self._fit(beta, spread)

    def _fit(self, beta: Tensor, spread: Tensor) -> VectorFit:
        slopes = beta[self.columns]
        if self.diagonal:
            log_det = spread.log().sum(-1, keepdim=True)
            return VectorFit(beta, slopes, spread, spread, spread.reciprocal(), log_det)
        root = torch.linalg.cholesky(spread) if self.argument == "covariance_matrix" else spread
        one = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        whitener = torch.linalg.solve_triangular(root, one.expand_as(root), upper=False)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        return VectorFit(beta, slopes, spread, root, whitener, log_det)

    def values(self, fit: VectorFit) -> dict[str, Tensor]:
        """The parameters of the lines."""
        out = as_parameters(self.block, fit.beta)
        if self.scale is not None:
            name, shape, dtype = self.scale
            spread = fit.root if self.is_factor else fit.spread
            spread = spread[:1] if self.is_shared else spread
            out[name] = spread.reshape(shape).to(dtype)
        return out

    def features(self, rows: slice, fit: VectorFit) -> Features:
        """Covariates, their products and residuals. # (d, rows), (P, rows), (K, D, rows)"""
        x = of_rows(self.x, rows)
        squares = products(x) if self.squares is None else self.squares[:, rows]
        K, D, d = self.columns.shape
        fitted = (fit.slopes.reshape(K * D, d) @ x).reshape(K, D, -1)
        return x, squares, self.y[:, rows] - fitted

    def log_density(self, fit: VectorFit, features: Features, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        e = features[2]
        white = fit.whitener.unsqueeze(-1) * e if self.diagonal else fit.whitener @ e
        constant = -fit.log_det - 0.5 * e.shape[1] * math.log(2 * math.pi)
        constant = constant if onto is None else constant + onto
        return constant - 0.5 * (white * white).sum(1)

    def moments(self, fit: VectorFit, weights: Tensor, features: Features) -> Tensor:
        """Σ r x xᵀ, Σ r e xᵀ and Σ r e eᵀ of some rows. # (K, P + D d + D D) or (K, P + D d + D)"""
        x, squares, e = features
        r = weights.to(torch.float64)
        weighted = r.unsqueeze(1) * e
        K, D, n = weighted.shape
        cross = weighted.reshape(K * D, n) @ x.T
        second = (weighted * e).sum(-1) if self.diagonal else weighted @ e.mT
        return torch.cat([r @ squares.T, cross.reshape(K, -1), second.reshape(K, -1)], 1)

    def about(self, before: VectorFit, now: VectorFit, moments: Tensor, mass: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`."""
        G, m, q = self._parted(moments)
        delta = now.slopes - before.slopes
        along = delta @ G
        if self.diagonal:
            moved = q + (delta * (along - 2 * m)).sum(-1)
        else:
            cross = delta @ m.mT
            moved = q - cross - cross.mT + along @ delta.mT
        d = self.columns.shape[-1]
        squares = moments[:, : d * (d + 1) // 2]
        return torch.cat([squares, (m - along).flatten(1), moved.flatten(1)], 1)

    def m_step(self, fit: VectorFit, moments: Tensor, mass: Tensor) -> tuple[VectorFit, Tensor]:
        """The maximiser, and by how much it raises the expected log joint, in nats.

        Args:
            fit: At the E-step.
            moments: As `moments` returns, summed. # (K, P + D d + …)
            mass: Σ r. # (K,)

        Raises:
            Handover: If a component has too little mass or fits its data exactly.
        """
        G, m, q = self._parted(moments)
        beta = fit.beta + self._step(fit, G, m)
        beta = beta.to(self.block[0][2]).to(torch.float64)
        if not bool(torch.isfinite(beta).all()):
            raise Handover
        delta = beta[self.columns] - fit.slopes
        moved = delta @ G
        if self.diagonal:
            rest = q - 2 * (delta * m).sum(-1) + (moved * delta).sum(-1)
        else:
            cross = delta @ m.mT
            rest = q - cross - cross.mT + moved @ delta.mT
        spread = fit.spread if self.scale is None else self._spread(rest, mass)
        after = self._fit(beta, spread)
        gain = -mass @ (after.log_det - fit.log_det).squeeze(-1)
        gain = gain - 0.5 * (_traces(after, rest) - _traces(fit, q)).sum()
        return after, gain + self.log_prior(after) - self.log_prior(fit)

    def _parted(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G, m and q of each component. # (K, d, d), (K, D, d), (K, D, D) or (K, D)"""
        K, D, d = self.columns.shape
        P = d * (d + 1) // 2
        G = moments[:, :P][:, self.full].reshape(K, d, d)
        m = moments[:, P : P + D * d].reshape(K, D, d)
        return G, m, moments[:, P + D * d :].reshape(self.known.shape)

    def _step(self, fit: VectorFit, G: Tensor, m: Tensor) -> Tensor:
        """By how much all coefficients move. # (C,)"""
        K, D, d = self.columns.shape
        flat = self.columns.reshape(-1)
        if self.is_apart:
            systems = G.unsqueeze(1).expand(K, D, d, d).reshape(K * D, d, d)
            own = solve_each(systems, m.reshape(K * D, d))
            return torch.zeros_like(fit.beta).index_add_(0, flat, own.reshape(-1))
        W = torch.diag_embed(fit.whitener) if self.diagonal else fit.whitener
        precision, C = W.mT @ W, len(fit.beta)
        both = torch.einsum("kab,kij->kaibj", precision, G)  # (K, D, d, D, d)
        wide = self.columns.reshape(K, D * d)
        place = wide.unsqueeze(2) * C + wide.unsqueeze(1)
        gram = G.new_zeros(C * C).index_add_(0, place.reshape(-1), both.reshape(-1))
        moment = G.new_zeros(C).index_add_(0, flat, (precision @ m).reshape(-1))
        gram = gram.reshape(C, C)
        if self.ridge is not None:
            prior = self.ridge.curved(fit.beta)
            gram, moment = gram + prior.curvature, moment + prior.gradient
        return pseudo_solve(gram, moment)

    def _spread(self, rest: Tensor, mass: Tensor) -> Tensor:
        """The spreads of residuals, as the parameter has them. # (K, D, D) or (K, D)"""
        each = mass.reshape(-1, *(1,) * (rest.dim() - 1))
        D = rest.shape[1]
        if self.is_shared:
            variance = (rest.sum(0) / each.sum(0)).expand_as(rest)
        else:
            variance = rest / each
        if self.diagonal:
            clear, few = (variance - self.least).amin(), 1.6
            spread = variance.clamp(min=0).sqrt()
        else:
            variance = (variance + variance.mT) / 2
            root, info = torch.linalg.cholesky_ex(variance)
            pivots = root.diagonal(dim1=-2, dim2=-1).square()
            variances = variance.diagonal(dim1=-2, dim2=-1)
            clear, few = (pivots - self.least - 1e-7 * variances).amin(), D + 1.1
            if bool((info != 0).any()):
                raise Handover
            spread = variance if self.argument == "covariance_matrix" else root
        if not (float(clear) > 0 and float(mass.sum() if self.is_shared else mass.amin()) > few):
            raise Handover
        assert self.scale is not None
        dtype = self.scale[2]
        return spread if dtype == torch.float64 else spread.to(dtype).to(torch.float64)


def _traces(fit: VectorFit, scatter: Tensor) -> Tensor:
    """tr(Σ⁻¹ S) of each component. # (K,)"""
    if scatter.dim() == 2:
        return (fit.whitener.square() * scatter).sum(-1)
    return ((fit.whitener @ scatter) * fit.whitener).sum((-2, -1))


def as_vector_lines(
    g: int, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values, K: int
) -> VectorLines | None:
    """The lines of a group of vectors, with all of its parameters, or None.

    Args:
        g: A group whose members and plates are the rows.
        graph: The collapsed graph.
        updates: What was decided.
        values: Parameter values, for their shapes.
        K: Number of components.
    """
    group = graph.groups[g]
    if group.family is None or not group.observed or group.elements is not None:
        return None
    if (group.family.name, group.event_dims) not in (("MultivariateNormal", 0), ("Normal", 1)):
        return None
    loc = group.bindings["loc"]
    if loc.how != "affine":
        return None
    if not are_found_alone(loc.params, LeastSquares, g, "loc", graph, updates, values):
        return None
    lead = 1 + group.n_plates
    rows = torch.Size((len(group.members), *group.sizes[: group.n_plates]))
    block = updates[loc.params[0]].block
    parts = designs_of(loc, block, values, lead)
    offset = loc.constant
    D, sizes = offset.shape[-1], offset.shape[:lead]
    found, cells = common_covariates(parts), len(parts) // D
    if found is None or cells not in (1, K):
        return None
    x, columns = found
    if group.value.shape[:lead] != rows or group.value.shape[-1] != D or len(x) != sizes.numel():
        return None
    argument, scale, known = _spread_of(g, graph, updates, values, K)
    if known is None:
        return None
    least = torch.zeros(1, D, dtype=torch.float64, device=x.device)
    if scale is not None:
        magnitude = data_magnitude(updates[scale[0]], graph, values[scale[0]]).to(torch.float64)
        update = updates[scale[0]].update
        assert isinstance(update, ClosedForm)
        least = (1e-6 * magnitude).square().reshape(-1, D).clamp(min=update.floor)
        if update.floor > 0 and argument != "scale":
            return None
    y = group.value if loc.is_without_constant else group.value - once_each(offset)
    y = y.to(torch.float64).flatten(lead, -2).movedim(-2, 0)
    y = y.reshape(len(y), -1, D)
    if len(y) > 1:
        noise = 8 * torch.finfo(offset.dtype).eps * float(y.abs().max())
        if not bool(((y - y[:1]).abs() <= noise).all()):
            return None  # what is known of a mean differs between components
    return VectorLines(
        by_row(x, sizes, rows),
        y[0].T.contiguous(),
        columns.reshape(cells, D, -1).expand(K, -1, -1).contiguous(),
        tuple(held(p, values) for p in block),
        argument,
        scale,
        known,
        least,
        scale is not None and math.prod(scale[1]) == known[0].numel(),
        scale is not None and whole_matrices(group.bindings[argument], values)[1],
        ridge=Ridge.of(block, graph, updates, values),
    )


def _spread_of(
    g: int,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    K: int,
) -> tuple[str, Held | None, Tensor | None]:
    """The argument of the spread, its parameter if it has one, and its values; None if none serve."""
    group: Group = graph.groups[g]
    argument = next(n for n in group.arguments if n != "loc")
    lead, tail = 1 + group.n_plates, 1 if argument == "scale" else 2
    given = group.arguments[argument].detach()
    D = group.bindings["loc"].constant.shape[-1]
    square = (D,) * tail
    if argument not in ("scale", "covariance_matrix", "scale_tril"):
        return argument, None, None
    batch = given.shape[: given.dim() - tail]
    if batch[:lead].numel() != 1 or batch[lead:].numel() not in (1, K):
        return argument, None, None
    known = given.to(torch.float64).expand(*batch, *square).reshape(-1, *square)
    known = known.expand(K, *square)
    binding = group.bindings[argument]
    if binding.how == "constant":
        return argument, None, known
    name, is_factor = whole_matrices(binding, values)
    if is_factor and argument != "covariance_matrix":
        return argument, None, None
    if name is None or not isinstance(updates[name].update, ClosedForm) or updates[name].priors:
        return argument, None, None
    if given.shape[given.dim() - tail :] != square:
        return argument, None, None
    if sum(name in other.params for other in graph.groups) != 1:
        return argument, None, None
    interval = bounds(graph.parameters[name].constraint)
    if tail == 1 and (interval is None or interval[0] > 0 or interval[1] < math.inf):
        return argument, None, None
    return argument, held(name, values), known
