"""A diffusion with linear steps: its bound, gap and evidence are what a joint Gaussian says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats as st
import torch

from models import diffusion
from pyro_em import ExactPosteriorEM
from tests.mains import run_main


def joint(S: np.ndarray, m: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (x, z_1, …, z_T) under the guide, as one linear map of x and ε."""
    T, D = len(beta), len(m)
    F = np.zeros(((T + 1) * D, (T + 1) * D))
    F[:D, :D] = np.linalg.cholesky(S)
    for t, b in enumerate(beta, start=1):
        own, before = slice(t * D, (t + 1) * D), slice((t - 1) * D, t * D)
        F[own] = np.sqrt(1 - b) * F[before]
        F[own, own] = np.sqrt(b) * np.eye(D)
    mean = np.concatenate([np.sqrt(np.prod(1 - beta[:t])) * m for t in range(T + 1)])
    return mean, F @ F.T


def test_bound_and_evidence_of_linear_steps_on_gaussian_data() -> None:
    torch.set_default_dtype(torch.float64)
    g = torch.Generator().manual_seed(0)
    mix = torch.tensor([[1.0, 0.8], [0.0, 0.4]])
    x = torch.randn(20_000, 2, generator=g) @ mix + torch.tensor([0.5, -0.3])
    pair = diffusion.initialize(x, T=3)
    steps, best = diffusion.best_linear_steps(x, pair.beta)

    m, S = x.mean(0).numpy(), np.cov(x.T, ddof=0)
    mean, cov = joint(S, m, pair.beta.numpy())
    for t in range(3):  # regressions of each z_t on z_{t + 1} in the joint
        own, given = slice(2 * t, 2 * t + 2), slice(2 * t + 2, 2 * t + 4)
        A = cov[own, given] @ np.linalg.inv(cov[given, given])
        assert steps["A"][t].numpy() == pytest.approx(A, abs=1e-12)
        assert steps["b"][t].numpy() == pytest.approx(mean[own] - A @ mean[given], abs=1e-12)
        assert steps["S"][t].numpy() == pytest.approx(
            cov[own, own] - A @ cov[given, own], abs=1e-12
        )

    torch.manual_seed(0)
    drawn = ExactPosteriorEM(pair.model, pair.guide, strategy="guide")
    bound = drawn.elbo(x, params=steps, num_particles=20)
    assert bound.standard_error is not None and bound.standard_error < 60  # of 40,000 nats
    assert abs(bound.value - best) < 4 * bound.standard_error

    mu, C = np.zeros(2), np.eye(2)
    for t in (2, 1, 0):
        A, b = steps["A"][t].numpy(), steps["b"][t].numpy()
        mu, C = A @ mu + b, A @ C @ A.T + steps["S"][t].numpy()
    evidence = st.multivariate_normal(mu, C).logpdf(x.numpy()).sum()
    few = x[:50]  # the filter of the library, row by row
    exact = ExactPosteriorEM(pair.model).elbo(few, params=steps).log_evidence
    assert exact == pytest.approx(st.multivariate_normal(mu, C).logpdf(few.numpy()).sum(), abs=1e-8)
    assert diffusion.evidence_of_linear_steps(x, steps) == pytest.approx(evidence, rel=1e-12)
    # Three steps do not forget all: the bound's gap is a part of what is left in z_T.
    left = st.multivariate_normal(mean[-2:], cov[-2:, -2:])
    kl = -left.entropy() + 0.5 * (
        2 * np.log(2 * np.pi) + np.trace(cov[-2:, -2:]) + mean[-2:] @ mean[-2:]
    )
    entropy = st.multivariate_normal(m, S).entropy()
    assert best / len(x) == pytest.approx(-entropy - kl, abs=1e-10)
    assert 1e-3 < (evidence - best) / len(x) < kl


@pytest.mark.slow
def test_main_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    options = ["--T", "4", "--hidden", "4", "--steps", "30", "--network-steps", "5"]
    out = run_main(diffusion, monkeypatch, capsys, tmp_path, *options, "--particles", "5")
    assert "of its marginal Gaussian (closed form)" in out
