"""Selections: arguments whose elements are single elements of parameters, read off the autograd graph.

If every node between an argument and θ is a view, an index or a stack, J t for t = 0, 1, 2, … is the
index map, and θ[index] must equal the argument to the bit. An invertible elementwise map f of a
selection has one nonzero per row of J: (J t) / (J 1) is the index map, and the argument is f(θ[index]).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding, Selection
from pyro_em.graph.bindings.nodes import below_normalisation, read_maps, slopes_and_places
from pyro_em.graph.bindings.reached import Reached


def as_selection(reached: Reached, normalised: str) -> Binding | str:
    """A selection binding, or the reason why there is none.

    Args:
        reached: The argument.
        normalised: How the distribution normalises its rows, if it does.
    """
    constant, names, leaves = reached.constant, reached.names, reached.leaves
    point, top, how = below_normalisation(reached.point, reached.top, constant, normalised)
    edge, node, shape = point.edge, point.node, point.shape
    maps, has_factor, problem = read_maps(node)
    if problem:
        return problem
    parts, slopes = [], []
    covered = torch.zeros(shape, dtype=torch.bool, device=constant.device)
    for name in names:
        leaf = leaves[name]
        if edge is leaf:
            index = torch.arange(leaf.numel(), device=leaf.device).reshape(leaf.shape)
            used = torch.ones_like(index, dtype=torch.bool)
            slope = torch.ones_like(used, dtype=constant.dtype)
        else:
            # Of many rows each of these is a number per row: what is done with goes at once.
            slope, place = slopes_and_places(edge, shape, leaf, constant)
            used = slope != 0
            if not bool(torch.isfinite(slope).all()):
                return "its derivative is not finite at the present parameters"
            place = place / torch.where(used, slope, 1.0)
            index = torch.where(used, place.round_(), -1).long()
            del place
        if bool((used & covered).any()):
            return "several parameters meet in one element"
        covered |= used
        parts.append(Selection(name, index.reshape(-1)[top], maps))
        slopes.append(slope.reshape(-1)[top])
        del index, slope, used
    del covered
    checked = []
    for part, slope in zip(parts, slopes, strict=True):
        used = part.index >= 0
        if has_factor:
            if how:
                return "a factor multiplies rows that are normalised"
            if maps:
                there = part.forward(leaves[part.param].detach())
                factor = torch.where(used, constant / there, 1.0)
            else:  # to the bit what multiplies the parameter, also where that is zero
                factor = torch.where(used, slope, 1.0)
            if not bool((torch.isfinite(factor) & (factor > 0)).all()):
                return "its known factor is not positive"
            part = Selection(part.param, part.index, maps, factor)
        if maps and not how:
            selected = leaves[part.param].detach().reshape(-1)[part.index.clamp(min=0)]
            back = part.inverse(constant if part.factor is None else constant / part.factor)
            same = torch.isclose(back, selected, rtol=1e-3, atol=1e-5) | ~torch.isfinite(back)
            if not bool((same | ~used).all()):
                return "its elementwise map cannot be inverted at the present parameters"
        checked.append(part)
    binding = Binding("selection", tuple(names), constant, tuple(checked), normalise=how)
    if not is_right(binding, leaves):
        return "its elements are not those of the parameter"
    return binding


def is_right(selection: Binding, leaves: Mapping[str, Tensor]) -> bool:
    """Whether what a selection selects from the leaves is the argument that it holds as constant.

    To the bit, unless a map, a factor or a normalisation computes with it.
    """
    constant = selection.constant
    predicted = selection.evaluate({name: leaves[name].detach() for name in selection.params})
    if predicted.dtype == constant.dtype and torch.equal(predicted, constant):
        return True
    if selection.normalise or any(s.maps or s.factor is not None for s in selection.selections):
        # A parameter without dimensions takes the precision of what it multiplies.
        near = torch.isclose(predicted.to(constant), constant, rtol=1e-5, atol=1e-7, equal_nan=True)
    else:
        near = predicted == constant
    return bool(near.all())
