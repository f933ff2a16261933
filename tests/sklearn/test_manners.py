"""What scikit-learn's users count on: nothing global changes, pipelines, searches, frames, pickles."""

from __future__ import annotations

import importlib
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pyro_em import AutoAmortizedNormal
from pyro_em.sklearn import HMM, GaussianMixture, LatentModel
from tests.data_sets import faithful
from tests.sklearn.test_estimator_checks import mixture


def bent(x: Tensor) -> None:
    a = pyro.param("a", lambda: x[:2].clone())
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(a[z] + 0.01 * a[z].sin(), 5.0).to_event(1), obs=x)


FRAME = pd.DataFrame(faithful().double().numpy()[:80], columns=["eruption", "waiting"])
ROWS = FRAME.to_numpy()


def test_nothing_of_the_users_changes() -> None:
    """Not the param store, not a random state, not the default precision, not the data."""
    pyro.param("means", torch.tensor(3.0))
    torch.set_default_dtype(torch.float32)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), ROWS.copy()
    estimators = [
        GaussianMixture(2, random_state=0),
        HMM(2, random_state=0),
        LatentModel(mixture, init="random", random_state=0),
    ]
    for estimator in estimators:
        estimator.fit(ROWS)
        assert estimator.predict_proba(ROWS).dtype == np.float64
        estimator.score(ROWS), estimator.sample(3)
    opaque = LatentModel(bent, tol=0.1, random_state=0).fit(ROWS)
    assert opaque.result_.standard_errors()["a"].isfinite().all()  # it runs the model
    with opaque.em() as em:
        assert float(em.score(torch.tensor(ROWS))) / len(ROWS) == pytest.approx(opaque.score(ROWS))
    assert {k: v.item() for k, v in pyro.get_param_store().items()} == {"means": 3.0}
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.get_default_dtype() == torch.float32
    assert (before[2] == ROWS).all()
    single = GaussianMixture(2, random_state=0).fit(ROWS.astype(np.float32))
    assert single.means_.dtype == single.predict_proba(ROWS.astype(np.float32)).dtype == np.float32


def test_searches_pipelines_and_frames() -> None:
    pipeline = make_pipeline(StandardScaler(), LatentModel(mixture, random_state=0, init="kmeans"))
    search = GridSearchCV(pipeline, {"latentmodel__keywords__K": [1, 2]}, cv=2).fit(FRAME)
    assert search.best_params_ == {"latentmodel__keywords__K": 2}
    assert search.best_estimator_[-1].keywords == {"K": 2} and pipeline[-1].keywords is None
    scores = []
    for train, test in ((ROWS[40:], ROWS[:40]), (ROWS[:40], ROWS[40:])):
        scaler = StandardScaler().fit(train)
        ours = GaussianMixture(2, covariance_type="diag", random_state=0)
        scores.append(ours.fit(scaler.transform(train)).score(scaler.transform(test)))
    assert search.best_score_ == pytest.approx(np.mean(scores), abs=1e-3)
    named = GaussianMixture(2, random_state=0).set_output(transform="pandas").fit(FRAME)
    assert list(named.feature_names_in_) == ["eruption", "waiting"]
    assert list(named.transform(FRAME).columns) == ["gaussianmixture0", "gaussianmixture1"]
    np.testing.assert_array_equal(named.transform(FRAME), named.predict_proba(FRAME))


def test_estimators_in_threads_take_turns() -> None:
    starts = [GaussianMixture(2, random_state=s) for s in range(2)]
    with ThreadPoolExecutor(2) as pool:
        fitted = list(pool.map(lambda e: e.fit(ROWS), starts))
    assert fitted[0].score(ROWS) == pytest.approx(clone(starts[0]).fit(ROWS).score(ROWS))


@pytest.mark.parametrize("make", [GaussianMixture, HMM])
def test_pickles_draws_and_second_fits(make: type) -> None:
    estimator = make(2, random_state=0, max_iter=20).fit(ROWS)
    copied = pickle.loads(pickle.dumps(estimator))
    assert not hasattr(copied, "result_") and len(pickle.dumps(estimator)) < 10_000
    np.testing.assert_array_equal(copied.predict_proba(ROWS), estimator.predict_proba(ROWS))
    x, z = copied.sample(400)
    assert x.shape == (400, 2) and z.shape == (400,)
    for k in range(2):
        spread = x[z == k].std(0) / (z == k).sum() ** 0.5
        assert (abs(x[z == k].mean(0) - estimator.means_[k]) < 4 * spread).all()
    going = estimator.set_params(warm_start=True).fit(ROWS)
    assert going.n_iter_ <= 6 and going.lower_bound_ >= copied.lower_bound_ - 1e-12
    assert clone(estimator).get_params() == estimator.get_params()


def analysis(x: Tensor) -> None:
    W = pyro.param("W", lambda: torch.tensor([[1.0], [5.0]]))
    mu, s = pyro.param("mu", lambda: x.mean(0)), pyro.param("s", torch.ones(2))
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(mu + h @ W.T, s.exp()).to_event(1), obs=x)


def test_scores_of_factors_are_posterior_means() -> None:
    estimator = LatentModel(analysis, tol=1.0).fit(ROWS)
    W, mu, psi = (estimator.params_[n] for n in ("W", "mu", "s"))
    precision = np.linalg.inv(W @ W.T + np.diag(np.exp(2 * psi)))
    np.testing.assert_allclose(estimator.transform(ROWS), (ROWS - mu) @ precision @ W, atol=1e-10)
    with pytest.raises(ValueError, match="have no discrete latent"):
        estimator.predict(ROWS)


class Curved(pyro.nn.PyroModule):
    """A latent without an exact posterior, and a network of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(1, 2).double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(h.tanh()), 1.0).to_event(1), obs=x)


def test_guides_that_draw_answer_alike_each_time() -> None:
    module = Curved()
    before = module.decoder.weight.detach().clone()
    estimator = LatentModel(module, AutoAmortizedNormal, max_iter=3, random_state=0)
    first, second = (clone(estimator).fit(ROWS[:5]) for _ in range(2))
    assert torch.equal(module.decoder.weight, before)
    assert first.converged_ is None and first.lower_bound_ == second.lower_bound_
    assert first.score(ROWS[:5]) == first.score(ROWS[:5]) == second.score(ROWS[:5])
    np.testing.assert_array_equal(first.transform(ROWS[:5]), second.transform(ROWS[:5]))


SPREADLESS = np.c_[ROWS, np.ones(len(ROWS))]
HOLES = np.where(ROWS > 80, np.nan, ROWS)


@pytest.mark.parametrize(
    ("estimator", "X", "words"),
    [
        (GaussianMixture(2), ROWS[:, 0], "Expected 2D array"),
        (GaussianMixture(2), [["long"], ["short"]], "could not convert string"),
        (GaussianMixture(2), HOLES, "contains NaN"),
        (GaussianMixture(2), scipy.sparse.csr_matrix(ROWS), "Sparse data"),
        (GaussianMixture(81), ROWS, "pass n_components=80 or fewer"),
        (GaussianMixture("two"), ROWS, "n_components='two'"),
        (GaussianMixture(2, covariance_type="diagonal"), ROWS, "pass 'full', 'tied'"),
        (GaussianMixture(2, init_params="k-means"), ROWS, "pass 'kmeans'"),
        (GaussianMixture(2, means_init=[[0.0, 0.0]]), ROWS, r"shape \(2, 2\)"),
        (GaussianMixture(2, weights_init=[2.0, 3.0]), ROWS, "sum to one"),
        (GaussianMixture(2, precisions_init=-np.ones((2, 2, 2))), ROWS, "positive definite"),
        (GaussianMixture(2, reg_covar=-1.0), ROWS, "reg_covar=-1"),
        (GaussianMixture(2, reg_covar=0.0, random_state=0), SPREADLESS, "pass reg_covar=1e-6"),
        (HMM(2, emission="normal"), ROWS, "pass 'gaussian'"),
        (HMM(2, emission="poisson"), ROWS, "3.6 is none"),
        (HMM(2, emission="categorical"), ROWS.round(), "2 columns"),
        (HMM(2, init={"mean": ROWS[:2]}), ROWS, "'mean' is no parameter"),
        (LatentModel(mixture, keywords=["K"]), ROWS, "pass keywords="),
        (LatentModel(mixture, fit_options={"tol": 1.0}), ROWS, "'tol' is given twice"),
        (LatentModel(mixture, keywords={"L": 3}), ROWS, "L"),
    ],
)
def test_a_newcomers_mistakes_get_a_sentence(estimator, X, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        estimator.fit(X)
    assert not type(caught.value).__name__.startswith("_")
    with pytest.raises(NotFittedError):
        estimator.predict(ROWS)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch) -> None:
    for name in [m for m in sys.modules if m.startswith("pyro_em.sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-em\[sklearn\]'"):
        importlib.import_module("pyro_em.sklearn")


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="pass lengths by name"):
        HMM(2).fit(ROWS, [40, 40])
    for lengths, words in (
        ([40, 30], "70 rows together"),
        ([80.0], "no lengths"),
        ([81, -1], "no len"),
    ):
        with pytest.raises(ValueError, match=words):
            HMM(2).fit(ROWS, lengths=lengths)


def test_a_fit_that_is_cut_short_says_so() -> None:
    mixture = GaussianMixture(3, random_state=0, max_iter=60)
    with pytest.warns(ConvergenceWarning, match="GaussianMixture did not converge"):
        mixture.fit(ROWS)
    short = mixture.lower_bound_
    assert mixture.set_params(acceleration="auto").fit(ROWS).converged_
    assert mixture.lower_bound_ > short


def test_covariances_stay_above_their_bound() -> None:
    """Where scikit-learn adds to them, they are bounded: a column without spread has that much."""
    flat = GaussianMixture(2, reg_covar=1e-4, random_state=0).fit(SPREADLESS)
    assert np.linalg.eigvalsh(flat.covariances_)[:, 0] == pytest.approx([1e-4, 1e-4])
    plain = GaussianMixture(2, reg_covar=0, random_state=0).fit(ROWS)
    np.testing.assert_allclose(flat.covariances_[:, :2, :2], plain.covariances_, rtol=1e-6)


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_the_bound_is_the_constrained_maximum(kind: str) -> None:
    """Of one component: the eigenvalues of the sample's covariance, raised to the bound."""
    values, vectors = np.linalg.eigh(np.cov(ROWS.T, bias=True))
    least = 2.0 * values[0]
    fitted = GaussianMixture(1, covariance_type=kind, reg_covar=least).fit(ROWS)
    expected = vectors @ np.diag(values.clip(least)) @ vectors.T
    np.testing.assert_allclose(fitted.covariances_.reshape(2, 2), expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_chains_that_nearly_underflow_are_summed_all_the_same() -> None:
    """A state that cannot be left has to explain a row that only the other one would."""
    start = {
        "startprob": [1, 0],
        "transmat": np.eye(2),
        "means": [[0], [100]],
        "covars": [[1], [1]],
    }
    estimator = HMM(2, init=start).fit(ROWS[:, :1] - ROWS[:, :1].mean())
    x, s = np.array([[0.0], [90.0]]), estimator.covariances_[0, 0]
    each = -0.5 * (x[:, 0] - estimator.means_[0, 0]) ** 2 / s - 0.5 * np.log(2 * np.pi * s)
    np.testing.assert_allclose(estimator.score_samples(x), each, rtol=1e-12)
    assert estimator.score(x) == pytest.approx(each.mean(), rel=1e-12)
    assert estimator.predict_proba(x).tolist() == [[1.0, 0.0]] * 2
    assert estimator.predict(x).tolist() == [0, 0]


def test_symbols_that_are_new_are_told() -> None:
    estimator = HMM(2, "categorical", random_state=0).fit([[0], [1], [1], [0], [2]])
    with pytest.raises(ValueError, match="symbol 3 is new"):
        estimator.predict([[3]])
    with pytest.raises(ValueError, match="-1 is none"):
        estimator.predict([[-1]])


def test_answers_are_those_of_the_model_that_was_fitted() -> None:
    """Parameters that are set afterwards are for the next fit, which does not go on from another."""
    fitted = HMM(2, random_state=0, warm_start=True).fit(ROWS, lengths=[30, 50])
    before = fitted.predict_proba(ROWS), fitted.score(ROWS)
    fitted.set_params(n_components=3, covariance_type="full", emission="poisson")
    np.testing.assert_array_equal(fitted.predict_proba(ROWS), before[0])
    assert fitted.score(ROWS) == before[1]
    with pytest.raises(ValueError, match="n_components was 2"):
        fitted.fit(ROWS)
    counts = ROWS.round()
    again = fitted.set_params(warm_start=False, n_components=2, tol=1.0)
    labels = again.fit_predict(counts, lengths=[30, 50])
    assert (labels == again.predict(counts, [30, 50])).all() and again.lambdas_.shape == (2, 2)
