"""ExactPosteriorEM: expectation-maximisation for any Pyro model with an exact posterior; one class, so
that users find all methods in one place, and mostly their docstrings.

What can be asked at the parameters comes from `pyro_em.questions`, what outlives a fit from
`pyro_em.fitting.keeping`, and planning, fitting and its steps are here. Each checks what it was given
and hands it to the wing that does the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
from torch import Tensor

from pyro_em.analysis.ordering import a_key, sort_components
from pyro_em.arguments import site_name, truth
from pyro_em.elsewhere import OF_EM, NamesFromElsewhere
from pyro_em.fitting import stepping
from pyro_em.fitting.fit import fit
from pyro_em.fitting.from_arrays import from_arrays
from pyro_em.fitting.keeping import Keeping
from pyro_em.fitting.partial import partial_fit
from pyro_em.fitting.parts.chunked import first_arguments
from pyro_em.fitting.parts.within_budget import within_budget
from pyro_em.fitting.preconditions import refuse_a_guide
from pyro_em.fitting.results.history import EMStep
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.session import Session
from pyro_em.plan.fit_wishes import fit_wishes
from pyro_em.plan.given_q import as_posterior, check_q
from pyro_em.plan.plan import Plan
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request, Strategy
from pyro_em.plan.unrouted import Unrouted
from pyro_em.plan.wishes import (
    check_collisions,
    check_constructor,
    updates_by_name,
)
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.starts.assignments import Start
from pyro_em.questions import Questions
from pyro_em.resampling.bootstrap import bootstrap
from pyro_em.resampling.refits import Again
from pyro_em.tracing.missing import WithMissing
from pyro_em.tracing.turns import AloneAtEachStep, alone
from pyro_em.updates.gradients.optimizers import Optimizer
from pyro_em.updates.update import Update
from pyro_em.variational.trainer import Trainer


class ExactPosteriorEM(Questions, Keeping, NamesFromElsewhere):
    r"""Coordinate ascent on the ELBO of an ordinary Pyro model: EM where it can, SVI where it must.

        log p(x; θ) = ELBO(q, θ) + KL(q ‖ p(z | x; θ))

    E-step: q(z) = p(z | x; θ), summed exactly over discrete latents. M-step:
    θ ← argmax E_q[log p(x, z; θ)], in closed form where the model allows it. Then the evidence
    never decreases. Latents without an exact posterior take their values from the guide: as point
    estimates, whose log prior then joins the objective, or as draws, and the bound

        ELBO = E_{q(h | x)}[log Σ_z p(x, z, h; θ) − log q(h | x)]

    is raised by stochastic gradients.

    Every method takes a model's arguments as the model does. Arrays of numpy, DataFrames and Series of
    pandas among them are read as tensors, which the plan and the log say: copies of the same kind of
    numbers (float64 stays float64), categories as their codes. What the model annotates with
    ``numpy.ndarray`` or ``pandas.DataFrame`` stays as it is, and so does all where the model fails on
    tensors and not on arrays.

    Args:
        model: A Pyro model: a function with ``pyro.param``, or a ``PyroModule``. It needs no
            annotation: no ``config_enumerate``, no ``max_plate_nesting``.
        guide: A guide for any of the latents, an autoguide class or a factory from a model to a
            guide (``AutoNormal``; built on the model with its discrete sites hidden), or
            ``"map"`` for point estimates. Sites with an exact posterior leave theirs unused: discrete
            ones within the budget, and Gaussian ones that are linear given all that is drawn, where
            no other guide site reads them and their guide density is a factor of its own.
        optim: A callable from a list of tensors to a torch optimiser, or a ``pyro.optim`` object.
            For drawn bounds it moves all parameters (Adam with learning rate 0.005 where None);
            in an exact fit it replaces L-BFGS for parameters without a closed form, with one step
            per M-step.
        strategy: ``"exact"``, ``"guide"`` (the guide for everything that it covers: SVI), `Hard`,
            `MonteCarlo`, `Annealed`, or a dict from latents or globs to these. Of a product u·v of
            Gaussian latents ``{"u": "exact"}`` integrates u under draws of v, and with ``guide="map"``
            at the point estimates of all others.
        updates: What to do with parameters, by name or glob: `ClosedForm`, `LeastSquares`,
            `Newton`, `Gradient`, `Fixed`.
        num_particles: Draws from the guide per step and per bound.
        max_plate_nesting: Number of plate dimensions; found by looking where left out.
        max_enumeration: Cells of the largest tensor that an enumeration may need. Where a table of all
            rows would be above it, ``fit``, ``score`` and ``evaluate_loss`` go through chunks of
            rows, if these have a thousand rows at least.
        missing: ``"nan"``: NaN in observed floating values is missing at random, and integrated out
            exactly. Every element under ``to_event`` is an entry of its own, in every family; a
            MultivariateNormal (also within a MixtureSameFamily) is conditioned on the coordinates
            that are seen, so that ``fit`` is the EM of Little and Rubin; of other vectors
            (Multinomial, Dirichlet) the whole event is lost. Where a row has nothing that is seen
            it does not count. NaN in anything else that a density reads is refused. By default NaN
            in observed values is refused too.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
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

    Source: Dempster, Laird and Rubin (1977); Neal and Hinton (1998) for the bound; Little and Rubin
    (2002) for missing data.
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
        missing: str | None = None,
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
            missing,
        )
        self.model = model
        request = Request(
            model if missing is None else WithMissing(model),
            guide,
            optim,
            strategy,
            updates,
            max_plate_nesting,
            max_enumeration,
        )
        self._session = Session(request, num_particles)

    @property
    def guide(self) -> Any:
        """The guide: as given, or once data have been seen the one that was built."""
        return self._session.planner.guide_now

    @property
    def num_particles(self) -> int:
        """Draws from the guide per step and per bound."""
        return self._session.num_particles

    @num_particles.setter
    def num_particles(self, number: int) -> None:
        self._session.num_particles = number

    # ------------------------------------------------------------------ looking

    @alone("plan")
    @from_arrays
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
        args = first_arguments(args)
        found = self._session.look_at_routes(args, kwargs)
        if isinstance(found, Unrouted):
            args, found = within_budget(self._session, found, args, kwargs)
        return self._session.planner.plan_on(found, args, kwargs)

    # ------------------------------------------------------------------ stepping

    @alone("step")
    @from_arrays
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One E-step and one M-step; one stochastic step on this batch where a guide draws.

        Args:
            *args: The model's arguments. An exact M-step is the maximum for the data of its own
                step: it forgets other data that came before, and warns once.
            **kwargs: The model's keyword arguments.

        Returns:
            The loss (−ELBO, nats) at the parameters *entering* the step, as ``SVI.step``.

        Raises:
            DegenerateError: If an update was degenerate; it has been rolled back. A stochastic step may
                return to parameters of up to eight steps before; the message says to which.
        """
        return stepping.step(self._session, args, kwargs)

    @alone("m_step")
    @from_arrays
    def m_step(self, q: Posterior | Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """The M-step for a given q; parameters are written in place.

        Args:
            q: A `Posterior`, or {site: probabilities} for every summed latent # (*plates, K); by glob
                those of a chain, {"z_*": probabilities} # (T, *plates, K). For Gaussian latents a
                Normal or MultivariateNormal; those left out have their posterior.
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            UsageError: If q does not fit the model.
            DegenerateError: If an update was degenerate; it has been rolled back.
        """
        check_q(q, is_needed=True)
        program = refuse_a_guide(self._ready(args, kwargs), "m_step")
        evaluation = program.evaluate()
        given = as_posterior(q, evaluation)
        evaluation = replace(evaluation, solved=given.solved)
        program.m_step(given.counts, evaluation, self._session.m_step_state, expand=False)

    @alone("steps")
    @from_arrays
    def steps(self, *args: Any, **kwargs: Any) -> Iterator[EMStep]:
        """EM without an end: yields each step after its M-step; the caller breaks.

        Parameters are in the param store before a step is yielded. Data, masks and weights that
        change between two steps are read anew, whoever changed them; the objective may fall then.
        The iterator ends only if the objective falls on its own, which is said in a warning.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        return AloneAtEachStep("steps", stepping.steps(self._session, args, kwargs))

    @alone("fit")
    @from_arrays
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
        process_group: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = True,
        on_checkpoint_error: str = "warn",
        online: Any = None,
        **kwargs: Any,
    ) -> EMResult:
        """Run EM until the estimated remaining gain is below ``tol``, or stochastic steps to an end.

        Args:
            *args: The model's arguments; `Chunks` in their place for data larger than memory; where a
                guide draws latents also one ``DataLoader``, whose batches are the model's arguments.
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
                * ``"random"``: random probabilities for every discrete latent, draws from the prior of
                  Gaussian ones, then an M-step;
                * {site: labels or probabilities}, by glob those of a chain, {site: values} of Gaussian
                  latents, then an M-step.
            seed: Seed of random starts.
            progress: Whether to show a bar; by default where the output is a terminal.
            callbacks: Called with each `EMStep`; one that returns True stops the fit.
            acceleration: Far fewer steps where EM is slow, on a path that may fall; the best evidence
                seen is kept, every E-step is counted, and the last steps are plain ones:

                * ``"quasi-newton"``: Newton steps for θ = EM(θ) with a derivative from the last
                  differences (Zhou, Alexander and Lange 2011);
                * ``"squarem"``: extrapolation along two EM steps (Varadhan and Roland 2008);
                * ``"auto"``: plain steps where they are quick, else ``"quasi-newton"``.
            batch_size: Stochastic fits: rows per batch, drawn anew in each epoch; the rows of a
                batch count N / batch_size times, what is outside the data's plate once.
            num_epochs: Stochastic fits, and ``online``: passes over the data. Each chunk of `Chunks` is
                a batch, in the order of their source.
            num_data: Stochastic fits: N, where a ``DataLoader`` does not know it.
            validation: Stochastic fits: arguments (a tensor, a tuple or a ``DataLoader``) whose
                bound is taken after each epoch, into ``history.validation``; callbacks see the latest
                one from the next step on, as ``step.validation``, so that one of them can stop early.
            schedule: Stochastic fits: None moves guide and model together; see `Alternating`.
            process_group: A process group of ``torch.distributed``, all of whose processes make this
                call. Arguments whose first dimension is the outermost plate's hold the rows of this
                process, none or more; all else has to be the same everywhere, and the initial values
                are those of the first process with rows. The result is that of all rows together,
                on all processes; its posterior is of this process's rows. ``batch_size`` is each
                process's own.
            checkpoint: A file in which the fit keeps where it stands. If the process is killed, or the
                fit interrupted, the same call made again goes on from there and ends with the same
                digits, on the same machine with the same versions and threads: parameters, history and
                all. ``max_steps``, ``num_epochs`` and ``tol`` may be others then, and count from the
                very beginning; what has been done is not done again. A file of another model, of
                other data or of another setting is refused and left alone. What callbacks keep for
                themselves is not in it.
            checkpoint_every: Steps from one writing to the next, which are lost at most; by default as
                few as cost one hundredth of the time. The end of a fit is always written.
            resume: Whether to go on from the file, if there is one; False starts over and replaces it.
            on_checkpoint_error: ``"warn"`` says once that the file cannot be written (a full disk, a
                read-only folder), and goes on; ``"raise"`` ends the fit.
            online: With `Chunks`: an M-step after each chunk. ``StepSize(0.6)`` averages sums of chunks
                with steps that become smaller (stepwise EM, Cappé and Moulines 2009),
                ``"incremental"`` replaces those of a chunk when it comes again (Neal and Hinton 1998).
                ``num_epochs`` passes are made (10 by default); with ``validation``, other data, the
                parameters are those with the best log evidence of these after a pass. Each entry of
                ``history`` is the evidence of a chunk, scaled to all rows; ``plan.exact`` is False.
                Any update serves whose expected log joint is a function of sums of one size: all
                closed forms, least squares, and gradients in arguments that rows share. ``init``
                and ``num_restarts`` look at the first chunk. With ``process_group`` the chunks of
                one number of all processes are one batch.
            **kwargs: The model's keyword arguments.

        Returns:
            The result at the returned parameters. A second ``fit`` continues from there.

        Raises:
            PyroEMError: If the model, the data or the arguments cannot be used, or a checkpoint belongs
                to another fit.
        """
        wishes = fit_wishes(
            max_steps=max_steps,
            tol=tol,
            num_restarts=num_restarts,
            init=init,
            seed=seed,
            progress=progress,
            callbacks=callbacks,
            acceleration=acceleration,
            batch_size=batch_size,
            num_epochs=num_epochs,
            num_data=num_data,
            validation=validation,
            schedule=schedule,
            process_group=process_group,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            on_checkpoint_error=on_checkpoint_error,
            online=online,
        )
        result = fit(self._session, wishes, args, kwargs)
        again = Again(self._session.request, self.num_particles, args, kwargs, wishes)
        return replace(result, _bootstrap=partial(bootstrap, again))

    @alone("partial_fit")
    @from_arrays
    def partial_fit(self, *args: Any, online: Any = None, **kwargs: Any) -> float:
        """One step of stepwise EM on a batch, with what was learnt from the batches before.

            s ← (1 − γ_t) s + γ_t S_batch / n,    θ ← M(N s)

        The sums are saved and loaded with the parameters, and forgotten by ``reset``.

        Args:
            *args: The model's arguments, for the batch.
            online: The sizes of steps γ_t: ``StepSize(0.6)``.
            **kwargs: The model's keyword arguments.

        Returns:
            The log evidence of the batch at the parameters entering the step, in nats.

        Raises:
            UsageError: If no sums of one size hold what the rows say.
            DegenerateError: If the step has no solution; nothing was changed.

        Source: Cappé and Moulines (2009).
        """
        check_collisions(self.model, args, ("online",), "partial_fit")
        return partial_fit(self._session, online, args, kwargs)

    @alone("sort_components")
    @from_arrays
    def sort_components(
        self,
        site: str,
        by: str | Tensor | None = None,
        *args: Any,
        descending: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Put the components of a latent into an order; the evidence stays as it is.

        Labels are arbitrary: two fits may find the same mixture with its components exchanged.

        Args:
            site: The latent; of a chain any step, or a glob of its steps (``"z_*"``).
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
        by = a_key(site, by)
        ready = self._ready(first_arguments(args), kwargs)
        program = refuse_a_guide(ready, "sort_components")
        return sort_components(program, site, by, descending=descending)

    def _ready(self, args: tuple, kwargs: dict[str, Any]) -> Program | Trainer:
        return self._session.ready(args, kwargs)
