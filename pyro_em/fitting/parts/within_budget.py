"""Data at hand whose one table would be above the budget: they are gone through in chunks of rows.

The budget, ``max_enumeration``, is of the cells that are held at once. Rows of the outermost plate are
independent, so that no step needs the table of all rows; it is the posterior of all rows that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_em.errors import OverBudget, PyroEMError
from pyro_em.fitting.parts.chunk_by_chunk import HOW
from pyro_em.fitting.parts.chunked import first_arguments
from pyro_em.fitting.parts.rows_alone import refuse_rows_that_see_others
from pyro_em.fitting.session import Session
from pyro_em.plan.over_all import require_partable
from pyro_em.plan.program import Program
from pyro_em.plan.unrouted import Unrouted
from pyro_em.sources.chunks import Chunks
from pyro_em.variational.bound import Variational

# Chunks of fewer rows cost more to read than to compute: the budget is what has to be looked at then.
_FEWEST = 1000


def in_chunks(error: PyroEMError, args: tuple, kwargs: Mapping[str, Any]) -> tuple | None:
    """The same arguments in chunks whose tables are within the budget; None where that is no remedy.

    Args:
        error: What stood in the way of all rows at once.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
    """
    over = [p for p in error.problems if isinstance(p, OverBudget)]
    if not over or len(over) < len(error.problems) or not args:
        return None
    rows = _rows(args[0])
    parted = 0
    while parted < len(args) and _rows(args[parted]) == rows:
        parted += 1
    others = (*args[parted:], *kwargs.values())
    if not rows or any(_rows(a) == rows for a in others):
        return None
    most = min(int(rows * p.limit / p.cells) for p in over)
    if not _FEWEST <= most < rows:
        return None
    return (Chunks(*args[:parted], rows=most), *args[parted:])


def serve(
    session: Session, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False
) -> Program | None:
    """The first chunk of some arguments; None where one cannot go through them.

    Args:
        session: Reads the model.
        args: The model's positional arguments in chunks.
        kwargs: Its keyword arguments.
        look_only: Whether only an E-step is wanted.
    """
    try:
        found = session.look(first_arguments(args), kwargs, look_only=look_only)
        if not isinstance(found, Program):
            return None
        require_partable(found, HOW)
        refuse_rows_that_see_others(session.planner, found, HOW, len(found.args) - len(args) + 1)
        return found
    except PyroEMError:
        return None


def within_budget(
    session: Session, found: Unrouted, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, Program | Variational | Unrouted]:
    """The first chunk of a fit that goes through chunks, and what it is; else what there was.

    Args:
        session: Reads the model.
        found: What stands in the way of all rows at once.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
    """
    fewer = in_chunks(found.error, args, kwargs)
    program = None if fewer is None else serve(session, fewer, kwargs)
    if fewer is None or program is None:
        return args, found
    some, total = program.args, len(args[0])
    return some, program.noting(
        f"a table of all {total:,} rows would be above max_enumeration: a fit goes through chunks of "
        f"{len(some[0]):,} rows, and this is the plan of the first."
    )


def _rows(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.dim() else None
