"""Whether a fresh trace agrees with what the bindings of a graph predict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group

_PART = 2**17  # cells that are compared at once


def _agrees(
    group: Group, arguments: Mapping[str, Tensor], value: Tensor, fresh: FactorGraph
) -> bool:
    """Whether all members are traced as predicted; False where it takes a look at each of them."""
    other, first = fresh.group_of(group.members[0])
    other = other.thin()
    own = slice(first, first + len(group.members))
    if other.members[own] != group.members or group.raw is not None or other.raw is not None:
        return False
    scales = (*group.scales, *other.scales)
    if any(isinstance(s, Tensor) for s in scales) or group.scale != other.scale[own]:
        return False
    if set(group.arguments) != set(other.arguments) or not group.is_static:
        return False
    pairs = [(value, other.value), *((arguments[n], other.arguments[n]) for n in arguments)]
    for mask, now in ((group.mask, other.mask), (group.elements, other.elements)):
        if mask is not None and now is not None:
            pairs.append((mask, now))
        elif mask is not now:
            return False
    n = len(group.members)
    rows = [(_rows(a, n), _rows(b, len(other.members))[own]) for a, b in pairs]
    return all(a.shape == b.shape and _same(a, b) for a, b in rows)


def _rows(t: Tensor, n: int) -> Tensor:
    """A tensor with a row for each of ``n`` members, where one stands for all."""
    return t.expand(n, *t.shape[1:]) if len(t) == 1 else t


def _static_parts(
    group: Any,
    i: int,
    arguments: Mapping[str, Tensor] | None = None,
    value: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (group.arguments if arguments is None else arguments).items():
        yield name, tensor[i]
    yield "value of the site", (group.value if value is None else value)[i]
    if group.mask is not None:
        yield "poutine.mask", group.mask[i]
    if group.elements is not None:
        yield "mask below to_event", group.elements[i]
    yield "poutine.scale", torch.as_tensor(group.scale[i])
    if group.raw is not None:
        yield "log density", group.raw[i]


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    if _are_one(a, b):
        return True
    if a.dtype == torch.bool or not a.is_floating_point():
        return a.shape == b.shape and bool((a == b).all())
    if _is_one_row(a) and _is_one_row(b) and a.shape[0] == b.shape[0]:
        a, b = a[:1], b[:1]
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    tolerance = (64 * torch.finfo(a.dtype).eps) ** 0.75
    return all(
        torch.allclose(x, y.to(x.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)
        for x, y in zip(_parts(a), _parts(b), strict=True)
    )


def _is_one_row(t: Tensor) -> bool:
    """Whether one row stands for all."""
    return t.dim() > 0 and t.shape[0] > 1 and t.stride(0) == 0


def _are_one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    form = (a.shape, a.dtype, a.device, a.stride())
    return a.data_ptr() == b.data_ptr() and form == (b.shape, b.dtype, b.device, b.stride())


def _parts(t: Tensor) -> Sequence[Tensor]:
    """A tensor in pieces of a bounded size, cut along its longest dimension."""
    if t.numel() <= _PART:
        return (t,)
    longest = max(range(t.dim()), key=lambda d: t.shape[d])
    return t.split(max(1, _PART * t.shape[longest] // t.numel()), longest)
