"""How parameters reach a distribution's argument: selection, affine, opaque.

The autograd graph of an argument a(θ) is read, never the user's source. With J = ∂a/∂θ, both
Jᵀv (one backward pass) and J t (differentiating Jᵀv in v) are cheap, so

* a is a *selection* of θ if every node is a view, an index or a stack: J t for t = 0, 1, 2, … is
  then the index map, and θ[index] must equal a to the bit;
* an invertible elementwise map f of a selection has one nonzero per row of J: (J t) / (J 1) is the
  index map, and a = f(θ[index]); the estimate passes through f⁻¹ (invariance of the MLE);
* a known factor c in a = c f(θ[index]) is an exposure, also in f(c θ[index]) where f is a power;
* a is *affine* if every node is linear in θ: a = J θ + offset, or a known function of such a predictor
  (`pyro_em.graph.bindings.affine`);
* a product a·exp(x·w), or logits x·w − log a, is affine in w and in the logarithm of a
  (`pyro_em.graph.bindings.log_affine`);
* an elementwise function of elements of several parameters is an expression of selections
  (`pyro_em.graph.bindings.composites`);
* a is *bilinear* if no product of it has more than two parameters, and none twice: least squares solves
  for each parameter while the others have values (`pyro_em.graph.bindings.bilinear`);
* a product of a matrix with its own transpose, Π = A Aᵀ, of matrices A that are selected, is a map of
  these: both factors are read, and have to select the same elements, one of them transposed;
* ``Categorical`` divides its rows by their own sums (or subtracts their logsumexp): on rows that
  are normalised already this is the identity, and the graph is cut there.

Anything else is *opaque* and goes to a gradient step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pyro_em.graph.bindings.affine import as_affine
from pyro_em.graph.bindings.bilinear import as_bilinear
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.composites import as_composite
from pyro_em.graph.bindings.log_affine import as_log_affine
from pyro_em.graph.bindings.named_leaves import NamedLeaves
from pyro_em.graph.bindings.nodes import (
    Point,
    below_expansion,
    is_leaf,
    nodes_below,
    variables_below,
)
from pyro_em.graph.bindings.products import as_product, as_sum
from pyro_em.graph.bindings.reached import Reached
from pyro_em.graph.bindings.selections import as_selection
from pyro_em.graph.bindings.useful import SELECTIONS, Useful


def bind(
    argument: Tensor,
    leaves: Mapping[str, Tensor],
    useful: Useful = SELECTIONS,
    *,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    laid: Tensor | None = None,
    plates: int = 0,
    max_cells: int = 2**27,
) -> Binding:
    """Read off an argument's autograd graph how parameters reach it.

    Args:
        argument: The value that a distribution holds, expanded as it may be.
        leaves: The leaf tensor of each parameter in this run.
        useful: Which bindings beside selections are looked for.
        layout: Views that bring the argument into the compact layout; the binding is that of
            ``layout(argument)``.
        laid: That, where it is known.
        plates: How many of the first dimensions of the layout are plates.
        max_cells: The most numbers of a Jacobian to hold.

    Returns:
        The strongest binding that holds.
    """
    normalised, link = useful.normalised, useful.link
    constant = layout(argument.detach()) if laid is None else laid.detach()
    if not argument.requires_grad:
        return Binding("constant", (), constant)
    start = torch.autograd.graph.get_gradient_edge(argument)
    names, complete = _leaves_below(start.node, leaves)
    if not complete:
        # What is known to reach it is trained all the same.
        return Binding(
            "opaque", names, constant, reason="a tensor that is no registered parameter reaches it"
        )
    if not names:
        return Binding("constant", (), constant)
    point = below_expansion(Point(argument, start.node, tuple(argument.shape)))
    index = torch.arange(math.prod(point.shape), device=argument.device).reshape(point.shape)
    top = layout(index.expand(argument.shape))
    reached = Reached(point, top, constant, names, leaves, plates, max_cells)
    product = as_product(reached) if useful.product else None
    if product is not None:
        return product
    selection = as_selection(reached, normalised)
    if isinstance(selection, Binding):
        return selection
    summed = as_sum(reached) if useful.product else None
    if summed is not None:
        return summed
    if useful.affine:
        affine = as_affine(reached, normalised, link)
        if isinstance(affine, Binding):
            return affine
        selection = affine
    is_one_row = all(size == 1 for size in top.shape[:plates])
    found = None
    if useful.bilinear:
        found = as_bilinear(reached, normalised=normalised)
    if found is None and useful.composite and is_one_row:
        found = as_composite(reached)
    if found is None and useful.affine and useful.logs:
        found = as_log_affine(reached, link)
    if found is None and useful.composite and not is_one_row:
        found = as_composite(reached)
    return found or Binding("opaque", names, constant, reason=selection)


def parameters_below(tensor: Tensor, leaves: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """Names of the parameters that reach a tensor; None where an unknown leaf does."""
    if not tensor.requires_grad:
        return ()
    names, complete = _leaves_below(torch.autograd.graph.get_gradient_edge(tensor).node, leaves)
    return names if complete else None


def known_below(tensor: Tensor, leaves: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the parameters that reach a tensor, whatever else does."""
    if not tensor.requires_grad:
        return ()
    return _leaves_below(torch.autograd.graph.get_gradient_edge(tensor).node, leaves)[0]


def leaves_below(tensors: Iterable[Tensor]) -> set[int]:
    """Identities of all leaf tensors that reach any of some tensors."""
    found: set[int] = set()
    seen: set[Node] = set()
    for tensor in tensors:
        if not tensor.requires_grad:
            continue
        if tensor.grad_fn is None:
            found.add(id(tensor))
            continue
        for node in nodes_below(tensor.grad_fn):
            if node not in seen and is_leaf(node):
                found.add(id(node.variable))  # type: ignore[attr-defined]
            seen.add(node)
    return found


def _leaves_below(node: Node, leaves: Mapping[str, Tensor]) -> tuple[tuple[str, ...], bool]:
    """Names of the parameters below a node in the order of ``leaves``; whether no other leaf is."""
    named = leaves if isinstance(leaves, NamedLeaves) else NamedLeaves(leaves)
    return named.among(variables_below(node))
