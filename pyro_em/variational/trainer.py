"""Stochastic steps along the gradient of the bound: optimisers, and how guide and model take turns.

Joint training moves φ (guide) and θ (model) on the same draw. `Alternating` is coordinate ascent:
some steps on φ with θ held, then some on θ with φ held, each on draws of its own. Parameters that keep
their closed form follow at the end of a step, by `pyro_em.variational.running_averages`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.errors import DegenerateError, UsageError, message, warn
from pyro_em.portable import StaysHere
from pyro_em.tracing.capture import ParameterRecord
from pyro_em.tracing.randomness import same_random_state
from pyro_em.updates.gradients.optimizers import Optimizer, adam
from pyro_em.updates.update import ClosedForm, Fixed, Gradient, Update
from pyro_em.variational.bound import Variational
from pyro_em.variational.sharing import Sharing
from pyro_em.variational.training import Stage, Training


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


@dataclass(frozen=True, eq=False)
class Trainer(StaysHere):
    """Stochastic steps on one pair of model and guide.

    Attributes:
        variational: The pair.
        optim: The user's optimiser; Adam where None.
        updates: The user's updates by parameter name, patterns resolved at each step.
        training: What lasts from step to step, and outlives a pair.
        num_particles: Draws per step.
        sharing: How steps are made together with other processes; None where this one has all data.
    """

    variational: Variational
    optim: Optimizer | pyro.optim.PyroOptim | None
    updates: Callable[[Mapping[str, Any]], Mapping[str, Update]]
    training: Training
    num_particles: int = 1
    sharing: Sharing | None = None

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
        past = self.training
        past.stage = Stage.ENTERED
        try:
            loss = self._step(args, kwargs, factors, schedule)
        except DegenerateError as error:
            which = "last good parameters"
            moved = past.stage is Stage.MOVED
            if moved or not (past.stage is Stage.FINITE or self._is_sound()):
                past.recovery.put_back()
                if past.recovery.step is not None and past.recovery.step < past.steps - 1:
                    which = f"parameters that entered step {past.recovery.step}"
            head, newline, rest = str(error).partition("\n")
            text = f"step {past.steps}: {head} The {which} were kept."
            raise DegenerateError(text + newline + rest) from error.__cause__
        except BaseException:  # an interrupt, or whatever the user's functions raise
            if past.stage is Stage.MOVED and past.recovery.step == past.steps:
                past.recovery.put_back()  # half a step is no step
            raise
        past.last = (args, kwargs, factors)
        return loss

    def _is_sound(self) -> bool:
        """Whether the present parameters have a finite loss on the batch before this one."""
        if self.training.last is None:
            return True
        if self.sharing is not None:
            return not self.sharing.any(lambda: not self._is_sound_here())
        return self._is_sound_here()

    def _is_sound_here(self) -> bool:
        assert self.training.last is not None
        args, kwargs, factors = self.training.last
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
            loss = self._move(args, kwargs, factors, "joint", self.optim)
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
        past, sharing = self.training, self.sharing
        batch = (args, kwargs, factors)
        if sharing is None:
            past.averages.m_step(self.variational, past.wishes, past.steps, *batch)
        else:
            with sharing.drawing():
                past.averages.m_step(
                    self.variational, past.wishes, past.steps, *batch, sharing.mean
                )
        past.steps += 1
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
        chosen: Callable[[str], bool] | None = None,
    ) -> float:
        past, sharing = self.training, self.sharing
        if sharing is None:
            loss, tensors = self._gradients(args, kwargs, factors)
        else:
            with sharing.drawing():
                loss, tensors = sharing.gradients(
                    lambda: self._gradients(args, kwargs, factors), past.baselines
                )
        if past.stage is Stage.ENTERED:
            past.stage = Stage.FINITE
        wishes = self._wishes_for(tensors)
        moved = {n: p for n, p in tensors.items() if p.grad is not None}
        if chosen is not None:
            moved = {n: p for n, p in moved.items() if chosen(n)}
        by_update = self._by_update(moved, wishes, label)
        self._require_finite(moved)
        if past.stage is not Stage.MOVED:
            whole = len(by_update) == 1 and past.optimizers.is_one_kernel(label)
            whole = whole and label == "joint" and label in by_update
            whole = whole and not any(isinstance(w, ClosedForm) for w in wishes.values())
            past.recovery.keep(tensors, past.steps, at_once=not whole)
            past.stage = Stage.MOVED
        for key, group in by_update.items():
            wish = wishes.get(next(iter(group)))
            given = wish.optimizer if key != label and isinstance(wish, Gradient) else optim
            past.optimizers.of(key, given or adam).step(group)
        for p in tensors.values():
            p.grad = None
        return loss

    def _by_update(
        self, moved: dict[str, Tensor], wishes: Mapping[str, Update], label: str
    ) -> dict[str, dict[str, Tensor]]:
        """The parameters that move, by the key of their optimiser."""
        if not wishes:
            return {label: moved} if moved else {}
        out: dict[str, dict[str, Tensor]] = {}
        for name, p in moved.items():
            wish = wishes.get(name)
            if isinstance(wish, (Fixed, ClosedForm)):
                continue
            has_optimizer = isinstance(wish, Gradient) and wish.optimizer is not None
            first = self.training.saved_name(_first_with(wish, wishes)) if has_optimizer else ""
            out.setdefault(f"updates:{first}" if has_optimizer else label, {})[name] = p
        return out

    def _gradients(
        self, args: tuple, kwargs: dict[str, Any], factors: Mapping[str, float] | None
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss of a batch, and the parameters that it read, with its gradient."""
        with torch.enable_grad(), ParameterRecord() as record:
            loss = self.variational.loss(
                args, kwargs, self.num_particles, factors, self.training.baselines
            )
        past = self.training
        if past.stage is Stage.ENTERED and self.sharing is None:
            past.stage = Stage.FINITE
        tensors = {n: p for n, p in record.found.items() if p.is_floating_point()}
        for p in tensors.values():
            p.grad = None
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach()), tensors

    def _wishes_for(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Update]:
        """The user's updates by name, resolved again only when parameters come or go."""
        past, names = self.training, tuple(tensors)
        if past.wished_for != names:
            past.wishes, past.wished_for = self.updates(tensors), names
        return past.wishes

    def _require_finite(self, moved: Mapping[str, Tensor]) -> None:
        each = {n: _numbers(p.grad) for n, p in moved.items() if p.grad is not None}
        gradients = list(each.values())
        if not gradients:
            return
        norms = torch._foreach_norm(gradients)
        if all(n.device.type == "cpu" for n in norms):
            is_finite = all(math.isfinite(n.item()) for n in norms)
        else:
            device = gradients[0].device
            is_finite = math.isfinite(torch.stack([n.to(device) for n in norms]).sum().item())
        if is_finite:
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
