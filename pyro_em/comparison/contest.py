"""The contest: one run of one contender, on the model, data and start that all share."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

from pyro_em.comparison.contenders import Contender, Direct, budgets_of, no_guide
from pyro_em.comparison.curves import Curve, Recorder, RunBroken
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import PyroEMError
from pyro_em.fitting.results.history import EMStatus, EMStep
from pyro_em.loss import TraceExact_ELBO
from pyro_em.posteriors.strategies import EStepStrategy
from pyro_em.tracing.capture import ParameterRecord
from pyro_em.tracing.scopes import Keeper, StoreState, own_store


@dataclass(frozen=True)
class Limits:
    """Where runs end.

    Attributes:
        max_steps: Steps of EM and evaluations of L-BFGS at most.
        svi_steps: Steps of a method with a learning rate.
        seconds: Wall clock of a run.
        tol: Estimated remaining gain in nats at which EM stops.
    """

    max_steps: int
    svi_steps: int
    seconds: float | None
    tol: float


@dataclass(frozen=True, eq=False)
class Method:
    """A contender that is ready to run anew for each learning rate and seed.

    Attributes:
        label: Its label.
        run: Takes the learning rate, the recorder, and whether one step is enough.
        rates: Learning rates to try; ``(None,)`` where none can be chosen.
        seeds: One where no random number matters.
        drawn: Whether its bound is an estimate by draws.
        note: What a reader has to know of it.
    """

    label: str
    run: Callable[[float | None, Recorder, bool], None]
    rates: tuple[float | None, ...]
    seeds: tuple[int, ...]
    drawn: bool
    note: str = ""


class _Enough(Exception):
    """The limit of a run inside an optimiser that cannot be told to stop."""


@dataclass(eq=False)
class Contest:
    """The model, the data and the start that all contenders share.

    Attributes:
        keeper: Restores modules.
        start: The param store at the start.
        model: Whose evidence is the measure.
        args: Of the model.
        kwargs: Of the model.
        limits: Where runs end.
        has_evidence: Whether the exact evidence can be computed.
        num_rows: N.
        budgets: Of the evidence's enumeration.
    """

    keeper: Keeper
    start: StoreState
    model: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    limits: Limits
    has_evidence: bool = False
    num_rows: float = 1.0
    budgets: dict[str, Any] = field(default_factory=dict)

    def look(self, contenders: Collection[Contender]) -> None:
        """Find whether the evidence can be computed, and N."""
        known = (one for one in contenders if not isinstance(one, SVI))
        self.budgets = next((budgets_of(one) for one in known), {})
        with self._scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.num_rows = _rows_of(self.model, self.args, self.kwargs)
            try:
                em = ExactPosteriorEM(self.model, **self.budgets)
                fitted = em.fit(*self.args, max_steps=0, progress=False, **self.kwargs)
            except PyroEMError:
                return
            self.has_evidence = fitted.posterior.exact
            self.num_rows = fitted.num_rows or 1.0

    def method(
        self,
        label: str,
        one: Contender,
        model: Callable[..., Any],
        rates: tuple[float, ...],
        seeds: tuple[int, ...],
    ) -> Method:
        """How to run a contender, how often, and what to say of it."""
        if isinstance(one, Direct):
            return Method(label, partial(self._direct, one, model), (None,), seeds[:1], False)
        if isinstance(one, SVI):
            tried, note = _rates(rates, one.optim)
            drawn = not self._is_exact(one)
            return Method(label, partial(self._svi, one), tried, seeds, drawn, note)
        if self.is_stochastic(one):
            tried, note = _rates(rates, one._session.request.optim)
            run = partial(self._em, one, self.limits.svi_steps)
            return Method(label, run, tried, seeds, True, note)
        random = _is_random(one._session.request.strategy)
        run = partial(self._em, one, self.limits.max_steps)
        return Method(label, run, (None,), seeds if random else seeds[:1], random)

    def once(self, method: Method, rate: float | None, seed: int, *, short: bool = False) -> Curve:
        """One run in a scope of its own; what it raises becomes its failure, in a sentence.

        Args:
            method: What runs.
            rate: Its learning rate.
            seed: Of all random numbers.
            short: Whether one step is enough.
        """
        with self._scope():
            to = Recorder(self._evidence() if self.has_evidence else None, self.limits.seconds)
            pyro.set_rng_seed(seed)
            try:
                method.run(rate, to, short)
            except RunBroken as error:
                return to.curve(rate, seed, str(error))
            except Exception as error:
                return to.curve(rate, seed, f"{type(error).__name__}: {_sentence(str(error))}")
        return to.curve(rate, seed)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """The common start, whatever happened before."""
        self.keeper.restore()
        with own_store(self.start):
            yield

    def _evidence(self) -> Callable[[], float]:
        """The exact log evidence at the parameters in the store; nan where it is not finite."""
        loss = TraceExact_ELBO(**self.budgets)

        def value() -> float:
            try:
                return -loss.loss(self.model, no_guide, *self.args, **self.kwargs)
            except (PyroEMError, ValueError, ArithmeticError):
                return math.nan

        return value

    def _is_exact(self, svi: SVI) -> bool:
        """Whether an SVI's loss is the exact evidence."""
        loss = getattr(svi.loss, "__self__", None)
        exact = isinstance(loss, TraceExact_ELBO) and loss.strategy == "exact"
        return exact and self.has_evidence

    def is_stochastic(self, em: ExactPosteriorEM) -> bool:
        """Whether its guide draws or scores latents, so that gradients move everything."""
        if em._session.request.guide is None:
            return False
        with self._scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return _anew(em, None).plan(*self.args, **self.kwargs).stochastic
            except PyroEMError:
                return False

    # The three kinds of contenders.

    def _em(
        self, em: ExactPosteriorEM, steps: int, rate: float | None, to: Recorder, short: bool
    ) -> None:
        fresh = _anew(em, rate)
        to.start()

        def note(step: EMStep) -> bool:
            known = step.log_evidence if self.has_evidence else None
            return to.step(step.elbo, known, free=known is not None)

        result = fresh.fit(
            *self.args,
            max_steps=1 if short else steps,
            tol=self.limits.tol,
            callbacks=(note,),
            progress=False,
            **self.kwargs,
        )
        to.finish(result.elbo)
        if result.status in (EMStatus.DEGENERATE, EMStatus.UNBOUNDED, EMStatus.FELL):
            raise RunBroken(_sentence(result.message or result.status.value))

    def _svi(self, svi: SVI, rate: float | None, to: Recorder, short: bool) -> None:
        fresh = copy.copy(svi)
        fresh.optim = _remade(svi.optim, rate)
        loss = getattr(svi.loss, "__self__", None)
        if isinstance(loss, pyro.infer.ELBO):
            loss = copy.copy(loss)
            if isinstance(loss, TraceExact_ELBO):
                loss._last = None
            fresh.loss, fresh.loss_and_grads = loss.loss, loss.loss_and_grads
        exact = self._is_exact(svi)
        to.start()
        for _ in range(1 if short else self.limits.svi_steps):
            bound = -_scalar(fresh.step(*self.args, **self.kwargs))
            if to.step(bound, bound if exact else None, free=exact):
                break
        to.finish(-_scalar(fresh.evaluate_loss(*self.args, **self.kwargs)))

    def _direct(
        self,
        direct: Direct,
        model: Callable[..., Any],
        _rate: float | None,
        to: Recorder,
        short: bool,
    ) -> None:
        loss = TraceExact_ELBO(**budgets_of(direct))
        to.start()
        with ParameterRecord() as record, torch.no_grad():
            model(*self.args, **self.kwargs)
        leaves = [leaf for leaf in dict.fromkeys(record.found.values()) if leaf.requires_grad]
        best, best_values = -math.inf, [leaf.detach().clone() for leaf in leaves]

        def closure() -> Tensor:
            nonlocal best, best_values
            for leaf in leaves:
                leaf.grad = None
            try:
                value = loss.differentiable_loss(model, no_guide, *self.args, **self.kwargs)
                value.backward()
                sound = all(bool(p.grad.isfinite().all()) for p in leaves if p.grad is not None)
            except (PyroEMError, ValueError, ArithmeticError, torch.linalg.LinAlgError):
                if best == -math.inf:
                    raise
                sound = False
            if sound:
                evidence = -float(value.detach())
                if evidence > best:
                    best, best_values = evidence, [leaf.detach().clone() for leaf in leaves]
            else:  # too far out: a wall that sends the line search back
                if best == -math.inf:
                    raise RunBroken("the gradient at the start is not finite")
                value = torch.tensor(1e3 * (1 + abs(best)) - best, dtype=torch.float64)
                for leaf in leaves:
                    leaf.grad = torch.zeros_like(leaf)
            if to.step(best, best, free=True) or short:
                raise _Enough
            return value.detach()

        steps = self.limits.max_steps
        optimizer = torch.optim.LBFGS(
            leaves,
            max_iter=steps,
            max_eval=steps,
            tolerance_grad=1e-8,
            tolerance_change=1e-12,
            history_size=direct.history_size,
            line_search_fn="strong_wolfe",
        )
        try:
            optimizer.step(closure)
        except _Enough:
            pass
        finally:
            with torch.no_grad():
                for leaf, value in zip(leaves, best_values, strict=True):
                    leaf.copy_(value)
        to.finish(best)


def _anew(em: ExactPosteriorEM, rate: float | None) -> ExactPosteriorEM:
    """The same settings, nothing fitted, another learning rate."""
    request = em._session.request
    return ExactPosteriorEM(
        request.model,
        request.guide,
        _remade(request.optim, rate),
        strategy=request.strategy,
        updates=request.updates,
        num_particles=em.num_particles,
        **budgets_of(em),
    )


def _rates(rates: tuple[float, ...], optim: Any) -> tuple[tuple[float | None, ...], str]:
    """The learning rates to try, the user's own among them; why there is no sweep, or ""."""
    if not isinstance(optim, pyro.optim.PyroOptim):
        return tuple(sorted(set(rates))), ""
    if not isinstance(optim.pt_optim_args, dict):
        note = "keeps its own learning rates, which depend on the parameter: no sweep"
        return (None,), note
    users_rate = optim.pt_optim_args.get("lr")
    return tuple(
        sorted({*rates, *([float(users_rate)] if isinstance(users_rate, (int, float)) else [])})
    ), ""


def _remade(optim: Any, rate: float | None) -> Any:
    """An optimiser of the same class without state, at another learning rate where one is given."""
    if isinstance(optim, pyro.optim.PyroOptim):
        fresh = copy.copy(optim)
        fresh.optim_objs, fresh.grad_clip, fresh._state_waiting_to_be_consumed = {}, {}, {}
        if rate is not None and isinstance(optim.pt_optim_args, dict):
            fresh.pt_optim_args = {**optim.pt_optim_args, "lr": rate}
        return fresh
    if rate is None:
        return optim

    def build(parameters: list[Tensor]) -> torch.optim.Optimizer:
        if optim is None:
            return torch.optim.Adam(parameters, lr=rate)
        built = optim(parameters)
        built.defaults["lr"] = rate
        for group in built.param_groups:
            group["lr"] = rate
        return built

    return build


def _is_random(strategy: Any) -> bool:
    """Whether an E-step strategy may use random numbers."""
    several = strategy.values() if isinstance(strategy, Mapping) else (strategy,)
    return any(isinstance(one, EStepStrategy) for one in several)


def _rows_of(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> float:
    """Elements of the outermost plate that holds data."""
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    frames = [
        frame
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["is_observed"]
        for frame in site["cond_indep_stack"]
        if frame.dim is not None
    ]
    return float(min(frames, key=lambda f: f.dim).full_size or 1) if frames else 1.0


def _scalar(loss: Any) -> float:
    return float(loss[0] if isinstance(loss, tuple) else loss)


def _sentence(text: str) -> str:
    """The first line of a message."""
    return text.strip().partition("\n")[0].rstrip()
