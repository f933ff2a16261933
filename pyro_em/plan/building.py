"""Building an exact `Program`: look, read, decide, and hold the bindings against another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from pyro_em.errors import ModelError, PyroEMError
from pyro_em.graph.bindings.signatures import KeptSelections
from pyro_em.graph.enumerated import check_arguments
from pyro_em.graph.findings.possible import are_possible
from pyro_em.graph.structure import Structure
from pyro_em.plan.continuous import with_continuous
from pyro_em.plan.decisions import decided
from pyro_em.plan.examined import examined, folded, without_sites
from pyro_em.plan.long_tables import in_long_format
from pyro_em.plan.loops import trouble
from pyro_em.plan.program import Program
from pyro_em.plan.task import Task, traced
from pyro_em.plan.unrouted import Unrouted, are_of_routes, without_route
from pyro_em.plan.verification import verified
from pyro_em.tracing.loops import ALIGNED, EVENTS, PLAIN, NotVectorized
from pyro_em.tracing.names import names_of

Instead = Callable[[Structure], Program | None]


def build_program(
    task: Task, *, first_look: bool = True, instead: Instead | None = None
) -> Program | Unrouted:
    """Look at a model and its data, decide everything, pay nothing yet.

    Args:
        task: What is wanted.
        first_look: Whether the plain run may advance the random state.
        instead: Asked once the skeleton is known, before latents are enumerated: a program that takes
            the place of the model's own.

    Returns:
        The program; where a latent has no route, what there is to say of it.

    Raises:
        PyroEMError: If the model or its data cannot be used, with all findings.
    """
    found = _built(task, first_look, {}, instead=instead)
    return found if isinstance(found, Unrouted) else rebuildable(task, found)


def rebuildable(task: Task, program: Program) -> Program:
    """A program that knows how its model is read anew; one that knows already is left as it is.

    Args:
        task: What was wanted of the user's model.
        program: What was made of it.
    """
    if program.rebuild is not None:
        return program
    return replace(program, rebuild=partial(build_program, task, first_look=False))


def _built(
    task: Task,
    first_look: bool,
    refused: Mapping[str, str],
    stepwise: bool = False,
    instead: Instead | None = None,
) -> Program | Unrouted:
    """The program; vectorised loops are read in none of the ways refused, each with a reason."""
    structure = examined(task, first_look, refused, stepwise)
    if isinstance(structure, Unrouted):
        long = in_long_format(task, structure.structure)
        if long is not None:
            with suppress(PyroEMError):  # what is wrong is said of the model as it is written
                found = build_program(replace(task, model=long), first_look=False)
                if isinstance(found, Program):
                    return found
        if structure.structure.series is None:
            return with_continuous(task, structure)
        try:
            found = with_continuous(task, structure)
        except NotVectorized as error:
            # However indices are read, their latents follow each other in the same way.
            refused = dict.fromkeys((ALIGNED, EVENTS, PLAIN), trouble(error))
            return _built(task, False, refused, instead=instead)
        # What is wrong is said of the loop, by the names of its sites.
        is_found = isinstance(found, Program)
        return found if is_found else _built(task, False, {}, True, instead)
    other = None if instead is None else instead(structure)
    if other is not None:
        return other
    looked, structure = folded(structure.looked), without_sites(structure)
    names = names_of(task.model, task.args, task.kwargs)
    log = task.log(names, own=True)
    try:
        if structure.unchecked:
            check_arguments(task.model, task.args, task.kwargs, structure, task.limit)
        selections = KeptSelections()
        graph = traced(task, structure, log, looked, selections)
        if structure.series is not None and not are_possible(log.sites, structure, log.forms):
            raise NotVectorized("some observed value, weight or argument cannot be used")
    except (NotVectorized, PyroEMError) as error:
        if structure.series is not None:
            refused = {**refused, structure.series.way: trouble(error)}
            return _built(task, False, refused)
        if not isinstance(error, ModelError) or not are_of_routes(error.problems):
            raise
        return without_route(structure, error, routes=task.routes)
    looked, log.sites = None, {}  # before the next run has sites of its own
    program = replace(decided(task, structure, graph, log), selections=selections)
    return program if task.look_only else verified(program)
