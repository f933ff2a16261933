"""A Gaussian mixture, fitted to Old Faithful: four covariance structures, K by BIC, three starts.

    z_n ~ Categorical(w),   x_n | z_n = k ~ N(μ_k, Σ_k),   so that   p(x) = Σ_k w_k N(x; μ_k, Σ_k)

    Σ_k free (full), Σ_k = Σ (tied), Σ_k = diag(σ_k1², …, σ_kD²) (diagonal), Σ_k = σ_k² I (spherical)

Run it: ``python -m models.gmm``, with ``--covariance tied`` for another structure, with
``--select 4`` for the BIC of every structure with K = 1, …, 4, with ``--start points --restarts 10``
for other starts. With ``--guide`` the responsibilities come from an amortised guide instead of the
E-step, and the gap of log p(x) = ELBO + KL(q ‖ posterior) is printed.

A reader learns what EM does in its textbook case, that its answer depends on where it starts, and
that the number of components depends on what shapes are allowed: long waits after long eruptions
need two components that are free in shape, or three of one common shape. With some or all of z
observed the same model is discriminant analysis: see ``models/discriminant.py``.

Data: eruption lengths (min) and waiting times (min) of the Old Faithful geyser, 272 rows (Azzalini
and Bowman 1990). Structures: Banfield and Raftery (1993); BIC: Fraley and Raftery (2002).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM

HERE = Path(__file__).parent
STRUCTURES = ("full", "tied", "diagonal", "spherical")
Selection = Mapping[tuple[str, int], EMResult]


def model(
    x: Tensor,
    K: int = 2,
    covariance: str = "full",
    labels: Tensor | None = None,
    known: Tensor | None = None,
) -> None:
    """A mixture of K Gaussians.

    Args:
        x: Data. # (N, D)
        K: Number of components.
        covariance: ``"full"``, ``"tied"``, ``"diagonal"`` or ``"spherical"``.
        labels: The components, where they are observed. # (N,)
        known: Which labels are observed; all where None. # (N,)
    """
    spread = torch.cov(x.T, correction=0).reshape(x.shape[1], x.shape[1])
    w = pyro.param("w", x.new_ones(K) / K, constraint=constraints.simplex)
    mu = pyro.param("mu", x[:K].clone())
    if covariance in ("full", "tied"):
        start = spread.repeat(K, 1, 1) if covariance == "full" else spread
        Sigma = pyro.param("Sigma", start, constraint=constraints.positive_definite)
    else:
        start = spread.diagonal() if covariance == "diagonal" else spread.diagonal().mean()
        start = start.sqrt().reshape(1, -1).repeat(K, 1)  # (K, D) or (K, 1)
        sigma = pyro.param("sigma", start, constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w), obs=labels, obs_mask=known)
        if covariance in ("full", "tied"):
            component = dist.MultivariateNormal(mu[z], Sigma[z] if covariance == "full" else Sigma)
        else:
            component = dist.Normal(mu[z], sigma[z]).to_event(1)
        pyro.sample("x", component, obs=x)


def guide(x: Tensor, K: int = 2, covariance: str = "full") -> None:
    """q(z_n | x_n) = softmax(a quadratic of x_n), which contains the exact posterior. # x: (N, D)"""
    scaled = (x - x.mean(0)) / x.std(0)
    i, j = torch.tril_indices(x.shape[1], x.shape[1])
    features = torch.cat([torch.ones_like(x[:, :1]), scaled, scaled[:, i] * scaled[:, j]], -1)
    B = pyro.param("B", x.new_zeros(features.shape[1], K))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=features @ B))


def covariances(params: Mapping[str, Tensor]) -> Tensor:
    """Σ_k as matrices, whatever their structure. # (K, D, D)"""
    K, D = params["mu"].shape
    if "sigma" in params:
        return torch.diag_embed(params["sigma"].expand(K, D) ** 2)
    return params["Sigma"].expand(K, D, D)


def load_data(dtype: torch.dtype = torch.float64) -> Tensor:
    """Old Faithful: eruption length and waiting time, both in minutes. # (272, 2)"""
    with open(HERE / "data" / "old_faithful.csv") as file:
        rows = list(csv.reader(file))[1:]
    return torch.tensor([[float(v) for v in row] for row in rows], dtype=dtype)


def initialize(x: Tensor, K: int = 2, seed: int = 0, start: str = "k-means") -> dict[str, Tensor]:
    """Assignments from which the first M-step makes parameters.

    Args:
        x: Data. # (N, D)
        K: Number of components.
        seed: Of whatever is random.
        start: ``"k-means"`` (of standardised data, best of ten; needs scikit-learn, else points),
            ``"points"`` (each row goes to the nearest of K rows chosen at random), or
            ``"responsibilities"`` (random ones, uniform on the simplex).
    """
    generator = torch.Generator().manual_seed(seed)
    if start == "responsibilities":
        noise = torch.rand(len(x), K, generator=generator, dtype=x.dtype).clamp(min=1e-12)
        return {"z": noise.log() / noise.log().sum(-1, keepdim=True)}
    scaled = (x - x.mean(0)) / x.std(0)
    if start == "k-means":
        try:
            from sklearn.cluster import KMeans

            labels = KMeans(K, n_init=10, random_state=seed).fit_predict(scaled.numpy())
            return {"z": torch.as_tensor(labels).long()}
        except ImportError:
            pass
    centres = scaled[torch.randperm(len(x), generator=generator)[:K]]
    return {"z": torch.cdist(scaled, centres).argmin(-1)}


def fit_restarts(
    x: Tensor, K: int, covariance: str, start: str, restarts: int, seed: int, **options: Any
) -> tuple[EMResult, list[EMResult]]:
    """Fit from several starts of one kind, seeds counting up; each in a param-store scope.

    Args:
        x: Data. # (N, D)
        K: Number of components.
        covariance: As in `model`.
        start: As in `initialize`.
        restarts: Number of starts.
        seed: Of the first start.
        **options: Passed to ``fit``.

    Returns:
        The fit with the largest evidence, and all of them.
    """
    fits = []
    for s in range(seed, seed + restarts):
        with pyro.get_param_store().scope():
            em = ExactPosteriorEM(model)
            init = initialize(x, K, s, start)
            fits.append(em.fit(x, K, covariance, init=init, seed=s, progress=False, **options))
    return max(fits, key=lambda fit: fit.log_evidence or -torch.inf), fits


def select(
    x: Tensor, structures: Sequence[str], max_K: int, restarts: int = 1, seed: int = 0
) -> dict[tuple[str, int], EMResult]:
    """Fit every structure with K = 1, …, max_K, each in a param store of its own.

    Args:
        x: Data. # (N, D)
        structures: Covariance structures.
        max_K: The largest K.
        restarts: k-means starts per model (each the best of ten), of which the best counts.
        seed: Of the first start.

    Returns:
        The best fit by structure and K.
    """
    return {
        (c, K): fit_restarts(x, K, c, "k-means", restarts if K > 1 else 1, seed, tol=1e-4)[0]
        for c in structures
        for K in range(1, max_K + 1)
    }


def draw(x: Tensor, result: EMResult, path: Path, selection: Selection | None = None) -> None:
    """The data in the colours of their responsibilities, the components, the evidence or the BIC.

    Args:
        x: Data. # (N, 2)
        result: The fit.
        path: Where the figure goes.
        selection: Fits whose BIC is drawn in place of the evidence per step.
    """
    from matplotlib.figure import Figure

    from pyro_em import plotting

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plotting.responsibilities(x, result.posterior.probs("z"), left)
    plotting.ellipses(result.params["mu"], covariances(result.params), left)
    left.set_xlabel("eruption length (min)")
    left.set_ylabel("waiting time to the next eruption (min)")
    left.set_title("Old Faithful: 50% and 95% of each component")
    if selection is None:
        plotting.evidence(result, right)
    else:
        best = min(selection, key=lambda key: selection[key].bic or torch.inf)
        lowest = selection[best].bic or 0.0
        for c, marker in zip(dict.fromkeys(c for c, _ in selection), "osD^", strict=False):
            above = {K: (fit.bic or 0) - lowest for (own, K), fit in selection.items() if own == c}
            right.plot(list(above), list(above.values()), marker=marker, label=c)
        right.set_yscale("symlog", linthresh=10)
        right.set_xticks(sorted({K for _, K in selection}))
        right.set_xlabel("number of components K")
        right.set_ylabel("BIC above the lowest (logarithmic over 10)")
        right.set_title(f"BIC: {best[0]} covariances with K = {best[1]} are best")
        right.legend(title="covariances", loc="lower left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def print_selection(selection: Selection) -> tuple[str, int]:
    """Print the BIC of every structure and K.

    Returns:
        The best structure and K.
    """
    structures = list(dict.fromkeys(c for c, _ in selection))
    sizes = sorted({K for _, K in selection})
    print("BIC (lower is better) and, in brackets, the log evidence")
    print("K  " + "".join(f"{c:>26}" for c in structures))
    for K in sizes:
        fits = [selection[c, K] for c in structures]
        cells = [f"{fit.bic:.3f} ({fit.log_evidence:.3f})" for fit in fits]
        print(f"{K}  " + "".join(f"{cell:>26}" for cell in cells))
    best = min(selection, key=lambda key: selection[key].bic or torch.inf)
    print(f"The lowest BIC has {best[0]} covariances with K = {best[1]}.\n")
    return best


def compare_with_guide(
    x: Tensor, K: int, covariance: str, exact: float, steps: int, seed: int
) -> None:
    """Fit model and guide together by stochastic steps, from the start of the exact fit.

    Args:
        x: Data. # (N, D)
        K: Number of components.
        covariance: As in `model`.
        exact: The log evidence that exact EM reached.
        steps: Number of steps of Adam.
        seed: Of the start.
    """
    pyro.clear_param_store()
    labels = initialize(x, K, seed)["z"]
    q = {"z": torch.nn.functional.one_hot(labels, K).to(x.dtype)}
    ExactPosteriorEM(model).m_step(q, x, K, covariance)
    em = ExactPosteriorEM(
        model, guide, lambda params: torch.optim.Adam(params, lr=0.1), strategy="guide"
    )
    print(f"\n{em.plan(x, K, covariance)}\n")
    em.fit(x, K, covariance, max_steps=steps, seed=seed, progress=True)
    terms = em.elbo(x, K, covariance)
    print(f"\nbound          {terms.value:.6f} after {steps} steps")
    print(f"exact evidence {terms.log_evidence:.6f} at the same parameters")
    print(f"gap            {terms.gap:.6f} = KL(q ‖ posterior)")
    print(f"exact EM       {exact:.6f}")


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Fit a Gaussian mixture to Old Faithful.")
    parser.add_argument("-K", type=int, default=2, help="number of components")
    parser.add_argument("--covariance", choices=STRUCTURES, default="full")
    parser.add_argument(
        "--select", type=int, metavar="MAX_K", help="choose covariance and K ≤ MAX_K by BIC"
    )
    parser.add_argument(
        "--start", choices=("k-means", "points", "responsibilities"), default="k-means"
    )
    parser.add_argument("--restarts", type=int, default=1, help="number of starts; the best counts")
    parser.add_argument("--guide", action="store_true", help="also fit with an amortised guide")
    parser.add_argument("--steps", type=int, default=3000, help="steps with the guide")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/gmm.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors are tiny: more threads would only wait for one another

    x = load_data()
    K, covariance, selection = options.K, options.covariance, None
    if options.select:
        selection = select(x, STRUCTURES, options.select, seed=options.seed)
        covariance, K = print_selection(selection)
    print(ExactPosteriorEM(model).plan(x, K, covariance), end="\n\n")
    pyro.clear_param_store()
    result, fits = fit_restarts(
        x, K, covariance, options.start, options.restarts, options.seed, tol=1e-8, max_steps=5000
    )
    if len(fits) > 1:
        ends = sorted((fit.log_evidence or -torch.inf for fit in fits), reverse=True)
        within = sum(ends[0] - end < 1e-3 for end in ends)
        print(f"log evidence from {len(fits)} starts: {', '.join(f'{e:.3f}' for e in ends)}")
        print(f"{within} of {len(fits)} starts ({options.start}) end at the best one.\n")
    print(f"{result}\n")
    for k in range(K):
        print(f"component {k}: weight {result.params['w'][k]:.6f}")
        print(f"  mean        {[round(v, 6) for v in result.params['mu'][k].tolist()]}")
        rows = [[round(v, 6) for v in row] for row in covariances(result.params)[k].tolist()]
        print(f"  covariance  {rows}")
    try:
        draw(x, result, options.figure, selection)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")
    if options.guide:
        assert result.log_evidence is not None
        compare_with_guide(x, K, covariance, result.log_evidence, options.steps, options.seed)


if __name__ == "__main__":
    main()
