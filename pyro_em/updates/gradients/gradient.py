"""Gradient M-step: maximise Q(θ) = E_q[log p(x, z; θ)] in the unconstrained space.

L-BFGS with a strong-Wolfe line search from the current values; a result that is worse than the
start is discarded, so that the objective cannot fall. Small problems are finished by Newton steps.
Where a coordinate ends at a bound of its constraint it is seen whether it should have left it.
An objective without bound has no maximiser: where the climb ends by the limits of numbers, and not by
its gradient, it is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from pyro.distributions.transforms import SoftplusLowerCholeskyTransform, SoftplusTransform
from torch import Tensor
from torch.distributions import transform_to, transforms

from pyro_em.errors import PyroEMError
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.updates.gradients.kept_loss import KeptLoss
from pyro_em.updates.gradients.lbfgs import minimise
from pyro_em.updates.gradients.optimizers import of_update
from pyro_em.updates.gradients.saturated import leave_bounds
from pyro_em.updates.unbounded import Runaway
from pyro_em.updates.update import Gradient

Objective = Callable[[Mapping[str, Tensor]], Tensor]

_NEWTON_SIZE = 24

_NEWTON_STEPS = 4

_FAR = 0.8  # of the digits of a number: a factor of 3e12 in float64, 3e5 in float32

_CLIMBS = 4  # each after the first begins where coordinates have left a bound

_CLIFF = 0.02  # how much further a coordinate is moved to see whether the model breaks there


def maximise(
    parameters: Sequence[TracedParameter],
    objective: Objective,
    update: Gradient,
    state: dict[str, torch.optim.Optimizer],
    weight: float,
) -> Runaway | None:
    """Raise the expected log joint over some parameters, writing them in place.

    Args:
        parameters: The parameters to move.
        objective: From constrained values of these parameters to Q in nats.
        update: How.
        state: Where a torch optimiser is kept between M-steps.
        weight: Total expected count, by which Q is divided so that tolerances do not depend on N.

    Returns:
        A coordinate that runs off to a limit of numbers while Q rises, or None.
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

    def at(values: Mapping[str, Tensor]) -> Tensor:
        return -objective(values) / weight

    def here() -> Tensor:
        return at(
            {
                p.name: transform_to(p.constraint)(v)
                for p, v in zip(parameters, variables, strict=True)
            }
        )

    if update.optimizer is not None:
        _step_optimizer(parameters, variables, here, update, state)
        return None
    is_small = sum(v.numel() for v in variables) <= _NEWTON_SIZE
    loss = KeptLoss(variables, here, curved=is_small)
    start = float(loss.tensor().detach())
    for _ in range(_CLIMBS):
        _lbfgs(variables, loss, update.steps)
        uphill: Tensor | None = None
        if is_small and loss.value_with_graph() < math.inf:
            uphill = _newton(variables, loss)
        moved = leave_bounds(parameters, variables, before, at, loss.value)
        if uphill is not None and not moved:
            moved = _leave_saddle(variables, loss, uphill)
        if not moved:
            break
    end = loss.value_with_graph()
    runaway = _runaway(parameters, variables, before, loss, weight)
    with torch.no_grad():
        improved = end <= start + _rounding(start, variables[0])
        for p, v, b in zip(parameters, variables, before, strict=True):
            p.unconstrained.copy_(v if improved else b)
    return runaway if improved else None


def _runaway(
    parameters: Sequence[TracedParameter],
    variables: Sequence[Tensor],
    before: Sequence[Tensor],
    loss: KeptLoss,
    weight: float,
) -> Runaway | None:
    """A coordinate where the climb was ended by the limits of numbers.

    Its gradient is far from zero, although it went on by a factor that takes most digits of a number,
    or a little further the model breaks. Where a limit exists (the slope of separable data), the
    gradient vanishes on the way.
    """
    try:
        gradients = loss.gradients()
    except PyroEMError:
        return None
    for p, v, b, g in zip(parameters, variables, before, gradients, strict=True):
        if g is None:
            continue
        eps = torch.finfo(v.dtype).eps
        gain = (g.detach() * weight).abs()
        gain = torch.where(torch.isfinite(gain), gain, math.inf)  # 0 · ∞ at the smallest number
        steep = torch.isfinite(v) & (gain >= max(0.1, 64 * eps**0.5 * weight))
        if not bool(steep.any()):
            continue
        far = steep & _is_logarithm(p, b, v) & ((v.detach() - b).abs() > -_FAR * math.log(eps))
        outward = steep & (g * v < 0)
        if not bool(far.any()) and bool(outward.any()):
            kept = v.detach().clone()
            with torch.no_grad():
                v.copy_(torch.where(outward, v * (1 + _CLIFF), v))
                breaks = _breaks(loss)
                v.copy_(kept)
            far = outward if breaks else far
        if bool(far.any()):
            at = int(torch.where(far, gain, 0.0).reshape(-1).argmax())
            return Runaway(p.name, at, float(gain.reshape(-1)[at]))
    return None


def _breaks(loss: KeptLoss) -> bool:
    """Whether the loss has no value here, or no slope."""
    try:
        gradients = loss.gradients()
    except PyroEMError:
        return True
    finite = (bool(torch.isfinite(g).all()) for g in gradients if g is not None)
    return not (math.isfinite(loss.value()) and all(finite))


def _is_logarithm(parameter: TracedParameter, before: Tensor, after: Tensor) -> Tensor:
    """Which unconstrained coordinates are logarithms on the way that they went."""
    found = _parts(transform_to(parameter.constraint))
    if any(isinstance(t, (transforms.SoftplusTransform, SoftplusTransform)) for t in found):
        return after < before  # upwards it is nearly the identity
    if any(isinstance(t, _LOGARITHMS) for t in found):
        return torch.ones_like(after, dtype=torch.bool)
    if any(isinstance(t, (*_TRIANGLES, SoftplusLowerCholeskyTransform)) for t in found):
        size = after.shape[-1]
        diagonal = torch.eye(size, dtype=torch.bool, device=after.device).expand(after.shape)
        bare = any(isinstance(t, _TRIANGLES) for t in found)
        return diagonal if bare else diagonal & (after < before)
    return torch.zeros_like(after, dtype=torch.bool)


_LOGARITHMS = (
    transforms.ExpTransform,
    transforms.SigmoidTransform,
    transforms.SoftmaxTransform,
    transforms.StickBreakingTransform,
)


_TRIANGLES = (transforms.LowerCholeskyTransform, transforms.PositiveDefiniteTransform)


def _parts(transform: transforms.Transform) -> list[transforms.Transform]:
    """A transform, or those that it is composed of."""
    if isinstance(transform, transforms.ComposeTransform):
        return [t for part in transform.parts for t in _parts(part)]
    if isinstance(transform, transforms.IndependentTransform):
        return _parts(transform.base_transform)
    return [transform]


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
        known = state[key] = of_update(update.optimizer, variables)
    for _ in range(update.steps):
        known.zero_grad()
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), variables, allow_unused=True)
        for v, g in zip(variables, gradients, strict=True):
            v.grad = None if g is None else torch.where(torch.isfinite(v), g, 0.0)
        known.step()
        known.zero_grad()


def _lbfgs(variables: list[Tensor], loss: KeptLoss, steps: int) -> None:
    """Lower the loss in place, all variables as one vector."""

    def place(flat: Tensor) -> None:
        with torch.no_grad():
            for v, part in zip(variables, flat.split([v.numel() for v in variables]), strict=True):
                new = part.reshape(v.shape)
                if not torch.equal(v, new):  # what is known of the loss here stays known
                    v.copy_(new)

    def function(flat: Tensor) -> tuple[float, Tensor]:
        place(flat)
        try:
            found = loss.gradients()
        except PyroEMError:
            if flat is start:
                raise
            # A trial point at which the model cannot run is a bad one, not the end of the fit.
            return math.inf, torch.zeros_like(flat)
        gradient = torch.cat(
            [
                # A coordinate at infinity is a structural zero: it stays.
                torch.zeros_like(v).reshape(-1)
                if g is None
                else torch.where(torch.isfinite(v), g, 0.0).reshape(-1)
                for v, g in zip(variables, found, strict=True)
            ]
        )
        return loss.value(), gradient

    start = torch.cat([v.detach().reshape(-1) for v in variables])
    place(minimise(function, start, steps))


def _leave_saddle(variables: Sequence[Tensor], loss: KeptLoss, direction: Tensor) -> bool:
    """Move along a direction in which the loss curves downwards, where that lowers it.

    A start in the middle of a symmetric prior may have no slope at all: loc = t² at t = 0.
    """
    best = loss.value()
    best -= 64 * _rounding(best, variables[0])
    kept, at = [v.detach().clone() for v in variables], None
    with torch.no_grad():
        for size in (1.0, -1.0, 0.1, -0.1, 1e-2, -1e-2):
            begin = 0
            for v, old in zip(variables, kept, strict=True):
                part = direction[begin : begin + v.numel()].reshape(v.shape)
                v.copy_(old + size * part)
                begin += v.numel()
            there = loss.value()
            if there < best:
                best, at = there, [v.detach().clone() for v in variables]
        for v, new in zip(variables, kept if at is None else at, strict=True):
            v.copy_(new)
    return at is not None


def _newton(variables: list[Tensor], loss: KeptLoss) -> Tensor | None:
    """A few safeguarded Newton steps: the last digits that first-order steps leave.

    Returns:
        Where they end at no minimum, a direction in which the loss curves downwards (or, where it has
        no curvature at all, any); else None.
    """
    uphill: Tensor | None = None
    for _ in range(_NEWTON_STEPS):
        old_value, found = loss.value_with_graph(), _curvature(variables, loss)
        if found is None:
            return None
        hessian, gradient = found
        if not bool(torch.isfinite(hessian).all()) or not bool(torch.isfinite(gradient).all()):
            return None
        if hessian.dtype in (torch.float16, torch.bfloat16):  # these have no linear algebra
            hessian, gradient = hessian.float(), gradient.float()
        eigenvalues, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        top = eigenvalues.abs().max()
        is_saddle = bool(eigenvalues[0] < -1e-6 * top) or not bool(top > 1e-9)
        uphill = vectors[:, 0] if is_saddle else None
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
            better = loss.value_with_graph() <= old_value + _rounding(old_value, variables[0])
            if not better:
                for v, o in zip(variables, old, strict=True):
                    v.copy_(o)
                return uphill
        if float(step.abs().max()) < 1e-14:
            return uphill
    return uphill


def _curvature(variables: list[Tensor], loss: KeptLoss) -> tuple[Tensor, Tensor] | None:
    """The Hessian and the gradient of the loss; None where it depends on nothing. # (P, P), (P,)"""
    with torch.enable_grad():
        first = torch.autograd.grad(loss.tensor(), variables, create_graph=True, allow_unused=True)
        gradient = _flat(variables, first)
        if not gradient.requires_grad:
            return None
        rows = [
            _flat(
                variables,
                torch.autograd.grad(component, variables, retain_graph=True, allow_unused=True),
            )
            for component in gradient
        ]
    return torch.stack(rows).detach(), gradient.detach()


def _flat(variables: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients as one vector, zero where there is none. # (P,)"""
    pairs = zip(variables, gradients, strict=True)
    return torch.cat([(torch.zeros_like(v) if g is None else g).reshape(-1) for v, g in pairs])
