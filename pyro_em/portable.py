"""Copies of results that another process can read: numbers travel, links to the model do not.

A result holds what belongs to its process: the user's functions, the model with its data, Pyro's
weak references. In a pickled copy each of these is an `Absent`, which says so when it is asked for
anything. A deep copy stays in the process, and shares them with the original.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_em.errors import PyroEMError, UsageError, message

_PLAIN = (type(None), bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)

_LIBRARIES = frozenset({"pyro_em", "pyro", "torch", "numpy"}) | sys.stdlib_module_names

_FUNCTIONS = (types.FunctionType, types.MethodType)


class Absent:
    """What a pickled copy left behind.

    Args:
        what: In words, for instance ``"its model"``.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        return f"<{self.what}: not in a pickled copy>"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what is not there."""
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # questions of Python's own
        self._refuse()

    def __reduce__(self) -> tuple[Any, ...]:
        return Absent, (self.what,)

    def _refuse(self) -> NoReturn:
        raise UsageError(
            message(
                "a pickled copy",
                f"this needs {self.what}, which the copy does not have.",
                "functions and models belong to the process in which they were made",
                [
                    "ask the original, in the process that fitted, and send the answer",
                    "send the parameters, and call ExactPosteriorEM here: em.save and em.load",
                ],
            )
        )


class StaysHere:
    """Base class of what never leaves its process: in a pickled copy an `Absent` replaces it."""

    stands_for = "its model"


class Portable:
    """Base class of values that always pickle and deep-copy, whatever they hold."""

    def _travelling(self) -> dict[str, Any]:
        """The attributes of a pickled copy; by default all of them."""
        return dict(vars(self))

    def _staying(self) -> dict[str, Any]:
        """The attributes of a deep copy; by default all of them."""
        return dict(vars(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (type(self), _packed(self._travelling(), None))

    def __copy__(self) -> Any:
        return _filled(type(self), vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        shared: list[Any] = []
        content = _packed(self._staying(), shared)
        copied = memo[id(self)] = _from_bytes(type(self), content, shared)
        return copied


def _from_bytes(cls: type, content: bytes, shared: list[Any] | None = None) -> Any:
    reader = _Reader(io.BytesIO(content))
    reader.shared = shared or []
    return _filled(cls, reader.load())


def _filled(cls: type, attributes: Mapping[str, Any]) -> Any:
    out: Any = object.__new__(cls)
    vars(out).update(attributes)
    return out


def _packed(attributes: dict[str, Any], shared: list[Any] | None) -> bytes:
    content = io.BytesIO()
    writer = _Writer(content, protocol=pickle.HIGHEST_PROTOCOL)
    writer.shared = shared
    writer.dump(attributes)
    return content.getvalue()


class _Writer(pickle.Pickler):
    """A pickler that leaves out what belongs to the process, or shares it where there is a list."""

    shared: list[Any] | None

    def persistent_id(self, value: Any) -> int | None:
        if self.shared is None or type(value) in _PLAIN or not _left_out(value):
            return None
        self.shared.append(value)
        return len(self.shared) - 1

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _plain(value).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if isinstance(value, Portable):  # tensors that it shares with others are written once
            attributes = value._travelling() if self.shared is None else value._staying()
            return _filled, (type(value), attributes)
        left_out = _left_out(value)
        if left_out:
            return Absent, (left_out,)
        if isinstance(value, Constraint):
            return _name_of(value) or NotImplemented
        return NotImplemented


class _Reader(pickle.Unpickler):
    shared: list[Any]

    def persistent_load(self, number: int) -> Any:
        return self.shared[number]


def _plain(tensor: Tensor) -> Tensor:
    """A tensor without a graph, without attributes, and without the rest of a larger memory."""
    out = tensor.detach()
    if out.layout is not torch.strided or out.is_meta:
        return out
    larger = out.untyped_storage().nbytes() > out.numel() * out.element_size()
    return out.clone() if larger else out


def _left_out(value: Any) -> str:
    """What a value stands for, in words, if it does not leave the process; empty if it does."""
    if isinstance(value, StaysHere):
        return value.stands_for
    if isinstance(value, (Tensor, Portable, Constraint)) and not isinstance(value, torch.nn.Module):
        return "" if _is_of_libraries(type(value)) else _words(value)
    if isinstance(value, (type, *_FUNCTIONS)):
        return "" if _is_of_libraries(value) and _is_importable(value) else _words(value)
    if not _is_of_libraries(type(value)):
        return _words(value)
    try:
        reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    except Exception:  # whatever an object says that cannot be pickled
        return _words(value)
    # A cached function goes by the name of what it wraps.
    named = isinstance(reduced, str) and callable(value)
    return _words(value) if named and not _is_importable(value) else ""


def require_picklable(whose: str, parts: Mapping[str, Any]) -> None:
    """Refuse by name what a user gave and Python cannot pickle.

    Args:
        whose: The object that holds the parts.
        parts: By the names of its arguments.

    Raises:
        UsageError: Naming the first part that does not pickle.
    """
    for name, part in parts.items():
        try:
            pickle.dumps(part)
        except UsageError:
            raise
        except Exception as error:  # whatever an object says that cannot be pickled
            raise UsageError(
                message(
                    f"pickling {whose}",
                    f"its {name} {_words(part)} does not pickle: {error}.",
                    "Python pickles functions and classes by name: lambdas and functions inside "
                    "functions have none that another process could look up",
                    [
                        f"define the {name} at the top level of a module (functools.partial gives "
                        "it arguments)",
                        f"let the other process make the {whose}, and send it the data only",
                    ],
                )
            ) from error


def deep_copied(whose: str, parts: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Copies of what a user gave.

    Raises:
        UsageError: If a part has no copies.
    """
    try:
        return copy.deepcopy(parts, memo)
    except (TypeError, RuntimeError) as error:
        raise UsageError(
            message(
                whose,
                f"it cannot be copied: {error}.",
                "something that the model, the guide or the optimiser holds has no copies",
                [f"make a new one: {whose}(model, ...)"],
            )
        ) from error


def _words(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or f"an object of {type(value).__qualname__}"
    return f"'{name}'"


def _is_of_libraries(value: Any) -> bool:
    """Whether a class or function is one that every process has."""
    module = getattr(value, "__module__", None) or "builtins"
    return module.partition(".")[0] in _LIBRARIES and module != "__main__"


def _is_importable(value: Any) -> bool:
    """Whether a class or function is found under its name."""
    if isinstance(value, types.MethodType):
        return False
    value_there: Any = importlib.import_module(value.__module__)
    for part in value.__qualname__.split("."):
        value_there = getattr(value_there, part, None)
    return value_there is value


def _name_of(constraint: Constraint) -> str:
    """The name under which a module holds this very constraint, which is compared by identity."""
    members = vars(importlib.import_module(type(constraint).__module__))
    return next((n for n, v in members.items() if v is constraint and not n.startswith("_")), "")


class Given:
    """A function of nothing whose answer is known.

    Args:
        answer: What it returns.
    """

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self) -> Any:
        """The answer."""
        return self.answer


class Copied:
    """A function of nothing that gives a deep copy of what another one gives.

    Args:
        function: The other one.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __call__(self) -> Any:
        """The answer, computed when it is first asked for."""
        if not hasattr(self, "answer"):
            self.answer = copy.deepcopy(self.function())
        return self.answer


class Refused:
    """A function of nothing that says why there is no answer.

    Args:
        text: The message of the `UsageError`.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self) -> NoReturn:
        """Say why there is no answer."""
        raise UsageError(self.text)


def answered(function: Callable[[], Any]) -> Given | Refused:
    """What a function of nothing answers now, for a copy that could not ask it any more."""
    try:
        return Given(function())
    except PyroEMError as error:
        return Refused(str(error))
