"""Building an exact `Program`: look, read, decide, and hold the bindings against another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pyro_em.errors import (
    DataError,
    Finding,
    ModelError,
    PyroEMError,
    UsageError,
    as_error,
    message,
    raise_findings,
)
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.conjugate_record import NotConjugate
from pyro_em.graph.enumerated import check_arguments
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.folded import Folded
from pyro_em.graph.lines import Line, NotLinear
from pyro_em.graph.possible import are_possible
from pyro_em.graph.read_lines import parts_at, read_lines
from pyro_em.graph.signatures import KeptSelections
from pyro_em.graph.stretches import LaterTuple
from pyro_em.graph.structure import Structure
from pyro_em.graph.unregistered import unregistered_notes
from pyro_em.plan.conjugates import Conjugates, at_units, conjugate_routes
from pyro_em.plan.cost import budget_problems, contraction_from_structure
from pyro_em.plan.gaussians import (
    explained,
    gaussian_routes,
    require_unweighed,
    with_values,
)
from pyro_em.plan.hyperparameters import unbounded_joints
from pyro_em.plan.known_updates import known_updates
from pyro_em.plan.long_tables import in_long_format
from pyro_em.plan.loops import examine_with_loops, examined_in_loops, trouble
from pyro_em.plan.notes import sites_without_data, support_edges, unconstrained_simplexes
from pyro_em.plan.program import Program, later_kernel
from pyro_em.plan.task import Task, traced
from pyro_em.plan.unrouted import Unrouted, are_of_routes, without_route
from pyro_em.plan.verification import verified
from pyro_em.plan.wishes import matched
from pyro_em.posteriors.elimination import ContractionPlan, LaterContraction
from pyro_em.posteriors.enumeration import check_scales, contraction_of
from pyro_em.posteriors.gaussian_components import Alike, NotSeparate, integrated
from pyro_em.posteriors.gaussian_steps import for_updates
from pyro_em.tracing.dependences import Dependences
from pyro_em.tracing.garbage import fewer_collections
from pyro_em.tracing.given import GivenConjugates, GivenGaussians, without_values
from pyro_em.tracing.loops import ALIGNED, EVENTS, PLAIN, NotVectorized
from pyro_em.tracing.names import names_of
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.parameters import versions_of
from pyro_em.updates.decision import decide_updates
from pyro_em.updates.expansion import expansions_of
from pyro_em.updates.update import Fixed, Gradient, ParameterUpdate, Update


@fewer_collections()
def build_program(
    task: Task,
    *,
    first_look: bool = True,
    refused: Mapping[str, str] | None = None,
    stepwise: bool = False,
) -> Program | Unrouted:
    """Look at a model and its data, decide everything, pay nothing yet.

    Args:
        task: What is wanted.
        first_look: Whether the plain run may advance the random state.
        refused: Ways of reading the indices of vectorised loops that do not serve, and why.
        stepwise: Whether these loops are run over integers.

    Returns:
        The program; where a latent has no route, what there is to say of it.

    Raises:
        PyroEMError: If the model or its data cannot be used, with all findings.
    """
    structure = _examined(task, first_look, refused or {}, stepwise)
    if isinstance(structure, Unrouted):
        long = in_long_format(task, structure.structure)
        if long is not None:
            with suppress(PyroEMError):  # what is wrong is said of the model as it is written
                found = build_program(replace(task, model=long), first_look=False)
                if isinstance(found, Program):
                    return found
        if structure.structure.series is None:
            return _with_continuous(task, structure)
        try:
            found = _with_continuous(task, structure)
        except NotVectorized as error:
            # However indices are read, their latents follow each other in the same way.
            refused = dict.fromkeys((ALIGNED, EVENTS, PLAIN), trouble(error))
            return build_program(task, first_look=False, refused=refused)
        # What is wrong is said of the loop, by the names of its sites.
        is_found = isinstance(found, Program)
        return found if is_found else build_program(task, first_look=False, stepwise=True)
    looked, structure = _folded(structure.looked), _without_sites(structure)
    names = names_of(task.model, task.args, task.kwargs)
    log = task.log(names)
    try:
        if structure.unchecked:
            check_arguments(task.model, task.args, task.kwargs, structure, task.limit)
        selections = KeptSelections()
        graph = traced(task, structure, log, looked, selections)
        if structure.series is not None and not are_possible(log.sites, structure, log.forms):
            raise NotVectorized("some observed value, weight or argument cannot be used")
    except (NotVectorized, PyroEMError) as error:
        if structure.series is not None:
            refused = {**(refused or {}), structure.series.way: trouble(error)}
            return build_program(task, first_look=False, refused=refused)
        if not isinstance(error, ModelError) or not are_of_routes(error.problems):
            raise
        return without_route(structure, error, routes=task.routes)
    looked, log.sites = None, {}  # before the next run has sites of its own
    program = replace(decided(task, structure, graph, log), selections=selections)
    return program if task.look_only else verified(program)


def _folded(looked: Mapping[str, Mapping[str, Any]] | None) -> Folded | None:
    """The sites of a run with tags in little memory: the next run has sites of its own."""
    return None if looked is None else Folded(looked)


def _without_sites(structure: Structure) -> Structure:
    """A structure without what runs traced: of a chain that is as much as the runs themselves."""
    if structure.series is not None:
        return replace(structure, looked=None)
    return replace(structure, looked=None, unobserved={})


def _without_draws(structure: Structure) -> Structure:
    """A structure whose unobserved sites have shapes in place of draws, which take memory."""
    sites = {
        name: {**site, "value": site["value"].new_zeros(()).expand(site["value"].shape)}
        if isinstance(site["value"], torch.Tensor)
        else site
        for name, site in structure.unobserved.items()
    }
    return replace(structure, looked=None, unobserved=sites)


def _with_continuous(task: Task, unrouted: Unrouted) -> Program | Unrouted:
    """A program whose continuous latents are integrated; what stands in the way of one."""
    try:
        found = at_units(task.model, unrouted.structure)
    except NotConjugate as error:  # what is in its way is no matter of its children
        return explained(unrouted, error.finding, linear=True)
    if found is None or unrouted.structure.random_plates:
        return _with_gaussians(task, unrouted)
    try:
        program = _conjugating(task, *found, unrouted.structure)
    except (NotConjugate, NotLinear) as error:
        return explained(unrouted, error.finding)
    except NotSeparate as error:
        return explained(unrouted, error.finding, linear=True)
    if program is None:
        return unrouted
    return program if task.look_only else verified(program)


def _conjugating(
    task: Task, model: GivenConjugates, kernels: Mapping[str, PriorKernel], bare: Structure
) -> Program | None:
    """A program that integrates conjugate latents; None where others have no route.

    Args:
        task: The user's model, and what is wanted of it.
        model: The same with these latents at their units.
        kernels: The kernel of each one's prior.
        bare: The skeleton of the user's model.

    Raises:
        NotConjugate: If a latent has a child that is not conjugate to it.
        NotSeparate: If discrete latents connect elements of a latent.
    """
    _refuse_sums(task, next(iter(model.values)), "conjugate")
    given = replace(task, model=model)
    structure = _examined(given, False, {}, stepwise=True)
    if isinstance(structure, Unrouted):
        return _beside_gaussians(given, model, kernels, structure.structure, bare, task)
    found = Conjugates.of(model, kernels, task.args, task.kwargs, structure)
    looked = _folded(structure.looked)
    notes = tuple(dict.fromkeys((*bare.notes, *structure.notes)))
    structure = replace(structure, looked=None, edges=bare.edges, notes=notes)
    log = task.log(names_of(task.model, task.args, task.kwargs))
    graph = traced(given, structure, log, looked)
    looked, log.sites = None, {}
    graph = found.integrated(graph, task.max_enumeration)
    return on_conjugates(task, decided(given, structure, graph, log), found, _without_sites(bare))


def on_conjugates(task: Task, program: Program, found: Conjugates, bare: Structure) -> Program:
    """A program that knows its conjugate latents, and the user's model without them.

    Args:
        task: The user's model, and what is wanted of it.
        program: Of the model with these latents given.
        found: The latents.
        bare: The skeleton of the user's model.
    """
    structure = program.structure
    return replace(
        program,
        conjugates=found,
        bare=bare,
        routes=LaterTuple(lambda: conjugate_routes(bare, structure, found)),
        rebuild=partial(build_program, task, first_look=False),
    )


def _beside_gaussians(
    given: Task,
    model: GivenConjugates,
    kernels: Mapping[str, PriorKernel],
    structure: Structure,
    bare: Structure,
    task: Task,
) -> Program | None:
    """The same where Gaussian latents have to be integrated as well; None where others have no route.

    Args:
        given: The model with its conjugate latents given.
        model: The same.
        kernels: The kernel of each one's prior.
        structure: Its skeleton.
        bare: That of the user's model.
        task: The user's model, and what is wanted of it.
    """
    gaussians = with_values(model, structure, weighed=True)
    if gaussians is None:
        return None

    def conjugates(inner: Structure) -> Conjugates:
        at_zero = GivenConjugates(GivenGaussians(model.model, gaussians.values), model.values)
        return Conjugates.of(at_zero, kernels, task.args, task.kwargs, inner)

    program = integrating(given, gaussians, structure, conjugates)
    if program is None:
        return None
    again = partial(build_program, task, first_look=False)
    return with_routes(replace(program, bare=_without_sites(bare), rebuild=again))


def _refuse_sums(task: Task, latent: str, kind: str) -> None:
    """Refuse an E-step of sums where a latent is integrated."""
    if task.strategy is not None:
        raise UsageError(
            message(
                f"strategy={task.strategy!r}",
                f"'{latent}' is a {kind} latent, and this E-step is one of sums.",
                "it works on the cells of discrete latents",
                ["use strategy='exact'", "give a guide for the continuous latents"],
            )
        )


def _with_gaussians(task: Task, unrouted: Unrouted) -> Program | Unrouted:
    """A program whose Gaussian latents are integrated; what stands in the way of one."""
    try:
        model = with_values(task.model, unrouted.structure)
        if model is None:
            return unrouted
        program = integrating(task, model, unrouted.structure)
    except NotLinear as error:
        return explained(unrouted, error.finding)
    except NotSeparate as error:
        return explained(unrouted, error.finding, linear=True)
    if program is None:
        return unrouted
    program = with_routes(program)
    return program if task.look_only else verified(program)


def integrating(
    task: Task,
    model: GivenGaussians,
    bare: Structure,
    conjugates: Callable[[Structure], Conjugates] | None = None,
) -> Program | None:
    """A program that integrates Gaussian latents, not verified yet; None where others have no route.

    Args:
        task: The user's model, and what is wanted of it.
        model: The same with values for these latents.
        bare: The skeleton of the user's model.
        conjugates: Reads the conjugate latents beside them, where there are any.

    Raises:
        NotLinear: If a latent has a child that is not linear in it and Gaussian.
        NotSeparate: If discrete latents connect rows of Gaussian ones, or matrices are too large.
    """
    _refuse_sums(task, next(iter(model.values)), "Gaussian")
    given = replace(task, model=model)
    structure = _examined(given, False, {}, bare=bare)
    if isinstance(structure, Unrouted):
        return None
    bound = not task.look_only
    lines = read_lines(model, task.args, task.kwargs, structure, bound=bound)
    looked = _folded(structure.looked)
    notes = tuple(dict.fromkeys((*bare.notes, *structure.notes)))
    structure = replace(structure, looked=None, edges=bare.edges, notes=notes)
    structure = _knowing(structure, lines)
    log = task.log(names_of(without_values(task.model), task.args, task.kwargs))
    found = None if conjugates is None else conjugates(structure)
    alike = Alike() if found is None else found.alike(lines)
    graph = with_lines(given, structure, lines, traced(given, structure, log, looked), alike)
    if found is not None:
        graph = found.integrated(graph, task.max_enumeration)
        require_unweighed(graph)
    program = on_lines(task, decided(given, structure, graph, log), lines, _without_sites(bare))
    return replace(program, conjugates=found)


def _knowing(structure: Structure, lines: Mapping[str, Line]) -> Structure:
    """A skeleton that knows which means are bound apart."""
    if structure.series is not None:
        template = replace(structure.series.template, lines=frozenset(lines))
        structure = replace(structure, series=replace(structure.series, template=template))
    return replace(structure, lines=frozenset(lines))


def with_lines(
    given: Task,
    structure: Structure,
    lines: Mapping[str, Line],
    graph: FactorGraph,
    alike: Alike | None = None,
) -> FactorGraph:
    """The graph of a model, traced with its Gaussian latents at zero, in which these are integrated.

    Args:
        given: The model with its Gaussian latents given.
        structure: Its skeleton.
        lines: How the latents enter each site.
        graph: As it was traced.
        alike: Sites whose spreads are multiples of one latent.

    Raises:
        NotSeparate: If discrete latents connect rows of Gaussian ones, or matrices are too large.
    """
    assert isinstance(given.model, GivenGaussians)
    read = parts_at(lines, given.model, given.args, given.kwargs, structure)
    return integrated(graph, lines, given.max_enumeration, read, alike=alike or Alike())


def on_lines(task: Task, program: Program, lines: Mapping[str, Line], bare: Structure) -> Program:
    """A program that knows the lines of its Gaussian latents, and the user's model without them.

    Args:
        task: The user's model, and what is wanted of it.
        program: Of the model with its Gaussian latents given.
        lines: How the latents enter each site.
        bare: The skeleton of the user's model.
    """
    return replace(
        program,
        lines=lines,
        bare=bare,
        rebuild=partial(build_program, task, first_look=False),
    )


def with_routes(program: Program) -> Program:
    """A program with the rows of its plan, where Gaussian latents are integrated."""
    assert program.bare is not None
    found = program.bare, program.structure, program.lines, program.graph
    own = {} if program.conjugates is None else program.conjugates.rows(program.bare)
    return replace(program, routes=LaterTuple(lambda: gaussian_routes(*found, own)))


def _examined(
    task: Task,
    first_look: bool,
    refused: Mapping[str, str],
    stepwise: bool = False,
    bare: Structure | None = None,
) -> Structure | Unrouted:
    """What two cheap runs say, before anything is paid for."""
    run = task.model, task.args, task.kwargs
    how: dict[str, Any] = {
        "max_plate_nesting": task.max_plate_nesting,
        "first_look": first_look,
        "sparing": True,
        "max_enumeration": task.max_enumeration,
    }
    if bare is not None and bare.series is not None:
        structure, problems = examined_in_loops(*run, bare, **how)
    else:
        structure, problems = examine_with_loops(
            *run, refused=refused, stepwise=stepwise or bare is not None, **how
        )
    n_latent = sum(p.where.startswith("site") and "latent" in p.what for p in problems)
    too_dear: ContractionPlan | None = None
    try:
        cost = contraction_from_structure(structure.sketch)
        found = budget_problems(structure.sketch, cost, task.max_enumeration)
        too_dear = cost if found else None
    except ModelError as error:
        found = [] if problems else list(error.problems)
    problems[n_latent:n_latent] = found
    if are_of_routes(problems):
        if structure.series is None:
            structure = _without_draws(structure)
        return without_route(structure, as_error(problems), routes=task.routes, cost=too_dear)
    if problems:
        raise_findings(_without_integrable(task, structure, problems))
    return structure


def _without_integrable(
    task: Task, structure: Structure, problems: Sequence[Finding]
) -> Sequence[Finding]:
    """Findings without those on latents that may well be integrated once the others are mended."""
    try:
        both = with_values(task.model, structure), at_units(task.model, structure)
    except (NotLinear, NotConjugate):
        return problems
    gaussian, conjugate = both
    latents = set() if gaussian is None else set(gaussian.values)
    # Neither a conjugate prior nor an index tells that the model has no other fault.
    if all(p.latents or p.kind is DataError for p in problems):
        long = in_long_format(task, structure)
        latents |= set() if conjugate is None else set(conjugate[1])
        latents |= set() if long is None else {z for r in long.reads.values() for z in r.latents}
    return [p for p in problems if not (p.latents and set(p.latents) <= latents)] or problems


def decided(
    task: Task,
    structure: Structure,
    graph: FactorGraph,
    log: OperationLog,
    contraction: ContractionPlan | None = None,
) -> Program:
    """A program from its graph: the order of its sums, its updates, its notes; not verified yet.

    Args:
        task: The model with its data.
        structure: Its skeleton.
        graph: The factor graph of an enumerated run.
        log: What that run did.
        contraction: The order of the sums, where it is known.
    """
    if contraction is None:
        contraction = _contraction(structure, graph)
    notes = (*check_scales(graph, contraction), *structure.notes)
    if structure.random_plates:
        plates = ", ".join(f"'{p}'" for p in structure.random_plates)
        notes += (f"plate {plates} draws a random subsample: an exact fit will refuse it.",)
    notes += unregistered_notes(structure.unregistered, graph.parameters, "model")
    requested = matched(task.requested, graph.parameters)
    updates: dict[str, ParameterUpdate] = {}
    if not task.look_only:  # else no binding is known, and no M-step follows
        updates, of_updates = _updates(task, requested, graph)
        notes += of_updates
    notes += tuple(sites_without_data(graph, structure))
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
        operations=log.finished(),
        rebuild=None if task.look_only else partial(build_program, task, first_look=False),
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
    notes = [*unbounded_joints(apart, fixed), *unconstrained_simplexes(apart, updates)]
    return updates, (*notes, *support_edges(apart, updates))


def _contraction(structure: Structure, graph: FactorGraph) -> ContractionPlan:
    """The order of the sums; of a loop over indices only its cost, which a few steps show."""
    if structure.series is None:
        return contraction_of(graph)
    few = contraction_from_structure(structure.sketch)
    return LaterContraction(partial(contraction_of, graph), few.cells, few.largest)
