"""What the quick blocks share: an E-step from prepared parameters, and the contraction beside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from pyro_em.densities.theta import At, Theta
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.block import Values
from pyro_em.updates.statistics import Expectation


class OnSums:
    """A block whose E-step goes through the data once and keeps sums alone.

    Attributes:
        graph: The collapsed graph.
        theta: Its parameters, in the form of the E-step, and their M-step.
        name: What the plan calls it.
        words: What the plan says of its iterations.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    graph: FactorGraph
    theta: Theta

    @abstractmethod
    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If something has to be judged by an E-step that looks at all tables.
        """

    @property
    def latents(self) -> tuple[str, ...]:
        """The latents that it sums."""
        return tuple(self.graph.latents)

    @property
    def scope(self) -> tuple[str, ...]:
        """Quick blocks read no latents outside."""
        return ()

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums at parameter values; see `pyro_em.posteriors.block.Block`."""
        assert weights is None, "a quick block is nested in nothing"
        return self.e_step(self.theta.enter(values))
