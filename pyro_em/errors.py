"""The exceptions, the warning and the one builder of their messages.

Every message says where, what, why, and which fixes to try, in that order, so that a reader of a
traceback needs nothing else. Several problems of one model are collected into one exception.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import pyro
import torch


class PyroEMError(Exception):
    """Base class of everything that this library raises on purpose.

    Attributes:
        problems: The findings behind the message, where there are several or they are collected.
        names_rows: Whether it says which row it is among all rows.
    """

    problems: tuple[Finding, ...] = ()
    names_rows: bool = False


class ModelError(PyroEMError, ValueError):
    """The model cannot be treated exactly as it is written."""


class DataError(PyroEMError, ValueError):
    """The data do not fit the model: missing, infinite, of a wrong shape, impossible."""


class UsageError(PyroEMError, ValueError):
    """A call whose arguments contradict each other or the model."""


class FileError(UsageError, OSError):
    """A file that cannot be written or read."""


class UnknownNameError(UsageError, KeyError):
    """A name, or a glob of names, that means nothing here; a ``KeyError`` as a mapping raises it."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows the repr


class DegenerateError(PyroEMError, ArithmeticError):
    """An update had no finite, non-degenerate solution; it has been rolled back."""


class GroupError(PyroEMError, RuntimeError):
    """Processes of a group that do not, or cannot, work together."""


class PyroEMWarning(UserWarning):
    """Something that a user can act upon and that does not stop a fit."""


@dataclass(frozen=True)
class Finding:
    """One finding about a model or its data.

    Attributes:
        where: The place, for instance ``"site 'x'"``.
        what: What was found there.
        why: Why that stops the computation, or an empty string.
        fixes: What to try, most likely first.
        kind: The exception class that suits it.
        latents: The latents that have no route because of it; none where it is of another matter.
        row: The first row of the data that it is about, where it is about any.
    """

    where: str
    what: str
    why: str = ""
    fixes: tuple[str, ...] = ()
    kind: type[PyroEMError] = ModelError
    latents: tuple[str, ...] = ()
    row: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}"]
        if self.why:
            lines.append(f"  Why: {self.why}")
        if self.fixes:
            lines.append("  Try one of the following fixes:")
            lines.extend(f"    - {fix}" for fix in self.fixes)
        return "\n".join(lines)


@dataclass(frozen=True)
class OverBudget(Finding):
    """An enumeration past the budget.

    Attributes:
        cells: Cells of its largest table.
        limit: The budget.
    """

    cells: int = 0
    limit: int = 0


def message(where: str, what: str, why: str = "", fixes: Sequence[str] = ()) -> str:
    """Build the four-part text of an error or a warning.

    Example:
        >>> print(message("site 'x'", "2 of 10 values are NaN.", fixes=["pass obs_mask"]))
        site 'x': 2 of 10 values are NaN.
          Try one of the following fixes:
            - pass obs_mask
    """
    return str(Finding(where, what, why, tuple(fixes)))


def warn(text: str) -> None:
    """Warn at the user's line that led here: outside this library and what it is built on."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, PyroEMWarning, stacklevel=level)


def _folder(file: str | None) -> str:
    return os.path.dirname(os.path.abspath(str(file))) + os.sep


_NOT_THE_USERS = (
    *(_folder(file) for file in (__file__, torch.__file__, pyro.__file__)),
    contextlib.__file__,  # a context manager that is used as a decorator
)


def raise_findings(problems: Sequence[Finding]) -> NoReturn:
    """Raise one exception that lists ``problems``; its class is that of the first.

    The same finding at many sites of a chain is reported once.
    """
    raise as_error(problems)


def as_error(problems: Sequence[Finding]) -> PyroEMError:
    """The exception that `raise_findings` raises."""
    folded = _folded(problems)
    if len(folded) == 1:
        text = folded[0]
    else:
        lines = "\n".join(f"{i}. {one}" for i, one in enumerate(folded, start=1))
        text = f"{len(folded)} problems:\n{lines}"
    error = problems[0].kind(text)
    error.problems = tuple(problems)
    return error


def remedy(problem: Finding) -> str:
    """What findings at the steps of a chain have in common: all but their numbers and their reasons.

    The last step has another reason than the others (no step after it) and the same remedies.
    """
    return re.sub(r"\d+", "#", " ".join((problem.where, problem.what, *problem.fixes)))


def _folded(problems: Sequence[Finding]) -> list[str]:
    alike: dict[tuple[str, int], list[Finding]] = {}
    at_site: Counter[str] = Counter()
    for problem in problems:
        # Two findings at one site are two, however much they look alike.
        key = remedy(problem), at_site[problem.where]
        at_site[problem.where] += 1
        alike.setdefault(key, []).append(problem)
    texts = []
    for members in alike.values():
        head, _, rest = str(members[0]).partition("\n")
        if len(members) > 1:
            head += f" (and {len(members) - 1} more alike, up to {members[-1].where})"
        texts.append(head + ("\n" + rest if rest else ""))
    return texts


def of_rows(error: PyroEMError, begin: int) -> PyroEMError:
    """The error that was raised for some rows of the data, with their place among all rows.

    Args:
        error: The error.
        begin: The number of the first of these rows among all.

    Example:
        >>> found = Finding("site 'x'", "2 of 9 values are NaN.", row=2)
        >>> print(of_rows(as_error([found]), 1000))
        site 'x': 2 of 9 values are NaN. The first is in row 1002 of all data.
    """
    if not any(p.row is not None for p in error.problems):
        other = type(error)(f"rows from {begin} on: {error}")
        other.problems = error.problems
        return other
    out = as_error(
        [
            p
            if p.row is None
            else replace(p, what=f"{p.what} The first is in row {begin + p.row} of all data.")
            for p in error.problems
        ]
    )
    out.names_rows = True
    return out


def sites_in_words(names: Sequence[str]) -> str:
    """``site 'z'`` or ``sites 'a', 'b', …`` for a message's beginning."""
    shown = ", ".join(f"'{n}'" for n in names[:5]) + (", …" if len(names) > 5 else "")
    if not names:
        return "model"
    return f"site {shown}" if len(names) == 1 else f"sites {shown}"


class Handover(Exception):
    """A step on sums over data met something that a step through tables has to judge."""


class TooFar(Handover):
    """A step on sums goes further than sums tell: the next one through tables, which takes more."""
