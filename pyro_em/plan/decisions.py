"""A program from its graph: the order of its sums, its updates, its notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.structure import Structure
from pyro_em.graph.unregistered import unregistered_notes
from pyro_em.plan.cost import contraction_from_structure
from pyro_em.plan.hyperparameters import unbounded_joints
from pyro_em.plan.known_updates import known_updates
from pyro_em.plan.notes import notes_on_graph, notes_on_updates
from pyro_em.plan.program import Program, later_kernel
from pyro_em.plan.task import Task
from pyro_em.plan.wishes import matched
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.posteriors.elimination import ContractionPlan, LaterContraction
from pyro_em.posteriors.enumeration import check_scales, contraction_of
from pyro_em.tracing.dependences import Dependences
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.parameters import versions_of
from pyro_em.updates.decisions.decision import decide_updates
from pyro_em.updates.regressions.expansion import expansions_of
from pyro_em.updates.update import Fixed, Gradient, ParameterUpdate, Update


def decided(
    task: Task,
    structure: Structure,
    graph: FactorGraph,
    log: OperationLog,
    contraction: ContractionPlan | None = None,
    operations: tuple[Any, ...] | None = None,
    notes: tuple[str, ...] | None = None,
) -> Program:
    """A program from its graph: the order of its sums, its updates, its notes; not verified yet.

    Args:
        task: The model with its data.
        structure: Its skeleton.
        graph: The factor graph of an enumerated run.
        log: What that run did.
        contraction: The order of the sums, where it is known.
        operations: Those of the run, where it is known to be one that was noted before.
        notes: What there is to say of it, where only an E-step is wanted and that is known.
    """
    if contraction is None:
        contraction = _contraction(structure, graph)
    requested = matched(task.requested, graph.parameters)
    updates: dict[str, ParameterUpdate] = {}
    if notes is None:
        notes = (*check_scales(graph, contraction), *structure.notes)
        if structure.random_plates:
            plates = ", ".join(f"'{p}'" for p in structure.random_plates)
            notes += (f"plate {plates} draws a random subsample: an exact fit will refuse it.",)
        notes += unregistered_notes(structure.unregistered, graph.parameters, "model")
        if not task.look_only:  # else no binding is known, and no M-step follows
            updates, of_updates = _updates(task, requested, graph)
            notes += of_updates
        notes += notes_on_graph(graph, structure)
    leaves = [p.unconstrained for p in graph.parameters.values()]
    return Program(
        task.model,
        task.args,
        task.kwargs,
        structure,
        graph,
        contraction,
        updates,
        compiled=False,
        traced_at=versions_of(graph.parameters),
        on_sums=later_kernel(graph, updates),
        notes=notes,
        look_only=task.look_only,
        gradient=task.gradient,
        strategy=task.strategy,
        routes=task.routes,
        dependences=Dependences() if log.reading is None else log.reading.finished(leaves),
        operations=log.finished() if operations is None else operations,
    )


def _updates(
    task: Task, requested: Mapping[str, Update], graph: FactorGraph
) -> tuple[dict[str, ParameterUpdate], tuple[str, ...]]:
    """What an M-step does with each parameter, and what there is to say of that."""
    apart = for_updates(graph)
    decide = partial(_decided_anew, apart, requested, task.gradient)
    return known_updates(apart, requested, task.gradient, decide)


def _decided_anew(
    apart: FactorGraph, requested: Mapping[str, Update], gradient: Gradient | None
) -> tuple[dict[str, ParameterUpdate], tuple[str, ...]]:
    updates = decide_updates(apart, requested, gradient)
    for e in expansions_of(apart, updates):
        reason = f"{updates[e.parameter].reason}, with parameter expansion"
        updates[e.parameter] = replace(updates[e.parameter], reason=reason)
    fixed = {n for n, u in updates.items() if isinstance(u.update, Fixed)}
    return updates, (*unbounded_joints(apart, fixed), *notes_on_updates(apart, updates))


def _contraction(structure: Structure, graph: FactorGraph) -> ContractionPlan:
    """The order of the sums; of a loop over indices only its cost, which a few steps show."""
    if structure.series is None:
        return contraction_of(graph)
    few = contraction_from_structure(structure.sketch)
    return LaterContraction(partial(contraction_of, graph), few.cells, few.largest)
