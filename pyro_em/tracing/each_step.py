"""Operations that count dimensions, as they are for each step of a tensor whose first are steps.

x[t].unsqueeze(0) at every step is x.unsqueeze(1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

SHAPING = frozenset({"unsqueeze", "squeeze", "view", "reshape", "expand"})

REDUCING = frozenset(
    {"sum", "mean", "prod", "any", "all", "amax", "amin", "softmax", "log_softmax", "logsumexp"}
)


def shaped(name: str, raw: Tensor, how: Sequence[Any], room: int) -> Tensor | None:
    """What one of `SHAPING` makes of every step; None for a call that is not understood.

    Args:
        name: The operation.
        raw: The values. # (steps, *shape of one step)
        how: What the operation is called with beside them.
        room: Dimensions from which on a shape may be one of all steps together.

    Returns:
        Its result. # (steps, *shape of one step's result)
    """
    numbers = how[0] if len(how) == 1 and isinstance(how[0], (tuple, list)) else how
    if not all(type(n) is int for n in numbers):
        return None
    steps, own = raw.shape[0], tuple(raw.shape[1:])
    if name in ("view", "reshape", "expand") and len(numbers) >= room:
        return None
    if name in ("view", "reshape"):
        return raw.reshape(steps, *numbers)
    if name == "expand":
        ones = (1,) * (len(numbers) - len(own))
        return raw.reshape(steps, *ones, *own).expand(steps, *numbers)
    if name == "squeeze" and not numbers:
        return raw.reshape(steps, *(n for n in own if n != 1))
    if len(numbers) != 1:
        return None
    (dim,) = (_counted(n) for n in numbers)
    return raw.unsqueeze(dim) if name == "unsqueeze" else raw.squeeze(dim)


def reduced(func: Any, raw: Tensor, how: Sequence[Any], by_name: dict[str, Any]) -> Tensor | None:
    """What one of `REDUCING` makes of every step; None for a call that is not understood.

    Args:
        func: The operation.
        raw: The values. # (steps, *shape of one step)
        how: Its further arguments.
        by_name: Those that are named.

    Returns:
        Its result. # (steps, *shape of one step's result)
    """
    if not how and not by_name:
        out: Tensor = func(raw.reshape(raw.shape[0], -1), -1)
        return out
    if "dim" in by_name and not how:
        dim = by_name["dim"]
    elif len(how) == 1 and "dim" not in by_name:
        (dim,) = how
    else:
        return None
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not dims or not all(type(n) is int for n in dims):
        return None
    if raw.dim() == 1:
        return None
    counted = tuple(map(_counted, dims))
    further = {k: v for k, v in by_name.items() if k != "dim"}
    if any(isinstance(v, Tensor) for v in further.values()):
        return None
    out = func(raw, counted if len(counted) > 1 else counted[0], **further)
    return out


def _counted(dim: int) -> int:
    """A dimension of one step among those of all."""
    return dim if dim < 0 else dim + 1
