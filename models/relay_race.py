"""The relay race: what a total time says about each of four runners.

    p(R, H, P, T) = Π_i p(R_i)  Π_i p(H_i | R_i, R_{i+1})
                    p(P_1 | R_1)  Π_{i>1} p(P_i | R_i, H_{i−1})  N(T; P_1 + P_2 + P_3 + P_4, 0.2²)

R_i is the skill of runner i (slow, average, fast), H_i the hand-off from runner i to the next (clean,
fumbled), P_i the time of a leg (10 … 13 s) and T the total time on the stopwatch. Eleven hidden
nodes have a joint table of 165,888 cells; the sum over them needs a table of a few hundred, because
the graph says who need not be kept together. A reader learns how one number is divided into blame
and credit, and how a fact about one leg explains the time away for the others. Nothing is fitted:
``em.posterior`` alone answers queries, and ``pyro.condition`` adds what else is known. Run it:
``python -m models.relay_race``.

Source: Koller and Friedman (2009), "Probabilistic Graphical Models", chapter 9, for the elimination
of variables; 3.2 for explaining away. The tables are made up.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, plotting

SKILLS, SECONDS, STOPWATCH = ("slow", "average", "fast"), (10.0, 11.0, 12.0, 13.0), 0.2
RUNNERS = tuple(f"R{i}" for i in range(1, 5))
Tables = Mapping[str, Tensor]


def load_data(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The conditional tables: skill, fumble, first leg, later leg."""
    clean = [[0.05, 0.15, 0.35, 0.45], [0.15, 0.35, 0.35, 0.15], [0.50, 0.35, 0.10, 0.05]]
    fumbled = [[0.01, 0.02, 0.12, 0.85], [0.01, 0.07, 0.27, 0.65], [0.05, 0.15, 0.35, 0.45]]
    tables = {
        "skill": [0.25, 0.50, 0.25],
        "fumble": [[0.24, 0.20, 0.18], [0.20, 0.15, 0.13], [0.18, 0.13, 0.10]],  # (R_i, R_{i+1})
        "first": clean,  # (R_1, P_1)
        "later": [list(pair) for pair in zip(clean, fumbled, strict=True)],  # (R_i, H_{i-1}, P_i)
    }
    return {name: torch.tensor(table, dtype=dtype) for name, table in tables.items()}


def model(T: Tensor, tables: Tables) -> None:
    """Races with their total times, each of other runners. # T: (N,) in seconds"""
    seconds = T.new_tensor(SECONDS)
    with pyro.plate("races", len(T)):
        R = [pyro.sample(f"R{i}", dist.Categorical(tables["skill"])) for i in range(1, 5)]
        H = []
        for i in range(3):
            fumble = tables["fumble"][R[i], R[i + 1]]
            H.append(pyro.sample(f"H{i + 1}", dist.Bernoulli(fumble)).long())
        P = [pyro.sample("P1", dist.Categorical(tables["first"][R[0]]))]
        for i in range(3):
            later = tables["later"][R[i + 1], H[i]]
            P.append(pyro.sample(f"P{i + 2}", dist.Categorical(later)))
        total = seconds[P[0]] + seconds[P[1]] + seconds[P[2]] + seconds[P[3]]
        pyro.sample("T", dist.Normal(total, STOPWATCH), obs=T)


def skills(T: Tensor, tables: Tables, known: Mapping[str, float] | None = None) -> Tensor:
    """p(R_i | T, what else is known) of every runner.

    Args:
        T: Total times. # (N,)
        tables: The conditional tables.
        known: Values of other nodes, the same in every race.

    Returns:
        Probabilities of slow, average, fast. # (N, 4, 3)
    """
    facts = {node: torch.full_like(T, value) for node, value in (known or {}).items()}
    for node in facts:
        if node.startswith(("P", "R")):
            facts[node] = facts[node].long()
    posterior = ExactPosteriorEM(pyro.condition(model, facts)).posterior(T, tables)
    return torch.stack([posterior.probs(runner) for runner in RUNNERS], 1)


QUERIES: dict[str, dict[str, float]] = {  # each adds a fact to the one before
    "the total time alone": {},
    "… and leg 2 took 13 s": {"P2": 3},
    "… and hand-off 1 was fumbled": {"P2": 3, "H1": 1},
}


def draw(T: float, tables: Tables, path: Path) -> None:
    """The network, skill against total time, and the three queries.

    Args:
        T: Total time of the queries, in seconds.
        tables: The conditional tables.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    draw_network(left, tables)

    times = torch.arange(40.0, 53.0, dtype=tables["skill"].dtype)
    probability = skills(times, tables)
    for k, colour in enumerate(("#b30000", "0.45", "#1f77b4")):
        middle.plot(times, probability[:, 1, k], "o-", color=colour, markersize=4,
                    label=f"runner 2 is {SKILLS[k]}")  # fmt: skip
    fumbled = ExactPosteriorEM(model).posterior(times, tables).probs("H1")[:, 1]
    middle.plot(times, fumbled, "s--", color="#e6ab02", markersize=4, label="hand-off 1 fumbled")
    middle.set_xlabel("total time T (s)")
    middle.set_ylabel("probability given T")
    middle.set_title("One number says something about each node")
    middle.set_ylim(0, 0.85)
    middle.legend(frameon=False, ncols=2)

    for j, (label, known) in enumerate(QUERIES.items()):
        slow = skills(torch.tensor([T], dtype=times.dtype), tables, known)[0, :, 0]
        places = [i + 0.27 * (j - 1) for i in range(4)]
        colour = ("#9ecae1", "#fc8d59", "#b30000")[j]
        right.bar(places, slow, width=0.25, color=colour, label=label)
    right.axhline(float(tables["skill"][0]), color="0.5", linewidth=1, label="before the race")
    right.set_xticks(range(4), [f"runner {i}" for i in range(1, 5)])
    right.set_ylabel("p(runner is slow | what is known)")
    right.set_title(f"T = {T:g} s: blame moves as facts come in")
    right.set_ylim(0, 0.72)
    right.legend(frameon=False, loc="upper right")
    for ax in (middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_network(ax: Any, tables: Tables) -> None:
    """The graph as the plan holds it."""
    seen = ExactPosteriorEM(model).plan(tables["skill"].new_tensor([46.0]), tables).graph
    places = {f"R{i}": (i - 1.0, 3.0) for i in range(1, 5)}
    places |= {f"H{i}": (i - 0.5, 2.0) for i in range(1, 4)}
    places |= {f"P{i}": (i - 1.0, 1.0) for i in range(1, 5)} | {"T": (1.5, 0.0)}
    labels = {site: f"${site[0]}_{site[1]}$" for site in places if len(site) > 1}
    plotting.graph(seen, ax, positions=places, labels=labels, plates=False)
    for up, what in ((3, "skills"), (2, "hand-offs"), (1, "leg times"), (0, "total")):
        ax.text(-0.55, up, what, ha="right", va="center", color="0.3")
    ax.set_xlim(-1.5, 3.4)
    ax.set_ylim(-0.4, 3.4)
    ax.set_title("The race; only the total time is seen")


def main() -> None:
    """Plan, ask, print and draw."""
    parser = argparse.ArgumentParser(description="What a total time says about four runners.")
    parser.add_argument("-T", type=float, default=48.0, help="total time in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the draws from the posterior")
    parser.add_argument("--figure", type=Path, default=Path("figures/relay_race.png"))
    options = parser.parse_args()

    tables = load_data()
    T = tables["skill"].new_tensor([options.T])
    em = ExactPosteriorEM(model)
    plan = em.plan(T, tables)
    print(plan, end="\n\n")
    cells = math.prod(route.size or 1 for route in plan.routes)
    print(
        f"The joint table of {len(plan.routes)} hidden nodes has {cells:,} cells; the largest table"
    )
    print(f"that is ever made has {plan.cells:,}: {cells // plan.cells} times fewer.")
    try:
        blanket = ", ".join(sorted(plan.graph.markov_blanket("R2")))
        print(f"Given {blanket}, runner 2 depends on nothing else.\n")
    except ImportError:
        print("The Markov blanket of runner 2 needs networkx: pip install networkx\n")
    posterior = em.posterior(T, tables)
    print(f"log p(T = {options.T:g}) = {posterior.log_evidence:.6f}\n")
    for label, known in QUERIES.items():
        print(f"T = {options.T:g} s: {label}")
        for i, row in enumerate(skills(T, tables, known)[0]):
            said = ", ".join(f"{name} {p:.3f}" for name, p in zip(SKILLS, row, strict=True))
            print(f"  runner {i + 1}: {said}")
    mode = posterior.mode()
    legs = [SECONDS[int(mode[f"P{i}"])] for i in range(1, 5)]
    fumbles = [i for i in range(1, 4) if mode[f"H{i}"] == 1]
    print("\nThe single most probable course of the race")
    print(f"  runners {', '.join(SKILLS[int(mode[r])] for r in RUNNERS)};", end=" ")
    print(f"legs {' + '.join(f'{s:g}' for s in legs)} s; fumbles at {fumbles or 'no hand-off'}.")
    draws = posterior.sample(1000, seed=options.seed)
    some = float(torch.stack([draws[f"H{i}"] for i in range(1, 4)]).any(0).double().mean())
    print(f"Yet in {some:.0%} of 1,000 races drawn from the posterior a hand-off was fumbled:")
    print("the most probable course is one of very many, and no summary of them.")
    try:
        draw(options.T, tables, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
