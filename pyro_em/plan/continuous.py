"""Programs whose continuous latents are integrated: Gaussian ones linearly, conjugate ones by pairs.

The model is run with these latents given, Gaussian ones at zero and conjugate ones at their units, and
what sites read of them is put into the graph of that run as blocks of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pyro_em.errors import UsageError, message
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.conjugate_children.conjugate_record import NotConjugate
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.gaussian_lines.lines import Line, NotLinear
from pyro_em.graph.gaussian_lines.lines_by_rows import are_of_rows, lines_of
from pyro_em.graph.gaussian_lines.read_lines import parts_at
from pyro_em.graph.stretches import LaterTuple
from pyro_em.graph.structure import Structure
from pyro_em.plan.conjugates import Conjugates, at_units, conjugate_routes
from pyro_em.plan.decisions import decided
from pyro_em.plan.examined import examined, folded, without_sites
from pyro_em.plan.gaussians import explained, gaussian_routes, require_unweighed, with_values
from pyro_em.plan.program import Program
from pyro_em.plan.task import Task, traced
from pyro_em.plan.unrouted import Unrouted
from pyro_em.plan.verification import verified
from pyro_em.posteriors.continuous.gaussian_components import Alike, NotSeparate, integrated
from pyro_em.tracing.given import GivenConjugates, GivenGaussians, without_values
from pyro_em.tracing.names import names_of


def with_continuous(task: Task, unrouted: Unrouted) -> Program | Unrouted:
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
    structure = examined(given, False, {}, stepwise=True)
    if isinstance(structure, Unrouted):
        return _beside_gaussians(given, model, kernels, structure.structure, bare, task)
    found = Conjugates.of(model, kernels, task.args, task.kwargs, structure)
    looked = folded(structure.looked)
    notes = tuple(dict.fromkeys((*bare.notes, *structure.notes)))
    structure = replace(structure, looked=None, edges=bare.edges, notes=notes)
    log = task.log(names_of(task.model, task.args, task.kwargs), own=True)
    graph = traced(given, structure, log, looked)
    looked, log.sites = None, {}
    graph = found.integrated(graph, task.max_enumeration)
    return on_conjugates(decided(given, structure, graph, log), found, without_sites(bare))


def on_conjugates(program: Program, found: Conjugates, bare: Structure) -> Program:
    """A program that knows its conjugate latents, and the user's model without them.

    Args:
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
    return with_routes(replace(program, bare=without_sites(bare)))


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
    structure = examined(given, False, {}, bare=bare)
    if isinstance(structure, Unrouted):
        return None
    bound = not task.look_only
    lines = lines_of(model, task.args, task.kwargs, structure, bound=bound)
    looked = folded(structure.looked)
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
    program = decided(given, structure, graph, log)
    return replace(program, lines=lines, bare=without_sites(bare), conjugates=found)


def _knowing(structure: Structure, lines: Mapping[str, Line]) -> Structure:
    """A skeleton that knows which means are bound apart."""
    if structure.series is not None:
        template = replace(structure.series.template, lines=frozenset(lines))
        structure = replace(structure, series=replace(structure.series, template=template))
    return replace(structure, lines=frozenset(lines), lines_of_rows=are_of_rows(lines))


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


def with_routes(program: Program) -> Program:
    """A program with the rows of its plan, where Gaussian latents are integrated."""
    assert program.bare is not None
    found = program.bare, program.structure, program.lines, program.graph
    own = {} if program.conjugates is None else program.conjugates.rows(program.bare)
    return replace(program, routes=LaterTuple(lambda: gaussian_routes(*found, own)))
