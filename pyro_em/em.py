"""ExactPosteriorEM: expectation-maximisation for any Pyro model with an exact posterior."""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em import saving
from pyro_em._errors import PyroEMWarning, UsageError, message
from pyro_em._pyro import restore, snapshot
from pyro_em.elbo import ELBOTerms, elbo_terms
from pyro_em.loop import (
    Bar,
    Run,
    advance,
    as_step,
    best_of,
    e_step,
    fell,
    run_start,
)
from pyro_em.m_step import Gradient, Update, apply_floors
from pyro_em.outcome import build_result
from pyro_em.plan import Plan
from pyro_em.posterior import Posterior, product_posterior, regrouped
from pyro_em.program import Evaluation, Program, build_program, parameters_at
from pyro_em.result import EMResult, EMStatus, EMStep
from pyro_em.starts import Start

_FIT_KEYWORDS = (
    "max_steps",
    "tol",
    "num_restarts",
    "init",
    "seed",
    "progress",
    "callbacks",
    "acceleration",
    "batch_size",
    "num_epochs",
    "num_data",
    "validation",
    "schedule",
)


class ExactPosteriorEM:
    r"""Expectation-maximisation on an ordinary Pyro model.

    E-step: q(z) = p(z | x; θ), summed exactly over all discrete latents. M-step:
    θ ← argmax E_q[log p(x, z; θ)], in closed form where the model allows it. Then

        log p(x; θ) = ELBO(q, θ) + KL(q ‖ p(z | x; θ))

    never decreases.

    Args:
        model: A Pyro model: a function with ``pyro.param``, or a ``PyroModule``. It needs no
            annotation: no ``config_enumerate``, no ``max_plate_nesting``.
        guide: Accepted for models that come with one; where every latent has an exact posterior it
            stays unused, and the plan says so.
        optim: A callable from a list of tensors to a torch optimiser; it replaces L-BFGS for
            parameters without a closed form, with one step per M-step.
        strategy: ``"exact"``.
        updates: What to do with parameters, by name or glob: `ClosedForm`, `LeastSquares`,
            `Gradient`, `Fixed`.
        num_particles: For guides; an exact posterior needs one.
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

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        optim: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        *,
        strategy: str = "exact",
        updates: Mapping[str, Update] | None = None,
        num_particles: int = 1,
        max_plate_nesting: int | None = None,
        max_enumeration: int = 2**27,
    ) -> None:
        if not callable(model):
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    f"model is {type(model).__name__}, not a callable.",
                    fixes=["pass the function itself, not the result of calling it"],
                )
            )
        if strategy != "exact":
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    f"strategy={strategy!r} is not available.",
                    "this version sums every latent exactly",
                    ["use strategy='exact'", "use pyro.infer.SVI for a guide's bound"],
                )
            )
        if num_particles < 1:
            raise UsageError(
                message(
                    "ExactPosteriorEM", f"num_particles={num_particles} is no number of samples."
                )
            )
        if isinstance(optim, pyro.optim.PyroOptim):
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    "optim is a pyro.optim object.",
                    "one torch optimiser serves all parameters of a gradient M-step",
                    ["pass lambda params: torch.optim.Adam(params, lr=0.01)"],
                )
            )
        for name, update in dict(updates or {}).items():
            if not isinstance(update, Update):
                shown = update.__name__ if isinstance(update, type) else repr(update)
                raise UsageError(
                    message(
                        f"updates['{name}']",
                        f"{shown} is no update.",
                        "an unknown word would leave the parameter alone in silence",
                        ["use an instance: Fixed(), ClosedForm(), LeastSquares() or Gradient()"],
                    )
                )
        self.model = model
        self.guide = guide
        self.optim = optim
        self.updates = dict(updates or {})
        self.max_plate_nesting = max_plate_nesting
        self.max_enumeration = max_enumeration
        self._program: Program | None = None
        self._total_steps = 0
        self._initial: dict[str, Tensor] = {}
        self._pending: dict[str, Any] | None = None

    # ------------------------------------------------------------------ looking

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Say how every latent and every parameter would be treated, and why, and the cost.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            A value that prints as a table.

        Raises:
            PyroEMError: If the model cannot be treated exactly; all findings in one message.
        """
        return self._look(args, kwargs).plan()

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """The E-step at the current parameters, for these data; changes nothing.

        Args:
            *args: The model's arguments; data of any size.
            **kwargs: The model's keyword arguments.

        Returns:
            q(z) = p(z | x; θ) with its log evidence.

        Raises:
            PyroEMError: If the model cannot be treated exactly, or the data are impossible.
        """
        return self._look(args, kwargs, look_only=True).posterior()

    def elbo(
        self,
        *args: Any,
        q: Posterior | Mapping[str, Tensor] | None = None,
        params: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> ELBOTerms:
        """ELBO(q, θ) and its terms.

        Args:
            *args: The model's arguments.
            q: A `Posterior` (of any parameters), or {site: probabilities} standing for the product
                of its marginals; the exact posterior at θ by default.
            params: Constrained values to evaluate at instead of the current ones, which stay.
            **kwargs: The model's keyword arguments.

        Returns:
            The bound in nats; ``float(...)`` of it is its value.
        """
        self._check_collisions(args, ("q", "params"), "elbo")
        program = self._look(args, kwargs, look_only=True)
        with parameters_at(program.graph.parameters, dict(params or {})):
            evaluation = program.evaluate()
            at = program.posterior(evaluation)
            given = at if q is None else self._as_posterior(q, evaluation)
            return elbo_terms(evaluation.graph, given, evaluation.tables, at)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """−ELBO at the current parameters, in nats, as ``SVI.evaluate_loss``.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        evidence = self.posterior(*args, **kwargs).log_evidence
        assert evidence is not None
        return -evidence

    # ------------------------------------------------------------------ stepping

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One E-step and one M-step.

        Returns:
            The loss (−ELBO, nats) at the parameters *entering* the step, as ``SVI.step``.

        Raises:
            DegenerateError: If an update was degenerate; it has been rolled back.
        """
        program = self._ready(args, kwargs)
        apply_floors(program.graph, program.updates)
        evaluation = program.evaluate()
        q = program.posterior(evaluation)
        program.m_step(q.counts, evaluation)
        self._total_steps += 1
        assert q.log_evidence is not None
        return -q.log_evidence

    def m_step(self, q: Posterior | Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """The M-step for a given q; parameters are written in place.

        Args:
            q: A `Posterior`, or {site: probabilities (*plates, K)} for every summed latent.
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            UsageError: If q does not fit the model.
            DegenerateError: If an update was degenerate; it has been rolled back.
        """
        program = self._ready(args, kwargs)
        evaluation = program.evaluate()
        given = self._as_posterior(q, evaluation)
        program.m_step(given.counts, evaluation)

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[EMStep]:
        """EM without an end: yields each step after its M-step; the caller breaks.

        Parameters are in the param store before a step is yielded. The iterator ends only if the
        evidence falls, which is said in a warning.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.
        """
        program = self._ready(args, kwargs)
        apply_floors(program.graph, program.updates)
        return self._steps(program)

    def _steps(self, program: Program) -> Iterator[EMStep]:
        begin = time.perf_counter()
        at = e_step(program)
        for index in itertools.count():
            origin = snapshot(program.graph.parameters)
            before, at = at, advance(program, at, index=index, verify=index == 0)
            if fell(program, before, at):
                restore(program.graph.parameters, origin)
                return
            self._total_steps += 1
            yield as_step(program, index, before, at, begin)

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
        """Run EM until the estimated remaining gain is below ``tol``.

        Args:
            *args: The model's arguments.
            max_steps: Steps at most; exactly so many with ``tol=0``.
            tol: Estimated remaining gain in nats at which to stop: g a / (1 − a), with g the last
                gain and a the largest ratio of successive gains in the last five steps. A plateau
                can hide more.
            num_restarts: Number of starts; the first is ``init``, the others are random hard
                assignments. The best evidence is kept.
            init: None (the values in the model or the param store), ``"random"`` (random
                assignments, then an M-step), or {site: labels or probabilities}.
            seed: Seed of random starts.
            progress: Whether to show a bar; by default where the output is a terminal.
            callbacks: Called with each `EMStep`; one that returns True stops the fit.
            acceleration: None.
            batch_size: For guides only.
            num_epochs: For guides only.
            num_data: For guides only.
            validation: For guides only.
            schedule: For guides only.
            **kwargs: The model's keyword arguments.

        Returns:
            The result at the returned parameters. A second ``fit`` continues from there.

        Raises:
            PyroEMError: If the model, the data or the arguments cannot be used.
        """
        given = {
            "batch_size": batch_size,
            "num_epochs": num_epochs,
            "num_data": num_data,
            "validation": validation,
            "schedule": schedule,
        }
        callbacks = (callbacks,) if callable(callbacks) else tuple(callbacks)
        self._check_fit_arguments(
            args, given, acceleration, max_steps, tol, num_restarts, callbacks
        )
        begin = time.perf_counter()
        program = self._ready(args, kwargs)
        generator = torch.Generator().manual_seed(
            int(torch.randint(2**31, ())) if seed is None else seed
        )
        bar = Bar(progress, max_steps, num_restarts, program.objective_name)
        runs: list[Run] = []
        try:
            origin = snapshot(program.graph.parameters)
            for r in range(num_restarts):
                if r:
                    restore(program.graph.parameters, origin)
                run = run_start(
                    program,
                    "random hard" if r else init,
                    generator,
                    max_steps,
                    tol,
                    callbacks,
                    bar,
                    r,
                    begin,
                )
                runs.append(run)
                if run.status in (EMStatus.INTERRUPTED, EMStatus.STOPPED):
                    break
        except BaseException:
            if runs:  # nothing already fitted is lost
                restore(program.graph.parameters, best_of(runs).parameters)
            raise
        finally:
            bar.close()
        best = best_of(runs)
        restore(program.graph.parameters, best.parameters)
        self._total_steps += best.num_steps
        return build_result(program, best, runs, init, seed, num_restarts, begin, self._total_steps)

    # ------------------------------------------------------------------ keeping

    def save(self, path: str | Path) -> None:
        """Save all parameters; the file loads under ``torch.load(weights_only=True)``.

        Raises:
            UsageError: If the model has not been run yet.
        """
        if self._program is None:
            raise UsageError(
                message(
                    "save",
                    "the model has not been run yet, so that its parameters are unknown.",
                    fixes=["call fit, step or plan first"],
                )
            )
        extra = {"total_steps": self._total_steps}
        torch.save(saving.pack(self._program.graph.parameters, extra), path)

    def load(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Load parameters that ``save`` wrote.

        They are checked against the model at once where the model has been run or its arguments are
        given here, else at the next call with data.

        Args:
            path: The file.
            *args: The model's arguments, optional.
            **kwargs: The model's keyword arguments, optional.

        Raises:
            UsageError: If the file belongs to another model; names the first difference.
        """
        state = saving.read(path)
        if args or kwargs or self._program is not None:
            if args or kwargs:
                self._look(args, kwargs, look_only=True)
            assert self._program is not None
            saving.restore(state, self._program.graph.parameters)
            self._total_steps = int(state["total_steps"])
        else:
            self._pending = state

    def reset(self) -> None:
        """Forget what was fitted.

        Parameters that the model initialises leave the param store, so that its next run makes them
        anew; ``nn.Parameter``s return to the values at which they were first seen.
        """
        store = pyro.get_param_store()
        if self._program is not None:
            for name, p in self._program.graph.parameters.items():
                if isinstance(p.unconstrained, torch.nn.Parameter):
                    with torch.no_grad():
                        p.unconstrained.copy_(self._initial[name])
                elif name in store:
                    del store[name]
        self._program, self._total_steps, self._pending = None, 0, None
        self._initial = {}

    # ------------------------------------------------------------------ inside

    def _look(self, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False) -> Program:
        self._check_model_keywords(kwargs)
        program = build_program(
            self.model,
            args,
            kwargs,
            requested=self.updates,
            gradient=None if self.optim is None else Gradient(self.optim, 1),
            max_plate_nesting=self.max_plate_nesting,
            max_enumeration=self.max_enumeration,
            first_look=self._program is None,
            guide_given=self.guide is not None,
            look_only=look_only,
        )
        if self.guide is not None:
            program.notes += ("the guide is not used: every latent has an exact posterior.",)
        if self._program is not None:
            program.state = self._program.state
        for name, p in program.graph.parameters.items():
            self._initial.setdefault(name, p.unconstrained.detach().clone())
        if self._pending is not None:
            state, self._pending = self._pending, None
            saving.restore(state, program.graph.parameters)
            self._total_steps = int(state["total_steps"])
        self._program = program
        return program

    def _ready(self, args: tuple, kwargs: dict[str, Any]) -> Program:
        """Look, and refuse what has nothing to fit."""
        program = self._look(args, kwargs)
        if not any(g.observed for g in program.graph.groups):
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    "the model has no observation.",
                    "its evidence is constant, so that there is nothing to learn from",
                    ["pass data to pyro.sample(..., obs=...)", "check that data is not None"],
                )
            )
        if not program.graph.parameters:
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    "the model has no parameters.",
                    "EM maximises the evidence over parameters",
                    [
                        "declare what is to be learned with pyro.param or PyroParam",
                        "call em.posterior(...) if only the latents are of interest",
                    ],
                )
            )
        if program.structure.random_plates:
            names = ", ".join(f"'{n}'" for n in program.structure.random_plates)
            raise UsageError(
                message(
                    f"plate {names}",
                    "it draws a random subsample.",
                    "an exact step needs all data; its bound would change from step to step",
                    ["leave subsample_size out"],
                )
            )
        for note in program.notes:
            warnings.warn(note, PyroEMWarning, stacklevel=3)
        return program

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

    def _check_fit_arguments(
        self,
        args: tuple,
        stochastic: Mapping[str, Any],
        acceleration: str | None,
        max_steps: int,
        tol: float,
        num_restarts: int,
        callbacks: Iterable[Any],
    ) -> None:
        given = [n for n, v in stochastic.items() if v is not None]
        if given:
            raise UsageError(
                message(
                    "fit",
                    f"{', '.join(given)}: an exact fit uses all data at every step.",
                    "these arguments belong to stochastic objectives",
                    ["leave them out"],
                )
            )
        if acceleration is not None:
            raise UsageError(
                message(
                    "fit",
                    f"acceleration={acceleration!r} is not available.",
                    fixes=["leave it out"],
                )
            )
        if max_steps < 0 or tol < 0 or num_restarts < 1 or math.isnan(tol):
            raise UsageError(
                message(
                    "fit",
                    f"max_steps={max_steps}, tol={tol}, num_restarts={num_restarts}.",
                    "max_steps and tol cannot be negative, num_restarts is at least one",
                )
            )
        callbacks_ok = all(callable(c) for c in callbacks)
        if not callbacks_ok:
            raise UsageError(
                message(
                    "fit",
                    "callbacks holds something that cannot be called.",
                    fixes=["pass a list of functions of one EMStep: callbacks=[watch]"],
                )
            )
        self._check_collisions(args, _FIT_KEYWORDS, "fit")

    def _signature(self) -> list[inspect.Parameter]:
        target = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
        try:
            return list(inspect.signature(target).parameters.values())
        except (TypeError, ValueError):
            return []

    def _check_collisions(self, args: tuple, keywords: Iterable[str], method: str) -> None:
        """Refuse a model whose argument could not be told from a keyword of a method."""
        left = self._signature()[len(args) :]
        clash = [p for p in left if p.name in tuple(keywords)]
        if clash:
            by_position = clash[0].kind is not inspect.Parameter.KEYWORD_ONLY
            raise UsageError(
                message(
                    method,
                    f"the model's argument '{clash[0].name}' is also a keyword of {method}.",
                    "it could not be passed to the model by name",
                    (["pass it by position"] if by_position else []) + ["rename it in the model"],
                )
            )

    def _check_model_keywords(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse a keyword that neither the method nor the model knows."""
        parameters = self._signature()
        if not parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return
        known = [p.name for p in parameters]
        for name in kwargs:
            if name in known:
                continue
            near = difflib.get_close_matches(name, [*_FIT_KEYWORDS, *known], n=1)
            if name in _FIT_KEYWORDS:
                what = "it is a keyword of fit, which this method does not have."
            elif near:
                what = f"neither the method nor the model has it; did you mean '{near[0]}'?"
            else:
                what = "neither the method nor the model has such an argument."
            raise UsageError(
                message(
                    f"keyword '{name}'",
                    what,
                    "keywords that are not the method's own go to the model",
                    ["the model takes: " + ", ".join(known)],
                )
            )
