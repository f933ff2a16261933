"""Whether a fresh trace agrees with what the bindings of a graph predict."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.diagonals import with_matrix
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role

_PART = 2**17  # cells that are compared at once


def disagreements(
    graph: FactorGraph,
    fresh: FactorGraph,
    values: Mapping[str, Tensor],
    *,
    exactly: bool = False,
    moved: Collection[int] = (),
) -> list[tuple[str, str]]:
    """Sites and arguments of a fresh trace that differ from what the bindings of a graph predict.

    Args:
        graph: The graph with its bindings.
        fresh: The fresh trace.
        values: Constrained parameter values at which it was made.
        exactly: Whether what no parameter reaches has to be the same number; else up to rounding.
        moved: Groups that read Gaussian latents, or are some, which had other values when the trace
            was made: their means, and the latents' values, are not compared.
    """
    found = []
    places = fresh.thin_groups_of([group.members[0] for group in graph.groups])
    for g, (group, place) in enumerate(zip(graph.groups, places, strict=True)):
        apart = _moved(group) if g in moved else frozenset[str]()
        still = _unmoved(group) if exactly else frozenset[str]()
        thin, arguments, at = group.thin_at(values)
        if _agrees(thin, _as_given(thin, arguments), at, place, still, apart):
            continue
        arguments, at = group.evaluated(values)
        for i, site in enumerate(group.members):
            traced = dict(_static_parts(*fresh.group_of(site)))
            parts = dict(_static_parts(group, i, _as_given(group, arguments), at))
            found += [(site, name) for name in traced if name not in parts]
            for name, tensor in parts.items():
                binding = group.bindings.get(name)
                if name in apart or (binding is not None and not binding.is_static):
                    continue
                same = _is_equal if name in still else _same
                if name not in traced or not same(tensor, traced[name]):
                    found.append((site, name))
    return found


def _as_given(group: Group, arguments: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The arguments of a group as the user's distribution has them."""
    return with_matrix(group.matrix, arguments) if group.matrix else arguments


def _unmoved(group: Group) -> frozenset[str]:
    """The parts of a group that no parameter reaches."""
    names = {name for name, b in group.bindings.items() if not b.params}
    names |= {_MASK, _ELEMENTS, _SCALE, _DENSITY}
    if group.value_binding is None:
        names.add(_VALUE)
    return frozenset(names)


def _moved(group: Group) -> frozenset[str]:
    """The parts of a group that follow the values of Gaussian latents."""
    return frozenset({"loc", _VALUE} if group.role is Role.GAUSSIAN else {"loc"})


def _agrees(
    group: Group,
    arguments: Mapping[str, Tensor],
    value: Tensor,
    place: tuple[Group, int],
    exact: frozenset[str],
    apart: frozenset[str],
) -> bool:
    """Whether all members are traced as predicted; False where it takes a look at each of them.

    ``place`` is the group of the fresh trace that holds the first of them, and where.
    """
    other, first = place
    own = slice(first, first + len(group.members))
    if other.members[own] != group.members or group.raw is not None or other.raw is not None:
        return False
    scales = (*group.scales, *other.scales)
    if any(isinstance(s, Tensor) for s in scales) or group.scale != other.scale[own]:
        return False
    traced = _as_given(other, other.arguments)
    if set(arguments) != set(traced) or not group.is_static:
        return False
    pairs = [(_VALUE, value, other.value)]
    pairs += [(n, arguments[n], traced[n]) for n in arguments]
    for name, mask, now in (
        (_MASK, group.mask, other.mask),
        (_ELEMENTS, group.elements, other.elements),
    ):
        if mask is not None and now is not None:
            pairs.append((name, mask, now))
        elif mask is not now:
            return False
    n = len(group.members)
    pairs = [pair for pair in pairs if pair[0] not in apart]
    rows = [(m, _rows(a, n), _rows(b, len(other.members))[own]) for m, a, b in pairs]
    return all(
        a.shape == b.shape and (_is_equal if m in exact else _same)(a, b) for m, a, b in rows
    )


def _rows(t: Tensor, n: int) -> Tensor:
    """A tensor with a row for each of ``n`` members, where one stands for all."""
    return t.expand(n, *t.shape[1:]) if n > 1 == len(t) else t


def _static_parts(
    group: Any,
    i: int,
    arguments: Mapping[str, Tensor] | None = None,
    value: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    held = _as_given(group, group.arguments) if arguments is None else arguments
    for name, tensor in held.items():
        yield name, tensor[i]
    yield _VALUE, (group.value if value is None else value)[i]
    if group.mask is not None:
        yield _MASK, group.mask[i]
    if group.elements is not None:
        yield _ELEMENTS, group.elements[i]
    yield _SCALE, torch.as_tensor(group.scale[i])
    if group.raw is not None:
        yield _DENSITY, group.raw[i]


_VALUE, _MASK, _ELEMENTS = "value of the site", "poutine.mask", "mask below to_event"


_SCALE, _DENSITY = "poutine.scale", "log density"


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether numbers are the same to the bit; a line holds once what all rows have."""
    if a.dtype != b.dtype:
        return False
    if a.shape == b.shape:
        return _are_one(a, b) or torch.equal(a, b)
    try:
        return torch.equal(*torch.broadcast_tensors(a, b))
    except RuntimeError:
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    if _are_one(a, b) or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)):
        return True
    if a.dtype == torch.bool or not a.is_floating_point():
        return a.shape == b.shape and bool((a == b).all())
    if _is_one_row(a) and _is_one_row(b) and a.shape[0] == b.shape[0]:
        a, b = a[:1], b[:1]
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    # Mostly they are equal: a look at rounding takes ten times as long.
    if a.dtype == b.dtype and torch.equal(a, b):
        return True
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
