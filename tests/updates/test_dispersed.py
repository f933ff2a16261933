"""Regressions with a dispersion: statsmodels, scipy on each expected log joint, autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, Fixed, PyroEMWarning
from pyro_em.families import predicted
from pyro_em.posteriors.mixtures import row_factors

N = 48
I = np.arange(N)
X = np.stack([np.ones(N), np.sin(1.7 * I), np.cos(0.9 * I + 1)], 1)
MEAN = np.exp(X @ np.array([1.1, 0.6, -0.4]))
NOISE = np.array([0.2, 1.9, 0.5, 1.1, 0.05, 2.6, 0.7, 0.9])[I % 8] * np.array([1.2, 0.8, 1])[I % 3]
COUNTS = np.floor(MEAN * NOISE)
WAITS = np.round(MEAN * NOISE + 0.05, 3)
GROUPS = np.array([[0.4, 0.5, 0.1], [1.2, -0.3, 0.2]])


def tensor(a: np.ndarray) -> Tensor:
    return torch.as_tensor(a, dtype=torch.float64)


Density = Callable[[Tensor, Tensor], dist.Distribution]

GAMMAS: dict[str, Density] = {
    "by the mean": lambda e, a: dist.Gamma(a, a * (-e).exp()),
    "over the mean": lambda e, a: dist.Gamma(a, a / e.exp()),
    "by the rate": lambda e, a: dist.Gamma(a, (-e).exp()),
}
COUNTED: dict[str, Density] = {
    "by the mean": lambda e, a: dist.NegativeBinomial(a, logits=e - a.log()),
    "by the logits": lambda e, a: dist.NegativeBinomial(a, logits=e),
    "by probabilities": lambda e, a: dist.NegativeBinomial(a, probs=torch.sigmoid(e)),
    "as mixed rates": lambda e, a: dist.GammaPoisson(a, a * (-e).exp()),
}


def regression(density: Density) -> Callable[[Tensor, Tensor], None]:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.zeros(3, dtype=torch.float64))
        a = pyro.param("a", torch.tensor(2.0, dtype=torch.float64), constraint=C.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("y", density(x @ w, a), obs=y)

    return model


def mixture(density: Density) -> Callable[[Tensor, Tensor], None]:
    def model(x: Tensor, y: Tensor) -> None:
        p = pyro.param("p", tensor(np.array([0.4, 0.6])), constraint=C.simplex)
        w = pyro.param("w", tensor(GROUPS))
        a = pyro.param("a", tensor(np.array([2.0, 1.0])), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(p))
            pyro.sample("y", density((x * w[z]).sum(-1), a[z]), obs=y)

    return model


@pytest.mark.parametrize("name", COUNTED)
def test_a_negative_binomial_regression_is_that_of_statsmodels_in_one_step(name: str) -> None:
    # statsmodels 0.15.0, NegativeBinomial(COUNTS, X).fit(method="newton")
    pyro.clear_param_store()
    em = ExactPosteriorEM(regression(COUNTED[name]))
    result = em.fit(tensor(X), tensor(COUNTS), max_steps=1, tol=0)
    assert result.log_evidence == pytest.approx(-100.6653992946175, abs=1e-9)
    assert float(result.params["a"]) == pytest.approx(1.7206787086403093, rel=1e-6)
    if "mean" in name or "mixed" in name:
        known = [0.91006151, 0.71791968, -0.47204484]
        np.testing.assert_allclose(result.params["w"], known, atol=1e-7)


@pytest.mark.parametrize("name", GAMMAS)
def test_a_gamma_regression_is_that_of_statsmodels_in_one_step(name: str) -> None:
    # statsmodels 0.15.0, GLM(WAITS, X, families.Gamma(links.Log())); the shape by scipy's brentq
    pyro.clear_param_store()
    em = ExactPosteriorEM(regression(GAMMAS[name]))
    result = em.fit(tensor(X), tensor(WAITS), max_steps=1, tol=0)
    assert result.log_evidence == pytest.approx(-101.25747825620138, abs=1e-9)
    assert float(result.params["a"]) == pytest.approx(1.2066298045228667, rel=1e-6)
    if "mean" in name:
        known = [1.11224773, 0.57974979, -0.40173987]
        np.testing.assert_allclose(result.params["w"], known, atol=1e-7)


def _numpy_em(steps: int) -> list[float]:
    """EM for a mixture of negative binomial regressions; scipy climbs in each M-step."""
    p, w, a = np.array([0.4, 0.6]), GROUPS.copy(), np.array([2.0, 1.0])
    history = []

    def log_p(w: np.ndarray, a: float) -> np.ndarray:
        mean = np.exp(X @ w)
        return stats.nbinom.logpmf(COUNTS, a, a / (a + mean))

    for _ in range(steps + 1):
        joint = np.stack([np.log(p[k]) + log_p(w[k], a[k]) for k in range(2)])
        history.append(float(special.logsumexp(joint, 0).sum()))
        r = special.softmax(joint, 0)
        p = r.mean(1)
        for k in range(2):
            found = optimize.minimize(
                lambda t, r=r[k]: -r @ log_p(t[:3], np.exp(t[3])),
                np.append(w[k], np.log(a[k])),
                method="BFGS",
                options={"gtol": 1e-7},
            )
            w[k], a[k] = found.x[:3], np.exp(found.x[3])
    return history


def test_a_mixture_takes_the_steps_of_numpy_in_one_piece_and_in_chunks() -> None:
    expected = _numpy_em(2)
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture(COUNTED["as mixed rates"]))
    result = em.fit(tensor(X), tensor(COUNTS), max_steps=2, tol=0)
    np.testing.assert_allclose([*result.history, result.log_evidence], expected, atol=2e-7)
    pyro.clear_param_store()
    chunks = Chunks(tensor(X), tensor(COUNTS), rows=20)
    parts = ExactPosteriorEM(mixture(COUNTED["by the mean"])).fit(chunks, max_steps=2, tol=0)
    np.testing.assert_allclose([*parts.history, parts.log_evidence], expected, atol=2e-7)


@pytest.mark.parametrize(
    ("density", "y"), [(GAMMAS["over the mean"], WAITS), (COUNTED["by the logits"], COUNTS)]
)
def test_many_rows_whose_weights_are_kept_in_single_precision_are_summed_in_double(
    density: Density, y: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, rows, found = tensor(np.tile(X, (9, 1))), tensor(np.tile(y, 9)), []
    for many in (2**60, 0):
        monkeypatch.setattr(row_factors, "_MANY", many)
        pyro.clear_param_store()
        found.append(ExactPosteriorEM(mixture(density)).fit(x, rows, max_steps=3, tol=0))
    wide, single = (np.array([*r.history, r.log_evidence]) for r in found)
    assert bool((wide[1:] != single[1:]).any())
    np.testing.assert_allclose(single, wide, rtol=1e-8)


@pytest.mark.parametrize("name", GAMMAS)
def test_an_m_step_ends_where_the_expected_log_joint_is_flat(name: str) -> None:
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture(GAMMAS[name]))
    x, y = tensor(X), tensor(WAITS)
    q = em.posterior(x, y)
    em.m_step(q, x, y)
    w = pyro.param("w").detach().requires_grad_()
    u = pyro.param("a").detach().log().requires_grad_()
    log_p = GAMMAS[name](x @ w.T, u.exp()).log_prob(y.unsqueeze(-1))
    for slope in torch.autograd.grad((q.probs("z") * log_p).sum(), (w, u)):
        assert float(slope.abs().max()) < 1e-7


def test_what_is_held_stays_and_the_rest_goes_to_its_maximum() -> None:
    pyro.clear_param_store()
    em = ExactPosteriorEM(regression(COUNTED["by the mean"]), updates={"a": Fixed()})
    result = em.fit(tensor(X), tensor(COUNTS), max_steps=1, tol=0)
    best = optimize.minimize(
        lambda w: -stats.nbinom.logpmf(COUNTS, 2.0, 2.0 / (2.0 + np.exp(X @ w))).sum(), np.zeros(3)
    )
    assert float(result.params["a"]) == 2.0
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-7)


def test_both_dispersion_and_mean_may_read_covariates() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.zeros(3, dtype=torch.float64))
        v = pyro.param("v", torch.zeros(2, dtype=torch.float64))
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Gamma((x[:, :2] @ v).exp(), (x @ w).exp()), obs=y)

    pyro.clear_param_store()
    result = ExactPosteriorEM(model).fit(tensor(X), tensor(WAITS), max_steps=1, tol=0)

    def loss(t: np.ndarray) -> float:
        return -stats.gamma.logpdf(WAITS, np.exp(X[:, :2] @ t[3:]), scale=np.exp(-X @ t[:3])).sum()

    best = optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-7})
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-7)


@pytest.mark.parametrize("name", ["by the mean", "by the logits"])
def test_counts_that_vary_less_than_poisson_ones_are_said_once(name: str) -> None:
    even = np.round(MEAN)
    pyro.clear_param_store()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = ExactPosteriorEM(regression(COUNTED[name])).fit(
            tensor(X), tensor(even), max_steps=3, tol=0
        )
    (only,) = [str(w.message) for w in told if issubclass(w.category, PyroEMWarning)]
    assert "'a'" in only and "site 'y' goes to Poisson counts" in only
    best = optimize.minimize(
        lambda w: -stats.poisson.logpmf(even, np.exp(X @ w)).sum(), np.array([1.0, 0, 0])
    )
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-6)


FORMS = {
    "Gamma": (predicted.GAMMA, ("concentration", "rate"), 0.7),
    "negative binomial": (predicted.NEGATIVE_BINOMIAL, ("total_count", "logits"), 4.0),
    "Gamma-Poisson": (predicted.GAMMA_POISSON, ("concentration", "rate"), 4.0),
}


@pytest.mark.parametrize("shape", [0.3, 8.5])  # the series of large shapes too
@pytest.mark.parametrize("name", FORMS)
def test_derivatives_in_predictors_are_those_of_the_density(name: str, shape: float) -> None:
    form, (first, second), x = FORMS[name]
    data = tensor(np.array(x))

    def value(at: Tensor) -> Tensor:
        own: Mapping[str, Tensor] = {first: at[0], second: at[1]}
        return form.at(form.data(data), own).value

    at = tensor(np.array([shape, -0.4]))
    bend = form.at(form.data(data), {first: at[0], second: at[1]})
    slope = torch.autograd.functional.jacobian(value, at)
    bent = torch.autograd.functional.hessian(value, at)
    size = float(bent.abs().max())
    for i, a in enumerate((first, second)):
        assert float(bend.slope[a] - slope[i]) == pytest.approx(0, abs=1e-9 * size)
        for j, b in enumerate((first, second)):
            if (a, b) in bend.curvature:
                gap = float(bend.curvature[a, b] + bent[i, j])
                assert gap == pytest.approx(0, abs=1e-8 * size)
    # Densities differ from torch's by what is free of the predictors.
    forward = {"logits": lambda t: t}
    kind = {"Gamma": dist.Gamma, "negative binomial": dist.NegativeBinomial}
    family = kind.get(name, dist.GammaPoisson)
    gaps = []
    for other in ([shape, -0.4], [1.1, 0.6]):
        args = {first: np.exp(other[0]), second: forward.get(second, np.exp)(other[1])}
        exact = family(**{n: tensor(np.array(v)) for n, v in args.items()}).log_prob(data)
        gaps.append(float(exact - value(tensor(np.array(other)))))
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-9 * size)


def test_rates_that_are_latent_have_the_same_regression_as_their_counts() -> None:
    """A Gamma latent of each row: EM goes to the negative binomial's maximum, statsmodels' number."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.zeros(3, dtype=torch.float64))
        a = pyro.param("a", torch.tensor(2.0, dtype=torch.float64), constraint=C.positive)
        with pyro.plate("n", len(x)):
            rate = pyro.sample("rate", GAMMAS["by the rate"](x @ w, a))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    pyro.clear_param_store()
    result = ExactPosteriorEM(model).fit(tensor(X), tensor(COUNTS), max_steps=25, tol=0)
    assert "Newton with" in str(result.plan) and min(np.diff(result.history)) > -1e-9
    assert result.log_evidence == pytest.approx(-100.6653992946175, abs=0.1)


def test_a_zero_among_gammas_is_named_by_its_row() -> None:
    y = WAITS.copy()
    y[3] = 0.0
    pyro.clear_param_store()
    with pytest.warns(PyroEMWarning, match="site 'y'.*n = 3"):
        ExactPosteriorEM(mixture(GAMMAS["by the mean"])).fit(tensor(X), tensor(y), max_steps=2)


@pytest.mark.parametrize("model", [regression, mixture])
def test_gammas_without_noise_are_named(model: Callable[[Density], Callable[..., None]]) -> None:
    pyro.clear_param_store()
    with pytest.warns(PyroEMWarning, match="parameter 'a'.*concentration of site 'y' would become"):
        result = ExactPosteriorEM(model(GAMMAS["by the mean"])).fit(
            tensor(X), tensor(np.exp(X @ GROUPS[0])), max_steps=8, tol=0
        )
    assert float(result.params["a"].max()) < 1e13


@pytest.mark.parametrize("counts", [COUNTS, np.full(len(COUNTS), 3.0) + np.arange(len(COUNTS)) % 2])
def test_a_component_without_data_keeps_its_dispersion(counts: np.ndarray) -> None:
    """Counts that vary, and counts that vary less than a Poisson's, all in the second component."""
    pyro.clear_param_store()
    model = mixture(COUNTED["by the mean"])
    data = tensor(X), tensor(counts)
    em = ExactPosteriorEM(model)
    q = {"z": torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(len(counts), 2)}
    em.plan(*data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroEMWarning)  # the second runs off
        em.m_step(q, *data)
    a, w = pyro.param("a").detach(), pyro.param("w").detach()
    np.testing.assert_allclose([*w[0], a[0]], [*GROUPS[0], 2.0], rtol=1e-12)
    alone = ExactPosteriorEM(regression(COUNTED["by the mean"]))
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroEMWarning)
        result = alone.fit(*data, max_steps=1, tol=0, progress=False)
    np.testing.assert_allclose(w[1], result.params["w"], rtol=1e-5)
