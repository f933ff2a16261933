"""Failure rates of ten pumps, each a draw from one population of pumps (Gamma–Poisson).

    λ_i ~ Gamma(a, b),   x_i ~ Poisson(λ_i t_i),   a, b = argmax Π_i ∫ p(x_i | λ) p(λ; a, b) dλ

The classic of empirical Bayes: a pump that failed once in a thousand hours and one that failed 22 times
in ten thousand say more together than each alone. Every λ_i has an exact posterior, Gamma(a + x_i,
b + t_i), whose mean lies between the pump's own rate and that of the population; what is left of the
data when the rates are integrated is negative binomial. Run it: ``python -m models.pump_failures``.

Source: Gaver and O'Muircheartaigh (1987), "Robust empirical Bayes analyses of event rates",
Technometrics 29, table 1.
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

FAILURES = (5, 1, 5, 14, 3, 19, 1, 1, 4, 22)
HOURS = (94.320, 15.720, 62.880, 125.760, 5.240, 31.440, 1.048, 1.048, 2.096, 10.480)  # thousands


def model(failures: Tensor, hours: Tensor) -> None:
    """A rate for each pump. # (N,), (N,)"""
    a = pyro.param("a", hours.new_tensor(1.0), constraint=constraints.positive)
    b = pyro.param("b", hours.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("pumps", len(failures)):
        rate = pyro.sample("rate", dist.Gamma(a, b))
        pyro.sample("failures", dist.Poisson(rate * hours), obs=failures)


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Failures, and thousands of hours of operation. # (10,), (10,)"""
    return torch.tensor(FAILURES, dtype=dtype), torch.tensor(HOURS, dtype=dtype)


def fit(failures: Tensor, hours: Tensor) -> EMResult:
    """To rounding, from the model's own start, in a parameter scope of its own."""
    with pyro.get_param_store().scope():
        result = ExactPosteriorEM(model).fit(
            failures, hours, tol=1e-10, max_steps=500, acceleration="squarem"
        )
        assert isinstance(result, EMResult)
        return result


def draw(failures: Tensor, hours: Tensor, result: EMResult, path: Path) -> None:
    """The pumps' own rates, and what the population makes of them, with 95% intervals."""
    from matplotlib.figure import Figure

    assert isinstance(result.posterior, Posterior)
    posterior = result.posterior.marginal("rate")
    draws = posterior.sample((4000,)).quantile(torch.tensor([0.025, 0.975]).to(hours), 0)
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(len(failures))
    mean = posterior.mean
    spread = torch.stack([mean - draws[0], draws[1] - mean])
    axes.errorbar(places, mean, yerr=spread, fmt="o", color="#1f77b4", label="posterior")
    axes.plot(places, failures / hours, "x", color="#d95f02", label="failures / hours")
    population = float(result.params["a"] / result.params["b"])
    axes.axhline(population, color="#888888", linewidth=0.8, label="population")
    axes.set_xlabel("pump")
    axes.set_ylabel("failures in a thousand hours")
    axes.legend(frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Rates per pump, their population learned.")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of the figure")
    parser.add_argument("--figure", type=Path, default=Path("figures/pump_failures.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(options.seed)

    failures, hours = load_data()
    with pyro.get_param_store().scope():
        print(f"{ExactPosteriorEM(model).plan(failures, hours)}\n")
    result = fit(failures, hours)
    print(result)
    a, b = float(result.params["a"]), float(result.params["b"])
    print(f"\nGamma({a:.6f}, {b:.6f}): {a / b:.4f} failures in a thousand hours on average.\n")
    assert isinstance(result.posterior, Posterior)
    mean = result.posterior.mean("rate")
    print("pump  failures    hours  own rate  posterior mean")
    for i, (x, t, m) in enumerate(zip(failures, hours, mean, strict=True)):
        own = float(x / t)
        print(f"{i + 1:4d}  {int(x):8d}  {float(t):7.3f}  {own:8.3f}  {float(m):14.3f}")
    try:
        draw(failures, hours, result, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
