r"""What is seen of a latent, as a factor that reads the latent: 1[z = z_seen].

Under ``obs_mask`` Pyro makes two sites of one, and reads of both where each holds. Summed as a latent
that every row has, times this factor where it is seen, it has the same density,

    Σ_z p(z) 1[z = z_seen] p(x | z) = p(z_seen) p(x | z_seen),

and what reads it has a number for each of its values, not one for each value and row.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

_ONE = torch.Size()


class Clamped(dist.TorchDistribution):  # type: ignore[misc]
    """All mass on one number: log p(x) = 0 where x is that number, else −∞.

    Args:
        held: The number. # (*batch)

    Example:
        >>> Clamped(torch.tensor([0.0, 1.0, 2.0])).log_prob(torch.tensor(1.0))
        tensor([-inf, 0., -inf])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"held": constraints.real}
    support = constraints.real

    def __init__(self, held: Tensor, validate_args: bool | None = None) -> None:
        self.held = held
        super().__init__(held.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Clamped:
        """The same for more elements."""
        return Clamped(self.held.expand(batch_shape), validate_args=False)

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """The number itself. # (*sample, *batch)"""
        return self.held.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero or −∞, in nats. # (*batch)"""
        return agreement(value, self.held)


def agreement(value: Tensor, held: Tensor) -> Tensor:
    """log 1[value = held], in nats. # (*batch)"""
    zero = held.new_zeros(())
    return torch.where(value == held, zero, zero - torch.inf)
