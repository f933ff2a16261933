"""How many directions of its parameters a model with Gaussian latents leaves undetermined.

p of the information criteria is the rank of what the data determine.

The distribution of what is observed is Gaussian, with a mean and a covariance that are functions of the
parameters. Directions along which neither moves, such as a rotation of loadings, no data determine: at
parameters in general position they are the kernel of the Jacobian of both. Blocks are alike in large
numbers; a few of them stand for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.graph.factors import Group
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.posteriors.chain_sums.state_moments import moments_of_first
from pyro_em.posteriors.chain_sums.state_steps import ChainSums, ChainTheta
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.reduction.reduction import Reduction
from pyro_em.tracing.parameters import TracedParameter, moved
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import event_shape, is_matrix, rows_of, tril_rows
from pyro_em.updates.update import Fixed

_MOST = 300  # numbers in parameters of which a Jacobian is taken
_LEVELS = 12  # of a chain that are looked at, or more where its state is large
_ROWS = 60  # of a site in one block that are looked at
_RELATIVE = 1e-12  # of the largest eigenvalue: what lies below is none


@dataclass(frozen=True)
class Undetermined:
    """Directions in which no data determine the parameters of a block.

    Attributes:
        count: How many there are.
        parameters: The parameters that they move.
    """

    count: int
    parameters: tuple[str, ...]

    @property
    def note(self) -> str:
        """In words, for users."""
        names = " and ".join(f"'{n}'" for n in self.parameters)
        one = self.count == 1
        return (
            f"no data determine {names} in {self.count} direction{'s' * (not one)}: the evidence stays "
            f"as it is along {'it' if one else 'them'}, as when latents are turned, and p does not "
            f"count {'it' if one else 'them'}."
        )


@dataclass(frozen=True, eq=False)
class _Slopes:
    """How the moments of a block move with the parameters.

    Attributes:
        gram: JᵀJ of their Jacobian J, in unconstrained coordinates; it adds up over parts. # (p, p)
        of_values: Gives the Jacobian of the parameters themselves. # (numbers, p)
        names: The parameters.
        sizes: How many coordinates each has.
    """

    gram: Tensor
    of_values: Callable[[], Tensor]
    names: Sequence[str]
    sizes: Sequence[int]


def undetermined(program: Program, over: Reduction[Part] | None = None) -> list[Undetermined]:
    """What each block of Gaussian latents leaves undetermined.

    Args:
        program: The model with its data, or with one part of them.
        over: All parts, where there are several: what one leaves undetermined another may not.
    """
    if not any(isinstance(g.nested, GaussianBlock) for g in program.graph.groups):
        return []
    known = _known(program) if over is None else None
    if known is not None and known[1] in known[0]:
        return []
    own = _slopes(program)
    grams = {g: slopes.gram for g, slopes in own.items()}
    if over is not None:

        def of_part(part: Part) -> dict[str, tuple[Tensor, int]]:
            found = _slopes(part.program)
            none = torch.zeros(1, dtype=torch.float64)
            return {
                g: (found[g].gram if g in found else none.expand_as(gram), int(g in found))
                for g, gram in grams.items()
            }

        grams = {g: gram for g, (gram, seen) in over.sum(of_part).items() if seen}
    out = [_left(grams[g], slopes) for g, slopes in own.items() if g in grams]
    found = [each for each in out if each.count]
    if known is not None and not found and len(out) == len(program.graph.groups):
        known[0].add(known[1])
    return found


def _known(program: Program) -> tuple[set[Hashable], Hashable] | None:
    """Where it is noted of chains that nothing is left undetermined, and by what name.

    A Jacobian that has full rank at some parameters has it at nearly all: another fit of the same form
    need not look again, whatever its data.
    """
    kernel = program.kernel.block
    if not isinstance(kernel, ChainSums):
        return None
    free = [n for n in kernel.theta.begins if not isinstance(program.updates[n].update, Fixed)]
    if len(free) < len(kernel.theta.begins):  # the others have values of their own
        return None
    parameters = program.graph.parameters
    return kernel.theta.decided.determined, tuple((n, repr(parameters[n].constraint)) for n in free)


@torch.no_grad()
def _slopes(program: Program) -> dict[str, _Slopes]:
    """By the number of its group, the slopes of each block that can be looked at."""
    groups = program.graph.groups
    kernel = program.kernel.block
    theta = kernel.theta if isinstance(kernel, ChainSums) else None
    out = {}
    for g, group in enumerate(groups):
        block = group.nested
        if not isinstance(block, GaussianBlock):
            continue
        elsewhere = {n for g in groups if g is not group for n in _reaching(g)}
        names = [
            n
            for n in group.params
            if n not in elsewhere and not isinstance(program.updates[n].update, Fixed)
        ]
        if not all(b.is_static for b in group.bindings.values()):
            continue
        found = None
        if theta is not None:
            found = _of_chain(theta, g, names, program.graph.parameters)
        if found is None:
            found = _of_block(block.representative, names, program.graph.parameters)
        if found is not None:
            out[str(g)] = found
    return out


def _reaching(group: Group) -> Collection[str]:
    return (*group.params, *(group.raw_params or ()))


def _of_block(
    block: GaussianBlock, names: Sequence[str], parameters: Mapping[str, TracedParameter]
) -> _Slopes | None:
    """The slopes of a block's moments; None where it is too large to look at."""
    unconstrained = moved(parameters, seed=51)
    others = {n: p.value().double() for n, p in parameters.items() if n not in names}
    sizes = [unconstrained[n].numel() for n in names]
    if not names or sum(sizes) > _MOST:
        return None
    flat = torch.cat([unconstrained[n].double().reshape(-1) for n in names])
    rows = _chosen(block, sum(sizes))

    def constrained(u: Tensor) -> dict[str, Tensor]:
        parts = zip(names, u.split(sizes), strict=True)
        return {
            n: transform_to(parameters[n].constraint)(x.reshape(unconstrained[n].shape))
            for n, x in parts
        }

    # As many random combinations of the moments as there are numbers: their rank is the same.
    seen = sum(len(_lower(n)[0]) + n for n in (_width(block, own) for own in rows))
    cells = math.prod(block.states)
    generator = torch.Generator().manual_seed(52)
    mix = torch.randn(len(flat) + 8, cells * seen, generator=generator, dtype=flat.dtype)

    def moments(u: Tensor) -> Tensor:
        values = {**others, **constrained(u)}
        return mix.to(u) @ torch.cat([_moments(block, own, values) for own in rows])

    try:
        jacobian = _jacobian(moments, flat)
    except torch.linalg.LinAlgError:
        # A spread that ended near the boundary is singular when moved: the rank is that of any
        # point inside.
        inside = [_inside(parameters[n], unconstrained[n]) for n in names]
        flat = torch.cat([x.double().reshape(-1) for x in inside])
        jacobian = _jacobian(moments, flat)
    return _Slopes(
        jacobian.mT @ jacobian,
        lambda: _jacobian(lambda u: _all_of(constrained(u)), flat),
        names,
        sizes,
    )


def _of_chain(
    theta: ChainTheta, g: int, names: Sequence[str], parameters: Mapping[str, TracedParameter]
) -> _Slopes | None:
    """The same from the matrices of a chain whose steps are alike; None where these do not serve."""
    unconstrained = moved(parameters, seed=51)
    if not names or sum(unconstrained[n].numel() for n in names) > _MOST:
        return None
    values = {n: p.value() for n, p in parameters.items()}
    slopes = []
    for name in names:
        u, constraint = unconstrained[name].double(), parameters[name].constraint
        values[name] = transform_to(constraint)(u)
        if constraint.event_dim == 0:  # each number by itself: it moves wherever its own moves
            slopes.append(torch.eye(u.numel(), dtype=torch.float64))
            continue

        def flat(x: Tensor, constraint: Any = constraint, shape: torch.Size = u.shape) -> Tensor:
            return transform_to(constraint)(x.reshape(shape)).reshape(-1)

        slopes.append(_jacobian(flat, u.reshape(-1)).cpu())
    at = theta.enter(values).theta
    columns = [theta.begins[n] + np.arange(values[n].numel()) for n in names]
    size = theta.chains[g].bare[0].shape[-1]
    try:
        found = moments_of_first(
            theta.chains[g], at, np.concatenate(columns), max(_LEVELS, 2 * size + 2)
        )
    except np.linalg.LinAlgError:
        return None
    if found is None or not np.isfinite(found).all():
        return None
    of_values = torch.block_diag(*slopes)
    sizes = [unconstrained[n].numel() for n in names]
    jacobian = torch.from_numpy(found) @ of_values
    return _Slopes(jacobian.mT @ jacobian, lambda: of_values, names, sizes)


@torch.no_grad()
def _left(gram: Tensor, slopes: _Slopes) -> Undetermined:
    """The directions along which no moment moves, less those along which no parameter does.

    Args:
        gram: JᵀJ of the moments of all parts. # (p, p)
        slopes: Of one of them.
    """
    norms = gram.diagonal().sqrt()
    read = norms > 0
    own = norms[read]
    kernel = _kernel(gram[read][:, read] / (own.unsqueeze(-1) * own))
    if not kernel.shape[1]:
        return Undetermined(0, ())
    # What the parameters' own constraints leave free: a matrix may have fewer than its numbers.
    of_values = slopes.of_values()[:, read]
    bound = _kernel(of_values.mT @ of_values)
    moves = torch.zeros(len(norms), dtype=torch.bool, device=norms.device)
    moves[read] = (kernel.abs() > 1e-4).any(1)
    parts = zip(slopes.names, moves.split(list(slopes.sizes)), strict=True)
    shown = [n for n, each in parts if bool(each.any())]
    return Undetermined(max(kernel.shape[1] - bound.shape[1], 0), tuple(shown))


def _inside(parameter: TracedParameter, moved_to: Tensor) -> Tensor:
    """Where a parameter was moved to; of a matrix, what it was moved by, which is near the identity."""
    is_spread = parameter.constraint.event_dim == 2
    return moved_to - parameter.unconstrained.detach() if is_spread else moved_to


def _all_of(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in values.values()])


def _jacobian(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        out: Tensor = torch.autograd.functional.jacobian(f, at, vectorize=True)
    return out


def _kernel(gram: Tensor) -> Tensor:
    """An orthonormal basis of what a matrix maps to nothing, from its Gram matrix. # (columns, k)"""
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, values < _RELATIVE * values[-1:]]


def _lower(n: int) -> Tensor:
    return torch.tril_indices(n, n)


def _width(block: GaussianBlock, rows: Sequence[Tensor]) -> int:
    """How many numbers some rows observe."""
    return sum(
        len(own) * event_shape(group).numel()
        for own, group in zip(rows, block.groups, strict=True)
        if group.role is not Role.GAUSSIAN
    )


def _chosen(block: GaussianBlock, wanted: int) -> list[list[Tensor]]:
    """Some blocks of unknowns, each as rows per site, with several times as many moments as wanted."""
    out: list[list[Tensor]] = []
    moments = 0
    for own in _of_blocks(block):
        own = _looked_at(block, own)
        seen = _width(block, own)
        if seen:
            out.append(own)
            moments += seen * (seen + 3) // 2
        if moments > 4 * wanted + 50:
            break
    return out


def _of_blocks(block: GaussianBlock) -> Iterator[list[Tensor]]:
    """The rows per site that are in no block of unknowns, in the largest, in others at random."""
    generator = torch.Generator().manual_seed(0)
    if block.of_a_row is not None:  # each block is that of a row
        each = [math.prod(line.sizes[1:]) for line in block.lines]
        order = torch.randperm(block.groups[0].sizes[0], generator=generator)
        for i in range(-1, len(order)):
            number = 0 if i < 0 else int(order[i])
            yield [torch.arange(number * n, (number + 1) * n) for n in each]
        return
    layout = block.layout
    order = torch.randperm(layout.blocks, generator=generator)
    largest = int(layout.block_sizes.argmax()) if layout.blocks else -1
    for number in (-1, largest, *order.tolist()):
        yield [(at == number).nonzero().reshape(-1) for at in layout.block_of_row]


def _looked_at(block: GaussianBlock, rows: Sequence[Tensor]) -> list[Tensor]:
    """Of the rows of a block some observed ones, and the latents that these read."""
    out: list[Tensor] = []
    needed: list[list[Tensor]] = [[] for _ in block.groups]
    for i, (group, own) in reversed(list(enumerate(zip(block.groups, rows, strict=True)))):
        if group.role is Role.GAUSSIAN:
            own = own[torch.isin(own, torch.cat([own[:0], *needed[i]]))]
        else:
            own = _telling(own, [r.elements.to(own.device) for r in block.lines[i].reads])
        for read in block.lines[i].reads:
            elements = read.elements.to(own.device)[own]
            needed[block.numbers_of_sites[read.latent]].append(elements)
        out.insert(0, own)
    return out


def _telling(rows: Tensor, reads: Sequence[Tensor]) -> Tensor:
    """Few rows of a site: of each latent that they read those of the elements of the most rows.

    What tells a latent's spread from that of the data is how rows of one element covary.
    """
    if len(rows) <= _ROWS or len(reads) < 2:
        return rows[:_ROWS]
    each = -(-_ROWS // len(reads))
    kept = []
    for elements in reads:
        own, counts = elements[rows].unique(return_inverse=True, return_counts=True)[1:]
        order = (-counts[own] * len(counts) + own).argsort(stable=True)
        kept.append(rows[order[:each]])
    return torch.cat(kept).unique()


def _moments(block: GaussianBlock, rows: list[Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """Mean and covariance of what some rows observe, for each state of the scope."""
    parts: list[Tensor | None] = []  # of each site's coordinates in all noises; then their means
    place: list[dict[int, int]] = []
    widths = [event_shape(g).numel() for g in block.groups]
    first, total = [], 0
    for width, own in zip(widths, rows, strict=True):
        first.append(total)
        total += width * len(own)
    observed: list[Tensor] = []
    for i, (group, own) in enumerate(zip(block.groups, rows, strict=True)):
        place.append({int(r): k for k, r in enumerate(own)})
        if not len(own):
            parts.append(None)
            continue
        arguments = {a: b.evaluate(values) for a, b in group.bindings.items()}
        mean = _taken(rows_of(group, arguments["loc"]), own)
        spread = (
            _taken(tril_rows(group, arguments), own)
            if is_matrix(group)
            else torch.diag_embed(_taken(rows_of(group, arguments["scale"]), own))
        )
        part = _beside(_among(spread, first[i], total), mean)
        terms = [a for a in group.lines if a != "loc"]
        for argument, read in zip(terms, block.lines[i].reads, strict=True):
            j = block.numbers_of_sites[read.latent]
            above = parts[j]
            if above is None:
                continue
            elements = read.elements[own.to(read.elements.device)].tolist()
            at = [place[j].get(e, -1) for e in elements]
            C = _taken(rows_of(group, arguments[argument], 1), own)
            if min(at) < 0:
                C = C * (torch.tensor(at) >= 0).to(C)[None, :, None, None]
            if at != list(range(above.shape[1])):
                above = above[:, torch.tensor(at).clamp(min=0)]
            part = part + C @ above
        parts.append(part)
        if group.role is not Role.GAUSSIAN:
            observed.append(part.flatten(1, 2))
    cells = max(len(t) for t in observed)
    both = torch.cat([t.expand(cells, *t.shape[1:]) for t in observed], 1)
    half, mean = both[..., :-1], both[..., -1]
    n = mean.shape[1]
    lower = _lower(n)
    covariance = (half @ half.mT)[:, lower[0], lower[1]]
    return torch.cat([mean.reshape(-1), covariance.reshape(-1)])


def _among(spread: Tensor, first: int, total: int) -> Tensor:
    """The rows' own noises among all noises.

    Args:
        spread: Of each row. # (cells, rows, D, D)
        first: The first noise of the first row.
        total: How many noises there are.

    Returns:
        # (cells, rows, D, total)
    """
    rows, width = spread.shape[1:3]
    begins = [first + k * width for k in range(rows)]
    pads = [(begin, total - begin - width) for begin in begins]
    if rows == 1:
        return torch.nn.functional.pad(spread, pads[0])
    own = zip(spread.unbind(1), pads, strict=True)
    return torch.stack([torch.nn.functional.pad(s, pad) for s, pad in own], 1)


def _beside(half: Tensor, mean: Tensor) -> Tensor:
    """Noises and means, one column more. # (cells, rows, D, total + 1)"""
    cells = max(len(half), len(mean))
    return torch.cat([half.expand(cells, -1, -1, -1), mean.expand(cells, -1, -1).unsqueeze(-1)], -1)


def _taken(t: Tensor, rows: Tensor) -> Tensor:
    """Some rows of what is held for all of them, or once. # (cells or 1, rows, …)"""
    t = t.double()
    return t[:, rows] if t.shape[1] > 1 else t.expand(t.shape[0], len(rows), *t.shape[2:])
