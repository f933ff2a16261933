"""Sums of groups in linear form as many small problems: which elements meet, and their derivatives.

A cell of a group is one value of all its arguments. Q is a sum over cells, each a function of the few
elements that its arguments read; with u the coordinates of these elements and a = f(u),

    ∂Q/∂u_i = Q_i f_i',      ∂²Q/∂u_i ∂u_j = Q_ij f_i' f_j' + δ_ij Q_i f_i'',

summed onto blocks of elements that share cells. Where an argument is made of several elements, as α / m
is, it has as many derivatives, and f'' is a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.exponential import FAR
from pyro_em.families.family import NaturalForm, Statistics
from pyro_em.graph.binding import Selection
from pyro_em.graph.expression import Expression, Jet
from pyro_em.updates.coordinates import Coordinates
from pyro_em.updates.scatter import sum_to

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
class Argument:
    """How one argument follows from coordinates.

    Attributes:
        elements: Which each of its numbers reads, −1 for none. # (*cells, *event), and (…, L) where an
            expression depends on L
        selections: The parts that come from parameters of the block; of an expression all its leaves.
        name: The only parameter, where it is read as it stands.
        expression: What is made of its leaves, where parameters meet in it.
        known: The tensors that the expression knows. # (*cells, *event)
        widths: Of each of its leaves how many coordinates it depends on.
    """

    elements: Tensor
    selections: tuple[Selection, ...]
    name: str | None
    expression: Expression | None = None
    known: tuple[Tensor, ...] = ()
    widths: tuple[int, ...] = (1,)

    @property
    def width(self) -> int:
        """How many coordinates each of its numbers depends on."""
        return sum(self.widths)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of one group.

    Attributes:
        group: Its number.
        form: Its linear form.
        shape: Of its cells: all arguments together, and ``to_event`` dimensions.
        arguments: In the order of the form.
        rows: The elements that meet in each cell, number by number. # (cells, R)
        block: The block of each cell; one past the last where no element is read. # (cells,)
        slope: Where a cell's slope goes among those of all blocks. # (cells * R,)
        curvature: Where its curvature goes. # (cells * R * R,)
        numbers: Which number of the arguments reads each of a cell's elements; None where each reads
            its own. # (R,)
    """

    group: int
    form: NaturalForm
    shape: tuple[int, ...]
    arguments: Mapping[str, Argument]
    rows: Tensor
    block: Tensor
    slope: Tensor
    curvature: Tensor
    numbers: Tensor | None = None

    @property
    def width(self) -> tuple[int, int]:
        """How many cells there are, and how many numbers their arguments have."""
        rows, R = self.rows.shape
        return rows, R if self.numbers is None else int(self.numbers[-1]) + 1


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
            moves = {n: self._moved(a, u, known.get(n)) for n, a in c.arguments.items()}
            at = {n: found[0] for n, found in moves.items()}
            terms, g, H = _of_cells(c, s, at)
            first = torch.cat([m[1].reshape(len(c.rows), -1) for m in moves.values()], -1)
            if c.numbers is None:
                second = torch.cat([m[2].reshape(len(c.rows), -1) for m in moves.values()], -1)
                H = H * (first.unsqueeze(-1) * first.unsqueeze(-2))
                H.diagonal(dim1=-2, dim2=-1).addcmul_(g, second)
            else:
                g, H = g[:, c.numbers], H[:, c.numbers][:, :, c.numbers]
                H = H * (first.unsqueeze(-1) * first.unsqueeze(-2))
                H.addcmul_(g.unsqueeze(-1), _bends(c, [m[2] for m in moves.values()]))
            value.index_add_(0, c.block, _told(c, s, at, terms.sum(-1)).reshape(-1))
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
            moves = {n: self._moved(a, u, None) for n, a in c.arguments.items()}
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
        terms, g, H = _of_cells(c, s, at)
        H = H * (first.unsqueeze(-1) * first.unsqueeze(-2))
        H.diagonal(dim1=-2, dim2=-1).addcmul_(g, second)
        total = _told(c, s, at, terms.sum(-1)).reshape(len(c.rows), -1).sum(-1)
        terms = terms.reshape(len(c.rows), -1)
        return There(total, _EPS * terms.abs().sum(-1), g * first, H.neg_())

    def _moved(self, a: Argument, u: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """An argument at coordinates with its first and second derivatives.

        Returns:
            # (*cells, *event) each; of an expression (…), (…, L) and (…, L, L)
        """
        coordinates = self.places.coordinates
        if a.expression is not None:
            leaves, i = [], 0
            for s, width in zip(a.selections, a.widths, strict=True):
                own = a.elements[..., i : i + width]
                if s.param in self.fixed:
                    leaves.append(Jet(self.fixed[s.param][s.index]))
                elif s.param in coordinates.rows:
                    leaves.append(_share(u[own], s.index % width, i))
                else:
                    value, first, second = coordinates.jet(s.param, u[own[..., 0]])
                    leaves.append(Jet(value, {i: first}, {(i, i): second}))
                i += width
            found = a.expression.jet(leaves, a.known)
            return found.dense(a.width, u.new_zeros(a.elements.shape[:-1]))
        if a.name is not None:
            own = u[a.elements]
            if coordinates.intervals[a.name] == (0.0, math.inf):
                out = own.exp()
                return out, out, out
            if coordinates.intervals[a.name] == (-math.inf, math.inf):
                return own, torch.ones_like(own), torch.zeros_like(own)
        assert known is not None or a.name is not None
        if not a.selections:
            assert known is not None
            nothing = torch.zeros(a.elements.shape, dtype=torch.float64)
            return known.expand(a.elements.shape), nothing, nothing
        with torch.enable_grad():
            own = u[a.elements.clamp(min=0)].requires_grad_()
            out = own.new_zeros(()) if known is None else known
            for s in a.selections:
                found = coordinates.forward(s.param, own)
                for each in s.maps:
                    found = each.forward(found)
                found = found if s.factor is None else found * s.factor
                out = found if s.is_whole else torch.where(s.index >= 0, found, out)
            (first,) = torch.autograd.grad(out.sum(), own, create_graph=True)
            second = torch.zeros_like(first)
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), own)
        return out.detach(), first.detach(), second.detach()


def _share(u: Tensor, at: Tensor, begin: int) -> Jet:
    """An element of a softmax with its derivatives in the row that it is of.

    Args:
        u: The row. # (…, D)
        at: The element. # (…)
        begin: The number of the row's first coordinate.
    """
    shares = u.softmax(-1)
    value = shares.gather(-1, at.unsqueeze(-1)).squeeze(-1)
    columns = [begin + j for j in range(u.shape[-1])]
    away = [(at == j).to(u) - shares[..., j] for j in range(u.shape[-1])]
    first = {c: value * d for c, d in zip(columns, away, strict=True)}
    second: dict[tuple[int, int], Tensor | float] = {}
    for i, c in enumerate(columns):
        for j in range(i, len(columns)):
            own = shares[..., i] * (float(i == j) - shares[..., j])
            second[c, columns[j]] = value * (away[i] * away[j] - own)
    return Jet(value, first, second)


def _told(c: Cells, s: Statistics, at: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """Values of cells, minus infinity where sums do not tell them. # (*cells)"""
    if c.form.reaches is None:
        return values
    return torch.where(c.form.reaches(s, at), values, -math.inf)


def _bends(c: Cells, each: Sequence[Tensor]) -> Tensor:
    """Second derivatives of each number of the arguments, on the diagonal. # (cells, R, R)"""
    rows, R = c.rows.shape
    out = torch.zeros(rows, R, R, dtype=torch.float64)
    begin = 0
    for a, second in zip(c.arguments.values(), each, strict=True):
        own = second.reshape(rows, -1, a.width, a.width)
        for i in range(own.shape[1]):
            end = begin + a.width
            out[:, begin:end, begin:end] = own[:, i]
            begin = end
    return out


def _of_cells(c: Cells, s: Statistics, at: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of Q of each cell, and its derivatives. # (*cells, ·), (cells, A), (cells, A, A)"""
    rows, A = c.width
    if c.form.derivatives is not None:
        g, H = c.form.derivatives(s, at)
        return c.form.terms(s, at), g.reshape(rows, A), H.reshape(rows, A, A)
    with torch.enable_grad():
        leaves = [a.detach().clone().requires_grad_() for a in at.values()]
        terms = c.form.terms(s, dict(zip(at, leaves, strict=True)))
        first = torch.autograd.grad(terms.sum(), leaves, create_graph=True, allow_unused=True)
        g = _columns(first, leaves, rows)
        columns = []
        for column in g.unbind(-1):
            if not column.requires_grad:
                columns.append(torch.zeros_like(g))
                continue
            second = torch.autograd.grad(column.sum(), leaves, retain_graph=True, allow_unused=True)
            columns.append(_columns(second, leaves, rows))
    return terms.detach(), g.detach(), torch.stack(columns, -2).detach()


def _columns(parts: Sequence[Tensor | None], like: Sequence[Tensor], rows: int) -> Tensor:
    """Derivatives in all numbers of the arguments, cell by cell. # (cells, A)"""
    pairs = zip(parts, like, strict=True)
    return torch.cat(
        [(torch.zeros_like(t) if g is None else g).reshape(rows, -1) for g, t in pairs], -1
    )
