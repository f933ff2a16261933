r"""The E-step of a homogeneous hidden Markov chain by forward and backward messages.

A graph is a chain if its latents z_0, z_1, … share their plates, one group of equal tables couples
each to the next, and every other factor reads at most one of them. With γ_t = α_t β_t and

    ξ(i, j) = Σ_t α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j) / c_t ,

γ and ξ are the posterior marginals and the expected transitions (Rabiner 1989, eqs. 27 and 37).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.compiled.forward_backward import messages
from pyro_em.compiled.solve import Handover
from pyro_em.compiled.step import Sums, counted, known_statistics
from pyro_em.families.record import Statistics
from pyro_em.graph import FactorGraph, Group
from pyro_em.statistics import group_statistics


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
    """

    graph: FactorGraph
    couples: int
    unary: Mapping[int, Tensor]
    free: tuple[int, ...]
    plates: tuple[int, ...]
    T: int
    K: int

    known: Mapping[int, Statistics | None] = field(default_factory=dict)

    name = "forward and backward messages"

    def e_step(self, arguments: Sequence[Mapping[str, Tensor]]) -> Sums:
        """Evidence and sums at some arguments.

        Raises:
            Handover: If a step's mass underflows or vanishes.
        """
        groups = self.graph.groups
        B, T, K = max(1, int(torch.tensor(self.plates).prod())), self.T, self.K
        log_l = torch.zeros(B, T, K, dtype=torch.float64, device=groups[self.couples].value.device)
        for g, steps in self.unary.items():
            table = self._table(groups[g], arguments[g]).to(torch.float64)
            log_l.index_add_(1, steps, table)
        top = log_l.amax(-1, keepdim=True)
        likelihood = (log_l - top).exp_()
        couples = groups[self.couples]
        log_a = couples.family.log_prob(couples.value, arguments[self.couples])  # type: ignore[union-attr]
        A = log_a.reshape(K, K).to(torch.float64).exp()
        alpha, beta = messages(likelihood, A)
        gamma = alpha * beta
        gamma /= gamma.sum(-1, keepdim=True)
        ahead = alpha[:, :-1] @ A
        mass = (ahead * likelihood[:, 1:]).sum(-1)
        first = likelihood[:, 0].sum(-1)
        log_evidence = mass.log().sum() + first.log().sum() + top.sum()
        for g in self.free:
            log_evidence = log_evidence + groups[g].log_density(arguments[g]).sum()
        evidence = float(log_evidence)
        if not (-1e300 < evidence < 1e300):  # NaN or infinite
            raise Handover
        statistics = {g: self._counted(g, gamma[:, s], arguments[g]) for g, s in self.unary.items()}
        statistics[self.couples] = self._transitions(
            likelihood, alpha, beta, A, ahead, arguments[self.couples]
        )
        for g in self.free:
            if groups[g].family is None:
                continue
            ones = groups[g].value.new_ones((len(groups[g].members), *groups[g].sizes))
            counts = ones.to(torch.float64)
            statistics[g] = counted(groups[g], counts, arguments[g], self.known.get(g))
        return Sums(evidence, statistics)

    def _table(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """Log densities of a unary group. # (B, members, K)"""
        table = group.log_density(arguments)
        if group.n_plates == 0:
            return table.reshape(1, len(group.members), self.K)
        return table.reshape(len(group.members), -1, self.K).transpose(0, 1)

    def _counted(self, g: int, gamma: Tensor, arguments: Mapping[str, Tensor]) -> Statistics:
        group = self.graph.groups[g]
        counts = gamma.transpose(0, 1)  # (members, B, K)
        counts = counts.sum(1) if group.n_plates == 0 else counts.reshape(-1, *self.plates, self.K)
        return counted(group, counts, arguments, self.known.get(g))

    def _transitions(
        self,
        likelihood: Tensor,
        alpha: Tensor,
        beta: Tensor,
        A: Tensor,
        ahead: Tensor,
        arguments: Mapping[str, Tensor],
    ) -> Statistics:
        group = self.graph.groups[self.couples]
        to = likelihood[:, 1:] * beta[:, 1:]
        weight = 1.0 / (ahead * to).sum(-1)  # (B, T − 1)
        if group.mask is not None:
            mask = group.mask.reshape(group.mask.shape[0], -1).T.to(weight.dtype)
            weight = weight * mask
        K = self.K
        start = (alpha[:, :-1] * weight.unsqueeze(-1)).reshape(-1, K)
        xi = A * (start.T @ to.reshape(-1, K))
        if not bool(torch.isfinite(xi).all()):
            raise Handover
        # The mask is in the weights already.
        counts = xi.reshape(1, *(1,) * group.n_plates, K, K)
        return group_statistics(group, counts, arguments, self.known.get(self.couples))


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
    known = {g: known_statistics(group) for g, group in enumerate(graph.groups)}
    return Chain(graph, couples, unary, tuple(free), sizes, len(latents), K, known)


def _steps(read: Sequence[Sequence[str]], place: Mapping[str, int]) -> bool:
    """Whether the pairs are (z_0, z_1), (z_1, z_2), … of all latents, in this order."""
    pairs = [(place[a], place[b]) for a, b in read]
    return pairs == [(t, t + 1) for t in range(len(place) - 1)]
