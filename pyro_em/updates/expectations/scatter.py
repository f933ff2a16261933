"""Sums from the cells of an argument onto the events of a parameter, and the magnitude of the data.

A parameter's event e (a number, a row or a matrix of it) may be read by many cells of an argument:

    n_e = Σ_{cells c that read e} n_c,   d_e = Σ_{cells c that read e} d_c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_em.distributions import broadcast_shape
from pyro_em.expanded import once_each
from pyro_em.families.forms import Kind
from pyro_em.graph.bindings.binding import Selection, is_in_order
from pyro_em.graph.factors import FactorGraph
from pyro_em.pieces import PIECE
from pyro_em.updates.update import ParameterUpdate


def _prod(shape: Sequence[int]) -> int:
    out = 1
    for s in shape:
        out *= s
    return out


def component_in_words(value: Tensor, event: int, flat: int) -> str:
    """Which event of a parameter it is, by its index."""
    shape = value.shape[: value.dim() - event]
    if not shape:
        return "its only component"
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    shown = index[0] if len(index) == 1 else tuple(reversed(index))
    return f"component {shown}"


def used_events(selections: Sequence[Selection], value: Tensor, event: int) -> Tensor:
    """Which of a parameter's events any selection reads. # (events,)"""
    size = _prod(value.shape[value.dim() - event :])
    used = torch.zeros(value.numel() // size, dtype=torch.bool, device=value.device)
    for selection in selections:
        index = once_each(selection.index)
        used[(index[index >= 0] // size).reshape(-1)] = True
    return used


def onto_events(
    kind: Kind, selection: Selection, n: Tensor, d: Tensor, value: Tensor, event: int
) -> tuple[Tensor, Tensor]:
    """Sum numerators and denominators of an argument's cells onto the parameter's events."""
    index = selection.index
    cells = index.shape[: index.dim() - event]
    n_event = n.shape[len(cells) :]
    d_event = d.shape[len(cells) :]
    batch = [max(a, b) for a, b in zip(n.shape[: len(cells)], d.shape, strict=False)]
    n, d = n.expand(*batch, *n_event), d.expand(*batch, *d_event)
    if selection.factor is not None:
        n, d = kind.form.exposed(n, d, selection.factor)
    n, d = sum_to(n, cells, len(n_event)), sum_to(d, cells, len(d_event))
    size = _prod(value.shape[value.dim() - event :])
    n_events = value.numel() // size
    first = index if event == 0 else index.flatten(index.dim() - event).min(-1).values
    row = torch.where(first >= 0, first // size, n_events).reshape(-1)
    d_out = d.new_zeros(n_events + 1, *d_event).index_add(0, row, d.reshape(-1, *d_event))
    if kind.form.is_row:
        # Rows may be permuted: scatter element by element.
        flat = torch.where(index >= 0, index, value.numel()).reshape(-1)
        n_flat = n.new_zeros(value.numel() + 1).index_add(0, flat, n.reshape(-1))
        return n_flat[:-1].reshape(n_events, -1), d_out[:-1]
    n_out = n.new_zeros(n_events + 1, *n_event).index_add(0, row, n.reshape(-1, *n_event))
    return n_out[:-1], d_out[:-1]


def sum_to(tensor: Tensor, cells: Sequence[int], event: int = 0) -> Tensor:
    """Sum over the cells that an argument is constant along, and expand to its cells."""
    axes = [i for i, size in enumerate(cells) if size == 1 and tensor.shape[i] > 1]
    tensor = tensor.sum(axes, keepdim=True) if axes else tensor
    return tensor.expand(*cells, *tensor.shape[tensor.dim() - event :])


def _none(value: Tensor) -> Tensor:
    """No magnitude, whatever the data are."""
    return torch.zeros_like(value[..., 0])


def _largest(magnitude: Callable[[Tensor], Tensor], value: Tensor, like: Tensor) -> Tensor:
    """The magnitudes of data, the largest along dimensions in which an index has one element.

    Args:
        magnitude: That of some data.
        value: The data. # (*cells, *event)
        like: The index. # (*cells)
    """

    def largest(part: Tensor) -> Tensor:
        x = magnitude(part)
        axes = [i for i, n in enumerate(like.shape) if n == 1 and x.shape[i] > 1]
        return x.amax(axes, keepdim=True) if axes else x

    along = max(range(like.dim()), key=lambda i: value.shape[i], default=0)
    if value.numel() <= PIECE or not like.dim() or like.shape[along] != 1:
        return largest(value)
    step = max(1, PIECE * value.shape[along] // value.numel())
    out: Tensor | None = None
    for part in value.split(step, along):
        own = largest(part)
        out = own if out is None else torch.maximum(out, own)
    assert out is not None
    return out


def _events(index: Tensor, event: int, size: int, n_events: int) -> tuple[Tensor, bool]:
    """Which event of a parameter each cell of an argument reads; ``n_events`` where none.

    Returns:
        The events, and whether they are 0, 1, 2, … # (*cells)
    """
    first = index if event == 0 else index.flatten(index.dim() - event).min(-1).values
    out = torch.where(first >= 0, first // size, n_events)
    return out, out.numel() == n_events and is_in_order(out)


def data_magnitude(update: ParameterUpdate, graph: FactorGraph, value: Tensor) -> Tensor:
    """The largest value among the data of each spread: what its rounding is relative to.

    Returns:
        One number per event of the parameter, or one per feature. # (events,) or (events, D)
    """
    assert update.kind is not None
    if graph.all_data is not None and update.name in graph.all_data.magnitudes:
        return graph.all_data.magnitudes[update.name]
    event = update.kind.event_dim
    size = _prod(value.shape[value.dim() - event :])
    n_events = value.numel() // size
    out: Tensor | None = None
    for use in update.uses:
        group = graph.groups[use.group]
        assert group.family is not None
        selection, asked = use.natural, (data_magnitude, event, size, n_events)
        if asked not in selection.remembered:
            selection.remembered[asked] = _events(selection.index, event, size, n_events)
        first, in_order = selection.remembered[asked]
        # The unit of a multiple is no matter of the data.
        magnitude = _none if use.is_multiple else group.family.magnitude
        x = _largest(magnitude, group.value.detach(), first)
        features = x.shape[first.dim() :]
        batch = broadcast_shape(first.shape, x.shape[: first.dim()])
        if in_order and batch == first.shape and len(update.uses) == 1:
            return x.expand(*batch, *features).reshape(n_events, *features)
        row = first.expand(batch).reshape(-1)
        x = x.expand(*batch, *features).reshape(len(row), *features)
        if out is None:
            out = x.new_zeros(n_events + 1, *features)
        row = row.reshape(-1, *(1,) * len(features)).expand(x.shape)
        out = out.scatter_reduce(0, row, x, "amax")
    assert out is not None
    return out[:-1]
