"""Stochastic steps along the gradient of the bound: optimisers, and how guide and model take turns.

Joint training moves φ (guide) and θ (model) on the same draw. `Alternating` is coordinate ascent:
some steps on φ with θ held, then some on θ with φ held, each on draws of its own. Parameters that keep
their closed form follow at the end of a step, by `pyro_em.variational.running_averages`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.errors import DegenerateError, UsageError, message, warn
from pyro_em.portable import StaysHere
from pyro_em.tracing.parameters import parameters_read
from pyro_em.tracing.randomness import same_random_state
from pyro_em.updates.optimizers import Optimizer, Steppers, adam
from pyro_em.updates.update import ClosedForm, Fixed, Gradient, Update
from pyro_em.variational.bound import Variational
from pyro_em.variational.recovery import Recovery
from pyro_em.variational.running_averages import RunningAverages


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


class Stage(Enum):
    """How far a stochastic step has come, for what has to be undone where it breaks."""

    ENTERED = "nothing is known of the parameters that enter it"
    FINITE = "the loss of those parameters is finite"
    MOVED = "they have been copied and are being changed"


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
        optimizers: The optimisers that have stepped.
        averages: What the closed forms on batches average.
        recovery: Parameters at which the loss was finite, to return to.
    """

    variational: Variational
    optim: Optimizer | pyro.optim.PyroOptim | None
    updates: Callable[[Mapping[str, Any]], Mapping[str, Update]]
    num_particles: int = 1
    saved_name: Callable[[str], str] = str
    steps: int = 0
    recovery: Recovery = field(default_factory=Recovery)
    _wishes: tuple[tuple[str, ...], Mapping[str, Update]] | None = None
    _stage: Stage = Stage.ENTERED
    _last: tuple[tuple, dict[str, Any], Mapping[str, float] | None] | None = None

    def __post_init__(self) -> None:
        self.optimizers = Steppers(self.saved_name)
        self.averages = RunningAverages(self.saved_name)

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
        self._stage = Stage.ENTERED
        try:
            loss = self._step(args, kwargs, factors, schedule)
        except DegenerateError as error:
            which = "last good parameters"
            moved = self._stage is Stage.MOVED
            if moved or not (self._stage is Stage.FINITE or self._is_sound()):
                self.recovery.put_back()
                if self.recovery.step is not None and self.recovery.step < self.steps - 1:
                    which = f"parameters that entered step {self.recovery.step}"
            head, newline, rest = str(error).partition("\n")
            text = f"step {self.steps}: {head} The {which} were kept."
            raise DegenerateError(text + newline + rest) from error.__cause__
        except BaseException:  # an interrupt, or whatever the user's functions raise
            if self._stage is Stage.MOVED and self.recovery.step == self.steps:
                self.recovery.put_back()  # half a step is no step
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
            of_guide = set(self.guide_parameters)
            if schedule.guide_steps and not of_guide:
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
                loss = self._move(args, kwargs, factors, "guide", optim, lambda n: n in of_guide)
                first = loss if first is None else first
            for _ in range(schedule.model_steps):
                optim = schedule.model_optim or self.optim
                loss = self._move(
                    args, kwargs, factors, "model", optim, lambda n: n not in of_guide
                )
                first = loss if first is None else first
            assert first is not None
            loss = first
        asked = {} if self._wishes is None else self._wishes[1]
        self.averages.m_step(self.variational, asked, self.steps, args, kwargs, factors)
        self.steps += 1
        return loss

    @property
    def guide_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the guide uses."""
        guide = self.variational.routing.guide
        return () if guide is None else guide.parameters(self.variational.parameters)

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
        if self._stage is Stage.ENTERED:
            self._stage = Stage.FINITE
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
            has_optimizer = isinstance(wish, Gradient) and wish.optimizer is not None
            first = self.saved_name(_first_with(wish, wishes)) if has_optimizer else ""
            by_update.setdefault(f"updates:{first}" if has_optimizer else label, {})[name] = p
        self._require_finite(moved)
        if self._stage is not Stage.MOVED:
            whole = len(by_update) == 1 and self.optimizers.is_one_kernel(label)
            whole = whole and label == "joint" and label in by_update
            whole = whole and not any(isinstance(w, ClosedForm) for w in wishes.values())
            self.recovery.keep(tensors, self.steps, at_once=not whole)
            self._stage = Stage.MOVED
        for key, group in by_update.items():
            wish = wishes.get(next(iter(group)))
            given = wish.optimizer if key != label and isinstance(wish, Gradient) else optim
            self.optimizers.of(key, given or adam).step(group)
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

    def state(self) -> dict[str, Any]:
        """What a saved fit needs to continue on the same path: tensors and numbers."""
        return {
            "optimizers": self.optimizers.state(),
            "baselines": dict(self.variational.baselines),
            "steps": self.steps,
            "averages": self.averages.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved fit stopped."""
        self.optimizers.restore(state.get("optimizers", {}))
        self.variational.baselines.update(state.get("baselines", {}))
        self.steps = int(state.get("steps", 0))
        self.averages.restore(state.get("averages", {}))


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
    """The entries of a gradient that are stored; of a sparse one only some are."""
    return gradient._values() if gradient.is_sparse else gradient


def _first_with(wish: Update | None, wishes: Mapping[str, Update]) -> str:
    return next(n for n, w in wishes.items() if w is wish)
