"""Chains to be written with ``pyro.markov`` and with ``vectorized_markov``: one function for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from pyro_em import vectorized_markov

Loop = Callable[..., Iterable[Any]]
Model = Callable[[Loop, Tensor], None]


def plain(name: str, size: int, dim: int | None = None, history: int = 1) -> Iterable[Any]:
    return pyro.markov(range(size), history=history)


LOOPS: dict[str, Loop] = {"vectorised": vectorized_markov, "loop": plain}


def rows(*shape: int, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g, dtype=torch.float64) + 0.3


def simplex(name: str, *shape: int, seed: int = 3) -> Tensor:
    value = rows(*shape, seed=seed)
    value = value / value.sum(-1, keepdim=True)
    return pyro.param(name, value, constraint=constraints.simplex)


def real(name: str, *shape: int, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=g, dtype=torch.float64) * 2
    return pyro.param(name, value)


def positive(name: str, *shape: int, seed: int = 7) -> Tensor:
    return pyro.param(name, rows(*shape, seed=seed), constraint=constraints.positive)


def data(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


T, N, K, D = 7, 3, 2, 2


def gaussian(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s", K)
    z = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], s[z]), obs=x[t])


def symbols(loop: Loop, x: Tensor) -> None:
    pi, A, B = simplex("pi", K), simplex("A", K, K), simplex("B", K, 4)
    z: Any = 0
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if isinstance(t, int) and t == 0 else A[z]))
        pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=(x[t] * 2).long().clamp(0, 3))


def in_a_plate(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s")
    z: Any = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def plate_inside(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s")
    z: Any = None
    rows = pyro.plate("rows", x.shape[1], dim=-1)
    for t in loop("time", len(x), dim=-2):
        with rows:
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def tones(loop: Loop, x: Tensor) -> None:
    """A plate of what is observed at each step of one chain."""
    pi, A, p = simplex("pi", K), simplex("A", K, K), simplex("p", K, 2)
    z: Any = None
    columns = pyro.plate("tones", x.shape[1])
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        with columns:
            pyro.sample(f"x_{t}", dist.Bernoulli(p[z, 1]), obs=(x[t] > 0).double())


def ragged(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s")
    lengths = torch.tensor([7, 4, 1])
    z: Any = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
                pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def ragged_by_a_table(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s")
    mask = torch.arange(len(x)).unsqueeze(-1) < torch.tensor([2, 7, 5])
    z: Any = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            with poutine.mask(mask=mask[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
                pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def rows_then_steps(loop: Loop, x: Tensor) -> None:
    """Steps are the second dimension, and one before the first is the last."""
    px, mu, s, b = simplex("px", K, K), real("mu", K), positive("s"), real("b", K, seed=6)
    x = x.T
    with pyro.plate("rows", len(x)):
        z: Any = 0
        for t in loop("time", x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Categorical(px[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + b[z] * x[:, t - 1], s), obs=x[:, t])


def tones_of_sequences(loop: Loop, x: Tensor) -> None:
    """Two plates beside the steps; dimensions are added to what is read at a step."""
    px, py = simplex("px", K, K), rows(K, 2) / 2
    y = (data(x.shape[1], len(x), 2) > 0).double()
    lengths = torch.tensor([7, 4, 1])
    tones = pyro.plate("tones", 2, dim=-1)
    with pyro.plate("rows", x.shape[1], dim=-2) as n:
        z: Any = 0
        for t in loop("time", len(x)):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                z = pyro.sample(f"z_{t}", dist.Categorical(px[z]))
                first, *_ = x[t]
                pyro.sample(f"x_{t}", dist.Normal(first + z, 1.0), obs=x[t][:, None])
                with tones as k:
                    pyro.sample(f"y_{t}", dist.Bernoulli(py[z, k]), obs=y[n, t])


def pyros_way(loop: Loop, x: Tensor) -> None:
    """Laid out by hand, as Pyro's examples are: sequences, then steps, then tones."""
    pi, A, p = simplex("pi", K), simplex("A", K, K), simplex("p", K, 2)
    lengths = torch.tensor([7, 4, 2])
    data = (x > 0).double().T.unsqueeze(-1).expand(-1, -1, 4)
    z: Any = 0
    columns = pyro.plate("tones", 4, dim=-1)
    with pyro.plate("rows", x.shape[1], dim=-3) as batch:
        batch = batch[:, None]
        for t in loop("time", len(x), dim=-2):
            with poutine.mask(mask=(t < lengths.unsqueeze(-1)).unsqueeze(-1)):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                with columns:
                    pyro.sample(
                        f"x_{t}",
                        dist.Bernoulli(p[z.squeeze(-1), 1].unsqueeze(-1)),
                        obs=Vindex(data)[batch, t],
                    )
    del pi


def missing_steps(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s")
    seen = torch.arange(len(x)) % 3 != 1
    z: Any = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        with poutine.mask(mask=seen[t]):
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def missing_by_obs_mask(loop: Loop, x: Tensor) -> None:
    pi, A, B = simplex("pi", K), simplex("A", K, K), simplex("B", K, 3)
    seen = torch.arange(len(x)) % 3 != 1
    codes = (x * 2).long().clamp(0, 2)
    z: Any = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=codes[t], obs_mask=seen[t])


def covariates(loop: Loop, x: Tensor) -> None:
    pi, A, a, b = simplex("pi", K), simplex("A", K, K), real("a", K), real("b", K, seed=6)
    s, u = positive("s"), data(len(x), seed=8)
    z: Any = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Normal(a[z] + b[z] * u[t], s), obs=x[t])


def covariates_in_a_plate(loop: Loop, x: Tensor) -> None:
    pi, A, a, b = simplex("pi", K), simplex("A", K, K), real("a", K), real("b", K, seed=6)
    s, u = positive("s"), data(len(x), seed=8)
    z: Any = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(a[z] + b[z] * u[t], s), obs=x[t])


def changing_transitions(loop: Loop, x: Tensor) -> None:
    A, mu, s = simplex("A", len(x), K, K), real("mu", K), positive("s")
    z: Any = torch.tensor(0)
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[t, z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def two_transitions(loop: Loop, x: Tensor) -> None:
    """Which of two matrices is known at each step."""
    pi, A, mu, s = simplex("pi", K), simplex("A", 2, K, K), real("mu", K), positive("s")
    kind = torch.arange(len(x)) % 2
    z: Any = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[kind[t]][z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def offsets(loop: Loop, x: Tensor) -> None:
    """A known level per step, and events of several numbers in a plate."""
    _offsets(loop, x, D)


def offsets_of_as_many_numbers(loop: Loop, x: Tensor) -> None:
    """As many numbers in an event as rows in the plate."""
    _offsets(loop, x, x.shape[1])


def _offsets(loop: Loop, x: Tensor, D: int) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K, D), positive("s", D)
    loc = data(len(x), D, seed=9)
    x = x.unsqueeze(-1) + data(len(x), x.shape[1], D, seed=4)
    z: Any = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + loc[t], s).to_event(1), obs=x[t])


def inputs_beside_events(loop: Loop, x: Tensor) -> None:
    """Numbers and vectors per step that meet vectors per state, in a plate."""
    pi, A, w, s = simplex("pi", K), simplex("A", K, K), real("w", K, 4), positive("s", 4)
    u, vectors = data(len(x), seed=8), data(len(x), 4, seed=9)
    x = x.unsqueeze(-1) + data(len(x), x.shape[1], 4, seed=4)
    z: Any = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
            loc = w[z] * vectors[t] + u[t] + 0.1 * t
            pyro.sample(f"x_{t}", dist.Normal(loc, s).to_event(1), obs=x[t])


def driven_transitions(loop: Loop, x: Tensor) -> None:
    """An input changes what the next state is likely to be."""
    A, c, mu = simplex("A", K, K), real("c", K), real("mu", K)
    u = data(len(x), seed=8)
    z: Any = torch.tensor(0)
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(logits=A[z].log() + u[t] * c))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def states_in_a_list(loop: Loop, x: Tensor) -> None:
    A, mu, b, s = simplex("A", K, K), real("mu", K), real("b"), positive("s")
    states: list[Any] = [0]
    for t in loop("time", len(x)):
        states.append(pyro.sample(f"z_{t}", dist.Categorical(A[states[-1]])))
        before = b * x[t - 1] if t > 0 else 0.0
        pyro.sample(f"x_{t}", dist.Normal(mu[states[-1]] + before, s), obs=x[t])


def other_start(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s")
    z: Any = None
    for t in loop("time", len(x)):
        if t == 0:
            z = pyro.sample(f"z_{t}", dist.Categorical(pi))
            pyro.sample(f"first_{t}", dist.Poisson(s + z), obs=torch.tensor(2.0))
        else:
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def side_by_side(loop: Loop, x: Tensor) -> None:
    """Two chains in one loop, which meet in what is observed."""
    A, B, mu, s = simplex("A", K, K), simplex("B", 3, 3, seed=4), real("mu", K, 3), positive("s")
    z: Any = 0
    w: Any = 0
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        w = pyro.sample(f"w_{t}", dist.Categorical(B[w]))
        pyro.sample(f"x_{t}", dist.Normal(Vindex(mu)[z, w], s), obs=x[t])


def one_after_the_other(loop: Loop, x: Tensor) -> None:
    A, mu, s = simplex("A", K, K), real("mu", K), positive("s")
    for name in ("z", "w"):
        z: Any = 0
        for t in loop(f"time of {name}", len(x)):
            z = pyro.sample(f"{name}_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x{name}_{t}", dist.Normal(mu[z], s), obs=x[t] * len(name))


def second_order(loop: Loop, x: Tensor) -> None:
    A, mu, s = simplex("A", K, K, K), real("mu", K), positive("s")
    z: Any = 0
    before: Any = 0
    for t in loop("time", len(x), history=2):
        now = pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[before, z]))
        before, z = z, now
        pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def autoregressive(loop: Loop, x: Tensor) -> None:
    """What was observed at the step before is carried along."""
    A, b, s = simplex("A", K, K), real("b", K), positive("s")
    z: Any = 0
    last: Any = torch.tensor(0.0, dtype=torch.float64)
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        last = pyro.sample(f"x_{t}", dist.Normal(b[z] * last, s), obs=x[t])


def shared_above(loop: Loop, x: Tensor) -> None:
    """A latent above the whole chain."""
    g = pyro.sample("g", dist.Categorical(simplex("w", 2)))
    A, mu, s = simplex("A", 2, K, K), real("mu", K), positive("s")
    z: Any = torch.tensor(0)
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[g, z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def mixture_of_chains(loop: Loop, x: Tensor) -> None:
    A, mu, s = simplex("A", 2, K, K), real("mu", K), positive("s")
    with pyro.plate("rows", x.shape[1]):
        g = pyro.sample("g", dist.Categorical(simplex("w", 2)))
        z: Any = torch.tensor(0)
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[g, z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


def extra_latent(loop: Loop, x: Tensor) -> None:
    """A latent of each step that is not carried along."""
    A, v, mu, s = simplex("A", K, K), simplex("v", 2), real("mu", K, 2), positive("s")
    z: Any = 0
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        m = pyro.sample(f"m_{t}", dist.Categorical(v))
        pyro.sample(f"x_{t}", dist.Normal(Vindex(mu)[z, m], s), obs=x[t])


def seasonal(loop: Loop, x: Tensor) -> None:
    A, mu, s, season = simplex("A", K, K), real("mu", K), positive("s"), data(3, seed=2)
    z: Any = 0
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z] + season[t % 3] + 0.1 * t, s), obs=x[t])


def factor(loop: Loop, x: Tensor) -> None:
    A, mu = simplex("A", K, K), real("mu", K)
    z: Any = 0
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.factor(f"f_{t}", -0.5 * (x[t] - mu[z]) ** 2)


def unobserved_noise(loop: Loop, x: Tensor) -> None:
    A, mu, s = simplex("A", K, K), real("mu", K), positive("s")
    z: Any = 0
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])
        pyro.sample(f"y_{t}", dist.Normal(mu[z], s))


def scaled(loop: Loop, x: Tensor) -> None:
    pi, A, mu, s = simplex("pi", K), simplex("A", K, K), real("mu", K), positive("s")
    weight = torch.tensor([1.0, 2.0, 3.0])
    z: Any = None
    with pyro.plate("rows", x.shape[1]), poutine.scale(scale=weight):
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[t])


ONE = [
    gaussian,
    symbols,
    missing_steps,
    missing_by_obs_mask,
    covariates,
    changing_transitions,
    driven_transitions,
    states_in_a_list,
    other_start,
    side_by_side,
    one_after_the_other,
    second_order,
    autoregressive,
    shared_above,
    extra_latent,
    seasonal,
    factor,
    unobserved_noise,
]
MANY = [
    in_a_plate,
    plate_inside,
    tones,
    ragged,
    ragged_by_a_table,
    pyros_way,
    tones_of_sequences,
    rows_then_steps,
    covariates_in_a_plate,
    two_transitions,
    inputs_beside_events,
    offsets,
    offsets_of_as_many_numbers,
    mixture_of_chains,
    scaled,
]
