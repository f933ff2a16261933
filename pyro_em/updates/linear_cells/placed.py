"""Which elements of parameters meet in the cells of groups in linear form: how blocks are laid out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding, Selection
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.linear_cells.blocks import Places
from pyro_em.updates.linear_cells.cells import Argument, Cells
from pyro_em.updates.linear_cells.coordinates import Coordinates


def size_of(coordinates: Coordinates, graph: FactorGraph) -> int:
    """How many second derivatives the problems of some parameters have together, with what fills them.

    Args:
        coordinates: The elements.
        graph: The graph.
    """
    owner, slot = _problems(list(_rows(_read(coordinates, graph)).values()), coordinates.size)
    return (int(owner.max()) + 1) * (int(slot.max()) + 1) ** 2


def cells_of(coordinates: Coordinates, graph: FactorGraph) -> int:
    """How many second derivatives the cells have in which rows of simplexes meet other parameters.

    Args:
        coordinates: The elements.
        graph: The graph.
    """
    if not coordinates.rows:
        return 0
    return sum(r.numel() * r.shape[-1] for r in _rows(_read(coordinates, graph)).values())


def places_of(coordinates: Coordinates, graph: FactorGraph, *, is_part: bool = False) -> Places:
    """Where the elements of some parameters are read.

    Args:
        coordinates: The elements.
        graph: The graph.
        is_part: Whether other parts of the data have cells of their own: elements that do not meet here
            may meet there, so that all of them are one problem.
    """
    found = _read(coordinates, graph)
    rows = _rows(found)
    alone = None if is_part else _alone(found, rows, coordinates)
    if is_part:
        owner, slot = (
            torch.zeros(coordinates.size, dtype=torch.long),
            torch.arange(coordinates.size),
        )
    elif alone is None:
        owner, slot = _problems(list(rows.values()), coordinates.size)
    else:
        owner, slot = _in_cells(*rows.values())
    B, m = int(owner.max()) + 1, int(slot.max()) + 1
    found_cells = []
    for g, (shape, arguments) in found.items():
        family, own = graph.groups[g].family, rows[g]
        assert family is not None and family.joint_form is not None
        first = own.amax(-1)
        block = torch.where(first >= 0, owner[first], B)
        at = torch.where(own >= 0, slot[own], m)
        slope = block.unsqueeze(-1) * (m + 1) + at
        curvature = slope.unsqueeze(-1) * (m + 1) + at.unsqueeze(-2)
        each = (slope.reshape(-1), curvature.reshape(-1), _numbers(arguments, math.prod(shape)))
        found_cells.append(Cells(g, family.joint_form, shape, arguments, own, block, *each))
    unused = torch.ones(B, m, dtype=torch.float64)
    unused[owner, slot] = 0.0
    flat = _shifts(coordinates, owner, slot, m)
    seen = torch.unique(torch.cat([own.reshape(-1) for own in rows.values()]))
    is_read = int((seen >= 0).sum()) == coordinates.size
    unused = torch.diag_embed(unused) + flat
    found_places = Places(
        coordinates, tuple(found_cells), owner, slot, (B, m), unused, is_read, alone
    )
    return replace(found_places, is_square=_is_square(coordinates, found_cells, owner, (B, m)))


def _alone(read: _Read, rows: Mapping[int, Tensor], coordinates: Coordinates) -> Tensor | None:
    """See `Places.alone`."""
    if len(read) > 1:
        return None
    ((_, arguments),), (own,) = read.values(), rows.values()
    if any(a.expression is not None for a in arguments.values()):
        return None
    if own.numel() != coordinates.size or len(torch.unique(own)) != own.numel():
        return None
    positive = []
    for a in arguments.values():
        interval = None if a.name is None else coordinates.intervals[a.name]
        if interval not in ((0.0, math.inf), (-math.inf, math.inf)):
            return None
        positive += [interval == (0.0, math.inf)] * (a.elements.numel() // len(own))
    return torch.tensor(positive)


def _is_square(
    coordinates: Coordinates, cells: Sequence[Cells], owner: Tensor, counts: tuple[int, int]
) -> bool:
    """See `Places.is_square`."""
    if len(cells) != 1 or coordinates.rows or cells[0].numbers is None:
        return False
    (c,), (B, m) = cells, counts
    known = any(a.expression is None and a.name is None for a in c.arguments.values())
    full = torch.bincount(owner, minlength=B)
    is_one = len(torch.unique(c.block)) == B and bool((c.rows >= 0).all()) and not known
    return is_one and c.width == (B, m) and bool((full == m).all())


def _shifts(coordinates: Coordinates, owner: Tensor, slot: Tensor, m: int) -> Tensor:
    """What a shift of all coordinates of a row of a simplex costs, which moves nothing. # (B, m, m)"""
    out = torch.zeros(int(owner.max()) + 1, m, m, dtype=torch.float64)
    for name, D in coordinates.rows.items():
        own = coordinates.slices[name]
        at, of = slot[own].reshape(-1, D), owner[own].reshape(-1, D)
        same = of.unsqueeze(-1) == of.unsqueeze(-2)
        out[of.unsqueeze(-1), at.unsqueeze(-1), at.unsqueeze(-2)] += same.to(out)
    return out


def _numbers(arguments: Mapping[str, Argument], cells: int) -> Tensor | None:
    """See `Cells.numbers`."""
    if all(a.expression is None for a in arguments.values()):
        return None
    out: list[int] = []
    for a in arguments.values():
        first = 0 if not out else out[-1] + 1
        for i in range(a.elements.numel() // (cells * a.width)):
            out += [first + i] * a.width
    return torch.tensor(out)


def _in_cells(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`_problems` where each cell is one, in its order. # (size,) each"""
    order = rows.reshape(-1).argsort()
    return order // rows.shape[1], order % rows.shape[1]


_Read = dict[int, tuple[tuple[int, ...], dict[str, Argument]]]


def _read(coordinates: Coordinates, graph: FactorGraph) -> _Read:
    """The groups that read some parameters: the shape of their cells, and their arguments."""
    return {
        g: _arguments(group, coordinates)
        for g, group in enumerate(graph.groups)
        if any(s.param in coordinates.slices for b in group.bindings.values() for s in b.selections)
    }


def _rows(read: _Read) -> dict[int, Tensor]:
    """The elements that meet in each cell of each group. # (cells, A) each"""
    return {
        g: torch.cat([a.elements.reshape(math.prod(shape), -1) for a in arguments.values()], -1)
        for g, (shape, arguments) in read.items()
    }


def _arguments(
    group: Group, coordinates: Coordinates
) -> tuple[tuple[int, ...], dict[str, Argument]]:
    """The shape of a group's cells, and how each argument follows from coordinates."""
    family = group.family
    assert family is not None and family.joint_form is not None
    names = [n for n in family.joint_form.arguments if n in group.bindings]
    events = {n: family.argument_dims.get(n, 0) for n in names}
    shapes = {n: group.bindings[n].constant.shape for n in names}
    cells = torch.broadcast_shapes(*(s[: len(s) - events[n]] for n, s in shapes.items()))
    out = {}
    for name in names:
        event = shapes[name][len(shapes[name]) - events[name] :]
        if group.bindings[name].how == "composite":
            out[name] = _met(group.bindings[name], coordinates, (*cells, *event))
            continue
        elements = torch.full(shapes[name], -1)
        own = []
        for s in group.bindings[name].selections:
            # A Beta holds both of its arguments as one tensor, which both parameters reach.
            if s.param not in coordinates.slices or not bool((s.index >= 0).any()):
                continue
            factor = None if s.factor is None else s.factor.to("cpu", torch.float64, copy=True)
            s = replace(s, index=s.index.cpu(), factor=factor)
            elements = torch.where(
                s.index >= 0, s.index + coordinates.slices[s.param].start, elements
            )
            own.append(s)
        plain = len(own) == 1 and own[0].is_whole and not own[0].maps and own[0].factor is None
        out[name] = Argument(
            elements.expand(*cells, *event).contiguous(),
            tuple(own),
            own[0].param if plain else None,
        )
    return tuple(cells), out


def _met(binding: Binding, coordinates: Coordinates, shape: tuple[int, ...]) -> Argument:
    """An argument in which parameters meet. # elements: (*shape, leaves)"""
    selections = tuple(Selection(s.param, s.index.cpu().expand(shape)) for s in binding.selections)
    elements = [_read_by(s, coordinates, shape) for s in selections]
    known = tuple(t.to("cpu", torch.float64).expand(shape) for t in binding.known)
    return Argument(
        torch.cat(elements, -1).contiguous(),
        selections,
        None,
        binding.expression,
        known,
        tuple(e.shape[-1] for e in elements),
    )


def _read_by(s: Selection, coordinates: Coordinates, shape: tuple[int, ...]) -> Tensor:
    """The coordinates that each number of a leaf depends on: its own, or its row. # (*shape, ·)"""
    if s.param not in coordinates.slices:
        return torch.full((*shape, 1), -1)
    begin, D = coordinates.slices[s.param].start, coordinates.rows.get(s.param, 0)
    if not D:
        return s.index.unsqueeze(-1) + begin
    return (s.index // D * D + begin).unsqueeze(-1) + torch.arange(D)


def _problems(rows: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The small problem that each element belongs to, and its place there. # (size,) each

    Args:
        rows: Per group the elements that meet in each cell, −1 for none. # (cells, A)
        size: How many elements there are.
    """
    owner = torch.arange(size + 1)
    while True:
        before = owner
        for cells in rows:
            at = torch.where(cells >= 0, cells, size)
            least = owner[at].amin(-1, keepdim=True).expand(at.shape)
            owner = owner.scatter_reduce(0, at.reshape(-1), least.reshape(-1), "amin")
            owner[size] = size
        if torch.equal(owner, before):
            break
    _, owner = torch.unique(owner[:-1], return_inverse=True)
    order, counts = owner.argsort(stable=True), torch.bincount(owner)
    first = counts.cumsum(0) - counts
    slot = torch.empty_like(owner)
    slot[order] = torch.arange(size) - first[owner[order]]
    return owner, slot
