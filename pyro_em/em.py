"""ExactPosteriorEM: expectation-maximisation for any Pyro model with an exact posterior."""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_em import saving
from pyro_em._errors import DegenerateError, PyroEMWarning, UsageError, message
from pyro_em.elbo import ELBOTerms, elbo_terms
from pyro_em.m_step import Gradient, Update, apply_floors
from pyro_em.plan import Plan
from pyro_em.posterior import (
    Posterior,
    dot,
    expected_log_joint,
    product_posterior,
    run_contraction,
    scales_of,
)
from pyro_em.program import Evaluation, Program, build_program, distrust, parameters_at
from pyro_em.result import EMResult, EMStatus, EMStep, History, free_parameters
from pyro_em.standard_errors import StandardErrors
from pyro_em.standard_errors import standard_errors as observed_information
from pyro_em.starts import Start, given_counts, random_counts

logger = logging.getLogger("pyro_em")

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
_STOCHASTIC = ("batch_size", "num_epochs", "num_data", "validation", "schedule")


@dataclass(eq=False)
class _Iterate:
    """Where the loop stands: parameters are in the store, the E-step at them is here."""

    evaluation: Evaluation
    q: Posterior


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
        if isinstance(optim, pyro.optim.PyroOptim):
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    "optim is a pyro.optim object.",
                    "one torch optimiser serves all parameters of a gradient M-step",
                    ["pass lambda params: torch.optim.Adam(params, lr=0.01)"],
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
        """The E-step at the current parameters, for these data; changes nothing."""
        return self._look(args, kwargs, compile_plan=False).posterior()

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
        program = self._look(args, kwargs, compile_plan=False)
        with parameters_at(program.graph.parameters, dict(params or {})):
            evaluation = program.evaluate()
            at = program.posterior(evaluation)
            given = at if q is None else self._as_posterior(q, evaluation)
            return elbo_terms(evaluation.graph, given, evaluation.tables, at)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """−ELBO at the current parameters, in nats, as ``SVI.evaluate_loss``."""
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
        evaluation = program.evaluate()
        q = program.posterior(evaluation)
        program.m_step(q.counts, evaluation)
        self._total_steps += 1
        assert q.log_evidence is not None
        return -q.log_evidence

    def m_step(self, q: Posterior | Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """The M-step for a given q: a `Posterior`, or {site: probabilities}."""
        program = self._ready(args, kwargs)
        evaluation = program.evaluate()
        given = self._as_posterior(q, evaluation)
        program.m_step(given.counts, evaluation)

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[EMStep]:
        """EM without an end: yields each step after its M-step; the caller breaks.

        Parameters are in the param store before a step is yielded.
        """
        program = self._ready(args, kwargs)
        begin = time.perf_counter()
        at = self._e_step(program)
        index = 0
        while True:
            before, at = at, self._advance(program, at, verify=index == 0)
            yield self._as_step(program, index, before, at, begin)
            index += 1

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
        self._check_fit_arguments(args, given, acceleration, max_steps, tol, num_restarts)
        begin = time.perf_counter()
        program = self._ready(args, kwargs)
        for note in program.notes:
            warnings.warn(note, PyroEMWarning, stacklevel=2)
        generator = torch.Generator().manual_seed(
            int(torch.randint(2**31, ())) if seed is None else seed
        )
        bar = _Bar(progress, max_steps, num_restarts)
        runs: list[_Run] = []
        try:
            origin = _snapshot(program)
            for r in range(num_restarts):
                if r:
                    _restore(program, origin)
                run = self._one_start(
                    program,
                    "random hard" if r else init,
                    generator,
                    max_steps,
                    tol,
                    tuple(callbacks),
                    bar,
                    r,
                    begin,
                )
                runs.append(run)
                if run.status in (EMStatus.INTERRUPTED, EMStatus.STOPPED):
                    break
        finally:
            bar.close()
        best = _best(runs)
        _restore(program, best.parameters)
        self._total_steps += best.num_steps
        return self._as_result(program, best, runs, init, seed, num_restarts, begin)

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
                self._look(args, kwargs, compile_plan=False)
            assert self._program is not None
            saving.restore(state, self._program.graph.parameters)
            self._total_steps = int(state["total_steps"])
        else:
            self._pending = state

    def reset(self) -> None:
        """Forget what was fitted: parameters return to the values at which the model began."""
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

    def _look(self, args: tuple, kwargs: dict[str, Any], *, compile_plan: bool = True) -> Program:
        requested = dict(self.updates)
        program = build_program(
            self.model,
            args,
            kwargs,
            requested=requested,
            max_plate_nesting=self.max_plate_nesting,
            max_enumeration=self.max_enumeration,
            first_look=self._program is None,
            compile_plan=compile_plan,
        )
        if self.optim is not None:
            program.updates = {
                n: type(u)(n, Gradient(self.optim, 1), u.reason)
                if isinstance(u.update, Gradient) and u.update.optimizer is None
                else u
                for n, u in program.updates.items()
            }
        if self.guide is not None:
            program.notes += ("the guide is not used: every latent has an exact posterior.",)
        if self._program is not None:
            program.state = self._program.state
        for name, p in program.graph.parameters.items():
            self._initial.setdefault(name, p.unconstrained.detach().clone())
        if self._pending is not None:
            saving.restore(self._pending, program.graph.parameters)
            self._total_steps = int(self._pending["total_steps"])
            self._pending = None
        self._program = program
        return program

    def _ready(self, args: tuple, kwargs: dict[str, Any]) -> Program:
        """Look, and refuse what has nothing to fit."""
        program = self._look(args, kwargs)
        if not any(g.observed for g in program.graph.groups):
            raise UsageError(
                message(
                    "fit",
                    "the model has no observation.",
                    "its evidence is constant, so that there is nothing to learn from",
                    ["pass data to pyro.sample(..., obs=...)", "check that data is not None"],
                )
            )
        if not program.graph.parameters:
            raise UsageError(
                message(
                    "fit",
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
        return program

    def _as_posterior(
        self, q: Posterior | Mapping[str, Tensor], evaluation: Evaluation
    ) -> Posterior:
        if not isinstance(q, Posterior):
            return product_posterior(evaluation.graph, q, evaluation.tables)
        same = [g.members for g in q.graph.groups] == [g.members for g in evaluation.graph.groups]
        sizes = [g.sizes for g in q.graph.groups] == [g.sizes for g in evaluation.graph.groups]
        if not (same and sizes):
            raise UsageError(
                message(
                    "q",
                    "the Posterior belongs to other data or another model.",
                    "its factors differ in sites or sizes",
                    ["compute it with em.posterior on the same arguments"],
                )
            )
        return q

    def _e_step(self, program: Program) -> _Iterate:
        evaluation = program.evaluate()
        return _Iterate(evaluation, program.posterior(evaluation))

    def _advance(self, program: Program, at: _Iterate, *, verify: bool) -> _Iterate:
        """One M-step from the E-step ``at``, and the E-step at the new parameters."""
        origin = _snapshot(program)
        program.m_step(at.q.counts, at.evaluation)
        if verify and program.compiled:
            off = program.disagreements()
            if off:
                site, argument = off[0]
                warnings.warn(
                    message(
                        f"site '{site}', argument '{argument}'",
                        "it is not what the compiled plan predicts; continuing on the generic path.",
                        "the model changes in a way that its autograd graph does not show",
                        ["avoid detach, .item() and branches on parameters in the model"],
                    ),
                    PyroEMWarning,
                    stacklevel=4,
                )
                _restore(program, origin)
                distrust(program, off)
                at = self._e_step(program)
                program.m_step(at.q.counts, at.evaluation)
        try:
            return self._e_step(program)
        except BaseException:
            _restore(program, origin)
            raise

    def _as_step(
        self, program: Program, index: int, before: _Iterate, after: _Iterate, begin: float
    ) -> EMStep:
        assert before.q.log_evidence is not None
        bound = expected_log_joint(before.q.counts, after.evaluation.tables) + before.q.entropy()
        return EMStep(
            index,
            before.q.log_evidence,
            before.q.log_evidence,
            bound,
            before.q,
            {n: p.value() for n, p in program.graph.parameters.items()},
            time.perf_counter() - begin,
        )

    def _one_start(
        self,
        program: Program,
        init: Any,
        generator: torch.Generator,
        max_steps: int,
        tol: float,
        callbacks: Sequence[Callable[[EMStep], Any]],
        bar: _Bar,
        r: int,
        begin: float,
    ) -> _Run:
        run = _Run(_snapshot(program))
        try:
            self._apply_init(program, init, generator)
            apply_floors(program.graph, program.updates)
            at = self._e_step(program)
        except DegenerateError as error:
            if r == 0:
                raise
            run.status, run.message = EMStatus.DEGENERATE, str(error)
            return run
        run.record(program, at)
        if r == 0:
            _warn_if_symmetric(at.q)
        eps = torch.finfo(program.graph.dtype).eps
        try:
            for index in range(max_steps):
                before = at
                at = self._advance(program, before, verify=index == 0)
                if self._fell(program, before, at, eps):
                    _restore(program, run.parameters)
                    run.status = EMStatus.FELL
                    break
                step = self._as_step(program, index, before, at, begin)
                run.entering.append(step.elbo)
                run.after.append(step.after_m_step)
                run.record(program, at)
                assert at.q.log_evidence is not None
                bar.update(r, at.q.log_evidence)
                if any(callback(step) is True for callback in callbacks):
                    run.status = EMStatus.STOPPED
                    break
                status = _should_stop([*run.entering, at.q.log_evidence], tol, eps)
                if status is not None:
                    run.status = status
                    break
        except DegenerateError as error:
            run.status, run.message = EMStatus.DEGENERATE, str(error)
        except KeyboardInterrupt:
            run.status = EMStatus.INTERRUPTED
            _restore(program, run.parameters)
        stopped = run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING)
        if stopped and run.last is not None and _is_symmetric(run.last.q):
            run.status = EMStatus.SYMMETRIC
        return run

    def _apply_init(self, program: Program, init: Any, generator: torch.Generator) -> None:
        if init is None:
            return
        evaluation = program.evaluate()
        if isinstance(init, str) and init in ("random", "random hard"):
            if not program.graph.latents:
                return
            counts = random_counts(
                evaluation.graph,
                program.contraction,
                evaluation.tables,
                generator=generator,
                hard=init == "random hard",
            )
        elif isinstance(init, Mapping):
            counts = given_counts(evaluation.graph, program.contraction, evaluation.tables, init)
        else:
            raise UsageError(
                message(
                    "init",
                    f"{init!r} is not understood.",
                    fixes=["use None, 'random', or {site: labels or probabilities}"],
                )
            )
        program.m_step(counts, evaluation)

    def _fell(self, program: Program, before: _Iterate, after: _Iterate, eps: float) -> bool:
        """Promise: the objective never falls; a fall is reported with the site that did it."""
        old, new = before.q.log_evidence, after.q.log_evidence
        assert old is not None and new is not None
        allowed = (1e-9 if eps < 1e-12 else 1e-5) * max(1.0, abs(old))
        if new >= old - allowed or not program.plan().is_monotone:
            return False
        losses = {}
        for g in range(len(program.graph.groups)):
            change = float(dot(before.q.counts[g], after.evaluation.tables[g])) - float(
                dot(before.q.counts[g], before.evaluation.tables[g])
            )
            losses[g] = change
        worst = min(losses, key=losses.__getitem__)
        group = program.graph.groups[worst]
        names = ", ".join(f"'{n}'" for n in group.params) or "none"
        warnings.warn(
            message(
                f"site '{group.members[0]}', parameters {names}",
                f"the log evidence fell from {old:.9g} to {new:.9g}; the expected log joint of this "
                f"site changed by {losses[worst]:.3g}. The parameters before the fall were kept.",
                "an exact EM step cannot do that: rounding, or a model that hides a dependence",
                ["use float64", "avoid detach and branches on parameters in the model"],
            ),
            PyroEMWarning,
            stacklevel=4,
        )
        return True

    def _check_fit_arguments(
        self,
        args: tuple,
        stochastic: Mapping[str, Any],
        acceleration: str | None,
        max_steps: int,
        tol: float,
        num_restarts: int,
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
        target = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
        try:
            parameters = list(inspect.signature(target).parameters.values())
        except (TypeError, ValueError):
            return
        left = parameters[len(args) :]
        clash = [p.name for p in left if p.name in _FIT_KEYWORDS]
        if clash:
            raise UsageError(
                message(
                    "fit",
                    f"the model's argument '{clash[0]}' is also a keyword of fit.",
                    "it could not be passed to the model by name",
                    ["pass it by position", "rename it in the model"],
                )
            )

    def _as_result(
        self,
        program: Program,
        run: _Run,
        runs: Sequence[_Run],
        init: Any,
        seed: int | None,
        num_restarts: int,
        begin: float,
    ) -> EMResult:
        assert run.last is not None
        if program.compiled and run.num_steps:
            off = program.disagreements()
            if off:
                site, argument = off[0]
                warnings.warn(
                    message(
                        f"site '{site}', argument '{argument}'",
                        "at the end of the fit it differs from the compiled plan.",
                        "the model changes in a way that its autograd graph does not show; the "
                        "result's evidence has been computed from the model itself",
                        ["avoid detach, .item() and branches on parameters in the model"],
                    ),
                    PyroEMWarning,
                    stacklevel=3,
                )
                distrust(program, off)
                run.last = self._e_step(program)
        q = run.last.q
        assert q.log_evidence is not None
        text = run.message or run.status.value
        if run.status is EMStatus.DEGENERATE:
            warnings.warn(text, PyroEMWarning, stacklevel=3)
        parameters = program.graph.parameters
        rows = _num_rows(program)
        if num_restarts > 1:
            start = f"best of {len(runs)} starts"
        elif init is None:
            start = "values in the model"
        else:
            start = init if isinstance(init, str) else "given: " + ", ".join(init)
        values = {n: p.value() for n, p in parameters.items()}
        zeros = {n: v == 0 for n, v in run.initial_values.items()}
        logger.info("fit: %s log evidence %.6f", run.status.name, q.log_evidence)
        return EMResult(
            params=values,
            log_evidence=q.log_evidence,
            elbo=q.log_evidence,
            posterior=q,
            history=History(tuple(run.entering), tuple(run.after)),
            converged=run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING),
            status=run.status,
            message=text,
            num_steps=run.num_steps,
            total_steps=self._total_steps,
            seconds=time.perf_counter() - begin,
            plan=program.plan(),
            rate=_rate([*run.entering, q.log_evidence]),
            starts=tuple(r.log_evidence for r in runs),
            num_rows=rows,
            num_free_parameters=free_parameters(parameters, program.updates, zeros),
            start=start,
            seed=seed,
            dtype=program.graph.dtype,
            _standard_errors=lambda: _standard_errors(program, values),
        )


@dataclass(eq=False)
class _Run:
    """One start: its path and where it stands."""

    parameters: dict[str, Tensor]
    status: EMStatus = EMStatus.MAX_STEPS
    message: str = ""
    last: _Iterate | None = None

    def __post_init__(self) -> None:
        self.entering: list[float] = []
        self.after: list[float] = []
        self.initial_values: dict[str, Tensor] = {}

    @property
    def num_steps(self) -> int:
        return len(self.entering)

    @property
    def log_evidence(self) -> float:
        if self.last is None or self.last.q.log_evidence is None:
            return math.nan
        return self.last.q.log_evidence

    def record(self, program: Program, at: _Iterate) -> None:
        """Remember parameters and E-step of the last complete step."""
        if not self.initial_values:
            self.initial_values = {n: p.value() for n, p in program.graph.parameters.items()}
        self.parameters, self.last = _snapshot(program), at


def _best(runs: Sequence[_Run]) -> _Run:
    """The best evidence among sound starts; a degenerate one only where there is no other."""
    usable = [r for r in runs if r.last is not None]
    sound = [r for r in usable if r.status is not EMStatus.DEGENERATE]
    return max(sound or usable, key=lambda r: r.log_evidence)


def _snapshot(program: Program) -> dict[str, Tensor]:
    return {n: p.unconstrained.detach().clone() for n, p in program.graph.parameters.items()}


def _restore(program: Program, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            program.graph.parameters[name].unconstrained.copy_(value)


def _should_stop(path: Sequence[float], tol: float, eps: float) -> EMStatus | None:
    """The stopping rule: estimated remaining gain g a / (1 − a), or rounding."""
    if tol == 0:
        return None
    gains = [b - a for a, b in pairwise(path)]
    if len(gains) < 6:
        return None
    rounding = 8 * eps * max(1.0, abs(path[-1]))
    if all(abs(g) <= rounding for g in gains[-2:]):
        return EMStatus.ROUNDING
    last = gains[-6:]
    if min(last) <= 0:
        return None
    ratio = max(b / a for a, b in pairwise(last))
    if ratio >= 1:
        return None
    remaining = last[-1] * ratio / (1 - ratio)
    return EMStatus.CONVERGED if last[-1] < tol and remaining < tol else None


def _rate(path: Sequence[float]) -> float | None:
    gains = [b - a for a, b in pairwise(path)]
    rounding = 1e-13 * max(1.0, abs(path[-1]))
    clear = [g for g in gains if g > rounding]
    if len(clear) < 3:
        return None
    return clear[-1] / clear[-2]


def _is_symmetric(q: Posterior) -> bool:
    """Whether the data say nothing of any latent: every posterior equals its prior."""
    if not q.graph.latents:
        return False
    informative = {
        d
        for g in q.graph.groups
        if g.observed
        for dims in g.dims
        for d in dims
        if d in q.graph.latents
    }
    if not informative or all(q.graph.latents[n].size == 1 for n in informative):
        return False
    for group, table in zip(q.graph.groups, q.tables, strict=True):
        if not group.observed:
            continue
        for i, dims in enumerate(group.dims):
            axes = [k for k, d in enumerate(dims) if d in q.graph.latents]
            if not axes:
                continue
            part = table[i]
            low, high = part.amin(axes), part.amax(axes)
            near = high - low <= 1e-9 * high.abs().clamp(min=1.0)
            if not bool((near | (low == high)).all()):
                return False
    return True


def _warn_if_symmetric(q: Posterior) -> None:
    if _is_symmetric(q):
        names = ", ".join(f"'{n}'" for n in list(q.graph.latents)[:3])
        warnings.warn(
            message(
                f"latents {names}",
                "the start is symmetric: every value explains the data equally well.",
                "EM cannot leave such a saddle; all components stay equal",
                [
                    "fit(..., init='random', seed=0)",
                    "give the components different initial values",
                ],
            ),
            PyroEMWarning,
            stacklevel=5,
        )


def _num_rows(program: Program) -> float:
    """Elements of the outermost data plate, weighted by sample weights."""
    structure = program.structure
    observed = [i for i in structure.sites.values() if i.observed and i.plates]
    if not observed:
        return 1.0
    shared = set.intersection(*(set(i.plates) for i in observed)) or set(observed[0].plates)
    outermost = min(shared, key=lambda p: structure.plates[p].dim)
    size = structure.plates[outermost].size
    for group in program.graph.groups:
        for i, scale in enumerate(group.scale):
            dims = group.dims[i]
            if isinstance(scale, Tensor) and group.observed and outermost in dims:
                axis = dims.index(outermost)
                if scale.shape[axis] == size:
                    axes = [k for k in range(scale.dim()) if k != axis]
                    return float((scale.amax(axes) if axes else scale).sum())
    return float(structure.plates[outermost].full_size)


def _standard_errors(program: Program, values: Mapping[str, Tensor]) -> StandardErrors:
    from pyro_em.m_step import Fixed

    parameters = program.graph.parameters
    free = [p for n, p in parameters.items() if not isinstance(program.updates[n].update, Fixed)]
    order = range(len(program.graph.groups))

    def log_evidence(moved: Mapping[str, Tensor]) -> Tensor:
        from pyro_em.contraction import contract, evidence

        fixed = {n: p.value() for n, p in parameters.items() if n not in moved}
        tables = program.log_densities_at({**fixed, **moved}, list(order))
        flat = [part for g in order for part in tables[g].to(torch.float64).unbind(0)]
        return evidence(contract(program.contraction, flat, scales=scales_of(program.graph)))

    with parameters_at(parameters, values):
        return observed_information(free, log_evidence)


class _Bar:
    """The progress bar: evidence per step, over all starts."""

    def __init__(self, progress: bool | None, max_steps: int, starts: int) -> None:
        disable = None if progress is None else not progress
        self.bar = tqdm(total=max_steps * starts, disable=disable, desc="EM", unit="step")
        self.max_steps, self.starts, self.current = max_steps, starts, 0

    def update(self, start: int, log_evidence: float) -> None:
        if start != self.current:
            self.bar.n = start * self.max_steps
            self.current = start
        label = f"EM start {start + 1}/{self.starts}" if self.starts > 1 else "EM"
        self.bar.set_description(label, refresh=False)
        self.bar.set_postfix_str(f"log evidence {log_evidence:.6f}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


__all__ = ["ExactPosteriorEM", "run_contraction"]
