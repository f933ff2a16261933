"""Rats that live to be weaned, litter by litter: a probability of its own for each litter.

    p_i ~ Beta(a_g, b_g),   x_i ~ Binomial(n_i, p_i)          g = control or treated

Litters differ more than coins of one bias would. Each litter's probability has an exact posterior,
Beta(a + x_i, b + n_i − x_i); what is left of the data is beta-binomial, whose intraclass correlation
1 / (a + b + 1) says how alike the pups of a litter are. Run it: ``python -m models.litters``.

Source: Weil (1970), Food and Cosmetics Toxicology 8; Williams (1975), "The analysis of binary responses
from toxicological experiments involving reproduction and teratogenicity", Biometrics 31.
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

# (weaned, alive at four days) of the litters of control and of treated mothers.
CONTROL = (
    *((13, 13), (12, 12), (9, 9), (9, 9), (8, 8), (8, 8), (12, 13), (11, 12)),
    *((9, 10), (9, 10), (8, 9), (11, 13), (4, 5), (5, 7), (7, 10), (7, 10)),
)
TREATED = (
    *((12, 12), (11, 11), (10, 10), (9, 9), (10, 11), (9, 10), (9, 10), (8, 9)),
    *((8, 9), (4, 5), (7, 9), (4, 7), (5, 10), (3, 6), (3, 10), (0, 7)),
)


def model(weaned: Tensor, alive: Tensor, group: Tensor) -> None:
    """A probability for each litter. # (N,), (N,), (N,)"""
    start = alive.new_tensor([2.0, 2.0])
    a = pyro.param("a", start, constraint=constraints.positive)
    b = pyro.param("b", start.clone(), constraint=constraints.positive)
    with pyro.plate("litters", len(weaned)):
        p = pyro.sample("p", dist.Beta(a[group], b[group]))
        pyro.sample("weaned", dist.Binomial(alive, p), obs=weaned)


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Pups weaned and pups alive at four days, and whether the mother was treated. # (32,) each"""
    rows = torch.tensor(CONTROL + TREATED, dtype=dtype)
    group = torch.arange(2).repeat_interleave(16)
    return rows[:, 0].clone(), rows[:, 1].clone(), group


def fit(weaned: Tensor, alive: Tensor, group: Tensor) -> EMResult:
    """To rounding, from the model's own start, in a parameter scope of its own."""
    with pyro.get_param_store().scope():
        result = ExactPosteriorEM(model).fit(
            weaned, alive, group, tol=1e-10, max_steps=2000, acceleration="squarem"
        )
        assert isinstance(result, EMResult)
        return result


def draw(weaned: Tensor, alive: Tensor, result: EMResult, path: Path) -> None:
    """Shares of litters, and what their groups make of them."""
    from matplotlib.figure import Figure

    assert isinstance(result.posterior, Posterior)
    mean = result.posterior.mean("p")
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(len(weaned))
    axes.plot(places, weaned / alive, "x", color="#d95f02", label="weaned / alive")
    axes.plot(places, mean, "o", color="#1f77b4", label="posterior mean")
    axes.axvline(15.5, color="#888888", linewidth=0.8)
    axes.set_xlabel("litter: control, then treated")
    axes.set_ylabel("probability to be weaned")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Beta-binomial litters.")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is random")
    parser.add_argument("--figure", type=Path, default=Path("figures/litters.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    weaned, alive, group = load_data()
    with pyro.get_param_store().scope():
        print(f"{ExactPosteriorEM(model).plan(weaned, alive, group)}\n")
    result = fit(weaned, alive, group)
    print(result)
    a, b = result.params["a"], result.params["b"]
    for name, mean, alike in zip(("control", "treated"), a / (a + b), 1 / (a + b + 1), strict=True):
        print(f"{name}: {float(mean):.4f} weaned, intraclass correlation {float(alike):.4f}")
    try:
        draw(weaned, alive, result, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
