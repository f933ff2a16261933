"""Which Gaussian latents have a conjugate latent as the scale that all their sites share, and a proof.

All sites of a Gaussian block have to read one latent in their spreads, and numbers that a coefficient
connects one and the same element of it. Under a precision matrix a coefficient has to be a known
number: a vector as it stands, or a multiple.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead, NotConjugate, refused
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.gaussians.gaussian_sites import over_scope
from pyro_em.posteriors.states.gaussian_chain import GaussianChain
from pyro_em.updates.expectations.conjugate_beliefs import with_factor
from pyro_em.updates.expectations.gaussian_rows import event_shape, is_matrix, rows_of


def pairs_alike(
    lines: Mapping[str, Line], reads: Mapping[str, ConjugateRead]
) -> tuple[tuple[str, str], ...]:
    """Pairs of Normal sites in whose spreads one latent is, where Gaussian ones reach them."""
    first: dict[str, str] = {}
    own = [(n, reads[n].latent) for n in lines if n in reads]
    return tuple((first.setdefault(latent, name), name) for name, latent in own)


def block_of_scale(
    graph: FactorGraph, latent: str, reads: Mapping[str, ConjugateRead]
) -> GaussianBlock | None:
    """The Gaussian block whose sites all have a latent in their spreads; None where no one has.

    Args:
        graph: In which Gaussian latents are integrated.
        latent: The conjugate latent.
        reads: What sites read of conjugate latents, by site.

    Raises:
        NotConjugate: If the spreads of some of its sites read it alone.
    """
    found = None
    for group in graph.groups:
        block = group.nested
        if not isinstance(block, GaussianBlock):
            continue
        sites = [name for g in block.groups for name in g.members]
        own = [n for n in sites if n in reads and reads[n].latent == latent]
        if not own:
            continue
        other = next((n for n in sites if n not in own), None)
        if other is not None:
            raise _unshared(latent, own[0], other, block)
        whole = all(bool((reads[n].elements >= 0).all()) for n in own)
        if isinstance(block, GaussianChain) and graph.structure.series is None and whole:
            return block
        several = any(len(g.members) > 1 for g in block.groups)
        if several or len(block.traced) != len(block.groups):
            what = "it belongs to a chain of Gaussian latents."
            raise refused(latent, f"site '{own[0]}'", what)
        assert found is None, "sites of one scale are in one block"
        found = block
    return found


def _unshared(latent: str, own: str, other: str, block: GaussianBlock) -> NotConjugate:
    number = block.numbers_of_sites[own]
    if own in block.latents:
        what = f"'{own}' is a Gaussian latent, and its spread reads '{latent}', "
    else:
        read = block.lines[number].reads[0].latent
        what = f"it reads Gaussian '{read}' and '{latent}', "
    return refused(latent, f"site '{own}'", what + f"which the spread of '{other}' does not.")


def with_scale(block: GaussianBlock, scale: ConjugateBlock) -> GaussianBlock:
    """A Gaussian block over the whole scope of its scale, with what its updates have to know.

    Args:
        block: The sites that the Gaussian latents connect.
        scale: The scale's block, these sites among its own.

    Raises:
        NotConjugate: If numbers that a coefficient connects have different scales.
    """
    groups = []
    for i, group in enumerate(block.groups):
        wide = over_scope(group, scale.scope, scale.states)
        groups.append(_prepared(wide, scale.reads[i].pair.argument))
    out = replace(block, groups=tuple(groups), scope=scale.scope, states=scale.states)
    for i in range(len(groups)):
        _require_one_scale(out, scale, i)
    return out


def _prepared(group: Group, argument: str) -> Group:
    """A site whose updates know that its spread has a factor, or that only a gradient serves."""
    binding = group.bindings[argument]
    one = torch.ones((), dtype=group.arguments[argument].dtype, device=group.value.device)
    scaled = with_factor(binding, one)
    if scaled is None:
        return replace(group, raw_params=group.params)
    return replace(group, bindings={**group.bindings, argument: scaled})


def _require_one_scale(block: GaussianBlock, scale: ConjugateBlock, i: int) -> None:
    """Hold the scales of a site against those of what its mean reads.

    Raises:
        NotConjugate: If they differ, or a matrix is the scale of what is no multiple of a vector.
    """
    group, line = block.groups[i], block.lines[i]
    where = f"site '{line.site}'"
    own = scales_of(block, scale, i)
    if bool((own < 0).any()):
        raise refused(scale.latent, where, f"some of its rows do not read '{scale.latent}'.")
    names = [a for a in group.lines if a != "loc"]
    for name, read in zip(names, line.reads, strict=True):
        coefficient = rows_of(group, group.arguments[name], 1)  # (cells|1, rows|1, D, q)
        binding = group.bindings[name]
        if scale.kernel.support == "matrix":
            first = coefficient[..., :1, :1]
            is_multiple = coefficient.shape[-1] == coefficient.shape[-2] and bool(
                (coefficient == first * torch.eye(coefficient.shape[-1]).to(first)).all()
            )
            if binding.how != "constant" or not is_multiple:
                what = f"its mean is no known multiple of '{read.latent}', whose precision matrix"
                raise refused(scale.latent, where, f"{what} is that of '{scale.latent}'.")
        if scale.count == 1:
            continue
        theirs = scales_of(block, scale, block.numbers_of_sites[read.latent])
        chosen = theirs[:, read.elements.clamp(min=0)]
        linked = coefficient != 0 if binding.how == "constant" else torch.ones_like(coefficient) > 0
        linked = linked & (read.elements >= 0)[:, None, None]
        if bool((linked & (own.unsqueeze(-1) != chosen.unsqueeze(-2))).any()):
            what = f"its elements of '{scale.latent}' are others than those of '{read.latent}'"
            raise refused(scale.latent, where, f"{what}, which it reads.")


def scales_of(block: GaussianBlock, scale: ConjugateBlock, i: int) -> Tensor:
    """Which element of a scale each number of a site has; vectors as one. # (cells, rows, D or 1)"""
    reading, form = scale.readings[i], block.groups[i]
    rows = block.layout.sites[i].rows
    width = 1 if is_matrix(form) else event_shape(form).numel()
    elements = reading.elements.T.expand(-1, rows * width)
    return elements.reshape(len(elements), rows, width)
