"""Constrained values of parameters, computed once for each unconstrained value.

A fit asks for the same value many times: each run of the model reads it, and each look at what
the run said compares with it. A transform takes longer than all else that reading a small one costs.
"""

from __future__ import annotations

from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

_FEW = 2**16  # elements of a parameter whose latest value is kept

# By a parameter's identity: the parameter, its constraint, its numbers, and what they became.
_latest: dict[int, tuple[ReferenceType[Tensor], constraints.Constraint, Tensor, Tensor]] = {}


def constrained(
    parameter: Tensor, constraint: constraints.Constraint, unconstrained: Tensor | None = None
) -> Tensor:
    """The constrained value of a parameter: a detached tensor of its own, which no step changes.

    Args:
        parameter: The unconstrained leaf.
        constraint: Where the constrained value lives.
        unconstrained: Another unconstrained value than the current one.

    Example:
        >>> u = torch.zeros(2)
        >>> constrained(u, constraints.positive), constrained(u, constraints.real)
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    u = parameter if unconstrained is None else unconstrained
    if constraint is constraints.real:
        return u.detach().clone()
    own = id(parameter)
    known = _latest.get(own)
    if known is not None and known[0]() is parameter and known[1] is constraint:
        before, value = known[2:]
        # Numbers are compared, not counts of writes, which ``.data`` and numpy go past.
        if before.dtype == u.dtype and before.device == u.device and torch.equal(before, u):
            return value.clone()
    with torch.no_grad():
        out = transform_to(constraint)(u).detach()
        if out.data_ptr() == u.data_ptr():
            return out.clone()
        if u.numel() <= _FEW and out.numel() <= _FEW:
            kept = u.detach().clone(), out.clone()
            _latest[own] = ref(parameter, lambda gone: _forget(own, gone)), constraint, *kept
        return out


def _forget(own: int, gone: ReferenceType[Tensor]) -> None:
    if own in _latest and _latest[own][0] is gone:
        del _latest[own]
