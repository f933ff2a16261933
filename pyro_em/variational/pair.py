"""A model and a guide run as one: who decides which latent, and at which values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pyro_em.errors import Finding
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import References
from pyro_em.tracing.handlers import (
    GiveValues,
    GuideSites,
    OfBatch,
    OnlySites,
    PairTrace,
    ScalePlates,
)
from pyro_em.tracing.randomness import random_state
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role
from pyro_em.tracing.whole import LeftWhole, Unvalidated
from pyro_em.variational.guide import GuideLook


@dataclass(frozen=True, eq=False)
class Pair:
    """The guide, then the model at the values that the guide gave, as one callable.

    Attributes:
        model: The user's model.
        guide: The guide.
        roles: Per latent of the model that takes its value from the guide, what that value is.
        shown: Guide sites whose log density counts.
        record: Where each run notes the guide's handler with its values, or None.
        chosen: Guide sites that are held at one value of their support, by its place there.
    """

    model: Model
    guide: Model
    roles: Mapping[str, Role]
    shown: frozenset[str] = frozenset()
    record: list[GuideSites] | None = None
    chosen: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run guide and model on the model's arguments."""
        with GuideSites(self.shown, self.chosen) as sites:
            self.guide(*args, **kwargs)
        if self.record is not None:
            sites.state = random_state()
            self.record.append(sites)
        with GiveValues(sites.values, self.roles, sites.subsamples):
            return self.model(*args, **kwargs)

    def drawn(
        self, args: tuple, kwargs: dict[str, Any], factors: Mapping[str, float]
    ) -> dict[str, dict[str, Any]]:
        """Run guide and model once, drawing on; parameters stay attached.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            factors: Per plate what multiplies its sites.

        Returns:
            The sites of both, by name, those of the guide as ``guide:name``.
        """
        tracer = PairTrace(self.shown, self.chosen, self.roles, factors)
        with LeftWhole(), Unvalidated():
            return tracer.run(self.guide, self.model, args, kwargs)


@dataclass(frozen=True, eq=False)
class Laid:
    """Guide and model for arguments of one form, some latents of the model solved exactly.

    Attributes:
        structure: The skeleton.
        pair: Guide and model.
        references: Values of the latents that are integrated; None without such.
        kernels: The kernel of the prior of each that is conjugate.
    """

    structure: Structure
    pair: Pair
    references: References | None = None
    kernels: Mapping[str, PriorKernel] = field(default_factory=dict)

    def on(self, model: Model) -> Model:
        """A model with values of the latents that are integrated."""
        return model if self.references is None else self.references.on(model)


@dataclass(frozen=True, eq=False)
class AtDraw:
    """A model at one draw of its guide.

    Attributes:
        model: The user's model.
        roles: Per latent that takes its value from the guide, what that value is.
        drawn: The guide's handler with its values.
    """

    model: Model
    roles: Mapping[str, Role]
    drawn: GuideSites

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with GiveValues(self.drawn.values, self.roles, self.drawn.subsamples):
            return self.model(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Routing:
    """Where each latent of the model goes.

    Attributes:
        exact: Discrete latents that are summed.
        points: Latents at a point estimate.
        drawn: Latents that the guide draws.
        enumerated: Those of ``drawn`` that are summed under the guide.
        reasons: Per latent, why, in words.
        guide: What runs of the guide showed, or None.
        unused: Guide sites that are left unused.
        gaussian: Gaussian and conjugate latents that are integrated.
        kernels: The kernel of the prior of each of these that is conjugate.
        kept: Per Gaussian latent that stays with the guide, why it is not integrated.
        not_linear: Those of them that runs of the model show not to have an exact posterior.
        bent: Those of them in which the model is not linear, whatever its data and other latents are.
        wished: Those of them whose exact route a strategy asked for.
    """

    exact: tuple[str, ...]
    points: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    enumerated: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    guide: GuideLook | None = None
    unused: tuple[str, ...] = ()
    gaussian: tuple[str, ...] = ()
    kept: Mapping[str, Finding] = field(default_factory=dict)
    not_linear: frozenset[str] = frozenset()
    bent: Mapping[str, Finding] = field(default_factory=dict)
    wished: tuple[str, ...] = ()
    kernels: Mapping[str, PriorKernel] = field(default_factory=dict)

    @property
    def solved(self) -> tuple[str, ...]:
        """Latents that have an exact posterior given what is drawn: summed or integrated ones."""
        return (*self.exact, *self.gaussian)

    @property
    def is_stochastic(self) -> bool:
        """Whether anything has to be drawn from the guide."""
        return bool(self.drawn)

    @property
    def shown(self) -> frozenset[str]:
        """Guide sites whose log density counts: the drawn ones and all they depend on."""
        if self.guide is None or not self.drawn:
            return frozenset()
        needed = self.guide.upstream({n for n in self.drawn if n in self.guide.sites})
        return frozenset(n for n in needed if n not in self.guide.points)

    def pair(self, model: Model, guide: Model | None) -> Model:
        """The model with its guide's values, or the model alone where none is used."""
        roles = {
            **dict.fromkeys(self.points, Role.POINT),
            **dict.fromkeys(self.drawn, Role.SAMPLED),
        }
        if guide is None or not roles:
            return model
        return Pair(model, guide, roles, self.shown)


def support_size(guide: GuideLook, name: str) -> int:
    """Number of values of a guide site of finite support."""
    return len(guide.sites[name]["fn"].enumerate_support(expand=False))


@dataclass(frozen=True, eq=False)
class WithSubsamples:
    """A model whose plates take the indices that a guide's plates of the same name drew.

    Attributes:
        model: The user's model.
        subsamples: Indices by the name of their plate.
    """

    model: Model
    subsamples: Mapping[str, torch.Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with GiveValues({}, {}, self.subsamples):
            return self.model(*args, **kwargs)


def pyros_pair(
    model: Model,
    guide: Model,
    routing: Routing,
    barren: Iterable[str],
    factors: Mapping[str, float],
) -> tuple[Model, Model]:
    """A model and its guide as Pyro's `TraceEnum_ELBO` takes them.

    Args:
        model: The user's model.
        guide: Its guide.
        routing: The routes.
        barren: Sites of the model that integrate to one, and that the guide does not draw.
        factors: Per plate what multiplies its sites.
    """
    hidden, unused = frozenset(barren), frozenset(routing.unused)
    enumerated = frozenset(routing.enumerated)

    def seen_model(*args: Any, **kwargs: Any) -> Any:
        with OfBatch(factors), OnlySites(hidden):
            return model(*args, **kwargs)

    def seen_guide(*args: Any, **kwargs: Any) -> Any:
        with ScalePlates(factors), OnlySites(unused, enumerated):
            return guide(*args, **kwargs)

    return seen_model, seen_guide
