"""Ends of a support: the outermost data that have posterior weight.

    low ← min {x_i : w_i > 0},     high ← max {x_i : w_i > 0},

an end a little outwards of it, since a transform of the parameter rounds and the support of a Uniform
does not contain its upper end. What parts of the data say of an element is its outermost datum in the
direction of the end, and the largest of these counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.errors import DegenerateError, message
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.expectations.scatter import component_in_words
from pyro_em.updates.update import ParameterUpdate

MARGIN = 64
"""Units of rounding by which an end lies outside the data."""


def outermost(
    update: ParameterUpdate, graph: FactorGraph, counts: Sequence[Tensor], value: Tensor
) -> Tensor:
    """Of one part, the outermost datum of each element, times −1 for lower ends. # (elements,)

    Args:
        update: An end of a support.
        graph: The part's graph.
        counts: Posterior weights per group.
        value: The parameter's value, for its shape.

    Returns:
        −inf for an element that no datum has weight for.
    """
    assert update.kind is not None
    sign, out = update.kind.form.end, value.new_full((value.numel() + 1,), -math.inf)
    for use in update.uses:
        group, factor = graph.groups[use.group], use.selection.factor
        index = use.selection.index
        found = outermost_data(group, counts[use.group], index, value.numel(), value, sign, factor)
        out[:-1] = torch.maximum(out[:-1], found)
    return out[:-1]


def outermost_data(
    group: Group,
    weights: Tensor,
    index: Tensor,
    size: int,
    like: Tensor,
    sign: int,
    factor: Tensor | None = None,
) -> Tensor:
    """The outermost datum with weight of each of some places, times −1 for lower ends. # (size,)

    Args:
        group: Whose data.
        weights: Expected counts. # (members, *sizes)
        index: The place that each cell belongs to, −1 for none. # (*cells)
        size: How many places there are.
        like: A tensor of the dtype of the ends.
        sign: −1 for lower ends, 1 for upper ones.
        factor: What multiplies an end before it is one of the data. # (*cells)

    Returns:
        −inf for a place that no datum has weight for.
    """
    out = like.new_full((size + 1,), -math.inf)
    w = weights.to(like.dtype)
    w = w.reshape(w.shape + (1,) * group.event_dims)
    w = w if group.elements is None else w * group.elements
    shape = torch.broadcast_shapes(index.shape, w.shape, group.value.shape)
    data = group.value.detach()
    data = data if factor is None else data / factor
    x = data.to(like.dtype)
    # In a coarser dtype a datum may come to lie outside.
    x = sign * torch.where(sign * x >= sign * data, x, _outwards(x, sign))
    x = torch.where((w > 0).expand(shape), x.expand(shape), -math.inf)
    index = torch.where(index >= 0, index, size).expand(shape)
    # Along dimensions in which the parameter does not vary, the largest is taken at once.
    return out.scatter_reduce(0, index.reshape(-1), x.reshape(-1), "amax")[:-1]


def end_at(
    update: ParameterUpdate,
    graph: FactorGraph,
    found: Tensor,
    values: Mapping[str, Tensor],
) -> tuple[Tensor, list[int]]:
    """The new value of a parameter that is an end, and the flat indices of elements without data.

    Args:
        update: The end.
        graph: The graph of any one part.
        found: The largest of what parts gave as `outermost`.
        values: All parameters as they are now.

    Raises:
        DegenerateError: If a support would have no width.
    """
    assert update.kind is not None
    sign, value = update.kind.form.end, values[update.name]
    empty = found == -math.inf
    natural = _outwards(sign * torch.where(empty, torch.zeros_like(found), found), sign)
    new = update.uses[0].selection.inverse(natural)
    interval = bounds(graph.parameters[update.name].constraint)
    if interval is not None:
        new = new.clamp(*interval)
    new = torch.where(empty, value.reshape(-1), new.to(value.dtype)).reshape(value.shape)
    _refuse_no_width(update, graph, {**values, update.name: new}, empty)
    return new, empty.nonzero().reshape(-1).tolist()


def _outwards(x: Tensor, sign: int) -> Tensor:
    info = torch.finfo(x.dtype)
    return x + sign * (MARGIN * info.eps * x.abs() + info.tiny)


def _refuse_no_width(
    update: ParameterUpdate, graph: FactorGraph, values: Mapping[str, Tensor], empty: Tensor
) -> None:
    for use in update.uses:
        group = graph.groups[use.group]
        low, high = (group.bindings[a].evaluate(values) for a in ("low", "high"))
        size = torch.maximum(low.abs(), high.abs())
        flat = (high - low) <= 4 * MARGIN * torch.finfo(low.dtype).eps * size
        index = use.selection.index
        flat, index = torch.broadcast_tensors(flat, index)
        bad = index[flat & (index >= 0)]
        bad = bad[~empty[bad]]
        if len(bad):
            raise no_width(update.name, values[update.name], int(bad[0]), group)


def no_width(name: str, value: Tensor, element: int, group: Group) -> DegenerateError:
    """That an interval collapses, by the parameter and the flat index of its element."""
    which = component_in_words(value, 0, element)
    return DegenerateError(
        message(
            f"parameter '{name}', {which}",
            "its interval collapses: all data that the component may have produced are equal. The "
            "update was rolled back.",
            "a density on an interval without width is unbounded; it is estimated from site "
            f"'{group.members[0]}'",
            [
                "begin with wider intervals, or elsewhere: num_restarts=10, seed=0",
                f"hold one end: updates={{'{name}': Fixed()}}",
                "use fewer components",
            ],
        )
    )
