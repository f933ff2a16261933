"""A model with its conjugate latents given, ready to be run at values of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.bindings.sparse_lines import random_like
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import GivenConjugates
from pyro_em.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class ConjugateModel:
    """The model with its data, and what is known of it.

    Attributes:
        model: The model with its conjugate latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        kernels: The kernel of each latent's prior.
    """

    model: GivenConjugates
    args: tuple
    kwargs: dict[str, Any]
    structure: Structure
    kernels: Mapping[str, PriorKernel]

    def inside(self, seed: int) -> dict[str, Tensor]:
        """Random values in the supports of all latents."""
        return {
            name: self.kernels[name].inside(random_like(like, seed + i))
            for i, (name, like) in enumerate(self.model.values.items())
        }

    def run(self, latents: Mapping[str, Tensor], at: Mapping[str, Tensor] | None) -> Run:
        """A run with discrete latents enumerated.

        Args:
            latents: Values of the conjugate ones.
            at: Parameters; the current ones where None.
        """
        model = self.model.at(latents)
        return run_enumerated(model, self.args, self.kwargs, self.structure, limit=None, values=at)
