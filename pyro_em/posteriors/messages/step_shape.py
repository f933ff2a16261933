"""The groups of a chain whose states are products, by what they read; or why a graph is none.

Latents are told apart by what their names are without the number of the step: ``z_0, w_0, z_1, w_1, …``
are two latents of each step. A factor belongs to the latest step that it reads, and what it reads is a
label: which latent, and how many steps before. The state of a step holds of each latent as many values
as later factors need; a latent that nothing reads later is local to its step, and no part of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.densities.tying import collapsed
from pyro_em.errors import Finding, sites_in_words
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.graph.parting import of_members
from pyro_em.graph.stretches import Members, Stem, StepRead, Stretch
from pyro_em.graph.vectorised_loops.latent_series import LatentSeries, kinds_of, names_of
from pyro_em.posteriors.messages.moves import Label, Moves, in_order
from pyro_em.tracing.sites import Role

MOST_STATES = 2**12  # values of a state, and of the latents local to a step

_MOST_PRODUCTS = 2**22  # of one move

_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$")


@dataclass(frozen=True, eq=False)
class Reader:
    """What the members of a group read.

    Attributes:
        labels: In the order of the group's dimensions.
        steps: The latest step that each member reads. # (members,)
    """

    labels: tuple[Label, ...]
    steps: Tensor


@dataclass(frozen=True, eq=False)
class StepShape:
    """The groups of a chain, by what they read.

    Attributes:
        T: The number of steps.
        sizes: How many values each latent of a step has.
        plates: Of all latents.
        histories: How many of its latest values the state holds; 0 where a latent is local.
        present: At which steps each latent is there. # (latents, T)
        unary: Groups that read the state of one step, or latents local to it.
        couples: Groups that read two states.
        free: Groups that read no latent.
        moves: How messages go from one step to the next.
    """

    T: int
    sizes: tuple[int, ...]
    plates: tuple[str, ...]
    histories: tuple[int, ...]
    present: Tensor
    unary: Mapping[int, Reader]
    couples: Mapping[int, Reader]
    free: tuple[int, ...]
    moves: Moves

    @property
    def locals(self) -> tuple[Label, ...]:
        """Labels of latents that are local to a step."""
        return tuple((c, 0) for c, h in enumerate(self.histories) if h == 0)

    def eligible(self, graph: FactorGraph) -> list[int]:
        """Groups whose arguments are the same at all steps and for all sequences."""

        def is_same(group: Group) -> bool:
            lead = 1 + group.n_plates
            return all(n == 1 for a in group.arguments.values() for n in a.shape[:lead])

        moving = [g for g in self.couples if not graph.groups[g].observed]
        reading = [g for g in (*moving, *self.unary) if is_same(graph.groups[g])]
        return sorted([*self.free, *reading])


@dataclass(frozen=True, eq=False)
class _Places:
    """Where latents are: which of a step's, and the step."""

    stems: tuple[Stem, ...]
    kinds: tuple[Latent, ...]
    present: Tensor
    first: int
    by_name: Mapping[str, Label] | None

    def of(self, name: str) -> Label | None:
        """The number of a latent, and its step."""
        if self.by_name is not None:
            return self.by_name.get(name)
        for c, stem in enumerate(self.stems):
            t = stem.step(name)
            if t is not None:
                return c, t - self.first
        return None

    def readers(self, group: Group) -> list[tuple[list[int], Reader]] | None:
        """The members of a group that read alike, and what; None where one reads no steps."""
        if isinstance(group.members, Members):
            found = [self._of_stretch(s) for s in group.members.stretches]
        else:
            found = [self._of_member(dims[group.n_plates :]) for dims in group.dims]
        alike: dict[tuple[Label, ...], list[tuple[range, range]]] = {}
        begin = 0
        for own in found:
            if own is None:
                return None
            labels, steps = own
            alike.setdefault(labels, []).append((range(begin, begin + len(steps)), steps))
            begin += len(steps)
        out = []
        for labels, each in alike.items():
            steps = torch.cat([torch.arange(r.start, r.stop) for _, r in each])
            out.append(([i for members, _ in each for i in members], Reader(labels, steps)))
        return out

    def _of_member(self, read: Sequence[str]) -> tuple[tuple[Label, ...], range] | None:
        places = [self.of(name) for name in read]
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return None
        last = max((t for _, t in known), default=0)
        return tuple((c, last - t) for c, t in known), range(last, last + 1)

    def _of_stretch(self, stretch: Stretch) -> tuple[tuple[Label, ...], range] | None:
        if len(stretch) == 1:
            return self._of_member(stretch.dims_of(0)[len(stretch.plates) :])
        lags: list[Label] = []
        for read in stretch.read:
            if not isinstance(read, StepRead) or read.stem not in self.stems:
                return None
            lags.append((self.stems.index(read.stem), read.lag))
        least = min((lag for _, lag in lags), default=0)
        begin = self.first + least
        steps = range(stretch.start - begin, stretch.stop - begin)
        return tuple((c, lag - least) for c, lag in lags), steps


def why_no_steps(latents: Mapping[str, Latent]) -> Finding | None:
    """Why latents that share factors are no steps of a chain, whatever the factors."""
    where = sites_in_words(names_of(latents))
    if len(latents) < 3:
        return Finding(where, "fewer than three latents are no chain")
    first, *others = kinds_of(latents)
    if any(v.plates != first.plates for v in others):
        return Finding(where, "latents of different plates: no kernel")
    return None


@dataclass(frozen=True, eq=False)
class AlikeMembers:
    """Members of a group that read alike.

    Attributes:
        group: The number of the group.
        members: Theirs; None where it is all of them.
    """

    group: int
    members: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Parts:
    """A graph as a chain: its groups in parts, numbered by their order, and what each part reads.

    Attributes:
        shape: The chain; its groups are these parts.
        parts: All parts.
        names: For each latent which of a step's it is, and the step.
    """

    shape: StepShape
    parts: tuple[AlikeMembers, ...]
    names: Callable[[str], Label | None]


@dataclass(frozen=True, eq=False)
class StepGraph:
    """A graph whose groups read the steps of a chain, all members of a group alike.

    Attributes:
        graph: The graph, collapsed; some groups may have been taken apart.
        origin: For each of its groups that of the other graph that it was taken from.
        shape: What its groups read.
    """

    graph: FactorGraph
    origin: tuple[int, ...]
    shape: StepShape


def step_graph(graph: FactorGraph) -> StepGraph | Finding:
    """The chain of product states that a collapsed graph is, or why it is none; by looking only."""
    for group in graph.groups:
        if group.role is not Role.POINT and group.family is None:
            site = group.members[0]
            what = f"'{site}' ({group.distribution}) has no sums: no kernel"
            return Finding(f"site '{site}'", what)
    found = step_parts(graph, False)
    if isinstance(found, Finding):
        return found
    groups = [
        graph.groups[part.group]
        if part.members is None
        else of_members(graph.groups[part.group], part.members)
        for part in found.parts
    ]
    if len(groups) > len(graph.groups):
        graph = collapsed(replace(graph, groups=tuple(groups)))
    return StepGraph(graph, tuple(part.group for part in found.parts), found.shape)


def step_parts(graph: FactorGraph, beyond: bool) -> Parts | Finding:
    """The chain of product states that a graph is, or why it is none.

    Args:
        graph: The graph.
        beyond: Whether groups may be in further plates, over which they are summed, and have to be
            in those of the latents.
    """
    finding = why_no_steps(graph.latents)
    if finding is not None:
        return finding
    where = sites_in_words(names_of(graph.latents))
    places = _places(graph.latents)
    if places is None:
        what = f"{len(graph.latents)} latents that are no steps of a chain: no kernel"
        return Finding(where, what)
    plates = places.kinds[0].plates
    parts: list[AlikeMembers] = []
    readers: dict[int, Reader] = {}
    free: list[int] = []
    for g, group in enumerate(graph.groups):
        if group.role is Role.POINT:
            parts.append(AlikeMembers(g, None))
            continue
        found, site = places.readers(group), group.members[0]
        if found is None:
            what = f"'{site}' reads more than steps of a chain: no kernel"
            return Finding(f"site '{site}'", what)
        for members, reader in found:
            own = group.dims[members[0]][: group.n_plates]
            if not reader.labels:
                free.append(len(parts))
            elif not (set(plates) <= set(own) if beyond else own in ((), plates)):
                what = f"'{site}' ({group.distribution}) has plates of its own: no kernel"
                return Finding(f"site '{site}'", what)
            else:
                readers[len(parts)] = reader
            parts.append(AlikeMembers(g, None if len(found) == 1 else tuple(members)))
    sizes = tuple(kind.size for kind in places.kinds)
    histories = _histories(len(sizes), readers)
    couples = {
        g: r for g, r in readers.items() if any(lag >= histories[c] > 0 for c, lag in r.labels)
    }
    if not couples or places.present.shape[1] <= 2 * max(histories):
        return Finding(where, f"{len(graph.latents)} latents that are no chain: no kernel")
    states = math.prod(n ** max(h, 1) for n, h in zip(sizes, histories, strict=True))
    if states > MOST_STATES:
        return Finding(where, f"a state of {states:,} values is too large for a kernel")
    moves = Moves.of(sizes, histories, [set(r.labels) for r in couples.values()])
    if moves.cells > _MOST_PRODUCTS:
        what = f"{moves.cells:,} products from step to step are too many for a kernel"
        return Finding(where, what)
    unary = {g: r for g, r in readers.items() if g not in couples}
    T = places.present.shape[1]
    shape = StepShape(
        T, sizes, plates, histories, places.present, unary, couples, tuple(free), moves
    )
    return Parts(shape, tuple(parts), places.of)


def _histories(count: int, readers: Mapping[int, Reader]) -> tuple[int, ...]:
    """How many values of each latent the state holds."""
    histories = [0] * count
    for reader in readers.values():
        for c, lag in reader.labels:
            histories[c] = max(histories[c], lag)
    # A local latent of a factor that couples two states is carried too.
    for reader in readers.values():
        if any(lag >= histories[c] > 0 for c, lag in reader.labels):
            for c, _ in reader.labels:
                histories[c] = max(histories[c], 1)
    return tuple(histories)


def _places(latents: Mapping[str, Latent]) -> _Places | None:
    """Where each latent is, by the pattern of a loop or by name; None where names show no steps."""
    found = _by_pattern(latents) if isinstance(latents, LatentSeries) else None
    return _by_name(latents) if found is None else found


def _by_pattern(latents: LatentSeries) -> _Places | None:
    if len(latents.steps) != 1 or latents.before[-1]:
        return None
    start, stop, own = latents.steps[0]
    stems, kinds = tuple(stem for stem, _ in own), tuple(kind for _, kind in own)
    present = torch.zeros(len(own), stop, dtype=torch.bool)
    present[:, start:] = True
    for name, latent in latents.before[0].items():
        for c, (stem, kind) in enumerate(own):
            t = stem.step(name)
            if t is not None and t < start:
                if latent.size != kind.size:
                    return None
                present[c, t] = True
                break
        else:
            return None
    begin = int(present.any(0).long().argmax())
    return _Places(stems, kinds, present[:, begin:], begin, None)


def _by_name(latents: Mapping[str, Latent]) -> _Places | None:
    stems: dict[Stem, list[str]] = {}
    steps: dict[str, int] = {}
    for name in latents:
        match = _NUMBER.match(name)
        if match is None:
            return None
        before, digits, after = match.groups()
        stems.setdefault(Stem(before, after), []).append(name)
        steps[name] = int(digits)
    number = {step: t for t, step in enumerate(sorted(set(steps.values())))}
    present = torch.zeros(len(stems), len(number), dtype=torch.bool)
    by_name: dict[str, Label] = {}
    kinds = []
    for c, own in enumerate(stems.values()):
        kind = latents[own[0]]
        if any(latents[name].size != kind.size for name in own):
            return None
        kinds.append(kind)
        for name in own:
            by_name[name] = (c, number[steps[name]])
            present[by_name[name]] = True
    return _Places(tuple(stems), tuple(kinds), present, 0, by_name)


def labels_of(shape: StepShape) -> tuple[Label, ...]:
    """The labels of the state, then those of local latents."""
    return (*shape.moves.state, *in_order(shape.locals))


@dataclass(frozen=True, eq=False)
class Locals:
    """Latents that are local to a step and share factors.

    Attributes:
        reads: Labels of the state that their factors read.
        own: Their own labels.
        groups: The groups that read them.
    """

    reads: tuple[Label, ...]
    own: tuple[Label, ...]
    groups: tuple[int, ...]


def locals_of(shape: StepShape) -> tuple[Locals, ...]:
    """Latents that are local to a step, those together that share factors."""
    sets: list[tuple[set[Label], set[Label], list[int]]] = []
    own = set(shape.locals)
    for g, reader in shape.unary.items():
        read = set(reader.labels)
        if not read & own:
            continue
        new = (read & own, read - own, [g])
        for other in [s for s in sets if s[0] & new[0]]:
            sets.remove(other)
            new = (new[0] | other[0], new[1] | other[1], [*other[2], *new[2]])
        sets.append(new)
    return tuple(Locals(in_order(reads), in_order(local), tuple(g)) for local, reads, g in sets)


def absent_from(shape: StepShape) -> tuple[tuple[Label, Tensor], ...]:
    """Labels that have no value at some steps, and these steps: the state holds the first one there."""
    absent = []
    for c, lag in labels_of(shape):
        there = torch.zeros(shape.T, dtype=torch.bool)
        there[lag:] = shape.present[c, : shape.T - lag]
        if not bool(there.all()):
            absent.append(((c, lag), (~there).nonzero().squeeze(-1)))
    return tuple(absent)
