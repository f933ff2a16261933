"""A model in which some latents have values, as a callable that runs like the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_em.tracing.handlers import GiveReferences, GiveValues
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

    def on_rows(self, plate_dim: int, size: int, batch_dims: Mapping[str, int]) -> Self:
        """The same with as many rows of its latents as data have that were cut; all rows are alike.

        Args:
            plate_dim: The dimension of the rows, from the right of the batch.
            size: How many rows the data have.
            batch_dims: How many batch dimensions the latents in the plate of the rows have.
        """
        values = dict(self.values)
        for name, dims in batch_dims.items():
            own = values.get(name)
            if own is not None and own.shape[dims + plate_dim] > size:
                values[name] = own.narrow(dims + plate_dim, 0, size).contiguous()
        model = self.model
        if isinstance(model, Given):
            model = model.on_rows(plate_dim, size, batch_dims)
        return replace(self, model=model, values=values)


class GivenGaussians(Given):
    """A model whose Gaussian latents are at given values."""

    role = Role.GAUSSIAN


class GivenConjugates(Given):
    """A model whose conjugate latents are at given values."""

    role = Role.CONJUGATE


@dataclass(frozen=True, eq=False)
class References:
    """Values at which a model is run whose continuous latents are integrated.

    Attributes:
        zeros: Of Gaussian latents. # (*batch, *event)
        units: Of conjugate ones. # (*batch, *event)
    """

    zeros: Mapping[str, Tensor]
    units: Mapping[str, Tensor] = field(default_factory=dict)

    def on(self, model: Model) -> Model:
        """A model with all its latents given."""
        return self.for_reads(model) if self.units else self.for_lines(model)

    def for_lines(self, model: Model) -> GivenGaussians:
        """The same, to give other values to Gaussian latents."""
        return GivenGaussians(
            GivenConjugates(model, self.units) if self.units else model, self.zeros
        )

    def for_reads(self, model: Model) -> GivenConjugates:
        """The same, to give other values to conjugate latents."""
        return GivenConjugates(
            GivenGaussians(model, self.zeros) if self.zeros else model, self.units
        )


def references_in(model: Model) -> References:
    """The values that a model's latents have, where it is one in which some have."""
    found: dict[Role, dict[str, Tensor]] = {Role.GAUSSIAN: {}, Role.CONJUGATE: {}}
    while isinstance(model, Given):
        found[model.role].update(model.values)
        model = model.model
    return References(found[Role.GAUSSIAN], found[Role.CONJUGATE])


@dataclass(frozen=True, eq=False)
class AtReferences:
    """A model whose continuous latents are at values of reference, in shapes that its first run shows.

    Attributes:
        model: The user's model.
        gaussian: Gaussian latents, which are at zero.
        units: Per conjugate latent what makes its unit of a tensor of its shape.
        found: Their values in the runs so far.
    """

    model: Model
    gaussian: frozenset[str]
    units: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    found: References = field(default_factory=lambda: References({}, {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        zeros, units = self.found.zeros, self.found.units
        assert isinstance(zeros, dict) and isinstance(units, dict)
        makers = dict.fromkeys(self.gaussian, torch.zeros_like)
        with (
            GiveReferences(makers, Role.GAUSSIAN, zeros),
            GiveReferences(self.units, Role.CONJUGATE, units),
        ):
            return self.model(*args, **kwargs)

    @property
    def references(self) -> References:
        """These values, from now on."""
        return References(dict(self.found.zeros), dict(self.found.units))
