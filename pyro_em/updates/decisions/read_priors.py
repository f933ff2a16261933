"""What priors of point estimates say of parameters, and whether they keep the form of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pyro_em.families.conjugacy import conjugate
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.decisions.read_uses import map_of_events, whole_events
from pyro_em.updates.update import Prior, Use, natural_factor

_LOCATED = ("Normal", "MultivariateNormal")


def as_prior(graph: FactorGraph, g: int, name: str) -> Prior | None:
    """The prior of a point-estimated site whose value is one whole parameter."""
    group = graph.groups[g]
    binding = group.value_binding
    if group.role is not Role.POINT or binding is None or binding.how != "selection":
        return None
    selection = next((s for s in binding.selections if s.param == name), None)
    plain = selection is not None and not selection.maps and selection.factor is None
    alone = len(binding.selections) == 1 and not any(
        d in graph.latents for dims in group.dims for d in dims
    )
    if selection is None or not plain or not alone:
        return None
    depends = {argument for argument, b in group.bindings.items() if b.params}
    if not depends:
        return Prior(g, selection)
    spreads = all(as_spread_of_prior(graph, g, a, n) for a in depends for n in _params(group, a))
    return Prior(g, selection, is_constant=False) if spreads else None


def as_spread_of_prior(graph: FactorGraph, g: int, argument: str, name: str) -> Prior | None:
    """What the prior of a point estimate says of a parameter that is its spread; None for no such.

    The other arguments are known numbers, and the point estimate is another parameter as it stands.
    """
    group = graph.groups[g]
    binding, value = group.bindings[argument], group.value_binding
    rule = None if group.family is None else group.family.rules.get(argument)
    if rule is None or not rule.kind.is_spread or group.distribution not in _LOCATED:
        return None
    if binding.how != "selection" or value is None:
        return None
    if value.how != "selection" or len(value.selections) != 1 or len(binding.selections) != 1:
        return None
    (own,), (selection,) = value.selections, binding.selections
    others = [b for a, b in group.bindings.items() if a != argument]
    if own.maps or own.factor is not None or own.param == name or any(b.params for b in others):
        return None
    is_plain = group.elements is None and binding.normalise == ""
    if not is_plain or any(d in graph.latents for dims in group.dims for d in dims):
        return None
    if selection.factor is not None:
        factor = natural_factor(selection.factor, rule)
        if factor is None:
            return None
        selection = replace(selection, factor=factor)
    if rule.kind.event_dim:
        leaf = graph.parameters[name].leaf
        if map_of_events(selection, rule) or whole_events(selection, leaf, rule.kind.form):
            return None
    return Prior(g, selection, argument, is_constant=False)


def _params(group: Group, argument: str) -> tuple[str, ...]:
    return group.bindings[argument].params


def why_not_conjugate(graph: FactorGraph, use: Use, priors: Sequence[Prior]) -> str:
    """Why a prior does not keep the form of a closed update, or nothing."""
    maps = tuple(m.name for m in use.selection.maps)
    for prior in priors:
        group = graph.groups[prior.group]
        assert group.family is not None
        if prior.argument:
            rule = group.family.rules[prior.argument]
            own = tuple(m.name for m in prior.selection.maps)
            if (rule.kind, rule.link.name, own) != (use.rule.kind, use.rule.link.name, maps):
                return f"it is the spread of '{group.members[0]}' in another form"
            continue
        known = conjugate(group.family.distribution, use.rule.kind, maps, use.rule.link.name)
        if known is None:
            return f"its {group.distribution} prior is not conjugate to a {use.rule.kind.value}"
        event = use.rule.kind.event_dim
        parameter = graph.parameters[prior.selection.param].leaf
        if event and whole_events(prior.selection, parameter, use.rule.kind.form):
            return f"its {group.distribution} prior is on other rows"
    return ""
