"""A product of two unknowns: the smallest model whose posterior no Gaussian fits.

    u, v ~ N(0, 1),   r | u, v ~ N(u v, 1),   log p(r) = log ∫ N(r; 0, 1 + v²) N(v; 0, 1) dv

Given v the model is linear and Gaussian in u, and the other way round; in both at once it is not.
Signs cannot be told apart, so that the posterior has two equal modes, near u = v = ±√(r − 1) for
r > 1. A mean-field guide q(u) q(v) of two Normals must choose one of them. For r > 1.62 its best
means are ±√(r − 1 − 1/r), both of one sign, with standard deviations 1/√r; then

    ELBO = 1/2 − r − log r − log(2π)/2,
    log p(r) − ELBO = KL(q ‖ posterior) ≈ log 2 (the mode not taken) + the shape of the other.

A reader learns that a bound says nothing about what a guide has never visited: importance weights
repair the shape, but not the log 2, and their standard error and Pareto k̂ describe the weights that
were drawn, not those that never were. Draws from the prior visit both modes.

Run it: ``python -m models.bilinear`` (twenty seconds). Source: Lim and Teh (2007), "Variational
Bayesian approach to movie rating prediction", for the model with many u and v; the mode-seeking
KL: Bishop (2006), section 10.1.2.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, EvidenceEstimate, ExactPosteriorEM, plotting

STARTS = {"both positive": (1.0, 1.0), "both negative": (-1.0, -1.0)}


def model(r: Tensor) -> None:
    """A rating that is the product of a taste and a quality, and noise. # r: ()"""
    u = pyro.sample("u", dist.Normal(r.new_zeros(()), 1.0))
    v = pyro.sample("v", dist.Normal(r.new_zeros(()), 1.0))
    pyro.sample("r", dist.Normal(u * v, 1.0), obs=r)


def guide(r: Tensor) -> None:
    """q(u) q(v), two Normals. # r: ()"""
    loc = pyro.param("loc", r.new_ones(2))
    scale = pyro.param("scale", r.new_full((2,), 0.3), constraint=constraints.positive)
    pyro.sample("u", dist.Normal(loc[0], scale[0]))
    pyro.sample("v", dist.Normal(loc[1], scale[1]))


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """One rating. # ()"""
    return torch.tensor(4.0, dtype=dtype)


def initialize(r: Tensor, start: tuple[float, float]) -> None:
    """Put the guide's means at a point (u, v), and forget what was fitted."""
    pyro.clear_param_store()
    pyro.param("loc", r.new_tensor(start))


def log_posterior(r: Tensor, width: float = 4.0, points: int = 801) -> tuple[Tensor, Tensor, float]:
    """The exact answer, by a sum over a grid.

    Args:
        r: The rating. # ()
        width: The grid covers ±width in both directions.
        points: Per direction.

    Returns:
        The grid's axis, log p(u, v | r) on it and log p(r), the latter from the one-dimensional
        integral. # (G,), (G, G), float
    """
    v = torch.linspace(-10, 10, 4001, dtype=r.dtype)
    inner = dist.Normal(0.0, (1 + v**2).sqrt()).log_prob(r) + dist.Normal(0.0, 1.0).log_prob(v)
    evidence = float(torch.logsumexp(inner, 0)) + math.log(float(v[1] - v[0]))
    axis = torch.linspace(-width, width, points, dtype=r.dtype)
    u, v = torch.meshgrid(axis, axis, indexing="ij")
    prior = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(0.0, 1.0).log_prob(v)
    return axis, prior + dist.Normal(u * v, 1.0).log_prob(r) - evidence, evidence


def best_mean_field(r: float) -> tuple[float, float]:
    """The mean of the best q(u) q(v) and its bound, for r > 1.62; its deviations are 1/√r."""
    return math.sqrt(r - 1 - 1 / r), 0.5 - r - math.log(r) - 0.5 * math.log(2 * math.pi)


def by_draws(estimate: EvidenceEstimate) -> tuple[Tensor, Tensor]:
    """The importance-weighted bound for fewer draws, averaged over blocks of the draws made.

    Args:
        estimate: Of S draws.

    Returns:
        Block sizes, and the average over blocks of the bound at each size. # (sizes,), (sizes,)
    """
    log_w = estimate.log_weights
    sizes = [2**j for j in range(int(math.log2(len(log_w))) + 1)]
    bounds = []
    for size in sizes:
        blocks = log_w[: len(log_w) // size * size].reshape(-1, size)
        bounds.append((torch.logsumexp(blocks, 1) - math.log(size)).mean())
    return torch.tensor(sizes), torch.stack(bounds)


def draw(
    r: Tensor, fits: dict[str, EMResult], estimates: list[EvidenceEstimate], path: Path
) -> None:
    """The posterior's contours with the guides' ellipses, and the estimates of the evidence.

    Args:
        r: The rating.
        fits: One fit per start.
        estimates: From draws of the guide and of the prior.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    axis, log_p, evidence = log_posterior(r)
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.contourf(axis, axis, log_p.exp().T, levels=12, cmap="Greys", alpha=0.85)
    loc = torch.stack([fit.params["loc"] for fit in fits.values()])
    scale = torch.stack([fit.params["scale"] for fit in fits.values()])
    plotting.ellipses(loc, torch.diag_embed(scale**2), left)
    for colour, name in zip(plotting.PALETTE, fits, strict=False):
        left.plot([], [], color=colour, label=f"start {name}")
    left.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xlabel="u", ylabel="v")
    left.set_title(
        f"Posterior of u and v for r = {float(r):g} (grey), and\n"
        "50% and 95% of a mean-field guide from two starts"
    )
    left.legend(loc="lower right", frameon=False)

    for colour, estimate in zip(("#1f77b4", "#2ca02c"), estimates, strict=True):
        sizes, bounds = by_draws(estimate)
        name = f"draws from the {estimate.proposal}"
        right.semilogx(sizes, bounds, "o-", color=colour, markersize=4, label=name, base=2)
    right.axhline(evidence, color="black", lw=1.4, label="log evidence (quadrature)")
    right.axhline(evidence - math.log(2), color="black", lw=1, ls=":", label="log evidence − log 2")
    right.set_ylim(evidence - 1.5, evidence + 0.15)
    right.set_xlabel("draws S")
    right.set_ylabel("importance-weighted bound (nats)")
    right.set_title("More draws repair the guide's shape,\nbut not the mode that it never visits")
    right.legend(loc="lower right", frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit from two starts, print and draw."""
    parser = argparse.ArgumentParser(description="A mean-field guide for a product of unknowns.")
    parser.add_argument("--rating", type=float, default=4.0, help="r")
    parser.add_argument("--steps", type=int, default=1000, help="steps of Adam per start")
    parser.add_argument("--draws", type=int, default=2048, help="draws for the evidence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/bilinear.png"))
    options = parser.parse_args()

    pyro.set_rng_seed(options.seed)
    r = torch.full_like(load_data(), options.rating)
    _, _, evidence = log_posterior(r)
    fits: dict[str, EMResult] = {}
    for name, start in STARTS.items():
        initialize(r, start)
        decay = 0.01 ** (1 / options.steps)  # the learning rate falls to a hundredth
        em = ExactPosteriorEM(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": decay}))
        if not fits:
            print(em.plan(r), end="\n\n")
            print(f"log evidence {evidence:.6f} nats (quadrature)\n")
        fits[name] = em.fit(r, max_steps=options.steps, seed=options.seed, progress=True)
        bound = em.elbo(r, num_particles=options.draws // 2)
        (u, v), (su, sv) = fits[name].params["loc"].tolist(), fits[name].params["scale"].tolist()
        print(f"start {name}: q(u) = N({u:.3f}, {su:.3f}²), q(v) = N({v:.3f}, {sv:.3f}²)")
        gap = evidence - bound.value
        print(f"  bound {bound.value:.4f} ± {bound.standard_error:.4f}, ", end="")
        print(f"gap {gap:.4f} = log 2 + {gap - math.log(2):.4f}")
    if options.rating > 1.62:
        best, bound_at_best = best_mean_field(options.rating)
        print(f"best in closed form: means ±{best:.3f}, deviations {options.rating**-0.5:.3f},")
        print(f"  bound {bound_at_best:.4f}, gap {evidence - bound_at_best:.4f}")
    print()
    pyro.set_rng_seed(options.seed)
    estimates = [
        em.estimate_evidence(r, num_particles=options.draws, proposal=proposal)
        for proposal in ("guide", "prior")
    ]
    for estimate in estimates:
        print(estimate)
        print(f"  missing to the log evidence: {evidence - estimate.value:.4f} nats\n")
    print(
        "The guide has one of two equal modes. Weights repair its shape, but the other one is never"
    )
    print(
        f"drawn: log 2 = {math.log(2):.4f} nats stay missing. Standard error and Pareto k̂ judge the"
    )
    print("weights that were drawn; they do not say that every mode was visited.")
    try:
        draw(r, fits, estimates, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
