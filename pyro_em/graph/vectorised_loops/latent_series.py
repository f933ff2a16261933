"""The latents of loops as one mapping, of any number of steps, and the chain that they may be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.graph.stretches import Members, Stem, StepRead, Stretch
from pyro_em.tracing.sites import Role


class LatentSeries(Mapping[str, Latent]):
    """The latents of loops, in the order of the model.

    Args:
        before: Those in front of each stretch of steps, and behind the last one.
        steps: For each stretch the first step, the step after the last one, and the latents of one
            step with the stems of their names.
    """

    def __init__(
        self,
        before: Sequence[Mapping[str, Latent]],
        steps: Sequence[tuple[int, int, tuple[tuple[Stem, Latent], ...]]],
    ) -> None:
        self.before, self.steps = tuple(before), tuple(steps)

    def __getitem__(self, name: str) -> Latent:
        for single in self.before:
            if name in single:
                return single[name]
        for start, stop, latents in self.steps:
            for stem, latent in latents:
                t = stem.step(name)
                if t is not None and start <= t < stop:
                    return replace(latent, name=name)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self[name] is not None
        except KeyError:
            return False

    def __len__(self) -> int:
        own = sum(len(latents) * (stop - start) for start, stop, latents in self.steps)
        return own + sum(map(len, self.before))

    def __iter__(self) -> Iterator[str]:
        for single, (start, stop, latents) in zip(self.before, self.steps, strict=False):
            yield from single
            for t in range(start, stop):
                for stem, _ in latents:
                    yield stem.at(t)
        yield from self.before[-1]

    def stem(self) -> Stem | None:
        """That of all latents, where these are one for each step 0, 1, 2, … of a single loop."""
        if len(self.steps) != 1 or len(self.steps[0][2]) != 1 or self.before[-1]:
            return None
        (start, _, ((stem, latent),)), singles = self.steps[0], self.before[0]
        alike = all(v.plates == latent.plates and v.size == latent.size for v in singles.values())
        return stem if alike and list(singles) == [stem.at(t) for t in range(start)] else None


def kinds_of(latents: Mapping[str, Latent]) -> list[Latent]:
    """The latents, of the steps of loops one for all."""
    if not isinstance(latents, LatentSeries):
        return list(latents.values())
    steps = [v for _, _, own in latents.steps for _, v in own]
    return [*(v for single in latents.before for v in single.values()), *steps]


def names_of(latents: Mapping[str, Latent]) -> Sequence[str]:
    """The names of latents, in the order of the model."""
    stem = latents.stem() if isinstance(latents, LatentSeries) else None
    if stem is None:
        return list(latents)
    return Members([Stretch(stem, 0, len(latents), (), ())])


@dataclass(frozen=True, eq=False)
class ChainForm:
    """A graph whose latents are one for each step, each coupled with the next.

    Attributes:
        names: Of the latents.
        couples: The group of transitions, from each step to the next.
        unary: Groups that read one step, and which step each member reads. # (members,)
        free: Groups that read none.
    """

    names: Sequence[str]
    couples: int
    unary: Mapping[int, range | Tensor]
    free: tuple[int, ...]


def chain_form(graph: FactorGraph) -> ChainForm | None:
    """The chain that the steps of one loop are, by their pattern; None where it does not show it."""
    latents = graph.latents
    stem = latents.stem() if isinstance(latents, LatentSeries) else None
    if stem is None:
        return None
    T = len(latents)
    couples, free = [], []
    unary: dict[int, range | Tensor] = {}
    for g, group in enumerate(graph.groups):
        if group.role is Role.POINT:
            continue
        if not isinstance(group.members, Members):
            return None
        read = [_steps_read(s, stem, T) for s in group.members.stretches]
        if any(steps is None for steps in read):
            return None
        own = [steps for steps in read if steps is not None]
        degree = {len(steps) for steps in own}
        if degree == {0}:
            free.append(g)
        elif degree == {1}:
            unary[g] = _joined([r for (r,) in own])
        elif own == [(range(T - 1), range(1, T))]:
            couples.append(g)
        else:
            return None
    if len(couples) != 1 or T < 3:
        return None
    return ChainForm(names_of(latents), couples[0], unary, tuple(free))


def _joined(ranges: Sequence[range]) -> range | Tensor:
    """Ranges one after the other; a single range where they are one."""
    if all(a.stop == b.start for a, b in itertools.pairwise(ranges)):
        return range(ranges[0].start, ranges[-1].stop)
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges])


def _steps_read(stretch: Stretch, stem: Stem, T: int) -> tuple[range, ...] | None:
    """The steps of the chain that each member reads, in their order; None if it reads others."""
    out = []
    for read in stretch.read:
        if isinstance(read, str):
            t = stem.step(read)
            if t is None or len(stretch) > 1:
                return None
            steps = range(t, t + 1)
        elif isinstance(read, StepRead) and read.stem == stem:
            steps = range(stretch.start - read.lag, stretch.stop - read.lag)
        else:
            return None
        if steps.start < 0 or steps.stop > T:
            return None
        out.append(steps)
    return tuple(out)


def plates_of(group: Group) -> tuple[str, ...] | None:
    """The plates of all members; None where they differ."""
    if isinstance(group.members, Members):
        found = {s.plates for s in group.members.stretches}
    else:
        found = {dims[: group.n_plates] for dims in group.dims}
    return found.pop() if len(found) == 1 else None
