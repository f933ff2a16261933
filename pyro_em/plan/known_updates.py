"""Updates that an earlier run of a model decided, where no number of a run enters the decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.told_by_selections import told_by_selections
from pyro_em.updates.update import Gradient, ParameterUpdate, Update

Decided = tuple[dict[str, ParameterUpdate], tuple[str, ...]]

_ASKED = "updates"


def known_updates(
    graph: FactorGraph,
    requested: Mapping[str, Update],
    gradient: Gradient | None,
    decide: Callable[[], Decided],
) -> Decided:
    """What is decided of each parameter, and the notes: as an earlier run decided it, if it did.

    Args:
        graph: The graph of an M-step.
        requested: The user's wishes by parameter.
        gradient: The update of parameters without a closed form.
        decide: Decides anew.
    """
    told = None if requested or gradient is not None else told_by_selections(graph)
    if told is None:
        return decide()
    found: Decided | None = told.recall(_ASKED)
    if found is None:
        found = decide()
        told.keep(found, _ASKED)
    updates, notes = found
    return dict(updates), notes
