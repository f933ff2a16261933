"""Kalman filter, smoother and draws against the dense joint normal distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyro_em.posteriors import kalman
from pyro_em.posteriors.kalman import filtered, lagged_covariance, sampled, smoothed
from pyro_em.posteriors.state_space import StateSpace
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
    T: int = 8, deviation: float = 1.0, prior: float = 1.0, offset: float = 0.0
) -> StateSpace:
    """A local linear trend of two series with one state, the second half as steep."""
    generator = torch.Generator().manual_seed(0)
    space = random(1, T, n=2, D=2, chains=1)
    transition = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double().expand(1, 2, 2, 2)
    noise = torch.stack([torch.eye(2) * prior, torch.diag(torch.tensor([0.5, 0.1]))]).double()[None]
    drift = torch.zeros(1, T, 2).double()
    drift[:, 0, 0] = offset
    walk = torch.randn(1, T, 1, generator=generator).double().cumsum(1) + offset
    return replace(
        space,
        transition=transition,
        drift=drift,
        noise=noise,
        loading=torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]).double(),
        deviation=torch.full((1, 1, 2), deviation).double(),
        value=walk * torch.tensor([1.0, 0.5])
        + deviation * torch.randn(1, T, 2, generator=generator).double(),
    )


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
    "own drift": lambda: replace(random(15), drift=random(15, own=True).drift),
    "own drift, missing": lambda: replace(
        random(16, missing=0.3), drift=random(16, own=True).drift
    ),
    "own loading": lambda: replace(random(17), loading=random(17, own=True).loading),
    "singular noise": lambda: random(18, k=1),
    "no noise": lambda: random(19, k=0),
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
    covariances = found.covariance, found.information, lagged
    shared = all(
        len(x) == 1 for x in (space.transition, space.noise, space.loading, space.deviation)
    )
    shared = shared and (space.seen is None or len(space.seen) == 1)
    assert {len(x) for x in covariances} == {1 if shared else space.chains}
    for chain in range(space.chains):
        expected = dense(space, chain)
        c = chain if len(found.covariance) > 1 else 0
        torch.testing.assert_close(found.log_evidence[chain], expected.log_evidence)
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


STRESS: dict[str, Callable[[], StateSpace]] = {
    "precise data": lambda: trend(deviation=1e-6),
    "precise data, known start": lambda: trend(deviation=1e-6, prior=0.0),
    "far from zero": lambda: trend(offset=1e6),
    "vague start": lambda: trend(prior=1e7**0.5),
    "vague start, far from zero": lambda: trend(prior=1e7**0.5, offset=1e6),
}


@pytest.mark.parametrize("case", STRESS)
def test_under_stress(case: str) -> None:
    space = STRESS[case]()
    found, expected = smoothed(space), dense(space, 0)
    T = space.steps
    evidence = float(expected.log_evidence)
    close(found.log_evidence[0], expected.log_evidence, max(1e-9, 1e-15 * abs(evidence)))
    close(found.mean[0], expected.mean, 1e-9)
    s, t = torch.triu_indices(T, T)
    lagged = lagged_covariance(space, found, s, t)[0]
    torch.testing.assert_close(lagged, expected.covariance[s, :, t], rtol=0.0, atol=1e-9)


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


def test_chunks_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    space = random(0, T=7, missing=0.2)
    whole = smoothed(space)
    monkeypatch.setattr(kalman, "_CHUNK", 3)
    pieces = smoothed(space)
    torch.testing.assert_close(pieces.mean, whole.mean)
    torch.testing.assert_close(pieces.covariance, whole.covariance)
    torch.testing.assert_close(pieces.log_evidence, whole.log_evidence)
