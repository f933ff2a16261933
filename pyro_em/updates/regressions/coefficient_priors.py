"""Priors of coefficients in an M-step: quadratic ones of what is solved for, others of dispersions.

    log p(θ) = −½ (θ − μ)ᵀ Λ (θ − μ) + c

A Normal prior, of numbers or of vectors, adds Λ to the Gram matrix of least squares and to the Hessian
of Newton's method, and Λ (μ − θ) to their right-hand sides. Its spread may be that of the data times a
known factor. A prior of a dispersion is a function of its logarithm, number by number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.families.conjugacy import inverse_matrix
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.update import ParameterUpdate, Prior

# Of one positive number, with derivatives of all orders in it.
_SMOOTH = frozenset(
    (
        "Chi2",
        "Exponential",
        "Gamma",
        "HalfCauchy",
        "HalfNormal",
        "InverseGamma",
        "LogNormal",
        "Weibull",
    )
)


def is_quadratic(graph: FactorGraph, prior: Prior) -> bool:
    """Whether a prior is Normal or multivariate Normal, at numbers that are known in an M-step."""
    family = graph.groups[prior.group].family
    named = family is not None and family.name in ("Normal", "MultivariateNormal")
    return named and not prior.argument


def is_smooth(graph: FactorGraph, prior: Prior) -> bool:
    """Whether a prior of a positive parameter has derivatives in its logarithm, number by number."""
    family = graph.groups[prior.group].family
    named = family is not None and family.name in _SMOOTH
    return named and prior.is_constant and not prior.argument


def normal_priors(
    block: Sequence[str],
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    updates: Mapping[str, ParameterUpdate],
    like: Tensor,
) -> tuple[Tensor, Tensor] | tuple[None, Tensor]:
    """Normal priors on the elements of a block: their precision, and how they pull at present values.

    Args:
        block: Parameter names.
        graph: The factor graph.
        values: The current parameters.
        updates: What was decided per parameter.
        like: For dtype and device.

    Returns:
        Λ and Λ (μ − θ), summed over priors; None for no priors. # (P, P), (P,)
    """
    total = sum(values[p].numel() for p in block)
    pull = like.new_zeros(total)
    whole: Tensor | None = None
    begin = 0
    for p in block:
        for prior in updates[p].priors:
            if not is_quadratic(graph, prior):
                continue
            whole = like.new_zeros(total, total) if whole is None else whole
            columns, precision, away = _one(prior, graph, values, p, like)
            place = begin + columns
            rows, others = place.unsqueeze(-1), place.unsqueeze(-2)
            whole.index_put_(torch.broadcast_tensors(rows, others), precision, accumulate=True)
            moved = (precision @ away.unsqueeze(-1)).squeeze(-1)
            pull.index_put_((place,), moved, accumulate=True)
        begin += values[p].numel()
    return (None, pull) if whole is None else (whole, pull)


def _one(
    prior: Prior, graph: FactorGraph, values: Mapping[str, Tensor], name: str, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one prior the elements that are jointly Normal, their precision, and μ − θ.

    # (events, D), (events, D, D), (events, D)
    """
    group, index = graph.groups[prior.group], prior.selection.index
    arguments = {n: a.detach().to(like) for n, a in group.evaluate_arguments(values).items()}
    weight = group.weights().to(like)
    weight = weight.reshape(weight.shape + (1,) * (index.dim() - weight.dim()))
    if "scale" in arguments:
        precision = (weight * arguments["scale"] ** -2).expand(index.shape)
        precision, columns = precision.reshape(-1, 1, 1), index.reshape(-1, 1)
    else:
        size = index.shape[-1]
        matrix = inverse_matrix(arguments) * weight[..., :1].unsqueeze(-1)
        precision = matrix.expand(*index.shape, size).reshape(-1, size, size)
        columns = index.reshape(-1, size)
    there = values[name].reshape(-1).to(like)
    target = arguments["loc"].expand(index.shape).reshape(columns.shape)
    return columns, precision, target - there[columns]


def dispersion_priors(
    block: Sequence[str],
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    updates: Mapping[str, ParameterUpdate],
) -> Curved | None:
    """Priors of positive parameters of a block at their values, in logarithms; None for none.

    Args:
        block: Parameter names.
        graph: The factor graph.
        values: Where to take them.
        updates: What was decided per parameter.
    """
    priors = [q for p in block for q in updates[p].priors if not is_quadratic(graph, q)]
    if not priors:
        return None
    with torch.inference_mode(False), torch.enable_grad():
        flat = [values[p].detach().reshape(-1).to(torch.float64) for p in block]
        u = torch.cat(flat).log().clone().requires_grad_()
        parts = dict(zip(block, u.split([len(f) for f in flat]), strict=True))
        at = {p: part.exp().reshape(values[p].shape) for p, part in parts.items()}
        total = u.new_zeros(())
        for prior in priors:
            group = graph.groups[prior.group]
            value = prior.selection.forward(at[prior.selection.param])
            total = total + group.log_density(group.arguments, value).sum()
        (slope,) = torch.autograd.grad(total, u, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), u)
    return Curved(total.detach(), slope.detach(), torch.diag(-bend))
