"""Data that take few values: each value once, and which of them each datum is.

A function f of one datum, evaluated for all data, takes as many numbers as there are data; of whole
numbers that lie close together it takes as many as there are values,

    f(x_i) = f(v_{c_i}) ,    v: the values that occur,    c: their codes

so that a long series of symbols is read without a table of its one-hot rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.graph.factors import Group

_MANY = 2**11  # data from which it pays
_WIDE = 2**10  # between the least value and the greatest at most
_OFTEN = 8  # how often a value occurs at least, on average


def with_values_once(group: Group) -> tuple[Group, Tensor] | None:
    """A group whose data are the values that occur, as its members, and the codes of the data.

    Args:
        group: A group without masks whose arguments are the same for all its data.

    Returns:
        The group and the codes, # (members or 1, *sizes or 1s); None where the data are few, or
        differ too much, or something else differs between them.
    """
    value = group.value
    if value.numel() < _MANY or not _is_plain(group):
        return None
    ends = [float(end) for end in value.aminmax()]
    if not all(map(math.isfinite, ends)):
        return None
    low, count = ends[0], ends[1] - ends[0] + 1
    if count > min(_WIDE, value.numel() // _OFTEN) or not low.is_integer():
        return None
    codes = value if value.dtype == torch.int64 else value.long()
    if value.is_floating_point() and not bool((codes == value).all()):
        return None
    codes = codes - int(low) if low else codes
    often = torch.bincount(codes.reshape(-1), minlength=int(count))
    occurring = often.nonzero().squeeze(1)
    if len(occurring) < len(often):
        codes = ((often > 0).cumsum(0) - 1)[codes]
    values = (occurring + int(low)).to(value.dtype)
    return replace(group, value=values.reshape(-1, *(1,) * (value.dim() - 1))), codes


def spread(few: Tensor, codes: Tensor | None) -> Tensor:
    """What was computed for the values that occur, for all data.

    Args:
        few: # (values, *1s, *rest), with as many dimensions of size one as codes have after the first
        codes: Which value each datum is; None where all data are in `few`.

    Returns:
        # (*codes.shape, *rest)

    Example:
        >>> spread(torch.tensor([[0.5], [2.0]]), torch.tensor([[1], [0], [1]])).T
        tensor([[2.0000, 0.5000, 2.0000]])
    """
    if codes is None:
        return few
    rest = few.shape[codes.dim() :]
    if len(few) == 1 or bool((few == few[:1]).all()):
        return few[:1].expand(*codes.shape, *rest)
    return (
        few.reshape(len(few), *rest).index_select(0, codes.reshape(-1)).reshape(*codes.shape, *rest)
    )


def _is_plain(group: Group) -> bool:
    """Whether each datum is one number, and nothing beside it differs from datum to datum."""
    family, value, batch = group.family, group.value, 1 + group.n_plates
    if family is None or family.event_dim or group.event_dims or value.dtype == torch.bool:
        return False
    if value.is_complex() or value.requires_grad or value.dim() != 1 + len(group.sizes):
        return False
    if any(t is not None for t in (group.mask, group.elements, group.belief, group.value_binding)):
        return False
    arguments = group.arguments.values()
    return all(n == 1 for n in value.shape[batch:]) and all(
        n == 1 for a in arguments for n in a.shape[:batch]
    )
