"""Regression that outliers do not bend: noise with heavy tails, as a Normal of random precision.

    w_n ~ Gamma(ν/2, ν/2),   y_n ~ N(b · x_n, σ² / w_n)          so that y_n − b · x_n is Student's t

Every precision has an exact posterior, whose mean is the weight of its row in a least squares fit: rows
far from the line count for little. EM is iteratively reweighted least squares, with σ in closed form
and ν by Newton's method. Run it: ``python -m models.robust_regression``.

Source: Lange, Little and Taylor (1989), "Robust statistical modeling using the t distribution", JASA
84; the stack losses of Brownlee (1965), 21 days of a plant that oxidises ammonia.
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

NAMES = ("intercept", "air flow", "water temperature", "acid concentration")

# Air flow, water temperature, acid concentration, stack loss.
ROWS = (
    *((80, 27, 89, 42), (80, 27, 88, 37), (75, 25, 90, 37), (62, 24, 87, 28), (62, 22, 87, 18)),
    *((62, 23, 87, 18), (62, 24, 93, 19), (62, 24, 93, 20), (58, 23, 87, 15), (58, 18, 80, 14)),
    *((58, 18, 89, 14), (58, 17, 88, 13), (58, 18, 82, 11), (58, 19, 93, 12), (50, 18, 89, 8)),
    *((50, 18, 86, 7), (50, 19, 72, 8), (50, 19, 79, 8), (50, 20, 80, 9), (56, 20, 82, 15)),
    (70, 20, 91, 15),
)


def model(X: Tensor, y: Tensor) -> None:
    """A precision for each row. # X: (N, D), y: (N,)"""
    b = pyro.param("b", X.new_zeros(X.shape[1]))
    sigma = pyro.param("sigma", y.std(), constraint=constraints.positive)
    nu = pyro.param("nu", y.new_tensor(4.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        w = pyro.sample("w", dist.Gamma(nu / 2, nu / 2))
        pyro.sample("y", dist.Normal(X @ b, sigma * w.rsqrt()), obs=y)


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs with a column of ones, and losses. # (21, 4), (21,)"""
    rows = torch.tensor(ROWS, dtype=dtype)
    return torch.cat([torch.ones(len(rows), 1, dtype=dtype), rows[:, :3]], 1), rows[:, 3].clone()


def fit(X: Tensor, y: Tensor) -> EMResult:
    """To rounding, from the model's own start, in a parameter scope of its own."""
    with pyro.get_param_store().scope():
        result = ExactPosteriorEM(model).fit(
            X, y, tol=1e-10, max_steps=2000, acceleration="squarem"
        )
        assert isinstance(result, EMResult)
        return result


def draw(X: Tensor, y: Tensor, result: EMResult, path: Path) -> None:
    """Residuals of least squares and of this fit, and the weights of the rows."""
    from matplotlib.figure import Figure

    assert isinstance(result.posterior, Posterior)
    weights = result.posterior.mean("w")
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    days = torch.arange(1, len(y) + 1)
    left.plot(days, y - X @ result.params["b"], "o", color="#1f77b4", label="Student's t")
    least = y - X @ torch.linalg.lstsq(X, y).solution
    left.plot(days, least, "x", color="#d95f02", label="least squares")
    left.axhline(0.0, color="#888888", linewidth=0.8)
    left.set_xlabel("day")
    left.set_ylabel("residual")
    left.legend(frameon=False)
    right.bar(days, weights, color="#1f77b4")
    right.set_xlabel("day")
    right.set_ylabel("weight of its row, E[w | y]")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Robust regression by a scale mixture.")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is random")
    parser.add_argument("--figure", type=Path, default=Path("figures/robust_regression.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    X, y = load_data()
    with pyro.get_param_store().scope():
        print(f"{ExactPosteriorEM(model).plan(X, y)}\n")
    result = fit(X, y)
    print(result)
    print(f"\nν = {float(result.params['nu']):.4f}, σ = {float(result.params['sigma']):.4f}\n")
    alone = torch.linalg.lstsq(X, y).solution
    print("                    least squares  Student's t")
    for name, ordinary, robust in zip(NAMES, alone, result.params["b"], strict=True):
        print(f"{name:18s}  {float(ordinary):13.4f}  {float(robust):11.4f}")
    assert isinstance(result.posterior, Posterior)
    light = (result.posterior.mean("w") < 0.1).nonzero().squeeze(-1) + 1
    print(f"\nDays of little weight: {', '.join(str(int(day)) for day in light)}.")
    try:
        draw(X, y, result, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
