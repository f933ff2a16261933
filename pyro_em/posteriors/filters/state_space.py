"""A linear-Gaussian chain in numbers, and what its E-step gives.

    x_t = A_t x_{t−1} + a_t + G_t ε_t,     ε_t ~ N(0, I),     x_{−1} = 0,
    y_t = H_t x_t + s_t e_t,               e_t ~ N(0, I),

for several chains at once. The noises of one step's observations are independent of each other: a full
covariance is whitened before, and offsets are taken off. Nothing is inverted: G may have fewer columns
than rows, or be zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StateSpace:
    """The numbers of some chains of T steps, in float64.

    Steps that are alike share their matrices: `dynamics` and `measurement` hold, for each step, the
    number of its own among the U or V different ones.

    Attributes:
        transition: A; that of the first step is not used. # (chains|1, U, n, n)
        drift: a, of each step. # (chains|1, T, n)
        noise: G. # (chains|1, U, n, k)
        dynamics: Which of the U each step has. # (T,)
        loading: H. # (chains|1, V, D, n)
        deviation: s, positive. # (chains|1, V, D)
        measurement: Which of the V each step has. # (T,)
        value: y; anything where not seen. # (chains, T, D)
        seen: Which numbers were observed; None if all. # (chains|1, T, D)
    """

    transition: Tensor
    drift: Tensor
    noise: Tensor
    dynamics: Tensor
    loading: Tensor
    deviation: Tensor
    measurement: Tensor
    value: Tensor
    seen: Tensor | None = None

    @property
    def chains(self) -> int:
        """How many chains there are."""
        return int(self.value.shape[0])

    @property
    def steps(self) -> int:
        """T."""
        return int(self.value.shape[1])

    @property
    def size(self) -> int:
        """n, the numbers of one state."""
        return int(self.transition.shape[-1])


@dataclass(frozen=True, eq=False)
class Filtered:
    """The states given the data up to their own step, and the evidence.

    Attributes:
        log_evidence: In nats, of each step. # (chains, T)
        predicted_mean: E[x_t | y_{<t}]. # (chains, T, n)
        predicted_covariance: # (chains|1, T, n, n)
        mean: E[x_t | y_{≤t}]. # (chains, T, n)
        covariance: # (chains|1, T, n, n)
        log_determinant: log|Λ|, by parts: what the data of a step add to log det(I + GᵀHᵀR⁻¹HG) of all
            noises. # (chains|1, T)
    """

    log_evidence: Tensor
    predicted_mean: Tensor
    predicted_covariance: Tensor
    mean: Tensor
    covariance: Tensor
    log_determinant: Tensor


@dataclass(frozen=True, eq=False)
class Smoothed:
    """What the E-step of some chains gives.

    Given all data the states are a Markov chain again, x_t = Φ_t x_{t−1} + … with noise of covariance
    C_t, from which all covariances follow by sums:

        P_t = Φ_t P_{t−1} Φ_tᵀ + C_t,     Cov(x_t, x_{t−1} | y) = Φ_t P_{t−1}.

    Steps that have the same matrices, as most of a long series do, share them.

    Attributes:
        log_evidence: In nats, of all steps. # (chains,)
        log_determinant: log det(I + GᵀHᵀR⁻¹HG) of all noises ε together. # (chains|1,)
        mean: E[x_t | y]. # (chains, T, n)
        disturbance: E[G_t ε_t | y]. # (chains, T, n)
        covariances: The different ones of `covariance`; of chains with fewer, anything follows.
            # (chains|1, P, n, n)
        which_covariance: Which of them each step has, in the order of steps. # (chains|1, T)
        transitions: The different ones of `transition`. # (chains|1, Q, n, n)
        noises: The different ones of `noise`. # (chains|1, Q, n, n)
        which_transition: Which of both each step has. # (chains|1, T)
    """

    log_evidence: Tensor
    log_determinant: Tensor
    mean: Tensor
    disturbance: Tensor
    covariances: Tensor
    which_covariance: Tensor
    transitions: Tensor
    noises: Tensor
    which_transition: Tensor

    def with_states(self, mean: Tensor, covariance: Tensor) -> Smoothed:
        """The same with other states.

        Args:
            mean: # (chains, T, n)
            covariance: # (chains|1, T, n, n)
        """
        every = torch.arange(covariance.shape[1], device=covariance.device)
        which = every.expand(len(covariance), -1)
        return replace(self, mean=mean, covariances=covariance, which_covariance=which)

    @cached_property
    def covariance(self) -> Tensor:
        """P_t = Cov(x_t | y). # (chains|1, T, n, n)"""
        return _each(self.covariances, self.which_covariance)

    @cached_property
    def transition(self) -> Tensor:
        """Φ_t; zero at the first step. # (chains|1, T, n, n)"""
        return _each(self.transitions, self.which_transition)

    @cached_property
    def noise(self) -> Tensor:
        """C_t = Cov(x_t | x_{t−1}, y). # (chains|1, T, n, n)"""
        return _each(self.noises, self.which_transition)


class SmoothedArrays(NamedTuple):
    """`Smoothed` as arrays, in its order: what goes from loops to loops needs no tensors."""

    log_evidence: NDArray[np.float64]
    log_determinant: NDArray[np.float64]
    mean: NDArray[np.float64]
    disturbance: NDArray[np.float64]
    covariances: NDArray[np.float64]
    which_covariance: NDArray[np.int32]
    transitions: NDArray[np.float64]
    noises: NDArray[np.float64]
    which_transition: NDArray[np.int32]

    @staticmethod
    def of(found: Smoothed) -> SmoothedArrays:
        """The same memory."""
        return SmoothedArrays(*(getattr(found, name).numpy() for name in SmoothedArrays._fields))

    @property
    def tensors(self) -> Smoothed:
        """The same memory."""
        return Smoothed(*map(torch.from_numpy, self))


def _each(different: Tensor, which: Tensor) -> Tensor:
    """The matrix of each step. # (chains|1, T, n, n)"""
    chain = torch.arange(len(different), device=which.device).unsqueeze(-1)
    return different[chain, which]
