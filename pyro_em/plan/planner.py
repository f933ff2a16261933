"""Looking at a model, its guide and its data: an exact `Program`, or a `Variational` pair."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro

from pyro_em.errors import (
    Finding,
    ModelError,
    PyroEMError,
    as_error,
    raise_findings,
)
from pyro_em.graph.conjugate_children.conjugate_reads import kernel_of_prior
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.findings.value_checks import parameter_problems
from pyro_em.graph.mixtures import mixtures_in, with_components
from pyro_em.graph.structure import Structure
from pyro_em.plan.building import build_program
from pyro_em.plan.cost import contraction_from_structure
from pyro_em.plan.gaussians import is_integrable
from pyro_em.plan.kept import Readings
from pyro_em.plan.leaving import Leaving, look_for_exact
from pyro_em.plan.notes import unbounded_priors
from pyro_em.plan.plan import Plan, plan_of
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request
from pyro_em.plan.routes import Route, matching, routes_of, routes_with_guide
from pyro_em.plan.routing import decide_routes, reduced
from pyro_em.plan.task import Task
from pyro_em.plan.unrouted import Unrouted, are_of_routes, without_route
from pyro_em.plan.unused import noting_unused, without_unused_strategy
from pyro_em.plan.weighted import draws_to_weight
from pyro_em.portable import StaysHere
from pyro_em.tracing.allocation import NumbersNeeded
from pyro_em.tracing.garbage import fewer_collections
from pyro_em.tracing.missing import has_missing, missing_in
from pyro_em.tracing.runs import Model
from pyro_em.updates.update import Update
from pyro_em.variational.bound import Variational, notes_on_leaving
from pyro_em.variational.guide import (
    GuideLook,
    built_guide,
    given_a_name,
    lacks_numbers,
    look_at_guide,
    needs_building,
    takes_points,
)
from pyro_em.variational.pair import Pair, Routing, WithSubsamples


@dataclass(frozen=True, eq=False)
class Known(StaysHere):
    """What is known of a model and its guide from one look to the next.

    Attributes:
        has_run: Whether the model has been run before.
        guide: The guide that the user's ``guide`` stands for, once it has been built.
        guide_parameters: Names of the parameters that the guide reads.
        name: That of a guide that was built here, and that of its class.
        leaving: What there is to say of Gaussian latents that left the guide.
        components: The model with the components of its observed mixtures as latents, where it has
            any; see `pyro_em.graph.mixtures`.
        bent: Per skeleton, by the names of its sites, Gaussian latents in which runs have shown the
            model not to be linear, each with the reason.
    """

    has_run: bool = False
    guide: Any = None
    guide_parameters: tuple[str, ...] = ()
    name: tuple[str, str] = ("", "")
    leaving: tuple[str, ...] = ()
    components: Model | None = None
    bent: Mapping[tuple[str, ...], Mapping[str, Finding]] = field(default_factory=dict)


class Planner(StaysHere):
    """Looks at a model with what the user asked for; a `Session` has one.

    Args:
        request: What the user asked for.

    Attributes:
        known: What earlier looks found out.
        readings: What is known of a model without a guide.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.known, self.readings = request, Known(), Readings()

    def look(
        self, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False
    ) -> Program | Variational:
        """Decide everything for these arguments, pay nothing yet.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            look_only: Whether only an E-step is wanted.

        Raises:
            PyroEMError: If a latent has no route, or the model or data cannot be used.
        """
        found = self.look_at_routes(args, kwargs, look_only=look_only)
        if isinstance(found, Unrouted):
            raise found.error
        return found

    @fewer_collections()
    def look_at_routes(
        self, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False
    ) -> Program | Variational | Unrouted:
        """As ``look``; where a latent has no route it is a finding, not an exception."""
        first = not self.known.has_run
        if first:
            self.known = replace(self.known, has_run=True)
        if self.request.guide is None:
            program = self._program(self.request.model, args, kwargs, first, look_only, ())
            if isinstance(program, Unrouted):
                return program
            self.request.check_strategies(program.structure.latents, program.structure.latents)
            return noting_unused(program, self.request.optim)
        bare, look = self._look_at_both(args, kwargs, first)
        routing = self._route(bare, look, args, kwargs)
        if isinstance(routing, Unrouted):
            return routing
        self.request.check_strategies((*bare.latents, *bare.barren), routing.solved)
        self.known = replace(self.known, leaving=notes_on_leaving(routing))
        if routing.is_stochastic:
            return Variational.of(
                self.request.model,
                self.known.guide,
                routing,
                bare,
                self.request.max_plate_nesting,
                draws_to_weight(self.request.e_step, routing),
            )
        pair = routing.pair(self.request.model, self.known.guide)
        routes = routes_with_guide(bare, routing)
        program = self._program(pair, args, kwargs, False, look_only, routes)
        if isinstance(program, Unrouted):
            return program
        routes = _with_component_rows(routes, program.structure)
        program = replace(
            program, routes=_with_gaussian_rows(routes, program.routes, routing.unused)
        )
        program = without_unused_strategy(program.noting(*unbounded_priors(program)))
        program = program.noting(*self.known.leaving)
        if not (routing.points or self.known.leaving):
            program = program.noting("the guide is not used: every latent has an exact posterior.")
        return noting_unused(program, self.request.optim)

    @property
    def guide_now(self) -> Any:
        """The guide: as given, or once data have been seen the one that was built."""
        return self.request.guide if self.known.guide is None else self.known.guide

    def plan_on(
        self, found: Program | Variational | Unrouted, args: tuple, kwargs: dict[str, Any]
    ) -> Plan:
        """Every decision about what a look at some data found, and what of these is missing."""
        plan = self.plan(found)
        if isinstance(found, Program) or not has_missing(self.request.model):
            return plan
        return replace(plan, missing=missing_in(self.request.model, args, kwargs))

    def plan(self, found: Program | Variational | Unrouted) -> Plan:
        """Every decision about what a look found, with its reason."""
        if isinstance(found, Program):
            return found.plan()
        if isinstance(found, Unrouted):
            return found.plan(self.request.updates_for(dict.fromkeys(found.parameters)))
        return plan_of(
            found, self.request.updates_for(found.parameters), self.request.optim is not None
        )

    def _look_at_both(
        self, args: tuple, kwargs: dict[str, Any], first: bool
    ) -> tuple[Structure, GuideLook]:
        """The bare model, at the subsamples that its guide drew, and the guide."""
        look: GuideLook | None = None
        model = self.request.model
        guide = self.known.guide
        if guide is None and not needs_building(self.request.guide):
            guide = built_guide(self.request.guide, self.request.model, None)
            self.known = replace(self.known, guide=guide)
        if guide is not None:
            look = look_at_guide(guide, args, kwargs, first_look=first)
            if look.subsamples:
                model = WithSubsamples(model, look.subsamples)
        # What is drawn is laid out in no other run: this one has all numbers, and validates them.
        sparing = takes_points(self.request.guide) if look is None else look.only_points
        bare = self._bare(model, args, kwargs, first, sparing)
        if lacks_numbers(bare):
            bare = self._bare(model, args, kwargs, False, sparing=False)
        if look is None:
            try:
                look = self._look_at_built(bare, args, kwargs, first, sparing=bare.unchecked)
            except NumbersNeeded:
                look = self._look_at_built(bare, args, kwargs, first, sparing=False)
        return bare, look

    def _look_at_built(
        self, bare: Structure, args: tuple, kwargs: dict[str, Any], first: bool, sparing: bool
    ) -> GuideLook:
        """A guide that is built of the model's skeleton, which is known from then on."""
        guide = built_guide(self.request.guide, self.request.model, bare, sparing=sparing)
        self.known = replace(self.known, guide=guide)
        self.known = replace(self.known, name=given_a_name(guide))
        return look_at_guide(guide, args, kwargs, first_look=first)

    def _bare(
        self, model: Model, args: tuple, kwargs: dict[str, Any], first: bool, sparing: bool
    ) -> Structure:
        """The skeleton of the model without its guide."""
        bare, problems = examine(
            model,
            args,
            kwargs,
            max_plate_nesting=self.request.max_plate_nesting,
            first_look=first,
            guide_given=True,
            sparing=sparing,
            max_enumeration=self.request.max_enumeration,
        )
        if problems:
            raise_findings(problems)
        return replace(bare, looked=None)  # what sums the latents looks at the pair

    def forget(self) -> tuple[str, ...]:
        """Forget a guide that was built here; returns the names of its parameters."""
        own = self.known.guide_parameters if needs_building(self.request.guide) else ()
        self.known = Known()
        self.readings.forget()
        if isinstance(self.request.optim, pyro.optim.PyroOptim):
            self.request.optim.optim_objs.clear()
        return own

    def saved_name(self, name: str) -> str:
        """A parameter's name in a file: that of a built guide's class, however it is called here."""
        own, cls = self.known.name
        return cls + name[len(own) :] if own and name.startswith(f"{own}.") else name

    def exact_beside(
        self,
        variational: Variational,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        summed_only: bool = False,
    ) -> Program | None:
        """The exact program of a model whose guide was chosen over it; None if there is none.

        Args:
            variational: The model with its guide.
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            summed_only: Whether Gaussian latents are not to be integrated.
        """
        bare, routing = variational.bare, variational.routing
        latents = set(bare.latents) - set(routing.points)
        may = set() if summed_only else latents
        gaussian = {n for n in may if self._may_be_integrated(n, bare) or is_conjugate(n, bare)}
        summed = latents - gaussian
        if any(bare.sites[n].support_size is None for n in summed if n in bare.sites):
            return None
        if summed & bare.coupled.keys():
            return None
        if gaussian & routing.not_linear:
            return None
        try:
            cost = contraction_from_structure(reduced(bare, {*routing.points, *gaussian}))
        except ModelError:  # latents of crossed plates
            return None
        if cost.cells > self.request.max_enumeration:
            return None
        exact = replace(routing, exact=tuple(summed), drawn=(), enumerated=(), gaussian=())
        pair = exact.pair(self.request.model, self.known.guide)
        try:
            program = self._program(pair, args, kwargs, False, True, (), updates={})
        except PyroEMError:
            if not gaussian:
                raise
            return None  # the model does not run with these latents at zero
        return program if isinstance(program, Program) else None

    def _may_be_integrated(self, name: str, bare: Structure) -> bool:
        """Whether a latent may be one of those that are integrated where a model is linear."""
        site = bare.unobserved.get(name)
        return self.request.e_step is None and site is not None and is_integrable(site)

    def all_from_guide(self, args: tuple, kwargs: dict[str, Any]) -> Variational | None:
        """The pair in which the guide draws all that it covers; None if that is not everything."""
        if self.request.guide is None or self.known.guide is None:
            return None
        bare, look = self._look_at_both(args, kwargs, False)
        routing = self._route(bare, look, args, kwargs, everything=True)
        if isinstance(routing, Unrouted):
            raise routing.error
        if routing.solved or not routing.drawn:
            return None
        return Variational.of(
            self.request.model, self.known.guide, routing, bare, self.request.max_plate_nesting
        )

    def _leaving(
        self, bare: Structure, look: GuideLook, args: tuple, kwargs: dict[str, Any]
    ) -> Leaving:
        """Finds the Gaussian latents that leave the guide."""
        wish, e_step = self.request.strategy, self.request.e_step
        kept = {n: "strategy='guide'" for n in bare.latents if matching(wish, n) == "guide"}
        if e_step is not None:
            kept = dict.fromkeys(bare.latents, f"strategy={e_step!r}")
        model = self.request.model
        return Leaving(
            WithSubsamples(model, look.subsamples) if look.subsamples else model,
            self.known.guide,
            bare,
            look,
            args,
            kwargs,
            self.request.max_plate_nesting,
            self.request.max_enumeration,
            frozenset(n for n in bare.latents if look_for_exact(wish, n)),
            kept,
            self.known.bent.get(tuple(bare.sites), {}),
        )

    def _route(
        self,
        bare: Structure,
        look: GuideLook,
        args: tuple,
        kwargs: dict[str, Any],
        everything: bool = False,
    ) -> Routing | Unrouted:
        self.known = replace(self.known, guide_parameters=tuple(look.run.parameters))

        def strategy(name: str) -> str:
            one = matching(self.request.strategy, name)
            if everything:
                return "guide"
            return one if isinstance(one, str) else "exact"

        def decide(
            gaussian: frozenset[str], kept: Mapping[str, Finding]
        ) -> tuple[Routing, list[Finding]]:
            limit = self.request.max_enumeration
            return decide_routes(
                bare,
                look,
                strategy=strategy,
                max_enumeration=limit,
                gaussian=gaussian,
                kept=kept,
            )

        of_parameters = parameter_problems(look.run)
        if of_parameters:  # Gaussian latents may well be integrated once these are mended
            may = (n for n in bare.latents if self._may_be_integrated(n, bare))
            routing, problems = decide(frozenset(may), {})
        elif everything:
            routing, problems = decide(frozenset(), {})
        else:
            routing, problems = self._leaving(bare, look, args, kwargs).routed(decide)
            bent = {**self.known.bent, tuple(bare.sites): routing.bent}
            self.known = replace(self.known, bent=bent)
        problems = [*of_parameters, *problems]
        if are_of_routes(problems):
            return without_route(bare, as_error(problems), guide=look)
        if problems:
            raise_findings(problems)
        return routing

    def _program(
        self,
        model: Model,
        args: tuple,
        kwargs: dict[str, Any],
        first: bool,
        look_only: bool,
        routes: tuple[Any, ...],
        updates: Mapping[str, Update] | None = None,
    ) -> Program | Unrouted:
        task = Task(
            model if self.known.components is None else _on(model, self.known.components),
            args,
            kwargs,
            requested=self.request.updates if updates is None else updates,
            gradient=self.request.gradient,
            max_plate_nesting=self.request.max_plate_nesting,
            max_enumeration=self.request.max_enumeration,
            look_only=look_only,
            strategy=self.request.e_step,
            routes=routes,
        )
        if self.request.guide is None:
            known = self.readings.again(task, first)
            if known is not None:
                return known
        if self.known.components is None and task.strategy is None:
            task, program = self._with_components(task, first)
        else:
            program = build_program(task, first_look=first)
        if isinstance(program, Program):
            integrates = bool(program.lines) or program.conjugates is not None
            if self.request.guide is None or not integrates:
                self.readings.keep(task, program)
        return program

    def _with_components(self, task: Task, first: bool) -> tuple[Task, Program | Unrouted]:
        """A program whose observed mixtures have their components as latents, where that serves."""
        asked = False

        def instead(structure: Structure) -> Program | None:
            nonlocal asked  # and not the skeleton, which holds the sites of the runs so far
            asked = True
            return self._of_components(task, structure)

        program = build_program(task, first_look=first, instead=instead)
        if isinstance(program, Program) and not asked:  # some latents were integrated first
            program = self._of_components(task, program.structure) or program
        known = self.known.components
        return task if known is None else replace(task, model=_on(task.model, known)), program

    def _of_components(self, task: Task, structure: Structure) -> Program | None:
        """The program with components as latents; None where there are none or it does not serve."""
        names = mixtures_in(structure)
        if not names:
            return None
        model = with_components(self.request.model)
        try:
            own = replace(task, model=_on(task.model, model))
            found = build_program(own, first_look=False)
        except PyroEMError:  # a name that the model has, a way in which it runs
            return None
        if isinstance(found, Unrouted) or set(names) <= set(mixtures_in(found.structure)):
            return None
        self.known = replace(self.known, components=model)
        return found


def is_conjugate(name: str, bare: Structure) -> bool:
    """Whether a latent's prior is one of those that have conjugate children."""
    site = bare.unobserved.get(name)
    return site is not None and kernel_of_prior(site["fn"]) is not None


def _on(model: Model, users_model: Model) -> Model:
    """A model, or its pair with a guide, on another form of the user's model."""
    return replace(model, model=users_model) if isinstance(model, Pair) else users_model


def _with_component_rows(routes: tuple[Route, ...], structure: Structure) -> tuple[Route, ...]:
    """The rows of a plan, and those of latents that are components of observed mixtures."""
    known = {r.site for r in routes}
    rows = routes_of(structure, True) if set(structure.latents) - known else ()
    own = [r for r in rows if r.site not in known and r.site in structure.latents]
    return (*routes, *own)


def _with_gaussian_rows(
    routes: Sequence[Route], read: Sequence[Route], unused: Collection[str]
) -> tuple[Route, ...]:
    """The rows of a plan, those of integrated latents with what the program says of them."""
    routed = ("Gaussian", "conjugate")
    found = {r.site: r for r in read if r.route in routed}
    return tuple(
        replace(
            r,
            reason=found[r.site].reason + "; its guide site is not used" * (r.site in unused),
        )
        if r.route in routed and r.site in found
        else r
        for r in routes
    )
