"""Gene counting: EM where it began, on two tables of four counts.

Genetic linkage: 197 animals in four visible classes, the first of which hides two:

    cells (1/2, p/4, (1 − p)/4, (1 − p)/4, p/4),   visible: (1/2 + p/4, (1 − p)/4, (1 − p)/4, p/4)

Blood groups: each person carries two alleles of A, B and O, of which one sees the blood group only:

    maternal, paternal ~ Categorical(f),   A = {AA, AO},  B = {BB, BO},  AB,  O = {OO}

Neither needs more than one line of thought: had the hidden cells been counted, p and f would be
proportions. EM replaces the missing counts by their expectations and takes the proportions. What a
reader learns is how fast: near the maximum each step leaves a fixed share of the error, and that
share is the share of information that is missing,

    (p_{t+1} − p̂) / (p_t − p̂) → 1 − I_observed / I_complete.

Counts weigh their class by ``poutine.scale``: a class of 125 animals is one row of weight 125.
Run it: ``python -m models.linkage``.

Source: Dempster, Laird and Rubin (1977), section 1, for the animals (Rao 1965); Lange (2002),
"Mathematical and Statistical Methods for Genetic Analysis", chapter 2, for the blood groups of
521 duodenal ulcer patients (Clarke et al. 1959).
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, Posterior

ALLELES = ("A", "B", "O")
GROUPS = ("A", "B", "AB", "O")
GROUP_OF_CELL = torch.tensor([0, 0, 1, 2, 3])
GROUP_OF_ALLELES = torch.tensor([[0, 2, 0], [2, 1, 1], [0, 1, 3]])  # of GROUPS, by ALLELES


def model(counts: Tensor) -> None:
    """Five cells, of which the first two look alike. # counts: (4,)"""
    p = pyro.param("p", counts.new_tensor(0.5), constraint=constraints.unit_interval)
    cells = torch.stack([torch.full_like(p, 0.5), p / 4, (1 - p) / 4, (1 - p) / 4, p / 4])
    shown = torch.nn.functional.one_hot(GROUP_OF_CELL).to(counts)
    with pyro.plate("classes", 4), poutine.scale(scale=counts):
        z = pyro.sample("z", dist.Categorical(cells))
        pyro.sample("x", dist.Categorical(shown[z]), obs=torch.arange(4))


def blood_groups(counts: Tensor) -> None:
    """Two alleles in Hardy-Weinberg proportions; the group is seen. # counts: (4,)"""
    start = counts.new_tensor([0.3, 0.2, 0.5])
    f = pyro.param("f", start, constraint=constraints.simplex)
    shown = torch.nn.functional.one_hot(GROUP_OF_ALLELES).to(counts)
    with pyro.plate("groups", 4), poutine.scale(scale=counts):
        maternal = pyro.sample("maternal", dist.Categorical(f))
        paternal = pyro.sample("paternal", dist.Categorical(f))
        pyro.sample("x", dist.Categorical(Vindex(shown)[maternal, paternal]), obs=torch.arange(4))


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Counts of the four classes of animals and of the blood groups A, B, AB, O. # (4,), (4,)"""
    return torch.tensor([125, 18, 20, 34], dtype=dtype), torch.tensor(
        [186, 38, 13, 284], dtype=dtype
    )


def path_of(em: ExactPosteriorEM, counts: Tensor, name: str, start: Tensor, steps: int) -> Tensor:
    """The parameter ``name`` from ``start`` on, after each of some steps. # (steps + 1, ...)"""
    return torch.stack([start, *(s.params[name] for s in islice(em.steps(counts), steps))])


def missing_information(counts: Tensor, result: EMResult) -> float:
    """The share of the information on p that the hidden split takes away.

    Args:
        counts: Animals per class. # (4,)
        result: The fit.

    Returns:
        1 − I_observed / I_complete, which is EM's rate of convergence.
    """
    p = float(result.params["p"])
    cells = counts @ result.posterior.probs("z")  # expected animals per hidden cell
    complete = float(cells[1] + cells[4]) / p**2 + float(cells[2] + cells[3]) / (1 - p) ** 2
    return 1 - 1 / float(result.standard_errors()["p"]) ** 2 / complete


def draw(error: Tensor, rate: float, counts: Tensor, alleles: Tensor, path: Path) -> None:
    """The error of p per step, and the path of the allele frequencies over their likelihood.

    Args:
        error: abs(p_t − p̂) for the animals. # (T,)
        rate: The share of missing information.
        counts: Blood groups. # (4,)
        alleles: Allele frequencies per step. # (T, 3)
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = torch.arange(len(error))
    left.semilogy(steps, error[0] * rate**steps, color="#d95f02", label=f"{rate:.4f}$^t$ (theory)")
    left.semilogy(steps, error, "o", color="#1f77b4", label="EM")
    left.set_xlabel("step t")
    left.set_ylabel("distance of p from its maximum")
    left.set_title("Linkage: each step leaves 13% of the error,\nthe share of missing information")
    left.legend(frameon=False)

    a, b = torch.meshgrid(
        torch.linspace(0.12, 0.34, 111, dtype=counts.dtype),
        torch.linspace(0.015, 0.215, 101, dtype=counts.dtype),
        indexing="ij",
    )
    o = 1 - a - b
    seen = torch.stack([a * (a + 2 * o), b * (b + 2 * o), 2 * a * b, o * o], -1).log() @ counts
    fall = seen.max() - seen
    levels = [0.0, 1.0, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 200.0]
    right.contourf(a, b, fall, levels=levels, cmap="Blues", alpha=0.7, extend="max")
    right.contour(a, b, fall, levels=levels[1:], colors="#6baed6", linewidths=0.8)
    right.plot(alleles[:, 0], alleles[:, 1], "o-", color="#d95f02", markersize=5)
    labels = ((0, "step 0", (-44, -4)), (1, "step 1", (6, 5)), (2, "steps 2, 3, …", (-24, -18)))
    for t, text, beside in labels:
        here = (float(alleles[t, 0]), float(alleles[t, 1]))
        right.annotate(text, here, xytext=beside, textcoords="offset points")
    right.set_xlabel("frequency of allele A")
    right.set_ylabel("frequency of allele B")
    right.set_title("Blood groups: three steps of gene counting\nreach the top of the likelihood")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Gene counting: linkage and blood groups by EM.")
    parser.add_argument("--steps", type=int, default=9, help="steps to print and draw")
    parser.add_argument("--seed", type=int, default=0, help="unused: nothing is random")
    parser.add_argument("--figure", type=Path, default=Path("figures/linkage.png"))
    options = parser.parse_args()

    animals, groups = load_data()
    em = ExactPosteriorEM(model)
    print(f"Genetic linkage\n{em.plan(animals)}\n")
    p = path_of(em, animals, "p", animals.new_tensor(0.5), options.steps)
    result = em.fit(animals, tol=0, max_steps=20)
    error = (p - result.params["p"]).abs()
    print("step  p            what is left of the error")
    for t in range(1, len(p)):
        share = f"{float(error[t] / error[t - 1]):.4f}" if error[t] > 1e-10 else ""
        print(f"{t:4d}  {float(p[t]):.9f}  {share}")
    rate = missing_information(animals, result)
    print(f"\np = {float(result.params['p']):.9f} ± {float(result.standard_errors()['p']):.7f}")
    print(f"The split of the first class hides {rate:.7f} of the information on p;")
    print("that is what each step leaves of the error.")

    gene_counting = ExactPosteriorEM(blood_groups)
    print(f"\nBlood groups\n{gene_counting.plan(groups)}\n")
    start = groups.new_tensor([0.3, 0.2, 0.5])
    alleles = path_of(gene_counting, groups, "f", start, options.steps)
    fitted = gene_counting.fit(groups, tol=0, max_steps=30)
    f, errors = fitted.params["f"], fitted.standard_errors()["f"]
    for name, value, error_of in zip(ALLELES, f.tolist(), errors.tolist(), strict=True):
        print(f"allele {name}: frequency {value:.6f} ± {error_of:.6f}")
    assert isinstance(fitted.posterior, Posterior)
    pairs = (fitted.posterior.joint("maternal", "paternal") * groups[:, None, None]).sum(0)
    print(
        f"Of {groups[0]:.0f} people of group A {pairs[0, 0]:.1f} are expected to be AA, the rest AO."
    )
    expected = groups.sum() * torch.zeros(4).to(groups).index_add(
        0, GROUP_OF_ALLELES.flatten(), torch.outer(f, f).flatten()
    )
    chi2 = float(((groups - expected) ** 2 / expected).sum())
    print("group  observed  expected under random mating")
    for name, n, m in zip(GROUPS, groups.tolist(), expected.tolist(), strict=True):
        print(f"{name:5s}  {n:8.0f}  {m:8.1f}")
    print(f"chi-squared {chi2:.3f} on 1 degree of freedom (3.84 would be the 5% limit)")
    try:
        draw(error, rate, groups, alleles, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
