"""Lines of large data, whose rows have Gaussian latents of their own: read from a few rows.

A run at random values of the latents makes vectors of each row, and derivatives several times as many.
What is read of them is mostly the same in every row: loadings, means. So a few rows are read by
themselves, with the columns of the model's arguments in place of theirs where numbers differ
(`pyro_em.graph.many_rows.given_rows`), and runs on slices of all rows say whether that is so of each:
autograd shows what reaches a mean and by which operations, a random vector its coefficients, and zero
its offset. Where it is not so, all rows are read at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import PyroEMError
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.linearity import Breaks, why_not_linear
from pyro_em.graph.bindings.named_leaves import NamedLeaves
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.gaussian_lines.jacobians import SitePlace
from pyro_em.graph.gaussian_lines.lines import Line, NotLinear, Read
from pyro_em.graph.gaussian_lines.means import latents_read
from pyro_em.graph.gaussian_lines.predictions import unlike
from pyro_em.graph.gaussian_lines.read_lines import hidden, random_values, read_lines
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.many_rows.given_rows import Given, NotGiven, in_all_rows, without_zeros
from pyro_em.graph.many_rows.slices import Slices, on_rows_of
from pyro_em.graph.structure import Structure
from pyro_em.tracing.freed import return_freed_memory
from pyro_em.tracing.given import GivenGaussians
from pyro_em.tracing.parameters import at_moved, values_of
from pyro_em.tracing.runs import Run

_FEW = 64  # rows that are read by themselves


def lines_of(
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    bound: bool = True,
) -> dict[str, Line]:
    """The mean of every site that is a Gaussian latent, or reads one; see `read_lines`.

    Args:
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        bound: Whether bindings are of use, because an M-step follows.

    Raises:
        NotLinear: If a latent has a child that is not linear in it and Gaussian.
    """
    slices = Slices.of(args, kwargs, structure) if bound else None
    found = None if slices is None else _by_rows(model, kwargs, slices)
    return read_lines(model, args, kwargs, structure, bound=bound) if found is None else found


def are_of_rows(lines: Mapping[str, Line]) -> bool:
    """Whether each row reads latents of its own, as the first row does, in static lines."""
    rows = {line.sizes[:1] for line in lines.values()}
    if len(rows) != 1 or not (size := rows.pop()) or size[0] < 2:
        return False
    inner = {name: math.prod(line.sizes[1:]) for name, line in lines.items()}
    return all(
        line.is_static
        and all(
            r.only is None and is_straight(r.elements, size[0], inner[r.latent]) for r in line.reads
        )
        for line in lines.values()
    )


def is_straight(elements: Tensor, rows: int, inner: int) -> bool:
    """Whether each row reads elements of its own, and in the same order as the first row does.

    Args:
        elements: What rows read. # (rows * …,)
        rows: How many there are.
        inner: How many elements of the latent each row has.
    """
    own = elements.reshape(rows, -1)
    begins = torch.arange(rows, device=own.device).unsqueeze(-1) * inner
    is_own = bool(((own[0] >= 0) & (own[0] < inner)).all())
    return is_own and bool((own - begins == own[:1]).all())


def _by_rows(
    model: GivenGaussians, kwargs: dict[str, Any], slices: Slices
) -> dict[str, Line] | None:
    """The lines of all rows; None where a few rows and the arguments do not tell them."""
    return_freed_memory(a for a in slices.args if isinstance(a, Tensor))
    few = slices.spread(_FEW)
    try:
        args, structure = slices.at(few)
        alone = read_lines(on_rows_of(model, structure), args, kwargs, structure)
        given = Given(slices, few)
        number = torch.arange(slices.rows, device=given.rows.device).unsqueeze(-1)
        inner = {name: math.prod(line.sizes[1:]) for name, line in alone.items()}
        lines = {name: _of_all(line, given, number, inner) for name, line in alone.items()}
        for rows in slices:
            args, structure = slices.at(rows)
            own = {name: line_of_rows(line, rows) for name, line in lines.items()}
            if not _are_those_of(own, on_rows_of(model, structure), args, kwargs, structure):
                return None
    except (NotGiven, NotLinear, PyroEMError, RuntimeError, ValueError, IndexError):
        return None  # what is wrong is said of all rows
    return lines


def _of_all(line: Line, given: Given, number: Tensor, inner: Mapping[str, int]) -> Line:
    """The line of all rows, from that of a few.

    Args:
        line: That of the few.
        given: The columns of the model's arguments.
        number: That of each row. # (N, 1)
        inner: How many elements of each latent a row has.

    Raises:
        NotGiven: If rows read elements other than their own, or numbers that are not given.
    """
    few = len(given.rows)
    if not line.is_static or line.sizes[:1] != (few,):
        raise NotGiven
    whole, lead = in_all_rows(given, len(number), 1), 1 + len(line.sizes)

    def of_all(binding: Binding) -> Binding:
        return without_zeros(binding, lead).mapped(whole)

    reads = []
    for read in line.reads:
        own = read.elements.reshape(few, -1)
        step, rows = inner[read.latent], number.to(own.device)
        if read.only is not None or not is_straight(read.elements, few, step):
            raise NotGiven
        elements = rows if own.shape[1] == 1 and step == 1 else rows * step + own[:1]
        reads.append(
            replace(read, elements=elements.reshape(-1), coefficient=of_all(read.coefficient))
        )
    sizes = (len(number), *line.sizes[1:])
    return replace(line, sizes=sizes, offset=of_all(line.offset), reads=tuple(reads))


def line_of_rows(line: Line, rows: slice) -> Line:
    """What some rows read, their latents counted from the first of them.

    Args:
        line: That of all rows, each of which reads elements of its own, as the first one does.
        rows: Which of them.
    """

    def cut(t: Tensor) -> Tensor:
        return t[:, rows] if t.shape[1] > 1 else t

    def of_read(read: Read) -> Read:
        elements = read.elements[: (rows.stop - rows.start) * math.prod(line.sizes[1:])]
        return replace(read, elements=elements, coefficient=read.coefficient.mapped(cut))

    return replace(
        line,
        sizes=(rows.stop - rows.start, *line.sizes[1:]),
        offset=line.offset.mapped(cut),
        reads=tuple(map(of_read, line.reads)),
    )


def _are_those_of(
    lines: Mapping[str, Line],
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
) -> bool:
    """Whether runs at moved parameters show some lines, and nothing else that reads latents.

    Args:
        lines: Of the rows at hand.
        model: The model with these rows of its Gaussian latents.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: The skeleton of it.

    Raises:
        NotLinear: If a mean is not linear, or something else of a site reads a latent.
    """
    values = {n: v.requires_grad_() for n, v in random_values(model, 31).items()}
    with at_moved(structure.parameters, seed=31):
        with Breaks(values) as breaks:
            run = run_enumerated(model.at(values), args, kwargs, structure, limit=None)
        if breaks.found or not _read_the_same(lines, run, values, structure):
            return False
        parameters = values_of(run.parameters)
        layout = FactorLayout(run.sites, structure.as_run)
        at_zero = run_enumerated(model, args, kwargs, structure, limit=None)
        zeros = FactorLayout(at_zero.sites, structure.as_run)
        if unlike(lines, zeros, parameters, model.values):
            return False
        return hidden(lines, (run, at_zero), values, parameters, layout) is None


def _read_the_same(
    lines: Mapping[str, Line], run: Run, values: Mapping[str, Tensor], structure: Structure
) -> bool:
    """Whether sites read the latents of their lines, and by operations that are linear."""
    leaves = NamedLeaves.of(values)
    for name in structure.sites:
        site = run.sites[name]
        read = latents_read(name, site, leaves)
        known = () if name not in lines else dict.fromkeys(r.latent for r in lines[name].reads)
        if set(read) != set(known):
            return False
        if read and why_not_linear(SitePlace.loc(site), leaves):
            return False
    return True
