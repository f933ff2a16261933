"""How Gaussian latents enter the mean of a site: loc = b(θ) + Σ C(θ) h[element].

A row reads one element of a latent's plates through each coefficient C. Both b and C are bound to the
parameters as any argument is. `pyro_em.graph.gaussian_lines.read_lines` reads them from runs of the
model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding
from pyro_em.families.registry import family_of
from pyro_em.graph.bindings.binding import Binding, is_in_order

GAUSSIAN = ("Normal", "MultivariateNormal")


@dataclass(frozen=True, eq=False)
class Read:
    """One latent in the mean of a site.

    Attributes:
        latent: The latent.
        elements: For each row of the site the flat number of the latent's element, −1 for none.
            # (rows,)
        coefficient: C, and how parameters reach it. # (1, *sizes or 1s, *scope, *event, q)
        only: The one element that it is about, where rows read several.
    """

    latent: str
    elements: Tensor
    coefficient: Binding
    only: int | None = None

    @cached_property
    def places(self) -> bytes:
        """The elements as a key."""
        out: bytes = self.elements.detach().cpu().to(torch.int64).numpy().tobytes()
        return out

    @cached_property
    def is_in_order(self) -> bool:
        """Whether the rows read the elements 0, 1, 2, …"""
        return is_in_order(self.elements)

    def rows_of(self, values: Tensor) -> Tensor:
        """The elements that rows read, zero where there is none. # (elements, q) to (rows, q)"""
        if len(self.elements) == len(values) and self.is_in_order:
            return values
        return values[self.elements.clamp(min=0)] * (self.elements >= 0).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Line:
    """The mean of a site as a function of Gaussian latents.

    Attributes:
        site: The site.
        sizes: Of its plates; their product is the number of rows.
        scope: Discrete latents that its mean, or its spread, depends on.
        event: Dimensions of its event, ``to_event`` included.
        offset: b, and how parameters reach it. # (1, *sizes or 1s, *scope, *event)
        reads: What it reads.
    """

    site: str
    sizes: tuple[int, ...]
    scope: tuple[str, ...]
    event: int
    offset: Binding
    reads: tuple[Read, ...]

    @property
    def parts(self) -> dict[str, Binding]:
        """All that the mean is made of, by name: the offset ``loc``, and the coefficients."""
        out = {"loc": self.offset}
        for read in self.reads:
            name = f"loc per '{read.latent}'"
            if name in out:
                name = f"{name} ({len(out)})"
            out[name] = read.coefficient
        return out

    def as_read(self) -> Line:
        """The mean at the parameters at which it was read, where no binding gives it."""

        def known(binding: Binding) -> Binding:
            return binding if binding.is_static else Binding("constant", (), binding.constant)

        reads = tuple(replace(r, coefficient=known(r.coefficient)) for r in self.reads)
        return replace(self, offset=known(self.offset), reads=reads)

    @property
    def is_static(self) -> bool:
        """Whether the mean can be recomputed from the parameters without the model."""
        return self.offset.is_static and all(r.coefficient.is_static for r in self.reads)


class NotLinear(Exception):
    """A latent is not linear and Gaussian; holds the finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def is_gaussian(fn: Any) -> bool:
    """Whether a distribution is a Normal or a MultivariateNormal, with any number of ``to_event``."""
    family = family_of(fn)
    return family is not None and family.name in (*GAUSSIAN, "IncompleteMultivariateNormal")


def is_matrix_of_rows(fn: Any) -> bool:
    """Whether a distribution is a MultivariateNormal for each of several rows of one event."""
    base, reinterpreted, _ = unwrap(fn)
    return isinstance(base, MultivariateNormal) and bool(reinterpreted)


def mean_at(line: Line, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """The mean of a site, predicted at parameters and values of the latents.

    Args:
        line: How the latents enter it.
        parameters: Constrained values by name.
        values: Values of the latents. # (*batch, *event)

    Returns:
        # (1, *sizes or 1s, *scope, *event)
    """
    ((_, out),) = means_at(line, parameters, values, 0)
    return out


def means_at(
    line: Line, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], cells: int
) -> Iterator[tuple[slice, Tensor]]:
    """The same in parts along the first plate, so that little is held at once; attached to nothing.

    Args:
        line: How the latents enter it.
        parameters: Constrained values by name.
        values: Values of the latents. # (*batch, *event)
        cells: How many numbers a part should have; 0 for all of them.

    Returns:
        Places along the first plate, each with # (1, *sizes or 1s, *scope, *event)
    """
    offset = line.offset.evaluate(parameters).detach()
    reads = []
    for read in line.reads:
        coefficient = read.coefficient.evaluate(parameters).detach()
        rows = values[read.latent].detach().reshape(-1, coefficient.shape[-1])
        rows = rows.to(coefficient.dtype)
        reads.append((coefficient, read.rows_of(rows)))
    first, rest = (line.sizes[0], math.prod(line.sizes[1:])) if line.sizes else (1, 1)
    own = offset.shape[1 + len(line.sizes) :].numel() * rest
    step = max(1, cells // max(own, 1)) if cells and reads else first
    for begin in range(0, max(first, 1), max(step, 1)):
        part = slice(begin, min(begin + step, first))
        out = _part_of(offset, part, line.sizes)
        sizes = (part.stop - part.start, *line.sizes[1:]) if line.sizes else ()
        for coefficient, rows in reads:
            chosen = rows[part.start * rest : part.stop * rest]
            image = _applied(_part_of(coefficient, part, line.sizes), chosen, sizes)
            out = image.add_(out) if _fits(out, image) else image + out
        yield part, out


def _fits(t: Tensor, into: Tensor) -> bool:
    """Whether a tensor can be added to another one where that lies."""
    if t.dtype != into.dtype or t.dim() != into.dim():
        return False
    return all(own in (1, size) for own, size in zip(t.shape, into.shape, strict=True))


def _part_of(t: Tensor, part: slice, sizes: tuple[int, ...]) -> Tensor:
    """A part along the first plate, where there is one that changes the tensor."""
    return t[:, part] if sizes and t.shape[1] > 1 else t


def _applied(coefficient: Tensor, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """C h for the elements that rows read. # (1, *sizes, *scope, *event)"""
    q, own = coefficient.shape[-1], coefficient.shape[1 + len(sizes) : -1]
    if coefficient.shape[: 1 + len(sizes)].numel() == 1:
        return (rows @ coefficient.reshape(-1, q).mT).reshape(1, *sizes, *own)
    return (coefficient * rows.reshape(1, *sizes, *(1,) * len(own), q)).sum(-1)
