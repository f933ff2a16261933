"""Means in which parameters are multiplied: least squares for each while the others have values."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from torch.distributions import constraints

from pyro_em import Chunks, ExactPosteriorEM, Gradient, LeastSquares, Newton, vectorized_markov
from pyro_em.graph.bindings.autograd import bind
from pyro_em.graph.bindings.useful import Useful

SERIES = torch.tensor(
    [0.3, 1.6, 1.1, 1.9, -0.8, -0.2, -0.9, 0.4, 1.4, 2.1, 1.0, 1.7, 0.9, -0.6, -1.1, 1.5, 1.2, 0.8],
    dtype=torch.float64,
)


def test_a_product_of_parameters_is_bound_and_evaluated_at_other_values() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64)
    leaves = {
        "a": torch.randn(3, generator=g, dtype=torch.float64, requires_grad=True),
        "b": torch.randn(2, generator=g, dtype=torch.float64, requires_grad=True),
        "c": torch.randn((), generator=g, dtype=torch.float64, requires_grad=True),
    }

    def mean(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        line = x @ a
        return torch.stack([c + b[0] * (line - 2), b[1] * c * 3 + b.sum() * x[:, 0] - line], -1) + 1

    found = bind(mean(**leaves), leaves, Useful(affine=True, bilinear=True))

    assert found.how == "bilinear"
    assert set(found.pairs or ()) == {("a", "b"), ("b", "c")}
    other = {n: torch.randn(v.shape, generator=g, dtype=v.dtype) for n, v in leaves.items()}
    assert torch.allclose(found.evaluate(other), mean(**other), atol=1e-12)
    line = found.linear_in(("a", "c"), other)
    moved = {**other, "a": torch.ones(3, dtype=torch.float64), "c": torch.tensor(3.0).double()}
    assert torch.allclose(line.evaluate(moved), mean(**moved), atol=1e-12)


@pytest.mark.parametrize(
    "mean",
    [
        lambda a, b, c: a[0] * a[1] * b,  # of a parameter with itself
        lambda a, b, c: a * b * c,  # of three
        lambda a, b, c: a / c + b,
        lambda a, b, c: a.exp() * b + c,
    ],
)
def test_no_other_product_is_bilinear(mean: object) -> None:
    leaves = {n: torch.rand(2, dtype=torch.float64, requires_grad=True) for n in ("a", "b", "c")}
    assert bind(mean(**leaves), leaves, Useful(affine=True, bilinear=True)).how == "opaque"  # type: ignore[operator]


def regimes(y: torch.Tensor) -> None:
    """An autoregression about a mean that changes with the regime (Hamilton, 1989), of order two."""
    start = pyro.param("start", torch.tensor([0.4, 0.6]).double(), constraint=constraints.simplex)
    moves = pyro.param(
        "moves",
        torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64),
        constraint=constraints.simplex,
    )
    mu = pyro.param("mu", torch.tensor([-0.5, 1.5], dtype=torch.float64))
    phi = pyro.param("phi", torch.tensor([0.1, -0.1], dtype=torch.float64))
    sd = pyro.param("sd", torch.tensor(0.8).double(), constraint=constraints.positive)
    z: list[torch.Tensor] = []
    for t in pyro.markov(range(len(y)), history=2):
        z.append(pyro.sample(f"z_{t}", dist.Categorical(start if t == 0 else moves[z[t - 1]])))
        if t >= 2:
            about = sum(phi[k] * (y[t - 1 - k] - mu[z[t - 1 - k]]) for k in range(2))
            pyro.sample(f"y_{t}", dist.Normal(mu[z[t]] + about, sd), obs=y[t])


def filtered(
    y: np.ndarray, start: np.ndarray, moves: np.ndarray, mu: np.ndarray, phi: np.ndarray, sd: float
) -> float:
    """The log evidence by the forward recursion over three regimes at a time."""
    before = start[:, None] * moves  # [z0, z1]
    total = 0.0
    for t in range(2, len(y)):
        three = before[:, :, None] * moves[None]  # [z(t-2), z(t-1), z(t)]
        loc = (
            mu[None, None, :]
            + phi[0] * (y[t - 1] - mu[None, :, None])
            + phi[1] * (y[t - 2] - mu[:, None, None])
        )
        three = three * np.exp(-0.5 * ((y[t] - loc) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
        total += math.log(three.sum())
        before = three.sum(0) / three.sum()
    return total


def test_regimes_about_means_reach_the_maximum_of_the_evidence() -> None:
    em = ExactPosteriorEM(regimes)
    plan = em.plan(SERIES)
    assert isinstance(plan.updates["mu"].update, LeastSquares)
    assert plan.updates["mu"].reason == "loc is affine in it while 'phi' has its value"
    result = em.fit(SERIES, tol=1e-9, max_steps=3000)
    y = SERIES.numpy()
    fitted = {n: v.detach().numpy() for n, v in result.params.items()}
    assert filtered(y, **fitted) == pytest.approx(result.log_evidence, abs=1e-9)
    gains = np.diff(result.history)
    assert gains.min() > -1e-9

    def minus(theta: np.ndarray) -> float:
        stay = 1 / (1 + np.exp(-theta[5:7]))
        moves = np.array([[stay[0], 1 - stay[0]], [1 - stay[1], stay[1]]])
        return -filtered(y, fitted["start"], moves, theta[:2], theta[2:4], math.exp(theta[4]))

    stay = np.clip(np.diag(fitted["moves"]), 1e-6, 1 - 1e-6)
    at = [*fitted["mu"], *fitted["phi"], math.log(fitted["sd"]), *np.log(stay / (1 - stay))]
    best = minimize(minus, at, method="Nelder-Mead", options={"maxiter": 400, "xatol": 1e-7})
    assert -best.fun <= result.log_evidence + 1e-6


def rows(x: torch.Tensor, y: torch.Tensor) -> None:
    """Lines whose slopes share one factor, in components."""
    weights = pyro.param(
        "weights", torch.tensor([0.5, 0.5]).double(), constraint=constraints.simplex
    )
    gain = pyro.param("gain", torch.tensor([0.5, 1.5], dtype=torch.float64))
    slope = pyro.param("slope", torch.tensor([1.0, -0.5], dtype=torch.float64))
    sd = pyro.param("sd", torch.tensor(1.0).double(), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(gain[z] * (x @ slope), sd), obs=y)


def test_a_step_is_two_regressions_one_after_the_other_also_in_chunks() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(40, 2, generator=g, dtype=torch.float64)
    z = torch.rand(40, generator=g) < 0.4
    y = torch.where(z, 0.7, 2.5) * (x @ torch.tensor([1.0, -1.0]).double())
    y = y + 0.3 * torch.randn(40, generator=g, dtype=torch.float64)
    result = ExactPosteriorEM(rows).fit(x, y, max_steps=1, tol=0)

    at, xs, ys = (
        {"gain": np.array([0.5, 1.5]), "slope": np.array([1.0, -0.5])},
        x.numpy(),
        y.numpy(),
    )
    density = np.exp(-0.5 * (ys[:, None] - at["gain"] * (xs @ at["slope"])[:, None]) ** 2)
    r = density / density.sum(1, keepdims=True)
    line = xs @ at["slope"]
    gain = (r * (line * ys)[:, None]).sum(0) / (r * (line**2)[:, None]).sum(0)
    design = (gain[None, :, None] * xs[:, None, :]).reshape(-1, 2)
    weight, target = r.reshape(-1), np.repeat(ys, 2)
    slope = np.linalg.solve((design * weight[:, None]).T @ design, design.T @ (weight * target))
    assert result.params["gain"].numpy() == pytest.approx(gain, abs=1e-12)
    assert result.params["slope"].numpy() == pytest.approx(slope, abs=1e-12)

    pyro.clear_param_store()
    parts = ExactPosteriorEM(rows).fit(Chunks(x, y, rows=11), max_steps=1, tol=0)
    assert torch.allclose(parts.params["slope"], result.params["slope"], atol=1e-12)


def level(y: torch.Tensor, about_mean: bool, squashed: bool = False, loop: bool = False) -> None:
    """A latent autoregression below noise, written about its mean or with an intercept."""
    mu = pyro.param("mu", torch.tensor(0.2).double())
    phi = pyro.param("phi", torch.tensor(0.5).double())
    q = pyro.param("q", torch.tensor(1.0).double(), constraint=constraints.positive)
    h = torch.tensor(0.0).double()
    steps = pyro.markov(range(len(y))) if loop else vectorized_markov("t", len(y))
    for t in steps:
        factor = torch.tanh(phi) if squashed else phi
        loc = mu + factor * (h - mu) if about_mean else mu + factor * h
        h = pyro.sample(f"h_{t}", dist.Normal(loc, q))
        pyro.sample(f"y_{t}", dist.Normal(h, 0.4), obs=y[t])


def test_a_latent_autoregression_about_its_mean_has_the_maximum_of_one_with_an_intercept() -> None:
    y = SERIES[:12]
    em = ExactPosteriorEM(level)
    assert isinstance(em.plan(y, True).updates["mu"].update, LeastSquares)
    about = em.fit(y, True, tol=1e-9, max_steps=3000)
    pyro.clear_param_store()
    plain = ExactPosteriorEM(level).fit(y, False, tol=1e-9, max_steps=3000)
    assert about.log_evidence == pytest.approx(plain.log_evidence, abs=1e-7)
    mean = plain.params["mu"] / (1 - plain.params["phi"])
    assert float(about.params["mu"]) == pytest.approx(float(mean), abs=1e-3)
    assert np.diff(about.history).min() > -1e-9


def test_a_chain_over_indices_with_a_mean_that_is_not_linear_is_that_of_the_loop() -> None:
    ends = []
    for loop in (True, False):
        pyro.clear_param_store()
        ends.append(ExactPosteriorEM(level).fit(SERIES[:8], True, True, loop, max_steps=2, tol=0))
    assert ends[1].log_evidence == pytest.approx(ends[0].log_evidence, abs=1e-7)


NODES = torch.linspace(-3, 3, 7, dtype=torch.float64)
PRIOR = torch.softmax(-(NODES**2) / 2, 0)


def items(x: torch.Tensor) -> None:
    """The two-parameter logistic model of responses (Bock and Aitkin, 1981), abilities on a grid."""
    slope = pyro.param("slope", torch.ones(3, dtype=torch.float64))
    place = pyro.param("place", torch.zeros(3, dtype=torch.float64))
    with pyro.plate("persons", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR))
        logits = slope * (NODES[z].unsqueeze(-1) - place)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def test_slopes_and_places_of_items_are_found_together_by_newton() -> None:
    # About what slopes 1.5, 1, 2 and places -0.5, 0, 0.5 make of three hundred persons.
    counts = [62, 9, 31, 9, 51, 28, 48, 62]
    patterns = [[k >> 2 & 1, k >> 1 & 1, k & 1] for k in range(8)]
    x = torch.tensor([p for p, n in zip(patterns, counts, strict=True) for _ in range(n)]).double()
    em = ExactPosteriorEM(items)
    plan = em.plan(x)
    assert plan.kernel == "mixture"
    assert isinstance(plan.updates["slope"].update, Newton)
    assert "linear in it while 'place' has its value" in plan.updates["slope"].reason
    result = em.fit(x, tol=1e-8, max_steps=400)

    def minus(theta: np.ndarray) -> float:
        eta = theta[:3] * (NODES.numpy()[:, None] - theta[3:])
        right, wrong = -np.logaddexp(0, -eta), -np.logaddexp(0, eta)
        total = 0.0
        for p, n in zip(np.array(patterns), counts, strict=True):
            total += n * np.log(PRIOR.numpy() @ np.exp((p * right + (1 - p) * wrong).sum(1)))
        return -total

    at = np.concatenate([result.params["slope"].numpy(), result.params["place"].numpy()])
    assert -minus(at) == pytest.approx(result.log_evidence, abs=1e-9)
    best = minimize(minus, [1, 1, 1, 0, 0, 0], method="BFGS", options={"gtol": 1e-7})
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-6)
    assert at == pytest.approx(best.x, abs=1e-2)


def test_a_component_whose_covariate_is_zero_takes_no_part_in_its_coefficient() -> None:
    def model(y: torch.Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.3).double())
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).double() / 2))
            pyro.sample("y", dist.Binomial(5, logits=w * z), obs=y)

    y = torch.tensor([1.0, 2, 3, 4, 5, 5, 4, 3, 2]).double()
    result = ExactPosteriorEM(model).fit(y, tol=1e-10)

    def minus(w: float) -> float:
        b = torch.distributions.Binomial(5, logits=torch.tensor([0.0, w]).double())
        return -float((b.log_prob(y.unsqueeze(-1)).exp().mean(-1)).log().sum())

    best = minimize_scalar(minus, bounds=(0, 4), method="bounded", options={"xatol": 1e-8})
    assert float(result.params["w"]) == pytest.approx(best.x, abs=1e-4)


def test_a_product_behind_a_link_is_climbed() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        gain, slope = pyro.param("gain", torch.tensor(1.0)), pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson((gain * (slope * x + 1)).exp()), obs=y)

    plan = ExactPosteriorEM(model).plan(torch.randn(6), torch.tensor([0.0, 1, 1, 0, 1, 0]))
    assert isinstance(plan.updates["gain"].update, Gradient)
