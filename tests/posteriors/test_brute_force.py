"""Exact means exact: random networks against the joint table."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pyro_em import DataError, ExactPosteriorEM
from tests.brute_force import random_network


@hypothesis_settings(max_examples=90)
@given(seed=st.integers(0, 10**6), zeros=st.booleans(), tiny=st.booleans())
def test_random_network(seed: int, zeros: bool, tiny: bool) -> None:
    torch.set_default_dtype(torch.float64)
    network = random_network(seed, zeros=zeros, tiny=tiny)
    joint = network.joint()
    em = ExactPosteriorEM(network.model)
    if joint.sum() == 0:
        with pytest.raises(DataError, match="impossible"):
            em.posterior()
        return
    q = em.posterior()
    assert q.log_evidence == pytest.approx(np.log(joint.sum()), rel=1e-9, abs=1e-9)
    truth = joint / joint.sum()
    latents = network.latents
    axes = range(len(latents))
    for a, i in enumerate(latents):
        marginal = truth.sum(tuple(x for x in axes if x != a))
        np.testing.assert_allclose(q.probs(f"v{i}").numpy(), marginal, atol=1e-9)
    for a, b in itertools.combinations(axes, 2):
        pair = truth.sum(tuple(x for x in axes if x not in (a, b)))
        np.testing.assert_allclose(
            q.joint(f"v{latents[a]}", f"v{latents[b]}").numpy(), pair, atol=1e-9
        )
        np.testing.assert_allclose(
            q.joint(f"v{latents[b]}", f"v{latents[a]}").numpy(), pair.T, atol=1e-9
        )
    mode = q.mode()
    cell = tuple(int(mode[f"v{i}"]) for i in latents)
    assert truth[cell] == pytest.approx(truth.max(), rel=1e-9)
    entropy = -(truth[truth > 0] * np.log(truth[truth > 0])).sum()
    assert q.entropy() == pytest.approx(entropy, abs=1e-8)


def test_samples_follow_the_posterior() -> None:
    network = random_network(17, zeros=False, tiny=False)
    q = ExactPosteriorEM(network.model).posterior()
    truth = network.joint() / network.joint().sum()
    draws = q.sample(4000, seed=1)
    counts = np.zeros_like(truth)
    index = tuple(draws[f"v{i}"].numpy() for i in network.latents)
    np.add.at(counts, index, 1)
    # Five standard errors of a multinomial frequency.
    assert np.all(np.abs(counts / 4000 - truth) < 5 * np.sqrt(truth * (1 - truth) / 4000) + 1e-3)


def _plated_joint(pg, pz, px, x):
    """p(x) and posteriors of a global g, locals z_n given g, items x_nm given g and z_n."""
    G, K = len(pg), pz.shape[1]
    per_g = np.log(pg)
    for n in range(x.shape[0]):
        inner = np.zeros((G, K))
        for g in range(G):
            for k in range(K):
                inner[g, k] = pz[g, k] * np.prod([px[g, k, v] for v in x[n]])
        per_g = per_g + np.log(inner.sum(1))
    return per_g


def test_three_level_hierarchy() -> None:
    """A global latent, a latent per group, data per item: nested plates, coupled levels."""
    rng = np.random.default_rng(0)
    pg, pz = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(2), 3)
    px = rng.dirichlet(np.ones(4), (3, 2))
    x = rng.integers(0, 4, (5, 6))

    def model():
        g = pyro.sample("g", dist.Categorical(torch.tensor(pg)))
        with pyro.plate("groups", 5, dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.tensor(pz)[g]))
            with pyro.plate("items", 6, dim=-1):
                pyro.sample("x", dist.Categorical(torch.tensor(px)[g, z]), obs=torch.tensor(x))

    q = ExactPosteriorEM(model).posterior()
    per_g = _plated_joint(pg, pz, px, x)
    evidence = np.log(np.exp(per_g - per_g.max()).sum()) + per_g.max()
    assert q.log_evidence == pytest.approx(evidence, rel=1e-12)
    post_g = np.exp(per_g - evidence)
    np.testing.assert_allclose(q.probs("g").numpy(), post_g, atol=1e-12)
    assert q.probs("z").shape == (5, 1, 2)
    expected = np.zeros((5, 2))
    joint = np.zeros((5, 3, 2))
    for n in range(5):
        like = pz * np.array(
            [[np.prod([px[g, k, v] for v in x[n]]) for k in range(2)] for g in range(3)]
        )
        joint[n] = post_g[:, None] * like / like.sum(1, keepdims=True)
        expected[n] = joint[n].sum(0)
    np.testing.assert_allclose(q.probs("z").numpy()[:, 0], expected, atol=1e-12)
    np.testing.assert_allclose(q.joint("g", "z").numpy(), joint, atol=1e-12)


def test_sibling_plates_share_a_global() -> None:
    rng = np.random.default_rng(3)
    pg = rng.dirichlet(np.ones(2))
    pa, pb = rng.dirichlet(np.ones(3), 2), rng.dirichlet(np.ones(2), 2)
    xa, xb = rng.integers(0, 3, 4), rng.integers(0, 2, 7)

    def model():
        g = pyro.sample("g", dist.Categorical(torch.tensor(pg)))
        with pyro.plate("a", 4):
            pyro.sample("xa", dist.Categorical(torch.tensor(pa)[g]), obs=torch.tensor(xa))
        with pyro.plate("b", 7):
            pyro.sample("xb", dist.Categorical(torch.tensor(pb)[g]), obs=torch.tensor(xb))

    q = ExactPosteriorEM(model).posterior()
    joint = pg * pa[:, xa].prod(1) * pb[:, xb].prod(1)
    assert q.log_evidence == pytest.approx(np.log(joint.sum()), rel=1e-12)
    np.testing.assert_allclose(q.probs("g").numpy(), joint / joint.sum(), atol=1e-12)


def test_a_tree_of_fifty_nodes() -> None:
    """Against belief propagation from the leaves, written here."""
    rng = np.random.default_rng(5)
    n, k = 50, 3
    parent = [-1] + [int(rng.integers(max(0, i - 4), i)) for i in range(1, n)]
    root, trans = rng.dirichlet(np.ones(k)), rng.dirichlet(np.ones(k), (n, k))
    emit = rng.dirichlet(np.ones(4), (n, k))
    x = rng.integers(0, 4, n)

    def model():
        z = []
        for i in range(n):
            p = torch.tensor(root) if i == 0 else torch.tensor(trans[i])[z[parent[i]]]
            z.append(pyro.sample(f"z{i}", dist.Categorical(p)))
            pyro.sample(
                f"x{i}", dist.Categorical(torch.tensor(emit[i])[z[i]]), obs=torch.tensor(x[i])
            )

    up = [emit[i][:, x[i]].copy() for i in range(n)]
    for i in range(n - 1, 0, -1):
        up[parent[i]] *= trans[i] @ up[i]
    q = ExactPosteriorEM(model).posterior()
    assert q.log_evidence == pytest.approx(np.log(root @ up[0]), rel=1e-12)
    np.testing.assert_allclose(q.probs("z0").numpy(), root * up[0] / (root @ up[0]), atol=1e-12)


def _forward_backward(pi, A, B):
    T, K = B.shape
    alpha, scale = np.zeros((T, K)), np.zeros(T)
    for t in range(T):
        a = (pi if t == 0 else alpha[t - 1] @ A) * B[t]
        scale[t] = a.sum()
        alpha[t] = a / scale[t]
    beta = np.ones((T, K))
    for t in range(T - 2, -1, -1):
        beta[t] = A @ (B[t + 1] * beta[t + 1]) / scale[t + 1]
    return np.log(scale).sum(), alpha * beta


def test_a_chain_of_a_thousand_steps() -> None:
    rng = np.random.default_rng(1)
    K, T = 4, 1000
    pi, A, E = rng.dirichlet(np.ones(K)), rng.dirichlet(np.ones(K), K), rng.dirichlet(np.ones(5), K)
    x = rng.integers(0, 5, T)

    def model():
        z = None
        for t in pyro.markov(range(T)):
            p = torch.tensor(pi) if z is None else torch.tensor(A)[z]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"x_{t}", dist.Categorical(torch.tensor(E)[z]), obs=torch.tensor(x[t]))

    q = ExactPosteriorEM(model).posterior()
    evidence, gamma = _forward_backward(pi, A, E[:, x].T)
    assert q.log_evidence == pytest.approx(evidence, rel=1e-12)
    for t in (0, 1, 500, 999):
        np.testing.assert_allclose(q.probs(f"z_{t}").numpy(), gamma[t], atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_and_likelihood_a_thousand_nats_apart(dtype: torch.dtype) -> None:
    """A component of vanishing weight that alone explains a point keeps all its mass."""
    torch.set_default_dtype(dtype)

    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.0, -1000.0])))
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 60.0])[z], 1.0), obs=x)

    q = ExactPosteriorEM(model).posterior(torch.tensor([0.0, 60.0, 20.0]))
    p = q.probs("z")
    assert p.dtype == dtype
    torch.testing.assert_close(p.sum(-1), torch.ones(3))
    assert p[1, 1] > 0.999 and p[0, 0] > 0.999 and p[2, 0] > 0.999


@pytest.mark.parametrize("kind", ["bernoulli", "onehot", "binomial"])
def test_other_supports(kind: str) -> None:
    mu = torch.tensor([-1.0, 0.5, 2.0])

    def model(x):
        with pyro.plate("n", len(x)):
            if kind == "bernoulli":
                z = pyro.sample("z", dist.Bernoulli(0.3))
                loc = mu[z.long()]
            elif kind == "onehot":
                z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
                loc = z @ mu
            else:
                z = pyro.sample("z", dist.Binomial(2, torch.tensor(0.4)))
                loc = mu[z.long()]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor([0.3, 1.9])
    prior = {
        "bernoulli": torch.tensor([0.7, 0.3]),
        "onehot": torch.tensor([0.2, 0.3, 0.5]),
        "binomial": torch.tensor([0.36, 0.48, 0.16]),
    }[kind]
    joint = prior * dist.Normal(mu[: len(prior)], 1.0).log_prob(x[:, None]).exp()
    q = ExactPosteriorEM(model).posterior(x)
    assert q.log_evidence == pytest.approx(float(joint.sum(-1).log().sum()), rel=1e-12)
    torch.testing.assert_close(q.probs("z"), joint / joint.sum(-1, keepdim=True))


@pytest.mark.parametrize("n,k,t", [(1, 1, 1), (1, 3, 1), (4, 1, 2), (1, 2, 3), (3, 3, 3)])
def test_size_one_dimensions(n: int, k: int, t: int) -> None:
    rng = np.random.default_rng(7)
    pi, A = rng.dirichlet(np.ones(k)), rng.dirichlet(np.ones(k), k)
    mu, x = rng.normal(size=k), rng.normal(size=(n, t))

    def model(x):
        with pyro.plate("sequences", n):
            z = None
            for s in pyro.markov(range(t)):
                p = torch.tensor(pi) if z is None else torch.tensor(A)[z]
                z = pyro.sample(f"z_{s}", dist.Categorical(p))
                pyro.sample(f"x_{s}", dist.Normal(torch.tensor(mu)[z], 1.0), obs=x[:, s])

    q = ExactPosteriorEM(model).posterior(torch.tensor(x))
    B = np.exp(-0.5 * (x[..., None] - mu) ** 2) / np.sqrt(2 * np.pi)
    runs = [_forward_backward(pi, A, B[i]) for i in range(n)]
    assert q.log_evidence == pytest.approx(sum(r[0] for r in runs), rel=1e-12)
    for s in range(t):
        p = q.probs(f"z_{s}")
        assert p.shape == (n, k)
        np.testing.assert_allclose(p.numpy(), [r[1][s] for r in runs], atol=1e-12)


def test_nested_markov_scopes_and_a_second_order_chain() -> None:
    rng = np.random.default_rng(2)
    K, T = 2, 6
    A = rng.dirichlet(np.ones(K), (K, K))
    E, x = rng.dirichlet(np.ones(3), K), rng.integers(0, 3, T)

    def model():
        a = b = torch.tensor(0)
        for t in pyro.markov(range(T), history=2):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor(A)[a, b]))
            pyro.sample(f"x_{t}", dist.Categorical(torch.tensor(E)[z]), obs=torch.tensor(x[t]))
            a, b = b, z

    total = np.zeros([K] * T)
    for path in itertools.product(range(K), repeat=T):
        full = (0, 0, *path)
        total[path] = np.prod(
            [A[full[t], full[t + 1], full[t + 2]] * E[path[t], x[t]] for t in range(T)]
        )
    q = ExactPosteriorEM(model).posterior()
    assert q.log_evidence == pytest.approx(np.log(total.sum()), rel=1e-12)
    truth = total / total.sum()
    np.testing.assert_allclose(q.joint("z_0", "z_5").numpy(), truth.sum((1, 2, 3, 4)), atol=1e-12)

    def tree(depth: int, value, name: str):
        if depth == 0:
            return
        for side in "lr":
            with pyro.markov():
                z = pyro.sample(name + side, dist.Categorical(torch.tensor(A)[value, value]))
                pyro.sample(
                    f"x{name}{side}", dist.Categorical(torch.tensor(E)[z]), obs=torch.tensor(1)
                )
                tree(depth - 1, z, name + side)

    def up(depth: int) -> np.ndarray:
        if depth == 0:
            return np.ones(K)
        step = np.array([[A[v, v, z] for z in range(K)] for v in range(K)]) @ (
            E[:, 1] * up(depth - 1)
        )
        return step**2

    q = ExactPosteriorEM(lambda: tree(5, torch.tensor(0), "n")).posterior()
    assert q.log_evidence == pytest.approx(np.log(up(5)[0]), rel=1e-12)
