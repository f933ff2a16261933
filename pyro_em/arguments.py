"""Arguments of public methods: what cannot be used is refused in a sentence, never a stack trace."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message


def whole(where: str, name: str, value: Any, least: int | None = 1) -> int:
    """A whole number, also one of numpy's or a tensor's.

    Raises:
        UsageError: If it is none, or below ``least``, where that is given.

    Example:
        >>> whole("fit", "max_steps", 3)
        3
    """
    try:
        number = None if isinstance(value, (bool, str)) else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None or (least is not None and number < least):
        above = "" if least is None else f", {least} or more"
        raise UsageError(
            message(
                where,
                f"{name}={shown(value)} is no number that it can take.",
                f"{name} is a whole number{above}",
                [f"pass {name}={max(least or 0, 10)}"],
            )
        )
    return number


def limit(where: str, name: str, value: Any) -> int:
    """A whole number of steps at most; infinity stands for no limit."""
    if isinstance(value, float) and value == math.inf:
        return sys.maxsize
    return whole(where, name, value, None)


def number(where: str, name: str, value: Any) -> float:
    """A real number, also one of numpy's or a tensor's; what it may be is the caller's.

    Raises:
        UsageError: If it is none.
    """
    try:
        real = None if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        real = None
    if real is None:
        raise UsageError(
            message(
                where,
                f"{name}={shown(value)} is no number that it can take.",
                f"{name} is a real number",
                [f"pass {name}=0.001"],
            )
        )
    return real


def a_level(where: str, value: Any) -> float:
    """The probability that an interval holds.

    Raises:
        UsageError: If it does not lie between zero and one.
    """
    level = number(where, "level", value)
    if not 0 < level < 1:
        raise UsageError(
            message(
                where,
                f"level={level:g} is not between zero and one.",
                "it is the probability that an interval holds",
                ["pass level=0.95"],
            )
        )
    return level


def seed_of(where: str, value: Any) -> int | None:
    """A seed for torch's generators, or None.

    Raises:
        UsageError: If it is no whole number of 64 bits.
    """
    if value is None:
        return None
    try:
        number = None if isinstance(value, (bool, str)) else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None or not -(2**63) <= number < 2**63:
        raise UsageError(
            message(
                where,
                f"seed={shown(value)} is no seed.",
                "random numbers are seeded with a whole number of at most 63 bits",
                ["pass seed=0", "leave it out for torch's global random state"],
            )
        )
    return number


def truth(where: str, name: str, value: Any) -> bool:
    """True or False.

    Raises:
        UsageError: If it is another value.
    """
    if not isinstance(value, bool):
        raise UsageError(
            message(where, f"{name}={shown(value)} is neither True nor False.", "it is a switch")
        )
    return value


def site_name(where: str, name: str, value: Any) -> str:
    """The name of a site.

    Raises:
        UsageError: If it is no string.
    """
    if not isinstance(value, str):
        raise UsageError(
            message(
                where,
                f"{name}={shown(value)} is no site's name.",
                "a latent is named as in the model's pyro.sample",
                [f"pass {name}='z'"],
            )
        )
    return value


def by_name(where: str, value: Any, what: str, fixes: list[str]) -> dict[str, Any]:
    """A mapping from names.

    Raises:
        UsageError: If it is none, or a key is no string.
    """
    keys = value if isinstance(value, Mapping) else [None]
    if not all(isinstance(k, str) for k in keys):
        raise UsageError(message(where, f"{shown(value)} is no {what}.", "", fixes))
    return dict(value)


def as_tensor(where: str, value: Any) -> Tensor:
    """Numbers as a tensor.

    Raises:
        UsageError: If they are none.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            message(
                where,
                f"{shown(value)} does not make a tensor of numbers.",
                str(error).split("\n")[0],
                ["pass a tensor, an array or nested lists of numbers"],
            )
        ) from error


def check_path(where: str, path: Any) -> None:
    """Refuse what is no path of a file.

    Raises:
        UsageError: If it is neither a string nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(
            message(
                where,
                f"{shown(path)} is no path of a file.",
                "",
                ["pass a string or a pathlib.Path: 'fitted.pt'"],
            )
        )


def shown(value: Any) -> str:
    """A value as a message shows it: short, and for large ones only the type."""
    if isinstance(value, Tensor) and value.numel() > 4:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    if len(text) > 60 or "\n" in text or text.startswith("<"):
        name = type(value).__name__
        return f"an object of type {name}"
    return text
