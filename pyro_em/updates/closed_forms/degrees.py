"""Degrees of freedom of Wisharts by Newton's method, with the scale matrices at their maximisers.

Cells c of weight w with S = Σ w E[Λ] and ℓ = Σ w E[log det Λ] have the expected log density

    ½ ν (ℓ − w D log 2 − w log det V) − ½ tr(V⁻¹ S) − w log Γ_D(½ ν) + const,

whose maximiser in a scale matrix V that cells v share is S_v / N_v, with S_v = Σ S and N_v = Σ w ν.
What is left is concave in all degrees of freedom together,

    Σ_c [½ ν (ℓ − w D log 2) − w log Γ_D(½ ν)] − ½ Σ_v N_v (log det S_v − D log N_v + D),

so that Newton steps, made shorter where they leave the constraint or lose, end at its maximum. Of
V = s A with a known A the maximiser is s = tr(A⁻¹ S_v) / (D N_v), and D log(tr(A⁻¹ S_v) / D) +
log det A stands in the place of log det S_v. Scale matrices that are known, or have another update,
are as they stand.

Source: Anderson (2003), "An Introduction to Multivariate Statistical Analysis", chapter 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.families.family import Statistics
from pyro_em.families.normal import precision_matrix
from pyro_em.graph.bindings.binding import Selection
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.update import ClosedForm, ParameterUpdate

_STEPS = 200
_LAST = 1e-11  # a relative step after which the next is lost in rounding
_MOST = 10.0  # times as many degrees of freedom after one step


@dataclass(frozen=True, eq=False)
class _Cells:
    """The cells of one group: Wisharts of one size.

    Attributes:
        size: D.
        weight: w. # (cells,)
        log_det: ℓ. # (cells,)
        matrix: S. # (cells, D, D)
        degrees: Which element the degrees of freedom are, −1 where they are known. # (cells,)
        known: The known degrees of freedom. # (cells,)
        scale: Which of the matrices that are at their maximisers the scale is, −1 for none. # (cells,)
        log_scale: log det V as it stands; of multiples log det A. # (cells,)
        trace: Of multiples tr(A⁻¹ S). # (cells,)
        is_multiple: Whether the scale that is at its maximiser is a number times a known A. # (cells,)
    """

    size: int
    weight: Tensor
    log_det: Tensor
    matrix: Tensor
    degrees: Tensor
    known: Tensor
    scale: Tensor
    log_scale: Tensor
    trace: Tensor
    is_multiple: Tensor

    def degrees_at(self, nu: Tensor) -> Tensor:
        """# (cells,)"""
        return torch.where(self.degrees >= 0, nu[self.degrees.clamp(min=0)], self.known)


class DegreesSolver:
    """The maximiser in degrees of freedom, solved from sums over the data.

    Args:
        block: The parameters.
        graph: The graph whose groups the sums are of.
        updates: What was decided per parameter.
    """

    def __init__(
        self,
        block: tuple[str, ...],
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
    ) -> None:
        self.block, self.graph = block, graph
        own = {g for g, group in enumerate(graph.groups) if set(block) & set(group.params)}
        self.scales = [n for n, u in updates.items() if _is_at_maximum(graph, u, own)]
        self.multiples = {n for n in self.scales if updates[n].uses[0].is_multiple}
        with_scales = {u.group for n in self.scales for u in updates[n].uses}
        self.groups = tuple(sorted(own | with_scales))

    def solve(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]],
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The maximisers of the expected log joint.

        Args:
            statistics: Expected statistics per group.
            arguments: The current arguments per group.
            values: The current parameters.
        """
        begin, scales = _begins(self.block, values), self._scale_begins(values)
        cells = [
            self._cells(g, statistics[g], arguments[g], begin, scales, values) for g in self.groups
        ]
        nu = torch.cat([values[n].detach().cpu().to(torch.float64).reshape(-1) for n in self.block])
        low, high = torch.full_like(nu, -math.inf), torch.full_like(nu, math.inf)
        for name in self.block:
            interval = bounds(self.graph.parameters[name].constraint)
            assert interval is not None
            part = slice(begin[name], begin[name] + values[name].numel())
            low[part], high[part] = interval
        for c in cells:
            used = c.degrees[c.degrees >= 0]
            low[used] = low[used].clamp(min=c.size - 1)
        found = _maximum(_Profile(cells), nu, low, high)
        out = {}
        for name in self.block:
            value = values[name]
            part = found[begin[name] : begin[name] + value.numel()]
            out[name] = part.reshape(value.shape).to(value)
        return out

    def _scale_begins(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        """The number of the first matrix of each parameter that is at its maximiser."""
        out, first = {}, 0
        for name in self.scales:
            out[name] = first
            size = 1 if name in self.multiples else values[name].shape[-2:].numel()
            first += values[name].numel() // size
        return out

    def _cells(
        self,
        g: int,
        s: Statistics,
        arguments: Mapping[str, Tensor],
        begin: Mapping[str, int],
        scales: Mapping[str, int],
        values: Mapping[str, Tensor],
    ) -> _Cells:
        group = self.graph.groups[g]
        assert group.family is not None
        given = group.family.degrees
        inverse = precision_matrix(arguments).detach()
        spread = next(a for a in group.family.rules if a in arguments)
        size = inverse.shape[-1]
        degrees = _numbers(group.bindings[given].selections, begin, arguments[given].shape)
        selections = group.bindings[spread].selections
        whole = {n: first for n, first in scales.items() if n not in self.multiples}
        scale = _numbers(selections, whole, arguments[spread].shape, event_dim=2)
        log_scale, s_now = -inverse.logdet(), torch.ones_like(inverse[..., 0, 0])
        is_multiple = torch.zeros(scale.shape, dtype=torch.bool)
        for one in selections:
            if one.param in self.multiples:
                number = one.index.amax((-2, -1))
                now = values[one.param].detach().reshape(-1)[number.clamp(min=0)].to(s_now)
                now = 1 / now if spread == "precision_matrix" else now
                s_now = torch.where(number >= 0, now, s_now)
                number = number.cpu()
                scale = torch.where(number >= 0, number + scales[one.param], scale)
                is_multiple = is_multiple | (number >= 0)
        log_scale = log_scale - size * s_now.log()
        trace = s_now * (inverse * s["matrix"].to(inverse)).sum((-2, -1))
        parts = (arguments[given].detach(), degrees, log_scale, scale, trace, is_multiple)
        shape = torch.broadcast_shapes(s["weight"].shape, *(t.shape for t in parts))

        def flat(t: Tensor) -> Tensor:
            return t.expand(shape).reshape(-1).cpu()

        known, degrees, log_scale, scale, trace, is_multiple = map(flat, parts)
        matrix = s["matrix"].expand(*shape, size, size).reshape(-1, size, size).cpu()
        return _Cells(
            size,
            flat(s["weight"]).to(torch.float64),
            flat(s["log_det"]).to(torch.float64),
            matrix.to(torch.float64),
            degrees,
            known.to(torch.float64),
            scale,
            log_scale.to(torch.float64),
            trace.to(torch.float64),
            is_multiple,
        )


class _Profile:
    """The expected log density with scale matrices at their maximisers."""

    def __init__(self, cells: Sequence[_Cells]) -> None:
        self.cells = cells
        self.count = 1 + max([-1, *(int(c.scale.amax()) for c in cells)])
        # log det S_v, and D, of each matrix that is at its maximiser. # (count,)
        self.log_det = torch.zeros(self.count, dtype=torch.float64)
        self.size = torch.zeros(self.count, dtype=torch.float64)
        sums: dict[int, Tensor] = {}
        traces = torch.zeros(self.count, dtype=torch.float64)
        for c in cells:
            traces.index_add_(0, c.scale[c.is_multiple], c.trace[c.is_multiple])
            at = c.scale >= 0
            self.size[c.scale[at]] = float(c.size)
            own = sums.setdefault(c.size, torch.zeros(self.count, c.size, c.size).to(c.matrix))
            own.index_add_(0, c.scale[at], c.matrix[at])
        for size, total in sums.items():
            here = self.size == size
            self.log_det[here] = total[here].logdet()
        some = traces > 0
        self.log_det[some] = self.size[some] * (traces[some] / self.size[some]).log()

    def at(self, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, slope and second derivatives. # (), (E,), (E, E)"""
        E = len(nu)
        value, slope = nu.new_zeros(()), nu.new_zeros(E)
        curvature = nu.new_zeros(E)
        share = nu.new_zeros(self.count, E)
        total = nu.new_zeros(self.count)
        for c in self.cells:
            own = c.degrees_at(nu)
            free, at = c.degrees >= 0, c.scale >= 0
            linear = (c.log_det - c.weight * c.size * math.log(2)) / 2
            held = ~at | c.is_multiple
            linear = linear - torch.where(held, c.weight * c.log_scale / 2, 0.0)
            halves = (own.unsqueeze(-1) - torch.arange(c.size)) / 2
            value = value + (own * linear - c.weight * (own / 2).mvlgamma(c.size)).sum()
            each = linear - c.weight * halves.digamma().sum(-1) / 2
            bend = c.weight * torch.special.polygamma(1, halves).sum(-1) / 4
            slope.index_add_(0, c.degrees[free], each[free])
            curvature.index_add_(0, c.degrees[free], bend[free])
            total.index_add_(0, c.scale[at], (c.weight * own)[at])
            both = free & at
            share.index_put_((c.scale[both], c.degrees[both]), c.weight[both], accumulate=True)
        log_v = self.log_det - self.size * total.log()
        value = value - (total * (log_v + self.size)).sum() / 2
        slope = slope - share.T @ log_v / 2
        second = share.T @ ((self.size / total / 2).unsqueeze(-1) * share)
        return value, slope, second - torch.diag(curvature)


def _maximum(profile: _Profile, nu: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where a concave function is largest between bounds. # (E,)"""
    value, slope, second = profile.at(nu)
    for _ in range(_STEPS):
        bend = -second
        # What no cell reads stays where it is.
        bend.diagonal()[bend.diagonal() == 0] = 1.0
        step = torch.linalg.solve(bend, slope)
        new = (nu + step).clamp(max=_MOST * nu)
        new = torch.where(new <= low, (nu + low) / 2, new)
        new = torch.where(new >= high, (nu + high) / 2, new)
        for _ in range(_STEPS):
            there = profile.at(new)
            if float(there[0]) >= float(value) - 1e-13 * abs(float(value)):
                break
            new = (nu + new) / 2
        length = float(((new - nu) / nu).abs().amax())
        nu, (value, slope, second) = new, there
        if length <= _LAST:
            break
    return nu


def _is_at_maximum(graph: FactorGraph, update: ParameterUpdate, groups: set[int]) -> bool:
    """Whether a closed form for scale matrices follows from sums alone, whatever degrees there are."""
    if not isinstance(update.update, ClosedForm) or update.update.floor > 0 or update.priors:
        return False
    families = [graph.groups[u.group].family for u in update.uses]
    if not update.uses or not all(f is not None and f.degrees for f in families):
        return False
    if any(u.selection.maps for u in update.uses):
        return False
    if not update.uses[0].is_multiple and any(u.selection.factor is not None for u in update.uses):
        return False
    return any(u.group in groups for u in update.uses)


def _begins(names: Sequence[str], values: Mapping[str, Tensor]) -> dict[str, int]:
    out, first = {}, 0
    for name in names:
        out[name] = first
        first += values[name].numel()
    return out


def _numbers(
    selections: Sequence[Selection], begin: Mapping[str, int], shape: torch.Size, event_dim: int = 0
) -> Tensor:
    """Which number, or matrix, of some parameters each cell of an argument is, −1 where none."""
    out = torch.full(shape, -1, dtype=torch.long)
    size = shape[len(shape) - event_dim :].numel()
    for s in selections:
        if s.param in begin:
            number = s.index.cpu().div(size, rounding_mode="floor") + begin[s.param]
            out = torch.where(s.index.cpu() >= 0, number, out)
    return out[..., 0, 0] if event_dim else out
