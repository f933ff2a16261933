"""Rows of Laplace distributions, whose locations are weighted medians of the data.

    ℓ_k(x) = −abs(x − μ_k) / b_k − log 2 b_k

The M-step of a location needs the data in their order and the responsibilities of each, which are kept
from the E-step (`pyro_em.posteriors.mixtures.row_factors.Collected`). With the data sorted once,

    μ_k = x_(i),   i the first with   Σ_{j ≤ i} r_k(j) ≥ ½ Σ_j r_k(j),

by sums over chunks in that order, and then row by row in the one chunk that holds the half. Then

    b_k = Σ_n r_nk abs(x_n − μ_k) / Σ_n r_nk,

both sums over all components and numbers that have one scale in common, and with n₀ and d₀ of a
conjugate prior (`pyro_em.updates.closed_forms.priors`) above and below. What is masked has no weight.
Nothing else of the size of the responsibilities is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.densities.affine_rows import Held, held
from pyro_em.densities.density import KeepsRows
from pyro_em.densities.ridge import WithPrior
from pyro_em.densities.single_rows import Chunk, SingleRows
from pyro_em.distributions import bounds
from pyro_em.errors import Handover
from pyro_em.graph.bindings.binding import whole_parameter
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.closed_forms.priors import contributions
from pyro_em.updates.update import ClosedForm, ParameterUpdate

Values = Mapping[str, Tensor]

_CELLS = 2**17  # of a chunk of an M-step

_FEWEST = 256  # rows of one


@dataclass(frozen=True, eq=False)
class Laplaces:
    """Components at some parameters; each has a number for each of an event. # (numbers, K, 1)

    Attributes:
        loc: μ.
        scale: b.
        size: No term is expanded.
    """

    loc: Tensor
    scale: Tensor
    size: float = 0.0

    @property
    def prepared(self) -> Laplaces:
        """What the E-step reads: nothing is left to prepare."""
        return self


@dataclass(frozen=True, eq=False)
class Argument:
    """An argument that is one parameter, or known.

    Attributes:
        cells: Its shape below members and plates: K and the ``to_event`` dimensions, or ones.
        held: The parameter.
        known: The numbers, where it is no parameter. # (*cells)
        numerator: n₀ of the parameter's prior. # (*cells)
        denominator: d₀. # (*cells)
        priors: The groups of that prior.
    """

    cells: tuple[int, ...]
    held: Held | None = None
    known: Tensor | None = None
    numerator: Tensor | float = 0.0
    denominator: Tensor | float = 0.0
    priors: tuple[Group, ...] = ()


@dataclass(eq=False)
class LaplaceRows(SingleRows, KeepsRows, WithPrior):
    """The rows of a Laplace group whose locations and scales are parameters of nothing else.

    Attributes:
        loc: The location, one for each component and number.
        spread: The scale, which some of them may share.
    """

    family = "Laplace"

    loc: Argument
    spread: Argument

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that are held."""
        return tuple(a.held[0] for a in (self.loc, self.spread) if a.held is not None)

    @property
    def in_prior(self) -> tuple[str, ...]:
        """The parameters whose priors the rows know."""
        held = self.spread.held
        return (held[0],) if held is not None and self.spread.priors else ()

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return self.value.shape[1] + 2 * self.K

    def enter(self, values: Values) -> Laplaces:
        """The components at parameter values."""
        own = (a.known if a.held is None else values[a.held[0]] for a in (self.loc, self.spread))
        return Laplaces(
            *(
                self._by_number(t.to(torch.float64).reshape(a.cells))
                for t, a in zip(own, (self.loc, self.spread), strict=True)
                if t is not None
            )
        )

    def values(self, p: Laplaces) -> dict[str, Tensor]:
        """The parameters at components."""
        out = {}
        for a, t in ((self.loc, p.loc), (self.spread, p.scale)):
            if a.held is not None:
                name, shape, dtype = a.held
                out[name] = self._of_cells(t, a)[1].reshape(shape).to(dtype)
        return out

    def log_prior(self, p: Laplaces) -> Tensor | float:
        """Log density of the scale's point estimate, in nats."""
        values, total = self.values(p), p.scale.new_zeros(())
        for group in self.spread.priors:
            log_p = group.log_density(group.arguments, group.evaluate_value(values))
            total = total + log_p.to(torch.float64).sum()
        return total

    def log_density(self, p: Laplaces, features: Chunk, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        if features.seen is None:
            out = -(2 * p.scale).log().sum(0)
            out = out if onto is None else out + onto.to(torch.float64)
            for x, loc, rate in zip(features.value, p.loc, p.scale.reciprocal(), strict=True):
                out = torch.addcmul(out, (x - loc).abs_(), rate, value=-1)
            return out
        total = features.value.new_zeros(self.K, features.value.shape[1])
        for x, seen, loc, scale in zip(features.value, features.seen, p.loc, p.scale, strict=True):
            each = (x - loc).abs_().div_(scale).add_((2 * scale).log())
            total -= each.masked_fill_(~seen, 0.0)
        return total if onto is None else total + onto

    def moments(self, p: Laplaces, weights: Tensor, features: Chunk) -> Tensor:
        """The responsibilities, which the M-step needs row by row. # (K, rows)"""
        return weights

    def m_step(self, p: Laplaces, moments: Tensor, mass: Tensor) -> tuple[Laplaces, Tensor]:
        """The maximisers, and by how much they raise the expected log joint, in nats.

        Args:
            p: At the E-step.
            moments: Responsibilities. # (K, N)
            mass: Σ r. # (K,)

        Raises:
            Handover: If a component is empty or near a collapse, which the M-step through tables names.
        """
        loc, scale = p.loc, p.scale
        before, total = self._deviations(moments, loc)
        total = mass.to(torch.float64).unsqueeze(-1).expand_as(loc) if total is None else total
        if not float(total.amin()) > 1.6:
            raise Handover
        after = before
        if self.loc.held is not None:
            loc = self._by_number(self._medians(moments).T.reshape(self.loc.cells))
            loc = self.enter(self.values(Laplaces(loc, scale))).loc
            after, _ = self._deviations(moments, loc)
        if self.spread.held is not None:
            n, _ = self._of_cells(after, self.spread)
            d, _ = self._of_cells(total, self.spread)
            new = (n + self.spread.numerator) / (d + self.spread.denominator)
            scale = self._by_number(new)
            if not bool((scale > 1e-6 * self._magnitude).all()):
                raise Handover
            scale = self.enter(self.values(Laplaces(loc, scale))).scale
        found = Laplaces(loc, scale)
        rise = before / p.scale - after / scale - total * (scale / p.scale).log()
        if not self.spread.priors:
            return found, rise.sum()
        return found, rise.sum() + self.log_prior(found) - self.log_prior(p)

    def _by_number(self, value: Tensor) -> Tensor:
        """An argument, number by number. # (numbers, K, 1)"""
        return value.expand(self.K, *self.shape).reshape(self.K, -1).T.unsqueeze(-1)

    def _of_cells(self, value: Tensor, argument: Argument) -> tuple[Tensor, Tensor]:
        """Sums of each number over the cells that have an argument in common, and one of each."""
        whole = value.squeeze(-1).T.reshape(self.K, *self.shape)
        first = whole[tuple(slice(n) for n in argument.cells)]
        return whole.sum_to_size(argument.cells), first

    @cached_property
    def _order(self) -> Tensor:
        """The rows in the order of each number. # (numbers, N)"""
        dtype = torch.int32 if len(self.value) < 2**31 else torch.int64
        return torch.stack([x.argsort().to(dtype) for x in self.value.T])

    @cached_property
    def _magnitude(self) -> Tensor:
        """The largest of each number. # (numbers, 1, 1)"""
        low, high = torch.aminmax(self.value, dim=0)  # no table of the absolute values
        return torch.maximum(high, -low).to(torch.float64).reshape(-1, 1, 1)

    def _medians(self, weights: Tensor) -> Tensor:
        """The first value of each number whose cumulative weight is half of all. # (numbers, K)"""
        pace = max(_FEWEST, _CELLS // self.K)
        out = weights.new_zeros(self.value.shape[1], self.K, dtype=torch.float64)
        for i, order in enumerate(self._order):
            parts = order.split(pace)
            sums = [
                self._counted(weights.index_select(1, part), part, i).sum(1, dtype=torch.float64)
                for part in parts
            ]
            until = torch.stack(sums).cumsum(0)
            half = until[-1] / 2
            for k, number in enumerate((until < half).sum(0).tolist()):
                own = parts[number]
                total = self._counted(weights[k].index_select(0, own), own, i).cumsum(0)
                if number:
                    total += until[number - 1, k]
                # Sums of a chunk in another order may differ from these in the last bit.
                at = min(int(torch.searchsorted(total, half[k])), len(own) - 1)
                out[i, k] = self.value[own[at], i]
        return out

    def _counted(self, weights: Tensor, rows: Tensor | slice, number: int) -> Tensor:
        """Weights of some rows, in float64; those whose number is masked have none."""
        weights = weights.to(torch.float64)
        if self.elements is None:
            return weights
        seen = self.elements[:, number]
        return weights * (seen[rows] if len(seen) > 1 else seen)

    def _deviations(self, weights: Tensor, loc: Tensor) -> tuple[Tensor, Tensor | None]:
        """Σ r abs(x − μ), and Σ r where it differs between numbers. # (numbers, K, 1) each"""
        pace = max(_FEWEST, _CELLS // self.K)
        out = torch.zeros_like(loc)
        total = None if self.elements is None else torch.zeros_like(loc)
        for begin in range(0, len(self.value), pace):
            rows = slice(begin, begin + pace)
            x = self.value[rows].to(torch.float64)
            r = weights[:, rows].to(torch.float64)
            for i, own in enumerate(x.T):
                counted = self._counted(r, rows, i)
                out[i, :, 0] += torch.linalg.vecdot(counted, (own - loc[i]).abs_())
                if total is not None:
                    total[i, :, 0] += counted.sum(1)
        return out, total


def _argument(
    g: int,
    name: str,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    lead: int,
    low: float,
) -> Argument | None:
    """An argument of a Laplace group that is a parameter of nothing else, or known; else None."""
    group = graph.groups[g]
    shape = group.arguments[name].shape
    if any(n != 1 for n in shape[:lead]):
        return None
    cells, binding = tuple(shape[lead:]), group.bindings.get(name)
    if binding is None or not binding.params:
        if binding is not None and not binding.is_static:
            return None
        return Argument(cells, known=group.arguments[name].detach().to(torch.float64))
    own = whole_parameter(binding, values)
    if own is None:
        return None
    update, rule = updates[own], updates[own].update
    priors = tuple(dict.fromkeys(p.group for p in update.priors))
    if any(own in other.params for h, other in enumerate(graph.groups) if h not in (g, *priors)):
        return None
    if not isinstance(rule, ClosedForm) or update.kind is None:
        return None
    if priors and (update.needs_data or not all(p.is_constant for p in update.priors)):
        return None
    if any(graph.groups[h].params != (own,) for h in priors):
        return None
    if update.kind.form.is_spread and rule.floor > 0:
        return None
    if bounds(graph.parameters[own].constraint) != (low, math.inf):
        return None
    where = held(own, values)
    if not priors:
        return Argument(cells, where)
    n, d = (t.to(torch.float64).reshape(cells) for t in contributions(update, graph, values[own]))
    if not (bool((n >= 0).all()) and bool((d >= 0).all())):
        return None
    return Argument(cells, where, None, n, d, tuple(graph.groups[h] for h in priors))


def as_laplace(
    g: int, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values, K: int
) -> LaplaceRows | None:
    """The rows of a Laplace group with all of its parameters, or None.

    Args:
        g: A group whose members and plates are the rows.
        graph: The collapsed graph.
        updates: What was decided.
        values: Parameter values, for their shapes.
        K: Number of components.
    """
    group = graph.groups[g]
    if group.value_binding is not None:
        return None
    rows = _Plain.of(group, K)
    if rows is None:
        return None
    loc = _argument(g, "loc", graph, updates, values, rows.lead, -math.inf)
    spread = _argument(g, "scale", graph, updates, values, rows.lead, 0.0)
    if loc is None or spread is None or (loc.held == spread.held):
        return None
    if loc.held is not None and loc.cells != (K, *rows.shape):
        return None  # a median of components whose spreads differ weighs them by these
    return LaplaceRows(rows.value, rows.elements, K, rows.lead, rows.shape, loc, spread)


class _Plain(SingleRows):
    """The rows alone, before their parameters are known."""

    family = "Laplace"
