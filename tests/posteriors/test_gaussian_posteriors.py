"""Posteriors of Gaussian latents as users ask for them, held against dense joints and closed forms."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, UsageError
from pyro_em.posteriors.answers.posterior import Posterior

D64 = torch.float64


@pytest.fixture(autouse=True)
def _store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=D64)


X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=D64)
W = tensor([1.0, 0.5], [-0.4, 0.8], [0.3, -1.2])
MU = tensor(0.2, -0.1, 0.4)
NOISE = tensor(0.5, 0.9, 0.7)


def factors(x: Tensor) -> None:
    w = pyro.param("W", W.clone())
    mu = pyro.param("mu", MU.clone())
    noise = pyro.param("noise", NOISE.clone(), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ w.T + mu, noise).to_event(1), obs=x)


GROUP = torch.tensor([0, 0, 0, 1, 2, 2, 1, 0])
Y = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=D64)


def intercepts(y: Tensor, group: Tensor, scale: float = 0.8) -> None:
    mu = pyro.param("mu", tensor(0.3)[0])
    between = pyro.param("between", tensor(scale)[0], constraint=constraints.nonnegative)
    with pyro.plate("groups", 3):
        u = pyro.sample("u", dist.Normal(y.new_zeros(()), between, validate_args=False))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu + u[group], y.new_tensor(0.6)), obs=y)


def chain(y: Tensor) -> None:
    """Numbers, then vectors whose means are linear in them; the first two are read together."""
    h: Any = pyro.sample("h_0", dist.Normal(y.new_zeros(()), 1.0))
    for t in range(1, 4):
        h = pyro.sample(f"h_{t}", dist.Normal(0.7 * h + 0.1 * t, y.new_tensor(0.5)))
    v = pyro.sample(
        "v",
        dist.MultivariateNormal(
            h * y.new_ones(2), covariance_matrix=y.new_tensor([[1.0, 0.3], [0.3, 0.5]])
        ),
    )
    pyro.sample("y", dist.Normal(v[0] - 2 * v[1], y.new_tensor(0.4)), obs=y)


def posterior(model: Any, *args: Any) -> Any:
    return ExactPosteriorEM(model).posterior(*args)


def conditioned(
    mean: np.ndarray, covariance: np.ndarray, C: np.ndarray, b: np.ndarray, R: np.ndarray, y: Any
) -> tuple[np.ndarray, np.ndarray, float]:
    """Posterior moments of h ~ N(mean, covariance) given y = C h + b + N(0, R), and log p(y)."""
    S = C @ covariance @ C.T + R
    gain = covariance @ C.T @ np.linalg.inv(S)
    r = np.asarray(y) - C @ mean - b
    quadratic = r @ np.linalg.solve(S, r) + np.linalg.slogdet(2 * np.pi * S)[1]
    return mean + gain @ r, covariance - gain @ C @ covariance, -0.5 * quadratic


def dense_factors() -> tuple[np.ndarray, np.ndarray, float]:
    """Of each row, and the evidence of all."""
    w, prior = W.numpy(), np.eye(2)
    rows = [
        conditioned(np.zeros(2), prior, w, MU.numpy(), np.diag(NOISE.numpy() ** 2), x)
        for x in X.numpy()
    ]
    return np.stack([m for m, _, _ in rows]), rows[0][1], sum(e for _, _, e in rows)


def dense_intercepts(scale: float = 0.8) -> tuple[np.ndarray, np.ndarray, float]:
    C = np.eye(3)[GROUP.numpy()]
    prior = scale**2 * np.eye(3)
    return conditioned(np.zeros(3), prior, C, np.full(8, 0.3), 0.36 * np.eye(8), Y.numpy())


def dense_chain(y: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Of (h_0, …, h_3, v_0, v_1)."""
    weight = np.zeros((6, 6))
    for t in range(1, 4):
        weight[t, t - 1] = 0.7
    weight[4:, 3] = 1.0
    noise = np.zeros((6, 6))
    noise[:4, :4] = np.diag([1.0, 0.25, 0.25, 0.25])
    noise[4:, 4:] = [[1.0, 0.3], [0.3, 0.5]]
    inverse = np.linalg.inv(np.eye(6) - weight)
    mean = inverse @ np.array([0.0, 0.1, 0.2, 0.3, 0.0, 0.0])
    C = np.array([[0.0, 0.0, 0.0, 0.0, 1.0, -2.0]])
    return conditioned(
        mean, inverse @ noise @ inverse.T, C, np.zeros(1), np.array([[0.16]]), np.array([y])
    )


def close(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- moments


def test_moments_of_factors_are_the_closed_form() -> None:
    q = posterior(factors, X)
    mean, covariance, evidence = dense_factors()
    close(q.mean("h"), mean)
    close(q.covariance("h"), np.broadcast_to(covariance, (7, 2, 2)))
    assert q.log_evidence == pytest.approx(evidence, abs=1e-10)
    assert q.entropy() == pytest.approx(
        7 * 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    )
    marginal = q.marginal("h")
    assert isinstance(marginal, dist.MultivariateNormal) and marginal.batch_shape == (7,)
    close(marginal.mean, mean)
    close(marginal.covariance_matrix, np.broadcast_to(covariance, (7, 2, 2)))
    close(q.mode()["h"], mean)


def test_moments_of_groups_are_the_closed_form() -> None:
    q = posterior(intercepts, Y, GROUP)
    mean, covariance, _ = dense_intercepts()
    close(q.mean("u"), mean)
    close(q.covariance("u"), covariance.diagonal())
    marginal = q.marginal("u")
    assert isinstance(marginal, dist.Normal)
    close(marginal.mean, mean)
    close(marginal.variance, covariance.diagonal())


def test_moments_of_latents_of_latents_are_the_dense_ones() -> None:
    q = posterior(chain, tensor(1.7)[0])
    mean, covariance, evidence = dense_chain(1.7)
    assert q.log_evidence == pytest.approx(evidence, abs=1e-12)
    close(q.mean("h_*"), mean[:4])
    close(q.covariance("h_*"), covariance.diagonal()[:4])
    close(q.mean("v"), mean[4:])
    close(q.covariance("v"), covariance[4:, 4:])
    close(q.covariance("h_0", "h_3"), covariance[0, 3])
    close(q.covariance("h_1", "v"), covariance[1, 4:])
    close(q.covariance("v", "h_1"), covariance[4:, 1])
    close(q.covariance("v", "v"), covariance[4:, 4:])
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    assert q.entropy() == pytest.approx(entropy, abs=1e-12)


def test_covariances_between_sites_of_a_plate_are_element_by_element() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(y.new_zeros(2), 2.0).to_event(1))
            pyro.sample("y", dist.Normal(a + b[..., 0] - b[..., 1], y.new_tensor(1.0)), obs=y)
        c = pyro.sample("c", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("z", dist.Normal(c, y.new_tensor(1.0)), obs=y[0])

    q = posterior(model, Y)
    prior, C = np.diag([1.0, 4.0, 4.0]), np.array([[1.0, 1.0, -1.0]])
    _, covariance, _ = conditioned(np.zeros(3), prior, C, np.zeros(1), np.eye(1), np.zeros(1))
    close(q.covariance("a", "b"), np.broadcast_to(covariance[0, 1:], (8, 2)))
    close(q.covariance("b", "a"), np.broadcast_to(covariance[1:, 0], (8, 2)))
    close(q.covariance("a", "c"), np.zeros(8))  # another component


def test_a_global_latent_and_those_of_rows_have_a_covariance_per_row() -> None:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("rows", len(y)):
            h = pyro.sample("h", dist.Normal(w, y.new_tensor(0.5)))
            pyro.sample("y", dist.Normal(h, y.new_tensor(1.0)), obs=y)

    q = posterior(model, Y[:2])
    prior = np.array([[1.0, 1.0, 1.0], [1.0, 1.25, 1.0], [1.0, 1.0, 1.25]])
    C = np.eye(3)[1:]
    _, covariance, _ = conditioned(np.zeros(3), prior, C, np.zeros(2), np.eye(2), np.zeros(2))
    close(q.covariance("w", "h"), covariance[0, 1:])
    close(q.covariance("h", "w"), covariance[0, 1:])


def test_plates_of_one_dimension_have_no_common_elements() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("a", 2):
            u = pyro.sample("u", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("b", 2):
            v = pyro.sample("v", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("rows", 4):
            i = torch.arange(4)
            pyro.sample("y", dist.Normal(u[i % 2] + v[i // 2], y.new_tensor(1.0)), obs=y)

    q = posterior(model, Y[:4])
    with pytest.raises(UsageError, match=r"'u' is in plate 'a', and 'v' in plate 'b'"):
        q.covariance("u", "v")
    assert q.covariance("u", "u").shape == (2,)


def test_dimensions_between_plates_stay_as_in_pyro() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", 8, dim=-2):
            h = pyro.sample("h", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(h, y.new_tensor(1.0)), obs=y.unsqueeze(-1))

    q = posterior(model, Y)
    close(q.mean("h"), Y.numpy()[:, None] / 2)
    assert q.covariance("h").shape == q.marginal("h").batch_shape == (8, 1)
    assert q.sample(5)["h"].shape == (5, 8, 1) and q.mode()["h"].shape == (8, 1)


def test_events_of_more_dimensions_are_flattened_in_covariances() -> None:
    def model(y: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(y.new_zeros(2, 4), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(h.reshape(-1), y.new_tensor(1.0)).to_event(1), obs=y)

    q = posterior(model, Y)
    close(q.mean("h"), Y.numpy().reshape(2, 4) / 2)
    close(q.covariance("h"), np.eye(8) / 2)
    assert q.marginal("h").event_shape == (8,) and q.sample(3)["h"].shape == (3, 2, 4)


def test_answers_have_the_dtype_of_the_model_and_memory_of_their_own() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            h = pyro.sample("h", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(h.sum(-1), y.new_tensor(1.0)), obs=y)

    q = posterior(model, Y.float())
    answers = [q.mean("h"), q.covariance("h"), q.covariance("h", "h"), q.marginal("h").mean]
    answers += [q.sample(2)["h"], q.mode()["h"]]
    assert {a.dtype for a in answers} == {torch.float32}
    before = q.mean("h")
    for a in answers:
        assert a.untyped_storage().nbytes() == 4 * a.numel()
        a.fill_(7.0)
    assert torch.equal(q.mean("h"), before)


# ---------------------------------------------------------------- variances of zero


def test_a_variance_of_zero_has_every_answer() -> None:
    q = posterior(intercepts, Y, GROUP, 0.0)
    close(q.mean("u"), np.zeros(3))
    close(q.covariance("u"), np.zeros(3))
    close(q.marginal("u").variance, np.zeros(3))
    close(q.sample(4)["u"], np.zeros((4, 3)))
    assert q.entropy() == -math.inf
    terms = ExactPosteriorEM(intercepts).elbo(Y, GROUP, 0.0)
    _, _, evidence = dense_intercepts(0.0)
    assert terms.value == pytest.approx(evidence, abs=1e-10) and terms.gap == 0
    assert terms.entropy == -math.inf and terms.kl == pytest.approx(0, abs=1e-9)
    again = ExactPosteriorEM(intercepts).elbo(Y, GROUP, 0.0, q=q)
    assert again.value == pytest.approx(evidence, abs=1e-10)


def test_a_singular_covariance_has_a_marginal() -> None:
    def model(y: Tensor) -> None:
        L = y.new_tensor([[1.0, 0.0], [2.0, 0.0]])
        h = pyro.sample(
            "h", dist.MultivariateNormal(y.new_zeros(2), scale_tril=L, validate_args=False)
        )
        pyro.sample("y", dist.Normal(h[0], y.new_tensor(1.0)), obs=y)

    with pyro.validation_enabled(False):
        marginal = posterior(model, Y[0]).marginal("h")
    close(marginal.scale_tril @ marginal.scale_tril.mT, np.array([[0.5, 1.0], [1.0, 2.0]]))


# ---------------------------------------------------------------- draws


def test_draws_have_the_posterior_moments_and_a_seed() -> None:
    q = posterior(chain, tensor(1.7)[0])
    state = torch.get_rng_state()
    draws = q.sample(20_000, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(draws["v"], q.sample(20_000, seed=3)["v"])
    assert not torch.equal(q.sample(2)["v"], q.sample(2)["v"])
    mean, covariance, _ = dense_chain(1.7)
    assert draws["h_*"].shape == (4, 20_000)
    flat = torch.cat([draws["h_*"].T, draws["v"]], 1).numpy()
    error = np.sqrt(covariance.diagonal() / len(flat))
    assert (np.abs(flat.mean(0) - mean) < 4 * error).all()
    size = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    assert (np.abs(np.cov(flat.T) - covariance) < 0.05 * size).all()


def test_many_draws_go_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    q = posterior(factors, X)
    monkeypatch.setattr("pyro_em.posteriors.answers.gaussian_faces.AT_ONCE", 50)
    draws = q.sample(1000, seed=0)["h"]
    assert draws.shape == (1000, 7, 2)
    mean, covariance, _ = dense_factors()
    assert (np.abs(draws.mean(0).numpy() - mean) < 5 * np.sqrt(covariance.diagonal() / 1000)).all()


# ---------------------------------------------------------------- discrete latents apart


def beside(x: Tensor, y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
        pyro.sample("x", dist.Normal(z, y.new_tensor(1.0)), obs=x)
        h = pyro.sample("h", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(h, y.new_tensor(1.0)), obs=y)


def test_discrete_and_gaussian_latents_answer_side_by_side() -> None:
    q = posterior(beside, Y.flip(0), Y)
    p = q.probs("z")
    discrete = -float((p * p.log()).sum())
    assert q.entropy() == pytest.approx(discrete + 8 * 0.5 * math.log(math.pi * math.e), abs=1e-9)
    draws, mode = q.sample(5, seed=1), q.mode()
    assert {k: v.shape for k, v in draws.items()} == {"z": (5, 8), "h": (5, 8)}
    close(mode["h"], Y.numpy() / 2)
    assert torch.equal(mode["z"], p.argmax(-1).to(D64))
    assert "z (8,)x2, h (8,) Gaussian" in repr(q)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "site", "words"),
    [
        ("probs", "h", r"'h' is a Gaussian latent.*\n.*density(.*\n)*.*mean\('h'\)"),
        ("joint", "h", r"'h' is a Gaussian latent"),
        ("probs", "h*", r"'h' is a Gaussian latent"),
        ("mean", "z", r"'z' is a discrete latent(.*\n)*.*probs\('z'\)"),
        ("mean", "z*", r"'z\*' is a discrete latent"),
        ("covariance", "z", r"'z' is a discrete latent"),
        ("marginal", "z", r"'z' is a discrete latent"),
        ("mean", "nobody", r"no Gaussian latent of this posterior; those are: 'h'"),
        ("mean", "n*", r"Gaussian latents are: 'h'"),
    ],
)
def test_a_question_to_the_wrong_kind_of_latent(method: str, site: str, words: str) -> None:
    q = posterior(beside, Y, Y)
    with pytest.raises((UsageError, KeyError), match=words):
        getattr(q, method)(site)


def test_a_glob_with_observed_steps_among_its_own_is_refused() -> None:
    def model(y: Tensor) -> None:
        h: Any = y.new_zeros(())
        for t in range(4):
            h = pyro.sample(
                f"h_{t}", dist.Normal(h, y.new_tensor(1.0)), obs=y[0] if t == 2 else None
            )
        pyro.sample("y", dist.Normal(h, y.new_tensor(1.0)), obs=y[1])

    q = posterior(model, Y)
    for ask in (q.mean, q.covariance, q.sample(1).__getitem__):
        with pytest.raises(UsageError, match="'h_2' as well, which is observed"):
            ask("h_*")
    assert q.mean("h_[01]").shape == (2,)


# ---------------------------------------------------------------- copies


def test_copies_answer_as_the_original() -> None:
    q = posterior(factors, X)
    for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q), copy.copy(q)):
        assert isinstance(other, Posterior)
        for method in ("mean", "covariance"):
            assert torch.equal(getattr(other, method)("h"), getattr(q, method)("h"))
        assert torch.equal(other.sample(2, seed=0)["h"], q.sample(2, seed=0)["h"])
        assert other.entropy() == q.entropy() and repr(other) == repr(q)
    result = ExactPosteriorEM(factors).fit(X, max_steps=2)
    mean = result.posterior.mean("h")
    for fitted in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert torch.equal(fitted.posterior.mean("h"), mean)


# ---------------------------------------------------------------- bounds


def test_the_terms_of_the_bound_are_those_of_the_gaussian_posterior() -> None:
    terms = ExactPosteriorEM(factors).elbo(X)
    mean, covariance, evidence = dense_factors()
    entropy = 7 * 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    w, precision = W.numpy(), NOISE.numpy() ** -2
    square = (X.numpy() - mean @ w.T - MU.numpy()) ** 2 + np.einsum("ij,jk,ik->i", w, covariance, w)
    reconstruction = -0.5 * (square * precision + np.log(2 * np.pi / precision)).sum()
    assert terms.value == terms.log_evidence == pytest.approx(evidence, abs=1e-10)
    assert terms.gap == 0 and terms.exact
    assert terms.entropy == pytest.approx(entropy, abs=1e-10)
    assert terms.expected_log_joint == pytest.approx(evidence - entropy, abs=1e-10)
    assert terms.reconstruction == pytest.approx(reconstruction, abs=1e-10)
    assert terms.kl == pytest.approx(reconstruction - evidence, abs=1e-10)
    assert terms.pointwise is not None
    assert float(terms.pointwise.sum()) == pytest.approx(evidence, abs=1e-10)


def test_the_gap_of_another_posterior_is_its_divergence() -> None:
    em = ExactPosteriorEM(factors)
    mean, covariance, _ = dense_factors()
    q = em.posterior(X)
    other = {"W": W + 0.3, "mu": MU - 0.2, "noise": NOISE * 1.4}
    terms = em.elbo(X, q=q, params=other)
    p_means, p_cov = [], None
    for x in X.numpy():
        R = np.diag(other["noise"].numpy() ** 2)
        m, p_cov, _ = conditioned(
            np.zeros(2), np.eye(2), other["W"].numpy(), other["mu"].numpy(), R, x
        )
        p_means.append(m)
    ours = dist.MultivariateNormal(torch.tensor(mean), torch.tensor(covariance))
    theirs = dist.MultivariateNormal(torch.tensor(np.stack(p_means)), torch.tensor(p_cov))
    divergence = float(torch.distributions.kl_divergence(ours, theirs).sum())
    assert terms.gap == pytest.approx(divergence, abs=1e-9) and divergence > 0.1
    assert terms.entropy == q.entropy()
    assert terms.value == pytest.approx(terms.expected_log_joint + terms.entropy, abs=1e-9)


def test_an_m_step_is_that_of_the_posterior_it_is_given() -> None:
    em = ExactPosteriorEM(factors)
    q = em.posterior(X)
    em.m_step(q, X)
    wanted = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    for name, value in (("W", W + 0.3), ("mu", MU - 0.2), ("noise", NOISE * 1.4)):
        pyro.get_param_store()[name] = value
    em.m_step(q, X)
    for name, value in wanted.items():
        close(pyro.param(name).detach(), value.numpy(), 1e-9)


def test_the_icl_counts_the_entropy_of_discrete_latents_alone() -> None:
    result = ExactPosteriorEM(factors).fit(X, max_steps=2)
    assert result.icl == result.bic


# ---------------------------------------------------------------- predictions


def test_predictions_of_factors_have_the_closed_moments() -> None:
    n = 1000
    draws = ExactPosteriorEM(factors).predictive(X, num_samples=n, seed=0)
    mean, covariance, _ = dense_factors()
    w, noise = W.numpy(), np.diag(NOISE.numpy() ** 2)
    expected, spread = mean @ w.T + MU.numpy(), w @ covariance @ w.T + noise
    x = draws["x"].numpy()
    assert x.shape == (n, 7, 3) and draws["h"].shape == (n, 7, 2)
    assert (np.abs(x.mean(0) - expected) < 5 * np.sqrt(spread.diagonal() / n)).all()
    assert np.abs(np.cov((x - expected).reshape(-1, 3).T) - spread).max() < 0.1


def test_predictions_without_data_are_those_of_the_prior() -> None:
    def model(x: Tensor | None) -> None:
        with pyro.plate("rows", 50):
            h = pyro.sample("h", dist.Normal(torch.zeros(2, dtype=D64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h @ W.T + MU, NOISE).to_event(1), obs=x)

    x = ExactPosteriorEM(model).predictive(None, num_samples=200, seed=0)["x"].reshape(-1, 3)
    spread = (W @ W.T).numpy() + np.diag(NOISE.numpy() ** 2)
    assert np.abs(np.cov(x.numpy().T) - spread).max() < 0.1
    assert np.abs(x.mean(0).numpy() - MU.numpy()).max() < 0.06


def test_evidence_by_draws_of_prior_and_posterior() -> None:
    em = ExactPosteriorEM(factors)
    _, _, evidence = dense_factors()
    exact = em.estimate_evidence(X, num_particles=5, proposal="posterior")
    assert exact.value == pytest.approx(evidence, abs=1e-9)
    torch.manual_seed(0)
    drawn = em.estimate_evidence(X, num_particles=400, proposal="prior")
    assert drawn.pointwise is not None and drawn.standard_error is not None
    assert abs(drawn.value - evidence) < 5 * drawn.standard_error + 0.3


# ---------------------------------------------------------------- below discrete latents

SHIFT = tensor([2.0, 0.0, -1.0], [-1.0, 1.0, 0.5])
SCALES = tensor(1.0, 0.4)
PRIOR = tensor(0.4, 0.6)


def analysers(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR))
        h = pyro.sample("h", dist.Normal(x.new_zeros(2), SCALES[z].unsqueeze(-1)).to_event(1))
        g = pyro.sample("g", dist.Normal(x.new_zeros(()), SCALES[z]))
        pyro.sample("x", dist.Normal(h @ W.T + SHIFT[z], NOISE).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(g + z, x.new_tensor(0.5)), obs=x[:, 0])


class Analysers:
    """Everything about `analysers` by enumeration of z and dense algebra, row by row."""

    def __init__(self) -> None:
        C = np.zeros((4, 3))
        C[:3, :2], C[3, 2] = W.numpy(), 1.0
        R = np.diag([*NOISE.numpy() ** 2, 0.25])
        means, covariances, logs = [], [], []
        for z in range(2):
            b = np.append(SHIFT[z].numpy(), z)
            prior = float(SCALES[z]) ** 2 * np.eye(3)
            rows = [conditioned(np.zeros(3), prior, C, b, R, [*x, x[0]]) for x in X.numpy()]
            means.append([m for m, _, _ in rows])
            covariances.append(rows[0][1])
            logs.append([e + np.log(float(PRIOR[z])) for _, _, e in rows])
        self.means, self.covariances = np.array(means), np.array(covariances)
        self.log_evidence = np.logaddexp(*np.array(logs))
        self.weights = np.exp(np.array(logs) - self.log_evidence)
        self.mean = np.einsum("kn,knd->nd", self.weights, self.means)
        off = self.means - self.mean
        self.covariance = np.einsum("kn,kij->nij", self.weights, self.covariances) + np.einsum(
            "kn,kni,knj->nij", self.weights, off, off
        )


def test_moments_below_a_discrete_latent_are_those_of_the_mixture() -> None:
    q, by_hand = posterior(analysers, X), Analysers()
    assert q.log_evidence == pytest.approx(by_hand.log_evidence.sum(), abs=1e-10)
    close(q.probs("z"), by_hand.weights.T, 1e-10)
    close(q.mean("h"), by_hand.mean[:, :2], 1e-10)
    close(q.mean("g"), by_hand.mean[:, 2], 1e-10)
    close(q.covariance("h"), by_hand.covariance[:, :2, :2], 1e-10)
    close(q.covariance("g"), by_hand.covariance[:, 2, 2], 1e-10)
    close(q.covariance("h", "g"), by_hand.covariance[:, :2, 2], 1e-10)  # through z alone
    for site, at in (("h", slice(0, 2)), ("g", 2)):
        marginal = q.marginal(site)
        assert isinstance(marginal, dist.MixtureSameFamily) and marginal.batch_shape == (7,)
        close(marginal.mean, by_hand.mean[:, at], 1e-10)
        variance = by_hand.covariance.diagonal(axis1=1, axis2=2)
        close(marginal.variance, variance[:, at], 1e-10)


def test_entropy_and_bound_below_a_discrete_latent() -> None:
    by_hand = Analysers()
    w = by_hand.weights
    conditional = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * by_hand.covariances)[1]
    entropy = -(w * np.log(w)).sum() + (w.sum(1) * conditional).sum()
    terms = ExactPosteriorEM(analysers).elbo(X)
    assert terms.entropy == pytest.approx(entropy, abs=1e-9)
    assert terms.value == pytest.approx(by_hand.log_evidence.sum(), abs=1e-9)
    assert terms.gap == pytest.approx(0, abs=1e-9)
    again = ExactPosteriorEM(analysers).elbo(X, q={"z": torch.tensor(w.T)})
    assert again.gap == pytest.approx(0, abs=1e-9) and again.entropy == pytest.approx(entropy)
    assert terms.kl is not None and again.kl == pytest.approx(terms.kl, abs=1e-9)


def test_draws_and_mode_below_a_discrete_latent() -> None:
    q, by_hand = posterior(analysers, X), Analysers()
    draws = q.sample(8000, seed=2)
    z = draws["z"].numpy()
    both = np.concatenate([draws["h"].numpy(), draws["g"].numpy()[..., None]], -1)
    for row in range(7):
        for k in range(2):
            own = both[z[:, row] == k, row]
            if len(own) < 300:
                continue
            spread = by_hand.covariances[k]
            error = np.sqrt(spread.diagonal() / len(own))
            assert (np.abs(own.mean(0) - by_hand.means[k, row]) < 4.5 * error).all()
            assert np.abs(np.cov(own.T) - spread).max() < 0.25 * spread.diagonal().max()
    mode = q.mode()
    best = by_hand.weights.argmax(0)
    assert torch.equal(mode["z"], torch.tensor(best))
    close(mode["h"], by_hand.means[best, np.arange(7), :2], 1e-10)


def test_a_group_that_rows_read_by_index_below_a_discrete_cause() -> None:
    def model(y: Tensor, group: Tensor) -> None:
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Categorical(PRIOR))
            u = pyro.sample("u", dist.Normal(2.0 * z, SCALES[z]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(u[group], y.new_tensor(0.6)), obs=y)

    q = posterior(model, Y, GROUP)
    for k in range(3):
        y = Y.numpy()[GROUP.numpy() == k]
        C, R = np.ones((len(y), 1)), 0.36 * np.eye(len(y))
        parts = [
            conditioned(np.array([2.0 * z]), np.eye(1) * s**2, C, np.zeros(len(y)), R, y)
            for z, s in enumerate(SCALES.numpy())
        ]
        logs = np.array([e for _, _, e in parts]) + np.log(PRIOR.numpy())
        w = np.exp(logs - np.logaddexp(*logs))
        m, v = (np.array([float(np.squeeze(p[i])) for p in parts]) for i in (0, 1))
        assert float(q.mean("u")[k]) == pytest.approx(w @ m, abs=1e-10)
        assert float(q.covariance("u")[k]) == pytest.approx(w @ (v + m**2) - (w @ m) ** 2)
    drawn, mode = q.sample(5, seed=0), q.mode()
    assert drawn["u"].shape == (5, 3) and mode["u"].shape == (3,)
    copied = pickle.loads(pickle.dumps(q))
    assert torch.equal(copied.sample(5, seed=0)["u"], drawn["u"])


def test_a_covariance_through_two_chains_of_causes_is_refused() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
        w = pyro.sample("w", dist.Bernoulli(0.2 + 0.5 * z))
        a = pyro.sample("a", dist.Normal(z, y.new_tensor(1.0)))
        b = pyro.sample("b", dist.Normal(w, y.new_tensor(1.0)))
        pyro.sample("x", dist.Normal(a, y.new_tensor(1.0)), obs=y[0])
        pyro.sample("y", dist.Normal(b, y.new_tensor(1.0)), obs=y[1])

    q = posterior(model, Y)
    with pytest.raises(UsageError, match="'a' depends on discrete 'z', and 'b' on 'w'"):
        q.covariance("a", "b")


# ---------------------------------------------------------------- without observations


def network(rows: int, weights: Tensor, biases: Tensor, scales: Tensor) -> None:
    """x_i ~ N(Σ_j w_ij x_j + b_i, v_i), nothing observed."""
    with pyro.plate("rows", rows):
        x: list[Any] = []
        for i in range(len(biases)):
            mean = biases[i] + sum(weights[i, j] * x[j] for j in range(i))
            x.append(pyro.sample(f"x_{i}", dist.Normal(mean, scales[i])))


def test_without_observations_the_moments_follow_the_recurrences_of_the_prior() -> None:
    """E[x_i] = Σ_j w_ij E[x_j] + b_i and Σ_ij = Σ_k w_jk Σ_ik + I_ij v_j (Bishop 2006, 8.1.4)."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(4, 4, generator=generator, dtype=D64).tril(-1)
    weights[3, 0] = 0.0
    biases, scales = tensor(0.5, -1.0, 0.2, 2.0), tensor(1.0, 0.3, 2.0, 0.7)
    mean, covariance = np.zeros(4), np.zeros((4, 4))
    w, v = weights.numpy(), scales.numpy() ** 2
    for j in range(4):
        mean[j] = w[j] @ mean + float(biases[j])
        for i in range(j + 1):
            covariance[i, j] = covariance[j, i] = w[j] @ covariance[i] + (i == j) * v[j]
    q = posterior(network, 2, weights, biases, scales)
    close(q.mean("x_*"), np.broadcast_to(mean[:, None], (4, 2)))
    close(q.covariance("x_*"), np.broadcast_to(covariance.diagonal()[:, None], (4, 2)))
    for i in range(4):
        for j in range(4):
            close(q.covariance(f"x_{i}", f"x_{j}"), np.full(2, covariance[i, j]))
    close(q.marginal("x_3").variance, np.full(2, covariance[3, 3]))
    best, draws = q.mode(), q.sample(20_000, seed=0)
    for i in range(4):
        close(best[f"x_{i}"], np.full(2, mean[i]))
    drawn = draws["x_*"].flatten(1)  # (4, draws · 2)
    assert np.allclose(torch.cov(drawn), covariance, atol=0.04 * covariance.max())


def forecast(y: list[Tensor | None]) -> None:
    h: Any = torch.zeros((), dtype=D64)
    for t, value in enumerate(y):
        h = pyro.sample(f"h_{t}", dist.Normal(0.8 * h + 0.5, torch.tensor(0.6, dtype=D64)))
        pyro.sample(f"y_{t}", dist.Normal(h, torch.tensor(0.4, dtype=D64)), obs=value)


def test_steps_beyond_the_data_are_forecasts() -> None:
    q = posterior(forecast, [Y[0], Y[1], None, None])
    inverse = np.linalg.inv(np.eye(4) - np.diag([0.8] * 3, -1))
    prior = 0.36 * inverse @ inverse.T
    C = np.eye(4)[:2]
    mean, covariance, _ = conditioned(
        inverse @ np.full(4, 0.5), prior, C, np.zeros(2), 0.16 * np.eye(2), Y[:2].numpy()
    )
    close(q.mean("h_*"), mean)
    close(q.covariance("h_*"), covariance.diagonal())
    close(q.covariance("h_0", "h_3"), covariance[0, 3])
    close(q.mean("y_3"), mean[3])
    close(q.covariance("y_3"), covariance[3, 3] + 0.16)
    assert set(q.sample(2)) == {"h_0", "h_1", "h_2", "y_2", "h_3", "y_3"}


def test_copies_answer_for_latents_without_observations() -> None:
    q = posterior(forecast, [Y[0], Y[1], None, None])
    before = pickle.loads(pickle.dumps(q)), copy.deepcopy(q)
    wanted = q.mean("h_*")
    for other in (*before, pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert torch.equal(other.mean("h_*"), wanted)


def test_moments_without_observations_are_those_of_their_moment() -> None:
    def model(y: Tensor, x: Tensor) -> None:
        slope = pyro.param("slope", tensor(2.0)[0])
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(slope * x, y.new_tensor(1.0)), obs=y)
            pyro.sample("new", dist.Normal(slope * x, y.new_tensor(1.0)))

    em, x = ExactPosteriorEM(model), Y.clone()
    q, late = em.posterior(Y, x), em.posterior(Y, x)
    pyro.get_param_store()["slope"] = torch.tensor(7.0, dtype=D64)
    close(q.mean("new"), 2 * Y.numpy())
    x.mul_(3)
    with pytest.raises(UsageError, match="changed"):
        late.mean("new")


def test_a_prior_below_a_discrete_latent_is_a_mixture() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Categorical(PRIOR))
        pyro.sample("h", dist.Normal(3.0 * z, SCALES[z]))

    q = posterior(model)
    w, m, v = PRIOR.numpy(), np.array([0.0, 3.0]), SCALES.numpy() ** 2
    close(q.mean("h"), w @ m)
    close(q.covariance("h"), w @ (v + m**2) - (w @ m) ** 2)
    assert isinstance(q.marginal("h"), dist.MixtureSameFamily)


@pytest.mark.parametrize(
    ("site", "words"),
    [("b", r"not linear in 'a'(.*\n)*.*predictive"), ("d", "'c': it is a Gamma")],
)
def test_a_prior_that_is_not_gaussian_has_no_moments(site: str, words: str) -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(tensor(0.0)[0], 1.0))
        pyro.sample("b", dist.Normal(a.exp(), 1.0))
        c = pyro.sample("c", dist.Gamma(tensor(2.0)[0], 1.0))
        pyro.sample("d", dist.Normal(c, 1.0))

    q = posterior(model)
    assert float(q.mean("a")) == 0.0
    with pytest.raises(UsageError, match=words):
        q.mean(site)
    copied = pickle.loads(pickle.dumps(q))  # has no model that it could ask
    assert float(copied.mean("a")) == 0.0
    with pytest.raises(UsageError, match="they have no closed form"):
        copied.mean(site)


# ---------------------------------------------------------------- distributions in place of a posterior


def test_the_gap_of_a_given_distribution_is_its_divergence_from_the_posterior() -> None:
    mean, covariance, _ = dense_factors()
    p = dist.MultivariateNormal(torch.tensor(mean), torch.tensor(covariance))
    loc, scale = X[:, :2], tensor(0.7, 0.4)
    for q in (
        dist.Normal(loc, scale).to_event(1),
        dist.Normal(loc, scale),
        dist.MultivariateNormal(loc, tensor([0.5, 0.1], [0.1, 0.3])),
    ):
        own = dist.MultivariateNormal(loc, scale.square().diag_embed())
        own = q if isinstance(q, dist.MultivariateNormal) else own
        terms = ExactPosteriorEM(factors).elbo(X, q={"h": q})
        wanted = float(torch.distributions.kl_divergence(own, p).sum())
        assert terms.gap == pytest.approx(wanted, rel=1e-10)
        assert terms.entropy == pytest.approx(float(own.entropy().expand(7).sum()), rel=1e-10)
        prior = dist.MultivariateNormal(torch.zeros(2, dtype=D64), torch.eye(2, dtype=D64))
        kl = float(torch.distributions.kl_divergence(own, prior).expand(7).sum())
        assert terms.kl == pytest.approx(kl, rel=1e-10)
    terms = ExactPosteriorEM(factors).elbo(X, q={"h": p})
    assert terms.gap == pytest.approx(0, abs=1e-9)


def test_the_gap_of_a_product_of_latents_of_latents() -> None:
    y = tensor(1.7)[0]
    mean, covariance, _ = dense_chain(1.7)
    q: dict[str, Any] = {f"h_{t}": dist.Normal(tensor(0.3 * t)[0], 0.5 + t / 9) for t in range(4)}
    vector = tensor([0.6, 0.2], [0.2, 0.9])
    q["v"] = dist.MultivariateNormal(tensor(1.0, -1.0), vector)
    joint = torch.zeros(6, 6, dtype=D64)
    joint[:4, :4] = torch.diag(torch.stack([q[f"h_{t}"].variance for t in range(4)]))
    joint[4:, 4:] = vector
    own = dist.MultivariateNormal(tensor(0.0, 0.3, 0.6, 0.9, 1.0, -1.0), joint)
    p = dist.MultivariateNormal(torch.tensor(mean), torch.tensor(covariance))
    terms = ExactPosteriorEM(chain).elbo(y, q=q)
    wanted = float(torch.distributions.kl_divergence(own, p))
    assert terms.gap == pytest.approx(wanted, rel=1e-10) and terms.log_evidence is not None


def test_an_m_step_for_a_given_distribution_is_the_regression_on_its_moments() -> None:
    loc, scale = X[:, :2].clone(), tensor(0.7, 0.4)
    ExactPosteriorEM(factors).m_step({"h": dist.Normal(loc, scale).to_event(1)}, X)
    phi = np.concatenate([loc.numpy(), np.ones((7, 1))], 1)
    second = phi.T @ phi
    second[:2, :2] += 7 * np.diag(scale.numpy() ** 2)
    wanted = np.linalg.solve(second, phi.T @ X.numpy()).T
    close(pyro.param("W").detach(), wanted[:, :2], 1e-9)
    close(pyro.param("mu").detach(), wanted[:, 2], 1e-9)
    residual = X.numpy() - phi @ wanted.T
    spread = wanted[:, :2] ** 2 @ scale.numpy() ** 2
    close(pyro.param("noise").detach(), np.sqrt((residual**2).mean(0) + spread), 1e-9)


def test_given_distributions_beside_given_probabilities() -> None:
    by_hand = Analysers()
    w = torch.full((7, 2), 0.5, dtype=D64)
    q = {"z": w, "h": dist.Normal(X[:, :2], 0.5), "g": dist.Normal(X[:, 0], 0.3)}
    terms = ExactPosteriorEM(analysers).elbo(X, q=q)
    own = dist.MultivariateNormal(
        torch.cat([X[:, :2], X[:, :1]], 1), torch.diag(tensor(0.25, 0.25, 0.09))
    )
    wanted = 0.0
    for k in range(2):
        p = dist.MultivariateNormal(
            torch.tensor(by_hand.means[k]), torch.tensor(by_hand.covariances[k])
        )
        part = torch.distributions.kl_divergence(own, p) + math.log(0.5)
        wanted += float((0.5 * (part - torch.tensor(by_hand.weights[k]).log())).sum())
    assert terms.gap == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"h": torch.zeros(7, 2)}, r"'h' is a Gaussian latent(.*\n)*.*Normal\(mean, scale\)"),
        ({"h": dist.Gamma(torch.ones(7, 2), 1.0)}, "Gamma"),
        ({"h": dist.Normal(torch.zeros(6, 2), 1.0)}, r"shape is \(6, 2\); \(7, 2\) was expected"),
        ({"nobody": torch.zeros(7, 2)}, "no summed latent is called 'nobody'"),
    ],
)
def test_a_wrong_distribution_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ExactPosteriorEM(factors).elbo(X, q=given)


def test_latents_that_are_solved_together_are_given_together() -> None:
    with pytest.raises(UsageError, match="distributions are missing for 'h_1', 'h_2', 'h_3', 'v'"):
        ExactPosteriorEM(chain).elbo(tensor(1.0)[0], q={"h_0": dist.Normal(0.0, 1.0)})


# ---------------------------------------------------------------- missing entries, other defaults


def test_missing_entries_are_conditioned_on_what_is_seen() -> None:
    x = X.clone()
    x[0, 1], x[3] = math.nan, math.nan
    em = ExactPosteriorEM(factors, missing="nan")
    q = em.posterior(x)
    for row in range(7):
        seen = ~x[row].isnan().numpy()
        mean, covariance, _ = conditioned(
            np.zeros(2),
            np.eye(2),
            W.numpy()[seen],
            MU.numpy()[seen],
            np.diag(NOISE.numpy()[seen] ** 2),
            x.numpy()[row, seen],
        )
        close(q.mean("h")[row], mean)
        close(q.covariance("h")[row], covariance)
    assert em.elbo(x, q={"h": q.marginal("h")}).gap == pytest.approx(0, abs=1e-10)
    draws = em.predictive(x, num_samples=500, keep_observed=True, seed=0)["x"]
    assert torch.equal(draws[:, 1], x[1].expand(500, 3)) and not bool(draws.isnan().any())
    expected = W @ q.mean("h")[0] + MU
    spread = float(W[1] @ q.covariance("h")[0] @ W[1] + NOISE[1] ** 2)
    assert abs(float(draws[:, 0, 1].mean() - expected[1])) < 4 * math.sqrt(spread / 500)
    assert abs(float(draws[:, 0, 1].var()) - spread) < 0.3 * spread


def test_numbers_do_not_depend_on_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    entropies = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            entropies.append(posterior(factors, X).entropy())
        finally:
            torch.set_default_dtype(before)
    assert entropies[0] == entropies[1]


def test_forecasts_of_a_hidden_markov_model_are_mixtures() -> None:
    A, mu, s = tensor([0.9, 0.1], [0.3, 0.7]), tensor(-1.0, 2.0), tensor(0.5, 1.0)

    def model(x: list[Tensor | None]) -> None:
        z: Any = 0
        for t, value in enumerate(x):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s[z]), obs=value)

    q = posterior(model, [Y[0], Y[1], None, None])
    filtered = A[0] * dist.Normal(mu, s).log_prob(Y[0]).exp()
    filtered = (filtered @ A) * dist.Normal(mu, s).log_prob(Y[1]).exp()
    p = filtered / filtered.sum() @ A @ A
    mean = float(p @ mu)
    close(q.mean("x_3"), mean)
    close(q.covariance("x_3"), float(p @ (s**2 + mu**2)) - mean**2)
    with pytest.raises(UsageError, match="'x_0' as well, which is observed"):
        q.mean("x_*")


def test_the_hidden_part_of_an_observed_site_is_no_latent_to_ask_for() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(h, x.new_tensor(1.0)), obs=x, obs_mask=seen)

    q = posterior(model, Y[:3], torch.tensor([True, False, True]))
    close(q.mean("h"), Y[:3].numpy() / 2 * [1, 0, 1])
    close(q.covariance("h"), np.array([0.5, 1.0, 0.5]))
    with pytest.raises(UsageError, match="those are: 'h'"):
        q.mean("x")


def test_the_posterior_of_a_fit_answers_for_latents_without_observations() -> None:
    """As that of ``em.posterior`` does, at the parameters of the result, also when they go on."""

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", tensor(0.5)[0])
        a = pyro.sample("a", dist.Normal(mu, tensor(1.0)[0]))
        pyro.sample("ahead", dist.Normal(2 * a, tensor(0.3)[0]))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(a, tensor(1.0)[0]), obs=x)

    em = ExactPosteriorEM(model)
    result = em.fit(X[:, 0])
    q = result.posterior
    assert isinstance(q, Posterior)
    pyro.get_param_store()["mu"] = tensor(7.0)[0]
    for own in (q, pickle.loads(pickle.dumps(result)).posterior):
        torch.testing.assert_close(own.mean("ahead"), 2 * q.mean("a"))
        torch.testing.assert_close(own.covariance("ahead"), 4 * q.covariance("a") + 0.09)
    assert abs(float(em.posterior(X[:, 0]).mean("ahead") - q.mean("ahead"))) > 0.1
