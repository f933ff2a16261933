r"""Smoothing of chains whose transitions change from step to step, by messages through time.

    α_t(j) ∝ ℓ_t(j) Σ_i α_{t−1}(i) A_t(i, j),      β_{t−1}(i) ∝ Σ_j A_t(i, j) ℓ_t(j) β_t(j)

with γ_t ∝ α_t β_t and ξ_t(i, j) ∝ α_{t−1}(i) A_t(i, j) ℓ_t(j) β_t(j). Long chains go through time on
two levels: products of matrices within blocks of about √T steps, all blocks side by side, then messages
from block to block, then those within all blocks side by side.

Source: Rabiner (1989), "A tutorial on hidden Markov models", sections III.A and V.A; Särkkä and
García-Fernández (2021), "Temporal parallelization of Bayesian smoothers", for products of steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_em.posteriors.messages.forward_backward import compiles

_LEAST = 1e-100  # of a step's mass: what is lost below 1e-308 cannot matter then

_SHORT = 64  # steps that are taken one by one

_WIDE = 4096  # numbers per step above which arithmetic costs more than operations do


def varying_neighbours(
    likelihood: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Posterior marginals of all steps, of all pairs of neighbours, and the log evidence.

    Args:
        likelihood: ℓ, each row divided by its maximum; the first row holds the initial
            probabilities too. # (T, B, K)
        transitions: A_t for t = 1, …, T − 1, rows from the former state, each matrix divided by its
            maximum. # (T - 1, B or 1, K, K)

    Returns:
        γ # (T, B, K), ξ # (T - 1, B, K, K) and Σ_t log c_t in nats # (B,); None where mass that may
        matter nearly underflows.

    Example:
        >>> A = torch.tensor([[[[0.9, 0.1], [0.2, 0.8]]]], dtype=torch.float64)
        >>> l = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]], dtype=torch.float64)
        >>> gamma, xi, log_evidence = varying_neighbours(l, A)
        >>> gamma[0], log_evidence.exp()
        (tensor([[0.8182, 0.1818]], dtype=torch.float64), tensor([0.5500], dtype=torch.float64))
    """
    T, B = likelihood.shape[:2]
    if compiles(T * B, likelihood.device):
        return _compiled(likelihood, transitions)
    steps = transitions * likelihood[1:].unsqueeze(-2)
    forward = _messages(steps, likelihood[0])
    backward = _messages(steps.transpose(-2, -1).flip(0), torch.ones_like(likelihood[0]))
    if forward is None or backward is None:
        return None
    alpha, mass = forward
    beta = backward[0].flip(0)
    gamma = alpha * beta
    gamma = gamma / gamma.sum(-1, keepdim=True)
    xi = alpha[:-1].unsqueeze(-1) * steps * beta[1:].unsqueeze(-2)
    xi = xi / xi.sum((-2, -1), keepdim=True)
    if not bool(torch.isfinite(gamma).all() & torch.isfinite(xi).all()):
        return None
    return gamma, xi, mass.log().sum(0)


def _compiled(likelihood: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same by compiled loops."""
    from pyro_em.posteriors.messages.numba_chain import smooth_each

    T, B, K = likelihood.shape
    gamma, log_p = torch.empty_like(likelihood.contiguous()), likelihood.new_empty(B)
    xi = likelihood.new_empty(T - 1, B, K, K)
    arrays = (likelihood.contiguous(), transitions.contiguous(), gamma, xi, log_p)
    smooth_each(*(t.numpy() for t in arrays))
    return (gamma, xi, log_p) if bool(torch.isfinite(log_p).all()) else None


def _messages(matrices: Tensor, first: Tensor) -> tuple[Tensor, Tensor] | None:
    """Messages through time, each divided by its sum.

    Args:
        matrices: M_t for t = 1, …, T − 1, non-negative. # (T - 1, B, K, K)
        first: The message at 0. # (B, K)

    Returns:
        m_t ∝ m_{t−1} M_t # (T, B, K), and the sums by which each was divided # (T, B); None where one
        is too small to trust.
    """
    B, K = first.shape
    mass = first.sum(-1)
    start = first / mass.unsqueeze(-1)
    is_short = len(matrices) < _SHORT or B * K * K > _WIDE
    steps = (_one_by_one if is_short else _by_blocks)(matrices, start)
    if steps is None:
        return None
    messages = torch.cat([start.unsqueeze(0), steps[0]])
    sums = torch.cat([mass.unsqueeze(0), steps[1]])
    return (messages, sums) if bool((sums >= _LEAST).all()) else None


def _one_by_one(matrices: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The messages after the first, and their sums. # (T - 1, B, K), (T - 1, B)"""
    now, messages, sums = start.unsqueeze(-2), [], []
    for matrix in matrices.unbind(0):
        now = now @ matrix
        total = now.sum(-1, keepdim=True)
        now = now / total
        messages.append(now)
        sums.append(total)
    return torch.stack(messages).squeeze(-2), torch.stack(sums)[..., 0, 0]


def _by_blocks(matrices: Tensor, start: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same in about √T operations: all blocks of steps side by side."""
    T, n = len(matrices), math.isqrt(len(matrices))
    B, K = start.shape
    blocks = -(-T // n)
    unit = torch.eye(K, dtype=matrices.dtype, device=matrices.device)
    steps = torch.cat([matrices, unit.expand(blocks * n - T, B, K, K)])
    steps = steps.reshape(blocks, n, B, K, K)
    product = steps[:, 0]
    for i in range(1, n):
        product = product @ steps[:, i]
        product = product / product.amax((-2, -1), keepdim=True)
    now, begins = start.unsqueeze(-2), [start]
    for block in product[:-1].unbind(0):
        now = now @ block
        total = now.sum(-1, keepdim=True)
        if not bool((total >= _LEAST).all()):
            return None
        now = now / total
        begins.append(now.squeeze(-2))
    within = steps.transpose(0, 1).reshape(n, blocks * B, K, K)
    messages, sums = _one_by_one(within, torch.cat(begins))
    messages = messages.reshape(n, blocks, B, K).transpose(0, 1).reshape(-1, B, K)
    sums = sums.reshape(n, blocks, B).transpose(0, 1).reshape(-1, B)
    return messages[:T], sums[:T]
