"""Conjugate latents outside the rows, where the rows come in parts: what parts say of them adds up.

    χ' = χ + Σ_parts Σ Δχ,     log evidence = A(χ') − A(χ) + Σ_parts Σ log base

The sums Σ Δχ of all parts are made first, at the parameters of an E-step. With them each part has the
same posterior; A(χ') − A(χ), the latent's own density and what else is outside the rows count with the
first part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock, Shared
from pyro_em.posteriors.conjugates.stacked_conjugates import StackedConjugates

Block = ConjugateBlock | StackedConjugates


@dataclass(frozen=True, eq=False)
class OutsideRows:
    """How a part of the data takes part in latents outside its rows.

    Attributes:
        plate: The plate of the rows.
        is_first: Whether what is outside the rows counts with this part.
        totals: Σ Δχ of all parts, by the name of the (first) latent of each block.
    """

    plate: str
    is_first: bool
    totals: Mapping[str, Tensor]

    def on(self, graph: FactorGraph) -> FactorGraph:
        """The graph of an E-step of this part, its latents outside the rows as all parts see them."""
        groups = list(graph.groups)
        for g, block in shared_blocks(graph, self.plate).items():
            sites = _first(block).groups
            counts = tuple(self.is_first or not is_outside(s, self.plate) for s in sites)
            shared = Shared(self.totals[sites[0].members[0]], self.is_first, counts)
            groups[g] = replace(groups[g], nested=block.sharing(shared))
        return replace(graph, groups=tuple(groups))


def naturals(
    graph: FactorGraph, arguments: Sequence[Mapping[str, Tensor]], plate: str, is_first: bool
) -> dict[str, Tensor]:
    """What one part adds to the χ of latents outside its rows, by the name of each block's first.

    Args:
        graph: That of an E-step.
        arguments: Per group.
        plate: The plate of the rows.
        is_first: Whether what is outside the rows counts with this part.
    """
    out = {}
    for g, block in shared_blocks(graph, plate).items():
        sites = _first(block).groups
        counts = [is_first or not is_outside(s, plate) for s in sites]
        out[sites[0].members[0]] = block.naturals(arguments[g], counts)
    return out


def shared_blocks(graph: FactorGraph, plate: str) -> dict[int, Block]:
    """The blocks of conjugate latents outside a plate, which no discrete latent touches."""
    found = {}
    for g, group in enumerate(graph.groups):
        block = group.nested
        if not isinstance(block, ConjugateBlock | StackedConjugates) or _first(block).scope:
            continue
        if is_outside(_first(block).groups[0], plate):
            found[g] = block
    return found


def is_outside(group: Group, plate: str) -> bool:
    """Whether the factors of a site are outside a plate."""
    return any(plate not in dims for dims in group.dims)


def _first(block: Block) -> ConjugateBlock:
    return block if isinstance(block, ConjugateBlock) else block.first
