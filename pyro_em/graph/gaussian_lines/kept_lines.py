"""Lines that were read on other data: whether they are those of the data at hand.

Where each coefficient is one element of a parameter, and each offset too, or zero, a line holds no
number of the data. A program that did the same operations then has another line only if the data
multiplied something by zero or one, or added zero. A run at moved parameters and random values of the
latents shows that: its derivative along a random direction, and its mean.

Coefficients may hold zeros and ones beside, as a random walk has them. They may be the data's: the
derivative has to be the same to the bit then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.sparse_lines import is_close
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.gaussian_lines.jacobians import SiteJacobian, SitePlace
from pyro_em.graph.gaussian_lines.lines import Line, Read, mean_at
from pyro_em.graph.gaussian_lines.lines_by_rows import lines_of
from pyro_em.graph.gaussian_lines.read_lines import random_values
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import GivenGaussians
from pyro_em.tracing.parameters import at_moved, values_of

_MOST = 2**20  # numbers that are kept of one model


def without_data(lines: Mapping[str, Line]) -> bool:
    """Whether lines hold no number of the data, and are small enough to be kept."""
    return _are_kept(lines) and all(_is_of_parameters(r.coefficient) for r in _reads(lines))


def may_be_kept(lines: Mapping[str, Line]) -> bool:
    """Whether `are_as_read` can tell that lines are those of other data, too."""
    if not _are_kept(lines):
        return False
    return all(_is_of_parameters(r.coefficient) or _has_units(r.coefficient) for r in _reads(lines))


def _are_kept(lines: Mapping[str, Line]) -> bool:
    """Whether lines are small, rows read one element of a latent, and offsets are no data's."""
    size = sum(r.elements.numel() + r.coefficient.constant.numel() for r in _reads(lines))
    if size > _MOST or any(r.only is not None for r in _reads(lines)):
        return False
    return all(_is_of_parameters(x.offset) or _is_zero(x.offset) for x in lines.values())


def _reads(lines: Mapping[str, Line]) -> list[Read]:
    return [r for line in lines.values() for r in line.reads]


def _is_of_parameters(binding: Binding) -> bool:
    """Whether each element is one of a parameter as it stands."""
    used = _elements_of_parameters(binding)
    return used is not None and bool(used.all())


def _has_units(binding: Binding) -> bool:
    """Whether each element is one of a parameter as it stands, zero, one or minus one."""
    used = _elements_of_parameters(binding)
    if used is None:
        return False
    size = binding.constant.abs()
    return bool((used | (size == 0) | (size == 1)).all())


def _elements_of_parameters(binding: Binding) -> Tensor | None:
    """Which elements are those of parameters as they stand; None where they are not that simple."""
    if binding.how == "constant":
        return torch.zeros_like(binding.constant, dtype=torch.bool)
    if binding.how != "selection" or any(
        s.maps or s.factor is not None for s in binding.selections
    ):
        return None
    return torch.stack([s.index >= 0 for s in binding.selections]).any(0)


def _is_zero(binding: Binding) -> bool:
    return binding.how == "constant" and not bool((binding.constant != 0).any())


def lines_again(
    known: Mapping[str, Line],
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    graph: FactorGraph,
    sites: Mapping[str, Mapping[str, Any]],
    *,
    bound: bool,
) -> Mapping[str, Line]:
    """How the Gaussian latents of a model enter means, on the data at hand.

    Args:
        known: Lines that were read on other data; none where they are not kept.
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        graph: As a run with all of them at zero shows it.
        sites: As that run traced them.
        bound: Whether bindings are of use, because an M-step follows.

    Raises:
        NotLinear: If a latent has a child that is not linear in it and Gaussian.
    """
    run = model, args, kwargs, structure
    is_known = known and offsets_are_as_read(known, graph, sites, values_of(graph.parameters))
    if is_known and are_as_read(known, *run):
        return known
    return lines_of(*run, bound=bound)


def offsets_are_as_read(
    lines: Mapping[str, Line],
    graph: FactorGraph,
    sites: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Tensor],
) -> bool:
    """Whether means in a run with all latents at zero are the offsets, to the bit.

    Args:
        lines: As they were read on other data.
        graph: As the run shows it.
        sites: As the run traced them; of a loop over indices they are those of its template.
        parameters: Constrained values in that run.
    """
    layout = None
    if graph.structure.series is not None:
        own = {name: dict(sites[name]) for name in graph.structure.as_run.sites}
        layout = FactorLayout(own, graph.structure.as_run)
    for name, line in lines.items():
        if layout is not None:
            place = SitePlace.of(name, layout)
            found = place.compact(place.loc(sites[name])).detach()
        else:
            group, i = graph.group_of(name)
            found = group.arguments["loc"][i].detach()
        expected = line.offset.evaluate(parameters)[0].detach().to(found.dtype)
        try:
            if not torch.equal(*torch.broadcast_tensors(found, expected)):
                return False
        except RuntimeError:
            return False
    return True


def are_as_read(
    lines: Mapping[str, Line],
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
) -> bool:
    """Whether a run at moved parameters and random values of the latents has these lines.

    Args:
        lines: As they were read on other data.
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
    """
    values = {n: v.requires_grad_() for n, v in random_values(model, 31).items()}
    with at_moved(structure.parameters, seed=31):
        run = run_enumerated(model.at(values), args, kwargs, structure, limit=None)
        parameters = values_of(run.parameters)
        layout = FactorLayout(run.sites, structure.as_run)
        for name, line in lines.items():
            place = SitePlace.of(name, layout)
            loc = place.loc(run.sites[name])
            if place.sizes != line.sizes or place.scope != line.scope:
                return False
            total = line.offset.evaluate(parameters).detach()
            for read in line.reads:
                leaf = values[read.latent]
                jacobian = SiteJacobian.of(place, loc, leaf, run.sites[read.latent])
                there = jacobian.of_all(leaf.detach()).detach().unsqueeze(0)
                nothing = Binding("constant", (), torch.zeros_like(line.offset.constant))
                alone = replace(line, offset=nothing, reads=(read,))
                expected = mean_at(alone, parameters, values)
                pair = torch.broadcast_tensors(there, expected.to(there.dtype))
                same = is_close if _is_of_parameters(read.coefficient) else torch.equal
                if not same(*pair):
                    return False
                total = total + expected
            found = place.compact(loc).detach().unsqueeze(0)
            if not is_close(*torch.broadcast_tensors(found, total.to(found.dtype))):
                return False
    return True
