"""The models with conjugate latents, against optima that scipy finds for the compound distributions."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import scipy.optimize
import scipy.stats as st

from models import litters, pump_failures, robust_regression
from tests.mains import run_main


def minimum(loss, start: list[float]) -> tuple[np.ndarray, float]:
    found = scipy.optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-9})
    return found.x, float(found.fun)


def test_rates_of_pumps_are_negative_binomial() -> None:
    x, t = pump_failures.load_data()
    result = pump_failures.fit(x, t)

    def loss(log: np.ndarray) -> float:
        a, b = np.exp(log)
        return -st.nbinom.logpmf(x.numpy(), a, b / (b + t.numpy())).sum()

    at, value = minimum(loss, [0.0, 0.0])
    assert result.log_evidence == pytest.approx(-value, abs=1e-8)
    found = [float(result.params[n]) for n in "ab"]
    assert found == pytest.approx(np.exp(at), rel=1e-4)
    a, b = found
    means = (a + x.numpy()) / (b + t.numpy())
    assert result.posterior.mean("rate").tolist() == pytest.approx(means, rel=1e-10)


def test_litters_are_beta_binomial() -> None:
    x, n, group = litters.load_data()
    result = litters.fit(x, n, group)
    total = 0.0
    for g in range(2):
        own, of = x[group == g].numpy(), n[group == g].numpy()

        def loss(log: np.ndarray, own: np.ndarray = own, of: np.ndarray = of) -> float:
            return -st.betabinom.logpmf(own, of, *np.exp(log)).sum()

        at, value = minimum(loss, [1.0, 0.0])
        total -= value
        found = [float(result.params[p][g]) for p in "ab"]
        assert found == pytest.approx(np.exp(at), rel=1e-3)
    assert result.log_evidence == pytest.approx(total, abs=1e-7)


def test_robust_regression_is_the_published_fit() -> None:
    X, y = robust_regression.load_data()
    result = robust_regression.fit(X, y)

    def loss(p: np.ndarray) -> float:
        r = (y.numpy() - X.numpy() @ p[:4]) / np.exp(p[4])
        return -st.t.logpdf(r, np.exp(p[5])).sum() + 21 * p[4]

    _, value = minimum(loss, [-38.0, 0.8, 0.5, 0.0, 0.0, 0.0])
    assert result.log_evidence == pytest.approx(-value, abs=1e-6)
    # Lange, Little and Taylor (1989) print these digits.
    assert result.params["b"].tolist() == pytest.approx([-38.5, 0.85, 0.49, -0.07], abs=0.02)
    assert float(result.params["nu"]) == pytest.approx(1.1, abs=0.05)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (pump_failures, "Gamma(0.822269, 1.258954)"),
        (litters, "treated: 0.7400 weaned, intraclass correlation 0.3174"),
        (robust_regression, "Days of little weight: 1, 3, 4, 21."),
    ],
)
def test_main_runs(module: ModuleType, expected: str, tmp_path, monkeypatch, capsys) -> None:
    assert expected in run_main(module, monkeypatch, capsys, tmp_path)
