"""Step by step beside scikit-learn and hmmlearn, from the same starts and from the same seeds."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hmmlearn import hmm as hmmlearn
from sklearn.mixture import GaussianMixture as Peer

from pyro_em.sklearn import HMM, GaussianMixture
from tests.data_sets import faithful

STEPS = 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_mixtures_take_scikit_learns_steps(kind: str) -> None:
    x = faithful().double().numpy()
    options = {"covariance_type": kind, "random_state": 3, "max_iter": STEPS, "tol": 0}
    options["means_init"] = x[[0, 1, 7]] if kind in ("tied", "diag") else None
    options["init_params"] = "random" if kind == "spherical" else "kmeans"
    peer = Peer(3, reg_covar=0, **options).fit(x)
    ours = GaussianMixture(3, **options).fit(x)
    for name in ("weights_", "means_", "covariances_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(peer, name), rtol=1e-9)
    np.testing.assert_allclose(ours.predict_proba(x), peer.predict_proba(x), atol=1e-9)
    np.testing.assert_allclose(ours.score_samples(x), peer.score_samples(x), atol=1e-9)
    for question in ("score", "bic", "aic"):
        assert getattr(ours, question)(x) == pytest.approx(getattr(peer, question)(x), rel=1e-12)
    assert (ours.predict(x) == peer.predict(x)).all()
    # Going on from what the other has found changes nothing but rounding.
    at = {"weights_init": peer.weights_, "means_init": peer.means_}
    at |= {"precisions_init": peer.precisions_, "covariance_type": kind, "max_iter": 1, "tol": 0}
    once = GaussianMixture(3, **at).fit(x)
    np.testing.assert_allclose(once.means_, Peer(3, reg_covar=0, **at).fit(x).means_, rtol=1e-9)


PI = np.array([0.5, 0.3, 0.2])
A = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
LENGTHS = [9, 1, 16, 14]


def peer_of(emission: str, covariance_type: str, x: np.ndarray) -> tuple[object, dict, list[str]]:
    """A model of hmmlearn at a start, the same start for ours, and the names of what to compare."""
    common = {"n_iter": STEPS, "tol": -np.inf, "init_params": "", "implementation": "log"}
    if emission == "poisson":
        peer = hmmlearn.PoissonHMM(3, **common)
        peer.lambdas_ = x[:3] + 1.0
        return peer, {"lambdas": peer.lambdas_}, ["lambdas_"]
    if emission == "categorical":
        peer = hmmlearn.CategoricalHMM(3, **common)
        peer.emissionprob_ = np.array(
            [[0.5, 0.2, 0.2, 0.1], [0.1, 0.5, 0.2, 0.2], [0.1, 0.2, 0.2, 0.5]]
        )
        return peer, {"emissionprob": peer.emissionprob_}, ["emissionprob_"]
    plain = {"covars_prior": 0, "covars_weight": 0, "min_covar": 0}
    peer = hmmlearn.GaussianHMM(3, covariance_type, **plain, **common)
    C = np.cov(x.T, bias=True)
    covars = {
        "full": np.stack([C] * 3),
        "tied": C,
        "diag": np.stack([np.diag(C)] * 3),
        "spherical": np.full(3, np.trace(C) / 2),
    }[covariance_type]
    peer.means_, peer.covars_ = x[:3], covars
    # What hmmlearn 0.3.3 shows of spherical covariances has too many rows.
    shown = [] if covariance_type == "spherical" else ["covars_"]
    return peer, {"means": x[:3], "covars": covars}, ["means_", *shown]


@pytest.mark.parametrize(
    ("emission", "covariance_type"),
    [
        pytest.param("gaussian", "diag", marks=pytest.mark.slow),
        ("gaussian", "full"),
        ("gaussian", "tied"),
        pytest.param("gaussian", "spherical", marks=pytest.mark.slow),
        ("poisson", "diag"),
        ("categorical", "diag"),
    ],
)
def test_chains_take_hmmlearns_steps(emission: str, covariance_type: str) -> None:
    rng, N = np.random.default_rng(4), sum(LENGTHS)
    states = rng.integers(3, size=N)
    x = {
        "gaussian": rng.normal(size=(N, 2)) + np.array([[0, 0], [2, 1], [-1, 3]])[states],
        "poisson": rng.poisson(np.array([[1, 5], [9, 2], [4, 8]])[states]),
        "categorical": rng.integers(4, size=(N, 1)),
    }[emission]
    peer, start, names = peer_of(emission, covariance_type, x)
    peer.startprob_, peer.transmat_ = PI, A
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.fit(x, LENGTHS)
        ours = HMM(
            3,
            emission,
            covariance_type=covariance_type,
            init={"startprob": PI, "transmat": A, **start},
            max_iter=STEPS,
            tol=0,
        ).fit(x, lengths=LENGTHS)
    for name in ("startprob_", "transmat_", *names):
        np.testing.assert_allclose(getattr(ours, name), getattr(peer, name), atol=1e-10)
    assert ours.score(x, lengths=LENGTHS) * N == pytest.approx(peer.score(x, LENGTHS), rel=1e-12)
    np.testing.assert_allclose(
        ours.predict_proba(x, LENGTHS), peer.predict_proba(x, LENGTHS), atol=1e-10
    )
    assert (ours.predict(x, LENGTHS) == peer.predict(x, LENGTHS)).all()
    assert ours.bic(x, LENGTHS) == pytest.approx(peer.bic(x, LENGTHS), rel=1e-12)
    # Row by row: what a sequence adds to the evidence of its beginning.
    rows = ours.score_samples(x, LENGTHS)
    for n in (1, 5, 9):
        assert rows[:n].sum() == pytest.approx(peer.score(x[:n]), rel=1e-10)
    assert rows.sum() == pytest.approx(peer.score(x, LENGTHS), rel=1e-12)
