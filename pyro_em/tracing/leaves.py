"""The leaves of a call's arguments: tensors, arrays, numbers, lists; their places and names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from pyro_em.tracing.sites import signature_of

Path: TypeAlias = tuple[Any, ...]
"""The number or the name of an argument, then keys of the containers in it."""

_DEPTH = 3  # containers that hold containers

_MANY = 4096  # entries of a container


def leaves_of(args: tuple, kwargs: Mapping[str, Any]) -> dict[Path, Any]:
    """Tensors, arrays, whole numbers and lists among arguments and in their containers, by place.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> list(leaves_of((3, {"x": [1, 2]}), {"flag": True}))
        [(0,), (1, 'x'), (1, 'x', 0), (1, 'x', 1)]
    """
    return dict(_below((*enumerate(args), *kwargs.items()), (), _DEPTH))


def _below(items: Any, path: Path, depth: int) -> Iterator[tuple[Path, Any]]:
    for key, value in items:
        at = (*path, key)
        if isinstance(value, (Tensor, np.ndarray)) or _is_whole(value):
            yield at, value
        elif depth and isinstance(value, Mapping) and len(value) <= _MANY:
            yield from _below(value.items(), at, depth - 1)
        elif depth and isinstance(value, (tuple, list)) and len(value) <= _MANY:
            yield at, value
            yield from _below(enumerate(value), at, depth - 1)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def name_of(model: Callable[..., Any], path: Path) -> str:
    """The name of a leaf as its user writes it.

    Args:
        model: The model, for the names of positional arguments.
        path: The leaf's place.

    Example:
        >>> name_of(lambda x, y: None, (1, "a", 0))
        "y['a'][0]"
    """
    first, *keys = path
    names = [p.name for p in signature_of(model) if p.kind is not p.VAR_POSITIONAL]
    if not isinstance(first, str):
        first = names[first] if first < len(names) else f"argument {first}"
    return first + "".join(f"[{key!r}]" for key in keys)


def replaced(
    args: tuple, kwargs: Mapping[str, Any], values: Mapping[Path, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The same arguments with other values of some leaves; containers on the way are new ones.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        values: Values by place.

    Example:
        >>> replaced((1, {"x": 2}), {}, {(1, "x"): 3})
        ((1, {'x': 3}), {})
    """
    on_the_way = {path[:i] for path in values for i in range(1, len(path))}

    def of(path: Path, value: Any) -> Any:
        if path in values:
            return values[path]
        if path not in on_the_way:
            return value
        if isinstance(value, Mapping):
            return {key: of((*path, key), item) for key, item in value.items()}
        items = [of((*path, i), item) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    return (
        tuple(of((i,), value) for i, value in enumerate(args)),
        {name: of((name,), value) for name, value in kwargs.items()},
    )
