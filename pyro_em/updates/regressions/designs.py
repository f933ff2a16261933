"""Designs: the derivative of an argument that is linear in parameters, ∂a/∂θ, read off its binding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.pieces import pieces

_MANY_CELLS = 256

Designs = list[tuple[Tensor, Tensor]]


_known: WeakKeyDictionary[Binding, tuple[tuple[tuple[str, ...], int], Designs]] = (
    WeakKeyDictionary()
)


def designs_of(
    binding: Binding, block: Sequence[str], values: Mapping[str, Tensor], lead: int, event: int = 0
) -> Designs:
    """∂a/∂θ for each cell behind the rows (a component, a feature): its columns that are not zero.

    A component's line does not depend on another's slope: most of the whole matrix would be zeros.
    It is the same at every step, and so computed once for each binding.

    Args:
        binding: An affine binding, or selections.
        block: Parameters whose elements are the columns.
        values: Their values, for sizes.
        lead: How many dimensions are rows: members and plates.
        event: How many of the last dimensions belong to one cell.

    Returns:
        Per cell the columns, and the matrix. # (columns,), (rows, *event, columns)
    """
    known = _known.get(binding)
    if known is not None and known[0] == (tuple(block), event):
        return known[1]
    slopes = binding.jacobians or {}
    if any(slopes[p].index is not None for p in block if p in slopes):
        found = _cell_by_cell(binding, block, values, lead, event)
        _known[binding] = ((tuple(block), event), found)
        return found
    whole = torch.cat([design(binding, p, values[p]) for p in block], -1)
    rows, own = whole.shape[:lead].numel(), whole.shape[whole.dim() - 1 - event : -1]
    whole = whole.reshape(rows, -1, *own, whole.shape[-1])
    if whole.shape[1] > _MANY_CELLS:
        every = torch.arange(whole.shape[-1], device=whole.device)
        out = [(every, whole[:, k]) for k in range(whole.shape[1])]
    else:
        out = []
        for k in range(whole.shape[1]):
            one = whole[:, k]
            columns = read_columns(one).nonzero().reshape(-1)
            out.append((columns, one[..., columns].contiguous()))
    _known[binding] = ((tuple(block), event), out)
    return out


def _cell_by_cell(
    binding: Binding, block: Sequence[str], values: Mapping[str, Tensor], lead: int, event: int
) -> Designs:
    """As `designs_of`, of what is held without zeros; cells of equal covariates share one tensor."""
    slopes, begins, begin = [], [], 0
    for name in block:
        held = (binding.jacobians or {}).get(name)
        slopes.append(Jacobian.of(design(binding, name, values[name])) if held is None else held)
        begins.append(begin)
        begin += values[name].numel()
    shape = binding.constant.shape
    rest = range(lead, len(shape) - event)
    is_shared = all(j.value.stride(d) == 0 for j in slopes for d in rest if shape[d] > 1)
    out: Designs = []
    narrow, used = torch.empty(0), torch.empty(0)
    for cell in product(*(range(shape[d]) for d in rest)):
        place = (slice(None),) * lead + cell
        own = [j.mapped(lambda t: t[place]) for j in slopes]  # noqa: B023
        each = [j.columns for j in own]
        read = [c + b for c, b in zip(each, begins, strict=True) if c is not None]
        is_alike = len(read) == len(own)
        columns = torch.cat(read) if is_alike else torch.arange(begin, device=own[0].value.device)
        if not (out and is_shared and is_alike):
            whole, used = _without_unread([j.value if is_alike else j.dense for j in own])
            narrow = whole.reshape(-1, *shape[len(shape) - event :], whole.shape[-1])
        out.append((columns[used], narrow))
    return out


def _without_unread(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Designs of several parameters side by side, without columns of zeros, and which were others.

    Most lines read one parameter of a block, whose covariates are no copy then.
    """
    reads = [read_columns(part) for part in parts]
    some = [(part, used) for part, used in zip(parts, reads, strict=True) if bool(used.any())]
    narrow = [p if bool(used.all()) else p[..., used] for p, used in some or [(parts[0], reads[0])]]
    return narrow[0] if len(narrow) == 1 else torch.cat(narrow, -1), torch.cat(reads)


def read_columns(whole: Tensor) -> Tensor:
    """Which columns of a design hold any number but zero. # (columns,) from (*rows, columns)"""
    used = torch.zeros(whole.shape[-1], dtype=torch.bool, device=whole.device)
    for (part,) in pieces(whole.flatten(0, -2)):
        if part.shape[-1] != len(used):  # few rows of many columns are cut along these
            return (whole != 0).flatten(0, -2).any(0)
        used |= (part != 0).any(0)
    return used


def design(binding: Binding, name: str, value: Tensor) -> Tensor:
    """∂a/∂θ. # (*cells, parameter.numel())"""
    if binding.jacobians is not None and name in binding.jacobians:
        return binding.jacobians[name].dense
    for part in binding.selections:
        if part.param == name:
            eye = torch.eye(
                value.numel() + 1, value.numel(), dtype=value.dtype, device=value.device
            )
            rows = eye[torch.where(part.index >= 0, part.index, value.numel())]
            return rows if part.factor is None else rows * part.factor.unsqueeze(-1)
    return value.new_zeros(()).expand(*binding.constant.shape, value.numel())
