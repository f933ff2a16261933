"""Arguments that are the same in all of many rows, held once."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pyro_em.graph.factors import Group

_MANY = 1024  # rows from which on it is looked


def with_alike_once(group: Group) -> Group:
    """A group whose arguments are held once where all rows of its first plate have the same.

    A distribution at the unit of a latent has a number for each row, `scale * w.rsqrt()`, though all
    of them are made of the same: what makes them is compared, so that they are the same at any
    parameters.
    """
    if not group.n_plates or group.sizes[0] < _MANY or group.nested is not None:
        return group
    arguments, bindings = dict(group.arguments), dict(group.bindings)
    for name, binding in group.bindings.items():
        argument = arguments[name]
        if binding.how not in ("constant", "selection") or argument.shape[1] == 1:
            continue
        if all(_is_alike(t) for t in (*binding.tensors, argument)):
            arguments[name] = _first(argument)
            bindings[name] = binding.mapped(_first)
    return replace(group, arguments=arguments, bindings=bindings)


def _first(t: Tensor) -> Tensor:
    return t[:, :1].clone() if t.shape[1] > 1 else t


def _is_alike(t: Tensor) -> bool:
    """Whether rows are the same; the first two say mostly that they are not."""
    if t.shape[1] == 1 or t.stride(1) == 0:
        return True
    first = t[:, :1]
    return bool((t[:, 1:2] == first).all()) and bool((t == first).all())
