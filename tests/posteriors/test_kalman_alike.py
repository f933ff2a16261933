"""The smoother in closed form of chains whose steps are alike, against the dense joint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyro_em.posteriors.filters import alike_means, kalman_moments, kalman_steps
from pyro_em.posteriors.filters.constant_scans import ConstantScans
from pyro_em.posteriors.filters.kalman import lagged_covariance
from pyro_em.posteriors.filters.kalman_alike import smoothed
from pyro_em.posteriors.filters.riccati import endless
from pyro_em.posteriors.filters.state_space import StateSpace
from tests.posteriors.dense_chain import dense
from tests.posteriors.test_kalman import same, with_no_two_alike

VAGUE = 1e7**0.5


def chain(
    seed: int = 0,
    T: int = 18,
    n: int = 2,
    D: int = 2,
    k: int | None = None,
    chains: int = 1,
    radius: float = 0.9,
    prior: float = 1.0,
    drift: float = 0.0,
    offset: float = 0.0,
    deviation: float = 1.0,
) -> StateSpace:
    """Draws of chains whose steps are alike, each with a drift of its own."""
    generator = np.random.default_rng(seed)
    normal = generator.normal
    k = n if k is None else k
    A = normal(size=(n, n))
    A *= radius / np.abs(np.linalg.eigvals(A)).max()
    G = np.stack([prior * normal(size=(n, k)), normal(size=(n, k))])
    H, s = normal(size=(D, n)), deviation * np.exp(0.3 * normal(size=D))
    a = drift * normal(size=(chains, T, n))
    a[:, 0] += offset
    x, y = np.zeros((chains, n)), np.empty((chains, T, D))
    for t in range(T):
        x = x @ A.T * (t > 0) + a[:, t] + normal(size=(chains, k)) @ G[min(t, 1)].T
        y[:, t] = x @ H.T + s * normal(size=(chains, D))
    kinds = torch.ones(T, dtype=torch.long)
    kinds[0] = 0
    one, two, three, four, five, six = (
        torch.from_numpy(v) for v in (np.stack([A, A])[None], a, G[None], H[None, None], s, y)
    )
    return StateSpace(one, two, three, kinds, four, five[None, None], 0 * kinds, six)


def walk(noise: float, T: int = 1000, radius: float = 1.0) -> StateSpace:
    """A level that moves as slowly as one likes, seen with noise of variance one."""
    space = chain(3, T, n=1, D=1, radius=radius)
    one = torch.ones(1, 1, 1, 1).double()
    return replace(
        space,
        noise=torch.tensor([1.0, noise]).double().reshape(1, 2, 1, 1),
        loading=one,
        deviation=one[0],
        value=noise * space.value.cumsum(1) + space.value,
        transition=radius * one.expand(1, 2, 1, 1),
    )


def in_units(space: StateSpace, units: list[float]) -> StateSpace:
    """The same with states in other units."""
    u = torch.tensor(units).double()
    transition = u[:, None] * space.transition / u
    return replace(
        space,
        transition=transition,
        drift=space.drift * u,
        noise=u[:, None] * space.noise,
        loading=space.loading / u,
    )


def little_noise(space: StateSpace, noise: float, offset: float) -> StateSpace:
    """The same with steps after the first one that hardly move, and data far from what they say."""
    less = space.noise.clone()
    less[:, 1] *= noise
    return replace(space, noise=less, value=space.value + offset)


SHORT: dict[str, Callable[[], StateSpace]] = {
    "plain": chain,
    "few steps count": lambda: chain(1, radius=0.3, deviation=0.3),
    "no step counts for nothing": lambda: chain(2, radius=0.999, deviation=3.0),
    "unit root": lambda: chain(3, radius=1.0),
    "growing": lambda: chain(20, radius=1.1),
    "own drifts": lambda: chain(5, chains=2, drift=1.0),
    "singular noise": lambda: chain(6, n=3, k=1, D=1),
    "known first state": lambda: chain(7, prior=0.0),
    "vague first state": lambda: chain(8, prior=VAGUE),
    "far away": lambda: chain(20, offset=1e6, radius=1.0),
    "far away, known": lambda: chain(20, offset=1e6, prior=0.0, radius=1.0),
    "far away, vague": lambda: chain(20, offset=1e6, prior=VAGUE, radius=1.0),
    "units": lambda: in_units(chain(10, drift=1.0), [1e-4, 1e4]),
}


@pytest.mark.parametrize("case", SHORT)
def test_against_the_dense_joint(case: str) -> None:
    space = SHORT[case]()
    found = smoothed(space)
    assert found is not None
    s, t = torch.triu_indices(space.steps, space.steps)
    lagged = lagged_covariance(space, found, s, t)[0]
    c = space.chains - 1
    expected = dense(space, c)
    nats = 1e-15 * abs(float(expected.log_evidence)) + 1e-9
    torch.testing.assert_close(found.log_evidence[c], expected.log_evidence, rtol=0.0, atol=nats)
    variance = expected.covariance[range(space.steps), :, range(space.steps)].diagonal(0, 1, 2)
    deviation = variance.clamp(min=0.0).sqrt()
    size = deviation[s].unsqueeze(-1) * deviation[t].unsqueeze(-2)
    error = (lagged - expected.covariance[s, :, t]).abs()
    assert bool((error <= 1e-11 * size).all())
    error = (found.mean[c] - expected.mean).abs()
    assert bool((error <= 1e-11 * deviation + 2e-15 * expected.mean.abs()).all())


LONG: dict[str, Callable[[], StateSpace]] = {
    "steady": lambda: chain(11, 300),
    "steady, chains": lambda: chain(12, 200, chains=3, drift=1.0, n=3),
    "slow": lambda: walk(0.05),
    "slower than the series": lambda: walk(1e-3),
    "near a unit root": lambda: walk(1e-3, radius=0.9999),
    "a first state that is never forgotten": lambda: walk(1e-6, T=100, radius=0.9),
    "data that say nothing": lambda: chain(deviation=1e10),
    "little noise, far away": lambda: little_noise(chain(30, 300, D=1, radius=0.8), 1e-4, 1e3),
    "many numbers": lambda: chain(22, 70, n=8, D=3),
}


@pytest.mark.parametrize("case", LONG)
def test_step_by_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space = LONG[case]()
    monkeypatch.setattr(alike_means, "_ROOM", 400)  # chains one after the other
    found = smoothed(space)
    assert found is not None
    expected = kalman_steps.smoothed(with_no_two_alike(space))
    same(found, expected, 2e-13)
    deviation = expected.covariance.diagonal(0, -2, -1).sqrt()
    size = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    assert bool(((found.covariance - expected.covariance).abs() <= 1e-12 * size).all())


def test_few_matrices_where_most_steps_are_the_same() -> None:
    found = smoothed(chain(11, 300))
    assert found is not None
    assert found.transitions.shape[1] < 40
    assert found.covariances.shape[1] < 80


def first_measured(space: StateSpace, by: float) -> StateSpace:
    """The same with a loading of the first step's own."""
    kinds = torch.ones_like(space.measurement)
    kinds[0] = 0
    both = [by * space.loading, space.loading]
    return replace(
        space,
        measurement=kinds,
        loading=torch.cat(both, 1),
        deviation=torch.cat([space.deviation] * 2, 1),
    )


def test_a_first_step_that_only_has_a_number_of_its_own() -> None:
    space = chain(11, 40)
    found, expected = smoothed(first_measured(space, 1.0)), smoothed(space)
    assert found is not None and expected is not None
    assert torch.equal(found.mean, expected.mean)


def ending(space: StateSpace, lengths: list[int]) -> StateSpace:
    """The same with data up to a step of each chain's own."""
    T, D = space.value.shape[1:]
    seen = (torch.arange(T) < torch.tensor(lengths)[:, None])[..., None].expand(-1, -1, D)
    return replace(space, seen=seen, value=torch.where(seen, space.value, torch.nan))


ENDING: dict[str, Callable[[], StateSpace]] = {
    "one": lambda: ending(chain(), [12]),
    "each its own": lambda: ending(chain(5, chains=3, drift=1.0), [18, 1, 7]),
    "two of one length": lambda: ending(chain(5, chains=3, radius=1.1), [9, 18, 9]),
    "all of one length": lambda: ending(chain(8, chains=2, prior=VAGUE), [11]),
    "long": lambda: ending(chain(12, 70, chains=3, drift=1.0, n=3, radius=0.4), [70, 45, 61]),
}


@pytest.mark.parametrize("case", ENDING)
def test_after_the_last_data_states_are_predicted(case: str) -> None:
    space = ENDING[case]()
    found = smoothed(space)
    assert found is not None
    same(found, kalman_steps.smoothed(with_no_two_alike(space)), 1e-12)


def missing(space: StateSpace) -> StateSpace:
    seen = torch.ones(1, *space.value.shape[1:], dtype=torch.bool)
    seen[:, 5] = False
    return replace(space, seen=seen)


def broken(space: StateSpace) -> StateSpace:
    kinds = space.dynamics.clone()
    kinds[9] = 0
    return replace(space, dynamics=kinds)


def far_and_precise(space: StateSpace) -> StateSpace:
    """The same with one noise less, and data far from what is expected."""
    noise = space.noise.clone()
    noise[..., -1] = 0.0
    return replace(space, noise=noise, value=space.value + 1e6)


NOT: dict[str, Callable[[], StateSpace]] = {
    "missing": lambda: missing(chain()),
    "data of a step's part": lambda: replace(chain(), seen=torch.arange(36).reshape(1, 18, 2) < 23),
    "a series without data": lambda: ending(chain(chains=2), [18, 0]),
    "a step unlike the others": lambda: broken(chain()),
    "a first step that is seen in its own way": lambda: first_measured(chain(), 2.0),
    "no step alike": lambda: with_no_two_alike(chain()),
    "precise": lambda: chain(deviation=0.01),
    "very precise": lambda: chain(deviation=1e-6),
    "so vague that digits are lost": lambda: chain(
        41, n=3, D=1, prior=1e3, radius=0.3, deviation=0.3
    ),
    "no noise": lambda: chain(k=0),
    "a level that does not move": lambda: walk(0.0),
    "few steps": lambda: chain(T=8),
    "growing unseen": lambda: replace(chain(radius=1.1), loading=torch.zeros(1, 1, 2, 2).double()),
    "not a number": lambda: replace(chain(), value=torch.full((1, 18, 2), torch.nan).double()),
    "not a number in between": lambda: replace(chain(), drift=torch.nan * chain().drift),
    "precise data far away": lambda: far_and_precise(
        chain(7, T=60, n=4, prior=0.0, deviation=0.1, radius=0.5)
    ),
    "too far away": lambda: chain(offset=1e14),
}


@pytest.mark.parametrize("case", NOT)
def test_what_is_left_to_the_sound_way(case: str) -> None:
    assert smoothed(NOT[case]()) is None


def test_numpy_takes_it_and_data_stay() -> None:
    space = chain(T=40, offset=1e6)
    before = [x.clone() for x in vars(space).values() if x is not None]
    found, own = kalman_steps.smoothed(space), smoothed(space)
    assert own is not None
    assert all(
        torch.equal(x, y) for x, y in zip(vars(found).values(), vars(own).values(), strict=True)
    )
    after = [x for x in vars(space).values() if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "n, steps, radius, reach",
    [
        (1, 100, 0.9, 100),
        (2, 7, 0.9, 7),
        (3, 50, 0.9, 50),
        (30, 9, 0.9, 9),
        (3, 50, 0.05, 13),
        (30, 9, 0.01, 8),
        (2, 300, 0.2, 25),
    ],
)
def test_scans(n: int, steps: int, radius: float, reach: int) -> None:
    generator = np.random.default_rng(n)
    F = radius * np.linalg.qr(generator.normal(size=(n, n)))[0]
    powers = np.stack([np.linalg.matrix_power(F, k) for k in range(ConstantScans.least(n))])
    scans = ConstantScans(powers, steps, reach)
    assert steps <= scans.steps < 1.3 * steps + 4
    b = generator.normal(size=(2, scans.steps, n))
    forward, backward = b.copy(), b.copy()
    for t in range(1, scans.steps):
        forward[:, t] += forward[:, t - 1] @ F.T
        backward[:, -1 - t] += backward[:, -t] @ F
    np.testing.assert_allclose(scans.forward(b.copy()), forward, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scans.backward(b.copy()), backward, rtol=0, atol=1e-12)


def test_fixed_points() -> None:
    space = chain(15, n=3)
    A, G = space.transition[0, 1].numpy(), space.noise[0, 1].numpy()
    H = (space.loading[0, 0] / space.deviation[0, 0, :, None]).numpy()
    Q, J = G @ G.T, H.T @ H
    found = endless(A, Q, J, np.eye(3))
    assert found is not None
    information, covariance = J, Q
    for _ in range(2**found.doublings):
        information = J + A.T @ information @ np.linalg.inv(np.eye(3) + Q @ information) @ A
        covariance = Q + A @ covariance @ np.linalg.inv(np.eye(3) + J @ covariance) @ A.T
    np.testing.assert_allclose(found.information, information, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("radius, noise", [(0.9, 0.0), (0.0, 1.0)])
def test_states_without_noise_or_memory_go_step_by_step(radius: float, noise: float) -> None:
    """No later data tell of a state that keeps nothing, and one without noise has no steady spread."""
    space = walk(noise, T=300, radius=radius)
    space = replace(space, value=torch.sin(torch.arange(300.0).double()).reshape(1, -1, 1))
    expected = kalman_moments.smoothed_by_moments(space)
    found = kalman_steps.smoothed(space)
    assert torch.allclose(found.log_evidence, expected.log_evidence, rtol=1e-12)
    assert torch.allclose(found.mean, expected.mean, atol=1e-12)
    assert torch.allclose(found.covariance, expected.covariance, atol=1e-12)
