"""Parameter expansion by a mean: what all elements of a Gaussian latent share goes into coefficients.

A latent u ~ N(0, S) that a site reads as C u + X β has a working mean m, which is zero at the E-step.
It is estimated as the mean of E[u], S about it; then u is centred again and β ← β + δ with X δ = C m.
The likelihood of both is the same, so that it cannot fall: an intercept beside random intercepts, or
the mean of the data beside factors, is learned at once and not little by little.

Source: Liu, Rubin and Wu (1998), Parameter expansion to accelerate EM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.expectations import beliefs
from pyro_em.updates.expectations.gaussian_rows import design_of, rows_of
from pyro_em.updates.regressions.expansion import centred_latents
from pyro_em.updates.update import LeastSquares, ParameterUpdate

_MANY = 2**26  # numbers of a design that is looked at


@dataclass(frozen=True, eq=False)
class Shift:
    """A latent whose mean other coefficients may take in.

    Attributes:
        group: The latent's group.
        children: Groups that read it, and the names of the coefficients there.
        block: The coefficients.
    """

    group: int
    children: tuple[tuple[int, str], ...]
    block: tuple[str, ...]


def shifts_of(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> tuple[Shift, ...]:
    """The latents with a mean of zero that sites with free offsets read, and no other site.

    Args:
        graph: The graph of an M-step.
        updates: What was decided per parameter.
    """
    found = []
    for latent in centred_latents(graph, updates):
        readers = {c: None for c, _ in latent.children}
        block = tuple(
            dict.fromkeys(p for c in readers for p in graph.groups[c].bindings["loc"].params)
        )
        if block and _are_theirs(graph, updates, block, set(readers)):
            found.append(Shift(latent.group, latent.children, block))
    return tuple(found)


def _are_theirs(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    block: Sequence[str],
    children: set[int],
) -> bool:
    """Whether coefficients are least squares, and reach the offsets of some sites alone."""
    for name in block:
        if not isinstance(updates[name].update, LeastSquares) or updates[name].priors:
            return False
    for g, group in enumerate(graph.groups):
        reached = [a for a, b in group.bindings.items() if set(block) & set(b.params)]
        if reached and (g not in children or reached != ["loc"]):
            return False
    return True


@dataclass(frozen=True, eq=False)
class ImageSums:
    """Sums of the least squares X δ = z, with z = C m of those who read a latent.

    Attributes:
        gram: Xᵀ X. # (p, p)
        moment: Xᵀ z. # (p,)
        left_out: How many parts of the data have too many rows to be looked at.
    """

    gram: Tensor
    moment: Tensor
    left_out: int = 0


def mean_sums(shift: Shift, graph: FactorGraph) -> tuple[Tensor, Tensor]:
    """The sum of a latent's posterior means and of what they count. # (q,), ()"""
    return beliefs.mean_sums(graph.groups[shift.group])


def image_of(
    shift: Shift,
    graph: FactorGraph,
    arguments: Sequence[Mapping[str, Tensor]],
    values: Mapping[str, Tensor],
    mean: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """X and z = C m, row by row; None where they would be too large. # (rows, p), (rows,)

    Args:
        shift: The latent with its coefficients.
        graph: The graph of an M-step.
        arguments: The current arguments per group, coefficients of the latent as they are now.
        values: The current parameters, for sizes.
        mean: m. # (q,)
    """
    designs, targets = [], []
    for c in dict.fromkeys(c for c, _ in shift.children):
        child = graph.groups[c]
        parts = [design_of(child, child.bindings["loc"], n, values[n], 0) for n in shift.block]
        image = sum(
            rows_of(child, arguments[c][a], 1).to(torch.float64) @ mean
            for other, a in shift.children
            if other == c
        )
        assert isinstance(image, Tensor)
        shape = torch.broadcast_shapes(*(t.shape[:2] for t in (*parts, image)))
        design = torch.cat([p.expand(*shape, *p.shape[2:]) for p in parts], -1)
        if design.numel() > _MANY:
            return None
        designs.append(design.reshape(-1, design.shape[-1]))
        targets.append(image.expand(*shape, image.shape[-1]).reshape(-1))
    return torch.cat(designs), torch.cat(targets)


def image_sums(image: tuple[Tensor, Tensor] | None, like: Tensor) -> ImageSums:
    """The sums of one part of the data.

    Args:
        image: X and z; None where they would be too large.
        like: A tensor on the device of the sums, whose last dimension has their size.
    """
    if image is None:
        size = like.shape[-1]
        return ImageSums(like.new_zeros(size, size), like.new_zeros(size), 1)
    x, z = image
    return ImageSums(x.mT @ x, x.mT @ z)


def gain_of(sums: ImageSums) -> Tensor:
    """δ, what the coefficients gain. # (p,)"""
    return torch.linalg.pinv(sums.gram, hermitian=True) @ sums.moment


def is_off(x: Tensor, z: Tensor, gain: Tensor, size: float) -> bool:
    """Whether X δ differs from z by more than rounding.

    Args:
        x: # (rows, p)
        z: # (rows,)
        gain: δ. # (p,)
        size: The largest number among all z.
    """
    return bool(((x @ gain - z).abs() > 1e-9 * size).any())


def split(shift: Shift, gain: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """δ by parameter."""
    parts = gain.split([values[name].numel() for name in shift.block])
    return {
        name: part.reshape(values[name].shape)
        for name, part in zip(shift.block, parts, strict=True)
    }
