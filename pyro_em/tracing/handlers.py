"""Pyro handlers that change what one run of a model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample

from pyro_em.distributions import element_mask, unwrap
from pyro_em.incomplete import drawn_given_seen
from pyro_em.tracing.feasible import without_masked_nonsense
from pyro_em.tracing.lean import nothing
from pyro_em.tracing.sites import ROLE, Role, is_factor, is_latent, role_of

MISSING = "_pyro_em_missing"  # in ``infer``: which entries of an observed value do not count


class SampleMessenger(Messenger):
    """A handler of sample sites alone: the many parameters of a network pass it quickly."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            self._pyro_sample(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            self._pyro_post_sample(msg)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        pass

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        pass


class KeepValues(SampleMessenger):
    """Give unobserved sites the values that they had in a plain run: nothing is drawn again.

    Some distributions cannot be sampled with tagged arguments, none at a trial point of a line
    search that is far off.
    """

    _postprocess_message = nothing

    def __init__(self, values: Mapping[str, torch.Tensor], of_guide: bool = False) -> None:
        super().__init__()
        self.values, self.of_guide = values, of_guide

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.values or msg["done"]:
            return
        if is_latent(msg) or (self.of_guide and role_of(msg) is Role.GUIDE):
            msg["value"] = self.values[msg["name"]]


class ScalePlates(SampleMessenger):
    """Multiply the scale of every site inside some plates: a batch stands for all data.

    Args:
        factors: Per plate its factor.
    """

    _postprocess_message = nothing

    _postprocess_message = nothing

    def __init__(self, factors: Mapping[str, float]) -> None:
        super().__init__()
        self.factors = factors

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.factors:
                msg["scale"] = msg["scale"] * self.factors[frame.name]


class OfBatch(ScalePlates):
    """The same for sites of which gradients are taken.

    A feasible value stands where an observation is masked: 0 · NaN is NaN in a gradient.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_sample(msg)
        fn, value = msg["fn"], msg["value"]
        if not isinstance(value, torch.Tensor) or role_of(msg) is not Role.DATA:
            return
        mask = element_mask(fn, msg["mask"])
        if mask is not None and type(unwrap(fn)[0]).__name__ != "Unit":
            msg["value"] = without_masked_nonsense(fn, value, mask, sparing=True)


class OnlySites(SampleMessenger):
    """Hide sites that do not count, and enumerate some in parallel.

    Args:
        hidden: Sites that outer handlers must not see.
        enumerated: Sites to enumerate; no other one is.
    """

    _postprocess_message = nothing

    def __init__(self, hidden: frozenset[str], enumerated: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.hidden, self.enumerated = hidden, enumerated

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.hidden:
            msg["stop"] = True
            return
        if msg["is_observed"] or site_is_subsample(msg):
            return
        infer = {k: v for k, v in msg["infer"].items() if k != "enumerate"}
        if msg["name"] in self.enumerated:
            infer["enumerate"] = "parallel"
        msg["infer"] = infer


class MaskSites(SampleMessenger):
    """Leave sites out of the density: observed ones, or all.

    Args:
        observed_only: Whether only sites with an observed value are masked.
    """

    _postprocess_message = nothing

    def __init__(self, observed_only: bool) -> None:
        super().__init__()
        self.observed_only = observed_only

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg) or (self.observed_only and not msg["is_observed"]):
            return
        msg["mask"] = False


class GiveValues(SampleMessenger):
    """Run a model with some latents at values from elsewhere, marked by their role.

    Args:
        values: The values.
        roles: What each of them is.
        subsamples: Indices that the guide's plates drew, to be used again.
    """

    _postprocess_message = nothing

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        roles: Mapping[str, Role],
        subsamples: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.values, self.roles, self.subsamples = values, roles, subsamples

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.subsamples:
                msg["value"], msg["done"] = self.subsamples[name], True
            return
        if name in self.roles and name in self.values and not msg["is_observed"]:
            msg["value"], msg["is_observed"] = self.values[name], True
            msg["infer"] = {**msg["infer"], ROLE: self.roles[name].value}


class GiveReferences(SampleMessenger):
    """Run a model with some latents at values of reference, whatever their shapes are.

    Args:
        makers: Per latent what makes such a value of a tensor of its shape.
        role: What their values are.
        values: Values that earlier runs gave; what they lack is added.
    """

    _postprocess_message = nothing

    def __init__(
        self,
        makers: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
        role: Role,
        values: dict[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.makers, self.role, self.values = makers, role, values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name not in self.makers or msg["is_observed"]:
            return
        if name not in self.values:
            mean = msg["fn"].mean.detach()
            self.values[name] = self.makers[name](torch.zeros_like(mean).contiguous())
        msg["value"], msg["is_observed"] = self.values[name], True
        msg["infer"] = {**msg["infer"], ROLE: self.role.value}


class GuideSites(SampleMessenger):
    """Run a guide inside a model's trace: record values, rename what counts, hide the rest.

    Args:
        shown: Sites whose log density counts; they appear as ``guide:name``.
        chosen: Per site that is held at one value of its support, everywhere in its plates, the
            place of the value there.

    Attributes:
        values: What was drawn, by the guide's names.
        infer: What the guide says of each site.
        subsamples: Indices that its plates drew.
        held: The sites that are held.
        state: The random state after the guide, where somebody keeps it.
    """

    prefix = "guide:"

    def __init__(self, shown: frozenset[str], chosen: Mapping[str, int]) -> None:
        super().__init__()
        self.shown, self.chosen = shown, chosen
        self.held: dict[str, dict[str, Any]] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.infer: dict[str, dict[str, Any]] = {}
        self.state: Any = None
        self.subsamples: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.chosen:
            support = msg["fn"].enumerate_support(expand=True)
            msg["value"], msg["done"] = support[self.chosen[msg["name"]]], True
            self.held[msg["name"]] = dict(msg)
        if site_is_subsample(msg) or msg["name"] not in self.shown:
            msg["stop"] = True
            return
        msg["name"] = self.prefix + msg["name"]
        msg["infer"] = {**msg["infer"], ROLE: Role.GUIDE.value}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
        else:
            own = msg["name"].removeprefix(self.prefix)
            self.values[own], self.infer[own] = msg["value"], msg["infer"]


class SampleTrace(SampleMessenger, TraceMessenger):
    """Record sample sites only."""

    _process_message = nothing

    def _pyro_post_sample(self, msg: Any) -> None:
        TraceMessenger._pyro_post_sample(self, msg)


class PairTrace(TraceMessenger):
    """A trace of sample sites: first those of a guide, then those of the model at its values.

    A step of a network runs both, and much of what it adds to their arithmetic is the way of each
    message through the handlers. This one does what four do in turn: `GuideSites` for
    those of the guide, then `GiveValues`, and outside of both `SampleTrace` and `OfBatch`.

    Args:
        shown: Guide sites whose log density counts.
        chosen: Guide sites that are held at one value of their support, by its place there.
        roles: Per latent of the model that takes its value from the guide, what that value is.
        factors: Per plate what multiplies its sites.
    """

    def __init__(
        self,
        shown: frozenset[str],
        chosen: Mapping[str, int],
        roles: Mapping[str, Role],
        factors: Mapping[str, float],
    ) -> None:
        super().__init__()
        guide = GuideSites(shown, chosen)
        self._model = GiveValues(guide.values, roles, guide.subsamples)
        self._batch = OfBatch(factors)
        self._turn: SampleMessenger = guide

    def run(
        self,
        guide: Callable[..., Any],
        model: Callable[..., Any],
        args: tuple,
        kwargs: Mapping[str, Any],
    ) -> dict[str, dict[str, Any]]:
        """Run the guide, then the model; returns the sites of both by name."""
        with self:
            guide(*args, **kwargs)
            self._turn = self._model
            model(*args, **kwargs)
        return self.trace.nodes

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        self._turn._pyro_sample(msg)
        if not msg["stop"]:
            self._batch._pyro_sample(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        if not msg["stop"]:
            name, nodes = msg["name"], self.trace.nodes
            if name in nodes or msg["infer"].get("_do_not_trace"):
                self._pyro_post_sample(msg)
            else:
                nodes[name] = msg.copy()
        self._turn._pyro_post_sample(msg)


class DrawObserved(SampleMessenger):
    """Draw what the model observes; latents at given values stay."""

    _postprocess_message = nothing

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        data = is_factor(msg) and role_of(msg) is Role.DATA
        unit = type(unwrap(msg["fn"])[0]).__name__ == "Unit"
        if self.active and data and not unit:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class DrawMissing(SampleMessenger):
    """Draw the missing entries of what the model observes, given those that are seen."""

    _postprocess_message = nothing

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        missing = msg["infer"].get(MISSING) if self.active else None
        if missing is None:
            return
        msg["value"] = drawn_given_seen(msg["fn"], msg["value"], missing)
        msg["infer"] = {k: v for k, v in msg["infer"].items() if k != MISSING}
