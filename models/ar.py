"""An autoregression below noise: the ten-year cycle of the lynx.

    h_t ~ N(c + φ₁ h_{t−1} + φ₂ h_{t−2}, σ²),   y_t ~ N(h_t, ρ²)

The trappings of lynx along the Mackenzie River, in logarithms, rise and fall every ten years. An
autoregression of second order swings like that where its roots are complex: the cycle is as long as
2π / arccos(φ₁ / 2√−φ₂). What was trapped is a sample of what lived there, so the autoregression is put
below a noise of its own, without which φ would be drawn towards zero; steps that were never counted can
be predicted, and so can the years to come. In the model this is a loop whose latents read two steps
back; the library makes of it a Kalman filter whose state holds both. The M-step for (c, φ) is one least
squares on posterior moments. Run it: ``python -m models.ar``.

Source: Moran (1953), "The statistical analysis of the Canadian lynx cycle"; Shumway and Stoffer (1982)
for EM.
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

from pyro_em import EMResult, ExactPosteriorEM, Forecast, Posterior, plotting, vectorized_markov

FIRST_YEAR = 1821
HISTORY = 2


def model(y: Tensor) -> None:
    """Logarithms of numbers that lived, each from the two years before, and what was seen. # y: (T,)

    It starts at what Moran found without a noise.
    """
    phi = pyro.param("phi", y.new_tensor([1.41, -0.77]))
    c = pyro.param("c", y.new_tensor(1.05))
    sigma = pyro.param("sigma", y.new_tensor(0.2), constraint=constraints.positive)
    rho = pyro.param("rho", y.new_tensor(0.05), constraint=constraints.positive)
    past: list[Tensor] = []
    for t in vectorized_markov("time", len(y), history=HISTORY):
        if len(past) < HISTORY:
            h = pyro.sample(f"h_{t}", dist.Normal(y.new_tensor(3.0), 1.0))
        else:
            h = pyro.sample(f"h_{t}", dist.Normal(c + phi[0] * past[-1] + phi[1] * past[-2], sigma))
        past.append(h)
        pyro.sample(f"y_{t}", dist.Normal(h, rho), obs=y[t])


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Decimal logarithms of the lynx trapped each year, 1821-1934. # (114,)"""
    path = Path(__file__).parent / "data" / "lynx.csv"
    counts = np.genfromtxt(path, delimiter=",", skip_header=2)[:, 1]
    return torch.tensor(np.log10(counts), dtype=dtype)


def fit(y: Tensor, tol: float = 1e-4) -> EMResult:
    """To the maximum, from the model's own start. # y: (T,)"""
    result = ExactPosteriorEM(model).fit(y, tol=tol, max_steps=500, acceleration="squarem")
    assert isinstance(result, EMResult)
    return result


def cycle(phi: Tensor) -> float:
    """The length of the cycle in steps; its roots must be complex. # phi: (2,)"""
    first, second = (float(p) for p in phi)
    return 2 * math.pi / math.acos(first / (2 * math.sqrt(-second)))


def forecast(y: Tensor, years: int) -> Forecast:
    """The years after the last one, at the fitted parameters. # y: (T,)"""
    longer = torch.cat([y, y.new_full((years,), math.nan)])
    return ExactPosteriorEM(model).forecast(longer, seed=0)


def draw(y: Tensor, q: Posterior, ahead: Forecast, path: Path) -> None:
    """The smoothed series with the forecast, and the errors of one-step predictions."""
    from matplotlib.figure import Figure

    years = FIRST_YEAR + torch.arange(len(y) + len(ahead.means))
    known = years[: len(y)]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    plotting.path(q, top, site="h_*", times=known, label="smoothed")
    longer = torch.cat([y, y.new_full((len(ahead.means),), math.nan)])
    plotting.forecast(ahead, top, site="y_*", times=years, data=longer, color="#d95f02")
    top.set_ylabel("log₁₀ lynx trapped")
    top.set_xlabel("")
    top.legend(frameon=False, loc="lower left", ncols=2)
    plotting.prediction_errors(q, bottom, site="y_*", times=known)
    bottom.set_xlabel("year")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="An autoregression below noise: the lynx.")
    parser.add_argument("--seed", type=int, default=0, help="unused: draws have their own seed")
    parser.add_argument("--years", type=int, default=20, help="years to predict")
    parser.add_argument("--figure", type=Path, default=Path("figures/ar.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    y = load_data()
    print(f"{ExactPosteriorEM(model).plan(y)}\n")
    result = fit(y)
    print(result)
    for name in ("phi", "c", "sigma", "rho"):
        print(f"{name:6s}", *(f"{float(v):8.4f}" for v in result.params[name].reshape(-1)))
    print(f"a cycle of {cycle(result.params['phi']):.2f} years")
    assert isinstance(result.posterior, Posterior)
    ahead = forecast(y, options.years)
    print(f"\n{ahead}")
    try:
        draw(y, result.posterior, ahead, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
