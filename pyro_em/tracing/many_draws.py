"""Predictions of many draws by one run: the draws are a plate to the left of all others.

A model whose latents are enumerated broadcasts from the left. So it runs once with as many values of
each latent as there are draws, and its other sites are drawn for each. A run with one draw first shows
that nothing takes all of a value together (`if y.any():`, `y.mean()`): this would mix draws, and may
agree by chance where single ones are looked at. What a run of many says is then held against runs
with one draw: distributions at what was drawn, and what follows from it. A model that takes tensors
of several draws for something else answers draw by draw.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.tracing.draws import predicted_run
from pyro_em.tracing.handlers import MISSING, SampleMessenger
from pyro_em.tracing.lean import nothing
from pyro_em.tracing.mixing import Mixing
from pyro_em.tracing.provenance import Tagged, looking_at
from pyro_em.tracing.randomness import same_random_state
from pyro_em.tracing.runs import Model
from pyro_em.tracing.whole import LeftWhole

logger = logging.getLogger(__name__)

_PLATE = "_pyro_em_draws"

_LARGEST = 2**22  # numbers of a site that one run draws

_FEWEST = 8  # draws that one run takes at least: four more of one draw go with it

Sites = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class ManyDraws:
    """A model that draws what its latents do not say, for many draws of these.

    Attributes:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keep_observed: Whether observed sites keep their values.
        nesting: How many batch dimensions are those of plates.
    """

    model: Model
    args: tuple
    kwargs: dict[str, Any]
    keep_observed: bool
    nesting: int

    def one(self, values: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """The sites of a run at one draw of the latents."""
        return predicted_run(self.model, self.args, self.kwargs, values, self.keep_observed)

    def of(self, values: Mapping[str, Tensor], n: int) -> dict[str, Tensor] | None:
        """The values of all sites at many draws of the latents. # (n, *value) each

        Args:
            values: Of each latent. # (n, *value)
            n: How many draws.

        Returns:
            None where the model does not say the same of them together as one by one.
        """
        if n < _FEWEST:
            return None
        with same_random_state():
            like = self.one({k: v[0] for k, v in values.items()})
        if any(len(s["fn"].batch_shape) > self.nesting for s in like.values()):
            return None
        if not self._keeps_draws_apart(like):
            return None
        size = max((s["value"].numel() for s in like.values() if _has_value(s)), default=1)
        at_once = min(n, _LARGEST // max(size, 1))
        if at_once < _FEWEST:
            return None
        parts: list[dict[str, Tensor]] = []
        for begin in range(0, n, at_once):
            own = {k: v[begin : begin + at_once] for k, v in values.items()}
            found = self._together(own, min(at_once, n - begin), like)
            if found is None:
                return None
            parts.append(found)
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def _keeps_draws_apart(self, like: Sites) -> bool:
        """Whether no number of a draw is read, and no operation takes all of a value together."""
        tagged = {k: Tagged(s["value"], frozenset({k})) for k, s in like.items() if _has_value(s)}
        watch = Mixing({})
        try:
            with (
                LeftWhole(random_state=True),
                torch.no_grad(),
                pyro.validation_enabled(False),
                looking_at(watch),
                _Given(tagged),
            ):
                self.model(*self.args, **self.kwargs)
        except Exception as error:  # some operations take no tagged tensor
            logger.debug("draws are made one by one: %s", error)
            return False
        return not watch.read and not watch.joined

    def _together(
        self, values: Mapping[str, Tensor], n: int, like: Sites
    ) -> dict[str, Tensor] | None:
        wide = {}
        for name, value in values.items():
            if name not in like:
                continue
            batch, ones = len(like[name]["fn"].batch_shape), [1] * self.nesting
            wide[name] = value.reshape(n, *ones[batch:], *value.shape[1:])
        try:
            sites = predicted_run(self._of_all(n), self.args, self.kwargs, wide, self.keep_observed)
            found = {k: _laid_out(sites[k]["value"], like[k]["value"], n) for k in like}
            if sites.keys() == like.keys() and all(
                self._agrees(sites, found, i) for i in dict.fromkeys((0, n - 1))
            ):
                return found
        except Exception as error:  # the user's own code, at tensors that it was not written for
            logger.debug("draws are made one by one: %s", error)
        return None

    def _of_all(self, n: int) -> Model:
        def model(*args: Any, **kwargs: Any) -> Any:
            with _WideMissing(), pyro.plate(_PLATE, n, dim=-1 - self.nesting):
                return self.model(*args, **kwargs)

        return model

    def _agrees(self, sites: Sites, values: Mapping[str, Tensor], i: int) -> bool:
        """Whether a run at one draw has the same distributions there, and the same follows from it."""
        own = {k: v[i] for k, v in values.items()}
        with same_random_state(), _Given(own):
            alone = self.one({})
        if alone.keys() != sites.keys():
            return False
        for name, site in alone.items():
            if not _is_close(site["value"], own[name]):
                return False
            if _follows(site):
                continue
            here = site["fn"].log_prob(own[name])
            there = sites[name]["fn"].log_prob(sites[name]["value"])
            if not _is_close(here, there[i].reshape(here.shape)):
                return False
        return True


class _WideMissing(SampleMessenger):
    """What is observed in part has a value of its own in each draw."""

    _postprocess_message = nothing

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if MISSING in msg["infer"] and isinstance(msg["value"], Tensor):
            fn = msg["fn"]
            msg["value"] = msg["value"].expand(fn.batch_shape + fn.event_shape)


class _Given(SampleMessenger):
    """All that is drawn or observed has a given value; what follows from it does not."""

    _postprocess_message = nothing

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not _follows(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _follows(site: Mapping[str, Any]) -> bool:
    return bool(site["infer"].get("_deterministic", False))


def _has_value(site: Mapping[str, Any]) -> bool:
    return isinstance(site["value"], Tensor)


def _laid_out(value: Tensor, like: Tensor, n: int) -> Tensor:
    """A value of many draws without the dimensions of plates that the site is not in. # (n, *value)"""
    if value.shape == like.shape:
        return value.expand(n, *like.shape)
    return value.expand(n, *value.shape[1:]).reshape(n, *like.shape)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    rtol = 1e-9 if a.dtype == torch.float64 else 1e-4
    return torch.allclose(a, b.to(a.dtype), rtol=rtol, atol=rtol, equal_nan=True)
