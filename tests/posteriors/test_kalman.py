"""Kalman filter, smoother and draws against the dense joint normal distribution."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_em.posteriors.filters import kalman, kalman_alike, kalman_compiled, kalman_steps
from pyro_em.posteriors.filters.condensed import condensed
from pyro_em.posteriors.filters.kalman import (
    disturbances,
    filtered,
    lagged_covariance,
    log_evidence,
    sampled,
    smoothed,
)
from pyro_em.posteriors.filters.kalman_moments import filtered_by_moments, smoothed_by_moments
from pyro_em.posteriors.filters.state_space import Filtered, Smoothed, StateSpace
from tests.posteriors.dense_chain import dense


def random(
    seed: int,
    T: int = 6,
    n: int = 3,
    D: int = 2,
    k: int | None = None,
    chains: int = 2,
    own: bool = False,
    kinds: int = 1,
    missing: float = 0.0,
    own_seen: bool = True,
) -> StateSpace:
    """A random chain; `kinds` different steps besides the first, matrices of each chain or not."""
    generator = torch.Generator().manual_seed(seed)
    C, k = chains if own else 1, n if k is None else k

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def which() -> Tensor:
        return torch.randint(kinds, (T,), generator=generator)

    dynamics = 1 + which()
    dynamics[0] = 0
    value = 3 * normal(chains, T, D)
    seen = None
    if missing:
        seen = torch.rand(chains if own_seen else 1, T, D, generator=generator) > missing
        seen[:, 2 % T] = False
        value = torch.where(seen, value, torch.nan)
    return StateSpace(
        normal(C, kinds + 1, n, n) / n**0.5,
        normal(C, T, n),
        normal(C, kinds + 1, n, k),
        dynamics,
        normal(C, kinds, D, n),
        normal(C, kinds, D).exp(),
        which(),
        value,
        seen,
    )


def trend(
    T: int = 8, deviation: float = 1.0, prior: float = 1.0, offset: float = 0.0, both: bool = True
) -> StateSpace:
    """A local linear trend of two series with one state, the second half as steep; or of the first."""
    generator = torch.Generator().manual_seed(0)
    space = random(1, T, n=2, D=2, chains=1)
    transition = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double().expand(1, 2, 2, 2)
    noise = torch.stack([torch.eye(2) * prior, torch.diag(torch.tensor([0.5, 0.1]))]).double()[None]
    drift = torch.zeros(1, T, 2).double()
    drift[:, 0, 0] = offset
    walk = torch.randn(1, T, 1, generator=generator).double().cumsum(1) + offset
    e = torch.randn(1, T, 2, generator=generator).double()
    D = 2 if both else 1
    return replace(
        space,
        transition=transition,
        drift=drift,
        noise=noise,
        loading=torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]).double()[:, :, :D],
        deviation=torch.full((1, 1, D), deviation).double(),
        value=(walk * torch.tensor([1.0, 0.5]) + deviation * e)[..., :D],
    )


def regression(deviation: float, prior: float, T: int = 8) -> StateSpace:
    """Two coefficients that do not change."""
    generator = torch.Generator().manual_seed(3)
    space = trend(T, deviation, prior, both=False)
    X = torch.randn(1, T, 1, 2, generator=generator).double()
    noise = space.noise.clone()
    noise[:, 1] = 0.0
    e = deviation * torch.randn(1, T, 1, generator=generator).double()
    return replace(
        space,
        transition=torch.eye(2).double().expand(1, 2, 2, 2),
        noise=noise,
        loading=X,
        measurement=torch.arange(T),
        deviation=space.deviation.expand(1, T, 1),
        value=X[..., 0] + 2.0 * X[..., 1] + e,
    )


def late(space: StateSpace) -> StateSpace:
    """The same, whose first three steps have no data."""
    seen = torch.ones(1, space.steps, space.value.shape[-1], dtype=torch.bool)
    seen[:, :3] = False
    return replace(space, seen=seen)


def companion(prior: float, chains: int = 2) -> StateSpace:
    """AR(3) with singular noise, and a first state that may be known."""
    space = random(2, 7, n=3, D=1, k=1, chains=chains)
    transition = torch.zeros(1, 2, 3, 3).double()
    transition[0, 1] = torch.tensor([[0.5, 0.2, -0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    noise = torch.zeros(1, 2, 3, 1).double()
    noise[0, 1, 0] = 0.7
    noise[0, 0] = prior
    return replace(space, transition=transition, noise=noise)


CASES: dict[str, Callable[[], StateSpace]] = {
    "plain": lambda: random(0),
    "own matrices": lambda: random(1, own=True, chains=3),
    "varying": lambda: random(2, kinds=3),
    "own and varying": lambda: random(3, kinds=2, own=True),
    "missing": lambda: random(4, missing=0.4),
    "missing in all chains": lambda: random(5, missing=0.4, own_seen=False),
    "missing, own, varying": lambda: random(6, missing=0.3, own=True, kinds=2),
    "nothing seen": lambda: random(7, T=3, missing=1.0),
    "one step": lambda: random(8, T=1),
    "two steps": lambda: random(9, T=2, chains=1),
    "many numbers": lambda: random(10, n=2, D=5),
    "many numbers, missing": lambda: random(11, n=2, D=5, missing=0.4),
    "many numbers, missing in all": lambda: random(12, n=2, D=5, missing=0.4, own_seen=False),
    "many numbers, own": lambda: random(13, n=2, D=4, own=True, missing=0.2),
    "one state": lambda: random(14, n=1, D=1, chains=3),
    "one state, missing": lambda: random(22, n=1, D=2, missing=0.4, own_seen=False),
    "own drift": lambda: replace(random(15), drift=random(15, own=True).drift),
    "own drift, missing": lambda: replace(
        random(16, missing=0.3), drift=random(16, own=True).drift
    ),
    "own loading": lambda: replace(random(17), loading=random(17, own=True).loading),
    "singular noise": lambda: random(18, k=1),
    "no noise": lambda: random(19, k=0),
    "many noises": lambda: random(21, n=2, k=3),
    "known first state": lambda: companion(0.0),
    "companion": lambda: companion(1.0),
    "no noise after the first": lambda: replace(
        random(20), noise=random(20).noise * torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_dense_joint(case: str) -> None:
    space = CASES[case]()
    found = smoothed(space)
    T, n = space.steps, space.size
    s, t = torch.triu_indices(T, T)
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(0))
    s, t = s[order], t[order]
    lagged = lagged_covariance(space, found, s, t)
    covariances = found.covariance, found.transition, found.noise, lagged
    shared = all(
        len(x) == 1 for x in (space.transition, space.noise, space.loading, space.deviation)
    )
    shared = shared and (space.seen is None or len(space.seen) == 1)
    assert {len(x) for x in covariances} == {1 if shared else space.chains}
    for chain in range(space.chains):
        expected = dense(space, chain)
        c = chain if len(found.covariance) > 1 else 0
        close(found.log_evidence[chain], expected.log_evidence)
        assert found.mean.shape == (space.chains, T, n)
        close(found.mean[chain], expected.mean)
        close(lagged[c], expected.covariance[s, :, t])
        close(found.covariance[c], expected.covariance[range(T), :, range(T)])


@pytest.mark.parametrize("case", CASES)
def test_filtered_states_know_the_past_alone(case: str) -> None:
    space = CASES[case]()
    found = filtered(space)
    chain = space.chains - 1
    c = chain if len(found.covariance) > 1 else 0
    before = torch.zeros(()).double()
    for t in range(space.steps):
        prior, after = dense(space, chain, t), dense(space, chain, t + 1)
        close(found.predicted_mean[chain, t], prior.mean[t])
        close(found.predicted_covariance[c, t], prior.covariance[t, :, t])
        close(found.mean[chain, t], after.mean[t])
        close(found.covariance[c, t], after.covariance[t, :, t])
        close(found.log_evidence[chain, t], after.log_evidence - before)
        before = after.log_evidence


def close(found: Tensor, expected: Tensor, within: float = 1e-11) -> None:
    """Equal but for rounding beside the largest number."""
    size = float(expected.abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=within, atol=within * max(1.0, size))


WAYS = ["numpy", *(["numba"] if kalman._HAS_NUMBA else [])]


def by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kalman, "_HAS_NUMBA", way == "numba")
    if way == "steps":  # of numpy, no closed form
        monkeypatch.setattr(kalman_alike, "smoothed", lambda space: None)
    monkeypatch.setattr(kalman, "_FEW", 0)


VAGUE = 1e7**0.5

STRESS: dict[str, Callable[[], StateSpace]] = {
    "precise": lambda: trend(deviation=1e-6),
    "precise, one series": lambda: trend(deviation=1e-6, both=False),
    "precise, known start": lambda: trend(deviation=1e-6, prior=0.0),
    "vague": lambda: trend(prior=VAGUE),
    "vague, one series": lambda: trend(prior=VAGUE, both=False),
    "vague, late": lambda: late(trend(prior=VAGUE, both=False)),
    "vague, precise": lambda: trend(prior=VAGUE, deviation=1e-6),
    "vague, precise, one series": lambda: trend(prior=VAGUE, deviation=1e-6, both=False),
    "vague, precise, late": lambda: late(trend(prior=VAGUE, deviation=1e-6)),
    "regression": lambda: regression(1.0, 1.0),
    "regression, vague": lambda: regression(1.0, VAGUE),
    "regression, vague, precise": lambda: regression(1e-3, VAGUE),
    "regression, vague, very precise": lambda: regression(1e-6, VAGUE),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", STRESS)
def test_under_stress(case: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(way, monkeypatch)
    space = STRESS[case]()
    found, expected = smoothed(space), dense(space, 0)
    assert torch.equal(log_evidence(space), found.log_evidence)
    T = space.steps
    within = 1e-15 * abs(float(expected.log_evidence)) + 1e-9
    torch.testing.assert_close(found.log_evidence[0], expected.log_evidence, rtol=0.0, atol=within)
    close(found.mean[0], expected.mean, 1e-13)
    s, t = torch.triu_indices(T, T)
    lagged = lagged_covariance(space, found, s, t)[0]
    deviation = expected.covariance[range(T), :, range(T)].diagonal(dim1=-2, dim2=-1).sqrt()
    size = deviation[s].unsqueeze(-1) * deviation[t].unsqueeze(-2)
    assert bool(((lagged - expected.covariance[s, :, t]).abs() <= 1e-9 * size).all())
    assert float(torch.linalg.eigvalsh(found.covariance).amin()) >= 0.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", STRESS)
def test_filtering_under_stress(case: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(way, monkeypatch)
    space = STRESS[case]()
    found = filtered(space)
    before = torch.zeros(()).double()
    for t in range(space.steps):
        expected = dense(space, 0, t + 1)
        within = 1e-15 * abs(float(expected.log_evidence)) + 1e-9
        nats = expected.log_evidence - before
        torch.testing.assert_close(found.log_evidence[0, t], nats, rtol=0.0, atol=within)
        close(found.mean[0, t], expected.mean[t])
        size = expected.covariance[t, :, t].diagonal().sqrt()
        error = (found.covariance[0, t] - expected.covariance[t, :, t]).abs()
        assert bool((error <= 1e-9 * size.outer(size)).all())
        before = expected.log_evidence


@pytest.mark.parametrize("deviation", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("prior", [0.0, 1.0, VAGUE])
def test_far_from_zero(deviation: float, prior: float) -> None:
    space = trend(deviation=deviation, prior=prior, offset=1e6)
    found, expected = smoothed(space), dense(space, 0)
    within = 1e-15 * abs(float(expected.log_evidence)) + 1e-9
    torch.testing.assert_close(found.log_evidence[0], expected.log_evidence, rtol=0.0, atol=within)
    torch.testing.assert_close(found.mean[0], expected.mean, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("case", ["plain", "missing, own, varying", "companion", "vague"])
def test_noises(case: str) -> None:
    space = {**CASES, **STRESS}[case]()
    found = smoothed(space)
    covariance, cross = disturbances(space, found)
    for chain in range(space.chains):
        c, own = (chain if len(x) > 1 else 0 for x in (covariance, space.transition))
        expected = dense(space, chain)
        for t in range(1, space.steps):
            A = space.transition[own, space.dynamics[t]]
            P = expected.covariance
            drift = space.drift[chain if len(space.drift) > 1 else 0, t]
            mean = expected.mean[t] - A @ expected.mean[t - 1] - drift
            shared = P[t, :, t - 1] - A @ P[t - 1, :, t - 1]
            spread = P[t, :, t] - A @ P[t - 1, :, t] - shared @ A.T
            close(found.disturbance[chain, t], mean)
            close(cross[c, t], shared)
            close(covariance[c, t], spread)
        close(covariance[c, 0], expected.covariance[0, :, 0])
    assert bool((cross[:, 0] == 0.0).all())


@pytest.mark.parametrize("case", CASES)
def test_both_determinants_are_the_same(case: str) -> None:
    space = CASES[case]()
    torch.testing.assert_close(
        smoothed(space).log_determinant, filtered(space).log_determinant.sum(-1)
    )


@pytest.mark.parametrize("case", CASES)
def test_the_differentiable_ones_are_the_same(case: str) -> None:
    space = CASES[case]()
    found, other = filtered(space), filtered_by_moments(space)
    for name in ("log_evidence", "log_determinant", "mean", "covariance", "predicted_mean"):
        close(getattr(other, name), getattr(found, name))
    close(other.predicted_covariance, found.predicted_covariance)
    same(smoothed_by_moments(space), smoothed(space), 1e-11)


def test_a_known_first_state_stays_known() -> None:
    found = smoothed(companion(0.0))
    assert bool((found.covariance[:, 0] == 0.0).all())
    assert bool((found.mean[:, 0] == companion(0.0).drift[:, 0]).all())


NUMBERS = ("transition", "drift", "noise", "loading", "deviation", "value")


@pytest.mark.parametrize(
    "case",
    ["plain", "missing, own, varying", "own drift, missing", "known first state", "one step"],
)
def test_the_evidence_is_twice_differentiable(case: str) -> None:
    space = CASES[case]()
    space = replace(space, value=space.value[:, :3], dynamics=space.dynamics[:3])
    seen = None if space.seen is None else space.seen[:, :3]
    space = replace(space, measurement=space.measurement[:3], seen=seen)
    space = replace(space, value=space.value.nan_to_num(0.0))

    def evidence(*numbers: Tensor) -> Tensor:
        return filtered(replace(space, **dict(zip(NUMBERS, numbers, strict=True)))).log_evidence

    numbers = [getattr(space, name).clone().requires_grad_() for name in NUMBERS]
    assert torch.autograd.gradcheck(evidence, numbers, fast_mode=True)
    assert torch.autograd.gradgradcheck(evidence, numbers, fast_mode=True)


@pytest.mark.parametrize(
    "case", ["plain", "missing, own, varying", "known first state", "no noise"]
)
def test_the_posterior_is_differentiable(case: str) -> None:
    space = CASES[case]()
    space = replace(space, value=space.value.nan_to_num(0.0))

    def posterior(*numbers: Tensor) -> tuple[Tensor, ...]:
        found = smoothed(replace(space, **dict(zip(NUMBERS, numbers, strict=True))))
        return tuple(getattr(found, f.name) for f in fields(found))

    numbers = [getattr(space, name).clone().requires_grad_() for name in NUMBERS]
    assert torch.autograd.gradcheck(posterior, numbers, fast_mode=True)


def test_gradients_at_a_missing_value_are_zero() -> None:
    space = CASES["missing"]()
    value = space.value.clone().requires_grad_()
    (grad,) = torch.autograd.grad(filtered(replace(space, value=value)).log_evidence.sum(), value)
    assert space.seen is not None
    assert bool((grad[~space.seen] == 0.0).all())
    assert bool((grad[space.seen] != 0.0).all())


@pytest.mark.parametrize(
    "case", ["plain", "missing, own, varying", "own drift", "known first state", "many numbers"]
)
def test_draws(case: str) -> None:
    space = CASES[case]()
    n = 20_000
    draws = sampled(space, n, torch.Generator().manual_seed(0))
    T, size = space.steps, space.size
    assert draws.shape == (n, space.chains, T, size)
    flat = draws.flatten(2).movedim(1, 0)
    for chain in range(space.chains):
        expected = dense(space, chain)
        covariance = expected.covariance.reshape(T * size, T * size)
        variance = covariance.diagonal()
        error = flat[chain].mean(0) - expected.mean.flatten()
        assert bool((error.abs() <= 5 * (variance / n).sqrt() + 1e-12).all())
        spread = ((variance[:, None] * variance + covariance.square()) / n).sqrt()
        assert bool(((flat[chain].T.cov() - covariance).abs() <= 5 * spread + 1e-12).all())


def test_draws_of_different_chains_differ() -> None:
    space = random(0, chains=1)
    twice = replace(space, value=space.value.repeat(2, 1, 1))
    first, second = sampled(twice, 1, torch.Generator().manual_seed(0))[0]
    assert not torch.allclose(first, second)


def long(T: int = 300, chains: int = 1, D: int = 2, slow: float = 0.9, n: int = 3) -> StateSpace:
    """A chain that stays as it is, until something is missing or other matrices come."""
    space = random(30, T=T, n=n, D=D, chains=chains)
    turn = torch.linalg.qr(space.transition[0, 1])[0]
    transition = torch.stack([turn, slow * turn])[None]
    return replace(space, transition=transition, deviation=torch.ones(1, 1, D).double())


def with_gaps(space: StateSpace, own: bool = False) -> StateSpace:
    seen = torch.ones(space.chains if own else 1, *space.value.shape[1:], dtype=torch.bool)
    seen[:, 100:103] = False
    seen[:, 200, 0] = False
    if own:
        seen[-1, 250:] = False
    value = space.value.clone()
    value[:, 100:103] = torch.nan
    return replace(space, value=value, seen=seen)


def with_a_break(space: StateSpace) -> StateSpace:
    dynamics = space.dynamics.clone()
    dynamics[150] = 0
    return replace(space, dynamics=dynamics)


def with_one_noise(space: StateSpace) -> StateSpace:
    return replace(space, noise=space.noise[..., :1].contiguous())


LONG: dict[str, Callable[[], StateSpace]] = {
    "steady": long,
    "steady, chains": lambda: long(chains=9),
    "gaps": lambda: with_gaps(long()),
    "gaps, chains": lambda: with_gaps(long(chains=9)),
    "own gaps": lambda: with_gaps(long(chains=3), own=True),
    "break": lambda: with_a_break(long()),
    "slow": lambda: long(slow=0.999),
    "more than four numbers": lambda: with_gaps(long(n=6, D=5, chains=2)),
    "four numbers": lambda: with_gaps(long(n=4, D=4)),
    "six data of one noise": lambda: with_one_noise(long(D=6, chains=2)),
    "condensed": lambda: long(D=7),
    "condensed, gaps": lambda: with_gaps(long(D=7, chains=2)),
    "own drift": lambda: replace(long(chains=2), drift=random(31, T=300, own=True).drift),
}


@pytest.mark.parametrize("way", [*WAYS, "steps"])
@pytest.mark.parametrize("case", LONG)
def test_steps_that_repeat(case: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(way, monkeypatch)
    space = LONG[case]()
    expected = filtered_by_moments(space)
    same(filtered(space), expected, 1e-11)
    found = smoothed(space)
    torch.testing.assert_close(
        found.log_evidence, expected.log_evidence.sum(-1), rtol=1e-12, atol=0.0
    )
    assert torch.equal(log_evidence(space), found.log_evidence)
    whole = with_no_two_alike(space)
    same(found, smoothed(whole), 1e-11)


@pytest.mark.skipif(not kalman._HAS_NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("case", [*CASES, *STRESS, *LONG])
def test_both_ways_are_the_same(case: str) -> None:
    space = {**CASES, **STRESS, **LONG}[case]()
    space, _ = condensed(space)
    same(kalman_compiled.smoothed(space), kalman_steps.smoothed(space), 1e-10)
    same(kalman_compiled.filtered(space), kalman_steps.filtered(space), 1e-10)
    normal = torch.randn(2, space.chains, space.steps, space.noise.shape[-1]).double()
    close(kalman_compiled.sampled(space, normal), kalman_steps.sampled(space, normal), 1e-10)


@pytest.mark.parametrize("way", [*WAYS, "steps"])
def test_steps_that_repeat_only_after_many(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out of a slow convergence is the sum of many small changes, not the last of them."""
    by(way, monkeypatch)
    space = random(32, T=1000, n=1, D=1, chains=1)
    space = replace(
        space,
        transition=torch.ones_like(space.transition),
        noise=torch.tensor([1.0, 0.05]).double().reshape(1, 2, 1, 1),
        loading=torch.ones_like(space.loading),
        deviation=torch.ones_like(space.deviation),
    )
    found = smoothed(space)
    assert found.transitions.shape[1] < 500
    whole = with_no_two_alike(space)
    same(found, smoothed(whole), 2e-14)
    same(filtered(space), filtered(whole), 2e-14)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 3),
    D=st.integers(1, 3),
    k=st.integers(0, 3),
    chains=st.integers(1, 2),
    gap=st.sampled_from([0, 1, 5]),
    known=st.booleans(),
)
def test_any_chain_by_each_way(
    seed: int, n: int, D: int, k: int, chains: int, gap: int, known: bool
) -> None:
    space = random(seed, T=30, n=n, D=D, k=k, chains=chains)
    if known:
        space = replace(space, noise=space.noise * torch.tensor([0.0, 1.0]).reshape(2, 1, 1))
    if gap:
        seen = torch.ones(chains, 30, D, dtype=torch.bool)
        seen[-1, 25 : 25 + gap] = False
        space = replace(space, value=torch.where(seen, space.value, torch.nan), seen=seen)
    expected = smoothed_by_moments(space)
    ways = [kalman_steps, kalman_compiled] if kalman._HAS_NUMBA else [kalman_steps]
    for way in ways:
        same(way.smoothed(space), expected, 1e-9)


def with_no_two_alike(space: StateSpace) -> StateSpace:
    """The same chain, each step with matrices of its own."""
    return replace(
        space,
        transition=space.transition[:, space.dynamics],
        noise=space.noise[:, space.dynamics],
        loading=space.loading[:, space.measurement],
        deviation=space.deviation[:, space.measurement],
        dynamics=torch.arange(space.steps),
        measurement=torch.arange(space.steps),
    )


def same(found: Filtered | Smoothed, expected: Filtered | Smoothed, within: float) -> None:
    names = [f.name for f in fields(found)]
    if isinstance(found, Smoothed):  # of each step, however they are held
        names = ["log_evidence", "log_determinant", "mean", "disturbance"]
        names += ["covariance", "transition", "noise"]
    for name in names:
        close(getattr(found, name), getattr(expected, name), within)


def test_few_steps_do_not_start_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kalman, "_HAS_NUMBA", True)
    assert kalman._way(random(0, T=128, chains=2)) is kalman_steps
    assert kalman._way(random(0, T=129, chains=2)) is not kalman_steps


def test_data_are_not_changed() -> None:
    space = with_gaps(long())
    before = [None if x is None else x.clone() for x in vars(space).values()]
    smoothed(space), filtered(space), sampled(space, 2)
    for x, y in zip(vars(space).values(), before, strict=True):
        assert x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.skipif(not kalman._HAS_NUMBA, reason="numba is not installed")
def test_machine_code_is_not_kept_when_what_it_calls_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import numba

    from pyro_em.posteriors.filters.numba_kalman import keyed

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    hits = []
    for key in ("one", "one", "other", "one"):
        function = numba.njit("i8(i8)", cache=True)(keyed(_twice, key))
        assert function(3) == 6
        hits.append(sum(function.stats.cache_hits.values()))
    assert hits == [0, 1, 0, 1]


def _twice(x: int) -> int:
    return 2 * x


@pytest.mark.skipif(not kalman._HAS_NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("n, D", [(1, 1), (4, 4), (4, 1), (10, 10)])
def test_memory(n: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 4 (n² + D) numbers a step, the results among them, where no step is like another."""
    by("numba", monkeypatch)
    space = with_no_two_alike(random(0, T=4000, n=n, D=D, chains=1))
    smoothed(space)
    tracemalloc.start()
    smoothed(space)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / 8 / space.steps < 4 * (n * n + D)


@pytest.mark.parametrize(
    "case", ["many numbers", "many numbers, missing in all", "own drift, missing"]
)
def test_digits_do_not_depend_on_the_default(case: str) -> None:
    space = CASES[case]()
    found = []
    before = torch.get_default_dtype()
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            found.append((smoothed(space), filtered(space), filtered_by_moments(space)))
        finally:
            torch.set_default_dtype(before)
    for one, other in zip(*found, strict=True):
        same(one, other, 0.0)
