"""Whether a tensor is linear in the values of latents, proven from its autograd graph.

A tensor a(h) = b + C h is linear in h if no operation between them is anything but a view, a sum, or
a product of which one side alone depends on h. What does not depend on h may be anything: exp(W) h is
linear in h. What leaves autograd (a comparison, ``detach``, ``.item()``) does not show in the graph,
and is seen as it happens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from pyro_em.graph.bindings.named_leaves import NamedLeaves

# Operations that are linear in all that they read.
_SUMS = re.compile(
    "Add|Alias|AsStrided|Cat|Clone|ConstantPadNd|Copy|Cumsum|DiagEmbed|Diagonal|Expand|Flip|Gather|"
    "Index|IndexAdd|IndexPut|IndexSelect|MaskedFill|Mean|MovedimIntList|Neg|Permute|Repeat|"
    "RepeatInterleave|ReshapeAlias|Roll|Rsub|Scatter|ScatterAdd|Select|Slice|Split|"
    "SplitWithSizes|Squeeze|Stack|Sub|Sum|T|Take|TakeAlongDim|ToCopy|Trace|Transpose|Tril|Triu|"
    "Unbind|Unfold|UnsafeView|Unsqueeze|View|Where"
)

# Products: linear if one side alone depends on latents.
_PRODUCTS = re.compile("Mul|Mm|Mv|Bmm|Dot|Ger|Linear")
_SUMS_OF_PRODUCTS = re.compile("Addmm|Addmv|Baddbmm|Addbmm|Addr|Addcmul")

# Functions whose results do not depend on the numbers that they are given, and those that leave torch.
_WITHOUT_NUMBERS = re.compile("(zeros|ones|empty|full|rand|randn)_like|new_[a-z_]+")
_NUMBERS = re.compile(
    "item|tolist|numpy|equal|allclose|is_nonzero|__(array|bool|complex|float|int|index)__"
)

# What autograd calls a write into a part of a tensor; what was written with does not show.
_IN_PLACE = "CopySlices"


@dataclass(frozen=True)
class Break:
    """An operation that is not linear in the leaves that reach it.

    Attributes:
        words: Why.
        alone: Leaves in which it is not linear, whatever the others are.
        factors: Of a product the other leaves of each factor: it is linear in those of one factor
            while those of the others have values.
    """

    words: str
    alone: frozenset[str]
    factors: tuple[frozenset[str], ...] = ()


def why_not_linear(tensor: Tensor, leaves: Mapping[str, Tensor], noun: str = "latents") -> str:
    """What makes a tensor no linear function of some leaves, in words; empty where it is one.

    Args:
        tensor: As a run computed it.
        leaves: The value of each latent in that run, or of each parameter.
        noun: What they are.
    """
    return next((b.words for b in breaks_of(tensor, leaves, noun)), "")


def breaks_of(
    tensor: Tensor, leaves: Mapping[str, Tensor], noun: str = "latents"
) -> Iterator[Break]:
    """All operations that make a tensor no linear function of some leaves.

    What is computed from such an operation is judged as if the leaves that are not linear there had
    values. Arguments are those of `why_not_linear`.
    """
    if tensor.grad_fn is None:
        return
    known = NamedLeaves.of(leaves)
    reach: dict[Node, frozenset[str]] = {}
    for node in parents_first(tensor.grad_fn):
        variable = getattr(node, "variable", None)
        if variable is not None:
            name = known.name_of(variable)
            reach[node] = frozenset() if name is None else frozenset([name])
            continue
        sides = [frozenset() if n is None else reach[n] for n, _ in node.next_functions]
        reach[node] = frozenset().union(*sides)
        if reach[node]:
            found = _break(node, sides, noun)
            if found is not None:
                reach[node] -= found.alone
                yield found


def _break(node: Node, sides: list[frozenset[str]], noun: str) -> Break | None:
    """Why one operation is not linear in the leaves that reach it; None where it is."""
    name, every = operation_of(node), frozenset().union(*sides)
    if _SUMS.fullmatch(name):
        return None
    if name == "Div" and not any(sides[1:]):
        return None
    plain = _PRODUCTS.fullmatch(name)
    if plain or _SUMS_OF_PRODUCTS.fullmatch(name):
        factors = [s for s in (sides if plain else sides[1:]) if s]
        if len(factors) < 2:
            return None
        twice = frozenset(n for n in every if sum(n in f for f in factors) > 1)
        latents = sorted(frozenset().union(*factors))
        if len(latents) > 1:
            words = f"a product of {noun} " + " and ".join(f"'{n}'" for n in latents)
        else:
            words = f"a product of '{latents[0]}' with itself"
        return Break(words, twice, tuple(f - twice for f in factors if f - twice))
    shown = " and ".join(f"'{n}'" for n in sorted(every))
    how = "written into a part of a tensor in place" if name == _IN_PLACE else name.lower()
    return Break(f"it is not linear in {shown} ({how})", every)


def operation_of(node: Node) -> str:
    """A node's operation, as autograd names it."""
    return node.name().split("::")[-1].split("Backward")[0]


def parents_first(top: Node) -> Iterator[Node]:
    """All nodes below one, each after those that it reads."""
    done: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(top, False)]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        stack.extend((n, False) for n, _ in node.next_functions if n is not None and n not in done)


class Breaks(TorchFunctionMode):
    """Note where the values of latents leave autograd, while a model runs.

    Args:
        leaves: The value of each latent.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._of = {id(leaf): frozenset([name]) for name, leaf in leaves.items()}
        self._alive: list[Tensor] = list(leaves.values())  # so that no identity is used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        # Of what gives its dtype alone no number is read.
        given = args[:1] if name == "type_as" else (args, kwargs)
        read = [self._of[id(t)] for t in _tensors(given) if id(t) in self._of]
        if read and _NUMBERS.fullmatch(name):
            self._note(frozenset().union(*read), name)
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        out = func(*args, **(kwargs or {}))
        if not read or _WITHOUT_NUMBERS.fullmatch(name):
            return out
        latents = frozenset().union(*read)
        if name == "broadcast_tensors":
            for before, after in zip(_tensors(args), _tensors(out), strict=True):
                self._follow(after, self._of.get(id(before), frozenset()))
            return out
        results = list(_tensors(out))
        followed = any(t.requires_grad for t in results)
        for t in results:
            if t.requires_grad:
                self._follow(t, latents)
            elif not followed or not t.is_floating_point():  # an order, a comparison, detach
                self._note(latents, name)
        return out

    def _follow(self, t: Tensor, latents: frozenset[str]) -> None:
        if latents:
            self._of[id(t)] = latents | self._of.get(id(t), frozenset())
            self._alive.append(t)

    def _note(self, latents: frozenset[str], name: str) -> None:
        for latent in latents:
            self.found.setdefault(latent, name.strip("_"))


def _tensors(parts: Any) -> Iterator[Tensor]:
    if isinstance(parts, torch.Tensor):
        yield parts
    elif isinstance(parts, (list, tuple)):
        for part in parts:
            yield from _tensors(part)
    elif isinstance(parts, dict):
        yield from _tensors(list(parts.values()))
