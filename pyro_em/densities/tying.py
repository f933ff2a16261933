"""Groups without repetition: what is equal for all members of a group is stored and computed once.

The steps of a homogeneous chain share one transition table. Tracing stacks a copy per step; here the
copies become one, and expected counts are summed over the steps before anything else happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding, Selection, normalised, whole_parameter
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import as_float64
from pyro_em.updates.update import ParameterUpdate

_FEW, _MANY = 8, 2**10  # members that are looked at before all are, where there are many


def collapsed(graph: FactorGraph) -> FactorGraph:
    """The graph with the leading dimension of each tensor of size one where all members agree.

    Priors on point estimates are left as they are, in float64.
    """
    return replace(graph, groups=tuple(_collapsed_group(g.thin()) for g in graph.groups))


def collapsed_updates(
    updates: Mapping[str, ParameterUpdate], graph: FactorGraph
) -> dict[str, ParameterUpdate]:
    """Closed-form updates whose uses refer to the collapsed groups.

    Args:
        updates: As decided for the traced graph.
        graph: Its collapsed form.
    """
    out = {}
    for name, update in updates.items():
        uses = []
        for use in update.uses:
            parts = graph.groups[use.group].bindings[use.argument].selections
            # Of a group that was taken apart some members may read other parameters.
            uses += [replace(use, selection=s) for s in parts if s.param == name]
        out[name] = replace(update, uses=tuple(uses))
    return out


def placed(
    updates: Mapping[str, ParameterUpdate], places: Mapping[int, Sequence[int]]
) -> dict[str, ParameterUpdate]:
    """Updates whose uses and priors have other numbers of groups, some of them several.

    Args:
        updates: As decided for a graph.
        places: For each of its groups the numbers of those that are made of it.
    """
    out = {}
    for name, update in updates.items():
        uses = [replace(u, group=g) for u in update.uses for g in places.get(u.group, ())]
        priors = [replace(p, group=g) for p in update.priors for g in places.get(p.group, ())]
        out[name] = replace(update, uses=tuple(uses), priors=tuple(priors))
    return out


def places_of(origin: Sequence[int]) -> dict[int, list[int]]:
    """For each group the numbers of those that were made of it, from what each was made of."""
    out: dict[int, list[int]] = {}
    for k, g in enumerate(origin):
        out.setdefault(g, []).append(k)
    return out


def _collapsed_group(group: Group) -> Group:
    if group.role is Role.POINT:
        wide = {name: as_float64(a) for name, a in group.arguments.items()}
        return replace(group, arguments=wide)
    if len(group.members) == 1 or group.family is None:
        return group
    bindings = {name: _collapsed_binding(b) for name, b in group.bindings.items()}
    arguments = {
        name: a[:1] if _has_one(bindings[name]) else a for name, a in group.arguments.items()
    }
    mask, elements = group.mask, group.elements
    return replace(
        group,
        bindings=bindings,
        arguments=arguments,
        value=_first_if_same(group.value),
        mask=None if mask is None else _first_if_same(mask),
        elements=None if elements is None else _first_if_same(elements),
    )


def _has_one(binding: Binding) -> bool:
    return binding.constant.shape[0] == 1


def _collapsed_binding(binding: Binding) -> Binding:
    tensors = [binding.constant] if binding.how in ("constant", "sum") else []
    for s in binding.selections:
        tensors += [s.index, *([s.factor] if s.factor is not None else [])]
    # The constant counts only where no parameter reaches an element.
    rest = [s.index >= 0 for s in binding.selections]
    if binding.how == "selection" and not bool(torch.stack(rest).any(0).all()):
        tensors.append(binding.constant)
    if binding.how not in ("constant", "selection", "sum") or not all(_is_same(t) for t in tensors):
        return binding
    selections = tuple(
        Selection(s.param, s.index[:1], s.maps, None if s.factor is None else s.factor[:1])
        for s in binding.selections
    )
    return replace(binding, constant=binding.constant[:1], selections=selections)


def _is_same(tensor: Tensor) -> bool:
    """Whether all members are as the first, which NaN is not; of many, the first few may say no."""
    if tensor.shape[0] == 1:
        return True
    if tensor.stride(0) == 0:  # one, expanded
        tensor = tensor[:1]
    first = tensor[:1]
    if len(tensor) > _MANY and not bool((tensor[:_FEW] == first).all()):
        return False
    return bool((tensor == first).all())


def _first_if_same(tensor: Tensor) -> Tensor:
    return tensor[:1] if _is_same(tensor) else tensor


@dataclass(frozen=True, eq=False)
class Arguments:
    """How one argument of a group is computed from parameter values, decided once.

    Attributes:
        binding: Where the values go.
        param: The parameter whose elements are the argument's, one to one and in order; None where
            the binding has to be evaluated.
        shape: The argument's shape.
        dtype: Its dtype.
    """

    binding: Binding
    param: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self, values: Mapping[str, Tensor]) -> Tensor:
        """The argument at parameter values."""
        if self.param is None:
            return self.binding.evaluate(values).to(self.dtype)
        rows = values[self.param].reshape(self.shape)
        return normalised(rows, self.binding.normalise).to(self.dtype)


def arguments_of(group: Group, values: Mapping[str, Tensor]) -> dict[str, Arguments]:
    """The evaluators of all arguments of a collapsed group.

    Args:
        group: The group.
        values: Parameter values, for their sizes.
    """
    out = {}
    for name, binding in group.bindings.items():
        argument = group.outlines[name]
        param = whole_parameter(binding, values)
        out[name] = Arguments(binding, param, tuple(argument.shape), argument.dtype)
    return out
