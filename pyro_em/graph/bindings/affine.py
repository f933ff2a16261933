"""Arguments that are affine in parameters, or a link of a predictor that is: a = g(J θ + offset).

Every node between the predictor and the parameters is linear. What stands above it is the link that a
generalised linear model has, exp or the sigmoid or the softmax, or the normalisation that a
distribution makes of its rows. A known positive factor on exp(η) is an offset of η. Rows of logits
may all be shifted by a number, and are: only their differences are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pyro_em.graph.bindings.binding import LINKS, Binding
from pyro_em.graph.bindings.factored import factored, once
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.bindings.nodes import (
    BILINEAR,
    LINEAR,
    VIEWS,
    Point,
    base_name,
    below_normalisation,
    forward_maps,
    inputs_of,
    is_leaf,
    moved_below,
    nodes_below,
    through_views,
)
from pyro_em.graph.bindings.reached import Reached

_FEW = 2**18  # numbers of a Jacobian that is held as it stands

_NODES = {"exp": ("Exp",), "sigmoid": ("Sigmoid",), "softmax": ("Softmax",)}


def as_affine(reached: Reached, normalised: str, link: str) -> Binding | str:
    """An affine binding with its Jacobians, or the reason why there is none.

    Args:
        reached: The argument.
        normalised: How the distribution normalises its rows, if it does.
        link: What makes the argument of the predictor; empty where it is the predictor.
    """
    constant, names, leaves = reached.constant, reached.names, reached.leaves
    point, top, how = below_normalisation(reached.point, reached.top, constant, normalised)
    if link:
        below = _below_link(point, top, constant, link)
        if isinstance(below, str):
            return below
        point, top = below
    elif how == "logits":  # log_softmax shifts a row once more
        walk = through_views(point.node)
        if base_name(walk) == "LogSoftmax":
            point, top = moved_below(point, walk, inputs_of(walk)[0], top, constant)
            if not _is_of_rows(walk, point.shape, top):
                return "a softmax along another dimension reaches it"
    problem = _why_not_linear(point.node)
    if problem:
        return problem
    predictor = LINKS[link].inverse(constant)
    offset = predictor
    jacobians: dict[str, Jacobian] = {}
    for name in names:
        leaf, own = leaves[name], None
        cells = leaf.numel() * constant.numel()
        if cells > _FEW:
            own = factored(point, top, leaf, constant, reached.plates, reached.max_cells)
        if own is None and cells > reached.max_cells:
            return f"its Jacobian would have {cells:,} cells"
        jacobians[name] = own or _whole(point, top, leaf, constant)
        offset = offset - jacobians[name] @ leaf.detach().reshape(-1).to(jacobians[name].dtype)
    if not link and not how:
        offset = _without_noise(offset, predictor, jacobians, leaves)
        return Binding("affine", tuple(names), offset, jacobians=jacobians)
    found = _without_rounding(offset, predictor, link, bool(how) or link == "softmax")
    if isinstance(found, str):
        return found
    return Binding("affine", tuple(names), found, jacobians=jacobians, normalise=how, link=link)


def _without_noise(
    offset: Tensor,
    predictor: Tensor,
    jacobians: Mapping[str, Jacobian],
    leaves: Mapping[str, Tensor],
) -> Tensor:
    """An offset, zero where it is no larger than the rounding of the sum that was taken from it."""
    size = predictor.abs()
    for name, jacobian in jacobians.items():
        theta = leaves[name].detach().reshape(-1).to(jacobian.dtype).abs()
        size = size + replace(jacobian, value=jacobian.value.abs()) @ theta
    if bool((offset.abs() <= 64 * torch.finfo(offset.dtype).eps * size).all()):
        return offset.new_zeros(()).expand(offset.shape)
    return offset


def _whole(point: Point, top: Tensor, leaf: Tensor, like: Tensor) -> Jacobian:
    """The Jacobian as it stands, column by column."""
    forward = forward_maps(point.edge, point.shape, leaf, like)
    columns = []
    for j in range(leaf.numel()):
        unit = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        unit[j] = 1
        columns.append(once(forward(unit.reshape(leaf.shape)).reshape(-1)[top]))
    value = torch.stack(torch.broadcast_tensors(*columns), -1)
    return Jacobian.of(value.expand(*top.shape, leaf.numel()))


def _below_link(
    point: Point, top: Tensor, constant: Tensor, link: str
) -> tuple[Point, Tensor] | str:
    """The place of the predictor below its link, or why there is none."""
    walk = through_views(point.node)
    while link == "exp" and base_name(walk) in ("Mul", "Div") and len(inputs_of(walk)) == 1:
        if base_name(walk) == "Div" and walk.next_functions[0][0] is None:
            return "a division by a parameter reaches it"
        edge = inputs_of(walk)[0]
        below = edge[0]
        if is_leaf(below) or tuple(below._input_metadata[edge[1]].shape) != _shape(walk):  # type: ignore[attr-defined]
            return "a factor of another shape multiplies it"
        point, top = moved_below(point, walk, edge, top, constant)
        walk = through_views(point.node)
    if is_leaf(walk) or base_name(walk) not in _NODES[link]:
        name = "nothing" if is_leaf(walk) else base_name(walk).lower()
        return f"no {link} of a linear predictor makes it ({name})"
    point, top = moved_below(point, walk, inputs_of(walk)[0], top, constant)
    if link == "softmax" and not _is_of_rows(walk, point.shape, top):
        return "a softmax along another dimension reaches it"
    return point, top


def _is_of_rows(softmax: Node, shape: Sequence[int], top: Tensor) -> bool:
    """Whether a softmax is one along the rows of an argument.

    Args:
        softmax: Its node.
        shape: Of what it reads.
        top: Which element of that each cell of the argument is.
    """
    dim, size = int(softmax._saved_dim), shape[-1]  # type: ignore[attr-defined]
    dim -= 2**64 if dim >= 2**63 else 0
    whole = torch.arange(size, device=top.device)
    is_row = top.shape[-1] == size and bool((top - top[..., :1] == whole).all())
    return dim % len(shape) == len(shape) - 1 and is_row and not bool((top[..., 0] % size).any())


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)  # type: ignore[attr-defined]


def _without_rounding(offset: Tensor, predictor: Tensor, link: str, is_row: bool) -> Tensor | str:
    """An offset without what rounding left in it, or why it cannot be told from it.

    Args:
        offset: As the difference of two numbers.
        predictor: The predictor, as the link's inverse gives it.
        link: The link.
        is_row: Whether a row may be shifted: it is centred.
    """
    if not bool(torch.isfinite(offset).all()):
        return f"its {link or 'predictor'} is at an end of its range at the present parameters"
    if is_row:
        offset = offset - offset.mean(-1, keepdim=True)
    size = 1 + predictor.abs()
    if link == "sigmoid":
        size = size + predictor.abs().exp()
    noise = 64 * torch.finfo(offset.dtype).eps * size.amax(-1, keepdim=True)
    if bool((offset.abs() <= noise).all()):
        return offset.new_zeros(()).expand(offset.shape)
    # An offset that is known to fewer digits than the estimates would have is none.
    if float(noise.max()) > max(1e-9, 1e5 * torch.finfo(offset.dtype).eps):
        return f"its {link or 'predictor'} is near an end of its range at the present parameters"
    return offset


def _why_not_linear(top: Node) -> str:
    """What makes a predictor no linear function of parameters; empty where it is one."""
    for node in nodes_below(top):
        if is_leaf(node) or node.name() in VIEWS:
            continue
        base = base_name(node)
        if node.name() not in LINEAR:
            return f"an operation that is not linear reaches it ({base.lower()})"
        parents = inputs_of(node)
        if base == "Div" and (len(parents) > 1 or node.next_functions[0][0] is None):
            return "a division by a parameter reaches it"
        if base.startswith("Addm") or base == "Baddbmm":
            product = [n for n, _ in node.next_functions[1:] if n is not None]
            if len(product) > 1:
                return "a product of parameters reaches it"
        elif base in BILINEAR and len(parents) > 1:
            return "a product of parameters reaches it"
    return ""
