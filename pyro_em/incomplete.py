r"""Normal vectors of which some coordinates are missing: what the seen ones say and predict.

With o the coordinates that are seen and m the others,

    log p(x_o) = log N(x_o | μ_o, Σ_oo),
    E[x_m | x_o] = μ_m + Σ_mo Σ_oo⁻¹ (x_o − μ_o),
    Cov[x_m | x_o] = Σ_mm − Σ_mo Σ_oo⁻¹ Σ_om.

One Cholesky factor of Σ with the seen coordinates first gives all three, and nothing is subtracted:

    Σ = [L_o 0; L_mo L_m] [L_o 0; L_mo L_m]ᵀ,   u = L_o⁻¹ (x_o − μ_o),
    (x_o − μ_o)ᵀ Σ_oo⁻¹ (x_o − μ_o) = ‖u‖²,   E[x_m | x_o] = μ_m + L_mo u,   Cov[x_m | x_o] = L_m L_mᵀ.

All rows that have seen the same coordinates share it.

Source: Little and Rubin (2002), section 11.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import unwrap
from pyro_em.pieces import PIECE, where_true

_BITS = 62  # coordinates whose pattern is one integer

FACTORS = 2**21  # numbers in the factors of some patterns that are held at once


class _RealOrMissing(constraints.Constraint):
    """Vectors of numbers, NaN where a coordinate is missing."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether no coordinate is infinite."""
        inside = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        for coordinate in value.unbind(-1):  # of all at once torch makes another number each
            inside &= ~where_true(torch.isinf, coordinate)
        return inside


class IncompleteMultivariateNormal(dist.MultivariateNormal):  # type: ignore[misc]
    """A MultivariateNormal whose values may hold NaN: such coordinates are integrated out.

    It has the arguments of the distribution that it was made from (`of`), with their gradients.

    Example:
        >>> full = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 9.0]]))
        >>> x = torch.tensor([torch.nan, 3.0])
        >>> same = dist.Normal(0.0, 3.0).log_prob(x[1])
        >>> bool(torch.isclose(IncompleteMultivariateNormal.of(full).log_prob(x), same))
        True
    """

    support = _RealOrMissing()

    @classmethod
    def of(cls, fn: Any) -> IncompleteMultivariateNormal:
        """The same distribution for values with missing coordinates.

        Args:
            fn: A MultivariateNormal, or a LowRankMultivariateNormal.
        """
        if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
            covariance = fn.covariance_matrix
            fn = dist.MultivariateNormal(fn.loc, covariance, validate_args=False)
        out: IncompleteMultivariateNormal = cls.__new__(cls)
        out.__dict__.update(vars(fn))
        return out

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of the coordinates that are seen, in nats; zero where none is. # (*batch)"""
        arguments = {"loc": self.loc, "scale_tril": self._unbroadcasted_scale_tril}
        log_p = marginal_log_density(value, arguments)
        batch = torch.broadcast_shapes(log_p.shape, self.batch_shape)
        return log_p.expand(batch)

    def imputed(self, value: Tensor) -> Tensor:
        """A value with its missing coordinates drawn, given the others. # (*batch, D)"""
        whole = self.sample()
        missing = torch.isnan(value)
        arguments = {"loc": whole, "scale_tril": self._unbroadcasted_scale_tril}
        # A draw of all coordinates, moved by what the seen ones differ from theirs.
        moved = whole + expected_deviation(value, arguments).to(whole.dtype)
        return torch.where(missing, moved, value)


def covariance_of(arguments: Mapping[str, Tensor]) -> Tensor:
    """The covariance matrix in float64, however it was given. # (*batch, D, D)"""
    if "covariance_matrix" in arguments:
        return arguments["covariance_matrix"].to(torch.float64)
    if "scale_tril" in arguments:
        tril = arguments["scale_tril"].to(torch.float64)
        return tril @ tril.mT
    root = torch.linalg.cholesky(arguments["precision_matrix"].to(torch.float64))
    return torch.cholesky_inverse(root)


@dataclass(frozen=True, eq=False)
class Patterns:
    """Rows by which coordinates they have seen.

    Attributes:
        seen: The distinct patterns. # (U, D)
        of_row: Which of them each row has. # (R,)
    """

    seen: Tensor
    of_row: Tensor

    def batches(self, most: int) -> list[tuple[Tensor, Tensor]]:
        """Patterns of about as many rows, with the places of these.

        Args:
            most: Patterns in one batch.

        Returns:
            For each batch its patterns # (u,) and their rows # (u, most rows), filled up by R.
        """
        of_row, rows = self.of_row, len(self.of_row)
        counts = torch.bincount(of_row, minlength=len(self.seen))
        order = torch.cat([of_row.argsort(stable=True), of_row.new_full((1,), rows)])
        begin = counts.cumsum(0) - counts
        size = counts.clamp(min=1).to(torch.float64).log2().ceil().long()
        out = []
        for one in size.unique().tolist():
            for own in ((size == one) & (counts > 0)).nonzero().squeeze(-1).split(most):
                if not len(own):
                    continue
                place = torch.arange(int(counts[own].max()), device=of_row.device)
                there = place < counts[own, None]
                at = torch.where(there, begin[own, None] + place, rows)
                out.append((own, order[at]))
        return out


def patterns_of(seen: Tensor) -> Patterns:
    """The distinct patterns of some rows.

    Args:
        seen: Which coordinates each row has seen. # (R, D)

    Example:
        >>> found = patterns_of(torch.tensor([[True, False], [True, True], [True, False]]))
        >>> found.seen[found.of_row].tolist()
        [[True, False], [True, True], [True, False]]
    """
    D = seen.shape[1]
    if D > _BITS:
        distinct, of_row = torch.unique(seen.to(torch.uint8), dim=0, return_inverse=True)
        return Patterns(distinct.bool(), of_row)
    of_row = torch.empty(len(seen), dtype=torch.long, device=seen.device)
    weights = 1 << torch.arange(D, device=seen.device)
    step = max(1, PIECE // max(D, 1))
    for own, rows in zip(of_row.split(step), seen.split(step), strict=True):
        torch.sum(rows * weights, -1, out=own)
    if len(seen) > 1 << D:  # a table of all patterns is less than what sorts the rows
        is_there = torch.bincount(of_row, minlength=1 << D) > 0
        code, place = is_there.nonzero().reshape(-1), is_there.cumsum(0) - 1
        for own in of_row.split(PIECE):
            own.copy_(place[own])
    else:
        code, of_row = torch.unique(of_row, return_inverse=True)
    bit = torch.arange(D, device=seen.device)
    return Patterns(((code.unsqueeze(-1) >> bit) & 1).bool(), of_row)


def distinct_patterns(parts: Iterable[Tensor]) -> Tensor:
    """The distinct patterns of many rows, without what each row has. # (U, D)

    Args:
        parts: Which coordinates rows have seen, some rows at a time. # (r, D) each

    Example:
        >>> first, second = torch.tensor([[True, False]]), torch.tensor([[True, True], [True, False]])
        >>> distinct_patterns([first, second]).tolist()
        [[True, False], [True, True]]
    """
    found: Tensor | None = None
    for seen in parts:
        found = patterns_of(seen if found is None else torch.cat([found, seen])).seen
    assert found is not None
    return found


def most_patterns(matrices: int, D: int) -> int:
    """Patterns whose factors are held at once: their memory is that of D² numbers per covariance."""
    return max(1, FACTORS // (matrices * D * D))


@dataclass(frozen=True, eq=False)
class Conditional:
    """What seen coordinates say of the others, for some patterns and covariances.

    Attributes:
        whiten: L_o⁻¹; zero in the columns of what is missing. # (*batch, D, D)
        log_det: log det L_o. # (*batch)
        gain: L_mo; zero in the rows of what is seen. # (*batch, D, D)
        root: L_m; zero in the rows of what is seen. # (*batch, D, D)
    """

    whiten: Tensor
    log_det: Tensor
    gain: Tensor
    root: Tensor

    @property
    def covariance(self) -> Tensor:
        """Cov[x | x_o]; zero for what is seen. # (*batch, D, D)"""
        return self.root @ self.root.mT


def conditional(covariance: Tensor, seen: Tensor) -> Conditional:
    """The factors of covariances with the seen coordinates first.

    Args:
        covariance: Σ. # (*batch, D, D)
        seen: Which coordinates are seen. # (*batch, D)
    """
    order = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)
    rows, columns = order.unsqueeze(-1), order.unsqueeze(-2)
    sorted_rows = covariance.take_along_dim(rows, -2)
    root = torch.linalg.cholesky(sorted_rows.take_along_dim(columns, -1))
    is_seen = seen.take_along_dim(order, -1)
    eye = torch.eye(seen.shape[-1], dtype=root.dtype, device=root.device).expand(root.shape)
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    back = order.argsort(-1)
    whiten = inverse * (is_seen.unsqueeze(-1) & is_seen.unsqueeze(-2))
    below = root.take_along_dim(back.unsqueeze(-1), -2) * (~seen).unsqueeze(-1)
    diagonal = torch.where(is_seen, root.diagonal(dim1=-2, dim2=-1), 1.0)
    return Conditional(
        whiten.take_along_dim(back.unsqueeze(-2), -1),
        diagonal.log().sum(-1),
        below * is_seen.unsqueeze(-2),
        below * ~is_seen.unsqueeze(-2),
    )


@dataclass(frozen=True, eq=False)
class _Laid:
    """Values and arguments as rows (dimensions of the data) by cells (all other dimensions).

    Attributes:
        y: x − μ, zero where missing. # (R, Q, D)
        covariance: Of each pattern, or of all. # (U or 1, Q or 1, D, D)
        patterns: Of the rows; one for each row where the covariance differs between rows.
        rows: The dimensions that are rows.
        cells: The others.
        shape: Sizes of all dimensions.
    """

    y: Tensor
    covariance: Tensor
    patterns: Patterns
    rows: list[int]
    cells: list[int]
    shape: list[int]

    def white(self) -> Iterator[tuple[Tensor, Tensor, Conditional, Tensor]]:
        """Per batch of patterns: which, their rows, their factors, and u. # …, (u, Q, D, rows)"""
        _, Q, D = self.y.shape
        y = torch.cat([self.y, self.y.new_zeros(1, Q, D)])
        most = most_patterns(self.covariance.shape[1], D)
        for own, rows in self.patterns.batches(most):
            covariance = self.covariance if len(self.covariance) == 1 else self.covariance[own]
            seen = self.patterns.seen[own].unsqueeze(1)
            seen = seen.expand(-1, covariance.shape[1], -1)
            found = conditional(covariance.expand(len(own), *covariance.shape[1:]), seen)
            yield own, rows, found, found.whiten @ y[rows].permute(0, 2, 3, 1)

    def restored(self, t: Tensor, event: int) -> Tensor:
        """From rows by cells back to the dimensions as they were. # (*shape, *event)"""
        order = self.rows + self.cells
        t = t.reshape([self.shape[d] for d in order] + list(t.shape[2:]))
        back = [order.index(d) for d in range(len(order))]
        return t.permute(back + [len(order) + i for i in range(event)])


def _laid(value: Tensor, arguments: Mapping[str, Tensor]) -> _Laid:
    """See `_Laid`.

    Args:
        value: # (*batch or 1s, D)
        arguments: ``loc`` # (*batch or 1s, D) and a spread # (*batch or 1s, D, D)
    """
    covariance, loc = covariance_of(arguments), arguments["loc"].to(torch.float64)
    n = max(value.dim() - 1, loc.dim() - 1, covariance.dim() - 2)
    value, loc = (t.reshape((1,) * (n + 1 - t.dim()) + t.shape) for t in (value, loc))
    covariance = covariance.reshape((1,) * (n + 2 - covariance.dim()) + covariance.shape)
    shape = list(torch.broadcast_shapes(value.shape[:n], loc.shape[:n], covariance.shape[:n]))
    rows = [d for d in range(n) if value.shape[d] > 1]
    cells = [d for d in range(n) if value.shape[d] == 1]
    order = rows + cells
    value, loc = (t.permute(*order, n) for t in (value, loc))
    covariance = covariance.permute(*order, n, n + 1)
    D, r = value.shape[-1], len(rows)
    seen = ~torch.isnan(value)
    x = torch.where(seen, value, 0.0).to(torch.float64)
    y = (x - loc) * seen
    R, Q = math.prod(value.shape[:r]), math.prod(shape[d] for d in cells)
    y = y.expand(*y.shape[:r], *(shape[d] for d in cells), D).reshape(R, Q, D)
    own = covariance.shape[r:n]
    each = Q if math.prod(own) > 1 else 1
    wide = [shape[d] for d in cells] if each > 1 else list(own)
    seen = seen.reshape(R, D)
    if math.prod(covariance.shape[:r]) == 1:
        covariance = covariance.expand(*(1,) * r, *wide, D, D).reshape(1, each, D, D)
        return _Laid(y, covariance, patterns_of(seen), rows, cells, shape)
    covariance = covariance.expand(*value.shape[:r], *wide, D, D).reshape(R, each, D, D)
    alone = Patterns(seen, torch.arange(R, device=value.device))
    return _Laid(y, covariance, alone, rows, cells, shape)


def marginal_log_density(value: Tensor, arguments: Mapping[str, Tensor]) -> Tensor:
    """log N(x_o | μ_o, Σ_oo) in nats; zero where nothing is seen.

    Args:
        value: NaN where missing. # (*batch or 1s, D)
        arguments: Of a MultivariateNormal. # (*batch or 1s, D), (*batch or 1s, D, D)

    Returns:
        # (*batch)

    Example:
        >>> x = torch.tensor([[torch.nan, torch.nan], [0.0, torch.nan]])
        >>> at = {"loc": torch.zeros(2), "covariance_matrix": torch.eye(2)}
        >>> [abs(round(v, 4)) for v in marginal_log_density(x, at).tolist()]
        [0.0, 0.9189]
    """
    laid = _laid(value, arguments)
    R, Q, _ = laid.y.shape
    out = laid.y.new_zeros(R + 1, Q)
    constant = 0.5 * math.log(2 * math.pi) * laid.patterns.seen.sum(-1)
    for own, rows, found, white in laid.white():
        log_p = -0.5 * (white * white).sum(-2)
        log_p = log_p - (constant[own, None] + found.log_det).unsqueeze(-1)
        out = out.index_put((rows,), log_p.mT)
    return laid.restored(out[:R], 0).to(_dtype(value, arguments))


def expected_deviation(value: Tensor, arguments: Mapping[str, Tensor]) -> Tensor:
    """E[x − μ | x_o], in float64; see `marginal_log_density`. # (*batch, D)"""
    laid = _laid(value, arguments)
    R, Q, D = laid.y.shape
    out = laid.y.new_zeros(R + 1, Q, D)
    for _own, rows, found, white in laid.white():
        out = out.index_put((rows,), (found.gain @ white).permute(0, 3, 1, 2))
    return laid.restored(laid.y + out[:R], 1)


def expected_covariance(
    weights: Tensor, value: Tensor, arguments: Mapping[str, Tensor], keep: tuple[bool, ...]
) -> Tensor:
    """Σ w Cov[x | x_o], summed over the dimensions that are not kept, in float64.

    Args:
        weights: # (*batch)
        value: NaN where missing. # (*batch or 1s, D)
        arguments: Of a MultivariateNormal; they do not vary along what is summed.
        keep: For each batch dimension, whether the result keeps it.

    Returns:
        # (*batch with 1 where summed, D, D)
    """
    laid = _laid(value, arguments)
    D, n = value.shape[-1], len(laid.shape)
    shape = torch.broadcast_shapes(weights.shape, tuple(laid.shape))
    order = laid.rows + laid.cells
    w = weights.to(torch.float64).expand(shape).permute(order)
    R, Q = laid.y.shape[:2]
    w = w.reshape(R, Q)
    U = len(laid.patterns.seen)
    if not any(keep[d] for d in laid.rows):
        mass = w.new_zeros(U, Q).index_add_(0, laid.patterns.of_row, w)
        total = w.new_zeros(Q, D, D)
        for own, _rows, found, _white in laid.white():
            total += (mass[own][..., None, None] * found.covariance).sum(0)
        total = total.reshape([1] * len(laid.rows) + [shape[d] for d in laid.cells] + [D, D])
    else:
        out = w.new_zeros(U, laid.covariance.shape[1], D, D)
        for own, _rows, found, _white in laid.white():
            out[own] = found.covariance
        total = w[..., None, None] * out[laid.patterns.of_row]
        total = total.reshape([shape[d] for d in order] + [D, D])
        summed = [i for i, d in enumerate(order) if d in laid.rows and not keep[d]]
        total = total.sum(summed, keepdim=True) if summed else total
    lost = [i for i, d in enumerate(order) if d in laid.cells and not keep[d]]
    total = total.sum(lost, keepdim=True) if lost else total
    back = [order.index(d) for d in range(n)]
    return total.permute(*back, n, n + 1)


def _dtype(value: Tensor, arguments: Mapping[str, Tensor]) -> torch.dtype:
    out = value.dtype
    for a in arguments.values():
        out = torch.promote_types(out, a.dtype)
    return out


def may_hold_nan(fn: Any) -> bool:
    """Whether an unwrapped distribution takes NaN for coordinates that are missing."""
    if isinstance(fn, dist.MixtureSameFamily):
        inner = unwrap(fn.component_distribution)[0]
        return may_hold_nan(inner)
    return isinstance(fn, IncompleteMultivariateNormal)


def drawn_given_seen(fn: Any, value: Tensor, missing: Tensor) -> Tensor:
    """Draws of missing entries given those of the same event that are seen.

    Args:
        fn: The marginal distribution of what is seen, as a site has it.
        value: Its value; anything where an entry is missing. # (*batch, *event)
        missing: Which entries are. # (*batch or 1s, *event)

    Returns:
        The value with draws in the place of what is missing. # (*batch, *event)
    """
    base = unwrap(fn)[0]
    if isinstance(base, IncompleteMultivariateNormal):
        whole = base.imputed(torch.where(missing, torch.nan, value))
    elif isinstance(base, dist.MixtureSameFamily) and _has_marginals(base):
        whole = _drawn_by_component(base, value, missing)
    else:
        whole = fn.sample()
    return torch.where(missing, whole.to(value.dtype), value)


def _has_marginals(mixture: Any) -> bool:
    """Whether the components of a MixtureSameFamily are those of what is seen."""
    return may_hold_nan(mixture) or bool(unwrap(mixture.component_distribution)[2])


def _drawn_by_component(mixture: Any, value: Tensor, missing: Tensor) -> Tensor:
    """A component given what is seen, and the rest given the component. # (*batch, *event)"""
    parts, event = mixture.component_distribution, len(mixture.event_shape)
    given = torch.where(missing, torch.nan, value) if may_hold_nan(mixture) else value
    given = given.unsqueeze(-1 - event)
    logits = mixture.mixture_distribution.logits + parts.log_prob(given)
    which = torch.distributions.Categorical(logits=logits).sample()
    inner = unwrap(parts)[0]
    is_normal = isinstance(inner, IncompleteMultivariateNormal)
    each = inner.imputed(given) if is_normal else parts.sample()
    each = each.expand(*logits.shape, *mixture.event_shape)
    at = which.reshape(*which.shape, *(1,) * (event + 1))
    return each.take_along_dim(at, logits.dim() - 1).squeeze(logits.dim() - 1)
