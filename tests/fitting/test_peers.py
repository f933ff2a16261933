"""Step by step beside other programs, from the same start."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hmmlearn import hmm as hmmlearn
from pyro.ops.indexing import Vindex
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from tests.data_sets import faithful
from tests.fitting.test_reference_results import gaussian_mixture

STEPS = 8


@pytest.mark.parametrize("structure", ["full", "tied", "diag", "spherical"])
def test_scikit_learn_mixtures(structure: str) -> None:
    x = faithful()
    start = x[[0, 1, 7]]
    cov = np.cov(x.numpy().T, bias=True)
    precision = {
        "full": np.stack([np.linalg.inv(cov)] * 3),
        "tied": np.linalg.inv(cov),
        "diag": np.stack([1 / np.diag(cov)] * 3),
        "spherical": np.full(3, 1 / np.diag(cov).mean().item()),
    }[structure]
    peer = GaussianMixture(
        3,
        covariance_type=structure,
        reg_covar=0,
        tol=0,
        max_iter=STEPS,
        weights_init=np.ones(3) / 3,
        means_init=start.numpy(),
        precisions_init=precision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer.fit(x.numpy())
    result = ExactPosteriorEM(gaussian_mixture(structure, 3)).fit(x, start, max_steps=STEPS, tol=0)
    np.testing.assert_allclose(result.params["mu"].numpy(), peer.means_, rtol=1e-9)
    np.testing.assert_allclose(result.params["w"].numpy(), peer.weights_, rtol=1e-9)
    probs = result.posterior.probs("z").numpy()
    np.testing.assert_allclose(probs, peer.predict_proba(x.numpy()), atol=1e-9)
    assert result.log_evidence / len(x) == pytest.approx(peer.score(x.numpy()), rel=1e-12)
    assert result.bic == pytest.approx(peer.bic(x.numpy()), rel=1e-12)
    assert result.aic == pytest.approx(peer.aic(x.numpy()), rel=1e-12)


def padded(x: np.ndarray, lengths: list[int]) -> torch.Tensor:
    rows = np.split(x, np.cumsum(lengths)[:-1])
    out = np.full((len(lengths), max(lengths), *x.shape[1:]), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.tensor(out)


def chain(y, lengths, start, emission):
    pi = pyro.param("pi", torch.tensor(start["pi"]), constraint=constraints.simplex)
    A = pyro.param("A", torch.tensor(start["A"]), constraint=constraints.simplex)
    with pyro.plate("sequences", len(lengths)):
        z = None
        for t in pyro.markov(range(int(lengths.max()))):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", emission(z), obs=y[:, t])


START = {"pi": [0.6, 0.3, 0.1], "A": [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]}


@pytest.mark.parametrize("kind", ["poisson", "gaussian", "categorical"])
def test_hmmlearn_with_sequences_of_unequal_length(kind: str) -> None:
    """Also Viterbi's path and its probability."""
    rng = np.random.default_rng(4)
    lengths = [5, 1, 9, 7]
    common = {"n_iter": STEPS, "tol": -np.inf, "init_params": "", "implementation": "log"}
    if kind == "poisson":
        x = rng.poisson(6, (sum(lengths), 1)).astype(float)
        peer = hmmlearn.PoissonHMM(3, **common)
        peer.lambdas_ = np.array([[3.0], [6.0], [10.0]])
        name, value = "rate", torch.tensor([3.0, 6.0, 10.0])

        def emission(z):
            return dist.Poisson(pyro.param("rate", value, constraint=constraints.positive)[z])

        data = padded(x[:, 0], lengths)
    elif kind == "gaussian":
        x = rng.normal(size=(sum(lengths), 2)) + rng.integers(0, 3, (sum(lengths), 1)) * 2
        peer = hmmlearn.GaussianHMM(
            3, covariance_type="full", covars_prior=0, covars_weight=1, min_covar=0, **common
        )
        peer.means_, peer.covars_ = np.array([[0.0, 0], [2, 2], [4, 4]]), np.stack([np.eye(2)] * 3)
        name, value = "mu", torch.tensor(peer.means_)

        def emission(z):
            S = pyro.param(
                "S", torch.eye(2).repeat(3, 1, 1), constraint=constraints.positive_definite
            )
            return dist.MultivariateNormal(pyro.param("mu", value)[z], S[z])

        data = padded(x, lengths)
    else:
        x = rng.integers(0, 4, (sum(lengths), 1))
        peer = hmmlearn.CategoricalHMM(3, **common)
        peer.emissionprob_ = rng.dirichlet(np.ones(4), 3)
        name, value = "E", torch.tensor(peer.emissionprob_)

        def emission(z):
            E = pyro.param("E", value, constraint=constraints.simplex)
            return dist.Categorical(Vindex(E)[z])

        data = padded(x[:, 0].astype(float), lengths).nan_to_num(nan=0).long()
    peer.startprob_, peer.transmat_ = np.array(START["pi"]), np.array(START["A"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.fit(x, lengths)

    def model(y, n):
        chain(y, n, START, emission)

    result = ExactPosteriorEM(model).fit(data, torch.tensor(lengths), max_steps=STEPS, tol=0)
    np.testing.assert_allclose(
        list(result.history), list(peer.monitor_.history)[-STEPS:], rtol=1e-8
    )
    theirs = {"rate": "lambdas_", "mu": "means_", "E": "emissionprob_"}[name]
    np.testing.assert_allclose(
        result.params[name].numpy().reshape(-1), getattr(peer, theirs).reshape(-1), rtol=1e-7
    )
    np.testing.assert_allclose(result.params["A"].numpy(), peer.transmat_, atol=1e-9)
    assert result.log_evidence == pytest.approx(peer.score(x, lengths), rel=1e-9)
    _, path = peer.decode(x, lengths)
    mode = result.posterior.mode()
    ours = [int(mode[f"z_{t}"][i]) for i, n in enumerate(lengths) for t in range(n)]
    assert ours == path.tolist()
