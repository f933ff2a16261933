"""What users hold of a posterior that is drawn: the guide's, with exact sums under each draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_em.arguments import seed_of, site_name, whole
from pyro_em.distributions import has_finite_support, is_discrete
from pyro_em.elsewhere import OF_DRAWN, NamesFromElsewhere
from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import Latent
from pyro_em.portable import Absent, Portable
from pyro_em.posteriors.posterior import Posterior
from pyro_em.tracing.allocation import watching
from pyro_em.tracing.dependences import Dependences, Reading, changed_since
from pyro_em.tracing.parameters import parameters_at
from pyro_em.tracing.randomness import same_random_state, seeded
from pyro_em.tracing.runs import sites_of
from pyro_em.tracing.turns import alone
from pyro_em.variational.bound import Variational
from pyro_em.variational.drawing import inner_posterior
from pyro_em.variational.particle import Particle
from pyro_em.variational.parts import split


def dependences_of(variational: Variational, args: tuple, kwargs: Mapping[str, Any]) -> Dependences:
    """What a run of guide and model reads, its parameters excepted."""
    reading = Reading(variational.pair, args, kwargs)
    with torch.no_grad(), same_random_state(), watching(reading):
        variational.particle(args, dict(kwargs))
    return reading.finished(p.unconstrained for p in variational.parameters.values())


@dataclass(frozen=True, eq=False)
class DrawnPosterior(Portable, NamesFromElsewhere):
    """q(z, h) = q(h | x) p(z | x, h): draws of the guide, exact given each of them.

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
        summed = f"; summed under them: {', '.join(routing.exact)}" if routing.exact else ""
        return f"DrawnPosterior(from the guide: {drawn}{summed})"

    @alone("sample")
    def sample(self, n: int = 1, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw jointly.

        Args:
            n: Number of draws.
            seed: Seed of the draws; torch's global state otherwise.

        Returns:
            For each latent its drawn values. # (n, *plates, *event)

        Raises:
            UsageError: If n is below one.
        """
        n, seed = whole("sample", "n", n, None), seed_of("sample", seed)
        if n < 1:
            raise UsageError(message("sample", f"n={n}: at least one draw is needed."))
        draws = []
        with seeded(seed):
            for _ in range(n):
                if self.variational.routing.exact:
                    inner = self._inner()
                    values = {**self._of_graph(inner), **{k: v[0] for k, v in inner[1].items()}}
                else:
                    values = self._values()
                draws.append(values)
        names = [*self.variational.routing.drawn, *self.variational.routing.points]
        names += list(self.variational.routing.exact)
        return {k: torch.stack([d[k] for d in draws]) for k in names if k in draws[0]}

    @alone("probs")
    def probs(self, site: str, *, num_particles: int = 10) -> Tensor:
        """Posterior marginals of a discrete latent, averaged over draws of the guide.

        Args:
            site: Its name.
            num_particles: Draws to average over.

        Returns:
            Probabilities. # (*plates, K)

        Raises:
            UsageError: If the site is no discrete latent.
        """
        site_name("probs", "site", site)
        num_particles = whole("probs", "num_particles", num_particles)
        routing = self.variational.routing
        if site in routing.exact:
            with torch.no_grad():
                parts = [self._inner_q(self._particle()).probs(site) for _ in range(num_particles)]
            return torch.stack(parts).mean(0)
        if site not in routing.drawn or routing.guide is None:
            raise UsageError(self._unknown(site))
        parts = []
        with torch.no_grad():
            for _ in range(1 if self._is_root(site) else num_particles):
                fn = self._guide_site(site)["fn"]
                if not has_finite_support(fn):
                    raise UsageError(self._unknown(site))
                support = fn.enumerate_support(expand=True)
                parts.append(torch.stack([fn.log_prob(v) for v in support], -1).exp())
        probs = torch.stack(parts).mean(0)
        return probs / probs.sum(-1, keepdim=True)

    @alone("mean")
    def mean(self, site: str, *, num_particles: int = 100) -> Tensor:
        """The mean of a latent under the guide: its distribution's own, else that of draws.

        Args:
            site: Its name.
            num_particles: Draws, where the distribution has no mean or depends on other draws.
        """
        site_name("mean", "site", site)
        num_particles = whole("mean", "num_particles", num_particles)
        routing = self.variational.routing
        if site not in routing.drawn and site not in routing.points:
            raise UsageError(self._unknown(site))
        with torch.no_grad():
            if self._is_root(site):
                try:
                    # The mean may be the very parameter of the guide.
                    return self._guide_site(site)["fn"].mean.detach().clone()
                except NotImplementedError:  # a transformed distribution
                    pass
            return self.sample(num_particles)[site].mean(0)

    @alone("mode")
    def mode(self) -> dict[str, Tensor]:
        """The most probable value of each latent of finite support, of others the guide's mean."""
        routing = self.variational.routing
        out: dict[str, Tensor] = {}
        if routing.exact:
            with torch.no_grad():
                support = {n: z.support for n, z in self._latents().items()}
            out = {n: support[n][self.probs(n).argmax(-1)] for n in routing.exact}
        for name in (*routing.drawn, *routing.points):
            fn = self._guide_site(name)["fn"]
            if has_finite_support(fn):
                out[name] = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)[
                    self.probs(name).argmax(-1)
                ]
            else:
                mean = self.mean(name)
                out[name] = mean.round() if is_discrete(fn) else mean
        return out

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

    def _unknown(self, site: str) -> str:
        routing = self.variational.routing
        known = ", ".join(f"'{n}'" for n in (*routing.exact, *routing.drawn, *routing.points))
        return message(
            f"site '{site}'",
            f"it is no latent of this kind; the latents are: {known}.",
            "probabilities belong to discrete latents, means to those that the guide draws",
            ["ask for another site", "use .sample(n) and count"],
        )
