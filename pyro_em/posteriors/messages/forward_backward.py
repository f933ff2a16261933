"""Smoothing of homogeneous chains by forward and backward messages.

    α_t(j) ∝ ℓ_t(j) Σ_i α_{t−1}(i) A(i, j),     β_{t−1}(i) ∝ Σ_j A(i, j) ℓ_t(j) β_t(j)

With c_t = Σ_j ℓ_t(j) Σ_i α_{t−1}(i) A(i, j), where α_{t−1} sums to one, the log evidence is Σ log c_t,
the marginals are γ_t ∝ α_t β_t and the transitions ξ_t(i, j) ∝ α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j).
Three ways, chosen by what is there: compiled loops (numba, the ``fast`` extra; not where its start
would outlast the fit), one loop over time for many sequences, and two levels of about √T steps for
few (also right for a GPU).

Without numba each operation costs more than its arithmetic. So both directions go through time at
once, α_t beside w_t(j) = ℓ_t(j) β_t(j), and are normalised at few steps only: if that loses too
much, once more at every step.

Source: Rabiner (1989), "A tutorial on hidden Markov models", section V.A, for the scaling.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HAS_NUMBA = importlib.util.find_spec("numba") is not None

_FEW = 128  # steps of all sequences for which numba is not started: half a second, as long as it
# saves in a thousand E-steps. A rule by size alone, so that a fit repeated gives the same digits.


_EVERY = 16  # steps between two normalisations

_BLOCK = 2**16  # numbers of α that are combined with β at once: temporaries stay in the cache

_LEAST = 1e-100  # mass that must be left after them: what is lost below 1e-308 cannot matter then


def wants_lanes(B: int, K: int, device: torch.device) -> bool:
    """Whether `smooth` is fastest if sequences are the last dimension in memory.

    Args:
        B: Number of sequences.
        K: Number of states.
        device: Where they are.
    """
    if _HAS_NUMBA and torch.device(device).type == "cpu":
        return B >= 8 and K <= 7
    return B >= 8


def compiles(steps: int, device: torch.device) -> bool:
    """Whether compiled loops are there and worth their start.

    Args:
        steps: Of all sequences.
        device: Where they are.
    """
    return _HAS_NUMBA and steps > _FEW and torch.device(device).type == "cpu"


def smooth(
    likelihood: Tensor,
    transition: Tensor,
    weight: Tensor | None = None,
    often: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior marginals, expected transitions and the log evidence of all sequences.

    Args:
        likelihood: ℓ, each row divided by its maximum; the first row holds the initial
            probabilities too. In any layout; contiguous, or a permuted view of a contiguous
            (K, T, B) if `wants_lanes`, are quickest. # (B, T, K)
        transition: A, rows from the former state; any non-negative numbers. # (K, K)
        weight: How much each transition counts; one where left out. # (B or 1, T - 1 or 1)
        often: How often the log evidence of each sequence counts; once where left out. # (B,)

    Returns:
        γ, in the layout of the likelihood # (B, T, K), ξ summed over sequences and steps # (K, K),
        and Σ log c_t in nats: NaN where a step's mass nearly underflows.

    Example:
        >>> A = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        >>> l = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
        >>> gamma, xi, log_evidence = smooth(l, A)
        >>> xi.round(decimals=4), log_evidence.exp()
        (tensor([[0.8182, 0.0000],
                [0.1818, 0.0000]], dtype=torch.float64), tensor(0.5500, dtype=torch.float64))
    """
    if compiles(likelihood.shape[0] * likelihood.shape[1], likelihood.device):
        return _by_numba(likelihood, transition, weight, often)
    # Rows of A that sum to at most one keep messages from growing.
    largest = transition.sum(-1).amax()
    A = transition / largest
    B, T, _ = likelihood.shape
    messages = _messages(likelihood.permute(1, 2, 0), A)
    gamma, xi = messages.smoothed(likelihood, A, weight)
    total = B if often is None else often.sum()
    return gamma, xi, messages.log_evidence(often) + (total * (T - 1)) * largest.log()


def neighbours(likelihood: Tensor, transition: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Posterior marginals of all steps, of all pairs of neighbours, and the log evidence.

    Args:
        likelihood: ℓ, each row divided by its maximum; the first row holds the initial
            probabilities too. # (T, K, B)
        transition: A, rows from the former state; any non-negative numbers. # (K, K)

    Returns:
        γ # (T, B, K), ξ # (T - 1, B, K, K) and Σ_t log c_t in nats # (B,); None where mass that may
        matter nearly underflows.

    Example:
        >>> A = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        >>> l = torch.tensor([[[0.5], [0.5]], [[1.0], [0.0]]], dtype=torch.float64)
        >>> gamma, xi, log_evidence = neighbours(l, A)
        >>> xi.squeeze().round(decimals=4), log_evidence.exp()
        (tensor([[0.8182, 0.0000],
                [0.1818, 0.0000]], dtype=torch.float64), tensor([0.5500], dtype=torch.float64))
    """
    largest = transition.sum(-1).amax()
    A = transition / largest
    messages = _messages(likelihood, A)
    if not bool(messages.are_kept()):
        return None
    both = messages.alpha * messages.beta
    mass = both.sum(1)
    gamma = (both / mass.unsqueeze(1)).transpose(1, 2)
    each = (messages.norm * mass)[1:].unsqueeze(1)
    starts = (messages.alpha[:-1] / each).transpose(1, 2).unsqueeze(-1)
    ends = (likelihood[1:] * messages.beta[1:]).transpose(1, 2).unsqueeze(-2)
    log_evidence = messages.norm.log().sum(0) + (len(likelihood) - 1) * largest.log()
    return gamma, (starts * A).mul_(ends), log_evidence


def _messages(steps: Tensor, A: Tensor) -> _Messages:
    """Messages of all steps. The likelihood: # (T, K, B)"""
    T, K, B = steps.shape
    # Two levels multiply matrices where one multiplies vectors, but in √T steps.
    least, most = (100, 1500) if steps.device.type == "cpu" else (16, 2**18)
    is_long = least <= T and most >= B * K * K
    messages = (_two_levels if is_long else _one_loop)(steps, A)
    return messages if bool(messages.are_kept()) else _one_loop(steps, A, every=1)


def _by_numba(
    likelihood: Tensor, transition: Tensor, weight: Tensor | None, often: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from pyro_em.posteriors.messages.numba_chain import ONE, smooth_lanes, smooth_rows

    transition = transition.contiguous()
    xi = torch.empty_like(transition)
    A, counts = transition.numpy(), xi.numpy()
    B, T, K = likelihood.shape
    each = np.ones(B) if often is None else often.contiguous().numpy()
    if B >= 8 and likelihood.stride() == (1, B, T * B):
        gamma = likelihood.new_empty(K, T, B)
        of = ONE if weight is None else weight.T.contiguous().numpy()
        lanes = likelihood.permute(2, 1, 0).numpy()
        log_evidence = smooth_lanes(lanes, A, of, each, gamma.numpy(), counts)
        gamma = gamma.permute(2, 1, 0)
    else:
        likelihood = likelihood.contiguous()
        gamma = torch.empty_like(likelihood)
        of = ONE if weight is None else weight.contiguous().numpy()
        log_evidence = smooth_rows(likelihood.numpy(), A, of, each, gamma.numpy(), counts)
    return gamma, xi, torch.tensor(log_evidence, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class _Messages:
    """Messages of every step, each up to a factor of its own.

    Attributes:
        alpha: α_t. # (T, K, B)
        beta: β_t. # (T, K, B)
        norm: What α_t was divided by when it had been made of α_{t−1}. # (T, B)
        least: The least of all norms, also of β and of those on the way. # ()
    """

    alpha: Tensor
    beta: Tensor
    norm: Tensor
    least: Tensor

    def are_kept(self) -> Tensor:
        """Whether nothing that may matter can have underflowed between two normalisations."""
        return self.least >= _LEAST

    def log_evidence(self, often: Tensor | None = None) -> Tensor:
        """Σ log c_t, NaN where a step's mass nearly underflows."""
        each = torch.where(self.norm > 1e-150, self.norm, torch.nan).log()
        return each.sum() if often is None else torch.dot(each.sum(0), often)

    def smoothed(
        self, likelihood: Tensor, A: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """γ, in the layout of the likelihood # (B, T, K), and ξ # (K, K)."""
        T, K, B = self.alpha.shape
        gamma = torch.empty_like(likelihood)
        steps, out = likelihood.permute(1, 2, 0), gamma.permute(1, 2, 0)
        # One matrix product over steps and sequences: (K, steps) if these are many, else (steps, K).
        order = (0, 2, 1) if B < K else (1, 0, 2)
        xi = torch.zeros_like(A)
        size = max(_BLOCK // (K * B), 16)
        for first in range(0, T, size):
            now, to = slice(first, first + size), slice(max(first, 1), first + size)
            both = self.alpha[now] * self.beta[now]
            mass = both.sum(1)
            torch.div(both, mass.unsqueeze(1), out=out[now])
            # Σ_ij α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j), as α_t was divided by its norm.
            each = (self.norm[now] * mass)[to.start - first :].reciprocal_()
            if weight is not None:
                each *= weight.T[to.start - 1 : first + size - 1] if len(weight.T) > 1 else weight.T
            alpha = self.alpha[to.start - 1 : first + size - 1][: len(each)].permute(order)
            starts = torch.mul(
                alpha, each.unsqueeze(1).permute(order), out=A.new_empty(alpha.shape)
            )
            ends = torch.mul(
                steps[to].permute(order), self.beta[to].permute(order), out=torch.empty_like(starts)
            )
            if B < K:
                xi.addmm_(starts.view(-1, K).T, ends.view(-1, K))
            else:
                xi.addmm_(starts.view(K, -1), ends.view(K, -1).T)
        return gamma, xi.mul_(A)


def _propagate(
    likelihood: Tensor, start: Tensor, A: Tensor, every: int, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions through S steps: v_s = (Aᵀ, A) u_{s−1} from v_0, u_s = v_s · ℓ_s.

    Args:
        likelihood: ℓ_s of both directions; u takes its place. # (S, 2, K, N)
        start: v_0. # (2, K, N)
        A: Transitions. # (K, K)
        every: Steps between two normalisations of u.
        ends: Further steps where u is normalised.

    Returns:
        u of the first direction # (S, K, N), v of the second, last step first # (S, K, N), and the
        norms of u, one where none was taken # (S, 2, N).
    """
    S, _, K, N = likelihood.shape
    norms = likelihood.new_ones(S, 2, 1, N)
    taken = {*range(every - 1, S, every), *ends}
    # The first direction of v_s is overwritten by the second of v_{s+1}: it has been used.
    v = likelihood.new_empty(S + 1, K, N)
    move, shape = torch.stack((A.T, A)), [2, K, N]
    if K <= 16:  # one product with zeros is quicker than two
        move, shape = torch.block_diag(A.T, A), [2 * K, N]
    pairs = v.as_strided((S, 2, K, N), (K * N, K * N, N, 1))
    moves, steps = pairs.view(S, *shape), likelihood.view(S, *shape)
    moves[-1].copy_(start.reshape(shape))
    steps[0].mul_(moves[-1])
    if 0 in taken:
        _normalise(likelihood[0], norms[0])
    multiply, times, as_array = _tiny_operations(likelihood.device, K, N)
    matrix, outs, rows = as_array(move), list(as_array(moves))[-2::-1], list(as_array(steps))
    with np.errstate(all="ignore"):  # whether mass was lost is read from the norms
        for s, out in enumerate(outs, 1):
            multiply(matrix, rows[s - 1], out=out)
            times(rows[s], out, out=rows[s])
            if s in taken:
                _normalise(likelihood[s], norms[s])
    return likelihood[:, 0], v[1:], norms.squeeze(2)


def _tiny_operations(device: torch.device, K: int, N: int) -> tuple[Callable[..., Any], ...]:
    """Matrix product, product, and their kind of array: a call of numpy costs half as much.

    Steps that are not tiny stay with torch, whose threads those of numpy's products would disturb.
    """
    if device.type == "cpu" and 2 * K * N < 2**13:
        return np.dot if K <= 16 else np.matmul, np.multiply, Tensor.numpy
    return torch.matmul, torch.mul, Tensor.detach


def _normalise(rows: Tensor, norm: Tensor) -> None:
    rows.div_(torch.sum(rows, 1, keepdim=True, out=norm))


def _one_loop(likelihood: Tensor, A: Tensor, every: int = _EVERY) -> _Messages:
    """One loop over all steps. The likelihood: # (T, K, B)"""
    T, K, B = likelihood.shape
    both = likelihood.new_empty(T, 2, K, B)
    both[:, 0] = likelihood
    both[:, 1] = likelihood.flip(0)
    alpha, beta, norms = _propagate(both, likelihood.new_ones(2, K, B), A, every, (T - 1,))
    return _Messages(alpha, beta, norms[:, 0], norms.amin())


def _two_levels(likelihood: Tensor, A: Tensor) -> _Messages:
    """Chunks of L steps side by side: their products, messages between them, and inside.

    The first q of C chunks have L steps, the others L − 1. The likelihood: # (T, K, B)
    """
    T, K, B = likelihood.shape
    # More chunks mean fewer steps inside; a processor is quicker with products that fit its cache.
    C = min(2 * math.isqrt(T), T // 2)
    if A.device.type == "cpu":
        C = min(C, max(2**16 // (K * K * B), math.isqrt(T) // 2))
    C = next((c for c in range(C, 2 * C // 3, -1) if T % c == 0), C)
    L = -(-T // C)
    q = T - C * (L - 1)
    both = likelihood.new_empty(L, 2, K, C, B)
    both[L - 1, :, :, q:] = 1.0  # steps that chunks do not have
    for times, steps, chunks in _pieces(C, L, q):
        piece = likelihood[times].unflatten(0, (-1, steps)).permute(1, 2, 0, 3)
        both[:steps, 0, :, chunks] = piece
        both[:steps, 1, :, chunks] = piece.flip(0)
    product, least = _products(both[:, 0].flatten(2), A, q * B, B)
    starts, ends, smallest = _between(product.unflatten(2, (C, B)))
    start = likelihood.new_ones(2, K, C, B)
    start[0, :, 1:] = (A.T @ starts.reshape(K, -1)).reshape(K, C - 1, B)
    start[1] = ends
    chunked = _propagate(both.flatten(3), start.flatten(2), A, _EVERY, (L - 2, L - 1))
    alpha, beta, norms = (t.unflatten(-1, (C, B)) for t in chunked)
    norms[L - 1, :, q:] = 1.0
    least = torch.minimum(torch.minimum(least, smallest), norms.amin())
    alphas, betas = found = likelihood.new_empty(2, T, K, B).unbind(0)
    norm = likelihood.new_empty(T, B)
    for times, steps, chunks in _pieces(C, L, q):
        for out, inside in zip(found, (alpha[:steps], beta[L - steps :]), strict=True):
            out[times].unflatten(0, (-1, steps)).copy_(inside[:, :, chunks].permute(2, 0, 1, 3))
        norm[times].unflatten(0, (-1, steps)).copy_(norms[:steps, 0, chunks].transpose(0, 1))
    return _Messages(alphas, betas, norm, least)


def _pieces(C: int, L: int, q: int) -> list[tuple[slice, int, slice]]:
    """Times, steps per chunk, and chunks: of those with L steps and those with L − 1."""
    pieces = [(slice(0, q * L), L, slice(0, q)), (slice(q * L, None), L - 1, slice(q, C))]
    return pieces if q < C else pieces[:1]


def _products(likelihood: Tensor, A: Tensor, full: int, first: int) -> tuple[Tensor, Tensor]:
    """Π_t A diag(ℓ_t) of each chunk, its largest number one, without the first A of the first chunk.

    Args:
        likelihood: # (L, K, N)
        A: # (K, K)
        full: How many of the N have all L steps; the others have one less.
        first: How many of the N belong to the first chunk.

    Returns:
        Products P(i, j) # (j, i, N), and the least of what they were divided by.
    """
    L, K, N = likelihood.shape
    At = A.T.contiguous()
    given = likelihood.unsqueeze(2).unbind(0)  # (j, 1, N) each
    product = At.unsqueeze(-1) * given[0]
    product[:, :, :first] = torch.diag_embed(given[0][:, 0, :first].T).permute(2, 1, 0)
    other = torch.empty_like(product)
    flat = [t.reshape(K, -1) for t in (product, other)]
    both, norms = [product, other], []
    for s in range(1, L):
        torch.mm(At, flat[(s + 1) % 2], out=flat[s % 2])
        new = both[s % 2].mul_(given[s])
        if s == L - 1 and full < N:
            new[:, :, full:] = both[(s + 1) % 2][:, :, full:]
        if s % _EVERY == 0 or s == L - 1:
            norms.append(new.amax((0, 1)))
            new.div_(norms[-1])
    return both[(L - 1) % 2], torch.stack(norms).amin()


def _between(product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Messages between chunks.

    Args:
        product: P(i, j) of each chunk. # (j, i, C, B)

    Returns:
        α at the ends of all chunks but the last # (K, C - 1, B), β at the ends of all # (K, C, B),
        and the least mass that was kept.
    """
    K, _, C, B = product.shape
    each = product.permute(2, 3, 1, 0)  # (C, B, i, j)
    move = torch.stack((each[1:], each[1:].flip(0).transpose(-1, -2)), 1).flatten(1, 2)
    found = product.new_empty(C, 2 * B, 1, K)
    found[0, :B, 0] = each[0].sum(-2)
    found[0, B:] = 1.0
    rows, norms = found.unbind(0), []
    for c, step in enumerate(move.unbind(0), 1):
        torch.bmm(rows[c - 1], step, out=rows[c])
        if c % 4 == 0:
            norms.append(rows[c].sum(-1, keepdim=True))
            rows[c].div_(norms[-1])
    total = found.sum(-1, keepdim=True)
    found = (found / total).unflatten(1, (2, B)).squeeze(3).permute(3, 1, 0, 2)  # (K, 2, C, B)
    least = torch.cat([total.flatten(), *(n.flatten() for n in norms)]).amin()
    return found[:, 0, : C - 1], found[:, 1].flip(1), least
