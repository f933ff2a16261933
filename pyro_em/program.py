"""Program: a model with its data, ready for E-steps and M-steps, compiled or generic.

The generic path runs the Python model at each evaluation and stands on its own. Where every binding
is a selection or affine, and a run with moved parameters and another random state confirms it, the
program is compiled: arguments flow from the parameters through the bindings, and the model is not
run again except to verify.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_em import _pyro
from pyro_em._checked import as_tensor
from pyro_em._errors import ModelError, UsageError, as_error, message, raise_problems, warn
from pyro_em._portable import StaysHere
from pyro_em._pyro import Role
from pyro_em.contraction import ContractionPlan
from pyro_em.dependences import Dependences, Reading, changed_since
from pyro_em.e_step import check_scales, contraction_of
from pyro_em.families import Kind
from pyro_em.graph import FactorGraph, Group, Resized, check_arguments, trace_graph
from pyro_em.hyperparameters import unbounded_joints
from pyro_em.m_step import (
    MStepReport,
    MStepState,
    ParameterUpdate,
    Update,
    decide_updates,
    edge_fixes,
    m_step,
)
from pyro_em.m_step.updates import Fixed, Gradient, bounds
from pyro_em.plan import (
    Plan,
    Route,
    budget_problems,
    contraction_from_structure,
    observations_of,
    routes_of,
)
from pyro_em.posterior import Posterior
from pyro_em.posteriors import exact_posterior
from pyro_em.strategies import (
    Annealed,
    EStepStrategy,
    Hard,
    MonteCarlo,
    e_step_of,
    gives_up,
)
from pyro_em.structure import Structure, examine
from pyro_em.unregistered import unregistered_notes
from pyro_em.unrouted import Unrouted, are_of_routes, without_route

_PART = 2**20  # cells that are compared at once


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The factors at some parameter values.

    Attributes:
        graph: The graph that they belong to.
        arguments: Per group.
        tables: Log densities per group.
    """

    graph: FactorGraph
    arguments: list[dict[str, Tensor]]
    tables: list[Tensor]


@dataclass(eq=False)
class Program(StaysHere):
    """A model with its data; see the module's text.

    Attributes:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: The skeleton found by looking.
        graph: The latest trace.
        contraction: The elimination order.
        updates: What was decided per parameter.
        compiled: Whether evaluations skip the model.
        notes: Warnings in words.
        traced_at: Versions of the parameters at the latest trace, so that it can be used again.
        look_only: Whether bindings are left out, because no M-step follows.
        gradient: The update of parameters without a closed form.
        strategy: Another E-step than the exact one.
        routes: Rows of the plan where a guide takes part.
        dependences: What it was read from, beside the parameters.
        rebuild: Reads the model anew.
        readings: How often it was read anew.
        has_told_of_sizes: Whether a plate or support whose size changes has been told of.
    """

    model: _pyro.Model
    args: tuple
    kwargs: dict[str, Any]
    structure: Structure
    graph: FactorGraph
    contraction: ContractionPlan
    updates: Mapping[str, ParameterUpdate]
    compiled: bool
    notes: tuple[str, ...] = ()
    state: MStepState = field(default_factory=MStepState)
    look_only: bool = False
    gradient: Gradient | None = None
    strategy: EStepStrategy | None = None
    routes: tuple[Route, ...] = ()
    dependences: Dependences = field(default_factory=Dependences)
    rebuild: Callable[[], Program | Unrouted] | None = None
    readings: int = 0
    has_told_of_sizes: bool = False
    traced_at: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.traced_at = self.versions()

    def versions(self) -> tuple[int, ...]:
        """Counts of in-place writes: equal as long as no parameter has been written."""
        return tuple(p.unconstrained._version for p in self.graph.parameters.values())

    def is_changed(self) -> bool:
        """Whether something that was read, the parameters excepted, is another by now."""
        return self.dependences.is_changed()

    def reread(self) -> None:
        """Read the model anew, on the data as they are now."""
        assert self.rebuild is not None
        fresh = self.rebuild()
        if isinstance(fresh, Unrouted):
            raise fresh.error
        self.structure, self.graph, self.contraction = (
            fresh.structure,
            fresh.graph,
            fresh.contraction,
        )
        self.updates, self.compiled = fresh.updates, fresh.compiled
        self.dependences, self.traced_at = fresh.dependences, fresh.traced_at
        self.readings += 1

    def require_unchanged(self, dependences: Dependences, what: str) -> None:
        """Refuse to compute late what belongs to the data of a fit, if those are others by now.

        Args:
            dependences: What the fit was read from.
            what: What somebody asks for.

        Raises:
            UsageError: If anything of it was changed.
        """
        # A compiled program has read all that it needs; a generic one runs the model again.
        seen = dependences.is_written() if self.compiled else dependences.is_changed()
        if seen or self.dependences is not dependences:
            raise UsageError(changed_since(what))

    def evaluate(self, values: Mapping[str, Tensor] | None = None) -> Evaluation:
        """The factors at the current parameters, or of a compiled program at other values."""
        with torch.no_grad():
            if self.compiled or values is not None:
                values = values or _pyro.values_of(self.graph.parameters)
                arguments = [g.evaluate_arguments(values) for g in self.graph.groups]
                at = [g.evaluate_value(values) for g in self.graph.groups]
            else:
                if self.versions() != self.traced_at:
                    self.graph = self._trace(with_bindings=not self.look_only)
                    self.traced_at = self.versions()
                arguments = [dict(g.arguments) for g in self.graph.groups]
                at = [g.value for g in self.graph.groups]
            tables = [
                g.log_density(a, x)
                for g, a, x in zip(self.graph.groups, arguments, at, strict=True)
            ]
        return Evaluation(self.graph, arguments, [t.detach() for t in tables])

    def posterior(self, evaluation: Evaluation | None = None) -> Posterior:
        """The exact E-step."""
        evaluation = evaluation or self.evaluate()
        return exact_posterior(evaluation.graph, self.contraction, evaluation.tables)

    def e_step(self, evaluation: Evaluation, index: int = 0) -> Posterior:
        """The E-step of the strategy; ``index`` is the number of the step."""
        return e_step_of(
            self.strategy, evaluation.graph, self.contraction, evaluation.tables, index
        )

    @property
    def is_monotone(self) -> bool:
        """Whether the objective can never fall by more than rounding."""
        if isinstance(self.strategy, (MonteCarlo, Annealed)):
            return False
        return not any(
            isinstance(u.update, Gradient) and u.update.optimizer is not None
            for u in self.updates.values()
        )

    @property
    def objective_name(self) -> str:
        """What a fit raises, in words."""
        if isinstance(self.strategy, Hard):
            return "log joint at the most probable assignment"
        if any(g.role is Role.POINT for g in self.graph.groups):
            return "log evidence + log prior"
        return "log evidence"

    def may_stop(self, step: int) -> bool:
        """Whether a stopping rule has a meaning after ``step`` steps."""
        if isinstance(self.strategy, MonteCarlo):
            return False
        return not isinstance(self.strategy, Annealed) or self.strategy.beta(max(step - 6, 0)) == 1

    def m_step(self, counts: Sequence[Tensor], evaluation: Evaluation) -> MStepReport:
        """The M-step; parameters are written in place."""
        return m_step(
            evaluation.graph,
            self.updates,
            counts,
            evaluation.arguments,
            self.log_densities_at,
            self.state,
        )

    def log_densities_at(
        self, values: Mapping[str, Tensor], groups: Sequence[int]
    ) -> dict[int, Tensor]:
        """Differentiable log densities of some groups at constrained values."""
        if self.compiled:
            return {g: self.graph.groups[g].log_density_at(values) for g in groups}
        try:
            graph = self._trace(values=values, with_bindings=False)
        except Resized as error:  # a trial point: the search goes on without it
            if not self.has_told_of_sizes:
                self.has_told_of_sizes = True
                warn(str(error))
            raise
        wanted = {name for g in groups for name in self.graph.groups[g].members}
        by_site = {
            name: table
            for group in graph.groups
            if wanted.intersection(group.members)
            for name, table in zip(group.members, group.log_density().unbind(0), strict=True)
        }
        return {
            g: torch.stack([by_site[name] for name in self.graph.groups[g].members]) for g in groups
        }

    def _trace(
        self,
        values: Mapping[str, Tensor] | None = None,
        random_seed: int | None = None,
        with_bindings: bool = True,
    ) -> FactorGraph:
        with self.dependences.own_run():
            return trace_graph(
                self.model,
                self.args,
                self.kwargs,
                self.structure,
                values=values,
                random_seed=random_seed,
                with_bindings=with_bindings,
            )

    def disagreements(
        self, values: Mapping[str, Tensor] | None = None, random_seed: int | None = None
    ) -> list[tuple[str, str]]:
        """Sites and arguments of a fresh trace that differ from what the bindings predict."""
        current = _pyro.values_of(self.graph.parameters)
        predicted_at = {**current, **(values or {})}
        try:
            fresh = self._trace(values=values, random_seed=random_seed, with_bindings=False)
        except Resized as error:
            if not self.has_told_of_sizes:
                self.has_told_of_sizes = True
                self.notes += (str(error),)
            return [("model", "the size of a plate or a support")]
        except ModelError:
            return [("model", "its sites")]
        found = []
        for group in self.graph.groups:
            arguments = group.evaluate_arguments(predicted_at)
            at = group.evaluate_value(predicted_at)
            if _agrees(group, arguments, at, fresh):
                continue
            for i, site in enumerate(group.members):
                traced = dict(_static_parts(*fresh.group_of(site)))
                for name, tensor in _static_parts(group, i, arguments, at):
                    binding = group.bindings.get(name)
                    if binding is not None and not binding.is_static:
                        continue
                    if name not in traced or not _same(tensor, traced[name]):
                        found.append((site, name))
        return found

    def plan(self) -> Plan:
        """The decisions, as a value that prints."""
        return Plan(
            self.routes or routes_of(self.structure),
            self.updates,
            self.contraction.cells,
            self.contraction.largest,
            self.compiled,
            observations_of(self.structure),
            self.structure.edges,
            self.notes,
            is_monotone=self.is_monotone,
            gives_up=gives_up(self.strategy),
        )


def _agrees(
    group: Group, arguments: Mapping[str, Tensor], value: Tensor, fresh: FactorGraph
) -> bool:
    """Whether all members are traced as predicted; False where it takes a look at each of them."""
    other, first = fresh.group_of(group.members[0])
    own = slice(first, first + len(group.members))
    if other.members[own] != group.members or group.raw is not None or other.raw is not None:
        return False
    scales = (*group.scale, *other.scale[own])
    if any(isinstance(s, Tensor) for s in scales) or group.scale != other.scale[own]:
        return False
    if set(group.arguments) != set(other.arguments) or not group.is_static:
        return False
    pairs = [(value, other.value), *((arguments[n], other.arguments[n]) for n in arguments)]
    for mask, now in ((group.mask, other.mask), (group.elements, other.elements)):
        if mask is not None and now is not None:
            pairs.append((mask, now))
        elif mask is not now:
            return False
    return all(a.shape == b[own].shape and _same(a, b[own]) for a, b in pairs)


def _static_parts(
    group: Any,
    i: int,
    arguments: Mapping[str, Tensor] | None = None,
    value: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (group.arguments if arguments is None else arguments).items():
        yield name, tensor[i]
    yield "value of the site", (group.value if value is None else value)[i]
    if group.mask is not None:
        yield "poutine.mask", group.mask[i]
    if group.elements is not None:
        yield "mask below to_event", group.elements[i]
    yield "poutine.scale", torch.as_tensor(group.scale[i])
    if group.raw is not None:
        yield "log density", group.raw[i]


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    if _are_one(a, b):
        return True
    if a.dtype == torch.bool or not a.is_floating_point():
        return a.shape == b.shape and bool((a == b).all())
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    tolerance = (64 * torch.finfo(a.dtype).eps) ** 0.75
    return all(
        torch.allclose(x, y.to(x.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)
        for x, y in zip(_parts(a), _parts(b), strict=True)
    )


def _are_one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    form = (a.shape, a.dtype, a.device, a.stride())
    return a.data_ptr() == b.data_ptr() and form == (b.shape, b.dtype, b.device, b.stride())


def _parts(t: Tensor) -> Sequence[Tensor]:
    """A tensor in pieces of a bounded size, cut along its longest dimension."""
    if t.numel() <= _PART:
        return (t,)
    longest = max(range(t.dim()), key=lambda d: t.shape[d])
    return t.split(max(1, _PART * t.shape[longest] // t.numel()), longest)


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
    model: _pyro.Model,
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
        raise_problems(problems)
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


def _first_trace(
    model: _pyro.Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    max_enumeration: int,
    reading: Reading | None,
    looked: Mapping[str, Mapping[str, Any]] | None,
) -> FactorGraph:
    """The graph of an enumerated run, whose operations are held to the budget."""
    limit = max(max_enumeration, 2**20)
    if structure.unchecked:
        check_arguments(model, args, kwargs, structure, limit)
    return trace_graph(
        model,
        args,
        kwargs,
        structure,
        limit=limit,
        # Who wants an E-step only needs neither bindings nor a list of what was read.
        with_bindings=reading is not None,
        looked=looked,
        reading=reading,
    )


def _edges(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> list[str]:
    """Parameters at which the support of the data ends, and that a gradient is to move."""
    where: dict[str, Group] = {}
    for group in graph.groups:
        for name in group.edges:
            where.setdefault(name, group)
    return [
        message(
            f"parameter '{name}'",
            f"the support of site '{g.members[0]}' ({g.distribution}) ends at it.",
            "the likelihood rises until the support meets the outermost row, and is zero beyond: a "
            "gradient does not see that jump, and a fit may end without an estimate",
            edge_fixes(name),
        )
        for name, g in where.items()
        if isinstance(updates[name].update, Gradient)
    ]


def _unconstrained_simplexes(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate]
) -> list[str]:
    """Probabilities without a constraint: they are normalised, but counted as free numbers."""
    return [
        message(
            f"parameter '{name}'",
            "it has no constraint but is used as probabilities.",
            "the number of free parameters, and so BIC and AIC, count every element",
            ["declare it: pyro.param(..., constraint=constraints.simplex)"],
        )
        for name, u in updates.items()
        if u.kind is Kind.SIMPLEX
        and all(use.rule.link.name == "identity" and not use.selection.maps for use in u.uses)
        and not isinstance(u.update, Fixed)
        and _pyro.is_real(graph.parameters[name].constraint)
    ]


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


@contextmanager
def parameters_at(
    parameters: Mapping[str, _pyro.TracedParameter],
    values: Mapping[str, Tensor],
    *,
    unconstrained: bool = False,
) -> Iterator[None]:
    """Hold parameters at other values inside a ``with`` block; they are restored afterwards.

    Raises:
        UsageError: If a name is unknown or a value has another shape.
    """
    for name, value in values.items():
        if name not in parameters:
            known = ", ".join(f"'{n}'" for n in parameters) or "none"
            raise UsageError(
                message(
                    f"params['{name}']",
                    f"the model has no such parameter; it has: {known}.",
                    fixes=["use the parameter's name in Pyro's param store"],
                )
            )
        shape = parameters[name].leaf.shape
        value = as_tensor(f"params['{name}']", value)
        if not unconstrained and value.shape != shape:
            raise UsageError(
                message(
                    f"params['{name}']",
                    f"its shape is {tuple(value.shape)}, not {tuple(shape)}.",
                    "a value replaces the whole parameter",
                )
            )
        constraint = parameters[name].constraint
        if not unconstrained and not _allowed(value, constraint):
            raise UsageError(
                message(
                    f"params['{name}']",
                    f"its value is outside the constraint {constraint}.",
                    "values are constrained ones, as pyro.param returns them",
                )
            )
    before = _pyro.snapshot({n: parameters[n] for n in values})
    try:
        with torch.no_grad():
            for name, value in values.items():
                if unconstrained:
                    parameters[name].unconstrained.copy_(value)
                else:
                    leaf = parameters[name].leaf
                    _pyro.write_unconstrained(
                        parameters[name], torch.as_tensor(value).detach().to(leaf)
                    )
        yield
    finally:
        _pyro.restore(parameters, before)


def _allowed(value: Tensor, constraint: constraints.Constraint) -> bool:
    """Whether a value satisfies a constraint or lies on the boundary that estimates may reach."""
    interval = bounds(constraint)
    if interval is not None:
        return bool(((value >= interval[0]) & (value <= interval[1])).all())
    return bool(torch.as_tensor(constraint.check(value)).all())


def matched(requested: Mapping[str, Update], parameters: Mapping[str, Any]) -> dict[str, Update]:
    """The user's updates per parameter; exact names win over globs.

    Raises:
        UsageError: If a name matches no parameter.
    """
    out: dict[str, Update] = {}
    for pattern in sorted(requested, key=lambda p: p in parameters):
        hits = [n for n in parameters if n == pattern or fnmatchcase(n, pattern)]
        if not hits:
            known = ", ".join(f"'{n}'" for n in parameters) or "none"
            raise UsageError(
                message(
                    f"updates['{pattern}']",
                    f"no parameter matches; the model has: {known}.",
                    "a misspelt name would be ignored in silence",
                    ["use a parameter's name or a glob such as 'decoder*'"],
                )
            )
        out.update(dict.fromkeys(hits, requested[pattern]))
    return out
