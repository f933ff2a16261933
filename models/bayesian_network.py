"""A Bayesian network with a hidden cause, learned by EM from rows with holes.

    p(z, x1, …, x5) = p(z) p(x1 | z) p(x2 | z) p(x3 | z) p(x4 | z) p(x5 | x4)

All nodes are binary; z is never seen, and in any row any of x1 … x5 may be missing. The E-step sums
over whatever a row does not say, and the M-step fills the conditional tables with expected counts.
A reader learns that nothing has to be imputed before fitting, that the fitted network then says with
which probability a missing entry is 1, and that the graph alone says who depends on whom. To learn
another network, change ``PARENTS``. Run it: ``python -m models.bayesian_network``.

Data: drawn from the network ``TRUTH`` by a seed; each entry is hidden with probability 0.25.
Source: Lauritzen (1995), "The EM algorithm for graphical association models with missing data".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, plotting

PARENTS: dict[str, tuple[str, ...]] = {
    "z": (),
    "x1": ("z",),
    "x2": ("z",),
    "x3": ("z",),
    "x4": ("z",),
    "x5": ("x4",),
}
SEEN = [node for node in PARENTS if node != "z"]  # the columns of the data
TRUTH = {  # p(node = 1 | parents), indexed by the values of the parents
    "z": torch.tensor(0.4),
    "x1": torch.tensor([0.10, 0.80]),
    "x2": torch.tensor([0.20, 0.90]),
    "x3": torch.tensor([0.85, 0.25]),
    "x4": torch.tensor([0.15, 0.75]),
    "x5": torch.tensor([0.30, 0.95]),
}
PLACES = {"z": (1.5, 2), "x1": (0, 1), "x2": (1, 1), "x3": (2, 1), "x4": (3, 1), "x5": (3, 0)}


def model(x: Tensor) -> None:
    """The network, one table per node; NaN where an entry is missing. # x: (N, 5)"""
    known = ~torch.isnan(x)
    values: dict[str, Tensor] = {}
    with pyro.plate("rows", len(x)):
        for node, parents in PARENTS.items():
            half = x.new_full((2,) * len(parents), 0.5)
            table = pyro.param(f"p({node})", half, constraint=constraints.unit_interval)
            p = table[tuple(values[parent] for parent in parents)]
            data: dict[str, Tensor] = {}
            if node in SEEN:
                i = SEEN.index(node)
                data = {"obs": x[:, i], "obs_mask": known[:, i]}
            values[node] = pyro.sample(node, dist.Bernoulli(p), **data).long()


def load_data(
    N: int = 1000, missing: float = 0.25, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Rows with holes (NaN), and the same rows without. # (N, 5), (N, 5)"""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for node, parents in PARENTS.items():
        p = TRUTH[node].to(dtype)[tuple(values[parent] for parent in parents)]
        values[node] = torch.bernoulli(p.expand(N), generator=generator).long()
    complete = torch.stack([values[node] for node in SEEN], -1).to(dtype)
    holes = torch.rand(complete.shape, generator=generator) < missing
    return complete.masked_fill(holes, torch.nan), complete


def initialize(x: Tensor) -> dict[str, Tensor]:
    """z by vote of x1, x2 and x4, so that z = 1 goes with ones there. # x: (N, 5)"""
    votes = x[:, [SEEN.index(node) for node in ("x1", "x2", "x4")]]
    return {"z": votes.nanmean(-1).nan_to_num(0.5).round().long()}


def imputations(result: EMResult, x: Tensor) -> Tensor:
    """p(entry = 1 | what the row says), and the entry itself where it is known. # (N, 5)"""
    return torch.stack([result.posterior.probs(node)[:, 1] for node in SEEN], -1)


def draw(result: EMResult, x: Tensor, complete: Tensor, path: Path) -> None:
    """The network with its tables, learned against true tables, and imputation put to the test.

    Args:
        result: The fit.
        x: Rows with holes. # (N, 5)
        complete: The same rows without. # (N, 5)
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    draw_network(left, result)

    truth = torch.cat([TRUTH[node].reshape(-1) for node in PARENTS])
    learned = torch.cat([result.params[f"p({node})"].reshape(-1) for node in PARENTS])
    errors = result.standard_errors()
    spread = torch.cat([errors[f"p({node})"].reshape(-1) for node in PARENTS])
    middle.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    middle.errorbar(truth, learned, 2 * spread, fmt="o", color="#1f77b4", capsize=3, markersize=5)
    middle.set_xlabel("true probability")
    middle.set_ylabel("learned probability (± 2 standard errors)")
    middle.set_title("The tables come back from rows with holes")

    hidden = torch.isnan(x)
    p, value = imputations(result, x)[hidden], complete[hidden]
    groups = [g for g in p.argsort().tensor_split(8) if len(g)]
    share = torch.stack([value[g].mean() for g in groups])
    bar = 2 * torch.stack([(p[g] * (1 - p[g])).sum().sqrt() / len(g) for g in groups])
    right.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    centre = torch.stack([p[g].mean() for g in groups])
    right.errorbar(centre, share, bar, fmt="o", color="#d95f02", capsize=3, markersize=5)
    right.set_xlabel("p(entry = 1 | rest of the row), average of a group")
    right.set_ylabel("share of the group that was 1")
    right.set_title(f"{len(p):,} hidden entries: shares follow probabilities")
    for ax in (middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_network(ax: Any, result: EMResult) -> None:
    """The graph, and at each node its learned table."""
    plotting.graph(result.plan.graph, ax, positions=PLACES, plates=False)
    for node, (across, up) in PLACES.items():
        table = result.params[f"p({node})"].reshape(-1)
        parent = PARENTS[node][0] if PARENTS[node] else ""
        lines = [f"p = {table[0]:.2f}"]
        if parent:
            lines = [f"{parent} = {k}:  {v:.2f}" for k, v in enumerate(table)]
        if node == "z":
            ax.text(across + 0.3, up, lines[0], va="center", fontsize=10)
        elif node == "x5":
            ax.text(across - 0.34, up, "\n".join(lines), ha="right", va="center", fontsize=10)
        else:
            side, align = (0.32, "left") if node == "x4" else (0.0, "center")
            place = (across + side, up if side else up - 0.26)
            va = "center" if side else "top"
            ax.text(*place, "\n".join(lines), ha=align, va=va, fontsize=10)
    ax.set_xlim(-0.55, 4.3)
    ax.set_ylim(-0.4, 2.4)
    ax.set_title("Learned p(node = 1 | parent); z is never seen")


def describe_graph(graph: Any) -> None:
    """Print what the graph implies, whatever the tables are."""
    print("Markov blankets: given these, a node depends on nothing else")
    for node in PARENTS:
        print(f"  {node}: {', '.join(sorted(graph.markov_blanket(node)))}")
    print("Separations")
    for a, b, given in (("x1", "x2", ()), ("x1", "x2", ("z",)), ("z", "x5", ("x4",))):
        condition = f" given {', '.join(given)}" if given else ""
        verdict = "independent" if graph.is_separated(a, b, given) else "dependent"
        print(f"  {a} and {b}{condition}: {verdict}")


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Learn a Bayesian network from rows with holes.")
    parser.add_argument("-N", type=int, default=1000, help="number of rows")
    parser.add_argument("--missing", type=float, default=0.25, help="share of entries to hide")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/bayesian_network.png"))
    options = parser.parse_args()

    x, complete = load_data(options.N, options.missing, options.seed)
    hidden = torch.isnan(x)
    em = ExactPosteriorEM(model)
    print(em.plan(x), end="\n\n")
    result = em.fit(x, init=initialize(x), seed=options.seed, tol=1e-6, progress=True)
    print(f"\n{result}\n")
    whole = int((~hidden.any(-1)).sum())
    print(
        f"{int(hidden.sum()):,} entries are missing; only {whole} of {len(x):,} rows are whole.\n"
    )
    errors = result.standard_errors()
    print("p(node = 1 | parents)      learned ± standard error, and the truth")
    for node, parents in PARENTS.items():
        rows = zip(result.params[f"p({node})"].reshape(-1), errors[f"p({node})"].reshape(-1),
                   TRUTH[node].reshape(-1), strict=True)  # fmt: skip
        for k, (p, error, truth) in enumerate(rows):
            name = f"p({node} = 1 | {parents[0]} = {k})" if parents else f"p({node} = 1)"
            print(f"  {name:20} {p:.3f} ± {error:.3f}   ({truth:.2f})")
    print()
    try:
        describe_graph(em.plan(x).graph)
    except ImportError:
        print("Independences need networkx: pip install networkx")
    p = imputations(result, x)
    print("\nThe first rows with a hole, and what the network puts there")
    for n in hidden.any(-1).nonzero()[:5, 0].tolist():
        row = " ".join("?" if h else f"{v:.0f}" for v, h in zip(x[n], hidden[n], strict=True))
        holes = [i for i in range(len(SEEN)) if hidden[n, i]]
        said = ", ".join(f"p({SEEN[i]} = 1) = {p[n, i]:.3f}" for i in holes)
        print(f"  {row}   {said}")
    right = float((p[hidden].round() == complete[hidden]).double().mean())
    common = complete[hidden].mean(0)
    print(f"The likelier value is the hidden one in {right:.1%} of the entries; ", end="")
    print(f"'always {common.round():.0f}' is right in {max(common, 1 - common):.1%}.")
    try:
        draw(result, x, complete, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
