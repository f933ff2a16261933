"""The mixtures against published optima and against scipy's direct maximisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from models import mixtures
from models.mixtures import Fit
from tests.mains import run_main


@pytest.fixture(scope="module")
def fits() -> dict[str, Fit]:
    pyro.clear_param_store()
    return mixtures.fit_all(mixtures.load_data())


def two(w: float, each: np.ndarray) -> np.ndarray:
    """Log density of two components with weights w and 1 − w. # (N, 2) -> (N,)"""
    return logsumexp(each + np.log([w, 1 - w]), axis=1)


def poisson(v: np.ndarray, x: np.ndarray, times: np.ndarray, K: int) -> float:
    return times @ two(expit(v[0]), stats.poisson.logpmf(x[:, None], np.exp(v[1:])))


def exponential(v: np.ndarray, x: np.ndarray, K: int) -> float:
    return two(expit(v[0]), stats.expon.logpdf(x[:, None], scale=np.exp(v[1:]))).sum()


def gaussian(v: np.ndarray, x: np.ndarray, K: int) -> float:
    return two(expit(v[0]), stats.norm.logpdf(x[:, None], v[1:3], np.exp(v[3:5]))).sum()


def student_t(v: np.ndarray, x: np.ndarray, K: int) -> float:
    each = stats.t.logpdf(x[:, None], np.exp(v[5]), v[1:3], np.exp(v[3:5]))
    return two(expit(v[0]), each).sum()


def regressions(v: np.ndarray, x: np.ndarray, y: np.ndarray, K: int) -> float:
    loc = v[1:3] + x[:, None] * v[3:5]
    return two(expit(v[0]), stats.norm.logpdf(y[:, None], loc, np.exp(v[5:7]))).sum()


DIRECT: dict[str, tuple[Callable[..., float], list[float]]] = {
    "London Times": (poisson, [-0.5, 0.2, 1.0]),
    "durations": (exponential, [0.0, 0.0, 2.0]),
    "wild points": (student_t, [0.0, -2.0, 3.0, 0.0, 0.0, 1.0]),
    "wild points, Gaussian": (gaussian, [0.0, -2.0, 3.0, 1.0, 0.0]),
    "two lines": (regressions, [0.0, 1.0, 0.5, 0.8, -0.4, -0.5, -0.5]),
}


@pytest.mark.parametrize("name", DIRECT)
def test_optimum_is_that_of_direct_maximisation(name: str, fits: dict[str, Fit]) -> None:
    density, start = DIRECT[name]
    args = [getattr(a, "numpy", lambda a=a: a)() for a in fits[name].args]
    best = minimize(lambda v: -density(v, *args), start, options={"gtol": 1e-6})
    assert fits[name].result.log_evidence == pytest.approx(-best.fun, abs=1e-5)
    w = fits[name].result.params["w"]
    assert float(w.max()) == pytest.approx(max(expit(best.x[0]), expit(-best.x[0])), abs=2e-3)


@pytest.mark.parametrize(
    ("name", "optimum"),
    [("London Times", -1989.945860), ("carcinoma", -293.704979), ("values", -504.467670)],
)
def test_published_optima(name: str, optimum: float, fits: dict[str, Fit]) -> None:
    assert fits[name].result.log_evidence == pytest.approx(optimum, abs=1e-5)


def test_rows_of_the_bic_are_people_not_patterns(fits: dict[str, Fit]) -> None:
    result = fits["carcinoma"].result
    assert result.num_rows == 118
    assert result.bic == pytest.approx(2 * 293.704979 + 23 * np.log(118), abs=1e-4)
    p = result.params["p"]
    assert float(p.min()) < 1e-6 and float(p.max()) > 1 - 1e-6  # at the boundary


def test_heavy_tails_take_the_wild_points(fits: dict[str, Fit]) -> None:
    t, normal = (fits[n].result for n in ("wild points", "wild points, Gaussian"))
    truth = np.array([-2.0, 3.0])
    off = [np.abs(np.sort(r.params["loc"].numpy()) - truth).max() for r in (t, normal)]
    assert off[0] < 0.3 < 0.6 < off[1]
    assert float(t.params["scale"].max()) < 1.5 < 3 < float(normal.params["scale"].max())
    assert t.bic is not None and normal.bic is not None
    assert t.bic < normal.bic - 50


def test_made_parameters_are_found(fits: dict[str, Fit]) -> None:
    lines = fits["two lines"].result.params
    np.testing.assert_allclose(lines["b"], [0.8, -0.4], atol=0.1)
    np.testing.assert_allclose(lines["a"], [1.0, 0.5], atol=0.2)
    rates = fits["durations"].result.params["rate"].sort().values
    np.testing.assert_allclose(rates, [1 / 8, 1.0], rtol=0.2)


def test_main_runs(
    fits: dict[str, Fit],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(mixtures, "fit_all", lambda data, seed: fits)  # fitted once per file
    out = run_main(mixtures, monkeypatch, capsys, tmp_path)
    # The standard errors that test_reference_results.py asserts: 0.350029, 0.250478.
    assert "1.257 ± 0.350 and 2.664 ± 0.25" in out
    assert "closes 0.9% of what is missing" in out
    for optimum in ("-1989.945861", "-293.704979", "-504.467671"):
        assert optimum in out
