"""What rows share whose argument is a line in known covariates.

Their coefficients, one after the other, are elements of parameters that nothing else reads; all cells
(components, entries of a vector, classes) have the same covariates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.pairs import products
from pyro_em.densities.ridge import are_read_elsewhere, may_be_ridge
from pyro_em.distributions import bounds
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.regressions.designs import Designs, read_columns
from pyro_em.updates.update import LeastSquares, Newton, ParameterUpdate

_FEW = 2**16  # numbers from which on the same of all rows is held once

_MANY = 2**21  # numbers from which on the model's own are read where they lie

Held = tuple[str, tuple[int, ...], torch.dtype]  # a parameter, its shape and its dtype


class AtCoefficients:
    """Lines at some coefficients: rows are evaluated with these as they stand.

    Attributes:
        size: No term is expanded.
    """

    size: ClassVar[float] = 0.0

    @property
    def prepared(self) -> Self:
        """What the E-step reads: nothing is left to prepare."""
        return self


def held(name: str, values: Mapping[str, Tensor]) -> Held:
    """A parameter that is held, by its value."""
    return name, tuple(values[name].shape), values[name].dtype


def as_coefficients(block: Sequence[Held], values: Mapping[str, Tensor]) -> Tensor:
    """The elements of parameters, one after the other, in float64. # (C,)"""
    return torch.cat([values[name].reshape(-1).to(torch.float64) for name, _, _ in block])


def as_parameters(block: Sequence[Held], beta: Tensor) -> dict[str, Tensor]:
    """The parameters whose elements coefficients are, in their own dtypes."""
    parts = beta.split([math.prod(shape) for _, shape, _ in block])
    return {
        name: part.reshape(shape).to(dtype)
        for (name, shape, dtype), part in zip(block, parts, strict=True)
    }


def are_found_alone(
    names: Collection[str],
    by: type[LeastSquares | Newton],
    g: int,
    argument: str,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Mapping[str, Tensor],
) -> bool:
    """Whether the coefficients in one argument of a group are found from this argument alone.

    Args:
        names: The parameters that the argument reads.
        by: The update that finds them.
        g: The group.
        argument: The argument.
        graph: The collapsed graph.
        updates: What was decided.
        values: Parameter values, for their dtypes.
    """
    own = set(names)
    elsewhere = are_read_elsewhere(graph, own, g)
    others = {p for a, b in graph.groups[g].bindings.items() if a != argument for p in b.params}
    if elsewhere or own & others or len({values[p].dtype for p in own}) != 1:
        return False
    return all(
        isinstance(updates[p].update, by)
        and set(updates[p].block) == own
        and may_be_ridge(graph, updates, p)
        and bounds(graph.parameters[p].constraint) == (-math.inf, math.inf)
        for p in own
    )


def common_covariates(parts: Designs, without: int | None = None) -> tuple[Tensor, Tensor] | None:
    """The covariates that all cells share, and which coefficients they multiply.

    Args:
        parts: Of each cell, one of its event too, the columns that are not zero, and the design.
            # (columns,), (rows, columns)
        without: What stands for the coefficients of a cell that has none, a class that others are held
            against; None where every cell must have some.

    Returns:
        # (rows, d), (cells, d); None where some have covariates of their own
    """
    if not parts:
        return None
    reads = {id(own): read_columns(own) for _, own in parts}
    first = next((own for _, own in parts if bool(reads[id(own)].any())), parts[0][1])
    read = reads[id(first)]
    x = first if bool(read.all()) else first[:, read]
    columns = []
    for which, own in parts:
        read = reads[id(own)]
        if without is not None and not bool(read.any()):
            columns.append(torch.full((x.shape[1],), without, device=x.device))
            continue
        if own is not first:
            own = own[:, read]
            if own.shape != x.shape or not torch.equal(own, x):
                return None
        columns.append(which[read])
    return x, torch.stack(columns)


def of_rows(known: Tensor, rows: slice) -> Tensor:
    """What is known of some rows in float64, row after row along memory. # (d, N) to (d, rows)"""
    part = known[:, rows]
    if part.dtype != torch.float64:
        return part.to(torch.float64, memory_format=torch.contiguous_format)
    return part if known.stride(1) == 1 else part.contiguous()


def by_row(
    known: Tensor, sizes: torch.Size, rows: Sequence[int], *, as_given: bool = False
) -> Tensor:
    """Known numbers of each row, in float64; they may be the same along some dimensions. # (d, N)

    Many are no copy: `of_rows` reads some of them.

    Args:
        known: # (sizes.numel(), d) or (*sizes, *d)
        sizes: Members and plates, or ones. # (*sizes,)
        rows: Members and plates.
        as_given: Whether many may stay in less than float64, for those who ask `of_rows` alone.
    """
    stays = as_given and known.is_floating_point() and known.numel() > _MANY
    wide = (known if stays else known.to(torch.float64)).reshape(*sizes, -1).expand(*rows, -1)
    flat = wide.flatten(0, -2).T
    many = flat.numel() > (_FEW if sizes.numel() == 1 else _MANY)
    return flat if many else flat.contiguous()


def products_of(x: Tensor) -> Tensor:
    """The products of covariates, once where these are the same of all rows. # (d, N) to (P, N)"""
    if x.stride(1) == 0 and x.shape[1] > 1:
        return products(x[:, :1]).expand(-1, x.shape[1])
    return products(x)
