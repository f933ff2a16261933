"""Standard errors from the observed information.

    I(u) = −∂² log p(x; θ(u)) / ∂u²,   cov(θ) = J B (Bᵀ I B)⁻¹ Bᵀ Jᵀ,   J = ∂θ/∂u.

The Hessian is that of the exact log evidence, by differentiating the contraction twice, in Pyro's
unconstrained coordinates u. B spans the directions in which the model can move: a softmax of K
numbers has K − 1 of them, a coordinate on its boundary none. Any further null direction of I means
that the data do not identify the parameter.

Whether a number of I is zero cannot be seen from the number, which has units: a slope per kilometre
has a millionth of the information of a slope per metre. It is compared with the information that
complete data would have, the size of the terms that cancel in it,

    F = Σ_cells q ∂log p(x, z) ∂log p(x, z)ᵀ.

Where a fit ended early the Hessian has some curvature along a direction that changes no row's density,
such as a rotation of loadings: a path that bends has some, if the slope is not zero. F has none, so
that it tells such a direction from a saddle.

Source: Louis (1982) for the observed information of incomplete data; the delta method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.errors import UsageError, message
from pyro_em.fitting.results.derivatives import (
    DRAWS,
    hessian,
    jacobian_of,
    random_scores,
    without_slope,
)
from pyro_em.fitting.results.free_directions import basis_of
from pyro_em.portable import Portable
from pyro_em.reduction.reduction import Reduction, Whole
from pyro_em.tracing.parameters import TracedParameter

_SLIGHT = 1e-3  # curvature, relative to that of each coordinate, that a slope may leave

_NEARLY = (
    1e-4  # of a square: what is left of terms that cancel, with directions that are nearly right
)


@dataclass(frozen=True, eq=False)
class StandardErrors(Portable, Mapping[str, Tensor]):
    """Standard errors by parameter; nan where there is none, and a note that says why.

    Attributes:
        values_by_name: One tensor per parameter, of its shape.
        covariance: Of all free parameters, flattened in the order of ``values_by_name``; nan in the
            rows and columns of those without a standard error.
        notes: Sentences about boundaries and what is not identified.
        at_boundary: Per parameter the elements that are held on the boundary of its constraint.
        not_identified: Per parameter the elements along which the evidence is flat.
        no_maximum: Per parameter the elements along which the evidence curves upwards.
    """

    values_by_name: dict[str, Tensor]
    covariance: Tensor
    notes: tuple[str, ...] = field(default=())
    at_boundary: Mapping[str, Tensor] = field(default_factory=dict)
    not_identified: Mapping[str, Tensor] = field(default_factory=dict)
    no_maximum: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __repr__(self) -> str:
        lines = [f"{name}: {value.tolist()}" for name, value in self.values_by_name.items()]
        return "\n".join([*lines, *(f"Note: {n}" for n in self.notes)])


Evidence = Callable[[Mapping[str, Tensor]], tuple[Sequence[Tensor], Tensor]]


class Curved:
    """The evidence of a part of the data at some parameters, ready to be differentiated.

    Args:
        parameters: The free parameters.
        evidence_of: From constrained values to the log densities of all factors and the log evidence
            that follows from them, twice differentiable.
        number: Of the part, whose random signs are its own.

    Attributes:
        values: Constrained values that are attached to ``variables``.
        variables: Unconstrained ones.
    """

    def __init__(
        self,
        parameters: Sequence[TracedParameter],
        evidence_of: Evidence | None = None,
        number: int = 0,
    ) -> None:
        self.parameters, self.number = parameters, number
        self.variables = [
            p.unconstrained if p.leaf is p.unconstrained else p.unconstrained.detach().clone()
            for p in parameters
        ]
        for v in self.variables:
            v.requires_grad_(True)
        with torch.enable_grad():
            self.values = {
                p.name: transform_to(p.constraint)(v)
                for p, v in zip(parameters, self.variables, strict=True)
            }
            if evidence_of is not None:
                self.tables, self.total = evidence_of(self.values)

    @property
    def cells(self) -> int:
        """How many log densities there are."""
        return sum(t.numel() for t in self.tables)

    def scores(self, n: int = DRAWS) -> Tensor:
        """Draws whose mean square is F. # (n, all u)"""
        with torch.enable_grad():
            return random_scores(self.tables, self.total, self.variables, n, self.number)

    def information(self) -> Tensor:
        """−∂² log p / ∂u². # (all u, all u)"""
        with torch.enable_grad():
            total = without_slope(self.total, self.parameters, self.values)
            return -hessian(total, self.variables)


def standard_errors(
    parameters: Sequence[TracedParameter],
    evidence_of: Evidence,
    loadings: Collection[str] = (),
) -> StandardErrors:
    """Standard errors of constrained parameters at their current values.

    Args:
        parameters: The free parameters.
        evidence_of: From constrained values to the log densities of all factors and the log evidence
            that follows from them, twice differentiable.
        loadings: Parameters that multiply Gaussian latents.

    Raises:
        UsageError: If there is no parameter.
    """
    _require_any(parameters)
    return standard_errors_over(parameters, Whole(Curved(parameters, evidence_of)), loadings)


def _require_any(parameters: Sequence[TracedParameter]) -> None:
    if not parameters:
        raise UsageError(
            message("standard_errors", "no parameter is free.", "all are fixed or unused")
        )


def standard_errors_over(
    parameters: Sequence[TracedParameter], over: Reduction[Curved], loadings: Collection[str] = ()
) -> StandardErrors:
    """Standard errors from parts of the data: information adds up, and so do scores.

    Args:
        parameters: The free parameters.
        over: The parts.
        loadings: Parameters that multiply Gaussian latents.

    Raises:
        UsageError: If there is no parameter.
    """
    _require_any(parameters)
    scores, information, cells = over.sum(lambda c: (c.scores(), c.information(), c.cells))
    at = Curved(parameters)
    values, variables = at.values, at.variables
    jacobian = jacobian_of([values[p.name] for p in parameters], variables)
    notes: list[str] = []
    basis = basis_of(parameters, variables, values, jacobian, notes)
    if information.dtype in (torch.float16, torch.bfloat16):  # these have no linear algebra
        information, basis = information.float(), basis.float()
        jacobian, scores = jacobian.float(), scores.float()
    reduced = basis.mT @ information @ basis
    least = 1e-9 if reduced.dtype == torch.float64 else 1e-4
    curvature = reduced.diagonal().abs()
    complete = (scores @ basis).square().mean(0)
    # Numbers that are no more than what rounding leaves of terms that cancel are zeros.
    rounding = 1e-2 * least * complete
    reduced = torch.where(reduced.abs() <= (rounding * rounding.unsqueeze(-1)).sqrt(), 0.0, reduced)
    size = torch.where(curvature <= rounding, complete, curvature)
    scale = torch.where(size > 0, size, 1.0).rsqrt()
    scaled = reduced * scale * scale.unsqueeze(-1)
    eigenvalues, vectors = torch.linalg.eigh(scaled)
    unseen = _unseen(scores @ basis * scale, vectors) & (eigenvalues.abs() <= _SLIGHT)
    if loadings or bool(unseen.any()):
        many = basis.shape[1] + DRAWS
        draws = over.sum(lambda c: c.scores(many)).to(basis)
        # Fewer densities than directions leave some unseen that all of them together show.
        few = cells < basis.shape[1]
        eigenvalues, vectors = _apart(scaled, draws @ basis * scale, _SLIGHT if few else torch.inf)
    small = (
        ((vectors * scale.unsqueeze(-1)).square() * rounding.unsqueeze(-1)).sum(0).clamp(min=least)
    )
    negative = eigenvalues < -small
    null = eigenvalues.abs() <= small
    if bool(negative.any()):
        notes.append(
            "the observed information is not positive definite: these parameters are no maximum "
            "of the evidence; fit to convergence first (a smaller tol)."
        )
    inverse = torch.where(null | negative, 0.0, 1 / torch.where(null, 1.0, eigenvalues))
    half = jacobian @ basis * scale @ vectors
    covariance = (half * inverse) @ half.mT
    variance = covariance.diagonal().clone()
    # Row by row: every element has its own unit.
    flat, upwards = (_moved_by(half, which) for which in (null, negative))
    unidentified = flat | upwards
    if bool((null | negative).any()):
        variance[unidentified] = torch.nan
        if bool(null.any()):
            names = _names(parameters, values, unidentified)
            notes.append(
                f"not identified by the data: {names}. The evidence is flat along "
                f"{int(null.sum())} direction(s) that move them."
            )
            if any(f"'{name}'" in names for name in loadings):
                notes.append(
                    "loadings of several Gaussian latents can be rotated, and the evidence stays: what "
                    "does not change with a rotation (their product W Wᵀ, say) is identified."
                )
    # A row without any free direction is a boundary value: it has no standard error.
    stuck = (jacobian @ basis).abs().amax(-1) == 0 if basis.shape[1] else variance == variance
    variance[stuck] = torch.nan
    covariance[torch.isnan(variance), :] = torch.nan
    covariance[:, torch.isnan(variance)] = torch.nan
    shapes = {p.name: values[p.name].shape for p in parameters}
    return StandardErrors(
        _by_name(variance.sqrt().detach(), shapes),
        covariance.detach(),
        tuple(notes),
        _by_name(stuck, shapes),
        _by_name(flat & ~upwards, shapes),
        _by_name(upwards, shapes),
    )


def _by_name(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """What all parameters have one after the other, in their shapes."""
    parts = flat.split([s.numel() for s in shapes.values()])
    return {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}


def _moved_by(half: Tensor, directions: Tensor) -> Tensor:
    """Which elements some directions move, each measured in its own unit. # (elements,)"""
    if not bool(directions.any()):
        return half.new_zeros(len(half), dtype=torch.bool)
    return half[:, directions].abs().amax(-1) > 1e-6 * half.abs().amax(-1)


def _unseen(scores: Tensor, directions: Tensor) -> Tensor:
    """Along which directions no row's density changes, but for rounding. # (directions,)

    Args:
        scores: Draws. # (draws, free directions)
        directions: As columns. # (free directions, directions)
    """
    along = (scores @ directions).square().mean(0)
    terms = (scores.abs() @ directions.abs()).square().mean(0)
    return along <= _NEARLY * terms


def _apart(information: Tensor, scores: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors where directions that no row sees are kept apart, as zeros.

    Args:
        information: Scaled. # (n, n)
        scores: At least n draws. # (draws, n)
        limit: The curvature up to which they are.

    Returns:
        # (n,), (n, n)
    """
    _, sizes, rows = torch.linalg.svd(scores, full_matrices=False)
    least = 1e-9 if scores.dtype == torch.float64 else 1e-4
    seen = sizes > least * sizes[0]
    hidden, rest = rows[~seen].mT, rows[seen].mT
    curvature, turned = torch.linalg.eigh(hidden.mT @ information @ hidden)
    flat = curvature.abs() <= limit
    flat_ones = hidden @ turned[:, flat]
    rest = torch.cat([rest, hidden @ turned[:, ~flat]], 1)
    eigenvalues, vectors = torch.linalg.eigh(rest.mT @ information @ rest)
    zeros = eigenvalues.new_zeros(flat_ones.shape[1])
    return torch.cat([zeros, eigenvalues]), torch.cat([flat_ones, rest @ vectors], 1)


def _names(
    parameters: Sequence[TracedParameter], values: Mapping[str, Tensor], chosen: Tensor
) -> str:
    names, begin = [], 0
    for p in parameters:
        size = values[p.name].numel()
        if bool(chosen[begin : begin + size].any()):
            names.append(f"'{p.name}'")
        begin += size
    return ", ".join(names)
