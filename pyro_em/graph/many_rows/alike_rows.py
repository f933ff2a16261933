"""Arguments that are the same in all of many rows, held once."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.graph.later_arguments import LaterArguments

_MANY = 1024  # rows from which on it is looked


def with_alike_once(group: Group) -> Group:
    """A group whose arguments are held once where all rows of its first plate have the same.

    A distribution at the unit of a latent has a number for each row, `scale * w.rsqrt()`, though all
    of them are made of the same: what makes them is compared, so that they are the same at any
    parameters.
    """
    if not group.n_plates or group.sizes[0] < _MANY or group.nested is not None:
        return group
    return _with_alike_once(group)


def with_parameters_once(group: Group) -> Group:
    """The same of counts out of trials, whose distribution expands parameters to the trials of rows."""
    family = group.family
    if family is None or family.natural is None or family.natural.levels is None:
        return group
    return _with_alike_once(group) if group.n_plates and group.nested is None else group


def _with_alike_once(group: Group) -> Group:
    later = group.arguments if isinstance(group.arguments, LaterArguments) else None
    held = dict(group.arguments if later is None else later.held)
    bindings = dict(group.bindings)
    for name, binding in group.bindings.items():
        argument = held[name]
        if binding.how not in ("constant", "selection") or group.outlines[name].shape[1] == 1:
            continue
        if not all(_is_alike(t) for t in binding.tensors):
            continue
        if argument is None:  # it follows from the binding
            assert later is not None
            bindings[name] = binding.mapped(_first)
            held[name] = bindings[name].evaluate(later.at).to(later.dtypes[name])
        elif _is_alike(argument):
            held[name], bindings[name] = _first(argument), binding.mapped(_first)
    known = {n: t for n, t in held.items() if t is not None}
    arguments = known if later is None else later.rebound(known, bindings)
    return replace(group, arguments=arguments, bindings=bindings)


def _first(t: Tensor) -> Tensor:
    return t[:, :1].clone() if t.shape[1] > 1 else t


def _is_alike(t: Tensor) -> bool:
    """Whether rows are the same; the first two say mostly that they are not."""
    if t.shape[1] == 1 or t.stride(1) == 0:
        return True
    first = t[:, :1]
    return bool((t[:, 1:2] == first).all()) and bool((t == first).all())
