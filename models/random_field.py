"""Markov random fields: potentials instead of conditional probabilities, and the sum Z over all states.

    p(x) = (1 / Z) Π_cliques ψ_C(x_C),   Z = Σ_x Π_cliques ψ_C(x_C)

    N observations: log p(x_1, …, x_N) = Σ_n Σ_C log ψ_C(x_nC) − N log Z(ψ)

A potential is written with ``pyro.factor(name, log ψ)``, and log Z, which learning needs, is
``log_partition(field)``. Two fields: colds pass between you, your roommate and your coworker; four
students who work in pairs, round a loop, share a misconception or not. From rows drawn from the
second (its square root, so that no state is too rare) the potentials are learned again, once with
all answers known, once with a third of them hidden.

Run it: ``python -m models.random_field``. A reader learns that a potential is no probability, what
the loop says about independence and no directed graph can, and that hidden answers cost an E-step
only: −N log Z does not depend on them.

Sources: Goodfellow, Bengio and Courville (2016), section 16.2.2 (colds); Koller and Friedman (2009),
section 4.1 (the misconception, Z = 7,201,840) and chapter 20 (learning).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em import EMResult, ExactPosteriorEM, Gradient, Posterior, log_partition

SICK, HEALTHY = 0, 1
Potentials = Mapping[tuple[str, str], Tensor]


def _table(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


COLDS: Potentials = {
    ("you", "roommate"): _table([2, 1], [1, 10]),  # rows: sick, healthy; columns: the same
    ("you", "coworker"): _table([2, 1], [1, 10]),
}
MISCONCEPTION: Potentials = {  # 1: has it
    ("Alice", "Bob"): _table([30, 5], [1, 10]),
    ("Bob", "Charles"): _table([100, 1], [1, 100]),
    ("Charles", "Debbie"): _table([1, 100], [100, 1]),
    ("Debbie", "Alice"): _table([100, 1], [1, 100]),
}
STUDENTS: Potentials = {pair: table.sqrt() for pair, table in MISCONCEPTION.items()}


def names(pairs: Sequence[tuple[str, str]] | Potentials) -> list[str]:
    """The variables of some pairs, each once."""
    return list(dict.fromkeys(name for pair in pairs for name in pair))


def field(potentials: Potentials, x: Tensor | None = None, known: Tensor | None = None) -> None:
    """A field of binary variables with a potential per pair.

    Args:
        potentials: ψ by pair. # (2, 2)
        x: Values, where they are observed, a column per variable. # (N, variables)
        known: Which of them are observed; all where None. # (N, variables)
    """
    value = {}
    for i, name in enumerate(names(potentials)):
        value[name] = pyro.sample(
            name,
            dist.Categorical(torch.ones(2).double()),  # declares two states
            obs=None if x is None else x[:, i],
            obs_mask=None if known is None else known[:, i],
        )
    for (a, b), table in potentials.items():
        pyro.factor(f"{a}-{b}", table.log()[value[a], value[b]])


def pairwise(h: Tensor, J: Tensor) -> Potentials:
    """Potentials with ψ_ab(x, y) = exp(h_a x + J_ab x y): nothing in them is left undetermined.

    Args:
        h: Log odds of a variable's value 1 where its neighbours are 0. # (4,)
        J: Couplings, log ψ(0, 0) ψ(1, 1) / ψ(0, 1) ψ(1, 0). # (4,)
    """
    zero = torch.zeros_like(h)
    tables = torch.stack([zero, zero, h, h + J], -1).reshape(-1, 2, 2).exp()
    return dict(zip(STUDENTS, tables, strict=True))


def model(x: Tensor, known: Tensor | None, weight: Tensor) -> None:
    """The students with unknown potentials: N rows of the field, each divided by Z.

    Args:
        x: Distinct rows of answers. # (rows, 4)
        known: Which of them are observed; all where None. # (rows, 4)
        weight: How often each row occurs. # (rows,)
    """
    h, J = pyro.param("h", torch.zeros(4).double()), pyro.param("J", torch.zeros(4).double())
    potentials = pairwise(h, J)
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight):
        field(potentials, x, known)
    log_Z = log_partition(partial(field, potentials), base="model")
    pyro.factor("normaliser", -weight.sum() * log_Z)


def load_data(N: int = 1000, hidden: float = 1 / 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows drawn exactly from the students' field, and which answers are known. # (N, 4), (N, 4)

    Args:
        N: Number of rows.
        hidden: Share of answers that are hidden, completely at random.
        seed: Of the draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = ExactPosteriorEM(field).posterior(STUDENTS).sample(N)
        x = torch.stack([drawn[name] for name in names(STUDENTS)], -1)
        return x, torch.rand(x.shape) >= hidden


def distinct(x: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows that differ in what is known, and their numbers: the arguments of `model`."""
    known_x = x if known is None else torch.where(known, x, -1)
    rows, weight = known_x.unique(dim=0, return_counts=True)
    return rows.clamp(min=0), None if known is None else rows >= 0, weight.double()


def initialize(x: Tensor, known: Tensor | None = None) -> dict[str, Tensor]:
    """Couplings as if each pair stood alone, from the rows that know both. # x, known: (N, 4)"""
    known = torch.ones_like(x, dtype=torch.bool) if known is None else known
    J = []
    for i in range(4):
        j = (i + 1) % 4
        both = known[:, i] & known[:, j]
        p00, p01, p10, p11 = torch.bincount(2 * x[both, i] + x[both, j], minlength=4) + 0.5
        J.append((p00 * p11 / (p01 * p10)).log())
    return {"h": -torch.stack(J).double() / 2, "J": torch.stack(J).double()}


def fit(x: Tensor, known: Tensor | None = None, **options: Any) -> EMResult:
    """Learn the potentials, in a param store of its own. # x, known: (N, 4)"""
    # Where each E-step moves the goal, an M-step that rises will do: the maximum is the same.
    updates = {} if known is None else {"[hJ]": Gradient(steps=3)}
    with pyro.get_param_store().scope():
        for name, value in initialize(x, known).items():
            pyro.param(name, value)
        em = ExactPosteriorEM(model, updates=updates)
        return em.fit(*distinct(x, known), progress=False, **options)


def coordinates(potentials: Potentials) -> dict[str, Tensor]:
    """h and J of any potentials round the loop, which determine p(x) and are determined by it.

    Factors can pass from one potential to its neighbour without a change to p(x); these cannot.
    """
    h = dict.fromkeys(names(potentials), torch.tensor(0.0, dtype=torch.float64))
    J = []
    for (a, b), table in potentials.items():
        (p00, p01), (p10, p11) = table.log()
        J.append(p00 + p11 - p01 - p10)
        h[a], h[b] = h[a] + p10 - p00, h[b] + p01 - p00
    return {"h": torch.stack(list(h.values())), "J": torch.stack(J)}


def draw(fits: Mapping[str, EMResult], path: Path) -> None:
    """Both fields with their marginals; learned against true coordinates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    show(left, COLDS, {"roommate": (0, 0), "you": (1, 1), "coworker": (2, 0)}, SICK)
    left.set_title("Colds: probability of being sick\n(yours is the smallest, since you meet both)")
    square = {"Alice": (0, 1), "Bob": (1, 1), "Charles": (1, 0), "Debbie": (0, 0)}
    show(middle, MISCONCEPTION, square, 1)
    middle.set_title("Four students in a loop:\nprobability of the misconception")
    truth = torch.cat(list(coordinates(STUDENTS).values()))
    low, high = float(truth.min()) - 0.8, float(truth.max()) + 0.8
    right.plot([low, high], [low, high], color="0.75", zorder=0)
    for i, (label, result) in enumerate(fits.items()):
        errors = result.standard_errors()
        right.errorbar(
            truth + 0.12 * (2 * i - 1),
            torch.cat([result.params["h"], result.params["J"]]).detach(),
            2 * torch.cat([errors["h"], errors["J"]]),
            fmt="os"[i],
            markersize=5,
            label=f"{label} (± 2 standard errors)",
        )
    right.set_xlabel("true (nats)")
    right.set_ylabel("learned (nats)")
    right.set_title(
        "The students' potentials, learned from rows\ndrawn: log odds h and couplings J in nats"
    )
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def show(
    ax: Any, potentials: Potentials, where: Mapping[str, tuple[float, float]], value: int
) -> None:
    """A field's graph, its potentials on the edges and the marginals of one value in the nodes."""
    q = ExactPosteriorEM(field).posterior(potentials)
    for (a, b), table in potentials.items():
        (xa, ya), (xb, yb) = where[a], where[b]
        ax.plot([xa, xb], [ya, yb], color="0.5", linewidth=2, zorder=0)
        text = "\n".join("  ".join(f"{v:g}" for v in row) for row in table.tolist())
        box = {"facecolor": "white", "edgecolor": "0.7", "boxstyle": "round,pad=0.3"}
        middle = ((xa + xb) / 2, (ya + yb) / 2)
        ax.text(*middle, text, ha="center", va="center", fontsize=9, family="monospace", bbox=box)
    points = list(where.values())
    shares = [float(q.probs(name)[value]) for name in where]
    ax.scatter(*zip(*points, strict=True), s=3800, c=shares, cmap="Blues", vmin=-0.1, vmax=1.3,
               edgecolors="0.3")  # fmt: skip
    for (name, point), share in zip(where.items(), shares, strict=True):
        ax.text(*point, f"{name}\n{share:.3f}", ha="center", va="center", fontsize=10)
    ax.margins(0.3)
    ax.set_axis_off()


def report_colds() -> None:
    """Print what the field of colds says."""
    Z = float(log_partition(field, COLDS).exp())
    q = ExactPosteriorEM(field).posterior(COLDS)
    print(f"Colds: Z = {Z:.0f}")
    for name in names(COLDS):
        share = float(q.probs(name)[SICK])
        print(f"  P({name} sick) = {share * Z:.0f}/{Z:.0f} = {share:.4f}")


def report_students() -> None:
    """Print what the loop says, about probabilities and about independence."""
    em = ExactPosteriorEM(field)
    Z = float(log_partition(field, MISCONCEPTION).exp())
    q = em.posterior(MISCONCEPTION)
    assert isinstance(q, Posterior)
    print(f"\nThe misconception: Z = {Z:,.0f}")
    print(f"  P(Alice has it not, Bob has it) = {float(q.joint('Alice', 'Bob')[0, 1]):.4f}")
    graph = em.plan(MISCONCEPTION).graph
    for a, b, given in [
        ("Alice", "Charles", ["Bob", "Debbie"]),
        ("Bob", "Debbie", ["Alice", "Charles"]),
        ("Alice", "Charles", ["Bob"]),
    ]:
        verb = "is" if graph.is_separated(a, b, given) else "is not"
        print(f"  {a} {verb} independent of {b} given {' and '.join(given)}.")
    print("  No directed graph over four variables says exactly this.")


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Sum and learn Markov random fields.")
    parser.add_argument("-N", type=int, default=1000, help="rows to learn from")
    parser.add_argument("--hidden", type=float, default=1 / 3, help="share of hidden answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/random_field.png"))
    options = parser.parse_args()

    report_colds()
    report_students()
    x, known = load_data(options.N, options.hidden, options.seed)
    with pyro.get_param_store().scope():
        print(f"\n{ExactPosteriorEM(model).plan(*distinct(x, known))}\n")
    fits = {"all answers known": fit(x), f"{options.hidden:.0%} hidden": fit(x, known)}
    for label, result in fits.items():
        print(f"{label}: {result}\n")
    truth, errors = coordinates(STUDENTS), [r.standard_errors() for r in fits.values()]
    print(f"{'in nats':<16}{'true':>8}" + "".join(f"{label:>20}" for label in fits))
    for kind, keys in (("h", names(STUDENTS)), ("J", ["-".join(pair) for pair in STUDENTS])):
        for i, key in enumerate(keys):
            cells = [
                f"{float(r.params[kind][i]):12.3f} ± {float(error[kind][i]):.3f}"
                for r, error in zip(fits.values(), errors, strict=True)
            ]
            print(f"{kind + ' ' + key:<16}{float(truth[kind][i]):8.3f}" + "".join(cells))
    print("h: log odds of 1 where neighbours are 0; J: coupling.")
    try:
        draw(fits, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
