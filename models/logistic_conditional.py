"""A label with M binary parents: a table of 2^M numbers or a logistic curve of M + 1.

    p(y = 1 | x1, …, xM) = σ(w0 + Σ_i w_i x_i),     p(x) = Π_i p(x_i)  or  p(x1) Π_i p(x_i | x_{i−1})

Some inputs are missing, more often where the label is 1 and x5 = 1. The E-step sums over the missing
inputs under p(x | everything seen); the M-step has closed forms for p(x) and Newton's method for w.
A reader learns what a parametric conditional saves (M + 1 numbers instead of 2^M), what a model of
the inputs is for, and why dropping incomplete rows is not harmless: here it moves the weight of x5
by many standard errors. Run it: ``python -m models.logistic_conditional``.

Data: drawn from a logistic curve over a chain of inputs, by a seed. Source: Bishop (2006), "Pattern
Recognition and Machine Learning", section 8.1.2; Ibrahim (1990) for EM with missing covariates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM

M = 5
TRUE_W = (-1.0, 1.5, -1.0, 0.5, 1.0, 1.5)  # w0, w1, …, w5
KINDS = [(c, i) for c in ("table", "logistic") for i in ("factorised", "chain")]


def model(x: Tensor, y: Tensor, conditional: str = "logistic", inputs: str = "chain") -> None:
    """Inputs, then the label given them.

    Args:
        x: Inputs in {0, 1}, NaN where missing. # (N, M)
        y: Labels in {0, 1}. # (N,)
        conditional: p(y | x): ``"logistic"``, or ``"table"`` for one number per cell of x.
        inputs: p(x): ``"factorised"`` or ``"chain"``.
    """
    M, unit = x.shape[1], constraints.unit_interval
    known = ~torch.isnan(x)
    if conditional == "logistic":
        w = pyro.param("w", x.new_full((M + 1,), 0.1))
    else:
        start = torch.linspace(0.4, 0.6, 2**M).to(x).reshape((2,) * M)
        cells = pyro.param("table", start, constraint=unit)
    values: list[Tensor] = []
    with pyro.plate("rows", len(x)):
        for i in range(M):
            after = inputs == "chain" and i > 0
            start = x.new_tensor([0.4, 0.6]) if after else x[:, i].nanmean()
            p = pyro.param(f"p{i + 1}", start, constraint=unit)
            p = p[values[-1].long()] if after else p
            d = dist.Bernoulli(p)
            mask = None if bool(known[:, i].all()) else known[:, i]
            values.append(pyro.sample(f"x{i + 1}", d, obs=x[:, i], obs_mask=mask))
        if conditional == "logistic":
            score = w[0]
            for i in range(M):
                score = score + w[i + 1] * values[i]
            pyro.sample("y", dist.Bernoulli(logits=score), obs=y)
        else:
            pyro.sample("y", dist.Bernoulli(cells[tuple(v.long() for v in values)]), obs=y)


def load_data(
    N: int = 600, seed: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with holes (NaN), the same inputs without, labels. # (N, M), (N, M), (N,)"""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.bernoulli(torch.full((N,), 0.5, dtype=dtype), generator=generator)]
    for _ in range(M - 1):  # an input repeats the one before with probability 0.75
        columns.append(torch.bernoulli(0.25 + 0.5 * columns[-1], generator=generator))
    x = torch.stack(columns, -1)
    w = torch.tensor(TRUE_W, dtype=dtype)
    y = torch.bernoulli((w[0] + x @ w[1:]).sigmoid(), generator=generator)
    # x1 and x3 go missing by what is always seen (y and x5): missing at random.
    rate = torch.where((y == 1) & (x[:, 4] == 1), 0.6, 0.1).to(dtype)
    holes = torch.zeros_like(x, dtype=torch.bool)
    for i in (0, 2):
        holes[:, i] = torch.bernoulli(rate, generator=generator).bool()
    return x.masked_fill(holes, torch.nan), x, y


def fit(
    x: Tensor, y: Tensor, conditional: str = "logistic", inputs: str = "chain", tol: float = 1e-3
) -> EMResult:
    """A fit of its own, whatever was fitted before."""
    pyro.clear_param_store()
    return ExactPosteriorEM(model).fit(x, y, conditional, inputs, tol=tol)


def count(conditional: str, inputs: str, M: int = M) -> int:
    """Free parameters by formula: 2^M or M + 1 of p(y | x), M or 1 + 2 (M − 1) of p(x)."""
    given_x = 2**M if conditional == "table" else M + 1
    return given_x + (M if inputs == "factorised" else 1 + 2 * (M - 1))


def draw(fits: dict[str, EMResult], path: Path) -> None:
    """Weights of three fits, and numbers of parameters against M.

    Args:
        fits: Fits of the logistic model by name.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    for j, (name, result) in enumerate(fits.items()):
        places = torch.arange(M + 1) + 0.2 * (j - 1)
        error = 2 * result.standard_errors()["w"]
        colour = ("0.55", "#1f77b4", "#d95f02")[j]
        left.errorbar(places, result.params["w"], error, fmt="o", color=colour, capsize=3,
                      label=name)  # fmt: skip
    for i, value in enumerate(TRUE_W):
        left.hlines(value, i - 0.38, i + 0.38, color="black", linewidth=1.2,
                    label="truth" if i == 0 else None)  # fmt: skip
    left.set_xticks(range(M + 1), [f"$w_{i}$" for i in range(M + 1)])
    left.set_ylabel("weight (± 2 standard errors)")
    left.set_title("Dropping rows with holes biases $w_5$; summing over the holes does not")
    left.set_ylim(top=4.2)
    left.legend(frameon=False, loc="upper left")

    sizes = list(range(1, 13))
    for label, numbers, colour in (
        ("p(y | x), table: $2^M$", [2**m for m in sizes], "#b30000"),
        ("p(x), chain: 1 + 2(M − 1)", [2 * m - 1 for m in sizes], "#7570b3"),
        ("p(y | x), logistic: M + 1", [m + 1 for m in sizes], "#1f77b4"),
        ("p(x), factorised: M", sizes, "#1b9e77"),
    ):
        right.plot(sizes, numbers, "o-", markersize=4, color=colour, label=label)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.set_xlabel("number of inputs M")
    right.set_ylabel("free parameters")
    right.set_title("What each choice costs")
    right.legend(frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Logistic regression with missing binary inputs.")
    parser.add_argument("-N", type=int, default=600, help="number of rows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--figure", type=Path, default=Path("figures/logistic_conditional.png"))
    options = parser.parse_args()

    x, complete, y = load_data(options.N, options.seed)
    print(ExactPosteriorEM(model).plan(x, y), end="\n\n")
    fitted = {kind: fit(x, y, *kind) for kind in KINDS}
    print("p(y | x)  p(x)        parameters  log evidence       BIC")
    for (conditional, inputs), result in fitted.items():
        print(f"{conditional:8}  {inputs:10}  {result.num_free_parameters:10}"
              f"  {result.log_evidence:12.3f}  {result.bic:8.1f}")  # fmt: skip
    best = min(KINDS, key=lambda kind: fitted[kind].bic or 0.0)
    print(f"The BIC prefers {best[0]} with {best[1]}, ", end="")
    print("which is how the data were made.\n" if best == ("logistic", "chain") else "here.\n")

    whole = ~torch.isnan(x).any(-1)
    fits = {
        "nothing missing": fit(complete, y),
        f"missing inputs summed over ({len(x):,} rows)": fitted["logistic", "chain"],
        f"whole rows only ({int(whole.sum()):,} rows)": fit(x[whole], y[whole]),
    }
    print(f"{'weights ± standard errors':42}" + "".join(f"  w{i:<12}" for i in range(M + 1)))
    print(f"{'truth':42}" + "".join(f"  {v:<13.2f}" for v in TRUE_W))
    for name, result in fits.items():
        pairs = zip(result.params["w"], result.standard_errors()["w"], strict=True)
        print(f"{name:42}" + "".join(f"  {v:<5.2f} ± {e:<5.2f}" for v, e in pairs))
    try:
        draw(fits, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
