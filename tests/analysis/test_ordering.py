"""Sorting components leaves the evidence, and puts every parameter in order."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, UsageError

X = torch.tensor([[3.0, 3.2, -1.0], [-1.2, 0.9, 1.1]], dtype=torch.float64)


def chain(x: torch.Tensor) -> None:
    start = pyro.param("start", torch.tensor([0.2, 0.5, 0.3]), constraint=constraints.simplex)
    A = pyro.param(
        "A",
        torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]),
        constraint=constraints.simplex,
    )
    mu = pyro.param("mu", torch.tensor([3.0, -1.0, 1.0]))
    s = pyro.param("s", torch.tensor(0.7), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        p = start
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s), obs=x[:, t])
            p = A[z]


def test_a_chain_is_sorted_in_all_its_parameters() -> None:
    em = ExactPosteriorEM(chain)
    before = em.posterior(X)
    values = {n: pyro.param(n).detach().clone() for n in ("start", "A", "mu", "s")}
    order = em.sort_components("z_0", "mu", X)
    assert order.tolist() == [1, 2, 0]
    assert pyro.param("mu").tolist() == [-1.0, 1.0, 3.0]
    torch.testing.assert_close(pyro.param("start").detach(), values["start"][order])
    torch.testing.assert_close(pyro.param("A").detach(), values["A"][order][:, order])
    assert float(pyro.param("s").detach()) == pytest.approx(float(values["s"]))
    after = em.posterior(X)
    assert after.log_evidence == pytest.approx(before.log_evidence, rel=1e-12)
    torch.testing.assert_close(after.probs("z_1"), before.probs("z_1")[..., order])


def two_chains(x: torch.Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([3.0, -1.0]))
    nu = pyro.param("nu", torch.tensor([0.5, 0.1]))
    y = z = None
    for t in pyro.markov(range(x.shape[1])):
        y = pyro.sample(f"y_{t}", dist.Categorical(torch.full((2,), 0.5)))
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.full((2,), 0.5)))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[0, t])
        pyro.sample(f"w_{t}", dist.Normal(nu[y], 1.0), obs=x[1, t])


def test_a_glob_names_all_steps_of_one_chain() -> None:
    em = ExactPosteriorEM(chain)
    assert em.sort_components("z_*", "mu", X).tolist() == [1, 2, 0]
    assert em.sort_components("z_*", "mu", X).tolist() == [0, 1, 2]
    pyro.clear_param_store()
    em = ExactPosteriorEM(two_chains)
    with pytest.raises(UsageError, match="'y_0' and 'z_0' share no components"):
        em.sort_components("*", "mu", X)
    assert em.sort_components("z_*", "mu", X).tolist() == [1, 0]
    assert pyro.param("nu").tolist() == pytest.approx([0.5, 0.1])
    with pytest.raises(UsageError, match=r"'w_\*': it matches nothing; the summed latents are"):
        em.sort_components("w_*", "mu", X)


def two_latents(x: torch.Tensor) -> None:
    a = pyro.param("a", torch.tensor([2.0, 0.0]))
    b = pyro.param("b", torch.tensor([[0.3, 0.7], [0.6, 0.4]]), constraint=constraints.simplex)
    c = pyro.param("c", torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        y = pyro.sample("y", dist.Categorical(b[z]))
        pyro.sample("x", dist.Normal(a[z], 1.0), obs=x)
        pyro.sample("w", dist.Normal(c[z, y], 1.0), obs=x)


def test_only_the_axes_of_that_latent_move() -> None:
    em = ExactPosteriorEM(two_latents)
    x = X.reshape(-1)
    before = em.posterior(x).log_evidence
    em.sort_components("z", "a", x)
    assert pyro.param("a").tolist() == [0.0, 2.0]
    assert pyro.param("c").tolist() == [[3.0, 5.0], [1.0, 2.0]]
    assert pyro.param("b").tolist() == [[0.6, 0.4], [0.3, 0.7]]
    em.sort_components("y", torch.tensor([1.0, 0.0]), x)
    assert pyro.param("c").tolist() == [[5.0, 3.0], [2.0, 1.0]]
    assert em.posterior(x).log_evidence == pytest.approx(before, rel=1e-12)


def test_components_that_constants_tell_apart_are_refused() -> None:
    def model(x: torch.Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([2.0, 0.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    em = ExactPosteriorEM(model)
    with pytest.raises(UsageError, match="not exchangeable"):
        em.sort_components("z", "mu", X[0])
    assert pyro.param("mu").tolist() == [2.0, 0.0]
    with pytest.raises(UsageError, match="no such parameter is indexed by 'z'"):
        em.sort_components("z", "nu", X[0])
    with pytest.raises(UsageError, match="no summed latent"):
        em.sort_components("y", "mu", X[0])
    with pytest.raises(UsageError, match="3 keys for 2 components"):
        em.sort_components("z", torch.zeros(3), X[0])


def analysers(x: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    w = pyro.param("W", torch.randn(3, 4, 2, generator=generator))
    mu = pyro.param("mu", torch.randn(3, 4, generator=generator))
    s = pyro.param(
        "s", torch.rand(3, 4, generator=generator) + 0.5, constraint=constraints.positive
    )
    pi = pyro.param("pi", torch.tensor([0.2, 0.5, 0.3]), constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (w[z] @ h.unsqueeze(-1)).squeeze(-1) + mu[z]
        pyro.sample("x", dist.Normal(mean, s[z]).to_event(1), obs=x)


@pytest.mark.parametrize("by", ["mu", "W", "pi"])
def test_components_of_factor_analysers_are_sorted_in_all_their_parameters(by: str) -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    em = ExactPosteriorEM(analysers)
    before = em.posterior(x)
    values = {n: pyro.param(n).detach().clone() for n in ("W", "mu", "s", "pi")}
    order = em.sort_components("z", by, x, descending=True)
    keys = values[by].reshape(3, -1)[:, 0]
    assert torch.equal(order, keys.argsort(descending=True)) and order.tolist() != [0, 1, 2]
    for name, value in values.items():
        torch.testing.assert_close(pyro.param(name).detach(), value[order])
    after = em.posterior(x)
    torch.testing.assert_close(after.probs("z"), before.probs("z")[:, order])
    torch.testing.assert_close(after.mean("h"), before.mean("h"))


def test_coefficients_of_a_mixture_of_regressions_are_sorted() -> None:
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))

    def model(y: torch.Tensor) -> None:
        beta = pyro.param("beta", torch.tensor([[1.0, -0.5], [-1.0, 2.0], [0.3, 0.1]]))
        s = pyro.param("s", torch.tensor([0.5, 1.0, 0.7]), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("y", dist.Normal((beta[z] * x).sum(-1), s[z]), obs=y)

    em = ExactPosteriorEM(model)
    assert em.sort_components("z", "beta", x[:, 0]).tolist() == [1, 2, 0]
    torch.testing.assert_close(pyro.param("s").detach(), torch.tensor([1.0, 0.7, 0.5]))
    torch.testing.assert_close(pyro.param("beta").detach()[:, 0], torch.tensor([-1.0, 0.3, 1.0]))
