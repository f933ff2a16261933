"""What every posterior answers, whether its latents are summed or drawn from a guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from pyro_em.globs import Values


@runtime_checkable
class AnyPosterior(Protocol):
    """The face that `Posterior` and `DrawnPosterior` share.

    Attributes:
        exact: Whether this is p(z | x; θ).
        log_evidence: log p(x; θ) in nats; None where it is not known.
    """

    @property
    def exact(self) -> bool:
        """Whether this is p(z | x; θ)."""
        ...

    @property
    def log_evidence(self) -> float | None:
        """log p(x; θ) in nats; None where it is not known."""
        ...

    def probs(self, site: str) -> Tensor:
        """Posterior marginals of a latent with finite support # (*plates, K), of a glob `stacked`."""
        ...

    def stacked(self, sites: Sequence[str]) -> Tensor:
        """Posterior marginals of several latents, in this order. # (T, *plates, K)"""
        ...

    def mode(self) -> Values:
        """The jointly most probable values.

        Raises:
            UsageError: If latents are drawn.
        """
        ...

    def sample(self, n: int = 1, *, seed: int | None = None) -> Values:
        """Draws of all latents # (n, *plates, *event), of a glob (T, n, *plates, *event)."""
        ...

    def entropy(self) -> float:
        """H(q) in nats.

        Raises:
            UsageError: If latents are drawn.
        """
        ...
