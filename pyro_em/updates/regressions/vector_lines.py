"""Normal equations of vectors whose mean is affine in parameters: regressions with several responses.

    (Σ_cells w Jᵀ Λ J) δ = Σ_cells Jᵀ Λ (Σ w x − w loc),      J = ∂loc/∂θ  of one cell, (D, p)

with the precision matrix Λ of the cell. Where no coefficient is shared between components, the solution
does not depend on Λ, and with the covariance of the residuals after it both are the joint maximum.

Source: Anderson (2003), section 8.2; Hamilton (1990) for autoregressions that switch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Statistics, weigh
from pyro_em.families.normal import precision_matrix
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.scatter import sum_to
from pyro_em.updates.regressions.designs import designs_of


def is_vector(group: Group) -> bool:
    """Whether a group's observations are vectors of correlated elements, with values of their own."""
    family = group.family
    return family is not None and family.name == "MultivariateNormal" and group.belief is None


def residual_statistics(group: Group, counts: Tensor, arguments: Arguments) -> Statistics:
    """Σ w and Σ w (x − loc) of every cell in which an argument varies, without their squares.

    Args:
        group: A group of vectors.
        counts: Expected counts. # (members, *sizes)
        arguments: At the E-step.
    """
    weights = _weights(group, counts)
    keep = _varying(weights.dim(), arguments, ("loc",)) | _spreads(weights.dim(), arguments)
    flags = tuple(d in keep for d in range(weights.dim()))
    loc = arguments["loc"].detach()
    ones = torch.ones_like((group.value - loc)[..., 0])
    return {
        "deviation": weigh(weights, group.value - loc, flags),
        "weight": weigh(weights, ones, flags),
        "reference:loc": loc,
    }


def scatter_statistics(group: Group, counts: Tensor, arguments: Arguments) -> Statistics:
    """Σ w e eᵀ of the residuals e at the present means, of every cell in which a spread varies.

    The location to put into the rule of a spread is zero, as is the one of reference.

    Args:
        group: A group of vectors.
        counts: Expected counts. # (members, *sizes)
        arguments: As they are now.
    """
    family = group.family
    assert family is not None
    weights = _weights(group, counts)
    keep = _spreads(weights.dim(), arguments)
    flags = tuple(d in keep for d in range(weights.dim()))
    detached = {name: a.detach() for name, a in arguments.items()}
    out = family.expected_statistics(weights, group.value, detached, flags)
    return {**out, "reference:loc": zero_location(arguments)}


def zero_location(arguments: Arguments) -> Tensor:
    """The location about which residuals are. # (1, …, 1, D)"""
    loc = arguments["loc"]
    return loc.new_zeros((1,) * (loc.dim() - 1) + loc.shape[-1:])


def _weights(group: Group, counts: Tensor) -> Tensor:
    out = counts.to(group.value.dtype)
    return out.reshape(out.shape + (1,) * group.event_dims)


def _spreads(batch: int, arguments: Arguments) -> set[int]:
    return _varying(batch, arguments, [name for name in arguments if name != "loc"])


def _varying(batch: int, arguments: Arguments, names: Sequence[str]) -> set[int]:
    return {d for d in range(batch) if any(arguments[n].shape[d] > 1 for n in names)}


def vector_equations(
    binding: Binding,
    block: Sequence[str],
    statistics: Statistics,
    arguments: Arguments,
    values: Mapping[str, Tensor],
    lead: int,
) -> tuple[Tensor, Tensor]:
    """What one site of vectors adds to the normal equations of a block of parameters.

    Args:
        binding: That of the mean.
        block: Parameter names.
        statistics: Σ w, Σ w (x − loc) and the loc of reference.
        arguments: The current arguments.
        values: The current parameters, for their sizes.
        lead: How many dimensions are rows: members and plates.

    Returns:
        Gram matrix and right-hand side. # (p, p), (p,)
    """
    total = sum(values[name].numel() for name in block)
    batch = binding.constant.shape[:-1]
    weight, loc = statistics["weight"], arguments["loc"].detach()
    each = weight.unsqueeze(-1)
    residual = statistics["deviation"] + each * (statistics["reference:loc"] - loc)
    wide = residual.to(torch.float64)
    precision = precision_matrix({n: a.detach() for n, a in arguments.items()}).to(wide)
    pulled = sum_to((precision @ wide.unsqueeze(-1)).squeeze(-1), batch, 1)
    weight = weight.to(wide)
    if any(n == 1 < p for n, p in zip(batch, precision.shape, strict=False)):
        # One mean under several precisions: these are added as they are weighed.
        precision = sum_to(weight[..., None, None] * precision, batch, 2)
        weight = torch.ones_like(precision[..., 0, 0])
    weight = sum_to(weight, batch)
    D = wide.shape[-1]
    parts = designs_of(binding, block, values, lead, 1)
    w, r = weight.reshape(-1, len(parts)), pulled.reshape(-1, len(parts), D)
    rows = batch[:lead] if precision.shape[:lead].numel() > 1 else torch.Size([1] * lead)
    precision = precision.expand(*rows, *batch[lead:], D, D).reshape(-1, len(parts), D, D)
    gram, moment = wide.new_zeros(total, total), wide.new_zeros(total)
    for k, (columns, narrow) in enumerate(parts):
        J = narrow.to(wide)  # (rows, D, columns)
        weighted = (precision[:, k] @ J) * w[:, k, None, None]
        place = columns.unsqueeze(-1), columns.unsqueeze(-2)
        gram[place] = gram[place] + J.flatten(0, 1).mT @ weighted.flatten(0, 1)
        moment[columns] += J.flatten(0, 1).mT @ r[:, k].reshape(-1)
    return gram, moment
