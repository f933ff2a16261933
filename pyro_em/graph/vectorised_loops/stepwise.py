"""Index tensors against integers: the body of a vectorised loop must do the same with both.

Two runs decide. In one the body runs over steps out of order before anything that counts, and what it
computes is tagged: where a tag reaches the later steps, or they change, they read more than the steps
just before, and only a loop is right. In the other it runs over integers, at a few steps, with the
latents at the values that they had: every argument, value, mask and scale must be what the index
tensor gave at that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.ops.provenance import get_provenance
from torch import Tensor

from pyro_em.distributions import element_mask, unwrap
from pyro_em.graph.coupling import Sites, differs, parts_of
from pyro_em.graph.structure import Structure
from pyro_em.graph.vectorised_loops.series import Unrolling
from pyro_em.tracing.allocation import is_shadow
from pyro_em.tracing.loops import EARLIER, Loop, NotVectorized, Place, Series
from pyro_em.tracing.sites import is_factor, tensors_of

Held = Callable[[Series, Mapping[str, Tensor]], Sites]


def unrolling_of(template: Structure, series: Series, held: Held) -> Unrolling:
    """How to read a template as its loops, which runs of its model confirm.

    Args:
        template: The structure that the looks found.
        series: The loops that they met.
        held: Runs the model as a series says, with latents at given values.

    Raises:
        NotVectorized: If the loop is another model.
    """
    found = Unrolling(template, series.way, dict(series.loops), dict(series.places), {})
    values = _values(found)
    seen = template.looked
    if seen is None:
        seen = held(Series(series.way, series.few), values)
    disturbed = Series(series.way, series.few, disturbed=True)
    _require_memory(found, seen, held(disturbed, values))
    steps = {loop.name: _steps(loop) for loop in found.loops.values()}
    walks = {n: _walk(found.loops[n], chosen) for n, chosen in steps.items()}
    over = Series(series.way, steps=walks)
    apart = held(over, {**_outside(found, values), **_values_at(found, values, steps)})
    ranks = _require_steps(found, seen, apart, over.places, steps)
    loops = {n: replace(loop, chosen=None) for n, loop in found.loops.items()}
    sites = {
        n: i for n, i in template.sites.items() if found.is_counted(n) or n in template.latents
    }
    passing = frozenset(n for n in sites if not found.is_counted(n))
    by_numbers = template.by_numbers or series.by_numbers
    plates = {
        n: replace(p, size=loops[n].rest, full_size=loops[n].rest) if n in loops else p
        for n, p in template.plates.items()
    }
    alone = replace(
        template, sites=sites, plates=plates, looked=None, passing=passing, by_numbers=by_numbers
    )
    seen_at = {
        loop.dim: (loops[n].rest, loop.chosen)
        for n, loop in found.loops.items()
        if loop.chosen is not None
    }
    return Unrolling(alone, series.way, loops, found.places, ranks, seen_at)


def _values(found: Unrolling) -> dict[str, Tensor]:
    """Values of all latents of the template: as drawn, or anyone of the support."""
    out = {}
    generator = torch.Generator().manual_seed(19)
    for name, site in found.template.unobserved.items():
        value = getattr(site["value"], "_t", site["value"]).detach()
        if is_shadow(value):
            support = _support(found, name)
            index = torch.randint(len(support), site["fn"].batch_shape, generator=generator)
            value = support[index.to(support.device)]
        out[name] = value
    return out


def _support(found: Unrolling, name: str) -> Tensor:
    """The values of a latent without numbers, from the step of an integer."""
    place = found.places.get(name)
    first = None if place is None else found.template.unobserved.get(place.at(0))
    if first is None or is_shadow(first["value"]):
        raise NotVectorized(f"the values of '{name}' are not known")
    support = first["fn"].enumerate_support(expand=False).detach()
    return support.reshape(len(support), *first["fn"].event_shape)


def _outside(found: Unrolling, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in values.items() if n not in found.places}


def _steps(loop: Loop) -> tuple[int, ...]:
    """The steps that are compared: the first that counts, and some beyond, apart from each other."""
    h = loop.history
    out = [h]
    later = loop.steps() + h
    for t in (int(later[len(later) // 2]), loop.size - 1):
        if t - h > out[-1] and t < loop.size:
            out.append(t)
    return tuple(out)


def _walk(loop: Loop, chosen: tuple[int, ...]) -> tuple[int, ...]:
    """The steps that are compared, each after those that it reads."""
    return tuple(t for last in chosen for t in range(last - loop.history, last + 1))


def _values_at(
    found: Unrolling, values: Mapping[str, Tensor], steps: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The latents of the steps that are walked, as index tensors gave them."""
    out = {}
    for name, value in values.items():
        place = found.places.get(name)
        if place is None or place.shift is None:
            continue
        site = found.template.unobserved[name]
        plates = [f.dim for f in site["cond_indep_stack"] if f.name != place.loop]
        rank = max((-d for d in plates if d is not None), default=0) + site["fn"].event_dim
        for t in steps[place.loop]:
            own = found.at(value, name, t, site["fn"].event_dim)
            while own.dim() > rank and own.shape[0] == 1:
                own = own.squeeze(0)
            out[found.name_at(name, t)] = own
    return out


def _require_memory(found: Unrolling, seen: Sites, disturbed: Sites) -> None:
    """Later steps must not notice what the body did before the steps that they read."""
    for name, site in seen.items():
        if not found.is_rest(name) and name in found.places:
            continue
        if name not in disturbed:
            raise NotVectorized(f"{_shown(found, name)} is not in every run")
        other = disturbed[name]
        what = _differing(_parts(site), _parts(other)) or _tagged(other)
        if what:
            raise NotVectorized(
                f"the {what} of {_shown(found, name)} depends on more steps than the "
                "history says, or is drawn at random"
            )


def _tagged(site: Mapping[str, Any]) -> str:
    """What of a site comes from earlier steps; empty if nothing does."""
    held = [("mask", site["mask"]), ("scale", site["scale"])]
    held += [("distribution", t) for t in tensors_of(site["fn"])]
    held += [("value", site["value"])] if site["is_observed"] else []
    return next((what for what, part in held if EARLIER in get_provenance(part)), "")


def _require_steps(
    found: Unrolling,
    seen: Sites,
    apart: Sites,
    places: Mapping[str, Place],
    steps: Mapping[str, tuple[int, ...]],
) -> dict[str, int]:
    """Every compared step must be the same with an index and an integer; gives batch dimensions."""
    ranks: dict[str, int] = {}
    expected: dict[tuple[str, int], set[str]] = {}
    for name in filter(found.is_rest, found.template.barren):
        loop = found.places[name].loop
        for t in steps[loop]:
            expected.setdefault((loop, t), set()).add(found.name_at(name, t))
    for name, site in seen.items():
        if name not in found.places:
            if name not in apart or _differing(_parts(site), _parts(apart[name])):
                raise NotVectorized(f"site '{name}' outside the loop is another one")
            continue
        if not found.is_rest(name):
            continue
        loop = found.places[name].loop
        for t in steps[loop]:
            own = found.name_at(name, t)
            expected.setdefault((loop, t), set()).add(own)
            other = apart.get(own)
            if other is None:
                raise NotVectorized(f"site '{own}' is there with an index tensor alone")
            kinds = {(type(unwrap(s["fn"])[0]), s["is_observed"]) for s in (site, other)}
            if len(kinds) > 1:
                raise NotVectorized(f"site '{own}' is of another kind with an index tensor")
            ours = {
                what: (found.at(x, name, t, min(e, x.dim())), e)
                for what, (x, e) in _parts(site).items()
            }
            what = _differing(ours, _parts(other))
            if what:
                raise NotVectorized(f"the {what} of '{own}' is another one with an index tensor")
            ranks.setdefault(name, len(other["fn"].batch_shape))
    for own in apart:
        place = places.get(own)
        if place is None or place.first is None or place.first not in steps[place.loop]:
            continue
        if own not in expected.get((place.loop, place.first), ()):
            raise NotVectorized(f"site '{own}' is there with an integer alone")
    return ranks


def _parts(site: Mapping[str, Any]) -> dict[str, tuple[Tensor, int]]:
    """What the density of a site is made of, by name, with its rightmost event dimensions."""
    out = {what: (getattr(x, "_t", x).detach(), e) for what, x, e in _listed(site)}
    if "mask" not in out:
        mask = element_mask(site["fn"], site["mask"])
        out["mask"] = torch.tensor(mask is not False), 0
    if "scale" not in out:
        out["scale"] = torch.as_tensor(float(site["scale"])), 0
    return out


def _listed(site: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, int]]:
    if is_factor(site):
        yield from parts_of(site)


def _differing(
    ours: Mapping[str, tuple[Tensor, int]], theirs: Mapping[str, tuple[Tensor, int]]
) -> str:
    """What of two sites differs; empty if nothing does."""
    if set(ours) != set(theirs):
        return "distribution"
    for what, (x, event_dim) in ours.items():
        try:
            a, b = torch.broadcast_tensors(x, theirs[what][0])
        except RuntimeError:
            return f"shape of the {what}"
        if differs(a, b.to(a.dtype), min(event_dim, a.dim())) is not None:
            return what
    return ""


def _shown(found: Unrolling, name: str) -> str:
    place = found.places.get(name)
    return f"'{name}'" if place is None else f"'{place.before}t{place.after}'"
