"""Rows whose log density is concave in a linear predictor: mixtures of generalised linear models.

    ℓ_k(y | x) = n η − d A(η) + h,     η = β_kᵀ x + offset,     A(η) = log(1 + exp η) or exp η

with n and d the sufficient statistics of a row (successes and trials, events and exposure). The M-step
maximises Σ_n r_nk ℓ_k(y_n | x_n) by Newton's method; each of its passes makes Σ r ℓ, Σ r ℓ′ x and Σ r
(−ℓ″) x xᵀ in chunks of rows. Responsibilities are kept from the E-step to the M-step: one number for
each row and component, and nothing else of that size
(`pyro_em.posteriors.mixtures.row_factors.Collected`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

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
)
from pyro_em.densities.density import KeepsRows, PlainRows
from pyro_em.densities.linear import would_cancel
from pyro_em.densities.pairs import products, unfolding, upper_pairs
from pyro_em.densities.ridge import Ridge, WithRidge
from pyro_em.errors import Handover
from pyro_em.graph.bindings.binding import LINKS
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.many_rows.given_rows import slice_of
from pyro_em.updates.regressions.coefficients import FAR
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.designs import designs_of
from pyro_em.updates.regressions.idle import Moves
from pyro_em.updates.regressions.newton import climb
from pyro_em.updates.regressions.predictors import Predictor, predictors_of
from pyro_em.updates.update import Newton, ParameterUpdate

Values = Mapping[str, Tensor]

_ROWS = 2**16  # whose statistics are made together

CELLS = 2**18  # of a chunk of an M-step: fewer cost calls, more leave the processor's cache


@dataclass(frozen=True, eq=False)
class PredictedFit(AtCoefficients):
    """Coefficients at some parameter values.

    Attributes:
        beta: All of them, one after the other. # (C,)
    """

    beta: Tensor


@dataclass(eq=False)
class Predicted(PlainRows, KeepsRows, WithRidge):
    """A group with a linear predictor, with its M-step.

    Attributes:
        x: Covariates, the same for all components. # (d, N)
        columns: Which coefficients they multiply; one past the last of a class without any, whose logit
            is known. # (K, d), or (cells, classes, d)
        block: The parameters that the coefficients are, with their shapes and dtypes.
    """

    x: Tensor
    columns: Tensor
    block: tuple[Held, ...]

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that are held."""
        return tuple(name for name, _, _ in self.block)

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return 3 * self.columns[..., 0].numel()

    def enter(self, values: Values) -> PredictedFit:
        """The coefficients at parameter values."""
        return PredictedFit(as_coefficients(self.block, values))

    def values(self, fit: PredictedFit) -> dict[str, Tensor]:
        """The parameters at coefficients."""
        return as_parameters(self.block, fit.beta)

    def features(self, rows: slice, fit: PredictedFit) -> slice:
        """The rows themselves."""
        return rows

    @abstractmethod
    def log_density(self, fit: PredictedFit, features: slice, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""

    def moments(self, fit: PredictedFit, weights: Tensor, features: slice) -> Tensor:
        """The responsibilities, which the M-step needs row by row. # (K, rows)"""
        return weights

    def m_step(
        self, fit: PredictedFit, moments: Tensor, mass: Tensor
    ) -> tuple[PredictedFit, Tensor]:
        """The maximiser, and by how much it raises the expected log joint, in nats.

        Args:
            fit: At the E-step.
            moments: Responsibilities. # (K, N)
            mass: Σ r. # (K,)

        Raises:
            Handover: If the predictor separates the data, which the M-step through tables names.
        """
        found = climb(
            lambda beta: self.with_prior(self.curved(beta, moments), beta),
            fit.beta,
            lambda beta: self.with_prior(self.curved(beta, moments, bent=False), beta),
            self.moves if self.ridge is None else None,
        )
        runs_off = not found.is_settled and self.moves(found.last)[0] >= FAR
        if runs_off or not bool(torch.isfinite(found.place).all()):
            raise Handover
        rounded = as_parameters(self.block, found.place)
        return PredictedFit(as_coefficients(self.block, rounded)), found.gain

    def _slopes(self, beta: Tensor) -> Tensor:
        """The coefficients of each cell, zero where it has none. # like ``columns``"""
        return torch.nn.functional.pad(beta, (0, 1))[self.columns]

    def moves(self, step: Tensor) -> Moves:
        """By how much a step moves the predictor of any row, and would if nothing cancelled."""
        return self._moved_by(self._slopes(step))

    def _moved_by(self, slopes: Tensor) -> Moves:
        pace, out = max(256, CELLS // slopes[..., 0].numel()), (0.0, 0.0)
        for begin in range(0, self.x.shape[1], pace):
            x = of_rows(self.x, slice(begin, begin + pace))
            far, size = self._range(slopes @ x), slopes.abs() @ x.abs()
            out = max(out[0], float(far.amax())), max(out[1], float(size.amax()))
        return out

    def _range(self, moved: Tensor) -> Tensor:
        """What of the steps of predictors changes a density. # (..., rows)"""
        return moved.abs()

    @abstractmethod
    def curved(self, beta: Tensor, weights: Tensor, bent: bool = True) -> Curved:
        """The expected log density of all rows in the coefficients.

        Args:
            beta: # (C,)
            weights: Responsibilities. # (K, N)
            bent: Whether second derivatives are wanted; they are zero otherwise.
        """

    def _scattered(self, slope: Tensor, curve: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Derivatives in the coefficients from those of each cell's.

        Args:
            slope: # (cells, m)
            curve: # (cells, m, m)
            size: The number of coefficients.
        """
        columns = self.columns.reshape(slope.shape)
        more = size + 1  # what belongs to no coefficient goes to the last
        gradient = slope.new_zeros(more).index_add_(0, columns.reshape(-1), slope.reshape(-1))
        place = columns.unsqueeze(2) * more + columns.unsqueeze(1)
        flat = slope.new_zeros(more * more).index_add_(0, place.reshape(-1), curve.reshape(-1))
        return gradient[:size], flat.reshape(more, more)[:size, :size]


@dataclass(eq=False)
class Numbers(Predicted):
    """Rows with one predictor for each component.

    Attributes:
        n: The numerator of a row. # (N,)
        d: Its denominator; None where all are one. # (N,)
        base: h of each row; None where all are zero. # (N,)
        offset: What is known of the predictor; None where nothing is. # (K or 1, N)
        link: ``"sigmoid"`` or ``"exp"``.
    """

    n: Tensor
    d: Tensor | None
    base: Tensor | None
    offset: Tensor | None
    link: str

    def _eta(self, beta: Tensor, rows: slice) -> Tensor:
        x = of_rows(self.x, rows)
        if self.offset is None:
            return self._slopes(beta) @ x
        return torch.addmm(self.offset[:, rows], self._slopes(beta), x)

    def log_density(self, fit: PredictedFit, features: slice, onto: Tensor | None = None) -> Tensor:
        """See `Predicted.log_density`."""
        eta = self._eta(fit.beta, features)
        total = torch.nn.functional.softplus(eta) if self.link == "sigmoid" else eta.exp()
        if self.d is not None:
            total.mul_(self.d[features])
        out = eta.mul_(self.n[features]).sub_(total)
        if self.base is not None:
            out.add_(self.base[features])
        return out if onto is None else out.add_(onto)

    def curved(self, beta: Tensor, weights: Tensor, bent: bool = True) -> Curved:
        """See `Predicted.curved`."""
        K, d = self.columns.shape
        N = self.x.shape[1]
        step = max(256, CELLS // (K * (d + 4)))
        value = beta.new_zeros(())
        slope, curve = beta.new_zeros(K, d), beta.new_zeros(K * d, d)
        for begin in range(0, N, step):
            rows = slice(begin, min(begin + step, N))
            x, r = of_rows(self.x, rows), weights[:, rows].to(torch.float64)
            eta = self._eta(beta, rows)
            trials = r if self.d is None else r * self.d[rows]
            if self.link == "sigmoid":
                p = torch.sigmoid(eta)
                mean = trials * p
                weight = p.neg_().add_(1).mul_(mean) if bent else mean
                log_sum = torch.nn.functional.softplus(eta)
            else:
                log_sum = eta.exp()
                mean = weight = trials * log_sum
            wins = r * self.n[rows]
            value += torch.dot(wins.reshape(-1), eta.reshape(-1))
            value -= torch.dot(trials.reshape(-1), log_sum.reshape(-1))
            slope.addmm_(wins.sub_(mean), x.T)
            if bent:
                curve.addmm_((weight.unsqueeze(1) * x).reshape(K * d, -1), x.T)
        return Curved(value, *self._scattered(slope, curve.reshape(K, d, d), len(beta)))


@dataclass(eq=False)
class Classes(Predicted):
    """Rows of logits: a latent's own, a gate, or counts of classes that a row observes.

    Attributes:
        counts: What is observed of each class; None for a latent's own site. # (classes, N)
        base: h of each row; None where all are zero. # (N,)
        offset: What is known of the logits; None where nothing is. # (cells or 1, classes, N)
    """

    counts: Tensor | None
    base: Tensor | None
    offset: Tensor | None

    def _log_p(self, beta: Tensor, rows: slice) -> Tensor:
        """Log probabilities of classes. # (cells, classes, rows)"""
        cells, classes, d = self.columns.shape
        slopes = self._slopes(beta).reshape(cells * classes, d)
        eta = (slopes @ of_rows(self.x, rows)).reshape(cells, classes, -1)
        if self.offset is not None:
            eta = eta + self.offset[..., rows]
        return eta.sub_(eta.amax(1, keepdim=True)).sub_(eta.exp().sum(1, keepdim=True).log_())

    def _range(self, moved: Tensor) -> Tensor:
        """Differences between classes. # (cells, rows)"""
        return moved.amax(1) - moved.amin(1)

    def log_density(self, fit: PredictedFit, features: slice, onto: Tensor | None = None) -> Tensor:
        """See `Predicted.log_density`."""
        log_p = self._log_p(fit.beta, features)
        if self.counts is None:
            out = log_p[0]
        else:
            out = log_p.mul_(self.counts[:, features]).sum(1)
        if self.base is not None:
            out = out + self.base[features]
        return out if onto is None else out + onto

    def curved(self, beta: Tensor, weights: Tensor, bent: bool = True) -> Curved:
        """See `Predicted.curved`."""
        cells, classes, d = self.columns.shape
        N, P = self.x.shape[1], d * (d + 1) // 2
        first, second = upper_pairs(classes, beta.device)
        step = max(256, CELLS // (len(first) * cells + P + d))
        value = beta.new_zeros(())
        slope = beta.new_zeros(cells * classes, d)
        curve = beta.new_zeros(cells * len(first), P)
        for begin in range(0, N, step):
            rows = slice(begin, min(begin + step, N))
            x, r = of_rows(self.x, rows), weights[:, rows].to(torch.float64)
            log_p = self._log_p(beta, rows)
            n = r.unsqueeze(0) if self.counts is None else r.unsqueeze(1) * self.counts[:, rows]
            total = n.sum(1, keepdim=True)
            value += torch.dot(n.reshape(-1), log_p.reshape(-1))
            p = log_p.exp_()
            slope.addmm_((n - total * p).reshape(cells * classes, -1), x.T)
            if not bent:
                continue
            both = p[:, first].neg_().mul_(p[:, second])
            both[:, first == second] += p
            both.mul_(total)
            curve.addmm_(both.reshape(cells * len(first), -1), products(x).T)
        whole = curve[:, unfolding(d, beta.device)].reshape(cells, len(first), d, d)
        places = unfolding(classes, beta.device).reshape(classes, classes)
        square = whole[:, places].permute(0, 1, 3, 2, 4).reshape(cells, classes * d, classes * d)
        return Curved(value, *self._scattered(slope.reshape(cells, classes * d), square, len(beta)))


def as_predicted(
    g: int, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values, K: int
) -> Predicted | None:
    """The predictor of a group, with all of its parameters, or None.

    Args:
        g: A group whose members and plates are the rows; Newton's method solves for one of its
            parameters.
        graph: The collapsed graph.
        updates: What was decided.
        values: Parameter values, for their shapes.
        K: Number of components.
    """
    group = graph.groups[g]
    names = [p for b in group.bindings.values() for p in b.params]
    if group.event_dims or group.elements is not None:
        return None
    found = [p for p in predictors_of(graph, names) if p.group == g]
    if len(found) != 1:
        return None
    (predictor,) = found
    if (
        not isinstance(predictor, Predictor)
        or predictor.binding.pairs
        or not _is_own(g, predictor, graph, updates, values)
    ):
        return None
    lead, event = predictor.lead, predictor.event
    own = not group.observed
    is_gate = own and not event
    if is_gate and (group.family is None or group.family.name != "Bernoulli" or K != 2):
        return None
    rows = torch.Size((len(group.members), *group.sizes[: group.n_plates]))
    block = updates[names[0]].block
    parts = designs_of(predictor.binding, block, values, lead)
    constant = predictor.binding.constant
    sizes, row = constant.shape[:lead], constant.shape[constant.dim() - event :]
    total = sum(values[name].numel() for name in block)
    read = common_covariates(parts, total if event else None)
    cells = len(parts) // max(row.numel(), 1)
    if read is None or cells not in (1, K) or constant[..., 0].numel() == 0:
        return None
    x, columns = read
    if len(x) != sizes.numel():
        return None
    x = by_row(x, sizes, rows, as_given=True)
    parameters = tuple(held(p, values) for p in block)
    ridge = Ridge.of(block, graph, updates, values)
    offset = None
    if not predictor.binding.is_without_constant:
        known = by_row(constant, sizes, rows)
        offset = None if not bool(known.any()) else known.reshape(cells, *row, -1)
    statistics = _of_rows(predictor, graph, rows, K)
    if statistics is None:
        return None
    n, d, base = statistics
    if is_gate:  # of its two logits the first is zero
        if cells != 1:
            return None
        columns = torch.stack([torch.full_like(columns, total), columns], 1)
        if offset is not None:
            offset = torch.stack([torch.zeros_like(offset), offset], 1)
        return Classes(x, columns, parameters, None, None, offset, ridge=ridge)
    if not event:
        link = predictor.rule.kind.form.inverse_link
        columns = columns.reshape(cells, -1).expand(K, -1).contiguous()
        return Numbers(x, columns, parameters, n, d, base, offset, link, ridge=ridge)
    columns = columns.reshape(cells, row.numel(), -1)
    if own and (cells != 1 or row.numel() != K):
        return None
    if not own and cells == 1:  # the same of all components
        columns = columns.expand(K, -1, -1).contiguous()
    return Classes(x, columns, parameters, None if own else n, base, offset, ridge=ridge)


def _is_own(
    g: int,
    predictor: Predictor,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
) -> bool:
    """Whether the coefficients of a group are found from this group alone."""
    names, argument = predictor.binding.params, predictor.argument
    if any(b.params for a, b in graph.groups[g].bindings.items() if a != argument):
        return False
    return are_found_alone(names, Newton, g, argument, graph, updates, values)


def _of_rows(
    predictor: Predictor, graph: FactorGraph, rows: torch.Size, K: int
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Sufficient statistics of each row, and the part of its log density that no predictor enters.

    Returns:
        # (N,) or (classes, N), (N,), (N,); a denominator of ones and a base of zeros are None. None
        where something differs between components.
    """
    group = graph.groups[predictor.group]
    if not group.observed:
        return torch.empty(0), None, None
    N, parts = rows.numel(), [slice(0, rows.numel())]
    if len(group.members) == 1 and group.n_plates == 1 and N > _ROWS:
        parts = [slice(a, min(a + _ROWS, N)) for a in range(0, N, _ROWS)]
    joined: list[Tensor] = []
    for part in parts:
        own = group if len(parts) == 1 else slice_of(group, part)
        size = rows if len(parts) == 1 else torch.Size((1, part.stop - part.start))
        some = _of_some_rows(predictor, own, size)
        if some is None:
            return None
        if len(parts) == 1:
            joined = list(some)
            break
        joined = joined or [t.new_empty(*t.shape[:-1], N if t.numel() else 0) for t in some]
        for whole, own_rows in zip(joined, some, strict=True):
            if whole.numel():
                whole[..., part] = own_rows
    n, d, base = joined
    ones = bool(predictor.event) or bool((d == 1).all())
    return n, None if ones else d, None if not bool(base.any()) else base


def _of_some_rows(
    predictor: Predictor, group: Group, rows: torch.Size
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same of some rows; a denominator that there is none of is empty."""
    family, lead = group.family, predictor.lead
    assert family is not None
    # Nothing of what is asked depends on the numbers of the predictor's own argument.
    own, given = predictor.argument, group.outlines
    arguments = {a: (given if a == own else group.arguments)[a].detach() for a in given}
    rest = [t for a, t in arguments.items() if a != predictor.argument]
    batch = 1 + len(group.sizes)
    if any(s != 1 for t in (group.value, *rest) for s in t.shape[lead:batch]):
        return None
    statistics = dict(family.statistics(group.value, arguments))
    like = next(iter(statistics.values()))
    one = torch.ones(like.shape[:batch], dtype=like.dtype, device=like.device)
    n, d = predictor.rule.contribution({**statistics, "weight": one}, arguments)
    like = predictor.binding.constant
    eta = like.new_zeros((1,) * batch + like.shape[batch:], dtype=torch.float64)
    if would_cancel(predictor.rule.kind, n, d):
        return None
    value = predictor.rule.kind.form.of_predictor(n.double(), d.double(), eta).value
    at = LINKS[family.links.get(predictor.argument, "")].forward(eta)
    log_p = family.log_prob(group.value, {**arguments, predictor.argument: at})

    def by_row(t: Tensor, tail: int) -> Tensor:
        own = t.to(torch.float64).expand(*rows, *t.shape[lead:])
        return own.reshape(rows.numel(), *t.shape[t.dim() - tail :]).movedim(0, -1).contiguous()

    base = by_row(log_p - value, 0)
    base = torch.where(base.abs() < 1e-14, 0.0, base)
    n = by_row(n, predictor.event)
    return n, base.new_empty(0) if predictor.event else by_row(d, 0), base
