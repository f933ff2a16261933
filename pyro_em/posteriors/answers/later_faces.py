"""Moments of Gaussian latents that no observation depends on: worked out when somebody asks.

Such a latent integrates to one, so that an E-step leaves it out. Its moments are those of its prior,
given what the observations say of the latents above it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from pyro_em.errors import PyroEMError, UsageError
from pyro_em.portable import Portable
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces

Ask = Callable[[Collection[str]], GaussianFaces]


class LaterFaces(Portable):
    """The faces of a posterior with latents that its E-step left out.

    Args:
        names: These latents.
        ask: Works out the faces with some of them, and of all that the posterior has. A pickled copy
            keeps what it answers of all, or its refusal.
    """

    def __init__(self, names: Collection[str], ask: Ask) -> None:
        self.names = tuple(names)
        self._ask: Ask | None = ask
        self._known: dict[frozenset[str], GaussianFaces] = {}
        self._refusal = ""

    def faces(self, sites: Collection[str]) -> GaussianFaces:
        """The faces with some of the latents.

        Args:
            sites: Which of them.

        Raises:
            UsageError: If they have no exact moments, or the model cannot be run any more.
        """
        wanted = frozenset(sites)
        for known, found in self._known.items():
            if wanted <= known:
                return found
        if self._ask is None:
            raise UsageError(self._refusal)
        found = self._known[wanted] = self._ask(wanted)
        return found

    def _travelling(self) -> dict[str, Any]:
        known, refusal = dict(self._known), self._refusal
        try:
            known[frozenset(self.names)] = self.faces(self.names)
        except PyroEMError as error:
            refusal = str(error)
        return {"names": self.names, "_ask": None, "_known": known, "_refusal": refusal}

    def _staying(self) -> dict[str, Any]:
        return dict(vars(self))
