"""What a model's operations allocate: at most so much, or nothing where shapes alone are of use.

A plain run of a mixture looks up one covariance matrix per datum: N × D × D numbers, several times.
Only their shapes are of use. A *shadow* is a tensor without numbers (on torch's ``meta`` device);
whatever is computed from one is a shadow too, costs nothing, and refuses to be read as a number. Tables
that a model makes of its data, `x @ v.T`, can be shadows as well (`pyro_em.tracing.tables`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em.tracing.operations import Operation, is_view, watching
from pyro_em.tracing.shadow_shapes import shadow_from
from pyro_em.tracing.tables import Tables, as_shadows

_META = torch.device("meta")

_SMALL = 4096  # cells; what is smaller is not counted

_KEPT_BYTES = 2**26  # what a model makes of nothing and may keep has numbers up to this size


class Overspent(BaseException):
    """A run allocates more than it may. No `Exception`: a model that catches those lets it pass."""


class NumbersNeeded(Exception):
    """A run with shadows cannot go on, or what it showed cannot be judged, without numbers."""


def spending_at_most(limit: int, tables: Tables | None = None) -> TorchDispatchMode:
    """A block that raises `Overspent` when its operations have allocated ``limit`` bytes in all.

    What looks up or draws much is stopped before it does.

    Args:
        limit: In bytes.
        tables: Tables that stop it before they are made, too.
    """
    spent = 0

    def spend(n: int) -> None:
        nonlocal spent
        spent += n
        if spent > limit:
            raise Overspent

    def handle(func: Operation, args: tuple, kwargs: dict[str, Any]) -> Any:
        foresee = _FORESEEN.get(func)
        if foresee is not None:
            spend(foresee(*args, **kwargs))
            return func(*args, **kwargs)
        table = None if tables is None else tables.instead_of(func, args, kwargs)
        if table is not None:
            spend(table.numel() * table.element_size())
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.numel() >= _SMALL and not is_view(func):
                spend(t.untyped_storage().nbytes())
        return out

    return watching(handle)


def _of_index(source: Tensor, indices: Any) -> int:
    """Bytes that ``source[indices]`` takes. Boolean indices are counted as if all were True."""
    found = [i for i in indices if i is not None]
    if any(i.dtype in (torch.bool, torch.uint8) for i in found):
        return source.numel() * source.element_size()
    rows = math.prod(broadcast_shape(*(i.shape for i in found)))
    kept = [n for n, i in zip(source.shape, indices, strict=False) if i is None]
    kept += source.shape[len(indices) :]
    return rows * math.prod(kept) * source.element_size()


def _of_draw(probs: Tensor, *rest: Any, **how: Any) -> int:
    """Bytes that ``torch.multinomial`` takes: a number per probability, and one beside it."""
    return 2 * probs.numel() * probs.element_size()


_aten = torch.ops.aten


_FORESEEN: Mapping[Operation, Callable[..., int]] = {
    _aten.index.Tensor: _of_index,
    _aten.multinomial.default: _of_draw,
}


class Shadows:
    """The shadows of one run: ``with Shadows() as s:`` tensors and shadows may meet in the block.

    Args:
        device: Where the tensors are in whose place the shadows stand.
        tables: What is a table, which gets a shadow too; None where what is made of numbers has some.

    Attributes:
        device: As given, or as found.
        has_tables: Whether a table got one.

    Raises:
        NumbersNeeded: If the block fails in any way: it might not with numbers.
    """

    def __init__(self, device: torch.device | None = None, tables: Tables | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.has_tables = False
        self._tables = tables
        self._makes_one = False

    def __enter__(self) -> Shadows:
        self._mode = watching(self._handle)
        self._mode.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._mode.__exit__(kind, error, traceback)
        if isinstance(error, Exception):
            raise NumbersNeeded from error

    def instead_of(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A shadow of some shape, in place of a tensor like another one."""
        if not like.is_meta:
            self.device = like.device
        self._makes_one = True
        try:
            return torch.empty(tuple(shape), dtype=like.dtype, device=_META)
        finally:
            self._makes_one = False

    def let_go(self) -> None:
        """The run is over: a table that its model has kept gets numbers."""
        if self._tables is not None:
            self._tables.give_numbers()

    def _handle(self, func: Operation, args: tuple, kwargs: dict[str, Any]) -> Any:
        if _holds_shadow(args) or (kwargs and _holds_shadow(kwargs.values())):
            out = _shadowed(func, args, kwargs, self._tables)
            if self.has_tables and self._tables is not None:
                self._tables.note(out, func, args, kwargs)
            return out
        if self._tables is not None:
            table = self._tables.instead_of(func, args, kwargs)
            if table is not None:
                self.has_tables = True
                self._tables.note(table, func, args, kwargs)
                return table
        if kwargs.get("device") != _META or self._makes_one:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)  # made on the device of a shadow, from nothing
        if isinstance(out, Tensor) and out.numel() * out.element_size() <= _KEPT_BYTES:
            return func(*args, **{**kwargs, "device": self.device})  # a model may keep it
        return out


@contextmanager
def judging_shadows() -> Iterator[None]:
    """A block that looks at shadows; reading one as a number raises `NumbersNeeded`."""
    try:
        yield
    except (RuntimeError, TypeError) as error:  # what torch raises on the meta device
        raise NumbersNeeded from error


def _shadowed(func: Operation, args: tuple, kwargs: dict[str, Any], tables: Tables | None) -> Any:
    for i, name in _written(func):
        value = args[i] if i < len(args) else kwargs.get(name)
        if not isinstance(value, Tensor):
            continue
        if not value.is_meta or (tables is not None and tables.has(value)):
            raise NumbersNeeded  # numbers that the model holds would be wrong afterwards
    args, kwargs = as_shadows(args, kwargs)
    if kwargs.get("device") is not None:
        kwargs["device"] = _META
    out = shadow_from(func, args, kwargs)
    out = func(*args, **kwargs) if out is None else out
    if isinstance(out, (bool, int, float)):
        raise NumbersNeeded
    return out


def _holds_shadow(values: Iterable[Any]) -> bool:
    for a in values:
        if isinstance(a, Tensor):
            if a.is_meta:
                return True
        elif isinstance(a, (list, tuple)) and _holds_shadow(a):
            return True
    return False


_writes: dict[Operation, tuple[tuple[int, str], ...]] = {}


def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operation writes."""
    if func not in _writes:
        _writes[func] = tuple(
            (i, a.name)
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        )
    return _writes[func]


def is_shadow(value: Any) -> bool:
    """Whether something is a tensor without numbers."""
    return isinstance(value, Tensor) and value.is_meta
