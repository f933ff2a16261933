"""A dynamic factor: one market behind many shares, some of which came later.

    f_t ~ N(φ f_{t−1}, 1),   x_t ~ N(a + w f_t, diag(s²)),   x_t the monthly returns of D shares

Eight shares of computer companies from 1990 to 2022. Four of them were not traded all the time: such
entries are NaN, and integrated out one by one, so that every month counts with what it has. The factor
that explains what the shares have in common was told of no index, and yet it is one: it follows the
Nasdaq. φ says how much of it lasts to the next month: about nothing, as markets should. The same
program with several factors, or with factors that last, is the model of coincident economic indicators.
Run it: ``python -m models.dynamic_factor``.

Source: Geweke (1977); Stock and Watson (1991); Watson and Engle (1983) for EM. Data: monthly prices of
finance.yahoo.com, as they come with matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, Posterior, plotting

INDEX = "^IXIC"


def model(x: Tensor) -> None:
    """A factor that all shares read, and a noise for each share. # x: (T, D)"""
    D = x.shape[1]
    phi = pyro.param("phi", x.new_tensor(0.2))
    a = pyro.param("a", x.nanmean(0))
    w = pyro.param("w", x.new_full((D,), 5.0))
    s = pyro.param("s", x.new_full((D,), 8.0), constraint=constraints.positive)
    f = x.new_zeros(())
    for t in pyro.markov(range(len(x))):
        f = pyro.sample(f"f_{t}", dist.Normal(phi * f, 1.0))
        pyro.sample(f"x_{t}", dist.Normal(a + w * f.unsqueeze(-1), s).to_event(1), obs=x[t])


def load_data(
    since: int = 1990, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Monthly returns in percent, NaN where a share was not traded.

    Args:
        since: The first year.
        dtype: Of the returns.

    Returns:
        Those of shares and of the Nasdaq, the shares' names, and the time of each month in years.
        # (T, D), (T,), D names, (T,)
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "Stocks.csv"
    with open(path) as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))
    names = rows[0][1:]
    months = [row for row in rows[1:] if row[0].endswith("-01") and row[1 + names.index(INDEX)]]
    months = [row for row in months if int(row[0][:4]) >= since]
    prices = torch.tensor([[float(v or math.nan) for v in row[1:]] for row in months])
    returns = 100 * prices.to(torch.float64).log().diff(dim=0)
    shares = [i for i, name in enumerate(names) if not name.startswith("^")]
    dates = [row[0].split("-") for row in months[1:]]
    times = torch.tensor([int(year) + (int(month) - 1) / 12 for year, month, _ in dates])
    market = returns[:, names.index(INDEX)]
    return returns[:, shares].to(dtype), market.to(dtype), [names[i] for i in shares], times


def fit(x: Tensor, tol: float = 1e-6) -> EMResult:
    """To the maximum, from the model's own start. # x: (T, D)"""
    em = ExactPosteriorEM(model, missing="nan")
    result = em.fit(x, tol=tol, max_steps=500, acceleration="squarem")
    assert isinstance(result, EMResult)
    return result


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two series. # (T,) each"""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def draw(
    q: Posterior, market: Tensor, names: list[str], loadings: Tensor, times: Tensor, path: Path
) -> None:
    """The factor with its band beside the index, and what each share has of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    plotting.path(q, left, site="f_*", times=times, label="factor", linewidth=1.0)
    left.plot(times, (market - market.mean()) / market.std(), color="0.3", linewidth=0.7)
    left.lines[-1].set_label("Nasdaq, standardised")
    left.set_xlabel("year")
    left.legend(frameon=False)
    order = loadings.argsort()
    right.barh([names[i] for i in order], loadings[order].tolist(), color=plotting.PALETTE[0])
    right.set_xlabel("percent per unit of the factor")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="A dynamic factor: monthly returns of shares.")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is random")
    parser.add_argument("--since", type=int, default=1990, help="the first year")
    parser.add_argument("--figure", type=Path, default=Path("figures/dynamic_factor.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    x, market, names, times = load_data(options.since)
    print(f"{ExactPosteriorEM(model, missing='nan').plan(x)}\n")
    result = fit(x)
    print(result)
    params, q = result.params, result.posterior
    assert isinstance(q, Posterior)
    print("\nshare   loading  noise  months")
    for i, name in enumerate(names):
        seen = int((~x[:, i].isnan()).sum())
        print(f"{name:6s}  {float(params['w'][i]):7.2f}  {float(params['s'][i]):5.2f}  {seen:6d}")
    factor = q.mean("f_*")
    print(f"\nwhat lasts of the factor to the next month: {float(params['phi']):.3f}")
    print(f"correlation of the factor with the Nasdaq: {correlation(factor, market):.3f}")
    ahead = ExactPosteriorEM(model).forecast(
        torch.cat([x, x.new_full((1, len(names)), math.nan)]), seed=0
    )
    last = f"x_{len(x)}"
    print("\nnext month, means and 95% intervals in percent")
    for i, name in enumerate(names):
        mean, low, high = (float(v[last][i]) for v in (ahead.means, ahead.lower, ahead.upper))
        print(f"{name:6s}  {mean:6.2f}  {low:7.2f} … {high:.2f}")
    try:
        draw(q, market, names, params["w"], times, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
