"""What users hold of a posterior that is drawn: the guide's, with exact sums under each draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor

from pyro_em.arguments import seed_of, site_name, whole
from pyro_em.distributions import has_finite_support, is_discrete
from pyro_em.elsewhere import OF_DRAWN, NamesFromElsewhere
from pyro_em.errors import UsageError, message
from pyro_em.globs import Values, is_glob, listed, matching, stacked_answers, unknown
from pyro_em.graph.factors import Latent
from pyro_em.portable import Absent, Portable
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.tracing.dependences import Dependences, Reading, changed_since
from pyro_em.tracing.draws import sites_of
from pyro_em.tracing.names import names_of, tensors_in
from pyro_em.tracing.operations import OperationLog, watching
from pyro_em.tracing.parameters import parameters_at
from pyro_em.tracing.randomness import same_random_state, seeded
from pyro_em.tracing.turns import alone
from pyro_em.variational.bound import Variational
from pyro_em.variational.drawing import inner_posterior
from pyro_em.variational.particle import Particle
from pyro_em.variational.parts import split


def dependences_of(variational: Variational, args: tuple, kwargs: Mapping[str, Any]) -> Dependences:
    """What a run of guide and model reads, its parameters excepted."""
    reading = Reading(variational.pair, args, kwargs)
    names = names_of(variational.pair, args, kwargs)
    held = [*pyro.get_param_store()._params.items(), *tensors_in(names)]
    with torch.no_grad(), same_random_state(), watching(OperationLog(held, reading)):
        variational.particle(args, dict(kwargs))
    return reading.finished(p.unconstrained for p in variational.parameters.values())


@dataclass(frozen=True, eq=False)
class DrawnPosterior(Portable, NamesFromElsewhere):
    """q(z, h) = q(h | x) p(z | x, h): draws of the guide, exact given each of them.

    Where a method takes a site it takes a glob as well, as `Posterior` does.

    Attributes:
        variational: The pair of model and guide.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        at: Unconstrained parameters of the fit that it belongs to; None for those of the moment.
        exact: False.
        log_evidence: None: it is not known.
        dependences: What model and guide read in that fit.
    """

    elsewhere: ClassVar[Mapping[str, str]] = OF_DRAWN

    variational: Variational
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    at: Mapping[str, Tensor] | None = None
    exact: bool = False
    log_evidence: float | None = None
    dependences: Dependences | None = None

    def _travelling(self) -> dict[str, Any]:
        return {**vars(self), "args": (), "kwargs": {}, "dependences": None}

    def __repr__(self) -> str:
        if isinstance(self.variational, Absent):
            return "DrawnPosterior(a pickled copy, without its model and guide)"
        routing = self.variational.routing
        drawn = ", ".join(routing.drawn)
        under = f"; summed under them: {', '.join(routing.exact)}" if routing.exact else ""
        if routing.gaussian:
            under += f"; integrated under them: {', '.join(routing.gaussian)}"
        return f"DrawnPosterior(from the guide: {drawn}{under})"

    @alone("sample")
    def sample(self, n: int = 1, *, seed: int | None = None) -> Values:
        """Draw jointly.

        Args:
            n: Number of draws.
            seed: Seed of the draws; torch's global state otherwise.

        Returns:
            For each latent its drawn values # (n, *plates, *event); a glob gives those of a chain, time
            first: ``sample(n)["h_*"]`` # (T, n, *plates, *event)

        Raises:
            UsageError: If n is below one.
        """
        n, seed = whole("sample", "n", n, None), seed_of("sample", seed)
        if n < 1:
            raise UsageError(message("sample", f"n={n}: at least one draw is needed."))
        draws = []
        with seeded(seed):
            for _ in range(n):
                if self.variational.routing.solved:
                    inner = self._inner()
                    values = {**self._of_graph(inner), **{k: v[0] for k, v in inner[1].items()}}
                else:
                    values = self._values()
                draws.append(values)
        names = [*self.variational.routing.drawn, *self.variational.routing.points]
        names += list(self.variational.routing.solved)
        return Values({k: torch.stack([d[k] for d in draws]) for k in names if k in draws[0]})

    @alone("probs")
    def probs(self, site: str, *, num_particles: int = 10) -> Tensor:
        """Posterior marginals of a discrete latent, averaged over draws of the guide.

        Args:
            site: Its name, or a glob that takes all steps of a chain.
            num_particles: Draws to average over.

        Returns:
            Probabilities. # (*plates, K), of a glob (T, *plates, K)

        Raises:
            UsageError: If the site is no discrete latent, or those of a glob differ in shape.
        """
        site_name("probs", "site", site)
        names = self._by_glob(site)
        if names is not None:
            return self.stacked(names, num_particles=num_particles)
        num_particles = whole("probs", "num_particles", num_particles)
        routing = self.variational.routing
        summed = site in routing.exact
        of_kind = self._summed_probs if summed else self._guides_probs
        return of_kind([site], num_particles)[site]

    @alone("assignments")
    def assignments(self, site: str, *, num_particles: int = 10) -> Tensor:
        """The most probable value of each row of a discrete latent by itself: see `probs`.

        Args:
            site: Its name, or a glob that takes all steps of a chain.
            num_particles: Draws of the guide to average over.

        Returns:
            Values of its support. # (*plates, *event), of a glob (T, *plates, *event)

        Raises:
            UsageError: If the site is no discrete latent, or those of a glob differ in shape.
        """
        site_name("assignments", "site", site)
        names = self._by_glob(site)
        codes = self.probs(site, num_particles=num_particles).argmax(-1)
        if names is None:
            return self._support(site)[codes]
        each = [self._support(n)[c] for n, c in zip(names, codes, strict=True)]
        return torch.stack(each)

    def _support(self, site: str) -> Tensor:
        """The values of a discrete latent. # (K, *event)"""
        if site in self.variational.routing.exact:
            with torch.no_grad():
                return self._latents()[site].support
        fn = self._guide_site(site)["fn"]
        values: Tensor = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)
        return values

    @alone("probs")
    def stacked(self, sites: Sequence[str], *, num_particles: int = 10) -> Tensor:
        """Posterior marginals of several discrete latents, in this order, from the same draws.

        Args:
            sites: Their names, at least one; no globs.
            num_particles: Draws to average over.

        Returns:
            Probabilities. # (T, *plates, K)

        Raises:
            UsageError: If a site is no discrete latent, or two differ in shape.
        """
        num_particles = whole("probs", "num_particles", num_particles)
        routing = self.variational.routing
        summed = [n for n in sites if n in routing.exact]
        found = self._summed_probs(summed, num_particles) if summed else {}
        if len(summed) < len(sites):
            drawn = [n for n in sites if n not in routing.exact]
            found |= self._guides_probs(drawn, num_particles)
        return stacked_answers("probs", sites, found.__getitem__)

    def _summed_probs(self, sites: Sequence[str], num_particles: int) -> dict[str, Tensor]:
        """Marginals of latents that are summed under each draw."""
        with torch.no_grad():
            qs = [self._inner_q(self._particle()) for _ in range(num_particles)]
            return {n: torch.stack([q.probs(n) for q in qs]).mean(0) for n in sites}

    def _guides_probs(self, sites: Sequence[str], num_particles: int) -> dict[str, Tensor]:
        """Marginals of discrete latents that the guide draws."""
        routing = self.variational.routing
        for site in sites:
            if site not in routing.drawn or routing.guide is None:
                raise UsageError(self._unknown(site))
        parts: dict[str, list[Tensor]] = {site: [] for site in sites}
        roots = all(self._is_root(site) for site in sites)
        with torch.no_grad():
            for _ in range(1 if roots else num_particles):
                run = self._run()
                for site in sites:
                    fn = run[site]["fn"]
                    if not has_finite_support(fn):
                        raise UsageError(self._unknown(site))
                    support = fn.enumerate_support(expand=True)
                    log_p = torch.stack([fn.log_prob(v) for v in support], -1)
                    parts[site].append(log_p.exp())
        means = {site: torch.stack(p).mean(0) for site, p in parts.items()}
        return {site: p / p.sum(-1, keepdim=True) for site, p in means.items()}

    @alone("mean")
    def mean(self, site: str, *, num_particles: int = 100) -> Tensor:
        """The mean of a latent under the guide: its distribution's own, else that of draws.

        Of a Gaussian latent that is integrated under each draw it is the average of its means there.

        Args:
            site: Its name, or a glob that takes all steps of a chain.
            num_particles: Draws, where the distribution has no mean or depends on other draws.

        Returns:
            # (*plates, *event), of a glob (T, *plates, *event)

        Raises:
            UsageError: If the guide draws no such latent, or those of a glob differ in shape.
        """
        site_name("mean", "site", site)
        num_particles = whole("mean", "num_particles", num_particles)
        names = self._by_glob(site)
        if names is None:
            return self._means([site], num_particles)[site]
        return stacked_answers(f"'{site}'", names, self._means(names, num_particles).__getitem__)

    def _means(self, sites: Sequence[str], num_particles: int) -> dict[str, Tensor]:
        """Means of latents that the guide draws, or that are point estimates."""
        routing = self.variational.routing
        for site in sites:
            if site not in (*routing.drawn, *routing.points, *routing.gaussian):
                raise UsageError(self._unknown(site))
        found = {}
        integrated = [site for site in sites if site in routing.gaussian]
        if integrated:
            qs = self._inner_posteriors(num_particles)
            found = {n: torch.stack([q.mean(n) for q in qs]).mean(0) for n in integrated}
            sites = [site for site in sites if site not in found]
        with torch.no_grad():
            roots = [site for site in sites if self._is_root(site)]
            run = self._run() if roots else {}
            for site in roots:
                with suppress(NotImplementedError):  # a transformed distribution has none
                    # The mean may be the very parameter of the guide.
                    found[site] = run[site]["fn"].mean.detach().clone()
            if len(found) < len(sites):
                draws = self.sample(num_particles)
                found = {site: draws[site].mean(0) for site in sites} | found
        return found

    @alone("covariance")
    def covariance(self, a: str, b: str | None = None, *, num_particles: int = 100) -> Tensor:
        """Covariances of Gaussian latents that are integrated under each draw.

            Cov(h) = E[Cov(h | u)] + Cov(E[h | u]) over draws u of the guide

        Args:
            a: Their site.
            b: Another one of the same plates; the same site where None.
            num_particles: Draws to average over.

        Returns:
            # (*plates,) for numbers, and D x D for each element of vectors

        Raises:
            UsageError: If a site is no Gaussian latent with an exact posterior given the draws.
        """
        site_name("covariance", "a", a)
        num_particles = whole("covariance", "num_particles", num_particles)
        b = a if b is None else b
        site_name("covariance", "b", b)
        for site in (a, b):
            if site not in self.variational.routing.gaussian:
                raise UsageError(self._unknown(site))
        qs = self._inner_posteriors(num_particles)
        other = None if a == b else b
        within = torch.stack([q.covariance(a, other) for q in qs]).mean(0)
        u, v = self._deviations(a, qs), self._deviations(b, qs)
        has_events = [self._event_dim(n) > 0 for n in (a, b)]
        if has_events[1]:
            u = u.unsqueeze(-1)
        if has_events[0]:
            v = v.unsqueeze(-2 if has_events[1] else -1)
        return within + (u * v).mean(0)

    def _deviations(self, site: str, qs: Sequence[Posterior]) -> Tensor:
        """Means of a latent under each draw, less their average. # (draws, *plates) or (…, D)"""
        means, event = torch.stack([q.mean(site) for q in qs]), self._event_dim(site)
        means = means.flatten(-event) if event else means
        return means - means.mean(0)

    def _event_dim(self, site: str) -> int:
        return int(self.variational.bare.unobserved[site]["fn"].event_dim)

    @alone("mode")
    def mode(self) -> Values:
        """The most probable value of each latent of finite support, of others the guide's mean.

        Returns:
            For each latent its value # (*plates, *event); a glob gives those of a chain
            # (T, *plates, *event)
        """
        routing = self.variational.routing
        out: dict[str, Tensor] = {}
        if routing.exact:
            probs = self._summed_probs(routing.exact, 10)
            out = {n: self._support(n)[p.argmax(-1)] for n, p in probs.items()}
        for name in (*routing.drawn, *routing.points):
            fn = self._guide_site(name)["fn"]
            if has_finite_support(fn):
                out[name] = self.assignments(name)
            else:
                mean = self.mean(name)
                out[name] = mean.round() if is_discrete(fn) else mean
        out |= self._means(routing.gaussian, 10) if routing.gaussian else {}
        return Values(out)

    @alone("entropy")
    def entropy(self) -> float:
        """One draw of H(q) in nats."""
        with self._held():
            return split(self.variational, self.args, dict(self.kwargs))[0].entropy

    # ------------------------------------------------------------------ inside

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold parameters at those of the fit that this posterior belongs to.

        Raises:
            UsageError: If the data, or something else that was read, are others by now.
        """
        if self.dependences is not None and self.dependences.is_changed():
            raise UsageError(changed_since("posterior"))
        known = self.variational.parameters
        values = {} if self.at is None else {n: v for n, v in self.at.items() if n in known}
        with parameters_at(known, values, unconstrained=True):
            yield

    def _particle(self) -> Particle:
        with self._held():
            return self.variational.particle(self.args, dict(self.kwargs))

    def _inner_q(self, particle: Particle) -> Posterior:
        assert particle.graph is not None
        return inner_posterior(particle.graph)[0]

    @torch.no_grad()
    def _inner_posteriors(self, n: int) -> list[Posterior]:
        """What is solved under each of some draws."""
        return [self._inner_q(self._particle()) for _ in range(n)]

    def _latents(self) -> Mapping[str, Latent]:
        graph = self._particle().graph
        assert graph is not None
        return graph.latents

    def _inner(self) -> tuple[Particle, dict[str, Tensor]]:
        with torch.no_grad():
            particle = self._particle()
        return particle, self._inner_q(particle).sample(1)

    @staticmethod
    def _of_graph(inner: tuple[Particle, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in inner[0].values.items()}

    def _run(self) -> Mapping[str, dict[str, Any]]:
        with self._held():
            return sites_of(self.variational.guide, self.args, dict(self.kwargs))

    def _values(self) -> dict[str, Tensor]:
        return {n: s["value"] for n, s in self._run().items()}

    def _guide_site(self, name: str) -> dict[str, Any]:
        return self._run()[name]

    def _is_root(self, site: str) -> bool:
        """Whether the guide's distribution of a site depends on no other draw."""
        look = self.variational.routing.guide
        return look is not None and not look.scopes.get(site)

    def _names(self) -> tuple[str, ...]:
        routing = self.variational.routing
        return (*routing.solved, *routing.drawn, *routing.points)

    def _by_glob(self, pattern: str) -> list[str] | None:
        """The latents that a glob matches, in order of time; None for a name.

        Raises:
            UsageError: If it matches none.
        """
        names = self._names()
        if pattern in names or not is_glob(pattern):
            return None
        found = matching(pattern, names)
        if not found:
            raise unknown(pattern, names, "latents")
        return found

    def _unknown(self, site: str) -> str:
        names = [n for n in self._names() if n != site]
        others = f"; other latents are: {listed(names)}" if names else ""
        return message(
            f"site '{site}'",
            f"it is no latent of this kind{others}.",
            "probabilities belong to discrete latents, means to continuous ones, covariances to "
            "Gaussian ones with an exact posterior given the draws",
            ["ask for another site", "use .sample(n) and count"],
        )
