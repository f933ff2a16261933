"""Pyro's own handlers at less cost per site: the same messages, the same dimensions.

A chain of a thousand steps passes each of them twice a step. What is left out is what costs and says
nothing: a ``Counter`` per site, a context manager per call, methods looked up by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from pyro.distributions import Categorical
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_em.tracing.capture import ParameterCapture
from pyro_em.tracing.not_distributions import require_distribution
from pyro_em.tracing.operations import Unwatched
from pyro_em.tracing.provenance import Tagged
from pyro_em.tracing.sites import ROLE, Role, is_factor, is_latent, role_of

Aside: TypeAlias = AbstractContextManager[None]
"""A block whose operations are none of the model's, to be opened at any number of sites."""

Met: TypeAlias = Callable[[dict[str, Any], Aside], bool]
"""What is done with a site once it is traced, which it may change; whether it wants to see others of
its class and shape."""

AtLarge: TypeAlias = Callable[[dict[str, Any]], None]
"""What is done with a site that asks for a draw of many numbers."""

_LARGE = 256  # elements; smaller latents are always drawn

_MANY_ROWS = 2**16  # numbers of a scale from which on it is held once for all sites that share it

nothing: Any = staticmethod(id)  # what does nothing with a message, without a call of Python


class _Silent(MarkovMessenger):
    """``pyro.markov`` that leaves it to the trace around it to count scopes, where anybody asks."""

    _process_message = nothing
    _postprocess_message = nothing


class LeanTrace(TraceMessenger):
    """``poutine.trace``; the ``pyro.markov`` contexts that it meets say nothing from then on.

    Args:
        capture: What captures parameters, and is told of no site.
    """

    def __init__(self, capture: ParameterCapture | None = None) -> None:
        super().__init__()
        self.capture = capture
        self._silenced: list[MarkovMessenger] = []
        self._scale: Tensor | None = None

    def follow(self, model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Run a model, and trace what it does."""
        with self:
            model(*args, **kwargs)

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "param":
            if self.capture is not None:
                self.capture.before(msg)
            return
        for handler in _PYRO_STACK:
            if type(handler) is MarkovMessenger and not self._others_enumerate():
                handler.__class__ = _Silent  # from the next site on
                self._silenced.append(handler)

    def _others_enumerate(self) -> bool:
        """Whether another handler around the present site asks for scopes, as one in a model may."""
        return any(isinstance(h, EnumMessenger) and h is not self for h in _PYRO_STACK)

    def __exit__(self, *exception: Any) -> None:
        for handler in self._silenced:  # a context that outlives the run counts in later ones
            handler.__class__ = MarkovMessenger
        self._silenced.clear()
        super().__exit__(*exception)

    def _postprocess_message(self, msg: Any) -> None:
        name, nodes = msg["name"], self.trace.nodes
        if msg["type"] != "sample" or msg["infer"].get("_do_not_trace") or name in nodes:
            super()._postprocess_message(msg)
            capture = self.capture if msg["type"] == "param" else None
            if capture is not None and capture.noted.get(name) is not msg["value"]:
                capture.after(msg)
        else:
            if isinstance(msg["scale"], Tensor):
                msg["scale"] = self._held_once(msg["scale"])
            nodes[name] = msg.copy()

    def _held_once(self, scale: Tensor) -> Tensor:
        """The scale of the site before, where this one has the same: handlers make one at each site."""
        is_plain = scale.__class__ is Tensor and not (scale.is_meta or scale.requires_grad)
        if not is_plain or scale.numel() < _MANY_ROWS:
            return scale
        before, self._scale = self._scale, scale
        if before is not None and _form(before) == _form(scale):
            with Unwatched():
                if torch.equal(before, scale):
                    self._scale = before
        return self._scale


def _form(t: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return t.shape, t.dtype, t.device


class WatchingTrace(LeanTrace):
    """The same, refusing what is no distribution, noting plates of size zero, by which Pyro divides,
    and masks.

    Args:
        capture: As `LeanTrace` takes it.

    Attributes:
        empty: Names of empty plates.
        at_large: What is done about a site that asks for a draw of many numbers; None for nothing.

    Raises:
        ModelError: From the midst of a run, at the first site whose distribution is none of Pyro's.
    """

    def __init__(self, capture: ParameterCapture | None = None) -> None:
        super().__init__(capture)
        self.empty: list[str] = []
        self.at_large: AtLarge | None = None
        self._masks: list[tuple[str, Tensor, int]] = []

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        fn = msg["fn"]
        if msg["type"] != "sample":
            return
        if not isinstance(fn, TorchDistributionMixin):
            require_distribution(msg["name"], fn)
            if type(fn).__name__ == "_Subsample" and fn.size == 0:
                self.empty.append(msg["name"])
        elif self.at_large is not None and asks_for_many(msg):
            self.at_large(msg)

    def _postprocess_message(self, msg: Any) -> None:
        super()._postprocess_message(msg)
        if isinstance(msg["mask"], Tensor):
            self._masks.append((msg["name"], msg["mask"], msg["mask"]._version))

    def changed_masks(self) -> tuple[str, ...]:
        """Names of the sites whose mask was written after them."""
        return tuple(name for name, mask, version in self._masks if mask._version != version)


class TaggingTrace(LeanTrace):
    """The same, of values that carry the names of their sites; observed ones keep what they carry.

    Args:
        values: Values of unobserved sites, which are not drawn again.
        capture: As `LeanTrace` takes it.
    """

    def __init__(self, values: Mapping[str, Tensor], capture: ParameterCapture) -> None:
        super().__init__(capture)
        self.values = values

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        if msg["name"] in self.values and not (msg["done"] or msg["is_observed"]):
            msg["value"] = self.values[msg["name"]]

    def _postprocess_message(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and msg["type"] == "sample" and is_factor(msg):
            before: frozenset[str] = frozenset()
            if isinstance(value, Tagged) and not is_latent(msg):
                before = value._provenance
            msg["value"] = Tagged(getattr(value, "_t", value), before | {msg["name"]})
        super()._postprocess_message(msg)


class EnumTrace(LeanTrace, EnumMessenger):
    """``poutine.trace`` around ``poutine.enum`` as one, without a context manager at each site.

    Args:
        first_available_dim: As ``poutine.enum`` takes it.
        latents: The sites to enumerate, whatever the model says of them; None for those that it
            marks.
        kept: Values of unobserved sites that are not enumerated.
        capture: What captures parameters.
        clamped: Sites with ``obs_mask`` whose value is that of their unobserved part in all rows.

    Attributes:
        draws: A block in which each latent is drawn before it is enumerated, and Gaussian ones that
            have values are drawn for nothing but the random state; None for no draws.
        met: Called with each site of a distribution once it is traced; None for nothing.
        aside: A block whose operations are none of the model's.
        made: Called there with a value that was made there, and its form; None for nothing.
    """

    made: Callable[[Tensor, tuple[Any, ...]], None] | None = None
    draws: Aside | None = None
    met: Met | None = None
    aside: Aside = nullcontext()

    def __init__(
        self,
        first_available_dim: int,
        latents: frozenset[str] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        capture: ParameterCapture | None = None,
        clamped: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(capture)
        self.clamped = clamped
        self.first_available_dim = first_available_dim
        self.latents, self.kept = latents, kept or {}
        self._supports: dict[tuple[Any, ...], Tensor] = {}
        # Kinds of distributions that ``met`` has done with.
        self._passed: set[tuple[Any, ...]] = set()

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            super()._process_message(msg)
            return
        if not msg["done"] and type(msg["fn"]).__name__ != "_Subsample":
            self._note_scope(msg)
        super()._process_message(msg)
        name, infer = msg["name"], msg["infer"]
        if name in self.clamped and infer.get("_deterministic"):
            both, own = msg["value"], self.trace.nodes[f"{name}_unobserved"]["value"]
            msg["value"] = own if own.dtype == both.dtype else own.to(both.dtype)
        if name in self.kept and not msg["done"] and is_latent(msg):
            # Not marked as done: the site's scope has still to be noted.
            msg["value"] = self.kept[name]
        if self.latents is not None:
            if name in self.latents and not msg["is_observed"]:
                if self.draws is not None and not msg["done"] and msg["value"] is None:
                    with self.draws:
                        msg["fn"](*msg["args"], **msg["kwargs"])
                infer["enumerate"] = "parallel"
                infer.pop("num_samples", None)
            else:
                infer.pop("enumerate", None)
        if self.draws is not None and ROLE in infer and role_of(msg) is Role.GAUSSIAN:
            with self.draws:
                _draw_as_at_first(msg)
        if infer.get("enumerate") != "parallel" or not _is_all_of_categorical(msg):
            _enumerate(self, msg)
            return
        infer["enumerate"] = None
        _enumerate(self, msg)  # which notes the site's scope
        infer["enumerate"] = "parallel"
        self._enumerate_categorical(msg)

    def _note_scope(self, msg: Any) -> None:
        """Count the sites in a site's ``pyro.markov`` contexts for those that have been silenced."""
        infer = msg["infer"]
        for handler in reversed(_PYRO_STACK):
            if handler is self:
                return
            if type(handler) is not _Silent:
                continue
            scope, pos = infer.setdefault("_markov_scope", {}), handler._pos
            for names in handler._stack[max(0, pos - handler.history) : pos + 1]:
                for name in names:
                    scope[name] = scope.get(name, 0) + 1
            infer["_markov_depth"] = 1 + infer.get("_markov_depth", 0)
            handler._stack[pos].add(msg["name"])

    def _enumerate_categorical(self, msg: Any) -> None:
        """All values of a Categorical, as Pyro lays them out: a copy of those of an earlier site."""
        infer, fn = msg["infer"], msg["fn"]
        scope = infer.get("_markov_scope")
        dim, number = _ENUM_ALLOCATOR.allocate(
            None if scope is None else set(self._param_dims[msg["name"]])
        )
        with self.aside:
            form = fn._num_events, dim, fn._param.device
            if form not in self._supports:
                support = torch.arange(form[0], device=form[2])
                self._supports[form] = support.reshape(-1, *(1,) * (-1 - dim))
            value = self._supports[form].clone()
            if self.made is not None:
                self.made(value, ("support", *form))
        value._pyro_categorical_support = id(fn)  # type: ignore[attr-defined]
        infer["_enumerate_dim"], infer["_dim_to_id"] = dim, {dim: number}
        msg["value"], msg["done"] = value, True

    def _postprocess_message(self, msg: Any) -> None:
        super()._postprocess_message(msg)
        value = msg["value"]
        if msg["type"] != "sample" or value is None:
            return
        if not isinstance(msg["fn"], TorchDistributionMixin):
            return
        ids = msg["infer"].setdefault("_dim_to_id", {})
        ids.update(self._param_dims.get(msg["name"], {}))
        if "_markov_scope" in msg["infer"]:  # else no site looks for what it takes up
            with torch._C.DisableTorchFunction():
                shape = value.shape
            n = len(shape) - msg["fn"].event_dim
            shape = shape[:n]
            self._value_dims[msg["name"]] = {
                dim: i for dim, i in ids.items() if n >= -dim and shape[dim] > 1
            }
        site = None if self.met is None else self.trace.nodes.get(msg["name"])
        if site is None or self.met is None:
            return
        kind = type(site["fn"]), site["fn"].batch_shape, site["fn"].event_shape
        if kind not in self._passed and not self.met(site, self.aside):
            self._passed.add(kind)


def asks_for_many(msg: Any) -> bool:
    """Whether many numbers are to be drawn at a site."""
    return not msg["done"] and msg["value"] is None and msg["fn"].shape().numel() >= _LARGE


def _draw_as_at_first(msg: Any) -> None:
    """Draw as many numbers as the first run of a model does for a Gaussian latent."""
    shape = msg["fn"].shape()
    torch.normal(msg["value"].new_zeros(shape), msg["value"].new_ones(shape))


def _is_all_of_categorical(msg: Any) -> bool:
    """Whether the values of a site are all of a Categorical, along a dimension of its own."""
    if msg["done"] or msg["is_observed"] or type(msg["fn"]) is not Categorical:
        return False
    return msg["infer"].get("num_samples") is None and not msg["infer"].get("expand")


@contextmanager
def in_front_of(msg: Any, name: str) -> Iterator[None]:
    """A site that a handler samples in front of the one that it handles, which may read it.

    A ``pyro.markov`` context inside the handler knows the site at hand already: it must not be in the
    scope of the one in front, but the other way about.

    Args:
        msg: The message of the site at hand.
        name: The name of the site in front of it.
    """
    contexts = [h for h in _PYRO_STACK if isinstance(h, MarkovMessenger)]
    holding = [h for h in contexts if h._stack and msg["name"] in h._stack[h._pos]]
    for h in holding:
        h._stack[h._pos].discard(msg["name"])
    try:
        yield
    finally:
        for h in holding:
            h._stack[h._pos].add(msg["name"])
    if holding:
        msg["infer"]["_markov_scope"][name] = msg["infer"]["_markov_depth"]


# Without the block that silences warnings of torch.jit, which traces nothing here.
_enumerate = getattr(EnumMessenger._pyro_sample, "__wrapped__", EnumMessenger._pyro_sample)
