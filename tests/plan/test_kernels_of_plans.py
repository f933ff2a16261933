"""What a plan says of the kernel that iterates, and why no quicker one does."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, Fixed, Hard

X = torch.linspace(-2.0, 2.0, 12)


def weights(name: str = "w") -> Tensor:
    return pyro.param(name, torch.tensor([0.4, 0.6]), constraint=C.simplex)


def means(*shape: int) -> Tensor:
    size = torch.Size(shape or (2,))
    return pyro.param("mu", torch.linspace(-1.0, 1.0, size.numel()).reshape(size))


def rows(
    observe: Callable[[Tensor], Any], latents: int = 1, scale: tuple[float, float] = (1.0, 1.0)
) -> None:
    w = weights()
    with pyro.plate("n", len(X)), pyro.poutine.scale(scale=scale[0]):
        z = [pyro.sample(f"z{i}", dist.Categorical(w)) for i in range(latents)]
        with pyro.poutine.scale(scale=scale[1]):
            pyro.sample("x", observe(*z), obs=X)


def chain(
    T: int, order: int = 1, scale: float = 1.0, covariate: bool = False, data: float = 1.0
) -> None:
    w, mu = weights(), means()
    A = pyro.param("A", torch.full((2,) * (order + 1), 0.5), constraint=C.simplex)
    past: list[Tensor] = []
    with pyro.poutine.scale(scale=scale):
        for t in range(T):
            index = tuple(past[-order:])
            fn = dist.Categorical(w if len(index) < order else A[index])
            if covariate and past:
                fn = dist.Categorical(logits=means()[past[-1]].unsqueeze(-1) * X[t])
            past.append(pyro.sample(f"z{t}", fn))
            with pyro.poutine.scale(scale=data):
                pyro.sample(f"x{t}", dist.Normal(mu[past[-1]], 1.0), obs=X[t])


def two_chains() -> None:
    w, mu = weights(), means(2, 2)
    A = pyro.param("A", torch.full((2, 2), 0.5), constraint=C.simplex)
    z = u = None
    for t in range(3):
        z = pyro.sample(f"z{t}", dist.Categorical(w if z is None else A[z]))
        u = pyro.sample(f"u{t}", dist.Categorical(w if u is None else A[u]))
        pyro.sample(f"x{t}", dist.Normal(mu[z, u], 1.0), obs=X[t])


def tree() -> None:
    w, mu = weights(), means()
    tables = [pyro.param(n, torch.full((2, 2), 0.5), constraint=C.simplex) for n in "ABC"]
    with pyro.plate("n", len(X)):
        z = pyro.sample("z", dist.Categorical(w))
        leaves = [pyro.sample(f"u{i}", dist.Categorical(t[z])) for i, t in enumerate(tables)]
        for i, u in enumerate(leaves):
            pyro.sample(f"x{i}", dist.Normal(mu[u], 1.0), obs=X)


def two_sets() -> None:
    mu, w = means(), weights()
    with pyro.plate("n", len(X)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=X)
        u = pyro.sample("u", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[u], 1.0), obs=-X)


def nested() -> None:
    mu, w = means(), weights()
    with pyro.plate("groups", 3, dim=-1):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("rows", 4, dim=-2):
            u = pyro.sample("u", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[z]))
            pyro.sample("x", dist.Normal(mu[u], 1.0), obs=X.reshape(4, 3))


def normal(*z: Tensor) -> Any:
    return dist.Normal(means(*(2,) * len(z))[z], 1.0)


CASES: dict[str, tuple[Callable[[], None], str, str | None]] = {
    "mixture": (lambda: rows(normal), "mixture", None),
    "weighted rows": (lambda: rows(normal, scale=(2.0, 1.0)), "mixture", None),
    "weighted data": (
        lambda: rows(normal, scale=(1.0, 2.0)),
        "contraction",
        "poutine.scale is not one weight per row: no kernel",
    ),
    "two per row": (lambda: rows(normal, latents=2), "mixture", None),
    "many per row": (
        lambda: rows(normal, latents=11),
        "contraction",
        "11 latents per row have 2,048 values together: no kernel",
    ),
    "nested": (nested, "contraction", "two latents that share factors: no kernel"),
    "a family without closed forms": (
        lambda: rows(lambda z: dist.Gumbel(means()[z], 1.0)),
        "contraction",
        "'x' (Gumbel) has no closed forms",
    ),
    "a gradient": (
        lambda: rows(lambda z: dist.Normal(means().sin()[z], 1.0)),
        "mixture",
        None,
    ),
    "a gradient that reads the data": (
        lambda: rows(lambda z: dist.StudentT(3.0, means().sin()[z], 1.0)),
        "contraction",
        "the update of 'mu' is a gradient",
    ),
    "a dependence that is hidden": (
        lambda: rows(lambda z: dist.Normal(means().detach()[z], 1.0)),
        "contraction",
        "the model changes in a way that its autograd graph does not show",
    ),
    "chain": (lambda: chain(5), "chain", None),
    "two steps": (lambda: chain(2), "contraction", "two latents that share factors: no kernel"),
    "second order": (lambda: chain(5, order=2), "chain", None),
    "second order of a few steps": (
        lambda: chain(4, order=2),
        "contraction",
        "4 latents that are no chain: no kernel",
    ),
    "tree": (tree, "mixture", None),
    "two chains": (two_chains, "chain", None),
    "weighted chain": (lambda: chain(4, scale=2.0), "chain", None),
    "weighted steps": (
        lambda: chain(4, data=2.0),
        "contraction",
        "'x0' has a weight (poutine.scale) of its own: no kernel",
    ),
    "covariates of transitions": (
        lambda: chain(4, covariate=True),
        "contraction",
        "the update of 'mu' is a gradient",  # a mean and a coefficient of logits
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_name_and_reason(case: str) -> None:
    model, name, reason = CASES[case]
    em = ExactPosteriorEM(model)
    plan = em.plan()
    assert (plan.kernel, plan.kernel_reason) == (name, reason)
    line = next(line for line in str(plan).splitlines() if line.startswith("Iterations"))
    assert reason is None or f"({reason})" in line
    assert line.startswith(f"Iterations: {name}")
    copy = pickle.loads(pickle.dumps(plan))
    assert (copy.kernel, copy.kernel_reason, str(copy)) == (name, reason, str(plan))
    assert str(em.fit(max_steps=2, progress=False).plan) == str(plan)


def test_independent_sets_have_a_kernel_each() -> None:
    plan = ExactPosteriorEM(two_sets).plan()
    assert plan.kernel == {("z",): "mixture", ("u",): "mixture"}
    assert plan.kernel_reason == {("z",): None, ("u",): None}
    assert "Iterations: mixture kernel, in chunks of rows, for z and u" in str(plan)


def sets_of_all_kinds() -> None:
    two_sets()
    mu, w = means(), weights()
    A = pyro.param("A", torch.full((2, 2), 0.5), constraint=C.simplex)
    h = None
    for t in range(4):
        h = pyro.sample(f"h{t}", dist.Categorical(w if h is None else A[h]))
        pyro.sample(f"v{t}", dist.Normal(mu[h], 1.0), obs=X[t])
    a = pyro.sample("a", dist.Categorical(w))
    with pyro.plate("pairs", len(X)):
        b, c = (pyro.sample(name, dist.Categorical(w)) for name in "bc")
        pyro.sample("y2", dist.Normal(A[a, b], 1.0), obs=X)
        pyro.sample("y3", dist.Normal(A[a, c], 1.0), obs=X)


def test_sets_of_all_kinds() -> None:
    plan = ExactPosteriorEM(sets_of_all_kinds, updates={"A": Fixed()}).plan()
    chain = tuple(f"h{t}" for t in range(4))
    assert plan.kernel == {
        ("z",): "mixture",
        ("u",): "mixture",
        chain: "chain",
        ("a", "b", "c"): "contraction",
    }
    why = "latents of different plates: no kernel"
    assert plan.kernel_reason == {("z",): None, ("u",): None, chain: None, ("a", "b", "c"): why}
    (line,) = [line for line in str(plan).splitlines() if line.startswith("Iterations")]
    assert line == (
        "Iterations: mixture kernel, in chunks of rows, for z and u; "
        "chain kernel, by forward and backward messages, for h0 … h3; "
        f"contraction ({why}), for a, b, c"
    )


def test_a_site_that_is_seen_in_part_has_its_name() -> None:
    def model() -> None:
        two_sets()
        with pyro.plate("m", 4):
            seen = torch.tensor([True, False, True, False])
            v = pyro.sample("v", dist.Categorical(weights()), obs=torch.ones(4), obs_mask=seen)
            pyro.sample("y2", dist.Normal(means()[v.long()], 1.0), obs=X[:4])

    plan = ExactPosteriorEM(model).plan()
    assert len(plan.kernel) == 3
    assert "v_unobserved" not in str(plan).split("Iterations")[1]


def test_sets_without_a_kernel() -> None:
    def model() -> None:
        w, mu = weights(), means()
        for i in range(3):
            z = pyro.sample(f"z{i}", dist.Categorical(w))
            pyro.sample(f"x{i}", dist.Normal(mu[z], 1.0), obs=X[i])

    plan = ExactPosteriorEM(model).plan()
    assert set(plan.kernel.values()) == {"contraction"}  # type: ignore[union-attr]
    assert plan.kernel_reason[("z1",)] == "'z1' is in no plate: no kernel"  # type: ignore[index]
    first, second = ("'z0' is in no plate: no kernel", "'z1' is in no plate: no kernel")
    assert f"Iterations: contraction ({first}; {second}; …)" in str(plan)


def test_strategies_need_cells() -> None:
    plan = ExactPosteriorEM(CASES["mixture"][0], strategy=Hard()).plan()
    assert plan.kernel_reason == "Hard() works on the cells of the posterior"


def test_without_a_route_nothing_iterates() -> None:
    def model() -> None:
        with pyro.plate("n", len(X)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(u.exp(), 1.0), obs=X)

    plan = ExactPosteriorEM(model).plan()
    assert plan.kernel == "none"
    assert "Iterations: none." in str(plan)
