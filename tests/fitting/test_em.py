"""The public API: loops, starts, stopping, saving, where parameters live."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pyro_em import (
    ClosedForm,
    DegenerateError,
    EMStatus,
    ExactPosteriorEM,
    Fixed,
    Gradient,
    PyroEMWarning,
    UsageError,
)
from pyro_em.testing.models import check_model

X = torch.tensor([-2.1, -1.9, -2.4, 0.1, 1.8, 2.2, 2.9, 1.4, -1.0, 2.0], dtype=torch.float64)


def mixture(x, K: int = 2):
    w = pyro.param("w", torch.ones(K) / K, constraint=constraints.simplex)
    mu = pyro.param("mu", torch.linspace(-1, 1, K))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s), obs=x)


class MixtureModule(PyroModule):
    def __init__(self, K: int = 2) -> None:
        super().__init__()
        self.w = PyroParam(torch.ones(K) / K, constraints.simplex)
        self.mu = torch.nn.Parameter(torch.linspace(-1, 1, K))
        self.s = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x):
        w, mu, s = self.w, self.mu, self.s
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], s), obs=x)


def evidence_by_hand(params) -> float:
    log_p = params["w"].log() + dist.Normal(params["mu"], params["s"]).log_prob(X[:, None])
    return float(log_p.logsumexp(-1).sum())


@pytest.mark.parametrize("local", [False, True])
def test_modules_fit_as_functions_do(local: bool) -> None:
    expected = ExactPosteriorEM(mixture).fit(X, max_steps=20, tol=0)
    pyro.clear_param_store()
    with pyro.settings.context(module_local_params=local):
        module = MixtureModule()
        result = ExactPosteriorEM(module).fit(X, max_steps=20, tol=0)
        np.testing.assert_allclose(list(result.history), list(expected.history), rtol=1e-12)
        assert result.plan.compiled
        # The module itself holds what was fitted, in its state dict too.
        torch.testing.assert_close(module.mu.detach(), expected.params["mu"])
        torch.testing.assert_close(module.w.detach(), expected.params["w"])
        torch.testing.assert_close(module.state_dict()["mu"], expected.params["mu"])
        other = MixtureModule()
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other.s.detach(), expected.params["s"])


def test_results_are_those_of_the_returned_parameters() -> None:
    em = ExactPosteriorEM(mixture)
    result = em.fit(X)
    assert result.log_evidence == pytest.approx(evidence_by_hand(result.params), rel=1e-12)
    assert result.elbo == result.log_evidence
    for name, value in result.params.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)
    after = result.history.after_m_step
    path = [*result.history, result.log_evidence]
    assert len(after) == len(result.history) == result.num_steps
    for i in range(result.num_steps):  # the two half-steps interleave
        assert path[i] <= after[i] + 1e-12 and after[i] <= path[i + 1] + 1e-12
    assert result.bic == pytest.approx(-2 * result.log_evidence + 4 * math.log(10))
    assert result.aic == pytest.approx(-2 * result.log_evidence + 8)
    p = result.posterior.probs("z")
    assert result.icl == pytest.approx(result.bic - 2 * float((p * p.log()).sum()))
    assert 0 < result.rate < 1


def test_step_is_the_loss_entering_it() -> None:
    em = ExactPosteriorEM(mixture)
    before = em.evaluate_loss(X)
    assert em.step(X) == pytest.approx(before)
    assert em.evaluate_loss(X) < before
    fitted = ExactPosteriorEM(mixture)
    pyro.clear_param_store()
    losses = [fitted.step(X) for _ in range(5)]
    pyro.clear_param_store()
    np.testing.assert_allclose(
        [-v for v in losses], list(fitted.fit(X, max_steps=5, tol=0).history)
    )


def test_steps_can_be_broken_and_continued() -> None:
    em = ExactPosteriorEM(mixture)
    seen = []
    for step in em.steps(X):
        torch.testing.assert_close(step.params["mu"], pyro.param("mu").detach())
        seen.append(step.elbo)
        if step.index == 4:
            break
    seen += list(em.fit(X, max_steps=5, tol=0).history)
    pyro.clear_param_store()
    np.testing.assert_allclose(
        seen, list(ExactPosteriorEM(mixture).fit(X, max_steps=10, tol=0).history)
    )


def test_the_m_step_takes_any_q() -> None:
    labels = (X > 0).long()
    em = ExactPosteriorEM(mixture)
    em.m_step({"z": torch.nn.functional.one_hot(labels).double()}, X)
    torch.testing.assert_close(
        pyro.param("mu").detach(), torch.stack([X[X <= 0].mean(), X[X > 0].mean()])
    )
    em.reset()
    em.m_step(em.posterior(X), X)
    by_hand = pyro.param("mu").detach().clone()
    em.reset()
    em.step(X)
    torch.testing.assert_close(pyro.param("mu").detach(), by_hand)


def test_elbo_of_any_q_and_theta() -> None:
    em = ExactPosteriorEM(mixture)
    q = torch.rand(10, 2, generator=torch.Generator().manual_seed(3))
    q = q / q.sum(-1, keepdim=True)
    params = {"mu": torch.tensor([-2.0, 1.5]), "w": torch.tensor([0.2, 0.8])}
    before = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    terms = em.elbo(X, q={"z": q}, params=params)
    log_joint = params["w"].log() + dist.Normal(params["mu"], 1.0).log_prob(X[:, None])
    by_hand = float((q * (log_joint - q.log())).sum())
    assert terms.value == pytest.approx(by_hand, rel=1e-12)
    assert terms.log_evidence == pytest.approx(float(log_joint.logsumexp(-1).sum()))
    posterior = (log_joint - log_joint.logsumexp(-1, keepdim=True)).exp()
    kl = float((q * (q.log() - posterior.log())).sum())
    assert terms.gap == pytest.approx(kl, rel=1e-10)
    assert terms.value == pytest.approx(terms.expected_log_joint + terms.entropy)
    assert terms.value == pytest.approx(terms.reconstruction - terms.kl)
    torch.testing.assert_close(terms.pointwise, log_joint.logsumexp(-1))
    assert all(bool((pyro.param(n) == v).all()) for n, v in before.items())
    exact = em.elbo(X)
    assert exact.gap == pytest.approx(0, abs=1e-12) and exact.standard_error == 0
    assert float(exact) == exact.value


def test_a_frozen_q_gives_the_hill_climbing_figure() -> None:
    """Each bound touches the evidence at its θ and lies below it everywhere else."""
    em = ExactPosteriorEM(mixture)
    em.step(X)
    q = em.posterior(X)
    at = float(pyro.param("mu")[0].detach())
    for value in np.linspace(at - 2, at + 2, 9):
        mu = torch.stack([torch.tensor(value), pyro.param("mu")[1].detach()])
        terms = em.elbo(X, q=q, params={"mu": mu})
        assert terms.gap >= -1e-12
        if value == at:
            assert terms.gap == pytest.approx(0, abs=1e-12)


def test_looking_changes_nothing() -> None:
    em = ExactPosteriorEM(mixture)
    em.plan(X)
    state = torch.random.get_rng_state()
    before = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    em.posterior(X)
    em.posterior(torch.zeros(3))
    em.elbo(X)
    em.evaluate_loss(X)
    em.plan(X)
    assert all(bool((pyro.param(n) == v).all()) for n, v in before.items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_starts() -> None:
    em = ExactPosteriorEM(mixture)
    first = em.fit(X, init="random", seed=4, max_steps=3, tol=0)
    em.reset()
    again = em.fit(X, init="random", seed=4, max_steps=3, tol=0)
    assert list(first.history) == list(again.history)
    em.reset()
    other = em.fit(X, init="random", seed=5, max_steps=3, tol=0)
    assert list(first.history) != list(other.history)
    em.reset()
    labelled = em.fit(X, init={"z": (X > 0).long()}, max_steps=1, tol=0)
    low, high = X[X <= 0], X[X > 0]
    within = ((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum()
    start = {
        "w": torch.tensor([len(low), len(high)]) / 10,
        "mu": torch.stack([low.mean(), high.mean()]),
        "s": (within / 10).sqrt(),
    }
    assert labelled.history[0] == pytest.approx(evidence_by_hand(start))


def test_restarts_keep_the_best() -> None:
    x = torch.cat([X, X + 9, X - 7])
    em = ExactPosteriorEM(mixture)
    result = em.fit(x, 4, num_restarts=8, seed=0)
    assert len(result.starts) == 8
    assert result.log_evidence == max(v for v in result.starts if not math.isnan(v))
    assert result.log_evidence > result.starts[0] or result.starts[0] == result.log_evidence
    torch.testing.assert_close(result.params["mu"], pyro.param("mu").detach())


def test_stopping_rules() -> None:
    em = ExactPosteriorEM(mixture)
    assert em.fit(X, max_steps=7, tol=0).num_steps == 7
    em.reset()
    result = em.fit(X)
    assert result.status is EMStatus.CONVERGED and result.num_steps >= 6
    more = em.fit(X, tol=1e-12, max_steps=500)
    assert more.log_evidence - result.log_evidence < 1e-2
    assert more.total_steps == result.num_steps + more.num_steps
    assert em.fit(X, tol=1e-300).status is EMStatus.ROUNDING
    em.reset()
    stopped = em.fit(X, callbacks=[lambda step: step.index == 2])
    assert stopped.status is EMStatus.STOPPED and stopped.num_steps == 3


def test_interruption_keeps_what_is_there() -> None:
    def interrupt(step):
        if step.index == 3:
            raise KeyboardInterrupt

    em = ExactPosteriorEM(mixture)
    result = em.fit(X, callbacks=[interrupt])
    assert result.status is EMStatus.INTERRUPTED and not result.converged
    assert result.num_steps == 4
    assert result.log_evidence == pytest.approx(evidence_by_hand(result.params))


def test_save_and_load(tmp_path) -> None:
    em = ExactPosteriorEM(mixture)
    result = em.fit(X, max_steps=5, tol=0)
    em.save(tmp_path / "fit.pt")
    torch.load(tmp_path / "fit.pt", weights_only=True)
    pyro.clear_param_store()
    fresh = ExactPosteriorEM(mixture)
    fresh.load(tmp_path / "fit.pt")
    assert -fresh.evaluate_loss(X) == pytest.approx(result.log_evidence, rel=1e-12)
    assert fresh.fit(X, max_steps=1, tol=0).total_steps == 6

    def other(x):
        mu = pyro.param("mu", torch.zeros(3))
        pyro.sample("x", dist.Normal(mu.sum(), 1.0).expand([len(x)]).to_event(1), obs=x)

    pyro.clear_param_store()
    with pytest.raises(UsageError, match=r"another model.*parameter 'w'"):
        ExactPosteriorEM(other).load(tmp_path / "fit.pt", X)
    with pytest.raises(UsageError, match="not written by"):
        (tmp_path / "junk.pt").write_bytes(b"junk")
        em.load(tmp_path / "junk.pt")


def test_reset_returns_to_the_model() -> None:
    em = ExactPosteriorEM(mixture)
    start = em.evaluate_loss(X)
    em.fit(X)
    em.reset()
    assert em.evaluate_loss(X) == pytest.approx(start)
    pyro.clear_param_store()
    module = MixtureModule()
    em = ExactPosteriorEM(module)
    em.fit(X)
    em.reset()
    assert em.evaluate_loss(X) == pytest.approx(start)


def test_updates_by_name_and_glob() -> None:
    em = ExactPosteriorEM(mixture, updates={"s": Fixed(), "m*": Gradient()})
    result = em.fit(X, max_steps=10, tol=0)
    assert float(result.params["s"]) == 1.0
    pyro.clear_param_store()
    closed = ExactPosteriorEM(mixture, updates={"s": Fixed()}).fit(X, max_steps=10, tol=0)
    torch.testing.assert_close(result.params["mu"], closed.params["mu"], rtol=1e-9, atol=1e-9)
    assert result.num_free_parameters == 3
    with pytest.raises(UsageError, match=r"updates\['nu'\]: no parameter matches"):
        ExactPosteriorEM(mixture, updates={"nu": Fixed()}).plan(X)


def test_a_torch_optimiser_climbs() -> None:
    em = ExactPosteriorEM(
        mixture, updates={"mu": Gradient(lambda p: torch.optim.Adam(p, lr=0.05), steps=3)}
    )
    result = em.fit(X, max_steps=60, tol=0)
    assert result.history[-1] > result.history[0]
    assert not result.plan.is_monotone


def test_degenerate_components_are_named_and_rolled_back() -> None:
    def model(x):
        mu = pyro.param("mu", torch.tensor([0.0, 2.9]))
        s = pyro.param("s", torch.tensor([2.0, 0.01]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)

    em = ExactPosteriorEM(model)
    with pytest.warns(PyroEMWarning, match=r"parameter 's', component 1: its variance collapses"):
        result = em.fit(X)
    assert result.status is EMStatus.DEGENERATE and not result.converged
    assert "ClosedForm(floor=" in result.message and "site 'x'" in result.message
    assert bool(torch.isfinite(result.params["s"]).all()) and float(result.params["s"][1]) > 0
    pyro.clear_param_store()
    floored = ExactPosteriorEM(model, updates={"s": ClosedForm(floor=1e-3)}).fit(X)
    assert float(floored.params["s"].min()) == pytest.approx(1e-3**0.5)
    assert floored.converged
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    with pytest.raises(DegenerateError):
        for _ in range(50):
            before = em.elbo(X).value
            em.step(X)
    assert em.elbo(X).value == pytest.approx(before)


def test_a_symmetric_start_is_said() -> None:
    def model(x):
        mu = pyro.param("mu", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    with pytest.warns(PyroEMWarning, match="symmetric"):
        result = ExactPosteriorEM(model).fit(X)
    assert result.status is EMStatus.SYMMETRIC and not result.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyro.clear_param_store()
        assert ExactPosteriorEM(model).fit(X, init="random", seed=0).converged


def test_structural_zeros_stay_zero() -> None:
    start = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    y = torch.tensor([0.0, 0.2, 0.1, 2.1, 1.9, 4.2, 4.0, 3.9])

    def model(y):
        A = pyro.param("A", start, constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 2.0, 4.0]))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"y{t}", dist.Normal(mu[z], 0.5), obs=y[t])

    em = ExactPosteriorEM(model)
    for init in (None, "random"):
        em.reset()
        result = em.fit(y, init=init, seed=1, max_steps=30, tol=0)
        assert bool((result.params["A"][start == 0] == 0).all())
        assert result.num_free_parameters == 2 + 3


def test_the_rest_of_pyro_sees_the_parameters() -> None:
    result = ExactPosteriorEM(mixture).fit(X)

    def generate():
        w, mu, s = pyro.param("w"), pyro.param("mu"), pyro.param("s")
        z = pyro.sample("z", dist.Categorical(w))
        return pyro.sample("x", dist.Normal(mu[z], s))

    draws = Predictive(generate, num_samples=2000)()["x"]
    assert float(draws.mean()) == pytest.approx(
        float((result.params["w"] * result.params["mu"]).sum()), abs=0.3
    )
    svi = SVI(
        config_enumerate(mixture),
        lambda x: None,
        pyro.optim.SGD({"lr": 1e-6}),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    assert svi.step(X) == pytest.approx(-result.log_evidence, rel=1e-9)


def test_summary_says_how_it_was_made() -> None:
    result = ExactPosteriorEM(mixture).fit(X, seed=3)
    about = result.summary().attrs
    assert about["log evidence (nats)"] == result.log_evidence
    assert {"seed", "dtype", "start", "torch", "pyro", "BIC (lower is better)"} <= set(about)
    assert "lower is better" in str(result)


def test_a_model_that_hides_a_dependence_is_not_compiled() -> None:
    def model(x):
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        shift = float(mu.detach().sum())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z], 1.0 + shift**2), obs=x)

    em = ExactPosteriorEM(model)
    plan = em.plan(X)
    assert not plan.compiled and isinstance(plan.updates["mu"].update, Gradient)
    path = [*em.fit(X, max_steps=20, tol=0).history]
    assert np.all(np.diff(path) > -1e-9)


def test_check_model_on_a_chain_in_a_plate() -> None:
    def model(y):
        A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        s = pyro.param("s", torch.tensor([1.0, 1.5]), constraint=constraints.positive)
        with pyro.plate("sequences", y.shape[0]):
            z = torch.tensor(0)
            for t in pyro.markov(range(y.shape[1])):
                z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
                pyro.sample(f"y{t}", dist.Normal(mu[z], s[z]), obs=y[:, t])

    check_model(model, torch.randn(5, 6))


def test_float32_parameters_beside_float64_data_do_not_seem_to_fall() -> None:
    torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ExactPosteriorEM(mixture).fit(X)
    assert result.converged and result.params["mu"].dtype == torch.float32


def test_a_results_parameters_are_its_own() -> None:
    """Neither later steps nor a second fit change what a result holds."""

    def model(x: torch.Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    em = ExactPosteriorEM(model)
    result = em.fit(torch.randn(50), max_steps=2, progress=False)
    before = result.params["mu"].clone()
    em.step(torch.randn(50) + 3)
    assert torch.equal(result.params["mu"], before)
    assert not torch.equal(pyro.param("mu"), before)


def test_the_parameters_of_a_step_are_those_of_its_moment_whenever_asked_for() -> None:
    def model(x):
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], s), obs=x)

    x = torch.cat([torch.randn(40) - 2, torch.randn(30) + 2])
    held, steps = [], []
    for step in itertools.islice(ExactPosteriorEM(model).steps(x), 4):
        steps.append(step)
        held.append({n: pyro.param(n).detach().clone() for n in ("w", "mu", "s")})
    for step, store in zip(steps, held, strict=True):
        for name, value in store.items():
            assert torch.equal(step.params[name], value)


def test_a_spread_at_zero_is_not_tried_where_another_density_has_no_zero() -> None:
    """Where a fit ended, a random effect is tried without its variance; a Gamma reads it here too."""

    def model(x: torch.Tensor) -> None:
        a = pyro.param("a", torch.tensor(2.0).double(), constraint=constraints.positive)
        with pyro.plate("groups", len(x), dim=-2):
            rate = pyro.sample("rate", dist.Gamma(a, a))
            mean = pyro.sample("mean", dist.Normal(torch.zeros(()).double(), a))
            with pyro.plate("rows", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(mean, 0.1), obs=x)
                pyro.sample("y", dist.Exponential(rate), obs=x.abs())

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    result = ExactPosteriorEM(model).fit(x, max_steps=1, tol=0, progress=False)
    assert math.isfinite(result.log_evidence)
