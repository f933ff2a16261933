"""What lasts from one stochastic step to the next: optimisers, averages, baselines, copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pyro_em.portable import StaysHere
from pyro_em.updates.gradients.optimizers import Steppers
from pyro_em.updates.update import Update
from pyro_em.variational.recovery import Recovery
from pyro_em.variational.running_averages import RunningAverages


class Stage(Enum):
    """How far a stochastic step has come, for what has to be undone where it breaks."""

    ENTERED = "nothing is known of the parameters that enter it"
    FINITE = "the loss of those parameters is finite"
    MOVED = "they have been copied and are being changed"


@dataclass(eq=False)
class Training(StaysHere):
    """The state of a stochastic fit; it goes on while parameters are the same.

    Attributes:
        saved_name: From a parameter's name here to its name in a file.
        steps: Complete steps so far.
        optimizers: The optimisers that have stepped.
        averages: What the closed forms on batches average.
        baselines: Decaying averages of downstream costs.
        recovery: Parameters at which the loss was finite, to return to.
        stage: How far the present step has come.
        last: The batch of the last complete step, and what multiplied its plates.
        wishes: The user's updates by parameter name.
        wished_for: The parameters that these were resolved for.
    """

    saved_name: Callable[[str], str] = str
    steps: int = 0
    baselines: dict[str, float] = field(default_factory=dict)
    recovery: Recovery = field(default_factory=Recovery)
    stage: Stage = Stage.ENTERED
    last: tuple[tuple, dict[str, Any], Mapping[str, float] | None] | None = None
    wishes: Mapping[str, Update] = field(default_factory=dict)
    wished_for: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.optimizers = Steppers(self.saved_name)
        self.averages = RunningAverages(self.saved_name)

    def state(self) -> dict[str, Any]:
        """What a saved fit needs to continue on the same path: tensors and numbers."""
        return {
            "optimizers": self.optimizers.state(),
            "baselines": dict(self.baselines),
            "steps": self.steps,
            "averages": self.averages.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved fit stopped."""
        self.optimizers.restore(state.get("optimizers", {}))
        self.baselines.update(state.get("baselines", {}))
        self.steps = int(state.get("steps", 0))
        self.averages.restore(state.get("averages", {}))
