"""Rows of Laplace distributions, whose locations are weighted medians of the data.

    ℓ_k(x) = −abs(x − μ_k) / b_k − log 2 b_k

The M-step of a location needs the data in their order and the responsibilities of each, which are kept
from the E-step (`pyro_em.posteriors.mixtures.row_factors.Collected`). With the data sorted once,

    μ_k = x_(i),   i the first with   Σ_{j ≤ i} r_k(j) ≥ ½ Σ_j r_k(j),

by sums over chunks in that order, and then row by row in the one chunk that holds the half. Then

    b_k = Σ_n r_nk abs(x_n − μ_k) / Σ_n r_nk.

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
from pyro_em.densities.single_rows import Chunk, SingleRows
from pyro_em.distributions import bounds
from pyro_em.errors import Handover
from pyro_em.graph.bindings.binding import whole_parameter
from pyro_em.graph.factors import FactorGraph
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


@dataclass(eq=False)
class LaplaceRows(SingleRows, KeepsRows):
    """The rows of a Laplace group whose locations and scales are parameters of nothing else.

    Attributes:
        loc: The parameter that is the location.
        spread: The parameter that is the scale.
    """

    family = "Laplace"

    loc: Held
    spread: Held

    @property
    def params(self) -> tuple[str, str]:
        """The parameters that are held."""
        return self.loc[0], self.spread[0]

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return self.value.shape[1] + 2 * self.K

    def enter(self, values: Values) -> Laplaces:
        """The components at parameter values."""
        return Laplaces(*(self._by_number(values[name]) for name in self.params))

    def values(self, p: Laplaces) -> dict[str, Tensor]:
        """The parameters at components."""
        return {
            name: t.squeeze(-1).T.reshape(shape).to(dtype)
            for (name, shape, dtype), t in zip(
                (self.loc, self.spread), (p.loc, p.scale), strict=True
            )
        }

    def log_density(self, p: Laplaces, features: Chunk, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        out = -(2 * p.scale).log().sum(0)
        out = out if onto is None else out + onto.to(torch.float64)
        for x, loc, rate in zip(features.value, p.loc, p.scale.reciprocal(), strict=True):
            out = torch.addcmul(out, (x - loc).abs_(), rate, value=-1)
        return out

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
        if not float(mass.amin()) > 1.6:
            raise Handover
        loc = self._by_number(self._medians(moments).T.reshape(self.loc[1]).to(self.loc[2]))
        before, after = self._deviations(moments, p.loc), self._deviations(moments, loc)
        total = mass.unsqueeze(-1)
        scale = self._by_number(
            (after / total).squeeze(-1).T.reshape(self.spread[1]).to(self.spread[2])
        )
        if not bool((scale > 1e-6 * self._magnitude).all()):
            raise Handover
        rise = before / p.scale - after / scale - total * (scale / p.scale).log()
        return Laplaces(loc, scale), rise.sum()

    def _by_number(self, value: Tensor) -> Tensor:
        """A parameter, number by number. # (numbers, K, 1)"""
        return value.to(torch.float64).reshape(self.K, -1).T.unsqueeze(-1)

    @cached_property
    def _order(self) -> Tensor:
        """The rows in the order of each number. # (numbers, N)"""
        dtype = torch.int32 if len(self.value) < 2**31 else torch.int64
        return torch.stack([x.argsort().to(dtype) for x in self.value.T])

    @cached_property
    def _magnitude(self) -> Tensor:
        """The largest of each number. # (numbers, 1, 1)"""
        return self.value.abs().amax(0).to(torch.float64).reshape(-1, 1, 1)

    def _medians(self, weights: Tensor) -> Tensor:
        """The first value of each number whose cumulative weight is half of all. # (numbers, K)"""
        pace = max(_FEWEST, _CELLS // self.K)
        out = weights.new_zeros(self.value.shape[1], self.K, dtype=torch.float64)
        for i, order in enumerate(self._order):
            parts = order.split(pace)
            sums = [weights.index_select(1, part).sum(1, dtype=torch.float64) for part in parts]
            until = torch.stack(sums).cumsum(0)
            half = until[-1] / 2
            for k, number in enumerate((until < half).sum(0).tolist()):
                own = parts[number]
                total = weights[k].index_select(0, own).to(torch.float64).cumsum(0)
                if number:
                    total += until[number - 1, k]
                # Sums of a chunk in another order may differ from these in the last bit.
                at = min(int(torch.searchsorted(total, half[k])), len(own) - 1)
                out[i, k] = self.value[own[at], i]
        return out

    def _deviations(self, weights: Tensor, loc: Tensor) -> Tensor:
        """Σ r abs(x − μ). # (numbers, K, 1)"""
        pace = max(_FEWEST, _CELLS // self.K)
        out = torch.zeros_like(loc)
        for begin in range(0, len(self.value), pace):
            rows = slice(begin, begin + pace)
            r, x = weights[:, rows].to(torch.float64), self.value[rows].to(torch.float64)
            for i, own in enumerate(x.T):
                out[i, :, 0] += torch.linalg.vecdot(r, (own - loc[i]).abs_())
        return out


def laplace_parameters(
    g: int, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> tuple[str, str] | None:
    """The location and the scale of a Laplace group that are parameters of nothing else, or None.

    Args:
        g: The group.
        graph: The graph.
        updates: What was decided.
        values: Parameter values, for their shapes.
    """
    group = graph.groups[g]
    if group.family is None or group.family.name != "Laplace" or not group.observed:
        return None
    if group.value_binding is not None:
        return None
    names = []
    for argument, low in (("loc", -math.inf), ("scale", 0.0)):
        name = whole_parameter(group.bindings[argument], values)
        if name is None or sum(name in other.params for other in graph.groups) > 1:
            return None
        update, rule = updates[name], updates[name].update
        if not isinstance(rule, ClosedForm) or update.kind is None or update.priors:
            return None
        if update.kind.form.is_spread and rule.floor > 0:
            return None
        if bounds(graph.parameters[name].constraint) != (low, math.inf):
            return None
        names.append(name)
    return (names[0], names[1]) if names[0] != names[1] else None


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
    names = laplace_parameters(g, graph, updates, values)
    group = graph.groups[g]
    if names is None or group.mask is not None:
        return None
    rows = _Plain.of(group, K)
    if rows is None or rows.elements is not None:
        return None
    whole = (K, *rows.shape)
    if any(tuple(group.arguments[a].shape[rows.lead :]) != whole for a in ("loc", "scale")):
        return None
    own = (held(name, values) for name in names)
    return LaplaceRows(rows.value, None, K, rows.lead, rows.shape, *own)


class _Plain(SingleRows):
    """The rows alone, before their parameters are known."""

    family = "Laplace"
