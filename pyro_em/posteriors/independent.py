"""Components of latents side by side: each by a block of its own, and what they say is added.

    log p(x) = Σ_c log p(x_c),     S = Σ_c S_c

Components share no factor: at given parameters they are independent. Each is solved by the first
kernel that serves it; those that none serves are contracted. Factors that read no latent go to one of
the components, so that they count once. Parameters are shared: all blocks read one vector of them,
and one M-step takes the sums of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import IMPOSSIBLE
from pyro_em.densities.theta import At, Theta, theta_of
from pyro_em.errors import Finding, Handover
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.arrangement import Arrangement, Kinds, PlacedBlock, arranged
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.contracted import Contraction, onto
from pyro_em.posteriors.quick import EMSteps, QuickBlock, SumsBlock
from pyro_em.updates.expectations.statistics import Expectation


@dataclass(frozen=True, eq=False)
class Independent(SumsBlock):
    """Components of latents that share no factor.

    Attributes:
        component: All of them.
        graph: The groups of all parts, one part after the other, then the priors.
        theta: The parameters of all.
        kernels: The kernels.
        rest: What is contracted; None where nothing is.
    """

    component: Component
    graph: FactorGraph
    theta: Theta
    kernels: tuple[PlacedBlock, ...]
    rest: PlacedBlock | None

    name: ClassVar[str] = "independent"
    words: ClassVar[str] = ""
    kinds: ClassVar[Kinds] = ()

    @classmethod
    def match(cls, component: Component) -> Self | Finding:
        """The blocks of all components, or why sums do not serve their M-step."""
        return cls.of(arranged(component, cls.kinds))

    @classmethod
    def of(cls, arrangement: Arrangement) -> Self | Finding:
        """The blocks of an arrangement with their parameters, or why sums do not serve the M-step."""
        component = arrangement.component
        theta = theta_of(
            arrangement.graph,
            arrangement.updates,
            component.values,
            arrangement.layout,
            arrangement.normals,
        )
        if isinstance(theta, Finding):
            return theta
        return cls(component, arrangement.graph, theta, arrangement.kernels, arrangement.rest)

    @property
    def parts(self) -> tuple[PlacedBlock, ...]:
        """All parts."""
        return self.kernels if self.rest is None else (*self.kernels, self.rest)

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters: those of the parts, added.

        Raises:
            Handover: If a part hands over, or what is contracted is impossible.
        """
        total = Expectation(0.0, {})
        for part, steps in zip(self.kernels, self._own_steps, strict=True):
            total = total + part.outside(steps.e_step(part.inside(at)))
        if self.rest is not None:
            with torch.inference_mode(False):  # its sums are a gradient
                found = self.rest.block.expect(self.theta.values(at))
            if not abs(found.log_evidence) < IMPOSSIBLE:
                raise Handover
            total = total + self.rest.outside(found)
        return total

    @cached_property
    def _own_steps(self) -> list[EMSteps]:
        """What takes the steps of each kernel."""
        blocks = [part.block for part in self.kernels]
        return [block.steps(self.theta) for block in blocks if isinstance(block, QuickBlock)]

    def table(self, values: Values) -> Tensor:
        """The log evidence per cell, in nats. # (*plates,)"""
        parts = [
            onto(part.block.table(values), part.block.dims, self.dims, self.component.graph)
            for part in self.parts
        ]
        return torch.stack(parts).sum(0)

    def marginals(self, values: Values) -> dict[str, Tensor]:
        """Posterior probabilities of all latents. # (*plates, K)"""
        out: dict[str, Tensor] = {}
        for part in self.parts:
            block = part.block
            own = block if isinstance(block, Contraction) else block.contraction
            out |= own.marginals(values)
        return {name: out[name] for name in self.latents}
