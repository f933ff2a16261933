"""The arguments of a model with another number of rows: of what it draws, not of what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_em.analysis.rows import Rows, Sites, named, plates_of_rows, rows_of, run, try_run
from pyro_em.analysis.uses import Uses, uses_of
from pyro_em.errors import Finding, UsageError, raise_findings
from pyro_em.tracing.leaves import leaves_of
from pyro_em.tracing.runs import Model


def resized(
    model: Model, n: int, args: tuple, kwargs: dict[str, Any], where: str
) -> tuple[Sites, Rows | None, tuple, dict[str, Any]]:
    """Arguments of ``n`` rows, with a run on them; rows of what is observed are given ones in turn.

    Args:
        model: The user's model; its parameters have been initialised.
        n: How many rows.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        where: The public method, for messages.

    Raises:
        UsageError: If an argument has other rows and is read, or none gives the plate its size.
    """
    try:
        sites = run(model, args, kwargs)
    except Exception as error:  # arguments of two sizes: some have n rows already
        return _brought_together(model, n, args, kwargs, where, error)
    if any(size == n for _, size in plates_of_rows(sites)):
        return sites, None, args, kwargs
    rows = rows_of(model, args, kwargs, where, sites)
    uses = uses_of(model, args, kwargs, sites)
    _refuse_read(model, n, rows, uses, where)
    args, kwargs = rows.taken(args, kwargs, torch.arange(n + rows.lag) % (rows.size + rows.lag))
    return run(model, args, kwargs), rows, args, kwargs


def _brought_together(
    model: Model, n: int, args: tuple, kwargs: dict[str, Any], where: str, error: Exception
) -> tuple[Sites, Rows, tuple, dict[str, Any]]:
    """As `resized`, where covariates have the new number of rows and the data the old one."""
    shapes = {
        p: tuple(v.shape) for p, v in leaves_of(args, kwargs).items() if isinstance(v, Tensor)
    }
    for size in dict.fromkeys(d for shape in shapes.values() for d in shape if d != n):
        dims = {p: shape.index(size) for p, shape in shapes.items() if size in shape}
        guess = Rows(None, size, dims)
        some = guess.taken(args, kwargs, torch.arange(n) % size)
        sites = try_run(model, *some)
        plates = () if sites is None else plates_of_rows(sites)
        plate = next((name for name, found in plates if found == n), "")
        if sites is None or plate == "":
            continue
        rows = Rows(plate, size, dims)
        _refuse_read(model, n, rows, uses_of(model, *some, sites), where)
        return sites, rows, *some
    raise UsageError(
        str(
            Finding(
                where,
                f"the model cannot be run on these arguments: {error}",
                "",
                (f"pass arguments of one number of rows, or covariates for all {n} new rows",),
            )
        )
    ) from error


def _refuse_read(model: Model, n: int, rows: Rows, uses: Uses | None, where: str) -> None:
    """Refuse to make up rows of what the model does not draw."""
    of_rows = [p for p, dim in rows.dims.items() if dim >= 0]
    if uses is None:
        asked, how = of_rows, "how the model reads them cannot be seen"
    else:
        asked = [p for p in of_rows if not uses.draws(p) and uses.reader(p) is not None]
        how = f"{uses.reader(asked[0]) if asked else ''}, and nothing of the model draws it"
    if not asked:
        return
    of = "steps" if rows.plate is None else f"elements of plate '{rows.plate}'"
    names = named(model, asked)
    raise_findings(
        [
            Finding(
                where,
                f"{names} {'has' if len(asked) == 1 else 'have'} a value for each of the {rows.size} "
                f"{of}, and {n} are asked for.",
                how,
                (
                    f"pass {names} with {n} values, the data as they are",
                    f"ask for {rows.size}",
                ),
                UsageError,
            )
        ]
    )
