"""What is known of each step of a chain from the data up to it, any transitions at any step.

    log α_t(j) = log Σ_i α_{t−1}(i) A_t(i, j) + log ℓ_t(j) − log c_t,   c_t = p(x_t | x_1, …, x_{t−1}),

in logarithms, so that nothing is lost where prior and data disagree: by a compiled loop (numba, the
``fast`` extra), or by torch step after step.

Source: Rabiner (1989), "A tutorial on hidden Markov models", section V.A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.posteriors.messages.forward_backward import compiles


@torch.no_grad()
def forward(likelihood: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
    """The forward messages of every sequence.

    Args:
        likelihood: log ℓ; the first row holds the initial probabilities too. # (T, B, K)
        transition: log A_t, rows from the former state. # (T - 1, B or 1, K, K)

    Returns:
        log p(z_t | x_1, …, x_t) # (T, B, K), and log p(x_t | x_1, …, x_{t-1}) in nats # (T, B)

    Example:
        >>> A = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> l = torch.tensor([[0.5, 0.5], [1.0, 0.5]]).log()
        >>> log_p, log_c = forward(l.unsqueeze(1), A.expand(1, 1, 2, 2))
        >>> log_p[1, 0].exp(), log_c[1].exp()
        (tensor([0.6667, 0.3333]), tensor([0.7500]))
    """
    T, B, _ = likelihood.shape
    if T > 1 and compiles(T * B, likelihood.device):
        alike = transition.stride(0) == 0  # transitions that are those of all steps are one
        return _compiled(likelihood, transition[:1] if alike else transition)
    norm = likelihood[0].logsumexp(-1, keepdim=True)
    alpha, norms = [likelihood[0] - norm], [norm]
    for own, pair in zip(likelihood[1:], transition, strict=True):
        joint = torch.logsumexp(alpha[-1].unsqueeze(-1) + pair, -2) + own
        norms.append(joint.logsumexp(-1, keepdim=True))
        alpha.append(joint - norms[-1])
    return torch.stack(alpha), torch.stack(norms).squeeze(-1)


def _compiled(likelihood: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
    from pyro_em.posteriors.messages.numba_filter import forward_rows

    dtype = torch.promote_types(likelihood.dtype, transition.dtype)
    log_l, log_A = (t.detach().to(dtype).contiguous() for t in (likelihood, transition))
    alpha, norm = torch.empty_like(log_l), log_l.new_empty(log_l.shape[:2])
    forward_rows(log_l.numpy(), log_A.numpy(), alpha.numpy(), norm.numpy())
    return alpha, norm
