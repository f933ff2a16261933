"""Parameter expansion: the scale of a Gaussian latent is learned as a coefficient, too.

A latent u ~ N(0, S) with free S, read through known coefficients Z, is written α u with a working
matrix α that is one at the E-step. The M-step regresses on Z E[u] with the other coefficients,
estimates S as ever, and returns to the model by S ← α S αᵀ: the likelihood of both is the same, so
that it cannot fall, and variances near zero take ten steps instead of a hundred thousand.

Where the other coefficients β have a design X with X B = Z (an intercept beside random intercepts),
u has a working mean m as well, which is estimated as the mean of E[u], and goes into β ← β + B α m:
what the groups have in common is learned at once and not little by little.

Source: Liu, Rubin and Wu (1998), Parameter expansion to accelerate EM.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.gaussian_rows import design_of, event_shape, is_matrix, rows_of
from pyro_em.updates.update import ClosedForm, Gradient, LeastSquares, ParameterUpdate

SCALAR, DIAGONAL, MATRIX = "scalar", "diagonal", "matrix"

_MANY = 2**26  # numbers of a design that is looked at


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
        group: The latent's own group.
        block: Coefficients that take in a mean of the latent.
        into: B, how they do. # (p, q)
    """

    latent: str
    parameter: str
    argument: str
    form: str
    width: int
    children: tuple[tuple[int, str], ...]
    group: int
    block: tuple[str, ...] = ()
    into: Tensor | None = None

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

    def taken_in(self, mean: Tensor, alpha: Tensor) -> Tensor:
        """What the coefficients of the block gain for a mean of the latent. # (p,)"""
        assert self.into is not None
        if self.form == MATRIX:
            return self.into @ (alpha.reshape(self.width, self.width) @ mean)
        return self.into @ (alpha * mean)

    def returned(self, value: Tensor, alpha: Tensor) -> Tensor:
        """The spread of α u, for that of u.

        Args:
            value: The parameter.
            alpha: The working coefficients.
        """
        alpha = alpha.to(value.dtype)
        if self.form != MATRIX:
            return value * alpha.abs().reshape(value.shape if alpha.numel() > 1 else ())
        a = alpha.reshape(self.width, self.width)
        if self.argument == "covariance_matrix":
            return a @ value @ a.mT
        _, upper = torch.linalg.qr((a @ value).mT)
        return (upper * upper.diagonal().sign().unsqueeze(-1)).mT


def expansions_of(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate]
) -> tuple[Expansion, ...]:
    """The latents whose scale is free and whose coefficients are known.

    Args:
        graph: The graph of an M-step.
        updates: What was decided per parameter.
    """
    if any(isinstance(u.update, Gradient) for u in updates.values()):
        return ()  # a gradient sees the latents as they are
    found = []
    for g, group in enumerate(graph.groups):
        if group.role is not Role.GAUSSIAN or group.lines != ("loc",):
            continue
        loc = group.bindings["loc"]
        if loc.how != "constant" or bool((loc.constant != 0).any()):
            continue
        one = _expansion(graph, g, group, updates)
        if one is not None:
            found.append(one)
    return tuple(found)


def _expansion(
    graph: FactorGraph, g: int, group: Group, updates: Mapping[str, ParameterUpdate]
) -> Expansion | None:
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
    if len(update.uses) != 1 or update.uses[0].group != g:
        return None
    # One spread for all elements, the whole of its parameter.
    size = part.index.numel()
    if size != int(part.index.max()) + 1 or size != _numel(graph, part.param):
        return None
    children = []
    for c, child in enumerate(graph.groups):
        for latent, argument in zip(child.reads, child.lines[1:], strict=True):
            if latent != name:
                continue
            if child.bindings[argument].how != "constant":
                return None
            children.append((c, argument))
    if matrix and size != width**2:
        return None
    form = MATRIX if matrix else SCALAR if size == 1 else DIAGONAL
    if form == DIAGONAL and size != width:
        return None
    block, into = _taken_in(graph, updates, children, width)
    return Expansion(name, part.param, arguments[0], form, width, tuple(children), g, block, into)


# B of a child, by the binding of its offset; found once, as it does not change.
_known: WeakKeyDictionary[Binding, tuple[Binding, Tensor | None]] = WeakKeyDictionary()


def _taken_in(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    children: Sequence[tuple[int, str]],
    width: int,
) -> tuple[tuple[str, ...], Tensor | None]:
    """The coefficients into which a mean of a latent can go, and B; nothing where it cannot."""
    if len(children) != 1:
        return (), None
    ((c, argument),) = children
    child = graph.groups[c]
    offset, coefficient = child.bindings["loc"], child.bindings[argument]
    block = offset.params
    for name in block:
        update = updates[name]
        if not isinstance(update.update, LeastSquares) or update.priors:
            return (), None
    reached = [g for g, group in enumerate(graph.groups) if set(block) & set(group.params)]
    if not block or reached != [c]:
        return (), None
    if any(set(block) & set(child.bindings[a].params) for a in child.lines if a != "loc"):
        return (), None
    known = _known.get(offset)
    if known is None or known[0] is not coefficient:
        known = coefficient, _solved(graph, child, offset, coefficient, block, width)
        _known[offset] = known
    return (block, known[1]) if known[1] is not None else ((), None)


def _solved(
    graph: FactorGraph,
    child: Group,
    offset: Binding,
    coefficient: Binding,
    block: Sequence[str],
    width: int,
) -> Tensor | None:
    """B with X B = Z, where there is one."""
    leaves = graph.parameters
    parts = [design_of(child, offset, name, leaves[name].leaf, 0) for name in block]
    z = rows_of(child, coefficient.constant, 1).to(torch.float64)
    shape = torch.broadcast_shapes(*(t.shape[:2] for t in (*parts, z)))
    x = torch.cat([p.expand(*shape, *p.shape[2:]) for p in parts], -1)
    if x.numel() > _MANY:
        return None
    x, z = x.reshape(-1, x.shape[-1]), z.expand(*shape, *z.shape[2:]).reshape(-1, width)
    into = torch.linalg.pinv(x.mT @ x, hermitian=True) @ (x.mT @ z)
    size = z.abs().amax()
    return into if bool(((x @ into - z).abs() <= 1e-9 * size).all()) else None


def _numel(graph: FactorGraph, name: str) -> int:
    return graph.parameters[name].leaf.numel()
