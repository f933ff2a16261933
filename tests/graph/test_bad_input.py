"""Bad input gets a sentence: where, what, why and a fix that works; nothing fitted is lost."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, tensor
from torch.distributions import constraints

from pyro_em import (
    ClosedForm,
    EMResult,
    EMStatus,
    ExactPosteriorEM,
    Fixed,
)
from pyro_em.errors import (
    DataError,
    DegenerateError,
    ModelError,
    PyroEMError,
    PyroEMWarning,
    UsageError,
)

EM = ExactPosteriorEM
NAN, INF = math.nan, math.inf
# Floats of the suite's dtype, which is set only while a test runs.
X = tensor([0.0, 0.1, 0.3, 1.0, 1.2], dtype=torch.float64)
GAPS = tensor([0.0, 0.1, NAN, 1.0, NAN], dtype=torch.float64)
ROWS = tensor([[0.0, 0.0], [1.0, NAN], [2.0, 3.0], [NAN, NAN]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def fitted(clean: None) -> None:
    """What was fitted before: each refusal must leave it alone."""
    pyro.param("mu", tensor([0.25, 1.25]))
    pyro.param("other", tensor(0.5), constraint=constraints.positive)


def stored() -> dict[str, Tensor]:
    return {n: p.detach().nan_to_num(-7.0) for n, p in pyro.get_param_store().items()}


def refuses(kind: type[PyroEMError], call: Callable[[], Any], words: str) -> str:
    """``call`` raises exactly ``kind``, says all ``words``, and changes nothing in the store."""
    before = stored()
    with pytest.raises(PyroEMError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert [w for w in words.split(" | ") if w not in text] == [], text
    after = stored()
    assert [n for n, v in before.items() if not torch.equal(v, after[n])] == []
    return text


def fit(model: Callable[..., Any], *args: Any, **kwargs: Any) -> EMResult:
    return EM(model).fit(*args, **kwargs)


# ------------------------------------------------------------------ the zoo


def means(k: int = 2) -> Tensor:
    return pyro.param("mu" if k == 2 else f"mu{k}", lambda: torch.arange(float(k)))


def label(name: str = "z", k: int = 2) -> Tensor:
    return pyro.sample(name, dist.Categorical(torch.ones(k) / k))


def coin() -> Tensor:
    return pyro.sample("z", dist.Bernoulli(0.5))


def rows(x: Tensor, loc: Callable[[Tensor], Tensor], mask: Tensor | None = None) -> None:
    mu = means()
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(loc(mu), 1.0), obs=x, obs_mask=mask)


def shared(x: Tensor, loc: Callable[[Tensor, Tensor], Any], draw: Any = label) -> None:
    mu, z = means(), draw()
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(torch.as_tensor(loc(mu, z)), 1.0), obs=x)


def empty(*args: Any) -> None:
    """A guide without sites."""


def gmm(x: Tensor, mask: Tensor | None = None, k: int = 2) -> None:
    rows(x, lambda mu: (mu if k == 2 else means(k))[label(k=k)], mask)


def features(x: Tensor, mask: Tensor | None = None, event: int = 1) -> None:
    mu = pyro.param("loc", lambda: torch.arange(4.0).reshape(2, 2))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mu[label()], 1.0).to_event(event), obs=x, obs_mask=mask)


def spread(x: Tensor, k: int = 2) -> None:
    mu = means(k)
    s = pyro.param("s", lambda: torch.ones(k), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        z = label(k=k)
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def masked(x: Tensor, how: str) -> None:
    mu, seen = means(), ~x.isnan()
    with pyro.plate("n", len(x)):
        d = dist.Normal(mu[label()], 1.0)
        if how == "handler":
            poutine.mask(pyro.sample, mask=seen)("x", d, obs=x)
        else:
            pyro.sample("x", d.mask(seen), obs=x)


def under_mask(x: Tensor, mask: Tensor) -> None:
    mu = means()
    with pyro.plate("n", len(x)), poutine.mask(mask=mask):
        pyro.sample("x", dist.Normal(mu[label()], 1.0), obs=x)


def sized(x: Tensor | None, scale: float = 1.0, of_z: float = 1.0, part: int = 5) -> None:
    mu = means()
    with pyro.plate("n", 5, subsample_size=part) as index, poutine.scale(scale=scale):
        z = poutine.scale(label, scale=of_z)()
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x if part == 5 else x[index])


def plateless(x: Tensor, latent: bool = False) -> None:
    z = pyro.sample("z", dist.Categorical(torch.ones(*x.shape, 2))) if latent else label()
    pyro.sample("x", dist.Normal(means()[z], 1.0), obs=x)


def chain(x: Tensor, lag: int = 0, history: int = 1, how: str = "markov") -> None:
    mu, zs = means(), []
    steps = range(x.shape[-1])
    for t in pyro.markov(steps, history=history) if how != "range" else steps:
        zs.append(pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2)[zs[-1] if zs else 0])))
        loc = mu[zs[t]] + (mu[zs[t - lag]] if 0 < lag <= t else 0.0)
        seen = ~x[t].isnan() if how == "mask" else None
        pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=x[..., t], obs_mask=seen)


def coupled_bits(x: Tensor) -> None:
    w = pyro.param("w", lambda: torch.ones(60))
    bits = [pyro.sample(f"z{i}", dist.Bernoulli(0.5)) for i in range(60)]
    pyro.sample("x", dist.Normal(sum(a * b for a, b in zip(w, bits, strict=True)), 1.0), obs=x)


def event_bits(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
    pyro.sample("x", dist.Normal((means() * z).sum(-1), 1.0), obs=x)


def plate_bits(x: Tensor) -> None:
    with pyro.plate("n", 5):
        z = label()
    pyro.sample("total", dist.Normal(means()[0] + z.sum(), 1.0), obs=x)


def no_parameters(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(1.0 * label(), 1.0), obs=x)


def two_constraints(x: Tensor, second: Any = constraints.unit_interval) -> None:
    a = pyro.param("a", tensor(0.5), constraint=constraints.positive)
    b = pyro.param("a", tensor(0.5), constraint=second)
    pyro.sample("x", dist.Normal(a, b), obs=x)


def loop(x: Tensor) -> None:
    mu = means()
    for i in range(len(x)):
        pyro.sample(f"x{i}", dist.Normal(mu[label(f"z{i}")], 1.0), obs=x[i])


def after_the_loop(x: Tensor, markov: bool = True) -> None:
    mu, zs = means(), [tensor(0)]
    for t in pyro.markov(range(3)) if markov else range(3):
        zs.append(pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2)[zs[-1]])))
    pyro.sample("x", dist.Normal(mu[zs[1]], 1.0), obs=x)


def emissions(x: Tensor) -> None:
    w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
    p = tensor([[0.5, 0.5, 0.0], [0.3, 0.7, 0.0]])
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Categorical(p[pyro.sample("z", dist.Categorical(w))]), obs=x)


def left_to_right(x: Tensor) -> None:
    first = tensor([[0.5, 0.5], [0.0, 1.0]])
    a, z = pyro.param("A", first, constraint=constraints.simplex), 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(a[z]))
        pyro.sample(f"x_{t}", dist.Categorical(torch.eye(2)[z]), obs=x[t])


def poisson(x: Tensor) -> None:
    rate = pyro.param("rate", tensor([1.0, 3.0]), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Poisson(rate[label()]), obs=x)


def crossed(x: Tensor) -> None:
    mu = means()
    rows, columns = pyro.plate("r", x.shape[0], dim=-2), pyro.plate("c", x.shape[1], dim=-1)
    with rows:
        a = label("a")
    with columns:
        b = label("b")
    with rows, columns:
        pyro.sample("x", dist.Normal(mu[a] + mu[b], 1.0), obs=x)


def raising(error: Exception) -> None:
    raise error


def changing(x: Tensor, calls: Iterator[int]) -> None:
    mu = means()
    pyro.sample(f"x_{next(calls)}", dist.Normal(mu[label()], 1.0), obs=x)


def many_problems(x: Tensor, y: Tensor) -> None:
    mu = means()
    with pyro.plate("n", len(x)):
        pyro.sample("first", dist.Normal(mu[0], 1.0), obs=x)
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Poisson(1.0))
        pyro.sample("x", dist.Normal(mu[0] + a + b, 1.0), obs=y)


def given(x: Tensor, observed: Any = None, latent: Any = None) -> None:
    """Sites with whatever is passed in place of their distributions."""
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", latent or dist.Bernoulli(0.5))
        pyro.sample("x", observed or dist.Normal(0.0, 1.0), obs=x + 0 * z.mean())


# ------------------------------------------------------------------ refusals

NAN2 = "site 'x' | 2 of 5 observed values are NaN | first at index (2,) | obs_mask"
SUPPORT = "site 'x' | 1 of 2 | support | index (1,)"
OUTSIDE = "outside every plate | pyro.plate | .to_event"
IF = "'z' | if z | torch.where"
LABELS = {"z": [0, 2, 0, 1, 1]}
D = " | import pyro.distributions as dist, and write dist.Normal(...)"
TORCHS = torch.distributions.Normal(0.0, 1.0)

drawn: Any = lambda mu: mu[0] + pyro.sample("z", dist.Normal(0.0, 1.0))  # noqa: E731
bent: Any = lambda mu: mu[0] + pyro.sample("z", dist.Normal(0.0, 1.0)).exp()  # noqa: E731
counted: Any = lambda mu: mu[0] + pyro.sample("z", dist.Poisson(1.0))  # noqa: E731
hidden: Any = lambda mu: mu[poutine.mask(label, mask=label() > 0)("y")]  # noqa: E731
unequal: Any = lambda mu: mu[label()] + mu[poutine.scale(label, scale=2.0)("y")]  # noqa: E731

REFUSED: dict[str, tuple[type[PyroEMError], Callable[[], Any], str]] = {
    # data that are no numbers
    "NaN": (DataError, lambda: fit(gmm, GAPS), NAN2),
    "NaN posterior": (DataError, lambda: EM(gmm).posterior(GAPS), NAN2),
    "NaN plan": (DataError, lambda: EM(gmm).plan(GAPS), NAN2),
    "NaN counts": (DataError, lambda: fit(poisson, GAPS), NAN2),
    "NaN event": (DataError, lambda: fit(features, ROWS), "3 of 8 | NaN | (1, 1) | .all(-1)"),
    "NaN chain": (DataError, lambda: fit(chain, GAPS), "'x_2' | 'x_4' | NaN | obs_mask"),
    "NaN beside obs_mask": (DataError, lambda: fit(gmm, GAPS, X != 1.0), NAN2),
    "inf": (DataError, lambda: fit(gmm, tensor([0, INF, 1])), "'x' | 1 of 3 | infinite | (1,)"),
    "inf remedy": (DataError, lambda: fit(gmm, tensor([0, INF])), "obs_mask | isfinite"),
    "NaN and inf": (DataError, lambda: fit(gmm, tensor([INF, NAN])), "2 of 2 | NaN or infinite"),
    # data of a wrong shape, type or support
    "features": (DataError, lambda: fit(features, torch.zeros(4, 3)), "'x' | (4, 3) | (2,)"),
    "plate": (DataError, lambda: fit(sized, torch.zeros(4)), "'x' | (4,) | (5,) | plate"),
    "matrix": (DataError, lambda: fit(gmm, torch.zeros(4, 3)), "'x' | (4, 3) | (4,) | broadcast"),
    "column": (DataError, lambda: fit(gmm, torch.zeros(5, 1)), "'x' | (5, 1) | (5,)"),
    "nested list": (DataError, lambda: fit(gmm, X.tolist()), "site 'x' | list | torch.as_tensor"),
    "empty plate": (DataError, lambda: fit(gmm, torch.zeros(0)), "plate 'n' | empty"),
    "negative": (DataError, lambda: fit(poisson, tensor([1.0, -2.0])), SUPPORT),
    "fraction": (DataError, lambda: fit(poisson, tensor([1.0, 2.5])), SUPPORT),
    "category": (DataError, lambda: fit(emissions, tensor([0, 3])), SUPPORT),
    "impossible": (DataError, lambda: fit(emissions, tensor([0, 2])), "'x' | imposs | rows = 1"),
    "impossible chain": (DataError, lambda: fit(left_to_right, tensor([0, 1, 0])), "'x_2' | impos"),
    # no distributions of Pyro's
    "torch's": (ModelError, lambda: fit(given, X, TORCHS), "'x' | torch.distributions.Normal" + D),
    "of a guide": (
        ModelError,
        lambda: EM(gmm, lambda *_: pyro.sample("h", TORCHS)).fit(X),
        "'h' | torch.distributions.Normal" + D,
    ),
    "torch's z": (
        ModelError,
        lambda: fit(given, X, latent=torch.distributions.Categorical(torch.ones(2))),
        "'z' | torch.distributions.Categorical | write dist.Categorical(...)",
    ),
    "a class": (ModelError, lambda: fit(given, X, dist.Normal), "'x' | class Normal | arguments"),
    "a function": (ModelError, lambda: fit(given, X, latent=torch.zeros_like), "'z' | object"),
    "a number": (ModelError, lambda: fit(given, X, 1.0), "'x' | type float | dist.Normal(loc"),
    # latents and enumeration
    "continuous": (ModelError, lambda: fit(rows, X, bent), "'z' | continuous | Normal | guide"),
    "guide lacks it": (ModelError, lambda: EM(rows, empty).fit(X, bent), "'z' | guide lacks it"),
    "infinite": (ModelError, lambda: fit(rows, X, counted), "'z' | Poisson | infinite support"),
    "event latent": (ModelError, lambda: fit(event_bits, tensor(1.0)), "'z' | to_event"),
    "budget": (ModelError, lambda: EM(gmm, max_enumeration=9).fit(X), "'z' | 10 cells | tion=9"),
    "budget, NaN": (ModelError, lambda: fit(coupled_bits, tensor(NAN)), "1.15e+18 | NaN"),
    "z.sum()": (ModelError, lambda: fit(plate_bits, X[0]), "'total' | 'z' | plate 'n' | outside"),
    "crossed": (ModelError, lambda: fit(crossed, torch.zeros(3, 3)), "'a' and 'b' | plates c, r"),
    "mask": (ModelError, lambda: fit(rows, X, hidden), "'y' | mask depends on a latent"),
    "mu[z]": (ModelError, lambda: fit(rows, X, lambda mu: mu[coin()]), "'z' | z.long()"),
    "if": (
        ModelError,
        lambda: fit(rows, X, lambda mu: mu[1 if coin() else 0]),
        IF,
    ),
    "if global": (
        ModelError,
        lambda: fit(shared, X, lambda mu, z: mu[1 if z else 0]),
        IF,
    ),
    "item": (
        ModelError,
        lambda: fit(shared, X, lambda mu, z: mu[z.item()]),
        "'z' | Python number",
    ),
    "int": (ModelError, lambda: fit(shared, X, lambda mu, z: mu[int(z)]), "'z' | Python number"),
    "list": (ModelError, lambda: fit(shared, X, lambda mu, z: [*mu][z]), "'z' | torch.stack"),
    "70 sites": (ModelError, lambda: fit(loop, torch.zeros(70)), "'z0' | 64 | pyro.plate"),
    "70 steps": (
        ModelError,
        lambda: fit(chain, torch.zeros(70), 0, 1, "range"),
        "64 | pyro.markov",
    ),
    "lag 2": (ModelError, lambda: fit(chain, X, 2), "'x_2' | 'z_0' | history=2"),
    "lag 3": (ModelError, lambda: fit(chain, X, 3), "'x_3' | 'z_0' | history=3"),
    "after the loop": (ModelError, lambda: fit(after_the_loop, X[0]), "'x' | 'z_0' | pyro.markov"),
    # batch dimensions outside every plate, also when their size is the number of states
    "plateless": (ModelError, lambda: fit(plateless, X), "site 'x' | size 5 | " + OUTSIDE),
    "plateless K": (ModelError, lambda: fit(plateless, X[:2]), "site 'x' | size 2 | " + OUTSIDE),
    "plateless latent": (ModelError, lambda: fit(plateless, X, True), "site 'z' | " + OUTSIDE),
    "plateless latent K": (ModelError, lambda: fit(plateless, X[:2], True), "'z' | " + OUTSIDE),
    "plateless chain": (ModelError, lambda: fit(chain, torch.zeros(4, 3)), "'x_0' | " + OUTSIDE),
    "plateless chain K": (ModelError, lambda: fit(chain, torch.zeros(2, 3)), "'x_0' | " + OUTSIDE),
    "to_event K": (
        ModelError,
        lambda: fit(features, torch.zeros(2, 2), None, 0),
        "'x' | " + OUTSIDE,
    ),
    "nesting": (UsageError, lambda: EM(gmm, max_plate_nesting=0).fit(X), "max_plate_nesting=1"),
    # parameters, observations, plates, scales
    "no parameters": (UsageError, lambda: fit(no_parameters, X), "no parameters | em.posterior"),
    "no observations": (UsageError, lambda: fit(sized, None), "no observation | obs="),
    "no sites": (UsageError, lambda: EM(lambda: None).posterior(), "no sites"),
    "constraints": (ModelError, lambda: fit(two_constraints, X[0]), "'a' | GreaterThan | Interval"),
    "unconstrained": (ModelError, lambda: fit(two_constraints, X[0], constraints.real), "Real()"),
    "stale": (ModelError, lambda: fit(gmm, X, None, 3), "'mu3' | (2,) | (3,) | clear_param_store"),
    "stale NaN": (ModelError, lambda: fit(gmm, X, None, 4), "parameter 'mu4' | not finite"),
    "subsample": (
        UsageError,
        lambda: fit(sized, X, 1.0, 1.0, 3),
        "'n' | random | subsample_size",
    ),
    "scale of z": (ModelError, lambda: fit(sized, X, 1.0, 2.0), "'z' and 'x' | poutine.scale"),
    "scales": (ModelError, lambda: fit(rows, X, unequal), "'z' and 'y' | different"),
    "scale across": (
        DataError,
        lambda: fit(sized, X, torch.ones(5, 1)),
        "'z' | poutine.scale has shape (5, 1) | 'n' of size 5 in dimension -1 | .squeeze(-1)",
    ),
    "scale short": (DataError, lambda: fit(sized, X, torch.ones(3)), "'x' | scale has shape (3,)"),
    "mask across": (
        DataError,
        lambda: fit(under_mask, X, torch.ones(5, 1) > 0),
        "'z' | mask has shape (5, 1)",
    ),
    "mask short": (DataError, lambda: fit(under_mask, X, torch.ones(3) > 0), "'x' | mask | (3,)"),
    "scale 0": (ModelError, lambda: fit(sized, X, 0.0), "scale > 0"),
    # calls
    "no arguments": (ModelError, lambda: fit(gmm), "missing 1 required positional argument: 'x'"),
    "model raises": (ModelError, lambda: fit(raising, ValueError("mine")), "ValueError: mine"),
    "model KeyError": (ModelError, lambda: fit(raising, KeyError("mine")), "KeyError | mine"),
    "changing": (ModelError, lambda: fit(changing, X[0], itertools.count()), "run to run"),
    "keyword": (UsageError, lambda: fit(lambda x, tol=1: gmm(x), X), "'tol' | keyword | position"),
    "typing error": (UsageError, lambda: fit(gmm, X, maxsteps=3), "'maxsteps' | max_steps"),
    "updates": (UsageError, lambda: EM(gmm, updates={"nu": Fixed()}).fit(X), "'nu' | 'mu'"),
    "updates glob": (UsageError, lambda: EM(gmm, updates={"n*": Fixed()}).plan(X), "'n*' | 'mu'"),
    "updates word": (UsageError, lambda: EM(gmm, updates={"mu": "fixed"}).fit(X), "['mu'] | Fixed"),
    "updates class": (UsageError, lambda: EM(gmm, updates={"mu": Fixed}).fit(X), "['mu'] | Fixed("),
    "init": (UsageError, lambda: fit(gmm, X, init="warm"), "init | 'warm' | 'random'"),
    "init site": (UsageError, lambda: fit(gmm, X, init={"y": [0] * 5}), "init['y'] | 'z'"),
    "init shape": (UsageError, lambda: fit(gmm, X, init={"z": [0]}), "(1,) | (5,) | (5, 2)"),
    "init label": (UsageError, lambda: fit(gmm, X, init=LABELS), "init['z'] | 0 to 2 | 0 … 1"),
    "init real": (UsageError, lambda: fit(gmm, X, init={"z": X}), "init['z'] | integer"),
    "init NaN": (UsageError, lambda: fit(gmm, X, init={"z": pairs(NAN)}), "init['z'] | NaN"),
    "params": (UsageError, lambda: EM(gmm).elbo(X, params={"nu": X}), "params['nu'] | 'mu'"),
    "params shape": (UsageError, lambda: EM(gmm).elbo(X, params={"mu": X}), "['mu'] | (5,) | (2,)"),
    "params NaN": (UsageError, lambda: EM(gmm).elbo(X, params={"mu": [NAN, 0]}), "'mu' | Real()"),
    "no model": (UsageError, lambda: EM(gmm(X)), "NoneType | not the result of calling"),  # type: ignore
    "save": (UsageError, lambda: EM(gmm).save("nowhere"), "save | not been run"),
    "max_steps": (UsageError, lambda: fit(gmm, X, max_steps=-1), "max_steps=-1"),
    "batch_size": (UsageError, lambda: fit(gmm, X, batch_size=3), "batch_size"),
    "probs": (UsageError, lambda: EM(gmm).posterior(X).probs("y"), "site 'y' | 'z'"),
}


# Defects of the library, each with what it does now.
def pairs(value: float) -> Tensor:
    return torch.full((5, 2), value)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    pyro.param("mu3", tensor([0.0, 1.0]))
    pyro.param("mu4", torch.full((4,), NAN))
    kind, call, words = REFUSED[case]
    refuses(kind, call, words)


def test_all_problems_in_one_message_latents_first() -> None:
    text = refuses(ModelError, lambda: fit(many_problems, GAPS, X / 0), "4 problems | NaN | infin")
    places = [text.index(f"{i}. site '{n}'") for i, n in enumerate(["a", "b", "first", "x"], 1)]
    assert places == sorted(places)


def mixed_up(x: Tensor) -> None:
    pyro.param("a", tensor(0.5), constraint=constraints.positive)
    pyro.param("a", tensor(0.5), constraint=constraints.unit_interval)
    mu, z = means(), pyro.sample("z", dist.Categorical(torch.ones(5, 2) / 2))
    c = pyro.sample("c", dist.Gamma(1.0, 1.0))
    pyro.sample("x", dist.Normal(mu[z] + c, 1.0), obs=x)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("'c'", "parameter 'a'"),
        ("site 'z'", "'x'"),
    ],
)
def test_latents_come_first(first: str, second: str) -> None:
    text = refuses(ModelError, lambda: fit(mixed_up, X), f"{first} | {second}")
    assert text.index(first) < text.index(second)


def test_unreadable_data_of_gaussian_latents_are_the_only_problem() -> None:
    """Once they are mended, the latent has an exact posterior."""

    def factors(x: Tensor) -> None:
        w = pyro.param("W", torch.ones(4))
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h[:, None] * w, 1.0).to_event(1), obs=x)

    bad = torch.where(torch.eye(4) > 0, NAN, torch.eye(4))
    text = refuses(DataError, lambda: fit(factors, bad), "'x' | 4 of 16 observed values are NaN")
    assert "'h'" not in text


def test_one_mistake_in_a_long_chain_is_said_once() -> None:
    text = refuses(ModelError, lambda: fit(chain, torch.zeros(50), 2), "'x_2' | 'z_0' | history=2")
    assert len(text.splitlines()) < 30


def test_sixty_coupled_binary_latents_within_a_second() -> None:
    begin = time.perf_counter()
    refuses(ModelError, lambda: fit(coupled_bits, tensor(3.0)), "'z0' | 1.15e+18 cells | 60 | 'x'")
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize("data", ["argument", "nested", "mode"])
def test_inference_mode(data: str) -> None:
    with torch.inference_mode():
        x = X.clone()
        if data == "mode":
            refuses(UsageError, lambda: EM(gmm).posterior(X), "inference_mode | torch.no_grad()")
    if data == "argument":
        refuses(UsageError, lambda: fit(gmm, x), "inference_mode | clone")
        fit(gmm, x.clone())
    if data == "nested":  # works, so that there is nothing to refuse
        fit(lambda d: gmm(d["x"]), {"x": x})
    with torch.no_grad():
        assert fit(gmm, X).converged


def test_stale_parameter() -> None:
    pyro.param("loc", torch.zeros(2, 3))
    words = "parameter 'loc' | (2, 3) | (2, 2) | clear_param_store() | scope()"
    refuses(ModelError, lambda: fit(features, ROWS[::2]), words)
    with pyro.get_param_store().scope():
        fit(features, ROWS[::2])
    assert pyro.param("loc").shape == (2, 3)


def test_reset_is_a_fix_of_a_stale_parameter() -> None:
    pyro.param("loc", torch.zeros(2, 3))
    em = EM(features)
    text = refuses(ModelError, lambda: em.fit(ROWS[::2]), "parameter 'loc'")
    if "em.reset()" in text:
        em.reset()
        em.fit(ROWS[::2])


QS: dict[str, tuple[Any, str]] = {
    "shape": ({"z": torch.ones(3, 2) / 2}, "q['z'] | (3, 2) | (5, 2)"),
    "labels": ({"z": torch.zeros(5)}, "q['z'] | (5,) | (5, 2)"),
    "sum": ({"z": torch.ones(5, 2)}, "q['z'] | sum to one"),
    "missing": ({}, "missing | 'z'"),
    "unknown": ({"z": torch.ones(5, 2) / 2, "y": X}, "'y'"),
    "NaN": ({"z": pairs(NAN)}, "q['z']"),
}


@pytest.mark.parametrize("call", ["elbo", "m_step"])
@pytest.mark.parametrize("q", QS)
def test_wrong_q(q: str, call: str) -> None:
    given, words = QS[q]
    em = EM(gmm)
    use = em.m_step if call == "m_step" else lambda q, x: em.elbo(x, q=q)
    refuses(UsageError, lambda: use(given, X), words)
    refuses(UsageError, lambda: use(em.posterior(X[:3]), X), "q | other data or another model")


def test_files_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "fitted.pt"
    em = EM(features)
    em.fit(ROWS[::2])
    em.save(path)
    refuses(UsageError, lambda: EM(gmm).load(path, X), "another model | 'loc'")
    other = EM(gmm)
    other.load(path)
    refuses(UsageError, lambda: other.fit(X), "another model | 'loc'")
    (tmp_path / "text").write_text("hello")
    refuses(UsageError, lambda: EM(gmm).load(tmp_path / "text"), "not written by")


# ------------------------------------------------------------------ what is fine, and the fixes


FINE: dict[str, Callable[[], Any]] = {
    "column to_event": lambda: fit(features, ROWS[::2].nan_to_num()),
    "integers": lambda: fit(gmm, tensor([0, 1, 5, 6])),
    "integer counts": lambda: fit(poisson, tensor([0, 1, 5, 6])),
    "float categories": lambda: fit(emissions, tensor([0.0, 1.0, 1.0])),
    "float32": lambda: fit(gmm, X.float()),
    "gradient": lambda: fit(gmm, X.clone().requires_grad_()),
    "N=1": lambda: fit(gmm, X[:1]),
    "K=1": lambda: fit(spread, X, 1),
    "N=1, K=1": lambda: fit(gmm, X[:1], None, 1),
    "chain of one": lambda: fit(chain, X[:1]),
    "z.long()": lambda: fit(rows, X, lambda mu: mu[coin().long()]),
    "torch.where": lambda: fit(rows, X, lambda mu: torch.where(coin().bool(), mu[1], mu[0])),
    "history": lambda: fit(chain, X, 2, 2),
    "range": lambda: fit(after_the_loop, X[0], False),
    "position": lambda: fit(lambda x, tol=1: gmm(x), X, 2),
    "one scale": lambda: fit(sized, X, 2.0),
    "same constraint": lambda: fit(two_constraints, X[1:2], constraints.positive),
    "budget": lambda: EM(gmm, max_enumeration=10).fit(X),
    "fixed subsample": lambda: EM(sized).posterior(X, 1.0, 1.0, 3),
    "no parameters": lambda: EM(no_parameters).posterior(X),
    "no observations": lambda: EM(sized).posterior(None),
}


@pytest.mark.parametrize("case", FINE)
def test_fine(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = FINE[case]()
    assert math.isfinite(result.log_evidence)


@pytest.mark.parametrize("how", ["obs_mask", "handler", "distribution", "event", "chain"])
def test_masked_nan_is_fine(how: str) -> None:
    seen = ~GAPS.isnan()
    if how == "event":
        both = (~ROWS.isnan()).all(-1)
        got, expected = fit(features, ROWS, both), fit(features, ROWS[both])
    elif how == "chain":
        got, expected = fit(chain, GAPS, 0, 1, "mask"), fit(gmm, GAPS[seen])
    elif how == "obs_mask":
        got, expected = fit(gmm, GAPS, seen), fit(gmm, GAPS[seen])
    else:
        got, expected = fit(masked, GAPS, how), fit(gmm, GAPS[seen])
    assert all(bool(p.isfinite().all()) for p in got.params.values())
    em = EM({"event": features, "chain": gmm}.get(how, gmm))
    at_got = em.elbo(ROWS[both] if how == "event" else GAPS[seen], params=dict(got.params))
    assert math.isclose(at_got.value, got.log_evidence, rel_tol=1e-9)
    assert math.isclose(expected.log_evidence, got.log_evidence, abs_tol=1e-3)


def test_tempering_is_said() -> None:
    with pytest.warns(PyroEMWarning, match=r"site 'x'.*latent 'z'.*tempers"):
        fit(sized, X, 2.0, 0.5)


# ------------------------------------------------------------------ degenerate, empty, symmetric

LONELY = tensor([0.0, 0.1, -0.1, 0.2, 50.0], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:component 1 of")
@pytest.mark.parametrize("data", [LONELY, LONELY[:1], torch.full((6,), 2.0, dtype=torch.float64)])
def test_a_collapsing_variance_is_rolled_back_and_named(data: Tensor) -> None:
    pyro.param("mu").data.copy_(tensor([0.0, 50.0]))
    em = EM(spread)
    with pytest.warns(
        PyroEMWarning, match=r"parameter 's', component [01]: its variance collapses"
    ):
        result = em.fit(data)
    assert result.status is EMStatus.DEGENERATE and not result.converged
    assert math.isfinite(result.log_evidence) and "ClosedForm(floor=" in result.message
    assert all(torch.equal(v, pyro.param(n)) for n, v in result.params.items())
    refuses(DegenerateError, lambda: [em.step(data) for _ in range(50)], "'s' | rolled back")
    assert all(bool(p.isfinite().all()) for p in stored().values())
    floored = EM(spread, updates={"s": ClosedForm(floor=1e-2)}).fit(data)
    assert floored.status is not EMStatus.DEGENERATE
    assert float(floored.params["s"].min()) >= 0.1 - 1e-12


def test_an_empty_component_keeps_its_value() -> None:
    pyro.param("mu").data.copy_(tensor([0.0, 1e6]))
    with pytest.warns(
        PyroEMWarning, match=r"component 1 of parameters 'mu', 's'.*its value was kept"
    ):
        result = fit(spread, X)
    assert result.params["mu"][1] == 1e6 and math.isfinite(result.log_evidence)


def test_a_symmetric_start_is_said() -> None:
    pyro.param("mu").data.fill_(0.5)
    with pytest.warns(PyroEMWarning, match=r"'z'.*start is symmetric(.|\n)*init='random'"):
        result = fit(spread, X)
    assert result.status is EMStatus.SYMMETRIC and not result.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(spread, X, init="random", seed=0).log_evidence > result.log_evidence


def test_restarts_of_a_symmetric_start_need_no_warning() -> None:
    pyro.param("mu").data.fill_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(spread, X, num_restarts=3, seed=0).status is not EMStatus.SYMMETRIC


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_fit_that_is_interrupted_keeps_its_parameters(error: type[BaseException]) -> None:
    seen = {}

    def callback(step: Any) -> None:
        seen.update(step.params)
        if step.index == 2:
            raise error

    if error is KeyboardInterrupt:
        result = fit(gmm, X, callbacks=[callback], tol=0)
        assert result.status is EMStatus.INTERRUPTED and result.num_steps == 3
        assert "interrupted" in result.message
    else:
        with pytest.raises(error):
            fit(gmm, X, callbacks=[callback], tol=0)
    torch.testing.assert_close(pyro.param("mu").detach(), seen["mu"])
