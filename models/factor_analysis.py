"""Factor analysis and probabilistic principal components: few causes behind many numbers.

    h_n ~ N(0, I_q),   x_n ~ N(μ + W h_n, Ψ),   so that   Cov(x) = W Wᵀ + Ψ

With one noise for all variables, Ψ = σ²I, the maximum is known: the first q principal axes, and σ² the
mean of the eigenvalues that are left. With a noise for each variable it is factor analysis, and EM is
how to fit it. Thirteen chemical measurements of 178 wines share three causes here; the loadings say
which measurements go together, and the cultivars part in the plane of the first two factors although
the model never sees them. W is determined up to a rotation, which a plan notes and BIC knows.
Run it: ``python -m models.factor_analysis``.

Source: Rubin and Thayer (1982); Tipping and Bishop (1999) for principal components; Kaiser (1958) for
varimax, by which the loadings are turned here.
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


def model(x: Tensor, q: int, one_noise: bool = False) -> None:
    """Factors of some data, with a noise for each variable or one for all. # x: (N, D)"""
    D = x.shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(D, q, generator=generator, dtype=torch.float64).to(x)
    W = pyro.param("W", start)
    mu = pyro.param("mu", x.mean(0))
    noises = x.new_ones(() if one_noise else D)
    psi = pyro.param("psi", noises, constraint=constraints.positive)  # standard deviations
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(x.new_zeros(q), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(mu + h @ W.T, psi).to_event(1), obs=x)


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[str]]:
    """Wines, each measurement with mean 0 and variance 1; cultivars; the measurements' names.

    Returns:
        # (178, 13), (178,), 13 names
    """
    from sklearn.datasets import load_wine

    wine = load_wine()
    x = torch.tensor(wine.data, dtype=dtype)
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    return x, torch.tensor(wine.target), list(wine.feature_names)


def fit(x: Tensor, q: int, one_noise: bool = False, tol: float = 1e-7) -> EMResult:
    """From the model's own start, in a parameter scope of its own. # x: (N, D)"""
    with pyro.get_param_store().scope():
        result = ExactPosteriorEM(model).fit(
            x, q, one_noise, tol=tol, max_steps=2000, acceleration="squarem"
        )
        assert isinstance(result, EMResult)
        return result


def principal_components(x: Tensor, q: int) -> tuple[float, float]:
    """The maximum with one noise, from the eigenvalues of the covariance.

    Args:
        x: Data. # (N, D)
        q: Factors.

    Returns:
        σ² and the log evidence in nats.
    """
    N, D = x.shape
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = eigenvalues[q:].mean()
    log_det = eigenvalues[:q].log().sum() + (D - q) * noise.log()
    constant = D * (torch.log(torch.tensor(2 * torch.pi)) + 1)
    return float(noise), float(-N / 2 * (constant + log_det))


def varimax(W: Tensor, steps: int = 50) -> Tensor:
    """The rotation that makes a few loadings large and the others small. # (q, q)"""
    R = torch.eye(W.shape[1]).to(W)
    for _ in range(steps):
        turned = W @ R
        u, _, v = torch.linalg.svd(W.T @ (turned**3 - turned * turned.square().mean(0)))
        R = u @ v
    return R


def draw(W: Tensor, h: Tensor, cultivar: Tensor, names: list[str], path: Path) -> None:
    """Loadings, and the wines in the plane of two factors.

    Args:
        W: Loadings. # (D, q)
        h: Posterior means of the factors. # (N, q)
        cultivar: # (N,)
        names: Of the measurements.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(W.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_xticks(range(W.shape[1]), [f"factor {k + 1}" for k in range(W.shape[1])])
    figure.colorbar(image, ax=left, label="loading")
    for k in cultivar.unique().tolist():
        right.plot(*h[cultivar == k, :2].T.numpy(), "o", markersize=4, label=f"cultivar {k + 1}")
    right.set_xlabel("factor 1")
    right.set_ylabel("factor 2")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Factor analysis of wines.")
    parser.add_argument("--factors", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="unused: the start is fixed")
    parser.add_argument("--figure", type=Path, default=Path("figures/factor_analysis.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    x, cultivar, names = load_data()
    q = options.factors
    with pyro.get_param_store().scope():
        print(f"{ExactPosteriorEM(model).plan(x, q)}\n")
    noise, evidence = principal_components(x, q)
    tied = fit(x, q, one_noise=True)
    print(f"One noise:    {tied.log_evidence:.4f} nats, closed form {evidence:.4f}")
    print(f"              σ² {float(tied.params['psi']) ** 2:.6f}, closed form {noise:.6f}")
    result = fit(x, q)
    print(f"Noise of each {result.log_evidence:.4f} nats")
    print(f"BIC {tied.bic:.1f} (p = {tied.num_free_parameters}) and ", end="")
    print(f"{result.bic:.1f} (p = {result.num_free_parameters}); lower is better\n")
    R = varimax(result.params["W"])
    R = R[:, (result.params["W"] @ R).square().sum(0).argsort(descending=True)]
    W = result.params["W"] @ R
    print(f"{'measurement':30s} {'loadings':{7 * q - 1}s}  own share of variance")
    for name, row, own in zip(names, W, result.params["psi"] ** 2, strict=True):
        print(f"{name:30s} {' '.join(f'{v:6.2f}' for v in row.tolist())}  {float(own):8.2f}")
    try:
        assert isinstance(result.posterior, Posterior)
        draw(W, result.posterior.mean("h") @ R, cultivar, names, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
