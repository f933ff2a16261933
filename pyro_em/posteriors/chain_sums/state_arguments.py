"""Arguments of the sites of Gaussian chains as functions of one vector of parameters, in numpy.

Where steps are alike, an argument is held once for all of them; where chains side by side are alike,
once for all chains. Coefficients and offsets are linear in the parameters; spreads are elements,
whatever else they go through number by number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding, ElementwiseMap
from pyro_em.graph.factors import Group
from pyro_em.posteriors.states.state_layout import Stack
from pyro_em.updates.expectations.gaussian_rows import apart_rows, event_shape

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]


class Unlike(Exception):
    """Why an argument is none of these, in words."""


@dataclass(frozen=True, eq=False)
class Linear:
    """Numbers c + J θ, of which J has few that are not zero.

    Attributes:
        constant: c. # (members|1, chains|1, K, D, …)
        row: Of each entry of J the number, counted in ``constant``. # (entries,)
        column: The element of θ. # (entries,)
        factor: The entry. # (entries,)
    """

    constant: Numbers
    row: Places
    column: Places
    factor: Numbers

    @property
    def is_constant(self) -> bool:
        """Whether no parameter reaches it."""
        return not len(self.row)

    def at(self, theta: Numbers) -> Numbers:
        """The numbers at parameters."""
        if self.is_constant:
            return self.constant
        shape = self.constant.shape
        moved = np.bincount(self.row, self.factor * theta[self.column], self.constant.size)
        return self.constant + moved.reshape(shape)

    def entries(self) -> tuple[tuple[Places, ...], Places, Numbers]:
        """The indices of each entry's number, its element of θ, and the entry itself."""
        return np.unravel_index(self.row, self.constant.shape), self.column, self.factor


@dataclass(frozen=True, eq=False)
class Picked:
    """Numbers of a spread that are elements of parameters.

    Attributes:
        row: Which numbers they are. # (entries,)
        column: The element of θ behind each. # (entries,)
        maps: What they go through, innermost first.
        factor: A known factor of each. # (entries,)
    """

    row: Places
    column: Places
    maps: tuple[ElementwiseMap, ...]
    factor: Numbers

    def forward(self, theta: Numbers) -> Numbers:
        """The numbers at parameters. # (entries,)"""
        x = theta[self.column]
        if self.maps:
            x = _through(x, [m.forward for m in self.maps])
        return x * self.factor

    def inverse(self, natural: Numbers) -> Numbers:
        """The elements of parameters whose maps give some numbers, before any factor."""
        if not self.maps:
            return natural
        return _through(natural, [m.inverse for m in reversed(self.maps)])


@dataclass(frozen=True, eq=False)
class Spread:
    """Standard deviations, or matrices, as a site has them.

    Attributes:
        argument: "scale", "scale_tril" or "covariance_matrix".
        linear: The numbers, where they are c + J θ; what is picked is not in them.
            # (1, chains|1, K, D) or (1, chains|1, K, D, D)
        picked: Those that are elements of parameters.
    """

    argument: str
    linear: Linear
    picked: tuple[Picked, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether entries of a row are correlated given the mean."""
        return self.argument != "scale"

    @property
    def is_constant(self) -> bool:
        """Whether no parameter reaches it."""
        return self.linear.is_constant and not self.picked

    def at(self, theta: Numbers) -> Numbers:
        """Standard deviations, or lower triangles L with L Lᵀ the covariance. # (chains|1, K, D, …)

        Raises:
            LinAlgError: If a covariance is none.
        """
        out = self.linear.at(theta)[0]
        if self.picked:
            out = out.copy()
            flat = out.reshape(-1)
            for part in self.picked:
                flat[part.row] = part.forward(theta)
        if self.argument == "covariance_matrix":
            out = np.linalg.cholesky(out)
        return out


def linear_of(
    group: Group,
    stack: Stack,
    argument: str,
    begins: Mapping[str, int],
    tail: int,
    *,
    by_step: bool = False,
) -> Linear:
    """An argument of a mean as a function of the parameters.

    Args:
        group: The sites of a stack.
        stack: Where they lie.
        argument: The argument's name.
        begins: Where each parameter begins in θ.
        tail: How many dimensions follow the event.
        by_step: Whether it may differ from step to step.

    Raises:
        Unlike: If it is none.
    """
    binding = group.bindings[argument]
    if not binding.is_static or binding.normalise or any(s.maps for s in binding.selections):
        raise Unlike(f"{argument} of '{group.members[0]}' is {binding.how} in its parameters")
    if binding.pairs:
        raise Unlike(f"{argument} of '{group.members[0]}' is {binding.how} in its parameters")
    laid = _Laid(group, stack, tail)
    constant, parts = _read(binding, laid, begins)
    found = _joined(constant, parts)
    if not by_step and len(found.constant) > 1:
        raise Unlike(f"coefficients of '{group.members[0]}' differ from step to step")
    return found


def spread_of(group: Group, stack: Stack, begins: Mapping[str, int]) -> Spread:
    """The spread of some sites as a function of the parameters.

    Args:
        group: The sites of a stack.
        stack: Where they lie.
        begins: Where each parameter begins in θ.

    Raises:
        Unlike: If it is none.
    """
    site = group.members[0]
    argument = next(
        (a for a in ("scale", "scale_tril", "covariance_matrix") if a in group.arguments), ""
    )
    if not argument:
        raise Unlike(f"the spread of '{site}' is a precision")
    binding = group.bindings[argument]
    if not binding.is_static or binding.normalise:
        raise Unlike(f"{argument} of '{site}' is {binding.how} in its parameters")
    if binding.how == "sum" or any(s.of_matrices for s in binding.selections):
        raise Unlike(f"{argument} of '{site}' is a product of parameters")
    laid = _Laid(group, stack, 1 if argument != "scale" else 0)
    constant, parts = _read(binding, laid, begins)
    found = _joined(constant, parts)
    if len(found.constant) > 1:
        raise Unlike(f"the spread of '{site}' differs from step to step")
    if binding.how != "selection":
        return Spread(argument, found, ())
    picked = []
    for part, selection in zip(parts, binding.selections, strict=True):
        index = np.broadcast_to(part.column, found.constant.shape).reshape(-1)
        row = np.flatnonzero(index >= 0)
        factor = np.broadcast_to(part.factor, found.constant.shape).reshape(-1)[row]
        picked.append(Picked(row, index[row], selection.maps, factor.copy()))
    none = np.empty(0, dtype=np.int64)
    return Spread(argument, Linear(found.constant, none, none, np.empty(0)), tuple(picked))


@dataclass(frozen=True, eq=False)
class _Laid:
    """Tensors of a group's cells as numbers by chain and rank.

    Attributes:
        group: The sites.
        stack: Where they lie.
        tail: How many dimensions follow the event.
    """

    group: Group
    stack: Stack
    tail: int

    def numbers(self, t: Tensor, more: int = 0) -> NDArray[np.generic]:
        """# (members|1, chains|1, K, D, …), of one where steps or chains are alike"""
        flat = zip(t.shape, t.stride(), strict=True)
        if t.numel() and all(n == 1 or step == 0 for n, step in flat):
            tail = self.tail + more
            rest = t.shape[t.dim() - tail :] if tail else ()
            width = event_shape(self.group).numel()
            return np.full((1, 1, self.stack.rows.shape[1], width, *rest), t[(0,) * t.dim()].item())
        rows = apart_rows(self.group, t.detach().cpu(), self.tail + more)[0]
        out: NDArray[np.generic] = rows.numpy()
        return by_chain(out, self.stack)


def by_chain(x: NDArray[np.generic], stack: Stack) -> NDArray[np.generic]:
    """Rows by chain and rank, held once where members or chains are alike.

    Args:
        x: # (members|1, rows|1, …)
        stack: Where they lie.

    Returns:
        # (members|1, chains|1, K, …)
    """
    where = stack.rows.numpy()
    if x.shape[1] > 1:
        x = x[:, where]
    else:
        x = np.broadcast_to(x[:, :, None], (len(x), 1, where.shape[1], *x.shape[2:]))
    if len(x) > 1 and bool((x == x[:1]).all()):
        x = x[:1]
    if x.shape[1] > 1 and bool((x == x[:, :1]).all()):
        x = x[:, :1]
    return x


@dataclass(frozen=True, eq=False)
class _Part:
    """What one parameter adds: picked elements with factors, or a matrix.

    Attributes:
        column: The element of θ, −1 for none. # (members|1, chains|1, K, D, …)
        factor: What it is multiplied by. # as ``column``
        matrix: In place of both, entries for all elements of the parameter. # (…, elements)
        begin: Where the parameter begins in θ.
    """

    column: Places
    factor: Numbers
    matrix: Numbers | None = None
    begin: int = 0


def _read(
    binding: Binding, laid: _Laid, begins: Mapping[str, int]
) -> tuple[Numbers, Sequence[_Part]]:
    """The constant of a binding, zero where parameters stand, and what each parameter adds."""
    constant = laid.numbers(binding.constant).astype(np.float64)
    none = np.empty(0, dtype=np.int64)
    if binding.how == "affine":
        assert binding.jacobians is not None
        parts = [
            _Part(none, np.empty(0), laid.numbers(j.dense, 1).astype(np.float64), begins[name])
            for name, j in binding.jacobians.items()
        ]
        return constant, parts
    if binding.how == "constant":
        return constant, []
    out = []
    for s in binding.selections:
        index = laid.numbers(s.index).astype(np.int64)
        factor = np.ones(())
        if s.factor is not None:
            factor = laid.numbers(s.factor).astype(np.float64)
        column = np.where(index >= 0, index + begins[s.param], -1)
        constant = np.where(index >= 0, 0.0, constant)
        out.append(_Part(column, np.broadcast_to(factor, np.broadcast(column, factor).shape)))
    return constant, out


def _joined(constant: Numbers, parts: Sequence[_Part]) -> Linear:
    """A constant and what parameters add, over all members and chains that any of them has."""
    shapes = [constant.shape]
    shapes += [p.column.shape if p.matrix is None else p.matrix.shape[:-1] for p in parts]
    shapes += [p.factor.shape for p in parts if p.matrix is None]
    shape = np.broadcast_shapes(*shapes)
    constant = np.ascontiguousarray(np.broadcast_to(constant, shape))
    row, column, factor = [], [], []
    for p in parts:
        if p.matrix is None:
            index = np.broadcast_to(p.column, shape).reshape(-1)
            own = np.flatnonzero(index >= 0)
            row.append(own)
            column.append(index[own])
            factor.append(np.broadcast_to(p.factor, shape).reshape(-1)[own])
        else:
            matrix = np.broadcast_to(p.matrix, (*shape, p.matrix.shape[-1]))
            own, element = np.nonzero(matrix.reshape(-1, matrix.shape[-1]))
            row.append(own)
            column.append(element + p.begin)
            factor.append(matrix.reshape(-1, matrix.shape[-1])[own, element])
    empty = np.empty(0, dtype=np.int64)
    return Linear(
        constant,
        np.concatenate([empty, *row]),
        np.concatenate([empty, *column]),
        np.concatenate([np.empty(0), *factor]),
    )


def beside(parts: Sequence[Linear], width: int) -> Linear:
    """Coefficients of several latents beside each other.

    Args:
        parts: # (1, chains|1, K, D, q) each
        width: Σ q.
    """
    lead = np.broadcast_shapes(*(p.constant.shape[:4] for p in parts))
    shape = *lead, width
    constant = np.zeros(shape)
    row, column, factor, begin = [], [], [], 0
    for p in parts:
        q = p.constant.shape[-1]
        constant[..., begin : begin + q] = p.constant
        wide = spread_over(p, (*lead, q))
        index, own, by = wide.entries()
        row.append(np.ravel_multi_index((*index[:-1], index[-1] + begin), shape))
        column.append(own)
        factor.append(by)
        begin += q
    empty = np.empty(0, dtype=np.int64)
    return Linear(
        constant,
        np.concatenate([empty, *row]),
        np.concatenate([empty, *column]),
        np.concatenate([np.empty(0), *factor]),
    )


def spread_over(x: Linear, shape: tuple[int, ...]) -> Linear:
    """The same numbers, repeated along dimensions of size one."""
    if x.constant.shape == shape:
        return x
    constant = np.ascontiguousarray(np.broadcast_to(x.constant, shape))
    if x.is_constant:
        return replace(x, constant=constant)
    index, column, factor = x.entries()
    times = [a if b == 1 else 1 for a, b in zip(shape, x.constant.shape, strict=True)]
    grid = np.stack(np.meshgrid(*map(np.arange, times), indexing="ij"), -1).reshape(-1, len(shape))
    every = np.stack(index, -1)[None] + grid[:, None]
    row = np.ravel_multi_index(tuple(every.reshape(-1, len(shape)).T), shape)
    return Linear(constant, row, np.tile(column, len(grid)), np.tile(factor, len(grid)))


def masked(x: Linear, there: NDArray[np.bool_]) -> Linear:
    """The same, zero where nothing is read.

    Args:
        x: # (1, chains|1, K, D, Q)
        there: # (K, Q)
    """
    whole = np.broadcast_to(there[:, None], x.constant.shape)
    kept = whole.reshape(-1)[x.row]
    return Linear(np.where(whole, x.constant, 0.0), x.row[kept], x.column[kept], x.factor[kept])


def reshaped(x: Linear, shape: tuple[int, ...]) -> Linear:
    """The same numbers in their order, in another shape."""
    return replace(x, constant=x.constant.reshape(shape))


def _through(x: Numbers, maps: Sequence[Callable[[Tensor], Tensor]]) -> Numbers:
    t = torch.from_numpy(x)
    for m in maps:
        t = m(t)
    out: Numbers = t.numpy()
    return out
