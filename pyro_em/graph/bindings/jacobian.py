"""The derivative of an argument in one parameter, which of most parameters reads few elements.

Of a line of each component, η_nk = x_n · w_k, the matrix ∂η/∂w has a row for each cell (n, k), and all
but the elements of w_k are zeros in it. What is held are the others, and which elements they are of:

    (∂a/∂θ)_cp = Σ_j value_cj [index_cj = p],

the covariates once for all components, and an index for each. A matrix that has no such zeros is held
as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Jacobian:
    """∂a/∂θ of an argument in one parameter.

    Attributes:
        value: What may be other than zero; expanded where it is the same. # (*argument, m)
        index: Of which element of the parameter, expanded where it is the same; None where they are
            all of them, in order. # (*argument, m)
        size: How many elements the parameter has.

    Example:
        >>> x = torch.tensor([1.0, 2.0]).reshape(2, 1, 1).expand(2, 3, 1)
        >>> own = Jacobian(x, torch.arange(3).reshape(1, 3, 1).expand(2, 3, 1), 3)
        >>> own.dense[1]
        tensor([[2., 0., 0.],
                [0., 2., 0.],
                [0., 0., 2.]])
        >>> own @ torch.tensor([1.0, 10.0, 100.0])
        tensor([[  1.,  10., 100.],
                [  2.,  20., 200.]])
    """

    value: Tensor
    index: Tensor | None
    size: int

    @classmethod
    def of(cls, dense: Tensor) -> Jacobian:
        """A matrix as it stands. # dense: (*argument, parameter.numel())"""
        return cls(dense, None, dense.shape[-1])

    @property
    def dense(self) -> Tensor:
        """All of it, zeros included. # (*argument, parameter.numel())"""
        if self.index is None:
            return self.value
        shared = [d for d in range(self.value.dim() - 1) if _is_shared(self.tensors, d)]
        value, index = (_narrowed(t, shared) for t in (self.value, self.index))
        zeros = value.new_zeros(*value.shape[:-1], self.size)
        dense = zeros.scatter_add_(-1, index, value)
        return dense.expand(*self.value.shape[:-1], self.size)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is made of."""
        return (self.value,) if self.index is None else (self.value, self.index)

    @property
    def columns(self) -> Tensor | None:
        """Which elements of the parameter every cell reads; None where cells differ. # (m,)"""
        if self.index is None:
            return torch.arange(self.size, device=self.value.device)
        index = _narrowed(self.index, _repeats(self.index))
        return index.reshape(-1) if index.numel() == index.shape[-1] else None

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.value.dtype

    def __matmul__(self, theta: Tensor) -> Tensor:
        """J θ. # theta: (parameter.numel(),); returns (*argument,)"""
        cells = range(self.value.dim() - 1)
        if self.index is None:
            shared = [d for d in cells if self.value.stride(d) == 0]
            return (_narrowed(self.value, shared) @ theta).expand(self.value.shape[:-1])
        value = _narrowed(self.value, [d for d in cells if self.value.stride(d) == 0])
        index = _narrowed(self.index, [d for d in cells if self.index.stride(d) == 0])
        out = torch.einsum("...m,...m->...", value, theta[index])
        return out.expand(self.value.shape[:-1])

    def mapped(self, change: Change) -> Jacobian:
        """The same with the dimensions of its argument laid out anew; the last one stays."""
        index = None if self.index is None else change(self.index)
        return replace(self, value=change(self.value), index=index)

    def without_zeros(self, lead: int) -> Jacobian:
        """The same without elements that a cell reads in no row, where that holds less.

        Args:
            lead: How many of the first dimensions are rows: members and plates.
        """
        if not self.value.numel():
            return self
        if self.index is not None:
            return replace(self, value=_once_where_equal(self.value, lead))
        used = (self.value != 0).flatten(0, lead - 1).any(0)
        width = max(int(used.sum(-1).max()), 1)
        if 2 * width > self.size:
            return self
        index = (~used).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
        index = index.reshape((1,) * lead + index.shape)
        value = self.value.gather(-1, index.expand(*self.value.shape[:-1], width))
        return Jacobian(_once_where_equal(value, lead), index.expand(value.shape), self.size)

    def reached(self, where: Tensor | None = None) -> Tensor:
        """Which elements of the parameter reach any cell, or any of some. # (parameter.numel(),)

        Args:
            where: The cells that count; all by default. # (*argument,)
        """
        if self.index is None and where is None:
            used = _narrowed(self.value, _repeats(self.value)) != 0
            return used.reshape(-1, self.size).any(0)
        out = torch.zeros(self.size, dtype=torch.bool, device=self.value.device)
        for j in range(self.value.shape[-1]):
            column = self.value[..., j]
            used = _narrowed(column, _repeats(column, 0)) != 0
            if where is not None:
                used = used & _narrowed(where, _repeats(where, 0))
            if self.index is None:
                out[j] = used.any()
                continue
            own = self.index[..., j]
            alike = _repeats(own, 0)
            used = used.any(alike, keepdim=True) if alike else used
            used, own = torch.broadcast_tensors(used, _narrowed(own, alike))
            out[own[used]] = True
        return out

    def times(self, factor: Tensor) -> Jacobian:
        """That of the argument multiplied by known numbers. # factor: broadcasts over the argument"""
        value = self.value * factor.unsqueeze(-1).to(self.value)
        return replace(
            self, value=value, index=None if self.index is None else self.index.expand(value.shape)
        )


def joined(parts: Sequence[Jacobian], join: Callable[[list[Tensor]], Tensor]) -> Jacobian:
    """Jacobians of several arguments in one parameter as one, their tensors joined along the cells."""
    first = parts[0]
    alike = len({p.value.shape[-1] for p in parts}) == 1
    if all(p.index is None for p in parts):
        return replace(first, value=join([p.value for p in parts]))
    if alike and all(p.index is not None for p in parts):
        index = join([p.index for p in parts if p.index is not None])
        return replace(first, value=join([p.value for p in parts]), index=index)
    return Jacobian.of(join([p.dense for p in parts]))


def _repeats(t: Tensor, last: int = 1) -> list[int]:
    """The dimensions along which a tensor is expanded, some of the last ones left out."""
    return [d for d in range(t.dim() - last) if t.stride(d) == 0]


def _is_shared(tensors: Sequence[Tensor], d: int) -> bool:
    return all(t.stride(d) == 0 for t in tensors)


def _narrowed(t: Tensor, dims: Sequence[int]) -> Tensor:
    """What is repeated along some dimensions, once; a dimension of size zero stays."""
    for d in dims:
        if t.shape[d] > 1:
            t = t.narrow(d, 0, 1)
    return t


def _once_where_equal(value: Tensor, lead: int) -> Tensor:
    """Numbers held once along dimensions behind the rows in which they are the same."""
    shape = value.shape
    for d in range(lead, value.dim() - 1):
        is_held = value.shape[d] > 1 and value.stride(d) != 0
        if is_held and bool((value.narrow(d, 0, 1) == value).all()):
            value = value.narrow(d, 0, 1)
    return value.expand(shape)
