"""Parameter expansion: the scale of a Gaussian latent is learned as a coefficient, too.

A latent u ~ N(0, S) with free S, read through known coefficients Z, is written α u with a working
matrix α that is one at the E-step. The M-step regresses on Z E[u] with the other coefficients,
estimates S as ever, and returns to the model by S ← α S αᵀ: the likelihood of both is the same, so
that it cannot fall, and variances near zero take ten steps instead of a hundred thousand.

Source: Liu, Rubin and Wu (1998), Parameter expansion to accelerate EM.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from pyro.distributions.constraints import softplus_lower_cholesky
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import bounds
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import event_shape, is_matrix
from pyro_em.updates.update import ClosedForm, Gradient, ParameterUpdate

SCALAR, DIAGONAL, MATRIX = "scalar", "diagonal", "matrix"


class FlatSpread(Exception):
    """The spread of an expanded latent became singular, where rounding leaves no matrix.

    Attributes:
        latent: The latent.
    """

    def __init__(self, latent: str) -> None:
        super().__init__(latent)
        self.latent = latent


@dataclass(frozen=True, eq=False)
class Expansion:
    """One latent whose scale is also learned as a coefficient.

    Attributes:
        latent: The latent.
        parameter: The parameter that is its spread.
        argument: The argument that the parameter is.
        form: What α is: one number for all coordinates, one for each, or a matrix.
        width: q, how many coordinates an element has.
        children: Groups that read it, and the names of the coefficients there.
    """

    latent: str
    parameter: str
    argument: str
    form: str
    width: int
    children: tuple[tuple[int, str], ...]

    def is_read_by(self, groups: Collection[int]) -> bool:
        """Whether any of some groups reads the latent."""
        return any(c in groups for c, _ in self.children)

    @property
    def size(self) -> int:
        """How many numbers α has."""
        return {SCALAR: 1, DIAGONAL: self.width, MATRIX: self.width**2}[self.form]

    def one(self, like: Tensor) -> Tensor:
        """α at the E-step. # (size,)"""
        if self.form == MATRIX:
            return torch.eye(self.width, dtype=torch.float64, device=like.device).reshape(-1)
        return torch.ones(self.size, dtype=torch.float64, device=like.device)

    def applied(self, coefficient: Tensor, alpha: Tensor) -> Tensor:
        """C α. # as C: (…, q)"""
        if self.form == MATRIX:
            return coefficient @ alpha.reshape(self.width, self.width).to(coefficient.dtype)
        return coefficient * alpha.to(coefficient.dtype)

    def design(self, coefficient: Tensor) -> Tensor:
        """∂(C α)/∂α. # (…, q, size)"""
        if self.form == SCALAR:
            return coefficient.unsqueeze(-1)
        if self.form == DIAGONAL:
            return coefficient.diag_embed()
        eye = torch.eye(self.width, dtype=coefficient.dtype, device=coefficient.device)
        # The derivative of (C α)_k in α_jk is C_j.
        whole = coefficient[..., None, :, None] * eye[:, None, :]
        return whole.reshape(*coefficient.shape, self.size)

    def returned(self, value: Tensor, alpha: Tensor) -> Tensor:
        """The spread of α u, for that of u.

        Args:
            value: The parameter.
            alpha: The working coefficients.

        Raises:
            FlatSpread: If it is singular: fewer elements than coordinates span no volume.
        """
        alpha = alpha.to(value.dtype)
        if self.form != MATRIX:
            return value * alpha.abs().reshape(value.shape if alpha.numel() > 1 else ())
        a = alpha.reshape(self.width, self.width)
        if self.argument == "covariance_matrix":
            spread = covariance = a @ value @ a.mT
        else:
            _, upper = torch.linalg.qr((a @ value).mT)
            spread = (upper * upper.diagonal().sign().unsqueeze(-1)).mT
            covariance = spread @ spread.mT
        if _is_flat(covariance):
            raise FlatSpread(self.latent)
        return spread


def _is_flat(covariance: Tensor) -> bool:
    """Whether the correlations of a covariance are singular but for rounding. # (q, q)"""
    unit = covariance.diagonal().clamp(min=torch.finfo(covariance.dtype).tiny).rsqrt()
    correlation = unit.unsqueeze(-1) * covariance * unit
    if not bool(torch.isfinite(correlation).all()):
        return True
    limit = 128 * len(unit) * torch.finfo(covariance.dtype).eps
    return bool(torch.linalg.eigvalsh(correlation)[0] <= limit)


def expansions_of(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate]
) -> tuple[Expansion, ...]:
    """The latents whose scale is free and whose coefficients are known.

    Args:
        graph: The graph of an M-step.
        updates: What was decided per parameter.
    """
    found = (_expansion(graph, c, updates) for c in centred_latents(graph, updates))
    return tuple(e for e in found if e is not None)


@dataclass(frozen=True)
class Centred:
    """A Gaussian latent whose mean is zero, whatever the parameters are.

    Attributes:
        group: The number of its group.
        children: Groups that read it, and the names of the coefficients there.
    """

    group: int
    children: tuple[tuple[int, str], ...]


def centred_latents(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate]
) -> tuple[Centred, ...]:
    """The latents that an M-step may expand: none beside a gradient, which sees them as they are."""
    if any(isinstance(u.update, Gradient) for u in updates.values()):
        return ()
    children: dict[str, list[tuple[int, str]]] = {}
    for c, child in enumerate(graph.groups):
        for latent, argument in zip(child.reads, child.lines[1:], strict=True):
            children.setdefault(latent, []).append((c, argument))
    return tuple(
        Centred(g, tuple(children[group.members[0]]))
        for g, group in enumerate(graph.groups)
        if _is_centred(group) and group.members[0] in children
    )


def _is_centred(group: Group) -> bool:
    if group.role is not Role.GAUSSIAN or group.lines != ("loc",):
        return False
    loc = group.bindings["loc"]
    return loc.how == "constant" and not bool((loc.constant != 0).any())


def _expansion(
    graph: FactorGraph, latent: Centred, updates: Mapping[str, ParameterUpdate]
) -> Expansion | None:
    group = graph.groups[latent.group]
    name, width = group.members[0], event_shape(group).numel()
    matrix = is_matrix(group)
    arguments = [a for a in group.arguments if a not in group.lines]
    if len(arguments) != 1 or (matrix and arguments[0] == "precision_matrix"):
        return None
    binding = group.bindings[arguments[0]]
    if binding.how != "selection" or len(binding.selections) != 1:
        return None
    (part,) = binding.selections
    update = updates[part.param]
    plain = not part.maps and part.factor is None and bool((part.index >= 0).all())
    if not plain or not isinstance(update.update, ClosedForm) or update.priors:
        return None
    if update.update.floor > 0 or not _is_any_spread(graph.parameters[part.param].constraint):
        return None  # what it is multiplied by could leave its place
    if len(update.uses) != 1 or update.uses[0].group != latent.group:
        return None
    # One spread for all elements, the whole of its parameter.
    size = part.index.numel()
    if size != int(part.index.max()) + 1 or size != _numel(graph, part.param):
        return None
    if any(graph.groups[c].bindings[a].how != "constant" for c, a in latent.children):
        return None
    if matrix and size != width**2:
        return None
    form = MATRIX if matrix else SCALAR if size == 1 else DIAGONAL
    if form == DIAGONAL and size != width:
        return None
    return Expansion(name, part.param, arguments[0], form, width, latent.children)


def _is_any_spread(constraint: constraints.Constraint) -> bool:
    """Whether a parameter may be any positive number or matrix."""
    interval = bounds(constraint)
    if interval is not None:
        return interval[0] <= 0 and interval[1] == math.inf
    matrices = (constraints.lower_cholesky, constraints.positive_definite)
    return any(type(constraint) is type(c) for c in (*matrices, softplus_lower_cholesky))


def _numel(graph: FactorGraph, name: str) -> int:
    return graph.parameters[name].leaf.numel()
