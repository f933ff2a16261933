"""The most probable path of chains, any transitions at any step.

    δ_t(j) = max_i [δ_{t−1}(i) + log A_t(i, j)] + log ℓ_t(j),

with the maximising i remembered, and the path read off backwards.

Source: Viterbi (1967); Rabiner (1989), "A tutorial on hidden Markov models", section III.B.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
    log_l = likelihood.detach().cpu().numpy()
    log_A = transition.detach().cpu().numpy()
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
    return torch.from_numpy(path).to(likelihood.device)
