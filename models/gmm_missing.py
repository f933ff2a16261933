"""A Gaussian mixture of incomplete rows: what was lost is integrated out, not filled.

    z ~ Categorical(w),   x | z = k ~ N(μ_k, Σ_k),   each row seen in part: o ⊂ {duration, waiting}

    log p(x_o; θ) = Σ_n log Σ_k w_k N(x_no; μ_ko, Σ_koo)

Suppose that most of the waiting times that follow a long eruption of Old Faithful were lost. They are
missing at random: whether a number is lost depends on what was seen, and on nothing else. Who drops
incomplete rows keeps mostly short eruptions, and who fills in means draws all rows together; the
likelihood of what was seen does neither. The model is the one for complete data: ``missing="nan"`` is
all that is new. Run it: ``python -m models.gmm_missing``.

Source: Little and Rubin (2002), "Statistical Analysis with Missing Data", sections 1.3 and 11.2;
Ghahramani and Jordan (1994) for mixtures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from models.gmm import load_data as complete_data
from pyro_em import EMResult, ExactPosteriorEM, plotting

TREATMENTS = ("all data", "whole rows only", "means filled in", "missing='nan'")


def model(x: Tensor) -> None:
    """Two components. # x: (N, 2)"""
    start = x.new_tensor([[2.0, 55.0], [4.3, 80.0]])
    w = pyro.param("w", x.new_tensor([0.5, 0.5]), constraint=constraints.simplex)
    mu = pyro.param("mu", start)
    spread = torch.diag(x.new_tensor([0.25, 36.0])).repeat(2, 1, 1)
    sigma = pyro.param("Sigma", spread, constraint=constraints.positive_definite)
    with pyro.plate("eruptions", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], sigma[z]), obs=x)


def load_data(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Old Faithful, whole, and with NaN for waiting times that were lost after long eruptions.

    Args:
        seed: Of what is lost.
        dtype: Of both.

    Returns:
        Durations and waiting times in minutes. # (272, 2) each
    """
    whole = complete_data(dtype)
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(len(whole), generator=g, dtype=torch.float64)
    lost = u < torch.where(whole[:, 0] > 3, 0.8, 0.1)
    x = whole.clone()
    x[lost, 1] = torch.nan
    return whole, x


def fit(x: Tensor) -> EMResult:
    """Fit from the model's own start, in a parameter scope of its own. # x: (N, 2)"""
    with pyro.get_param_store().scope():
        result = ExactPosteriorEM(model, missing="nan").fit(x, tol=1e-8, max_steps=2000)
        assert isinstance(result, EMResult)
        return result


def treated(whole: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The data that each treatment fits. # (rows, 2)"""
    seen = ~x.isnan()
    filled = torch.where(seen, x, x.nanmean(0))
    return dict(zip(TREATMENTS, (whole, x[seen.all(1)], filled, x), strict=True))


def draw(x: Tensor, fits: dict[str, EMResult], path: Path) -> None:
    """The rows and the components that three treatments find.

    Args:
        x: Data with NaN. # (N, 2)
        fits: By treatment.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    lost = x[:, 1].isnan()
    for ax, name in zip(axes, TREATMENTS[1:], strict=True):
        params = fits[name].params
        ax.plot(*x[~lost].T, ".", color="#555555", markersize=4)
        ax.plot(x[lost, 0], torch.full((int(lost.sum()),), 40.0), "|", color="#d95f02")
        plotting.ellipses(params["mu"], params["Sigma"], ax)
        ax.set_title(name)
        ax.set_xlabel("eruption (minutes)")
    axes[0].set_ylabel("waiting (minutes); marks below: lost")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="A Gaussian mixture of incomplete rows.")
    parser.add_argument("--seed", type=int, default=0, help="of what is lost")
    parser.add_argument("--figure", type=Path, default=Path("figures/gmm_missing.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    whole, x = load_data(options.seed)
    em = ExactPosteriorEM(model, missing="nan")
    print(em.plan(x), end="\n\n")
    fits = {name: fit(data) for name, data in treated(whole, x).items()}
    print("                   rows  weight of long  their waiting  standard deviation  correlation")
    for name, result in fits.items():
        w, mu, s = (result.params[n][1] for n in ("w", "mu", "Sigma"))
        deviation, r = float(s[1, 1].sqrt()), float(s[0, 1] / (s[0, 0] * s[1, 1]).sqrt())
        rows = f"{result.num_rows:4.0f}"
        print(f"{name:18s} {rows}  {w:14.3f}  {mu[1]:13.2f}  {deviation:18.2f}  {r:11.3f}")
    try:
        draw(x, fits, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
