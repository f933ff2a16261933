"""Kalman filter, smoother and draws of linear-Gaussian chains, whatever computes them.

Factors of covariances keep twice the digits: a vague first state and precise data are no trouble
together. They are computed on the CPU, step after step, wherever the data are: by compiled loops
(numba, the ``fast`` extra; not where its start would outlast the fit) or by numpy. Where derivatives
are asked for, by covariances and precisions.
"""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from functools import cache
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from pyro_em.posteriors.filters import kalman_steps
from pyro_em.posteriors.filters.condensed import condensed, stays_wide
from pyro_em.posteriors.filters.kalman_moments import filtered_by_moments, smoothed_by_moments
from pyro_em.posteriors.filters.state_space import Filtered, Smoothed, StateSpace

_CPU = torch.device("cpu")
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


# Steps of all chains for which numba is not started. A rule by size alone, so that a fit repeated gives
# the same digits.
_FEW = 256

_T = TypeVar("_T", StateSpace, Filtered, Smoothed)


class _Way(Protocol):
    """Who computes it."""

    def filtered(self, space: StateSpace) -> Filtered: ...

    def smoothed(self, space: StateSpace) -> Smoothed: ...

    def log_evidence(self, space: StateSpace) -> Tensor: ...

    def sampled(self, space: StateSpace, normal: Tensor) -> Tensor: ...


class _CompiledWay(_Way, Protocol):
    """The same by compiled loops."""

    def smoothed_at_hand(self, space: StateSpace) -> Smoothed | None: ...


def filtered(space: StateSpace) -> Filtered:
    """The states given the data up to their own step, and the evidence of each step.

    Args:
        space: The chains. Twice differentiable in all their numbers.

    Returns:
        Means of each chain, covariances once where all chains share them.

    Example:
        >>> filtered(_example()).mean.flatten()
        tensor([0.5000, 0.8000], dtype=torch.float64)
    """
    if _is_differentiated(space):
        return filtered_by_moments(space)
    with torch.no_grad():
        narrow, nats = condensed(_on(space, _CPU))
        found = _way(narrow).filtered(narrow)
        if nats is not None:
            found = replace(found, log_evidence=found.log_evidence + nats)
    return _on(found, space.value.device)


def smoothed(space: StateSpace) -> Smoothed:
    """The E-step: the states given all data.

    Args:
        space: The chains. Twice differentiable in all their numbers.

    Returns:
        Means and covariances of each step, and what gives covariances between steps.

    Example:
        >>> smoothed(_example()).mean.flatten()
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    M, T, D = space.value.shape
    if compiles(M * T) and stays_wide(space.size, D):
        quick = _compiled_way().smoothed_at_hand(space)
        if quick is not None:
            return quick
    if _is_differentiated(space):
        return smoothed_by_moments(space)
    here = _on(space, _CPU)
    narrow, nats = condensed(here)
    found = _way(narrow).smoothed(narrow)
    if nats is not None:
        found = replace(found, log_evidence=found.log_evidence + nats.sum(-1))
    return found if here is space else _on(found, space.value.device)


@torch.no_grad()
def log_evidence(space: StateSpace) -> Tensor:
    """The evidence alone, to the bit that of `smoothed`, in nats.

    Args:
        space: The chains. No derivative is followed.

    Returns:
        # (chains,)

    Example:
        >>> log_evidence(_example()).round(decimals=4)
        tensor([-2.9426], dtype=torch.float64)
    """
    narrow, nats = condensed(_on(space, _CPU))
    found = _way(narrow).log_evidence(narrow)
    return (found if nats is None else found + nats.sum(-1)).to(space.value.device)


@torch.no_grad()
def sampled(space: StateSpace, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws of the states given all data, each given the one before.

    Args:
        space: The chains.
        n: How many draws.
        generator: Where random numbers come from; torch's own if left out.

    Returns:
        Independent draws, also where covariances are singular. # (n, chains, T, n_state)

    Example:
        >>> sampled(_example(), 3).shape
        torch.Size([3, 1, 2, 1])
    """
    like = space.value
    shape = n, space.chains, space.steps, space.noise.shape[-1]
    normal = torch.randn(shape, generator=generator, dtype=torch.float64, device=like.device)
    narrow, _ = condensed(_on(space, _CPU))
    return _way(narrow).sampled(narrow, normal.cpu()).to(like.device)


def lagged_covariance(space: StateSpace, smoothed: Smoothed, s: Tensor, t: Tensor) -> Tensor:
    """Cov(x_s, x_t | y) = P_s Φ_{s+1}ᵀ … Φ_tᵀ of pairs of steps.

    Args:
        space: The chains.
        smoothed: Their E-step.
        s: Earlier steps. # (pairs,)
        t: Later steps, or the same. # (pairs,)

    Returns:
        Once where all chains share it. # (chains|1, pairs, n, n)

    Example:
        >>> first, second = torch.tensor([0]), torch.tensor([1])
        >>> found = lagged_covariance(_example(), smoothed(_example()), first, second)
        >>> round(found.item(), 4)
        0.2
    """
    order = (t - s).argsort(descending=True, stable=True)
    first, lag = s[order], (t - s)[order]
    out = smoothed.covariance[:, first]
    for k in range(1, int(lag[0]) + 1 if len(lag) else 0):
        here = first[lag >= k] + k
        moved = out[:, : len(here)] @ smoothed.transition[:, here].mT
        out = torch.cat([moved, out[:, len(here) :]], 1)
    return out[:, order.argsort()]


def disturbances(space: StateSpace, smoothed: Smoothed) -> tuple[Tensor, Tensor]:
    """Cov(G_t ε_t | y), and Cov(G_t ε_t, x_{t−1} | y), zero at the first step.

    With D = A − Φ they are C + D P D' and −D P, P that of the state before.

    Args:
        space: The chains.
        smoothed: Their E-step.

    Returns:
        Once where all chains share them. # (chains|1, T, n, n) each

    Example:
        >>> covariance, cross = disturbances(_example(), smoothed(_example()))
        >>> covariance.flatten().round(decimals=4), cross.flatten().round(decimals=4)
        (tensor([0.4000, 0.6000], dtype=torch.float64), tensor([ 0.0000, -0.2000], dtype=torch.float64))
    """
    less = space.transition[:, space.dynamics[1:]] - smoothed.transition[:, 1:]
    cross = -(less @ smoothed.covariance[:, :-1])
    covariance = smoothed.noise[:, 1:] - cross @ less.mT
    first = smoothed.noise[:, :1]
    return torch.cat([first, covariance], 1), torch.cat([torch.zeros_like(first), cross], 1)


def is_compiled(space: StateSpace) -> bool:
    """Whether loops over these steps are compiled."""
    return compiles(space.chains * space.steps)


def compiles(steps: int) -> bool:
    """Whether loops over so many steps of all chains are compiled."""
    return _HAS_NUMBA and steps > _FEW


def _way(space: StateSpace) -> _Way:
    """Compiled loops, unless they are not there or few steps make their start the longest part."""
    if not is_compiled(space):
        return cast(_Way, kalman_steps)
    return _compiled_way()


@cache
def _compiled_way() -> _CompiledWay:
    """It is not imported before it is needed."""
    from pyro_em.posteriors.filters import kalman_compiled

    return cast(_CompiledWay, kalman_compiled)


def _on(x: _T, device: torch.device) -> _T:
    """The same numbers elsewhere."""
    numbers = vars(x).values()
    if device is _CPU and False not in [t is None or t.is_cpu for t in numbers]:
        return x
    if all(t is None or t.device == device for t in numbers):
        return x
    found = {f.name: getattr(x, f.name) for f in fields(x)}
    return replace(x, **{k: t if t is None else t.to(device) for k, t in found.items()})


def _is_differentiated(space: StateSpace) -> bool:
    """Whether a derivative may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return True in [x is not None and x.requires_grad for x in vars(space).values()]


def _example() -> StateSpace:
    """Two ones, seen with variance one of a random walk with variance one."""
    one, which = torch.ones(1, 1, 1, 1).double(), torch.zeros(2, dtype=torch.long)
    value = torch.ones(1, 2, 1).double()
    return StateSpace(one, 0 * value, one, which, one, one[..., 0], which, value)
