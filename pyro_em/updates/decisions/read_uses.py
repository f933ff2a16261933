"""How a parameter stands in an argument, for closed forms: its factor, its maps, its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_em.families.family import LOG_SIMPLEX, Rule
from pyro_em.families.form import Form
from pyro_em.graph.bindings.binding import PRODUCT, Binding, Selection
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.update import Use, natural_factor


def as_use(
    graph: FactorGraph, g: int, argument: str, binding: Binding, name: str
) -> tuple[Use | None, str]:
    """A parameter in an argument as a closed form reads it, or None and why there is none."""
    group = graph.groups[g]
    assert group.family is not None
    rule = group.family.rules.get(argument)
    if rule is None:
        return None, "no closed form is known for this argument"
    selection = next(s for s in binding.selections if s.param == name)
    multiple = group.family.multiples.get(argument)
    if multiple is not None and _is_multiple(binding):
        return Use(g, argument, selection, multiple, is_multiple=True), ""
    if selection.factor is not None:
        scalable = rule.kind.form.scales and rule.link.name == "identity"
        if rule.kind.form.is_gram:
            scalable = natural_factor(selection.factor, rule) is not None
        if not scalable:
            return None, "a factor multiplies it"
    if rule.kind.is_location and any(m.has_pole for m in selection.maps):
        return None, "its map has a pole, and a location may lie beyond it"
    event = rule.kind.event_dim
    if event:
        problem = map_of_events(selection, rule)
        if problem:
            return None, problem
        problem = whole_events(selection, graph.parameters[name].leaf, rule.kind.form)
        if problem:
            return None, problem
    return Use(g, argument, selection, rule), ""


def _is_multiple(binding: Binding) -> bool:
    """Whether matrices are one number of a parameter each, times known matrices."""
    if len(binding.selections) != 1 or binding.selections[0].factor is None:
        return False
    (selection,) = binding.selections
    if selection.of_matrices or selection.index.dim() < 2:
        return False
    number = selection.index.amax((-2, -1), keepdim=True)
    others = (selection.index < 0) & (number >= 0)
    is_one = bool((others | (selection.index == number)).all())
    return is_one and not bool((binding.constant[others] != 0).any())


def is_end(graph: FactorGraph, g: int, name: str) -> bool:
    """Whether a parameter at which a support ends has a closed form: the outermost data."""
    group = graph.groups[g]
    read = [(a, b) for a, b in group.bindings.items() if name in b.params]
    for argument, binding in read:
        if binding.how != "selection":
            return False
        use, _ = as_use(graph, g, argument, binding, name)
        if use is None or use.rule.kind.form.end == 0:
            return False
    return bool(read)


def map_of_events(selection: Selection, rule: Rule) -> str:
    """Why the maps between rows or matrices and the argument have no closed form, or nothing."""
    maps = [m.name for m in selection.maps]
    if not maps or (maps == ["log"] and rule.link is LOG_SIMPLEX):
        return ""
    if maps == [PRODUCT.name] and rule.takes_products:
        return ""
    if selection.of_matrices:
        return "a product of mapped matrices"
    return "an elementwise map of whole rows"


def whole_events(selection: Selection, parameter: Tensor, form: Form) -> str:
    """Why a closed form cannot maximise over whole rows or matrices, or nothing: a selection may be one
    that earlier runs have shown.
    """
    asked = (whole_events, parameter.shape, form.event_dim, form.is_row)
    if asked not in selection.remembered:
        selection.remembered[asked] = _not_one_to_one(selection.of_kinds_of_rows, parameter, form)
    return str(selection.remembered[asked])


def _not_one_to_one(index: Tensor, parameter: Tensor, form: Form) -> str:
    """Why the rows or matrices that are selected are not those of the parameter, or nothing."""
    event = form.event_dim
    if parameter.dim() < event or parameter.shape[-event:] != index.shape[-event:]:
        return "only part of a row of the parameter is used"
    size = math.prod(parameter.shape[-event:])
    rows = index.reshape(-1, size)
    rows = rows[(rows >= 0).any(-1)]
    if bool((rows < 0).any()):
        return "a row is partly constant"
    first = rows.min(-1).values
    if bool((first % size != 0).any()):
        return "its rows are not rows of the parameter"
    offsets = rows - first.unsqueeze(-1)
    if form.is_row:
        offsets = offsets.sort(-1).values
    expected = torch.arange(size, device=index.device)
    if not bool((offsets == expected).all()):
        return "its rows are not rows of the parameter"
    return ""
