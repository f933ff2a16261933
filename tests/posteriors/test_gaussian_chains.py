"""Gaussian latents that follow each other, against Pyro's own joint and against one dense block."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_em import EMResult, EMStatus, ExactPosteriorEM, Posterior, PyroEMWarning
from pyro_em.posteriors.states import state_form
from tests.posteriors.chain_models import CASES, noise, number, positive
from tests.posteriors.gaussian_models import DenseJoint, Values, dense_joint
from tests.posteriors.random_chains import random_chain

JOINTS = [n for n in CASES if n not in ("classes", "vectors")]  # discrete, and a noise next to zero


# Cases whose steps are held against those of one dense block, which has tests of its own.
BESIDE_ONE_BLOCK = ("second_order", "dynamic_factor", "vectors", "classes", "weighted", "decay")


def joint_of(model: Callable[..., None], args: tuple[Any, ...]) -> DenseJoint:
    """Evidence and posterior from Pyro's own log density, which is quadratic."""
    sites = poutine.trace(model).get_trace(*args).nodes
    shapes = {
        n: s["value"].shape
        for n, s in sites.items()
        if s["type"] == "sample" and not s["is_observed"] and "Plate" not in str(s["name"])
        if not type(s["fn"]).__name__.startswith("_Subsample")
    }

    def log_joint(values: Values) -> Tensor:
        return poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()

    return dense_joint(shapes, log_joint)


def as_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chains of any length be solved as one dense block."""
    monkeypatch.setattr(state_form, "SHORTEST", 10**9)


def fitted(model: Callable[..., None], args: tuple[Any, ...], steps: int) -> EMResult:
    """The result of a few steps from the model's own start."""
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ExactPosteriorEM(model).fit(*args, max_steps=steps, tol=0)


def require_joint(q: Posterior, joint: DenseJoint) -> None:
    """Evidence and means must be those of Pyro's own log density."""
    assert q.log_evidence == pytest.approx(joint.log_evidence, abs=1e-9)
    for name, place in joint.places.items():
        mean = joint.mean[place].reshape(joint.shapes[name])
        torch.testing.assert_close(q.mean(name), mean, rtol=0.0, atol=1e-9)


def require_covariances(q: Posterior, joint: DenseJoint) -> None:
    """Covariances of some pairs of latents must be those of the joint."""
    names = list(joint.places)
    for a, b in [(names[i], names[j]) for i in (0, 3, -1) for j in (0, 4, -2)]:
        part = joint.covariance[joint.places[a], joint.places[b]]
        found = q.covariance(a, b)
        if joint.shapes[a] and found.shape != part.shape:  # a plate: elements of their own
            part = part.diagonal()
        torch.testing.assert_close(found, part.reshape(found.shape), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_a_chain_is_what_its_joint_and_one_dense_block_are(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = CASES[case]()
    ours = fitted(model, args, 2)
    assert all("Kalman" in r.reason for r in ours.plan.routes if r.route == "Gaussian")
    assert "Iterations: Kalman filter and smoother" in str(ours.plan)
    q = ours.posterior
    assert all(b >= a - 1e-9 for a, b in zip(ours.history, ours.history[1:], strict=False))
    if case in JOINTS:
        joint = joint_of(model, args)
        require_joint(q, joint)
        require_covariances(q, joint)
    if case not in BESIDE_ONE_BLOCK:
        return
    as_one_block(monkeypatch)
    theirs = fitted(model, args, 2)
    assert not any("Kalman" in r.reason for r in theirs.plan.routes)
    assert ours.history == pytest.approx(theirs.history, abs=1e-9)
    for name, value in ours.params.items():
        torch.testing.assert_close(value, theirs.params[name], rtol=1e-8, atol=1e-9)
    assert ours.num_free_parameters == theirs.num_free_parameters
    assert ours.num_rows == theirs.num_rows
    other = theirs.posterior
    assert q.entropy() == pytest.approx(other.entropy(), abs=1e-9)
    names = [r.site for r in ours.plan.routes if r.route == "Gaussian"]
    assert {n: len(d) for n, d in q.sample(3).items() if n in names} == dict.fromkeys(names, 3)
    for a, b in zip(names, names[3:] + names[:3], strict=True):
        torch.testing.assert_close(q.covariance(a, b), other.covariance(a, b), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("case", ["dynamic_factor", "late", "lasting"])
def test_given_distributions_and_random_starts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound at any q, an M-step from it, and a start from the prior: as of one dense block."""
    model, args = CASES[case]()
    found = []
    for one_block in (False, True):
        if one_block:
            as_one_block(monkeypatch)
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        posterior = em.posterior(*args)
        q = {}
        for route in em.plan(*args).routes:
            mean = posterior.mean(route.site)
            moved = mean + 0.1 * torch.cos(torch.arange(mean.numel()).double()).reshape(mean.shape)
            q[route.site] = dist.Normal(moved, 0.3).to_event(int("Multi" in route.distribution))
        bound = float(em.elbo(*args, q=q).value)
        assert bound < posterior.log_evidence
        em.m_step(q, *args)
        found.append((bound, {n: p.detach().clone() for n, p in pyro.get_param_store().items()}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-9)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-8, atol=1e-9)


def test_a_start_from_the_prior() -> None:
    model, args = CASES["panel"]()
    result = ExactPosteriorEM(model).fit(*args, init="random", seed=3, max_steps=2, tol=0)
    assert result.history[1] > result.history[0]
    assert torch.tensor(result.history).isfinite().all()


def test_standard_errors_are_those_of_one_dense_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = CASES["local_level"]()
    found = []
    for one_block in (False, True):
        if one_block:
            as_one_block(monkeypatch)
        found.append(fitted(model, args, 10).standard_errors())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-8, equal_nan=True)


def test_draws_have_the_moments_of_the_posterior() -> None:
    model, args = CASES["panel"]()
    q = ExactPosteriorEM(model).posterior(*args)
    draws = q.sample(4000)
    for name in ("h_0", "h_5", "h_9"):
        deviation = q.covariance(name).sqrt()
        off = (draws[name].mean(0) - q.mean(name)) / deviation
        assert float(off.abs().max()) < 5 / 4000**0.5
        torch.testing.assert_close(draws[name].std(0), deviation, rtol=0.06, atol=0.0)


def test_a_long_chain_costs_what_its_length_costs() -> None:
    """The evidence of 150 steps, which as one block would take matrices of 22,500 numbers."""

    def model(y: Tensor) -> None:
        h = pyro.sample("h_0", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(len(y))):
            if t:
                h = pyro.sample(f"h_{t}", dist.Normal(h, positive("q", 0.5)))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 1.0)), obs=y[t])

    y = noise(150, seed=20)
    found = ExactPosteriorEM(model, max_enumeration=1_000).posterior(y).log_evidence
    lags = torch.arange(150).double()
    walk = 1 + 0.25 * torch.minimum(lags, lags.unsqueeze(-1))
    joint = dist.MultivariateNormal(torch.zeros(150).double(), walk + torch.eye(150).double())
    assert found == pytest.approx(float(joint.log_prob(y)), abs=1e-8)


@pytest.mark.parametrize("seed", [4])
def test_random_chains_are_their_joints(seed: int) -> None:
    model = random_chain(seed)
    result = fitted(model, (), 1)
    assert result.history[0] <= result.log_evidence + 1e-9
    require_joint(result.posterior, joint_of(model, ()))


def second_order_with_a_state(y: Tensor, spread: str, shifted: bool = False) -> None:
    """The second number of its state has no noise; with ``shifted`` a coefficient stands there."""
    phi, s = number("phi", [0.8, -0.2]), positive("s", 1.2)
    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    rows = [[phi[0], one], [phi[1], zero]] if shifted else [[phi[0], phi[1]], [one, zero]]
    A, scale = torch.stack([torch.stack(row) for row in rows]), torch.stack([s, zero])
    tril = torch.diag(scale) if spread == "diagonal" else torch.stack([scale, 0 * scale.flip(0)])
    h = pyro.sample("h_0", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    for t in pyro.markov(range(len(y))):
        if t:
            noisy = dist.Normal(A @ h, scale, validate_args=False).to_event(1)
            if spread != "scale":
                noisy = dist.MultivariateNormal(A @ h, scale_tril=tril, validate_args=False)
            h = pyro.sample(f"h_{t}", noisy)
        pyro.sample(f"y_{t}", dist.Normal(h[0], positive("r", 0.6)), obs=y[t])


def second_order_with_two_lags(y: Tensor) -> None:
    """The same, with a latent for the step before the first."""
    phi, s = number("phi", [0.8, -0.2]), positive("s", 1.2)
    h = [pyro.sample(f"h_{k}", dist.Normal(0.0, 1.0)) for k in range(2)]
    for t in range(len(y)):
        if t:
            h.append(pyro.sample(f"h_{t + 1}", dist.Normal(phi[0] * h[-1] + phi[1] * h[-2], s)))
        pyro.sample(f"y_{t}", dist.Normal(h[-1], positive("r", 0.6)), obs=y[t])


def test_a_state_with_a_number_without_noise_is_a_longer_history() -> None:
    y = noise(10, seed=22)
    lags = fitted(second_order_with_two_lags, (y,), 4)
    assert {r.reason for r in lags.plan.routes} >= {
        "linear in 'h_2'; chain: Kalman filter and smoother, 2 states"
    }
    for spread in ("scale", "diagonal"):
        one = fitted(second_order_with_a_state, (y, spread), 4)
        assert one.history == pytest.approx(lags.history, abs=1e-10)
        for name, value in one.params.items():
            torch.testing.assert_close(value, lags.params[name], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    ("spread", "shifted", "words"),
    [
        ("scale", True, "parameter 'phi': it enters the mean of 'h_1', which has coordinates"),
        ("matrix", False, "site 'h_1': its covariance is singular"),
    ],
)
def test_what_has_no_noise_to_be_moved_in_is_named(spread: str, shifted: bool, words: str) -> None:
    with pytest.warns(PyroEMWarning, match=words):
        result = ExactPosteriorEM(second_order_with_a_state).fit(
            noise(10, seed=22), spread, shifted, max_steps=3, tol=0
        )
    assert result.status is EMStatus.DEGENERATE and result.params["phi"].tolist() == [0.8, -0.2]


def stacked_or_not(y: Tensor, kind: str, at_once: bool) -> None:
    """What is observed of each step in the loop, or of all steps in a plate after it."""
    A, W = number("A", [[0.8, 0.1], [-0.2, 0.7]]), number("W", [[1.0, 0.2], [0.3, -0.7]])
    inputs = noise(len(y), seed=23)
    b = 0.0 if kind == "vectors" else pyro.sample("b", dist.Normal(0.0, 1.0))

    def emitted(t: Any, h: Tensor) -> Any:
        if kind == "vectors":
            return dist.Normal(h @ W.mT, positive("r", 0.5)).to_event(1)
        mean = W[0, 0].exp() * inputs[t] * h + inputs[t] * b  # not linear in the parameter
        return dist.Normal(mean, positive("r", 0.5))

    h, states = torch.zeros(2 if kind == "vectors" else ()).double(), list[Tensor]()
    for t in range(len(y)):
        step = dist.Normal(A @ h, 1.0).to_event(1) if kind == "vectors" else None
        h = pyro.sample(f"h_{t}", step or dist.Normal(0.9 * h, 1.0))
        states.append(h)
        if not at_once:
            pyro.sample(f"y_{t}", emitted(t, h), obs=y[t])
    if at_once:
        with pyro.plate("steps", len(y)):
            pyro.sample("y", emitted(torch.arange(len(y)), torch.stack(states)), obs=y)


@pytest.mark.parametrize("kind", ["vectors", "opaque"])
def test_what_is_observed_of_all_steps_at_once_is_a_chain(kind: str) -> None:
    y = noise(12, 2, seed=24) if kind != "opaque" else noise(12, seed=24)
    y[3, ...] = torch.nan
    found = []
    for at_once in (False, True):
        pyro.clear_param_store()
        em = ExactPosteriorEM(stacked_or_not, missing="nan")
        result = em.fit(y, kind, at_once, max_steps=2, tol=0)
        assert "chain: Kalman" in result.plan.routes[0].reason
        q, name = result.posterior, "y" if at_once else "y_*"
        errors = q.prediction_errors(name)
        ahead = em.forecast(y, kind, at_once, seed=0).means
        gap = ahead["y"][3] if at_once else ahead["y_3"]
        numbers = (q.mean("h_*"), q.filtered("h_*").mean, errors, gap, *result.params.values())
        found.append(([*result.history, result.log_evidence], numbers))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-11)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=0.0, atol=1e-11, equal_nan=True)
