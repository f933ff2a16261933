r"""Gradient M-step: maximise Q(θ) = E_q[log p(x, z; θ)] in the unconstrained space.

L-BFGS with a strong-Wolfe line search from the current values; a result that is worse than the
start is discarded, so that the objective cannot fall. Small problems are finished by Newton steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em._errors import PyroEMError
from pyro_em._pyro import TracedParameter
from pyro_em.m_step.updates import Gradient

Objective = Callable[[Mapping[str, Tensor]], Tensor]

_NEWTON_SIZE = 24
_NEWTON_STEPS = 4


def maximise(
    parameters: Sequence[TracedParameter],
    objective: Objective,
    update: Gradient,
    state: dict[str, torch.optim.Optimizer],
    weight: float,
) -> None:
    """Raise the expected log joint over some parameters, writing them in place.

    Args:
        parameters: The parameters to move.
        objective: From constrained values of these parameters to Q in nats.
        update: How.
        state: Where a torch optimiser is kept between M-steps.
        weight: Total expected count, by which Q is divided so that tolerances do not depend on N.
    """
    before = [p.unconstrained.detach().clone() for p in parameters]
    direct = [p.leaf is p.unconstrained for p in parameters]  # nn.Parameter: read by its module
    if update.optimizer is None:
        variables = [
            p.unconstrained if d else b.clone().requires_grad_()
            for p, d, b in zip(parameters, direct, before, strict=True)
        ]
    else:
        variables = [p.unconstrained for p in parameters]

    def loss() -> Tensor:
        values = {
            p.name: transform_to(p.constraint)(v)
            for p, v in zip(parameters, variables, strict=True)
        }
        return -objective(values) / weight

    if update.optimizer is not None:
        _step_optimizer(parameters, variables, loss, update, state)
        return
    with torch.no_grad():
        start = float(loss())
    _lbfgs(variables, loss, update.steps)
    if _value(loss) < math.inf and sum(v.numel() for v in variables) <= _NEWTON_SIZE:
        _newton(variables, loss)
    end = _value(loss)
    with torch.no_grad():
        improved = end <= start + _rounding(start, variables[0])
        for p, v, b in zip(parameters, variables, before, strict=True):
            p.unconstrained.copy_(v if improved else b)


def _value(loss: Callable[[], Tensor]) -> float:
    """The loss, or infinity where the model cannot run."""
    try:
        with torch.no_grad():
            return float(loss())
    except PyroEMError:
        return math.inf


def _rounding(value: float, like: Tensor) -> float:
    """What a sum of this size may be off by."""
    return 8 * torch.finfo(like.dtype).eps * max(1.0, abs(value))


def _step_optimizer(
    parameters: Sequence[TracedParameter],
    variables: list[Tensor],
    loss: Callable[[], Tensor],
    update: Gradient,
    state: dict[str, torch.optim.Optimizer],
) -> None:
    key = ",".join(p.name for p in parameters)
    known = state.get(key)
    held = [] if known is None else known.param_groups[0]["params"]
    if known is None or any(a is not b for a, b in zip(held, variables, strict=False)):
        assert update.optimizer is not None
        known = state[key] = update.optimizer(variables)
    for _ in range(update.steps):
        known.zero_grad()
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), variables, allow_unused=True)
        for v, g in zip(variables, gradients, strict=True):
            v.grad = None if g is None else torch.where(torch.isfinite(v), g, 0.0)
        known.step()
        known.zero_grad()


def _lbfgs(variables: list[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    optimizer = torch.optim.LBFGS(
        variables,
        max_iter=steps,
        max_eval=3 * steps,
        history_size=20,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    best = math.inf

    def closure() -> Tensor:
        nonlocal best
        try:
            with torch.enable_grad():
                value = loss()
                gradients = torch.autograd.grad(value, variables, allow_unused=True)
            finite = bool(torch.isfinite(value.detach()))
        except PyroEMError:
            if best == math.inf:
                raise
            finite = False
        if not finite and best < math.inf:
            # A trial point at which the model cannot run is a bad one, not the end of the fit.
            for v in variables:
                v.grad = torch.zeros_like(v)
            return torch.as_tensor(best + 1e3 * (1 + abs(best)))
        best = min(best, float(value.detach()))
        for v, g in zip(variables, gradients, strict=True):
            # A coordinate at infinity is a structural zero: it stays.
            v.grad = torch.zeros_like(v) if g is None else torch.where(torch.isfinite(v), g, 0.0)
        return value.detach()

    optimizer.step(closure)
    for v in variables:
        v.grad = None


def _newton(variables: list[Tensor], loss: Callable[[], Tensor]) -> None:
    """A few safeguarded Newton steps: the last digits that first-order steps leave."""
    for _ in range(_NEWTON_STEPS):
        with torch.enable_grad():
            value = loss()
            gradients = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)
            rows = []
            flat = []
            for v, g in zip(variables, gradients, strict=True):
                flat.append(torch.zeros_like(v).reshape(-1) if g is None else g.reshape(-1))
            gradient = torch.cat(flat)
            if not gradient.requires_grad:
                return
            for component in gradient:
                row = torch.autograd.grad(
                    component, variables, retain_graph=True, allow_unused=True
                )
                rows.append(
                    torch.cat(
                        [
                            torch.zeros_like(v).reshape(-1) if r is None else r.reshape(-1)
                            for v, r in zip(variables, row, strict=True)
                        ]
                    )
                )
        hessian, gradient = torch.stack(rows).detach(), gradient.detach()
        if not bool(torch.isfinite(hessian).all()) or not bool(torch.isfinite(gradient).all()):
            return
        eigenvalues, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        top = eigenvalues.abs().max()
        curved = eigenvalues > 1e-10 * top
        inverse = torch.where(curved, 1 / torch.where(curved, eigenvalues, 1.0), 0.0)
        step = -vectors @ (inverse * (vectors.mT @ gradient))
        old = [v.detach().clone() for v in variables]
        with torch.no_grad():
            at = 0
            for v in variables:
                v += step[at : at + v.numel()].reshape(v.shape)
                at += v.numel()
            # Near the optimum the gain is below rounding while the step is not.
            old_value = float(value.detach())
            better = _value(loss) <= old_value + _rounding(old_value, variables[0])
            if not better:
                for v, o in zip(variables, old, strict=True):
                    v.copy_(o)
                return
        if float(step.abs().max()) < 1e-14:
            return
