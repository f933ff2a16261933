"""Values that a distribution can have, in place of masked ones.

0 · NaN is NaN, in a statistic and in a gradient: what is masked has to be a possible value, though it
counts nowhere. Another observed event is the first choice, then a value inside the support.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_em.distributions import Mask, unwrap

_MANY = 2**14  # rows from which on values that are filled already are not written again

_CANNOT = (NotImplementedError, AttributeError, RuntimeError, ValueError, TypeError, IndexError)


def without_masked_nonsense(
    fn: Any, value: Tensor, mask: Mask, *, sparing: bool = False, by_itself: bool = False
) -> Tensor:
    """A value with feasible events where it is masked.

    Args:
        fn: The site's distribution.
        value: The observed value. # (*batch or 1s, *event)
        mask: As `pyro_em.distributions.element_mask` returns. # (*batch, *reinterpreted dims)
        sparing: Whether masked events that are possible stay: others may read them.
        by_itself: Whether what takes the place of an event is the same whatever the others are.

    Returns:
        The value itself where nothing is masked. # (*batch, *event)

    Example:
        >>> import pyro.distributions as dist
        >>> x = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
        >>> without_masked_nonsense(dist.Normal(torch.zeros(2), 1.0).to_event(1), x, ~x.isnan())
        tensor([[1., 3.],
                [2., 3.]])
    """
    if mask is None or mask is True or not value.numel():  # of pyro.factor there is no number
        return value
    base, reinterpreted, _ = unwrap(fn)
    kept = torch.as_tensor(mask, device=value.device)
    lead = value.dim() - len(base.event_shape)
    batch = torch.Size(broadcast_shape(kept.shape, value.shape[:lead]))
    full, kept = value.expand(batch + value.shape[lead:]), kept.expand(batch)
    if sparing and not bool(kept.all()):
        kept = kept | _possible(base, full.detach(), batch)
    if bool(kept.all()):
        return value if sparing else full
    with torch.no_grad():
        other = _feasible(base, reinterpreted, full, kept, by_itself)
    return torch.where(_along(kept, full), full, other) if full.requires_grad else other


def _feasible(
    base: Any, reinterpreted: int, value: Tensor, kept: Tensor, by_itself: bool
) -> Tensor:
    """A value with feasible events where ``kept`` is False."""
    out, done = (value, kept) if by_itself else from_data(value, kept, reinterpreted)
    support = _support(base, out)
    if support is not None:
        done = kept | (done & _inside(support, out, kept.shape))
    candidates = _candidates(base, support, value)
    while not bool(done.all()):
        event = next(candidates, None)
        if event is None:
            return out
        out = torch.where(_along(done, out), out, _first(event, out.shape).to(out.dtype))
        if support is None:
            return out
        done = done | _inside(support, out, kept.shape)
    return out


def feasible_event(fn: Any, like: Tensor) -> Tensor:
    """One value in the support of ``fn``, of shape ``event_shape``, typed as ``like``.

    Example:
        >>> import pyro.distributions as dist
        >>> feasible_event(dist.OneHotCategorical(torch.ones(3) / 3), torch.empty(0))
        tensor([1., 0., 0.])
    """
    value = torch.zeros(tuple(fn.event_shape), dtype=like.dtype, device=like.device)
    return without_masked_nonsense(fn, value, False)


def _along(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim()))


def from_data(value: Tensor, kept: Tensor, reinterpreted: int) -> tuple[Tensor, Tensor]:
    """Each masked event as the first one that is seen: of the same feature, in any row.

    Args:
        value: # (*batch, *reinterpreted dims, *event)
        kept: Where it counts. # (*batch, *reinterpreted dims)
        reinterpreted: How many dimensions are features.

    Returns:
        The value, and where it is an observed one now.
    """
    n = kept.dim() - reinterpreted
    features, event = kept.shape[n:], value.shape[kept.dim() :]
    rows = kept.reshape(-1, features.numel())
    if not rows.numel():
        return value, kept
    first = rows.to(torch.int8).argmax(0)
    table = value.reshape((*rows.shape, *event))
    at = torch.arange(rows.shape[1], device=first.device)
    seen = table[first, at].reshape((*features, *event))
    there = rows.any(0).reshape(features)
    if rows.shape[0] >= _MANY and _is_filled(table, rows, seen):
        return value, kept | there
    return torch.where(_along(kept, value), value, seen), kept | there


def _is_filled(table: Tensor, rows: Tensor, seen: Tensor) -> bool:
    """Whether masked events are the given ones already, of rows some at a time."""
    seen = seen.reshape(table.shape[1:])
    return all(
        bool((_along(own, part) | (part == seen)).all())
        for part, own in zip(table.split(_MANY), rows.split(_MANY), strict=True)
    )


def _first(event: Tensor, shape: torch.Size) -> Tensor:
    """What broadcasts to a shape; the first where it differs between the values of a latent."""
    while event.dim() > len(shape):
        event = event[0]
    for d in range(1, event.dim() + 1):
        if event.shape[-d] != shape[-d]:
            event = event.narrow(event.dim() - d, 0, 1)
    return event.expand(shape)


def _support(base: Any, value: Tensor) -> constraints.Constraint | None:
    """The support, where it can say whether a value is inside."""
    try:
        support = base.support
        support.check(value)
    except _CANNOT:
        return None
    return support


def _possible(base: Any, value: Tensor, batch: torch.Size) -> Tensor:
    """Which events are numbers in the support. # (*batch)"""
    finite = torch.isfinite(value).reshape(*batch, -1).all(-1)
    support = _support(base, value)
    return finite if support is None else finite & _inside(support, value, batch)


def _inside(support: constraints.Constraint, value: Tensor, batch: torch.Size) -> Tensor:
    """Which events are in the support, for every value of a latent. # (*batch)"""
    inside: Tensor = support.check(value)
    while inside.dim() > len(batch):
        inside = inside.all(0)
    for d in range(1, inside.dim() + 1):
        if batch[-d] == 1 and inside.shape[-d] > 1:
            inside = inside.all(-d, keepdim=True)
    return inside.expand(batch)


def _candidates(
    base: Any, support: constraints.Constraint | None, like: Tensor
) -> Iterator[Tensor]:
    """Values of a distribution, most of them inside the support. # broadcastable to a value"""
    event, device = tuple(base.event_shape), like.device
    discrete = not like.is_floating_point() if support is None else bool(support.is_discrete)
    zeros = torch.zeros(event, dtype=like.dtype, device=device)
    if support is not None and not discrete:
        try:  # inside, where densities are finite
            transform = biject_to(support)
            shape = transform.inverse_shape(tuple(base.batch_shape) + event)
            yield transform(torch.zeros(shape, dtype=like.dtype, device=device)).detach()
        except _CANNOT:
            pass
    yield zeros
    yield zeros + 1
    if event and event[-1]:
        first = zeros.clone()
        first[..., 0] = 1
        yield first
    for bound in ("lower_bound", "upper_bound"):
        at = getattr(support, bound, None)
        if at is not None:
            yield torch.as_tensor(at, device=device).detach()
    try:
        with torch.random.fork_rng(devices=[device] if like.is_cuda else []):
            yield base.sample().detach()
    except _CANNOT:
        pass
