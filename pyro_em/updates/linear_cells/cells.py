"""Cells of a group in linear form: how arguments follow from coordinates, and Q, with derivatives.

A cell is one value of all arguments of a group. An argument reads a few elements of parameters, and
follows from their coordinates u by a = f(u), or from several of them by an expression such as α / m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.family import NaturalForm, Statistics
from pyro_em.graph.bindings.binding import Selection
from pyro_em.graph.bindings.expression import Expression, Jet
from pyro_em.updates.linear_cells.coordinates import Coordinates


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

    def jet(
        self,
        u: Tensor,
        known: Tensor | None,
        coordinates: Coordinates,
        fixed: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The argument at coordinates with its first and second derivatives.

        Args:
            u: The coordinates of all elements.
            known: What is known of the argument, where it has constant parts.
            coordinates: What they are the coordinates of.
            fixed: Parameters outside the block that meet those of the block.

        Returns:
            # (*cells, *event) each; of an expression (…), (…, L) and (…, L, L)
        """
        if self.expression is not None:
            leaves, i = [], 0
            for s, width in zip(self.selections, self.widths, strict=True):
                own = self.elements[..., i : i + width]
                if s.param in fixed:
                    leaves.append(Jet(fixed[s.param][s.index]))
                elif s.param in coordinates.rows:
                    leaves.append(_share(u[own], s.index % width, i))
                else:
                    value, first, second = coordinates.jet(s.param, u[own[..., 0]])
                    leaves.append(Jet(value, {i: first}, {(i, i): second}))
                i += width
            found = self.expression.jet(leaves, self.known)
            return found.dense(self.width, u.new_zeros(self.elements.shape[:-1]))
        if self.name is not None:
            own = u[self.elements]
            if coordinates.intervals[self.name] == (0.0, math.inf):
                out = own.exp()
                return out, out, out
            if coordinates.intervals[self.name] == (-math.inf, math.inf):
                return own, torch.ones_like(own), torch.zeros_like(own)
        assert known is not None or self.name is not None
        if not self.selections:
            assert known is not None
            nothing = torch.zeros(self.elements.shape, dtype=torch.float64)
            return known.expand(self.elements.shape), nothing, nothing
        with torch.enable_grad():
            own = u[self.elements.clamp(min=0)].requires_grad_()
            out = own.new_zeros(()) if known is None else known
            for s in self.selections:
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


def where_told(c: Cells, s: Statistics, at: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """Values of cells, minus infinity where sums do not tell them. # (*cells)"""
    if c.form.reaches is None:
        return values
    return torch.where(c.form.reaches(s, at), values, -math.inf)


def bends_of(c: Cells, each: Sequence[Tensor]) -> Tensor:
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


def derivatives_of(
    c: Cells, s: Statistics, at: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
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
