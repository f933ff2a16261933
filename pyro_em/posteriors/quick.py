"""What the quick blocks share: an E-step from prepared parameters, and the contraction beside it."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from pyro_em.densities.theta import At, Theta
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.contracted import Contraction
from pyro_em.updates.statistics import Expectation


class QuickBlock:
    """A block whose E-step goes through the data once and keeps sums alone.

    Attributes:
        component: What it solves.
        graph: The collapsed graph, possibly of distinct rows.
        theta: Its parameters, in the form of the E-step, and their M-step.
        name: What the plan calls it.
        words: What the plan says of its iterations.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    component: Component
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
        return self.component.latents

    @property
    def scope(self) -> tuple[str, ...]:
        """Quick blocks read no latents outside."""
        return ()

    @cached_property
    def contraction(self) -> Contraction:
        """The same component by contraction, which keeps tables."""
        found = Contraction.match(self.component)
        assert isinstance(found, Contraction)
        return found

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions of ``table``."""
        return self.contraction.dims

    def table(self, values: Values) -> Tensor:
        """The log evidence per cell, in nats. # (*plates,)"""
        return self.contraction.table(values)

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums at parameter values; see `pyro_em.posteriors.block.Block`."""
        if weights is not None:
            return self.contraction.expect(values, weights)
        return self.e_step(self.theta.enter(values))
