"""Multivariate Normals whose covariance is a diagonal of parameters, read as independent Normals.

    N(x | μ, diag(σ²)) = Π_d N(x_d | μ_d, σ_d)

Neither a covariance nor a Cholesky factor with zeros beside its diagonal is solved by the scatter of
the data; standard deviations are. What is proved is which elements of parameters stand where: those on
the diagonal, and constant zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.families.registry import REGISTRY
from pyro_em.graph.bindings.binding import MAPS, Binding, ElementwiseMap, Selection, power_map
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role

# Which power of a diagonal element is the standard deviation.
_EXPONENT = {"scale_tril": 1.0, "covariance_matrix": 0.5, "precision_matrix": -0.5}


def with_diagonals(graph: FactorGraph) -> FactorGraph:
    """The graph with its diagonal multivariate Normals as independent ones."""
    groups = tuple(_independent(group, graph) or group for group in graph.groups)
    if all(a is b for a, b in zip(groups, graph.groups, strict=True)):
        return graph
    return replace(graph, groups=groups)


def with_matrix(name: str, arguments: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The arguments of independent Normals as the user's multivariate Normal has them.

    Args:
        name: Its matrix (`Group.matrix`).
        arguments: Those of the group.
    """
    power = arguments["scale"] ** (1 / _EXPONENT[name])
    rest = {n: a for n, a in arguments.items() if n != "scale"}
    return {**rest, name: torch.diag_embed(power)}


def _independent(group: Group, graph: FactorGraph) -> Group | None:
    """A group of independent Normals, or None where its covariance is no diagonal of parameters."""
    family = group.family
    if family is None or family.distribution is not dist.MultivariateNormal:
        return None
    is_latent = group.role is Role.GAUSSIAN
    if not is_latent and (group.role is not Role.DATA or not group.observed):
        return None
    if group.lines or group.reads:
        return None
    name = next(n for n in _EXPONENT if n in group.arguments)
    binding = group.bindings[name]
    if binding.how != "selection" or not _is_diagonal(binding, is_latent and name == "scale_tril"):
        return None
    scale = _scale(binding, _EXPONENT[name], graph)
    return replace(
        group,
        family=REGISTRY[dist.Normal],
        event_dims=group.event_dims + 1,
        arguments={"loc": group.arguments["loc"], "scale": scale.constant},
        bindings={"loc": group.bindings["loc"], "scale": scale},
        matrix=name,
    )


def _is_diagonal(binding: Binding, may_be_zero: bool) -> bool:
    """Whether parameters are on the diagonal, and constant zeros beside it.

    Args:
        binding: Of the matrix.
        may_be_zero: Whether a constant on the diagonal may be zero: a latent without noise.
    """
    D = binding.constant.shape[-1]
    if D < 2 or any(s.of_matrices for s in binding.selections):
        return False
    if any(s.is_whole for s in binding.selections):
        return False  # an element beside the diagonal is one of a parameter
    beside = ~torch.eye(D, dtype=torch.bool, device=binding.constant.device)
    read = torch.stack([s.index >= 0 for s in binding.selections]).any(0)
    if bool((read & beside).any()) or bool((binding.constant != 0)[..., beside].any()):
        return False
    along = read.diagonal(dim1=-2, dim2=-1)
    constant = binding.constant.diagonal(dim1=-2, dim2=-1)
    return bool((along | (constant > 0) | (may_be_zero & (constant == 0))).all())


def _scale(binding: Binding, exponent: float, graph: FactorGraph) -> Binding:
    """The standard deviations, from the diagonal of a matrix of which they are a power."""

    def along(t: Tensor) -> Tensor:
        return t.diagonal(dim1=-2, dim2=-1).contiguous()

    selections = tuple(
        Selection(
            s.param,
            along(s.index),
            _powered(s, exponent, graph),
            None if s.factor is None else along(s.factor) ** exponent,
        )
        for s in binding.selections
    )
    constant = along(binding.constant) ** exponent
    return replace(binding, constant=constant, selections=selections)


def _powered(part: Selection, exponent: float, graph: FactorGraph) -> tuple[ElementwiseMap, ...]:
    """The maps of a selection, then a power; one power for two where the numbers are positive."""
    if exponent == 1:
        return part.maps
    interval = bounds(graph.parameters[part.param].constraint)
    last = part.maps[-1].exponent if part.maps else None
    if last is not None and len(part.maps) == 1 and interval is not None and interval[0] >= 0:
        both = last * exponent
        return () if both == 1 else (power_map(both),)
    return (*part.maps, MAPS["Sqrt"] if exponent > 0 else MAPS["Rsqrt"])
