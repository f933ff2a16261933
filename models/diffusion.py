"""Diffusion: a hierarchy of latents whose guide adds noise and has nothing to learn.

    guide   z_1 = √(1 − β_1) x + √β_1 ε,   z_t = √(1 − β_t) z_{t−1} + √β_t ε
    model   z_T ~ N(0, I),   z_{t−1} | z_t ~ N(m_t(z_t), S_t),   x | z_1 ~ N(m_1(z_1), S_1)

    log p(x) ≥ E_q[log p(x, z_1, …, z_T) − Σ_t log q(z_t | z_{t−1})]

Each step of the guide forgets a little of x, until nothing is left; the model learns to go back, so
that new data come from noise. It is the VAE's bound with a guide without parameters, and the M-step
alone is left. Two ways back: linear steps, m_t(z) = A_t z + b_t, and a small network for each step.

With linear steps everything is known in closed form. The bound sees the data only by their mean m and
covariance S, the best steps are the conditionals of the joint Gaussian that the guide makes of N(m, S),
and at these

    bound / N = −H(N(m, S)) − KL(N(m_T, S_T) ‖ N(0, I)),

where m_T, S_T are what is left of the data after T steps. Model and latents are a Gaussian chain, so
that their evidence is exact as well: p(x) = N(μ, C), which this library finds as Kalman's filter does
when it is given no guide. A reader learns that a guide without parameters costs little if it forgets
all (the gap is a part of the KL divergence above), and that the way back decides what can be said:
linear steps make a Gaussian of anything, and networks part the two clusters.

Run it: ``python -m models.diffusion`` (twenty seconds). Data: Old Faithful's eruptions,
standardised. Source: Sohl-Dickstein, Weiss, Maheswaranathan and Ganguli (2015), "Deep unsupervised
learning using nonequilibrium thermodynamics"; Ho, Jain and Abbeel (2020), "Denoising diffusion
probabilistic models".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from models import gmm
from pyro_em import EMResult, ExactPosteriorEM


class Diffusion(nn.Module):
    """The noise of each step, a way back, and the Pyro model and guide of them.

    Args:
        beta: β_1, …, β_T, the share of the variance that each step replaces by noise. # (T,)
        D: Number of dimensions of the data.
        hidden: Width of the network of each step of the way back; linear steps where None.
    """

    def __init__(self, beta: Tensor, D: int, hidden: int | None = None) -> None:
        super().__init__()
        self.beta, self.D = beta, D
        self.keep = (1 - beta).cumprod(0)  # of the variance of x, after t steps
        own = [] if hidden is None else [network(D, hidden) for _ in beta]
        self.networks = nn.ModuleList(own).to(beta)

    def __len__(self) -> int:
        """T, the number of steps."""
        return len(self.beta)

    def model(self, x: Tensor) -> None:
        """From noise to data. # x: (N, D)"""
        back = self.network_steps() if self.networks else self.linear_steps()
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{len(self)}", dist.Normal(x.new_zeros(self.D), 1.0).to_event(1))
            for t in reversed(range(1, len(self))):
                z = pyro.sample(f"z_{t}", back(t, z))
            pyro.sample("x", back(0, z), obs=x)

    def guide(self, x: Tensor) -> None:
        """From data to noise; there is nothing to learn. # x: (N, D)"""
        with pyro.plate("data", len(x)):
            z = x
            for t, beta in enumerate(self.beta, start=1):
                z = pyro.sample(
                    f"z_{t}", dist.Normal((1 - beta).sqrt() * z, beta.sqrt()).to_event(1)
                )

    def linear_steps(self) -> Callable[[int, Tensor], Any]:
        """z_{t} | z_{t+1} = z ~ N(A_t z + b_t, S_t), with z_0 = x; a function of t and z."""
        eye = torch.eye(self.D).to(self.beta)
        A = pyro.param("A", (1 - self.beta).sqrt()[:, None, None] * eye)
        b = pyro.param("b", self.beta.new_zeros(len(self), self.D))
        S = pyro.param(
            "S", self.beta[:, None, None] * eye, constraint=constraints.positive_definite
        )
        return lambda t, z: dist.MultivariateNormal(z @ A[t].T + b[t], S[t])

    def network_steps(self) -> Callable[[int, Tensor], Any]:
        """The same with a mean that is moved by a network of each step."""
        pyro.module("networks", self.networks)
        s = pyro.param("s", self.beta.sqrt(), constraint=constraints.positive)

        def back(t: int, z: Tensor) -> Any:
            mean = (1 - self.beta[t]).sqrt() * z + self.networks[t](z)
            return dist.Normal(mean, s[t]).to_event(1)

        return back


def network(D: int, hidden: int) -> nn.Sequential:
    """A map that starts at zero. # (N, D) -> (N, D)"""
    last = nn.Linear(hidden, D)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), last)


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Duration of eruptions and waiting time, each with mean 0 and standard deviation 1. # (272, 2)"""
    x = gmm.load_data(dtype)
    return (x - x.mean(0)) / x.std(0, correction=0)


def initialize(x: Tensor, T: int = 12, hidden: int | None = None, seed: int = 0) -> Diffusion:
    """Steps back that shrink as the guide's do, linear or with networks on top that start at zero.

    Args:
        x: Data. # (N, D)
        T: Number of steps.
        hidden: Width of the network of each step; linear steps where None.
        seed: Of the networks' random weights.
    """
    pyro.clear_param_store()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Diffusion(torch.linspace(0.02, 0.7, T).to(x), x.shape[1], hidden)


def best_linear_steps(x: Tensor, beta: Tensor) -> tuple[dict[str, Tensor], float]:
    """The optimum of the bound over linear steps back, in closed form.

    With m_t, S_t the mean and covariance of z_t (m_0, S_0 those of the data) and a = √(1 − β),
    A = a S_{t−1} S_t⁻¹, b = m_{t−1} − A m_t and S = S_{t−1} − a A S_{t−1}.

    Args:
        x: Data. # (N, D)
        beta: The guide's noise. # (T,)

    Returns:
        ``A``, ``b`` and ``S`` of all steps, and the bound in nats.
    """
    mean, cov = x.mean(0), torch.cov(x.T, correction=0)
    eye, entropy = torch.eye(x.shape[1]).to(x), 0.5 * torch.logdet(2 * math.pi * math.e * cov)
    found: dict[str, list[Tensor]] = {"A": [], "b": [], "S": []}
    for step in beta:
        a, before, m = (1 - step).sqrt(), cov, mean
        mean, cov = a * mean, (1 - step) * cov + step * eye
        A = a * torch.linalg.solve(cov, before).T
        S = before - a * A @ before
        found["A"].append(A)
        found["b"].append(m - A @ mean)
        found["S"].append((S + S.T) / 2)
    kl = 0.5 * (cov.trace() + mean @ mean - len(mean) - torch.logdet(cov))
    return {k: torch.stack(v) for k, v in found.items()}, -len(x) * float(entropy + kl)


def evidence_of_linear_steps(x: Tensor, steps: dict[str, Tensor]) -> float:
    """log p(x) of linear steps from N(0, I): a Gaussian, whose mean and covariance follow them."""
    mean, cov = x.new_zeros(x.shape[1]), torch.eye(x.shape[1]).to(x)
    for A, b, S in zip(*(steps[k].flip(0) for k in ("A", "b", "S")), strict=True):
        mean, cov = A @ mean + b, A @ cov @ A.T + S
    return float(dist.MultivariateNormal(mean, cov).log_prob(x).sum())


def fit(x: Tensor, pair: Diffusion, steps: int, lr: float, seed: int) -> tuple[EMResult, Any]:
    """Climb the bound with Adam, whose learning rate falls to a hundredth; and ``em`` itself."""
    adam = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
    em = ExactPosteriorEM(pair.model, pair.guide, adam, strategy="guide")
    print(em.plan(x), end="\n\n")
    return em.fit(x, max_steps=steps, seed=seed, progress=True), em


@torch.no_grad()
def guide_draws(pair: Diffusion, x: Tensor, seed: int) -> dict[str, Tensor]:
    """x and its way to noise. # (N, D) each"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nodes = pyro.poutine.trace(pair.guide).get_trace(x).nodes
    return {"x": x, **{f"z_{t}": nodes[f"z_{t}"]["value"] for t in range(1, len(pair) + 1)}}


@torch.no_grad()
def new_data(pair: Diffusion, x: Tensor, n: int, seed: int) -> dict[str, Tensor]:
    """Draws of the model, from noise to data: every site. # (n, D) each"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trace = pyro.poutine.trace(pyro.poutine.uncondition(pair.model))
        nodes = trace.get_trace(x.new_zeros(n, x.shape[1])).nodes
    sites = ["x", *(f"z_{t}" for t in range(1, len(pair) + 1))]
    return {site: nodes[site]["value"] for site in sites}


def draw(
    x: Tensor,
    ways: dict[str, dict[str, Tensor]],
    results: dict[str, EMResult],
    best: float,
    path: Path,
) -> None:
    """Data on their way to noise, noise on two ways back, and the bounds.

    Args:
        x: Data.
        ways: By title, x, z_1, … as drawn: those of the guide first.
        results: A fit for each of the ways back.
        best: The optimum of linear steps, in nats.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 11), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    top, bottom = parts
    last = len(next(iter(ways.values()))) - 1
    shown = [0, *(round(last * share) for share in (0.25, 0.5, 0.75)), last]
    panels = top.subplots(len(ways), len(shown), sharex=True, sharey=True)
    colours = ("#555555", "#1f77b4", "#d95f02")
    for row, (title, sites), colour in zip(panels, ways.items(), colours, strict=True):
        for ax, t in zip(row, shown, strict=True):
            points = sites["x" if t == 0 else f"z_{t}"].cpu()
            ax.scatter(*points.T, s=5, color=colour, alpha=0.6, linewidth=0)
            ax.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal")
            if row is panels[0]:
                ax.set_title("x" if t == 0 else f"$z_{{{t}}}$")
        row[0].set_ylabel(title)

    ax = bottom.subplots()
    for (name, result), colour in zip(results.items(), colours[1:], strict=True):
        ax.plot(torch.tensor(list(result.history)) / len(x), color=colour, lw=0.8, label=name)
    ax.axhline(best / len(x), color="black", lw=1, ls="--", label="best linear steps (closed form)")
    ax.set_ylim(best / len(x) - 0.6, best / len(x) + 0.6)
    ax.set(xlabel="step of the fit", ylabel="bound (nats per row)")
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Plan, fit linear steps and networks, print and draw."""
    parser = argparse.ArgumentParser(description="A diffusion of Old Faithful, there and back.")
    parser.add_argument("--T", type=int, default=12, help="steps from data to noise")
    parser.add_argument("--hidden", type=int, default=64, help="width of each network")
    parser.add_argument("--steps", type=int, default=300, help="of Adam, for the linear steps")
    parser.add_argument("--network-steps", type=int, default=600, help="the same for the networks")
    parser.add_argument("--particles", type=int, default=50, help="draws for the printed bounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/diffusion.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    x = load_data()
    results, ways = {}, {}
    pair = initialize(x, options.T)
    steps, best = best_linear_steps(x, pair.beta)
    results["linear steps"], em = fit(x, pair, options.steps, 0.02, options.seed)
    bound = em.elbo(x, num_particles=options.particles)
    print(f"linear steps: bound {bound.value:.2f} ± {bound.standard_error:.2f} nats after the fit,")
    print(f"  {best:.2f} at the best steps (closed form);")
    bound = em.elbo(x, params=steps, num_particles=options.particles)
    evidence = evidence_of_linear_steps(x, steps)
    print(
        f"at these: drawn bound {bound.value:.2f} ± {bound.standard_error:.2f}, log evidence of ",
        end="",
    )
    print(f"the chain {bound.log_evidence:.4f},")
    print(f"  of its marginal Gaussian (closed form) {evidence:.4f}, gap {evidence - best:.4f}\n")
    ways["the guide: to noise"] = guide_draws(pair, x, options.seed)
    ways["linear steps back"] = new_data(pair, x, len(x), options.seed)

    pair = initialize(x, options.T, options.hidden, options.seed)
    results["networks"], em = fit(x, pair, options.network_steps, 0.02, options.seed)
    bound = em.elbo(x, num_particles=options.particles)
    print(
        f"networks: bound {bound.value:.2f} ± {bound.standard_error:.2f} nats; the evidence of ",
        end="",
    )
    print("linear steps, that of a Gaussian, lies below it")
    ways["networks back"] = new_data(pair, x, len(x), options.seed)
    try:
        draw(x, ways, results, best, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
