"""Responsibilities of rows from log densities of their cells, each number written once.

r_k = exp(ℓ_k − max ℓ) / Σ_j exp(ℓ_j − max ℓ),      log p = max ℓ + log Σ_j exp(ℓ_j − max ℓ)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)


_MANY = 2048


def unnormalised(joint: Tensor, may_clamp: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest log density of each row, the exponential of what the others are below it, its sum.

    Args:
        joint: Log densities, which are overwritten. # (K, rows)
        may_clamp: Whether weights that count nothing may be zero.
    """
    top = joint.amax(0)
    weights = joint.sub_(top)
    if may_clamp:
        weights.clamp_(min=-80.0)
    if weights.dtype == torch.float64:  # of two it takes half the time
        weights.mul_(_LOG2_E).exp2_()
    else:
        weights.exp_()
    if may_clamp:
        torch.threshold_(weights, 2e-35, 0.0)
    return top, weights, weights.sum(0)


def sum_of_logs(mass: Tensor) -> Tensor:
    """Σ log of numbers between one and that of components: of many, eight share a logarithm. # ()"""
    out = mass.to(torch.float64)
    for _ in range(3):
        half, odd = divmod(out.shape[0], 2)
        if half < _MANY:  # a logarithm is cheaper than what it takes to share it
            break
        rest = out[2 * half :]
        out = out[:half] * out[half : 2 * half]
        if odd:
            out = torch.cat([out, rest])
    return out.log().sum()
