"""Bayesian linear regression whose hyperparameters are learned: how much should weights shrink?

    w ~ N(0, τ² I),   y_n ~ N(w · x_n, σ²),   τ, σ = argmax log p(y; τ, σ)

Ridge regression with its penalty σ²/τ² chosen by the evidence rather than by cross-validation. The
weights are latents that all rows read; their posterior is exact, and EM moves τ and σ to where the
evidence is highest: γ of the ten weights are determined by the data and not by the prior,

    γ = Σ_i (1 − Var(w_i | y) / τ²),

which is also MacKay's fixed point τ² = |E w|² / γ. Run it: ``python -m models.bayesian_regression``.

Source: MacKay (1992), "Bayesian interpolation"; Bishop (2006), section 9.3.4, for EM; data of Efron,
Hastie, Johnstone and Tibshirani (2004).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, Posterior


def model(X: Tensor, y: Tensor) -> None:
    """Weights under a prior whose scale is learned. # X: (N, D), y: (N,)"""
    tau = pyro.param("tau", y.new_tensor(1.0), constraint=constraints.positive)
    sigma = pyro.param("sigma", y.new_tensor(1.0), constraint=constraints.positive)
    w = pyro.sample("w", dist.Normal(X.new_zeros(X.shape[1]), tau).to_event(1))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Normal(X @ w, sigma), obs=y)


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[str]]:
    """Diabetes: measurements and the disease's progress, all with mean 0 and variance 1.

    Returns:
        # (442, 10), (442,), 10 names
    """
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    X, y = torch.tensor(data.data, dtype=dtype), torch.tensor(data.target, dtype=dtype)
    X = (X - X.mean(0)) / X.std(0, unbiased=False)
    return X, (y - y.mean()) / y.std(unbiased=False), list(data.feature_names)


def fit(X: Tensor, y: Tensor) -> EMResult:
    """To rounding, from the model's own start, in a parameter scope of its own."""
    with pyro.get_param_store().scope():
        result = ExactPosteriorEM(model).fit(X, y, tol=1e-11, max_steps=500)
        assert isinstance(result, EMResult)
        return result


def determined(result: EMResult) -> float:
    """γ, the number of weights that the data determine."""
    assert isinstance(result.posterior, Posterior)
    variance = result.posterior.covariance("w").diagonal()
    return float((1 - variance / result.params["tau"] ** 2).sum())


def evidence_along(X: Tensor, y: Tensor, tau: Tensor, sigma: Tensor) -> Tensor:
    """log p(y; τ, σ) for several τ, in nats. # like tau"""
    prior = tau[:, None, None] ** 2 * (X @ X.T) + sigma**2 * torch.eye(len(y)).to(y)
    zero = torch.zeros_like(y)
    return dist.MultivariateNormal(zero, prior).log_prob(y)


def draw(X: Tensor, y: Tensor, result: EMResult, names: list[str], path: Path) -> None:
    """The evidence over τ, and the weights with 95% intervals beside least squares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tau = torch.logspace(-2.0, 0.7, 40, dtype=y.dtype)
    left.semilogx(tau, evidence_along(X, y, tau, result.params["sigma"]), color="#1f77b4")
    left.axvline(float(result.params["tau"]), color="#d95f02", label="EM")
    left.set_xlabel("τ, standard deviation of the weights")
    left.set_ylabel("log evidence (nats)")
    left.legend(frameon=False)
    assert isinstance(result.posterior, Posterior)
    w = result.posterior.mean("w")
    deviation = result.posterior.covariance("w").diagonal().sqrt()
    places = torch.arange(len(w))
    right.errorbar(places, w, yerr=1.96 * deviation, fmt="o", color="#1f77b4", label="posterior")
    right.plot(
        places, torch.linalg.lstsq(X, y).solution, "x", color="#d95f02", label="least squares"
    )
    right.set_xticks(places.tolist(), names)
    right.set_ylabel("weight")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Bayesian regression, its evidence maximised.")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is random")
    parser.add_argument("--figure", type=Path, default=Path("figures/bayesian_regression.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    X, y, names = load_data()
    with pyro.get_param_store().scope():
        print(f"{ExactPosteriorEM(model).plan(X, y)}\n")
    result = fit(X, y)
    print(result)
    tau, sigma = float(result.params["tau"]), float(result.params["sigma"])
    print(f"\nτ = {tau:.6f}, σ = {sigma:.6f}: a ridge penalty of {(sigma / tau) ** 2:.4f}")
    print(f"The data determine γ = {determined(result):.4f} of {X.shape[1]} weights.\n")
    assert isinstance(result.posterior, Posterior)
    mean = result.posterior.mean("w")
    deviation = result.posterior.covariance("w").diagonal().sqrt()
    alone = torch.linalg.lstsq(X, y).solution
    print("      least squares  posterior")
    for name, a, m, d in zip(names, alone, mean, deviation, strict=True):
        print(f"{name:4s}  {float(a):13.4f}  {float(m):9.4f} ± {float(d):.4f}")
    try:
        draw(X, y, result, names, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
