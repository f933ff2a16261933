"""Parameter values in the form in which a compiled step computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_em.densities.natural import State


@dataclass(frozen=True, eq=False)
class At:
    """Where an E-step is made.

    Attributes:
        natural: Simplex rows, probabilities and rates; None where there are none.
        components: Per Normal group that has parameters of its own.
        values: The parameters that neither holds.
        arguments: Of the groups that neither evaluates.
        prepared: Per Normal group what its rows are evaluated with.
        log_prior: Of the parameters that ``natural`` does not hold, in nats.
    """

    natural: State | None
    components: Mapping[int, Any]
    values: Mapping[str, Tensor]
    arguments: Mapping[int, Mapping[str, Tensor]]
    prepared: Mapping[int, Any]
    log_prior: Tensor | float = 0.0

    @property
    def eta(self) -> Tensor:
        """Logarithms and rates of linear groups."""
        assert self.natural is not None
        return self.natural.eta
