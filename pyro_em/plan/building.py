"""Building an exact `Program`: look, read, decide, and hold the bindings against another run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributions import transform_to

from pyro_em.errors import ModelError, as_error, message, raise_findings
from pyro_em.graph.examination import examine
from pyro_em.graph.unregistered import unregistered_notes
from pyro_em.plan.cost import budget_problems, contraction_from_structure
from pyro_em.plan.hyperparameters import unbounded_joints
from pyro_em.plan.notes import _unconstrained_simplexes
from pyro_em.plan.program import Program, _edges, _first_trace
from pyro_em.plan.routes import Route
from pyro_em.plan.unrouted import Unrouted, are_of_routes, without_route
from pyro_em.plan.wishes import matched
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import check_scales, contraction_of
from pyro_em.posteriors.strategies import EStepStrategy
from pyro_em.tracing.dependences import Reading
from pyro_em.tracing.parameters import parameters_at
from pyro_em.tracing.runs import Model
from pyro_em.updates.decision import decide_updates
from pyro_em.updates.update import Fixed, Gradient, ParameterUpdate, Update


@contextmanager
def _fewer_collections() -> Iterator[None]:
    """Let Python look for garbage more rarely: planning a long chain keeps nearly all it makes."""
    before = gc.get_threshold()
    if before[0]:
        gc.set_threshold(max(before[0], 50_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_fewer_collections()
def build_program(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    requested: Mapping[str, Update],
    gradient: Gradient | None = None,
    max_plate_nesting: int | None,
    max_enumeration: int,
    first_look: bool = True,
    look_only: bool = False,
    strategy: EStepStrategy | None = None,
    routes: tuple[Route, ...] = (),
) -> Program | Unrouted:
    """Look at a model and its data, decide everything, pay nothing yet.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        requested: The user's updates, by parameter name or glob.
        gradient: The update of parameters without a closed form; L-BFGS if None.
        max_plate_nesting: As the user gave it.
        max_enumeration: The budget in cells.
        first_look: Whether the plain run may advance the random state.
        look_only: Whether only an E-step is wanted, so that bindings need not be read.
        strategy: Another E-step than the exact one.
        routes: Rows of the plan where a guide takes part.

    Returns:
        The program; where a latent has no route, what there is to say of it.

    Raises:
        PyroEMError: If the model or its data cannot be used, with all findings.
    """
    structure, problems = examine(
        model,
        args,
        kwargs,
        max_plate_nesting=max_plate_nesting,
        first_look=first_look,
        sparing=True,
        max_enumeration=max_enumeration,
    )
    n_latent = sum(p.where.startswith("site") and "latent" in p.what for p in problems)
    too_dear: ContractionPlan | None = None
    try:
        cost = contraction_from_structure(structure)
        found = budget_problems(structure, cost, max_enumeration)
        too_dear = cost if found else None
    except ModelError as error:
        found = [] if problems else list(error.problems)
    problems[n_latent:n_latent] = found
    if are_of_routes(problems):
        return without_route(structure, as_error(problems), routes=routes, cost=too_dear)
    if problems:
        raise_findings(problems)
    looked, structure = structure.looked, replace(structure, looked=None)
    reading = None if look_only else Reading(model, args, kwargs)
    try:
        graph = _first_trace(model, args, kwargs, structure, max_enumeration, reading, looked)
    except ModelError as error:
        if not are_of_routes(error.problems):
            raise
        return without_route(structure, error, routes=routes)
    contraction = contraction_of(graph)
    notes = (*check_scales(graph, contraction), *structure.notes)
    if structure.random_plates:
        plates = ", ".join(f"'{p}'" for p in structure.random_plates)
        notes += (f"plate {plates} draws a random subsample: an exact fit will refuse it.",)
    notes += unregistered_notes(structure.unregistered, graph.parameters, "model")
    updates = decide_updates(graph, matched(requested, graph.parameters), gradient)
    fixed = {n for n, u in updates.items() if isinstance(u.update, Fixed)}
    notes += tuple(unbounded_joints(graph, fixed))
    notes += tuple(_unconstrained_simplexes(graph, updates))
    notes += tuple(_edges(graph, updates))
    program = Program(
        model,
        args,
        kwargs,
        structure,
        graph,
        contraction,
        updates,
        compiled=False,
        notes=notes,
        look_only=look_only,
        gradient=gradient,
        strategy=strategy,
        routes=routes,
    )
    if reading is None:
        return program
    leaves = [p.unconstrained for p in graph.parameters.values()]
    program.dependences = reading.finished(leaves)
    program.rebuild = partial(
        build_program,
        model,
        args,
        kwargs,
        requested=requested,
        gradient=gradient,
        max_plate_nesting=max_plate_nesting,
        max_enumeration=max_enumeration,
        first_look=False,
        strategy=strategy,
        routes=routes,
    )
    off = _verify(program)
    program.compiled = graph.is_static and not off
    if off:
        distrust(program, off)
        random = program.disagreements(random_seed=21)
        if random and not structure.random_plates:
            site, argument = random[0]
            program.notes += (
                message(
                    f"site '{site}' ({argument})",
                    "the model draws random numbers that reach it.",
                    "every step uses one and the same draw; another call would draw others",
                    ["draw outside the model and pass the numbers as an argument"],
                ),
            )
    return program


def distrust(program: Program, off: Sequence[tuple[str, str]]) -> None:
    """Hand every parameter of a site whose bindings are wrong to a gradient step."""
    program.compiled = False
    sites = {site for site, _ in off}
    updates = dict(program.updates)
    for group in program.graph.groups:
        if not sites.intersection(group.members) and "model" not in sites:
            continue
        for name in group.params:
            if isinstance(updates[name].update, (Gradient, Fixed)):
                continue
            where = ", ".join(f"'{s}' ({a})" for s, a in list(off)[:3])
            updates[name] = ParameterUpdate(
                name,
                program.gradient or Gradient(),
                f"the model changes {where} in a way that no binding shows "
                "(detach, .item(), a branch on a value, randomness)",
            )
    program.updates = updates


def _verify(program: Program) -> list[tuple[str, str]]:
    """Trace once with all free parameters moved inside their constraints and another random state."""
    generator = torch.Generator().manual_seed(20)
    moved = {}
    direct = {}
    for name, p in program.graph.parameters.items():
        if not p.unconstrained.is_floating_point():
            continue
        u = p.unconstrained.detach()
        noise = torch.randn(u.shape, generator=generator, dtype=torch.float64, device="cpu").to(u)
        new = u + 0.1 * noise
        if p.leaf is p.unconstrained:
            direct[name] = new
        with torch.no_grad():
            moved[name] = transform_to(p.constraint)(new)
    with parameters_at(
        {n: program.graph.parameters[n] for n in direct}, direct, unconstrained=True
    ):
        return program.disagreements(moved, random_seed=20)
