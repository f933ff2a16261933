"""The most probable path of chains, any transitions at any step.

    δ_t(j) = max_i [δ_{t−1}(i) + log A_t(i, j)] + log ℓ_t(j),

with the maximising i, the first of equals, found again or remembered, and the path read off backwards:
by compiled loops (numba, the ``fast`` extra), or by numpy.

Source: Viterbi (1967); Rabiner (1989), "A tutorial on hidden Markov models", section III.B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.messages.forward_backward import compiles


def viterbi(likelihood: Tensor, transition: Tensor) -> Tensor:
    """The most probable path of every sequence.

    Args:
        likelihood: log ℓ; the first row holds the initial probabilities too. # (T, B, K)
        transition: log A_t, rows from the former state. # (T - 1, B or 1, K, K)

    Returns:
        States. # (T, B)

    Example:
        >>> A = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> l = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2]]).log()
        >>> viterbi(l.unsqueeze(1), A.expand(2, 1, 2, 2)).squeeze(1)
        tensor([0, 0, 0])
    """
    # Transitions that are those of all steps are looked at once.
    alike = len(transition) > 1 and transition.stride(0) == 0
    log_l, log_A = (
        likelihood.detach().cpu(),
        (transition[:1] if alike else transition).detach().cpu(),
    )
    T, B, _ = log_l.shape
    if T == 1:
        path = log_l.argmax(-1)
    elif compiles(T * B, log_l.device):
        dtype = torch.promote_types(log_l.dtype, log_A.dtype)
        path = _compiled(log_l.to(dtype).contiguous(), log_A.to(dtype).contiguous())
    else:
        path = torch.from_numpy(_by_steps(log_l.numpy(), log_A.expand(T - 1, -1, -1, -1).numpy()))
    return path.to(likelihood.device)


def _compiled(log_l: Tensor, log_A: Tensor) -> Tensor:
    from pyro_em.posteriors.messages.numba_paths import best_paths

    path = torch.empty(log_l.shape[:2], dtype=torch.long)
    best_paths(log_l.numpy(), log_A.numpy(), path.numpy())
    return path


def _by_steps(
    log_l: NDArray[np.floating[Any]], log_A: NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    """The same by numpy, step after step."""
    T, B, K = log_l.shape
    came_from = np.empty((T - 1, B, K), dtype=np.int64)
    best = log_l[0]
    for t in range(1, T):
        scores = best[:, :, None] + log_A[t - 1]
        scores.argmax(1, out=came_from[t - 1])
        best = scores.max(1) + log_l[t]
    path = np.empty((T, B), dtype=np.int64)
    rows = np.arange(B)
    path[-1] = best.argmax(-1)
    for t in range(T - 1, 0, -1):
        path[t - 1] = came_from[t - 1][rows, path[t]]
    return path
