"""Chains of Gaussian latents from a loop over indices, whose later steps are one site each.

The places of a few steps show those of all: levels go on by the same number from step to step, and
everything else stays. No step is laid out by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.lines import Line, Read
from pyro_em.graph.stretches import Later
from pyro_em.graph.vectorised_loops.series import Unrolling
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.gaussians.gaussian_sites import (
    dense_block,
    site_over,
    taken,
    with_offset,
)
from pyro_em.posteriors.gaussians.site_forms import SiteForm, Term
from pyro_em.posteriors.states.gaussian_chain import GaussianChain
from pyro_em.posteriors.states.kept_layouts import remembered
from pyro_em.posteriors.states.state_form import SHORTEST, Placed, state_form
from pyro_em.posteriors.states.state_layout import Stack, StateLayout
from pyro_em.tracing.loops import Loop, NotVectorized
from pyro_em.tracing.sites import Role

_SHOWN = 12  # steps beyond the history that show how levels go on

_MOST = 2**18  # elements that lines read, of layouts that are kept

Parts = Mapping[str, Mapping[str, Tensor]]


def series_chain(
    graph: FactorGraph,
    lines: Mapping[str, Line],
    scope: tuple[str, ...],
    states: tuple[int, ...],
    values: Mapping[str, Tensor],
    read: Parts,
) -> GaussianChain:
    """The chain that the connected sites of one loop make up.

    Args:
        graph: As traced with Gaussian latents at zero.
        lines: What the mean of each site of the template reads.
        scope: Discrete latents that any of them depends on.
        states: How many values each has.
        values: Constrained parameters by name.
        read: Per site what its mean is made of, where no binding gives it.

    Raises:
        NotVectorized: If they make up none: a look step by step says more.
    """
    loop = _Steps.of(graph, lines)
    layout = loop.layout()
    traced, groups = [], []
    for name, line in lines.items():
        group = loop.group_of(name)
        parts = {own: loop.stacked(name, b) for own, b in _parts(line).items()}
        group = with_offset(group, parts["loc"], values)
        traced.append(group)
        own_read = read.get(name, {})
        known = {
            new: loop.in_front(name, own_read[old])
            for (new, binding), old in zip(parts.items(), line.parts, strict=True)
            if not binding.is_static
        }
        reads = ("",) * len(line.reads)
        groups.append(site_over(group, parts, reads, scope, states, values, known))

    def beginning() -> GaussianBlock:
        short = loop.short()
        return dense_block(graph, short, scope, states, values, loop.read_at(short, read))

    return GaussianChain(
        tuple(groups),
        tuple(lines.values()),
        scope,
        states,
        traced=tuple(traced),
        chains=layout,
        beginning=Later(beginning),
    )


def _parts(line: Line) -> dict[str, Binding]:
    """What a mean is made of, by names that do not hold a latent's."""
    names = ("loc", *(f"loc per latent {j + 1}" for j in range(len(line.reads))))
    return dict(zip(names, line.parts.values(), strict=True))


def _stack(form: SiteForm, placed: Sequence[Placed], members: int, chains: int) -> Stack:
    """A stack of which the first members have places: those of the others follow."""
    one = placed[0]
    levels = [p.level for p in placed]
    rise = levels[1] - levels[0] if len(levels) > 1 else 1
    regular = all(p.key == one.key and p.start == one.start for p in placed)
    if not regular or levels != [one.level + rise * i for i in range(len(levels))]:
        raise NotVectorized("the places of Gaussian latents change from step to step")
    return replace(
        Stack.of(form, [one], chains),
        members=members,
        levels=one.level + rise * torch.arange(members),
        starts=torch.full((members,), one.start),
    )


def _width(group: Group) -> tuple[int, bool]:
    """How many numbers a row of a site has, and whether they are those of a latent."""
    width = group.value.shape[1 + len(group.sizes) :].numel()
    return width, group.role is Role.GAUSSIAN


@dataclass(frozen=True, eq=False)
class _Steps:
    """The sites of one loop's template, with Gaussian latents.

    Attributes:
        graph: The graph of the loop.
        lines: What the mean of each site reads.
        unrolling: How the loop is read.
        loop: The loop.
    """

    graph: FactorGraph
    lines: Mapping[str, Line]
    unrolling: Unrolling
    loop: Loop

    @classmethod
    def of(cls, graph: FactorGraph, lines: Mapping[str, Line]) -> _Steps:
        unrolling: Unrolling = graph.structure.series
        if any(z in unrolling.places for line in lines.values() for z in line.scope):
            raise NotVectorized("discrete latents of a loop decide about Gaussian ones")
        names = [p.loop for n in lines if (p := unrolling.places.get(n)) is not None]
        if len(set(names)) != 1 or len(names) < len(lines):
            raise NotVectorized("Gaussian latents of a loop are read outside of it")
        return cls(graph, lines, unrolling, unrolling.loops[names[0]])

    @property
    def few(self) -> Unrolling:
        """The same with a few steps, of the lines' sites alone."""
        size = min(self.loop.size, self.loop.history + _SHOWN)
        template = self.unrolling.template
        sites = {n: template.sites[n] for n in template.sites if n in self.lines}
        return replace(
            self.unrolling,
            template=replace(template, sites=sites),
            loops={self.loop.name: replace(self.loop, size=size)},
        )

    def short(self) -> dict[str, Line]:
        """The line of each site at a few steps."""
        return {own: line for n, t in self.few.order() for own, line in self.lines_at(n, t)}

    def layout(self) -> StateLayout:
        """Where the numbers of all steps lie."""
        return remembered(self._decides(), self._layout)

    def _decides(self) -> Hashable | None:
        """All that the layout follows from; None where that is too much to be kept."""
        reads = [r for line in self.lines.values() for r in line.reads]
        if sum(r.elements.numel() for r in reads) > _MOST:
            return None
        places, template = self.unrolling.places, self.unrolling.template

        def of_line(name: str, line: Line) -> Hashable:
            own = [(r.latent, places.get(r.latent), r.places) for r in line.reads]
            plates = template.sites[name].plates
            group = self.group_of(name)
            members = len(group.members)
            return name, places[name], plates, line.sizes, members, *_width(group), *own

        loop = self.loop.name, self.loop.size, self.loop.history
        order = tuple(n for n in template.sites if n in self.lines)
        return loop, order, tuple(of_line(n, line) for n, line in self.lines.items())

    def _layout(self) -> StateLayout:
        short, few = self.short(), self.few
        numbers = {name: i for i, name in enumerate(short)}
        forms = [self._form(line, numbers) for line in short.values()]
        form = state_form(forms)
        if form is None:
            is_short = self.loop.size < SHORTEST  # one block of numbers, whoever reads the loop
            why = "" if is_short else "Gaussian latents of all steps are read at one step"
            raise NotVectorized(why)
        stacks = []
        for name in self.lines:
            members = [numbers[self.name(n, t)] for n, t in few.order() if n == name]
            placed, count = [form.sites[i] for i in members], len(self.group_of(name).members)
            stacks.append(_stack(forms[members[0]], placed, count, form.chains))
        steps = 1 + max(int(s.levels.max()) for s in stacks)
        return StateLayout(replace(form, steps=steps, sites=()), tuple(stacks))

    def _form(self, line: Line, numbers: Mapping[str, int]) -> SiteForm:
        unknown = [r.latent for r in line.reads if r.latent not in numbers]
        if unknown:
            raise NotVectorized(f"'{unknown[0]}' is no latent of every step")
        return SiteForm(
            line.site,
            torch.Size(line.sizes).numel(),
            *_width(self.graph.group_of(line.site)[0]),
            tuple(Term(numbers[r.latent], r.elements) for r in line.reads),
        )

    def name(self, name: str, t: int | None) -> str:
        """The name of a site at a step."""
        return self.unrolling.name_at(name, t)

    def axis(self, name: str) -> int | None:
        """Which of its plates the steps of a site are; None of one step."""
        if not self.unrolling.is_rest(name):
            return None
        return self.unrolling.template.sites[name].plates.index(self.loop.name)

    def group_of(self, name: str) -> Group:
        """The members of a site of the template in the graph."""
        if name not in self._groups:
            self._groups[name] = self._group_of(name)
        return self._groups[name]

    @cached_property
    def _groups(self) -> dict[str, Group]:
        return {}

    def _group_of(self, name: str) -> Group:
        axis, h = self.axis(name), self.loop.history
        group, first = self.graph.group_of(self.name(name, h if axis is not None else None))
        count = 1 if axis is None else self.loop.size - h
        if count == len(group.members):
            return group
        return taken(group, range(first, first + count))

    def stacked(self, name: str, binding: Binding) -> Binding:
        """A binding with a row for each step."""
        return binding.mapped(lambda t: self.in_front(name, t))

    def in_front(self, name: str, t: Tensor) -> Tensor:
        """What a site's cells hold, with its steps in front. # (1, *sizes, …) to (steps, …)"""
        axis = self.axis(name)
        if axis is None:
            return t
        t = t[0].movedim(axis, 0)
        rest = self.loop.size - self.loop.history
        alike = len(t) == 1 or (not t.requires_grad and bool((t == t[:1]).all()))
        return t[:1].expand(rest, *t.shape[1:]) if alike else t

    def lines_at(self, name: str, t: int | None) -> list[tuple[str, Line]]:
        """The line of a site at a step, by the site's name there."""
        line, axis = self.lines[name], self.axis(name)
        own = self.name(name, t)
        i = None if axis is None or t is None else t - self.loop.history

        def here(x: Tensor) -> Tensor:
            if axis is None or i is None:
                return x
            return x.select(1 + axis, i if x.shape[1 + axis] > 1 else 0)

        reads = tuple(
            Read(
                self.name(r.latent, t),
                self._elements(name, r, i),
                r.coefficient.mapped(here),
                r.only,
            )
            for r in line.reads
        )
        sizes = line.sizes if axis is None else line.sizes[:axis] + line.sizes[axis + 1 :]
        offset = line.offset.mapped(here)
        return [(own, Line(own, sizes, line.scope, line.event, offset, reads))]

    def read_at(self, short: Mapping[str, Line], read: Parts) -> dict[str, dict[str, Tensor]]:
        """What no binding gives of the means of a few steps."""
        out: dict[str, dict[str, Tensor]] = {}
        for name, t in self.few.order():
            own = self.name(name, t)
            for old, new in zip(self.lines[name].parts, short[own].parts, strict=True):
                if old in read.get(name, {}):
                    rows = self.in_front(name, read[name][old])
                    i = 0 if t is None else t - self.loop.history
                    out.setdefault(own, {})[new] = rows[i : i + 1]
        return out

    def _elements(self, name: str, read: Read, i: int | None) -> Tensor:
        """The element that each row of a site reads of a latent at one step. # (rows,)"""
        axis = self.axis(name)
        latent = self.lines.get(self._rest_of(read.latent) or "")
        if axis is None or latent is None:
            return read.elements
        sizes, line = self.lines[name].sizes, latent
        at = self.axis(line.site)
        assert at is not None
        inner = torch.Size(line.sizes[at + 1 :]).numel()
        steps = line.sizes[at]
        elements = read.elements
        step = torch.div(elements, inner, rounding_mode="floor") % steps
        outer = torch.div(elements, inner * steps, rounding_mode="floor")
        rest = outer * inner + elements % inner
        by_step = step.reshape(sizes).movedim(axis, 0).reshape(steps, -1)
        rest = torch.where(elements >= 0, rest, -1).reshape(sizes).movedim(axis, 0)
        rest = rest.reshape(steps, -1)
        own = torch.arange(steps, device=elements.device).unsqueeze(-1)
        if bool(((by_step != own) & (rest >= 0)).any()) or bool((rest != rest[:1]).any()):
            raise NotVectorized(f"a step of '{name}' reads '{read.latent}' at other steps")
        return rest[0]

    def _rest_of(self, latent: str) -> str | None:
        """The site of all later steps of which a latent of the template is one; None of one step."""
        place = self.unrolling.places.get(latent)
        if place is None or place.shift is None:
            return None
        for name in self.lines:
            own = self.unrolling.places[name]
            if own.shift is not None and (own.before, own.after) == (place.before, place.after):
                return name
        raise NotVectorized(f"'{place.before}t' is no latent of every step")


def aliases(lines: Mapping[str, Line], unrolling: Unrolling) -> list[tuple[str, str]]:
    """Pairs of names in lines that belong together: a latent carried on, and the sites that it is."""
    stems: dict[tuple[str, str, str], list[str]] = {}
    names = dict.fromkeys([*lines, *(r.latent for line in lines.values() for r in line.reads)])
    for name in names:
        place = unrolling.places.get(name)
        if place is not None and place.shift is not None:
            stems.setdefault((place.loop, place.before, place.after), []).append(name)
    out = []
    for (loop, before, after), same in stems.items():
        first = [
            n
            for n in names
            if (p := unrolling.places.get(n)) is not None
            and p.first is not None
            and p.loop == loop
            and n == f"{before}{p.first}{after}"
        ]
        out += [(same[0], other) for other in (*same[1:], *first)]
    return out
