"""From connected sites to a chain: alike steps become members of one group, with one binding."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding, joined
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.stretches import Later
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.gaussians.gaussian_sites import dense_block, site_over, taken, with_offset
from pyro_em.posteriors.gaussians.site_forms import SiteForm, Term
from pyro_em.posteriors.states.gaussian_chain import GaussianChain
from pyro_em.posteriors.states.state_form import StateForm, state_form
from pyro_em.posteriors.states.state_layout import Stack, StateLayout
from pyro_em.posteriors.states.steps_of_plates import Piece, by_steps, first_steps
from pyro_em.tracing.sites import Role

_FIRST = 12  # levels that stand for all where a look at a few steps is enough


def chain_block(
    graph: FactorGraph,
    lines: Mapping[str, Line],
    scope: tuple[str, ...],
    states: tuple[int, ...],
    values: Mapping[str, Tensor],
    read: Mapping[str, Mapping[str, Tensor]],
) -> GaussianChain | None:
    """The chain that connected sites make up; None where they make up none.

    Args:
        graph: As traced with Gaussian latents at zero.
        lines: What the mean of each site reads.
        scope: Discrete latents that any of them depends on.
        states: How many values each has.
        values: Constrained parameters by name.
        read: Per site what its mean is made of, where no binding gives it.
    """
    pieces = [piece for line in lines.values() for piece in by_steps(line, graph)]
    numbers = {piece.line.site: i for i, piece in enumerate(pieces)}
    members = [graph.group_of(piece.line.site) for piece in pieces]
    forms = [
        SiteForm(
            piece.line.site,
            torch.Size(piece.line.sizes).numel(),
            group.value.shape[1 + len(group.sizes) :].numel(),
            group.role is Role.GAUSSIAN,
            tuple(Term(numbers[r.latent], r.elements) for r in piece.line.reads),
        )
        for piece, (group, _) in zip(pieces, members, strict=True)
    ]
    form = state_form(forms)
    if form is None:
        return None
    alike: dict[Hashable, list[int]] = {}
    for i, (piece, (group, member)) in enumerate(zip(pieces, members, strict=True)):
        placed = form.sites[i]
        start = placed.start if forms[i].is_latent else None
        own = group.dims[member][group.n_plates :]
        kinds = tuple(_kind(b) for b in piece.line.parts.values())
        alike.setdefault((id(group), start, own, placed.key, kinds), []).append(i)
    if 3 * len(alike) > len(forms):  # steps that are all of different kinds
        return None
    if any(pieces[i].whole and len(s) < pieces[i].steps for s in alike.values() for i in s):
        return None  # steps of one site that are not alike

    traced, groups, firsts, stacks = [], [], [], []
    for chosen in alike.values():
        whole, group = pieces[chosen[0]].whole, members[chosen[0]][0]
        if whole is not None:
            group, those = replace(group, by_steps=True), [whole]
        else:
            group = taken(group, [members[i][1] for i in chosen])
            those = [pieces[i].line for i in chosen]
        parts = _stacked_parts(those)
        group = with_offset(group, parts["loc"], values)
        traced.append(group)
        # Its coefficients are of several latents, one for each member.
        reads = ("",) * (len(parts) - 1)
        known = _stacked_tensors(those, parts, read)
        groups.append(site_over(group, parts, reads, scope, states, values, known))
        firsts.append(those[0])
        placed_here = [form.sites[i] for i in chosen]
        stacks.append(Stack.of(forms[chosen[0]], placed_here, form.chains))
    return GaussianChain(
        tuple(groups),
        tuple(firsts),
        scope,
        states,
        traced=tuple(traced),
        chains=StateLayout(form, tuple(stacks)),
        beginning=Later(lambda: _beginning(graph, pieces, form, scope, states, values, read)),
    )


def _beginning(
    graph: FactorGraph,
    pieces: Sequence[Piece],
    form: StateForm,
    scope: tuple[str, ...],
    states: tuple[int, ...],
    values: Mapping[str, Tensor],
    read: Mapping[str, Mapping[str, Tensor]],
) -> GaussianBlock:
    """The first few steps as one dense block."""
    last = max(_FIRST, 2 * form.size + 2)
    first = [p for p, at in zip(pieces, form.sites, strict=True) if at.level < last]
    graph, lines, read = first_steps(first, graph, read)
    return dense_block(graph, lines, scope, states, values, read)


def _kind(b: Binding) -> Hashable:
    """The same for bindings that may be stacked."""
    selections = tuple(
        (s.param, tuple(m.name for m in s.maps), s.factor is None) for s in b.selections
    )
    tail = b.constant.shape[-1:] if b.constant.dim() else ()
    slopes = (*(b.jacobians or ()), *(b.pairs or ()))
    return b.how, b.params, selections, slopes, b.normalise, tail


def _stacked_parts(lines: Sequence[Line]) -> dict[str, Binding]:
    """What the means of alike sites are made of, one binding for each part."""
    parts = [tuple(line.parts.values()) for line in lines]
    names = ("loc", *(f"loc per latent {j}" for j in range(1, len(parts[0]))))
    return {name: joined([own[j] for own in parts], _cat) for j, name in enumerate(names)}


def _stacked_tensors(
    lines: Sequence[Line],
    parts: Mapping[str, Binding],
    read: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """What no binding gives of the means of alike sites, for all of them."""
    out = {}
    for j, (name, binding) in enumerate(parts.items()):
        if not binding.is_static:
            own = [read[line.site][list(line.parts)[j]] for line in lines]
            out[name] = _cat(own)
    return out


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one row each as one, which is expanded where they are all the same. # (members, …)"""
    if len({t.shape for t in tensors}) > 1:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        tensors = [t.expand(shape) for t in tensors]
    out = torch.cat(list(tensors))
    # Equal numbers may depend on different parameters.
    if not out.requires_grad and bool((out == out[:1]).all()):
        return out[:1].expand(out.shape)
    return out
