"""Bindings that recur: the steps of a chain have one autograd graph each, all of one form.

A binding is determined by the nodes between an argument and the parameters, by what they saved
(indices, sizes, factors), by the parameters themselves and by the argument's value. Where all of
these are equal the binding that was read off before is the binding.

From run to run parameters and values differ. Where elements of parameters are looked up as they are,
the nodes and what they saved determine which: such a selection holds in a later run too, if what it
selects there is the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from pyro_em.graph.bindings.autograd import bind
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.selections import is_right
from pyro_em.graph.bindings.useful import SELECTIONS, Useful

# Nodes of which the Jacobian depends on nothing but what they show: saved fields and output shapes.
# Not Cat, for instance, which hides the sizes of inputs without a gradient.
_OPEN = frozenset(
    f"{name}Backward{i}"
    for name in (
        "Clone",
        "Div",
        "Exp",
        "Expand",
        "Index",
        "IndexSelect",
        "Log",
        "LogSoftmax",
        "Logsumexp",
        "Mul",
        "Permute",
        "Select",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Softplus",
        "Sqrt",
        "Squeeze",
        "Stack",
        "Sub",
        "Sum",
        "T",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    )
    for i in range(4)
)


_SMALL = 4096  # cells of a saved tensor that is compared

_MOST = 64  # selections that are kept from run to run


class KeptSelections:
    """Selections that earlier runs of a model showed, by the form of the graph that they are of."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Binding] = {}

    def keep(self, key: Hashable, binding: Binding) -> None:
        """Keep a selection that holds no number of its run."""
        parts = binding.selections
        if binding.how != "selection" or any(s.maps or s.factor is not None for s in parts):
            return
        if len(parts) > 1 or not parts[0].is_whole or parts[0].index.numel() > _SMALL:
            return
        while len(self.known) >= _MOST:
            del self.known[next(iter(self.known))]
        self.known[key] = replace(binding, constant=binding.constant.new_empty(0))

    def find(self, key: Hashable, constant: Tensor, leaves: Mapping[str, Tensor]) -> Binding | None:
        """The selection of a graph of a known form, if what it selects now is the argument."""
        kept = self.known.get(key)
        if kept is None:
            return None
        binding = replace(kept, constant=constant)
        return binding if is_right(binding, leaves) else None


class Recurring:
    """`bind` for many arguments of one run, each form of graph read once.

    Args:
        leaves: The leaf tensor of each parameter in the run.
        kept: What earlier runs of the same model showed.
    """

    def __init__(self, leaves: Mapping[str, Tensor], kept: KeptSelections | None = None) -> None:
        self.leaves, self.kept = leaves, kept
        self.names = {id(leaf): name for name, leaf in leaves.items()}
        self.known: dict[Hashable, tuple[Tensor, Binding]] = {}

    def bind(
        self,
        argument: Tensor,
        layout: Callable[[Tensor], Tensor],
        form: Hashable,
        useful: Useful = SELECTIONS,
        *,
        plates: int = 0,
        laid: Tensor | None = None,
    ) -> Binding:
        """As `pyro_em.graph.bindings.autograd.bind`.

        Args:
            argument: The value that a distribution holds.
            layout: Views that bring the argument into the compact layout.
            form: What determines ``layout``, next to the argument's own shape and strides.
            useful: As there.
            plates: As there.
            laid: The argument in the compact layout, where it is known.
        """
        graph = signature(argument, self.names)
        kind = (argument.dtype, argument.device, argument.shape, argument.stride())
        key = (graph, form, *kind, useful, plates)
        if graph is not None and key in self.known:
            same, binding = self.known[key]
            if _bits(same) == _bits(argument):
                return binding
        is_small = argument.numel() <= _SMALL
        if graph is not None and self.kept is not None:
            constant = layout(argument.detach()) if laid is None else laid.detach()
            before = self.kept.find(key, constant, self.leaves)
            if before is not None:
                if is_small:
                    self.known[key] = argument.detach(), before
                return before
        binding = bind(argument, self.leaves, useful, layout=layout, laid=laid, plates=plates)
        if graph is not None and is_small:
            self.known[key] = argument.detach(), binding
        if graph is not None and self.kept is not None:
            self.kept.keep(key, binding)  # of what a plate repeats one row alone
        return binding


def signature(tensor: Tensor, names: Mapping[int, str] | None = None) -> Hashable | None:
    """What determines a tensor's Jacobians; None where something that does is not shown.

    Args:
        tensor: Where the graph ends.
        names: Of leaves, by identity. Those without a name are told apart by identity: signatures of
            one run can be compared while it is alive.
    """
    if not tensor.requires_grad:
        return None
    number: dict[Node, int] = {}
    entries: list[Hashable] = []
    edge = get_gradient_edge(tensor)
    stack = [edge.node]
    number[edge.node] = 0
    while stack:
        node = stack.pop()
        name = node.name()
        if name.endswith("AccumulateGrad"):
            leaf = node.variable  # type: ignore[attr-defined]
            name = (names or {}).get(id(leaf), id(leaf))
            entries.append((number[node], name, leaf.shape))
            continue
        saved = _saved(node) if name in _OPEN else None
        if saved is None:
            return None
        children = []
        for child, output in node.next_functions:
            if child is None:
                children.append((-1, 0))
                continue
            if child not in number:
                number[child] = len(number)
                stack.append(child)
            children.append((number[child], output))
        outputs = tuple((tuple(m.shape), m.dtype) for m in node._input_metadata)  # type: ignore[attr-defined]
        entries.append((number[node], name, saved, outputs, tuple(children)))
    return (edge.output_nr, tuple(entries))


Outline: TypeAlias = tuple[Hashable, list[Tensor]]
"""What determines a tensor's Jacobians: a structure, and what nodes saved."""


def outlines(tensors: Sequence[Tensor]) -> list[Outline | None]:
    """What determines the Jacobians of some tensors (`outline`), each looked at once."""
    known: dict[int, Outline | None] = {}  # steps may share one distribution
    found = []
    for t in tensors:
        if id(t) not in known:
            known[id(t)] = outline(t, {})
        found.append(known[id(t)])
    return found


def outline(tensor: Tensor, seen: dict[Node, int]) -> Outline | None:
    """What determines a tensor's Jacobians, tensors that nodes saved apart.

    Two tensors of equal outline, of equal bits and with equal saved tensors have one and the same
    binding. What a node saved of inputs that the graph shows is left out.

    Args:
        tensor: A tensor that requires a gradient.
        seen: Empty; cleared for the next call.

    Returns:
        The structure, leaves by identity, and what was saved; None where something that matters is
        not shown.
    """
    root = tensor.grad_fn
    if root is None:
        root = get_gradient_edge(tensor).node
    seen[root] = 0
    stack = [root]
    entries: list[Hashable] = []
    constants: list[Tensor] = []
    derived: list[tuple[Node, str]] = []
    hides = False
    while stack:
        node = stack.pop()
        name = node.name()
        if name[-14:] == "AccumulateGrad":
            entries.append((seen[node], id(node.variable)))  # type: ignore[attr-defined]
            continue
        if name not in _OPEN:
            return None
        entry: list[Hashable] = [seen[node], name]
        following = node.next_functions
        for child, output in following:
            if child is None:
                entry.append(None)
                hides = hides or not name.startswith(_SHOWING)
                continue
            number = seen.get(child)
            if number is None:
                number = seen[child] = len(seen)
                stack.append(child)
            entry += (number, output)
        for field in _fields_of(node):
            place = _SAVED_INPUTS.get(field)
            if place is not None and (
                place < 0 or (place < len(following) and following[place][0] is not None)
            ):
                derived.append((node, field))
                continue
            value = getattr(node, field)
            kind = type(value)
            if kind is Tensor:
                constants.append(value)
            elif kind is tuple:
                for v in value:
                    if isinstance(v, Tensor):
                        constants.append(v)
                        entry.append(Tensor)
                    else:
                        entry.append(v)
            elif isinstance(value, Tensor):
                constants.append(value)
            else:
                entry.append(value)
        if name not in _SHAPED_BY_INPUTS:
            entry += _shapes(node)
        entries.append(tuple(entry))
    if hides:
        # A constant operand that no node saved: what was computed from it tells.
        values = [getattr(node, field) for node, field in derived]
        constants += [v for v in values if isinstance(v, Tensor)]
        entries += [s for node in seen if node.next_functions for s in _shapes(node)]
    for c in constants:
        if c.numel() > _SMALL:
            return None
        entries.append((c.shape, c.dtype))
    return (tensor.output_nr, tuple(entries)), constants


def _shapes(node: Node) -> list[Hashable]:
    """Shapes and dtypes of a node's outputs."""
    return [(tuple(m.shape), m.dtype) for m in node._input_metadata]  # type: ignore[attr-defined]


# Nodes whose output has a shape that follows from their inputs and from what they saved.
_SHAPED_BY_INPUTS = frozenset(
    {"DivBackward0", "ExpBackward0", "IndexBackward0", "LogBackward0", "MulBackward0"}
    | {"SumBackward1", "SigmoidBackward0", "SqrtBackward0", "LogsumexpBackward0"}
)


# What a node saves of its inputs, by the place of the input; -1 stands for its output.
_SAVED_INPUTS = {"_saved_self": 0, "_saved_other": 1, "_saved_result": -1}


# Nodes that save every constant operand that their Jacobian depends on.
_SHOWING = ("Mul", "Div", "Index")


_fields: dict[type, tuple[str, ...]] = {}


def _saved(node: Node) -> tuple[Hashable, ...] | None:
    """What a node saved, tensors by content; None where one is too large to compare."""
    out = tuple(_content(getattr(node, name)) for name in _fields_of(node))
    return None if any(c is _TOO_LARGE for c in out) else out


def _fields_of(node: Node) -> tuple[str, ...]:
    cls = type(node)
    if cls not in _fields:
        _fields[cls] = tuple(name for name in dir(cls) if name.startswith("_saved_"))
    return _fields[cls]


_TOO_LARGE = object()


def _content(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return _TOO_LARGE if value.numel() > _SMALL else _bits(value)
    if isinstance(value, (tuple, list)):
        parts = tuple(_content(v) for v in value)
        return _TOO_LARGE if any(p is _TOO_LARGE for p in parts) else parts
    return value


def _bits(tensor: Tensor) -> Hashable:
    value = tensor.detach().cpu()
    if value.dtype == torch.bfloat16:  # numpy has none; float32 holds each of its numbers
        value = value.float()
    return (tensor.shape, tensor.dtype, value.numpy().tobytes())
