"""Which Gaussian and conjugate latents leave a guide, and why the others stay.

A latent h leaves the guide where its posterior is Gaussian, or of the form of its prior, for every
value of what is drawn, no guide site that is used reads it, and its guide density is a factor of its
own:

    q(u, h) = q(u) q(h)   becomes   q(u) p(h | x, u),

which tightens the bound by E_q(u)[KL(q(h) ‖ p(h | x, u))]. In a product u·v each factor is exact only
given the other: both stay, unless a strategy chooses one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoStructured

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding, PyroEMError, UsageError, message
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.globs import is_match
from pyro_em.graph.conjugate_children.conjugate_model import ConjugateModel
from pyro_em.graph.conjugate_children.conjugate_reads import kernel_of_prior, read_conjugates
from pyro_em.graph.conjugate_children.conjugate_record import NotConjugate
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.gaussian_lines.culprits import culprits
from pyro_em.graph.gaussian_lines.lines import Line, NotLinear, is_gaussian
from pyro_em.graph.gaussian_lines.read_lines import parts_at, random_values, read_lines
from pyro_em.graph.structure import Structure
from pyro_em.graph.trace import trace_graph
from pyro_em.plan.gaussians import why_not_integrable
from pyro_em.portable import StaysHere
from pyro_em.posteriors.continuous.conjugate_components import conjugated
from pyro_em.posteriors.continuous.gaussian_components import (
    Alike,
    NotSeparate,
    components_of_lines,
    integrated,
)
from pyro_em.posteriors.scales.scaled_components import pairs_alike
from pyro_em.tracing.given import GivenGaussians, References
from pyro_em.tracing.randomness import same_random_state
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role, is_auxiliary, mask_tensor
from pyro_em.variational.drawing import drawn_graph
from pyro_em.variational.guide import GuideLook
from pyro_em.variational.laying import at_references, look_at_given
from pyro_em.variational.pair import Laid, Pair, Routing

# From Gaussian latents that are to be integrated, and reasons why others are not, to all routes.
Decide = Callable[[frozenset[str], Mapping[str, Finding]], tuple[Routing, list[Finding]]]

_WHY = (
    "a Gaussian latent is integrated exactly where all that reads it is a Normal or "
    "MultivariateNormal whose loc is linear in it, whatever is drawn"
)

_WHY_CONJUGATE = (
    "a latent of another prior is integrated exactly where all that reads it is conjugate to it, "
    "whatever is drawn"
)


@dataclass(frozen=True)
class _Against:
    """Latents that cannot be integrated in some routes; none if all can.

    Attributes:
        reasons: Per latent why.
        lasting: Whether that holds whatever the data and the other latents are.
    """

    reasons: dict[str, Finding]
    lasting: bool = False


@dataclass(frozen=True, eq=False)
class Leaving(StaysHere):
    """Finds the latents that leave.

    Attributes:
        model: The user's model.
        guide: Its guide, as a callable.
        bare: The skeleton of the model alone.
        look: What runs of the guide showed.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        nesting: Number of plate dimensions, as the user gave it.
        limit: The budget in cells.
        chosen: Latents for which the user asked for the exact route by name.
        kept: Latents that a strategy leaves to the guide, and which.
        known: Latents that earlier runs of a model of these sites kept, each with the reason.
    """

    model: Model
    guide: Any
    bare: Structure
    look: GuideLook
    args: tuple
    kwargs: dict[str, Any]
    nesting: int | None
    limit: int
    chosen: frozenset[str] = frozenset()
    kept: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, Finding] = field(default_factory=dict)

    def routed(self, decide: Decide) -> tuple[Routing, list[Finding]]:
        """All routes, with as many Gaussian latents integrated as the rules allow.

        Args:
            decide: Gives all routes once it is known which latents are to be integrated.

        Raises:
            UsageError: If strategies ask for two factors of a product.
        """
        wanted, kept = self._candidates()
        bent = {n: f for n, f in kept.items() if self.known.get(n) is f}
        not_linear = frozenset(bent)
        while True:
            routing, problems = decide(frozenset(wanted), kept)
            own = {n: k for n, k in self._kernels.items() if n in routing.gaussian}
            routing = replace(routing, not_linear=not_linear, bent=bent, kernels=own)
            # A guide site that is used may read some of them, which then stay.
            wanted = set(routing.gaussian)
            if problems:  # what it is exact with has no route
                return decide(frozenset(), kept)
            if not wanted:
                return self._with_wishes(routing), problems
            against = self._against(routing)
            if not against.reasons:
                return self._with_wishes(routing), problems
            bent = bent | (against.reasons if against.lasting else {})
            kept |= against.reasons
            not_linear |= against.reasons.keys()
            wanted -= against.reasons.keys()

    def _with_wishes(self, routing: Routing) -> Routing:
        """The routes, with the latents whose exact route was asked for in vain."""
        return replace(routing, wished=tuple(n for n in routing.kept if n in self.chosen))

    @cached_property
    def _kernels(self) -> dict[str, PriorKernel]:
        """The kernels of latents whose priors have conjugate children."""
        found = {n: kernel_of_prior(s["fn"]) for n, s in self.bare.unobserved.items()}
        return {n: k for n, k in found.items() if k is not None}

    # ------------------------------------------------------------------ before any run

    def _candidates(self) -> tuple[set[str], dict[str, Finding]]:
        """Latents that may leave as far as the skeleton and the guide say; why others may not."""
        wanted: set[str] = set()
        kept: dict[str, Finding] = {}
        jointly = drawn_jointly(self.guide, self.look)
        parts = [p.name for p in self.bare.plates.values() if p.size < p.full_size]
        for name in self.bare.latents:
            site = self.bare.unobserved[name]
            conjugate = name in self._kernels and mask_tensor(site) is None
            if not is_gaussian(site["fn"]) and not conjugate:
                continue
            if name in self.look.points and name not in self.chosen:
                continue  # a point estimate is what the user asked for
            problem = "" if conjugate else why_not_integrable(site)
            why = _WHY_CONJUGATE if conjugate else _WHY
            if name in self.kept:
                kept[name] = Finding("", self.kept[name], latents=(name,))
            elif name in jointly:
                kept[name] = _finding("", jointly[name], (name,), why)
            elif parts or self.bare.random_plates:
                shown = next(iter((*parts, *self.bare.random_plates)))
                what = "it holds a part of its rows"
                kept[name] = _finding(f"plate '{shown}'", what, (name,), why)
            elif problem:
                kept[name] = _finding("", problem, (name,), why)
            elif name in self.known:
                kept[name] = self.known[name]
            else:
                wanted.add(name)
        return wanted, kept

    # ------------------------------------------------------------------ from runs

    def _against(self, routing: Routing) -> _Against:
        """Latents that cannot be integrated in these routes."""
        names = routing.gaussian
        pair = routing.pair(self.model, self.guide)
        at = at_references(pair, routing)
        try:
            with same_random_state():
                structure, problems = look_at_given(
                    at, self.args, self.kwargs, self.nesting, self.limit, sparing=not routing.drawn
                )
                if problems:
                    return _Against(_all_of(names, problems[0]))
                return self._from_runs(pair, at.references, structure, names)
        except (NotSeparate, NotLinear, NotConjugate) as error:
            return _Against(_named(names, error.finding))
        except UsageError:
            raise
        except PyroEMError as error:  # what it says without these latents is said elsewhere
            what = str(error).splitlines()[0]
            return _Against(_all_of(names, next(iter(error.problems), Finding("", what))))

    def _from_runs(
        self, pair: Model, at: References, structure: Structure, names: tuple[str, ...]
    ) -> _Against:
        given = at.for_lines(pair)
        run = (given, self.args, self.kwargs, structure)
        try:
            lines = read_lines(*run, bound=False) if at.zeros else {}
        except NotLinear as error:
            against = self._blamed(given, structure)
            return against if against.reasons else _Against(_named(names, error.finding))
        points = _reached_points(lines, structure)
        if points:
            return _Against(points)
        kernels = {n: self._kernels[n] for n in at.units}
        looked, structure = structure.looked, replace(structure, looked=None)
        if isinstance(pair, Pair) and Role.SAMPLED in pair.roles.values():
            laid = Laid(structure, pair, at, kernels)
            drawn_graph(laid, self.args, self.kwargs, limit=self.limit)
            return _Against({})
        whole = at.on(pair)
        graph = trace_graph(
            whole, self.args, self.kwargs, structure, with_bindings=False, looked=looked
        )
        reads = {}
        if kernels:
            own = at.for_reads(pair), self.args, self.kwargs, structure
            reads = read_conjugates(ConjugateModel(*own, kernels))
        if lines:
            parts = parts_at(lines, *run)
            alike = Alike(pairs_alike(lines, reads), frozenset(lines))
            graph = integrated(graph, lines, self.limit, parts, alike=alike)
        if kernels:
            conjugated(graph, reads, kernels, self.limit)
        return _Against({})

    def _blamed(self, given: GivenGaussians, structure: Structure) -> _Against:
        """Latents in which the model is not linear; else factors of products."""
        values = {n: v.requires_grad_() for n, v in random_values(given, 31).items()}
        with torch.enable_grad():
            run = run_enumerated(given.at(values), self.args, self.kwargs, structure, limit=None)
            found = culprits(run, values)
        if found.alone:
            return _Against(dict(found.alone), lasting=True)
        out: dict[str, Finding] = {}
        for factors, finding in found.products:
            favoured = [f for f in factors if f & self.chosen]
            if len(favoured) > 1:
                raise UsageError(_both_chosen([*(f & self.chosen for f in favoured)], finding))
            own = favoured[0] if favoured else frozenset()
            for latent in sorted(frozenset().union(*factors) - own):
                out.setdefault(latent, _given_others(latent, factors, finding))
        return _Against(out)


def look_for_exact(strategy: Any, name: str) -> bool:
    """Whether a dict of strategies asks for the exact route of a latent, by name or glob."""
    if not isinstance(strategy, Mapping):
        return False
    if name in strategy:
        return bool(strategy[name] == "exact")
    hits = [s for pattern, s in strategy.items() if is_match(name, pattern)]
    return bool(hits) and bool(hits[0] == "exact")


def drawn_jointly(guide: Any, look: GuideLook) -> dict[str, str]:
    """Latents whose guide density is no factor of its own, each with the reason."""
    out: dict[str, str] = {}
    for part in guide.modules() if isinstance(guide, torch.nn.Module) else ():
        if isinstance(part, (AutoContinuous, AutoStructured)) and part.prototype_trace is not None:
            what = f"{type(part).__name__} draws its sites jointly"
            out |= {n: what for n in look.sites if n in part.prototype_trace.nodes}
    helpers = {n for n, s in look.sites.items() if is_auxiliary(s)}
    for name, site in look.sites.items():
        above = look.scopes.get(name, frozenset())
        shared = [
            other
            for other, scope in look.scopes.items()
            if other not in helpers and other != name and scope & above & helpers
        ]
        # Of the site's own helpers it may be an image, as AutoNormal's sites are.
        is_delta = type(unwrap(site["fn"])[0]).__name__ == "Delta"
        if shared:
            out.setdefault(name, f"the guide draws it jointly with '{shared[0]}'")
        elif above - helpers:
            shown = min(above - helpers)
            out.setdefault(name, f"its guide density depends on the guide's '{shown}'")
        elif is_delta and not above and name not in look.points:
            out.setdefault(name, "the guide is a Delta")
    return out


def _reached_points(lines: Mapping[str, Line], structure: Structure) -> dict[str, Finding]:
    """Gaussian latents whose values a point estimate's prior reads, with all that these connect."""
    out: dict[str, Finding] = {}
    for component in components_of_lines(lines):
        points = [n for n in component if structure.sites[n].role is Role.POINT]
        if points:
            latents = [n for n in component if structure.sites[n].role is Role.GAUSSIAN]
            what = "it is a point estimate whose prior depends on Gaussian latents"
            out |= _all_of(latents, Finding(f"site '{points[0]}'", what))
    return out


def _finding(where: str, what: str, latents: tuple[str, ...], why: str) -> Finding:
    return Finding(where, what, why, (), latents=latents)


def _all_of(names: Any, finding: Finding) -> dict[str, Finding]:
    return {n: replace(finding, latents=tuple(names)) for n in names}


def _named(names: tuple[str, ...], finding: Finding) -> dict[str, Finding]:
    """The finding for the latents that it names, or for all."""
    return _all_of([n for n in names if n in finding.latents] or names, finding)


def _given_others(latent: str, factors: tuple[frozenset[str], ...], finding: Finding) -> Finding:
    own = next(f for f in factors if latent in f)
    others = ", ".join(f"'{n}'" for f in factors if f is not own for n in sorted(f))
    return replace(
        finding,
        what=f"exact only given {others} ({finding.what.rstrip('.')})",
        fixes=(f"choose it: strategy={{'{latent}': 'exact'}} leaves {others} to the guide",),
        latents=(latent,),
    )


def _both_chosen(chosen: list[frozenset[str]], finding: Finding) -> str:
    names = sorted(frozenset().union(*chosen))
    shown = ", ".join(f"'{n}': 'exact'" for n in names)
    return message(
        f"strategy={{{shown}}}",
        f"{finding.where}: {finding.what}",
        "each of them is exact only where the other has a value",
        [f"leave one to the guide: strategy={{'{names[0]}': 'exact'}}"],
    )
