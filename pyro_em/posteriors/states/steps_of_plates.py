"""Sites of which each row of the first plate reads its own step of a chain, as one piece per step.

    y ~ N(C h_t + b) for all t in one plate, with h_0, h_1, … of a loop

A chain takes such pieces as it takes the sites of a loop. The group of the site stays what it is: its
rows in order are those of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.lines import Line, Read
from pyro_em.tracing.sites import Role

_MOST = 16  # latents beside the chain's that all steps read


@dataclass(frozen=True, eq=False)
class Piece:
    """A site, or one step of it.

    Attributes:
        line: What its mean reads.
        whole: The line of the whole site with one read in place of those of all steps; None of a site
            that is not in pieces.
        steps: How many pieces the site has.
        step: The place of this one among them.
    """

    line: Line
    whole: Line | None = None
    steps: int = 1
    step: int = 0


def by_steps(line: Line, graph: FactorGraph) -> list[Piece]:
    """The pieces of a site, or the site itself where its rows do not read a step each.

    Args:
        line: What its mean reads.
        graph: The factor graph.
    """
    series: dict[int, list[Read]] = {}
    for read in line.reads:
        series.setdefault(id(read.coefficient), []).append(read)
    steps = line.sizes[0] if line.sizes else 1
    counts = [len(own) for own in series.values()]
    of_all = counts.count(1)
    if steps < 2 or max(counts, default=0) < steps or of_all > _MOST:
        return [Piece(line)]
    if any(1 < count < steps for count in counts):
        return [Piece(line)]
    group, _ = graph.group_of(line.site)
    if group.role is not Role.DATA or len(group.members) > 1:
        return [Piece(line)]
    each: list[list[Read]] = [[] for _ in range(steps)]
    for own in series.values():
        if len(own) == 1:
            rows = own[0].elements.reshape(steps, -1)
            for t in range(steps):
                coefficient = _at(own[0].coefficient, t)
                each[t].append(replace(own[0], elements=rows[t], coefficient=coefficient))
            continue
        found = _steps_of(own, steps)
        if found is None:
            return [Piece(line)]
        for t, (k, elements) in enumerate(found):
            each[t].append(
                replace(own[k], elements=elements, coefficient=_at(own[k].coefficient, t))
            )
    whole = replace(line, reads=tuple(own[0] for own in series.values()))
    out = []
    for t, reads in enumerate(each):
        offset = _at(line.offset, t)
        piece = Line(line.site, line.sizes[1:], line.scope, line.event, offset, tuple(reads))
        out.append(Piece(piece, whole, steps, t))
    return out


def _steps_of(reads: Sequence[Read], steps: int) -> list[tuple[int, Tensor]] | None:
    """For each step which of some latents it reads, and its elements; None where it is not one."""
    elements = torch.stack([r.elements for r in reads]).reshape(len(reads), steps, -1)
    there = elements >= 0
    used = there.any(-1)  # (reads, steps)
    if bool((used.sum(0) != 1).any()):
        return None
    chosen = used.to(torch.uint8).argmax(0).tolist()
    return [(k, elements[k, t]) for t, k in enumerate(chosen)]


def _at(binding: Binding, step: int) -> Binding:
    """What a site's cells hold at one element of its first plate. # (1, S|1, …) to (1, …)"""
    return binding.mapped(lambda x: x[:, step if x.shape[1] > 1 else 0])


def first_steps(
    pieces: Sequence[Piece], graph: FactorGraph, read: Mapping[str, Mapping[str, Tensor]]
) -> tuple[FactorGraph, dict[str, Line], Mapping[str, Mapping[str, Tensor]]]:
    """Some first pieces as sites: the graph with fewer rows of sites in pieces, lines, what was read.

    Args:
        pieces: All sites, of those in pieces the first few.
        graph: The factor graph.
        read: Per site what its mean is made of, where no binding gives it.
    """
    chosen: dict[str, list[Piece]] = {}
    for piece in pieces:
        chosen.setdefault(piece.line.site, []).append(piece)
    lines: dict[str, Line] = {}
    some = dict(read)
    groups = {id(g): g for g in graph.groups}
    for site, own in chosen.items():
        whole = own[0].whole
        if whole is None:
            lines[site] = own[0].line
            continue
        at = [p.step for p in own]

        def rows(t: Tensor, at: list[int] = at) -> Tensor:
            return t[:, at] if t.shape[1] > 1 else t

        lines[site] = _line_of(whole, own, rows)
        group, _ = graph.group_of(site)
        groups[id(group)] = _with_rows(group, len(at), rows)
        some[site] = {part: rows(t) for part, t in read.get(site, {}).items()}
    return replace(graph, groups=tuple(groups.values())), lines, some


def _line_of(whole: Line, own: Sequence[Piece], rows: Callable[[Tensor], Tensor]) -> Line:
    """The line of a site with some of its steps."""
    reads = []
    for k, first in enumerate(whole.reads):
        coefficient = first.coefficient.mapped(rows)
        for i, piece in enumerate(own):
            step = piece.line.reads[k]
            elements = torch.full((len(own), len(step.elements)), -1, device=step.elements.device)
            elements[i] = step.elements
            reads.append(replace(step, elements=elements.reshape(-1), coefficient=coefficient))
    offset = whole.offset.mapped(rows)
    return replace(whole, sizes=(len(own), *whole.sizes[1:]), offset=offset, reads=tuple(reads))


def _with_rows(group: Group, count: int, rows: Callable[[Tensor], Tensor]) -> Group:
    """A group of one member with some elements of its first plate."""

    def of_scale(s: Tensor | float) -> Tensor | float:
        return rows(s.unsqueeze(0))[0] if isinstance(s, Tensor) and s.dim() else s

    return replace(
        group,
        sizes=(count, *group.sizes[1:]),
        arguments={a: rows(t) for a, t in group.arguments.items()},
        bindings={a: b.mapped(rows) for a, b in group.bindings.items()},
        value=rows(group.value),
        mask=None if group.mask is None else rows(group.mask),
        elements=None if group.elements is None else rows(group.elements),
        scale=tuple(of_scale(s) for s in group.scale),
    )
