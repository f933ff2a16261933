"""Labels seen in part, beside the same evidence written out: a symbol that shows the latent of a row.

``pyro.sample("z", d, obs=labels, obs_mask=seen)`` has the density of an ordinary latent under which a
masked Categorical with a table of zeros and ones is observed. That model has no ``obs_mask``, so that
nothing of what reads it is in play.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, vectorized_markov

N, K = 30, 3
G = torch.Generator().manual_seed(1)
X = 2 * torch.randn(N, 2, generator=G).double()
U = torch.randn(N, 2, generator=G).double()
COUNTS = torch.poisson(3 * torch.ones(N).double(), generator=G)
LABELS = [torch.randint(n, (N,), generator=G) for n in (K, 2)]
SEEN = [torch.rand(N, generator=G) < 0.4 for _ in range(2)]
COUNTED = torch.rand(N, generator=G) < 0.8
MEANS = torch.randn(K, 2, generator=G).double()
Sample = Callable[..., Tensor]


def by_mask(name: str, d: dist.Distribution, label: Tensor, seen: Tensor) -> Tensor:
    return pyro.sample(name, d, obs=label, obs_mask=seen)


def written_out(name: str, d: dist.Distribution, label: Tensor, seen: Tensor) -> Tensor:
    z = pyro.sample(name, d)
    shown = torch.eye(d.logits.shape[-1], dtype=torch.float64)
    with poutine.mask(mask=seen):
        pyro.sample(f"{name}_shown", dist.Categorical(probs=shown[z]), obs=label)
    return z


def weights() -> Tensor:
    return pyro.param("p", torch.tensor([0.5, 0.3, 0.2]).double(), constraint=C.simplex)


def spreads(*shape: int) -> Tensor:
    return pyro.param("s", torch.ones(shape).double(), constraint=C.positive)


def masked(sample: Sample) -> None:
    p, mu, s = weights(), pyro.param("mu", MEANS.clone()), spreads(K, 1)
    with pyro.plate("n", N), poutine.mask(mask=COUNTED), poutine.scale(scale=2.0):
        z = sample("z", dist.Categorical(p), LABELS[0], SEEN[0])
        pyro.sample("x", dist.Normal(mu[z], s[z]).to_event(1), obs=X)


def experts(sample: Sample) -> None:
    v, mu, s = pyro.param("v", MEANS.T.clone()), pyro.param("mu", MEANS[:, 0].clone()), spreads(K)
    with pyro.plate("n", N):
        z = sample("z", dist.Categorical(logits=U @ v), LABELS[0], SEEN[0])
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=X[:, 0])


def two(sample: Sample) -> None:
    p, s = weights(), spreads()
    q = pyro.param("q", torch.tensor([0.6, 0.4]).double().repeat(K, 1), constraint=C.simplex)
    mu = pyro.param("mu", MEANS.clone())
    with pyro.plate("n", N):
        z = sample("z", dist.Categorical(p), LABELS[0], SEEN[0])
        v = sample("v", dist.Categorical(q[z]), LABELS[1], SEEN[1])
        pyro.sample("x", dist.Normal(Vindex(mu)[z, v], s), obs=X[:, 0])


def analysers(sample: Sample) -> None:
    p, mu, s = weights(), pyro.param("mu", MEANS.clone()), spreads(2)
    W = pyro.param("W", MEANS.flip(0).clone())
    with pyro.plate("n", N):
        z = sample("z", dist.Categorical(p), LABELS[0], SEEN[0])
        h = pyro.sample("h", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(mu[z] + W[z] * h.unsqueeze(-1), s).to_event(1), obs=X)


def rates(sample: Sample) -> None:
    p, b = weights(), pyro.param("b", torch.ones(K).double(), constraint=C.positive)
    a = pyro.param("a", torch.tensor([1.0, 2.0, 4.0]).double(), constraint=C.positive)
    with pyro.plate("n", N):
        z = sample("z", dist.Categorical(p), LABELS[0], SEEN[0])
        r = pyro.sample("r", dist.Gamma(a[z], b[z]))
        pyro.sample("x", dist.Poisson(r), obs=COUNTS)


def chain(sample: Sample) -> None:
    p, mu, s = weights(), pyro.param("mu", MEANS[:, 0].clone()), spreads(K)
    A = pyro.param("A", 0.5 * torch.eye(K).double() + 0.5 / K, constraint=C.simplex)
    z = None
    for t in vectorized_markov("time", N):
        d = dist.Categorical(p if z is None else A[z])
        z = sample(f"z_{t}", d, LABELS[0][t], SEEN[0][t])
        pyro.sample(f"x_{t}", dist.Normal(mu[z], s[z]), obs=X[t, 0])


def fitted(model: Callable[[Sample], None], sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    pyro.clear_param_store()
    history = ExactPosteriorEM(model).fit(sample, max_steps=3, tol=0, progress=False).history
    store = pyro.get_param_store()
    return torch.tensor(list(history)).double(), {n: store[n].detach().clone() for n in store}


@pytest.mark.parametrize("model", [masked, experts, two, analysers, rates, chain])
def test_labels_have_the_density_of_what_shows_them(model: Callable[[Sample], None]) -> None:
    (found, values), (asked, others) = fitted(model, by_mask), fitted(model, written_out)
    torch.testing.assert_close(found, asked, rtol=1e-12, atol=0)
    for name, value in values.items():
        torch.testing.assert_close(value, others[name], rtol=1e-9, atol=1e-12)


def test_losses_beside_a_guide_are_those_of_what_shows_the_labels() -> None:
    def model(sample: Sample) -> None:
        p, mu, d = weights(), pyro.param("mu", MEANS.clone()), pyro.param("d", MEANS[:2].clone())
        with pyro.plate("n", N):
            z = sample("z", dist.Categorical(p), LABELS[0], SEEN[0])
            h = pyro.sample("h", dist.Normal(mu[z], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.tanh(h) @ d, 1.0).to_event(1), obs=X)

    def guide(sample: Sample) -> None:
        a = pyro.param("a", torch.zeros(N, 2).double())
        with pyro.plate("n", N):
            pyro.sample("h", dist.Normal(a, 1.0).to_event(1))

    losses = []
    for sample in (by_mask, written_out):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        em = ExactPosteriorEM(model, guide, lambda p: torch.optim.Adam(p, lr=1e-2))
        losses.append([float(em.step(sample)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
