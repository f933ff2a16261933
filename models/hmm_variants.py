"""Variants of the hidden Markov model: four chains, one loop over ``pyro.markov`` each.

    sequences      z_t ~ A[z_{t-1}],           x_t ~ N(μ[z_t], σ[z_t]²) or Categorical(E[z_t])
    left to right  A[i, j] = 0 for j < i or j > i + 1: from stage to stage, never back
    factorial      z_t ~ A[z_{t-1}], w_t ~ B[w_{t-1}],   x_t ~ N(base + a z_t + b w_t, σ²)
    second order   z_t ~ A[z_{t-2}, z_{t-1}],  x_t ~ Categorical(E[z_t])

A reader learns that sequences of unequal length are padded and masked (latent and observation under
one ``poutine.mask``), that a probability of zero stays zero through EM, that two chains with one
common observation are summed jointly, and that memory of two steps is ``history=2``.
Run it: ``python -m models.hmm_variants``. Data: generated from a seed.

Source: Rabiner (1989), "A tutorial on hidden Markov models"; Ghahramani and Jordan (1997),
"Factorial hidden Markov models".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, Posterior

simplex, positive = constraints.simplex, constraints.positive


def sequences(
    x: Tensor, lengths: Tensor, pi: Tensor, A: Tensor, emit: Callable[[Tensor], dist.Distribution]
) -> None:
    """N chains of their own lengths; what is beyond the end of a sequence counts nowhere.

    Args:
        x: Padded data. # (N, T)
        lengths: Length of each sequence. # (N,)
        pi: Probabilities of the first state. # (K,)
        A: Transition probabilities. # (K, K)
        emit: From a state to the distribution of its observation.
    """
    z = None
    with pyro.plate("sequences", len(x)):
        for t in pyro.markov(range(int(lengths.max()))):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"x_{t}", emit(z), obs=x[:, t])


def gaussian(x: Tensor, lengths: Tensor, pi: Tensor, A: Tensor, mu: Tensor) -> None:
    """Gaussian emissions; ``pi``, ``A`` and ``mu`` are the start. # x: (N, T)"""
    pi, A = pyro.param("pi", pi, constraint=simplex), pyro.param("A", A, constraint=simplex)
    mu = pyro.param("mu", mu)
    sigma = pyro.param("sigma", torch.ones_like(mu), constraint=positive)
    sequences(x, lengths, pi, A, lambda z: dist.Normal(mu[z], sigma[z]))


def categorical(x: Tensor, lengths: Tensor, pi: Tensor, A: Tensor, E: Tensor) -> None:
    """Categorical emissions; ``pi``, ``A`` and ``E`` are the start. # x: (N, T)"""
    pi, A = pyro.param("pi", pi, constraint=simplex), pyro.param("A", A, constraint=simplex)
    E = pyro.param("E", E, constraint=simplex)
    sequences(x, lengths, pi, A, lambda z: dist.Categorical(E[z]))


def factorial(x: Tensor) -> None:
    """Two appliances that go on and off by themselves; only their total is seen. # x: (T,)"""
    stay = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).to(x)
    A = pyro.param("A", stay, constraint=simplex)
    B = pyro.param("B", stay, constraint=simplex)
    base = pyro.param("base", x.min())
    a = pyro.param("a", 0.3 * (x.max() - x.min()))
    b = pyro.param("b", 0.7 * (x.max() - x.min()))
    sigma = pyro.param("sigma", 0.2 * x.std(), constraint=positive)
    z = w = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        w = pyro.sample(f"w_{t}", dist.Categorical(B[w]))
        pyro.sample(f"x_{t}", dist.Normal(base + a * z + b * w, sigma), obs=x[t])


def second_order(x: Tensor, A: Tensor, E: Tensor) -> None:
    """The next state depends on the last two; state 0 came before the first. # x: (T,)"""
    A = pyro.param("A", A, constraint=simplex)
    E = pyro.param("E", E, constraint=simplex)
    before = last = torch.tensor(0)
    for t in pyro.markov(range(len(x)), history=2):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[before, last]))
        pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[t])
        before, last = last, z


def first_order(x: Tensor, A: Tensor, E: Tensor) -> None:
    """The same with memory of one step, for comparison. # x: (T,)"""
    A = pyro.param("A", A, constraint=simplex)
    E = pyro.param("E", E, constraint=simplex)
    z = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[t])


STAGES = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]], dtype=torch.float64)
FIRST = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
LEVELS = torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64)
PAIRS = torch.tensor([[[0.05, 0.95]] * 2, [[0.95, 0.05]] * 2], dtype=torch.float64)
NOISE = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
WATTS = (100.0, 150.0, 600.0)  # base load, fridge, heater


def walk(steps: int, rows: Callable[[list[int]], Tensor], generator: torch.Generator) -> Tensor:
    """Draw a path; ``rows`` maps the path so far to the probabilities of the next state."""
    path: list[int] = []
    for _ in range(steps):
        path.append(int(torch.multinomial(rows(path), 1, generator=generator)))
    return torch.tensor(path)


def two_state(steps: int, p: float, generator: torch.Generator) -> Tensor:
    """Draw a path that leaves its state with probability p, from state 0. # (steps,)"""
    A = torch.tensor([[1 - p, p], [p, 1 - p]])
    return walk(steps, lambda path: A[path[-1] if path else 0], generator)


def load_data(seed: int = 0) -> dict[str, Tensor]:
    """Generated series: patients (N, T) with lengths, power (T,), symbols (T,); and the truth."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(10, 31, (30,), generator=g)
    patients = torch.full((30, int(lengths.max())), float("nan"), dtype=torch.float64)
    for row, n in zip(patients, lengths.tolist(), strict=True):
        z = walk(n, lambda path: STAGES[path[-1]] if path else FIRST, g)
        row[:n] = LEVELS[z] + 0.7 * torch.randn(n, generator=g, dtype=torch.float64)
    on = [two_state(120, p, g) for p in (0.15, 0.08)]
    power = WATTS[0] + WATTS[1] * on[0] + WATTS[2] * on[1]
    power = power + 40 * torch.randn(120, generator=g, dtype=torch.float64)
    states = walk(100, lambda path: PAIRS[(0, 0, *path)[-2], (0, 0, *path)[-1]], g)
    symbols = torch.multinomial(NOISE[states], 1, generator=g)[:, 0]
    return {
        "patients": patients,
        "lengths": lengths,
        "power": power,
        "fridge": on[0],
        "heater": on[1],
        "symbols": symbols,
    }


def fit(model: Callable[..., None], *args: Tensor) -> EMResult:
    """Exact EM from the start in the model, in an empty param store."""
    pyro.clear_param_store()
    return ExactPosteriorEM(model).fit(*args, tol=1e-5, max_steps=100)


def path_of(result: EMResult, site: str, steps: int) -> Tensor:
    """The Viterbi path of one chain. # (T,) or (T, N)"""
    assert isinstance(result.posterior, Posterior)
    return result.posterior.mode()[f"{site}_*"][:steps]


def probs_of(result: EMResult, site: str, steps: int) -> Tensor:
    """Smoothed probabilities of one chain. # (T, K) or (T, N, K)"""
    return result.posterior.probs(f"{site}_*")[:steps]


def fit_stages(data: dict[str, Tensor]) -> EMResult:
    """A left-to-right chain of the patients; its zeros stay zero."""
    return fit(gaussian, data["patients"], data["lengths"], FIRST, STAGES, LEVELS * 0.8)


def fit_orders(symbols: Tensor) -> tuple[EMResult, EMResult]:
    """Chains with memory of one and of two steps, from starts between even and true."""
    start = 0.5 * PAIRS + 0.25
    E = 0.5 * NOISE + 0.25
    one = fit(first_order, symbols, torch.tensor([[0.4, 0.6], [0.6, 0.4]]).to(E), E)
    return one, fit(second_order, symbols, start, E)


def draw(data: dict[str, Tensor], stages: EMResult, power: EMResult, path: Path) -> None:
    """The series with their decoded states, and the posterior probabilities below.

    Args:
        data: From ``load_data``.
        stages: The left-to-right fit.
        power: The factorial fit.
        path: Where the figure goes.
    """
    from matplotlib.figure import Figure

    from pyro_em.plotting.axes import PALETTE

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(1.7, 1), sharex="col")
    lengths = data["lengths"]
    paths = path_of(stages, "z", int(lengths.max()))
    within = torch.arange(len(paths)).unsqueeze(-1) < lengths
    visits = torch.stack([((paths == k) & within).sum(0) for k in range(3)])
    n = int(visits.min(0).values.argmax())  # a patient who spends some time in every stage
    T = int(lengths[n])
    x, states = data["patients"][n, :T], paths[:T, n]
    mu, time = stages.params["mu"], range(1, T + 1)
    axes[0, 0].step(time, mu[states], where="mid", color="black", label="mean of decoded stage")
    probs = probs_of(stages, "z", T)[:, n]
    for k in range(3):
        own = states == k
        axes[0, 0].scatter(torch.arange(1, T + 1)[own], x[own], color=PALETTE[k], s=22)
        axes[1, 0].plot(time, probs[:, k], color=PALETTE[k], label=f"stage {k + 1}")
    axes[0, 0].set_ylim(top=float(x.max()) + 1)
    axes[0, 0].legend(frameon=False, loc="upper left")
    axes[0, 0].set_ylabel("measurement")
    axes[0, 0].set_title("Left to right: one patient passes three stages, never back")
    axes[1, 0].set_xlabel("visit")
    z, w = path_of(power, "z", len(data["power"])), path_of(power, "w", len(data["power"]))
    base, a, b = (power.params[name] for name in ("base", "a", "b"))
    minutes = range(1, len(z) + 1)
    axes[0, 1].scatter(minutes, data["power"], s=10, color="0.6", label="total power (seen)")
    level = base + a * z + b * w
    axes[0, 1].step(minutes, level, where="mid", color="black", linewidth=1, label="decoded")
    axes[0, 1].set_ylim(0, float(data["power"].max()) * 1.25)
    axes[0, 1].legend(frameon=False, ncols=2, loc="upper left")
    axes[0, 1].set_ylabel("watts")
    axes[0, 1].set_title("Factorial: two appliances found in their common total")
    for site, name, colour in (("z", "fridge", PALETTE[0]), ("w", "heater", PALETTE[1])):
        p = probs_of(power, site, len(z))[:, 1]
        axes[1, 1].plot(minutes, p, color=colour, label=f"{name} is on")
    axes[1, 1].set_xlabel("minute")
    for ax in axes[1]:
        ax.set_ylim(-0.03, 1.4)
        ax.set_yticks([0, 0.5, 1])
        ax.set_ylabel("posterior probability")
        ax.legend(frameon=False, ncols=3, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Plan, fit, print and draw."""
    parser = argparse.ArgumentParser(description="Fit four variants of the hidden Markov model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/hmm_variants.png"))
    options = parser.parse_args()
    data = load_data(options.seed)

    stages = fit_stages(data)
    print(f"left to right: {len(data['lengths'])} sequences of 10 to 30 visits\n{stages.plan}\n")
    print(f"{stages}\ntransitions (zeros stay exactly zero):")
    for row in stages.params["A"].tolist():
        print("  " + "  ".join(f"{v:.4f}" for v in row))
    power = fit(factorial, data["power"])
    print(f"\nfactorial: one total of two appliances\n{power.plan}\n\n{power}")
    watts = [round(float(power.params[name]), 1) for name in ("base", "a", "b")]
    print(f"base load, fridge, heater in watts: {watts}, generated with {list(WATTS)}")
    for site, name in (("z", "fridge"), ("w", "heater")):
        right = (path_of(power, site, len(data[name])) == data[name]).double().mean()
        print(f"  {name}: {100 * float(right):.0f}% of the minutes decoded rightly")
    one, two = fit_orders(data["symbols"])
    print(f"\nmemory of one step:  log evidence {one.log_evidence:.3f}")
    print(f"memory of two steps: log evidence {two.log_evidence:.3f}")
    print("states come in pairs 0 0 1 1, which a memory of one step cannot follow")
    try:
        draw(data, stages, power, options.figure)
        print(f"\nfigure: {options.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
