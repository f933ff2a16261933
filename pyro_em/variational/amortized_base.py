"""What the amortised guides share: finding latents and what they see, encoding, sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyro_em.distributions import depends_on_tensors, element_mask, unwrap
from pyro_em.errors import DataError, UsageError, message
from pyro_em.tracing.sites import is_latent, is_subsample, tensors_of
from pyro_em.variational.encoder import (
    MLP,
    Call,
    CoveredSite,
    Encoder,
    Key,
    PlateIndices,
    argument_holding,
    argument_items,
    as_features,
    call_signature,
    covered_site,
    declared_plate,
    features_of,
    is_data,
    scale_beside_plates,
)


class AutoAmortized(AutoGuide):
    """What the amortised guides share: finding latents and features, encoding, sampling."""

    master: Any
    prototype_trace: Any

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Encoder | Mapping[str, Encoder] | None = None,
        hidden: Sequence[int] = (64,),
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(self._prepared(model), create_plates=create_plates)
        self.hidden = tuple(hidden)
        self._shared = encoder is not None and not isinstance(encoder, Mapping)
        self._given = tuple(encoder) if isinstance(encoder, Mapping) else ()
        self.encoder = encoder if self._shared else PyroModule()
        for name in self._given:
            deep_setattr(self.encoder, name, encoder[name])  # type: ignore[index]
        self._sites: dict[str, CoveredSite] = {}
        self._sources: dict[str, tuple[Key, int, int]] | None = None
        self._signature: tuple = ()

    # What the two guides do differently.

    def _prepared(self, model: Callable[..., Any]) -> Callable[..., Any]:
        return model

    def _covers(self, fn: Any) -> bool:
        raise NotImplementedError

    def _outputs(self, node: dict[str, Any]) -> int:
        """Number of outputs that the parameters of one element need."""
        raise NotImplementedError

    def _local(self, prior: Any, outputs: Tensor) -> Any:
        """The distribution with parameters ``outputs``, (*batch, outputs)."""
        raise NotImplementedError

    def _add_global(self, node: dict[str, Any]) -> None:
        """Create the parameters of a latent outside every plate."""
        raise NotImplementedError

    def _global(self, name: str, prior: Any) -> Any:
        """The distribution of a latent outside every plate."""
        raise NotImplementedError

    def _centre(self, fn: Any) -> Tensor:
        """The median of a distribution of this guide."""
        raise NotImplementedError

    # The interface of Pyro's autoguides.

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent that the guide covers; takes the arguments of the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        call = self._look(args, kwargs, self._create_plates(*args, **kwargs))
        values = {}
        for name, node in call.latents.items():
            with ExitStack() as stack:
                for plate, _ in self._sites[name].plates:
                    stack.enter_context(call.plates[plate])
                # What the model weighs or masks, the guide has to weigh and mask alike.
                scale = scale_beside_plates(node)
                if isinstance(scale, Tensor) or scale != 1.0:
                    stack.enter_context(poutine.scale(scale=scale))
                if node["mask"] is not None:
                    stack.enter_context(poutine.mask(mask=node["mask"]))
                values[name] = pyro.sample(name, self._distribution(name, call))
        return values

    @pyro_method
    def posterior(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The distribution q(h_n | x_n) of every latent, with batch shape ``plates``."""
        with poutine.block():
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            plates = {} if self.master is not None else self._create_plates(*args, **kwargs)
            call = self._look(args, kwargs, plates)
            return {name: self._distribution(name, call) for name in call.latents}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every continuous latent, the mode of every discrete one."""
        return {n: self._centre(fn) for n, fn in self.posterior(*args, **kwargs).items()}

    def attach(self, model: Callable[..., Any]) -> None:
        """Give a guide its model again after unpickling, which (as in Pyro) leaves it behind."""
        self._model = (self._prepared(model),)

    # Copies and pickles. Pyro's own version takes the model away from the original, too.

    def __getstate__(self) -> dict[str, Any]:
        model, master = self._model, self.master
        for node in self.prototype_trace.nodes.values() if self.prototype_trace else ():
            for tensor in tensors_of(node["fn"]):
                vars(tensor).pop("unconstrained", None)  # a weak reference, as PyroModule does
        state = {**super().__getstate__()}
        self._model, self.master = model, master
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoAmortized:
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model = self._model
        return new

    # The first call.

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace, picking = self._run(args, kwargs, {}, frozenset())
        data = {n: s for n, s in trace.nodes.items() if is_data(s)}
        prototype = poutine.Trace()
        for name, node in trace.nodes.items():
            if is_latent(node) and self._covers(node["fn"]):
                prototype.add_node(name, **node)
        self._sites = {name: covered_site(node, data) for name, node in prototype.nodes.items()}
        local = [name for name, site in self._sites.items() if site.plates]
        if not set(self._given) <= set(local):
            where = f"encoder of site '{min(set(self._given) - set(local))}'"
            what = f"{type(self).__name__} covers no latent of that name inside a plate."
            raise UsageError(message(where, what, fixes=[f"choose from {local}"]))
        call = self._from_trace(trace, {})
        for name in self._sites:
            if name in local:
                self._add_encoder(name, call)
            else:
                self._add_global(prototype.nodes[name])
        self._sources = self._find_sources(trace.nodes, picking, args, kwargs)
        self._signature = call_signature(args, kwargs)
        if self.master is not None:
            self.master()._check_prototype(prototype)
        self.prototype_trace = prototype

    def _add_encoder(self, name: str, call: Call) -> None:
        outputs, features = self._outputs(call.latents[name]), features_of(name, self._sites, call)
        if not self._shared and name not in self._given:
            deep_setattr(self.encoder, name, MLP(features, self.hidden))
        with torch.no_grad():
            encoded = self._encoder(name)(features)
        if encoded.shape[:-1] != features.shape[:-1]:
            what = f"it maps features {tuple(features.shape)} to {tuple(encoded.shape)}."
            why = "one vector per element of the latent's plates is needed"
            fix = f"return a tensor of shape {(*features.shape[:-1], 'H')}"
            raise UsageError(message(f"encoder of site '{name}'", what, why, [fix]))
        like = {"dtype": encoded.dtype, "device": encoded.device}
        head = PyroModule[nn.Linear](encoded.shape[-1], outputs, **like)
        nn.init.zeros_(head.weight)  # the guide begins with one distribution for all data
        nn.init.zeros_(head.bias)
        deep_setattr(self, f"heads.{name}", head)

    def _find_sources(
        self, nodes: Mapping[str, Any], picking: set[str], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, tuple[Key, int, int]] | None:
        """Which argument each observed value is, with its dims and event dims; None if not all are.

        Where they are, no later call has to run the model, whose decoder may be costly.
        """
        for node in (nodes[name] for name in self._sites):
            weighted = isinstance(node["scale"], Tensor) or node["scale"] != 1.0
            if weighted or node["mask"] is not None or depends_on_tensors(node["fn"].support):
                return None
            if any(f.name in picking or f.size < 0 for f in node["cond_indep_stack"]):
                return None
        sources = {}
        for name in {name for site in self._sites.values() for name in site.observed}:
            value, event_dim = nodes[name]["value"], nodes[name]["fn"].event_dim
            key = argument_holding(value, args, kwargs)
            if key is None or nodes[name]["mask"] is not None:
                return None
            if value.shape[: value.dim() - event_dim] != nodes[name]["fn"].batch_shape:
                return None
            sources[name] = (key, value.dim(), event_dim)
        return sources

    # Every call.

    def _run(
        self, args: tuple, kwargs: dict[str, Any], given: Mapping[str, Any], shown: frozenset[str]
    ) -> tuple[Any, set[str]]:
        """Run the model hidden from outer handlers, except for the indices of the plates ``shown``."""
        if self._model is None:
            what = "it has to run its model, which pickling leaves behind."
            fixes = ["call guide.attach(model) after loading"]
            raise UsageError(message(type(self).__name__, what, fixes=fixes))
        hide = poutine.block(hide_fn=lambda m: not (is_subsample(m) and m["name"] in shown))
        watch = PlateIndices({name: plate.indices for name, plate in given.items()})
        with torch.no_grad(), hide, poutine.trace() as tracer, watch:
            self.model(*args, **kwargs)
        return tracer.trace, watch.picking

    def _look(self, args: tuple, kwargs: dict[str, Any], plates: dict[str, Any]) -> Call:
        call = self._from_arguments(args, kwargs, plates)
        if call is None:
            names = {name for site in self._sites.values() for name, _ in site.plates}
            # The model's own plates draw the indices, in sight of the handlers of the guide, so
            # that they are replayed and recorded as those of a plate of the guide are.
            trace, _ = self._run(args, kwargs, plates, frozenset(names - set(plates)))
            call = self._from_trace(trace, plates)
        return call

    def _from_arguments(
        self, args: tuple, kwargs: dict[str, Any], given: dict[str, Any]
    ) -> Call | None:
        if self._sources is None or call_signature(args, kwargs) != self._signature:
            return None
        if any(plate.size != plate.subsample_size for plate in given.values()):
            return None
        arguments = dict(argument_items(args, kwargs))
        observed: dict[str, tuple[Tensor, int]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for name, (key, dims, event_dim) in self._sources.items():
            if arguments[key].dim() != dims:
                return None
            observed[name] = (as_features(arguments[key]), event_dim)
        for site in self._sites.values():
            for plate, dim in site.plates:
                lengths = {observed[n][0].shape[dim - observed[n][1]] for n in site.observed}
                lengths.add(sizes.setdefault(plate, (min(lengths), dim))[0])
                if len(lengths) > 1:
                    return None
        plates = {n: pyro.plate(n, s, dim=d) for n, (s, d) in sizes.items() if n not in given}
        return Call({**plates, **given}, observed, dict(self.prototype_trace.nodes))

    def _from_trace(self, trace: Any, given: dict[str, Any]) -> Call:
        # A latent may be missing in another branch of the model, or observed in this call.
        nodes = {n: trace.nodes[n] for n in self._sites if n in trace.nodes}
        latents = {n: node for n, node in nodes.items() if is_latent(node)}
        plates, observed = dict(given), {}
        for frame in (f for node in latents.values() for f in node["cond_indep_stack"]):
            if frame.name not in plates:
                plates[frame.name] = declared_plate(frame, trace)
        for name in {name for site in self._sites.values() for name in site.observed}:
            node = trace.nodes.get(name)
            if node is not None and is_data(node):
                fn, value = node["fn"], torch.as_tensor(node["value"])
                event = value.shape[value.dim() - fn.event_dim :]
                value = as_features(value.expand(fn.batch_shape + event))
                mask = element_mask(fn, node["mask"])
                if isinstance(mask, Tensor):
                    event_dims = fn.event_dim - unwrap(fn)[1]
                    value = torch.where(mask.reshape(mask.shape + (1,) * event_dims), value, 0.0)
                observed[name] = (value, fn.event_dim)
        return Call(plates, observed, latents)

    def _encoder(self, name: str) -> Any:
        return self.encoder if self._shared else attrgetter(name)(self.encoder)

    def _distribution(self, name: str, call: Call) -> Any:
        site, prior = self._sites[name], call.latents[name]["fn"]
        if not site.plates:
            return self._global(name, prior)
        features, encoder = features_of(name, self._sites, call), self._encoder(name)
        if isinstance(encoder, MLP) and features.shape[-1] != len(encoder.mean):
            what = f"{features.shape[-1]} numbers per element; the first call had "
            why = f"the encoder reads all of {list(site.observed)} that belongs to one element"
            fixes = ["pass an encoder that takes any number of features", "make a new guide"]
            where = f"features of site '{name}'"
            raise DataError(message(where, f"{what}{len(encoder.mean)}.", why, fixes))
        head = attrgetter(f"heads.{name}")(self)
        outputs = head(encoder(features).to(head.weight.dtype)).to(site.dtype)
        batch = [1] * -site.plates[0][1]
        for (_, dim), size in zip(site.plates, features.shape, strict=False):
            batch[dim] = size
        return self._local(prior, outputs.reshape(*batch, outputs.shape[-1]))
