"""One model, three uses: z observed (discriminant analysis), some z observed, no z observed.

    z_n ~ Categorical(w),   x_n | z_n = k ~ N(μ_k, Σ_k)

The model is that of ``models/gmm.py``. With every species known the M-step alone is the maximum of
log p(x, z), and its posterior is Gaussian discriminant analysis (quadratic with full covariances,
linear with a tied one). With some species known (``obs_mask``) EM sums over the others:
semi-supervised learning. With none known it is a mixture, which has to find the species by itself.

Run it: ``python -m models.discriminant``. A reader learns that these are one likelihood with more or
fewer of its terms observed, and when unlabelled data help: most where labels are few.

Data: Fisher's iris flowers, 150 rows, 4 lengths (cm), 3 species, from scikit-learn. Semi-supervised
mixtures: McLachlan (1975); Nigam, McCallum, Thrun and Mitchell (2000).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
from torch import Tensor

from models.gmm import STRUCTURES, covariances, initialize, model
from pyro_em import EMResult, ExactPosteriorEM

K = 3
SPECIES = ("setosa", "versicolor", "virginica")


@dataclass(frozen=True)
class Use:
    """What one use of the model leads to.

    Attributes:
        result: The fit.
        probs: p(z_n | x_n) of every flower, its own label unseen. # (N, K)
    """

    result: EMResult
    probs: Tensor

    def errors(self, labels: Tensor, among: Tensor | None = None) -> int:
        """Number of flowers whose most probable species is another one. # (N,), (N,)"""
        wrong = self.probs.argmax(-1) != labels
        return int((wrong if among is None else wrong[among]).sum())


def load_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Lengths and widths of sepal and petal in cm, and the species. # (150, 4), (150,)"""
    from sklearn.datasets import load_iris

    iris = load_iris()
    return torch.as_tensor(iris.data).to(dtype), torch.as_tensor(iris.target).long()


def choose(labels: Tensor, per_species: int, seed: int = 0) -> Tensor:
    """Mark so many flowers of each species, at random, as labelled. # (N,) -> (N,) bool"""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(labels), generator=generator)
    known = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(K):
        own = (labels == k).nonzero()[:, 0]
        known[own[order[own].argsort()[:per_species]]] = True
    return known


def fit(
    x: Tensor,
    labels: Tensor,
    known: Tensor,
    covariance: str = "full",
    unlabelled: bool = True,
    tol: float = 1e-6,
) -> Use:
    """Fit with the known labels; where none is known, from k-means.

    Args:
        x: Data. # (N, D)
        labels: Species; the unknown ones are used only to name clusters. # (N,)
        known: Which labels are observed. # (N,)
        covariance: As in ``models.gmm``.
        unlabelled: Whether flowers without a label count too.
        tol: Of the fit.
    """
    with pyro.get_param_store().scope():
        em = ExactPosteriorEM(model)
        if known.any():  # discriminant analysis: one M-step, also the start of what follows
            result = em.fit(x[known], K, covariance, labels[known], progress=False)
        if not known.any():
            found = initialize(x, K)["z"]  # k-means; each cluster is called after its majority
            names = torch.stack([labels[found == k].mode().values for k in range(K)])
            init = {"z": names[found]}
            result = em.fit(x, K, covariance, init=init, tol=tol, max_steps=5000, progress=False)
        elif unlabelled and not known.all():
            hidden = torch.where(known, labels, 0)
            result = em.fit(
                x, K, covariance, hidden, known, tol=tol, max_steps=5000, progress=False
            )
        return Use(result, em.posterior(x, K, covariance).probs("z"))


def learning_curve(
    x: Tensor, labels: Tensor, sizes: Sequence[int], draws: int, covariance: str, seed: int
) -> Mapping[int, tuple[float, float]]:
    """Share of errors among the unlabelled flowers, by the number of labels per species.

    Args:
        x: Data. # (N, D)
        labels: Species. # (N,)
        sizes: Labels per species.
        draws: Random choices of the labelled flowers, over which errors are averaged.
        covariance: As in ``models.gmm``.
        seed: Of the first choice.

    Returns:
        By size the share of errors with labelled flowers only, and with the others too.
    """
    out = {}
    for size in sizes:
        wrong = [0, 0]
        for s in range(seed, seed + draws):
            known = choose(labels, size, s)
            for i, unlabelled in enumerate((False, True)):
                use = fit(x, labels, known, covariance, unlabelled, tol=1e-3)
                wrong[i] += use.errors(labels, ~known)
        among = draws * (len(x) - K * size)
        out[size] = (wrong[0] / among, wrong[1] / among)
    return out


def draw(
    x: Tensor,
    labels: Tensor,
    uses: Mapping[str, tuple[Use, Tensor]],
    curve: Mapping[int, tuple[float, float]],
    path: Path,
) -> None:
    """The three uses in the plane of the petals, and the errors by the number of labels.

    Args:
        x: Data. # (N, 4)
        labels: Species. # (N,)
        uses: By title a fit and which labels it knew.
        curve: What `learning_curve` returns.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    from pyro_em import plotting

    petals = x[:, 2:]
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for ax, (title, (use, known)) in zip(axes, uses.items(), strict=False):
        plotting.responsibilities(petals, use.probs, ax)
        Sigma = covariances(use.result.params)[:, 2:, 2:]
        plotting.ellipses(use.result.params["mu"][:, 2:], Sigma, ax, levels=(0.95,))
        wrong = use.probs.argmax(-1) != labels
        ring = {"s": 60, "facecolor": "none", "linewidth": 1.2}
        if 0 < int(known.sum()) < len(x):
            ax.scatter(*petals[known].T, **ring, edgecolor="0.6", marker="s", label="labelled")
        ax.scatter(*petals[wrong].T, **ring, edgecolor="black", label="wrong species")
        ax.set_title(f"{title}: {int(wrong.sum())} of {len(x)} wrong")
        ax.set_xlabel("petal length (cm)")
        ax.set_ylabel("petal width (cm)")
        ax.legend(loc="upper left", frameon=False)
    for i, label in enumerate(("labelled flowers only", "and the unlabelled ones (EM)")):
        shares = [100 * shares[i] for shares in curve.values()]
        axes[3].plot(list(curve), shares, marker="o", color=plotting.PALETTE[i], label=label)
    free = next(use for use, known in uses.values() if not known.any())
    axes[3].axhline(
        100 * free.errors(labels) / len(x), color="0.5", linestyle="--", label="no labels at all"
    )
    axes[3].set_ylim(bottom=0)
    axes[3].set_xlabel("labelled flowers per species")
    axes[3].set_ylabel("errors among the unlabelled flowers (%)")
    axes[3].set_title("Unlabelled flowers help most where labels are few")
    axes[3].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Plan, fit three times, print and draw."""
    parser = argparse.ArgumentParser(description="Discriminant analysis and mixtures of irises.")
    parser.add_argument("--covariance", choices=STRUCTURES, default="full")
    parser.add_argument("--labels", type=int, default=10, help="labels per species, where some are")
    parser.add_argument("--draws", type=int, default=5, help="choices of labelled flowers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/discriminant.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors are tiny: more threads would only wait for one another

    x, labels = load_data()
    covariance = options.covariance
    some = choose(labels, options.labels, options.seed)
    with pyro.get_param_store().scope():
        plan = ExactPosteriorEM(model).plan(x, K, covariance, labels, some)
    print(f"With {int(some.sum())} of {len(x)} species known:\n\n{plan}\n")
    masks = {
        "all labels": some | True,
        f"{int(some.sum())} labels": some,
        "no labels": some & False,
    }
    uses = {title: (fit(x, labels, known, covariance), known) for title, known in masks.items()}
    print(f"{'known':<12}{'log evidence of what is seen':>30}{'wrong':>8}{'steps':>8}")
    for title, (use, _) in uses.items():
        row = f"{use.result.log_evidence:>30.6f}{use.errors(labels):>8}{use.result.num_steps:>8}"
        print(f"{title:<12}{row}")
    print(
        "The fewer labels are seen, the fewer terms the evidence has: from log p(x, z), all seen,"
    )
    print("to log p(x), none seen. Its maximum with some labels lies between the two.\n")

    curve = learning_curve(x, labels, (6, 8, 12, 20), options.draws, covariance, options.seed)
    print(f"errors among unlabelled flowers, mean of {options.draws} choices of the labelled ones")
    print("labels per species   labelled only   with the unlabelled")
    for size, (alone, together) in curve.items():
        print(f"{size:>18}{alone:>16.2%}{together:>22.2%}")
    try:
        draw(x, labels, uses, curve, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
