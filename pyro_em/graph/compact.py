"""Tensors in the compact layout: the batch dimensions that are wanted, what is only repeated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.expanded import once_each
from pyro_em.graph.forms import equal_to_first
from pyro_em.graph.structure import Structure


class Stray(Exception):
    """A dimension that belongs to no plate and no latent; holds the tensor's shape and its size."""


def stray_finding(name: str, structure: Structure, shape: tuple[int, ...], size: int) -> Finding:
    """The finding on a site with such a dimension."""
    return Finding(
        f"site '{name}'",
        f"with latents enumerated, one of its tensors has shape {shape}; its dimension "
        f"of size {size} belongs to no plate and no latent of the site.",
        "an enumerated value has its own dimension on the left of all plates",
        (
            "align other tensors with the plates on the right: avoid unsqueeze(-1) and "
            "reshape on a latent's value",
            "wrap the site in a pyro.plate, or use .to_event",
        ),
        latents=tuple(n for n in structure.sites[name].scope if n in structure.latents),
    )


def compact(
    tensor: Tensor,
    event_dim: int,
    dims: Sequence[int | None],
    collapse: int = 0,
    like: Tensor | None = None,
) -> Tensor:
    """Keep only the batch dimensions ``dims`` (from the right), in that order; expanded ones as 1.

    Args:
        tensor: A traced tensor. # (*batch, *event)
        event_dim: How many of its rightmost dimensions are kept whole.
        dims: Negative positions among the batch dimensions; None inserts one of size one.
        collapse: How many of the leftmost event dimensions may be collapsed too when expanded.
        like: The tensor of the same shape whose strides say what is expanded; by default this one.

    Returns:
        A view. # (*dims, *event)

    Example:
        >>> compact(torch.zeros(2, 1, 5, 3), 1, [-1, -3]).shape
        torch.Size([5, 2, 3])
    """
    return compacted(
        tensor, recipe_for(tensor if like is None else like, event_dim, dims, collapse)
    )


@dataclass(frozen=True)
class Recipe:
    """How tensors of one shape and strides are brought into the compact layout.

    Attributes:
        expanded: Dimensions that are copies.
        padded: How many dimensions of size one are missing on the left.
        order: The order of the dimensions then.
        shape: The shape at last.
    """

    expanded: tuple[int, ...]
    padded: int
    order: tuple[int, ...]
    shape: tuple[int, ...]


def recipe_for(
    like: Tensor, event_dim: int, dims: Sequence[int | None], collapse: int = 0
) -> Recipe:
    """The recipe for tensors of the form of ``like``; see `compact`."""
    return _recipe(like.shape, like.stride(), event_dim, tuple(dims), collapse)


def laid_out(
    tensors: Sequence[tuple[Tensor, int, int]], dims: Sequence[int | None]
) -> list[tuple[Tensor, Recipe]]:
    """Tensors of one site in the compact layout, each with the recipe for others of its form.

    Args:
        tensors: Each with its ``event_dim`` and ``collapse``; see `compact`.
        dims: See `compact`.
    """
    recipes = [recipe_for(t, event_dim, dims, collapse) for t, event_dim, collapse in tensors]
    return [
        (compacted(t, recipe), recipe) for (t, *_), recipe in zip(tensors, recipes, strict=True)
    ]


@lru_cache(maxsize=1024)
def _recipe(
    full: tuple[int, ...],
    strides: tuple[int, ...],
    event_dim: int,
    dims: tuple[int | None, ...],
    collapse: int,
) -> Recipe:
    shape = list(full)
    batch = len(shape) - event_dim
    expanded = [d for d in range(batch + collapse) if shape[d] > 1 and strides[d] == 0]
    for d in expanded:
        shape[d] = 1
    padded = max(-batch, 0)  # an argument that broadcasts over reinterpreted dimensions
    shape, batch = [1] * padded + shape, max(batch, 0)
    present = [batch + d for d in dims if d is not None and batch + d >= 0]
    others = [d for d in range(batch) if d not in present]
    for d in others:
        if shape[d] != 1:
            raise Stray(tuple(shape), shape[d])
    order = (*present, *others, *range(batch, len(shape)))
    sizes = iter([shape[d] for d in present])
    target = [next(sizes) if d is not None and batch + d >= 0 else 1 for d in dims]
    return Recipe(tuple(expanded), padded, order, (*target, *shape[batch:]))


def compacted(tensor: Tensor, recipe: Recipe) -> Tensor:
    """A tensor in the compact layout; a view."""
    for d in recipe.expanded:
        tensor = tensor.narrow(d, 0, 1)
    if recipe.padded:
        tensor = tensor.reshape((1,) * recipe.padded + tuple(tensor.shape))
    if recipe.order != tuple(range(tensor.dim())):
        tensor = tensor.permute(recipe.order)
    return tensor if tuple(tensor.shape) == recipe.shape else tensor.reshape(recipe.shape)


def once_along_rows(tensor: Tensor, event_dim: int) -> Tensor:
    """A tensor whose expanded batch dimensions have size one, so that what is made of it is small.

    What is an expansion itself stays: its derivative is read below it, where it is small as well.
    """
    if tensor.grad_fn is not None and tensor.grad_fn.name().startswith("ExpandBackward"):
        return tensor
    return once_each(tensor, tensor.dim() - event_dim)


def compact_all(tensors: Sequence[Tensor], recipe: Recipe) -> Tensor:
    """Tensors of one form in the compact layout, along a leading dimension of their own."""
    if recipe.expanded:
        narrow = []
        for t in tensors:
            for d in recipe.expanded:
                t = t.narrow(d, 0, 1)
            narrow.append(t)
        tensors = narrow
    first = tensors[0]
    if not first.requires_grad and bool(equal_to_first(tensors).all()):
        one = compacted(first, replace(recipe, expanded=()))
        return one.unsqueeze(0).expand(len(tensors), *one.shape)  # kept once
    stack = torch.stack(list(tensors))
    if recipe.padded:
        stack = stack.reshape(len(stack), *(1,) * recipe.padded, *stack.shape[1:])
    order = (0, *(d + 1 for d in recipe.order))
    if order != tuple(range(stack.dim())):
        stack = stack.permute(order)
    return stack.reshape(len(stack), *recipe.shape)
