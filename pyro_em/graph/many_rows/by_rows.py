"""A model whose arguments differ from row to row, read some rows at a time.

Where a mean reads a component and covariates, `(x * w[z]).sum(-1)`, an enumerated run makes a number
for each row, component and covariate, and several times as many when derivatives are read. What stays
of them is little: the covariates, and which coefficient multiplies them. So the model is run on slices
of its data, and what their graphs say is put side by side.

That is the graph of all rows only if the model says of a row the same whichever rows are beside it. A
few rows, far apart, are read by themselves to see that. Where all that they show stands in the model's
arguments, no other row need be read (`pyro_em.graph.many_rows.given_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import PyroEMError
from pyro_em.expanded import once_each
from pyro_em.graph.bindings.sparse_lines import is_close
from pyro_em.graph.factors import FactorGraph, Group, seen_entries
from pyro_em.graph.many_rows.given_rows import (
    Later,
    Numbers,
    is_of_all,
    mapped_group,
    of_given_rows,
    some_rows,
    tensors_of,
)
from pyro_em.graph.many_rows.row_products import with_row_products
from pyro_em.graph.many_rows.slices import Slices, on_rows_of
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import Given
from pyro_em.tracing.missing import Missing
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.runs import Model, held_run
from pyro_em.tracing.sites import Role

Sites = Mapping[str, Mapping[str, Any]]
Read = Callable[[tuple, Structure, Sites | None], FactorGraph]

_FEW = 64  # rows that are read by themselves

_GIVEN = (Role.CONJUGATE, Role.GAUSSIAN)  # latents that have a value

# Distributions of torch that compute numbers of all rows and components when a plate expands them.
_COMPUTING = frozenset({"Beta", "Weibull"})


def by_rows(
    model: Model,
    kwargs: dict[str, Any],
    slices: Slices,
    looked: Sites | None,
    read: Read,
    numbers: Numbers,
    *,
    bound: bool,
    given_only: bool = False,
) -> FactorGraph | None:
    """The graph of all rows from those of slices; None where the model has to see all rows at once.

    Args:
        model: The user's model.
        kwargs: Its keyword arguments.
        slices: Of its positional arguments.
        looked: The sites of a plain run on all rows, with which what is read has to agree.
        read: The graph of a model with some rows, given its arguments, its skeleton and the sites of a
            plain run with these.
        numbers: The same at given parameters, without bindings.
        bound: Whether it is asked how parameters reach arguments.
        given_only: Whether the model is rather run on all rows than read in slices, where some of its
            rows do not stand in its arguments.
    """
    few = slices.spread(_FEW)
    try:
        args, structure = slices.at(few)
        own = on_rows_of(model, structure) if isinstance(model, Given) else model
        plain = None if looked is None else _plain(own, args, kwargs, structure, looked, few)
        alone = with_row_products(read(args, structure, plain), slices.plate)
        if not _depends_on_rows(alone, slices.plate, bound):
            return None
        # Where entries are missing, others stand in their place than the model was given.
        given = of_given_rows(alone, few, slices) if bound and not alone.missing else None
        if given is not None and is_of_all(given, slices, numbers):
            return given
        if given_only:
            return None
        whole: _Whole | None = None
        for rows in slices:
            graph = with_row_products(read(*slices.at(rows), None), slices.plate, alone)
            whole = whole or _Whole(graph, slices)
            if not whole.take(graph, rows):
                return None
    except (PyroEMError, RuntimeError, ValueError, IndexError):
        return None  # what is wrong is said of all rows
    assert whole is not None
    graph = whole.graph()
    return graph if whole.is_at(graph, few, alone) else None


def _plain(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    looked: Sites,
    rows: Tensor,
) -> Sites:
    """A plain run on some rows, at the values that their latents have in one on all of them."""
    values = {}
    for name in structure.latents:
        traced = looked[name]["value"]
        value: Tensor = getattr(traced, "_t", traced)
        own = structure.sites[name].plates
        if own:
            value = value.movedim(-len(own), 0)[rows].movedim(0, -len(own))
        values[name] = value
    return held_run(model, args, kwargs, values)


def _depends_on_rows(graph: FactorGraph, plate: str, bound: bool) -> bool:
    """Whether some argument has a number for each row and value of a latent, and slices make up all.

    Where continuous latents are at given values a number for each row is enough.
    """
    # Pyro puts labels and the values of a latent together, for each row and value.
    found = bool(graph.structure.clamped)
    least = 0 if any(g.role in _GIVEN for g in graph.groups) else 1
    for group in graph.groups:
        if group.raw is not None or group.value_binding is not None or group.nested is not None:
            return False
        if len(group.members) != 1 or (bound and not _is_bound(group, graph)):
            return False
        dims = group.dims[0]
        if plate not in dims:
            continue
        at = 1 + dims.index(plate)
        found |= group.distribution in _COMPUTING and len(dims) > group.n_plates
        for t in group.arguments.values():
            # Of a latent whose probabilities differ each row has a number for each of its values.
            last = None if group.role is Role.LATENT else 1 + len(group.sizes)
            of_latents = t.shape[1 + group.n_plates : last]
            found |= t.shape[at] > 1 and max(of_latents, default=1) > least
    return found and (not graph.missing or bool(graph.structure.lines))


def _is_bound(group: Group, graph: FactorGraph) -> bool:
    """Whether bindings give all of a site, but for a mean whose line is bound apart."""
    if group.members[0] in graph.structure.lines and "loc" in group.bindings:
        group = replace(group, bindings={n: b for n, b in group.bindings.items() if n != "loc"})
    return group.is_static


class _Whole:
    """Groups of all rows, filled slice by slice.

    Args:
        first: The graph of the first slice.
        slices: All of them.
    """

    def __init__(self, first: FactorGraph, slices: Slices) -> None:
        self.first, self.slices = first, slices
        self.values = values_of(first.parameters)
        self.filled: dict[tuple[int, int], Tensor] = {}
        self.missing: list[tuple[Missing, ...]] = []

    def take(self, graph: FactorGraph, rows: slice) -> bool:
        """Take in what a slice says; whether it is of the form of the first one."""
        if len(graph.groups) != len(self.first.groups):
            return False
        kinds = ([(m.site, m.whole) for m in own.missing] for own in (graph, self.first))
        if next(kinds) != next(kinds):
            return False
        self.missing.append(graph.missing)
        for g, (own, first) in enumerate(zip(graph.groups, self.first.groups, strict=True)):
            if own.members != first.members or own.dims != first.dims:
                return False
            later = self._later(first)
            mine, theirs = list(tensors_of(own, later)), list(tensors_of(first, later))
            if len(mine) != len(theirs):
                return False
            at = self._along(first)
            for i, (t, like) in enumerate(zip(mine, theirs, strict=True)):
                if not self._put((g, i), t.detach(), like.detach(), at, rows):
                    return False
        return True

    def _along(self, group: Group) -> int | None:
        """The dimension of the rows in what a group holds."""
        dims = group.dims[0]
        return 1 + dims.index(self.slices.plate) if self.slices.plate in dims else None

    def _later(self, group: Group) -> Later | None:
        """Where rows are, and at which parameters: what follows from these is computed later."""
        at = self._along(group)
        return None if at is None else (at, self.values)

    def _put(
        self, key: tuple[int, int], t: Tensor, like: Tensor, at: int | None, rows: slice
    ) -> bool:
        t, like = once_each(t), once_each(like)
        if at is None or t.shape[at] == 1:
            return t.shape == like.shape and torch.equal(t, like)
        shape = list(t.shape)
        shape[at] = like.shape[at]
        if tuple(shape) != like.shape or t.dtype != like.dtype or like.shape[at] == 1:
            return False
        if t.shape[at] != rows.stop - rows.start:
            return False
        if key not in self.filled:
            shape[at] = self.slices.rows
            self.filled[key] = t.new_empty(shape)
        self.filled[key].narrow(at, rows.start, t.shape[at]).copy_(t)
        return True

    def graph(self) -> FactorGraph:
        """The graph of all rows."""
        groups = []
        for g, group in enumerate(self.first.groups):
            at, number = self._along(group), count()

            def whole(t: Tensor, at: int | None = at, g: int = g, number: Any = number) -> Tensor:
                i, one = next(number), once_each(t.detach())
                filled = self.filled.get((g, i))
                shape = list(t.shape)
                if at is not None and shape[at] > 1:
                    shape[at] = self.slices.rows
                return (one if filled is None else filled).expand(shape)

            sizes = tuple(self.slices.rows if at == 1 + d else n for d, n in enumerate(group.sizes))
            groups.append(replace(mapped_group(group, whole, self._later(group)), sizes=sizes))
        structure, plate = self.slices.structure, self.slices.plate
        missing = tuple(
            replace(m[0], entries=sum(p.entries for p in m), of=sum(p.of for p in m))
            for m in zip(*self.missing, strict=True)
        )
        return replace(
            self.first, structure=structure, groups=tuple(groups), parted=plate, missing=missing
        )

    def is_at(self, graph: FactorGraph, rows: Tensor, alone: FactorGraph) -> bool:
        """Whether a graph says of some rows what they say by themselves."""
        part = some_rows(graph, self.slices.plate, rows)
        for own, other in zip(part.groups, alone.groups, strict=True):
            pairs = [(_seen(own), _seen(other))]
            pairs += [(t, other.arguments[name]) for name, t in own.arguments.items()]
            pairs += [
                (a, b)
                for a, b in ((own.mask, other.mask), (own.elements, other.elements))
                if a is not None and b is not None
            ]
            for a, b in pairs:
                same = is_close if a.is_floating_point() else torch.equal
                if a.shape != b.shape or not same(a, b.detach()):
                    return False
        return True


def _seen(group: Group) -> Tensor:
    """The value of a group, zero where it is hidden: there stands what is feasible."""
    seen = seen_entries(group)
    return group.value if seen is None else torch.where(seen, group.value, 0)
