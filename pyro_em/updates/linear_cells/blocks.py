"""Sums of groups in linear form as many small problems: which elements meet, and their derivatives.

A cell of a group is one value of all its arguments. Q is a sum over cells, each a function of the few
elements that its arguments read; with u the coordinates of these elements and a = f(u),

    ∂Q/∂u_i = Q_i f_i',      ∂²Q/∂u_i ∂u_j = Q_ij f_i' f_j' + δ_ij Q_i f_i'',

summed onto blocks of elements that share cells. Where an argument is made of several elements, as α / m
is, it has as many derivatives, and f'' is a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.exponential import FAR
from pyro_em.families.family import Statistics
from pyro_em.updates.expectations.scatter import sum_to
from pyro_em.updates.linear_cells.cells import Argument, Cells, bends_of, derivatives_of, where_told
from pyro_em.updates.linear_cells.coordinates import Coordinates

EDGE = 1e-6 * FAR
"""Nats that only a datum at the end of a support has."""

_MOST = 20  # Newton steps from arguments back to elements

_FARTHEST = 20.0  # of a coordinate in one of these

_SETTLED = 1e-8  # a step after which the next is lost in rounding

_EPS = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class There:
    """The expected log joint of each block at some coordinates.

    Attributes:
        value: In nats. # (B,)
        rounding: What two equal values may differ by. # (B,)
        slope: In the coordinates of a block. # (B, m)
        curvature: Of −Q; the identity where a block has fewer coordinates. # (B, m, m)
    """

    value: Tensor
    rounding: Tensor
    slope: Tensor
    curvature: Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Where the elements of a block of parameters are read, decided once.

    Attributes:
        coordinates: The elements.
        cells: Per group.
        owner: The small problem that each element belongs to. # (elements,)
        slot: Its place there. # (elements,)
        counts: How many problems there are, and coordinates of the largest.
        unused: One where a problem has fewer coordinates. # (B, m, m)
        is_read: Whether every element is read.
        alone: Which columns are positive, where each cell of the only group is a problem of its own and
            each argument a parameter as it stands; else None. # (m,)
        is_square: Whether each cell of the only group is a problem of its own, of as many elements as
            its arguments have numbers.
    """

    coordinates: Coordinates
    cells: tuple[Cells, ...]
    owner: Tensor
    slot: Tensor
    counts: tuple[int, int]
    unused: Tensor
    is_read: bool
    alone: Tensor | None
    is_square: bool = False

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups whose sums are needed."""
        return tuple(c.group for c in self.cells)

    def at(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
        values: Mapping[str, Tensor],
    ) -> Problem:
        """The problem that sums pose.

        Args:
            statistics: Expected statistics per group.
            arguments: The current arguments per group, for what is known of them.
            values: The current parameters, of which some are fixed.
        """
        sums, known = [], []
        for c in self.cells:
            given = statistics[c.group]
            feature = given["feature"] if "feature" in given else c.form.gathered(given)
            feature, weight = (
                t.detach().to("cpu", torch.float64) for t in (feature, given["weight"])
            )
            own = {
                "feature": sum_to(feature, c.shape, 1).clone(),
                "weight": sum_to(weight, c.shape).clone(),
            }
            for name in c.form.references:
                reference = arguments[c.group][name].detach().to("cpu", torch.float64)
                own[f"reference:{name}"] = reference.clone()
            sums.append(own)
            known.append(
                {
                    n: arguments[c.group][n].detach().to("cpu", torch.float64).clone()
                    for n, a in c.arguments.items()
                    if a.name is None
                }
            )
        fixed = {
            s.param: values[s.param].detach().to("cpu", torch.float64).reshape(-1)
            for c in self.cells
            for a in c.arguments.values()
            for s in a.selections
            if s.param not in self.coordinates.slices
        }
        return Problem(self, tuple(sums), tuple(known), fixed)


@dataclass(frozen=True, eq=False)
class Problem:
    """Q as a function of coordinates.

    Attributes:
        places: Where elements are read.
        sums: Per group in their order. # (*cells, P), (*cells)
        known: Arguments that have constant parts.
        fixed: Parameters outside the block that meet those of the block.
    """

    places: Places
    sums: tuple[Statistics, ...]
    known: tuple[Mapping[str, Tensor], ...]
    fixed: Mapping[str, Tensor]

    def spread(self, of_blocks: Tensor) -> Tensor:
        """What belongs to slots, element by element. # (B, m) to (elements,)"""
        return of_blocks[self.places.owner, self.places.slot]

    def spread_one(self, of_blocks: Tensor) -> Tensor:
        """What belongs to blocks, element by element. # (B,) to (elements,)"""
        return of_blocks[self.places.owner]

    def block_masses(self) -> Tensor:
        """The weight behind each block. # (B,)"""
        out = torch.zeros(self.places.counts[0] + 1, dtype=torch.float64)
        for c, s in zip(self.places.cells, self.sums, strict=True):
            out.index_add_(0, c.block, s["weight"].reshape(-1))
        return out[:-1]

    def may_lack_data(self) -> bool:
        """Whether there may be elements that no datum reads."""
        return not self.places.is_read or any(bool((s["weight"] <= 0).any()) for s in self.sums)

    def masses(self) -> Tensor:
        """The weight behind each element; −1 where none reads it. # (elements,)"""
        size = self.places.coordinates.size
        mass, often = torch.zeros(2, size + 1, dtype=torch.float64)
        for c, s in zip(self.places.cells, self.sums, strict=True):
            at = torch.where(c.rows >= 0, c.rows, size)
            weight = s["weight"].reshape(-1, 1).expand(at.shape)
            mass.index_add_(0, at.reshape(-1), weight.reshape(-1))
            often.index_fill_(0, at.reshape(-1), 1.0)
        return torch.where(often > 0, mass, -1.0)[:-1]

    def derivatives(self, u: Tensor) -> There:
        """Q with its derivatives."""
        if self.places.alone is not None:
            return self._of_cells_alone(u, self.places.alone)
        B, m = self.places.counts
        # One row and one column more take what belongs to no element.
        value, rounding = torch.zeros(2, B + 1, dtype=torch.float64)
        slope = torch.zeros((B + 1) * (m + 1), dtype=torch.float64)
        curvature = torch.zeros((B + 1) * (m + 1) ** 2, dtype=torch.float64)
        for c, s, known in zip(self.places.cells, self.sums, self.known, strict=True):
            moves = {n: self._jet(a, u, known.get(n)) for n, a in c.arguments.items()}
            at = {n: found[0] for n, found in moves.items()}
            terms, g, H = derivatives_of(c, s, at)
            first = torch.cat([m[1].reshape(len(c.rows), -1) for m in moves.values()], -1)
            if c.numbers is None:
                second = torch.cat([m[2].reshape(len(c.rows), -1) for m in moves.values()], -1)
                H = H * (first.unsqueeze(-1) * first.unsqueeze(-2))
                H.diagonal(dim1=-2, dim2=-1).addcmul_(g, second)
            else:
                g, H = g[:, c.numbers], H[:, c.numbers][:, :, c.numbers]
                H = H * (first.unsqueeze(-1) * first.unsqueeze(-2))
                H.addcmul_(g.unsqueeze(-1), bends_of(c, [m[2] for m in moves.values()]))
            value.index_add_(0, c.block, where_told(c, s, at, terms.sum(-1)).reshape(-1))
            rounding.index_add_(0, c.block, terms.abs().sum(-1).reshape(-1), alpha=_EPS)
            slope.index_add_(0, c.slope, (g * first).reshape(-1))
            curvature.index_add_(0, c.curvature, H.reshape(-1), alpha=-1.0)
        slope = slope.reshape(B + 1, m + 1)[:B, :m]
        curvature = curvature.reshape(B + 1, m + 1, m + 1)[:B, :m, :m]
        return There(value[:B], rounding[:B], slope, curvature + self.places.unused)

    def maximum(self, u: Tensor) -> Tensor | None:
        """Where Q is largest, where the family says so; None where it is to be searched for.

        Args:
            u: Where parameters are.
        """
        is_positive = self.places.alone
        if is_positive is None and not self.places.is_square:
            return None
        c, s = self.places.cells[0], self.sums[0]
        if c.form.maximum is None or not bool((s["weight"] > 0).all()):
            return None
        if not bool((s["feature"].abs() < EDGE).all()):
            return None
        if is_positive is None:
            return self._by_arguments(u)
        moved, at = self._alone(u, is_positive)
        found = c.form.maximum(s, at)
        if found is None:
            return None
        found = found.reshape(moved.shape)
        found = torch.where(is_positive, found.log(), found)
        out = torch.empty_like(u)
        out[c.rows.reshape(-1)] = found.reshape(-1)
        return out if bool(torch.isfinite(out).all()) else None

    def _by_arguments(self, u: Tensor) -> Tensor | None:
        """Where the arguments are those at which Q is largest, by Newton's method for a(u) = a*.

        As many elements meet as arguments have numbers; None where it finds none.
        """
        c, s = self.places.cells[0], self.sums[0]
        assert c.numbers is not None and c.form.maximum is not None
        rows, A = c.width
        wanted: Tensor | None = None
        place = (torch.arange(rows).unsqueeze(-1), c.numbers, self.places.slot[c.rows])
        for _ in range(_MOST):
            moves = {n: self._jet(a, u, None) for n, a in c.arguments.items()}
            at = torch.cat([m[0].reshape(rows, -1) for m in moves.values()], -1)
            if wanted is None:
                wanted = c.form.maximum(s, {n: m[0] for n, m in moves.items()})
                if wanted is None:
                    return None
                wanted = wanted.reshape(rows, A)
            first = torch.cat([m[1].reshape(rows, -1) for m in moves.values()], -1)
            jacobian = torch.zeros(rows, A, A, dtype=torch.float64)
            jacobian.index_put_(place, first, accumulate=True)
            step, failed = torch.linalg.solve_ex(jacobian, (wanted - at).unsqueeze(-1))
            length = step.abs().amax()
            if bool(failed.any()) or not float(length) <= _FARTHEST:
                return None
            u = u.clone()
            u[c.rows] = u[c.rows] + step.squeeze(-1).gather(-1, self.places.slot[c.rows])
            if float(length) <= _SETTLED:
                return u
        return None

    def _alone(self, u: Tensor, is_positive: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The numbers of the only group's cells, and its arguments. # (cells, A), (*cells, *event)"""
        c = self.places.cells[0]
        out = u[c.rows]
        if bool(is_positive.any()):
            out = torch.where(is_positive, out.exp(), out)
        widths = [a.elements.numel() // len(c.rows) for a in c.arguments.values()]
        return out, {
            name: part.reshape(a.elements.shape)
            for (name, a), part in zip(c.arguments.items(), out.split(widths, -1), strict=True)
        }

    def _of_cells_alone(self, u: Tensor, is_positive: Tensor) -> There:
        """Q with its derivatives where cells share nothing: nothing is scattered."""
        c, s = self.places.cells[0], self.sums[0]
        out, at = self._alone(u, is_positive)
        first = second = out
        if not bool(is_positive.all()):
            first = torch.where(is_positive, out, 1.0)
            second = torch.where(is_positive, out, 0.0)
        terms, g, H = derivatives_of(c, s, at)
        H = H * (first.unsqueeze(-1) * first.unsqueeze(-2))
        H.diagonal(dim1=-2, dim2=-1).addcmul_(g, second)
        total = where_told(c, s, at, terms.sum(-1)).reshape(len(c.rows), -1).sum(-1)
        terms = terms.reshape(len(c.rows), -1)
        return There(total, _EPS * terms.abs().sum(-1), g * first, H.neg_())

    def _jet(self, a: Argument, u: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return a.jet(u, known, self.places.coordinates, self.fixed)
