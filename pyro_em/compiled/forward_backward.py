r"""Forward and backward messages of homogeneous chains, scaled at every step.

    α_t(j) ∝ ℓ_t(j) Σ_i α_{t−1}(i) A(i, j),     β_{t−1}(i) ∝ Σ_j A(i, j) ℓ_t(j) β_t(j)

each normalised to sum to one; c_t = Σ_j ℓ_t(j) Σ_i α_{t−1}(i) A(i, j) gives the log evidence Σ log c_t.
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


def messages(likelihood: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
    """α and β of every sequence and step.

    Args:
        likelihood: ℓ, each row divided by its maximum; the first row holds the initial
            probabilities too. # (B, T, K)
        transition: A, rows from the former state; any non-negative numbers. # (K, K)

    Returns:
        α and β, each row summing to one; rows after an underflow are not numbers. # (B, T, K)

    Example:
        >>> A = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> alpha, beta = messages(torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]), A)
        >>> alpha[0, 1], beta[0, 0] * 1.1
        (tensor([1., 0.]), tensor([0.9000, 0.2000]))
    """
    if _HAS_NUMBA and likelihood.device.type == "cpu":
        from pyro_em.compiled.numba_chain import sweep

        alpha, beta = torch.empty_like(likelihood), torch.empty_like(likelihood)
        arrays = (likelihood, transition, alpha, beta)
        sweep(*(t.contiguous().numpy() for t in arrays))
        return alpha, beta
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
