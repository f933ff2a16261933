"""The E-step and the most probable path of a first-order chain, all steps together.

What the contraction does one latent after the other goes here by messages, in about √T operations,
with the cells of every factor as its result; transitions may be the same at all steps or not:

    γ_t ∝ α_t β_t,     ξ_t(i, j) ∝ α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j)

Chains of several latents per step or of a longer history are those of
`pyro_em.posteriors.messages.product_steps`. Where messages lose what may matter (prior and likelihood
in worse conflict than floats can hold) there is no result, and the contraction, which works with
logarithms, has to serve.

Source: Rabiner (1989), "A tutorial on hidden Markov models"; Viterbi (1967) for the path.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.expanded import once_each
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.vectorised_loops.latent_series import ChainForm, chain_form, kinds_of, plates_of
from pyro_em.posteriors.messages.forward import forward
from pyro_em.posteriors.messages.forward_backward import neighbours
from pyro_em.posteriors.messages.product_steps import product_steps
from pyro_em.posteriors.messages.varying import varying_neighbours
from pyro_em.posteriors.messages.viterbi import viterbi
from pyro_em.tracing.sites import Role

LEAST = 3  # latents of a chain: fewer are as quick by contraction


@dataclass(frozen=True)
class Couple:
    """A group whose members read neighbours.

    Attributes:
        group: Its number.
        steps: For each member the earlier of its two latents.
        is_turned: Whether the later latent comes first in its tables.
    """

    group: int
    steps: tuple[int, ...]
    is_turned: bool


@dataclass(frozen=True)
class Steps:
    """A graph as a chain.

    Attributes:
        plates: Of all its latents.
        sizes: Of these plates.
        T: Number of latents.
        K: Their number of values.
        couples: Groups that read neighbours.
        single: Groups that read one latent, and for each member which.
        free: Groups that read none.
    """

    plates: tuple[str, ...]
    sizes: tuple[int, ...]
    T: int
    K: int
    couples: tuple[Couple, ...]
    single: tuple[tuple[int, tuple[int, ...]], ...]
    free: tuple[int, ...]


def steps_of(graph: FactorGraph) -> Steps | None:
    """The chain that a graph is, or None; by looking only, once."""
    if "steps" not in graph.remembered:
        graph.remembered["steps"] = _look(graph)
    steps: Steps | None = graph.remembered["steps"]
    return steps


def _look(graph: FactorGraph) -> Steps | None:
    form = chain_form(graph)
    return _of_members(graph) if form is None else _of_pattern(graph, form)


def _of_pattern(graph: FactorGraph, form: ChainForm) -> Steps | None:
    """The chain that the steps of one loop are, without a look at each."""
    first = kinds_of(graph.latents)[0]
    for group in graph.groups:
        if group.role is Role.POINT:
            return _of_members(graph)
        plates = plates_of(group)
        if plates is None or not group.is_unscaled:
            return None
    for g in (form.couples, *form.unary):
        if not set(first.plates) <= set(plates_of(graph.groups[g]) or ()):
            return None
    T = len(form.names)
    return Steps(
        first.plates,
        tuple(graph.dim_size(p) for p in first.plates),
        T,
        first.size,
        (Couple(form.couples, tuple(range(T - 1)), False),),
        tuple(
            (g, tuple(places if isinstance(places, range) else places.tolist()))
            for g, places in form.unary.items()
        ),
        form.free,
    )


def _of_members(graph: FactorGraph) -> Steps | None:
    """The chain that a graph is, by a look at each latent and each member of its groups."""
    names = list(graph.latents)
    if len(names) < LEAST:
        return None
    first = graph.latents[names[0]]
    if any(z.plates != first.plates or z.size != first.size for z in graph.latents.values()):
        return None
    place = {name: t for t, name in enumerate(names)}
    couples: list[Couple] = []
    single: list[tuple[int, tuple[int, ...]]] = []
    free: list[int] = []
    coupled: set[int] = set()
    for g, group in enumerate(graph.groups):
        # Plates that the latents are not in are summed over, and may be others at each step.
        plates = {
            tuple(p if p in first.plates else None for p in dims[: group.n_plates])
            for dims in group.dims
        }
        read = [tuple(place[d] for d in dims[group.n_plates :]) for dims in group.dims]
        if not group.is_unscaled or len(plates) > 1:
            return None
        degrees = {len(r) for r in read}
        if degrees == {0}:
            free.append(g)
            continue
        if not set(first.plates) <= set(*plates):
            return None
        if degrees == {1}:
            single.append((g, tuple(t for (t,) in read)))
        elif degrees == {2}:
            turned = {b - a for a, b in read}
            if turned not in ({1}, {-1}):
                return None
            steps = tuple(min(pair) for pair in read)
            couples.append(Couple(g, steps, turned == {-1}))
            coupled.update(steps)
        else:
            return None
    if len(coupled) < len(names) - 1:
        return None
    sizes = tuple(graph.dim_size(p) for p in first.plates)
    return Steps(
        first.plates, sizes, len(names), first.size, tuple(couples), tuple(single), tuple(free)
    )


@dataclass(frozen=True, eq=False)
class StepCells:
    """What the E-step of a chain is made of.

    Attributes:
        log_evidence: In nats. # ()
        terms: Its terms with their plates.
        cells: Per group the posterior of its cells. # (members, *sizes)
    """

    log_evidence: Tensor
    terms: list[tuple[tuple[str, ...], Tensor]]
    cells: list[Tensor]


@torch.no_grad()
def step_cells(graph: FactorGraph, tables: Sequence[Tensor]) -> StepCells | None:
    """The E-step of a graph that is a first-order chain; None where it is none.

    Args:
        graph: The factors.
        tables: Log densities per group. # (members, *sizes)

    Returns:
        Evidence and cells; None also where messages lose what may matter.
    """
    if len(graph.latents) < LEAST:
        return None
    steps = steps_of(graph)
    if steps is None:
        products = product_steps(graph)
        found = None if products is None else products.cells(tables)
        return None if found is None else StepCells(found.log_evidence, found.terms, found.cells)
    smoothed = _smoothed(graph, steps, tables)
    if smoothed is None:
        return None
    gamma, xi, per_sequence = smoothed
    terms = [(steps.plates, per_sequence)]
    cells: list[Tensor] = [per_sequence] * len(graph.groups)
    for g, places in steps.single:
        cells[g] = _laid_out(_at(gamma, places), graph.groups[g], steps)
    for couple in steps.couples:
        table = _at(xi, couple.steps)
        table = table.mT if couple.is_turned else table
        cells[couple.group] = _laid_out(table, graph.groups[couple.group], steps)
    for g in steps.free:
        table = tables[g].to(torch.float64)
        cells[g] = torch.ones_like(table)
        terms += list(zip(graph.groups[g].dims, table.unbind(0), strict=True))
    total = torch.stack([t.sum() for _, t in terms]).sum()
    return StepCells(total, terms, cells)


@torch.no_grad()
def smoothed_pairs(
    graph: FactorGraph, tables: Sequence[Tensor]
) -> tuple[tuple[int, ...], Tensor, Tensor] | None:
    """Posterior marginals of all steps and of all pairs of neighbours of a first-order chain.

    Args:
        graph: The factors.
        tables: Log densities per group. # (members, *sizes)

    Returns:
        The sizes of the plates, γ # (T, B, K) and ξ # (T - 1, B, K, K); None where the graph is no
        such chain, or messages lose what may matter.
    """
    steps = steps_of(graph)
    found = None if steps is None else _smoothed(graph, steps, tables)
    if steps is None or found is None:
        return None
    gamma, xi, _ = found
    K = steps.K
    return steps.sizes, gamma.reshape(steps.T, -1, K), xi.reshape(steps.T - 1, -1, K, K)


def _smoothed(
    graph: FactorGraph, steps: Steps, tables: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """γ # (T, *plates, K), ξ # (T - 1, *plates, K, K) and the log evidence. # (*plates)"""
    log_l = _single(graph, steps, tables)
    top = log_l.amax(-1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        return None
    likelihood = (log_l - top).exp_().reshape(steps.T, -1, steps.K)
    transition = _transition(graph, steps, tables)
    smoothed = (
        _of_varying(likelihood, _pairs(graph, steps, tables))
        if transition is None
        else _of_equal(likelihood, transition)
    )
    if smoothed is None:
        return None
    gamma, xi, log_c = smoothed
    per_sequence = log_c.reshape(steps.sizes) + top.squeeze(-1).sum(0)
    gamma = gamma.reshape(log_l.shape)
    xi = xi.reshape(steps.T - 1, *steps.sizes, steps.K, steps.K)
    return gamma, xi, per_sequence


@torch.no_grad()
def forward_cells(graph: FactorGraph, tables: Sequence[Tensor]) -> Tensor | None:
    """p(z_t | all factors up to step t) of a graph that is a chain; None where it is none.

    A factor of two steps counts from the later one on. In logarithms: nothing is lost.

    Args:
        graph: The factors.
        tables: Log densities per group. # (members, *sizes)

    Returns:
        Probabilities. # (T, *plates, K)
    """
    steps = steps_of(graph)
    if steps is None:
        return None
    log_l = _single(graph, steps, tables).reshape(steps.T, -1, steps.K)
    log_p, _ = forward(log_l, _of_neighbours(graph, steps, tables))
    return log_p.exp().reshape(steps.T, *steps.sizes, steps.K)


@torch.no_grad()
def predicted_cells(
    graph: FactorGraph, tables: Sequence[Tensor], data: Collection[int]
) -> Tensor | None:
    """p(z_t | all factors before the data of step t) of a graph that is a chain.

    Args:
        graph: The factors.
        tables: Log densities per group. # (members, *sizes)
        data: The groups that hold data; each reads one latent, or none.

    Returns:
        Probabilities. # (T, *plates, K); None where the graph is no chain.
    """
    steps = steps_of(graph)
    if steps is None:
        return None
    unseen = [torch.zeros_like(t) if g in data else t for g, t in enumerate(tables)]
    log_l, prior = (
        _single(graph, steps, t).reshape(steps.T, -1, steps.K) for t in (tables, unseen)
    )
    pairs = _pairs(graph, steps, tables)
    found = [prior[0].log_softmax(-1)]
    alpha = log_l[0]
    for own, without, pair in zip(log_l[1:], prior[1:], pairs, strict=True):
        moved = torch.logsumexp(alpha.log_softmax(-1).unsqueeze(-1) + pair, -2)
        found.append((moved + without).log_softmax(-1))
        alpha = moved + own
    return torch.stack(found).exp().reshape(steps.T, *steps.sizes, steps.K)


@torch.no_grad()
def best_path(graph: FactorGraph, tables: Sequence[Tensor]) -> Tensor | None:
    """A jointly most probable path of a graph that is a chain; None where it is none.

    Args:
        graph: The factors.
        tables: Log densities per group. # (members, *sizes)

    Returns:
        Positions in the latents' supports. # (latents, *plates)
    """
    if len(graph.latents) < LEAST:
        return None
    steps = steps_of(graph)
    if steps is None:
        products = product_steps(graph)
        return None if products is None else products.path(tables)
    log_l = _single(graph, steps, tables).reshape(steps.T, -1, steps.K)
    pairs = _of_neighbours(graph, steps, tables)
    return viterbi(log_l, pairs).reshape(steps.T, *steps.sizes)


def _of_equal(likelihood: Tensor, transition: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Messages where the logarithms of transitions are those of all steps. # (K, K)"""
    largest = transition.amax()
    smoothed = neighbours(likelihood.transpose(1, 2), (transition - largest).exp())
    if smoothed is None:
        return None
    gamma, xi, log_c = smoothed
    return gamma, xi, log_c + (len(likelihood) - 1) * largest


def _of_varying(likelihood: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Messages where each step has transitions of its own. # (T - 1, B or 1, K, K)"""
    largest = pairs.amax((-2, -1), keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        return None
    smoothed = varying_neighbours(likelihood, (pairs - largest).exp_())
    if smoothed is None:
        return None
    gamma, xi, log_c = smoothed
    return gamma, xi, log_c + largest.sum((0, 2, 3))


def _pairs(graph: FactorGraph, steps: Steps, tables: Sequence[Tensor]) -> Tensor:
    """Log densities that read neighbours, summed per step. # (T - 1, B or 1, K, K)"""
    pairs = torch.zeros((), dtype=torch.float64, device=tables[0].device)
    pairs = pairs.expand(steps.T - 1, *(1 for _ in steps.plates), steps.K, steps.K)
    for couple in steps.couples:
        table = _of_couple(graph, steps, couple, tables)
        if couple.steps == tuple(range(steps.T - 1)):
            pairs = pairs + table
        else:
            sizes = torch.broadcast_shapes(pairs.shape[1:], table.shape[1:])
            pairs = pairs.expand(-1, *sizes).clone()
            index = torch.tensor(couple.steps, device=table.device)
            pairs.index_add_(0, index, table.expand(-1, *sizes))
    return pairs.reshape(steps.T - 1, -1, steps.K, steps.K)


def _of_neighbours(graph: FactorGraph, steps: Steps, tables: Sequence[Tensor]) -> Tensor:
    """As `_pairs`; what is the same everywhere is one table, expanded. # (T - 1, B or 1, K, K)"""
    alike = _transition(graph, steps, tables)
    if alike is not None:
        return alike.expand(steps.T - 1, 1, steps.K, steps.K)
    return _pairs(graph, steps, tables)


def _transition(graph: FactorGraph, steps: Steps, tables: Sequence[Tensor]) -> Tensor | None:
    """Logarithms of transitions where they are the same everywhere, else None. # (K, K)"""
    total: Tensor | None = None
    for couple in steps.couples:
        if couple.steps != tuple(range(steps.T - 1)):
            return None
        table = _of_couple(graph, steps, couple, tables)
        one = table[(0,) * (table.dim() - 2)]
        if not bool((once_each(table) == one).all()):
            return None
        total = one if total is None else total + one
    return total


def _of_couple(
    graph: FactorGraph, steps: Steps, couple: Couple, tables: Sequence[Tensor]
) -> Tensor:
    """Log densities of neighbours, the earlier first. # (members, *plates, K, K)"""
    table = _reduced(tables[couple.group], graph.groups[couple.group], steps)
    return table.mT if couple.is_turned else table


def _single(graph: FactorGraph, steps: Steps, tables: Sequence[Tensor]) -> Tensor:
    """Log densities that read one latent, summed per step. # (T, *plates, K)"""
    out = torch.zeros(
        (steps.T, *steps.sizes, steps.K), dtype=torch.float64, device=tables[0].device
    )
    for g, places in steps.single:
        table = _reduced(tables[g], graph.groups[g], steps)
        if places == tuple(range(steps.T)):
            out += table
        else:
            out.index_add_(0, torch.tensor(places, device=out.device), table)
    return out


def _reduced(table: Tensor, group: Group, steps: Steps) -> Tensor:
    """A table summed over plates that the latents are not in. # (members, *plates, *values)"""
    beyond = _beyond(group, steps)
    table = table.to(torch.float64)
    return table.sum(beyond) if beyond else table


def _laid_out(table: Tensor, group: Group, steps: Steps) -> Tensor:
    """A table over the latents' plates as one over those of a group. # (members, *sizes)"""
    for d in _beyond(group, steps):
        table = table.unsqueeze(d)
    return table.expand(len(group.members), *group.sizes)


def _beyond(group: Group, steps: Steps) -> list[int]:
    plates = group.dims[0][: group.n_plates]
    return [1 + d for d, plate in enumerate(plates) if plate not in steps.plates]


def _at(stack: Tensor, places: tuple[int, ...]) -> Tensor:
    """Some rows of a stack; no copy where they are consecutive."""
    first, last = places[0], places[-1]
    if places == tuple(range(first, last + 1)):
        return stack[first : last + 1]
    return stack[torch.tensor(places, device=stack.device)]
