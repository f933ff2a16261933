"""``missing="nan"``: NaN in observed values means missing at random, and is integrated out.

Where a model observes NaN, its distribution is replaced by the marginal one of what is seen:

* elements of their own (everything but event dimensions of the distribution itself) are masked, as by
  ``.mask(seen).to_event(1)``;
* a MultivariateNormal keeps NaN in its value and integrates such coordinates out
  (`pyro_em.incomplete.IncompleteMultivariateNormal`); so do the components of a MixtureSameFamily;
* of any other vector (Multinomial, Dirichlet) the whole event is masked.

The model itself gets its own value back from ``pyro.sample``, NaN included: what it computes from it is
input of other densities, and is never filled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from pyro_em.distributions import Mask, element_mask, unwrap
from pyro_em.incomplete import IncompleteMultivariateNormal, may_hold_nan
from pyro_em.tracing.feasible import from_data, without_masked_nonsense
from pyro_em.tracing.handlers import MISSING, SampleMessenger
from pyro_em.tracing.names import names_of, tensors_in
from pyro_em.tracing.provenance import Tagged, tags_of
from pyro_em.tracing.sites import is_factor
from pyro_em.tracing.whole import LeftWhole

Model = Callable[..., Any]

_FOUND = "_pyro_em_found"  # in ``infer``: a `Missing`

_NORMAL = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)


@dataclass(frozen=True)
class WithMissing:
    """A model in whose observed values NaN means missing.

    Attributes:
        users_model: The user's model.
    """

    users_model: Model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with MissingEntries(*_holds_nan(self.users_model, args, kwargs)):
            return self.users_model(*args, **kwargs)


@dataclass(frozen=True)
class Missing:
    """How many entries of an observed site are missing.

    Attributes:
        site: The site's name as the user knows it; a glob for the steps of a vectorised loop.
        entries: Missing entries.
        of: All entries of the site that count.
        whole: Whether one missing entry loses its whole event.
    """

    site: str
    entries: int
    of: int
    whole: bool = False


def has_missing(model: Any) -> bool:
    """Whether NaN in the observed values of a model, or of its pair with a guide, means missing."""
    return isinstance(model, WithMissing) or isinstance(getattr(model, "model", None), WithMissing)


# What to write where values of earlier steps are missing and later steps read them.
LAGGED = (
    "an autoregression whose values may be missing: let them be latents that are seen as they are, "
    "h = pyro.sample(f'h_{t}', Normal(c + phi * h, s)); pyro.sample(f'y_{t}', Normal(h, 1e-6), "
    "obs=y[t]), with missing='nan'; a Kalman filter integrates over the gaps"
)


class MissingEntries(SampleMessenger):
    """Integrate NaN in observed values out; see the module's text.

    Args:
        alike: Whether sites with numbers in their names are treated as if something of them were
            missing: the steps of a loop are of one form, whatever is missing of each.
        in_part: Whether vectors of such sites are treated as if some of their coordinates were.
    """

    def __init__(self, alike: bool = False, in_part: bool = False) -> None:
        super().__init__()
        self.alike, self.in_part = alike, in_part
        self._given: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        value, fn = msg["value"], msg["fn"]
        if not msg["is_observed"] or not is_factor(msg) or not isinstance(value, Tensor):
            return
        if not value.is_floating_point() or value.is_meta or type(unwrap(fn)[0]).__name__ == "Unit":
            return
        name = msg["name"]
        missing = torch.isnan(getattr(value, "_t", value).detach())
        some = bool(missing.any())
        is_step = self.alike and any(c.isdigit() for c in name)
        if not some and not is_step:
            return
        of, missing = _counted(fn, missing, element_mask(fn, msg["mask"]))
        some = some and bool(missing.any())  # not where all of it lies under a mask
        if not some and not is_step:
            return
        msg["fn"], msg["value"], lost = integrated(
            fn, value, missing, is_step, is_step and self.in_part
        )
        if not some:
            return
        entries = int(torch.count_nonzero(missing))  # a sum would hold each as an integer
        self._given[name] = value
        shown = re.sub("<[^>]*>", "*", name.removesuffix("_observed"))
        is_more = lost is not missing and bool((lost & ~missing).any())
        found = Missing(shown, entries, of, is_more)
        msg["infer"] = {**msg["infer"], MISSING: lost, _FOUND: found}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        given = self._given.pop(msg["name"], None)
        if given is None or not msg["is_observed"] or MISSING not in msg["infer"]:
            return
        tags = tags_of(msg["value"])
        plain = getattr(given, "_t", given)
        msg["value"] = Tagged(plain, tags | tags_of(given)) if tags else given


def _counted(fn: Any, missing: Tensor, counted: Mask) -> tuple[int, Tensor]:
    """How many entries count, and where one that counts is missing. # (value's shape)"""
    base = unwrap(fn)[0]
    if counted is None or counted is True:
        return missing.numel(), missing
    if counted is False:
        return 0, torch.zeros_like(missing)
    own = counted.reshape(counted.shape + (1,) * len(base.event_shape))
    try:
        own = own.expand(missing.shape)
    except RuntimeError:  # a mask of more dimensions than the value, as of a latent
        return missing.numel(), missing
    return int(own.sum()), missing & own


def _holds_nan(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a tensor that a model can read by a name holds NaN, and whether in part of a vector."""
    tensors = (t for _, t in tensors_in(names_of(model, args, kwargs)))
    found = [t for t in tensors if _may_hold_nan(t)]
    return bool(found), any(_in_part(t) for t in found if t.dim() > 1)


def _in_part(t: Tensor) -> bool:
    return _some_in_part(torch.isnan(t.detach()))


def _some_in_part(missing: Tensor) -> bool:
    """Whether some vector is missing in part. # (*batch, D)"""
    return bool((missing.any(-1) & ~missing.all(-1)).any())


def _may_hold_nan(t: Tensor) -> bool:
    """Whether a tensor holds NaN, or infinite numbers of both signs: without a tensor of its size."""
    plain = t.is_floating_point() and t.layout is torch.strided and not t.is_meta
    return plain and bool(torch.isnan(t.detach().sum()))


def integrated(
    fn: Any, value: Tensor, missing: Tensor, by_itself: bool = False, in_part: bool = False
) -> tuple[Any, Tensor, Tensor]:
    """The distribution of what is seen, with a value that it can have.

    Args:
        fn: A site's distribution.
        value: Its observed value, NaN where missing. # (*batch or 1s, *event)
        missing: Where it is. # like the value
        by_itself: Whether what takes the place of an event is the same whatever the others are.
        in_part: Whether a vector is taken as one of which any coordinate may be missing.

    Returns:
        The distribution, the value, and which entries count no more. # like the value
    """
    base, reinterpreted, _ = unwrap(fn)
    event = len(base.event_shape)
    if event == 0:
        marginal, seen = base, ~missing
    elif isinstance(base, _NORMAL) and (in_part or _some_in_part(missing)):
        marginal, seen = IncompleteMultivariateNormal.of(base), ~missing.all(-1)
    elif (mixture := _mixture_of_seen(base, missing)) is not None:
        marginal, seen = mixture, ~missing.flatten(-event).all(-1)
        if not may_hold_nan(mixture):
            value = _filled(value, missing, event)
    else:
        marginal, seen = base, ~missing.flatten(-event).any(-1)
        missing = (~seen).reshape(seen.shape + (1,) * event).expand(missing.shape)
    batch = fn.batch_shape + fn.event_shape[:reinterpreted]
    own = element_mask(fn)
    if own is False or isinstance(own, Tensor):
        seen = seen & own
    if marginal.batch_shape != batch:
        marginal = ExpandedDistribution(marginal, batch)
    out = marginal.mask(seen)
    out = out.to_event(reinterpreted) if reinterpreted else out
    if may_hold_nan(unwrap(out)[0]):
        # Elsewhere NaN under a mask of the user's own would count as missing: it is harmless there.
        return out, value, missing
    filled = without_masked_nonsense(out, value, seen, by_itself=by_itself)
    if type(base).__name__ == "Categorical":  # codes that are stored as floats
        filled = filled.long()
    return out, filled, missing


def _mixture_of_seen(base: Any, missing: Tensor) -> Any:
    """A MixtureSameFamily over vectors with each component's marginal; None for anything else."""
    if not isinstance(base, torch.distributions.MixtureSameFamily):
        return None
    inner, reinterpreted, masks = unwrap(base.component_distribution)
    event = len(base.event_shape)
    if masks or event != reinterpreted + len(inner.event_shape):
        return None
    if reinterpreted and not inner.event_shape:
        seen = (~missing).unsqueeze(-1 - event)
        parts = inner.mask(seen).to_event(reinterpreted)
    elif isinstance(inner, _NORMAL) and not reinterpreted:
        parts = IncompleteMultivariateNormal.of(inner)
    else:
        return None
    return dist.MixtureSameFamily(base.mixture_distribution, parts, validate_args=False)


def _filled(value: Tensor, missing: Tensor, event: int) -> Tensor:
    """Another observed number of the same feature, or of any, where an entry is missing."""
    out, there = from_data(value, ~missing, event)
    if bool((there | ~missing).all()):
        return out
    return torch.where(there | ~missing, out, value[~missing][0])


def missing_of(sites: Mapping[str, Mapping[str, Any]]) -> tuple[Missing, ...]:
    """What is missing per site of a trace."""
    found = (site["infer"].get(_FOUND) for site in sites.values() if site["type"] == "sample")
    return tuple(one for one in found if one is not None)


def missing_in(model: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[Missing, ...]:
    """What is missing per site of a model, from one run of it.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    with LeftWhole(random_state=True), torch.no_grad(), poutine.trace() as tracer:
        model(*args, **kwargs)
    return missing_of(tracer.trace.nodes)
