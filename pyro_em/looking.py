"""Looking at a model, its guide and its data: an exact `Program`, or a `Variational` pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch

from pyro_em import _pyro
from pyro_em._errors import ModelError, UsageError, as_error, message, raise_problems
from pyro_em._portable import StaysHere
from pyro_em._pyro import Role
from pyro_em.findings import parameter_problems
from pyro_em.guides import (
    GuideLook,
    built_guide,
    given_a_name,
    look_at_guide,
    needs_building,
)
from pyro_em.m_step import Gradient, ParameterUpdate, Update
from pyro_em.m_step.updates import Fixed
from pyro_em.pairing import (
    Routing,
    WithSubsamples,
    decide_routes,
    matching,
    reduced,
    routes_with_guide,
    unknown_strategies,
)
from pyro_em.plan import Plan, contraction_from_structure, observations_of
from pyro_em.program import Program, build_program, matched
from pyro_em.strategies import EStepStrategy, MonteCarlo
from pyro_em.structure import Structure, examine
from pyro_em.training import Optimizer
from pyro_em.unrouted import Unrouted, are_of_routes, without_route
from pyro_em.variational import Variational

Strategy = str | EStepStrategy


class _StepsPyroOptim(torch.optim.Optimizer):
    """A ``pyro.optim`` object with the interface of a torch optimiser."""

    def __init__(self, parameters: list[torch.Tensor], optim: pyro.optim.PyroOptim) -> None:
        super().__init__(parameters, {})
        self.optim = optim

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        self.optim([p for p in self.param_groups[0]["params"] if p.grad is not None])


@dataclass(eq=False)
class Looker(StaysHere):
    """What the user asked for, and how to look at a model with it.

    Attributes:
        model: The user's model.
        guide: The user's ``guide`` argument.
        optim: The user's optimiser.
        strategy: The user's strategy.
        updates: The user's updates by name or glob.
        max_plate_nesting: As the user gave it.
        max_enumeration: The budget in cells.
        built: The guide that ``guide`` stands for, once it has been built.
        seen: Whether the model has been run before.
        guide_parameters: Names of the parameters that the guide reads.
        name: That of a guide that was built here, and that of its class.
    """

    model: Callable[..., Any]
    guide: Any
    optim: Optimizer | pyro.optim.PyroOptim | None
    strategy: Strategy | Mapping[str, Strategy]
    updates: Mapping[str, Update]
    max_plate_nesting: int | None
    max_enumeration: int
    built: Any = None
    seen: bool = False
    guide_parameters: tuple[str, ...] = ()
    name: tuple[str, str] = ("", "")

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

    def look_at_routes(
        self, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False
    ) -> Program | Variational | Unrouted:
        """As ``look``; where a latent has no route it is a finding, not an exception."""
        first, self.seen = not self.seen, True
        if self.guide is None:
            program = self._program(self.model, args, kwargs, first, look_only, ())
            if isinstance(program, Unrouted):
                return program
            _drop_unused_strategy(program)
            self._check_strategies(program.structure.latents, program.structure.latents)
            self._note_unused_optimiser(program)
            return program
        bare, look = self._look_at_both(args, kwargs, first)
        routing = self._route(bare, look)
        if isinstance(routing, Unrouted):
            return routing
        self._check_strategies((*bare.latents, *bare.barren), routing.exact)
        if routing.is_stochastic:
            return Variational(
                self.model,
                self.built,
                routing,
                bare,
                self.max_plate_nesting,
                self._weighted(routing),
            )
        pair = routing.pair(self.model, self.built)
        routes = routes_with_guide(bare, routing)
        program = self._program(pair, args, kwargs, False, look_only, routes)
        if isinstance(program, Unrouted):
            return program
        program.notes += tuple(_unbounded_priors(program))
        _drop_unused_strategy(program)
        if not routing.points:
            program.notes += ("the guide is not used: every latent has an exact posterior.",)
        self._note_unused_optimiser(program)
        return program

    def _note_unused_optimiser(self, program: Program) -> None:
        """Say so where an optimiser was given and no parameter of an exact fit is moved by it."""
        if self.optim is None or not program.updates:
            return
        if any(isinstance(u.update, Gradient) for u in program.updates.values()):
            return
        program.notes += (
            "optim is not used: no parameter needs a gradient (updates={name: Gradient(optim)} "
            "would move one by it).",
        )

    def _look_at_both(
        self, args: tuple, kwargs: dict[str, Any], first: bool
    ) -> tuple[Structure, GuideLook]:
        """The bare model, at the subsamples that its guide drew, and the guide."""
        look: GuideLook | None = None
        model = self.model
        if self.built is None and not needs_building(self.guide):
            self.built = built_guide(self.guide, self.model, None)
        if self.built is not None:
            look = look_at_guide(self.built, args, kwargs, first_look=first)
            if look.subsamples:
                model = WithSubsamples(model, look.subsamples)
        bare, problems = examine(
            model,
            args,
            kwargs,
            max_plate_nesting=self.max_plate_nesting,
            first_look=first,
            guide_given=True,
            max_enumeration=self.max_enumeration,
        )
        if problems:
            raise_problems(problems)
        bare = replace(bare, looked=None)  # what sums the latents looks at the pair
        if look is None:
            self.built = built_guide(self.guide, self.model, bare)
            self.name = given_a_name(self.built)
            look = look_at_guide(self.built, args, kwargs, first_look=first)
        return bare, look

    def _check_strategies(self, latents: Iterable[str], exact: Iterable[str]) -> None:
        """Refuse a dict of strategies that names no latent, or part of what is summed together."""
        unknown = unknown_strategies(self.strategy, latents)
        if unknown:
            known = ", ".join(f"'{n}'" for n in latents) or "none"
            raise UsageError(
                message(
                    f"strategy['{unknown[0]}']",
                    f"no latent matches; the model has: {known}.",
                    "a misspelt name would be ignored in silence",
                    ["use a latent's name or a glob"],
                )
            )
        asked = self.e_step
        left = [n for n in exact if asked is not None and matching(self.strategy, n) != asked]
        if left:
            raise UsageError(
                message(
                    f"strategy={asked!r}",
                    f"it was asked for some latents, but '{left[0]}' is to be summed exactly.",
                    "latents that are summed share one E-step",
                    [f"pass strategy={asked!r} for all of them"],
                )
            )

    def forget(self) -> tuple[str, ...]:
        """Forget a guide that was built here; returns the names of its parameters."""
        own = self.guide_parameters if needs_building(self.guide) else ()
        self.built, self.seen, self.guide_parameters, self.name = None, False, (), ("", "")
        if isinstance(self.optim, pyro.optim.PyroOptim):
            self.optim.optim_objs.clear()
        return own

    def saved_name(self, name: str) -> str:
        """A parameter's name in a file: that of a built guide's class, however it is called here."""
        own, cls = self.name
        return cls + name[len(own) :] if own and name.startswith(f"{own}.") else name

    def exact_beside(
        self, variational: Variational, args: tuple, kwargs: dict[str, Any]
    ) -> Program | None:
        """The exact program of a model whose guide was chosen over it; None if there is none."""
        bare, routing = variational.bare, variational.routing
        latents = set(bare.latents) - set(routing.points)
        if any(bare.sites[n].support_size is None for n in latents if n in bare.sites):
            return None
        if latents & bare.coupled.keys():
            return None
        try:
            cost = contraction_from_structure(reduced(bare, set(routing.points)))
        except ModelError:  # latents of crossed plates
            return None
        if cost.cells > self.max_enumeration:
            return None
        exact = replace(routing, exact=tuple(latents), drawn=(), enumerated=())
        pair = exact.pair(self.model, self.built)
        program = self._program(pair, args, kwargs, False, True, ())
        return program if isinstance(program, Program) else None

    def all_from_guide(self, args: tuple, kwargs: dict[str, Any]) -> Variational | None:
        """The pair in which the guide draws all that it covers; None if that is not everything."""
        if self.guide is None or self.built is None:
            return None
        bare, look = self._look_at_both(args, kwargs, False)
        routing = self._route(bare, look, everything=True)
        if isinstance(routing, Unrouted):
            raise routing.error
        if routing.exact or not routing.drawn:
            return None
        return Variational(self.model, self.built, routing, bare, self.max_plate_nesting)

    def _route(
        self, bare: Structure, look: GuideLook, everything: bool = False
    ) -> Routing | Unrouted:
        self.guide_parameters = tuple(look.run.parameters)

        def strategy(name: str) -> str:
            one = matching(self.strategy, name)
            if everything:
                return "guide"
            return one if isinstance(one, str) else "exact"

        routing, problems = decide_routes(
            bare, look, strategy=strategy, max_enumeration=self.max_enumeration
        )
        problems = [*parameter_problems(look.run), *problems]
        if are_of_routes(problems):
            return without_route(bare, as_error(problems), guide=look)
        if problems:
            raise_problems(problems)
        return routing

    def _weighted(self, routing: Routing) -> int | None:
        """Draws per step of Monte Carlo EM by importance; None for the ELBO."""
        e_step = self.e_step
        if e_step is None:
            return None
        names = ", ".join(f"'{n}'" for n in routing.drawn)
        if not isinstance(e_step, MonteCarlo):
            raise UsageError(
                message(
                    f"strategy={e_step!r}",
                    f"the guide draws {names}, and this E-step is one of sums.",
                    "it has a meaning only where every latent is summed or a point estimate",
                    ["use strategy='exact' or MonteCarlo(n)", "use guide='map' for these latents"],
                )
            )
        look = routing.guide
        assert look is not None
        rough = [n for n in routing.shown if not getattr(look.sites[n]["fn"], "has_rsample", False)]
        if rough:
            raise UsageError(
                message(
                    f"strategy={e_step!r}",
                    f"the guide's draw of '{rough[0]}' cannot be reparameterised.",
                    "weights of such draws have no gradient in the guide",
                    ["use strategy='exact' or 'guide'"],
                )
            )
        return e_step.num_samples

    @property
    def e_step(self) -> EStepStrategy | None:
        """The E-step that was asked for in place of the exact one."""
        if not isinstance(self.strategy, Mapping):
            return None if isinstance(self.strategy, str) else self.strategy
        wanted = {s for s in self.strategy.values() if not isinstance(s, str)}
        if len(wanted) > 1:
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    "strategy holds several E-steps: " + ", ".join(map(repr, wanted)) + ".",
                    "all summed latents share one E-step",
                    ["use one of them"],
                )
            )
        return next(iter(wanted), None)

    @property
    def gradient(self) -> Gradient | None:
        """The update of parameters without a closed form."""
        optim = self.optim
        if optim is None:
            return None
        if isinstance(optim, pyro.optim.PyroOptim):
            return Gradient(lambda p: _StepsPyroOptim(p, optim), 1)
        return Gradient(optim, 1)

    def _program(
        self,
        model: _pyro.Model,
        args: tuple,
        kwargs: dict[str, Any],
        first: bool,
        look_only: bool,
        routes: tuple[Any, ...],
    ) -> Program | Unrouted:
        return build_program(
            model,
            args,
            kwargs,
            requested=self.updates,
            gradient=self.gradient,
            max_plate_nesting=self.max_plate_nesting,
            max_enumeration=self.max_enumeration,
            first_look=first,
            look_only=look_only,
            strategy=self.e_step,
            routes=routes,
        )

    def updates_for(self, parameters: Mapping[str, Any]) -> Mapping[str, Update]:
        """The user's updates by exact parameter name."""
        return matched(self.updates, parameters)


def _drop_unused_strategy(program: Program) -> None:
    """An E-step has no meaning where no latent is summed; say so and do without."""
    if program.strategy is None or program.graph.latents:
        return
    program.notes += (f"strategy={program.strategy!r} is not used: no latent is summed.",)
    program.strategy = None


def _unbounded_priors(program: Program) -> list[str]:
    """Point estimates by gradient under priors whose density is unbounded at the boundary.

    A closed form finds out whether the data speak against the boundary, and names the component.
    """
    found = []
    for group in program.graph.groups:
        below = [v for n, v in group.arguments.items() if n.startswith("concentration")]
        climbs = any(isinstance(program.updates[n].update, Gradient) for n in group.params)
        kind = group.distribution
        if group.role is not Role.POINT or kind not in ("Beta", "Dirichlet", "Gamma") or not climbs:
            continue
        if any(bool((v < 1).any()) for v in below):
            found.append(
                message(
                    f"site '{group.members[0]}'",
                    f"its {kind} prior has a concentration below one, and its update is a gradient.",
                    "the density is unbounded at the boundary: where the data do not speak against "
                    "it the estimate runs there, until rounding stops it",
                    [
                        "use a concentration of at least one",
                        "make it a parameter without a prior: pyro.param instead of pyro.sample",
                        "use a guide with a spread: ExactPosteriorEM(model, AutoNormal)",
                    ],
                )
            )
    return found


def plan_of(variational: Variational, updates: Mapping[str, Update], has_optim: bool) -> Plan:
    """The decisions about a pair, as a value that prints."""
    look, bare = variational.routing.guide, variational.bare
    assert look is not None
    decided = {}
    of_guide = look.parameters(variational.parameters)
    for name in variational.parameters:
        wish = updates.get(name)
        whose = "guide" if name in of_guide else "model"
        if name in look.run.parameters and name in bare.parameters:
            whose = "guide and model (under Alternating it moves in the guide's turns)"
        if isinstance(wish, Fixed):
            decided[name] = ParameterUpdate(name, wish, "as the user asked")
        elif wish is not None:
            decided[name] = ParameterUpdate(name, wish, f"of the {whose}, as the user asked")
        else:
            kind = "guide's" if variational.is_exact else "drawn"
            reason = f"of the {whose}; gradient of the {kind} bound"
            decided[name] = ParameterUpdate(name, Gradient(torch.optim.Adam, 1), reason)  # type: ignore[arg-type]
    exact = variational.routing.exact
    cost = contraction_from_structure(
        reduced(bare, {*variational.routing.drawn, *variational.routing.points})
    )
    notes = [] if has_optim else ["no optim was given: Adam with learning rate 0.005."]
    notes += variational.notes
    if variational.analytic and variational.weighted is None:
        names = ", ".join(f"'{n}'" for n in sorted(variational.analytic))
        notes.append(f"the KL divergence of {names} is taken in closed form.")
    return Plan(
        routes_with_guide(bare, variational.routing),
        decided,
        cost.cells if exact else 0,
        cost.largest if exact else (),
        False,
        observations_of(bare),
        bare.edges,
        tuple(notes),
        stochastic=True,
        draws=not variational.is_exact,
        is_monotone=False,
        gives_up=""
        if variational.weighted is None
        else f"MonteCarlo({variational.weighted}): raises the importance-weighted bound of "
        f"{variational.weighted} draws, not the ELBO.",
    )
