"""Updates that were decided in an earlier run of a model, where no number of a run enters the decision.

Where every argument selects its elements from parameters, what is decided follows from which elements
those are, from the families and from the constraints. The selections of a model are kept from run to
run (`pyro_em.graph.bindings.signatures.KeptSelections`), and remember what was decided of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro_em.graph.bindings.binding import Selection
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.update import Gradient, ParameterUpdate, Update

Decided = tuple[dict[str, ParameterUpdate], tuple[str, ...]]


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
    groups = graph.groups
    if (
        requested
        or gradient is not None
        or not groups
        or not all(map(_is_told_by_selections, groups))
    ):
        return decide()
    selections = [s for g in groups for b in g.bindings.values() for s in b.selections]
    asked = (
        known_updates,
        tuple(map(_form, groups)),
        tuple((n, p.leaf.shape, p.leaf.dtype) for n, p in graph.parameters.items()),
    )
    objects = [
        *selections,
        *(g.family for g in groups),
        *(p.constraint for p in graph.parameters.values()),
    ]
    memory = selections[0].remembered
    before, found = memory.get(asked, ((), None))
    if len(before) != len(objects) or any(a is not b for a, b in zip(before, objects, strict=True)):
        found = decide()
        memory[asked] = objects, found
    updates, notes = found
    return dict(updates), notes


def _is_told_by_selections(group: Group) -> bool:
    """Whether nothing but selections of whole arguments says what the parameters of a group are."""
    return (
        group.family is not None
        and len(group.members) == 1
        and group.role in (Role.LATENT, Role.DATA)
        and group.nested is None
        and group.value_binding is None
        and not (group.hyperparameters or group.edges or group.lines or group.reads)
        and group.mask is None
        and group.elements is None
        and group.is_unscaled
        and len(group.bindings) > 0
        and all(
            b.how == "selection" and len(b.selections) == 1 and _is_plain(b.selections[0])
            for b in group.bindings.values()
        )
    )


def _is_plain(selection: Selection) -> bool:
    return selection.is_whole and not selection.maps and selection.factor is None


def _form(group: Group) -> tuple[Any, ...]:
    return (
        group.members,
        group.dims,
        group.role,
        group.n_plates,
        group.event_dims,
        group.distribution,
        group.matrix,
        group.raw_params,
        len(group.sizes),
        tuple((n, b.normalise, b.link) for n, b in group.bindings.items()),
    )
