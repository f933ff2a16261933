"""From what a model's loops showed over index tensors to the steps that they stand for.

A look at vectorised loops sees a model of fixed size: the first steps, one site for all later steps
with steps as a plate, and the sites that carry values on. Such a *template* is judged like any other
model. Here is what it takes to read it as the loop: every later step must be a function of its own
index and of the ``history`` steps before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations
from typing import Any

from torch import Tensor

from pyro_em.graph.stretches import Later, LaterDict, LaterTuple, Stem
from pyro_em.graph.structure import SiteInfo, Structure
from pyro_em.tracing.loops import Loop, NotVectorized, Place, Series


@dataclass(frozen=True, eq=False)
class Unrolling:
    """The template of a model and the loops in it.

    Attributes:
        template: Its structure, steps as plates.
        way: How indices are read.
        loops: By name.
        places: Of the sites in loops.
        ranks: For each site of all later steps the number of its batch dimensions at one step.
        seen: For each dimension of steps of which part was looked at: how many there are, and which
            those were, counted from the first later one.
    """

    template: Structure
    way: str
    loops: Mapping[str, Loop]
    places: Mapping[str, Place]
    ranks: Mapping[str, int]
    seen: Mapping[int, tuple[int, Tensor]] = field(default_factory=dict)

    def series(self) -> Series:
        """How to run the model."""
        return Series(self.way, is_known=True)

    def is_rest(self, name: str) -> bool:
        """Whether a site of the template stands for all later steps."""
        place = self.places.get(name)
        return place is not None and place.shift == self.loops[place.loop].history

    def is_counted(self, name: str) -> bool:
        """Whether a site of the template stands for any site of the loop."""
        place = self.places.get(name)
        return place is None or place.first is not None or self.is_rest(name)

    def order(self) -> Iterator[tuple[str, int | None]]:
        """The sites of the loops in their order: the template's site, and the step."""
        names = list(self.template.sites)
        firsts: dict[tuple[str, int], list[str]] = {}
        rest: dict[str, list[str]] = {}
        for name in names:
            place = self.places.get(name)
            if place is None:
                continue
            if place.first is not None:
                firsts.setdefault((place.loop, place.first), []).append(name)
            elif self.is_rest(name):
                rest.setdefault(place.loop, []).append(name)
        done: set[str] = set()
        for name in names:
            place = self.places.get(name)
            if place is None:
                yield name, None
                continue
            if place.loop in done:
                continue
            done.add(place.loop)
            loop = self.loops[place.loop]
            for t in range(loop.history):
                yield from ((n, None) for n in firsts.get((loop.name, t), ()))
            for t in range(loop.history, loop.size):
                yield from ((n, t) for n in rest.get(loop.name, ()))

    def name_at(self, name: str, t: int | None) -> str:
        """The name of a template's site at a step; of one that carries values on, at its own."""
        place = self.places.get(name)
        if t is None or place is None or place.shift is None:
            return name
        return place.at(t - self.loops[place.loop].history + place.shift)

    def info_at(self, name: str, t: int | None) -> SiteInfo:
        """A site as it is at a step."""
        info = self.template.sites[name]
        if t is None:
            return info
        loop = self.places[name].loop
        return replace(
            info,
            name=self.name_at(name, t),
            plates=tuple(p for p in info.plates if p != loop),
            scope=tuple(self.name_at(z, t) for z in info.scope),
            batch_dim=self.ranks[name],
            nested=tuple(p for p in info.nested if p != loop),
        )

    def at(self, tensor: Tensor, name: str, t: int, event_dim: int = 0) -> Tensor:
        """A traced tensor at a step, without the dimension of steps where that is the leftmost.

        Args:
            tensor: Of a site of all later steps. # (*batch, *event)
            name: The site.
            t: The step.
            event_dim: How many of its dimensions are those of an event.
        """
        loop = self.loops[self.places[name].loop]
        dim = tensor.dim() - event_dim + loop.dim
        if dim < 0:
            return tensor
        own = tensor.narrow(dim, loop.place(t) if tensor.shape[dim] > 1 else 0, 1)
        return own.squeeze(0) if dim == 0 else own

    def unrolled(self, looked: Mapping[str, Mapping[str, Any]] | None = None) -> Structure:
        """The structure of the loop itself, whose sites are listed when somebody asks for them.

        Args:
            looked: The sites of the template, as a run with tags traced them.
        """
        template, whole = self.template, Later(self._whole)

        def later(name: str) -> Any:
            own = getattr(template, name)
            return LaterDict(lambda: getattr(whole.value, name)) if own else {}

        return replace(
            template,
            plates={n: p for n, p in template.plates.items() if n not in self.loops},
            sites=later("sites"),
            latents=LaterTuple(lambda: tuple(whole.value.latents)),
            barren=later("barren"),
            masked_pairs=later("masked_pairs"),
            kept_values=later("kept_values"),
            unobserved=later("unobserved"),
            edges=LaterTuple(lambda: tuple(whole.value.edges)),
            passing=frozenset(),
            looked=looked,
            unregistered=tuple(
                replace(u, site=self.name_at(u.site, self._first_step(u.site)))
                for u in template.unregistered
            ),
            series=self,
        )

    @cached_property
    def sketch(self) -> Structure:
        """The structure of the loop with few steps."""
        few = {
            n: replace(loop, size=min(loop.size, 2 * loop.history + 3))
            for n, loop in self.loops.items()
        }
        return replace(self, loops=few)._whole()

    def _whole(self) -> Structure:
        """The structure of the loop, with all its steps."""
        template = self.template
        sites: dict[str, SiteInfo] = {}
        edges: dict[tuple[str, str], None] = {}
        parents: dict[str, list[str]] = {}
        for parent, child in template.edges:
            parents.setdefault(child, []).append(parent)
        for name, t in self.order():
            info = self.info_at(name, t)
            if info.name in sites:
                raise NotVectorized(f"two sites are called '{info.name}'")
            sites[info.name] = info
            for parent in parents.get(name, ()):
                edges[self.name_at(parent, t), info.name] = None
        for child in template.barren:
            for own, t in self._spread(child):
                for parent in parents.get(child, ()):
                    edges[self.name_at(parent, t), own] = None
        latent = set(template.latents)
        known = [(n, t) for n, t in self.order() if n in latent]
        return replace(
            template,
            plates={n: p for n, p in template.plates.items() if n not in self.loops},
            sites=sites,
            latents=tuple(self.name_at(n, t) for n, t in known),
            barren={own: template.barren[n] for n in template.barren for own, _ in self._spread(n)},
            masked_pairs={
                own: mask if t is None else self.at(mask, f"{n}_observed", t)
                for n, mask in template.masked_pairs.items()
                for own, t in self._spread(n, f"{n}_observed")
            },
            kept_values={
                own: value if t is None else self._kept_at(n, value, t)
                for n, value in template.kept_values.items()
                for own, t in self._spread(n)
            },
            unobserved={
                own: template.unobserved[n]
                for n in template.unobserved
                for own, _ in self._spread(n)
            },
            edges=tuple(edges),
            passing=frozenset(),
            looked=None,
            unregistered=(),
            series=None,
        )

    def stem_of(self, name: str) -> tuple[Stem, int] | None:
        """What the name of a site at an integer step shares with later steps, and that step."""
        place = self.places.get(name)
        if place is None or place.first is None:
            return None
        for stem in self.stems.get(place.loop, ()):
            if stem.at(place.first) == name:
                return stem, place.first
        return None

    @cached_property
    def stems(self) -> dict[str, tuple[Stem, ...]]:
        """Per loop the stems of the sites of all later steps, in their order."""
        out: dict[str, tuple[Stem, ...]] = {}
        for name in self.template.sites:
            if self.is_rest(name):
                place = self.places[name]
                out[place.loop] = (*out.get(place.loop, ()), Stem(place.before, place.after))
        return out

    def _first_step(self, name: str) -> int | None:
        return self.loops[self.places[name].loop].history if self.is_rest(name) else None

    def _spread(self, name: str, site: str | None = None) -> Iterator[tuple[str, int | None]]:
        """The names that one name of the template stands for, with their steps."""
        site = name if site is None else site
        place = self.places.get(site)
        if place is None or place.first is not None:
            yield name, None
        elif self.is_rest(site):
            cut = len(place.after) - len(site.removeprefix(name)) if site != name else None
            for t in range(self.loops[place.loop].history, self.loops[place.loop].size):
                yield f"{place.before}{t}{place.after[:cut]}", t

    def _kept_at(self, name: str, value: Tensor, t: int) -> Tensor:
        fn = self.template.unobserved[name]["fn"]
        return self.at(value, name, t, fn.event_dim)


def with_template(known: Unrolling, template: Structure) -> Unrolling:
    """A template of the same model with some latents given, read as its loops are known to be.

    Args:
        known: How the loops of the model are read.
        template: What all steps of its loops showed.
    """
    sites = {
        n: i for n, i in template.sites.items() if known.is_counted(n) or n in template.latents
    }
    passing = frozenset(n for n in sites if not known.is_counted(n))
    alone = replace(template, sites=sites, looked=None, passing=passing)
    return replace(known, template=alone, seen={})


def require_loops(template: Structure, series: Series) -> None:
    """Refuse a template whose later steps are no functions of the steps just before.

    Args:
        template: The structure that the looks found.
        series: The loops that they met.

    Raises:
        NotVectorized: With the reason.
    """
    series.require_ends()
    places, loops = series.places, series.loops
    if template.random_plates:
        raise NotVectorized("a plate draws a random subsample")
    if template.notes:
        raise NotVectorized("there is something to say of a site")
    rest = {n for n, p in places.items() if p.shift == loops[p.loop].history}
    for own in (places[n] for n in rest):
        if own.before[-1:].isdigit() or own.after[:1].isdigit():
            raise NotVectorized(f"the name '{own.before}{{t}}{own.after}' has more digits")
    for a, b in permutations([Stem(places[n].before, places[n].after) for n in rest], 2):
        digits = b.before.removeprefix(a.before)[:1]
        if b.before.startswith(a.before) and digits.isdigit():
            raise NotVectorized(f"'{a.at(0)}' and '{b.at(0)}' may be names of one site")
    for name in template.sites:
        if name not in rest:
            _require_own_name(name, rest, places)
    for name, info in template.sites.items():
        place = places.get(name)
        if place is None and any(p in loops for p in info.plates):
            raise NotVectorized(f"a plate of site '{name}' has the name of a loop")
        for latent in info.scope:
            other = places.get(latent)
            if other is None or (
                place is not None and place.shift is not None and name not in rest
            ):
                continue
            if place is None or other.loop != place.loop:
                raise NotVectorized(f"site '{name}' reads a latent of a loop from outside")
            loop = loops[place.loop]
            if name in rest and other.first is not None:
                raise NotVectorized(f"'{place.before}t' reads a step before its history")
            if name in rest and other.shift is not None and other.shift < loop.history:
                _require_predecessors(template, other, info, loop, rest, places)


def _require_own_name(name: str, rest: set[str], places: Mapping[str, Place]) -> None:
    met = places.get(name)
    for place in (places[n] for n in rest):
        middle = name.removeprefix(place.before).removesuffix(place.after)
        if name != f"{place.before}{middle}{place.after}" or not middle.isdigit():
            continue
        if met is None or met.first != int(middle):
            raise NotVectorized(f"two sites may be called '{name}'")


def _require_predecessors(
    template: Structure,
    read: Place,
    reader: SiteInfo,
    loop: Loop,
    rest: set[str],
    places: Mapping[str, Place],
) -> None:
    """A latent that is carried on must be one at every step, in the same plates."""
    names = [read.at(t) for t in range(read.shift or 0, loop.history)]
    names += [n for n in rest if (places[n].before, places[n].after) == (read.before, read.after)]
    if len(names) != loop.history - (read.shift or 0) + 1:
        raise NotVectorized(f"'{read.before}t' is no site of every step")
    forms = set()
    for name in names:
        if name not in template.latents or places[name].loop != loop.name:
            raise NotVectorized(f"'{read.before}t' is no latent of every step")
        info = template.sites[name]
        forms.add((tuple(p for p in info.plates if p != loop.name), info.support_size))
    if len(forms) != 1:
        raise NotVectorized(f"'{read.before}t' has other plates or values at the first steps")
