"""Spreads that have shrunk to the rounding of what they spread about: a density without bound."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.expectations.scatter import component_in_words

_SHARPEST = 1e-6 / torch.finfo(torch.float64).eps
"""Of a shape: logarithms of data times it are numbers to six digits."""

_ROUNDINGS = 4.0  # of the largest location: a spread below it is the rounding of equal data


def refuse_noiseless(
    graph: FactorGraph,
    largest: Mapping[int, tuple[str, float]],
    block: Collection[str],
    values: Mapping[str, Tensor],
) -> None:
    """Name a dispersion that has grown beyond what the digits of data tell.

    Args:
        graph: The factor graph.
        largest: Of each group an argument, and the number beyond which data have no noise.
        block: The parameters that were solved for.
        values: The parameters after the update.

    Raises:
        DegenerateError: If there is one.
    """
    for g, (argument, most) in largest.items():
        group = graph.groups[g]
        names = [n for n in group.bindings[argument].params if n in block]
        found = group.evaluate_arguments(values)[argument]
        if not names or not bool((found > most).any()):
            continue
        value = values[names[0]]
        at = component_in_words(value, 0, int(value.abs().argmax()))
        raise DegenerateError(
            message(
                f"parameter '{names[0]}', {at}",
                f"{argument} of site '{group.members[0]}' would become {float(found.max()):.3g}. The "
                "update was rolled back.",
                "data are predicted to their last digits: without noise the likelihood has no bound",
                [
                    "restart elsewhere: fit(..., init='random', num_restarts=10, seed=0)",
                    f"give it a prior: {names[0]} = pyro.sample('{names[0]}', dist.Gamma(2., 0.1)…) "
                    "and guide='map'",
                    "use fewer components, or one dispersion for all",
                ],
            )
        )


def refuse_collapse(
    graph: FactorGraph,
    spreads: Mapping[int, tuple[str, str]],
    block: Collection[str],
    values: Mapping[str, Tensor],
) -> None:
    """Name a parameter of a spread that collapses on equal data or on a single point.

    Args:
        graph: The factor graph.
        spreads: Of each group the argument that is a spread, and the one that it is about; of an
            inverse spread, which rises as it collapses, none.
        block: The parameters that were solved for.
        values: The parameters after the update.

    Raises:
        DegenerateError: If there is one.
    """
    for g, (spread, about) in spreads.items():
        group = graph.groups[g]
        names = [n for n in group.bindings[spread].params if n in block]
        if not names:
            continue
        arguments = group.evaluate_arguments(values)
        if not about:
            has_collapsed = arguments[spread] >= _SHARPEST
        else:
            largest = arguments[about].abs().amax()
            rounding = torch.finfo(arguments[spread].dtype).eps * largest
            has_collapsed = arguments[spread] <= _ROUNDINGS * rounding
        if not bool(has_collapsed.any()):
            continue
        name, worst = names[0], arguments[spread].reshape(-1)
        value, worst = values[name], worst.amax() if not about else worst.amin()
        size = value.abs()
        place = size.argmax() if not about else size.argmin()
        at = component_in_words(value, 0, int(place))
        end, inside = "zero", "greater_than(1e-3)"
        if not about:
            end, inside = "infinity", "interval(0.0, 1e3)"
        raise DegenerateError(
            message(
                f"parameter '{name}', {at}",
                f"its spread collapses: {spread} would become {float(worst):.3g}. "
                "The update was rolled back.",
                "a component that holds a single point, or equal data, has unbounded likelihood; it is "
                f"estimated from site '{group.members[0]}'",
                [
                    "restart elsewhere: fit(..., init='random', num_restarts=10, seed=0)",
                    f"keep it away from {end}: pyro.param('{name}', ..., "
                    f"constraint=constraints.{inside})",
                    "use fewer components, or share the spread between them",
                ],
            )
        )
