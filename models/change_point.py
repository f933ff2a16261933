"""A change point: one latent year for a whole series of coal-mining disasters.

    k ~ Uniform{1851, …, 1961},   y_t ~ Poisson(λ_before) for t ≤ k,   y_t ~ Poisson(λ_after) for t > k

The latent is outside the plate of years: one choice, shared by all 112 observations. The E-step sums
it over all 111 values, the M-step is closed: each rate is an average of counts, weighted by the
probability that the year lies on its side of the change. A reader learns what a posterior over a
*time* looks like, and what EM leaves out: it takes the fitted rates as known. With conjugate priors
on the rates they can be integrated out by hand, so that both posteriors are drawn here.

Run it: ``python -m models.change_point``. Data: British coal-mining disasters with ten deaths or
more, per year, 1851 to 1962: 191 in 112 years.

Source: Jarrett (1979), "A note on the intervals between coal-mining disasters", for the data;
Raftery and Akman (1986) and Carlin, Gelfand and Smith (1992) for the change point.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM

FIRST = 1851
DISASTERS = (
    "4541043406334026335453144155342522342132211113001011003103220111010100021000110233112111124200"
    "014000100000100101"
)


def model(y: Tensor) -> None:
    """One change, anywhere but after the last year. # y: (T,)"""
    T = len(y)
    half = T // 2
    start = torch.stack([y[:half].mean(), y[half:].mean()])
    rate = pyro.param("rate", start, constraint=constraints.positive)
    k = pyro.sample("k", dist.Categorical(y.new_ones(T - 1) / (T - 1)))
    with pyro.plate("years", T):
        after = (torch.arange(T) > k).long()
        pyro.sample("y", dist.Poisson(rate[after]), obs=y)


def constant(y: Tensor) -> None:
    """The same without a change. # y: (T,)"""
    rate = pyro.param("constant", y.mean(), constraint=constraints.positive)
    with pyro.plate("years", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Disasters per year, 1851 to 1962. # (112,)"""
    return torch.tensor([int(c) for c in DISASTERS], dtype=dtype)


def rates_integrated_out(y: Tensor, shape: float = 0.5, inverse_scale: float = 0.25) -> Tensor:
    """p(k | y) where the rates are unknown: Gamma priors, integrated in closed form.

    p(y | k) ∝ Π_sides Γ(a + S) / (b + n)^(a + S), with n years and S disasters on a side.

    Args:
        y: Counts. # (T,)
        shape: a of both priors.
        inverse_scale: b of both priors.

    Returns:
        Probabilities of the last year before the change. # (T - 1,)
    """
    n = torch.arange(1, len(y)).to(y)
    total = y.cumsum(0)[:-1]
    log_p = torch.zeros_like(n)
    for years, disasters in ((n, total), (len(y) - n, y.sum() - total)):
        a, b = shape + disasters, inverse_scale + years
        log_p = log_p + torch.lgamma(a) - a * b.log()
    return log_p.softmax(0)


def smallest_set(probs: Tensor, share: float = 0.95) -> Tensor:
    """The fewest years that hold a share of the probability, in order. # (K,) -> (years,)"""
    order = probs.argsort(descending=True)
    count = int((probs[order].cumsum(0) < share).sum()) + 1
    return order[:count].sort().values + FIRST


def draw(y: Tensor, result: EMResult, path: Path) -> None:
    """The counts with the expected rate of each year, and the posterior of the year."""
    from matplotlib.figure import Figure

    years = (torch.arange(len(y)) + FIRST).numpy()
    probs = result.posterior.probs("k")
    before, after = result.params["rate"].tolist()
    past = torch.cat([torch.zeros(1).to(probs), probs]).cumsum(0)  # P(k < t)
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    top.bar(years, y.numpy(), color="#9ecae1", width=0.8, label="disasters in the year")
    top.plot(years, before + (after - before) * past, color="#d95f02", lw=2, label="expected rate")
    top.set_xlim(FIRST - 1, FIRST + len(y))
    top.set_ylabel("disasters per year")
    top.set_title(f"British coal mines: {before:.1f} disasters a year, then {after:.1f}")
    top.legend(frameon=False)
    bottom.bar(
        years[:-1], probs.numpy(), color="#1f77b4", width=0.8, label="at the fitted rates (EM)"
    )
    bottom.plot(
        years[:-1],
        rates_integrated_out(y),
        "o",
        color="#d95f02",
        markersize=6,
        label="rates integrated out",
    )
    bottom.set_xlim(1879.4, 1902.6)
    bottom.set_xticks(range(1880, 1903, 2))
    bottom.set_xlabel("last year before the change")
    bottom.set_ylabel("probability")
    bottom.set_title(
        f"The change came around 1890: most probably after {int(probs.argmax()) + FIRST}"
    )
    bottom.legend(frameon=False)
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Find the year in which mining became safer.")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is random")
    parser.add_argument("--figure", type=Path, default=Path("figures/change_point.png"))
    options = parser.parse_args()

    y = load_data()
    em = ExactPosteriorEM(model)
    print(em.plan(y), end="\n\n")
    result = em.fit(y, tol=1e-9)
    print(f"{result}\n")
    rate, errors = result.params["rate"].tolist(), result.standard_errors()["rate"].tolist()
    print(f"disasters a year: {rate[0]:.4f} ± {errors[0]:.4f} before the change,")
    print(f"                  {rate[1]:.4f} ± {errors[1]:.4f} after it")
    probs = result.posterior.probs("k")
    years = smallest_set(probs)
    wide = smallest_set(rates_integrated_out(y))
    print(f"most probable last year before it: {int(result.posterior.mode()['k']) + FIRST}")
    print(f"95% of the probability: {_ranges(years)} ({_ranges(wide)} with the rates unknown)")
    print("P(last year before the change), at the fitted rates and with them integrated out")
    for t in range(1885 - FIRST, 1898 - FIRST):
        print(f"  {t + FIRST}  {float(probs[t]):.4f}  {float(rates_integrated_out(y)[t]):.4f}")
    flat = ExactPosteriorEM(constant).fit(y)
    assert result.bic is not None and flat.bic is not None
    print(f"BIC {result.bic:.2f} with a change, {flat.bic:.2f} with one rate (lower is better)")
    try:
        draw(y, result, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


def _ranges(years: Tensor) -> str:
    """Years in words: ``1886-1892, 1895``."""
    runs: list[list[int]] = []
    for year in years.tolist():
        if runs and year == runs[-1][-1] + 1:
            runs[-1].append(year)
        else:
            runs.append([year])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


if __name__ == "__main__":
    main()
