"""The guide's route: a bound that is drawn, and its gradient.

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
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_em.errors import DegenerateError, raise_findings
from pyro_em.graph.examination import examine
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.structure import Structure, form_of
from pyro_em.graph.trace import trace_graph
from pyro_em.graph.unregistered import unregistered_notes
from pyro_em.portable import StaysHere
from pyro_em.posteriors.contraction import contract
from pyro_em.posteriors.enumeration import contraction_of, scales_of
from pyro_em.posteriors.exact import exact_posterior
from pyro_em.posteriors.posterior import Posterior
from pyro_em.tracing.handlers import FeasibleWhereMasked, GuideSites, HoldAt, ScalePlates
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.runs import Model, drawn_run
from pyro_em.tracing.sites import Role, is_factor, is_latent, role_of
from pyro_em.variational.broken_bounds import (
    in_users_names,
    not_finite,
    require_finite,
    validation_told,
)
from pyro_em.variational.divergence import _kl_term, _with_analytic_kl
from pyro_em.variational.pair import Pair, Routing, pyros_pair, support_size
from pyro_em.variational.particle import (
    Particle,
    Term,
    Weight,
    _reparameterised,
    dims_of,
    log_weights,
)
from pyro_em.variational.score_function import _downstream, score_terms

_KEPT = 16  # structures of batches of different shape


_ONE = Weight()


@dataclass(eq=False)
class Variational(StaysHere):
    """A model with its guide, ready to draw bounds.

    Attributes:
        model: The user's model.
        guide: Its guide.
        routing: The routes.
        max_plate_nesting: As the user gave it.
        bare: What a look at the model without its guide found.
        weighted: Draws of the importance-weighted bound that takes the place of the ELBO, or None.
        analytic: Drawn latents whose KL divergence is known in closed form.
        baselines: Decaying averages of downstream costs.
    """

    model: Model
    guide: Model
    routing: Routing
    bare: Structure
    max_plate_nesting: int | None = None
    weighted: int | None = None
    analytic: frozenset[str] = frozenset()
    baselines: dict[str, float] = field(default_factory=dict)
    _structures: dict[Any, Structure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pair = self.routing.pair(self.model, self.guide)
        self.analytic = _with_analytic_kl(self.routing, self.bare)
        self.downstream = _downstream(self.routing, self.bare)
        self.shared = _of_all_elements(self.routing, self.bare)

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
        with ScalePlates(factors or {}), FeasibleWhereMasked(), validation_told():
            if self.routing.exact:
                return self._summed(args, kwargs, report, chosen or {})
            return self._plain(args, kwargs, analytic, report)

    def particles(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        factors: Mapping[str, float] | None = None,
        *,
        analytic: bool = True,
        report: bool = False,
    ) -> list[Particle]:
        """Particles whose bounds add up to one draw: one for each value that is enumerated here."""
        names = () if self.is_pyros else self.routing.enumerated
        look = self.routing.guide
        ranges = [range(support_size(look, n)) for n in names if look is not None]
        return [
            self.particle(
                args,
                kwargs,
                factors,
                analytic=analytic,
                report=report,
                chosen=dict(zip(names, values, strict=True)),
            )
            for values in itertools.product(*ranges)
        ]

    def _plain(self, args: tuple, kwargs: dict[str, Any], analytic: bool, report: bool) -> Particle:
        known = self.analytic if analytic else frozenset()
        unneeded = set() if report else {*known, *(GuideSites.prefix + n for n in known)}
        sites = drawn_run(self.pair, args, kwargs, unneeded).sites
        terms: list[Term] = []
        for name, site in sites.items():
            if not is_factor(site) or is_latent(site):
                continue
            role = role_of(site)
            own = name.removeprefix(GuideSites.prefix)
            if own in known and role in (Role.GUIDE, Role.SAMPLED):
                if role is Role.SAMPLED:
                    terms.append(_kl_term(own, site, sites[GuideSites.prefix + own]))
                continue
            value = site["log_prob"]
            if role is Role.GUIDE:
                value = -(value if _reparameterised(site) else value.detach())
            terms.append(Term(name, role, dims_of(site, value), value, site["scale"]))
        values = {
            n.removeprefix(GuideSites.prefix): s["value"]
            for n, s in sites.items()
            if n.startswith(GuideSites.prefix) or (is_factor(s) and _is_given(s))
        }
        return self._with_scores(terms, sites, None, report, values)

    def _summed(
        self, args: tuple, kwargs: dict[str, Any], report: bool, chosen: Mapping[str, int]
    ) -> Particle:
        record: list[tuple[GuideSites, HoldAt]] = []
        assert isinstance(self.pair, Pair)
        graph = trace_graph(
            replace(self.pair, record=record, chosen=chosen),
            args,
            kwargs,
            self.structure(args, kwargs),
            with_bindings=False,
            keep_random_state=False,
            attached=True,
        )
        guide, held = record[-1]
        weight = Weight(tuple(_weight_of(held.sites[n]) for n in chosen))
        plan = contraction_of(graph)
        tables = [g.log_density().to(torch.float64) for g in graph.groups]
        flat: list[Tensor] = []
        terms: list[Term] = []
        sites: dict[str, dict[str, Any]] = {}
        for group, table in zip(graph.groups, tables, strict=True):
            for i, name in enumerate(group.members):
                if group.role is not Role.GUIDE:
                    flat.append(table[i])
                    continue
                own = name.removeprefix(GuideSites.prefix)
                log_q = table[i] * group.scale[i]
                sites[name] = {
                    "fn": self.routing.guide.sites[own]["fn"],  # type: ignore[union-attr]
                    "infer": guide.infer[own],
                    "log_prob": log_q,
                    "score": table[i],
                    "dims": group.dims[i],
                }
                follows = own in chosen or _reparameterised(sites[name])
                value = log_q if follows else log_q.detach()
                terms.append(Term(name, Role.GUIDE, group.dims[i], -value, group.scale[i]))
                flat.append(torch.zeros_like(table[i]))
        scale = _common_scale(graph)
        for dims, value in contract(plan, flat, scales=scales_of(graph)):
            terms.append(Term("summed", None, dims, value, scale))
        return self._with_scores(terms, sites, graph, report, guide.values, weight, chosen)

    def _with_scores(
        self,
        terms: list[Term],
        sites: Mapping[str, dict[str, Any]],
        graph: FactorGraph | None,
        report: bool,
        values: Mapping[str, Tensor],
        weight: Weight = _ONE,
        chosen: Collection[str] = (),
    ) -> Particle:
        terms = [replace(t, value=weight.weigh(t.value, t.dims)) for t in terms]
        scores, baselines, log_q = {}, {}, 0.0
        for name, site in sites.items():
            if not name.startswith(GuideSites.prefix):
                continue
            own = name.removeprefix(GuideSites.prefix)
            if report and "log_prob" in site:
                own_log_q = site["log_prob"].detach()
                log_q += float(weight.weigh(own_log_q, site.get("dims", ())).sum())
            if own not in chosen and not _reparameterised(site):
                # The cost carries the scale, the score does not.
                if "score" in site:
                    score, dims = site["score"], site["dims"]
                else:
                    score = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
                    dims = dims_of(site, score)
                scores[own] = Term(own, Role.GUIDE, dims, score)
                baselines[own] = site.get("infer", {}).get("baseline", {})
        return Particle(tuple(terms), scores, values, graph, log_q, baselines, weight)

    def structure(self, args: tuple, kwargs: dict[str, Any]) -> Structure:
        """The pair's structure for these arguments; found once per shape."""
        key = form_of(args, kwargs)
        if key not in self._structures:
            structure, problems = examine(
                self.pair,
                args,
                kwargs,
                max_plate_nesting=self.max_plate_nesting,
                first_look=False,
                guide_given=True,
            )
            if problems:
                raise_findings([in_users_names(p) for p in problems])
            looked, structure = structure.looked, replace(structure, looked=None)
            trace_graph(self.pair, args, kwargs, structure, with_bindings=False, looked=looked)
            if len(self._structures) >= _KEPT:
                self._structures.pop(next(iter(self._structures)))
            self._structures[key] = structure
        return self._structures[key]

    # ------------------------------------------------------------------ the bound and its gradient

    def loss(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        num_particles: int = 1,
        factors: Mapping[str, float] | None = None,
    ) -> Tensor:
        """−ELBO, a scalar whose gradient is an unbiased estimate of the bound's.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            num_particles: Draws to average over.
            factors: Per plate what multiplies its sites.

        Raises:
            DegenerateError: If the bound is not finite; names the site.
        """
        if self.weighted is not None:
            return -self._weighted_bound(args, kwargs, factors)
        if self.is_pyros:
            elbo, pair = self.pyros_elbo(num_particles), self.pyros_pair(factors)
            with validation_told():
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
            bound = particle.bound
            require_finite(particle, bound)
            if torch.is_grad_enabled():  # a look must not move the baselines
                bound = bound + score_terms(particle, self.downstream, self.shared, self.baselines)
            total = bound if total is None else total + bound
        assert total is not None
        return -total if num_particles == 1 else -total / num_particles

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
            require_finite(particle, particle.bound)
            particles.append(particle)
        return log_weights(particles, self.bare.data_plate, self.draws_are_local).bound()

    @property
    def draws_are_local(self) -> bool:
        """Whether every latent is drawn or summed anew for each element of the data plate."""
        look = self.routing.guide
        if look is not None and look.coupled & set(self.routing.drawn):
            return False
        return self.bare.are_local((*self.routing.drawn, *self.routing.exact))

    def draws(
        self, args: tuple, kwargs: dict[str, Any], n: int, *, analytic: bool = True
    ) -> list[Tensor]:
        """Independent draws of the bound; where all is summed under the guide they are equal."""
        if self.is_pyros:
            elbo, pair = self.pyros_elbo(1), self.pyros_pair()
            with validation_told():
                return [torch.tensor(-elbo.loss(*pair, *args, **kwargs)) for _ in range(n)]
        with torch.no_grad():
            drawn = (self.particles(args, kwargs, analytic=analytic) for _ in range(n))
            return [torch.stack([p.bound for p in particles]).sum() for particles in drawn]

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings in words about what model and guide depend on."""
        look = self.routing.guide
        of_guide = () if look is None else look.unregistered
        return (
            *self.bare.notes,
            *unregistered_notes(self.bare.unregistered, self.parameters, "model"),
            *unregistered_notes(of_guide, self.parameters, "guide"),
        )

    @property
    def parameters(self) -> dict[str, TracedParameter]:
        """All parameters of guide and model, as the first look found them."""
        look = self.routing.guide
        return {**({} if look is None else look.run.parameters), **self.bare.parameters}

    def with_draws_only(self) -> Variational:
        """The same pair with nothing enumerated under the guide."""
        if not self.routing.enumerated:
            return self
        routing = replace(self.routing, enumerated=())
        return Variational(self.model, self.guide, routing, self.bare, self.max_plate_nesting)

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
        return bool(self.routing.enumerated) and not self.routing.exact

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
        look = self.routing.guide
        one_value = look.points if look is not None else frozenset()
        return set(self.routing.drawn) <= {*self.routing.enumerated, *one_value}


def inner_posterior(
    graph: FactorGraph, weight: Weight = _ONE
) -> tuple[Posterior, tuple[Group, ...]]:
    """p(z | x, h) at one draw h, and the model's factors; anything where the draw has no weight."""
    groups = tuple(g for g in graph.groups if g.role is not Role.GUIDE)
    model = FactorGraph(graph.structure, graph.latents, groups, graph.parameters)
    tables = [g.log_density().detach() for g in groups]
    tables = [
        torch.stack([weight.possible(t, d) for t, d in zip(table, group.dims, strict=True)])
        for table, group in zip(tables, groups, strict=True)
    ]
    return exact_posterior(model, contraction_of(model), tables), groups


def _weight_of(site: Mapping[str, Any]) -> tuple[tuple[str, ...], Tensor, int]:
    """The probability of the value at which a guide site is held; see `Weight`."""
    fn = site["fn"]
    probability = fn.log_prob(site["value"]).exp()
    # Pyro keeps a probability of zero at eps, and the record of a family does not.
    tiny = probability <= 2 * torch.finfo(probability.dtype).eps
    probability = torch.where(tiny, 0.0, probability).to(torch.float64)
    dims = dims_of(site, probability)
    shape = [size for d, size in zip(dims, probability.shape, strict=True) if d]
    size = len(fn.enumerate_support(expand=False))
    return tuple(d for d in dims if d), probability.reshape(shape), size


def _common_scale(graph: FactorGraph) -> float | None:
    """The one number by which all sites of the model are scaled; None if there is none."""
    scales = {
        float(s) if not isinstance(s, Tensor) else math.nan
        for g in graph.groups
        if g.role is not Role.GUIDE and g.n_plates
        for s in g.scale
    }
    only = scales.pop() if len(scales) == 1 else math.nan
    return None if math.isnan(only) else only


def _is_given(site: Mapping[str, Any]) -> bool:
    return role_of(site) in (Role.SAMPLED, Role.POINT)


def _of_all_elements(routing: Routing, structure: Structure) -> frozenset[str]:
    """Drawn sites of which an element reaches terms of other elements of its plate."""
    look = routing.guide
    if look is None:
        return frozenset()
    coupled = {*structure.coupled, *look.coupled}
    below = {n: {n, *(u for u, s in look.scopes.items() if n in s)} for n in routing.shown}
    return frozenset(n for n, reached in below.items() if reached & coupled)
