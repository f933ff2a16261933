"""Amortised guides: one neural network gives every datum its own posterior approximation.

q(h | x) = ∏_n q(h_n | x_n), with q(h_n | x_n) = Normal(loc(x_n), scale(x_n)) for a continuous
latent, through the bijection onto its support, and Categorical(logits(x_n)) for a discrete one.

Source: Kingma and Welling (2014), Auto-encoding variational Bayes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_feasible
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.nn.functional import softplus

from pyro_em.distributions import has_finite_support, is_discrete, is_real, unwrap
from pyro_em.errors import ModelError, UsageError, message
from pyro_em.variational.amortized_base import AutoAmortized
from pyro_em.variational.encoder import Encoder, floats


class AutoAmortizedNormal(AutoAmortized):
    r"""Amortised guide for continuous latents: q(h_n | x_n) = Normal(loc(x_n), scale(x_n)).

    Per element n of the latent's plates an encoder reads x_n, all observed values inside those
    plates, and two linear heads give loc and scale. A latent with constrained support is the image
    of such a Normal under ``biject_to(support)``; one outside every plate has a loc and a scale of
    its own. Discrete latents are left to another guide or to enumeration.

    The number of data may change from call to call. The model is not run again where its arguments
    hold the observed values as they are, which the first call decides; it is where it subsamples,
    scales or masks latents, or changes the data on the way. NaN and masked values are features 0.

    Args:
        model: The model.
        encoder: Maps features to activations, # (*plates, F) -> (*plates, H). One module, shared
            by all latents, or a dict of them by site; where left out, a multilayer perceptron per
            latent.
        hidden: Widths of that perceptron's layers. Its inputs are standardised by mean and
            standard deviation of the first call's data, which are its buffers.
        init_scale: The initial scale, in unconstrained space; the initial loc there is 0.
        init_loc_fn: Gives latents outside every plate their initial value.
        create_plates: As for Pyro's autoguides.

    Raises:
        ModelError: On the first call, if a latent has no observation inside its plates.

    Source: Kingma and Welling (2014).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("n", len(x)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(h, 0.5), obs=x)
        >>> guide = AutoAmortizedNormal(model, hidden=(8,))
        >>> guide(torch.zeros(5))["h"].shape, guide.median(torch.zeros(3))
        (torch.Size([5]), {'h': tensor([0., 0., 0.])})
        >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | Mapping[str, Encoder] | None = None,
        hidden: Sequence[int] = (64,),
        *,
        init_scale: float = 0.1,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not init_scale > 0:
            raise UsageError(message("init_scale", f"it is {init_scale}.", "scales are positive"))
        self._start = (init_scale, init_loc_fn)
        super().__init__(model, encoder, hidden, create_plates=create_plates)

    def _prepared(self, model: Callable[..., Any]) -> Callable[..., Any]:
        init_loc_fn = self._start[1]
        return InitMessenger(lambda m: init_loc_fn(m) if self._covers(m["fn"]) else None)(model)

    def _covers(self, fn: Any) -> bool:
        if is_discrete(fn) or isinstance(unwrap(fn)[0], dist.Delta):
            return False
        try:
            biject_to(fn.support)
        except (NotImplementedError, AttributeError):
            return False
        return True

    def _outputs(self, node: dict[str, Any]) -> int:
        return 2 * math.prod(_free_shape(node["fn"]))

    def _local(self, prior: Any, outputs: Tensor) -> Any:
        loc, raw = (o.reshape(o.shape[:-1] + _free_shape(prior)) for o in outputs.chunk(2, -1))
        return self._image(prior, loc, softplus(raw + math.log(math.expm1(self._start[0]))))

    def _add_global(self, node: dict[str, Any]) -> None:
        loc = biject_to(node["fn"].support).inv(node["value"].detach())
        scale = torch.full_like(loc, self._start[0])
        deep_setattr(self, f"locs.{node['name']}", PyroParam(loc, constraints.real))
        deep_setattr(self, f"scales.{node['name']}", PyroParam(scale, constraints.positive))

    def _global(self, name: str, prior: Any) -> Any:
        return self._image(
            prior, attrgetter(f"locs.{name}")(self), attrgetter(f"scales.{name}")(self)
        )

    def _image(self, prior: Any, loc: Tensor, scale: Tensor) -> Any:
        fn = dist.Normal(loc, scale).to_event(len(_free_shape(prior)))
        if is_real(prior.support):
            return fn  # a plain Normal, so that its divergence from another is analytic
        # The cache spares inverting the bijection, which is inexact at the ends of an interval.
        return dist.TransformedDistribution(fn, [biject_to(prior.support).with_cache(1)])

    def _centre(self, fn: Any) -> Tensor:
        if not isinstance(fn, dist.TransformedDistribution):
            return fn.mean.clone()
        value = fn.base_dist.mean
        for transform in fn.transforms:
            value = transform(value)
        return value


class AutoAmortizedCategorical(AutoAmortized):
    r"""Amortised guide for discrete latents: q(z_n | x_n) = Categorical(logits(x_n)).

    The same as `AutoAmortizedNormal` for Categorical, OneHotCategorical and Bernoulli latents, each
    by a distribution of its own kind; continuous latents are left to another guide. Sites are
    sampled as they are: ``config_enumerate(guide)`` has ``TraceEnum_ELBO`` sum them out.

    Args:
        model: The model.
        encoder: As in `AutoAmortizedNormal`.
        hidden: As in `AutoAmortizedNormal`.
        create_plates: As for Pyro's autoguides.

    Raises:
        ModelError: On the first call, if a latent has no observation inside its plates or is of
            another kind with finite support.

    Source: Kingma and Welling (2014).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("n", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        ...         pyro.sample("x", dist.Normal(z.float(), 1.0), obs=x)
        >>> guide = AutoAmortizedCategorical(model, hidden=(8,))
        >>> guide.posterior(torch.randn(4))["z"].probs.shape
        torch.Size([4, 3])
        >>> pyro.clear_param_store()
    """

    def _covers(self, fn: Any) -> bool:
        return has_finite_support(unwrap(fn)[0])

    def _outputs(self, node: dict[str, Any]) -> int:
        if _kind(node["fn"]) is None:
            what = f"{type(unwrap(node['fn'])[0]).__name__} latents have no amortised guide."
            why = "it would have to be a distribution of the same kind"
            fixes = ["write it as a Categorical", "write the guide by hand"]
            raise ModelError(message(f"site '{node['name']}'", what, why, fixes))
        return math.prod(_logits_shape(node["fn"]))

    def _local(self, prior: Any, outputs: Tensor) -> Any:
        logits = outputs.reshape(outputs.shape[:-1] + _logits_shape(prior))
        return _kind(prior)(logits=logits).to_event(unwrap(prior)[1])

    def _add_global(self, node: dict[str, Any]) -> None:
        fn = node["fn"]
        logits = floats(node).new_zeros(*fn.batch_shape, math.prod(_logits_shape(fn)))
        deep_setattr(self, f"logits.{node['name']}", PyroParam(logits))

    def _global(self, name: str, prior: Any) -> Any:
        return self._local(prior, attrgetter(f"logits.{name}")(self))

    def _centre(self, fn: Any) -> Tensor:
        base = unwrap(fn)[0]
        # Bernoulli.mode is NaN at one half.
        return (base.logits > 0).to(base.logits) if isinstance(base, dist.Bernoulli) else fn.mode


def _free_shape(fn: Any) -> torch.Size:
    """Shape of one element in unconstrained space."""
    return biject_to(fn.support).inverse_shape(fn.shape())[len(fn.batch_shape) :]


def _kind(fn: Any) -> Any:
    """The class of a discrete distribution that a guide can be, or None."""
    base = unwrap(fn)[0]
    kinds = (
        dist.Bernoulli,
        dist.Categorical,
        dist.OneHotCategoricalStraightThrough,
        dist.OneHotCategorical,
    )
    return next((kind for kind in kinds if isinstance(base, kind)), None)


def _logits_shape(fn: Any) -> torch.Size:
    """Shape of one element's logits."""
    states = unwrap(fn)[0].param_shape[-1:] if _kind(fn) is dist.Categorical else ()
    return fn.event_shape + torch.Size(states)
