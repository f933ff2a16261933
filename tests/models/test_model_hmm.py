"""Hidden Markov models against hmmlearn, a plain forward pass, and brute force."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from models import hmm, hmm_variants
from pyro_em import EMResult, ExactPosteriorEM
from tests.mains import run_main

hmmlearn = pytest.importorskip("hmmlearn.hmm")


@pytest.fixture
def x() -> torch.Tensor:
    return hmm.load_data()


@pytest.fixture
def result(x: torch.Tensor) -> EMResult:
    return ExactPosteriorEM(hmm.model).fit(x, tol=1e-11)


@pytest.fixture(scope="module")
def fits() -> dict[object, EMResult]:
    """Of the variants, by model and data."""
    return {}


@pytest.fixture
def fitted_once(fits: dict[object, EMResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """What several tests fit is fitted once: a result is a value."""
    fit = hmm_variants.fit

    def kept(model: Callable[..., None], *args: torch.Tensor) -> EMResult:
        key = model, tuple(x.numpy().tobytes() for x in args)
        if key not in fits:
            fits[key] = fit(model, *args)
        return fits[key]

    monkeypatch.setattr(hmm_variants, "fit", kept)


def peer_of(result: EMResult) -> hmmlearn.PoissonHMM:
    """hmmlearn's model at our parameters."""
    peer = hmmlearn.PoissonHMM(2)
    peer.startprob_, peer.transmat_ = result.params["pi"].numpy(), result.params["A"].numpy()
    peer.lambdas_ = result.params["rate"].numpy()[:, None]
    return peer


def forward(x: np.ndarray, params: dict[str, torch.Tensor]) -> np.ndarray:
    """p(z_t | x_1..t), one step after another. # (T,) -> (T, K)"""
    pi, A, rate = (params[name].numpy() for name in ("pi", "A", "rate"))
    out: list[np.ndarray] = []
    for c in x:
        alpha = (out[-1] @ A if out else pi) * stats.poisson.pmf(c, rate)
        out.append(alpha / alpha.sum())
    return np.array(out)


def test_published_fit(x: torch.Tensor, result: EMResult) -> None:
    assert result.log_evidence == pytest.approx(-341.878701, abs=1e-5)
    rate, A = result.params["rate"], result.params["A"]
    np.testing.assert_allclose(rate, [15.420764, 26.018241], atol=1e-4)
    np.testing.assert_allclose(A, [[0.928374, 0.071626], [0.119034, 0.880966]], atol=1e-4)
    peer = peer_of(result)
    peer.n_features = 1
    ours = result.bic  # every year counts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours == pytest.approx(peer.bic(x.numpy()[:, None].astype(int)), rel=1e-9)


def test_number_of_states(x: torch.Tensor) -> None:
    """Three states reach hmmlearn's best of thirty starts, -328.5275; AIC takes three, BIC two."""
    found = hmm.numbers_of_states(x, 3)
    fits = {K: found[K] for K in (1, 2, 3)}
    assert fits[1].log_evidence == pytest.approx(stats.poisson.logpmf(x, x.mean()).sum(), rel=1e-9)
    assert fits[3].log_evidence == pytest.approx(-328.5275, abs=1e-3)
    assert found.best_row.key == (2,) and found.by("aic").best_row.key == (3,)


def test_filter_smoother_viterbi_forecast(x: torch.Tensor) -> None:
    result = ExactPosteriorEM(hmm.model).fit(x, max_steps=5, tol=0)
    counts = x.numpy().astype(int)
    peer, alpha = peer_of(result), forward(counts, dict(result.params))
    np.testing.assert_allclose(hmm.filtered(x), alpha, atol=1e-9)
    np.testing.assert_allclose(hmm.smoothed(x), peer.predict_proba(counts[:, None]), atol=1e-9)
    np.testing.assert_array_equal(hmm.decoded(x), peer.predict(counts[:, None]))
    A, rate = result.params["A"].numpy(), result.params["rate"].numpy()
    ahead = hmm.forecast(x, horizon=4, most=80)
    for h in range(4):
        weights = alpha[-1] @ np.linalg.matrix_power(A, h + 1)
        mixture = weights @ stats.poisson.pmf(np.arange(81), rate[:, None])
        np.testing.assert_allclose(ahead[h], mixture, atol=1e-10)


def test_interval() -> None:
    for level in (0.5, 0.9):
        probs = torch.tensor(stats.poisson.pmf(np.arange(80), 20.0))
        assert hmm.interval(probs, level) == stats.poisson.interval(level, 20.0)


def split(x: torch.Tensor, lengths: torch.Tensor) -> np.ndarray:
    rows = [row[:n] for row, n in zip(x, lengths.tolist(), strict=True)]
    return torch.cat(rows).numpy()[:, None]


@pytest.mark.usefixtures("fitted_once")
def test_left_to_right_gaussian_of_unequal_lengths() -> None:
    data = hmm_variants.load_data()
    x, lengths = data["patients"], data["lengths"]
    ours = hmm_variants.fit_stages(data)
    zeros = hmm_variants.STAGES == 0
    assert (ours.params["A"][zeros] == 0).all()
    assert ours.params["pi"].tolist() == [1, 0, 0]
    peer = hmmlearn.GaussianHMM(
        3, "diag", min_covar=0, covars_prior=0, covars_weight=1, means_weight=0,
        n_iter=300, tol=1e-10, init_params="", implementation="log",
    )  # fmt: skip
    peer.startprob_ = hmm_variants.FIRST.numpy()
    peer.transmat_ = hmm_variants.STAGES.numpy()
    peer.means_ = 0.8 * hmm_variants.LEVELS.numpy()[:, None]
    peer.covars_ = np.ones((3, 1))
    flat = split(x, lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.fit(flat, lengths.tolist())
    assert ours.log_evidence == pytest.approx(peer.score(flat, lengths.tolist()), abs=1e-5)
    np.testing.assert_allclose(ours.params["A"], peer.transmat_, atol=1e-3)
    np.testing.assert_allclose(ours.params["mu"], peer.means_[:, 0], atol=1e-3)
    path = hmm_variants.path_of(ours, "z", x.shape[1])
    mine = torch.cat([path[:n, i] for i, n in enumerate(lengths.tolist())])
    np.testing.assert_array_equal(mine, peer.predict(flat, lengths.tolist()))


def test_categorical_of_unequal_lengths() -> None:
    rng = np.random.default_rng(1)
    lengths = torch.tensor([4, 1, 9])
    x = torch.tensor(rng.integers(0, 3, (3, 9)))
    pi, A, E = rng.dirichlet([1, 1]), rng.dirichlet([1, 1], 2), rng.dirichlet([1, 1, 1], 2)
    start = tuple(torch.tensor(v) for v in (pi, A, E))
    ours = ExactPosteriorEM(hmm_variants.categorical).fit(x, lengths, *start, max_steps=8, tol=0)
    peer = hmmlearn.CategoricalHMM(
        2, n_iter=8, tol=-np.inf, init_params="", implementation="log", n_features=3
    )
    peer.startprob_, peer.transmat_, peer.emissionprob_ = pi, A, E
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.fit(split(x, lengths), lengths.tolist())
    np.testing.assert_allclose(list(ours.history), list(peer.monitor_.history), rtol=1e-9)
    np.testing.assert_allclose(ours.params["E"], peer.emissionprob_, atol=1e-9)


def test_factorial_against_the_joint_table() -> None:
    T = 4
    x = hmm_variants.load_data()["power"][:T]
    q = ExactPosteriorEM(hmm_variants.factorial).posterior(x)
    params = {n: v.detach().numpy() for n, v in pyro.get_param_store().items()}
    table = np.zeros([2] * (2 * T))
    for path in itertools.product(range(2), repeat=2 * T):
        z, w = (0, *path[:T]), (0, *path[T:])
        means = params["base"] + params["a"] * np.array(z[1:]) + params["b"] * np.array(w[1:])
        moves = [params["A"][z[t], z[t + 1]] * params["B"][w[t], w[t + 1]] for t in range(T)]
        table[path] = np.prod(moves) * np.prod(stats.norm.pdf(x.numpy(), means, params["sigma"]))
    assert q.log_evidence == pytest.approx(np.log(table.sum()), rel=1e-10)
    table /= table.sum()
    for t in range(T):
        others = tuple(i for i in range(2 * T) if i not in (t, T + t))
        np.testing.assert_allclose(q.joint(f"z_{t}", f"w_{t}"), table.sum(others), atol=1e-10)
    best = np.unravel_index(table.argmax(), table.shape)
    mode = q.mode()
    assert [int(mode[f"{s}_{t}"]) for s in "zw" for t in range(T)] == [int(v) for v in best]


def test_second_order_is_a_first_order_chain_on_pairs() -> None:
    """States (z_{t-1}, z_t), of which only those that share a state follow each other."""
    rng = np.random.default_rng(2)
    A, E = rng.dirichlet([1, 1], (2, 2)), rng.dirichlet([1, 1, 1], 2)
    x = rng.integers(0, 3, 20)
    start = torch.tensor(A), torch.tensor(E)
    q = ExactPosteriorEM(hmm_variants.second_order).posterior(torch.tensor(x), *start)
    peer = hmmlearn.CategoricalHMM(4, implementation="log")
    peer.startprob_ = np.array([A[0, 0, 0], A[0, 0, 1], 0, 0])
    peer.transmat_ = np.zeros((4, 4))
    for i, j, k in itertools.product(range(2), repeat=3):
        peer.transmat_[2 * i + j, 2 * j + k] = A[i, j, k]
    peer.emissionprob_ = np.vstack([E, E])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score, probs = peer.score_samples(x[:, None])
        path = peer.predict(x[:, None])
    assert q.log_evidence == pytest.approx(score, rel=1e-10)
    for t in range(20):
        np.testing.assert_allclose(q.probs(f"z_{t}"), probs[t].reshape(2, 2).sum(0), atol=1e-10)
    assert [int(q.mode()[f"z_{t}"]) for t in range(20)] == [int(p) % 2 for p in path]


@pytest.mark.usefixtures("fitted_once")
def test_what_the_variants_claim() -> None:
    data = hmm_variants.load_data()
    power = hmm_variants.fit(hmm_variants.factorial, data["power"])
    found = [float(power.params[name]) for name in ("base", "a", "b")]
    np.testing.assert_allclose(found, hmm_variants.WATTS, atol=25)
    for site, name in (("z", "fridge"), ("w", "heater")):
        path = hmm_variants.path_of(power, site, len(data[name]))
        assert (path == data[name]).double().mean() > 0.9
    one, two = hmm_variants.fit_orders(data["symbols"])
    assert two.log_evidence > one.log_evidence + 10


@pytest.mark.usefixtures("fitted_once")
@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (hmm, ["--largest", "1", "--horizon", "2"], "forecast for 2007: mean 16.19"),
        (hmm_variants, [], "memory of two steps"),
    ],
)
def test_main(module, arguments, says, tmp_path: Path, monkeypatch, capsys) -> None:
    assert says in run_main(module, monkeypatch, capsys, tmp_path, *arguments)
