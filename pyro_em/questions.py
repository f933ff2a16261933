"""What can be asked of a model at its parameters: posteriors, bounds, evidences, draws, forecasts.

None of it changes a parameter. Each method checks what it was given and hands it to the wing that does
the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_em.analysis.elbo import ELBOTerms, elbo_at
from pyro_em.analysis.evidence import EvidenceEstimate, estimate_evidence
from pyro_em.analysis.forecast import Forecast, forecast
from pyro_em.analysis.generate import Generated, Source, no_points, points_of
from pyro_em.analysis.of_parts import bound_of_parts, elbo_of_parts, log_evidence_of_parts
from pyro_em.analysis.predictive import predictive_draws
from pyro_em.arguments import a_level, by_name, seed_of, truth, whole
from pyro_em.errors import ModelError, PyroEMError, UsageError, message
from pyro_em.fitting.from_arrays import from_arrays
from pyro_em.fitting.parts.chunk_by_chunk import (
    SharedByChunks,
    answers,
    parts_of,
    refuse_q_of_chunks,
)
from pyro_em.fitting.parts.chunked import chunks_in, first_arguments
from pyro_em.fitting.parts.within_budget import in_chunks, serve
from pyro_em.fitting.preconditions import refuse_a_guide
from pyro_em.fitting.session import Session
from pyro_em.globs import Values
from pyro_em.plan.given_q import check_q
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.plan.unobserved import unobserved, with_unobserved
from pyro_em.plan.wishes import (
    check_call,
    check_collisions,
    check_draws,
)
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.tracing.given import without_values
from pyro_em.tracing.long_format import as_written
from pyro_em.tracing.parameters import snapshot
from pyro_em.tracing.randomness import seeds_from
from pyro_em.tracing.scopes import own_store, store_state
from pyro_em.tracing.turns import AloneAtEachStep, alone
from pyro_em.variational.bound import Variational
from pyro_em.variational.drawn import DrawnPosterior, dependences_of


class Questions:
    """The methods of `pyro_em.ExactPosteriorEM` that answer for data at the current parameters.

    Attributes:
        model: The user's model.
    """

    model: Callable[..., Any]
    _session: Session

    @alone("posterior")
    @from_arrays
    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The E-step at the current parameters, for these data; changes nothing.

        Args:
            *args: The model's arguments; data of any size.
            **kwargs: The model's keyword arguments.

        Returns:
            A `Posterior`: q(z) = p(z | x; θ) with its log evidence; a `DrawnPosterior`, draws of the
            guide, where a latent has no exact one. It answers for the moments of Gaussian sites without
            observations too, a forecast or a network of which nothing is observed. Of `Chunks` an
            iterator over the posterior of each, at the parameters when it is asked for; conjugate
            latents outside the rows have the posterior that all rows give them.

        Raises:
            PyroEMError: If a latent has no route, or the data are impossible.
        """
        chunks = chunks_in(args)
        if chunks is not None:
            outside = SharedByChunks(self._session, chunks, args[1:], kwargs)
            each = answers(lambda own: self._posterior(own, kwargs, outside), chunks, args[1:])
            return AloneAtEachStep("posterior", each)
        return self._posterior(args, kwargs)

    def _posterior(
        self, args: tuple, kwargs: dict[str, Any], outside: SharedByChunks | None = None
    ) -> Posterior | DrawnPosterior:
        found = self._look(args, kwargs, look_only=True)
        if isinstance(found, Program):
            shared = None if outside is None else outside.of_next(found)
            if shared is None and found.strategy is None:
                q = found.posterior_at()
            else:
                q = found.e_step(found.evaluate(outside=shared), self._session.total_steps)
            return with_unobserved(q, unobserved(found, self._session.request.max_enumeration))
        at = snapshot(found.parameters)
        return DrawnPosterior(
            found, args, kwargs, at, dependences=dependences_of(found, args, kwargs)
        )

    @alone("elbo")
    @from_arrays
    def elbo(
        self,
        *args: Any,
        q: Posterior | Mapping[str, Any] | None = None,
        params: Mapping[str, Tensor] | None = None,
        num_particles: int | None = None,
        **kwargs: Any,
    ) -> ELBOTerms:
        """ELBO(q, θ) and its terms.

        Args:
            *args: The model's arguments.
            q: A `Posterior` (of any parameters), or {site: probabilities} standing for the product
                of its marginals; for Gaussian latents {site: Normal(...)} or a MultivariateNormal
                (those left out have their posterior at θ). The exact posterior at θ by default.
            params: Constrained values to evaluate at instead of the current ones, which stay.
            num_particles: Draws from the guide; those of the constructor where None.
            **kwargs: The model's keyword arguments.

        Returns:
            The bound in nats; ``float(...)`` of it is its value.
        """
        check_collisions(self.model, args, ("q", "params", "num_particles"), "elbo")
        check_q(q)
        params = by_name(
            "params", {} if params is None else params, "dict from parameters to values", _PARAMS
        )
        if num_particles is not None:
            check_draws(num_particles, "elbo")
        chunks = chunks_in(args)
        if chunks is not None:
            refuse_q_of_chunks(q)
            return elbo_of_parts(
                self._parts("elbo", args, kwargs), params, self._session.total_steps
            )
        found = self._look(args, kwargs, look_only=True)
        planner, n = self._session.planner, num_particles or self._session.num_particles
        return elbo_at(planner, found, args, kwargs, q, params, n, self._session.total_steps)

    @alone("score")
    @from_arrays
    def score(self, *args: Any, **kwargs: Any) -> float:
        """The log evidence of these data at the current parameters: of new data, how well they fit.

            log p(x; θ) = log Σ_z p(x, z; θ)

        It is the total over all rows, not their mean; ``em.posterior(x).evidence_per_row`` is that of
        each row.

        Args:
            *args: The model's arguments; data of any size.
            **kwargs: The model's keyword arguments.

        Returns:
            The log evidence in nats; of a model with point estimates given these, without their
            log prior.

        Raises:
            UsageError: If the guide draws latents: the log evidence is not known then.
            PyroEMError: If the model or the data cannot be used, or the data are impossible.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         z = pyro.sample("z", dist.Bernoulli(0.5))
            ...         pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * z), obs=x)
            >>> round(ExactPosteriorEM(model).score(torch.tensor([1.0, 0.0])), 4)
            -1.3863
        """
        args, found = self._within_budget(args, kwargs)
        if found is None:
            return log_evidence_of_parts(lambda: self._parts("score", args, kwargs))
        return refuse_a_guide(found, "score", _SCORES).log_evidence()

    @alone("evaluate_loss")
    @from_arrays
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """−ELBO at the current parameters, in nats, as ``SVI.evaluate_loss``.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        args, found = self._within_budget(args, kwargs)
        if found is None:
            parts = self._parts("evaluate_loss", args, kwargs)
            return -bound_of_parts(parts, self._session.total_steps)
        if isinstance(found, Variational):
            draws = found.draws(args, kwargs, self._session.num_particles)
            return -float(torch.stack(draws).mean())
        return -found.bound(self._session.total_steps)

    @alone("estimate_evidence")
    @from_arrays
    def estimate_evidence(
        self,
        *args: Any,
        num_particles: int = 1000,
        proposal: str | None = None,
        **kwargs: Any,
    ) -> EvidenceEstimate:
        """The importance-weighted bound on the log evidence, with diagnostics of its weights.

        log p(x) ≥ E[log (1/S) Σ_s p(x, z_s) / q(z_s)], tight as S grows.

        Args:
            *args: The model's arguments.
            num_particles: Draws S.
            proposal: Where z_s comes from: ``"guide"`` (latents that are summed exactly stay so),
                ``"prior"`` or ``"posterior"`` (discrete models only); by default the guide where
                it draws anything, else the posterior.
            **kwargs: The model's keyword arguments.

        Returns:
            The bound, its standard error, effective sample size and Pareto k̂.

        Raises:
            UsageError: If there is no such proposal for this model.
        """
        check_collisions(self.model, args, ("num_particles", "proposal"), "estimate_evidence")
        found = self._look(args, kwargs, look_only=True)
        return estimate_evidence(
            self._session.planner, found, args, kwargs, num_particles, proposal
        )

    @alone("predictive")
    @from_arrays
    def predictive(
        self,
        *args: Any,
        num_samples: int = 1000,
        seed: int | None = None,
        keep_observed: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Draws from the posterior predictive, p(x_new | x) = E_{q(z | x)}[p(x_new | z)].

        Latents come from their exact posterior (from the guide where there is none), and the model
        draws what it observes.

        Args:
            *args: The model's arguments.
            num_samples: Number of draws.
            seed: Seed of the draws; torch's global state otherwise.
            keep_observed: Whether observed values stay, so that only what is missing is drawn:
                imputations of ``obs_mask`` sites.
            **kwargs: The model's keyword arguments.

        Returns:
            Per site its values; observations, latents and deterministic sites
            # (num_samples, *plates, *event); a glob takes all steps of a chain, time first:
            ``["x_*"]`` # (T, num_samples, *plates, *event). Of `Chunks` an iterator over the draws
            of each, independent of each other.

        Raises:
            UsageError: If num_samples is below one.
        """
        own = ("num_samples", "seed", "keep_observed")
        check_collisions(self.model, args, own, "predictive")
        num_samples = whole("predictive", "num_samples", num_samples, None)
        seed = seed_of("predictive", seed)
        truth("predictive", "keep_observed", keep_observed)
        chunks = chunks_in(args)
        if chunks is not None:
            seeds = seeds_from(seed)
            each = answers(
                lambda own: self._predictive(own, kwargs, num_samples, next(seeds), keep_observed),
                chunks,
                args[1:],
            )
            return AloneAtEachStep("predictive", each)
        return self._predictive(args, kwargs, num_samples, seed, keep_observed)

    def _predictive(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        num_samples: int,
        seed: int | None,
        keep_observed: bool,
    ) -> Values:
        found = self._look(args, kwargs, look_only=True)
        q: Posterior | DrawnPosterior
        if isinstance(found, Program):
            q = found.posterior_at()
        else:
            q = DrawnPosterior(found, args, kwargs)
        model = as_written(without_values(found.model))
        return predictive_draws(model, q, args, kwargs, num_samples, seed, keep_observed)

    @alone("generate")
    @from_arrays
    def generate(self, n: int, /, *args: Any, seed: int | None = None, **kwargs: Any) -> Values:
        """Draw new data from the model at its parameters, latents included.

            z ~ p(z; θ),    x ~ p(x | z; θ)

        Nothing is conditioned on: the arguments only say what the model is called with. Arguments that
        it observes, or that do no more than give a plate its size, are brought to ``n`` rows; what
        else has a value for each row (covariates, indices of groups, masks, lengths) is the user's to
        give, with ``n`` rows. Where ``n`` is the number of rows at hand, all stays as it is.

        Args:
            n: Elements of the outermost plate that all observations share: rows of a table, sequences
                of as many steps as those given. Steps, where the data are one series without a plate.
            *args: The model's arguments; the data may be those of the fit, or None where the model
                takes that.
            seed: Seed of the draws; torch's global state otherwise.
            **kwargs: The model's keyword arguments.

        Returns:
            Per site its values # (*plates, *event); a glob takes all steps, ``["x_*"]``
            # (T, *plates, *event). What is masked or missing in the data is drawn too. Latents with
            point estimates outside the plate are at these, those inside are drawn anew; all others
            are drawn from their prior, whatever the guide says of them.

        Raises:
            UsageError: If an argument has other rows than ``n`` and is read; if observations are read
                before they are drawn; if the model's data are not among its arguments; if a
                ``pyro.factor`` reads a latent or data, which draws would leave out.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         z = pyro.sample("z", dist.Bernoulli(0.5))
            ...         pyro.sample("x", dist.Normal(10 * z, 1.0), obs=x)
            >>> new = ExactPosteriorEM(model).generate(1000, torch.zeros(3), seed=0)
            >>> new["x"].shape, bool(((new["x"] > 5) == (new["z"] == 1)).all())
            (torch.Size([1000]), True)
        """
        check_collisions(self.model, args, ("seed",), "generate")
        n, seed = whole("generate", "n", n), seed_of("generate", seed)
        return self._generated(n, first_arguments(args), kwargs, seed, "generate").values

    def _generated(
        self, n: int | None, args: tuple, kwargs: dict[str, Any], seed: int | None, where: str
    ) -> Generated:
        """New data, with the arguments that hold them; as many rows as there are where n is None."""
        session = self._session
        check_call(self.model, args, kwargs, where)
        if session.request.guide is None and session.pending is None:
            session.check_arguments(args, kwargs)
            with own_store(store_state()), session.buffers_kept():
                return Source.of(self.model, n, args, kwargs, no_points, where).drawn(seed)
        with session.buffers_kept():
            points = partial(self._points, where=where)
            return Source.of(self.model, n, args, kwargs, points, where).drawn(seed)

    def _points(self, *ways: tuple[tuple, dict[str, Any]], where: str) -> dict[str, Tensor]:
        """Values of latents at point estimates, with the first arguments on which the model is read."""
        for args, kwargs in ways[:-1]:
            with contextlib.suppress(PyroEMError):
                return points_of(self._look(args, kwargs, look_only=True), args, kwargs)
        args, kwargs = ways[-1]
        return points_of(self._look(args, kwargs, look_only=True), args, kwargs)

    @alone("forecast")
    @from_arrays
    def forecast(
        self,
        *args: Any,
        level: float = 0.95,
        num_samples: int = 1000,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Forecast:
        """Predict the missing entries of a longer series, at the current parameters.

            p(y_{T+1}, …, y_{T+H} | y_1, …, y_T; θ)

        Steps to predict are NaN in the data, whatever ``missing`` is, or under ``obs_mask``; inputs of
        theirs are the user's to give. Entries that are missing in between are predicted as well, given
        what comes after them. Nothing is learned from the longer series.

        Args:
            *args: The model's arguments, for the longer series.
            level: The probability that an interval holds.
            num_samples: Number of draws.
            seed: Seed of the draws; torch's global state otherwise.
            **kwargs: The model's keyword arguments.

        Returns:
            Means, intervals and draws of each observed site with missing entries. Means are exact for
            numbers and normal vectors of the families that the library knows, intervals where an entry
            is a normal or a mixture of normals; otherwise, and where a guide draws, they are those of
            the draws. The forecast says of which sites.

        Raises:
            UsageError: If nothing is missing, or an argument cannot be used.
            PyroEMError: If the model or the data cannot be used.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(y):
            ...     h = 0.0
            ...     for t in pyro.markov(range(len(y))):
            ...         h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            ...         pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])
            >>> y = torch.tensor([1.0, 2.0, float("nan"), float("nan")])
            >>> forecast = ExactPosteriorEM(model).forecast(y, seed=0)
            >>> forecast.means["y_*"], forecast.lower["y_*"]
            (tensor([1.4000, 1.4000]), tensor([-1.7603, -2.3188]))
            >>> forecast.draws["y_*"].shape
            torch.Size([2, 1000])
        """
        check_collisions(self.model, args, ("level", "num_samples", "seed"), "forecast")
        level = a_level("forecast", level)
        num_samples = whole("forecast", "num_samples", num_samples, None)
        seed = seed_of("forecast", seed)
        if num_samples < 1:
            raise UsageError(
                message("forecast", f"num_samples={num_samples}: at least one draw is needed.")
            )
        found = self._session.look_at_gaps(args, kwargs)
        return forecast(found, args, kwargs, level, num_samples, seed)

    # ------------------------------------------------------------------ inside

    def _look(
        self, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False
    ) -> Program | Variational:
        return self._session.look(args, kwargs, look_only=look_only)

    def _within_budget(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, Program | Variational | None]:
        """The arguments with what they are; in chunks, with nothing, where all rows are too many."""
        if chunks_in(args) is not None:
            return args, None
        try:
            return args, self._look(args, kwargs, look_only=True)
        except ModelError as error:
            fewer = in_chunks(error, args, kwargs)
            if fewer is None or serve(self._session, fewer, kwargs, look_only=True) is None:
                raise
            return fewer, None

    def _parts(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Iterator[Part]:
        chunks = chunks_in(args)
        assert chunks is not None
        return parts_of(self._session, chunks, args[1:], kwargs, method)


_SCORES = (
    "the log evidence is not known, only bounds on it",
    ["call em.elbo(x) for the bound", "call em.estimate_evidence(x) for a tighter one"],
)


_PARAMS = ["pass {'mu': values}, or result.params"]
