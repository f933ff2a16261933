"""Other E-steps: hard against k-means and Viterbi training, Monte Carlo, annealed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.distributions import constraints

from pyro_em import (
    Annealed,
    EMStatus,
    ExactPosteriorEM,
    Hard,
    MonteCarlo,
    UsageError,
)

X = torch.tensor([-2.1, -1.9, -2.4, 0.1, 1.8, 2.2, 2.9, 1.4, -1.0, 2.0], dtype=torch.float64)
Model = Callable[..., None]


def mixture(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.6, 0.4]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s), obs=x)


def chain(x: Tensor) -> None:
    start = pyro.param("start", torch.tensor([0.7, 0.3]), constraint=constraints.simplex)
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    z: Any = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def log_joint(w: Tensor, mu: Tensor, s: Tensor, x: Tensor) -> Tensor:
    return w.log() + dist.Normal(mu, s).log_prob(x[:, None])


def store(*names: str) -> list[Tensor]:
    return [pyro.param(n).detach().clone() for n in names]


def is_one_hot(p: Tensor) -> bool:
    return bool(((p == 0) | (p == 1)).all()) and bool((p.sum(-1) == 1).all())


STRATEGIES = {"hard": Hard(), "monte carlo": MonteCarlo(5), "annealed": Annealed([0.3, 0.6])}


# ------------------------------------------------------------------ hard


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("clusters", [2, 4])
def test_hard_em_of_a_spherical_mixture_is_lloyd(seed: int, clusters: int) -> None:
    torch.manual_seed(seed)
    centres = 4 * torch.randn(clusters, 2)
    x = centres.repeat_interleave(20, 0) + torch.randn(20 * clusters, 2)
    first = x[torch.randperm(len(x))[:clusters]].clone()

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", first.clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(clusters) / clusters))
            pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)

    em = ExactPosteriorEM(model, strategy=Hard())
    for step in range(1, 9):
        em.step(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = KMeans(
                clusters, init=first.numpy(), n_init=1, tol=0, max_iter=step, algorithm="lloyd"
            ).fit(x.numpy())
        mu = pyro.param("mu").detach()
        np.testing.assert_allclose(mu.numpy(), peer.cluster_centers_, rtol=1e-9, atol=1e-9)
        q = em.posterior(x)
        probs = q.probs("z")
        assert is_one_hot(probs)
        if peer.n_iter_ < step:  # it has converged: labels are those of its centres
            assert (probs.argmax(-1).numpy() == peer.labels_).all()
        nearest = ((x[:, None] - mu) ** 2).sum(-1).argmin(-1)
        assert (probs.argmax(-1) == nearest).all()
    inertia = float(((x - mu[nearest]) ** 2).sum())
    assert inertia == pytest.approx(peer.inertia_, rel=1e-9)
    constant = len(x) * (math.log(clusters) + math.log(2 * math.pi))
    assert em.elbo(x).value == pytest.approx(-constant - inertia / 2, abs=1e-8)


def viterbi(start: np.ndarray, A: np.ndarray, mu: np.ndarray, x: np.ndarray) -> tuple:
    e = -0.5 * (x[:, None] - mu) ** 2 - 0.5 * math.log(2 * math.pi)
    with np.errstate(divide="ignore"):
        ls, la = np.log(start), np.log(A)
    score, back = ls + e[0], []
    for t in range(1, len(x)):
        full = score[:, None] + la
        back.append(full.argmax(0))
        score = full.max(0) + e[t]
    path = [int(score.argmax())]
    for b in reversed(back):
        path.append(int(b[path[-1]]))
    return np.array(path[::-1]), float(score.max())


def test_hard_em_of_a_chain_is_viterbi_training() -> None:
    torch.manual_seed(3)
    x = torch.cat([torch.randn(8) - 1.5, torch.randn(7) + 1.5, torch.randn(6) - 1.5])
    em = ExactPosteriorEM(chain, strategy=Hard())
    em.plan(x)
    for _ in range(6):
        start, A, mu = (p.numpy() for p in store("start", "A", "mu"))
        path, score = viterbi(start, A, mu, x.numpy())
        q = em.posterior(x)
        assert [int(q.probs(f"z_{t}").argmax()) for t in range(len(x))] == path.tolist()
        assert em.step(x) == pytest.approx(-score, abs=1e-9)
        counts = np.zeros((2, 2))
        np.add.at(counts, (path[:-1], path[1:]), 1)
        new_A = counts / counts.sum(1, keepdims=True)
        new_mu = np.array([x.numpy()[path == k].mean() for k in range(2)])
        got = [p.numpy() for p in store("start", "A", "mu")]
        np.testing.assert_allclose(got[0], np.eye(2)[path[0]], atol=1e-12)
        np.testing.assert_allclose(got[1], new_A, atol=1e-12)
        np.testing.assert_allclose(got[2], new_mu, atol=1e-12)


@pytest.mark.parametrize("model", [mixture, chain])
def test_hard_em_raises_its_bound_and_reports_the_evidence(model: Model) -> None:
    em = ExactPosteriorEM(model, strategy=Hard())
    result = em.fit(X)
    path = [*result.history, result.elbo]
    assert result.converged and result.status is not EMStatus.FELL
    assert min(b - a for a, b in pairwise(path)) >= -1e-9
    halves = result.history.after_m_step
    assert all(a - 1e-9 <= h <= b + 1e-9 for a, h, b in zip(path, halves, path[1:], strict=False))
    exact = ExactPosteriorEM(model)
    assert result.log_evidence == pytest.approx(exact.elbo(X).log_evidence, abs=1e-10)
    mode = result.posterior.mode()
    for site, value in mode.items():
        probs = result.posterior.probs(site)
        assert is_one_hot(probs)
        assert (probs.argmax(-1) == value).all()
    best = exact.posterior(X).mode()
    assert {n: v.tolist() for n, v in mode.items()} == {n: v.tolist() for n, v in best.items()}
    assert result.posterior.entropy() == pytest.approx(0, abs=1e-12)
    assert "one assignment" in str(result.plan)


def test_hard_em_of_a_mixture_has_the_bound_of_its_labels() -> None:
    em = ExactPosteriorEM(mixture, strategy=Hard())
    for _ in range(3):
        em.step(X)
        w, mu, s = store("w", "mu", "s")
        terms = em.elbo(X)
        table = log_joint(w, mu, s, X)
        assert terms.value == pytest.approx(float(table.amax(-1).sum()), abs=1e-10)
        assert terms.log_evidence == pytest.approx(float(table.logsumexp(-1).sum()), abs=1e-10)
        assert terms.entropy == 0
        gap = float((table.logsumexp(-1) - table.amax(-1)).sum())
        assert terms.gap == pytest.approx(gap, abs=1e-10)


def test_ties_are_broken_to_one_assignment() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    q = ExactPosteriorEM(model, strategy=Hard()).posterior(torch.tensor([0.0, 0.0, 3.0]))
    assert is_one_hot(q.probs("z"))


def test_hard_em_ties_in_a_chain() -> None:
    def model() -> None:
        A = pyro.param("A", torch.full((2, 2), 0.5), constraint=constraints.simplex)
        z: Any = 0
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(0.0 * z, 1.0), obs=torch.tensor(0.5))

    q = ExactPosteriorEM(model, strategy=Hard()).posterior()
    values = [q.probs(f"z_{t}") for t in range(4)]
    assert all(is_one_hot(v) for v in values)
    for t in range(3):  # one path, not one value per site
        pair = q.joint(f"z_{t}", f"z_{t + 1}")
        torch.testing.assert_close(pair, values[t][:, None] * values[t + 1])


# ------------------------------------------------------------------ Monte Carlo


@pytest.mark.parametrize("model", [mixture, chain])
def test_draws_average_to_the_exact_posterior(model: Model) -> None:
    torch.manual_seed(0)
    n = 400
    exact, drawn = (
        ExactPosteriorEM(model, strategy=s).posterior(X) for s in ("exact", MonteCarlo(n))
    )
    sites = ["z"] if model is mixture else [f"z_{t}" for t in range(10)]
    for site in sites:
        error = (exact.probs(site) - drawn.probs(site)).abs().max()
        assert float(error) < 4 * 0.5 / math.sqrt(n)
        assert bool(torch.allclose(drawn.probs(site).sum(-1), torch.tensor(1.0)))
        counted = drawn.probs(site) * n
        torch.testing.assert_close(counted, counted.round(), atol=1e-6, rtol=0)


def test_seeds_repeat_and_differ() -> None:
    paths = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        em = ExactPosteriorEM(mixture, strategy=MonteCarlo(3))
        paths.append(list(em.fit(X, max_steps=6).history))
    assert paths[0] == paths[1] != paths[2]


def test_the_seed_of_fit_repeats_the_draws() -> None:
    paths = []
    for _ in range(2):
        pyro.clear_param_store()
        em = ExactPosteriorEM(mixture, strategy=MonteCarlo(3))
        paths.append(list(em.fit(X, max_steps=6, seed=5).history))
    assert paths[0] == paths[1]


def test_monte_carlo_runs_all_its_steps() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        em = ExactPosteriorEM(mixture, strategy=MonteCarlo(2))
        result = em.fit(X, max_steps=60, tol=1e6)
    assert result.status is EMStatus.MAX_STEPS and not result.converged
    assert result.num_steps == 60
    w, mu, s = (result.params[n] for n in ("w", "mu", "s"))
    table = log_joint(w, mu, s, X)
    assert result.log_evidence == pytest.approx(float(table.logsumexp(-1).sum()), abs=1e-10)
    torch.testing.assert_close(result.posterior.probs("z"), table.softmax(-1))
    assert "max_steps" in str(result.plan) and "MonteCarlo(2)" in str(result.plan)


def test_many_draws_come_near_exact_em() -> None:
    torch.manual_seed(0)
    exact = ExactPosteriorEM(mixture).fit(X, max_steps=5, tol=0).params
    pyro.clear_param_store()
    drawn = ExactPosteriorEM(mixture, strategy=MonteCarlo(600)).fit(X, max_steps=5).params
    for name, value in exact.items():
        torch.testing.assert_close(drawn[name], value, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("strategy", list(STRATEGIES.values()), ids=list(STRATEGIES))
def test_structural_zeros_stay_zero(strategy: Any) -> None:
    def model(x: Tensor) -> None:
        A0 = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
        A = pyro.param("A", A0, constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-2.0, 0.0, 2.0]))
        z: Any = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    x = torch.tensor([-2.0, -2.2, 0.3, -0.2, 1.9, 2.2, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ExactPosteriorEM(model, strategy=strategy).fit(x, max_steps=12)
    A = result.params["A"]
    assert float(A[0, 2]) == float(A[1, 0]) == float(A[2, 0]) == float(A[2, 1]) == 0.0
    assert math.isfinite(result.log_evidence) and math.isfinite(result.elbo)


# ------------------------------------------------------------------ annealed


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9, 1.0])
def test_annealed_posteriors_are_powers_by_brute_force(beta: float) -> None:
    em = ExactPosteriorEM(mixture, strategy=Annealed([beta]))
    q = em.posterior(X)
    table = log_joint(torch.tensor([0.6, 0.4]), torch.tensor([-1.0, 1.0]), torch.tensor(1.0), X)
    r = (beta * table).softmax(-1)
    torch.testing.assert_close(q.probs("z"), r, rtol=1e-10, atol=1e-14)
    bound = float((r * (table - r.log())).sum())
    assert em.elbo(X).value == pytest.approx(bound, abs=1e-9)
    assert q.entropy() == pytest.approx(float(-(r * r.log()).sum()), abs=1e-9)
    assert em.step(X) == pytest.approx(-bound, abs=1e-9)
    assert float(pyro.param("mu")[0]) == pytest.approx(float((r[:, 0] * X).sum() / r[:, 0].sum()))


def test_annealed_posterior_of_a_chain_by_brute_force() -> None:
    x, beta = X[:5], 0.4
    q = ExactPosteriorEM(chain, strategy=Annealed(lambda step: beta)).posterior(x)
    grid = torch.cartesian_prod(*[torch.arange(2)] * 5)
    start, A, mu = store("start", "A", "mu")
    log_p = start.log()[grid[:, 0]] + dist.Normal(mu[grid], 1.0).log_prob(x).sum(-1)
    log_p = log_p + A.log()[grid[:, :-1], grid[:, 1:]].sum(-1)
    r = (beta * log_p).softmax(0)
    for t in range(5):
        want = torch.stack([r[grid[:, t] == k].sum() for k in range(2)])
        torch.testing.assert_close(q.probs(f"z_{t}"), want, rtol=1e-9, atol=1e-12)
    bound = float((r * (log_p - r.log())).sum())
    assert q.bound == pytest.approx(bound, abs=1e-9)


def test_annealing_runs_its_schedule_and_then_is_exact_em() -> None:
    schedule = [0.05] * 12 + [0.5] * 5
    result = ExactPosteriorEM(mixture, strategy=Annealed(schedule)).fit(X, tol=1e-3)
    assert result.num_steps > len(schedule)
    assert result.converged
    after = [*result.history, result.elbo][len(schedule) :]
    assert min(b - a for a, b in pairwise(after)) >= -1e-9
    assert result.elbo == pytest.approx(result.log_evidence, abs=1e-9)
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture, strategy=Annealed(schedule))
    middle = em.fit(X, max_steps=len(schedule), tol=0).params
    for name, value in middle.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)
    plain = ExactPosteriorEM(mixture).fit(X, tol=1e-10)
    assert result.log_evidence == pytest.approx(plain.log_evidence, abs=1e-2)
    assert "until the schedule ends" in str(result.plan)


def test_after_an_annealed_fit_the_posterior_is_exact() -> None:
    em = ExactPosteriorEM(mixture, strategy=Annealed([0.05, 0.05, 0.5]))
    result = em.fit(X)
    torch.testing.assert_close(em.posterior(X).probs("z"), result.posterior.probs("z"))
    assert em.elbo(X).value == pytest.approx(result.elbo)


@pytest.mark.parametrize("schedule", [[0.0], [1.5], [math.nan], [0.5, -0.1], [math.inf]])
def test_schedules_are_checked(schedule: list[float]) -> None:
    with pytest.raises(UsageError, match=r"outside \(0, 1\]"):
        Annealed(schedule)
    if len(schedule) == 1:
        em = ExactPosteriorEM(mixture, strategy=Annealed(lambda step: schedule[0]))
        with pytest.raises(UsageError, match=r"outside \(0, 1\]"):
            em.fit(X)


def test_annealing_frees_a_start_that_em_stays_near() -> None:
    x = torch.cat([torch.randn(40) * 0.3 + c for c in (-6.0, 0.0, 6.0)])

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([5.9, 6.1, -3.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    plain = ExactPosteriorEM(model).fit(x)
    pyro.clear_param_store()
    slow = Annealed([0.01 * 1.08**i for i in range(59)])
    annealed = ExactPosteriorEM(model, strategy=slow).fit(x)
    assert annealed.log_evidence > plain.log_evidence + 10


# ------------------------------------------------------------------ masks, weights, labels

LEFT = torch.arange(10) < 6
MIXED = torch.tensor([0.6, 0.4], dtype=torch.float64)
CENTRES = torch.tensor([-1.0, 1.0], dtype=torch.float64)


def with_mask(x: Tensor) -> None:
    mu = pyro.param("mu", CENTRES.clone())
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=LEFT):
        z = pyro.sample("z", dist.Categorical(MIXED))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def with_weights(x: Tensor) -> None:
    mu = pyro.param("mu", CENTRES.clone())
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=torch.arange(1.0, 11.0)):
        z = pyro.sample("z", dist.Categorical(MIXED))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def with_labels(x: Tensor) -> None:
    mu = pyro.param("mu", CENTRES.clone())
    labels = (x > 0).long()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(MIXED), obs=labels, obs_mask=~LEFT)
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def by_hand(kind: str, strategy: Any) -> tuple[float, float]:
    """The bound and the evidence. The rows' q are independent."""
    table = MIXED.log() + dist.Normal(CENTRES, 1.0).log_prob(X[:, None])
    weight = torch.arange(1.0, 11.0) if kind == "with_weights" else torch.ones(10)
    if kind == "with_mask":
        weight = LEFT.double()
    if kind == "with_labels":
        known = torch.nn.functional.one_hot((X > 0).long(), 2).bool()
        table = table.masked_fill(~LEFT[:, None] & ~known, -torch.inf)
    evidence = float((weight * table.logsumexp(-1)).sum())
    if isinstance(strategy, Hard):
        return float((weight * table.amax(-1)).sum()), evidence
    if isinstance(strategy, Annealed):
        r = (strategy.beta(0) * table).softmax(-1)
        cells = torch.where(r > 0, r * (table - r.log()), 0.0)
        return float((weight * cells.sum(-1)).sum()), evidence
    return evidence, evidence


@pytest.mark.parametrize("strategy", [Hard(), Annealed([0.4]), "exact"], ids=["h", "a", "e"])
@pytest.mark.parametrize("model", [with_mask, with_weights, with_labels])
def test_bounds_by_hand(model: Model, strategy: Any) -> None:
    bound, evidence = by_hand(model.__name__, strategy)
    terms = ExactPosteriorEM(model, strategy=strategy).elbo(X)
    assert terms.log_evidence == pytest.approx(evidence, abs=1e-9)
    assert terms.value == pytest.approx(bound, abs=1e-9)
    assert terms.gap is not None and terms.gap >= -1e-9


def test_point_estimates_under_each() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(torch.tensor(0.5), 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(MIXED))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        mu = pyro.param("m", CENTRES.clone())
        with pyro.plate("components", 2):
            pyro.sample("mu", dist.Delta(mu))

    log_prior = float(dist.Normal(torch.tensor(0.5), 3.0).log_prob(CENTRES).sum())
    for strategy in (Hard(), Annealed([0.4]), "exact"):
        bound, evidence = by_hand("mixture", strategy)
        pyro.clear_param_store()
        em = ExactPosteriorEM(model, guide, strategy=strategy)
        terms = em.elbo(X)
        assert terms.log_prior == pytest.approx(log_prior, abs=1e-9)
        assert terms.log_evidence == pytest.approx(evidence, abs=1e-9)
        assert terms.value == pytest.approx(bound + log_prior, abs=1e-9)
        assert terms.gap == pytest.approx(evidence - bound, abs=1e-9)
        result = em.fit(X)
        assert result.converged
        assert result.params["mu"].shape == (2,)


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_method_works_with_each(name: str, tmp_path: Any) -> None:
    em = ExactPosteriorEM(mixture, strategy=STRATEGIES[name])
    assert type(STRATEGIES[name]).__name__ in str(em.plan(X))
    loss = em.step(X)
    assert math.isfinite(loss)
    for step in em.steps(X):
        assert step.posterior is not None and math.isfinite(step.elbo)
        if step.index == 3:
            break
    result = em.fit(X, max_steps=20, num_restarts=3, seed=0)
    assert len(result.starts) == 3
    q = em.posterior(X)
    assert q.sample(2)["z"].shape == (2, 10)
    assert set(q.mode()["z"].tolist()) <= {0, 1}
    terms = em.elbo(X)
    assert terms.log_evidence == pytest.approx(result.log_evidence, abs=1e-9)
    assert terms.gap is not None and terms.gap >= -1e-9
    assert terms.reconstruction is not None and terms.kl is not None
    assert terms.value == pytest.approx(terms.reconstruction - terms.kl, abs=1e-9)
    assert terms.pointwise is not None
    assert float(terms.pointwise.sum()) == pytest.approx(result.log_evidence, abs=1e-9)
    em.m_step(em.posterior(X), X)
    em.save(tmp_path / "x.pt")
    expected = store("w", "mu", "s")
    pyro.clear_param_store()
    again = ExactPosteriorEM(mixture, strategy=STRATEGIES[name])
    again.load(tmp_path / "x.pt", X)
    for a, b in zip(store("w", "mu", "s"), expected, strict=True):
        torch.testing.assert_close(a, b)
    again.reset()
    assert "mu" not in pyro.get_param_store()
    assert result.standard_errors()["mu"].shape == (2,)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_dict_of_one_entry_is_the_strategy(name: str) -> None:
    paths = []
    for strategy in (STRATEGIES[name], {"z": STRATEGIES[name]}, {"*": STRATEGIES[name]}):
        pyro.clear_param_store()
        torch.manual_seed(0)
        em = ExactPosteriorEM(mixture, strategy=strategy)
        paths.append(list(em.fit(X, max_steps=8, tol=0).history))
    assert paths[0] == paths[1] == paths[2]


# ------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    "strategy", [Hard, MonteCarlo, "soft", 3, None, {"z": "soft"}, {"z": Hard}]
)
def test_unknown_strategies_get_a_sentence(strategy: Any) -> None:
    with pytest.raises(UsageError, match="is not available"):
        ExactPosteriorEM(mixture, strategy=strategy)


def test_guide_as_a_strategy_needs_a_guide() -> None:
    with pytest.raises(UsageError, match="there is no guide"):
        ExactPosteriorEM(mixture, strategy="guide")


@pytest.mark.parametrize("n", [0, -3])
def test_monte_carlo_needs_a_draw(n: int) -> None:
    with pytest.raises(UsageError, match="no number of draws"):
        MonteCarlo(n)


@pytest.mark.parametrize("n", [2.5, math.nan, math.inf])
def test_monte_carlo_needs_a_whole_number(n: Any) -> None:
    with pytest.raises(UsageError):
        MonteCarlo(n)


@pytest.mark.parametrize("make", [lambda: MonteCarlo("3"), lambda: Annealed(0.5)])  # type: ignore
def test_wrong_types_get_a_sentence(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError):
        make()


def test_a_strategy_for_an_unknown_site_is_refused() -> None:
    with pytest.raises(UsageError, match="zz"):
        ExactPosteriorEM(mixture, strategy={"zz": Hard()}).plan(X)


def two_latents(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.6, 0.4])))
        y = pyro.sample("y", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mu[z] + y, 1.0), obs=x)


def test_hard_for_one_latent_only_is_done_or_refused() -> None:
    try:
        q = ExactPosteriorEM(two_latents, strategy={"z": Hard(), "y": "exact"}).posterior(X)
    except UsageError:
        return
    assert not is_one_hot(q.probs("y"))


def test_two_e_steps_are_refused() -> None:
    em = ExactPosteriorEM(two_latents, strategy={"z": Hard(), "y": MonteCarlo(3)})
    with pytest.raises(UsageError, match="several E-steps"):
        em.plan(X)


@pytest.mark.parametrize("strategy", ["exact", Hard(), MonteCarlo(3), Annealed([0.5])])
def test_the_plan_says_whether_the_objective_can_fall(strategy: Any) -> None:
    plan = ExactPosteriorEM(mixture, strategy=strategy).plan(X)
    assert plan.is_monotone is not isinstance(strategy, (MonteCarlo, Annealed))


@pytest.mark.parametrize("strategy", [Hard(), MonteCarlo(20), Annealed([0.5])])
def test_a_strategy_without_sums_is_said_and_not_used(strategy) -> None:
    """Nothing is summed beside a point estimate: the step is the exact one, and the fit converges."""

    def model(x):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    x = torch.tensor([1.0, 0.0, 1.0, 1.0])
    em = ExactPosteriorEM(model, "map", strategy=strategy)
    plan = em.plan(x)
    assert plan.gives_up == "" and plan.is_monotone
    assert f"{type(strategy).__name__}(" in str(plan) and "is not used: no latent is summed" in str(
        plan
    )
    with pytest.warns(match="is not used"):
        result = em.fit(x, progress=False)
    assert result.converged and float(result.params["p"]) == pytest.approx(4 / 6, abs=1e-6)
