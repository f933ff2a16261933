"""Masks, obs_mask, missing values, predictive sites: what is partly observed."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch.distributions import constraints

from pyro_em import DegenerateError, ExactPosteriorEM, Hard, ModelError, PyroEMWarning

LABELS = torch.tensor([0, 1, 1, 0])
KNOWN = torch.tensor([True, False, True, False])
X = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)


def semi_supervised(x, labels, known, kind="categorical"):
    pi = pyro.param("pi", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
    with pyro.plate("n", len(x)):
        if kind == "onehot":
            hot = torch.nn.functional.one_hot(labels, 2).to(x.dtype)
            z = pyro.sample("z", dist.OneHotCategorical(pi), obs=hot, obs_mask=known)
            loc = z @ mu
        elif kind == "bernoulli":
            z = pyro.sample("z", dist.Bernoulli(pi[1]), obs=labels.to(x.dtype), obs_mask=known)
            loc = mu[z.long()]
        else:
            z = pyro.sample("z", dist.Categorical(pi), obs=labels, obs_mask=known)
            loc = mu[z]
        y = (
            pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.6])[z.long()]))
            if kind == "child"
            else 0
        )
        pyro.sample("x", dist.Normal(loc + y, 1.0), obs=x)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "onehot"])
def test_marginals_of_a_partly_observed_latent(n: int, kind: str) -> None:
    q = ExactPosteriorEM(semi_supervised).posterior(X[:n], LABELS[:n], KNOWN[:n], kind)
    joint = torch.tensor([0.3, 0.7]).log() + dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(
        X[:n, None]
    )
    hot = torch.nn.functional.one_hot(LABELS[:n], 2).double()
    expected = torch.where(KNOWN[:n, None], hot, joint.softmax(-1))
    torch.testing.assert_close(q.probs("z"), expected)
    mode = q.mode()
    assert set(mode) == {"z"}
    index = mode["z"].argmax(-1) if kind == "onehot" else mode["z"].long()
    assert torch.equal(index, expected.argmax(-1))
    draws = q.sample(5, seed=0)["z"]
    assert draws.shape[:2] == (5, n)
    observed = draws.argmax(-1) if kind == "onehot" else draws.long()
    assert bool((observed[:, KNOWN[:n]] == LABELS[:n][KNOWN[:n]]).all())
    evidence = torch.where(KNOWN[:n], joint[range(n), LABELS[:n]], joint.logsumexp(-1)).sum()
    assert q.log_evidence == pytest.approx(float(evidence))


def test_joint_with_a_partly_observed_latent() -> None:
    q = ExactPosteriorEM(semi_supervised).posterior(X, LABELS, KNOWN, "child")
    py = torch.tensor([0.2, 0.6])
    prior = torch.stack([1 - py, py], -1) * torch.tensor([0.3, 0.7])[:, None]
    loc = torch.tensor([0.0, 1.0])[:, None] + torch.tensor([0.0, 1.0])
    joint = prior * dist.Normal(loc, 1.0).log_prob(X[:, None, None]).exp()
    for i in range(4):
        if KNOWN[i]:
            joint[i, 1 - LABELS[i]] = 0
    expected = joint / joint.sum((-1, -2), keepdim=True)
    torch.testing.assert_close(q.joint("z", "y"), expected)
    torch.testing.assert_close(q.joint("y", "z"), expected.mT)
    torch.testing.assert_close(q.joint("z", "z").diagonal(dim1=-2, dim2=-1), expected.sum(-1))


@pytest.mark.parametrize("known", [True, False])
def test_a_partly_observed_latent_outside_plates(known: bool) -> None:
    def model():
        z = pyro.sample(
            "z",
            dist.Categorical(torch.tensor([0.3, 0.7])),
            obs=torch.tensor(0),
            obs_mask=torch.tensor(known),
        )
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0])[z], 1.0), obs=torch.tensor(2.0))

    q = ExactPosteriorEM(model).posterior()
    assert q.probs("z").shape == (2,)
    assert float(q.probs("z")[0]) == 1.0 if known else 0 < float(q.probs("z")[0]) < 1
    assert int(q.mode()["z"]) == (0 if known else 1)


def test_labels_count_in_the_updates() -> None:
    """Complete rows count once, incomplete ones by their responsibilities."""
    em = ExactPosteriorEM(semi_supervised)
    r = em.posterior(X, LABELS, KNOWN).probs("z")
    em.step(X, LABELS, KNOWN)
    torch.testing.assert_close(pyro.param("pi").detach(), r.mean(0))
    torch.testing.assert_close(pyro.param("mu").detach(), (r * X[:, None]).sum(0) / r.sum(0))


def test_missing_values_integrate_to_one() -> None:
    """NaN under obs_mask, feature by feature: marginalising by hand."""
    x = torch.tensor([[1.0, math.nan, 0.2], [math.nan, math.nan, -1.0], [0.3, 0.4, 0.5]])

    def model(x):
        mu = pyro.param("mu", torch.tensor([[0.0, 0.5, 1.0], [1.0, -1.0, 0.0]]))
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            with pyro.plate("features", 3, dim=-1):
                loc = mu[z, torch.arange(3)]
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=~torch.isnan(x))

    em = ExactPosteriorEM(model)
    mu = torch.tensor([[0.0, 0.5, 1.0], [1.0, -1.0, 0.0]])
    log_p = dist.Normal(mu, 1.0).log_prob(x[:, None].nan_to_num())
    log_p = (log_p * ~torch.isnan(x)[:, None]).sum(-1) + torch.tensor([0.4, 0.6]).log()
    q = em.posterior(x)
    assert q.log_evidence == pytest.approx(float(log_p.logsumexp(-1).sum()))
    r = log_p.softmax(-1)
    torch.testing.assert_close(q.probs("z")[:, 0], r)
    em.step(x)
    seen = (~torch.isnan(x)).double()
    expected = torch.einsum("nk,nd->kd", r, x.nan_to_num()) / torch.einsum("nk,nd->kd", r, seen)
    torch.testing.assert_close(pyro.param("mu").detach(), expected)


def test_a_mask_that_hides_nothing_leaves_an_observed_chain() -> None:
    def model(x, mask):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        v = torch.tensor(0.0)
        for t in range(2):
            v = pyro.sample(f"x{t}", dist.Normal(v + z, 1.0), obs=x[t], obs_mask=mask[t])

    em = ExactPosteriorEM(model)
    x = torch.tensor([1.0, 0.2])
    full = em.posterior(x, torch.tensor([True, True])).log_evidence
    log_p = torch.stack(
        [
            dist.Normal(z, 1.0).log_prob(x[0]) + dist.Normal(x[0] + z, 1.0).log_prob(x[1])
            for z in (0, 1)
        ]
    )
    assert full == pytest.approx(float((log_p - math.log(2)).logsumexp(0)))
    assert em.posterior(x, torch.tensor([True, False])).log_evidence is not None
    with pytest.raises(ModelError, match="site 'x0_unobserved': a continuous latent"):
        em.posterior(x, torch.tensor([False, True]))


def test_a_masked_latent_above_an_observation_is_still_em() -> None:
    def model(x, keep):
        pi = pyro.param("pi", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
        with pyro.plate("n", len(x)):
            with poutine.mask(mask=keep):
                z = pyro.sample("z", dist.Categorical(pi))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    x = torch.tensor([5.0, -5.0, 5.0, -5.0])
    em = ExactPosteriorEM(model)
    q = em.posterior(x, KNOWN)
    assert em.elbo(x, KNOWN, q={"z": q.probs("z")}).gap == pytest.approx(0, abs=1e-9)
    path = list(em.fit(x, KNOWN, max_steps=15, tol=0).history)
    assert np.all(np.diff(path) >= -1e-9)


def test_predictive_sites_and_chains_of_them() -> None:
    def model(x):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        loc = torch.tensor([-1.0, 2.0])[z]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        new = pyro.sample("new", dist.Normal(loc, 1.0))
        newer = pyro.sample("newer", dist.Poisson(new.exp()))
        pyro.sample("label", dist.Bernoulli(torch.sigmoid(newer)))
        pyro.sample("y", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))

    em = ExactPosteriorEM(model)
    x = torch.tensor(0.4)
    q = em.posterior(x)
    joint = torch.tensor([0.3, 0.7]) * dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).log_prob(x).exp()
    assert q.log_evidence == pytest.approx(float(joint.sum().log()))
    posterior = joint / joint.sum()
    torch.testing.assert_close(q.probs("y"), posterior @ torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    routes = {r.site: (r.route, r.distribution) for r in em.plan(x).routes}
    assert routes["new"] == ("integrates to one", "Normal")
    assert routes["label"][0] == "integrates to one"
    assert routes["y"][0] == "enumerate"


def test_a_second_module_with_the_same_names_is_refused() -> None:
    class Means(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.mu = torch.nn.Parameter(torch.tensor([0.0, 1.0]))

        def forward(self, x):
            mu = self.mu
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
                pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    first, second = Means(), Means()
    fitted = ExactPosteriorEM(first).fit(X)
    with pytest.raises(ModelError, match=r"parameter 'mu'.*another module"):
        ExactPosteriorEM(second).fit(X)
    with pyro.get_param_store().scope():
        again = ExactPosteriorEM(second).fit(X)
    torch.testing.assert_close(second.mu.detach(), first.mu.detach())
    assert again.log_evidence == pytest.approx(fitted.log_evidence)


def test_an_unbounded_factor_is_named() -> None:
    def model(x):
        strength = pyro.param("strength", torch.tensor(0.3))
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.5, 0.5])))
        b = pyro.sample("b", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.factor("tie", strength * (a == b))
        pyro.sample("x", dist.Normal(1.0 * a, 1.0), obs=x)

    with pytest.warns(PyroEMWarning, match=r"(?s)site 'tie', parameters 'strength'.*without bound"):
        result = ExactPosteriorEM(model).fit(torch.tensor(0.4), max_steps=20)
    assert bool(torch.isfinite(result.params["strength"]))
    em = ExactPosteriorEM(model)
    with pytest.raises(DegenerateError):
        for _ in range(20):
            em.step(torch.tensor(0.4))
            em.posterior(torch.tensor(0.4))


def test_random_numbers_inside_a_model_are_said() -> None:
    def model(x):
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        noise = torch.randn(len(x))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z] + noise, 1.0), obs=x)

    with pytest.warns(PyroEMWarning, match=r"site 'x' \(loc\).*draws random numbers"):
        ExactPosteriorEM(model).fit(X, max_steps=2)


def test_a_model_without_anything_to_sum() -> None:
    q = ExactPosteriorEM(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))).posterior()
    assert q.log_evidence == 0.0 and q.entropy() == 0.0


@pytest.mark.parametrize("kind", ["several counts", "a large count", "beta-binomial"])
def test_a_partly_observed_leaf_need_not_be_enumerated(kind: str) -> None:
    """What was not observed, and nothing reads, integrates to one."""
    n = torch.tensor([3.0, 9.0, 4.0, 6.0])
    if kind == "a large count":
        n = torch.full((4,), 200.0)
    value = torch.tensor([1.0, 7.0, math.nan, math.nan])
    seen = torch.tensor([True, True, False, False])

    def leaf(p: torch.Tensor) -> dist.TorchDistribution:
        if kind == "beta-binomial":
            return dist.BetaBinomial(2 * p, 2 - 2 * p, total_count=n)
        return dist.Binomial(n, p)

    def model() -> None:
        p = pyro.param("p", torch.tensor([0.2, 0.7]), constraint=constraints.unit_interval)
        with pyro.plate("n", 4):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", leaf(p[z]), obs=value, obs_mask=seen)
            pyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=X)

    joint = torch.tensor([0.4, 0.6]).log() + dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(
        X[:, None]
    )
    filled = torch.where(seen, value, 0.0)
    each = torch.stack([leaf(torch.tensor(p)).log_prob(filled) for p in (0.2, 0.7)], -1)
    joint = joint + torch.where(seen[:, None], each, 0.0)
    em = ExactPosteriorEM(model, max_enumeration=500)
    q = em.posterior()
    assert q.log_evidence == pytest.approx(float(joint.logsumexp(-1).sum()))
    torch.testing.assert_close(q.probs("z"), joint.softmax(-1))
    result = em.fit(max_steps=3, tol=0)
    assert result.num_rows == 4
    if kind != "beta-binomial":
        r = joint.softmax(-1)[seen]
        assert em.plan().updates["p"].update.__class__.__name__ == "ClosedForm"
        pyro.clear_param_store()
        em.step()
        expected = (r * value[seen, None]).sum(0) / (r * n[seen, None]).sum(0)
        torch.testing.assert_close(pyro.param("p").detach(), expected)


def test_a_latent_with_several_counts_that_is_read_is_still_refused() -> None:
    def model() -> None:
        with pyro.plate("n", 4):
            k = pyro.sample("k", dist.Binomial(torch.tensor([3.0, 9.0, 4.0, 6.0]), 0.3))
            pyro.sample("y", dist.Normal(k, 1.0), obs=X)

    with pytest.raises(ModelError, match="total_count varies"):
        ExactPosteriorEM(model).posterior()


LEAVING = torch.tensor([[0.34, 0.33, 0.33], [0.0, 1.0, 0.0], [0.33, 0.33, 0.34]])


def padded(x: torch.Tensor, lengths: torch.Tensor) -> None:
    """From state 0 to anywhere, from state 1 nowhere: what follows would favour state 1."""
    mu = pyro.param("mu", torch.tensor([0.0, 0.1, 0.2]).double())
    with pyro.plate("n", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                start = torch.tensor([0.5, 0.3, 0.2]).double()
                p = start if z is None else LEAVING.double()[z]
                z = pyro.sample(f"z{t}", dist.Categorical(p))
                pyro.sample(f"x{t}", dist.Normal(mu[z], 1.0), obs=x[:, t])


def test_the_best_path_of_a_padded_sequence_is_that_of_the_sequence() -> None:
    """What does not count takes no part in the maximum either."""
    lengths = torch.tensor([1, 2, 4, 6])
    x = torch.tensor([0.1, 0.0, 0.3, -0.2, 0.1, 0.2]).double().repeat(4, 1)
    mode = ExactPosteriorEM(padded).posterior(x, lengths).mode()
    for n, T in enumerate(lengths.tolist()):
        alone = ExactPosteriorEM(padded).posterior(x[n : n + 1, :T], lengths[n : n + 1]).mode()
        for t in range(T):
            assert int(mode[f"z{t}"][n]) == int(alone[f"z{t}"][0]), (n, t)
        for t in range(T, 6):  # most probable given the step before
            before = int(mode[f"z{t - 1}"][n])
            assert int(mode[f"z{t}"][n]) == int(LEAVING[before].argmax())


@pytest.mark.filterwarnings("ignore:component . of parameter 'mu'")
def test_hard_em_of_padded_sequences_is_that_of_the_sequences() -> None:
    """Bound, history and parameters: masked steps add nothing to log p(x, z)."""
    x = torch.tensor([[0.1, 2.0, -0.5, 0.9], [0.1, 0.0, 0.0, 0.0]]).double()
    lengths = torch.tensor([4, 1])

    def apart(x: torch.Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 0.1, 0.2]).double())
        for n, T in enumerate((4, 1)):
            z = None
            for t in pyro.markov(range(T)):
                start = torch.tensor([0.5, 0.3, 0.2]).double()
                p = start if z is None else LEAVING.double()[z]
                z = pyro.sample(f"z{n}_{t}", dist.Categorical(p))
                pyro.sample(f"x{n}_{t}", dist.Normal(mu[z], 1.0), obs=x[n, t])

    fits = []
    for model, args in ((padded, (x, lengths)), (apart, (x,))):
        with pyro.get_param_store().scope():
            em = ExactPosteriorEM(model, strategy=Hard())
            fits.append(em.fit(*args, max_steps=4, tol=0, progress=False))
    assert list(fits[0].history) == pytest.approx(list(fits[1].history), rel=1e-12)
    torch.testing.assert_close(fits[0].params["mu"], fits[1].params["mu"])


def test_the_best_assignment_beside_an_observed_latent() -> None:
    """Where a latent is observed, its unobserved part is as if it were not there."""

    def model(known: torch.Tensor) -> None:
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.55, 0.45])))
        table = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
        b = pyro.sample("b", dist.Categorical(table[a]), obs=torch.tensor(1), obs_mask=known)
        loc = torch.tensor([0.0, 0.1])[b] + torch.tensor([0.6, 0.0])[a]
        pyro.sample("x", dist.Normal(loc, 0.5), obs=torch.tensor(0.4))

    q = ExactPosteriorEM(model).posterior(torch.tensor(True))
    normal = dist.Normal(torch.tensor([0.7, 0.1]), 0.5).log_prob(torch.tensor(0.4))
    scores = torch.tensor([0.55 * 0.5, 0.45]).log() + normal
    assert int(q.mode()["a"]) == int(scores.argmax())
    joint = q.joint("a", "b")
    torch.testing.assert_close(joint, torch.diag_embed(torch.ones(2))[1] * q.probs("a")[:, None])
