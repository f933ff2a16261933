"""Distributions of Pyro, noted where they are made: one note for all that a constructor asks of torch.

What a constructor of torch or Pyro does follows from its arguments, as what a function of torch does:
``Categorical(probs=p)`` is one note here, and five calls of torch in the constructor. What it makes is
known by that note, tensor for tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.distributions.distribution import COERCIONS
from torch import Tensor
from torch.distributions import Distribution

Construct = Callable[[type, tuple[Any, ...], Mapping[str, Any]], Any]

_NUMBERS = (float, int, bool, type(None))

# Classes with the constructors that were looked at, and whether these are a library's own.
_looked_at: dict[type, tuple[Any, bool]] = {}


def is_told_by_arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether what a distribution is made of says what its constructor does.

    Example:
        >>> import pyro.distributions as dist
        >>> is_told_by_arguments(dist.Normal, (0.0, 1.0), {})
        True
        >>> is_told_by_arguments(dist.Independent, (dist.Normal(0.0, 1.0), 0), {})
        False
    """
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor) and type(value) not in _NUMBERS:
            return False
    made_by = cls.__init__  # type: ignore[misc]
    known = _looked_at.get(cls)
    if known is None or known[0] is not made_by:
        known = _looked_at[cls] = made_by, _is_of_a_library(cls, made_by)
    return known[1]


def _is_of_a_library(cls: type, made_by: Any) -> bool:
    wheres = cls.__module__, getattr(made_by, "__module__", "")
    return cls.__new__ is object.__new__ and all(
        where.startswith(("torch.distributions.", "pyro.distributions.")) for where in wheres
    )


def tensors_made(fn: Any) -> list[Tensor]:
    """The tensors that a distribution holds, in the order in which it got them."""
    out: list[Tensor] = []
    for value in vars(fn).values():
        if isinstance(value, Tensor):
            out.append(value)
        elif isinstance(value, Distribution):
            out += tensors_made(value)
    return out


def begin_constructing(construct: Construct) -> None:
    """Let distributions of Pyro be made by a function, which may leave it to Pyro.

    Args:
        construct: Given the class and the arguments it returns a distribution, or None.
    """
    COERCIONS.append(construct)


def is_left_to(
    construct: Construct, cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a distribution may be made by a function at once.

    Its arguments have to say what its constructor does, and nobody may have asked for distributions
    after the function did, as ``poutine.collapse`` does.
    """
    return COERCIONS[-1] == construct and is_told_by_arguments(cls, args, kwargs)


def end_constructing(construct: Construct) -> None:
    """Let Pyro make them again."""
    if construct in COERCIONS:
        COERCIONS.remove(construct)
