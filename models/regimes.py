"""Regimes of a business cycle: growth about one of two means, with the memory of an autoregression.

    z_t ~ Categorical(P[z_{t−1}]),   y_t ~ N(μ[z_t] + Σ_k φ_k (y_{t−k} − μ[z_{t−k}]), σ²),   k = 1, …, 4

Growth of the real GNP of the United States, quarter by quarter, as Hamilton (1989) read it:
recessions are the quarters whose regime has the lower mean. A quarter's growth depends on five
regimes, its own and the four before, so that the exact E-step sums over all 32 of their combinations
at each quarter. In the mean parameters are multiplied, φ_k μ[z]: the M-step solves least squares for
the means while φ has its value, and then for φ. Run it: ``python -m models.regimes``.

The published maximum begins with the long-run shares of the regimes, which follow from P. Here the
shares at the beginning are free, which gains a hundredth of a nat.

Source: Hamilton (1989), "A new approach to the economic analysis of nonstationary time series and the
business cycle"; his data and estimates.
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

LAGS = 4
PUBLISHED = {  # the log evidence there is -181.263
    "start": (0.2811, 0.7189),
    "move": ((0.7547, 0.2453), (0.0959, 0.9041)),
    "mean": (-0.3588, 1.1635),
    "phi": (0.0135, -0.0575, -0.2470, -0.2129),
    "noise": 0.7690,
}


def model(growth: Tensor) -> None:
    """A regime for each quarter; the first four quarters are given. # growth: (T,)"""

    def start(name: str, values: object, constraint: constraints.Constraint) -> Tensor:
        return pyro.param(name, growth.new_tensor(values), constraint=constraint)

    first = start("start", [0.5, 0.5], constraints.simplex)
    move = start("move", [[0.75, 0.25], [0.1, 0.9]], constraints.simplex)
    mean = start("mean", [-0.5, 1.0], constraints.real)
    phi = start("phi", [0.0] * LAGS, constraints.real)
    noise = start("noise", 0.8, constraints.positive)
    z: list[Tensor] = []
    for t in pyro.markov(range(len(growth)), history=LAGS):
        z.append(pyro.sample(f"z_{t}", dist.Categorical(first if t == 0 else move[z[t - 1]])))
        if t >= LAGS:
            lags = [growth[t - k] - mean[z[t - k]] for k in range(1, LAGS + 1)]
            about = sum(phi[k] * lag for k, lag in enumerate(lags))
            pyro.sample(f"growth_{t}", dist.Normal(mean[z[t]] + about, noise), obs=growth[t])


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Growth of real GNP in percent per quarter, 1951 II to 1984 IV. # (135,)"""
    rows = (Path(__file__).parent / "data" / "gnp.csv").read_text().splitlines()[2:]
    return torch.tensor([float(row.split(",")[1]) for row in rows], dtype=dtype)


def quarter(t: int) -> str:
    """The name of a quarter.

    Example:
        >>> quarter(0), quarter(134)
        ('1951 II', '1984 IV')
    """
    return f"{1951 + (t + 1) // 4} {('I', 'II', 'III', 'IV')[(t + 1) % 4]}"


def fit(growth: Tensor, tol: float = 1e-4) -> EMResult:
    """To the maximum, from the model's own start. # growth: (T,)"""
    result = ExactPosteriorEM(model).fit(growth, tol=tol, max_steps=500)
    assert isinstance(result, EMResult)
    return result


def recessions(result: EMResult) -> Tensor:
    """The probability that each quarter is one of low growth, given all quarters. # (T,)"""
    assert isinstance(result.posterior, Posterior)
    low = int(result.params["mean"].argmin())
    return result.posterior.probs("z_*")[:, low]


def draw(growth: Tensor, low: Tensor, path: Path) -> None:
    """Growth, and below it the probability of the regime of low growth."""
    from matplotlib.figure import Figure

    years = 1951.25 + torch.arange(len(growth)) / 4
    figure = Figure(figsize=(9, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.axhline(0, color="0.8", linewidth=0.8)
    top.plot(years, growth, color="0.25", linewidth=1.0)
    top.set_ylabel("growth of real GNP\n(percent per quarter)")
    bottom.fill_between(years, low, step="mid", color="#d95f02", alpha=0.6, linewidth=0)
    bottom.set_ylabel("probability of\nthe low regime")
    bottom.set_ylim(0, 1)
    bottom.set_xlim(1951, 1985)
    bottom.set_xlabel("year")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Regimes of the growth of real GNP.")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is drawn")
    parser.add_argument("--figure", type=Path, default=Path("figures/regimes.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    growth = load_data()
    print(f"{ExactPosteriorEM(model).plan(growth)}\n")
    result = fit(growth)
    print(result)
    print("\nparameter   here                              published")
    for name in ("mean", "phi", "noise"):
        here = ", ".join(f"{v:.3f}" for v in result.params[name].reshape(-1).tolist())
        there = torch.tensor(PUBLISHED[name]).reshape(-1).tolist()
        print(f"{name:10}  {here:32}  {', '.join(f'{v:.3f}' for v in there)}")
    low = recessions(result)
    inside, begun = False, ""
    print("\nrecessions (probability above a half)")
    for t, is_low in enumerate([*(low > 0.5).tolist(), False]):
        if is_low and not inside:
            begun = quarter(t)
        if inside and not is_low:
            print(f"  {begun} to {quarter(t - 1)}")
        inside = is_low
    try:
        draw(growth, low, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
