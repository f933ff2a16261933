"""What each process of a group has of the data, and what all of them have to have alike.

An argument whose first dimension is that of the outermost plate is the process's own: its rows are some
of all rows. All others are the same everywhere, as are the routes, the updates and the parameters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.plan.part import plate_of_rows
from pyro_em.plan.program import Program
from pyro_em.reduction.over_group import OverGroup
from pyro_em.tracing.checkpoint import checksum
from pyro_em.tracing.parameters import TracedParameter, restore, snapshot
from pyro_em.tracing.randomness import same_random_state
from pyro_em.tracing.sites import signature_of
from pyro_em.variational.bound import Variational

logger = logging.getLogger("pyro_em")


@dataclass(frozen=True)
class _Described:
    """An argument, or a part of one, as other processes need to know it.

    Attributes:
        size: Of its first dimension; None where it has none.
        form: Its dtype and its other dimensions, in words.
    """

    size: int | None
    form: str


@dataclass(frozen=True, eq=False)
class Shards:
    """The rows of the data, process by process.

    Attributes:
        over: The group.
        plate: The plate whose elements are parted.
        rows: How many elements each rank has.
    """

    over: OverGroup[Any]
    plate: str
    rows: tuple[int, ...]

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.rows)

    @property
    def own(self) -> int:
        """Rows of this rank."""
        return self.rows[self.over.rank]

    @property
    def begin(self) -> int:
        """The number of this rank's first row among all."""
        return sum(self.rows[: self.over.rank])

    @property
    def is_empty(self) -> bool:
        """Whether this rank has no rows; a row of another one shows it the form of values."""
        return not self.own

    @property
    def first(self) -> int:
        """The first rank with rows: what is outside the plate counts with it."""
        return next(r for r, size in enumerate(self.rows) if size)

    @property
    def place(self) -> str:
        """Where this rank's rows are, in words."""
        if self.is_empty:
            return "which has no rows"
        return f"which has rows {self.begin} to {self.begin + self.own - 1} of all data"


# ---------------------------------------------------------------- arguments


def arguments(
    over: OverGroup[Any], model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any], bool]:
    """The arguments of this rank, some rows of another rank's where it has none.

    Args:
        over: The group.
        model: The model, for the names of arguments.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The arguments, and whether this rank has rows. What a single row looks like says little of the
        other rows (what is constant along them, what is not), so that a rank with one row lends it to
        a neighbour with more.

    Raises:
        UsageError: If ranks pass different arguments.
    """
    mine = dict(_leaves(model, args, kwargs))
    over.agree(
        {"the list of arguments": checksum({"names": [str(n) for n in mine]})},
        ("pass the same arguments on all processes; only the rows differ",),
    )
    all_of_them: list[dict[str, _Described]] = over.gathered(
        lambda: {name: _described(value) for name, value in mine.items()}
    )
    sizes = {name: [one[name].size for one in all_of_them] for name in mine}
    parted = [n for n, s in sizes.items() if len(set(s)) > 1 and None not in s]
    counted = parted or [n for n, s in sizes.items() if None not in s]
    if counted:  # before the model has been read, the longest argument tells where rows are
        longest = max(counted, key=lambda n: sum(s or 0 for s in sizes[n]))
        over.at_rows(sum(s or 0 for s in sizes[longest][: over.rank]))
    if not parted:  # all shards have one size
        return args, dict(kwargs), True
    rows = [int(size or 0) for size in sizes[parted[0]]]
    if any(sizes[n] != rows for n in parted):
        raise over.refusal(
            UsageError(
                message(
                    f"arguments {', '.join(repr(n) for n in parted[:4])}",
                    "they do not have as many rows as each other on all processes.",
                    "rows of all arguments belong together",
                    ["pass the same rows of all arguments, or empty tensors for all of them"],
                )
            )
        )
    many = [r for r, size in enumerate(rows) if size > 1] or [rows.index(max(rows))]
    lent = {r: min(many, key=lambda m: abs(m - r)) for r, n in enumerate(rows) if n == 1}
    own = {n: mine[n] for n in parted}
    for lender, to in lent.items():
        if lender == to:
            continue
        row = over.from_rank(lender, lambda: {n: mine[n] for n in parted})
        if over.rank == to:
            own = {n: _joined(own[n], row[n], after=lender > to) for n in parted}
    has_rows = over.rank in many
    shown = over.from_rank(many[0], lambda: {n: own[n][:_SHOWN] for n in parted})
    changed = _replaced(model, args, kwargs, own if has_rows else shown)
    return *changed, has_rows


_SHOWN = 8  # rows that a rank without rows looks at


def _joined(own: Any, more: Any, after: bool) -> Any:
    """Rows with another one before or after them."""
    pair = (own, more) if after else (more, own)
    if isinstance(own, Tensor):
        return torch.cat([t.to(own.device) for t in pair])
    if isinstance(own, numpy.ndarray):
        return numpy.concatenate(pair)
    return type(own)([*pair[0], *pair[1]])


def agreed(
    over: OverGroup[Any],
    model: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    size: int,
    in_chunks: int = 0,
) -> None:
    """Refuse arguments that are neither parted nor the same on all ranks.

    Args:
        over: The group.
        model: The model, for the names of arguments.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        size: Elements of the outermost plate, as the model was read here.
        in_chunks: How many of the first arguments come in chunks, which hold rows of their own.

    Raises:
        UsageError: If there are any, or no argument is parted.
    """
    apart = [name for name, _ in _named(model, args, kwargs)[:in_chunks]]
    mine = {
        name: value
        for name, value in _leaves(model, args, kwargs)
        if not any(name == n or name.startswith(f"{n}[") for n in apart)
    }
    has_rows = over.gathered(lambda: [_described(v).size == size for v in mine.values()])
    parted = {n for i, n in enumerate(mine) if all(of_rank[i] for of_rank in has_rows)}
    if not parted and not in_chunks:
        raise over.refusal(
            UsageError(
                message(
                    "process_group",
                    f"no argument has the {size} rows of the outermost plate as its first dimension.",
                    "the rows of the arguments are what the processes share out between them; data "
                    "that the model gets in another way would count once per process",
                    [
                        "pass the data of each process as an argument: em.fit(shard, process_group=...)"
                    ],
                )
            )
        )
    inside = {n for n in mine for p in parted if n.startswith(f"{p}[")}
    digests = {
        f"argument '{n}'": _digest(value)
        for n, value in mine.items()
        if n not in parted and n not in inside
    }
    digests |= {f"the form of argument '{n}'": _described(mine[n]).form for n in sorted(parted)}
    over.agree(
        digests,
        (
            "pass the same value on all processes",
            "make its first dimension that of the outermost plate, if it belongs to the rows",
        ),
    )


def _leaves(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    for name, value in _named(model, args, kwargs):
        yield from _below(name, value)


def _named(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    names = [p.name for p in signature_of(model) if p.kind is not p.VAR_POSITIONAL]
    names += [f"#{i + 1}" for i in range(len(names), len(args))]
    return [*zip(names, args, strict=False), *sorted(kwargs.items())]


def _below(name: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """A value, and what is in it where it is a container: that may be parted instead."""
    yield name, value
    if depth and isinstance(value, Mapping):
        for key in value:
            yield from _below(f"{name}[{key!r}]", value[key], depth - 1)
    elif depth and isinstance(value, (tuple, list)) and len(value) <= 16:
        for i, item in enumerate(value):
            yield from _below(f"{name}[{i}]", item, depth - 1)


def _described(value: Any) -> _Described:
    if isinstance(value, (Tensor, numpy.ndarray)):
        shape = tuple(value.shape)
        size = shape[0] if shape else None
        return _Described(size, f"{str(value.dtype).removeprefix('torch.')} {shape[1:]}")
    if isinstance(value, (tuple, list)):
        return _Described(len(value), type(value).__name__)
    return _Described(None, type(value).__name__)


def _digest(value: Any) -> str:
    """A checksum of a value; of what is neither data nor a container, of its class."""
    return checksum({"value": _plain(value)})


def _plain(value: Any) -> Any:
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(numpy.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    return type(value).__qualname__


def _replaced(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], by_name: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Arguments with other values for some leaves."""

    def of(name: str, value: Any) -> Any:
        if name in by_name:
            return by_name[name]
        if isinstance(value, Mapping):
            return {key: of(f"{name}[{key!r}]", item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(of(f"{name}[{i}]", item) for i, item in enumerate(value))
        return value

    named = [of(name, value) for name, value in _named(model, args, kwargs)]
    positional = tuple(named[: len(args)])
    return positional, dict(zip(sorted(kwargs), named[len(args) :], strict=True))


# ---------------------------------------------------------------- what was read


def outermost_plate(found: Program | Variational) -> tuple[str, int]:
    """The plate whose elements are parted, and how many of them this rank's arguments have.

    Raises:
        UsageError: If there is none, or it is a part of more rows already.
    """
    structure = found.structure if isinstance(found, Program) else found.bare
    name = plate_of_rows(structure)
    if name is None:
        raise UsageError(
            message(
                "process_group",
                "no vectorised plate is around all observations that are in plates.",
                "processes share out the elements of the outermost plate, which are independent",
                ["put the rows into pyro.plate(name, len(x))", "fit in one process"],
            )
        )
    plate = structure.plates[name]
    if plate.full_size != plate.size:
        raise UsageError(
            message(
                f"plate '{name}'",
                f"it has {plate.size} elements of {plate.full_size}.",
                "with process_group every process has its own rows, and they are counted together",
                ["leave the size of all data out: pyro.plate(name, len(x))"],
            )
        )
    return name, plate.size


def share_parameters(shards: Shards, parameters: Mapping[str, TracedParameter]) -> None:
    """Give all ranks the parameter values of the first one with rows.

    Raises:
        UsageError: If ranks have other parameters, or parameters of other shapes.
    """
    forms = {f"parameter '{n}'": _form_of(p) for n, p in sorted(parameters.items())}
    shards.over.agree(
        {**forms, "the order of parameters": checksum({"names": list(parameters)})},
        (
            "let no parameter have one number per row: it would belong to one process alone",
            "build the same model on all processes",
        ),
    )
    values = shards.over.from_rank(shards.first, lambda: snapshot(parameters))
    restore(parameters, {n: v.to(parameters[n].unconstrained) for n, v in values.items()})


def _form_of(p: TracedParameter) -> str:
    return f"{p.unconstrained.dtype} {tuple(p.unconstrained.shape)} {p.constraint!r}"


def refuse_parameters_of_rows(
    shards: Shards,
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    parameters: Mapping[str, TracedParameter],
) -> None:
    """Refuse parameters of which each row has its own: they would be those of other rows elsewhere.

    Where ranks have different numbers of rows the shapes tell them; where they have the same number
    the model is run once more, on one row less.

    Args:
        shards: The rows of all ranks.
        model: The model.
        guide: Its guide, if there is one.
        args: Its positional arguments, as this rank has them.
        kwargs: Its keyword arguments.
        parameters: All parameters.

    Raises:
        UsageError: With the parameter's name.
    """
    size = shards.own
    doubtful = [n for n, p in parameters.items() if size > 1 and size in p.unconstrained.shape]
    found = ""
    if doubtful and len({r for r in shards.rows if r}) == 1:
        shorter = {
            n: v[:-1]
            for n, v in _leaves(model, args, kwargs)
            if isinstance(v, (Tensor, numpy.ndarray)) and _described(v).size == size
        }
        again = _replaced(model, args, kwargs, shorter)
        store = pyro.get_param_store()
        with same_random_state(), store.scope(), torch.no_grad():
            try:
                for one in (guide, model):
                    if callable(one):
                        pyro.poutine.trace(one).get_trace(*again[0], **again[1])
            except Exception:  # functions that take no other data: what they made is known
                logger.info("process_group: model and guide cannot be run on one row less")
            now = {n: tuple(v.shape) for n, v in store.items()}
        found = next(
            (n for n in doubtful if n in now and now[n] != tuple(parameters[n].value().shape)),
            "",
        )
    if found:
        raise UsageError(
            message(
                f"parameter '{found}'",
                f"it has one element for each of the {size} rows.",
                "with process_group a parameter is one and the same on all processes, whose rows "
                "are different ones",
                ["let a latent or a network serve all rows", "fit in one process"],
            )
        )


def plan_digest(found: Program | Variational) -> dict[str, str]:
    """What all ranks have to plan alike, by name; numbers of rows are left out."""
    structure = found.structure if isinstance(found, Program) else found.bare
    out = {
        "the sites of the model": checksum(
            {
                n: [i.distribution, i.observed, list(i.plates), list(i.scope), i.support_size or 0]
                for n, i in structure.sites.items()
            }
        )
    }
    for name, plate in structure.plates.items():
        if name != plate_of_rows(structure):
            out[f"the size of plate '{name}'"] = str(plate.size)
    if isinstance(found, Program):
        plan = found.plan()
        out["the routes of latents"] = checksum({r.site: r.route for r in plan.routes})
        for name, update in plan.updates.items():
            out[f"the update of parameter '{name}'"] = re.sub(
                r"\d+", "#", f"{type(update.update).__name__} {update.reason}"
            )
        out["whether the model is run at each step"] = str(plan.compiled)
    else:
        routing = found.routing
        out["the routes of latents"] = checksum(
            {"drawn": list(routing.drawn), "solved": list(routing.solved)}
        )
    return out
