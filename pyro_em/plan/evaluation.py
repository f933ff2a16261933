"""What a program says at some parameter values, and where a fresh run of the model says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.continuous.gaussian_steps import Solved


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The factors at some parameter values.

    Attributes:
        graph: The graph that they belong to.
        arguments: Per group.
        tables: Log densities per group.
        solved: The posterior of the latents that a group integrates.
        values: The parameters; None where they are those of the graph's trace.
    """

    graph: FactorGraph
    arguments: list[dict[str, Tensor]]
    tables: list[Tensor]
    solved: Solved = field(default_factory=dict)
    values: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Disagreement:
    """Where a fresh trace differs from what the bindings predict; false where it does not.

    Attributes:
        places: Sites, each with an argument.
        note: What users have to be told of it, in words, or nothing.
    """

    places: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.places)
