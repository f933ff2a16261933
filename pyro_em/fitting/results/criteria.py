"""The counts in information criteria: N observed rows, and p free parameters that the data determine.

    BIC = −2 log p(x; θ) + p log N                                  (Schwarz 1978)

A row all of whose observations are masked holds no information, and an element of a parameter that no
factor can read (never indexed, read under a mask alone, or of a component whose probability is a
structural zero) is not fitted: neither counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_em.errors import PyroEMError
from pyro_em.fitting.results.identified import Undetermined
from pyro_em.fitting.results.information_criteria import ONE, STEPS
from pyro_em.fitting.results.possible import Alive, possible_cells
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group, is_incomplete, seen_entries
from pyro_em.graph.stretches import Members
from pyro_em.graph.structure import Structure
from pyro_em.graph.vectorised_loops.latent_series import plates_of
from pyro_em.incomplete import distinct_patterns
from pyro_em.pieces import PIECE
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.sites import Role
from pyro_em.updates.update import Fixed

_SPREADS = (0.1, 1.0)  # of points at which it is seen what moves a density


def num_rows(program: Program) -> float:
    """Elements of the outermost data plate with any observed value, by their sample weights."""
    structure = program.structure.sketch
    nested = [i.nested for i in structure.sites.values() if i.role is Role.DATA and i.nested]
    if not nested:
        return _observed_steps(program)
    outermost = (*structure.data_plates, *nested[0])[0]
    if outermost not in structure.plates:
        return _observed_turns(program, outermost)
    plate = structure.plates[outermost]
    observed: Tensor | bool = False  # or which elements are
    weight: Tensor | None = None
    for _, group in _sites(program):
        if group.role is not Role.DATA:
            continue
        plates = plates_of(group)
        if plates is not None and outermost not in plates:
            continue
        if plates is not None and not isinstance(group.scales[0], Tensor):  # all members at once
            observed = _or_seen(observed, group.mask, 1 + plates.index(outermost))
            continue
        for i, dims in enumerate(group.dims):
            if outermost not in dims:
                continue
            axis = dims.index(outermost)
            observed = _or_seen(observed, None if group.mask is None else group.mask[i], axis)
            scale = group.scale[i]
            if weight is None and isinstance(scale, Tensor) and scale.shape[axis] == plate.size:
                weight = scale.movedim(axis, 0).reshape(plate.size, -1).amax(-1)
    if weight is not None:
        return float((weight * observed).sum())
    seen: float = plate.size
    if isinstance(observed, Tensor):  # a sum would make an integer of each
        seen = int(torch.count_nonzero(observed.expand(plate.size)))
    return (seen if observed is not False else 0.0) * plate.full_size / plate.size


def _or_seen(observed: Tensor | bool, mask: Tensor | None, axis: int) -> Tensor | bool:
    """Which elements are observed so far, or where a mask shows any; True for all."""
    if mask is None or observed is True:
        return True
    shown = mask.movedim(axis, 0)
    return shown.reshape(shown.shape[0], -1).any(-1) | observed


def _sites(program: Program) -> Iterator[tuple[int, Group]]:
    """All groups with their numbers, the sites of a block one by one."""
    for g, group in enumerate(program.graph.groups):
        if group.nested is not None:
            yield from ((g, site) for site in group.nested.groups)
        else:
            yield g, group


def counted(structure: Structure, rows: float) -> str:
    """What `num_rows` counts, in words.

    Args:
        structure: The model's.
        rows: What it counted.
    """
    sketch = structure.sketch
    nested = [i.nested for i in sketch.sites.values() if i.role is Role.DATA and i.nested]
    if not nested:
        return STEPS if rows > 1 else ONE
    return f"elements of plate '{(*sketch.data_plates, *nested[0])[0]}'"


def _observed_steps(program: Program) -> float:
    """Steps of one series without plates that have any observed value; 1 where there is no loop."""
    steps: dict[str, int] = {}
    for _, group in _sites(program):
        if group.belief is not None or group.role is not Role.DATA:
            continue
        seen = None if group.mask is None else group.mask.reshape(len(group.mask), -1).any(1)
        if seen is not None and len(seen) == 1:
            seen = seen.expand(len(group.members))
        for first, own in _alike_names(group.members):
            kind = re.sub(r"\d+", "#", first)
            steps[kind] = steps.get(kind, 0) + (
                len(own) if seen is None else int(seen[own.start : own.stop].sum())
            )
    return float(max(steps.values(), default=1))


def _alike_names(members: Sequence[str]) -> Iterator[tuple[str, range]]:
    """Names that differ in a number alone, by the first of them, and their places."""
    if not isinstance(members, Members):
        yield from ((name, range(i, i + 1)) for i, name in enumerate(members))
        return
    at = 0
    for stretch in members.stretches:
        yield stretch.name_of(0), range(at, at + len(stretch))
        at += len(stretch)


def _observed_turns(program: Program, plate: str) -> float:
    """Turns of a loop with any observed value."""
    size = program.structure.sequential[plate]
    turns = set()
    for name, info in program.structure.sites.items():
        if info.role is Role.DATA and plate in info.turns:
            group, i = program.graph.group_of(name)
            if group.mask is None or bool(group.mask[i].any()):
                turns.add(info.turns[plate] % size)
    return float(len(turns))


def count_free(
    parameters: Mapping[str, TracedParameter],
    updates: Mapping[str, object],
    structural_zeros: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
) -> int:
    """Number of free parameters through their constraints.

    Args:
        parameters: All parameters.
        updates: Their `ParameterUpdate`; fixed ones are not counted.
        structural_zeros: Per parameter where a probability was zero from the start.
        read: Per parameter which elements any factor reads; all by default.

    Returns:
        K − 1 for a simplex of K, D (D + 1) / 2 for a covariance, one per number otherwise.
    """
    total = 0
    for name, p in parameters.items():
        if isinstance(getattr(updates[name], "update", None), Fixed):
            continue
        ones = torch.ones_like(p.leaf, dtype=torch.bool)
        used = read.get(name, ones)
        base = p.constraint
        while isinstance(base, constraints.independent):
            base = base.base_constraint
        shape = type(base).__name__.lstrip("_")
        if base is constraints.simplex:
            zeros = structural_zeros.get(name, ~ones)
            alive = ((~zeros).sum(-1) - 1).clamp(min=0)
            total += int((alive * used.any(-1)).sum())
        elif shape.endswith("PositiveDefinite") or shape in (
            "LowerCholesky",
            "SoftplusLowerCholesky",
        ):
            total += int((used | used.mT).tril().sum())
        elif shape in ("CorrCholesky", "CorrMatrix", "UnitLowerCholesky"):
            d = ones.shape[-1]
            total += int(used.flatten(-2).any(-1).sum()) * d * (d - 1) // 2
        else:
            total += int(used.sum())
    return total


@torch.no_grad()
def free_parameters(
    program: Program,
    initial: Mapping[str, Tensor],
    *,
    without: Collection[str] = (),
    apart: Sequence[Undetermined] = (),
    read: Mapping[str, Tensor] | None = None,
) -> int:
    """p of a finished fit.

    Args:
        program: The model with its data.
        initial: The parameters where the fit began, whose zeros are structural.
        without: Parameters that are left out: point estimates of `estimated_locally`.
        apart: What no data determine.
        read: Which elements of each parameter any factor reads, where the program has not all data.
    """
    names = [n for n in program.graph.parameters if n not in without]
    return _count_of(program, initial, names, read) - sum(found.count for found in apart)


@torch.no_grad()
def local_estimates(program: Program, initial: Mapping[str, Tensor], names: Collection[str]) -> int:
    """Numbers of point estimates that are no parameters of the model, counted in the same way."""
    return _count_of(program, initial, names)


def _count_of(
    program: Program,
    initial: Mapping[str, Tensor],
    names: Collection[str],
    read: Mapping[str, Tensor] | None = None,
) -> int:
    zeros = {n: v == 0 for n, v in initial.items()}
    parameters = {n: program.graph.parameters[n] for n in names}
    read = elements_read(program, initial) if read is None else read
    return count_free(parameters, program.updates, zeros, read)


def estimated_locally(program: Program) -> set[str]:
    """Parameters that hold point estimates of latents of the data's plates: they grow with the data."""
    structure = program.structure
    sites, plates = structure.sites, set(structure.data_plates)
    return {
        name
        for group in program.graph.groups
        if group.role is Role.POINT and group.value_binding is not None
        if all(plates.intersection(sites[m].nested) for m in group.members)
        for name in group.value_binding.params
    }


def elements_read(program: Program, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which elements of each parameter any factor reads where it counts.

    Args:
        program: The model with its data.
        initial: The parameters where the fit began.
    """
    graph = program.graph
    read = {
        n: torch.zeros_like(p.leaf, dtype=torch.bool).reshape(-1)
        for n, p in graph.parameters.items()
    }
    possible = possible_cells(program, initial)
    unknown: dict[int, set[str]] = {}
    for g, group in _sites(program):
        group = group.thin()
        alive = _alive(group, None if graph.groups[g].nested else possible[g])
        bindings = list(group.bindings.items())
        bindings += [] if group.value_binding is None else [("", group.value_binding)]
        seen = seen_entries(group) if is_incomplete(group) else None
        if seen is not None:
            seen, alive = _distinct(seen, alive, group)
        known: set[str] = set()
        for argument, binding in bindings:
            for name in binding.params:
                by_row = argument in group.lines[1:]
                at = alive if seen is None else _alive_at(argument, alive, seen, by_row)
                if binding.computed is not None:
                    elements = _elements_computed(graph, binding, name, at)
                else:
                    elements = _elements_of(binding, name, at, read[name].numel())
                if elements is None:
                    unknown.setdefault(g, set()).add(name)
                else:
                    read[name] |= elements
            known |= set(binding.params)
        if group.raw_params is None:
            unknown.setdefault(g, set()).update(read)
        else:
            unknown.setdefault(g, set()).update(set(group.raw_params) - known)
    # A module reads its own parameter, wherever a trial point is.
    module_parameters = {
        n for n, p in graph.parameters.items() if isinstance(p.leaf, torch.nn.Parameter)
    }
    for name in module_parameters & set().union(*unknown.values()):
        read[name] |= True
    unknown = {
        g: names - module_parameters for g, names in unknown.items() if names - module_parameters
    }
    if unknown:
        _differentiate(program, unknown, possible, read)
    return {n: r.reshape(graph.parameters[n].leaf.shape) for n, r in read.items()}


def _distinct(seen: Tensor, alive: Tensor | None, group: Group) -> tuple[Tensor, Tensor | None]:
    """What is seen and counts, once for rows that have seen the same, where no argument has rows."""
    lead = 1 + group.n_plates
    arguments = [b.constant.shape[:lead].numel() for b in group.bindings.values()]
    counts = seen.new_ones(()) if alive is None else alive.unsqueeze(-1)
    shape = torch.broadcast_shapes(seen.shape, counts.shape)
    if group.n_plates < 1 or max(arguments) > 1 or shape[lead:-1].numel() > 1:
        return seen, alive
    rows = (t.expand(*shape[:-1], n).reshape(-1, n) for t, n in ((seen, shape[-1]), (counts, 1)))
    step = max(1, PIECE // max(shape[-1], 1))
    parts = zip(*(t.split(step) for t in rows), strict=True)
    found = distinct_patterns(own & counted for own, counted in parts)
    return found.reshape(1, len(found), *(1,) * (len(shape) - 3), shape[-1]), None


def _elements_of(binding: Binding, name: str, alive: Tensor | None, size: int) -> Tensor | None:
    """Which elements of a parameter the cells that count read; None if the binding does not show it."""
    out: Tensor | None = None
    for part in binding.selections:
        if part.param != name:
            continue
        index = part.index
        plain = alive is None and binding.how == "selection"
        if plain and part.is_in_order and index.numel() == size:
            return torch.ones(size, dtype=torch.bool, device=index.device)
        there = index >= 0
        if alive is not None:
            there = there & _shaped(alive, index)
        elements = torch.zeros(size, dtype=torch.bool, device=index.device)
        elements[index[there]] = True
        out = elements if out is None else out | elements
    if binding.jacobians is not None and name in binding.jacobians:
        there = None if alive is None else _shaped(alive, binding.constant)
        elements = binding.jacobians[name].reached(there)
        out = elements if out is None else out | elements
    return out if binding.how in ("selection", "affine") else None


def _elements_computed(
    graph: FactorGraph, binding: Binding, name: str, alive: Tensor | None
) -> Tensor | None:
    """The same of what is computed of parameters: those that move a cell, at two points far apart."""
    parameters = graph.parameters
    if isinstance(parameters[name].leaf, torch.nn.Parameter):
        return None  # all of a module counts
    assert binding.computed is not None
    there = None if alive is None else _shaped(alive, binding.constant)
    found = (
        binding.computed.reached(name, _moved(parameters, spread), there) for spread in _SPREADS
    )
    return reduce(or_, found)


def _moved(parameters: Mapping[str, TracedParameter], spread: float) -> dict[str, Tensor]:
    """Parameters at a point that nobody chose."""
    generator, out = torch.Generator().manual_seed(0), {}
    for name, p in parameters.items():
        noise = torch.randn(p.unconstrained.shape, generator=generator, dtype=torch.float64)
        moved = p.unconstrained + spread * noise.to(p.unconstrained)
        out[name] = transform_to(p.constraint)(moved).detach()
    return out


def _shaped(alive: Tensor, like: Tensor) -> Tensor:
    """The cells that count, laid out as an argument. # like ``like``"""
    alive = alive.reshape(alive.shape + (1,) * (like.dim() - alive.dim()))
    axes = [d for d, size in enumerate(like.shape) if size == 1 and alive.shape[d] > 1]
    for d in axes:
        alive = alive.any(d, keepdim=True)
    return alive.expand(like.shape)


def _alive(group: Group, possible: Tensor | None) -> Tensor | None:
    """Cells that count. # (members, *sizes or 1s, *to_event dims or 1s), or None for all"""
    out = possible
    if group.mask is not None and group.observed:
        out = group.mask if out is None else out & group.mask
    if group.elements is not None and out is not None:
        return out.reshape(out.shape + (1,) * group.event_dims) & group.elements
    return out


def _alive_at(argument: str, alive: Tensor | None, seen: Tensor, by_row: bool = False) -> Tensor:
    """Elements of an argument of vectors that a row has seen: of a matrix, both coordinates.

    Args:
        argument: Its name.
        alive: Cells that count. # (members, *sizes or 1s), or None for all
        seen: Coordinates that are seen. # (members, *sizes or 1s, D)
        by_row: Whether each coordinate reads a row of the matrix.
    """
    if by_row:
        out = seen.unsqueeze(-1)
    else:
        out = seen if argument == "loc" else seen.unsqueeze(-1) & seen.unsqueeze(-2)
    if alive is None:
        return out
    return out & alive.reshape(alive.shape + (1,) * (out.dim() - alive.dim()))


def _differentiate(
    program: Program,
    unknown: Mapping[int, set[str]],
    possible: Alive,
    read: dict[str, Tensor],
) -> None:
    """What cannot be looked up: an element that moves no density, at two points far apart."""
    generator = torch.Generator().manual_seed(0)
    groups = list(unknown)
    for spread in _SPREADS:
        values = _moved(program.graph.parameters, spread)
        asked = set().union(*unknown.values())
        leaves = {name: v.requires_grad_() for name, v in values.items() if name in asked}
        names = list(leaves)
        try:
            with torch.enable_grad():
                tables = program.log_densities_at(values, groups)
                total = torch.zeros((), dtype=torch.float64)
                for g, table in tables.items():
                    weight = torch.rand(table.shape, generator=generator, dtype=torch.float64)
                    weight = weight.to(table.device)
                    if possible[g] is not None:
                        weight = weight * possible[g]
                    total = (
                        total.to(table.device) + (weight * table).nan_to_num(0.0, 0.0, 0.0).sum()
                    )
                slopes = (
                    torch.autograd.grad(
                        total, [leaves[n] for n in names], allow_unused=True, retain_graph=False
                    )
                    if total.requires_grad
                    else [None] * len(names)
                )
        except PyroEMError:
            slopes = [torch.ones_like(leaves[n]) for n in names]
        for name, slope in zip(names, slopes, strict=True):
            if slope is not None:
                read[name] |= (slope != 0).reshape(-1)
