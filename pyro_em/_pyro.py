"""The only file that touches Pyro's internals: running a model under handlers.

Three kinds of run, in the order in which a model is looked at:

* a *plain* run: nothing enumerated, validation on; it initialises parameters and shows shapes;
* a *provenance* run: every latent's value carries its name, so that each site's distribution tells
  which latents reach it;
* an *enumerated* run: discrete latents take all their values along dimensions of their own, and
  every read of a parameter yields one leaf of the autograd graph.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import broadcast_shape as broadcast_shape_of_pyro
from pyro.ops.provenance import ProvenanceTensor, get_provenance
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from pyro.util import get_rng_state, set_rng_state
from torch.distributions import constraints, transform_to
from torch.utils._pytree import tree_map

from pyro_em._densities import add_log_probs
from pyro_em._errors import PyroEMError
from pyro_em._feasible import feasible_event as feasible_event
from pyro_em._feasible import without_masked_nonsense
from pyro_em._memory import own_start, settle
from pyro_em._mixing import Mixing
from pyro_em._shadows import (
    NumbersNeeded,
    Overspent,
    Shadows,
    is_shadow,
    size_guard,
    spending_at_most,
)
from pyro_em._whole import LeftWhole
from pyro_em._wrappers import element_mask
from pyro_em._wrappers import unwrap as unwrap

Model = Callable[..., Any]

_LARGE = 256  # elements; smaller latents are always drawn
_PLAIN_BYTES = 2**26  # what a plain run may allocate in all before it runs with shadows


@dataclass(frozen=True, eq=False)
class TracedParameter:
    """A parameter as one run of a model read it.

    Attributes:
        name: Its name in Pyro's param store.
        unconstrained: The leaf tensor that an optimiser would step.
        constraint: Where the constrained value lives.
        leaf: The tensor to which autograd leads from every use of the parameter in this run.
        declared: Texts of all constraints under which this run declared the parameter.
        initial_shape: The shape that the model asked for, where it said one.
        is_foreign: Whether the store holds another tensor than the ``nn.Parameter`` that the
            module reads.
        initial: The initial value that the model gave, where this run initialised the parameter.
        given: The initial value that the model gives, used or not, from a plain run.
    """

    name: str
    unconstrained: torch.Tensor
    constraint: constraints.Constraint
    leaf: torch.Tensor
    declared: tuple[str, ...] = ()
    initial_shape: torch.Size | None = None
    is_foreign: bool = False
    initial: torch.Tensor | None = None
    given: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        """The current constrained value: a tensor of its own, which no later step changes."""
        with torch.no_grad():
            out = transform_to(self.constraint)(self.unconstrained).detach()
            return out.clone() if out.data_ptr() == self.unconstrained.data_ptr() else out


class NoTensor(Exception):
    """The initial value of a parameter is no tensor, or none of real numbers in dense form.

    Attributes:
        name: The parameter's.
        value: What was given.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(f"parameter '{name}'")
        self.name, self.value = name, value


class ParameterCapture(Messenger):
    """Record every parameter that a model reads, and hand out one detached leaf per name.

    Args:
        values: Constrained values to hand out instead, possibly attached to an autograd graph.
        look_at_initial_shape: Whether to evaluate lazy initial values for their shape.
        hand_out: Whether leaves are handed out at all; parameters are only recorded otherwise.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor] | None = None,
        look_at_initial_shape: bool = False,
        hand_out: bool = True,
    ) -> None:
        super().__init__()
        self.values = values
        self.hand_out = hand_out
        self.look_at_initial_shape = look_at_initial_shape
        self.given: dict[str, Any] = {}
        self.parameters: dict[str, TracedParameter] = {}
        self._starts: dict[str, torch.Tensor] = {}
        self._constraints: dict[str, constraints.Constraint] = {}

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        self._note_start(msg)
        _start_apart(msg)

    def _note_start(self, msg: dict[str, Any]) -> None:
        """Note the initial value of a parameter that this run initialises."""
        name, args = msg["name"], msg["args"]
        if not self.look_at_initial_shape or len(args) < 2 or name in pyro.get_param_store():
            return
        given = args[1]
        self._constraints[name] = msg["kwargs"].get("constraint") or constraints.real
        if isinstance(given, torch.Tensor) or not callable(given):
            self._noted(name, given)
        else:
            msg["args"] = (name, lambda: self._noted(name, given()), *args[2:])

    def _noted(self, name: str, value: Any) -> Any:
        odd = isinstance(value, torch.Tensor) and (
            value.layout != torch.strided or value.is_quantized or value.is_complex()
        )
        if odd or not isinstance(value, torch.Tensor):
            raise NoTensor(name, value)
        self._starts[name] = value.detach()
        return value

    def unfinished(self) -> TracedParameter | None:
        """The parameter whose initial value Pyro could not bring into its constraint, if any."""
        for name, given in self._starts.items():
            if name not in self.parameters:
                nowhere = torch.full_like(given, torch.nan) if given.is_floating_point() else given
                own = self._constraints[name]
                return TracedParameter(name, nowhere, own, given, initial=given)
        return None

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        name, value = msg["name"], msg["value"]
        given = msg["kwargs"].get("constraint")
        store = pyro.get_param_store()
        constraint = store._constraints.get(name, given) if name in store else given
        constraint = constraints.real if constraint is None else constraint
        known = self.parameters.get(name)
        # pyro.param("p") without an initial value reads and declares nothing.
        declares = len(msg["args"]) > 1 and given is not None
        declared = (known.declared if known else ()) + ((repr(given),) if declares else ())
        if declares and repr(constraint) != repr(given):
            declared = (*declared, repr(constraint))
        if known is None:
            unconstrained = value.unconstrained() if hasattr(value, "unconstrained") else value
            if isinstance(value, torch.nn.Parameter):
                # A plain nn.Parameter is read directly by its module, not through this message.
                leaf = value
            elif self.values is not None and name in self.values:
                leaf = self.values[name]
            else:
                leaf = value.detach().clone().requires_grad_(value.is_floating_point())
            start = self._given(msg)
            shape = start.shape if isinstance(start, torch.Tensor) else None
            self.given[name] = start
            own = msg["args"][1] if len(msg["args"]) > 1 else None
            foreign = isinstance(own, torch.nn.Parameter) and own is not value and "$$$" not in name
        else:
            unconstrained, leaf, shape = known.unconstrained, known.leaf, known.initial_shape
            foreign = known.is_foreign
        initial = known.initial if known else self._starts.get(name)
        declarations = tuple(dict.fromkeys(declared))
        start = self.given[name]
        if not isinstance(start, torch.Tensor) or isinstance(start, torch.nn.Parameter):
            start = None  # a module's parameter is its own value
        self.parameters[name] = TracedParameter(
            name, unconstrained, constraint, leaf, declarations, shape, foreign, initial, start
        )
        if self.hand_out:
            if leaf is not value and hasattr(value, "unconstrained"):
                # A PyroModule that declares its parameter in this run asks for the leaf below.
                leaf.unconstrained = value.unconstrained  # type: ignore[attr-defined]
            msg["value"] = leaf

    def _given(self, msg: dict[str, Any]) -> Any:
        """The initial value that the model gives, made if it is lazy."""
        if not self.look_at_initial_shape or len(msg["args"]) < 2:
            return None
        initial = self._starts.get(msg["name"], msg["args"][1])
        if callable(initial) and not isinstance(initial, torch.Tensor):
            with torch.random.fork_rng(devices=[]):
                initial = initial()
        return initial


def _start_apart(msg: dict[str, Any]) -> None:
    """Let a parameter that this message declares begin in memory of its own."""
    name, *rest = msg["args"]
    if rest and msg["name"] not in pyro.get_param_store():
        msg["args"] = (name, own_start(rest[0]), *rest[1:])


class _KeepValues(Messenger):
    """Give unobserved sites the values that they had in a plain run: nothing is drawn again.

    Some distributions cannot be sampled with tagged arguments, none at a trial point of a line
    search that is far off.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], of_guide: bool = False) -> None:
        super().__init__()
        self.values, self.of_guide = values, of_guide

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        drawn = is_latent(msg) or (self.of_guide and role_of(msg) is Role.GUIDE)
        if msg["name"] in self.values and not msg["done"] and drawn:
            # Not marked as done: the enumerating handler still has to note the site's scope.
            msg["value"] = self.values[msg["name"]]


class _DrawNothing(Messenger):
    """Give large latents that can be enumerated a shadow instead of a draw."""

    def __init__(self, shadows: Shadows) -> None:
        super().__init__()
        self.shadows = shadows

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["done"] or msg["value"] is not None or not is_latent(msg):
            return
        fn = msg["fn"]
        shape = fn.shape()
        if not has_finite_support(fn) or shape.numel() < _LARGE:
            return
        msg["value"] = self.shadows.instead_of(fn.enumerate_support(expand=False), shape)
        dist.enable_validation(False)  # a shadow satisfies no constraint; the caller restores


_mixing: ContextVar[Mixing | None] = ContextVar("mixing", default=None)


def _is_tagged(value: Any) -> bool:
    return isinstance(value, ProvenanceTensor)


class Tagged(ProvenanceTensor):
    """Pyro's tensor with provenance, at a fifth of the time per operation."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        """Run an operation on the values; its outputs carry the tags of all inputs."""
        tags: set[str] = set()
        plain = [_untagged(a, tags) for a in args]
        out = func(*plain, **({k: _untagged(a, tags) for k, a in kwargs.items()} if kwargs else {}))
        frozen = frozenset(tags)
        mixing = _mixing.get()
        if mixing is not None:
            mixing.see(func, args, kwargs or {}, frozen, _is_tagged, out)
        return _tagged(out, frozen)


_NO_TENSORS = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device)


def _untagged(value: Any, tags: set[str]) -> Any:
    """A value with plain tensors in it; their tags are added to ``tags``."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, ProvenanceTensor):
            tags |= value._provenance
            return value._t
        return value
    if isinstance(value, _NO_TENSORS):
        return value
    if type(value) in (tuple, list):
        return type(value)(_untagged(v, tags) for v in value)
    if type(value) is slice:
        return slice(*(_untagged(v, tags) for v in (value.start, value.stop, value.step)))
    return tree_map(lambda v: _untagged(v, tags) if isinstance(v, torch.Tensor) else v, value)


def _tagged(value: Any, tags: frozenset[str]) -> Any:
    """A value whose tensors carry tags."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, ProvenanceTensor):
            value, tags = value._t, tags | value._provenance
        return Tagged(value, tags)
    if isinstance(value, _NO_TENSORS):
        return value
    if type(value) in (tuple, list):
        return type(value)(_tagged(v, tags) for v in value)
    return tree_map(lambda v: _tagged(v, tags) if isinstance(v, torch.Tensor) else v, value)


class _TagSites(Messenger):
    """Tag the value of each site with the site's own name; observed ones keep their tags too."""

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        if not is_factor(msg) or not isinstance(value, torch.Tensor):
            return
        before = frozenset() if is_latent(msg) else get_provenance(value)
        untagged = getattr(value, "_t", value)
        msg["value"] = Tagged(untagged, before | {msg["name"]})


class _MarkForEnumeration(Messenger):
    """Ask Pyro to enumerate the given sites in parallel, whatever the model says of them."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or msg["name"] not in self.names:
            msg["infer"].pop("enumerate", None)
            return
        msg["infer"]["enumerate"] = "parallel"
        msg["infer"].pop("num_samples", None)


class _WatchPlates(Messenger):
    """Note plates of size zero before Pyro divides by their size."""

    def __init__(self) -> None:
        super().__init__()
        self.empty: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg) and getattr(msg["fn"], "size", None) == 0:
            self.empty.append(msg["name"])


class _WatchMasks(Messenger):
    """Note masks that are written in place after the site that they mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Tensor, int]] = []

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["mask"], torch.Tensor):
            self.seen.append((msg["name"], msg["mask"], msg["mask"]._version))

    def changed(self) -> tuple[str, ...]:
        """Names of the sites whose mask is another one by now."""
        return tuple(name for name, mask, version in self.seen if mask._version != version)


class RunFailed(Exception):
    """A model raised; holds what it did until then.

    Attributes:
        error: What the model raised.
        run: The sites and parameters so far.
        empty_plates: Plates of size zero.
    """

    def __init__(self, error: Exception, run: Run, empty_plates: tuple[str, ...]) -> None:
        super().__init__(str(error))
        self.error, self.run, self.empty_plates = error, run, empty_plates


class _SampleMessenger(Messenger):
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


class ScalePlates(_SampleMessenger):
    """Multiply the scale of every site inside some plates: a batch stands for all data.

    Args:
        factors: Per plate its factor.
    """

    def __init__(self, factors: Mapping[str, float]) -> None:
        super().__init__()
        self.factors = factors

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.factors:
                msg["scale"] = msg["scale"] * self.factors[frame.name]


class FeasibleWhereMasked(_SampleMessenger):
    """Put a feasible value where an observation is masked: 0 · NaN is NaN in a gradient."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn, value = msg["fn"], msg["value"]
        if not isinstance(value, torch.Tensor) or role_of(msg) is not Role.DATA:
            return
        mask = element_mask(fn, msg["mask"])
        if mask is not None and type(unwrap(fn)[0]).__name__ != "Unit":
            msg["value"] = without_masked_nonsense(fn, value, mask, sparing=True)


class OnlySites(Messenger):
    """Hide sites that do not count, and enumerate some in parallel.

    Args:
        hidden: Sites that outer handlers must not see.
        enumerated: Sites to enumerate; no other one is.
    """

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


class MaskSites(Messenger):
    """Leave sites out of the density: observed ones, or all.

    Args:
        observed_only: Whether only sites with an observed value are masked.
    """

    def __init__(self, observed_only: bool) -> None:
        super().__init__()
        self.observed_only = observed_only

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg) or (self.observed_only and not msg["is_observed"]):
            return
        msg["mask"] = False


@dataclass(frozen=True, eq=False)
class Run:
    """The sites and the parameters of one run of a model.

    Attributes:
        sites: Everything that was traced, by name.
        parameters: What the model read.
        scopes: Per site the other sites that reach it, from a provenance run.
        suspects: Discrete latents whose plates' elements it may have mixed, from a provenance run.
        changed_masks: Sites whose mask was written after them.
        shadows: Where large latents have no numbers, so that no argument was validated.
        unfinished: The parameter at whose initial value the run broke off.
        cleared: Whether the run has emptied the param store of what was in it.
    """

    sites: dict[str, dict[str, Any]]
    parameters: dict[str, TracedParameter]
    scopes: dict[str, frozenset[str]] = field(default_factory=dict)
    changed_masks: tuple[str, ...] = ()
    shadows: Shadows | None = None
    unfinished: TracedParameter | None = None
    suspects: frozenset[str] = frozenset()
    cleared: bool = False


class Role(Enum):
    """What a site of a model paired with its guide stands for."""

    DATA = "data"  # observed by the user
    LATENT = "latent"  # to be summed
    POINT = "point"  # a latent of the model at a point estimate: its density is a log prior
    SAMPLED = "sampled"  # a latent of the model at a value that the guide drew
    GUIDE = "guide"  # a site of the guide whose value was drawn


_ROLE = "_pyro_em_role"


def role_of(site: Mapping[str, Any]) -> Role:
    """The role of a traced site."""
    marked = site["infer"].get(_ROLE)
    if marked is not None:
        return Role(marked)
    return Role.DATA if site["is_observed"] else Role.LATENT


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a traced site is an unobserved random choice that no guide drew."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
        and role_of(site) is Role.LATENT
    )


def is_auxiliary(site: Mapping[str, Any]) -> bool:
    """Whether a guide marks a site as one that the model lacks."""
    return bool(site["infer"].get("is_auxiliary", False))


class GiveValues(_SampleMessenger):
    """Run a model with some latents at values from elsewhere, marked by their role.

    Args:
        values: The values.
        roles: What each of them is.
        subsamples: Indices that the guide's plates drew, to be used again.
    """

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
            msg["infer"] = {**msg["infer"], _ROLE: self.roles[name].value}


class GuideSites(_SampleMessenger):
    """Run a guide inside a model's trace: record values, rename what counts, hide the rest.

    Args:
        shown: Sites whose log density counts; they appear as ``guide:name``.
    """

    prefix = "guide:"

    def __init__(self, shown: frozenset[str]) -> None:
        super().__init__()
        self.shown = shown
        self.values: dict[str, torch.Tensor] = {}
        self.infer: dict[str, dict[str, Any]] = {}
        self.subsamples: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg) or msg["name"] not in self.shown:
            msg["stop"] = True
            return
        msg["name"] = self.prefix + msg["name"]
        msg["infer"] = {**msg["infer"], _ROLE: Role.GUIDE.value}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
        else:
            own = msg["name"].removeprefix(self.prefix)
            self.values[own], self.infer[own] = msg["value"], msg["infer"]


class HoldAt(_SampleMessenger):
    """Hold sites of a guide at one value of their support, everywhere in their plates.

    Args:
        chosen: Per site the place of the value in its support.
    """

    def __init__(self, chosen: Mapping[str, int]) -> None:
        super().__init__()
        self.chosen = chosen
        self.sites: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.chosen:
            support = msg["fn"].enumerate_support(expand=True)
            msg["value"], msg["done"] = support[self.chosen[msg["name"]]], True
            self.sites[msg["name"]] = dict(msg)


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a traced site contributes a density: latents, observations, ``pyro.factor``."""
    if site["type"] != "sample" or site_is_subsample(site):
        return False
    return not site["infer"].get("_deterministic", False)


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a traced site holds the indices of a plate."""
    return site["type"] == "sample" and site_is_subsample(site)


@contextmanager
def same_random_state(active: bool = True) -> Iterator[None]:
    """Restore the random state after a block."""
    if not active:
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def drawn_run(
    model: Model, args: tuple, kwargs: dict[str, Any], unneeded: Collection[str] = ()
) -> Run:
    """Run a model paired with its guide once, drawing on; parameters stay attached.

    Every site with a density gets ``log_prob`` over its batch, scaled and masked, those in
    ``unneeded`` excepted.
    """
    with LeftWhole(), pyro.validation_enabled(False), _SampleTrace() as tracer:
        model(*args, **kwargs)
    add_log_probs(
        tracer.trace,
        lambda name, site: is_factor(site) and not is_latent(site) and name not in unneeded,
    )
    return Run(dict(tracer.trace.nodes), {})


class _SampleTrace(_SampleMessenger, TraceMessenger):
    """Record sample sites only."""

    def _pyro_post_sample(self, msg: Any) -> None:
        TraceMessenger._pyro_post_sample(self, msg)


def signature_of(model: Any) -> list[inspect.Parameter]:
    """The parameters of a model or guide; empty where they cannot be known."""
    target = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return []


def is_being_traced() -> bool:
    """Whether a handler around this call records every sample site: a model is being run."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, BlockMessenger):
            return False
        if isinstance(handler, TraceMessenger) and not handler.param_only:
            return True
    return False


def without_state(optim: Any) -> Any:
    """A ``pyro.optim`` object as it was made: optimisers of parameters hold weak references."""
    if not isinstance(optim, pyro.optim.PyroOptim):
        return optim
    fresh = copy.copy(optim)
    fresh.optim_objs, fresh.grad_clip, fresh._state_waiting_to_be_consumed = {}, {}, {}
    return fresh


def rename(module: Any, name: str) -> None:
    """Give a ``PyroModule`` and all below it another name in the param store, before its first use."""
    module._pyro_set_supermodule(name, module._pyro_context)


def sites_of(model: Model, args: tuple, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sites of one run, without densities and without gradients."""
    with LeftWhole(), torch.no_grad(), pyro.validation_enabled(False), poutine.trace() as tracer:
        model(*args, **kwargs)
    return {n: s for n, s in tracer.trace.nodes.items() if is_factor(s)}


def predicted_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    values: Mapping[str, torch.Tensor],
    keep_observed: bool,
) -> dict[str, dict[str, Any]]:
    """The sites of one run with latents at given values and observed sites drawn anew.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values of latents.
        keep_observed: Whether observed sites keep their values.
    """
    with (
        LeftWhole(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        poutine.trace() as tracer,
        _DrawObserved(not keep_observed),
        GiveValues(values, dict.fromkeys(values, Role.SAMPLED), {}),
    ):
        model(*args, **kwargs)
    return {
        n: s
        for n, s in tracer.trace.nodes.items()
        if s["type"] == "sample"
        and not site_is_subsample(s)
        and type(unwrap(s["fn"])[0]).__name__ != "Unit"
    }


class _DrawObserved(Messenger):
    """Draw what the model observes; latents at given values stay."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        data = is_factor(msg) and role_of(msg) is Role.DATA
        unit = type(unwrap(msg["fn"])[0]).__name__ == "Unit"
        if self.active and data and not unit:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Another random state inside a block; the present one where ``seed`` is None."""
    if seed is None:
        yield
        return
    with same_random_state():
        torch.manual_seed(seed)
        yield


@contextmanager
def parameters_read() -> Iterator[dict[str, torch.Tensor]]:
    """Collect the unconstrained tensor of every parameter that is read inside, by name."""
    with _ParameterRecord() as record:
        yield record.found


class _ParameterRecord(Messenger):
    """The unconstrained tensor of every parameter that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, torch.Tensor] = {}

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        _start_apart(msg)

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        if value is not None:
            own = value.unconstrained() if hasattr(value, "unconstrained") else value
            self.found[msg["name"]] = own


def plain_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    keep_random_state: bool,
    sparing: bool = False,
) -> Run:
    """Run a model once as Pyro would, with validation on; parameters are initialised.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keep_random_state: Whether the global random state is restored.
        sparing: Whether a run that allocates much is broken off and done again with shadows in
            place of large latents; their arguments then have to be validated elsewhere.

    Raises:
        RunFailed: If the model raises.
        NumbersNeeded: If the model raises with shadows.
    """
    with same_random_state(keep_random_state):
        if not sparing:
            return _plain_run(model, args, kwargs)
        begin, known = random_state(), frozenset(pyro.get_param_store()._params)
        try:
            with spending_at_most(_PLAIN_BYTES):
                return _plain_run(model, args, kwargs)
        except Overspent:
            set_random_state(begin)
            _forget_all_but(known)  # the next run draws their starts from the same state
        try:
            with Shadows() as shadows:
                run = _plain_run(model, args, kwargs, _DrawNothing(shadows))
            if _holds_shadows():
                raise NumbersNeeded
        except BaseException:
            _forget_all_but(known)
            raise
        return replace(run, shadows=shadows)


def _plain_run(model: Model, args: tuple, kwargs: dict[str, Any], *more: Messenger) -> Run:
    capture = ParameterCapture(look_at_initial_shape=True)
    tracer, watch, masks = poutine.trace(), _WatchPlates(), _WatchMasks()
    begun = _store_as_it_is()
    with LeftWhole(), ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(pyro.validation_enabled(True))
        for messenger in (tracer, watch, masks, capture, *more):
            stack.enter_context(messenger)
        try:
            model(*args, **kwargs)
        except PyroEMError:
            raise  # the model calls this library, which has said what is wrong
        except Exception as error:
            broken = capture.unfinished()
            run = Run(dict(tracer.trace.nodes), capture.parameters, unfinished=broken)
            raise RunFailed(error, run, tuple(watch.empty)) from error
    parameters = _apart(_alive(capture.parameters), capture.given)
    cleared = _was_cleared(begun)
    return Run(dict(tracer.trace.nodes), parameters, {}, masks.changed(), cleared=cleared)


def _store_as_it_is() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The param store's own dictionary, and a copy of it."""
    held = pyro.get_param_store()._params
    return held, dict(held)


def _was_cleared(begun: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> bool:
    """Whether the param store has been cleared since, and not been restored (as a scope does)."""
    held, before = begun
    now = pyro.get_param_store()._params
    return now is not held and any(now.get(name) is not p for name, p in before.items())


def _holds_shadows() -> bool:
    """Whether a parameter's initial value is a shadow."""
    return any(is_shadow(p) for p in pyro.get_param_store()._params.values())


def _forget_all_but(known: Collection[str]) -> None:
    """Delete the parameters that a run which is not used has initialised."""
    store = pyro.get_param_store()
    for name in [n for n in store._params if n not in known]:
        del store[name]


def random_state() -> tuple[Any, Any]:
    """The random states that a model may advance."""
    return get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def set_random_state(state: tuple[Any, Any]) -> None:
    """Go back to a `random_state`."""
    set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _alive(parameters: Mapping[str, TracedParameter]) -> dict[str, TracedParameter]:
    """Parameters with the leaves that the store holds now.

    A ``PyroModule`` that declares a parameter during a run puts another leaf into the store.
    """
    store = pyro.get_param_store()
    out = {}
    for name, p in parameters.items():
        now = store._params.get(name)
        stays = now is None or isinstance(p.leaf, torch.nn.Parameter) or p.is_foreign
        out[name] = p if stays else replace(p, unconstrained=now)
    return out


def is_stored(parameters: Mapping[str, TracedParameter]) -> bool:
    """Whether the param store still holds what a look found; modules keep their own."""
    store = pyro.get_param_store()
    return all(
        isinstance(p.unconstrained, torch.nn.Parameter)
        or store._params.get(name) is p.unconstrained
        for name, p in parameters.items()
    )


def _apart(
    parameters: Mapping[str, TracedParameter], given: Mapping[str, Any]
) -> dict[str, TracedParameter]:
    """Parameters in memory of their own.

    Where Pyro has run the model before, a parameter may be the very tensor that the model passes as
    its initial value: that one goes back to whom it belongs.
    """
    store = pyro.get_param_store()
    out = dict(parameters)
    for name, p in parameters.items():
        old = p.unconstrained
        if given.get(name) is not old or isinstance(old, torch.nn.Parameter):
            continue
        if store._params.get(name) is not old:
            continue
        new = old.detach().clone().requires_grad_(old.requires_grad)
        store._params[name] = new
        store._param_to_name.pop(old, None)
        store._param_to_name[new] = name
        out[name] = replace(p, unconstrained=new)
    settle(p.unconstrained for p in out.values())
    return out


def tensors_of(fn: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a distribution object holds, through its wrappers."""
    for item in vars(fn).values():
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, torch.distributions.Distribution):
            yield from tensors_of(item)
        elif isinstance(item, (list, tuple)):
            for part in item:
                if isinstance(part, torch.Tensor):
                    yield part
                elif isinstance(part, torch.distributions.Distribution) or hasattr(part, "inv"):
                    yield from tensors_of(part)


def support_reads_latents(fn: Any) -> bool:
    """Whether the support of a distribution from a provenance run differs between latents' values."""
    try:
        return _has_tags(fn.support)
    except (NotImplementedError, AttributeError):
        return False


def _has_tags(constraint: Any) -> bool:
    held = list(vars(constraint).values())
    parts = [p for v in held for p in (v if isinstance(v, (list, tuple)) else (v,))]
    return any(
        _has_tags(p) if isinstance(p, constraints.Constraint) else bool(get_provenance(p))
        for p in parts
    )


def provenance_run(model: Model, args: tuple, kwargs: dict[str, Any], plain: Run) -> Run:
    """Run a model with tagged values; ``scopes`` says which other sites reach each site.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        plain: A plain run, whose latent values are used again.

    Raises:
        NumbersNeeded: If the plain run has shadows and the model raises with them.
    """
    capture = ParameterCapture()
    latents = {n: s for n, s in plain.sites.items() if is_latent(s)}
    begun = _store_as_it_is()
    mixing = Mixing({n: _plate_sizes(s) for n, s in latents.items() if not is_smooth(s["fn"])})
    with (
        LeftWhole(),
        plain.shadows or nullcontext(),
        same_random_state(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        _TagSites(),
        _KeepValues({n: s["value"] for n, s in latents.items()}),
        capture,
        _looking_at(mixing),
    ):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    scopes = {}
    for name, site in trace.nodes.items():
        if not is_factor(site):
            continue
        scope: frozenset[str] = frozenset()
        for tensor in tensors_of(site["fn"]):
            scope |= get_provenance(tensor)
        scope |= get_provenance(site["mask"]) | get_provenance(site["scale"])
        if site["is_observed"]:
            scope |= get_provenance(site["value"]) - {name}
        scopes[name] = scope
    return Run(
        dict(trace.nodes),
        capture.parameters,
        scopes,
        suspects=frozenset(mixing.suspects),
        cleared=_was_cleared(begun),
    )


@contextmanager
def _looking_at(mixing: Mixing) -> Iterator[None]:
    """Let every operation on tagged tensors be seen."""
    token = _mixing.set(mixing)
    try:
        yield
    finally:
        _mixing.reset(token)


def _plate_sizes(site: Mapping[str, Any]) -> frozenset[int]:
    """The sizes of a site's vectorised plates that have several elements."""
    frames = [f for f in site["cond_indep_stack"] if f.dim is not None]
    return frozenset(f.size for f in frames if f.size > 1)


def is_smooth(fn: Any) -> bool:
    """Whether draws are followed by gradients: neither summed nor scored."""
    return not has_finite_support(fn) and bool(getattr(fn, "has_rsample", False))


def held_run(
    model: Model, args: tuple, kwargs: dict[str, Any], values: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """The sites of one run with latents held at given values; the random state is restored.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values of all its latents, and of the sites of its guide.
    """
    with (
        LeftWhole(),
        same_random_state(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        _KeepValues(values, of_guide=True),
    ):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    return {n: s for n, s in trace.nodes.items() if is_factor(s)}


def enumerated_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    latents: frozenset[str],
    max_plate_nesting: int,
    kept: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor] | None = None,
    limit: int | None = None,
    random_seed: int | None = None,
    keep_random_state: bool = True,
    attached: bool = False,
    validated: bool = False,
    reading: Callable[..., Any] | None = None,
) -> Run:
    """Run a model with ``latents`` enumerated to the left of ``max_plate_nesting`` dimensions.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        latents: Names of the sites to enumerate.
        max_plate_nesting: Number of dimensions that belong to plates.
        kept: Values of unobserved sites that are not enumerated.
        values: Constrained parameter values to use instead of the current ones.
        limit: Raise `OutputTooLarge` when one operation's output has more cells.
        random_seed: Start this run from another random state.
        keep_random_state: Whether the global random state is restored.
        attached: Whether parameters stay attached to their unconstrained leaves.
        validated: Whether distributions check their arguments.
        reading: Runs each operation, to note what it reads; with a limit only.
    """
    capture = ParameterCapture(values, hand_out=not attached)
    with (
        LeftWhole(),
        same_random_state(keep_random_state),
        torch.enable_grad(),
        pyro.validation_enabled(False),
        dist.validation_enabled(validated),
        poutine.trace() as tracer,
        poutine.enum(first_available_dim=-1 - max_plate_nesting),
        _MarkForEnumeration(latents),
        _KeepValues(kept),
        capture,
    ):
        if random_seed is not None:
            # torch.manual_seed would queue a seed for devices that are not initialised yet.
            torch.default_generator.manual_seed(random_seed)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed(random_seed)
        if limit is None:
            model(*args, **kwargs)
        else:
            with size_guard(limit, reading):
                model(*args, **kwargs)
    settle(p.unconstrained for p in capture.parameters.values())
    return Run(dict(tracer.trace.nodes), capture.parameters)


def is_of_validation(error: Exception) -> bool:
    """Whether a distribution raised because an argument is outside its constraint."""
    return isinstance(error, ValueError) and str(error).startswith("Expected parameter ")


def is_of_shadows(error: BaseException | None) -> bool:
    """Whether an operation raised because it met a tensor without numbers."""
    return isinstance(error, RuntimeError) and re.search(r"\bmeta\b", str(error)) is not None


def broadcast_shape(a: Sequence[int], b: Sequence[int]) -> torch.Size:
    """The shape of two shapes together; ``torch.broadcast_shapes`` takes 40 µs and imports sympy.

    Raises:
        ValueError: If they do not broadcast.
    """
    return torch.Size(a if a == b else broadcast_shape_of_pyro(a, b))


def write_unconstrained(parameter: TracedParameter, value: torch.Tensor) -> None:
    """Write a constrained value in place into the parameter's unconstrained leaf."""
    with torch.no_grad():
        transform = transform_to(parameter.constraint)
        parameter.unconstrained.copy_(transform.inv(value))


def is_real(constraint: constraints.Constraint) -> bool:
    """Whether every number is allowed."""
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    return type(base) is type(constraints.real)


def values_of(parameters: Mapping[str, TracedParameter]) -> dict[str, torch.Tensor]:
    """The current constrained values by name, tensors of their own."""
    return {name: p.value() for name, p in parameters.items()}


def snapshot(parameters: Mapping[str, TracedParameter]) -> dict[str, torch.Tensor]:
    """Copies of all unconstrained parameters."""
    return {name: p.unconstrained.detach().clone() for name, p in parameters.items()}


def restore(
    parameters: Mapping[str, TracedParameter], unconstrained: Mapping[str, torch.Tensor]
) -> None:
    """Write unconstrained values back in place."""
    with torch.no_grad():
        for name, value in unconstrained.items():
            parameters[name].unconstrained.copy_(value)


def has_finite_support(fn: Any) -> bool:
    """Whether Pyro can enumerate a distribution."""
    return bool(getattr(fn, "has_enumerate_support", False)) and not has_many_counts(fn)


def has_many_counts(fn: Any) -> bool:
    """Whether the elements of a distribution of counts have supports of their own."""
    total = getattr(unwrap(fn)[0], "total_count", None)
    if not isinstance(total, torch.Tensor) or not total.numel():
        return False
    return not bool((total == total.reshape(-1)[0]).all())


def is_discrete(fn: Any) -> bool:
    """Whether a distribution's support is discrete."""
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False
