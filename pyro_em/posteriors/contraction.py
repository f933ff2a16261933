"""The log evidence of a plated factor graph, and its exact gradient.

    log p(x) = log Σ_z Π_f f(z),   evaluated by tensor variable elimination;

its gradient with respect to the log-density tensor of a factor *is* the posterior of that
factor's cells, so that one backward pass yields every expected count of any discrete model.
With max instead of log-sum-exp the gradient marks a jointly most probable assignment.

Plates are products: the variables of an innermost plate are eliminated first, the result is summed
(in log space) over the plate, and so on outwards. Chains and trees cost no more than their largest
clique, in any order of plates that does not couple a plate's elements.

Source: Obermeyer, Bingham, Jankowiak, Pradhan, Chiu, Rush, Goodman (2019), "Tensor variable
elimination for plated factor graphs"; Darwiche (2003) for the gradient. Log-sum-exp here is exact
down to the last nat: Pyro's own ring clamps gradients and loses posterior mass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.posteriors.elimination import Align, ContractionPlan, Eliminate, Reduce, alignment

Ring = Callable[[Tensor], Tensor]


class _LogSumExp(torch.autograd.Function):
    """log Σ exp over the last dimension; rows of −inf have gradient zero, not NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        top = x.amax(-1, keepdim=True)
        weights = (x - torch.where(torch.isfinite(top), top, 0.0)).exp()
        total = weights.sum(-1, keepdim=True)
        out = (total.log() + torch.where(torch.isfinite(top), top, 0.0)).squeeze(-1)
        ctx.save_for_backward(x, weights, total)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, weights, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For second derivatives the weights must depend on x again.
            out = _LogSumExp.apply(x)
            safe = torch.where(torch.isfinite(out), out, 0.0).unsqueeze(-1)
            return grad.unsqueeze(-1) * (x - safe).exp()
        return weights * (grad.unsqueeze(-1) / torch.where(total > 0, total, 1.0))


def log_sum_exp(x: Tensor) -> Tensor:
    """Sum out the last dimension of a table of log densities.

    Example:
        >>> log_sum_exp(torch.tensor([[-torch.inf, -torch.inf], [0.0, 0.0]]))
        tensor([  -inf, 0.6931])
    """
    if not torch.is_grad_enabled():
        return x.logsumexp(-1)  # whose values are right; the gradients of empty rows are not
    return _LogSumExp.apply(x)


def maximum(x: Tensor) -> Tensor:
    """Maximise out the last dimension; the gradient marks one maximiser per row."""
    return x.max(-1).values


Scales = Sequence[Tensor | float]


def contract(
    plan: ContractionPlan,
    tables: Sequence[Tensor],
    *,
    scales: Scales | None = None,
    ring: Ring = log_sum_exp,
) -> list[tuple[tuple[str, ...], Tensor]]:
    """Carry out a contraction.

    Args:
        plan: The order.
        tables: The factors' log densities in nats, dimensions as in the plan.
        scales: What multiplies each factor outside the logarithm (a number, or a tensor over its
            dimensions with ones at the latents); None where all are one.
        ring: How a variable is eliminated.

    Returns:
        The terms of the log evidence: the names of their plates and their values; the evidence is
        the sum of all values.
    """
    slots: dict[int, Tensor] = dict(enumerate(tables))
    terms: list[tuple[tuple[str, ...], Tensor]] = []
    for step in plan.steps:
        if isinstance(step, Eliminate):
            total: Tensor | None = None
            for s, layout, exponent in zip(
                step.inputs, step.alignments, step.exponents, strict=True
            ):
                table = slots.pop(s)
                if scales is not None and exponent is not None:
                    table = _raise(table, plan, s, exponent, scales)
                table = _aligned(table, layout)
                total = table if total is None else total + table
            assert total is not None
            slots[step.output] = ring(total)
            continue
        table = slots.pop(step.input)
        if scales is not None and step.scale is not None:
            table = table * _over(scales[step.scale], plan.factor_dims[step.scale], step.table_dims)
        if step.is_final:
            terms.append((step.table_dims, table))
        else:
            slots[step.output] = table.sum(step.axes) if step.axes else table
    return terms


def _aligned(table: Tensor, layout: Align) -> Tensor:
    if layout.leaves_all:
        return table
    table = table.permute(layout.permutation)
    sizes = iter(table.shape)
    return table.reshape([next(sizes) if s is None else 1 for s in layout.shape])


def _over(scale: Tensor | float, dims: Sequence[str], target: Sequence[str]) -> Tensor | float:
    """A factor's scale (ones at its latents) laid out over the dimensions of a table."""
    if not isinstance(scale, Tensor):
        return scale
    keep = [i for i, d in enumerate(dims) if scale.shape[i] > 1]
    small = scale.reshape([scale.shape[i] for i in keep])
    names = [dims[i] for i in keep]
    return _aligned(small, alignment(names, target))


def _raise(
    table: Tensor, plan: ContractionPlan, slot: int, exponent: tuple[str, int], scales: Scales
) -> Tensor:
    how, reference = exponent
    base = scales[reference]
    if how == "ratio":
        own = scales[slot]
        if own is base or (
            not isinstance(own, Tensor) and not isinstance(base, Tensor) and own == base
        ):
            return table
        dims = plan.factor_dims[slot]
        ratio = torch.as_tensor(_over(own, dims, dims)) / torch.as_tensor(
            _over(base, plan.factor_dims[reference], dims)
        )
        return table if bool((ratio == 1).all()) else table * ratio
    if not isinstance(base, Tensor):
        return table if base == 1.0 else table / base
    return table / _over(base, plan.factor_dims[reference], _dims_of_message(plan, slot))


def _dims_of_message(plan: ContractionPlan, slot: int) -> tuple[str, ...]:
    for step in plan.steps:
        if isinstance(step, Reduce) and step.output == slot:
            return tuple(d for i, d in enumerate(step.table_dims) if i not in step.axes)
    raise KeyError(slot)


def evidence(terms: Iterable[tuple[tuple[str, ...], Tensor]]) -> Tensor:
    """The log evidence in nats: the sum of a contraction's terms."""
    total: Tensor | None = None
    for _, value in terms:
        part = value.sum(dtype=torch.float64)
        total = part if total is None else total.to(part.device) + part
    return torch.zeros((), dtype=torch.float64) if total is None else total
