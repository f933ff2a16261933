"""Mixtures of other things than Gaussians: counts, answers, durations, heavy tails and lines.

    p(x) = Σ_k w_k p(x | θ_k),  with  Poisson(λ_k),  Π_d Bernoulli(p_kd),  Exponential(λ_k),
    Student-t(ν, μ_k, σ_k),  or  p(y | x) = Σ_k w_k N(y; a_k + b_k x, σ_k²)

Run it: ``python -m models.mixtures``. A reader learns that EM is one algorithm whatever the
component is: only the M-step differs, and it is found from the distribution that the model names. It
is in closed form for counts, answers and durations, least squares for lines, Newton's method on sums
for Student's t, whose heavy tails keep a few wild points from moving the centres.

Data: deaths of women over 80 per day in the London Times, 1910-1912 (Titterington, Smith and Makov
1985); 118 slides judged by 7 pathologists for carcinoma of the cervix (Agresti 2002); 216 answers to
4 questions of role conflict (Stouffer and Toby 1951; Goodman 1974). Durations, clusters with wild
points and lines are generated from a seed. Student's t: Peel and McLachlan (2000).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ClosedForm, EMResult, ExactPosteriorEM, Gradient, LeastSquares
from pyro_em.updates.update import NewtonOnSums

WORDS = {
    ClosedForm: "closed form",
    LeastSquares: "least squares",
    NewtonOnSums: "Newton on sums",
    Gradient: "gradient",
}

LONDON = (162, 267, 271, 185, 111, 61, 27, 8, 3, 1)  # days with 0, 1, …, 9 deaths
CARCINOMA = (
    "0000000:34 0000100:2 0100000:6 0100001:1 0100100:4 0100101:5 1000000:2 1010101:1 1100000:2 "
    "1100001:1 1100100:2 1100101:7 1100111:1 1101001:1 1101101:2 1101111:3 1110101:13 1110111:5 "
    "1111101:10 1111111:16"
)
VALUES = (
    "0000:20 0001:2 0010:9 0011:2 0100:6 0101:1 0110:4 0111:1 1000:38 1001:7 1010:24 1011:6 "
    "1100:25 1101:6 1110:23 1111:42"
)


def weights(K: int) -> Tensor:
    """w: equal at first. # (K,)"""
    return pyro.param("w", torch.ones(K, dtype=torch.float64) / K, constraint=constraints.simplex)


def poisson(x: Tensor, times: Tensor, K: int = 2) -> None:
    """Counts x, the n-th of them seen times_n times. # x: (N,), times: (N,)"""
    w = weights(K)
    start = (x * times).sum() / times.sum() * torch.linspace(0.5, 1.5, K).to(x)
    rate = pyro.param("rate", start, constraint=constraints.positive)
    with pyro.plate("values", len(x)), pyro.poutine.scale(scale=times):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def bernoulli(x: Tensor, times: Tensor, K: int = 2) -> None:
    """Latent classes: answers are independent given the class. # x: (N, D), times: (N,)"""
    w = weights(K)
    p = pyro.param("p", x[:K] * 0.6 + 0.2, constraint=constraints.unit_interval)
    with pyro.plate("patterns", len(x)), pyro.poutine.scale(scale=times):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)


def exponential(x: Tensor, K: int = 2) -> None:
    """Durations. # x: (N,)"""
    w = weights(K)
    start = torch.logspace(0.5, -0.5, K).to(x) / x.mean()
    rate = pyro.param("rate", start, constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Exponential(rate[z]), obs=x)


def student_t(x: Tensor, K: int = 2) -> None:
    """Clusters with equally heavy tails; ν → ∞ is the Gaussian. # x: (N,)"""
    w = weights(K)
    loc = pyro.param("loc", x.quantile(torch.linspace(0.25, 0.75, K).to(x)))
    scale = pyro.param("scale", x.new_ones(K), constraint=constraints.positive)
    df = pyro.param("df", x.new_tensor(5.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.StudentT(df, loc[z], scale[z]), obs=x)


def gaussian(x: Tensor, K: int = 2) -> None:
    """The same clusters without heavy tails, for comparison. # x: (N,)"""
    w = weights(K)
    loc = pyro.param("loc", x.quantile(torch.linspace(0.25, 0.75, K).to(x)))
    scale = pyro.param("scale", x.new_ones(K), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def regressions(x: Tensor, y: Tensor, K: int = 2) -> None:
    """Lines. # x: (N,), y: (N,)"""
    w = weights(K)
    a = pyro.param("a", y.new_zeros(K))
    b = pyro.param("b", torch.linspace(1, -1, K).to(y))
    s = pyro.param("s", y.std().repeat(K), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(a[z] + b[z] * x, s[z]), obs=y)


def patterns(text: str) -> tuple[Tensor, Tensor]:
    """Answers and how often each pattern was given, from "0110:12 …". # (N, D), (N,)"""
    rows = [item.split(":") for item in text.split()]
    x = torch.tensor([[float(c) for c in pattern] for pattern, _ in rows], dtype=torch.float64)
    return x, torch.tensor([float(count) for _, count in rows], dtype=torch.float64)


def load_data(seed: int = 0) -> dict[str, tuple[Tensor, ...]]:
    """The arguments of every model; those generated depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    counts = torch.tensor(LONDON, dtype=torch.float64)
    means = torch.where(uniform(1000) < 0.4, 1.0, 8.0)
    wild = 40 * uniform(12) - 20
    x = 10 * uniform(200) - 5
    lines = torch.where(uniform(200) < 0.5, 1 + 0.8 * x, 0.5 - 0.4 * x)
    return {
        "London Times": (torch.arange(10.0, dtype=torch.float64), counts),
        "carcinoma": patterns(CARCINOMA),
        "values": patterns(VALUES),
        "durations": (-means * uniform(1000).log(),),
        "wild points": (torch.cat([normal(120) - 2, normal(80) + 3, wild]),),
        "two lines": (x, lines + 0.6 * normal(200)),
    }


@dataclass(frozen=True)
class Fit:
    """A fitted model with its data."""

    family: str
    args: tuple[Any, ...]
    result: EMResult


def initialize(name: str) -> dict[str, Any]:
    """How a fit begins: at the model's values, three classes also at seven random assignments."""
    return {"num_restarts": 8} if name == "carcinoma" else {}


def fit_all(data: Mapping[str, tuple[Tensor, ...]], seed: int = 0) -> dict[str, Fit]:
    """Fit every model to its data, each in a param store of its own."""
    models: dict[str, tuple[Callable[..., None], int]] = {
        "London Times": (poisson, 2),
        "carcinoma": (bernoulli, 3),
        "values": (bernoulli, 2),
        "durations": (exponential, 2),
        "wild points": (student_t, 2),
        "wild points, Gaussian": (gaussian, 2),
        "two lines": (regressions, 2),
    }
    fits = {}
    for name, (model, K) in models.items():
        args = (*data[name.removesuffix(", Gaussian")], K)
        with pyro.get_param_store().scope():
            result = ExactPosteriorEM(model).fit(
                *args, seed=seed, tol=1e-6, max_steps=10_000, progress=False, **initialize(name)
            )
        fits[name] = Fit(model.__name__, args, result)
    return fits


def density(fit: Fit, at: Tensor) -> Tensor:
    """The density of a fitted mixture of counts, durations or clusters. # (M,) -> (M,)"""
    p = fit.result.params
    components = {
        "poisson": lambda: dist.Poisson(p["rate"]),
        "exponential": lambda: dist.Exponential(p["rate"]),
        "student_t": lambda: dist.StudentT(p["df"], p["loc"], p["scale"]),
        "gaussian": lambda: dist.Normal(p["loc"], p["scale"]),
    }
    return (p["w"] * components[fit.family]().log_prob(at.unsqueeze(-1)).exp()).sum(-1)


def draw(fits: Mapping[str, Fit], path: Path) -> None:
    """One panel per model: the data and what was fitted."""
    from matplotlib.figure import Figure

    from pyro_em.plotting.axes import PALETTE

    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3).ravel()

    ax, fit = axes[0], fits["London Times"]
    x, times, _ = fit.args
    one = dist.Poisson((x * times).sum() / times.sum()).log_prob(x).exp()
    ax.bar(x.numpy(), times.numpy(), color="0.85", label="observed")
    ax.plot(x, times.sum() * density(fit, x), "o-", color=PALETTE[0], label="two Poissons")
    ax.plot(x, times.sum() * one, "s--", color=PALETTE[1], label="one Poisson")
    ax.set(
        title="Deaths over 80: two rates fit, one does not", xlabel="deaths per day", ylabel="days"
    )

    for ax, name, item in ((axes[1], "carcinoma", "pathologist"), (axes[2], "values", "question")):
        params = fits[name].result.params
        D = params["p"].shape[1]
        for k in params["w"].argsort(descending=True).tolist():
            label = f"class of {params['w'][k]:.0%}"
            ax.plot(range(1, D + 1), params["p"][k], "o-", color=PALETTE[k], label=label)
        ax.set(xlabel=item, ylabel="probability of a yes", ylim=(-0.04, 1.28))
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        ax.set_xticks(range(1, D + 1), "ABCDEFG"[:D] if name == "carcinoma" else "1234")
    axes[1].set_title("Carcinoma: a third class divides the pathologists")
    axes[2].set_title("Role conflict: two kinds of respondents")

    ax, fit = axes[3], fits["durations"]
    x = fit.args[0].sort().values
    p = fit.result.params
    survival = (p["w"] * (-p["rate"] * x.unsqueeze(-1)).exp()).sum(-1)
    ax.step(x, 1 - torch.arange(1, len(x) + 1) / (len(x) + 1), color="0.6", label="observed")
    ax.plot(x, survival, color=PALETTE[0], label="two exponentials")
    ax.plot(x, (-x / x.mean()).exp(), "--", color=PALETTE[1], label="one exponential")
    ax.set(title="Durations: the tail is straight, the start is steep", yscale="log")
    ax.set(xlabel="duration", ylabel="share that lasts longer", ylim=(5e-4, 1.2))

    ax = axes[4]
    x = fits["wild points"].args[0]
    grid = torch.linspace(-20, 20, 801, dtype=x.dtype)
    ax.hist(x.numpy(), bins=100, range=(-20, 20), density=True, color="0.85", label="observed")
    ax.plot(grid, density(fits["wild points"], grid), color=PALETTE[0], label="Student's t")
    gaussians = density(fits["wild points, Gaussian"], grid)
    ax.plot(grid, gaussians, "--", color=PALETTE[1], label="Gaussian")
    ax.set(title="Wild points spoil a Gaussian, not a t", xlabel="x", ylabel="density")

    ax, fit = axes[5], fits["two lines"]
    x, y, _ = fit.args
    p, q = fit.result.params, fit.result.posterior.probs("z")
    ax.scatter(x, y, c=q[:, 1], cmap="coolwarm", s=14, vmin=0, vmax=1)
    for k, colour in enumerate(("#3b4cc0", "#b40426")):
        label = f"y = {p['a'][k]:.2f} {'+' if p['b'][k] >= 0 else '−'} {p['b'][k].abs():.2f} x"
        ax.plot(x.sort().values, p["a"][k] + p["b"][k] * x.sort().values, color=colour, label=label)
    ax.set(title="Two lines, found without labels", xlabel="x", ylabel="y")
    for i, ax in enumerate(axes):
        top = {"loc": "upper center", "ncols": 3, "columnspacing": 1, "handlelength": 1.2}
        ax.legend(frameon=False, **(top if i in (1, 2) else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Mixtures of five other families.")
    parser.add_argument("--seed", type=int, default=0, help="of generated data and random starts")
    parser.add_argument("--figure", type=Path, default=Path("figures/mixtures.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors are tiny: more threads would only wait for one another

    data = load_data(options.seed)
    with pyro.get_param_store().scope():
        print(f"{ExactPosteriorEM(student_t).plan(*data['wild points'], 2)}\n")
    fits = fit_all(data, options.seed)
    print(f"{'data':<23}{'family':<13}K{'log evidence':>15}{'BIC':>11}{'steps':>7}  M-step")
    for name, fit in fits.items():
        r = fit.result
        step = ", ".join(f"{n}: {WORDS[type(u.update)]}" for n, u in r.plan.updates.items())
        row = f"{r.log_evidence:>15.6f}{r.bic:>11.3f}{r.num_steps:>7}  {step}"
        print(f"{name:<23}{fit.family:<13}{fit.args[-1]}{row}")
    london = fits["London Times"].result
    error = london.standard_errors()["rate"]
    rates = [f"{v:.3f} ± {e:.3f}" for v, e in zip(london.params["rate"], error, strict=True)]
    print(f"\nLondon Times: {rates[0]} and {rates[1]} deaths a day; EM needs so many steps because")
    print(f"the two overlap: each step closes {1 - (london.rate or 0):.1%} of what is missing.")
    t, normal = (fits[n].result for n in ("wild points", "wild points, Gaussian"))
    for label, r in (("Student's t", t), ("Gaussian", normal)):
        centres = ", ".join(f"{v:.2f}" for v in r.params["loc"].sort().values)
        spreads = ", ".join(f"{v:.2f}" for v in r.params["scale"][r.params["loc"].argsort()])
        print(f"{label:<12} centres {centres} (made with -2, 3), scales {spreads} (made with 1, 1)")
    print(f"ν = {t.params['df']:.2f}: the heavy tails take the wild points, not the centres.")
    try:
        draw(fits, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
