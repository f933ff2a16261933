"""From factors to groups: factors of equal form are stacked along a dimension of members."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.families.family import Family
from pyro_em.graph.bindings.binding import Binding, each_alone
from pyro_em.graph.bindings.binding import joined as joined_bindings
from pyro_em.graph.factors import Group
from pyro_em.graph.structure import SiteInfo


@dataclass(frozen=True, eq=False)
class Factor:
    """One site's log density over its plates and its latents, ready to be stacked."""

    info: SiteInfo
    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    family: Family | None
    event_dims: int
    arguments: dict[str, Tensor]
    bindings: dict[str, Binding]
    value: Tensor
    mask: Tensor | None
    scale: Tensor | float
    raw: Tensor | None
    raw_params: tuple[str, ...] | None
    value_binding: Binding | None
    elements: Tensor | None
    hyperparameters: tuple[tuple[str, str], ...] = ()
    edges: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two factors must share at least to be stacked."""
        if self.family is None:
            return ("single", self.info.name)
        return self.family.distribution, self.info.role, self.sizes

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two factors must share to be stacked."""
        if self.family is None:
            return self.kind
        return (
            self.family.distribution,
            self.info.role,
            len(self.info.plates),
            self.sizes,
            self.event_dims,
            tuple(self.value.shape),
            self.value.dtype,
            self.raw_params,
            None if self.mask is None else tuple(self.mask.shape),
            None if self.elements is None else tuple(self.elements.shape),
            None if self.value_binding is None else form_of_binding(self.value_binding),
            tuple(
                (name, tuple(self.arguments[name].shape), *form_of_binding(b))
                for name, b in self.bindings.items()
            ),
        )


def form_of_binding(binding: Binding) -> tuple[Any, ...]:
    """What two bindings must share to be stacked."""
    parts = tuple(
        (s.param, tuple(m.name for m in s.maps), s.factor is None) for s in binding.selections
    )
    kind = (binding.how, binding.normalise, binding.link, binding.logs, binding.expression)
    return (*kind, binding.params, parts, tuple(binding.pairs or ()))


def forms_of_bindings(groups: Iterable[Group]) -> list[Any]:
    """How parameters reach the arguments of each group, without the numbers."""
    return [(g.members, [(a, form_of_binding(b)) for a, b in g.bindings.items()]) for g in groups]


@dataclass(frozen=True, eq=False)
class Batch:
    """Factors of equal form and equal bindings, stacked.

    Attributes:
        first: The first of them.
        members: Their sites, in model order.
        dims: For each member the names of its dimensions.
        arguments: See `Group`.
        bindings: See `Group`.
        value: See `Group`.
    """

    first: Factor
    members: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    arguments: Mapping[str, Tensor]
    bindings: Mapping[str, Binding]
    value: Tensor


def stacked(pieces: Sequence[Factor | Batch], order: Mapping[str, int]) -> list[Group]:
    """Groups of equal signature, in the order of their first members.

    Args:
        pieces: All factors.
        order: The place of each site in the model.
    """
    pieces = sorted(pieces, key=lambda p: order[_first(p).info.name])
    firsts = [_first(p) for p in pieces]
    kinds = [f.kind for f in firsts]
    if len(set(kinds)) == len(kinds):  # none is stacked with another
        return [_of_batch(p) if isinstance(p, Batch) else _of_one(p) for p in pieces]
    by_signature: dict[tuple[Any, ...], list[Factor | Batch]] = {}
    for p, f in zip(pieces, firsts, strict=True):
        by_signature.setdefault(f.signature, []).append(p)
    groups = []
    for members in by_signature.values():
        factors = [m for m in members if isinstance(m, Factor)]
        if len(factors) == len(members):
            groups.append(_group(factors))
        else:
            groups.append(_of_batches(members, order))
    return groups


def _first(piece: Factor | Batch) -> Factor:
    return piece.first if isinstance(piece, Batch) else piece


def _of_batches(pieces: Sequence[Factor | Batch], order: Mapping[str, int]) -> Group:
    """A group of batches and of factors that were laid out by themselves."""
    groups = [_of_batch(p) if isinstance(p, Batch) else _of_one(p) for p in pieces]
    first = groups[0]
    if len(groups) == 1:
        return first
    names = [n for g in groups for n in g.members]
    place = sorted(range(len(names)), key=lambda i: order[names[i]])
    dims = [d for g in groups for d in g.dims]
    scale = [s for g in groups for s in g.scale]
    into = torch.empty(len(place), dtype=torch.long)
    into[torch.tensor(place)] = torch.arange(len(place))

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return _joined_in_order(parts, into)

    bindings = {a: joined_bindings([g.bindings[a] for g in groups], joined) for a in first.bindings}
    return replace(
        first,
        members=tuple(names[i] for i in place),
        dims=tuple(dims[i] for i in place),
        arguments={
            # One binding of all says that the arguments are one function of the parameters.
            a: _repeated(first.arguments[a][:1], len(names))
            if b.is_one_for_all
            else joined([g.arguments[a] for g in groups])
            for a, b in bindings.items()
        },
        bindings=bindings,
        value=joined([g.value for g in groups]),
        scale=tuple(scale[i] for i in place),
    )


def _joined_in_order(parts: Sequence[Tensor], into: Tensor) -> Tensor:
    """Stacks of members as one, each member put where it belongs; kept once where all are equal."""
    into, n = into.to(parts[0].device), len(into)
    if any(p.requires_grad for p in parts):
        return torch.cat(list(parts)).index_select(0, into.argsort())
    one = parts[0][:1]
    if all(len(p) == 1 or p.stride(0) == 0 for p in parts) and all(
        torch.equal(p[:1], one) for p in parts[1:]
    ):
        return _repeated(one, n)
    out = one.new_empty((n, *one.shape[1:]))
    begin = 0
    for p in parts:
        out.index_copy_(0, into[begin : begin + len(p)], p)
        begin += len(p)
    return out


def _repeated(one: Tensor, n: int) -> Tensor:
    return one.expand(n, *one.shape[1:])


def _of_batch(batch: Batch) -> Group:
    one, n = _of_one(batch.first), len(batch.members)
    return replace(
        one,
        members=batch.members,
        dims=batch.dims,
        arguments=batch.arguments,
        bindings=batch.bindings,
        value=batch.value,
        scale=tuple(one.scale) * n,
    )


def _group(members: Sequence[Factor]) -> Group:
    if len(members) == 1:
        return _of_one(members[0])
    first = members[0]
    n = len(first.info.plates)
    masks = [f.mask for f in members if f.mask is not None]
    elements = [f.elements for f in members if f.elements is not None]
    return Group(
        tuple(f.info.name for f in members),
        tuple(f.dims for f in members),
        n,
        first.sizes,
        first.family,
        first.event_dims,
        {a: _stack_tensors([f.arguments[a] for f in members]) for a in first.arguments},
        {
            a: joined_bindings([f.bindings[a] for f in members], _stack_tensors)
            for a in first.bindings
        },
        _stack_tensors([f.value for f in members]),
        _stack_tensors(masks) if masks else None,
        tuple(f.scale for f in members),
        None if first.raw is None else first.raw.unsqueeze(0),
        first.raw_params,
        first.info.observed,
        first.info.distribution,
        first.info.role,
        None
        if first.value_binding is None
        else joined_bindings(
            [f.value_binding for f in members if f.value_binding is not None], _stack_tensors
        ),
        _stack_tensors(elements) if elements else None,
        first.hyperparameters,
        first.edges,
    )


def _of_one(f: Factor) -> Group:
    """The group of one factor."""
    return Group(
        (f.info.name,),
        (f.dims,),
        len(f.info.plates),
        f.sizes,
        f.family,
        f.event_dims,
        {name: a.unsqueeze(0) for name, a in f.arguments.items()},
        each_alone(f.bindings),
        f.value.unsqueeze(0),
        None if f.mask is None else f.mask.unsqueeze(0),
        (f.scale,),
        None if f.raw is None else f.raw.unsqueeze(0),
        f.raw_params,
        f.info.observed,
        f.info.distribution,
        f.info.role,
        None if f.value_binding is None else f.value_binding.alone,
        None if f.elements is None else f.elements.unsqueeze(0),
        f.hyperparameters,
        f.edges,
    )


def _stack_tensors(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def repeated(binding: Binding, n: int) -> Binding:
    """One binding for several members, whose tensors are kept once."""
    return binding.mapped(lambda t: _repeated(t.unsqueeze(0), n))
