"""What a user asked of `ExactPosteriorEM`, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro

from pyro_em.errors import UsageError, message
from pyro_em.globs import listed
from pyro_em.plan.routes import matching, unknown_strategies
from pyro_em.plan.wishes import matched
from pyro_em.portable import StaysHere
from pyro_em.posteriors.strategies import EStepStrategy
from pyro_em.updates.gradients.optimizers import Optimizer, StepsPyroOptim
from pyro_em.updates.update import Gradient, Update

Strategy = str | EStepStrategy


@dataclass(frozen=True, eq=False)
class Request(StaysHere):
    """What the user gave.

    Attributes:
        model: The user's model.
        guide: The user's ``guide`` argument.
        optim: The user's optimiser.
        strategy: The user's strategy.
        updates: The user's updates by name or glob.
        max_plate_nesting: As the user gave it.
        max_enumeration: The budget in cells.
    """

    model: Callable[..., Any]
    guide: Any
    optim: Optimizer | pyro.optim.PyroOptim | None
    strategy: Strategy | Mapping[str, Strategy]
    updates: Mapping[str, Update]
    max_plate_nesting: int | None
    max_enumeration: int

    @property
    def e_step(self) -> EStepStrategy | None:
        """The E-step that was asked for in place of the exact one."""
        if not isinstance(self.strategy, Mapping):
            return None if isinstance(self.strategy, str) else self.strategy
        wanted = {s for s in self.strategy.values() if not isinstance(s, str)}
        if len(wanted) > 1:
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    "strategy holds several E-steps: " + ", ".join(map(repr, wanted)) + ".",
                    "all summed latents share one E-step",
                    ["use one of them"],
                )
            )
        return next(iter(wanted), None)

    @property
    def gradient(self) -> Gradient | None:
        """The update of parameters without a closed form."""
        optim = self.optim
        if optim is None:
            return None
        if isinstance(optim, pyro.optim.PyroOptim):
            return Gradient(lambda p: StepsPyroOptim(p, optim), 1)
        return Gradient(optim, 1)

    def updates_for(self, parameters: Mapping[str, Any]) -> Mapping[str, Update]:
        """The user's updates by exact parameter name."""
        return matched(self.updates, parameters)

    def check_strategies(self, latents: Iterable[str], exact: Iterable[str]) -> None:
        """Refuse a dict of strategies that names no latent, or part of what is summed together."""
        if not isinstance(self.strategy, Mapping):
            return
        unknown = unknown_strategies(self.strategy, latents)
        if unknown:
            raise UsageError(
                message(
                    f"strategy['{unknown[0]}']",
                    f"no latent matches; the model has: {listed(list(latents))}.",
                    "a misspelt name would be ignored in silence",
                    ["use a latent's name or a glob"],
                )
            )
        asked = self.e_step
        if asked is None:
            return
        left = [n for n in exact if matching(self.strategy, n) != asked]
        if left:
            raise UsageError(
                message(
                    f"strategy={asked!r}",
                    f"it was asked for some latents, but '{left[0]}' is to be summed exactly.",
                    "latents that are summed share one E-step",
                    [f"pass strategy={asked!r} for all of them"],
                )
            )
