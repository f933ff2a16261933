"""The network of an amortised guide: which data it reads, in which shape, for which site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_em.distributions import unwrap
from pyro_em.errors import DataError, ModelError, message
from pyro_em.tracing.sites import is_subsample

Encoder = Callable[[Tensor], Tensor]

Key = int | str


@dataclass(frozen=True)
class CoveredSite:
    """A latent that a guide covers.

    Attributes:
        plates: Names and dims of its plates, from left to right.
        observed: The observed sites that are its features.
        dtype: That of its parameters.
    """

    plates: tuple[tuple[str, int], ...]
    observed: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Call:
    """What a guide needs to know of one call of the model.

    Attributes:
        plates: The plates of the latents, with this call's sizes.
        observed: Per observed site its value, (*batch, *event), and its number of event dims.
        latents: The model's traced sites of the latents.
    """

    plates: dict[str, Any]
    observed: dict[str, tuple[Tensor, int]]
    latents: dict[str, Any]


class PlateIndices(Messenger):
    """Gives plates their indices, and records which plates draw part of their elements."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given = given
        self.picking: set[str] = set()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not is_subsample(msg):
            return
        if msg["value"] is not None or msg["fn"].subsample_size is not None:
            self.picking.add(msg["name"])
        if msg["name"] in self.given:
            msg["value"], msg["done"] = self.given[msg["name"]], True


class MLP(PyroModule):
    """Features (*plates, F), standardised as those of the first call are, through softplus layers.

    Standardising keeps large values, such as counts in the hundreds, where the network can learn;
    softplus keeps new data that lie far out apart, where tanh would not.
    """

    def __init__(self, features: Tensor, widths: Sequence[int]) -> None:
        super().__init__()
        flat = features.detach().reshape(-1, features.shape[-1])
        mean, std = flat.mean(0), flat.std(0, unbiased=False)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(std > 0, std, mean.abs().clamp(min=1.0)))
        like = {"dtype": features.dtype, "device": features.device}
        layers: list[nn.Module] = []
        for inward, outward in zip((flat.shape[-1], *widths), widths, strict=False):
            layers += [PyroModule[nn.Linear](inward, outward, **like), PyroModule[nn.Softplus]()]
        self.layers = PyroModule[nn.Sequential](*layers)

    def forward(self, features: Tensor) -> Tensor:
        """The last hidden layer. # (*plates, F) -> (*plates, widths[-1])"""
        return self.layers((features.to(self.mean.dtype) - self.mean) / self.scale)


def covered_site(node: Mapping[str, Any], data: Mapping[str, Any]) -> CoveredSite:
    """A latent and the observed sites inside its plates.

    Raises:
        ModelError: If a plate is sequential, or nothing is observed inside the plates.
    """
    where, frames = f"site '{node['name']}'", node["cond_indep_stack"]
    plates = tuple(sorted(((f.name, f.dim) for f in frames if f.vectorized), key=lambda p: p[1]))
    names = {f.name for f in frames}
    if len(plates) < len(frames):
        why = "its elements are separate latents, and one encoder has to see them all"
        fixes = ["write 'with pyro.plate(...)' instead of 'for i in pyro.plate(...)'"]
        raise ModelError(message(where, "it is inside a sequential plate.", why, fixes))
    inside = {n: {f.name for f in s["cond_indep_stack"]} for n, s in data.items()}
    observed = tuple(n for n in data if names <= inside[n]) if names else ()
    if names and not observed:
        what = f"nothing is observed inside its plates {sorted(names)}."
        why = "an amortised guide computes an element's posterior from that element's data"
        fixes = ["observe a site inside these plates", "use AutoNormal for this latent"]
        raise ModelError(message(where, what, why, fixes))
    return CoveredSite(plates, observed, floats(node).dtype)


def floats(node: Mapping[str, Any]) -> Tensor:
    """A tensor with dtype and device of a latent's value or, if discrete, of its probabilities."""
    tensors = [node["value"], *vars(unwrap(node["fn"])[0]).values()]
    return next(t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())


def is_data(site: Mapping[str, Any]) -> bool:
    """Whether a traced site holds observed numbers; ``pyro.factor`` holds none."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    return not site["infer"].get("_deterministic", False) and 0 not in site["fn"].event_shape


def features_of(name: str, sites: Mapping[str, CoveredSite], call: Call) -> Tensor:
    """The observed values of each element of a latent's plates, (*plates, F)."""
    parts = []
    for data in sites[name].observed:
        if data not in call.observed:
            why = f"the encoder of '{name}' reads it"
            text = message(f"site '{data}'", "it is not observed in this call.", why, ["pass data"])
            raise DataError(text)
        value, event_dim = call.observed[data]
        front = [value.dim() - event_dim + dim for _, dim in sites[name].plates]
        rest = [i for i in range(value.dim()) if i not in front]
        sizes = [value.shape[i] for i in front]
        parts.append(value.permute(*front, *rest).reshape(*sizes, -1))
    return torch.cat(parts, -1)


def as_features(value: Tensor) -> Tensor:
    """Data as floats, with 0 for what is NaN or infinite."""
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


def scale_beside_plates(node: Mapping[str, Any]) -> Any:
    """The scale that a latent has in the model for other reasons than subsampling."""
    frames = node["cond_indep_stack"]
    return node["scale"] / math.prod(f.full_size / f.size for f in frames if f.size > 0)


def argument_items(args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Key, Any]]:
    """The arguments of a call, each with its position or its name."""
    return [*enumerate(args), *sorted(kwargs.items())]


def call_signature(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """What has to stay the same for a model to use its arguments as it did before."""
    return tuple(
        (key, a if isinstance(a, bool | str | None) else type(a))
        for key, a in argument_items(args, kwargs)
    )


def argument_holding(value: Any, args: tuple, kwargs: Mapping[str, Any]) -> Key | None:
    """The one argument that is ``value``; None if there is none or several."""

    def place(t: Tensor) -> tuple:
        return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device

    tensors = [(k, a) for k, a in argument_items(args, kwargs) if isinstance(a, Tensor)]
    keys = [k for k, a in tensors if isinstance(value, Tensor) and place(a) == place(value)]
    return keys[0] if len(keys) == 1 else None


def declared_plate(frame: Any, trace: Any) -> Any:
    """A plate as the model has it, whose indices the guide's trace holds already."""
    with poutine.block():
        if frame.name not in trace.nodes:
            return pyro.plate(frame.name, dim=frame.dim)
        indices = trace.nodes[frame.name]["value"]
        return pyro.plate(frame.name, frame.full_size, subsample=indices, dim=frame.dim)
