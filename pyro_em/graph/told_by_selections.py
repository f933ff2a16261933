"""Graphs in which no number of a run enters what is decided of them, and what was decided before.

Where every argument selects its elements from parameters, decisions follow from which elements those
are, from the families and from the constraints. The selections of a model are kept from run to run
(`pyro_em.graph.bindings.signatures.KeptSelections`), and remember what was decided of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_em.graph.bindings.binding import Selection
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role


@dataclass(frozen=True, eq=False)
class Told:
    """What tells a graph apart from others of which something else may be decided.

    Attributes:
        form: What is equal in a graph of the same form.
        objects: What is the very same object there: selections, families and constraints.
        memory: What was decided of graphs that read the first of these selections.
    """

    form: Hashable
    objects: tuple[Any, ...]
    memory: dict[Any, Any]

    def recall(self, asked: Hashable, *others: Any) -> Any:
        """What was decided of such a graph before; None where nothing was.

        Args:
            asked: Which decision, and what it depends on beside the form.
            others: Objects that it depends on as well.
        """
        objects = (*self.objects, *others)
        before, found = self.memory.get((asked, self.form), ((), None))
        same = len(before) == len(objects)
        same = same and all(a is b for a, b in zip(before, objects, strict=True))
        return found if same else None

    def keep(self, found: Any, asked: Hashable, *others: Any) -> None:
        """Remember a decision, which holds no number of its run."""
        self.memory[asked, self.form] = (*self.objects, *others), found


def told_by_selections(graph: FactorGraph) -> Told | None:
    """What tells a graph apart; None where more than selections of whole arguments does."""
    groups = graph.groups
    if not groups or not all(map(_is_told, groups)):
        return None
    selections: Sequence[Selection] = [
        s for g in groups for b in g.bindings.values() for s in b.selections
    ]
    form = (
        tuple(map(_form, groups)),
        tuple((n, p.leaf.shape, p.leaf.dtype) for n, p in graph.parameters.items()),
    )
    objects = (
        *selections,
        *(g.family for g in groups),
        *(p.constraint for p in graph.parameters.values()),
    )
    return Told(form, objects, selections[0].remembered)


def _is_told(group: Group) -> bool:
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
