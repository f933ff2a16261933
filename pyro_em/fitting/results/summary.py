"""The table of a fit: one row per element of a parameter, with what describes the fit above it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.fitting.results.intervals import interval, limits_of, scale_in_words
from pyro_em.fitting.results.labels import Labels, ParameterForm, stem
from pyro_em.fitting.results.standard_errors import StandardErrors
from pyro_em.fitting.results.table import Table
from pyro_em.globs import listed
from pyro_em.updates.update import Fixed, NoUpdate, ParameterUpdate

COLUMNS = ("estimate", "standard_error", "z", "lower", "upper", "note")
_MOST = 1000  # elements of a parameter that have a row each
_ORDER = ("component", "", "from", "to", "feature", "category", "factor", "covariate", "index")


def parameter_table(
    params: Mapping[str, Tensor],
    forms: Mapping[str, ParameterForm],
    updates: Mapping[str, ParameterUpdate],
    errors: StandardErrors | None,
    labels: Labels,
    level: float,
    attrs: Mapping[str, Any],
) -> Table:
    """One row per element of each parameter.

    Args:
        params: Constrained values.
        forms: What they are.
        updates: What a fit does with them.
        errors: Their standard errors; None where there are none.
        labels: Of their elements.
        level: The probability that an interval holds.
        attrs: What describes the fit.
    """
    shown = {n: is_shown(n, v) for n, v in params.items()}
    axes = _levels(forms[n].axes for n in params if shown[n])
    index: list[tuple[Any, ...]] = []
    rows: list[tuple[Any, ...]] = []
    scales: dict[str, list[str]] = {}
    for name, value in params.items():
        if not shown[name]:
            index.append((name, *("" for _ in axes)))
            rows.append((*[math.nan] * 5, f"a tensor of shape {tuple(value.shape)}"))
            continue
        index += [(name, *place) for place in _places(forms[name].axes, labels[name], axes)]
        limits = limits_of(forms[name].constraint, value)
        error = None if errors is None or name not in errors else errors[name]
        found = torch.full_like(value, torch.nan) if error is None else error
        ends = interval(value, found, *limits, level)
        notes = _notes(name, value, updates.get(name), errors)
        if bool(torch.isfinite(found).any()):
            scales.setdefault(scale_in_words(*limits), []).append(name)
        columns = (value.double(), found.double(), value.double() / found.double(), *ends)
        numbers = [c.reshape(-1).tolist() for c in columns]
        rows += zip(*numbers, notes, strict=True)
    attrs = {**attrs, **_about_intervals(level, scales)}
    return Table(("parameter", *axes), tuple(index), COLUMNS, tuple(rows), attrs)


def elements(
    axes: Mapping[str, Sequence[str]], labels: Labels
) -> tuple[tuple[str, ...], dict[str, list[tuple[Any, ...]]]]:
    """The names of an index's levels, and per parameter where each of its elements is on them.

    Args:
        axes: The names of each parameter's axes.
        labels: Of their places.

    Example:
        >>> elements({"w": ("component",)}, {"w": (("low", "high"),)})
        (('parameter', 'component'), {'w': [('w', 'low'), ('w', 'high')]})
    """
    levels = _levels(axes.values())
    places = {n: [(n, *at) for at in _places(own, labels[n], levels)] for n, own in axes.items()}
    return ("parameter", *levels), places


def estimates(
    params: Mapping[str, Tensor], forms: Mapping[str, ParameterForm], labels: Labels
) -> Table:
    """The values alone, one row per element.

    Args:
        params: Constrained values.
        forms: What they are.
        labels: Of their elements.
    """
    table = parameter_table(params, forms, {}, None, labels, 0.95, {})
    rows = tuple((row[0] if row[0] == row[0] else row[-1],) for row in table.rows)
    return Table(table.names, table.index, COLUMNS[:1], rows)


def wide_table(
    params: Mapping[str, Tensor],
    forms: Mapping[str, ParameterForm],
    labels: Labels,
    attrs: Mapping[str, Any],
) -> Table:
    """The estimates with a column for each component.

    Parameters that do not run over components are in a column ``all``; of a table of transitions the
    columns are those to which they lead.

    Args:
        params: Constrained values.
        forms: What they are.
        labels: Of their elements.
        attrs: What describes the fit.

    Raises:
        UsageError: If no parameter runs over the components of one latent.
    """
    shown = [n for n, v in params.items() if is_shown(n, v)]
    across = {n: _across(forms[n].axes) for n in shown}
    if all(a is None for a in across.values()):
        axes = dict.fromkeys(a for n in shown for a in forms[n].axes)
        raise UsageError(
            message(
                "summary(wide=True)",
                f"no parameter has an axis 'component'; the axes are: {listed(list(axes))}.",
                "a wide table has a column for each component of one latent",
                [
                    f"unstack what you like: summary()['estimate'].unstack('{name}')"
                    for name in list(axes)[:1]
                ],
            )
        )
    rest = {n: tuple(a for i, a in enumerate(forms[n].axes) if i != across[n]) for n in shown}
    levels = _levels(rest.values())
    columns: dict[Any, None] = {}
    cells: dict[tuple[Any, ...], dict[Any, float]] = {}
    for name in shown:
        own, at = labels[name], across[name]
        kept = tuple(label for i, label in enumerate(own) if i != at)
        value = params[name].double()
        if at is None:
            flat, over = value.reshape(-1, 1), ("all",)
        else:
            flat, over = value.movedim(at, -1).reshape(-1, value.shape[at]), own[at]
        columns |= dict.fromkeys(over)
        for place, row in zip(_places(rest[name], kept, levels), flat.tolist(), strict=True):
            cells[name, *place] = dict(zip(over, row, strict=True))
    if "all" in columns:
        columns = {"all": None, **columns}
    rows = tuple(tuple(row.get(c, math.nan) for c in columns) for row in cells.values())
    return Table(
        ("parameter", *levels), tuple(cells), tuple(columns), rows, attrs, over="component"
    )


def as_frame(table: Table) -> Any:
    """A DataFrame with the index, columns and ``attrs`` of a table, or the table without pandas."""
    try:
        from pyro_em.fitting.results.frame import frame_of
    except ImportError:
        return table
    return frame_of(table)


def _across(axes: Sequence[str]) -> int | None:
    """Which axis of a parameter is spread over columns."""
    return next((axes.index(name) for name in ("component", "to") if name in axes), None)


def is_shown(name: str, value: Tensor) -> bool:
    """Whether the elements of a parameter have a row each: not those of networks and large tables."""
    return value.numel() <= _MOST and "$$$" not in name


def _levels(axes: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The levels of the index beyond the parameter, components first."""
    names = dict.fromkeys(a for own in axes for a in own)
    return tuple(sorted(names, key=_rank))


def _rank(axis: str) -> int:
    return _ORDER.index(stem(axis)) if stem(axis) in _ORDER else _ORDER.index("")


def _places(
    own: Sequence[str], labels: Sequence[Sequence[Any]], levels: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """The labels of each element on all levels, empty where it has none."""
    for labelled in product(*labels):
        at = dict(zip(own, labelled, strict=True))
        yield tuple(at.get(level, "") for level in levels)


def _notes(
    name: str, value: Tensor, update: ParameterUpdate | None, errors: StandardErrors | None
) -> list[str]:
    """Why an element has no standard error, in a word or two."""
    notes = [""] * value.numel()
    kind = None if update is None else update.update
    if isinstance(kind, (Fixed, NoUpdate)):
        return ["fixed" if isinstance(kind, Fixed) else "not used"] * value.numel()
    if errors is None:
        return notes
    for words, found in (
        ("boundary", errors.at_boundary),
        ("not identified", errors.not_identified),
        ("no maximum", errors.no_maximum),
    ):
        for i in found[name].reshape(-1).nonzero().reshape(-1).tolist() if name in found else ():
            notes[i] = notes[i] or words
    return notes


def _about_intervals(level: float, scales: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """On which scales intervals are made, in words."""
    if not scales:
        return {}
    of = ", ".join(f"the {scale} ({', '.join(names)})" for scale, names in scales.items())
    return {"intervals": f"{level:.4g}, symmetric on the scale of {of}"}
