"""Both ends of a support made of two parameters: Uniform(low, low + width), Uniform(c − h, c + h).

The outermost data with posterior weight give both ends, as they do where each is a parameter
(`pyro_em.updates.closed_forms.ends`); where each pair of elements makes one interval, the two
parameters follow:

    low(θ) = min {x_i : w_i > 0},     high(θ) = max {x_i : w_i > 0},

by Newton's method in θ, which is one step where the ends are linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.expression import Expression, Jet, leaf
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.closed_forms.ends import MARGIN, no_width, outermost_data

_STEPS = 50

_ENDS = ("low", "high")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two parameters whose elements make intervals, one with one.

    Attributes:
        group: The number of the group whose support ends there.
        params: Their names.
        elements: Of each interval the element of each parameter. # (2, intervals)
        index: The interval of each cell. # (*cells)
    """

    group: int
    params: tuple[str, str]
    elements: Tensor
    index: Tensor


def pair_at(graph: FactorGraph, name: str) -> Pair | None:
    """The pair that a parameter is one of, which all else in the model leaves alone; None for none."""
    reached = [g for g, group in enumerate(graph.groups) if name in group.params]
    if len(reached) != 1:
        return None
    (g,) = reached
    group = graph.groups[g]
    if group.role is not Role.DATA or group.value_binding is not None or not _has_ends(group):
        return None
    params = tuple(dict.fromkeys(p for a in _ENDS for p in group.bindings[a].params))
    bindings = [group.bindings[a] for a in _ENDS]
    if len(params) != 2 or any(b.how not in ("selection", "composite") for b in bindings):
        return None
    others = [h for h, other in enumerate(graph.groups) if set(params) & set(other.params)]
    plain = all(
        s.is_whole and not s.maps and s.factor is None for b in bindings for s in b.selections
    )
    if others != [g] or not plain or any(b.known for b in bindings):
        return None
    if not any(b.how == "composite" for b in bindings):
        return None
    shape = torch.broadcast_shapes(*(b.constant.shape for b in bindings))
    read = []
    for p in params:
        own = [s.index.expand(shape) for b in bindings for s in b.selections if s.param == p]
        if any(not torch.equal(index, own[0]) for index in own[1:]):
            return None
        read.append(own[0])
    pairs, index = torch.unique(torch.stack(read).reshape(2, -1), dim=1, return_inverse=True)
    sizes = [graph.parameters[p].leaf.numel() for p in params]
    if any(
        n != pairs.shape[1] or len(torch.unique(own)) != n
        for n, own in zip(sizes, pairs, strict=True)
    ):
        return None
    return Pair(g, (params[0], params[1]), pairs, index.reshape(shape))


def _has_ends(group: Group) -> bool:
    rules = {} if group.family is None else group.family.rules
    if not set(_ENDS) <= set(rules) or not set(_ENDS) <= set(group.bindings):
        return False
    return [rules[a].kind.form.end for a in _ENDS] == [-1, 1]


def outermost_of(pair: Pair, graph: FactorGraph, counts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Of one part the outermost data of each interval, lower ones times −1. # (2, intervals)

    Args:
        pair: The parameters, as the part's graph has them.
        graph: The part's graph.
        counts: Posterior weights per group.
        like: For the dtype.
    """
    group, w = graph.groups[pair.group], counts[pair.group]
    n = pair.elements.shape[1]
    each = [outermost_data(group, w, pair.index, n, like, sign) for sign in (-1, 1)]
    return torch.stack(each)


def ends_at(
    pair: Pair, graph: FactorGraph, found: Tensor, values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """New values of both parameters, and the flat indices of elements without data.

    Args:
        pair: The parameters.
        graph: The graph of any one part.
        found: The largest of what parts gave as `outermost_of`.
        values: All parameters as they are now.

    Raises:
        DegenerateError: If a support would have no width.
    """
    empty = torch.isinf(found).any(0)
    ends = torch.where(empty, 0.0, found.to(torch.float64)) * found.new_tensor([[-1.0], [1.0]])
    old = [
        values[p].detach().reshape(-1)[own]
        for p, own in zip(pair.params, pair.elements, strict=True)
    ]
    at = [t.to(torch.float64) for t in old]
    eps = torch.finfo(old[0].dtype).eps
    size = torch.stack([*ends.abs(), *(t.abs() for t in at)]).amax(0)
    flat = (ends[1] - ends[0] <= 4 * MARGIN * eps * size) & ~empty
    if bool(flat.any()):
        which = int(pair.elements[1][flat][0])
        raise no_width(pair.params[1], values[pair.params[1]], which, graph.groups[pair.group])
    # Transforms round, and the support does not contain its upper end.
    margin = MARGIN * eps * size + torch.finfo(old[0].dtype).tiny
    wanted = ends + torch.stack([-margin, margin])
    bindings = [graph.groups[pair.group].bindings[a] for a in _ENDS]
    at, is_solved = _solved([_as_expression(b, pair) for b in bindings], at, wanted, margin)
    new, without = {}, {}
    for p, own, value in zip(pair.params, pair.elements, at, strict=True):
        interval = bounds(graph.parameters[p].constraint)
        if interval is not None:
            is_solved &= (value > interval[0]) & (value < interval[1])
        new[p], without[p] = value, [int(i) for i in own[empty]]
    for p, own, before in zip(pair.params, pair.elements, old, strict=True):
        out = values[p].detach().reshape(-1).clone()
        out[own] = torch.where(is_solved & ~empty, new[p].to(before), before)
        new[p] = out.reshape(values[p].shape)
    return new, without


def _as_expression(binding: Binding, pair: Pair) -> tuple[Expression, list[int]]:
    """An end as an expression, and which parameter each of its leaves is."""
    made = binding.expression or leaf(0)
    return made, [pair.params.index(s.param) for s in binding.selections]


def _solved(
    ends: Sequence[tuple[Expression, list[int]]], at: list[Tensor], wanted: Tensor, margin: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The numbers at which both ends are as wanted, and for which intervals they were found."""
    for _ in range(_STEPS):
        jets = [e.jet([Jet(at[i], {i: 1.0}) for i in which], ()) for e, which in ends]
        low, high = (j.dense(2, at[0]) for j in jets)
        off = torch.stack([low[0], high[0]]) - wanted
        if bool((off.abs() <= margin / 4).all()):
            break
        (a, b), (c, d) = low[1].unbind(-1), high[1].unbind(-1)
        determinant = a * d - b * c
        at = [
            at[0] - (d * off[0] - b * off[1]) / determinant,
            at[1] - (a * off[1] - c * off[0]) / determinant,
        ]
    return at, (off.abs() <= margin / 2).all(0)
