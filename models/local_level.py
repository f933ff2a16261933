"""A local level: how much of a river's ups and downs is weather, and how much is a level that moves.

    level_t ~ N(level_{t−1}, σ²),   flow_t ~ N(level_t, ρ²)

A hundred years of the Nile's flow at Aswan. Two standard deviations say everything: with σ = 0 the
level is one mean for all years, with ρ = 0 every year is its own level. Their maximum likelihood is
found by exact EM, whose E-step is the Kalman smoother, and whose M-step two averages. A reader
meets the four views of a series: smoothing (what all years say of each level), filtering (what was
known at the time), forecasting, and the errors of one-step predictions, which show what the model
does not know: the level fell at once in 1899, when the first dam was begun. Run it: ``python -m
models.local_level``.

Source: Durbin and Koopman (2012), "Time series analysis by state space methods", chapter 2; data of
Cobb (1978).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, Forecast, Posterior, plotting

FIRST_YEAR = 1871


def model(flow: Tensor) -> None:
    """A level for each year, hardly known at the start, and a flow about it. # flow: (T,)"""
    start = flow.new_tensor([40.0, 120.0])
    drift = pyro.param("drift", start[0], constraint=constraints.positive)  # σ
    noise = pyro.param("noise", start[1], constraint=constraints.positive)  # ρ
    level = flow.new_zeros(())
    for t in pyro.markov(range(len(flow))):
        spread = flow.new_tensor(1e7**0.5) if t == 0 else drift
        level = pyro.sample(f"level_{t}", dist.Normal(level, spread))
        pyro.sample(f"flow_{t}", dist.Normal(level, noise), obs=flow[t])


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """The Nile's flow at Aswan in 10⁸ cubic metres, 1871-1970. # (100,)"""
    path = Path(__file__).parent / "data" / "nile.csv"
    return torch.tensor(np.genfromtxt(path, delimiter=",", skip_header=2)[:, 1], dtype=dtype)


def fit(flow: Tensor) -> EMResult:
    """To the maximum, from the model's own start. # flow: (T,)"""
    result = ExactPosteriorEM(model).fit(flow, tol=1e-8, max_steps=500, acceleration="squarem")
    assert isinstance(result, EMResult)
    return result


def forecast(flow: Tensor, years: int) -> Forecast:
    """The years after the last one, at the fitted parameters. # flow: (T,)"""
    longer = torch.cat([flow, flow.new_full((years,), math.nan)])
    return ExactPosteriorEM(model).forecast(longer, seed=0)


def draw(flow: Tensor, q: Posterior, ahead: Forecast, path: Path) -> None:
    """Smoothed level and forecast, the level as it was known at the time, and prediction errors."""
    from matplotlib.figure import Figure

    years = FIRST_YEAR + torch.arange(len(flow) + len(ahead.means))
    known = years[: len(flow)]
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    plotting.path(q, top, site="level_*", data=flow, times=known, label="smoothed level")
    longer = torch.cat([flow, flow.new_full((len(ahead.means),), math.nan)])
    plotting.forecast(ahead, top, site="flow_*", times=years, data=longer, color="#d95f02")
    top.set_ylabel("flow (10⁸ m³)")
    top.legend(frameon=False)
    later = slice(1, None)  # at first nothing is known
    filtered = q.filtered("level_*")
    plotting.path(
        dist.Normal(filtered.mean[later], filtered.stddev[later]),
        middle,
        data=flow[later],
        times=known[later],
        label="level as known at the time",
        color="#2ca02c",
    )
    middle.set_ylabel("flow (10⁸ m³)")
    middle.legend(frameon=False)
    plotting.prediction_errors(q.prediction_errors("flow_*")[later], bottom, times=known[later])
    for axes in (top, middle):
        axes.set_xlabel("")
    bottom.set_xlabel("year")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="A local level: the flow of the Nile.")
    parser.add_argument("--seed", type=int, default=0, help="unused: draws have their own seed")
    parser.add_argument("--years", type=int, default=10, help="years to predict")
    parser.add_argument("--figure", type=Path, default=Path("figures/local_level.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    flow = load_data()
    print(f"{ExactPosteriorEM(model).plan(flow)}\n")
    result = fit(flow)
    print(result)
    drift, noise = float(result.params["drift"]), float(result.params["noise"])
    print(f"variance of the level's steps {drift**2:.1f}, of the flow about it {noise**2:.1f}")
    q = result.posterior
    assert isinstance(q, Posterior)
    levels, known = q.mean("level_*"), q.filtered("level_*").mean
    print("\nyear   flow  level as known  level in hindsight")
    for year in (1897, 1898, 1899, 1900, 1901):
        t = year - FIRST_YEAR
        print(f"{year}  {float(flow[t]):5.0f}  {float(known[t]):14.1f}  {float(levels[t]):18.1f}")
    errors = q.prediction_errors("flow_*")[1:]
    worst = int(errors.abs().argmax()) + 1
    print(
        f"largest of the standardised errors: {float(errors[worst - 1]):.2f} in {FIRST_YEAR + worst}"
    )
    ahead = forecast(flow, options.years)
    print(f"\n{ahead}")
    try:
        draw(flow, q, ahead, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
