"""Which update each parameter gets: the strongest that is exact, read off the bindings of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.decisions.strongest import strongest_updates
from pyro_em.updates.decisions.together import solved_together
from pyro_em.updates.update import (
    EXACT,
    ClosedForm,
    Fixed,
    Gradient,
    LeastSquares,
    Newton,
    NewtonOnProfile,
    NewtonOnSums,
    NoUpdate,
    ParameterUpdate,
    Update,
)


def forgets(updates: Mapping[str, ParameterUpdate]) -> bool:
    """Whether an M-step goes to a maximum wherever the parameters were, and so forgets other data.

    A single step of an optimiser moves them a little.
    """
    moving = [u.update for u in updates.values() if not isinstance(u.update, (Fixed, NoUpdate))]
    return any(not isinstance(u, Gradient) or u.optimizer is None for u in moving)


def decide_updates(
    graph: FactorGraph, requested: Mapping[str, Update], default: Gradient | None = None
) -> dict[str, ParameterUpdate]:
    """Choose the strongest update that is exact for each parameter; nothing is evaluated.

    Args:
        graph: A traced graph with bindings.
        requested: The user's wishes by exact parameter name.
        default: The gradient update where there is no closed form; L-BFGS if None.
    """
    decided = {}
    for name, strongest in strongest_updates(graph, graph.parameters).items():
        wish = requested.get(name)
        if wish is None and default is not None and isinstance(strongest.update, Gradient):
            decided[name] = ParameterUpdate(name, default, strongest.reason)
        else:
            decided[name] = strongest if wish is None else _granted(strongest, wish)
    return solved_together(graph, decided, default)


def _granted(strongest: ParameterUpdate, wish: Update) -> ParameterUpdate:
    if isinstance(wish, ClosedForm) and isinstance(strongest.update, ClosedForm):
        return replace(strongest, update=wish)
    if isinstance(wish, (LeastSquares, Newton)) and isinstance(strongest.update, type(wish)):
        return strongest
    if isinstance(wish, Newton) and isinstance(strongest.update, NewtonOnSums | NewtonOnProfile):
        return strongest
    if isinstance(wish, EXACT):
        return replace(
            strongest, reason=f"{type(wish).__name__} was asked for, but {strongest.reason}"
        )
    return ParameterUpdate(strongest.name, wish, "as the user asked")


def groups_reached(graph: FactorGraph, names: set[str]) -> list[int]:
    """Indices of the groups whose density depends on any of the parameters."""

    def reaches(group: Group) -> bool:
        if group.family is None and group.raw_params is None:
            return True
        return bool(names.intersection(group.params))

    return [i for i, g in enumerate(graph.groups) if reaches(g)]
