"""Stochastic steps: optimisers, schedules, and closed forms on running averages.

Joint training moves φ (guide) and θ (model) on the same draw. `Alternating` is coordinate ascent:
some steps on φ with θ held, then some on θ with φ held, each on draws of its own.

A parameter whose factors hold only summed or drawn latents may keep its closed form: statistics of
batches are averaged, s ← (1 − ρ) s + ρ ŝ, and θ ← argmax of s.

Source: Cappé and Moulines (2009), "Online EM algorithm for latent data models".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.errors import DegenerateError, UsageError, message, warn
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.trace import trace_graph
from pyro_em.portable import StaysHere
from pyro_em.posteriors.enumeration import contraction_of
from pyro_em.posteriors.exact import exact_posterior
from pyro_em.tracing.handlers import GuideSites, ScalePlates
from pyro_em.tracing.parameters import parameters_read
from pyro_em.tracing.randomness import same_random_state
from pyro_em.updates.decision import decide_updates
from pyro_em.updates.m_step import MStepState, m_step
from pyro_em.updates.optimizers import Optimizer, Stepper, adam
from pyro_em.updates.statistics import Expectation
from pyro_em.updates.update import ClosedForm, Fixed, Gradient, ParameterUpdate, Update
from pyro_em.variational.bound import Variational
from pyro_em.variational.recovery import Kept


@dataclass(frozen=True)
class Alternating:
    """Coordinate ascent on the bound: steps on the guide, then steps on the model, per batch.

    A parameter that both read moves in the guide's turns.

    Attributes:
        guide_steps: Steps on φ with θ held.
        model_steps: Steps on θ with φ held.
        guide_optim: Optimiser of φ (learning rate η_φ); that of the fit where None.
        model_optim: Optimiser of θ (learning rate η_θ); that of the fit where None.

    Example:
        >>> Alternating(2, 1).guide_steps
        2
    """

    guide_steps: int = 1
    model_steps: int = 1
    guide_optim: Optimizer | pyro.optim.PyroOptim | None = None
    model_optim: Optimizer | pyro.optim.PyroOptim | None = None

    def __post_init__(self) -> None:
        for name in ("guide_steps", "model_steps"):
            whole("Alternating", name, getattr(self, name), None)
        if self.guide_steps < 0 or self.model_steps < 0 or not self.guide_steps + self.model_steps:
            raise UsageError(
                message(
                    "Alternating",
                    f"guide_steps={self.guide_steps}, model_steps={self.model_steps}.",
                    "numbers of steps cannot be negative, and one must be positive",
                )
            )


@dataclass(eq=False)
class Trainer(StaysHere):
    """Stochastic steps on one pair of model and guide.

    Attributes:
        variational: The pair.
        optim: The user's optimiser; Adam where None.
        updates: The user's updates by parameter name, patterns resolved at each step.
        num_particles: Draws per step.
        saved_name: From a parameter's name here to its name in a file.
        steps: Complete steps so far.
        steppers: The optimisers by name.
        averages: Running averages of the closed forms' numerators and denominators.
        pending: Optimiser states that were loaded and wait for their optimisers.
        kept: Parameters at which the loss was finite, to return to.
    """

    variational: Variational
    optim: Optimizer | pyro.optim.PyroOptim | None
    updates: Callable[[Mapping[str, Any]], Mapping[str, Update]]
    num_particles: int = 1
    saved_name: Callable[[str], str] = str
    steps: int = 0
    steppers: dict[str, Stepper] = field(default_factory=dict)
    averages: dict[str, Expectation] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    _wishes: tuple[tuple[str, ...], Mapping[str, Update]] | None = None
    _is_good: bool = False
    _has_moved: bool = False
    _last: tuple[tuple, dict[str, Any], Mapping[str, float] | None] | None = None

    def step(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        factors: Mapping[str, float] | None = None,
        schedule: Alternating | None = None,
    ) -> float:
        """One stochastic step on a batch.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            factors: Per plate what multiplies its sites.
            schedule: How guide and model take turns; both at once where None.

        Returns:
            The loss (−ELBO in nats) of the first draw, at the parameters entering the step.

        Raises:
            DegenerateError: If the loss or a gradient is not finite; names the step. The parameters
                are then some at which the loss was finite: those of this step or the one before if
                they are, else the last that were copied.
        """
        self._is_good = self._has_moved = False
        try:
            loss = self._step(args, kwargs, factors, schedule)
        except DegenerateError as error:
            which = "last good parameters"
            if self._has_moved or not (self._is_good or self._is_sound()):
                self.kept.put_back()
                if self.kept.step is not None and self.kept.step < self.steps - 1:
                    which = f"parameters that entered step {self.kept.step}"
            head, newline, rest = str(error).partition("\n")
            said = f"step {self.steps}: {head} The {which} were kept."
            raise DegenerateError(said + newline + rest) from error.__cause__
        except BaseException:  # an interrupt, or whatever the user's functions raise
            if self._has_moved and self.kept.step == self.steps:  # half a step is no step
                self.kept.put_back()
            raise
        self._last = (args, kwargs, factors)
        return loss

    def _is_sound(self) -> bool:
        """Whether the present parameters have a finite loss on the batch before this one."""
        if self._last is None:
            return True
        args, kwargs, factors = self._last
        try:
            with torch.no_grad(), same_random_state():
                self.variational.loss(args, kwargs, self.num_particles, factors)
        except DegenerateError:
            return False
        return True

    def _step(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        factors: Mapping[str, float] | None,
        schedule: Alternating | None,
    ) -> float:
        if schedule is None:
            loss = self._move(args, kwargs, factors, "joint", self.optim, lambda name: True)
        else:
            own = set(self.guide_parameters)
            if schedule.guide_steps and not own:
                raise UsageError(
                    message(
                        "Alternating",
                        "the guide has no parameters of its own.",
                        "its turns would change nothing",
                        ["register its networks in the guide: pyro.module(name, network)"],
                    )
                )
            first: float | None = None
            for _ in range(schedule.guide_steps):
                optim = schedule.guide_optim or self.optim
                loss = self._move(args, kwargs, factors, "guide", optim, lambda n: n in own)
                first = loss if first is None else first
            for _ in range(schedule.model_steps):
                optim = schedule.model_optim or self.optim
                loss = self._move(args, kwargs, factors, "model", optim, lambda n: n not in own)
                first = loss if first is None else first
            assert first is not None
            loss = first
        self._closed_forms(args, kwargs, factors)
        self.steps += 1
        return loss

    @property
    def guide_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the guide uses."""
        look = self.variational.routing.guide
        return () if look is None else look.parameters(self.variational.parameters)

    def _move(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        factors: Mapping[str, float] | None,
        label: str,
        optim: Optimizer | pyro.optim.PyroOptim | None,
        chosen: Callable[[str], bool],
    ) -> float:
        with torch.enable_grad(), parameters_read() as parameters:
            loss = self.variational.loss(args, kwargs, self.num_particles, factors)
        self._is_good = True
        tensors = {n: p for n, p in parameters.items() if p.is_floating_point()}
        for p in tensors.values():
            p.grad = None
        if loss.requires_grad:
            loss.backward()
        wishes = self._wishes_for(tensors)
        moved = {n: p for n, p in tensors.items() if chosen(n) and p.grad is not None}
        by_update: dict[str, dict[str, Tensor]] = {}
        for name, p in moved.items():
            wish = wishes.get(name)
            if isinstance(wish, (Fixed, ClosedForm)):
                continue
            own = isinstance(wish, Gradient) and wish.optimizer is not None
            first = self.saved_name(_first_with(wish, wishes)) if own else ""
            by_update.setdefault(f"updates:{first}" if own else label, {})[name] = p
        self._require_finite(moved)
        if not self._has_moved:
            stepper = self.steppers.get(label)
            whole = len(by_update) == 1 and stepper is not None and stepper.is_one_kernel
            whole = whole and label == "joint" and label in by_update
            whole = whole and not any(isinstance(w, ClosedForm) for w in wishes.values())
            self.kept.keep(tensors, self.steps, at_once=not whole)
            self._has_moved = True
        for key, group in by_update.items():
            wish = wishes.get(next(iter(group)))
            given = wish.optimizer if key != label and isinstance(wish, Gradient) else optim
            if key not in self.steppers or self.steppers[key].optim is not (given or adam):
                self.steppers[key] = Stepper(given or adam, self.saved_name)
                self.steppers[key].pending = self.pending.pop(key, None)
            self.steppers[key].step(group)
        for p in tensors.values():
            p.grad = None
        return float(loss.detach())

    def _wishes_for(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Update]:
        """The user's updates by name, resolved again only when parameters come or go."""
        names = tuple(tensors)
        if self._wishes is None or self._wishes[0] != names:
            self._wishes = (names, self.updates(tensors))
        return self._wishes[1]

    def _require_finite(self, moved: Mapping[str, Tensor]) -> None:
        each = {n: _numbers(p.grad) for n, p in moved.items() if p.grad is not None}
        gradients = list(each.values())
        if not gradients:
            return
        device = gradients[0].device
        norms = [n.to(device) for n in torch._foreach_norm(gradients)]
        if math.isfinite(torch.stack(norms).sum().item()):
            return
        bad = [n for n, gradient in each.items() if not bool(torch.isfinite(gradient).all())]
        if not bad:  # a finite gradient whose norm overflows
            _warn_of_squares(each)
            return
        raise DegenerateError(
            message(
                f"parameter '{bad[0]}'",
                "its gradient is not finite.",
                "a step along it would destroy the parameter",
                [
                    "use a smaller learning rate",
                    "avoid square roots and logarithms of zero in the model",
                ],
            )
        )

    # ------------------------------------------------------------------ closed forms on batches

    def _closed_forms(
        self, args: tuple, kwargs: dict[str, Any], factors: Mapping[str, float] | None
    ) -> None:
        asked = (self._wishes or ((), {}))[1]
        names = {n for n, u in asked.items() if isinstance(u, ClosedForm)}
        if not names:
            return
        v = self.variational
        with ScalePlates(factors or {}):
            graph = trace_graph(
                v.pair,
                args,
                kwargs,
                v.structure(args, kwargs),
                keep_random_state=False,
            )
        updates = self._granted(graph, names, asked)
        with torch.no_grad():
            tables = [g.log_density().detach() for g in graph.groups]
            q = exact_posterior(graph, contraction_of(graph), tables)
        # A component that no row of the batch belongs to is empty, not one of 1e-40 rows.
        counts = [torch.where(c < 1e-10, 0.0, c) for c in q.counts]
        arguments = [{n: a.detach() for n, a in g.arguments.items()} for g in graph.groups]

        def blend(name: str, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
            """Numerators and denominators live on the parameter: batches may differ in rows."""
            update = updates[name].update
            step_size = update.step_size if isinstance(update, ClosedForm) else None
            rho = step_size or (self.steps + 1) ** -0.6
            saved = self.saved_name(name)
            batch = _sums(n, d)
            if saved in self.averages:
                old = _sums(*(s.to(n) for s in _pair(self.averages[saved])))
                batch = old + rho * (batch + -1.0 * old)
            self.averages[saved] = batch
            n, d = _pair(batch)
            return n.clone(), d.clone()

        m_step(graph, updates, counts, arguments, _no_gradient, MStepState(), blend)

    def _granted(
        self, graph: FactorGraph, names: set[str], asked: Mapping[str, Update]
    ) -> dict[str, ParameterUpdate]:
        decided = decide_updates(graph, {n: asked[n] for n in names if n in graph.parameters})
        out = {}
        for name, update in decided.items():
            if name not in names:
                out[name] = ParameterUpdate(name, Fixed(), "trained on the drawn bound")
            elif not isinstance(update.update, ClosedForm) or update.needs_data:
                raise UsageError(
                    message(
                        f"updates['{name}']",
                        f"a closed form was asked for, but {_in_users_words(update.reason)}.",
                        "on batches it needs additive statistics of summed or drawn latents",
                        ["leave it out: the parameter is then trained by gradient"],
                    )
                )
            else:
                out[name] = update
        return out

    def state(self) -> dict[str, Any]:
        """What a saved fit needs to continue on the same path: tensors and numbers."""
        return {
            "optimizers": {**self.pending, **{k: s.state() for k, s in self.steppers.items()}},
            "baselines": dict(self.variational.baselines),
            "steps": self.steps,
            "averages": {name: list(_pair(sums)) for name, sums in self.averages.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved fit stopped."""
        self.pending = dict(state.get("optimizers", {}))
        self.variational.baselines.update(state.get("baselines", {}))
        self.steps = int(state.get("steps", 0))
        self.averages = {n: _sums(p[0], p[1]) for n, p in state.get("averages", {}).items()}


def _sums(n: Tensor, d: Tensor) -> Expectation:
    """The numerator and the denominator of one closed form as sums over data."""
    return Expectation(math.nan, {"closed form": {"numerator": n, "denominator": d}})


def _pair(sums: Expectation) -> tuple[Tensor, Tensor]:
    own = sums.sums["closed form"]
    return own["numerator"], own["denominator"]


def _warn_of_squares(gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient.square()).all()):
            text = message(
                f"parameter '{name}'",
                "its gradient is finite, but the square of it is not.",
                "an optimiser that averages squares (Adam) does not move it any more",
                ["work in float64", "scale the data, or what the parameter is multiplied by"],
            )
            warn(text)


def _numbers(gradient: Tensor) -> Tensor:
    """The entries of a gradient that it holds: few of a sparse one."""
    return gradient._values() if gradient.is_sparse else gradient


def _in_users_words(reason: str) -> str:
    """The reason against a wish without the wish, and guide sites as the user called them."""
    return (
        reason.partition("was asked for, but ")[2].replace(f"'{GuideSites.prefix}", "guide site '")
        or reason
    )


def _first_with(wish: Update | None, wishes: Mapping[str, Update]) -> str:
    return next(n for n, w in wishes.items() if w is wish)


def _no_gradient(values: Mapping[str, Tensor], groups: Sequence[int]) -> Mapping[int, Tensor]:
    raise AssertionError("closed forms need no gradient")
