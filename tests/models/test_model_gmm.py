"""Gaussian mixtures and discriminant analysis against scikit-learn and published numbers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import EmpiricalCovariance
from sklearn.discriminant_analysis import (
    LinearDiscriminantAnalysis,
    QuadraticDiscriminantAnalysis,
)
from sklearn.mixture import GaussianMixture

from models import discriminant, gmm, gmm_missing
from tests.mains import run_main

FAITHFUL = {
    "full": -1130.263960,
    "tied": -1140.186759,
    "diagonal": -1147.806353,
    "spherical": -1709.529282,
}


@pytest.mark.parametrize("structure", gmm.STRUCTURES)
def test_optima_and_bic_of_each_structure(structure: str) -> None:
    x = gmm.load_data()
    best, _ = gmm.fit_restarts(x, 2, structure, "k-means", 1, 0, tol=1e-8)
    assert best.log_evidence == pytest.approx(FAITHFUL[structure], abs=1e-5)
    kind = {"diagonal": "diag"}.get(structure, structure)
    Sigma = gmm.covariances(best.params).numpy()
    precision = {
        "full": np.linalg.inv(Sigma),
        "tied": np.linalg.inv(Sigma[0]),
        "diag": 1 / np.diagonal(Sigma, axis1=1, axis2=2),
        "spherical": 1 / Sigma[:, 0, 0],
    }[kind]
    peer = GaussianMixture(
        2,
        covariance_type=kind,
        reg_covar=0,
        tol=1e-10,
        weights_init=best.params["w"].numpy(),
        means_init=best.params["mu"].numpy(),
        precisions_init=precision,
    ).fit(x.numpy())
    assert best.bic == pytest.approx(peer.bic(x.numpy()), abs=1e-4)
    np.testing.assert_allclose(peer.means_, best.params["mu"], atol=1e-3)


def test_selection_by_bic_finds_three_tied_components() -> None:
    """mclust's choice for Old Faithful is EEE with three components, too."""
    selection = gmm.select(gmm.load_data(), ("full", "tied"), 3)
    assert gmm.print_selection(selection) == ("tied", 3)
    assert selection["tied", 3].log_evidence == pytest.approx(-1126.315928, abs=1e-3)
    # 2 weights, 6 means, 3 entries of one covariance.
    assert selection["tied", 3].bic == pytest.approx(2 * 1126.315928 + 11 * np.log(272), abs=2e-3)
    assert min((1, 2, 3), key=lambda K: selection["full", K].bic or np.inf) == 2
    one = selection["full", 1]
    x = gmm.load_data().numpy()
    exact = multivariate_normal.logpdf(x, x.mean(0), np.cov(x.T, bias=True)).sum()
    assert one.log_evidence == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("start", ["k-means", "points", "responsibilities"])
def test_starts(start: str) -> None:
    x = gmm.load_data()
    first, again, other = (gmm.initialize(x, 3, seed, start)["z"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert start == "k-means" or not torch.equal(first, other)  # the best of ten is always one
    if start == "responsibilities":
        assert first.shape == (272, 3)
        torch.testing.assert_close(first.sum(-1), torch.ones(272))
        # Uniform on the simplex: the variance of a coordinate is 1/18.
        assert float(first.var(0).mean()) == pytest.approx(1 / 18, rel=0.25)
    else:
        assert first.shape == (272,) and set(first.tolist()) == {0, 1, 2}
    best, fits = gmm.fit_restarts(x, 2, "full", start, 3, 0, tol=1e-6)
    assert len(fits) == 3
    assert best.log_evidence == max(fit.log_evidence for fit in fits)
    assert best.log_evidence == pytest.approx(FAITHFUL["full"], abs=1e-4)


def with_labels(per_species: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, labels = discriminant.load_data()
    return x, labels, discriminant.choose(labels, per_species)


def test_all_labels_is_quadratic_discriminant_analysis() -> None:
    x, labels, known = with_labels(50)
    assert known.all()
    use = discriminant.fit(x, labels, known)
    peer = QuadraticDiscriminantAnalysis(
        solver="eigen", covariance_estimator=EmpiricalCovariance()
    ).fit(x.numpy(), labels.numpy())
    np.testing.assert_allclose(use.probs, peer.predict_proba(x.numpy()), atol=1e-8)
    closed = 0.0
    for k in range(3):
        own = x[labels == k].numpy()
        Sigma = np.cov(own.T, bias=True)
        closed += multivariate_normal.logpdf(own, own.mean(0), Sigma).sum() + 50 * np.log(1 / 3)
        np.testing.assert_allclose(use.result.params["Sigma"][k], Sigma, rtol=1e-9)
    assert use.result.log_evidence == pytest.approx(closed, abs=1e-8)


def test_a_tied_covariance_is_linear_discriminant_analysis() -> None:
    x, labels, known = with_labels(50)
    use = discriminant.fit(x, labels, known, "tied")
    peer = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), labels.numpy())
    np.testing.assert_allclose(use.probs, peer.predict_proba(x.numpy()), atol=1e-8)


def test_some_labels_lie_in_between() -> None:
    """Nested labels: max log p(x, z_seen) rises as fewer are seen, from log p(x, z) to log p(x)."""
    x, labels, _ = with_labels(50)
    uses = [discriminant.fit(x, labels, discriminant.choose(labels, n)) for n in (50, 25, 10, 0)]
    evidence = [use.result.log_evidence for use in uses]
    assert evidence == sorted(evidence)
    assert evidence[0] < evidence[1] - 1 and evidence[2] < evidence[3] - 1
    peer = GaussianMixture(
        3,
        reg_covar=0,
        tol=1e-9,
        max_iter=1000,
        means_init=uses[-1].result.params["mu"].numpy(),
        weights_init=uses[-1].result.params["w"].numpy(),
        precisions_init=np.linalg.inv(uses[-1].result.params["Sigma"].numpy()),
    ).fit(x.numpy())
    assert evidence[-1] == pytest.approx(150 * peer.score(x.numpy()), abs=1e-4)
    assert uses[0].errors(labels) <= uses[-1].errors(labels)


def test_semi_supervised_step_by_step() -> None:
    """Against EM written from the textbook: known labels keep their responsibility of one."""
    x, labels, known = with_labels(10)
    use = discriminant.fit(x, labels, known, tol=1e-9)
    X, hot = x.numpy(), np.eye(3)[labels]
    r = np.where(known.numpy()[:, None], hot, 0.0)
    for _ in range(300):
        n = r.sum(0)
        mu = r.T @ X / n[:, None]
        log_p = np.empty((150, 3))
        for k in range(3):
            d = X - mu[k]
            Sigma = (r[:, k, None] * d).T @ d / n[k]
            log_p[:, k] = np.log(n[k] / n.sum()) + multivariate_normal.logpdf(X, mu[k], Sigma)
        p = np.exp(log_p - np.logaddexp.reduce(log_p, 1, keepdims=True))
        r = np.where(known.numpy()[:, None], hot, p)
    np.testing.assert_allclose(use.result.params["mu"], mu, atol=1e-4)
    np.testing.assert_allclose(use.probs, p, atol=1e-3)
    seen = np.where(known, log_p[np.arange(150), labels], np.logaddexp.reduce(log_p, 1)).sum()
    assert use.result.log_evidence == pytest.approx(seen, abs=1e-5)


@pytest.mark.slow
def test_unlabelled_flowers_help_most_where_labels_are_few() -> None:
    x, labels = discriminant.load_data()
    curve = discriminant.learning_curve(x, labels, (6, 20), 3, "full", 0)
    gain = {size: alone - together for size, (alone, together) in curve.items()}
    assert gain[6] > 0.05
    assert gain[6] > gain[20] + 0.05


def test_what_was_lost_after_long_eruptions_biases_whole_rows_only() -> None:
    """The weight and the waiting time of long eruptions, beside those of all data; by scipy."""
    whole, x = gmm_missing.load_data()
    data = gmm_missing.treated(whole, x)
    fits = {name: gmm_missing.fit(data[name]) for name in data}
    target = fits["all data"].params
    weight = {n: abs(float(f.params["w"][1] - target["w"][1])) for n, f in fits.items()}
    waiting = {n: abs(float(f.params["mu"][1, 1] - target["mu"][1, 1])) for n, f in fits.items()}
    assert weight["missing='nan'"] < 0.01 < 0.4 < weight["whole rows only"]
    assert waiting["missing='nan'"] < 0.5 < 10 < waiting["means filled in"]
    w, mu, s = (fits["missing='nan'"].params[n].numpy() for n in ("w", "mu", "Sigma"))
    total = 0.0
    for row in x.numpy():
        o = ~np.isnan(row)
        parts = [
            w[k] * multivariate_normal.pdf(row[o], mu[k][o], s[k][np.ix_(o, o)]) for k in range(2)
        ]
        total += np.log(sum(parts))
    assert fits["missing='nan'"].log_evidence == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (gmm, ["--start", "points", "--restarts", "2"], "starts (points) end at the best one"),
        (gmm, ["--covariance", "diagonal", "--restarts", "1"], "-1147.806353"),
        (gmm, ["--select", "2"], "The lowest BIC has full covariances with K = 2."),
        (discriminant, ["--draws", "1"], "-188.375555"),
        (gmm_missing, [], "missing='nan'       272           0.646"),
    ],
)
def test_main_runs(
    module: ModuleType,
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert expected in run_main(module, monkeypatch, capsys, tmp_path, *options)
