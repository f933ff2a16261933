"""`Posterior`: q over all latents with an exact posterior, as users hold it; one class, so that every
kind of latent is asked in the same words, and mostly docstrings: the faces of each kind answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_em.arguments import seed_of, site_name, whole
from pyro_em.elsewhere import OF_SUMMED, NamesFromElsewhere
from pyro_em.errors import UsageError, message
from pyro_em.globs import Values, listed, meant
from pyro_em.graph.factors import FactorGraph
from pyro_em.portable import Portable
from pyro_em.posteriors.answers.conjugate_faces import (
    ConjugateFaces,
    ConjugateSite,
    one_marginal,
    stacked_or_alone,
)
from pyro_em.posteriors.answers.discrete_faces import DiscreteFaces
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.later_faces import LaterFaces
from pyro_em.posteriors.answers.observed_in_part import under_user_names
from pyro_em.posteriors.answers.prediction_errors import prediction_errors
from pyro_em.posteriors.answers.refusals import refuse_gaussian, without_rows
from pyro_em.posteriors.answers.series_faces import covariances, filtered, marginals
from pyro_em.posteriors.answers.site_runs import means
from pyro_em.posteriors.answers.stacks import batch_shape
from pyro_em.posteriors.continuous.gaussian_steps import Solved, conjugates_in, gaussians_in
from pyro_em.posteriors.sampling import codes_of, draw_codes
from pyro_em.tracing.without_sympy import PlainShapes

logger = logging.getLogger("pyro_em")


@dataclass(frozen=True, eq=False)
class Posterior(Portable, NamesFromElsewhere):
    """q(z): the exact posterior over all summed latents, or a product that a user gave.

    Gaussian latents that enter the model linearly are part of it: q(z, h) = q(z) N(h | m(z), S(z)); so
    are conjugate ones (rates, probabilities, simplexes), each with a density of its prior's form. Of
    these ``mean``, ``covariance`` and ``marginal`` answer, of discrete ones ``probs`` and ``joint``.

    Where a method takes a site it takes a glob as well (``"z_*"``, as in `fnmatch`; a name that exists
    is no glob) and stacks its answers along a new first dimension, in order of time: ``z_2`` comes
    before ``z_10``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_em import ExactPosteriorEM
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        ...         pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)
        >>> q = ExactPosteriorEM(model).posterior(torch.tensor([0.0, 1.0]))
        >>> q.probs("z")
        tensor([[0.5000, 0.5000],
                [0.1192, 0.8808]])
        >>> q.mode()["z"].shape
        torch.Size([2])

    Attributes:
        graph: The factor graph at which it was computed.
        cells: Per group the probability of every cell, unscaled. # (members, *sizes)
        counts: Per group expected counts: scaled and masked. # (members, *sizes)
        log_evidence: log p(x; θ) in nats; None for a q that a user gave.
        log_prior: Log density of point-estimated latents in nats; the evidence excludes it.
        bound: ELBO(q, θ) in nats, log prior included; None for a q that a user gave.
        exact: Whether this is p(z | x; θ).
        tables: The log densities behind it.
        entropy_value: H(q) of the discrete latents in nats.
        pointwise: The evidence per element of the outermost data plate, where there is one.
        solved: For groups that integrate Gaussian latents, by their number, the posterior of these.
        later: Answers for Gaussian latents that no observation depends on; None where there are none.
        parameters: Constrained values by name; None where they are those of the graph's trace.
    """

    elsewhere: ClassVar[Mapping[str, str]] = OF_SUMMED

    graph: FactorGraph
    cells: list[Tensor]
    counts: list[Tensor]
    log_evidence: float | None
    exact: bool
    tables: list[Tensor]
    entropy_value: float
    pointwise: Tensor | None = None
    log_prior: float = 0.0
    bound: float | None = None
    solved: Solved = field(default_factory=dict)
    later: LaterFaces | None = None
    parameters: Mapping[str, Tensor] | None = None

    def __repr__(self) -> str:
        shown = [
            f"{n} {tuple(self.graph.dim_size(p) for p in v.plates)}x{v.size}"
            for n, v in list(self.graph.latents.items())[:4]
        ]
        faces = self._gaussian
        for name in list(self._conjugate.places)[: 4 - len(shown)]:
            own = self._conjugate.site(name)
            kind = own.solution.kernel.distribution.__name__
            shown.append(f"{name} {(*own.batch, *own.event)} {kind}")
        for name in list(faces.places)[: 4 - len(shown)]:
            site = faces.site("repr", name)
            shown.append(f"{name} {(*site.batch, *site.event)} Gaussian")
        count = len(self.graph.latents) + len(faces.places) + len(self._conjugate.places)
        more = [", …"] if count > len(shown) else [""]
        about = f"exact={self.exact}, log_evidence={self.log_evidence}"
        return f"Posterior({', '.join([about, *shown])}{more[0]})"

    def entropy(self) -> float:
        """H(q) = −E_q[log q(z, h)] in nats, scaled as the sites are.

        The entropy of the discrete latents, and the expected differential entropy of Gaussian ones
        given these, which may be negative, and is −inf where a variance is zero.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     h = pyro.sample("h", dist.Normal(0.0, 1.0))
            ...     pyro.sample("x", dist.Normal(h, 1.0), obs=x)
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor(2.0))
            >>> round(q.entropy(), 4)  # log(2 π e / 2) / 2
            1.0724
        """
        if not self.solved:
            return self.entropy_value
        return self.entropy_value + self._gaussian.entropy() + self._conjugate.entropy()

    def mean(self, site: str) -> Tensor:
        """The posterior mean of a Gaussian or conjugate latent, or of all steps of a chain.

        Args:
            site: Its name, or a glob.

        Returns:
            E_q[h]; under discrete latents the mean of the mixture; where no observation depends on the
            latent, the mean of its prior. # (*plates, *event), of a glob (T, *plates, *event)

        Raises:
            UsageError: If the model has no such Gaussian latent, or those of a glob differ in shape.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
            >>> ExactPosteriorEM(model).posterior(torch.tensor([2.0, 4.0])).mean("h")
            tensor([1., 2.])
        """
        site_name("mean", "site", site)
        conjugate = self._conjugate_sites(site)
        if conjugate is not None:
            return stacked_or_alone(site, [s.mean() for s in conjugate])
        faces = self._faces_of(site)
        names = faces.names("mean", site)
        if names is None:
            return faces.site("mean", site).mean()
        return means(faces, names)

    def covariance(self, a: str, b: str | None = None, *, lag: int | None = None) -> Tensor:
        """The posterior covariance of a Gaussian latent, or of two, element by element of the plates.

        Elements of one plate may depend on each other too; ``sample`` draws them jointly.

        Args:
            a: One site; left alone also a glob, for the covariance of each.
            b: Another, or a glob: pairs are taken in order of time, and a single site goes with each.
            lag: Of a glob left alone the covariance of steps so far apart, Cov(h_t, h_{t+lag}).

        Returns:
            Of numbers # (*plates,), of vectors # (*plates, D, D); of events of more dimensions with D
            numbers in all. Of two sites # (*plates of both, D_a, D_b) without the D of numbers; zero
            where nothing connects them. Of a glob # (T, ...), with a lag # (T - lag, ...)

        Raises:
            UsageError: If the model has no such Gaussian latent, or the two lie in different plates of
                one dimension.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
            ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
            ...     pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor(3.0))
            >>> q.covariance("a"), q.covariance("a", "b")
            (tensor(0.6667), tensor(-0.3333))
        """
        site_name("covariance", "a", a)
        if b is not None:
            site_name("covariance", "b", b)
        alone = self._conjugate_sites(a) if b is None and lag is None else None
        if alone is not None:
            return stacked_or_alone(a, [s.covariance() for s in alone])
        return covariances(self._faces_of(*([a] if b is None else [a, b])), a, b, lag)

    def marginal(self, site: str) -> Any:
        """The posterior distribution of a continuous latent, for each element of its plates by itself.

        Args:
            site: Its name, or a glob.

        Returns:
            A Pyro distribution over the site's plates: a Normal of numbers, a MultivariateNormal
            of vectors (of events of more dimensions flattened to one); of a conjugate latent one of
            the class of its prior (a Gamma, for an Exponential); below discrete latents a
            MixtureSameFamily of these. Variances may be zero. Of a glob one over # (T, *plates)

        Raises:
            UsageError: If the model has no such Gaussian latent, or those of a glob differ in shape.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     h = pyro.sample("h", dist.Normal(0.0, 1.0))
            ...     pyro.sample("x", dist.Normal(h, 1.0), obs=x)
            >>> ExactPosteriorEM(model).posterior(torch.tensor(2.0)).marginal("h")
            Normal(loc: 1.0, scale: 0.7071067690849304)
            >>> def waiting(x):
            ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            ...     with pyro.plate("rows", len(x)):
            ...         pyro.sample("x", dist.Exponential(rate), obs=x)
            >>> ExactPosteriorEM(waiting).posterior(torch.tensor([1.0, 3.0])).marginal("rate")
            Gamma(concentration: 4.0, rate: 5.0)
        """
        site_name("marginal", "site", site)
        conjugate = self._conjugate_sites(site)
        if conjugate is not None:
            return one_marginal(site, conjugate)
        faces = self._faces_of(site)
        names = faces.names("marginal", site)
        if names is None:
            return faces.site("marginal", site).marginal()
        return marginals(faces, "marginal", names)

    def filtered(self, site: str) -> Any:
        """What was known of each step of a series at that step: given no data that come later.

        Data come at the step that has their number (``y_3`` at ``h_3``); of data with other names the
        order of the model decides, and of rows of a plate what they read.

        Args:
            site: A glob of the steps, discrete or Gaussian, or one of them.

        Returns:
            Of discrete latents p(z_t | x_1, …, x_t) # (T, *plates, K); of Gaussian ones a distribution
            over # (T, *plates) as ``marginal`` gives it, with ``mean`` and ``variance``. Of one name
            without the T.

        Raises:
            UsageError: If there are no such latents, they differ in shape, or this q is not the exact
                posterior of data.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(y):
            ...     h = 0.0
            ...     for t in pyro.markov(range(len(y))):
            ...         h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            ...         pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor([1.0, 2.0]))
            >>> q.filtered("h_*").mean, q.mean("h_*")
            (tensor([0.5000, 1.4000]), tensor([0.8000, 1.4000]))
        """
        site_name("filtered", "site", site)
        with PlainShapes():
            return filtered(self, site, self._faces_of(site))

    def prediction_errors(self, site: str) -> Tensor:
        """Standardised one-step prediction errors of a series, for diagnostics.

            e_t = (y_t − E[y_t | y_1, …, y_{t−1}]) / sd(y_t | y_1, …, y_{t−1})

        Under the model they are uncorrelated, of mean zero and variance one along a series, and
        independent and standard normal where all latents are Gaussian. What discrete latents are at a
        step is summed given the data before it. Entries of a vector are standardised each by itself.
        Other data of the same step are not used.

        Args:
            site: An observed site, or a glob of the steps of a series.

        Returns:
            NaN where nothing was observed. # (*plates, *event), of a glob (T, *plates, *event)

        Raises:
            UsageError: If the data have no mean or variance, as categories.

        Source: Durbin and Koopman (2012), "Time Series Analysis by State Space Methods", section 2.12.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(y):
            ...     h = 0.0
            ...     for t in pyro.markov(range(len(y))):
            ...         h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            ...         pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor([1.0, 2.0]))
            >>> q.prediction_errors("y_*")  # 1 / √2 and (2 − 1/2) / √2.5
            tensor([0.7071, 0.9487])
        """
        site_name("prediction_errors", "site", site)
        with PlainShapes():
            return prediction_errors(self, site)

    def _faces_of(self, *sites: str) -> GaussianFaces:
        """What answers for some Gaussian latents: names or globs."""
        names = () if self.later is None else self.later.names
        unread = {n for s in sites for n in meant(s, names)}
        if unread and self.later is not None:
            return self.later.faces(unread)
        return replace(self._gaussian, others=(*names, *self._conjugate.places))

    def _conjugate_sites(self, site: str) -> list[ConjugateSite] | None:
        """The conjugate latents that a name or a glob means; None where there are none."""
        faces = self._conjugate
        names = meant(site, tuple(faces.places)) if faces.places else ()
        return [faces.site(n) for n in names] or None

    def _gaussian_with_unread(self) -> GaussianFaces:
        """All Gaussian latents together: also those that no observation depends on.

        They are left out where their distribution given the others is not Gaussian, and where the model
        cannot be asked any more.
        """
        if self.later is None or self._conjugate.places:
            return self._gaussian
        try:
            return self.later.faces(self.later.names)
        except UsageError as error:
            logger.debug("draws leave out %s: %s", listed(self.later.names), error)
            return self._gaussian

    @property
    def _gaussian(self) -> GaussianFaces:
        return GaussianFaces(self.graph, gaussians_in(self.solved), self.cells)

    @property
    def _conjugate(self) -> ConjugateFaces:
        return ConjugateFaces(self.graph, conjugates_in(self.solved), self.cells)

    @property
    def _discrete(self) -> DiscreteFaces:
        return DiscreteFaces(self.graph, self.cells, self.tables, self.exact)

    def probs(self, site: str) -> Tensor:
        """The posterior marginals of a latent, or of all steps of a chain.

        Args:
            site: Its name; for a site with ``obs_mask`` the name in the model. Or a glob.

        Returns:
            Probabilities. # (*plates, K), of a glob (T, *plates, K)

        Raises:
            UsageError: If no such latent was summed, or those of a glob differ in shape.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     A, z = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 0
            ...     for t in pyro.markov(range(len(x))):
            ...         z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            ...         pyro.sample(f"x_{t}", dist.Normal(2.0 * z, 1.0), obs=x[t])
            >>> q = ExactPosteriorEM(model).posterior(torch.tensor([0.1, 1.2, 2.3]))
            >>> q.probs("z_*").shape, q.joint("z_*").shape, q.mode()["z_*"]
            (torch.Size([3, 2]), torch.Size([2, 2, 2]), tensor([0, 1, 1]))
        """
        site_name("probs", "site", site)
        return self._discrete.probs(site)

    def assignments(self, site: str) -> Tensor:
        """The most probable value of each row of a latent by itself: the mode of its marginal.

            ẑ_n = argmax_k q(z_n = k)

        Each is right as often as can be (of a chain, the expected number of right steps is largest);
        together they may be impossible, as a path with a forbidden transition: ``mode`` is the most
        probable assignment of all latents together. Of equal probabilities the first value is taken.

        Args:
            site: Its name; for a site with ``obs_mask`` the name in the model, which is as observed
                where it was observed. Or a glob.

        Returns:
            Values of its support. # (*plates, *event), of a glob (T, *plates, *event)

        Raises:
            UsageError: If no such latent was summed, or those of a glob differ in shape.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         z = pyro.sample("z", dist.Bernoulli(0.5))
            ...         pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)
            >>> ExactPosteriorEM(model).posterior(torch.tensor([0.3, 1.8])).assignments("z")
            tensor([0., 1.])
        """
        site_name("assignments", "site", site)
        return self._discrete.assignments(site)

    @property
    def evidence_per_row(self) -> Tensor:
        """log p(x_n; θ) of each row, or sequence, by itself: how well the model fits it, in nats.

        The latents are summed and integrated. A row is an element of the outermost plate of the data;
        one with a sample weight counts so often.

        Returns:
            They add up to ``log_evidence``. # (N,)

        Raises:
            UsageError: If the data have no plate, or rows share a latent: their evidence is one number.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         z = pyro.sample("z", dist.Bernoulli(0.5))
            ...         pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * z), obs=x)
            >>> ExactPosteriorEM(model).posterior(torch.tensor([1.0, 0.0])).evidence_per_row.float()
            tensor([-0.6931, -0.6931])
        """
        if self.pointwise is None:
            raise UsageError(without_rows(self.graph.structure.data_plate))
        return self.pointwise

    def stacked(self, sites: Sequence[str]) -> Tensor:
        """The posterior marginals of several latents, in this order.

        Args:
            sites: Their names, at least one; no globs.

        Returns:
            Probabilities. # (T, *plates, K)

        Raises:
            UsageError: If no such latent was summed, or two differ in shape.
        """
        names = tuple(sites)
        for name in names if self.solved else ():
            refuse_gaussian(self.graph, "stacked", name)
        return self._discrete.stacked(names)

    def joint(self, a: str, b: str | None = None) -> Tensor:
        """The joint posterior of two latents, or of all neighbours along a chain.

        Args:
            a: One site, or a glob.
            b: Another, or a glob: pairs are taken in order of time, and a single site goes with
                each. Left out, a glob's own neighbours are the pairs: (z_0, z_1), (z_1, z_2), …

        Returns:
            Probabilities. # (*plates of both, K_a, K_b), of a glob (pairs, *plates of both, K_a, K_b):
            T − 1 pairs of neighbours

        Raises:
            UsageError: If no such latent was summed, or pairs differ in shape or do not match.
        """
        site_name("joint", "a", a)
        if b is not None:
            site_name("joint", "b", b)
        return self._discrete.joint(a, b)

    def mode(self) -> Values:
        """A jointly most probable assignment of the discrete latents; Gaussian ones at their means.

        The discrete latents are most probable with the others integrated out (on chains the path of
        Viterbi). Each Gaussian latent is at its mean given these, which is its mode; so is each
        conjugate one, whose density may have no mode.

        Returns:
            For each latent its values, a discrete one's from its support # (*plates, *event); a glob
            gives the path of a chain: ``mode()["z_*"]`` # (T, *plates, *event)
        """
        best = self._discrete.best()
        gaussian = self._gaussian_with_unread()
        if gaussian.solved or self.solved:
            codes = self._codes(best, gaussian)
            best |= gaussian.mode(codes)
            best |= self._conjugate.mode(codes)
        return under_user_names(self.graph, best)

    def _codes(self, values: Mapping[str, Tensor], gaussian: GaussianFaces) -> dict[str, Tensor]:
        """The places of values in the supports of the discrete latents. # (*leading, *plates)"""
        read = [self.graph.groups[g] for g in self.solved]
        read += [gaussian.graph.groups[g] for g in gaussian.solved]
        return codes_of(self.graph, values) if any(group.dims[0] for group in read) else {}

    def sample(self, n: int = 1, *, seed: int | None = None) -> Values:
        """Draw jointly from the posterior: discrete latents first, Gaussian ones given these.

        Args:
            n: Number of draws.
            seed: Seed of the draws; torch's global state otherwise.

        Returns:
            For each latent its drawn values # (n, *plates, *event); a glob gives those of a chain, time
            first as everywhere: ``sample(n)["z_*"]`` # (T, n, *plates, *event). Gaussian latents that
            no observation depends on are drawn with the others; those of other families, whose
            posterior is their prior, by `ExactPosteriorEM.predictive`.
        """
        n, seed = whole("sample", "n", n, None), seed_of("sample", seed)
        if n < 1:
            raise UsageError(message("sample", f"n={n}: at least one draw is needed."))
        generator = None
        if seed is not None:
            device = self.cells[0].device if self.cells else None
            generator = torch.Generator(device=device).manual_seed(seed)
        latents = self.graph.latents
        out = {
            name: z.support.new_empty((n, *batch_shape(self.graph, z), *z.support.shape[1:]))
            for name, z in latents.items()
        }
        done = 0
        for size, codes in draw_codes(self._discrete.draws(), n, generator) if latents else ():
            for name, z in latents.items():
                values = z.support[codes[name].reshape(size, *batch_shape(self.graph, z))]
                out[name][done : done + size] = values
            done += size
        gaussian = self._gaussian_with_unread()
        if gaussian.solved or self.solved:
            codes = self._codes(out, gaussian)
            conjugate = self._conjugate
            drawn = conjugate.sample(n, generator, codes)
            out |= gaussian.sample(n, generator, codes, conjugate.by_group(drawn))
            out |= drawn
        return under_user_names(self.graph, out)
