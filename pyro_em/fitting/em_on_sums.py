"""One EM step on sums over the data.

The parameters are plain values here; nothing is written until somebody can look. Whatever is out of
the ordinary raises `Handover`, and the full step of `pyro_em.fitting.em_map`, which stands on its
own and is this one's oracle in the tests, takes over from the last good values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from pyro_em.densities.theta import At
from pyro_em.posteriors.on_sums import OnSums
from pyro_em.tracing.sites import Role
from pyro_em.updates.statistics import Expectation

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Point:
    """Where a run on sums stands: the parameters, and the E-step there."""

    iteration: Iteration
    at: At
    expectation: Expectation
    log_prior: float = 0.0

    @property
    def log_evidence(self) -> float:
        """log p(x; θ) in nats."""
        return self.expectation.log_evidence

    @property
    def objective(self) -> float:
        """What EM raises: the log evidence plus the log prior, in nats."""
        return self.expectation.log_evidence + self.log_prior

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return self.iteration.values(self.at)


@dataclass(frozen=True, eq=False)
class Iteration:
    """An EM step on sums over the data.

    Attributes:
        block: The latents, with their E-step and the parameters' M-step.
    """

    block: OnSums

    def enter(self, values: Values) -> At:
        """Parameter values in the form of the E-step.

        Raises:
            Handover: If the full E-step has to look.
        """
        return self.block.theta.enter(values)

    def values(self, at: At) -> dict[str, Tensor]:
        """All parameters by name."""
        return self.block.theta.values(at)

    @torch.inference_mode()
    def e_step(self, at: At) -> Point:
        """The E-step at some parameters.

        Raises:
            Handover: If the full E-step has to look.
        """
        expectation = self.block.e_step(at)
        return Point(self, at, expectation, self.block.theta.log_prior(at))

    @torch.inference_mode()
    def m_step(self, point: Point) -> tuple[At, float]:
        """The M-step from an E-step.

        Returns:
            The new parameters, and by how much they raise the expected log joint, in nats.

        Raises:
            Handover: If the full M-step has to look.
        """
        return self.block.theta.m_step(point.at, point.expectation)

    def tells_apart(self, point: Point) -> bool:
        """Whether the components differ in an argument of what is observed."""
        theta = self.block.theta
        return any(
            _tells_apart(a.evaluate(point.values), 1 + group.n_plates, 1 + len(group.sizes))
            for group, evaluators in zip(theta.graph.groups, theta.evaluators, strict=True)
            if group.observed
            and group.role is not Role.POINT
            and (group.mask is None or bool(group.mask.any()))
            for a in evaluators.values()
            if a.dtype.is_floating_point
        )


def _tells_apart(argument: Tensor, first: int, dims: int) -> bool:
    """Whether an argument differs between values of a latent."""
    axes = [i for i in range(first, dims) if argument.shape[i] > 1]
    if not axes:
        return False
    low, high = argument.amin(axes), argument.amax(axes)
    return bool((high - low > 1e-6 * high.abs().clamp(min=1.0)).any())


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB of freed memory, once per process.

    glibc gives the end of the heap back to the system where more is free than twice the largest
    block that was mapped and freed so far, and each page that is taken again costs a fault: between
    a sixth and a third of the time where steps make some MB of temporaries. One block just below
    the limit of 32 MiB, freed before it is touched, raises what is kept. Other C libraries take no
    notice.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
