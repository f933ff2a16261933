"""The classics in ``models/``: linkage, a change point, a bilinear model, gradient estimators."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pyro
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp
from scipy.stats import norm, poisson

from models import bilinear, change_point, gradient_estimators, linkage
from pyro_em import ExactPosteriorEM
from tests.mains import run_main

# ---------------------------------------------------------------- linkage and blood groups


def test_linkage_has_the_published_path_rate_and_standard_error() -> None:
    animals, _ = linkage.load_data()
    em = ExactPosteriorEM(linkage.model)
    path = [float(s.params["p"]) for s in islice(em.steps(animals), 5)]
    published = [0.608247423, 0.624321050, 0.626488879, 0.626777322, 0.626815632]
    np.testing.assert_allclose(path, published, rtol=0, atol=1e-9)
    result = em.fit(animals, tol=0, max_steps=20)
    assert float(result.params["p"]) == pytest.approx((15 + math.sqrt(53809)) / 394, abs=1e-9)
    assert float(result.standard_errors()["p"]) == pytest.approx(0.0514673, abs=1e-7)
    assert linkage.missing_information(animals, result) == pytest.approx(0.1327787, abs=1e-7)
    assert result.num_rows == 197


def group_probabilities(a: float, b: float) -> np.ndarray:
    o = 1 - a - b
    return np.array([a * a + 2 * a * o, b * b + 2 * b * o, 2 * a * b, o * o])


def test_gene_counting_step_by_step_and_at_the_maximum() -> None:
    """Against gene counting by hand, Lange's estimates and Hardy-Weinberg by scipy."""
    _, groups = linkage.load_data()
    em = ExactPosteriorEM(linkage.blood_groups)
    path = torch.stack([s.params["f"] for s in islice(em.steps(groups), 6)]).numpy()
    n = groups.numpy()
    a, b, o = 0.3, 0.2, 0.5
    for step in path:
        aa, bb = n[0] * a / (a + 2 * o), n[1] * b / (b + 2 * o)
        a = (2 * aa + (n[0] - aa) + n[2]) / (2 * n.sum())
        b = (2 * bb + (n[1] - bb) + n[2]) / (2 * n.sum())
        o = 1 - a - b
        np.testing.assert_allclose(step, [a, b, o], rtol=1e-10)
    np.testing.assert_allclose(path[-1], [0.2136, 0.0501, 0.7363], atol=5e-5)  # Lange (2002)

    result = em.fit(groups, tol=0, max_steps=30)
    best = minimize(
        lambda t: -(n @ np.log(group_probabilities(*t))),
        [0.3, 0.2],
        method="Nelder-Mead",
        bounds=[(0.01, 0.45)] * 2,
        options={"xatol": 1e-10, "fatol": 1e-10},
    )
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-8)
    np.testing.assert_allclose(result.params["f"][:2], best.x, atol=1e-6)

    def loss(t: torch.Tensor) -> torch.Tensor:
        a, b, o = t[0], t[1], 1 - t[0] - t[1]
        p = torch.stack([a * a + 2 * a * o, b * b + 2 * b * o, 2 * a * b, o * o])
        return -(groups @ p.log())

    hessian = torch.autograd.functional.hessian(loss, result.params["f"][:2])
    expected = torch.linalg.inv(hessian).diagonal().sqrt()
    torch.testing.assert_close(result.standard_errors()["f"][:2], expected, rtol=1e-6, atol=0)


def test_linkage_runs(monkeypatch, capsys, tmp_path) -> None:
    out = run_main(linkage, monkeypatch, capsys, tmp_path)
    assert "0.608247423" in out and "0.1327787" in out and "0.0514673" in out
    f = np.array([0.213591, 0.050145])
    expected = 521 * group_probabilities(*f)
    chi2 = ((np.array([186, 38, 13, 284]) - expected) ** 2 / expected).sum()
    assert f"chi-squared {chi2:.3f}" in out
    assert f"{186 * f[0] / (f[0] + 2 * (1 - f.sum())):.1f} are expected to be AA" in out


# ---------------------------------------------------------------- a change point


def test_the_disasters_are_the_published_ones() -> None:
    y = change_point.load_data()
    assert (len(y), float(y.sum())) == (112, 191)
    # Carlin, Gelfand and Smith (1992): the change most probably after the 41st year, then 40, 39.
    posterior = change_point.rates_integrated_out(y)
    assert (posterior.argsort(descending=True)[:3] + 1).tolist() == [41, 40, 39]
    # Raftery and Akman (1986): around 10 March 1890; the median here is in 1890 too.
    assert int((posterior.cumsum(0) < 0.5).sum()) + change_point.FIRST == 1890


def test_the_posterior_of_the_year_and_the_evidence_by_brute_force() -> None:
    y = change_point.load_data()
    em = ExactPosteriorEM(change_point.model)
    result = em.fit(y, tol=1e-10)
    n = len(y)
    before, after = result.params["rate"].tolist()

    def by_year(rates: np.ndarray) -> np.ndarray:
        log_p = poisson.logpmf(y.numpy()[:, None], rates)  # (T, 2)
        return np.array([log_p[: k + 1, 0].sum() + log_p[k + 1 :, 1].sum() for k in range(n - 1)])

    joint = by_year(np.array([before, after])) - math.log(n - 1)
    assert result.log_evidence == pytest.approx(logsumexp(joint), abs=1e-9)
    np.testing.assert_allclose(
        result.posterior.probs("k"), np.exp(joint - logsumexp(joint)), atol=1e-10
    )
    assert int(result.posterior.mode()["k"]) == joint.argmax() == 1891 - 1851
    best = minimize(
        lambda t: -logsumexp(by_year(np.exp(t)) - math.log(n - 1)), np.log([3.0, 1.0]),
        options={"gtol": 1e-9},
    )  # fmt: skip
    np.testing.assert_allclose([before, after], np.exp(best.x), rtol=1e-4)
    assert result.log_evidence >= -best.fun - 1e-8


def test_integrating_the_rates_out_is_integration() -> None:
    y = torch.tensor([3.0, 4.0, 0.0, 1.0])
    a, b = 0.5, 0.25

    def side(counts: np.ndarray) -> float:
        def integrand(rate: float) -> float:
            prior = a * math.log(b) - gammaln(a) + (a - 1) * math.log(rate) - b * rate
            return math.exp(poisson.logpmf(counts, rate).sum() + prior)

        return quad(integrand, 0, 1)[0] + quad(integrand, 1, 60)[0]

    p = np.array([side(y[:k].numpy()) * side(y[k:].numpy()) for k in (1, 2, 3)])
    np.testing.assert_allclose(change_point.rates_integrated_out(y), p / p.sum(), rtol=1e-6)


def test_change_point_runs(monkeypatch, capsys, tmp_path) -> None:
    out = run_main(change_point, monkeypatch, capsys, tmp_path)
    assert "most probable last year before it: 1891" in out
    y = change_point.load_data().numpy()
    flat = poisson.logpmf(y, y.mean()).sum()
    assert f"{-2 * flat + math.log(112):.2f} with one rate" in out
    assert change_point._ranges(torch.tensor([1886, 1887, 1888, 1890])) == "1886-1888, 1890"


# ---------------------------------------------------------------- a bilinear model


def free_bound(m: float, n: float, s: float, t: float, r: float) -> float:
    """The bound of u ~ N(m, s²) and v ~ N(n, t²), by moments."""
    square = r * r - 2 * r * m * n + (m * m + s * s) * (n * n + t * t)
    kl = (m * m + s * s + n * n + t * t) / 2 - 1 - math.log(s * t)
    return -0.5 * math.log(2 * math.pi) - square / 2 - kl


def mean_field_bound(m: float, s: float, r: float) -> float:
    return free_bound(m, m, s, s, r)


def test_the_exact_answer_of_the_bilinear_model() -> None:
    r = bilinear.load_data()
    axis, log_p, evidence = bilinear.log_posterior(r)
    one = quad(lambda v: norm.pdf(4.0, 0, math.sqrt(1 + v * v)) * norm.pdf(v), -12, 12)[0]
    assert evidence == pytest.approx(math.log(one), abs=1e-7)
    x, w = np.polynomial.hermite_e.hermegauss(150)
    two = w @ norm.pdf(4.0, np.outer(x, x)) @ w / w.sum() ** 2
    assert evidence == pytest.approx(math.log(two), abs=1e-5)
    cell = float(axis[1] - axis[0]) ** 2
    assert float(log_p.exp().sum()) * cell == pytest.approx(1, abs=2e-3)
    top = np.unravel_index(int(log_p[400:, 400:].argmax()), (401, 401))
    np.testing.assert_allclose(axis[400:][list(top)], math.sqrt(3), atol=0.01)


def test_the_joint_density_of_the_bilinear_model() -> None:
    values = {"u": torch.tensor(0.7), "v": torch.tensor(-1.2)}
    trace = pyro.poutine.trace(pyro.poutine.condition(bilinear.model, values))
    want = norm.logpdf(0.7) + norm.logpdf(-1.2) + norm.logpdf(4.0, 0.7 * -1.2)
    got = trace.get_trace(bilinear.load_data()).log_prob_sum()
    assert float(got) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("r", [2.0, 4.0, 6.0])
def test_the_best_mean_field_guide_in_closed_form(r: float) -> None:
    m, s = math.sqrt(r - 1 - 1 / r), r**-0.5
    best = minimize(lambda t: -mean_field_bound(t[0], math.exp(t[1]), r), [1.0, -0.5])
    np.testing.assert_allclose([best.x[0], math.exp(best.x[1])], [m, s], atol=1e-4)
    assert bilinear.best_mean_field(r) == pytest.approx((m, -best.fun), abs=1e-7)
    # Nothing is gained by means or deviations of their own.
    free = minimize(lambda t: -free_bound(*t[:2], *np.exp(t[2:]), r), [0.5, 1.0, -0.2, -0.6])
    assert -free.fun == pytest.approx(-best.fun, abs=1e-7)
    if r < 3:
        return
    _, _, evidence = bilinear.log_posterior(torch.tensor(r))
    assert math.log(2) < evidence - mean_field_bound(m, s, r) < math.log(2) + 0.3


def test_the_bound_of_the_guide_and_both_estimates_of_the_evidence() -> None:
    r = bilinear.load_data()
    m, s = -math.sqrt(2.75), 0.5
    bilinear.initialize(r, (m, m))
    pyro.param("scale", r.new_full((2,), s), constraint=torch.distributions.constraints.positive)
    em = ExactPosteriorEM(bilinear.model, bilinear.guide)
    _, _, evidence = bilinear.log_posterior(r)
    bound = em.elbo(r, num_particles=200)
    assert bound.standard_error is not None
    assert abs(bound.value - mean_field_bound(m, s, 4.0)) < 4 * bound.standard_error
    guide = em.estimate_evidence(r, num_particles=1100)
    assert guide.value == pytest.approx(evidence - math.log(2), abs=0.15)  # half is never seen
    prior = em.estimate_evidence(r, num_particles=1100, proposal="prior")
    assert abs(prior.value - evidence) < 4 * prior.standard_error < 0.6
    sizes, bounds = bilinear.by_draws(guide)
    w = guide.log_weights.numpy()
    assert float(bounds[0]) == pytest.approx(w.mean())
    assert float(bounds[-1]) == pytest.approx(logsumexp(w[:1024]) - math.log(1024))
    assert sizes.tolist() == [2**j for j in range(11)]


def test_bilinear_runs_and_ends_in_the_mode_of_its_start(monkeypatch, capsys, tmp_path) -> None:
    out = run_main(bilinear, monkeypatch, capsys, tmp_path, "--steps", "200", "--draws", "256")
    fits = [line for line in out.splitlines() if line.startswith("start ")]
    means = [[float(q.split(",")[0]) for q in line.split("N(")[1:]] for line in fits]
    np.testing.assert_allclose(means, math.sqrt(2.75) * np.array([[1, 1], [-1, -1]]), atol=0.15)


# ---------------------------------------------------------------- gradient estimators


@pytest.mark.parametrize("phi", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("whose", ["plain", "library"])
def test_gradient_estimators_have_the_textbook_variances(phi: float, whose: str) -> None:
    """Moments by Gauss-Hermite quadrature; the tolerance is five standard errors of a variance."""
    n = 40_000
    make = {
        "plain": gradient_estimators.estimates,
        "library": gradient_estimators.library_estimates,
    }[whose]
    drawn = make(phi, n)
    e, w = np.polynomial.hermite_e.hermegauss(40)
    w = w / w.sum()
    x = phi + e
    single = {
        gradient_estimators.SCORE: x**2 * e,
        gradient_estimators.BASELINE: (x**2 - phi**2 - 1) * e,
        gradient_estimators.PATH: 2 * x,
    }
    assert gradient_estimators.variances(phi) == pytest.approx(
        {k: float(w @ (g - 2 * phi) ** 2) for k, g in single.items()}
    )
    for name, g in single.items():
        mean, variance = float(w @ g), float(w @ (g - w @ g) ** 2)
        spread = math.sqrt((float(w @ (g - mean) ** 4) - variance**2) / n)
        assert mean == pytest.approx(2 * phi)
        assert abs(float(drawn[name].mean()) - mean) < 5 * math.sqrt(variance / n)
        # the library's baseline is an average of n costs, not their mean
        assert abs(float(drawn[name].var()) - variance) < 5 * spread, name


def test_gradient_estimators_run(monkeypatch, capsys, tmp_path) -> None:
    out = run_main(gradient_estimators, monkeypatch, capsys, tmp_path, "--draws", "5000")
    assert "score function with a baseline" in out  # the plan
    assert "needs 56 times the draws" in out and "with a baseline 20 times" in out
