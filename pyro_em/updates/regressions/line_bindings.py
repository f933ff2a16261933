"""Arguments and bindings of the few rows that stand for all rows of a Normal site; see `line_sums`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.expanded import once_each
from pyro_em.graph.bindings.binding import Binding, Selection
from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.gaussian_rows import rows_of

LINE = "coefficients"  # what all that a mean is made of is called where it is θ itself


def has_factor(group: Group, scale: Binding) -> bool:
    """Whether a spread is a parameter's times a known factor of each row, one for all its entries."""
    if group.family is None or scale.how != "selection" or group.elements is not None:
        return False
    one = len(scale.selections) == 1 and scale.selections[0].is_whole
    if not one or scale.normalise or scale.selections[0].factor is None:
        return False
    event = once_each(scale.selections[0].factor).shape[1 + len(group.sizes) :]
    return event.numel() == 1


def factors_of(group: Group) -> Tensor:
    """What multiplies the spread of each row. # (cells or 1, rows or 1)"""
    (selection,) = group.bindings["scale"].selections
    assert selection.factor is not None
    return rows_of(group, selection.factor).to(torch.float64)[..., 0]


def with_one_factor(
    arguments: dict[str, Tensor], bindings: dict[str, Binding], factor: Tensor
) -> None:
    """Let a spread of few rows have one known factor.

    Args:
        arguments: Of few rows, with the factor of the first; that with the given one is put in.
        bindings: The same.
        factor: # (members, *sizes)
    """
    scale = bindings["scale"]
    (selection,) = scale.selections
    event = scale.constant.shape[factor.dim() :]
    shape = (*factor.shape, *event)
    factor = factor.reshape(*factor.shape, *(1,) * len(event)).to(scale.constant).expand(shape)
    index = selection.index.expand(shape)
    selections = (replace(selection, index=index, factor=factor),)
    constant = scale.constant.expand(shape)
    bindings["scale"] = replace(scale, constant=constant, selections=selections)
    arguments["scale"] = arguments["scale"].expand(shape)


def in_parameters(
    arguments: dict[str, Tensor],
    bindings: dict[str, Binding],
    sizes: Mapping[str, int],
    ones: tuple[int, ...],
    like: Tensor,
) -> None:
    """Let the coefficients be θ: each parameter is a stretch of them.

    Args:
        arguments: Of all rows; those of few are put in.
        bindings: The same.
        sizes: How many numbers each parameter has.
        ones: The shape of a mean of few rows: members and sizes, which are ones, and the event.
        like: For dtype and device.
    """
    total, begin, selections = sum(sizes.values()), 0, []
    for name, size in sizes.items():
        index = torch.full((total,), -1, dtype=torch.long, device=like.device)
        index[begin : begin + size] = torch.arange(size, device=like.device)
        selections.append(Selection(name, index.expand(*ones, total)))
        begin += size
    zero = like.new_zeros(*ones, total)
    bindings[LINE] = Binding("selection", tuple(sizes), zero, tuple(selections))
    bindings["loc"] = Binding("constant", (), zero[..., 0])
    arguments |= {LINE: zero, "loc": zero[..., 0]}
