"""Tensors that carry the names of the sites whose values reached them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor, get_provenance
from torch.utils._pytree import tree_map

from pyro_em.tracing.mixing import Mixing
from pyro_em.tracing.sites import tensors_of_each

watched_mixing: ContextVar[Mixing | None] = ContextVar("mixing", default=None)


def _is_tagged(value: Any) -> bool:
    return isinstance(value, ProvenanceTensor)


class Tagged(ProvenanceTensor):
    """Pyro's tensor with provenance, at a tenth of the time per operation."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        """Run an operation on the values; its outputs carry the tags of all inputs."""
        if func in _SHAPES and type(args[0]) is cls:
            return func(args[0]._t, *args[1:], **(kwargs or {}))  # type: ignore[no-any-return]
        tags: frozenset[str] = frozenset()
        plain = []
        for a in args:
            kind = type(a)
            if kind is cls:
                own = a._provenance
                tags = own if not tags or tags is own else tags | own
                plain.append(a._t)
            elif kind is torch.Tensor or kind in _NUMBERS:
                plain.append(a)
            else:
                more: set[str] = set()
                plain.append(_untagged(a, more))
                tags = tags | more if more else tags
        if kwargs:
            named: set[str] = set()
            out = func(*plain, **{k: _untagged(a, named) for k, a in kwargs.items()})
            tags = tags | named
        else:
            out = func(*plain)
        mixing = watched_mixing.get()
        if mixing is not None:
            mixing.see(func, args, kwargs or {}, tags, _is_tagged, out)
        return _with_tags(out, tags) if type(out) is torch.Tensor else _tagged(out, tags)


@contextmanager
def looking_away() -> Iterator[None]:
    """A block of operations known to take elements of plates each by itself; tags go on."""
    token = watched_mixing.set(None)
    try:
        yield
    finally:
        watched_mixing.reset(token)


@contextmanager
def looking_at(mixing: Mixing) -> Iterator[None]:
    """A block in which every operation on tagged tensors is seen."""
    token = watched_mixing.set(mixing)
    try:
        yield
    finally:
        watched_mixing.reset(token)


def tags_of(value: Any) -> frozenset[str]:
    """The tags that a value carries."""
    if isinstance(value, ProvenanceTensor):
        return value._provenance
    if isinstance(value, torch.Tensor) or type(value) in _NUMBERS:
        return frozenset()
    return get_provenance(value)


def scopes_of(factors: Mapping[str, Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Per site of a run with tagged values the other sites that reach it."""
    scopes = {}
    tensors = tensors_of_each([site["fn"] for site in factors.values()])
    for (name, site), own in zip(factors.items(), tensors, strict=True):
        held = [*own, site["mask"], site["scale"]]
        scope = frozenset().union(*map(tags_of, held))
        if site["is_observed"]:
            scope |= tags_of(site["value"]) - {name}
        scopes[name] = scope
    return scopes


def _with_tags(value: torch.Tensor, tags: frozenset[str]) -> torch.Tensor:
    if not tags:
        return value
    out = value.as_subclass(Tagged)  # type: ignore[arg-type]
    out._t, out._provenance = value, tags  # type: ignore[attr-defined]
    return out


_NUMBERS = (int, float, bool, type(None))


# What tells of a tensor's form and of no number in it.
_SHAPES = frozenset(
    {
        torch.Tensor.dim,
        torch.Tensor.size,
        torch.Tensor.numel,
        torch.Tensor.stride,
        torch.Tensor.is_floating_point,
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,  # type: ignore[attr-defined]
        torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    }
)


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
