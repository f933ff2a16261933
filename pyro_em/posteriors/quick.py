"""What the quick blocks share: an E-step from prepared parameters, and the contraction beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from torch import Tensor

from pyro_em.densities.density import NormalRows
from pyro_em.densities.layout import Layout, layout_of
from pyro_em.densities.theta import At, Theta, theta_of
from pyro_em.densities.tying import collapsed_updates, placed, places_of
from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.contracted import Contraction
from pyro_em.updates.expectations.statistics import Expectation

B = TypeVar("B", covariant=True)


@dataclass(frozen=True, eq=False)
class Outline(Generic[B]):
    """A component that a block can solve, before it is known how its densities are evaluated.

    Attributes:
        graph: The collapsed graph, possibly of distinct rows.
        eligible: Groups whose linear form the block can use.
        finish: Makes the block, or says why there is none after all.
        origin: For each of its groups that of the component which it was taken from; None where they
            are the same.
        sizes: For each of its groups how many values the latents have that it reads; None where all
            latents have as many.
    """

    graph: FactorGraph
    eligible: Sequence[int]
    finish: Callable[[Layout], B | Finding]
    origin: tuple[int, ...] | None = None
    sizes: Mapping[int, int] | None = None


class EMSteps(Protocol):
    """What steps on sums need: parameters in a form of their own, and an E-step there."""

    @property
    def theta(self) -> Any:
        """The parameters: ``enter``, ``values``, ``m_step``, ``log_prior``."""
        ...

    def e_step(self, at: Any) -> Expectation:
        """Evidence and sums at some parameters."""
        ...


class QuickSteps(EMSteps, Protocol):
    """What takes the steps of a model, as its plan names it."""

    @property
    def name(self) -> str:
        """What the plan calls it."""
        ...

    @property
    def words(self) -> str:
        """What the plan says of an iteration."""
        ...


class SumsBlock:
    """A block whose E-step goes through the data once and keeps sums alone.

    Attributes:
        component: What it solves.
        graph: The collapsed graph, possibly of distinct rows.
        theta: Its parameters, in the form of the E-step, and their M-step.
        name: What the plan calls it.
    """

    name: ClassVar[str]
    component: Component
    graph: FactorGraph
    theta: Theta

    @abstractmethod
    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If something has to be judged by an E-step that looks at all tables.
        """

    def steps(self, theta: Theta) -> EMSteps:
        """What takes many steps on its data: itself, or what these data allow to be quicker.

        Args:
            theta: The parameters of the steps: its own, or those of all blocks that it stands beside.
        """
        return self

    @property
    def adds(self) -> bool:
        """Whether the sums of parts of the data add up."""
        return self.theta.adds

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


class QuickBlock(SumsBlock):
    """A kernel: a block of one component, which may stand beside others.

    Attributes:
        normals: Normal groups that are evaluated by matrix products.
        words: What the plan says of its iterations.
    """

    words: ClassVar[str]
    normals: Mapping[int, NormalRows]

    @classmethod
    def glance(cls, latents: Mapping[str, Latent]) -> Finding | None:
        """Why no component of such latents is one, whatever its factors, where that can be told."""
        return None

    @classmethod
    @abstractmethod
    def outline(cls, component: Component) -> Outline[Self] | Finding:
        """What the block makes of a component, or why it does not serve; by looking only."""

    @classmethod
    def match(cls, component: Component) -> Self | Finding:
        """The block that a component is, or why it is none."""
        outline = cls.outline(component)
        if isinstance(outline, Finding):
            return outline
        graph, values = outline.graph, component.values
        updates = component.updates
        if outline.origin is not None:
            updates = placed(updates, places_of(outline.origin))
        updates = collapsed_updates(updates, graph)
        layout = layout_of(graph, updates, values, outline.eligible, outline.sizes)
        block = outline.finish(layout)
        if isinstance(block, Finding):
            return block
        theta = theta_of(graph, updates, values, layout, block.normals)
        if isinstance(theta, Finding):
            return theta
        block.component, block.theta = component, theta
        return block
