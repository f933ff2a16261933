"""Loops over indices with Gaussian latents, against the same loops over integers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, ModelError, vectorized_markov
from tests.posteriors.chain_models import noise, number, positive

Loop = Callable[..., Iterator[Any]]
Case = tuple[Callable[..., None], tuple[Any, ...]]


def over_integers(name: str, size: int, history: int = 1) -> Iterator[int]:
    """The loop that an index stands for."""
    yield from pyro.markov(range(size), history=history)


def local_level() -> Case:
    def model(loop: Loop, y: Tensor) -> None:
        h: Any = None
        for t in loop("time", len(y)):
            mean, spread = (0.0, 3.0) if h is None else (h, positive("q", 0.7))
            h = pyro.sample(f"h_{t}", dist.Normal(mean, spread))
            pyro.sample(f"y_{t}", dist.Normal(h + number("m", 0.1), positive("r", 0.9)), obs=y[t])

    return model, (noise(12),)


def second_order() -> Case:
    """History two, inputs, gaps."""

    def model(loop: Loop, y: Tensor, u: Tensor, ok: Tensor) -> None:
        phi, before, h = number("phi", [0.6, 0.2]), None, None
        for t in loop("time", len(y), history=2):
            mean = torch.zeros(()).double()
            if h is not None:
                mean = mean + phi[0] * h
            if before is not None:
                mean = mean + phi[1] * before
            before, h = h, pyro.sample(f"h_{t}", dist.Normal(mean + u[t], positive("s", 0.8)))
            seen = dist.Normal(h, positive("r", 0.6)).mask(ok[t])
            pyro.sample(f"y_{t}", seen, obs=y[t])

    ok = torch.ones(12, dtype=torch.bool)
    ok[5:8] = False
    return model, (noise(12, seed=2), noise(12, seed=3), ok)


def factors() -> Case:
    """Vectors below a plate of series, with a coefficient that is no linear function."""

    def model(loop: Loop, y: Tensor) -> None:
        W = number("W", [[1.0, 0.2], [0.5, 1.0], [0.3, -1.0]])
        tril = number("L", [[0.5, 0.0], [0.2, 0.6]], constraints.lower_cholesky)
        series, h = pyro.plate("series", 3), None
        for t in loop("time", len(y)):
            if h is None:
                start = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
                h = pyro.sample(f"h_{t}", start)
            else:
                decay = torch.exp(-positive("tau", [0.3, 0.6]))
                h = pyro.sample(f"h_{t}", dist.MultivariateNormal(decay * h, scale_tril=tril))
            with series:
                mean = (W * h.unsqueeze(-2)).sum(-1)
                pyro.sample(f"y_{t}", dist.Normal(mean, positive("r", [0.5, 0.7, 0.9])), obs=y[t])

    return model, (noise(9, 3, seed=4),)


def panel() -> Case:
    """Series of unequal lengths, level and slope."""

    def model(loop: Loop, y: Tensor, lengths: Tensor) -> None:
        people, level, slope = pyro.plate("people", y.shape[1]), None, None
        for t in loop("time", len(y)):
            with people:
                first = slope is None
                mean = 0.0 if first else slope
                slope = pyro.sample(f"slope_{t}", dist.Normal(mean, positive("a", 0.3)))
                mean = 0.0 if first else level + slope
                level = pyro.sample(f"level_{t}", dist.Normal(mean, positive("b", 0.5)))
                with pyro.poutine.mask(mask=t < lengths):
                    pyro.sample(f"y_{t}", dist.Normal(level, positive("r", 0.6)), obs=y[t])

    return model, (noise(9, 4, seed=6), torch.tensor([9, 4, 7, 9]))


def classes() -> Case:
    """A discrete class of each series decides its noise."""

    def model(loop: Loop, y: Tensor) -> None:
        pi = number("pi", [0.4, 0.6], constraints.simplex)
        series, h = pyro.plate("series", y.shape[1]), None
        with series:
            z = pyro.sample("z", dist.Categorical(pi))
        for t in loop("time", len(y)):
            with series:
                mean = torch.zeros(()).double() if h is None else h
                h = pyro.sample(f"h_{t}", dist.Normal(mean, positive("q", [0.3, 1.2])[z]))
                pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 0.5)), obs=y[t])

    return model, (noise(9, 3, seed=9),)


def two_stages() -> Case:
    """Each step is made of two latents, one after the other: states go on by two levels."""

    def model(loop: Loop, y: Tensor) -> None:
        a = None
        for t in loop("time", len(y)):
            mean = torch.zeros(()).double() if a is None else 0.9 * a
            half = pyro.sample(f"half_{t}", dist.Normal(mean, positive("q", 0.4)))
            a = pyro.sample(f"a_{t}", dist.Normal(half, positive("s", 0.3)))
            pyro.sample(f"y_{t}", dist.Normal(a, positive("r", 0.5)), obs=y[t])

    return model, (noise(9, seed=14),)


CASES = {f.__name__: f for f in (local_level, second_order, factors, panel, classes, two_stages)}


@pytest.mark.parametrize("case", CASES)
def test_indices_do_what_integers_do(case: str) -> None:
    model, args = CASES[case]()
    found = []
    for loop in (vectorized_markov, over_integers):
        pyro.clear_param_store()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = 1 if case == "factors" else 2
            result = ExactPosteriorEM(model).fit(loop, *args, max_steps=steps, tol=0)
        plan, q = result.plan, result.posterior
        assert "step by step" not in str(plan)
        flat = [n.partition(":")[0] for n in plan.notes if "evidence is as high" in n]
        assert len(flat) == len(set(flat)), "a variance at zero is said once for all steps"
        assert all("Kalman" in r.reason for r in plan.routes if r.route == "Gaussian")
        names = [r.site for r in plan.routes if r.route == "Gaussian"]
        means = [q.mean(n) for n in names]
        found.append((q.log_evidence, means, q.covariance(names[3], names[4]), result))
    (ours, means, between, result), (theirs, others, other_between, other) = found
    assert ours == pytest.approx(theirs, abs=1e-10)
    for a, b in zip(means, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(between, other_between, rtol=0.0, atol=1e-10)
    assert result.history == pytest.approx(other.history, abs=1e-9)
    for name, value in result.params.items():
        torch.testing.assert_close(value, other.params[name], rtol=1e-8, atol=1e-9)
    assert result.num_rows == other.num_rows
    assert result.num_free_parameters == other.num_free_parameters


def test_a_step_that_reads_all_others_is_read_step_by_step() -> None:
    def model(loop: Loop, y: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        h: Any = 0.0
        for t in loop("time", len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(h + drift, positive("q", 0.5)))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 1.0)), obs=y[t])

    y = noise(9, seed=8)
    em = ExactPosteriorEM(model)
    said = " ".join(em.plan(vectorized_markov, y).notes)
    assert "read step by step" in said and "body" not in said, "no body reads it otherwise"
    q = em.posterior(vectorized_markov, y)
    other = ExactPosteriorEM(model).posterior(over_integers, y)
    assert q.log_evidence == pytest.approx(other.log_evidence, abs=1e-10)


def test_a_short_loop_is_solved_as_one_block_without_a_word() -> None:
    model, _ = local_level()
    em = ExactPosteriorEM(model)
    assert em.plan(vectorized_markov, noise(5)).notes == ()


def test_latents_that_no_observation_depends_on_have_the_moments_of_their_prior() -> None:
    """w_t | h_t ~ N(2 h_t + 1, s²) that nothing reads: mean 2 E[h_t] + 1, variance 4 V[h_t] + s²."""

    def model(loop: Loop, y: Tensor) -> None:
        h: Any = 0.0
        for t in loop("time", len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(h, positive("q", 0.7)))
            pyro.sample(f"w_{t}", dist.Normal(2 * h + 1, positive("s", 0.4)))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 0.9)), obs=y[t])

    em = ExactPosteriorEM(model)
    q = em.posterior(vectorized_markov, noise(9))
    assert "step by step" not in str(em.plan(vectorized_markov, noise(9)))
    torch.testing.assert_close(q.mean("w_*"), 2 * q.mean("h_*") + 1)
    torch.testing.assert_close(q.covariance("w_*"), 4 * q.covariance("h_*") + 0.16)


def test_a_slope_that_only_the_next_level_reads_is_a_latent_of_every_step() -> None:
    """Also that of the last step, which nobody reads: it has the moments of its prior given others."""

    def model(loop: Loop, y: Tensor) -> None:
        level, slope = torch.zeros(()).double(), torch.zeros(()).double()
        for t in loop("time", len(y)):
            mean = level + slope
            slope = pyro.sample(f"slope_{t}", dist.Normal(0.9 * slope, positive("s", 0.3)))
            level = pyro.sample(f"level_{t}", dist.Normal(mean, positive("q", 0.5)))
            pyro.sample(f"y_{t}", dist.Normal(level, positive("r", 0.9)), obs=y[t])

    y, found = noise(12, seed=11), []
    for loop in (vectorized_markov, over_integers):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        plan, q = em.plan(loop, y), em.posterior(loop, y)
        assert plan.notes == ()
        moments = [f(n) for f in (q.mean, q.covariance) for n in ("level_*", "slope_*")]
        found.append((q.log_evidence, *moments))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-10)


def test_a_chain_that_no_observation_reads_is_a_chain_of_its_prior() -> None:
    def model(loop: Loop, y: Tensor) -> None:
        h = w = torch.zeros(()).double()
        for t in loop("time", len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(h, positive("q", 0.7)))
            w = pyro.sample(f"w_{t}", dist.Normal(w, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 0.9)), obs=y[t])

    q = ExactPosteriorEM(model).posterior(vectorized_markov, noise(9))
    torch.testing.assert_close(q.mean("w_*"), torch.zeros(9).double())
    torch.testing.assert_close(q.covariance("w_*"), torch.arange(1.0, 10.0).double())
    assert q.sample(2)["w_*"].shape == (9, 2)


def test_what_is_not_linear_is_said_by_the_names_of_its_sites() -> None:
    def model(loop: Loop, y: Tensor) -> None:
        h: Any = torch.zeros(()).double()
        for t in loop("time", len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(torch.tanh(h), 0.5))
            pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])

    y = noise(12, seed=9)
    with pytest.raises(ModelError, match="h_0") as error:
        ExactPosteriorEM(model).fit(vectorized_markov, y, max_steps=1)
    assert "<time" not in str(error.value)
    assert "not linear in 'h_0' (tanh)" in str(error.value)
