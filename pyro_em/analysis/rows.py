"""Rows of the data, among the arguments of a model: which of them to change for other rows.

A row is an element of the outermost plate that all observations share. Data without such a plate are
one series, whose rows are its steps. Which arguments have rows, and along which dimension, is found by
running the model with one more row: its plate has to grow by one.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_em.errors import Finding, UsageError, raise_findings
from pyro_em.tracing.leaves import Path, leaves_of, name_of, replaced
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role, factors_in, role_of
from pyro_em.tracing.whole import LeftWhole

Sites = Mapping[str, Mapping[str, Any]]

_MOST = 64  # ways to choose dimensions that are tried

_MOST_LAGS = 3  # steps before the first that is observed

_COUNT = -1  # in place of a dimension: the leaf is the number of rows


@dataclass(frozen=True)
class Rows:
    """The rows of a model's data.

    Attributes:
        plate: The plate whose elements they are; None where they are the steps of one series.
        size: How many there are.
        dims: Per leaf of the arguments that has rows their dimension; −1 where it is how many.
        lag: How many rows come before those that the plate has: an autoregression begins with them.
    """

    plate: str | None
    size: int
    dims: Mapping[Path, int]
    lag: int = 0

    def taken(
        self, args: tuple, kwargs: Mapping[str, Any], rows: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments with some of the rows, any of them several times.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            rows: Numbers of rows. # (n,)
        """
        leaves = leaves_of(args, kwargs)
        return replaced(args, kwargs, {p: taken(leaves[p], d, rows) for p, d in self.dims.items()})


def taken(value: Any, dim: int, rows: Tensor) -> Any:
    """Rows of one leaf.

    Args:
        value: The leaf.
        dim: Its dimension of rows; −1 where it is their number.
        rows: Numbers of rows. # (n,)
    """
    if dim == _COUNT:
        return len(rows)
    if isinstance(value, Tensor):
        return value.index_select(dim, rows.to(value.device))
    if isinstance(value, np.ndarray):
        return value.take(rows.cpu().numpy(), axis=dim)
    return type(value)([value[i] for i in rows.tolist()])


def rows_of(
    model: Model, args: tuple, kwargs: dict[str, Any], where: str, sites: Sites | None = None
) -> Rows:
    """The rows of the data that a model is given.

    Args:
        model: The user's model; its parameters have been initialised.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        where: The public method, for messages.
        sites: A run of the model on these arguments, where there is one.

    Raises:
        UsageError: If no argument has a value for each row.
    """
    sites = run(model, args, kwargs) if sites is None else sites
    candidates = plates_of_rows(sites)
    for lag, (plate, size) in itertools.product(range(_MOST_LAGS + 1), candidates):
        for dims in _choices(args, kwargs, size + lag):
            rows = Rows(plate, size, dims, lag)
            more = torch.cat([torch.arange(size + lag), torch.zeros(1, dtype=torch.long)])
            if size_in(try_run(model, *rows.taken(args, kwargs, more)), plate) == size + 1:
                return rows
    raise_findings([_no_rows(where, candidates)])


def plates_of_rows(sites: Sites) -> list[tuple[str | None, int]]:
    """The plates whose elements may be rows, outermost first, with their sizes; else the steps.

    Args:
        sites: The sites of a run.
    """
    observed = [s for s in sites.values() if role_of(s) is Role.DATA]
    nested = [s["cond_indep_stack"] for s in observed or list(sites.values())[-1:]]
    nested = [frames for frames in nested if frames]
    if nested:
        shared = set.intersection(*({f.name for f in frames} for frames in nested))
        return [(f.name, f.size) for f in nested[0] if f.name in shared]
    kinds = Counter(
        re.sub(r"\d+", "#", n) for n, s in sites.items() if s in observed or not observed
    )
    steps = max(kinds.values(), default=1)
    return [(None, steps)] if steps > 1 else []


def size_in(sites: Sites | None, plate: str | None) -> int | None:
    """How many rows a run has.

    Args:
        sites: The sites of the run; None if it failed.
        plate: The plate; None for the steps of one series.
    """
    if sites is None:
        return None
    return next((size for name, size in plates_of_rows(sites) if name == plate), None)


def _choices(args: tuple, kwargs: Mapping[str, Any], size: int) -> Iterator[dict[Path, int]]:
    """Ways to choose what has rows: first dimensions before others, tensors before numbers."""
    leaves = leaves_of(args, kwargs)
    ways: dict[Path, list[int | None]] = {}
    counts: list[Path] = []
    for path, value in leaves.items():
        if isinstance(value, int):
            counts += [path] * (value == size)
            continue
        shape = (len(value),) if isinstance(value, (list, tuple)) else tuple(value.shape)
        dims = [d for d, n in enumerate(shape) if n == size]
        if dims and not any(path[:i] in ways for i in range(1, len(path))):
            ways[path] = [*dims, None]
    for with_counts in (False, True)[: 1 + bool(counts)]:
        for chosen in itertools.islice(itertools.product(*ways.values()), _MOST):
            rows = {p: d for p, d in zip(ways, chosen, strict=True) if d is not None}
            if with_counts:
                rows.update(dict.fromkeys(counts, _COUNT))
            if rows:
                yield rows


def run(model: Model, args: tuple, kwargs: dict[str, Any], *handlers: Any) -> Sites:
    """The factors of one run of a model, drawing its latents; the random state is restored.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        *handlers: Handlers around it, innermost last.

    Raises:
        UsageError: If a value has not the shape of its site.
    """
    with (
        LeftWhole(random_state=True),
        torch.no_grad(),
        pyro.validation_enabled(False),
        poutine.trace() as tracer,
        ExitStack() as stack,
    ):
        for handler in handlers:
            stack.enter_context(handler)
        model(*args, **kwargs)
    sites = factors_in(tracer.trace.nodes)
    for name, site in sites.items():
        _check_shape(name, site)
    return sites


def try_run(model: Model, args: tuple, kwargs: dict[str, Any]) -> Sites | None:
    """As `run`; None where the model cannot be run on these arguments."""
    try:
        return run(model, args, kwargs)
    except Exception:  # whatever the model raises of arguments that do not go together
        return None


def _check_shape(name: str, site: Mapping[str, Any]) -> None:
    """Refuse a value that is broadcast against its distribution, or does not fit it."""
    value, fn = site["value"], site["fn"]
    if not isinstance(value, Tensor) or not hasattr(fn, "shape"):
        return
    own, wanted = tuple(value.shape), tuple(fn.shape())
    pairs = zip(reversed(own), reversed(wanted), strict=False)
    if any(a != b and a > 1 and b > 1 for a, b in pairs):
        raise UsageError(
            str(Finding(f"site '{name}'", f"its value has the shape {own}, not {wanted}."))
        )


def _no_rows(where: str, candidates: list[tuple[str | None, int]]) -> Finding:
    if not candidates:
        what = "the observations are in no plate and no loop: there is one of each."
    else:
        shown = " or ".join(
            f"the {size} steps of the series"
            if plate is None
            else f"the {size} elements of plate '{plate}'"
            for plate, size in candidates
        )
        what = f"no argument has a value for each of {shown}."
    return Finding(
        where,
        what,
        "rows are found as the dimension of arguments that gives a plate its size",
        (
            "pass the data to the model as an argument: def model(x): ... pyro.plate('rows', len(x))",
            "take the size of the plate from the data, or from an argument of its own",
        ),
        UsageError,
    )


def named(model: Model, paths: Iterable[Path]) -> str:
    """Leaves in a message."""
    return ", ".join(f"'{name_of(model, p)}'" for p in paths)
