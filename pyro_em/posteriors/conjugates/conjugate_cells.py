"""From the layout of groups to rows of a latent, and back: plates and events first, states last."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import Few
from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.conjugate_beliefs import element_sizes, slices_of


def rows_of(t: Tensor, group: Group, tail: int = 0, *, full: bool = False) -> Tensor:
    """Numbers of a group as rows: elements of its plates and its event, then states of its scope.

    Args:
        t: # (1, *plates or 1s, *states or 1s, *to_event or 1s, *tail)
        group: The group.
        tail: How many dimensions the tail has.
        full: Whether every row is there even where all are alike.

    Returns:
        # (rows or 1, cells or 1, *tail)
    """
    n, scope = group.n_plates, len(group.sizes) - group.n_plates
    t = t.reshape(
        t.shape[: t.dim() - tail]
        + (1,) * (_lead(group) - t.dim() + tail)
        + t.shape[t.dim() - tail :]
    )
    sizes, states = group.sizes[:n], group.sizes[n:]
    events = element_sizes(group)
    plates, own_states = t.shape[1 : 1 + n], t.shape[1 + n : 1 + n + scope]
    own_events = t.shape[1 + n + scope : _lead(group)]
    last = t.shape[_lead(group) :]
    alike = not full and plates.numel() * own_events.numel() == 1
    rows = (plates, own_events) if alike else (sizes, events)
    cells = own_states if own_states.numel() == 1 else states
    t = t.expand(1, *rows[0], *cells, *rows[1], *last)
    order = [
        *range(1, 1 + n),
        *range(1 + n + scope, _lead(group)),
        *range(1 + n, 1 + n + scope),
        *range(_lead(group), t.dim()),
    ]
    t = t.squeeze(0).permute([d - 1 for d in order])
    return t.reshape(math.prod(rows[0]) * math.prod(rows[1]), math.prod(cells), *last)


def in_cells(rows: Tensor, group: Group) -> Tensor:
    """Rows of a group in its layout: the reverse of `rows_of`.

    Args:
        rows: # (rows or 1, cells or 1, *tail)
        group: The group.

    Returns:
        # (1, *plates or 1s, *states or 1s, *to_event or 1s, *tail)
    """
    n, scope = group.n_plates, len(group.sizes) - group.n_plates
    events, tail = element_sizes(group), rows.shape[2:]
    sizes, states = group.sizes[:n], group.sizes[n:]
    if rows.shape[0] == 1:
        sizes, events = (1,) * n, (1,) * len(events)
    if rows.shape[1] == 1:
        states = (1,) * scope
    t = rows.reshape((*sizes, *events, *states, *tail))
    e = len(events)
    order = [
        *range(n),
        *range(n + e, n + e + scope),
        *range(n, n + e),
        *range(n + e + scope, t.dim()),
    ]
    return t.permute(order).unsqueeze(0)


def _lead(group: Group) -> int:
    return 1 + len(group.sizes) + group.event_dims


@dataclass(frozen=True, eq=False)
class ElementsRead:
    """Which element of a latent each row of a site reads.

    Attributes:
        elements: −1 where a row reads none. # (rows or 1, cells or 1)
        count: How many elements the latent has.
        in_order: Whether row i reads element i, and no other row does.
        whole: Whether every row reads one.
    """

    elements: Tensor
    count: int
    in_order: bool
    whole: bool

    @classmethod
    def of(cls, elements: Tensor, rows: int, count: int) -> ElementsRead:
        """That of elements as they were read, for a site of some rows."""
        flat = elements[:, 0]
        straight = elements.shape == (count, 1) and rows == count
        in_order = straight and bool((flat == torch.arange(count, device=flat.device)).all())
        return cls(elements, count, in_order, bool((elements >= 0).all()))

    def summed(self, rows: Tensor) -> Tensor:
        """Rows summed onto the elements that they read.

        Args:
            rows: # (rows, cells or 1, *tail)

        Returns:
            # (count, cells or 1, *tail)
        """
        at, n, tail = self.elements, rows.shape[0], rows.shape[2:]
        if self.in_order:
            return rows
        if self.count == 1 and self.whole:
            return rows.sum(0, keepdim=True)
        if at.shape[1] == 1:
            out = rows.new_zeros(self.count + 1, *rows.shape[1:])
            at = at[:, 0].expand(n)
            if not self.whole:
                at = torch.where(at >= 0, at, self.count)
            return out.index_add(0, at, rows)[: self.count]
        cells = max(rows.shape[1], at.shape[1])
        at = torch.where(at >= 0, at, self.count).expand(n, cells)
        at = at * cells + torch.arange(cells, device=at.device)
        flat = rows.expand(n, cells, *tail).reshape(n * cells, *tail)
        out = rows.new_zeros((self.count + 1) * cells, *tail)
        out = out.index_add(0, at.reshape(-1), flat)
        return out.reshape(self.count + 1, cells, *tail)[: self.count]

    def taken(self, values: Tensor) -> Tensor:
        """What rows read of the elements; anything where they read none.

        Args:
            values: # (count, cells or 1, *tail)

        Returns:
            # (rows or 1, cells or 1, *tail)
        """
        if self.in_order or (self.count == 1 and self.elements.shape[1] == 1):
            return values
        at = self.elements if self.whole else self.elements.clamp(min=0)
        if at.shape[1] == 1:
            return values[at[:, 0]]
        if values.shape[1] == 1:
            return values[:, 0][at]
        return values[at, torch.arange(values.shape[1], device=at.device)]


def in_order(elements: Tensor, count: int) -> bool:
    """Whether numbers are those from zero on."""
    own = torch.arange(count, device=elements.device)
    return len(elements) == count and bool((elements == own).all())


def plus(sums: Tensor, constant: Tensor) -> Tensor:
    """Sums that nobody else holds plus something, in their place where they have the room."""
    wide = torch.broadcast_shapes(sums.shape, constant.shape) != sums.shape
    if wide or sums.requires_grad or constant.requires_grad or sums.dtype != constant.dtype:
        return sums + constant
    return sums.add_(constant)


def alike(total: Tensor, by_shape: bool) -> tuple[Tensor, Tensor | None, Few | None]:
    """Σ Δχ of elements that are alike once, and which of these each has; else which first numbers.

    Args:
        total: # (elements, cells or 1, P)
        by_shape: Whether it is of use which first numbers are alike.
    """
    if total.shape[1] != 1:
        return total, None, None
    place, shapes = alike_rows(total[:, 0], len(total) // 4)
    if place is not None:
        return total[Few.of(place).first], place, None
    return total, None, Few.of(shapes) if by_shape and shapes is not None else None


def alike_rows(rows: Tensor, most: int) -> tuple[Tensor | None, Tensor | None]:
    """For each row the number of those that equal it; the same of its first element.

    Args:
        rows: # (rows, P)
        most: How many different ones there may be.

    Returns:
        # (rows,) each; None where there are too many different ones
    """
    first = _numbered(rows[:, 0], most)
    out, known = first
    for column in rows.unbind(-1)[1:]:
        place, n = _numbered(column, most) if known else (None, 0)
        if out is None or place is None:
            return None, first[0]
        out, known = _numbered(out * n + place, most)
    return out, first[0]


def _numbered(numbers: Tensor, most: int) -> tuple[Tensor | None, int]:
    """For each number which of the different ones it is, and how many there are; some at a time."""
    parts = slices_of(len(numbers))
    values, waiting = numbers[:0], [numbers[:0]]
    for rows in parts:
        waiting.append(numbers[rows].unique())
        if rows is parts[-1] or sum(map(len, waiting)) > len(values):
            values, waiting = torch.cat([values, *waiting]).unique(), []
        if len(values) > most:
            return None, 0
    out = numbers.new_empty(len(numbers), dtype=torch.long)
    for rows in parts:
        out[rows] = torch.searchsorted(values, numbers[rows].contiguous())
    return out.clamp_(max=len(values) - 1), len(values)
