r"""The E-step of a homogeneous hidden Markov chain by forward and backward messages.

A graph is a chain if its latents z_0, z_1, … share their plates, one group of equal tables couples
each to the next, and every other factor reads at most one of them. With γ_t = α_t β_t and

    ξ(i, j) = Σ_t α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j) / c_t ,

γ and ξ are the posterior marginals and the expected transitions (Rabiner 1989, eqs. 27 and 37).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.compiled.features import Gaussian, Prepared, as_gaussian
from pyro_em.compiled.forward_backward import smooth
from pyro_em.compiled.layout import is_in_order
from pyro_em.compiled.step import Sums, checked, counted, known_statistics
from pyro_em.families.record import Statistics
from pyro_em.graph import FactorGraph, Group
from pyro_em.statistics import group_statistics

Ready = tuple[Prepared, Tensor]  # components at some arguments, and the data's features


@dataclass(frozen=True, eq=False)
class Chain:
    """The chain that a graph is.

    Attributes:
        graph: The collapsed graph.
        couples: The group of transitions.
        unary: Groups that read one state, and at which steps.
        free: Groups that read none.
        plates: Sizes of the chain's plates.
        T: Its length.
        K: Its number of states.
        known: Statistics that no argument changes, per group.
        whole: Unary groups that read steps 0, 1, 2, … to the last.
        gaussians: Groups that are evaluated by matrix products over features.
    """

    graph: FactorGraph
    couples: int
    unary: Mapping[int, Tensor]
    free: tuple[int, ...]
    plates: tuple[int, ...]
    T: int
    K: int
    known: Mapping[int, Statistics | None]
    whole: frozenset[int]
    gaussians: Mapping[int, Gaussian]

    def e_step(self, arguments: Sequence[Mapping[str, Tensor]]) -> Sums:
        """Evidence and sums at some arguments.

        Raises:
            Handover: If a step's mass underflows or vanishes, or was lost.
        """
        groups = self.graph.groups
        K = self.K
        # Both halves of the E-step need them.
        prepared = {
            g: (rule.prepare(arguments[g]), rule.features(slice(None)))
            for g, rule in self.gaussians.items()
        }
        log_l = self._log_likelihood(arguments, prepared)
        top = log_l.amax(-1, keepdim=True)
        likelihood = (log_l - top).exp_()
        couples = groups[self.couples]
        log_a = couples.family.log_prob(couples.value, arguments[self.couples])  # type: ignore[union-attr]
        A = log_a.reshape(K, K).to(torch.float64).exp()
        gamma, xi, log_evidence = smooth(likelihood, A, self._weight(couples))
        log_evidence = log_evidence.to(top) + top.sum()
        for g in self.free:
            log_evidence = log_evidence + groups[g].log_density(arguments[g]).sum()
        evidence = checked(log_evidence, gamma, float(gamma.shape[0] * self.T))
        statistics = {
            g: self._counted(g, gamma[:, s], arguments[g], prepared.get(g))
            for g, s in self.unary.items()
        }
        # The mask is in the weights already.
        counts = xi.reshape(1, *(1,) * couples.n_plates, K, K)
        statistics[self.couples] = group_statistics(
            couples, counts, arguments[self.couples], self.known.get(self.couples)
        )
        for g in self.free:
            ones = groups[g].value.new_ones((len(groups[g].members), *groups[g].sizes))
            counts = ones.to(torch.float64)
            statistics[g] = counted(groups[g], counts, arguments[g], self.known.get(g))
        return Sums(evidence, statistics)

    def _log_likelihood(
        self, arguments: Sequence[Mapping[str, Tensor]], prepared: Mapping[int, Ready]
    ) -> Tensor:
        """Log densities that read one state, summed per step. # (B, T, K)"""
        out: Tensor | None = None
        # A group that covers every step first: nothing has to be filled with zeros.
        for g in sorted(self.unary, key=lambda g: g not in self.whole):
            steps = self.unary[g]
            table = self._table(g, arguments[g], prepared.get(g)).to(torch.float64)
            if out is None and g in self.whole:
                out = table.expand(math.prod(self.plates), -1, -1).contiguous()
                continue
            if out is None:
                out = table.new_zeros(math.prod(self.plates), self.T, self.K)
            out.index_add_(1, steps, table.expand(len(out), -1, -1))
        assert out is not None
        return out

    def _table(self, g: int, arguments: Mapping[str, Tensor], prepared: Ready | None) -> Tensor:
        """Log densities of a unary group. # (B, members, K)"""
        group, M = self.graph.groups[g], len(self.graph.groups[g].members)
        if prepared is None:
            table = group.log_density(arguments).reshape(M, -1, self.K)
            return table.transpose(0, 1)
        rows = self.gaussians[g].log_density(*prepared)
        table = rows.reshape(self.K, M, -1).permute(2, 1, 0)
        if group.mask is None:
            return table
        return torch.where(self._mask(group).unsqueeze(-1), table, 0.0)

    def _mask(self, group: Group) -> Tensor:
        """Where a group counts. # (B or 1, members or 1)"""
        assert group.mask is not None
        return group.mask.reshape(group.mask.shape[0], -1).T

    def _counted(
        self,
        g: int,
        gamma: Tensor,
        arguments: Mapping[str, Tensor],
        prepared: Ready | None,
    ) -> Statistics:
        group = self.graph.groups[g]
        if prepared is not None:
            rule, (components, features) = self.gaussians[g], prepared
            if group.mask is not None:
                gamma = gamma * self._mask(group).unsqueeze(-1)
            weights = gamma.permute(2, 1, 0).reshape(self.K, -1).to(rule.x.dtype)
            moments = rule.moments(components, weights, features)
            return rule.statistics(components, moments, gamma.sum((0, 1)), arguments)
        counts = gamma.transpose(0, 1)  # (members, B, K)
        counts = counts.sum(1) if group.n_plates == 0 else counts.reshape(-1, *self.plates, self.K)
        return counted(group, counts, arguments, self.known.get(g))

    def _weight(self, couples: Group) -> Tensor | None:
        """How much each transition counts: masked ones do not. # (B or 1, T - 1 or 1)"""
        if couples.mask is None:
            return None
        return self._mask(couples).to(torch.float64)


def as_chain(graph: FactorGraph) -> Chain | None:
    """The chain that a collapsed graph is, or None.

    Args:
        graph: A collapsed graph.
    """
    latents = list(graph.latents)
    if len(latents) < 3:
        return None
    first = graph.latents[latents[0]]
    if first.size < 2 or any(
        v.plates != first.plates or v.size != first.size for v in graph.latents.values()
    ):
        return None
    place = {name: t for t, name in enumerate(latents)}
    couples, unary, free = None, {}, []
    for g, group in enumerate(graph.groups):
        read = [[d for d in dims if d in place] for dims in group.dims]
        degree = {len(r) for r in read}
        plates = group.dims[0][: group.n_plates]
        if degree == {0}:
            free.append(g)
            continue
        if plates not in ((), first.plates) or group.family is None:
            return None
        if degree == {1} and group.sizes[-1] == first.size:
            unary[g] = torch.tensor([place[r[0]] for r in read], device=group.value.device)
        elif degree == {2} and couples is None and _steps(read, place):
            couples = g
        else:
            return None
    if couples is None:
        return None
    group, K = graph.groups[couples], first.size
    mask_is_of_latents = group.mask is None or (group.mask.shape[-1] == group.mask.shape[-2] == 1)
    tensors = [group.value, *group.arguments.values()]
    repeated = all(n == 1 for t in tensors for n in t.shape[: 1 + group.n_plates])
    sizes = tuple(graph.dim_size(p) for p in first.plates)
    if not repeated or not mask_is_of_latents or group.observed or group.event_dims:
        return None
    T = len(latents)
    whole = frozenset(g for g, steps in unary.items() if len(steps) == T and is_in_order(steps))
    gaussians = {g: rule for g in unary if (rule := as_gaussian(graph.groups[g], K)) is not None}
    known = {g: known_statistics(group) for g, group in enumerate(graph.groups)}
    return Chain(graph, couples, unary, tuple(free), sizes, T, K, known, whole, gaussians)


def _steps(read: Sequence[Sequence[str]], place: Mapping[str, int]) -> bool:
    """Whether the pairs are (z_0, z_1), (z_1, z_2), … of all latents, in this order."""
    pairs = [(place[a], place[b]) for a, b in read]
    return pairs == [(t, t + 1) for t in range(len(place) - 1)]
