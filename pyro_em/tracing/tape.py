"""What a function of tensors does to those that it is given, noted once and done again at others.

    (θ) ↦ model run, densities        noted:   the operations through which θ reaches the densities

A model that is run at one parameter after another does the same each time to its data, its plates and
its latents; what differs is what the parameters reach. While the function runs, each operation on
tensors is noted; of these stay the ones between the parameters and the result. Where something else
decides what the function does, a number read from a tensor, a random draw, a write into a tensor that
is not made anew each time, there are no notes: the function has to run itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_READS = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__complex__"}
    | {"__array__", "__contains__", "equal", "allclose", "is_nonzero", "nonzero", "unique"}
    | {"__format__", "__repr__", "masked_select", "argwhere", "__iter__", "__reversed__"}
)  # what comes of them is a number, or a shape that depends on numbers

_DRAWS = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal"}
    | {"bernoulli", "multinomial", "poisson", "binomial", "dropout", "alpha_dropout", "rrelu"}
    | {"dropout2d", "dropout3d", "dropout1d", "feature_alpha_dropout", "gumbel_softmax"}
    | {"_standard_gamma", "_sample_dirichlet", "dropout_", "uniform_", "normal_", "exponential_"}
    | {"random_", "bernoulli_", "cauchy_", "geometric_", "log_normal_"}
)
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands among those that are computed anew."""

    number: int


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation between the parameters and the result.

    Attributes:
        function: What is called.
        given: Its arguments, a place for each tensor that is computed anew.
        form: How they are put together.
        results: The places of its results; None for one that is the same whatever the parameters are.
        attached: Whether gradients flow through it.
    """

    function: Callable[..., Any]
    given: tuple[Any, ...]
    form: Any
    results: tuple[int | None, ...]
    attached: bool


@dataclass(frozen=True, eq=False)
class Tape:
    """The operations through which parameters reach some tensors.

    Attributes:
        names: The parameters that are handed over, in order.
        held: Tensors that the function reads by itself: the parameters of modules.
        operations: In the order in which they were done.
        results: Per key the place of a result, or the result where no parameter reaches it.
        size: How many places there are.
        shapes: Of the results.
    """

    names: tuple[str, ...]
    held: tuple[Tensor, ...]
    operations: tuple[Operation, ...]
    results: Mapping[Any, Place | Tensor]
    size: int
    shapes: Mapping[Any, torch.Size]

    def __call__(self, values: Values) -> dict[Any, Tensor]:
        """The tensors at other parameters, attached to them.

        Args:
            values: Of the parameters that reach a result, at least.
        """
        at: list[Any] = [None] * self.size
        at[: len(self.names)] = [values.get(name) for name in self.names]
        at[len(self.names) : len(self.names) + len(self.held)] = self.held
        enabled = torch.is_grad_enabled()
        for op in self.operations:
            given = [at[g.number] if isinstance(g, Place) else g for g in op.given]
            args, kwargs = tree_unflatten(given, op.form)
            if op.attached or not enabled:
                out = op.function(*args, **kwargs)
            else:
                with torch.no_grad():
                    out = op.function(*args, **kwargs)
            found = [out] if isinstance(out, Tensor) else tree_flatten(out)[0]
            for place, result in zip(op.results, found, strict=True):
                if place is not None:
                    at[place] = result
        return {k: at[r.number] if isinstance(r, Place) else r for k, r in self.results.items()}

    def only(self, keys: Sequence[Any]) -> Tape:
        """The tape of some of its results.

        Args:
            keys: Theirs.
        """
        results = {key: self.results[key] for key in keys}
        kept = _needed_for(results.values(), self.operations)
        shapes = {key: self.shapes[key] for key in keys}
        return replace(self, operations=tuple(kept), results=results, shapes=shapes)

    def through_stacks(self) -> Tape:
        """The tape without stacks of which one element is taken: the others are not computed."""
        made = {r: op for op in self.operations for r in op.results if r is not None}
        at: dict[int, Any] = {}

        def place(g: Any) -> Any:
            return at.get(g.number, g) if isinstance(g, Place) else g

        operations = []
        for op in self.operations:
            stacked = _element_of_stack(op, made)
            if stacked is not None and op.results[0] is not None:
                at[op.results[0]] = place(stacked)
                continue
            operations.append(replace(op, given=tuple(place(g) for g in op.given)))
        results = {key: place(r) for key, r in self.results.items()}
        return replace(self, operations=tuple(operations), results=results)


def _element_of_stack(op: Operation, made: Mapping[int, Operation]) -> Any:
    """What an operation takes out of a stack along its first dimension, if it does that."""
    if op.function is not Tensor.__getitem__ or not isinstance(op.given[0], Place):
        return None
    stack, i = made.get(op.given[0].number), op.given[1]
    if stack is None or stack.function is not torch.stack or type(i) is not int:
        return None
    (parts, *rest), kwargs = tree_unflatten(list(stack.given), stack.form)
    return parts[i] if not any(rest) and not kwargs else None


def _needed_for(results: Iterable[Any], operations: Sequence[Operation]) -> list[Operation]:
    """The operations that lead to some results, in their order."""
    needed = {p.number for p in results if isinstance(p, Place)}
    kept = []
    for op in reversed(operations):
        if needed.isdisjoint(r for r in op.results if r is not None):
            continue
        kept.append(op)
        needed.update(g.number for g in op.given if isinstance(g, Place))
    return kept[::-1]


@dataclass(frozen=True)
class _Written:
    """An operation that writes into its first argument, which it returns."""

    function: Callable[..., Any]

    def __call__(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.function(target, *args, **kwargs)
        return target


class Recorder(TorchFunctionMode):
    """Notes what is done to some tensors inside a ``with`` block.

    Args:
        values: The parameters that the function is given.
        held: Tensors of which it is a function as well.

    Attributes:
        problem: Why the notes do not say what the function does; empty where they do.
    """

    def __init__(self, values: Values, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.problem = ""
        self.names, self.held = tuple(values), tuple(held)
        self.kept: list[Tensor] = [*values.values(), *held]
        self.places = {id(t): i for i, t in reversed([*enumerate(self.kept)])}
        self.operations: list[Operation] = []
        self.detached: set[int] = set()  # made where no gradients flow
        self.unknown: dict[
            int, Tensor
        ] = {}  # what no note says: drawn, written into, or made of such

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.problem:
            # The library's own looks at numbers decide how they are laid out, and not what they are.
            is_own = sys._getframe(1).f_globals.get("__name__", "").startswith("pyro_em.")
            self._note(func, args, kwargs, out, is_own)
        return out

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any, is_own: bool) -> None:
        name = getattr(func, "__name__", "")
        flat, form = tree_flatten((list(args), kwargs))
        given = [a for a in flat if isinstance(a, Tensor)]
        is_moved = any(id(a) in self.places for a in given)
        found = [out] if isinstance(out, Tensor) else tree_flatten(out)[0]
        tensors = [t for t in found if isinstance(t, Tensor)]
        writes = _is_write(name)
        if writes or kwargs.get("out") is not None:
            place = self.places.get(id(given[0]), -1) if given and writes else -1
            if place < len(self.names) + len(self.held):  # not one that is made anew each time
                if is_moved or name in _DRAWS or any(id(a) in self.unknown for a in given):
                    self._forget([*given, *tensors] if place >= 0 else [*given[:1], *tensors])
                return
            func, found = _Written(func), given[:1]
            tensors = found
        hidden = any(id(a) in self.unknown or self._is_unseen(a) for a in given)
        if name in _DRAWS or hidden:
            self._forget(tensors)
            return
        if not is_moved:
            return
        if name in _READS and not is_own:
            self.problem = f"it reads a number of a tensor ({name})"
        if not tensors:
            return
        places = tuple(
            Place(self.places[id(a)]) if isinstance(a, Tensor) and id(a) in self.places else a
            for a in flat
        )
        results: list[int | None] = []  # what is written into is known by another place from now on
        for t in found:
            results.append(len(self.kept) if isinstance(t, Tensor) else None)
            if isinstance(t, Tensor):
                self.places[id(t)] = len(self.kept)
                self.kept.append(t)  # the number of an object is its own while it lives
        attached = torch.is_grad_enabled()
        if not attached:
            self.detached.update(id(t) for t in tensors)
        self.operations.append(Operation(func, places, form, tuple(results), attached))

    def _is_unseen(self, t: Tensor) -> bool:
        """Whether gradients flow to a tensor through what was not noted: a function of one's own."""
        return t.grad_fn is not None and (id(t) not in self.places or id(t) in self.detached)

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            self.unknown[id(t)] = t
            self.places.pop(id(t), None)

    def tape(self, results: Mapping[Any, Tensor]) -> Tape | None:
        """What is done again to get some results; None where the notes do not say it."""
        if self.problem:
            return None
        out: dict[Any, Place | Tensor] = {}
        for key, t in results.items():
            place = self.places.get(id(t))
            if self._is_unseen(t):
                return None
            if place is None and (t.requires_grad or id(t) in self.unknown):
                return None
            out[key] = t.detach() if place is None else Place(place)
        kept = _needed_for(out.values(), self.operations)
        shapes = {key: t.shape for key, t in results.items()}
        return _compact(self, kept, out, shapes)


def _compact(
    recorder: Recorder,
    operations: list[Operation],
    results: dict[Any, Any],
    shapes: Mapping[Any, torch.Size],
) -> Tape:
    """A tape whose places are numbered without gaps."""
    first = len(recorder.names) + len(recorder.held)
    number = {i: i for i in range(first)}
    for op in operations:
        for r in op.results:
            if r is not None:
                number.setdefault(r, len(number))

    def at(g: Any) -> Any:
        return Place(number[g.number]) if isinstance(g, Place) else g

    done = tuple(
        Operation(
            op.function,
            tuple(at(g) for g in op.given),
            op.form,
            tuple(None if r is None else number[r] for r in op.results),
            op.attached,
        )
        for op in operations
    )
    found = {key: at(r) for key, r in results.items()}
    return Tape(recorder.names, recorder.held, done, found, len(number), shapes)


def _is_write(name: str) -> bool:
    """Whether an operation writes into one of its arguments."""
    if name in ("__setitem__", "__set__", "__delitem__"):
        return True
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__iter__", "__index__", "__int__")
    return name.endswith("_") and not name.endswith("__")
