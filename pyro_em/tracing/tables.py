"""Tables that a model makes of its data alone, foreseen before they are made.

`x @ v.T` has a number for each row and each value of a latent, and so have its logits once they are
normalised: of a million rows and sixteen values each is 122 MiB. A look at what a model is made of
needs their shapes only. Sums over rows and numbers of single rows are no tables: they are computed, so
that a model may decide by them as it does.

A model may keep what it has computed, in an attribute or a list. So it is noted how each of these
shadows is computed, and one that outlives its run gets its numbers then.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.tracing.shadow_shapes import shadow_from

_MANY_ROWS = 2**16  # of data from which on tables are looked for

_LEAST = 2**22  # bytes of a table

_OF_ROW = 16  # bytes of a row: with fewer a result is a number of each row


@dataclass(frozen=True, eq=False)
class _Note:
    """How a shadow is computed.

    Attributes:
        func: The operation that makes it.
        args: Positional arguments, with notes in place of shadows, which it does not keep alive.
        kwargs: Keyword arguments, likewise.
        versions: How often tensors among these had been written to.
    """

    func: Any
    args: tuple
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]

    def numbers(self) -> Any:
        """What the operation makes of numbers.

        Raises:
            _Unknown: If that cannot be computed any more.
        """
        if _versions(self.args, self.kwargs) != self.versions:
            raise _Unknown
        args = [_numbers(a) for a in self.args]
        return self.func(*args, **{k: _numbers(a) for k, a in self.kwargs.items()})


def _numbers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_numbers(v) for v in value]
    if value is _OF_LATENTS:
        raise _Unknown
    return value.numbers() if isinstance(value, _Note) else value


_OF_LATENTS = object()


class _Unknown(Exception):
    """A shadow has no numbers."""


class Tables:
    """What is a table beside some data, and the shadows in place of such tables.

    Args:
        limit: Bytes from which on a result is one.
        met: Called with the first of them.
    """

    def __init__(self, limit: int, met: Callable[[], None]) -> None:
        self.limit, self.met = limit, met
        self._notes: dict[int, tuple[weakref.ref[Tensor], _Note]] = {}

    @classmethod
    def beside(cls, given: Iterable[Any], met: Callable[[], None]) -> Tables | None:
        """Tables beside a model's arguments; None where these have few rows.

        Args:
            given: The arguments.
            met: Called when one is met.
        """
        rows = max((len(a) for a in given if isinstance(a, Tensor) and a.dim()), default=0)
        return None if rows < _MANY_ROWS else cls(max(_LEAST, _OF_ROW * rows + 1), met)

    def instead_of(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """A shadow of what an operation would make of numbers, if that is a table.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if not self._may_be_one(args, kwargs):
            return None
        out = shadow_from(func, *as_shadows(args, kwargs))
        if not isinstance(out, Tensor) or out.numel() * out.element_size() < self.limit:
            return None
        return out

    def has(self, shadow: Tensor) -> bool:
        """Whether it is known how a shadow is computed."""
        known = self._notes.get(id(shadow))
        return known is not None and known[0]() is shadow

    def note(self, out: Any, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note how a shadow is computed, as long as it is there.

        Args:
            out: What an operation returned.
            func: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if not isinstance(out, Tensor) or self.has(out):
            return
        if not self._notes:
            self.met()
        own, notes = id(out), self._notes

        def forget(gone: weakref.ref[Tensor]) -> None:
            if own in notes and notes[own][0] is gone:
                del notes[own]

        noted = tuple(map(self._noted, args)), {k: self._noted(a) for k, a in kwargs.items()}
        notes.pop(own, None)
        notes[own] = weakref.ref(out, forget), _Note(func, *noted, _versions(*noted))

    def _noted(self, value: Any) -> Any:
        """A value with notes in place of shadows."""
        if isinstance(value, (list, tuple)):
            return [self._noted(v) for v in value]
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        return self._notes[id(value)][1] if self.has(value) else _OF_LATENTS

    def give_numbers(self) -> None:
        """Give those shadows their numbers that are still there: the run that made them is over.

        What was made of a latent has none, and what cannot be computed any more stays without.
        """
        if self._notes:
            gc.collect()  # distributions that refer to themselves are there until then
        while self._notes:
            place, note = self._notes.popitem()[1]
            shadow = place()
            del place  # what has weak references is not exchanged
            if shadow is not None:
                with suppress(_Unknown, RuntimeError), torch.set_grad_enabled(shadow.requires_grad):
                    torch.utils.swap_tensors(shadow, note.numbers())

    def _may_be_one(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Whether what is given suffices for a table; most operations are told by this alone."""
        cells, has_tensors = 1, False
        for a in (*args, *kwargs.values()):
            for t in a if isinstance(a, (list, tuple)) else (a,):
                if isinstance(t, Tensor):
                    cells, has_tensors = cells * max(1, t.numel()), True
        if not has_tensors:
            sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
            cells = math.prod(n for n in sizes if isinstance(n, int))
        return 16 * cells >= self.limit


def _versions(args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    found = []
    for a in (*args, *kwargs.values()):
        parts = a if isinstance(a, (list, tuple)) else (a,)
        found += [t._version for t in parts if isinstance(t, Tensor) and not t.is_inference()]
    return tuple(found)


def as_shadows(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """An operation's arguments with shadows in place of tensors."""
    return tuple(map(_as_shadow, args)), {k: _as_shadow(a) for k, a in kwargs.items()}


def _as_shadow(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _shadow_of(value)
    if isinstance(value, (list, tuple)):
        return [_as_shadow(v) for v in value]
    return value


def _shadow_of(t: Tensor) -> Tensor:
    """A shadow with the layout of a tensor."""
    if t.is_meta:
        return t
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")
