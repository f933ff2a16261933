"""The path of a stochastic fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyro_em.fitting.results.history import EMStatus


@dataclass(eq=False)
class StochasticRun:
    """The path of a stochastic fit.

    Attributes:
        bounds: The bound of each step's batch, scaled to all data, at the parameters entering it.
        validation: (step, bound) on the validation data after each epoch.
        status: Why it ended.
        message: More about the status.
        epochs: Complete epochs.
    """

    bounds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    status: EMStatus = EMStatus.MAX_STEPS
    message: str = ""
    epochs: int = 0
