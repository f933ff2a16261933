"""What the elements of a parameter are called: names of its axes, labels of the places on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributions import constraints

from pyro_em.arguments import shown
from pyro_em.errors import UsageError, message
from pyro_em.globs import listed
from pyro_em.graph.axes import axis_names
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.parameters import TracedParameter

_LIKE_COMPONENTS = ("from", "to")
_HOW = [
    "by axis: labels={'component': ['short', 'long']}",
    "by parameter and axis: labels={'mu': {'feature': ['eruption', 'wait']}}",
]


@dataclass(frozen=True)
class ParameterForm:
    """What a parameter is, beside its value.

    Attributes:
        axes: A name for each axis; see `pyro_em.graph.axes.axis_names`.
        constraint: Where its value lives.
    """

    axes: tuple[str, ...]
    constraint: constraints.Constraint


Labels = Mapping[str, tuple[tuple[Any, ...], ...]]
"""Per parameter and axis a label for each place."""


def forms_in(graph: FactorGraph) -> dict[str, ParameterForm]:
    """The forms of all parameters of a model that was read."""
    names = axis_names(graph)
    return {n: ParameterForm(names[n], p.constraint) for n, p in graph.parameters.items()}


def forms_of(parameters: Mapping[str, TracedParameter]) -> dict[str, ParameterForm]:
    """The forms of parameters of which it is not known how they reach their sites."""
    return {
        n: ParameterForm(unknown_axes(p.leaf.dim()), p.constraint) for n, p in parameters.items()
    }


def unknown_axes(count: int) -> tuple[str, ...]:
    """Names of axes of which nothing is known.

    Example:
        >>> unknown_axes(2)
        ('index', 'index_2')
    """
    return tuple(f"index_{i + 1}" if i else "index" for i in range(count))


def stem(axis: str) -> str:
    """The name of an axis without the number that tells it from another one.

    Example:
        >>> stem("feature_2"), stem("feature")
        ('feature', 'feature')
    """
    head, _, tail = axis.rpartition("_")
    return head if head and tail.isdigit() else axis


def labels_of(
    given: Any,
    forms: Mapping[str, ParameterForm],
    shapes: Mapping[str, Sequence[int]],
    columns: Iterable[Sequence[Any]] = (),
    plates: Mapping[str, int] | None = None,
) -> Labels:
    """The labels of all elements: the user's, names of columns, else numbers from zero.

    Args:
        given: By axis or by parameter and axis, as a user gives them; None for none. Labels of
            ``component`` serve ``from`` and ``to`` as well, those of ``feature`` also ``feature_2``.
        forms: The parameters.
        shapes: Theirs.
        columns: The columns of tables that were passed as data: they are the labels of features and
            covariates of the same number, where one table alone has so many.
        plates: The sizes of plates that may have labels too.

    Raises:
        UsageError: If labels are for nothing, or not as many as there are places.
    """
    by_axis, by_parameter = _checked(given, forms, shapes, plates or {})
    tables = list(dict.fromkeys(tuple(c) for c in columns))
    found: dict[str, tuple[tuple[Any, ...], ...]] = {}
    for name, shape in shapes.items():
        own = by_parameter.get(name, {})
        found[name] = tuple(
            _first_that_fits(axis, size, own, by_axis, tables)
            for axis, size in zip(forms[name].axes, shape, strict=True)
        )
    return found


def _first_that_fits(
    axis: str,
    size: int,
    own: Mapping[str, tuple[Any, ...]],
    by_axis: Mapping[str, tuple[Any, ...]],
    tables: Sequence[tuple[Any, ...]],
) -> tuple[Any, ...]:
    for among in (own, by_axis):
        for name in _also(axis):
            if name in among and len(among[name]) == size:
                return among[name]
    fitting = [t for t in tables if len(t) == size]
    if stem(axis) in ("feature", "covariate") and len(fitting) == 1:
        return fitting[0]
    return tuple(range(size))


def _also(axis: str) -> list[str]:
    """The names under which the labels of an axis may be given, its own first."""
    names = [axis, stem(axis)]
    return [*names, "component"] if stem(axis) in _LIKE_COMPONENTS else names


def _checked(
    given: Any,
    forms: Mapping[str, ParameterForm],
    shapes: Mapping[str, Sequence[int]],
    plates: Mapping[str, int],
) -> tuple[dict[str, tuple[Any, ...]], dict[str, dict[str, tuple[Any, ...]]]]:
    """What the user gave, by axis and by parameter."""
    if given is None:
        return {}, {}
    if not isinstance(given, Mapping):
        raise UsageError(message("labels", f"{shown(given)} is no dict of labels.", "", _HOW))
    by_axis: dict[str, tuple[Any, ...]] = {}
    by_parameter: dict[str, dict[str, tuple[Any, ...]]] = {}
    everywhere = {n: list(zip(forms[n].axes, s, strict=True)) for n, s in shapes.items()}
    among = {**everywhere, "plates": list(plates.items())} if plates else everywhere
    for key, value in given.items():
        if isinstance(value, Mapping):
            if key not in shapes:
                raise _unknown(f"labels[{key!r}]", "no parameter has this name", everywhere)
            by_parameter[key] = {
                axis: _fitting(f"labels[{key!r}][{axis!r}]", axis, some, {key: everywhere[key]})
                for axis, some in value.items()
            }
        else:
            by_axis[key] = _fitting(f"labels[{key!r}]", key, value, among)
    return by_axis, by_parameter


def _fitting(
    where: str, axis: Any, value: Any, among: Mapping[str, list[tuple[str, int]]]
) -> tuple[Any, ...]:
    """Labels of an axis that some parameter has, as many as that has places.

    Raises:
        UsageError: If no parameter has such an axis, or none of this size, or two labels are one.
    """
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise UsageError(
            message(where, f"{shown(value)} is no list of labels.", "an axis has several", _HOW)
        )
    labels = tuple(value.tolist() if hasattr(value, "tolist") else value)
    sizes: dict[int, str] = {}
    for name, axes in among.items():
        for _, size in (found for found in axes if axis in _also(found[0])):
            sizes.setdefault(size, name)
    if not sizes and axis in among:
        own = among[axis][0][0] if among[axis] else ""
        fixes = [f"name its axis: labels={{{axis!r}: {{{own!r}: [...]}}}}"] if own else []
        raise UsageError(message(where, f"'{axis}' is a parameter.", "labels are for axes", fixes))
    if not sizes:
        raise _unknown(where, "no parameter has such an axis", among)
    if len(labels) not in sizes:
        of = ", ".join(f"{s} places in '{n}'" for s, n in sizes.items())
        count = "1 label was" if len(labels) == 1 else f"{len(labels)} labels were"
        raise UsageError(message(where, f"{count} given.", f"the axis has {of}"))
    try:
        once = set(labels)
    except TypeError as error:
        raise UsageError(
            message(where, "a label is a list or the like.", "labels name rows", _HOW)
        ) from error
    if len(once) < len(labels):
        raise UsageError(message(where, "two labels are the same.", "they tell rows apart"))
    return labels


def _unknown(where: str, what: str, among: Mapping[str, list[tuple[str, int]]]) -> UsageError:
    axes = "; ".join(f"'{n}': {listed([a for a, _ in found])}" for n, found in among.items())
    return UsageError(message(where, f"{what}. The axes are: {axes}.", "", _HOW))
