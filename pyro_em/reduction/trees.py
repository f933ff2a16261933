"""Values made of tensors and numbers, seen as the list of what can be added in them.

A tree is a tensor, a number, None, or a mapping, sequence or dataclass of trees. What is no sum of
parts (a name, a shape, where sums were taken) is a field with the metadata `SAME`, and is the first
part's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Of a dataclass field: every part has the same, so that it is not added.
SAME: Mapping[str, bool] = {"same in all parts": True}


def mapped(tree: T, change: Callable[[Any], Any]) -> T:
    """The same tree with each tensor and number changed, in the order in which `leaves` lists them.

    Args:
        tree: The tree.
        change: From a leaf to another one.

    Example:
        >>> mapped({"a": (1.0, 2.0), "b": None}, lambda x: 10 * x)
        {'a': (10.0, 20.0), 'b': None}
    """
    out: Any
    value: Any = tree
    if value is None or isinstance(value, str):
        out = value
    elif isinstance(value, (Tensor, bool, int, float)):
        out = change(value)
    elif isinstance(value, Mapping):
        out = {key: mapped(item, change) for key, item in value.items()}
    elif isinstance(value, (tuple, list)):
        out = type(value)(mapped(item, change) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        added = [f.name for f in dataclasses.fields(value) if f.init and f.metadata != SAME]
        changed = {name: mapped(getattr(value, name), change) for name in added}
        out = dataclasses.replace(value, **changed)
    else:
        raise TypeError(f"{type(value).__name__} is no sum of parts")
    return out  # type: ignore[no-any-return]


def leaves(tree: Any) -> list[Any]:
    """The tensors and numbers of a tree, one after the other.

    Example:
        >>> leaves({"a": (1.0, 2.0), "b": None})
        [1.0, 2.0]
    """
    out: list[Any] = []

    def note(leaf: Any) -> Any:
        out.append(leaf)
        return leaf

    mapped(tree, note)
    return out


def combined(a: T, b: T, both: Callable[[Any, Any], Any]) -> T:
    """Two trees of one form, leaf by leaf.

    Example:
        >>> combined({"a": 1.0}, {"a": 2.0}, lambda x, y: x + y)
        {'a': 3.0}
    """
    others = iter(leaves(b))
    return mapped(a, lambda leaf: both(leaf, next(others)))


def added(a: T, b: T) -> T:
    """The sum of two trees of one form."""
    return combined(a, b, lambda x, y: x + y)


def larger(a: T, b: T) -> T:
    """The larger of each two leaves."""
    return combined(a, b, _larger)


def _larger(x: Any, y: Any) -> Any:
    return torch.maximum(x, y) if isinstance(x, Tensor) else max(x, y)
