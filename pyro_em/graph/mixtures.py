"""Mixtures inside distributions, read as latents: which component a datum is of is one more latent.

    x ~ Σ_m p_m f(x; θ_m)        is        c ~ Categorical(p),   x ~ f(x; θ_c)

An observed ``MixtureSameFamily`` has parameters of every component in one density, which no closed form
reaches. With its component as a latent of its own, summed as any other, each has the update of its
family. The evidence is the same number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_em.distributions import broadcast_shape, element_mask, unwrap
from pyro_em.expanded import before_expansion
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.structure import Structure
from pyro_em.tracing.handlers import SampleMessenger
from pyro_em.tracing.lean import in_front_of
from pyro_em.tracing.missing import WithMissing
from pyro_em.tracing.provenance import looking_away
from pyro_em.tracing.sites import Role, is_factor

Model = Callable[..., Any]

_MIXTURE = "MixtureSameFamily"

_STEP = r"_?(?:\d+|<[^>]*>)"  # at a name's end; of an index tensor in brackets


@dataclass(frozen=True)
class WithComponents:
    """A model whose observed mixtures have their components as latents of their own.

    Attributes:
        users_model: The user's model.
    """

    users_model: Model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with NamedComponents():
            return self.users_model(*args, **kwargs)


def with_components(model: Model) -> Model:
    """A model with its components as latents; what is missing is integrated out of each of them."""
    if isinstance(model, WithMissing):
        return WithMissing(WithComponents(model.users_model))
    return WithComponents(model)


def mixtures_in(structure: Structure) -> tuple[str, ...]:
    """Observed sites that are mixtures by their distribution."""
    sites = structure.as_run.sites.values()
    return tuple(s.name for s in sites if s.role is Role.DATA and s.distribution == _MIXTURE)


def component_name(site: str) -> str:
    """The name of the latent that is the component of an observed mixture; steps stay numbered.

    Example:
        >>> component_name("x"), component_name("x_12")
        ('x_component', 'x_component_12')
    """
    stem = re.fullmatch(rf"(.*?)({_STEP})", site)
    return f"{site}_component" if stem is None else f"{stem[1]}_component{stem[2]}"


def is_component(name: str) -> bool:
    """Whether a latent of a model with components is one of them, by its name."""
    return re.fullmatch(rf".+_component({_STEP})?", name) is not None


def has_components(model: Any) -> bool:
    """Whether a model's observed mixtures have their components as latents."""
    while not isinstance(model, WithComponents):
        if not hasattr(model, "users_model"):
            return False
        model = model.users_model
    return True


class NamedComponents(SampleMessenger):
    """Give each observed mixture a latent for its component, in front of it."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] or not is_factor(msg):
            return
        fn = msg["fn"]
        base, reinterpreted, _ = unwrap(fn)
        parts = None if reinterpreted else components_of_mixture(base)
        if parts is None:
            return
        name = component_name(msg["name"])
        with in_front_of(msg, name):
            component = pyro.sample(name, parts.weights)
        chosen = parts.chosen(component)
        chosen = chosen.expand(broadcast_shape(chosen.batch_shape, fn.batch_shape))
        mask = element_mask(fn)
        msg["fn"] = chosen if mask is None else chosen.mask(mask)


@dataclass(frozen=True, eq=False)
class Components:
    """The components of a mixture.

    Attributes:
        weights: The distribution of which component it is.
        kind: The class of the components.
        arguments: Their arguments, with how many dimensions of an event each has on its right.
            # (*batch or 1s, components or 1, *event)
        constants: Arguments that are no tensors.
        reinterpreted: Batch dimensions of a component that are event dimensions of the mixture.
    """

    weights: Any
    kind: type
    arguments: Mapping[str, tuple[Tensor, int]]
    constants: Mapping[str, Any]
    reinterpreted: int

    def chosen(self, component: Tensor) -> Any:
        """The distribution of data, given which component they are of."""
        own = {name: _at(a, event, component) for name, (a, event) in self.arguments.items()}
        fn = self.kind(**own, **self.constants)
        return fn.to_event(self.reinterpreted) if self.reinterpreted else fn


def components_of_mixture(base: Any) -> Components | None:
    """The components of a distribution; None where it is no mixture, or of a family without record."""
    if type(base).__name__ != _MIXTURE:
        return None
    inner, reinterpreted, masks = unwrap(base.component_distribution)
    family, mixing = family_of(inner), base.mixture_distribution
    if family is None or masks or not isinstance(mixing, torch.distributions.Categorical):
        return None
    if not isinstance(inner, dist.Distribution):  # of torch alone: Pyro cannot sample it at a site
        return None
    given: dict[str, tuple[Tensor, int]] = {}
    constants: dict[str, Any] = {}
    for name, argument in given_arguments(inner, family).items():
        raw = getattr(inner, name, argument)
        if name in family.constants and not isinstance(raw, Tensor):
            constants[name] = raw
            continue
        event = reinterpreted + family.argument_dims.get(name, 0)
        if argument.dim() > event:
            given[name] = before_expansion(argument), event
        elif argument.dim() == 0:
            constants[name] = argument
        else:
            return None
    # A mixture computes logits at once, and an expansion takes them for what was given.
    probs = "probs" in vars(mixing)
    weights = before_expansion(mixing.probs if probs else mixing.logits)
    if weights.shape[-1] != base._num_component:  # equal weights, which were expanded
        weights = weights.expand(*weights.shape[:-1], base._num_component)
    which = {"probs" if probs else "logits": weights}
    return Components(dist.Categorical(**which), type(inner), given, constants, reinterpreted)


def _at(argument: Tensor, event: int, component: Tensor) -> Tensor:
    """An argument of all components at one of them. # (*batch, *event)"""
    axis = argument.dim() - 1 - event
    if argument.shape[axis] == 1:
        return argument.squeeze(axis)
    rest = (slice(None),) * event
    with looking_away():  # rows stay where they are, though `Vindex` writes them as numbers
        return Vindex(argument)[(Ellipsis, component, *rest)]  # type: ignore[no-any-return]
