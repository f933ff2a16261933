"""Autograd graphs as they are read: nodes by name, maps that they are, derivatives between places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pyro_em.graph.bindings.binding import MAPS, ElementwiseMap, power_map
from pyro_em.tracing.without_sympy import pull_back

VIEWS = frozenset(
    f"{name}Backward{i}"
    for name in (
        "Alias",
        "AsStrided",
        "Cat",
        "Clone",
        "DiagEmbed",
        "Diagonal",
        "Expand",
        "Flip",
        "Gather",
        "Index",
        "IndexSelect",
        "MovedimIntList",
        "Permute",
        "Repeat",
        "RepeatInterleave",
        "ReshapeAlias",
        "Roll",
        "Select",
        "Slice",
        "Split",
        "Squeeze",
        "Stack",
        "T",
        "Take",
        "TakeAlongDim",
        "ToCopy",
        "Transpose",
        "Unbind",
        "UnsafeView",
        "Unsqueeze",
        "View",
    )
    for i in range(4)
)


LINEAR = frozenset(
    f"{name}Backward{i}"
    for name in (
        "Add",
        "Sub",
        "Rsub",
        "Neg",
        "Sum",
        "Mean",
        "Mul",
        "Div",
        "Mm",
        "Mv",
        "Bmm",
        "Dot",
        "Addmm",
        "Addmv",
        "Baddbmm",
        "ConstantPadNd",
        "Cumsum",
    )
    for i in range(4)
)


BILINEAR = ("Mul", "Div", "Mm", "Mv", "Bmm", "Dot", "Addmm", "Addmv", "Baddbmm")


@dataclass(frozen=True, eq=False)
class Point:
    """A place in an autograd graph: what is differentiated, its node, its shape."""

    edge: Tensor | GradientEdge
    node: Node
    shape: tuple[int, ...]


def below_expansion(point: Point) -> Point:
    """Step below Expand nodes: above them a derivative would have N × K × D × D cells."""
    while point.node.name() == "ExpandBackward0":
        shape = tuple(point.node._saved_self_sym_sizes)  # type: ignore[attr-defined]
        parent, output = point.node.next_functions[0]
        assert parent is not None
        point = point_at(parent, output, shape)
    return point


def point_at(node: Node, output: int, shape: tuple[int, ...]) -> Point:
    """The place of one output of a node."""
    if is_leaf(node):
        return Point(node.variable, node, shape)  # type: ignore[attr-defined]
    return Point(GradientEdge(node, output), node, shape)


def output_shape(node: Node, output: int = 0) -> tuple[int, ...]:
    """The shape of an output of a node."""
    if is_leaf(node):
        return tuple(node.variable.shape)  # type: ignore[attr-defined]
    return tuple(node._input_metadata[output].shape)  # type: ignore[attr-defined]


def base_name(node: Node) -> str:
    """A node's operation, as autograd names it."""
    return node.name().split("::")[-1].split("Backward")[0]


def is_leaf(node: Node) -> bool:
    """Whether a node is a leaf tensor."""
    return node.name().endswith("AccumulateGrad")


def inputs_of(node: Node) -> list[tuple[Node, int]]:
    """The nodes that a node reads, with the number of the output of each."""
    return [(n, i) for n, i in node.next_functions if n is not None]


def nodes_below(node: Node) -> list[Node]:
    """A node and all that it is computed from."""
    seen: dict[Node, None] = {}
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen[n] = None
            stack.extend(m for m, _ in inputs_of(n))
    return list(seen)


def variables_below(node: Node) -> list[Tensor]:
    """The leaf tensors from which a node is computed."""
    return [n.variable for n in nodes_below(node) if is_leaf(n)]  # type: ignore[attr-defined]


def normalisation(node: Node) -> tuple[Node, int] | None:
    """The input x of a node x / x.sum(−1) or x − x.logsumexp(−1), if it is one."""
    parents = inputs_of(node)
    if len(parents) != 2 or base_name(node) not in ("Div", "Sub"):
        return None
    (x, i), (total, _) = parents
    if base_name(total) not in ("Sum", "Logsumexp"):
        return None
    below = inputs_of(total)
    return (x, i) if len(below) == 1 and below[0] == (x, i) else None


def read_maps(node: Node) -> tuple[tuple[ElementwiseMap, ...], bool, str]:
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
        elif base in ("Mul", "Div") and len(parents) == 1 and all(m.is_power for m in maps):
            # A power of c θ is a power of θ times one of c.
            # A division *by* the parameter shows the same node; the check below refuses it.
            if base == "Div" and node.next_functions[0][0] is None:
                return (), False, "a division by the parameter"
            has_factor = True
        else:
            return (), False, f"an operation that is no selection reaches it ({base.lower()})"
        node = parents[0][0]
    other = next((n for n in nodes_below(node) if not is_leaf(n) and n.name() not in VIEWS), None)
    if other is not None:
        name = base_name(other).lower()
        return (), False, f"an operation that is no selection reaches it ({name})"
    return tuple(reversed(maps)), has_factor, ""


def forward_maps(
    output: Tensor | GradientEdge, shape: Sequence[int], source: Tensor | GradientEdge, like: Tensor
) -> Callable[[Tensor | None], Tensor]:
    """t ↦ J t for the map from ``source`` to ``output``; None stands for t = 0, 1, 2, …"""
    v = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device, requires_grad=True)
    g = pull_back(output, source, v, create_graph=True)
    assert g is not None

    def forward(t: Tensor | None) -> Tensor:
        if t is None:
            t = torch.arange(g.numel(), dtype=g.dtype, device=g.device)
        else:
            t = t.expand(g.shape)
        if not g.requires_grad:
            return torch.zeros_like(v)
        out = pull_back(g, v, t.reshape(g.shape), allow_unused=True)
        return torch.zeros_like(v) if out is None else out

    forward.source_shape = g.shape  # type: ignore[attr-defined]
    return forward


def slopes_and_places(
    output: Tensor | GradientEdge, shape: Sequence[int], source: Tensor | GradientEdge, like: Tensor
) -> tuple[Tensor, Tensor]:
    """J 1 and J t for t = 0, 1, 2, …, where J is the map from ``source`` to ``output``."""
    forward = forward_maps(output, shape, source, like)
    return forward(torch.ones((), dtype=like.dtype, device=like.device)), forward(None)


def through_views(node: Node) -> Node:
    """The first node below views of a single tensor that is no view itself."""
    while not is_leaf(node) and node.name() in VIEWS and len(inputs_of(node)) == 1:
        node = inputs_of(node)[0][0]
    return node


def moved_below(
    point: Point, node: Node, edge: tuple[Node, int], top: Tensor, like: Tensor
) -> tuple[Point, Tensor]:
    """The place of an input of a node with as many elements, reached from another through views.

    Args:
        point: Where one is.
        node: The node below its views.
        edge: The input of that node.
        top: Which element of ``point`` each cell of the argument is.
        like: For dtype and device.

    Returns:
        The input's place, and which of its elements each cell is.
    """
    shape = point.shape
    if node is not point.node:
        forward = forward_maps(point.edge, shape, GradientEdge(node, 0), like)
        top = forward(None).round().long().reshape(-1)[top]
        shape = forward.source_shape  # type: ignore[attr-defined]
    return point_at(*edge, tuple(shape)), top


def below_normalisation(
    point: Point, top: Tensor, constant: Tensor, normalised: str
) -> tuple[Point, Tensor, str]:
    """The rows as they were before a distribution normalised them.

    Args:
        point: Where the argument is.
        top: Which element of it each cell of the compact layout is.
        constant: The argument's value.
        normalised: How the distribution normalises its rows; empty where it does not.

    Returns:
        Their place, which element each cell is, and ``normalised`` where they were.
    """
    how = ""
    while normalised:
        walk = through_views(point.node)
        cut = normalisation(walk)
        if cut is None:
            break
        point, top = moved_below(point, walk, cut, top, constant)
        how = normalised
    return point, top, how
