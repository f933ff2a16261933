"""Means that lines predict, against those that a run has.

The steps of a loop have one small mean each, all of one form: they are predicted and compared together.
A large mean is compared in parts along its first plate, so that little is held at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.sparse_lines import is_rounding, rounding
from pyro_em.graph.gaussian_lines.jacobians import SitePlace
from pyro_em.graph.gaussian_lines.lines import Line, means_at
from pyro_em.graph.layout import FactorLayout

_CELLS = 2**22  # numbers that are compared at once

_SMALL = 256  # numbers of a mean that is compared with others of its form


def unlike(
    lines: Mapping[str, Line],
    layout: FactorLayout,
    parameters: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> list[str]:
    """Sites whose mean in a run is not what their lines give at parameters and latents' values.

    Args:
        lines: How the latents enter each site.
        layout: Of the run.
        parameters: Constrained values in it, by name.
        values: Values of the latents in it. # (*batch, *event)

    Returns:
        Their names, in the order of the lines.
    """
    off: set[str] = set()
    small: list[_Small] = []
    known: dict[int, Tensor] = {}  # steps of a loop mostly share their bindings

    def at_parameters(binding: Binding) -> Tensor:
        if id(binding) not in known:
            known[id(binding)] = binding.evaluate(parameters).detach()
        return known[id(binding)]

    for name, line in lines.items():
        place = SitePlace.of(name, layout)
        actual = place.compact(place.loc(layout.sites[name])).detach().unsqueeze(0)
        if actual.numel() <= _SMALL:
            coefficients = [at_parameters(read.coefficient) for read in line.reads]
            small.append(_Small(line, actual, at_parameters(line.offset), coefficients))
        elif not _is_as_predicted(line, actual, parameters, values):
            off.add(name)
    alike: dict[Hashable, list[_Small]] = {}
    for member in small:
        alike.setdefault(member.form(), []).append(member)
    for members in alike.values():
        off.update(_unlike_of_one_form(members, values))
    return [name for name in lines if name in off]


class _Small(NamedTuple):
    """A small mean, and what it is predicted from at given parameters.

    Attributes:
        line: How the latents enter it.
        actual: The mean that a run has. # (1, *sizes or 1s, *scope, *event)
        offset: b. # (1, *sizes or 1s, *scope, *event)
        coefficients: C of each latent that it reads. # (1, *sizes or 1s, *scope, *event, q)
    """

    line: Line
    actual: Tensor
    offset: Tensor
    coefficients: list[Tensor]

    def form(self) -> Hashable:
        """What is equal of means that can be predicted together."""
        tensors = (self.actual, self.offset, *self.coefficients)
        return self.line.sizes, *((t.shape, t.dtype, t.device) for t in tensors)


def _unlike_of_one_form(members: list[_Small], values: Mapping[str, Tensor]) -> Iterator[str]:
    """Those of small means of one form that a run does not have as predicted."""
    actual = torch.cat([member.actual for member in members])
    if not actual.numel():
        return
    sizes = members[0].line.sizes
    expected = torch.cat([member.offset for member in members])
    for i, own in enumerate(members[0].coefficients):
        q, inner = own.shape[-1], own.dim() - 2 - len(sizes)
        coefficients = torch.cat([member.coefficients[i] for member in members])
        reads = [member.line.reads[i] for member in members]
        rows = torch.stack([r.rows_of(values[r.latent].detach().reshape(-1, q)) for r in reads])
        rows = rows.to(own.dtype).reshape(len(members), *sizes, *(1,) * inner, q)
        expected = expected + (coefficients * rows).sum(-1)
    off = (actual - expected.to(actual.dtype)).reshape(len(members), -1).abs().amax(-1)
    size = actual.reshape(len(members), -1).abs().amax(-1)
    agrees = off <= rounding(actual.dtype) * size
    for member, is_right in zip(members, agrees.tolist(), strict=True):
        if not is_right:
            yield member.line.site


def _is_as_predicted(
    line: Line, actual: Tensor, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> bool:
    """Whether a large mean is what its line gives. # (1, *sizes or 1s, *scope, *event)"""
    for part, expected in means_at(line, parameters, values, _CELLS):
        there = actual[:, part] if line.sizes and actual.shape[1] > 1 else actual
        if not is_rounding(there - expected.to(actual.dtype), actual):
            return False
    return True
