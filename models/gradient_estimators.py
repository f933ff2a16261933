"""Two estimators of one gradient, and why everyone reparameterises.

    d/dφ E_q[x²] = 2 φ,   q = Normal(φ, 1)

    score function      x² (x − φ),        x ~ q                 variance φ⁴ + 14 φ² + 15
      with a baseline   (x² − b)(x − φ)    b = φ² + 1, the mean  variance 8 φ² + 10
                                           b = φ² + 3, the best  variance 8 φ² + 6
    reparameterisation  2 (φ + ε),         ε ~ Normal(0, 1)      variance 4

All are right on average; they differ in how many draws they need. The score function only weighs
log q by the cost of the draw, so that it works where x is a count or the cost has no derivative, and
pays for it. Reparameterisation follows the draw x = φ + ε. A baseline subtracts what is known of the
cost without looking at the draw. A reader learns what stands behind every stochastic step of this
library: a guide's site whose distribution can be reparameterised takes the second way, every other
one the first, with a running average of past costs as its baseline.

Run it: ``python -m models.gradient_estimators``.

Source: Williams (1992) for the score function; Kingma and Welling (2014) for reparameterisation;
Mohamed, Rosca, Figurnov and Mnih (2020), "Monte Carlo gradient estimation in machine learning".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, TraceExact_ELBO

SCORE, BASELINE, PATH = "score function", "score function, baseline", "reparameterisation"
COLOURS = {SCORE: "#d95f02", BASELINE: "#9467bd", PATH: "#1f77b4"}
PHIS = (0.0, 0.5, 1.0, 2.0, 3.0)


class NormalByScore(dist.Normal):
    """A Normal that claims it cannot be reparameterised."""

    has_rsample = False


def variances(phi: float) -> dict[str, float]:
    """The variance of one draw of each estimator, in closed form."""
    return {SCORE: phi**4 + 14 * phi**2 + 15, BASELINE: 8 * phi**2 + 10, PATH: 4.0}


def estimates(phi: float, n: int) -> dict[str, Tensor]:
    """Independent single-draw estimates of d/dφ E_q[x²], by differentiating surrogates.

    Args:
        phi: The mean of q.
        n: Number of estimates.

    Returns:
        Per estimator. # (n,)
    """
    mean = torch.full((n,), phi, dtype=torch.float64, requires_grad=True)  # one draw for each
    q = dist.Normal(mean, 1.0)
    x = q.sample()
    surrogates = {
        SCORE: x**2 * q.log_prob(x),
        BASELINE: (x**2 - (phi**2 + 1)) * q.log_prob(x),
        PATH: q.rsample() ** 2,
    }
    return {k: torch.autograd.grad(s.sum(), mean)[0] for k, s in surrogates.items()}


def model(phi: Tensor) -> None:
    """A target that differs from q = Normal(φ, 1) by exp(−x²): then −ELBO = E_q[x²]. # phi: (n,)"""
    with pyro.plate("draws", len(phi)):
        x = pyro.sample("x", dist.Normal(phi, 1.0))
        pyro.factor("cost", -(x**2))


def guide_by_path(phi: Tensor) -> None:
    """A guide that can be reparameterised. # phi: (n,)"""
    mean = pyro.param("mean", phi.clone())
    with pyro.plate("draws", len(phi)):
        pyro.sample("x", dist.Normal(mean, 1.0))


def guide_by_score(phi: Tensor) -> None:
    """The same distribution, without that property. # phi: (n,)"""
    mean = pyro.param("mean", phi.clone())
    with pyro.plate("draws", len(phi)):
        pyro.sample("x", NormalByScore(mean, 1.0))


def library_estimates(phi: float, n: int) -> dict[str, Tensor]:
    """The same three, as this library's bound differentiates: n means, one draw for each.

    Args:
        phi: The mean of q.
        n: Number of estimates.

    Returns:
        Per estimator. # (n,)
    """
    at = torch.full((n,), phi, dtype=torch.float64)
    out = {}
    for name, guide in ((SCORE, guide_by_score), (PATH, guide_by_path)):
        pyro.clear_param_store()
        elbo = TraceExact_ELBO()
        elbo.loss_and_grads(model, guide, at)
        out[name] = pyro.param("mean").grad.clone()
        if name == SCORE:  # the second step knows the average cost of the first
            pyro.param("mean").grad.zero_()
            elbo.loss_and_grads(model, guide, at)
            out[BASELINE] = pyro.param("mean").grad.clone()
    pyro.clear_param_store()
    return {name: out[name] for name in COLOURS}


def draw(phi: float, n: int, path: Path) -> None:
    """Spread of the estimates against the number of draws, and variances against φ.

    Args:
        phi: Of the left-hand panel.
        n: Estimates for a variance.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [4**j for j in range(6)]
    drawn = estimates(phi, 400 * sizes[-1])
    shares = torch.tensor([0.05, 0.95], dtype=torch.float64)
    for name, colour in COLOURS.items():
        means = [drawn[name].reshape(-1, s).mean(1) for s in sizes]
        low, high = torch.stack([m.quantile(shares) for m in means]).T
        left.fill_between(sizes, low, high, color=colour, alpha=0.25, label=name)
        left.plot(sizes, low, color=colour, lw=1.2)
        left.plot(sizes, high, color=colour, lw=1.2)
    left.axhline(2 * phi, color="black", lw=1, ls="--", label="exact: 2 φ")
    left.set_xscale("log", base=4)
    left.set_xticks(sizes, [str(s) for s in sizes])
    left.set_xlabel("draws averaged in one estimate")
    left.set_ylabel("estimate of the gradient")
    left.set_title(f"Where 90% of the estimates lie (φ = {phi:g})")
    left.legend(frameon=False)

    curve = torch.linspace(0, 3, 61)
    dots = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    measured = {p: estimates(p, n) for p in dots}
    for name, colour in COLOURS.items():
        right.plot(curve, [variances(float(p))[name] for p in curve], color=colour, label=name)
        right.plot(dots, [float(measured[p][name].var()) for p in dots], "o", color=colour)
    right.plot([], [], "o", color="grey", label="measured")
    right.set_yscale("log")
    right.set_ylim(bottom=2)
    right.set_xlabel("φ")
    right.set_ylabel("variance of one draw (log scale)")
    right.set_title("Only reparameterisation does not grow with φ")
    right.legend(frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, estimate, print and draw."""
    parser = argparse.ArgumentParser(description="Score function against reparameterisation.")
    parser.add_argument("--draws", type=int, default=100_000, help="draws for each variance")
    parser.add_argument("--phi", type=float, default=1.0, help="of the figure's left panel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/gradient_estimators.png"))
    options = parser.parse_args()

    pyro.set_rng_seed(options.seed)
    print(ExactPosteriorEM(model, guide_by_score).plan(torch.ones(3)), end="\n\n")
    pyro.clear_param_store()
    print(f"Gradient 2 φ of E[x²]: averages and variances of {options.draws:,} single draws")
    print("  φ    estimator                  mean     variance  (theory)   in this library's bound")
    for phi in PHIS:
        own, library = estimates(phi, options.draws), library_estimates(phi, options.draws)
        for name in COLOURS:
            mean, variance = float(own[name].mean()), float(own[name].var())
            print(f"  {phi:.1f}  {name:25s}  {mean:7.3f}  {variance:9.2f}  ", end="")
            print(f"({variances(phi)[name]:7.2f})  {float(library[name].var()):9.2f}")
    ratio = variances(3.0)[SCORE] / variances(3.0)[PATH]
    print(f"\nAt φ = 3 the score function needs {ratio:.0f} times the draws of reparameterisation")
    print(f"for the same precision; with a baseline {variances(3.0)[BASELINE] / 4:.0f} times.")
    try:
        draw(options.phi, options.draws, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
