"""The table: the work, the peer, the target."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_em.tracing.missing import WithMissing
from tests.benchmarks import models
from tests.benchmarks.dispersed import dispersed_mixture
from tests.benchmarks.exponential import (
    gamma_mixture,
    gamma_mixture_by_mean,
    negative_binomial_mixture,
    student_mixture,
    weibull_mixture,
)
from tests.benchmarks.regressions import logistic_mixture
from tests.benchmarks.series import system_steps
from tests.benchmarks.timing import Case, Steps

Pair = tuple[Steps, Steps]


def blobs(N: int, D: int, K: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Overlapping clusters. # (N, D)"""
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(K, D, generator=g)
    which = torch.randint(K, (N,), generator=g)
    return (centres[which] + torch.randn(N, D, generator=g)).to(dtype)


def gaussian(N: int, D: int, K: int) -> Callable[[], Pair]:
    """Against scikit-learn from the same start."""

    def make() -> Pair:
        from sklearn.mixture import GaussianMixture

        x = blobs(N, D, K)
        X, precision = x.numpy(), np.linalg.inv(torch.cov(x[:5000].T).numpy())

        def theirs(steps: int) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                GaussianMixture(
                    K,
                    tol=0,
                    max_iter=steps,
                    reg_covar=0,
                    means_init=X[:K],
                    weights_init=np.full(K, 1 / K),
                    precisions_init=np.stack([precision] * K),
                ).fit(X)

        return models.iterations(models.mixture, x, K), theirs

    return make


def gemm_flops(N: int, D: int, K: int) -> float:
    """Two products over 1 + D + D (D + 1) / 2 features."""
    return 4.0 * N * K * (D + D * (D + 1) // 2)


def precision(N: int, D: int, K: int) -> Callable[[], Pair]:
    """float32 against float64."""

    def make() -> Pair:
        single = models.iterations(models.mixture, blobs(N, D, K, torch.float32), K)
        return single, models.iterations(models.mixture, blobs(N, D, K), K)

    return make


def incomplete(N: int, D: int, K: int) -> Callable[[], Pair]:
    """A tenth of the entries missing, against the complete data."""

    def make() -> Pair:
        full = blobs(N, D, K, torch.float64)
        g = torch.Generator().manual_seed(1)
        x = full.masked_fill(torch.rand(N, D, generator=g) < 0.1, torch.nan)
        ours = models.iterations(WithMissing(models.mixture), x, K, full)
        return ours, models.iterations(models.mixture, full, K, full)

    return make


def chain_start(K: int, S: int = 0, D: int = 0) -> dict[str, Tensor]:
    """Random probabilities and spread-out means."""
    g = torch.Generator().manual_seed(1)
    out = {
        "pi": torch.ones(K) / K,
        "A": torch.rand(K, K, generator=g) + torch.eye(K),
        "E": torch.rand(K, max(S, 1), generator=g) + 0.1,
        "mu": torch.linspace(-1, 1, K).unsqueeze(-1).repeat(1, max(D, 1)),
        "s": torch.ones(K, max(D, 1)),
    }
    for name in ("A", "E"):
        out[name] = out[name] / out[name].sum(-1, keepdim=True)
    return {name: v.double() for name, v in out.items()}


def symbols(T: int, K: int, S: int = 16) -> Callable[[], Pair]:
    """One categorical chain against hmmlearn's scaling implementation."""

    def make() -> Pair:
        from hmmlearn.hmm import CategoricalHMM

        x = torch.randint(0, S, (T,), generator=torch.Generator().manual_seed(0))
        start = chain_start(K, S)

        def theirs(steps: int) -> None:
            model = CategoricalHMM(
                K, n_iter=steps, tol=-np.inf, init_params="", implementation="scaling"
            )
            model.n_features = S
            model.startprob_, model.transmat_ = start["pi"].numpy(), start["A"].numpy()
            model.emissionprob_ = start["E"].numpy()
            model.fit(x.numpy().reshape(-1, 1))

        return models.iterations(models.symbols_chain, x, K, S, start), theirs

    return make


def gaussians(B: int, T: int, K: int, D: int) -> Callable[[], Pair]:
    """Many Gaussian chains against hmmlearn's scaling implementation."""

    def make() -> Pair:
        from hmmlearn.hmm import GaussianHMM

        x = blobs(B * T, D, K).reshape(B, T, D)
        start = chain_start(K, D=D)

        def theirs(steps: int) -> None:
            model = GaussianHMM(
                K,
                "diag",
                n_iter=steps,
                tol=-np.inf,
                init_params="",
                implementation="scaling",
                covars_prior=0,
                covars_weight=1,
                min_covar=0,
            )
            model.startprob_, model.transmat_ = start["pi"].numpy(), start["A"].numpy()
            model.means_, model.covars_ = start["mu"].numpy(), start["s"].numpy()
            model.fit(x.reshape(-1, D).numpy(), [T] * B)

        return models.iterations(models.gaussian_chains, x, K, start), theirs

    return make


def without_numba(make: Callable[[], Pair]) -> Callable[[], Pair]:
    """The same work by torch alone."""

    def plain() -> Pair:
        from pyro_em.posteriors.messages import forward_backward

        ours, theirs = make()

        def slow(steps: int) -> None:
            before = forward_backward._HAS_NUMBA
            forward_backward._HAS_NUMBA = False
            try:
                ours(steps)
            finally:
                forward_backward._HAS_NUMBA = before

        return slow, theirs

    return plain


def against_trace_enum(T: int, K: int, S: int = 16) -> Callable[[], Pair]:
    """One categorical chain without numba against Pyro's TraceEnum_ELBO: its gradient alone."""

    def make() -> Pair:
        import pyro
        from pyro.infer import TraceEnum_ELBO, config_enumerate

        x = torch.randint(0, S, (T,), generator=torch.Generator().manual_seed(0))
        start = chain_start(K, S)
        ours, _ = without_numba(symbols(T, K, S))()
        elbo = TraceEnum_ELBO(max_plate_nesting=0)
        model = config_enumerate(models.symbols_chain, "parallel")

        def theirs(steps: int) -> None:
            for _ in range(steps):
                pyro.clear_param_store()
                elbo.loss_and_grads(model, lambda *args: None, x, K, S, start)

        return ours, theirs

    return make


def binary_items(N: int, J: int, K: int) -> Callable[[], Pair]:
    """Latent classes against StepMix."""

    def make() -> Pair:
        from stepmix import StepMix

        g = torch.Generator().manual_seed(0)
        p = torch.rand(K, J, generator=g)
        x = (torch.rand(N, J, generator=g) < p[torch.randint(K, (N,), generator=g)]).double()

        def theirs(steps: int) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                StepMix(
                    K,
                    measurement="binary",
                    n_init=1,
                    max_iter=steps,
                    abs_tol=0,
                    rel_tol=0,
                    random_state=0,
                    progress_bar=0,
                ).fit(x.numpy())

        return models.iterations(models.latent_class, x, K), theirs

    return make


def hidden_node(N: int) -> Callable[[], Pair]:
    """A Bayesian network with a hidden node against pgmpy's EM."""

    def make() -> Pair:
        import logging

        import pandas as pd
        from pgmpy.estimators import ExpectationMaximization
        from pgmpy.models import DiscreteBayesianNetwork

        logging.getLogger("pgmpy").setLevel(logging.ERROR)
        g = torch.Generator().manual_seed(0)
        z = torch.rand(N, generator=g) < 0.4
        p = torch.tensor([[0.2, 0.8], [0.3, 0.7], [0.6, 0.1], [0.9, 0.5], [0.4, 0.8]])
        x = (torch.rand(N, 5, generator=g) < p[:, z.long()].T).double()
        table = pd.DataFrame(x.long().numpy(), columns=[f"x{j}" for j in range(5)])
        network = DiscreteBayesianNetwork([("z", f"x{j}") for j in range(5)], latents={"z"})

        def theirs(steps: int) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ExpectationMaximization(network, table).get_parameters(
                    latent_card={"z": 2}, max_iter=steps, atol=0, n_jobs=1, show_progress=False
                )

        return models.iterations(models.hidden_cause, x), theirs

    return make


def lines(N: int, D: int, K: int) -> Callable[[], Pair]:
    """A mixture of regressions against EM written by hand in numpy."""

    def make() -> Pair:
        g = torch.Generator().manual_seed(0)
        X = torch.randn(N, D, generator=g).double()
        B = torch.randn(K, D, generator=g).double()
        which = torch.randint(K, (N,), generator=g)
        y = (B[which] * X).sum(-1) + 0.3 * torch.randn(N, generator=g).double()

        def theirs(steps: int) -> None:
            A, t = X.numpy(), y.numpy()
            w, b = np.full(K, 1 / K), np.linspace(-1, 1, K * D).reshape(K, D)
            s = np.ones(K)
            for _ in range(steps):
                residual = t - b @ A.T  # (K, N)
                log_p = np.log(w / s)[:, None] - 0.5 * (residual / s[:, None]) ** 2
                top = log_p.max(0)
                r = np.exp(log_p - top)
                r /= r.sum(0)
                mass = r.sum(1)
                w = mass / N
                for k in range(K):
                    weighted = A * r[k][:, None]
                    b[k] = np.linalg.solve(weighted.T @ A, weighted.T @ t)
                    s[k] = np.sqrt(r[k] @ (t - A @ b[k]) ** 2 / mass[k])

        return models.iterations(models.regressions, X, y, K), theirs

    return make


def digits() -> Tensor:
    """Handwritten digits, without the pixels that are always empty. # (1797, 61)"""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data, dtype=torch.float64)
    return x[:, x.std(0) > 0]


def factor_data(N: int, D: int, q: int) -> Tensor:
    """Few factors behind many features, with noise of one. # (N, D)"""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(q, D, generator=g, dtype=torch.float64)
    x = torch.randn(N, q, generator=g, dtype=torch.float64) @ w
    return x + torch.randn(N, D, generator=g, dtype=torch.float64)


def factors(data: Callable[[], Tensor], q: int) -> Callable[[], Pair]:
    """Against scikit-learn's factor analysis by exact singular values."""

    def make() -> Pair:
        from sklearn.decomposition import FactorAnalysis

        x = data()
        X = x.numpy()

        def theirs(steps: int) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                FactorAnalysis(q, tol=0, max_iter=steps, svd_method="lapack").fit(X)

        return models.iterations(models.factors, x, q), theirs

    return make


CASES = (
    Case("GMM f64, N=10k D=2 K=3", "scikit-learn", 4.0, gaussian(10_000, 2, 3), 5, 105),
    Case(
        "GMM f64, N=100k D=16 K=32", "scikit-learn", 5.0, gaussian(100_000, 16, 32), 1, 7, 3, 3,
        gemm_flops(100_000, 16, 32),
    ),
    Case(
        "GMM f64, N=1M D=8 K=16", "scikit-learn", 8.0, gaussian(1_000_000, 8, 16), 1, 5, 2, 3,
        gemm_flops(1_000_000, 8, 16),
    ),
    Case(
        "GMM f64, N=20k D=64 K=10", "scikit-learn", 1.6, gaussian(20_000, 64, 10), 1, 9, 5, 5,
    ),
    Case("GMM f32, N=100k D=16 K=32", "its own f64", 1.5, precision(100_000, 16, 32), 1, 5, 4, 5),
    Case(
        "GMM f64, N=10k D=8 K=4, 10% missing", "complete data", 0.125, incomplete(10_000, 8, 4),
        2, 32, 102, 5,
    ),
    Case("categorical HMM, T=1000 K=10", "hmmlearn scaling", 1.4, symbols(1000, 10), 5, 205),
    Case(
        "the same without numba", "TraceEnum_ELBO", 500.0, against_trace_enum(1000, 10), 1, 21, 2, 3
    ),
    Case("categorical HMM, T=10k K=32", "hmmlearn scaling", 4.0, symbols(10_000, 32), 2, 22, 12, 3),
    Case(
        "the same without numba", "hmmlearn scaling", 0.6, without_numba(symbols(10_000, 32)),
        1, 7, 7, 3,
    ),
    Case(
        "Gaussian HMM, 100 x T=500, K=5 D=4", "hmmlearn scaling", 4.0, gaussians(100, 500, 5, 4),
        1, 11, 6, 3,
    ),
    Case(
        "the same without numba", "hmmlearn scaling", 2.5,
        without_numba(gaussians(100, 500, 5, 4)), 1, 9, 6, 3,
    ),
    Case("latent class, N=10k J=10 K=3", "StepMix", 15.0, binary_items(10_000, 10, 3), 5, 405, 105, 9),
    Case("hidden-node network, N=2000", "pgmpy", 100.0, hidden_node(2000), 2, 52, 4, 3),
    Case("mixture of regressions, N=100k", "numpy by hand", 1.0, lines(100_000, 3, 3), 1, 7, 7, 3),
    Case(
        "mixture of logistic regressions, N=100k", "numpy by hand", 1.0,
        logistic_mixture(100_000, 8, 3), 2, 7, 7, 3,
    ),
    Case(
        "mixture of Gamma regressions, N=100k", "numpy by hand", 1.0,
        dispersed_mixture(100_000, 4, 3, counts=False), 2, 7, 7, 3,
    ),
    Case(
        "mixture of negative binomial regressions, N=100k", "numpy by hand", 0.7,
        dispersed_mixture(100_000, 4, 3, counts=True), 2, 7, 7, 3,
    ),
    Case("Gamma mixture, N=200k K=4", "numpy by hand", 1.0, gamma_mixture(200_000, 4), 2, 22, 22, 5),
    Case(
        "Gamma mixture by its means, N=200k K=4", "numpy by hand", 1.0,
        gamma_mixture_by_mean(200_000, 4), 2, 22, 22, 5,
    ),
    Case(
        "Weibull mixture, N=200k K=4", "numpy by hand", 1.0,
        weibull_mixture(200_000, 4), 2, 22, 12, 3,
    ),
    Case(
        "negative binomial mixture, N=200k K=4", "numpy by hand", 3.3,
        negative_binomial_mixture(200_000, 4), 2, 22, 4, 3,
    ),
    Case(
        "Student mixture, N=200k K=4", "numpy by hand", 1.4, student_mixture(200_000, 4), 2, 22, 22, 5
    ),
    Case("linear dynamical system, T=1000 n=4 D=4", "dynamax", 20.0, system_steps(1000, 4, 4), 5, 105),
    Case("factor analysis, digits q=10", "scikit-learn", 40.0, factors(digits, 10), 5, 1005, 55, 5),
    Case(
        "factor analysis, 20k x 64 q=10", "scikit-learn", 500.0,
        factors(lambda: factor_data(20_000, 64, 10), 10), 5, 1005, 10, 3,
    ),
)  # fmt: skip
