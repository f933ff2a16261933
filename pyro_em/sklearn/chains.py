"""Answers of chains whose log densities are at hand: smoothing, the best path, one step ahead.

Steps beyond the end of a sequence have density one in every state: what is summed over them is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.posteriors.messages.forward import forward
from pyro_em.posteriors.messages.forward_backward import smooth
from pyro_em.posteriors.messages.viterbi import viterbi


def smoothed(log_density: Tensor, log_pi: Tensor, log_A: Tensor) -> tuple[Tensor, float]:
    """p(z_t | x_1, …, x_T) at all steps, and the log evidence.

    Args:
        log_density: log p(x_t | z_t = k). # (B, T, K)
        log_pi: Of the first state. # (K,)
        log_A: Of transitions, rows from the former state. # (K, K)

    Returns:
        # (B, T, K), and nats; not finite where a step's mass nearly underflows.

    Example:
        >>> half = torch.tensor([0.5, 0.5]).double().log()
        >>> gamma, log_evidence = smoothed(torch.zeros(1, 3, 2).double(), half, half.expand(2, 2))
        >>> gamma[0, 0], abs(log_evidence) < 1e-12
        (tensor([0.5000, 0.5000], dtype=torch.float64), True)
    """
    log_l = _with_first(log_density, log_pi)
    tops = log_l.amax(-1, keepdim=True)
    gamma, _, log_evidence = smooth((log_l - tops).exp(), log_A.exp())
    return gamma, float(log_evidence + tops.sum())


def best_paths(log_density: Tensor, log_pi: Tensor, log_A: Tensor, inside: Tensor) -> Tensor:
    """The most probable path of each sequence, by Viterbi; # as in `smoothed` -> (B, T)

    A state that stands for the end of a sequence makes all of them equally long: it is entered for
    nothing, and never left.

    Args:
        log_density: As in `smoothed`.
        log_pi: As there.
        log_A: As there.
        inside: Which steps are of a sequence. # (B, T)
    """
    (B, T, K), never = log_density.shape, -torch.inf
    log_l = log_density.new_full((T, B, K + 1), never)
    log_l[..., :K] = _with_first(log_density, log_pi).transpose(0, 1)
    log_l[~inside.T] = log_l.new_tensor([never] * K + [0.0])
    transitions = log_A.new_full((K + 1, K + 1), never)
    transitions[:K, :K], transitions[:, K] = log_A, 0.0
    return viterbi(log_l, transitions.expand(T - 1, 1, K + 1, K + 1)).T


def one_step_ahead(log_density: Tensor, log_pi: Tensor, log_A: Tensor) -> Tensor:
    """log p(x_t | x_1, …, x_{t-1}) by the forward recursion; # as in `smoothed` -> (B, T)"""
    T, K = log_density.shape[1:]
    log_l = _with_first(log_density, log_pi).transpose(0, 1)
    return forward(log_l, log_A.expand(T - 1, 1, K, K))[1].T


def _with_first(log_density: Tensor, log_pi: Tensor) -> Tensor:
    out = log_density.clone()
    out[:, 0] += log_pi
    return out
