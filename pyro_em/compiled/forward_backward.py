r"""Smoothing of homogeneous chains by forward and backward messages, scaled at every step.

    α_t(j) ∝ ℓ_t(j) Σ_i α_{t−1}(i) A(i, j),     β_{t−1}(i) ∝ Σ_j A(i, j) ℓ_t(j) β_t(j)

each normalised to sum to one; c_t = Σ_j ℓ_t(j) Σ_i α_{t−1}(i) A(i, j) gives the log evidence
Σ log c_t, γ_t ∝ α_t β_t the marginals and ξ_t(i, j) ∝ α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j) the transitions.
Three ways, chosen by what is there: a compiled loop (numba, the ``fast`` extra), one loop over time
for many sequences, and two levels of √T steps for few (also right for a GPU).

Source: Rabiner (1989), "A tutorial on hidden Markov models", section V.A, for the scaling.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def smooth(
    likelihood: Tensor, transition: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior marginals, expected transitions and the log evidence of all sequences.

    Args:
        likelihood: ℓ, each row divided by its maximum; the first row holds the initial
            probabilities too. # (B, T, K)
        transition: A, rows from the former state; any non-negative numbers. # (K, K)
        weight: How much each transition counts; one where left out. # (B or 1, T - 1 or 1)

    Returns:
        γ # (B, T, K), ξ summed over sequences and steps # (K, K), and Σ log c_t in nats: NaN where
        a step's mass nearly underflows.

    Example:
        >>> A = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        >>> l = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
        >>> gamma, xi, log_evidence = smooth(l, A)
        >>> xi.round(decimals=4), log_evidence.exp()
        (tensor([[0.8182, 0.0000],
                [0.1818, 0.0000]], dtype=torch.float64), tensor(0.5500, dtype=torch.float64))
    """
    if _HAS_NUMBA and likelihood.device.type == "cpu":
        from pyro_em.compiled.numba_chain import smooth as compiled

        weight = likelihood.new_ones(1, 1) if weight is None else weight
        gamma, xi = torch.empty_like(likelihood), torch.empty_like(transition)
        arrays = (likelihood.contiguous(), transition.contiguous(), weight.contiguous(), gamma, xi)
        log_evidence = compiled(*(t.numpy() for t in arrays))
        return gamma, xi, torch.tensor(log_evidence, dtype=torch.float64)
    alpha, beta = messages(likelihood, transition)
    gamma = alpha * beta
    gamma = gamma / gamma.sum(-1, keepdim=True)
    ahead = alpha[:, :-1] @ transition
    mass = (ahead * likelihood[:, 1:]).sum(-1)
    log_evidence = torch.where(mass > 1e-150, mass, torch.nan).log().sum()
    log_evidence = log_evidence + likelihood[:, 0].sum(-1).log().sum()
    to = likelihood[:, 1:] * beta[:, 1:]
    each = (ahead * to).sum(-1).reciprocal()
    each = each if weight is None else each * weight
    K = transition.shape[0]
    start = (alpha[:, :-1] * each.unsqueeze(-1)).reshape(-1, K)
    return gamma, transition * (start.T @ to.reshape(-1, K)), log_evidence


def messages(likelihood: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
    """α and β of every sequence and step, by torch alone.

    Args:
        likelihood: As in `smooth`. # (B, T, K)
        transition: A. # (K, K)

    Returns:
        α and β, each row summing to one. # (B, T, K)
    """
    B, T, K = likelihood.shape
    # Two levels multiply matrices where one multiplies vectors, but in √T steps.
    if T >= 16 and 64 * math.isqrt(T) >= B * K:
        return _two_levels(likelihood, transition)
    return _one_loop(likelihood, transition)


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True)


def _one_loop(likelihood: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    T = likelihood.shape[1]
    steps = likelihood.unbind(1)
    alpha = [_normalised(steps[0])]
    for t in range(1, T):
        alpha.append(_normalised((alpha[-1] @ A) * steps[t]))
    beta = [torch.full_like(steps[0], 1.0 / A.shape[0])]
    At = A.T.contiguous()
    for t in range(T - 1, 0, -1):
        beta.append(_normalised((steps[t] * beta[-1]) @ At))
    return torch.stack(alpha, 1), torch.stack(beta[::-1], 1)


def _two_levels(likelihood: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Products of L matrices in parallel over C chunks, then messages over chunks, then inside."""
    B, T, K = likelihood.shape
    n = T - 1  # steps with a transition
    L = math.isqrt(n - 1) + 1
    C = -(-n // L)
    # Steps beyond the end are left out of the products, and what is computed there is dropped.
    padded = torch.nn.functional.pad(likelihood[:, 1:], (0, 0, 0, C * L - n), value=1.0)
    steps = padded.reshape(B, C, L, K).unbind(2)  # L of (B, C, K)
    product = torch.eye(K, dtype=A.dtype, device=A.device).expand(B, C, K, K)
    last = n - (C - 1) * L  # steps of the last chunk
    for at, step in enumerate(steps):
        grown = (product @ A) * step.unsqueeze(-2)
        grown = grown / grown.amax((-2, -1), keepdim=True)
        if at >= last:
            grown = torch.cat([grown[:, :-1], product[:, -1:]], 1)
        product = grown
    per_chunk = product.unbind(1)
    first = _normalised(likelihood[:, 0])
    starts = [first]
    for c in range(C - 1):
        starts.append(_normalised((starts[-1].unsqueeze(-2) @ per_chunk[c]).squeeze(-2)))
    flat = torch.full_like(first, 1.0 / K)
    ends = [flat]
    for c in range(C - 1, 0, -1):
        ends.append(_normalised((per_chunk[c] @ ends[-1].unsqueeze(-1)).squeeze(-1)))
    alpha, beta = torch.stack(starts, 1), torch.stack(ends[::-1], 1)  # (B, C, K)
    alphas = []
    for step in steps:
        alpha = _normalised((alpha @ A) * step)
        alphas.append(alpha)
    At = A.T.contiguous()
    betas = []
    for at in range(L - 1, -1, -1):
        betas.append(beta)
        moved = _normalised((steps[at] * beta) @ At)
        beta = torch.cat([moved[:, :-1], beta[:, -1:]], 1) if at >= last else moved
    forward = torch.stack(alphas, 2).reshape(B, C * L, K)[:, :n]
    backward = torch.stack(betas[::-1], 2).reshape(B, C * L, K)[:, :n]
    before_first = _normalised((steps[0][:, 0] * backward[:, 0]) @ At)
    return (
        torch.cat([first.unsqueeze(1), forward], 1),
        torch.cat([before_first.unsqueeze(1), backward], 1),
    )
