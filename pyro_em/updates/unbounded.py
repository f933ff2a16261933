"""Objectives without a maximiser: what runs off, and the sentence on it."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np

from pyro_em.errors import message
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.decisions.decision import groups_reached


@dataclass(frozen=True)
class Runaway:
    """A coordinate along which the objective rises without end.

    Attributes:
        parameter: Its name.
        element: Its flat index in the unconstrained value.
        gain: What the objective still gains there, in nats per unit of the unconstrained value.
    """

    parameter: str
    element: int
    gain: float


def edge_fixes(name: str) -> list[str]:
    """What to try for a parameter at which a support ends."""
    return [
        f"set it to the smallest or largest row, and hold it: updates={{'{name}': Fixed()}}",
        "use a distribution whose support does not depend on it: a Normal, or a Beta on a known "
        "interval",
    ]


def unbounded_in_words(graph: FactorGraph, runaway: Runaway, now: float | None = None) -> str:
    """The sentence on an objective that has no maximiser.

    Args:
        graph: The factor graph.
        runaway: The coordinate that runs off.
        now: The element's value there; that in the param store where None.
    """
    name = runaway.parameter
    parameter = graph.parameters[name]
    value = parameter.value()
    shape = parameter.unconstrained.shape if now is None else value.shape
    place = tuple(int(i) for i in np.unravel_index(runaway.element, shape)) if shape else ()
    which = f"component {place[0] if len(place) == 1 else place}" if place else "its only component"
    if now is None and value.shape == shape:
        now = float(value[place])
    shown = "" if now is None else f" (now {now:.3g})"
    gain = f"{runaway.gain:.3g} nats per unit" if isfinite(runaway.gain) else "with each unit"
    members = [graph.groups[g].members[0] for g in groups_reached(graph, {name})]
    sites = ", ".join(f"site '{n}'" for n in dict.fromkeys(members))
    if any(name in g.edges for g in graph.groups):
        return message(
            f"parameter '{name}', {which}",
            f"the expected log joint rises up to a jump to −inf along it{shown}. The update was rolled "
            "back.",
            f"the support of {sites} ends at it: the maximum is at the outermost row that the "
            "component may have produced, and a gradient does not see it",
            edge_fixes(name),
        )
    return message(
        f"parameter '{name}', {which}",
        f"the expected log joint rises without end along it{shown}: where numbers end it still gains "
        f"{gain} of its unconstrained value. The update was rolled back.",
        "a density without bound: a spread that collapses on equal data or on a single point, or a "
        f"parameter that the data do not hold back; it is read by {sites}",
        [
            "keep it away from its limits: constraint=constraints.interval(low, high), or "
            "greater_than(low)",
            "give it a prior that is zero at the limit (InverseGamma for a scale) and guide='map'",
            "restart elsewhere: fit(..., init='random', num_restarts=10, seed=0)",
        ],
    )
