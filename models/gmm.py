"""A Gaussian mixture with full covariances, fitted to Old Faithful.

    p(x) = Σ_k w_k N(x; μ_k, Σ_k)

Run it: ``python -m models.gmm``; with ``--guide`` the responsibilities come from an amortised guide
instead of the E-step, and the gap of log p(x) = ELBO + KL(q ‖ posterior) is printed.

Data: eruption lengths (min) and waiting times (min) of the Old Faithful geyser, 272 rows (Azzalini
and Bowman 1990).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM

HERE = Path(__file__).parent


def model(x: Tensor, K: int = 2) -> None:
    """A mixture of K Gaussians. # x: (N, D)"""
    spread = torch.cov(x.T, correction=0)
    w = pyro.param("w", x.new_ones(K) / K, constraint=constraints.simplex)
    mu = pyro.param("mu", x[:K].clone())
    Sigma = pyro.param("Sigma", spread.repeat(K, 1, 1), constraint=constraints.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], Sigma[z]), obs=x)


def guide(x: Tensor, K: int = 2) -> None:
    """q(z_n | x_n) = softmax(a quadratic of x_n), which contains the exact posterior. # x: (N, D)"""
    scaled = (x - x.mean(0)) / x.std(0)
    i, j = torch.tril_indices(x.shape[1], x.shape[1])
    features = torch.cat([torch.ones_like(x[:, :1]), scaled, scaled[:, i] * scaled[:, j]], -1)
    B = pyro.param("B", x.new_zeros(features.shape[1], K))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=features @ B))


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Old Faithful: eruption length and waiting time, both in minutes. # (272, 2)"""
    with open(HERE / "data" / "old_faithful.csv") as file:
        rows = list(csv.reader(file))[1:]
    return torch.tensor([[float(v) for v in row] for row in rows], dtype=dtype)


def initialize(x: Tensor, K: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """k-means labels of standardised data, where scikit-learn is installed; else random ones."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return {"z": torch.randint(K, (len(x),), generator=torch.Generator().manual_seed(seed))}
    scaled = (x - x.mean(0)) / x.std(0)
    labels = KMeans(K, n_init=10, random_state=seed).fit_predict(scaled.numpy())
    return {"z": torch.as_tensor(labels).long()}


def draw(x: Tensor, result: EMResult, path: Path) -> None:
    """The data in the colours of their responsibilities, the components, the evidence per step."""
    from matplotlib.figure import Figure

    from pyro_em import plotting

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plotting.responsibilities(x, result.posterior.probs("z"), left)
    plotting.ellipses(result.params["mu"], result.params["Sigma"], left)
    left.set_xlabel("eruption length (min)")
    left.set_ylabel("waiting time to the next eruption (min)")
    left.set_title("Old Faithful: 50% and 95% of each component")
    plotting.evidence(result, right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def compare_with_guide(x: Tensor, K: int, exact: float, steps: int, seed: int) -> None:
    """Fit model and guide together by stochastic steps, from the start of the exact fit.

    Args:
        x: Data. # (N, D)
        K: Number of components.
        exact: The log evidence that exact EM reached.
        steps: Number of steps of Adam.
        seed: Of the start.
    """
    pyro.clear_param_store()
    labels = initialize(x, K, seed)["z"]
    q = {"z": torch.nn.functional.one_hot(labels, K).to(x.dtype)}
    ExactPosteriorEM(model).m_step(q, x, K)
    em = ExactPosteriorEM(
        model, guide, lambda params: torch.optim.Adam(params, lr=0.1), strategy="guide"
    )
    print(f"\n{em.plan(x, K)}\n")
    em.fit(x, K, max_steps=steps, seed=seed, progress=True)
    terms = em.elbo(x, K)
    print(f"\nbound          {terms.value:.6f} after {steps} steps")
    print(f"exact evidence {terms.log_evidence:.6f} at the same parameters")
    print(f"gap            {terms.gap:.6f} = KL(q ‖ posterior)")
    print(f"exact EM       {exact:.6f}")


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Fit a Gaussian mixture to Old Faithful.")
    parser.add_argument("-K", type=int, default=2, help="number of components")
    parser.add_argument("--guide", action="store_true", help="also fit with an amortised guide")
    parser.add_argument("--steps", type=int, default=3000, help="steps with the guide")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/gmm.png"))
    options = parser.parse_args()

    x = load_data()
    em = ExactPosteriorEM(model)
    print(em.plan(x, options.K), end="\n\n")
    start = initialize(x, options.K, options.seed)
    result = em.fit(x, options.K, init=start, seed=options.seed, tol=1e-8, progress=True)
    print(f"\n{result}\n")
    for k in range(options.K):
        print(f"component {k}: weight {result.params['w'][k]:.6f}")
        print(f"  mean        {[round(v, 6) for v in result.params['mu'][k].tolist()]}")
        rows = [[round(v, 6) for v in row] for row in result.params["Sigma"][k].tolist()]
        print(f"  covariance  {rows}")
    try:
        draw(x, result, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")
    if options.guide:
        assert result.log_evidence is not None
        compare_with_guide(x, options.K, result.log_evidence, options.steps, options.seed)


if __name__ == "__main__":
    main()
