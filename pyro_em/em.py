"""ExactPosteriorEM: expectation-maximisation for any Pyro model with an exact posterior."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.analysis.elbo import ELBOTerms, drawn_terms, elbo_terms
from pyro_em.analysis.evidence import EvidenceEstimate, estimate_evidence
from pyro_em.analysis.ordering import sort_components
from pyro_em.analysis.predictive import predictive_draws
from pyro_em.arguments import by_name, check_path, seed_of, shown, site_name, truth, whole
from pyro_em.elsewhere import OF_EM, NamesFromElsewhere
from pyro_em.errors import PyroEMError, UsageError, message, warn
from pyro_em.fitting import epochs
from pyro_em.fitting.loop import endless_steps
from pyro_em.fitting.origins import Origin, origin_of, told
from pyro_em.fitting.preconditions import (
    refuse_inside_a_model,
    refuse_rows_of_a_guide,
    refuse_unfittable,
    refuse_untrainable,
)
from pyro_em.fitting.progress import Bar
from pyro_em.fitting.report import build_result, build_stochastic_result
from pyro_em.fitting.restarts import run_starts
from pyro_em.fitting.result import EMResult, EMStep
from pyro_em.fitting.run import Settings, best_of
from pyro_em.graph.blame import given_arguments
from pyro_em.graph.structure import form_of, refuse_without_numbers
from pyro_em.plan.plan import Plan, plan_of
from pyro_em.plan.planner import Looker, Strategy
from pyro_em.plan.program import Evaluation, Program
from pyro_em.plan.unrouted import Unrouted
from pyro_em.plan.wishes import (
    FIT_KEYWORDS,
    as_callbacks,
    check_acceleration,
    check_collisions,
    check_constructor,
    check_draws,
    check_fit,
    check_init,
    check_loader,
    check_model_keywords,
    fit_numbers,
    refuse_exact_keywords,
    refuse_stochastic_keywords,
    updates_by_name,
)
from pyro_em.portable import require_picklable
from pyro_em.posteriors.assignments import Start
from pyro_em.posteriors.posterior import Posterior, regrouped
from pyro_em.posteriors.product import product_posterior
from pyro_em.tracing import checkpoint
from pyro_em.tracing.dependences import contents_of
from pyro_em.tracing.parameters import TracedParameter, parameters_at, restore, snapshot, values_of
from pyro_em.tracing.randomness import same_random_state, seeded
from pyro_em.tracing.runs import is_stored, without_state
from pyro_em.tracing.turns import AloneAtEachStep, alone
from pyro_em.updates.decision import forgets
from pyro_em.updates.m_step import apply_floors
from pyro_em.updates.optimizers import Optimizer
from pyro_em.updates.update import Update
from pyro_em.variational.batches import Batch, Batches, first_batch, is_loader
from pyro_em.variational.bound import Variational
from pyro_em.variational.drawn import DrawnPosterior, dependences_of
from pyro_em.variational.trainer import Alternating, Trainer


class ExactPosteriorEM(NamesFromElsewhere):
    r"""Coordinate ascent on the ELBO of an ordinary Pyro model: EM where it can, SVI where it must.

        log p(x; θ) = ELBO(q, θ) + KL(q ‖ p(z | x; θ))

    E-step: q(z) = p(z | x; θ), summed exactly over discrete latents. M-step:
    θ ← argmax E_q[log p(x, z; θ)], in closed form where the model allows it. Then the evidence
    never decreases. Latents without an exact posterior take their values from the guide: as point
    estimates, whose log prior then joins the objective, or as draws, and the bound

        ELBO = E_{q(h | x)}[log Σ_z p(x, z, h; θ) − log q(h | x)]

    is raised by epochs gradients.

    Args:
        model: A Pyro model: a function with ``pyro.param``, or a ``PyroModule``. It needs no
            annotation: no ``config_enumerate``, no ``max_plate_nesting``.
        guide: A guide for any of the latents, an autoguide class or a factory from a model to a
            guide (``AutoNormal``; built on the model with its discrete sites hidden), or
            ``"map"`` for point estimates. Sites with an exact posterior leave theirs unused.
        optim: A callable from a list of tensors to a torch optimiser, or a ``pyro.optim`` object.
            For drawn bounds it moves all parameters (Adam with learning rate 0.005 where None);
            in an exact fit it replaces L-BFGS for parameters without a closed form, with one step
            per M-step.
        strategy: ``"exact"``, ``"guide"`` (the guide for everything that it covers), `Hard`,
            `MonteCarlo`, `Annealed`, or a dict from latents or globs to these.
        updates: What to do with parameters, by name or glob: `ClosedForm`, `LeastSquares`,
            `Gradient`, `Fixed`.
        num_particles: Draws from the guide per step and per bound.
        max_plate_nesting: Number of plate dimensions; found by looking where left out.
        max_enumeration: Cells of the largest tensor that an enumeration may need.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from torch.distributions import constraints
        >>> def model(flips):
        ...     p = pyro.param("p", torch.tensor([0.6, 0.5]), constraint=constraints.unit_interval)
        ...     with pyro.plate("rows", len(flips)):
        ...         coin = pyro.sample("coin", dist.Bernoulli(0.5)).long()
        ...         pyro.sample("heads", dist.Binomial(10, p[coin]), obs=flips)
        >>> pyro.clear_param_store()
        >>> result = ExactPosteriorEM(model).fit(torch.tensor([5.0, 9.0, 8.0, 4.0, 7.0]), tol=1e-9)
        >>> [round(v, 3) for v in result.params["p"].tolist()]
        [0.797, 0.52]
        >>> pyro.clear_param_store()

    Source: Dempster, Laird and Rubin (1977); Neal and Hinton (1998) for the bound.
    """

    elsewhere = OF_EM

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | str | None = None,
        optim: Optimizer | pyro.optim.PyroOptim | None = None,
        *,
        strategy: Strategy | Mapping[str, Strategy] = "exact",
        updates: Mapping[str, Update] | None = None,
        num_particles: int = 1,
        max_plate_nesting: int | None = None,
        max_enumeration: int = 2**27,
    ) -> None:
        updates = updates_by_name(updates)
        check_constructor(
            model,
            guide,
            optim,
            strategy,
            updates,
            num_particles,
            max_plate_nesting,
            max_enumeration,
        )
        self.model = model
        self.num_particles = num_particles
        self._looker = Looker(
            model, guide, optim, strategy, updates, max_plate_nesting, max_enumeration
        )
        self._program: Program | None = None
        self._trainer: Trainer | None = None
        self._total_steps = 0
        self._initial: dict[str, Tensor] = {}
        self._pending: dict[str, Any] | None = None
        self._parameters: dict[str, TracedParameter] = {}
        self._training: dict[str, Any] = {}
        self._form: Any = None
        self._held: frozenset[str] = frozenset()
        self._foreign: set[str] = set()
        self._data: tuple[Any, ...] | None = None
        self._has_forgotten = self._has_loaded = False
        self._reset_names: set[str] = set()

    @property
    def guide(self) -> Any:
        """The guide: as given, or once data have been seen the one that was built."""
        return self._looker.guide if self._looker.built is None else self._looker.built

    # ------------------------------------------------------------------ looking

    @alone("plan")
    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Say how every latent and every parameter would be treated, and why, and the cost.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            A value that prints as a table. A latent without a route has the route ``"none"`` and the
            finding; ``fit``, ``step``, ``posterior`` and ``elbo`` raise it.

        Raises:
            PyroEMError: If the model or its data cannot be used; all findings in one message.
        """
        self._check_arguments(args, kwargs)
        found = self._looker.look_at_routes(args, kwargs)
        if isinstance(found, Unrouted):
            return found.plan(self._looker.updates_for(dict.fromkeys(found.parameters)))
        found = self._noted(found)
        if isinstance(found, Program):
            return found.plan()
        updates = self._looker.updates_for(found.parameters)
        return plan_of(found, updates, self._looker.optim is not None)

    @alone("posterior")
    def posterior(self, *args: Any, **kwargs: Any) -> Posterior | DrawnPosterior:
        """The E-step at the current parameters, for these data; changes nothing.

        Args:
            *args: The model's arguments; data of any size.
            **kwargs: The model's keyword arguments.

        Returns:
            q(z) = p(z | x; θ) with its log evidence; draws of the guide where a latent has no exact
            posterior.

        Raises:
            PyroEMError: If a latent has no route, or the data are impossible.
        """
        found = self._look(args, kwargs, look_only=True)
        if isinstance(found, Program):
            return found.e_step(found.evaluate(), self._total_steps)
        at = snapshot(found.parameters)
        return DrawnPosterior(
            found, args, kwargs, at, dependences=dependences_of(found, args, kwargs)
        )

    @alone("elbo")
    def elbo(
        self,
        *args: Any,
        q: Posterior | Mapping[str, Tensor] | None = None,
        params: Mapping[str, Tensor] | None = None,
        num_particles: int | None = None,
        **kwargs: Any,
    ) -> ELBOTerms:
        """ELBO(q, θ) and its terms.

        Args:
            *args: The model's arguments.
            q: A `Posterior` (of any parameters), or {site: probabilities} standing for the product
                of its marginals; the exact posterior at θ by default.
            params: Constrained values to evaluate at instead of the current ones, which stay.
            num_particles: Draws from the guide; those of the constructor where None.
            **kwargs: The model's keyword arguments.

        Returns:
            The bound in nats; ``float(...)`` of it is its value.
        """
        check_collisions(self.model, args, ("q", "params", "num_particles"), "elbo")
        _check_q(q)
        params = by_name(
            "params", {} if params is None else params, "dict from parameters to values", _PARAMS
        )
        if num_particles is not None:
            check_draws(num_particles, "elbo")
        found = self._look(args, kwargs, look_only=True)
        if isinstance(found, Variational):
            if q is not None:
                program = self._looker.exact_beside(found, args, kwargs)
                if program is None:
                    raise UsageError(
                        message(
                            "elbo",
                            "q was given, but the model has latents without an exact posterior.",
                            "a table of probabilities can stand for discrete latents only",
                            ["leave q out: the guide is q"],
                        )
                    )
            else:
                with parameters_at(found.parameters, params):
                    beside = self._looker.exact_beside(found, args, kwargs)
                    at = None if beside is None else beside.posterior()
                    n = num_particles or self.num_particles
                    return drawn_terms(found, args, kwargs, n, at)
        else:
            program = found
        with parameters_at(program.graph.parameters, params):
            evaluation = program.evaluate()
            at = program.posterior(evaluation)
            if q is None:
                given = program.e_step(evaluation, self._total_steps)
            else:
                given = self._as_posterior(q, evaluation)
            return elbo_terms(evaluation.graph, given, evaluation.tables, at)

    @alone("evaluate_loss")
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """−ELBO at the current parameters, in nats, as ``SVI.evaluate_loss``.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        found = self._look(args, kwargs, look_only=True)
        if isinstance(found, Variational):
            draws = found.draws(args, kwargs, self.num_particles)
            return -float(torch.stack(draws).mean())
        return _loss(found.e_step(found.evaluate(), self._total_steps))

    @alone("estimate_evidence")
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
        return estimate_evidence(self._looker, found, args, kwargs, num_particles, proposal)

    @alone("predictive")
    def predictive(
        self,
        *args: Any,
        num_samples: int = 1000,
        seed: int | None = None,
        keep_observed: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
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
            Per site its values; observations, latents and deterministic sites.
            # (num_samples, *plates, *event)

        Raises:
            UsageError: If num_samples is below one.
        """
        own = ("num_samples", "seed", "keep_observed")
        check_collisions(self.model, args, own, "predictive")
        num_samples = whole("predictive", "num_samples", num_samples, None)
        seed = seed_of("predictive", seed)
        truth("predictive", "keep_observed", keep_observed)
        found = self._look(args, kwargs, look_only=True)
        q: Posterior | DrawnPosterior
        if isinstance(found, Program):
            q, model = found.posterior(), found.model
        else:
            q, model = DrawnPosterior(found, args, kwargs), self.model
        return predictive_draws(model, q, args, kwargs, num_samples, seed, keep_observed)

    # ------------------------------------------------------------------ stepping

    @alone("step")
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One E-step and one M-step; one epochs step on this batch where a guide draws.

        Args:
            *args: The model's arguments. An exact M-step is the maximum for the data of its own
                step: it forgets other data that came before, and warns once.
            **kwargs: The model's keyword arguments.

        Returns:
            The loss (−ELBO, nats) at the parameters *entering* the step, as ``SVI.step``.

        Raises:
            DegenerateError: If an update was degenerate; it has been rolled back. A epochs step may
                return to parameters of up to eight steps before; the message says to which.
        """
        if args and is_loader(args[0]):
            raise UsageError(self._no_loader_in_step(args, kwargs))
        program = self._ready(args, kwargs)
        if isinstance(program, Trainer):
            loss = program.step(args, kwargs)
            self._total_steps += 1
            return loss
        self._say_what_is_forgotten(program, args, kwargs)
        apply_floors(program.graph, program.updates)
        evaluation = program.evaluate()
        q = program.e_step(evaluation, self._total_steps)
        program.m_step(q.counts, evaluation)
        self._total_steps += 1
        return _loss(q)

    def _say_what_is_forgotten(self, program: Program, args: tuple, kwargs: dict[str, Any]) -> None:
        """Warn once where a step of an exact model is taken on other data than what came before."""
        before, self._data = self._data, contents_of((args, kwargs))
        if before in (None, self._data) or self._has_forgotten or not forgets(program.updates):
            return
        self._has_forgotten = True
        warn(
            message(
                "step",
                "these data are others than before, and what was learnt of those is forgotten.",
                "every M-step of an exact model is the maximum for the data of its own step: going "
                "through batches fits the last one",
                ["em.fit(all data): it finds the best parameters for all of them by itself"],
            )
        )

    def _no_loader_in_step(self, args: tuple, kwargs: dict[str, Any]) -> str:
        """Why ``step`` takes no DataLoader, and what to do with this model."""
        if self._is_exact_on(args, kwargs):
            return message(
                "step",
                "a DataLoader was given.",
                "a step of an exact model takes all data at once: every M-step forgets what the "
                "batches before it said",
                ["pass the data themselves: em.fit(data)"],
            )
        return message(
            "step",
            "a DataLoader was given.",
            "one step takes one batch",
            ["for batch in loader: em.step(batch)", "em.fit(loader, num_epochs=...)"],
        )

    def _is_exact_on(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether no guide draws for the batches of a loader."""
        if self.guide is None:
            return True
        batch = first_batch(args[0])
        items = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        try:
            with same_random_state():
                return isinstance(self._look((*items, *args[1:]), kwargs, look_only=True), Program)
        except PyroEMError:  # said by the next call with a batch
            return False

    @alone("m_step")
    def m_step(self, q: Posterior | Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """The M-step for a given q; parameters are written in place.

        Args:
            q: A `Posterior`, or {site: probabilities} for every summed latent. # (*plates, K)
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            UsageError: If q does not fit the model.
            DegenerateError: If an update was degenerate; it has been rolled back.
        """
        _check_q(q, given=True)
        program = self._ready(args, kwargs)
        if isinstance(program, Trainer):
            raise UsageError(_needs_sums("m_step"))
        evaluation = program.evaluate()
        given = self._as_posterior(q, evaluation)
        program.m_step(given.counts, evaluation)

    @alone("steps")
    def steps(self, *args: Any, **kwargs: Any) -> Iterator[EMStep]:
        """EM without an end: yields each step after its M-step; the caller breaks.

        Parameters are in the param store before a step is yielded. Data, masks and weights that
        change between two steps are read anew, whoever changed them; the objective may fall then.
        The iterator ends only if the objective falls on its own, which is said in a warning.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        program = self._ready(args, kwargs)
        if isinstance(program, Trainer):
            stochastic_steps = self._stochastic_steps(program, args, kwargs)
            return AloneAtEachStep("steps", stochastic_steps)
        apply_floors(program.graph, program.updates)
        self._data = contents_of((args, kwargs))
        return AloneAtEachStep("steps", self._steps(program))

    def _stochastic_steps(
        self, trainer: Trainer, args: tuple, kwargs: dict[str, Any]
    ) -> Generator[EMStep, None, None]:
        same = itertools.repeat(Batch(args, kwargs))
        for step in epochs.steps(trainer, same, None, time.perf_counter()):
            self._total_steps += 1
            yield replace(step, params=values_of(trainer.variational.parameters))

    def _steps(self, program: Program) -> Generator[EMStep, None, None]:
        for step in endless_steps(program):
            self._total_steps += 1
            yield step

    @alone("fit")
    def fit(
        self,
        *args: Any,
        max_steps: int = 1000,
        tol: float = 1e-3,
        num_restarts: int = 1,
        init: Start = None,
        seed: int | None = None,
        progress: bool | None = None,
        callbacks: Iterable[Callable[[EMStep], Any]] = (),
        acceleration: str | None = None,
        batch_size: int | None = None,
        num_epochs: int | None = None,
        num_data: int | None = None,
        validation: Any = None,
        schedule: Any = None,
        **kwargs: Any,
    ) -> EMResult:
        """Run EM until the estimated remaining gain is below ``tol``, or epochs steps to an end.

        Args:
            *args: The model's arguments; where a guide draws latents also one ``DataLoader``, whose
                batches are the model's arguments.
            max_steps: Steps at most; exactly so many with ``tol=0``. Stochastic fits run so many
                steps where ``num_epochs`` is None.
            tol: Estimated remaining gain in nats at which to stop: g a / (1 − a), with g the last
                gain and a the largest ratio of successive gains in the last five steps. A plateau
                can hide more.
            num_restarts: Number of starts; the best evidence is kept. The first is ``init``. For the
                others six times as many candidates (random points, k-means, nearest points, random
                assignments) are run for five steps each, two of the six for forty, and the best of
                each kind in turn go on to the end (em-EM: Biernacki, Celeux and Govaert 2003); half
                as many and no second round where every step has to run the model.
                ``result.ends`` says which ended where.
            init: Where the first start begins:

                * None: the values in the model or the param store;
                * ``"kmeans"``: scikit-learn's k-means (best of ten) of what is observed below each
                  row of a latent (each step of a chain), then an M-step. Numbers are standardised;
                  symbols are one-hot codes, Binomial and Multinomial counts proportions; several
                  observed sites stand side by side; covariates are not used. Latents that see the
                  same sites take turns, each on what the one before leaves over. Rows whose label
                  is observed keep it;
                * ``"random points"``: the same rows, with responsibilities by distance to K of
                  them, drawn far apart (as k-means++ draws its centres);
                * ``"random"``: random probabilities for every latent, then an M-step;
                * {site: labels or probabilities}, then an M-step.
            seed: Seed of random starts.
            progress: Whether to show a bar; by default where the output is a terminal.
            callbacks: Called with each `EMStep`; one that returns True stops the fit.
            acceleration: ``"squarem"`` extrapolates along EM steps (Varadhan and Roland 2008): far
                fewer steps where EM is slow, and no monotone path; the best evidence seen is kept.
            batch_size: Stochastic fits: rows per batch, drawn anew in each epoch; the rows of a
                batch count N / batch_size times, what is outside the data's plate once.
            num_epochs: Stochastic fits: passes over the data.
            num_data: Stochastic fits: N, where a ``DataLoader`` does not know it.
            validation: Stochastic fits: arguments (a tensor, a tuple or a ``DataLoader``) whose
                bound is taken after each epoch, into ``history.validation``; callbacks see the latest
                one from the next step on, as ``step.validation``, so that one of them can stop early.
            schedule: Stochastic fits: None moves guide and model together; see `Alternating`.
            **kwargs: The model's keyword arguments.

        Returns:
            The result at the returned parameters. A second ``fit`` continues from there.

        Raises:
            PyroEMError: If the model, the data or the arguments cannot be used.
        """
        max_steps, tol, num_restarts, num_epochs, batch_size, seed = fit_numbers(
            max_steps, tol, num_restarts, num_epochs, batch_size, seed
        )
        check_init(init)
        if progress is not None:
            truth("fit", "progress", progress)
        given = {
            "batch_size": batch_size,
            "num_epochs": num_epochs,
            "num_data": num_data,
            "validation": validation,
            "schedule": schedule,
        }
        callbacks = as_callbacks(callbacks)
        check_fit(max_steps, tol, num_restarts, acceleration, num_epochs)
        begin = time.perf_counter()
        first = first_batch(args[0]) if args and is_loader(args[0]) else None
        if first is not None:
            items = tuple(first) if isinstance(first, (tuple, list)) else (first,)
            check_loader(self.model, len(items), args[1:], kwargs)
            looked = (*items, *args[1:])
        else:
            looked = args
        values = {
            **given,
            "init": init,
            "seed": seed,
            "progress": progress,
            "acceleration": acceleration,
            "max_steps": None if max_steps == 1000 else max_steps,
            "tol": None if tol == 1e-3 else tol,
            "num_restarts": None if num_restarts == 1 else num_restarts,
            "callbacks": callbacks or None,
        }
        passed = [name for name, value in values.items() if value is not None]
        check_collisions(self.model, looked, FIT_KEYWORDS, "fit", passed)
        held = frozenset(pyro.get_param_store())
        with seeded(seed):
            program = self._ready(looked, kwargs)
            origin = self._origin(program, held)
            before = self._total_steps
            if callbacks:
                callbacks = (self._counting_from(before), *callbacks)
            if isinstance(program, Trainer):
                refuse_exact_keywords(init, num_restarts, acceleration)
                result = self._fit_stochastic(
                    program, args, kwargs, given, max_steps, seed, progress, callbacks, begin
                )
                return told(result, origin)
            refuse_stochastic_keywords(given)
            check_acceleration(acceleration, program.is_monotone and program.strategy is None)
            if first is not None:
                raise UsageError(
                    message(
                        "fit",
                        "a DataLoader was given.",
                        "an exact fit uses all data at every step",
                        ["pass the data themselves: em.fit(data)"],
                    )
                )
            bar = Bar(progress, max_steps, num_restarts, program.objective_name)
            settings = Settings(max_steps, tol, callbacks, bar, begin, acceleration)
            runs = run_starts(program, settings, init, num_restarts, seed)
            best = best_of(runs)
            restore(program.graph.parameters, best.parameters)
            self._total_steps = before + best.num_steps
            self._data = contents_of((args, kwargs))
            result = build_result(program, best, runs, settings, init, seed, self._total_steps)
            return told(result, origin)

    def _origin(self, found: Program | Trainer, held: Collection[str]) -> Origin:
        """Where the values come from at which a fit begins; from now on they are its own."""
        seen = found.structure if isinstance(found, Program) else found.variational
        origin = origin_of(
            self._parameters,
            {n: p.given for n, p in seen.parameters.items()},
            held=held,
            first=self._initial,
            foreign=self._foreign,
        )
        if self._has_loaded:
            origin = replace(origin, foreign=())
        self._foreign -= set(origin.foreign)
        return origin

    def _counting_from(self, before: int) -> Callable[[EMStep], None]:
        """A callback that counts steps for those after it, which may save."""

        def count(step: EMStep) -> None:
            self._total_steps = before + step.index + 1

        return count

    def _fit_stochastic(
        self,
        trainer: Trainer,
        args: tuple,
        kwargs: dict[str, Any],
        given: Mapping[str, Any],
        max_steps: int,
        seed: int | None,
        progress: bool | None,
        callbacks: tuple[Callable[[EMStep], Any], ...],
        begin: float,
    ) -> EMResult:
        schedule, validation = given["schedule"], given["validation"]
        if schedule is not None and not isinstance(schedule, Alternating):
            raise UsageError(
                message(
                    "fit",
                    f"schedule={schedule!r} is not understood.",
                    fixes=["use None or Alternating(guide_steps, model_steps)"],
                )
            )
        order = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        batches = Batches(args, kwargs, given["batch_size"], given["num_data"], order)
        held_out = None
        if validation is not None:
            if any(isinstance(v, Tensor) and v.dim() for v in kwargs.values()):
                raise UsageError(
                    message(
                        "fit",
                        "validation was given together with data by keyword.",
                        "keywords go to every call of the model, validation included",
                        ["pass data by position: fit(x, y, validation=(x_val, y_val))"],
                    )
                )
            several = isinstance(validation, (tuple, list))
            aside = tuple(validation) if several else (validation,)
            held_out = Batches(aside, kwargs, None, None, None)
        refuse_rows_of_a_guide(trainer.variational, batches, held_out)
        if held_out is not None:
            epochs.look_at_validation(trainer, held_out)
        parameters = trainer.variational.parameters
        before = self._total_steps
        run = epochs.run(
            trainer,
            batches,
            max_steps=max_steps,
            num_epochs=given["num_epochs"],
            schedule=schedule,
            validation=held_out,
            callbacks=callbacks,
            parameters=lambda: values_of(parameters),
            progress=progress,
            begin=begin,
        )
        self._total_steps = before + len(run.bounds)
        plan = plan_of(
            trainer.variational,
            self._looker.updates_for(parameters),
            self._looker.optim is not None,
        )
        return build_stochastic_result(trainer, batches, run, plan, seed, begin, self._total_steps)

    @alone("sort_components")
    def sort_components(
        self,
        site: str,
        by: str | Tensor,
        *args: Any,
        descending: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Put the components of a latent into an order; the evidence stays as it is.

        Labels are arbitrary: two fits may find the same mixture with its components exchanged.

        Args:
            site: The latent (any step of a chain).
            by: A parameter that the latent indexes (its first entry per component is the key), or a
                key per component. # (K,)
            *args: The model's arguments.
            descending: Largest first.
            **kwargs: The model's keyword arguments.

        Returns:
            The order: new component k was component ``order[k]``. # (K,)

        Raises:
            UsageError: If there is no such latent or key, or the components are not exchangeable.
        """
        site_name("sort_components", "site", site)
        truth("sort_components", "descending", descending)
        program = self._ready(args, kwargs)
        if isinstance(program, Trainer):
            raise UsageError(_needs_sums("sort_components"))
        return sort_components(program, site, by, descending=descending)

    # ------------------------------------------------------------------ keeping

    @alone("save")
    def save(self, path: str | Path) -> None:
        """Save all parameters; the file loads under ``torch.load(weights_only=True)``.

        A complete new file takes the place of the old one at once: a process that is killed, or a
        full disk, leaves the old one as it was. No folder is made.

        Args:
            path: The file.

        Raises:
            UsageError: If the model has not been run yet, or a parameter is not finite.
            FileError: If the file cannot be written; also a `UsageError` and an ``OSError``.
        """
        check_path("save", path)
        if not self._parameters:
            raise UsageError(
                message(
                    "save",
                    "the model has not been run yet, so that its parameters are unknown.",
                    fixes=["call fit, step or plan first"],
                )
            )
        checkpoint.write(path, self._state())

    def _state(self) -> dict[str, Any]:
        """What a file holds: parameters, optimisers, buffers."""
        extra: dict[str, Any] = {"total_steps": self._total_steps}
        if self._trainer is not None:
            extra["training"] = self._trainer.state()
        elif self._training:  # loaded, and not continued yet
            extra["training"] = self._training
        roots = (self.model, self.guide)
        buffers = checkpoint.buffers_of(roots)
        extra["buffers"] = {n: b.detach().cpu().clone() for n, b in buffers.items()}
        named = {self._looker.saved_name(n): p for n, p in self._parameters.items()}
        return checkpoint.pack(named, extra)

    def _arguments(self) -> dict[str, Any]:
        """What the constructor was given."""
        looker = self._looker
        return {
            "model": self.model,
            "guide": looker.guide,
            "optim": without_state(looker.optim),
            "strategy": looker.strategy,
            "updates": dict(looker.updates),
            "num_particles": self.num_particles,
            "max_plate_nesting": looker.max_plate_nesting,
            "max_enumeration": looker.max_enumeration,
        }

    @alone("pickling")
    def __getstate__(self) -> dict[str, Any]:
        """For another process: what the constructor was given, and what was fitted.

        Raises:
            UsageError: If the model, the guide or something else does not pickle, by name.
        """
        given = self._arguments()
        require_picklable("ExactPosteriorEM", given)
        return {"given": given, "fitted": self._state() if self._parameters else self._pending}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state["given"])  # type: ignore[misc]
        self._pending = state["fitted"]

    def __copy__(self) -> ExactPosteriorEM:
        """Another object of the same parts."""
        return type(self)(**self._arguments())

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactPosteriorEM:
        """Another object with copies of what the constructor was given; the param store is one."""
        given = self._arguments()
        try:
            copied = type(self)(**copy.deepcopy(given, memo))
        except (TypeError, RuntimeError) as error:
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    f"it cannot be copied: {error}.",
                    "something that the model, the guide or the optimiser holds has no copies",
                    ["make a new one: ExactPosteriorEM(model, ...)"],
                )
            ) from error
        memo[id(self)] = copied
        return copied

    @alone("load")
    def load(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Load parameters that ``save`` wrote, with this version of the library or an earlier one.

        They are checked against the model at once where the model has been run or its arguments are
        given here, else at the next call with data.

        Args:
            path: The file.
            *args: The model's arguments, optional.
            **kwargs: The model's keyword arguments, optional.

        Raises:
            UsageError: If the file belongs to another model (names the first difference), is
                damaged, of a newer version or something else, or has numbers that are not finite.
            FileError: If it is missing or cannot be read; also a `UsageError` and an ``OSError``.
        """
        check_path("load", path)
        state = checkpoint.read(path)
        if args or kwargs:
            self._look(args, kwargs, look_only=True)
        self._pending = state
        if self._parameters:
            self._restore_pending()

    @alone("reset")
    def reset(self) -> None:
        """Forget what was fitted.

        Parameters that the model initialises leave the param store, so that its next run makes them
        anew; each ``nn.Parameter`` returns to the value at which it was first seen.
        """
        store = pyro.get_param_store()
        built = self._looker.forget()
        self._reset_names = set(self._parameters) - self._foreign
        for name, p in self._parameters.items():
            if isinstance(p.unconstrained, torch.nn.Parameter) and name not in built:
                with torch.no_grad():
                    p.unconstrained.copy_(self._initial[name])
            elif name in store:
                del store[name]
        self._program, self._trainer, self._total_steps, self._pending = None, None, 0, None
        self._initial, self._parameters, self._training = {}, {}, {}
        self._form, self._data = None, None
        self._has_forgotten = self._has_loaded = False
        self._foreign = set()

    # ------------------------------------------------------------------ inside

    def _look(
        self, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False
    ) -> Program | Variational:
        self._check_arguments(args, kwargs)
        return self._noted(self._looker.look(args, kwargs, look_only=look_only))

    def _check_arguments(self, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(is_loader(a) for a in (*args, *kwargs.values())):
            raise UsageError(
                message(
                    "arguments",
                    "a DataLoader was given.",
                    "only fit goes through batches, and takes the loader as its first argument",
                    ["pass one batch: next(iter(loader))", "pass the data themselves"],
                )
            )
        check_model_keywords(self.model, kwargs)
        refuse_inside_a_model()
        self._held = frozenset(pyro.get_param_store())

    def _noted(self, found: Program | Variational) -> Program | Variational:
        """Take note of the parameters that a look found."""
        if isinstance(found, Program):
            self._parameters = dict(found.graph.parameters)
            if self._program is not None:
                found.state = self._program.state
            self._program = found
        else:
            self._parameters = found.parameters
        for name, p in self._parameters.items():
            if name in self._initial:
                continue
            self._initial[name] = p.unconstrained.detach().clone()
            if name in self._held and name not in self._reset_names:
                self._foreign.add(name)
        self._restore_pending()
        return found

    def _restore_pending(self) -> None:
        """Write parameters that ``load`` read before the model had been run."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        self._foreign, self._has_loaded = set(self._parameters), True
        named = {self._looker.saved_name(n): p for n, p in self._parameters.items()}
        checkpoint.restore(state, named)
        checkpoint.restore_buffers(state, (self.model, self.guide))
        self._total_steps = int(state["total_steps"])
        self._trainer, self._training = None, dict(state.get("training", {}))

    def _ready(self, args: tuple, kwargs: dict[str, Any]) -> Program | Trainer:
        """Look, and refuse what has nothing to fit."""
        refuse_without_numbers(given_arguments(self.model, args, kwargs))
        form = _without_rows(form_of(args, kwargs))
        if self._trainer is not None and form == self._form and is_stored(self._parameters):
            return self._trainer  # batches of one form have the same routes
        found = self._look(args, kwargs)
        if isinstance(found, Variational):
            self._form = form
            return self._trainer_of(found)
        program = found
        refuse_unfittable(program)
        for note in program.notes:
            warn(note)
        return program

    def _trainer_of(self, variational: Variational) -> Trainer:
        """The optimisers for a pair; they live on while parameters are the same."""
        refuse_untrainable(variational, self._looker.updates_for(variational.parameters))
        if self._trainer is None:
            for note in variational.notes:
                warn(note)
            self._trainer = Trainer(
                variational,
                self._looker.optim,
                self._looker.updates_for,
                self.num_particles,
                self._looker.saved_name,
            )
            self._trainer.restore(self._training)
            self._training = {}
        else:
            variational.baselines = self._trainer.variational.baselines
            self._trainer.variational = variational
        return self._trainer

    def _as_posterior(
        self, q: Posterior | Mapping[str, Tensor], evaluation: Evaluation
    ) -> Posterior:
        if not isinstance(q, Posterior):
            return product_posterior(evaluation.graph, q, evaluation.tables)
        laid_out = regrouped(q, evaluation.graph)
        if laid_out is None:
            raise UsageError(
                message(
                    "q",
                    "the Posterior belongs to other data or another model.",
                    "its factors differ in sites or sizes",
                    ["compute it with em.posterior on the same arguments"],
                )
            )
        return laid_out


def _without_rows(form: Any) -> Any:
    """What batches of one kind of data share: everything but the number of rows."""
    parts, names = form
    return tuple((*p[:2], p[2][1:]) if isinstance(p, tuple) else p for p in parts), names


_PARAMS = ["pass {'mu': values}, or result.params"]


def _check_q(q: Any, given: bool = False) -> None:
    """Refuse what can be no posterior."""
    if isinstance(q, (Posterior, Mapping)) or (q is None and not given):
        return
    draws = isinstance(q, DrawnPosterior)
    raise UsageError(
        message(
            "q",
            f"it is {shown(q)}, not a posterior of summed latents.",
            "a guide's draws are no table of probabilities" if draws else "",
            [
                "pass what em.posterior(...) returned on the same data",
                "pass {site: probabilities} for every summed latent: {'z': responsibilities}",
            ],
        )
    )


def _needs_sums(method: str) -> str:
    return message(
        method,
        "the guide draws latents of this model.",
        "it works on a posterior that is summed",
        ["use step or fit", "use guide='map' for continuous latents"],
    )


def _loss(q: Posterior) -> float:
    assert q.bound is not None
    return -q.bound
