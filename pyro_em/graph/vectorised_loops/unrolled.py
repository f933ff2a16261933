"""From the factors of a template to those of the loop's steps, stacked and not copied.

The later steps of a loop are one factor whose first plate is the steps: with that dimension in front
it is a `Group` of as many members. Members whose tensors are the same are one, expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.binding import joined as joined_bindings
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.graph.stacking import Factor
from pyro_em.graph.stretches import Dims, Members, Repeated, Stem, StepRead, Stretch
from pyro_em.graph.structure import Structure
from pyro_em.graph.vectorised_loops.latent_series import LatentSeries
from pyro_em.graph.vectorised_loops.series import Unrolling
from pyro_em.tracing.loops import NotVectorized
from pyro_em.tracing.parameters import TracedParameter

Lead = Callable[[Tensor], Tensor]

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class _Block:
    """Members of a group that come from one factor of the template.

    Attributes:
        stretch: Their names and dimensions.
        one: The first of them.
        whole: The factor, with tensors whose first dimension is that of members, or of size one.
    """

    stretch: Stretch
    one: Factor
    whole: Factor


def unrolled_graph(
    structure: Structure,
    factors: Sequence[Factor],
    latents: Mapping[str, Latent],
    parameters: Mapping[str, TracedParameter],
) -> FactorGraph:
    """The graph of a loop.

    Args:
        structure: That of the loop.
        factors: Those of its template that count, in order.
        latents: Those of its template.
        parameters: What the run read.
    """
    unrolling: Unrolling = structure.series
    blocks: dict[tuple[Any, ...], list[_Block]] = {}
    for factor in _counted(factors, unrolling):
        block = _block(factor, unrolling)
        blocks.setdefault(block.one.signature, []).append(block)
    groups = tuple(_merged(own) for own in blocks.values())
    return FactorGraph(structure, _series(latents, unrolling), groups, parameters)


def _series(latents: Mapping[str, Latent], unrolling: Unrolling) -> LatentSeries:
    """The latents of the loop's steps, in their order."""
    before: list[dict[str, Latent]] = [{}]
    steps = []
    done: set[str] = set()
    for name in latents:
        place = unrolling.places.get(name)
        if place is None or place.first is not None:
            before[-1][name] = latents[name]
        elif unrolling.is_rest(name) and place.loop not in done:
            done.add(place.loop)
            loop = unrolling.loops[place.loop]
            own = tuple(
                (Stem(p.before, p.after), _latent_at(latents[n], unrolling, n, loop.history))
                for n in latents
                if (p := unrolling.places.get(n)) is not None
                and p.loop == loop.name
                and unrolling.is_rest(n)
            )
            steps.append((loop.history, loop.size, own))
            before.append({})
    return LatentSeries(before, steps)


def _latent_at(latent: Latent, unrolling: Unrolling, name: str, t: int) -> Latent:
    loop = unrolling.places[name].loop
    rank = unrolling.ranks[name]
    by_dim = {unrolling.template.plates[p].dim: p for p in latent.plates if p != loop}
    return Latent(
        unrolling.name_at(name, t),
        tuple(p for p in latent.plates if p != loop),
        latent.support,
        tuple(by_dim.get(d) for d in range(-rank, 0)),
    )


def _block(f: Factor, unrolling: Unrolling) -> _Block:
    name = f.info.name
    n = len(f.info.plates)
    if not unrolling.is_rest(name):
        return _Block(_single(f, unrolling), f, _mapped(f, lambda t: t.unsqueeze(0)))
    place = unrolling.places[name]
    loop = unrolling.loops[place.loop]
    k = f.info.plates.index(loop.name)
    if isinstance(f.scale, Tensor):
        if f.scale.shape[k] > 1:
            raise NotVectorized(f"poutine.scale of '{name}' differs from step to step")
        f = replace(f, scale=f.scale.squeeze(k))
    whole = _mapped(f, lambda t: t.movedim(k, 0))
    read: list[StepRead | str] = []
    for z in f.dims[n:]:
        p = unrolling.places.get(z)
        lag = 0 if p is None or p.shift is None else loop.history - p.shift
        read.append(z if p is None else StepRead(Stem(p.before, p.after), lag))
    plates = f.dims[:k] + f.dims[k + 1 : n]
    stem = Stem(place.before, place.after)
    stretch = Stretch(stem, loop.history, loop.size, plates, tuple(read))
    dims = stretch.dims_of(0)
    one = _with(
        _mapped(whole, lambda t: t[0]),
        info=replace(unrolling.info_at(name, loop.history), scope=dims[n - 1 :]),
        dims=dims,
        sizes=f.sizes[:k] + f.sizes[k + 1 :],
    )
    return _Block(stretch, one, whole)


def _single(f: Factor, unrolling: Unrolling) -> Stretch:
    """One site by itself, or one step of a loop at an integer."""
    n = len(f.info.plates)
    own = unrolling.stem_of(f.info.name)
    if own is None:
        return Stretch(f.info.name, 0, 1, f.dims[:n], f.dims[n:])
    stem, t = own
    read: list[StepRead | str] = []
    for z in f.dims[n:]:
        other = unrolling.stem_of(z)
        same = other is not None and unrolling.places[z].loop == unrolling.places[f.info.name].loop
        read.append(StepRead(other[0], t - other[1]) if same and other is not None else z)
    return Stretch(stem, t, t + 1, f.dims[:n], tuple(read))


def _joined_stretches(blocks: Sequence[_Block]) -> list[Stretch]:
    """Stretches that go on where another ends are one."""
    out: list[Stretch] = []
    for stretch in (b.stretch for b in blocks):
        last = out[-1] if out else None
        if (
            last is not None
            and not isinstance(stretch.name, str)
            and replace(last, stop=stretch.stop) == replace(stretch, start=last.start)
            and last.stop == stretch.start
        ):
            out[-1] = replace(last, stop=stretch.stop)
        else:
            out.append(stretch)
    return out


def _mapped(f: Factor, lead: Lead) -> Factor:
    """A factor with every tensor that is laid out over its dimensions passed through ``lead``."""

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else lead(tensor)

    value = f.value_binding
    return _with(
        f,
        arguments={n: lead(a) for n, a in f.arguments.items()},
        bindings={n: b.mapped(lead) for n, b in f.bindings.items()},
        value=lead(f.value),
        mask=of(f.mask),
        raw=of(f.raw),
        value_binding=None if value is None else value.mapped(lead),
        elements=of(f.elements),
    )


def _with(one: V, /, **changes: Any) -> V:
    """As ``dataclasses.replace``, at a tenth of the time."""
    out = object.__new__(type(one))
    vars(out).update(vars(one), **changes)
    return out


def _merged(blocks: Sequence[_Block]) -> Group:
    first = blocks[0].one
    counts = [len(b.stretch) for b in blocks]
    stretches = _joined_stretches(blocks)
    whole = [b.whole for b in blocks]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return _joined(tensors, counts)

    def optional(tensors: Sequence[Tensor | None]) -> Tensor | None:
        held = [t for t in tensors if t is not None]
        return joined(held) if held else None

    def bound(bindings: Sequence[Binding]) -> Binding:
        return joined_bindings(bindings, joined)

    values = [w.value_binding for w in whole if w.value_binding is not None]
    bindings = {a: bound([w.bindings[a] for w in whole]) for a in first.bindings}
    arguments = {
        # One binding of all says that the arguments are one function of the parameters.
        a: first.arguments[a].expand(sum(counts), *first.arguments[a].shape)
        if bindings[a].is_one_for_all
        else joined([w.arguments[a] for w in whole])
        for a in first.arguments
    }
    return Group(
        Members(stretches),
        Dims(stretches),
        len(first.info.plates),
        first.sizes,
        first.family,
        first.event_dims,
        arguments,
        bindings,
        joined([w.value for w in whole]),
        optional([w.mask for w in whole]),
        _scales([b.one.scale for b in blocks], counts),
        optional([w.raw for w in whole]),
        first.raw_params,
        first.info.observed,
        first.info.distribution,
        first.info.role,
        bound(values) if values else None,
        optional([w.elements for w in whole]),
        first.hyperparameters,
        first.edges,
    )


def _scales(scales: Sequence[Tensor | float], counts: Sequence[int]) -> Sequence[Tensor | float]:
    first = scales[0]
    if not isinstance(first, Tensor) and all(s is first or s == first for s in scales):
        return Repeated(first, sum(counts))
    return tuple(s for s, n in zip(scales, counts, strict=True) for _ in range(n))


def _joined(tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Blocks of members one after the other; members that are the same stay one, expanded."""
    total = sum(counts)
    first = tensors[0]
    if all(t.shape[0] == 1 and _is_same(t, first) for t in tensors):
        return first.expand(total, *first.shape[1:])
    each = [t.expand(n, *t.shape[1:]) for t, n in zip(tensors, counts, strict=True)]
    return each[0] if len(each) == 1 else torch.cat(each)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (not a.requires_grad and a.shape == b.shape and bool((a == b).all()))


# ---------------------------------------------------------------- masked latents


def _counted(factors: Sequence[Factor], unrolling: Unrolling) -> list[Factor]:
    """Counts of a masked latent are dropped only where nothing that counts depends on it.

    What `pyro_em.graph.trace` does from step to step, for all steps at once: a latent takes part
    where its mask says so, or a factor that reads it does. Steps that read each other are followed
    until nothing changes.
    """
    unread = {f"{name}_unobserved" for name in unrolling.template.masked_pairs}
    by_name = {f.info.name: f for f in factors}
    masked = [
        f.info.name
        for f in factors
        if f.mask is not None and not f.info.observed and f.info.name not in unread
    ]
    if not masked:
        return list(factors)
    units = {f.info.name: _Unit.of(f, unrolling) for f in factors}
    changed = True
    while changed:
        changed = False
        for name in reversed(masked):
            before = units[name].mask
            assert before is not None
            after = before
            for child in factors:
                if child.info.name != name:
                    for part in _shares(units[name], units[child.info.name], unrolling):
                        after = part if after is None else after | part
            after = _closed(after, units[name], by_name[name], unrolling)
            if after.shape != before.shape or bool((after != before).any()):
                units[name] = replace(units[name], mask=after)
                changed = True
    return [
        replace(f, mask=units[f.info.name].laid_out(f)) if f.info.name in masked else f
        for f in factors
    ]


@dataclass(frozen=True, eq=False)
class _Unit:
    """Where a factor of the template counts.

    Attributes:
        name: Its site.
        steps: How many steps it stands for.
        is_rest: Whether it stands for all later steps.
        plates: Its plates, that of the steps excepted.
        scope: The latents that it reads.
        mask: Where it counts; None where it does everywhere. # (steps or 1, *plates or 1s)
    """

    name: str
    steps: int
    is_rest: bool
    plates: tuple[str, ...]
    scope: tuple[str, ...]
    mask: Tensor | None

    @classmethod
    def of(cls, f: Factor, unrolling: Unrolling) -> _Unit:
        name, n = f.info.name, len(f.info.plates)
        mask = f.mask
        rest = unrolling.is_rest(name)
        plates, steps = f.info.plates, 1
        if mask is not None:
            mask = mask.reshape((*mask.shape[:n], -1)).any(-1)
        if rest:
            loop = unrolling.loops[unrolling.places[name].loop]
            k = plates.index(loop.name)
            plates, steps = plates[:k] + plates[k + 1 :], loop.rest
            mask = None if mask is None else mask.movedim(k, 0)
        elif mask is not None:
            mask = mask.unsqueeze(0)
        return cls(name, steps, rest, plates, f.dims[n:], mask)

    def laid_out(self, f: Factor) -> Tensor:
        """The mask over the dimensions of the factor."""
        assert self.mask is not None and f.mask is not None
        mask = self.mask
        if self.is_rest:
            k = next(i for i, p in enumerate(f.info.plates) if p not in self.plates)
            mask = mask.movedim(0, k)
        else:
            mask = mask.squeeze(0)
        return mask.reshape(mask.shape + (1,) * (f.mask.dim() - mask.dim()))


def _shares(unit: _Unit, child: _Unit, unrolling: Unrolling) -> list[Tensor]:
    """Where a latent takes part because a factor that reads it does. # (steps, *plates or 1s)"""
    out = []
    alive = child.mask
    if alive is None:
        device = unit.mask.device if unit.mask is not None else None
        alive = torch.ones((1,) * (1 + len(child.plates)), dtype=torch.bool, device=device)
    for i in reversed(range(len(child.plates))):
        if child.plates[i] not in unit.plates:
            alive = alive.any(1 + i)
    if unit.name in child.scope:
        if child.is_rest and not unit.is_rest:
            alive = alive.any(0, keepdim=True)
        out.append(alive)
    place = unrolling.places.get(unit.name)
    if place is None or not child.is_rest:
        return out
    history = unrolling.loops[place.loop].history
    for read in child.scope:
        other = unrolling.places.get(read)
        if other is None or other.loop != place.loop or other.shift in (None, history):
            continue
        assert other.shift is not None
        if unit.is_rest and (other.before, other.after) == (place.before, place.after):
            out.append(_earlier(alive, unit.steps, history - other.shift))
        elif place.first is not None and other.at(place.first) == unit.name:
            t = place.first - other.shift
            if 0 <= t < child.steps:
                out.append(alive[t : t + 1] if alive.shape[0] > 1 else alive)
    return out


def _earlier(alive: Tensor, steps: int, lag: int) -> Tensor:
    """What holds ``lag`` steps later, False beyond the end. # (steps, …)"""
    alive = alive.expand(steps, *alive.shape[1:])
    out = torch.zeros_like(alive, memory_format=torch.contiguous_format)
    if lag < steps:
        out[: steps - lag] = alive[lag:]
    return out


def _closed(mask: Tensor, unit: _Unit, f: Factor, unrolling: Unrolling) -> Tensor:
    """A latent that reads itself some steps before: followed back to the beginning at once."""
    place = unrolling.places.get(unit.name)
    if place is None or not unit.is_rest:
        return mask
    history = unrolling.loops[place.loop].history
    for read in unit.scope:
        other = unrolling.places.get(read)
        if other is None or other.shift is None or other.shift == history:
            continue
        if (other.before, other.after) != (place.before, place.after):
            continue
        lag = history - other.shift
        while lag < unit.steps:
            mask = mask | _earlier(mask, unit.steps, lag)
            lag *= 2
    return mask
