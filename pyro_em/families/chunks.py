"""Log densities of many cells, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pyro_em.families.family import Family

_PIECE = 2**20  # numbers of events that a family handles at once


def log_density(
    family: Family,
    value: Tensor,
    arguments: Mapping[str, Tensor],
    lead: int,
    event_dims: int,
    elements: Tensor | None = None,
) -> Tensor:
    """log p(value | arguments) in nats, one number per cell.

    A family's temporaries have the size of all events, which may be many times that of the result.
    Without gradients the longest dimension is taken in pieces, so that they stay small. What all
    members share (the transitions of a homogeneous chain) is evaluated once.

    Args:
        family: The record that evaluates.
        value: # (*lead or 1s, *event)
        arguments: The same for each argument, with its own event.
        lead: How many dimensions the result has.
        event_dims: Batch dimensions beyond them, which are summed (``to_event``).
        elements: Which terms of that sum count; all by default. # (*lead or 1s, *event_dims or 1s)

    Returns:
        Log densities. # (*lead)

    Example:
        >>> from pyro_em.families import family_of
        >>> import pyro.distributions as dist
        >>> family = family_of(dist.Normal(0.0, 1.0))
        >>> arguments = {"loc": torch.zeros(1, 2), "scale": torch.ones(1, 2)}
        >>> log_density(family, torch.zeros(3, 1), arguments, 2, 0).shape
        torch.Size([3, 2])
    """
    given = [value, *arguments.values()]
    if elements is not None:
        given.append(elements)
    batch, distinct, repeated = _said_twice(lead, *[(t.shape, t.stride()) for t in given])
    if repeated is None:
        out = _in_pieces(family, value, arguments, lead, event_dims, elements, batch)
        return out.expand(batch)  # a density need not read all that is given
    for i, dims in enumerate(repeated):
        for d in dims:
            given[i] = given[i].narrow(d, 0, 1)
    value, own = given[0], dict(zip(arguments, given[1:], strict=False))
    elements = None if elements is None else given[-1]
    return _in_pieces(family, value, own, lead, event_dims, elements, distinct).expand(batch)


_Form = tuple[Sequence[int], Sequence[int]]


@lru_cache(maxsize=1024)
def _said_twice(
    lead: int, *forms: _Form
) -> tuple[torch.Size, torch.Size, tuple[tuple[int, ...], ...] | None]:
    """The batch of some tensors, that of what is distinct, and which dimensions only repeat.

    Args:
        lead: How many dimensions are looked at.
        *forms: The shape and the strides of each tensor.
    """
    repeated = tuple(
        tuple(d for d in range(lead) if shape[d] > 1 and strides[d] == 0)
        for shape, strides in forms
    )
    batch = torch.broadcast_shapes(*[shape[:lead] for shape, _ in forms])
    if not any(repeated):
        return batch, batch, None
    distinct = [
        [1 if d in dims else shape[d] for d in range(lead)]
        for (shape, _), dims in zip(forms, repeated, strict=True)
    ]
    return batch, torch.broadcast_shapes(*distinct), repeated


def _in_pieces(
    family: Family,
    value: Tensor,
    arguments: Mapping[str, Tensor],
    lead: int,
    event_dims: int,
    elements: Tensor | None,
    batch: Sequence[int],
) -> Tensor:
    """`log_density` where nothing is said twice. The batch: # (*lead)"""
    numbers = math.prod(batch) * math.prod(value.shape[lead:])
    if numbers <= 2 * _PIECE or torch.is_grad_enabled():
        return _whole(family, value, arguments, event_dims, elements)
    axis = max(range(lead), key=lambda i: batch[i])
    size = max(1, _PIECE * batch[axis] // numbers)

    def cut(t: Tensor, begin: int) -> Tensor:
        return t.narrow(axis, begin, min(size, batch[axis] - begin)) if t.shape[axis] > 1 else t

    def piece(begin: int) -> Tensor:
        return _whole(
            family,
            cut(value, begin),
            {name: cut(a, begin) for name, a in arguments.items()},
            event_dims,
            None if elements is None else cut(elements, begin),
        )

    # Pieces that wait for each other lie among the temporaries, whose memory is not given back then.
    first = piece(0)
    shape = list(first.shape)  # a density need not read all that is given
    shape[axis] = batch[axis]
    out = first.new_empty(shape)
    for begin in range(0, batch[axis], size):
        cut(out, begin).copy_(first if begin == 0 else piece(begin))
    return out


def _whole(
    family: Family,
    value: Tensor,
    arguments: Mapping[str, Tensor],
    event_dims: int,
    elements: Tensor | None,
) -> Tensor:
    """The density of all that is given."""
    log_p = family.log_prob(value, arguments)
    if elements is not None:
        log_p = torch.where(elements, log_p, 0.0)
    return log_p.sum(tuple(range(-event_dims, 0))) if event_dims else log_p
