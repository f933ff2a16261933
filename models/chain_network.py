"""A chain of K-state nodes with Dirichlet priors: one transition table per node, or one for all.

    μ ~ Dir(α),  A_m(k, ·) ~ Dir(α),     p(x1, …, xM) = μ(x1) Π_m A_m(x_{m−1}, x_m)

The textbook draws this network twice. In the first drawing each node has parameters of its own, K − 1
+ (M − 1) K (K − 1) free numbers; in the second all nodes after the first share theirs, K − 1
+ K (K − 1), whatever M is; a table of the whole joint would have K^M − 1. With ``guide="map"`` the
parameters are the modes of their posteriors, (n + α − 1) / Σ (n + α − 1) with n counted transitions.
A reader learns what sharing and a prior are for: without the prior a transition that was never seen
makes new data impossible. Run it: ``python -m models.chain_network``.

Data: sequences drawn from a shared chain by ancestral sampling, which is the model run without data.
Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 8.1.2 and figures 8.10-12.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em import DataError, EMResult, ExactPosteriorEM

TRUTH = {
    "mu": torch.tensor([0.5, 0.3, 0.2]),
    "A": torch.tensor([[0.75, 0.20, 0.05], [0.25, 0.45, 0.30], [0.10, 0.40, 0.50]]),
}
K, M = 3, 6


def model(
    x: Tensor | None,
    shared: bool = False,
    alpha: float = 2.0,
    N: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Parameters from their priors, then N sequences; draws sequences where ``x`` is None.

    Args:
        x: States in 0 … K − 1, or None. # (N, M)
        shared: Whether all nodes after the first share one table.
        alpha: Of the Dirichlet priors, the same for each state.
        N: Number of sequences to draw.
        dtype: Of the parameters.

    Returns:
        The sequences. # (N, M)
    """
    concentration = torch.full((K,), alpha, dtype=dtype)
    mu = pyro.sample("mu", dist.Dirichlet(concentration))
    names = ["A"] if shared else [f"A{m}" for m in range(2, M + 1)]
    rows = dist.Dirichlet(concentration.expand(K, K)).to_event(1)
    A = [pyro.sample(name, rows) for name in names] * (M - 1 if shared else 1)
    states: list[Tensor] = []
    with pyro.plate("sequences", N if x is None else len(x)):
        for m in range(M):
            probs = A[m - 1][states[-1]] if states else mu
            data = None if x is None else x[:, m]
            states.append(pyro.sample(f"x{m + 1}", dist.Categorical(probs), obs=data))
    return torch.stack(states, -1)


def ancestral_sample(
    parameters: Mapping[str, Tensor], N: int, shared: bool = True, seed: int = 0
) -> Tensor:
    """Run the model forwards with its parameters held: each node after its parent. # (N, M)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pyro.condition(model, dict(parameters))(None, shared, N=N)


def load_data(N: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sequences from the true chain, whose table is shared. # (N, M)"""
    return ancestral_sample({n: t.to(dtype) for n, t in TRUTH.items()}, N, seed=seed)


def count(shared: bool, K: int = K, M: int = M) -> int:
    """Free parameters by formula."""
    return K - 1 + (1 if shared else M - 1) * K * (K - 1)


def fit(x: Tensor, shared: bool, alpha: float = 2.0) -> tuple[ExactPosteriorEM, EMResult]:
    """A fit of its own: the modes of the parameters' posteriors. # x: (N, M)"""
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide="map")
    return em, em.fit(x, shared, alpha)


def per_sequence(em: ExactPosteriorEM, x: Tensor, shared: bool, alpha: float) -> str:
    """The log probability of a sequence on average, or that one is impossible. # x: (N, M)"""
    try:
        value = em.posterior(x, shared, alpha).log_evidence
    except DataError:
        return "impossible"
    assert value is not None
    return f"{value / len(x):.4f}"


def draw(fits: Mapping[str, EMResult], path: Path) -> None:
    """The true table, the shared one, those of each node; and the numbers of parameters.

    Args:
        fits: The fits ``"shared"`` and ``"per node"``.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.75, 1))
    tables, curves = parts
    shown = {"truth": TRUTH["A"], "shared by all nodes": fits["shared"].params["A"]}
    shown |= {f"own table of $x_{m}$": fits["per node"].params[f"A{m}"] for m in range(2, M + 1)}
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    axes = tables.subplots(2, 4)
    axes[1, 0].set_axis_off()
    for (i, j), (name, table) in zip(places, shown.items(), strict=True):
        ax = axes[i, j]
        ax.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=1)
        for a in range(K):
            for b in range(K):
                p = float(table[a, b])
                ax.text(b, a, f"{p:.2f}", ha="center", va="center",
                        color="white" if p > 0.6 else "black", fontsize=9)  # fmt: skip
        ax.set_title(name, fontsize=10)
        ax.set_xticks(range(K))
        ax.set_yticks(range(K))
    axes[0, 0].set_ylabel("state before")
    axes[1, 1].set_ylabel("state before")
    for ax in axes[1, 1:]:
        ax.set_xlabel("state after")
    axes[0, 0].set_xlabel("state after")
    tables.suptitle("One shared table is close to the truth; each node's own is noisier")

    ax = curves.subplots()
    sizes = list(range(2, 13))
    for label, numbers, colour in (
        ("table of the joint: $K^M - 1$", [K**m - 1 for m in sizes], "0.5"),
        ("chain, own tables", [count(False, K, m) for m in sizes], "#d95f02"),
        ("chain, shared table", [count(True, K, m) for m in sizes], "#1f77b4"),
    ):
        ax.plot(sizes, numbers, "o-", markersize=4, color=colour, label=label)
    ax.set_yscale("log")
    ax.set_xlabel("number of nodes M")
    ax.set_ylabel("free parameters")
    ax.set_title(f"Parameters of M nodes with {K} states")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="A chain with Dirichlet priors, shared or not.")
    parser.add_argument("-N", type=int, default=40, help="number of sequences")
    parser.add_argument("--alpha", type=float, default=2.0, help="of the Dirichlet priors, ≥ 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/chain_network.png"))
    options = parser.parse_args()

    x = load_data(options.N, options.seed)
    fresh = load_data(1000, options.seed + 1)
    fits: dict[str, EMResult] = {}
    lines = []
    for shared in (False, True):
        name = "shared" if shared else "per node"
        for alpha in (1.0, options.alpha):
            em, fits[name] = fit(x, shared, alpha)
            result = fits[name]
            row = f"{name:8}  {alpha:5.1f}  {result.num_free_parameters:10}"
            tested = per_sequence(em, fresh, shared, alpha)
            lines.append(f"{row}  {result.log_evidence:12.3f}  {tested}")
        if not shared:
            print(em.plan(x, shared, options.alpha), end="\n\n")
    print(f"{len(x)} sequences of {M} nodes with {K} states; 1,000 fresh ones to test on")
    print("tables    alpha  parameters  log evidence  per fresh sequence")
    print("\n".join(lines))
    print("alpha = 1 is maximum likelihood: what was never seen is held impossible.")
    print(f"By formula: {count(False)} per node, {count(True)} shared, {K**M - 1} for the joint.\n")
    A, own = fits["shared"].params["A"], fits["per node"].params
    print(
        f"The shared table with alpha = {options.alpha:g} (rows: the state before), and the truth"
    )
    for row, true in zip(A, TRUTH["A"], strict=True):
        print("  " + "  ".join(f"{v:.4f}" for v in row) + "    ("
              + "  ".join(f"{v:.2f}" for v in true) + ")")  # fmt: skip
    error = float((A - TRUTH["A"]).abs().mean())
    errors = [float((own[f"A{m}"] - TRUTH["A"]).abs().mean()) for m in range(2, M + 1)]
    print(f"Mean absolute error: {error:.3f} shared, {sum(errors) / len(errors):.3f} per node.")
    sample = ancestral_sample(
        {"mu": fits["shared"].params["mu"], "A": A}, 5, seed=options.seed
    )  # new sequences
    print("\nNew sequences from the fitted chain, each node after its parent")
    for row in sample.tolist():
        print("  " + " → ".join(str(v) for v in row))
    try:
        draw(fits, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
