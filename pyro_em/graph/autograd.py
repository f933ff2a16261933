"""How parameters reach a distribution's argument: selection, affine, opaque.

The autograd graph of an argument a(θ) is read, never the user's source. With J = ∂a/∂θ, both
Jᵀv (one backward pass) and J t (differentiating Jᵀv in v) are cheap, so

* a is a *selection* of θ if every node is a view, an index or a stack: J t for t = 0, 1, 2, … is
  then the index map, and θ[index] must equal a to the bit;
* an invertible elementwise map f of a selection has one nonzero per row of J: (J t) / (J 1) is the
  index map, and a = f(θ[index]); the estimate passes through f⁻¹ (invariance of the MLE);
* a known factor c in a = c f(θ[index]) is an exposure;
* a is *affine* if every node is linear in θ: a = J θ + offset, or a known function of such a predictor
  (`pyro_em.graph.affine`);
* a product of a matrix with its own transpose, Π = A Aᵀ, of matrices A that are selected, is a map of
  these: both factors are read, and have to select the same elements, one of them transposed;
* ``Categorical`` divides its rows by their own sums (or subtracts their logsumexp): on rows that
  are normalised already this is the identity, and the graph is cut there.

Anything else is *opaque* and goes to a gradient step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pyro_em.graph.affine import as_affine
from pyro_em.graph.binding import MAPS, PRODUCT, Binding, ElementwiseMap, Selection, power_map
from pyro_em.graph.nodes import (
    VIEWS,
    Point,
    base_name,
    below_expansion,
    below_normalisation,
    forward_maps,
    inputs_of,
    is_leaf,
    nodes_below,
    point_at,
    through_views,
)


def bind(
    argument: Tensor,
    leaves: Mapping[str, Tensor],
    *,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    normalised: str = "",
    allow_affine: bool = False,
    link: str = "",
    allow_product: bool = False,
    max_cells: int = 2**27,
) -> Binding:
    """Read off an argument's autograd graph how parameters reach it.

    Args:
        argument: The value that a distribution holds, expanded as it may be.
        leaves: The leaf tensor of each parameter in this run.
        layout: Views that bring the argument into the compact layout; the binding is that of
            ``layout(argument)``.
        normalised: ``"probs"`` or ``"logits"`` where the distribution normalises this argument's
            rows, else empty.
        allow_affine: Whether an affine binding is of use (its Jacobian is then computed).
        link: What makes the argument of an affine predictor, by its name in ``binding.LINKS``.
        allow_product: Whether matrices A Aᵀ are of use.
        max_cells: The largest Jacobian to form.

    Returns:
        The strongest binding that holds.
    """
    constant = layout(argument.detach())
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
    product = _as_product(point, top, constant, names, leaves) if allow_product else None
    if product is not None:
        return product
    selection = _as_selection(point, top, constant, names, leaves, normalised)
    if isinstance(selection, Binding):
        return selection
    if allow_affine:
        affine = as_affine(point, top, constant, names, leaves, normalised, link, max_cells)
        if isinstance(affine, Binding):
            return affine
        return Binding("opaque", names, constant, reason=affine)
    return Binding("opaque", names, constant, reason=selection)


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
    names = {id(leaf): name for name, leaf in leaves.items()}
    found = {
        names.get(id(n.variable))  # type: ignore[attr-defined]
        for n in nodes_below(node)
        if is_leaf(n)
    }
    return tuple(name for name in leaves if name in found), None not in found


def _as_selection(
    point: Point,
    top: Tensor,
    constant: Tensor,
    names: Sequence[str],
    leaves: Mapping[str, Tensor],
    normalised: str,
) -> Binding | str:
    """A selection binding, or the reason why there is none."""
    point, top, how = below_normalisation(point, top, constant, normalised)
    edge, node, shape = point.edge, point.node, point.shape
    maps, has_factor, problem = _read_maps(node)
    if problem:
        return problem
    parts = []
    covered = torch.zeros(shape, dtype=torch.bool, device=constant.device)
    for name in names:
        leaf = leaves[name]
        if edge is leaf:
            index = torch.arange(leaf.numel(), device=leaf.device).reshape(leaf.shape)
            used = torch.ones_like(index, dtype=torch.bool)
        else:
            forward = forward_maps(edge, shape, leaf, constant)
            slope = forward(torch.ones((), dtype=constant.dtype, device=constant.device))
            used = slope != 0
            ratio = forward(None) / torch.where(used, slope, 1.0)
            index = torch.where(used, ratio.round(), -1).long()
            if not bool(torch.isfinite(slope).all()):
                return "its derivative is not finite at the present parameters"
        if bool((used & covered).any()):
            return "several parameters meet in one element"
        covered |= used
        parts.append(Selection(name, index.reshape(-1)[top], maps))
    checked = []
    for part in parts:
        used = part.index >= 0
        if has_factor:
            if how:
                return "a factor multiplies rows that are normalised"
            factor = torch.where(used, constant / part.forward(leaves[part.param].detach()), 1.0)
            if not bool((torch.isfinite(factor) & (factor > 0)).all()):
                return "its known factor is not positive"
            part = Selection(part.param, part.index, maps, factor)
        if maps and not how:
            selected = leaves[part.param].detach().reshape(-1)[part.index.clamp(min=0)]
            back = part.inverse(constant if part.factor is None else constant / part.factor)
            same = torch.isclose(back, selected, rtol=1e-3, atol=1e-5) | ~torch.isfinite(back)
            if not bool((same | ~used).all()):
                return "its elementwise map cannot be inverted at the present parameters"
        checked.append(part)
    binding = Binding("selection", tuple(names), constant, tuple(checked), normalise=how)
    if not is_right(binding, leaves):
        return "its elements are not those of the parameter"
    return binding


def _as_product(
    point: Point,
    top: Tensor,
    constant: Tensor,
    names: Sequence[str],
    leaves: Mapping[str, Tensor],
) -> Binding | None:
    """A selection of whole matrices A Aᵀ, or None; what is none may still be a plain selection."""
    node = through_views(point.node)
    if is_leaf(node) or base_name(node) not in ("Mm", "Bmm") or len(inputs_of(node)) != 2:
        return None
    factors = [getattr(node, f"_saved_{name}").detach() for name in ("self", "mat2")]
    A, D = factors[0], constant.shape[-1]
    if A.shape[-2:] != (D, D) or constant.shape[-2:] != (D, D):
        return None
    place = top
    if node is not point.node:
        forward = forward_maps(point.edge, point.shape, GradientEdge(node, 0), constant)
        place = forward(None).round().long().reshape(-1)[top]
    cells = place.reshape(-1, D, D)
    each = torch.arange(D * D, device=place.device).reshape(D, D)
    offset = cells - cells[:, :1, :1]
    if bool((cells[:, 0, 0] % (D * D) != 0).any()):
        return None
    if not bool((offset == each).all()) and not bool((offset == each.mT).all()):
        return None
    read = []
    for (parent, output), factor in zip(inputs_of(node), factors, strict=True):
        own = torch.arange(factor.numel(), device=factor.device).reshape(factor.shape)
        at = point_at(parent, output, tuple(factor.shape))
        read.append(_as_selection(at, own, factor, names, leaves, ""))
    left, right = read
    if not isinstance(left, Binding) or not isinstance(right, Binding):
        return None
    parts = []
    for a, b in zip(left.selections, right.selections, strict=True):
        alike = [m.name for m in a.maps] == [m.name for m in b.maps]
        alike = alike and a.factor is None and b.factor is None
        if not alike or not torch.equal(a.index, b.index.mT):
            return None
        matrices = a.index.reshape(-1, D * D)[cells[:, 0, 0] // (D * D)]
        parts.append(Selection(a.param, matrices.reshape(place.shape), (*a.maps, PRODUCT)))
    whole = torch.stack([part.index >= 0 for part in parts]).any(0)
    binding = Binding("selection", tuple(names), constant, tuple(parts))
    return binding if bool(whole.all()) and is_right(binding, leaves) else None


def is_right(selection: Binding, leaves: Mapping[str, Tensor]) -> bool:
    """Whether what a selection selects from the leaves is the argument that it holds as constant.

    To the bit, unless a map, a factor or a normalisation computes with it.
    """
    constant = selection.constant
    predicted = selection.evaluate({name: leaves[name].detach() for name in selection.params})
    if selection.normalise or any(s.maps or s.factor is not None for s in selection.selections):
        near = torch.isclose(predicted, constant, rtol=1e-5, atol=1e-7, equal_nan=True)
    else:
        near = predicted == constant
    return bool(near.all())


def _read_maps(node: Node) -> tuple[tuple[ElementwiseMap, ...], bool, str]:
    """Elementwise maps and a known factor between a node and its leaves.

    Returns:
        The maps (innermost first), whether there is a constant factor outside them, and a reason
        why the graph is no selection (empty when it is).
    """
    maps: list[ElementwiseMap] = []
    has_factor = False
    while not is_leaf(node):
        parents, base = inputs_of(node), base_name(node)
        if node.name() in VIEWS:
            if len(parents) > 1:
                break
        elif base in MAPS and len(parents) == 1:
            if base == "Softplus" and getattr(node, "_saved_beta", 1) != 1:
                return (), False, "softplus with a beta other than one"
            maps.append(MAPS[base])
        elif base == "Pow" and len(parents) == 1:
            exponent = float(getattr(node, "_saved_exponent", math.nan))
            if not math.isfinite(exponent) or exponent == 0:
                return (), False, "a power whose exponent is not a known number"
            maps.append(power_map(exponent))
        elif base in ("Mul", "Div") and len(parents) == 1 and not maps:
            # A division *by* the parameter shows the same node; the check below refuses it.
            if base == "Div" and node.next_functions[0][0] is None:
                return (), False, "a division by the parameter"
            has_factor = True
        else:
            return (), False, f"an operation that is no selection reaches it ({base.lower()})"
        node = parents[0][0]
    for n in nodes_below(node):
        if not is_leaf(n) and n.name() not in VIEWS:
            return (
                (),
                False,
                f"an operation that is no selection reaches it ({base_name(n).lower()})",
            )
    return tuple(reversed(maps)), has_factor, ""
