"""Random intercepts and slopes: what is common to all subjects, and how each of them differs.

    u_i ~ N(0, Σ),   y_ij ~ N(β₀ + u_i0 + (β₁ + u_i1) day_ij, σ²)

Eighteen people slept three hours a night. Their reaction times rise by ten milliseconds a day on the
average, some people's by twenty and one person's not at all. A line through each subject's own ten
points overstates how much people differ, and one line for all says nothing about them; with the lines'
own distribution Σ learned from the data each subject is drawn towards the others, the more the less
the subject's own points say. All of this is one E-step over Gaussian latents, which the rows read by
index as ``u[subject]``, and an M-step of least squares and moments: the maximum likelihood fit of lme4
and of MixedLM. Run it: ``python -m models.random_effects``.

Source: Laird and Ware (1982); Liu, Rubin and Wu (1998) for parameter expansion; data of Belenky et al.
(2003), as in Bates, Mächler, Bolker and Walker (2015).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, Posterior


def model(y: Tensor, day: Tensor, subject: Tensor) -> None:
    """A line for all, and its deviation for each subject. # y, day, subject: (N,)"""
    X = torch.stack([torch.ones_like(day), day], -1)
    beta = pyro.param("beta", y.new_tensor([250.0, 10.0]))
    start = torch.diag(y.new_tensor([20.0, 5.0]))
    L = pyro.param("L", start, constraint=constraints.lower_cholesky)
    sigma = pyro.param("sigma", y.new_tensor(30.0), constraint=constraints.positive)
    with pyro.plate("subjects", int(subject.max()) + 1):
        u = pyro.sample("u", dist.MultivariateNormal(y.new_zeros(2), scale_tril=L))
    with pyro.plate("rows", len(y)):
        mean = X @ beta + (X * u[subject]).sum(-1)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Reaction times in milliseconds, days, and subjects from 0 on. # (180,) each"""
    path = Path(__file__).parent / "data" / "sleepstudy.csv"
    table = torch.tensor(np.genfromtxt(path, delimiter=",", skip_header=2))
    subject = table[:, 0].unique(return_inverse=True)[1]
    return table[:, 2].to(dtype), table[:, 1].to(dtype), subject


def fit(y: Tensor, day: Tensor, subject: Tensor) -> EMResult:
    """To a few digits behind the published ones, from the model's own start."""
    result = ExactPosteriorEM(model).fit(
        y, day, subject, tol=1e-9, max_steps=500, acceleration="squarem"
    )
    assert isinstance(result, EMResult)
    return result


def own_lines(y: Tensor, day: Tensor, subject: Tensor) -> Tensor:
    """Least squares for each subject alone: intercept and slope. # (subjects, 2)"""
    X = torch.stack([torch.ones_like(day), day], -1)
    parts = [(X[subject == i], y[subject == i]) for i in range(int(subject.max()) + 1)]
    return torch.stack([torch.linalg.lstsq(X, y).solution for X, y in parts])


def draw(lines: Tensor, deviations: Tensor, alone: Tensor, path: Path) -> None:
    """Slopes by subject with 95% intervals, beside those of each subject alone.

    Args:
        lines: Intercept and slope of each subject. # (subjects, 2)
        deviations: Posterior standard deviations of these. # (subjects, 2)
        alone: As `own_lines` gives them. # (subjects, 2)
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    order = lines[:, 1].argsort()
    rows = torch.arange(len(order))
    left.errorbar(lines[order, 1], rows, xerr=1.96 * deviations[order, 1], fmt="o", color="#1f77b4")
    left.plot(alone[order, 1], rows, "x", color="#d95f02", label="subject alone")
    left.set_yticks(rows.tolist(), [str(int(i)) for i in order])
    left.set_xlabel("milliseconds per day, 95% intervals")
    left.set_ylabel("subject")
    left.legend(frameon=False)
    for own, together in zip(alone, lines, strict=True):
        right.annotate("", together.tolist(), own.tolist(), arrowprops={"arrowstyle": "->"})
    right.plot(*alone.T, "x", color="#d95f02")
    right.plot(*lines.T, "o", color="#1f77b4")
    right.set_xlabel("intercept (milliseconds)")
    right.set_ylabel("slope (milliseconds per day)")
    right.set_title("Each subject is drawn towards all")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Random intercepts and slopes: the sleep study.")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is random")
    parser.add_argument("--figure", type=Path, default=Path("figures/random_effects.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    data = load_data()
    print(f"{ExactPosteriorEM(model).plan(*data)}\n")
    result = fit(*data)
    errors = result.standard_errors()
    print(result)
    for name, value, error in zip(
        ("intercept", "slope"), result.params["beta"], errors["beta"], strict=True
    ):
        print(f"{name:9s} {float(value):10.4f} ± {float(error):.4f}")
    covariance = result.params["L"] @ result.params["L"].T
    spread = covariance.diagonal().sqrt()
    print(f"standard deviation of intercepts {spread[0]:.3f}, of slopes {spread[1]:.3f}")
    print(f"their correlation {float(covariance[0, 1] / spread.prod()):.3f}")
    print(f"standard deviation within a subject {float(result.params['sigma']):.3f}")
    assert isinstance(result.posterior, Posterior)
    lines = result.params["beta"] + result.posterior.mean("u")
    deviations = result.posterior.covariance("u").diagonal(dim1=-2, dim2=-1).sqrt()
    alone = own_lines(*data)
    print("\nsubject  slope alone  slope in the model")
    for i in (0, 1, 8):
        own, together = float(alone[i, 1]), float(lines[i, 1])
        print(f"{i:7d}  {own:11.2f}  {together:9.2f} ± {float(deviations[i, 1]):.2f}")
    try:
        draw(lines, deviations, alone, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
