"""Rows with a linear predictor and a dispersion: mixtures of Gamma and negative binomial regressions.

With ζ = β_kᵀ x + offset and s_k = exp u_k, of which both are found together,

    Gamma               ℓ = s ζ − y exp ζ + (s − 1) log y − log Γ(s)
    negative binomial   ℓ = log Γ(y + s) − log Γ(s) − log y! + y ζ − (y + s) log(1 + exp ζ)

A mean in place of a rate has log s_k among the terms of ζ. What depends on s and a count alone is taken
once for each count that occurs, weighed by how often: no gamma function is evaluated row by row.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_em.densities.affine_rows import (
    as_coefficients,
    as_parameters,
    by_row,
    common_covariates,
    held,
    of_rows,
)
from pyro_em.densities.predicted import CELLS, Predicted, PredictedFit, Values
from pyro_em.densities.ridge import Ridge, are_read_elsewhere, may_be_ridge
from pyro_em.errors import Handover
from pyro_em.families import saddle_point
from pyro_em.families.predicted import GAMMA, digamma_rise, log_rising, trigamma_rise
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.regressions.coefficients import FAR
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.designs import designs_of
from pyro_em.updates.regressions.dispersed import Dispersed, dispersed_at, positive
from pyro_em.updates.regressions.idle import Moves
from pyro_em.updates.regressions.newton import climb
from pyro_em.updates.update import Newton, ParameterUpdate


@dataclass(frozen=True, eq=False)
class DispersedFit(PredictedFit):
    """Coordinates, and what rows need of the dispersions there.

    Attributes:
        shape: s. # (K,)
        table: What depends on s and a count, for each count that occurs; for Gammas − log Γ(s).
            # (K, counts) or (K, 1)
    """

    shape: Tensor
    table: Tensor


Weighed = tuple[Tensor, ...]
OfRows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""What goes to the value, what to log s, r ℓ′, −r ℓ″, and minus r times the mixed derivative where it
differs from row to row. # (K,), (K,), (K, rows) each"""

OfShapes = tuple[Tensor, Tensor, Tensor, Tensor]
"""Values, slopes and curvatures in log s, and mixed curvatures with what is the same for all rows.
# (K,) each, (K or 1, d or 1)"""


@dataclass(eq=False)
class DispersedRows(Predicted):
    """Rows with one predictor and one dispersion for each component.

    The last of a component's ``columns`` is that of its log s; one past the last where s is known.

    Attributes:
        y: Data. # (N,)
        offset: What is known of the predictor; None where nothing is. # (K or 1, N)
        known: What is known of log s. # (K,)
        logs: Which coordinates are logarithms of parameters. # (C,)
        largest: The shape beyond which data have no noise.
    """

    largest: ClassVar[float] = math.inf

    y: Tensor
    offset: Tensor | None
    known: Tensor
    logs: Tensor

    def enter(self, values: Values) -> DispersedFit:
        """The coordinates at parameter values."""
        theta = as_coefficients(self.block, values)
        return self._at(torch.where(self.logs, theta.log(), theta))

    def values(self, fit: PredictedFit) -> dict[str, Tensor]:
        """The parameters at coordinates."""
        return as_parameters(self.block, torch.where(self.logs, fit.beta.exp(), fit.beta))

    def m_step(
        self, fit: PredictedFit, moments: Tensor, mass: Tensor
    ) -> tuple[DispersedFit, Tensor]:
        """See `Predicted.m_step`; a dispersion that runs off is named by the M-step through tables."""
        weighed = self._weighed(moments)

        def of(beta: Tensor) -> Curved:
            found = self.with_prior(self._climbed(beta, moments, weighed), beta)
            return positive(found, self.logs)

        found = climb(of, fit.beta, moves=self._all_moves if self.ridge is None else None)
        off = torch.where(self.logs, found.last, 0.0).abs().amax()
        runs_off = not found.is_settled and (float(off) >= FAR or self.moves(found.last)[0] >= FAR)
        if runs_off or not bool(torch.isfinite(found.place).all()):
            raise Handover
        after = self.enter(self.values(PredictedFit(found.place)))
        if not bool((after.shape <= self.largest).all()):
            raise Handover  # the M-step through tables names data without noise
        return after, found.gain

    def curved(self, beta: Tensor, weights: Tensor, bent: bool = True) -> Curved:
        """See `Predicted.curved`."""
        return self._climbed(beta, weights, self._weighed(weights))

    def moves(self, step: Tensor) -> Moves:
        """See `Predicted.moves`; a dispersion is not looked at."""
        return self._moved_by(self._slopes(torch.where(self.logs, 0.0, step))[:, :-1])

    def _all_moves(self, step: Tensor) -> Moves:
        """The same, where a dispersion counts by itself."""
        (moved, size), log = self.moves(step), float(torch.where(self.logs, step, 0.0).abs().amax())
        return max(moved, log), max(size, log)

    def _shape(self, slopes: Tensor) -> Tensor:
        return (slopes[:, -1] + self.known).exp()

    def _eta(self, slopes: Tensor, rows: slice) -> Tensor:
        x = of_rows(self.x, rows)
        if self.offset is None:
            return slopes[:, :-1] @ x
        return torch.addmm(self.offset[:, rows], slopes[:, :-1], x)

    def _climbed(self, beta: Tensor, weights: Tensor, weighed: Weighed) -> Curved:
        """The expected log density of all rows, with its derivatives, in coordinates."""
        slopes = self._slopes(beta)
        (K, more), N = slopes.shape, self.x.shape[1]
        d, s = more - 1, self._shape(slopes)
        step = max(256, CELLS // (K * (d + 4)))
        plain, level = beta.new_zeros(2, K)
        slope, curve = beta.new_zeros(K, more), beta.new_zeros(K, more, more)
        within, across = beta.new_zeros(K * d, d), beta.new_zeros(K, d)
        for begin in range(0, N, step):
            rows = slice(begin, min(begin + step, N))
            x, r = of_rows(self.x, rows), weights[:, rows].to(torch.float64)
            own = self._of_rows(self._eta(slopes, rows), r, s.unsqueeze(-1), rows)
            plain += own[0]
            level += own[1]
            slope[:, :d] += own[2] @ x.T
            within.addmm_((own[3].unsqueeze(1) * x).reshape(K * d, -1), x.T)
            if own[4] is not None:
                across.addmm_(own[4], x.T)
        value, slope[:, d], curve[:, d, d], more_across = self._of_shapes(s, plain, level, weighed)
        curve[:, :d, :d] = within.reshape(K, d, d)
        curve[:, d, :d] = curve[:, :d, d] = across + more_across
        return Curved(value.sum(), *self._scattered(slope, curve, len(beta)))

    @abstractmethod
    def _at(self, beta: Tensor) -> DispersedFit:
        """What rows are evaluated with at coordinates."""

    @abstractmethod
    def _weighed(self, weights: Tensor) -> Weighed:
        """Sums over rows that do not depend on coordinates."""

    @abstractmethod
    def _of_rows(self, eta: Tensor, r: Tensor, s: Tensor, rows: slice) -> OfRows:
        """What a pass makes of some rows.

        Args:
            eta: ζ, which may be written. # (K, rows)
            r: Responsibilities. # (K, rows)
            s: # (K, 1)
            rows: Which rows.
        """

    @abstractmethod
    def _of_shapes(self, s: Tensor, plain: Tensor, level: Tensor, weighed: Weighed) -> OfShapes:
        """What depends on s alone, with the sums of a pass.

        Args:
            s: # (K,)
            plain: Σ of what `_of_rows` gives first. # (K,)
            level: Σ of what it gives second. # (K,)
            weighed: As `_weighed` returns.
        """


def _in_parts(weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Responsibilities of some rows at a time, in double precision: those of many are kept in single.

    Args:
        weights: # (K, N)
    """
    K, N = weights.shape
    step = max(256, CELLS // K)
    for begin in range(0, N, step):
        rows = slice(begin, min(begin + step, N))
        yield rows, weights[:, rows].to(torch.float64)


@dataclass(eq=False)
class GammaRows(DispersedRows):
    """Gammas: ζ is the logarithm of the rate.

    Attributes:
        log_y: Logarithms of the data. # (N,)
    """

    largest: ClassVar[float] = GAMMA.largest

    log_y: Tensor

    def _at(self, beta: Tensor) -> DispersedFit:
        s = self._shape(self._slopes(beta))
        if saddle_point.is_large(s):
            raise Handover
        return DispersedFit(beta, s, -s.lgamma().unsqueeze(-1))

    def log_density(self, fit: PredictedFit, features: slice, onto: Tensor | None = None) -> Tensor:
        """See `Predicted.log_density`."""
        assert isinstance(fit, DispersedFit)
        eta, s = self._eta(self._slopes(fit.beta), features), fit.shape.unsqueeze(-1)
        mean = eta.exp().mul_(self.y[features])
        out = eta.mul_(s).sub_(mean).addcmul_(s - 1, self.log_y[features]).add_(fit.table)
        return out if onto is None else out.add_(onto)

    def _weighed(self, weights: Tensor) -> Weighed:
        mass, logs = self.x.new_zeros(2, len(weights), dtype=torch.float64)
        sums = mass.new_zeros(len(weights), len(self.x))
        for rows, r in _in_parts(weights):
            mass += r.sum(-1)
            logs += r @ self.log_y[rows]
            sums += r @ of_rows(self.x, rows).T
        return mass, logs, sums

    def _of_rows(self, eta: Tensor, r: Tensor, s: Tensor, rows: slice) -> OfRows:
        mean = eta.exp().mul_(self.y[rows]).mul_(r)
        level = eta.mul_(r).sum(-1)
        return -mean.sum(-1), level, (r * s).sub_(mean), mean, None

    def _of_shapes(self, s: Tensor, plain: Tensor, level: Tensor, weighed: Weighed) -> OfShapes:
        mass, logs, sums = weighed
        total = s * (level + logs)
        lead = total - s * mass * s.digamma()
        curve = s * s * torch.special.polygamma(1, s) * mass - lead
        return total + plain - mass * s.lgamma(), lead, curve, -s.unsqueeze(-1) * sums


def _below(eta: Tensor) -> Tensor:
    """log(1 + exp −|ζ|): what log σ(ζ) and log σ(−ζ) have in common, with the sign changed."""
    return eta.abs().neg_().exp_().log1p_()


@dataclass(eq=False)
class CountRows(DispersedRows):
    """Negative binomials: ζ is the logit of a success.

    Attributes:
        counts: Those that occur. # (counts,)
        which: The place of each row's. # (N,)
    """

    counts: Tensor
    which: Tensor

    def _at(self, beta: Tensor) -> DispersedFit:
        s = self._shape(self._slopes(beta))
        table = log_rising(s.unsqueeze(-1), self.counts) - (self.counts + 1).lgamma()
        return DispersedFit(beta, s, table)

    def log_density(self, fit: PredictedFit, features: slice, onto: Tensor | None = None) -> Tensor:
        """See `Predicted.log_density`."""
        assert isinstance(fit, DispersedFit)
        eta, y = self._eta(self._slopes(fit.beta), features), self.y[features]
        s, out = fit.shape.unsqueeze(-1), fit.table.index_select(1, self.which[features])
        # y log σ(ζ) + s log σ(−ζ): of large counts two large terms would cancel in another form.
        out.sub_((y + s).mul_(_below(eta))).sub_(eta.clamp(min=0).mul_(s))
        out.add_(eta.clamp_(max=0).mul_(y))
        return out if onto is None else out.add_(onto)

    def _weighed(self, weights: Tensor) -> Weighed:
        found = weights.new_zeros(len(weights), len(self.counts), dtype=torch.float64)
        for rows, r in _in_parts(weights):
            found.index_add_(1, self.which[rows], r)
        return (found,)

    def _of_rows(self, eta: Tensor, r: Tensor, s: Tensor, rows: slice) -> OfRows:
        y, p = self.y[rows], torch.sigmoid(eta)
        log_p, wins = _below(eta).mul_(r), r * y
        level = log_p.sum(-1) + (eta.clamp(min=0) * r).sum(-1)
        plain = (eta.clamp(max=0) * wins).sum(-1) - log_p @ y - s.squeeze(-1) * level
        both = (y + s).mul_(r).mul_(p)
        return plain, -level, wins.sub_(both), both * torch.sigmoid(-eta), p.mul_(r).mul_(s)

    def _of_shapes(self, s: Tensor, plain: Tensor, level: Tensor, weighed: Weighed) -> OfShapes:
        (often,) = weighed
        wide = s.unsqueeze(-1)
        value = plain + (often * log_rising(wide, self.counts)).sum(-1)
        lead = s * ((often * digamma_rise(wide, self.counts)).sum(-1) + level)
        curve = -lead - s * s * (often * trigamma_rise(wide, self.counts)).sum(-1)
        return value, lead, curve, s.new_zeros(1, 1)


def as_dispersed(
    g: int, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values, K: int
) -> DispersedRows | None:
    """A group with a predictor and a dispersion, with all of its parameters, or None.

    Args:
        g: A group whose members and plates are the rows.
        graph: The collapsed graph.
        updates: What was decided.
        values: Parameter values, for their shapes.
        K: Number of components.
    """
    group = graph.groups[g]
    found = dispersed_at(g, group, graph.parameters)
    if found is None or not group.observed or group.event_dims or group.elements is not None:
        return None
    names = found.params
    if set(names) != set(group.params) or not _are_found_here(g, names, graph, updates, values):
        return None
    lead, block = 1 + group.n_plates, updates[names[0]].block
    rates = [a for a in found.bindings if a != found.form.shape]
    if len(rates) != 1 or group.value.numel() != group.value.shape[:lead].numel():
        return None
    rate = found.bindings[rates[0]]
    parts = designs_of(rate, block, values, lead)
    read = common_covariates(parts)
    rows = torch.Size((len(group.members), *group.sizes[: group.n_plates]))
    sizes = rate.constant.shape[:lead]
    if read is None or len(parts) not in (1, K) or len(read[0]) != sizes.numel():
        return None
    total = sum(values[name].numel() for name in block)
    shape = _shapes(found, group, block, values, K, total)
    if shape is None:
        return None
    x, columns = read
    sign = -1.0 if group.distribution == "GammaPoisson" else 1.0
    x = by_row(x if sign > 0 else -x, sizes, rows)
    offset = None
    if not rate.is_without_constant:
        known = sign * by_row(rate.constant, sizes, rows)
        offset = known if bool(known.any()) else None
    columns = torch.cat([columns.expand(K, -1), shape[0].unsqueeze(-1)], 1)
    logs = {name for b in found.bindings.values() for name in b.logs}
    is_log = [torch.full((values[n].numel(),), n in logs, device=x.device) for n in block]
    y = by_row(group.value, group.value.shape[:lead], rows).reshape(-1)
    if group.distribution != "Gamma" and saddle_point.is_large(y):
        return None
    parameters = tuple(held(p, values) for p in block)
    own = (x, columns, parameters, y, offset, shape[1], torch.cat(is_log))
    ridge = Ridge.of(block, graph, updates, values)
    if group.distribution == "Gamma":
        if not bool((y > 0).all()):  # an end of the support: the step through tables names the row
            return None
        return GammaRows(*own, y.log(), ridge=ridge)
    return CountRows(*own, *torch.unique(y, return_inverse=True), ridge=ridge)


def _are_found_here(
    g: int,
    names: Sequence[str],
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
) -> bool:
    """Whether some parameters are found from this group alone, all of them together."""
    own = set(names)
    if are_read_elsewhere(graph, own, g):
        return False
    return len({values[p].dtype for p in own}) == 1 and all(
        isinstance(updates[p].update, Newton)
        and set(updates[p].block) == own
        and may_be_ridge(graph, updates, p)
        for p in own
    )


def _shapes(
    found: Dispersed, group: Group, block: Sequence[str], values: Values, K: int, total: int
) -> tuple[Tensor, Tensor] | None:
    """The coordinate of each component's log s, and what is known of it; None where rows differ.

    # (K,), (K,)
    """
    lead, name = 1 + group.n_plates, found.form.shape
    binding = found.bindings.get(name)
    known = group.arguments[name].detach().log() if binding is None else binding.constant
    known = known.to(torch.float64)
    if known.shape[:lead].numel() != 1 or known.numel() not in (1, K):
        return None
    known = known.reshape(-1).expand(K).contiguous()
    if binding is None:
        return torch.full((K,), total, device=known.device), known
    columns = []
    for which, J in designs_of(binding, block, values, lead):
        if J.shape != (1, 1) or float(J) != 1.0:
            return None
        columns.append(which)
    return torch.cat(columns).expand(K), known
