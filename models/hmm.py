"""A Poisson hidden Markov model of the earthquakes of 1900-2006: years are quiet or active.

    z_1 ~ Categorical(π),   z_t | z_{t-1} ~ Categorical(A[z_{t-1}]),   x_t | z_t ~ Poisson(λ[z_t])

    filtering    p(z_t | x_1..t)          what was known at the time
    smoothing    p(z_t | x_1..T)          what is known in hindsight
    decoding     argmax p(z_1..T | x)     the best path as a whole (Viterbi)
    forecasting  p(x_T+h | x_1..T)        a mixture of Poissons with weights p(z_T+h | x_1..T)

A reader learns how a loop over ``pyro.markov`` becomes a chain that is summed exactly in time
linear in T, that all four questions are one question (the posterior of a model in which some years
are observed and others are not), and how to choose the number of states.
Run it: ``python -m models.hmm``.

Data: the number of earthquakes of magnitude 7 or more in the world, in each of 107 years.
Source: Zucchini and MacDonald (2009), "Hidden Markov models for time series".
"""

from __future__ import annotations

import argparse
import csv
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, Selection, select

HERE = Path(__file__).parent
FIRST_YEAR = 1900


def parameters(x: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """π, A and λ; they start at staying with probability 0.9 and at quantiles of the counts."""
    away = 0.1 / max(K - 1, 1)
    A = torch.full((K, K), away).to(x) + (0.9 - away) * torch.eye(K).to(x)
    levels = torch.quantile(x, (torch.arange(K).to(x) + 0.5) / K)
    return (
        pyro.param("pi", x.new_ones(K) / K, constraint=constraints.simplex),
        pyro.param("A", A / A.sum(-1, keepdim=True), constraint=constraints.simplex),
        pyro.param("rate", levels, constraint=constraints.positive),
    )


def model(x: Tensor, K: int = 2, horizon: int = 0) -> None:
    """A chain of K states, each with its rate; years after the data are not observed.

    Args:
        x: Counts. # (T,)
        K: Number of states.
        horizon: Number of years to go on after the last one observed.
    """
    pi, A, rate = parameters(x, K)
    z = None
    for t in pyro.markov(range(len(x) + horizon)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t] if t < len(x) else None)


def model_of_prefixes(x: Tensor, K: int = 2) -> None:
    """T copies of the series at once, of which copy n is observed up to year n. # x: (T,)"""
    pi, A, rate = parameters(x, K)
    z = None
    with pyro.plate("copies", len(x)):
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            with pyro.poutine.mask(mask=t <= torch.arange(len(x))):
                pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t].expand(len(x)))


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Earthquakes of magnitude 7 or more per year, 1900-2006. # (107,)"""
    with open(HERE / "data" / "earthquakes.csv") as file:
        return torch.tensor([float(row["earthquakes"]) for row in csv.DictReader(file)]).to(dtype)


def numbers_of_states(x: Tensor, largest: int) -> Selection:
    """Fits of 1, 2, ... states, each from its own start; every year counts in BIC. # x: (T,)"""
    states = range(1, largest + 1)
    return select(lambda K: partial(model, K=K), x, K=states, num_restarts=1, tol=1e-8)


def filtered(x: Tensor, K: int = 2) -> Tensor:
    """p(z_t | x_1..t) for every t, at the current parameters. # (T,) -> (T, K)"""
    q = ExactPosteriorEM(model_of_prefixes).posterior(x, K)
    t = torch.arange(len(x))
    return q.probs("z_*")[t, t]


def smoothed(x: Tensor, K: int = 2) -> Tensor:
    """p(z_t | x_1..T) for every t, at the current parameters. # (T,) -> (T, K)"""
    return ExactPosteriorEM(model).posterior(x, K).probs("z_*")


def decoded(x: Tensor, K: int = 2) -> Tensor:
    """The jointly most probable path (Viterbi), at the current parameters. # (T,) -> (T,)"""
    return ExactPosteriorEM(model).posterior(x, K).mode()["z_*"]


def forecast(x: Tensor, K: int = 2, horizon: int = 5, most: int = 60) -> Tensor:
    """p(x_T+h = c | x_1..T) for counts c = 0..most and h = 1..horizon. # (horizon, most + 1)"""
    q = ExactPosteriorEM(model).posterior(x, K, horizon=horizon)
    weights = q.probs("z_*")[len(x) :]
    counts = torch.arange(most + 1).to(x).unsqueeze(-1)
    rate = parameters(x, K)[2].detach()
    return weights @ dist.Poisson(rate).log_prob(counts).exp().T


def interval(probs: Tensor, level: float = 0.9) -> tuple[int, int]:
    """The central interval of counts that holds at least ``level``. # probs: (counts,)"""
    below = probs.cumsum(-1)
    return int((below < (1 - level) / 2).sum()), int((below < (1 + level) / 2).sum())


def draw(x: Tensor, K: int, ahead: Tensor, path: Path) -> None:
    """The series with its decoded states, the probabilities of the top state, the forecast.

    Args:
        x: Counts. # (T,)
        K: Number of states; the parameters are the current ones.
        ahead: Forecast distributions. # (horizon, counts)
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    from pyro_em import plotting

    years = torch.arange(len(x)) + FIRST_YEAR
    rate, states = parameters(x, K)[2].detach(), decoded(x, K)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.4, 1), height_ratios=(1.5, 1))
    top = figure.add_subplot(grid[0, 0])
    labels = [f"state {k + 1}, {float(rate[k]):.1f} a year" for k in range(K)]
    plotting.state_sequence(x, states, top, times=years, means=rate, labels=labels)
    top.set_xlabel("")
    top.set_ylabel("earthquakes in the year")
    top.set_ylim(0, float(x.max()) * 1.25)
    top.set_title("Decoding splits the century into quiet and active years")
    top.legend(ncols=K + 1, frameon=False, loc="upper left")
    bottom = figure.add_subplot(grid[1, 0], sharex=top)
    top_state = int(rate.argmax())
    bottom.plot(years, filtered(x, K)[:, top_state], color="0.6", linewidth=1.2, label="filtered")
    colour = plotting.PALETTE[top_state % len(plotting.PALETTE)]
    smooth = smoothed(x, K)[:, top_state]
    bottom.plot(years, smooth, color=colour, linewidth=1.8, label="smoothed")
    bottom.set_ylim(-0.03, 1.3)
    bottom.set_yticks([0, 0.5, 1])
    bottom.set_xlabel("year")
    bottom.set_ylabel(f"probability of state {top_state + 1}")
    bottom.set_title("Hindsight (smoothing) is surer than the knowledge of the time (filtering)")
    bottom.legend(ncols=2, frameon=False, loc="upper left")
    right = figure.add_subplot(grid[:, 1])
    last = FIRST_YEAR + len(x) - 1
    right.bar(
        range(ahead.shape[1]), ahead[0], color=plotting.PALETTE[0], alpha=0.55, label=f"{last + 1}"
    )
    far = f"{last + len(ahead)}"
    right.step(range(ahead.shape[1]), ahead[-1], where="mid", color=plotting.PALETTE[1], label=far)
    right.set_xlim(0, 45)
    right.set_xlabel("earthquakes in the year")
    right.set_ylabel("probability")
    right.set_title("Forecast: wider the further ahead")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Plan, choose the number of states, print what the chain says, and draw."""
    parser = argparse.ArgumentParser(description="Fit a Poisson hidden Markov model.")
    parser.add_argument("-K", type=int, default=2, help="number of states to look at")
    parser.add_argument("--largest", type=int, default=3, help="largest number of states tried")
    parser.add_argument("--horizon", type=int, default=10, help="years to forecast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/hmm.png"))
    options = parser.parse_args()

    x, K = load_data(), options.K
    print(numbers_of_states(x, options.largest))
    em = ExactPosteriorEM(model)
    print(f"\n{em.plan(x, K)}\n")
    result = em.fit(x, K, tol=1e-11, seed=options.seed, progress=True)
    print(f"\nlog evidence {result.log_evidence:.6f} after {result.num_steps} steps\n")
    states = decoded(x, K)
    for k in range(K):
        row = ", ".join(f"{v:.6f}" for v in result.params["A"][k].tolist())
        print(f"state {k + 1}: rate {result.params['rate'][k]:.6f}, transitions {row}")
        print(f"  {int((states == k).sum())} of {len(x)} years by Viterbi")
    ahead = forecast(x, K, options.horizon)
    last = FIRST_YEAR + len(x) - 1
    for h in (0, options.horizon - 1):
        mean = float(ahead[h] @ torch.arange(ahead.shape[1]).to(ahead))
        low, high = interval(ahead[h])
        print(f"forecast for {last + 1 + h}: mean {mean:.2f}, 90% between {low} and {high}")
    try:
        draw(x, K, ahead, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
