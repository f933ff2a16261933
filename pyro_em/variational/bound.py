"""The bound that a guide draws, and its gradient.

With latents h drawn from the guide and z summed exactly under them,

    ELBO = E_{q(h | x)}[ log Σ_z p(x, z, h; θ) − log q(h | x; φ) ] ≤ log p(x; θ).

One draw is a `Particle`: its terms, each a tensor over plates. Draws that are reparameterised carry
their gradient themselves. A draw y that is not contributes (C_y − b) ∇ log q(y), with C_y the terms
downstream of y (of the same plate elements only) and b a baseline: the score function estimator.
Latents that are summed under the guide (q(y | x) q(h | x, y)) are left to Pyro's `TraceEnum_ELBO`;
beside exact sums they are summed here, by one run for each value k of y,

    ELBO = Σ_k q(y = k | x) E_{q(h | x, k)}[ log Σ_z p(x, z, h, k) − log q(h | x, k) − log q(k | x) ].

Source: Kingma and Welling (2014); Ranganath, Gerrish and Blei (2014) for the score function and its
Rao–Blackwellisation; Obermeyer et al. (2019) for sums under continuous draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_em.errors import DegenerateError, message, sites_in_words
from pyro_em.globs import listed
from pyro_em.graph.bindings.autograd import leaves_below
from pyro_em.graph.structure import Structure, form_of
from pyro_em.graph.trace import trace_graph
from pyro_em.graph.unregistered import unregistered_notes
from pyro_em.portable import StaysHere
from pyro_em.tracing.handlers import OfBatch
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import tensors_of
from pyro_em.variational.broken_bounds import (
    draw_errors_named,
    not_finite,
    require_finite,
)
from pyro_em.variational.divergence import with_analytic_kl
from pyro_em.variational.drawing import plain_draw, summed_draw
from pyro_em.variational.laying import laid_out
from pyro_em.variational.pair import Laid, Pair, Routing, pyros_pair, support_size
from pyro_em.variational.particle import (
    Particle,
    log_weights,
)
from pyro_em.variational.score_function import coupled_sites, downstream_terms, score_terms

_MOST_STRUCTURES = 16  # that are cached: one for each shape of a batch


@dataclass(frozen=True, eq=False)
class Variational(StaysHere):
    """A model with its guide, ready to draw bounds; `Variational.of` makes one.

    Attributes:
        model: The user's model.
        guide: Its guide.
        routing: The routes.
        bare: The structure of the model without its guide.
        analytic: Drawn latents whose KL divergence is taken in closed form.
        max_plate_nesting: As the user gave it.
        weighted: Draws of the importance-weighted bound that takes the place of the ELBO, or None.
    """

    model: Model
    guide: Model
    routing: Routing
    bare: Structure
    analytic: frozenset[str]
    max_plate_nesting: int | None = None
    weighted: int | None = None
    _laid: dict[Any, Laid] = field(default_factory=dict, init=False)  # found once each

    @classmethod
    def of(
        cls,
        model: Model,
        guide: Model,
        routing: Routing,
        bare: Structure,
        max_plate_nesting: int | None,
        weighted: int | None = None,
    ) -> Self:
        """A model with its guide, each KL divergence in closed form where there is one."""
        analytic = with_analytic_kl(routing, bare)
        return cls(model, guide, routing, bare, analytic, max_plate_nesting, weighted)

    @cached_property
    def pair(self) -> Pair:
        """Guide and model as one."""
        pair = self.routing.pair(self.model, self.guide)
        assert isinstance(pair, Pair)  # something is drawn
        return pair

    @cached_property
    def downstream(self) -> Mapping[str, frozenset[str]]:
        """For each drawn site the terms that depend on its draw."""
        return downstream_terms(self.routing, self.bare)

    @cached_property
    def shared(self) -> Collection[str]:
        """Drawn sites of which an element reaches terms of other elements of its plate."""
        return coupled_sites(self.routing, self.bare)

    # ------------------------------------------------------------------ drawing

    def particle(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        factors: Mapping[str, float] | None = None,
        *,
        analytic: bool = True,
        report: bool = False,
        chosen: Mapping[str, int] | None = None,
    ) -> Particle:
        """One draw from the guide and the terms of its bound, attached to all parameters.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            factors: Per plate what multiplies its sites (a batch that stands for all data).
            analytic: Whether known KL divergences replace the draw's.
            report: Whether log q is wanted as well where it is not needed for the bound.
            chosen: Guide sites that are held at a value instead, and weighed by its probability.
        """
        factors = factors or {}
        with draw_errors_named():
            if not self.routing.solved:
                known = self.analytic if analytic else frozenset()
                return plain_draw(self.pair, args, kwargs, factors, report, known)
            assert self.routing.guide is not None
            with OfBatch(factors):
                laid, guide = self.laid(args, kwargs), self.routing.guide
                return summed_draw(laid, guide, args, kwargs, report, chosen or {}, factors)

    def particles(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        factors: Mapping[str, float] | None = None,
        *,
        report: bool = False,
    ) -> list[Particle]:
        """Particles whose bounds add up to one draw: one for each value that is enumerated here."""
        names = () if self.is_pyros else self.routing.enumerated
        guide = self.routing.guide
        ranges = [range(support_size(guide, n)) for n in names if guide is not None]
        return [
            self.particle(
                args,
                kwargs,
                factors,
                report=report,
                chosen=dict(zip(names, values, strict=True)),
            )
            for values in itertools.product(*ranges)
        ]

    def structure(self, args: tuple, kwargs: dict[str, Any]) -> Structure:
        """The pair's structure for these arguments; found once per shape."""
        return self.laid(args, kwargs).structure

    def laid(self, args: tuple, kwargs: dict[str, Any]) -> Laid:
        """The pair for these arguments; found once per shape."""
        key = form_of(args, kwargs)
        if key not in self._laid:
            laid = laid_out(self.pair, self.routing, args, kwargs, self.max_plate_nesting)
            looked, structure = laid.structure.looked, replace(laid.structure, looked=None)
            trace_graph(
                laid.on(laid.pair), args, kwargs, structure, with_bindings=False, looked=looked
            )
            if len(self._laid) >= _MOST_STRUCTURES:
                self._laid.pop(next(iter(self._laid)))
            self._laid[key] = replace(laid, structure=structure)
        return self._laid[key]

    # ------------------------------------------------------------------ the bound and its gradient

    def loss(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        num_particles: int = 1,
        factors: Mapping[str, float] | None = None,
        baselines: dict[str, float] | None = None,
    ) -> Tensor:
        """−ELBO, a scalar whose gradient is an unbiased estimate of the bound's.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            num_particles: Draws to average over.
            factors: Per plate what multiplies its sites.
            baselines: Decaying averages of downstream costs, which go on with these draws where a
                gradient is wanted.

        Raises:
            DegenerateError: If the bound is not finite; names the site.
        """
        baselines = {} if baselines is None else baselines
        if self.weighted is not None:
            return -self._weighted_bound(args, kwargs, factors)
        if self.is_pyros:
            elbo, pair = self.pyros_elbo(num_particles), self.pyros_pair(factors)
            with draw_errors_named():
                if torch.is_grad_enabled():
                    loss = elbo.differentiable_loss(*pair, *args, **kwargs)
                else:
                    loss = torch.as_tensor(elbo.loss(*pair, *args, **kwargs))
            if not bool(torch.isfinite(loss)):
                raise DegenerateError(not_finite("model", float(loss.detach())))
            return loss
        total: Tensor | None = None
        drawn = (self.particles(args, kwargs, factors) for _ in range(num_particles))
        for particle in itertools.chain.from_iterable(drawn):
            loss = particle.loss
            require_finite(particle, loss)
            # Evaluating a bound must not move the baselines.
            if particle.scores and torch.is_grad_enabled():
                loss = loss - score_terms(particle, self.downstream, self.shared, baselines)
            total = loss if total is None else total + loss
        assert total is not None
        return total if num_particles == 1 else total / num_particles

    def _weighted_bound(
        self, args: tuple, kwargs: dict[str, Any], factors: Mapping[str, float] | None
    ) -> Tensor:
        """log (1/S) Σ_s w_s, per element of the data plate where every draw is local to it.

        Its gradient weighs each draw by w_s / Σ w: expectations by importance.
        """
        assert self.weighted is not None
        particles = []
        for _ in range(self.weighted):
            particle = self.particle(args, kwargs, factors, analytic=False)
            require_finite(particle, particle.loss)
            particles.append(particle)
        return log_weights(particles, self.bare.data_plate, self.draws_are_local).bound()

    @property
    def draws_are_local(self) -> bool:
        """Whether every latent is drawn or summed anew for each element of the data plate."""
        guide = self.routing.guide
        if guide is not None and guide.coupled & set(self.routing.drawn):
            return False
        return self.bare.are_local((*self.routing.drawn, *self.routing.solved))

    def draws(self, args: tuple, kwargs: dict[str, Any], n: int) -> list[Tensor]:
        """Independent draws of the bound; where all is summed under the guide they are equal."""
        if self.is_pyros:
            elbo, pair = self.pyros_elbo(1), self.pyros_pair()
            with draw_errors_named():
                return [torch.tensor(-elbo.loss(*pair, *args, **kwargs)) for _ in range(n)]
        with torch.no_grad():
            drawn = (self.particles(args, kwargs) for _ in range(n))
            return [torch.stack([p.bound for p in particles]).sum() for particles in drawn]

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings in words about what model and guide depend on."""
        guide = self.routing.guide
        of_guide = () if guide is None else guide.unregistered
        return (
            *self.bare.notes,
            *unregistered_notes(self.bare.unregistered, self.parameters, "model"),
            *unregistered_notes(of_guide, self.parameters, "guide"),
            *notes_on_leaving(self.routing),
        )

    @property
    def parameters(self) -> dict[str, TracedParameter]:
        """All parameters of guide and model, as the first runs of both recorded them."""
        guide = self.routing.guide
        return {**({} if guide is None else guide.run.parameters), **self.bare.parameters}

    def with_draws_only(self) -> Variational:
        """The same pair with nothing enumerated under the guide."""
        if not self.routing.enumerated:
            return self
        routing = replace(self.routing, enumerated=())
        return Variational.of(self.model, self.guide, routing, self.bare, self.max_plate_nesting)

    def point_model(self) -> Model:
        """The model at its point estimates, all other latents its own."""
        return replace(self.routing, drawn=()).pair(self.model, self.guide)

    @property
    def bound_name(self) -> str:
        """Which bound `loss` is the negative of, in words."""
        n = self.weighted
        return "ELBO" if n is None else f"importance-weighted bound of {n} draw{'s' * (n > 1)}"

    @property
    def point_sites(self) -> dict[str, str]:
        """For each point-estimated site the guide's parameter of a name that ends with it."""
        out = {}
        for site in self.routing.points:
            hits = [n for n in self.parameters if n == site or n.endswith(f".{site}")]
            if len(hits) == 1:
                out[site] = hits[0]
        return out

    @property
    def is_pyros(self) -> bool:
        """Whether latents are summed under the guide by Pyro: where nothing is summed exactly."""
        return bool(self.routing.enumerated) and not self.routing.solved

    def pyros_elbo(self, num_particles: int) -> TraceEnum_ELBO:
        """Pyro's bound where ``is_pyros``."""
        return TraceEnum_ELBO(
            num_particles=num_particles, max_plate_nesting=self.bare.max_plate_nesting
        )

    def pyros_pair(self, factors: Mapping[str, float] | None = None) -> tuple[Model, Model]:
        """Model and guide as Pyro's bound takes them.

        Args:
            factors: Per plate what multiplies its sites.
        """
        barren = (n for n in self.bare.barren if n not in self.routing.drawn)
        return pyros_pair(self.model, self.guide, self.routing, barren, factors or {})

    @property
    def is_exact(self) -> bool:
        """Whether the bound holds no randomness: everything is summed under the guide."""
        guide = self.routing.guide
        one_value = guide.points if guide is not None else frozenset()
        return set(self.routing.drawn) <= {*self.routing.enumerated, *one_value}


def notes_on_leaving(routing: Routing) -> tuple[str, ...]:
    """What users have to know of Gaussian latents that left the guide, or were asked to in vain."""
    notes = [
        message(
            f"strategy={{'{name}': 'exact'}}",
            f"'{name}' stays with the guide: {why.where + ': ' * bool(why.where)}"
            f"{why.what.rstrip('.')}.",
            why.why,
            why.fixes,
        )
        for name, why in routing.kept.items()
        if name in routing.wished
    ]
    left = [n for n in routing.gaussian if n in routing.unused]
    if routing.guide is None or not left:
        return tuple(notes)
    if not (routing.drawn or routing.points):
        text = "the guide is not used (strategy='guide' keeps it): every latent has an exact posterior."
        return (text,)
    unused = unused_parameters(routing)
    more = f" and {len(unused) - 2} more" if len(unused) > 4 else ""
    shown = listed(unused[:2] if more else unused) + more
    it = "it is" if len(left) == 1 else "they are"
    its = "its guide site is" if len(left) == 1 else "their guide sites are"
    rest = f": no gradient reaches {shown}" if unused else ""
    notes.append(
        message(
            sites_in_words(left),
            f"{it} integrated exactly, and {its} not used{rest}.",
            "their posterior is known given what the guide is used for: the bound is tighter so",
            ["strategy='guide' keeps the guide for all that it covers"],
        )
    )
    return tuple(notes)


def unused_parameters(routing: Routing) -> list[str]:
    """Parameters that reach only guide sites which are not used."""
    guide = routing.guide
    if guide is None or not routing.unused:
        return []
    used = guide.upstream({n for n in (*routing.drawn, *routing.points) if n in guide.sites})
    held = [t for n in used for t in (*tensors_of(guide.sites[n]["fn"]), guide.sites[n]["value"])]
    reached = leaves_below(t for t in held if isinstance(t, Tensor))
    return [n for n, p in guide.run.parameters.items() if id(p.leaf) not in reached]
