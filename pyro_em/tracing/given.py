"""A model in which some latents have values, as a callable that runs like the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from pyro_em.tracing.handlers import GiveValues, GiveZeros
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role


def without_values(model: Model) -> Model:
    """The model that draws its latents, where it is one in which some have values."""
    while isinstance(model, Given):
        model = model.model
    return model


@dataclass(frozen=True, eq=False)
class Given:
    """A model some of whose latents are at given values, wherever it is run.

    Attributes:
        model: The user's model.
        values: Per latent its value. # (*batch, *event)
        role: What these latents are.
    """

    model: Model
    values: Mapping[str, Tensor]
    role: ClassVar[Role]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with GiveValues(self.values, dict.fromkeys(self.values, self.role), {}):
            return self.model(*args, **kwargs)

    def at(self, values: Mapping[str, Tensor]) -> Self:
        """The same model with other values of its latents."""
        return replace(self, values=values)


class GivenGaussians(Given):
    """A model whose Gaussian latents are at given values."""

    role = Role.GAUSSIAN


class GivenConjugates(Given):
    """A model whose conjugate latents are at given values."""

    role = Role.CONJUGATE


@dataclass(frozen=True, eq=False)
class GaussiansAtZero:
    """A model whose Gaussian latents are at zero in their own shapes, which its first run shows.

    Attributes:
        model: The user's model.
        names: The latents.
        zeros: Their values in the runs so far. # (*batch, *event)
    """

    model: Model
    names: frozenset[str]
    zeros: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with GiveZeros(self.names, Role.GAUSSIAN, self.zeros):
            return self.model(*args, **kwargs)

    @property
    def given(self) -> GivenGaussians:
        """The same model at these values from now on."""
        return GivenGaussians(self.model, dict(self.zeros))
