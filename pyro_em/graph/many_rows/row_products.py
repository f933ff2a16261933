"""Arguments in which a number of each row and an element of a parameter meet, held by the two.

An exposure e_n in r[z] e_n is one number of each row, and which elements of r are read is the same in
all rows. A reading gives index and factor at each row and value of the latents, N K numbers each: where
they say the same along a dimension they are held once along it, N + K numbers in all. So is the index
of what a known group of each row chooses, p[g]: it is a number of the row plus one of the cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from pyro_em.expanded import once_each
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.by_row import ByRow
from pyro_em.graph.factors import FactorGraph, Group


def with_row_products(
    graph: FactorGraph, plate: str, like: FactorGraph | None = None
) -> FactorGraph:
    """A graph whose selections hold their known factors, and what these multiply, once each.

    Args:
        graph: That of some rows.
        plate: The plate of rows.
        like: That of other rows, already so: where the elements that are read differ between its rows
            they may differ here.
    """
    others: Iterable[Group | None] = like.groups if like is not None else [None] * len(graph.groups)
    pairs = zip(graph.groups, others, strict=False)
    groups = tuple(_of_group(own, plate, other) for own, other in pairs)
    return graph if len(groups) != len(graph.groups) else replace(graph, groups=groups)


def _of_group(group: Group, plate: str, like: Group | None) -> Group:
    if plate not in group.dims[0]:
        return group
    at = 1 + group.dims[0].index(plate)
    bindings = dict(group.bindings)
    for name, binding in group.bindings.items():
        other = None if like is None else like.bindings.get(name)
        if _has_factors(binding):
            bindings[name] = _as_product(binding, at, other)
        elif _is_chosen(binding, at, other):
            bindings[name] = _as_sum(binding, at)
    return replace(group, bindings=bindings)


def _is_chosen(binding: Binding, at: int, like: Binding | None) -> bool:
    """Whether it selects elements of parameters, others in some rows than in others."""
    if binding.how != "selection" or any(s.factor is not None for s in binding.selections):
        return False
    if not all(s.is_whole for s in binding.selections):
        return False
    if like is not None:  # by chance it may be the same in these rows
        return any(isinstance(s, ByRow) for s in like.selections)
    return any(once_each(s.index).shape[at] > 1 for s in binding.selections)


def _as_sum(binding: Binding, at: int) -> Binding:
    selections = tuple(ByRow.of(s, at) or s for s in binding.selections)
    return replace(_without_constant(binding), selections=selections)


def _without_constant(binding: Binding) -> Binding:
    """A binding that selects all elements: of its constant it has but the shape."""
    constant = binding.constant.new_zeros(()).expand(binding.constant.shape)
    return replace(binding, constant=constant)


def _has_factors(binding: Binding) -> bool:
    """Whether it selects all of its elements, and multiplies them by what is known."""
    if binding.how != "selection" or binding.normalise or len(binding.selections) != 1:
        return False
    (selection,) = binding.selections
    return selection.factor is not None and selection.is_whole


def _as_product(binding: Binding, at: int, like: Binding | None) -> Binding:
    (selection,) = binding.selections
    assert selection.factor is not None
    factor = _held_once(selection.factor, [d for d in range(selection.index.dim()) if d != at])
    dims = list(range(selection.index.dim()))
    if like is not None and like.selections and once_each(like.selections[0].index).shape[at] > 1:
        dims.remove(at)  # by chance it is the same in these rows
    index = _held_once(selection.index, dims)
    selections = (replace(selection, index=index, factor=factor),)
    return replace(_without_constant(binding), selections=selections)


def _held_once(t: Tensor, dims: Iterable[int]) -> Tensor:
    """The same numbers, held once along dimensions in which they are the same."""
    one = t
    for d in dims:
        first = one.narrow(d, 0, 1)
        if one.shape[d] > 1 and bool((one == first).all()):
            one = first
    return one.expand(t.shape)
