"""What images of bits with logits cost: −log p of each bit, or of each image in one compiled pass."""

from __future__ import annotations

import importlib.util
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

_HAS_NUMBA = importlib.util.find_spec("numba") is not None

# Bits for which numba is not started. A rule by size alone, so that a fit repeated gives the same
# digits.
_FEW = 2**17

# Of torch: where it has more, its four passes are no slower than one pass of one thread.
_THREADS = 2


def lost_bits(fn: Any, value: Tensor) -> tuple[Tensor, int] | None:
    """−log p of an image with logits, where its distribution is one and validates nothing.

    Returns:
        −log p of each bit or, of many, of each image; and how many of the last dimensions are the
        image's. # (*batch, *event) or (*batch), event_dim or 0
    """
    if type(fn) is not dist.Independent or fn.reinterpreted_batch_ndims == 0:
        return None
    base, event_dim = fn.base_dist, fn.reinterpreted_batch_ndims
    if type(base) is not dist.Bernoulli or "logits" not in base.__dict__:
        return None
    if fn._validate_args or base._validate_args:
        return None
    logits = base.__dict__["logits"]
    if logits.shape != value.shape:
        logits, value = torch.broadcast_tensors(logits, value)
    if is_compiled(logits, value):
        return _Lost.apply(logits, value, event_dim), 0
    return binary_cross_entropy_with_logits(logits, value, reduction="none"), event_dim


def is_compiled(logits: Tensor, bits: Tensor) -> bool:
    """Whether the compiled loop takes them: many singles on the processor, with a gradient."""
    return (
        logits.requires_grad
        and not bits.requires_grad
        and logits.numel() >= _FEW
        and _HAS_NUMBA
        and logits.device.type == bits.device.type == "cpu"
        and logits.dtype is bits.dtype is torch.float32
        and logits.is_contiguous()
        and bits.is_contiguous()
        and torch.get_num_threads() <= _THREADS
        and torch.is_grad_enabled()
    )


class _Lost(torch.autograd.Function):
    """The cost of each image, whose slope, probability − bit, comes from the same pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bits: Tensor, event_dim: int) -> Tensor:  # type: ignore[override]
        from pyro_em.tracing.numba_bits import bits_lost

        slope = torch.empty_like(logits)
        cost = logits.new_empty(logits.shape[:-event_dim])
        size = logits.shape[-event_dim:].numel()
        rows = (t.detach().reshape(-1, size).numpy() for t in (logits, bits, slope))
        bits_lost(*rows, cost.reshape(-1).numpy())
        ctx.save_for_backward(logits, bits, slope)
        ctx.event_dim = event_dim
        return cost

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, bits, slope = ctx.saved_tensors
        is_one_number = not any(grad.stride()) and grad.numel() > 0
        if torch.is_grad_enabled():  # second derivatives
            slope = logits.sigmoid() - bits
        elif is_one_number and grad.flatten()[0].item() == 1.0:
            return slope, None, None  # as in the loss of a step: no pass over all bits
        return slope * grad.reshape(grad.shape + (1,) * ctx.event_dim), None, None
