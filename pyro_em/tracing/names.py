"""What the names of a model stand for: its arguments, its closure, its globals, its attributes.

They are looked up anew, since they may come to stand for something else between two runs. Functions
that a model calls are looked into as the model is, objects by their attributes, containers entry by
entry.
"""

from __future__ import annotations

import dis
import functools
import operator
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEPTH = 3  # functions that call functions, containers that hold containers

_MANY = 256  # entries of a container


def tensors_within(values: Iterable[Any], depth: int = _DEPTH) -> list[Tensor]:
    """Tensors and arrays (as tensors) among some values and in the containers among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, np.ndarray):
            with suppress(TypeError, ValueError):  # of strings or objects, or negative strides
                found.append(torch.from_numpy(value))
        elif depth and isinstance(value, (list, tuple, dict)) and len(value) <= _MANY:
            parts = value.values() if isinstance(value, dict) else value
            found += tensors_within(parts, depth - 1)
    return found


def tensors_in(names: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors and arrays that names stand for; those deep in containers have no name."""
    data = {n: v for n, v in names.items() if isinstance(v, (Tensor, np.ndarray))}
    return [(name, tensor) for name, v in data.items() for tensor in tensors_within([v])]


def numbers_in(names: Mapping[str, Any]) -> dict[str, Any]:
    """The names that stand for a number, a text or nothing."""
    return {n: (type(v), v) for n, v in names.items() if isinstance(v, NUMBERS)}


def names_of(
    model: Any, args: tuple, kwargs: Mapping[str, Any], trail: Trail | None = None
) -> dict[str, Any]:
    """What a model's arguments, closure, globals and attributes stand for.

    Args:
        model: What is run.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        trail: Where it is noted where each value was found.
    """
    out: dict[str, Any] = {}
    seen: set[int] = set()
    trail = Trail() if trail is None else trail
    given = [*args, *kwargs.values()]
    out["argument:"] = len(given)
    for i, value in enumerate(given):
        _add(out, f"argument[{i}]", value, _DEPTH - 1, trail)
    objects = [a for a in given if not _may_be_watched(a) and _is_users(a)]
    for one in (model, *objects):
        for name, value in _held(one, _DEPTH, seen, trail):
            _add(out, name, value, _DEPTH, trail)
    return out


class Trail:
    """Where the values of a model's names were found: to see at once that nothing has changed.

    Attributes:
        is_whole: Whether all that was looked at is noted.
    """

    def __init__(self) -> None:
        self.is_whole = True
        self._of_dicts: list[tuple[Mapping[Any, Any], Any, Any]] = []
        self._of_lists: list[tuple[list[Any], list[Any]]] = []
        self._of_cells: list[tuple[types.CellType, Any]] = []
        self._sizes: list[tuple[Mapping[Any, Any], int]] = []
        self._functions: list[tuple[types.FunctionType, Any, Any, Any]] = []

    def note_dict(self, found: Mapping[Any, Any]) -> None:
        """All entries of a dict were looked at."""
        self._sizes.append((found, len(found)))
        self._of_dicts += [(found, key, value) for key, value in found.items()]

    def note_list(self, found: list[Any]) -> None:
        """All entries of a list were looked at."""
        self._of_lists.append((found, list(found)))

    def note_function(self, f: types.FunctionType, names: Iterable[str]) -> None:
        """The closure, the defaults and some globals of a function were looked at."""
        self._functions.append((f, f.__code__, f.__closure__, f.__defaults__))
        self._of_cells += [(cell, _content(cell)) for cell in f.__closure__ or ()]
        self._of_dicts += [(f.__globals__, n, f.__globals__[n]) for n in names]

    def is_unchanged(self) -> bool:
        """Whether every value is where it was; if not, what is there may be equal all the same."""
        return (
            self.is_whole
            and all(holder.get(key, self) is value for holder, key, value in self._of_dicts)
            and all(_content(cell) is value for cell, value in self._of_cells)
            and all(len(holder) == size for holder, size in self._sizes)
            and all(
                len(now) == len(then) and all(map(operator.is_, now, then))
                for now, then in self._of_lists
            )
            and all(
                f.__code__ is code and f.__closure__ is closure and f.__defaults__ is defaults
                for f, code, closure, defaults in self._functions
            )
        )


def _add(out: dict[str, Any], name: str, value: Any, depth: int, trail: Trail) -> None:
    """A value under a name, and what a container holds under names of their own."""
    if depth and isinstance(value, (list, tuple, dict)) and len(value) <= _MANY:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, dict):
            trail.note_dict(value)
        elif isinstance(value, list):
            trail.note_list(value)
        out[f"{name}:"] = len(value)
        for key, part in items:
            _add(out, f"{name}[{key!r}]", part, depth - 1, trail)
        return
    out[name] = value


def _held(one: Any, depth: int, seen: set[int], trail: Trail) -> Iterator[tuple[str, Any]]:
    """Names and values that a function reads, or that an object has."""
    if not depth or id(one) in seen:
        return
    seen.add(id(one))
    if isinstance(one, functools.partial):
        trail.is_whole = False
        yield "partial", [*one.args, *one.keywords.values()]
        yield from _held(one.func, depth, seen, trail)
    elif isinstance(one, types.MethodType):
        yield from _held(one.__func__, depth, seen, trail)
        yield from _held(one.__self__, depth, seen, trail)
    elif isinstance(one, types.FunctionType):
        yield from _of_function(one, depth, seen, trail)
    elif isinstance(one, torch.nn.Module):
        trail.is_whole = False
        for path, module in one.named_modules():
            for name, value in (*vars(module).items(), *module._buffers.items()):
                if not name.startswith("_") and _may_be_watched(value):
                    yield f"{path}.{name}", value
        yield from _held(getattr(type(one), "forward", None), depth, seen, trail)
    elif hasattr(one, "__dict__") and not isinstance(one, (type, types.ModuleType)):
        trail.note_dict(vars(one))
        for name, value in vars(one).items():
            if _may_be_watched(value):
                yield f"{type(one).__name__} {len(seen)}.{name}", value
            else:
                yield from _held(value, depth - 1, seen, trail)
        if callable(one):
            yield from _held(type(one).__call__, depth, seen, trail)


def _of_function(
    f: types.FunctionType, depth: int, seen: set[int], trail: Trail
) -> Iterator[tuple[str, Any]]:
    names = [n for n in _globals_of(f.__code__) if n in f.__globals__]
    trail.note_function(f, names)
    held = dict(zip(f.__code__.co_freevars, map(_content, f.__closure__ or ()), strict=True))
    held |= {n: f.__globals__[n] for n in names}
    for i, value in enumerate(f.__defaults__ or ()):
        held[f"default {i}"] = value
    for name, value in held.items():
        if _may_be_watched(value):
            yield f"{f.__qualname__}.{name}", value
        elif isinstance(value, types.FunctionType):
            if value.__module__ == f.__module__:
                yield from _held(value, depth - 1, seen, trail)
        elif isinstance(value, torch.nn.Module) or _is_users(value):
            yield from _held(value, depth - 1, seen, trail)


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of the globals that a function's code reads, functions inside it included."""
    names = {i.argval: None for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            names |= dict.fromkeys(_globals_of(part))
    return tuple(names)


def _is_users(value: Any) -> bool:
    """Whether an object is none of a library whose objects keep things for themselves."""
    return type(value).__module__.split(".")[0] not in _LIBRARIES


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


_LIBRARIES = ("torch", "pyro", "pyro_em", "numpy", "pandas", "logging", "tqdm", "matplotlib")

NUMBERS = (bool, int, float, complex, str, bytes, type(None))

_WATCHED = (*NUMBERS, Tensor, np.ndarray, np.generic, list, tuple, dict)


def _may_be_watched(value: Any) -> bool:
    """Numbers, data and containers; functions and modules are looked into instead."""
    return isinstance(value, _WATCHED)
