"""Chains over index tensors against the same chains as loops, brute force and forward-backward."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from pyro_em import ExactPosteriorEM, PyroEMError, UsageError, vectorized_markov
from pyro_em.plan.program import Program
from tests.graph import vectorized_models as models
from tests.graph.vectorized_models import LOOPS, Loop, N, T, data, positive, real, simplex

STEP_BY_STEP = "read step by step"


def as_model(chain: models.Model, loop: Loop) -> Callable[[Tensor], None]:
    return lambda x: chain(loop, x)


def notes(em: ExactPosteriorEM, *args: Any) -> str:
    return "\n".join(em.plan(*args).notes)


def compare(chain: models.Model, x: Tensor, *, vectorised: bool = True) -> None:
    """Posterior, plan and fit of a chain in both forms."""
    found = {}
    for way, loop in LOOPS.items():
        pyro.clear_param_store()
        em = ExactPosteriorEM(as_model(chain, loop))
        q = em.posterior(x)
        found[way] = q, q.mode(), em.fit(x, max_steps=2, tol=0)
    q, mode, result = found["vectorised"]
    q_of_loop, mode_of_loop, result_of_loop = found["loop"]
    plan, plan_of_loop = result.plan, result_of_loop.plan
    assert (STEP_BY_STEP in str(plan)) == (not vectorised), plan.notes
    assert str(plan).split("\nNote")[0] == str(plan_of_loop).split("\nNote")[0]
    assert set(plan.edges) == set(plan_of_loop.edges)
    assert q.log_evidence == pytest.approx(q_of_loop.log_evidence, rel=1e-10)
    assert list(q.graph.latents) == list(q_of_loop.graph.latents)
    for z in q.graph.latents:
        torch.testing.assert_close(q.probs(z), q_of_loop.probs(z), rtol=1e-9, atol=1e-12)
    assert q.entropy() == pytest.approx(q_of_loop.entropy(), rel=1e-9)
    assert mode.keys() == mode_of_loop.keys()
    assert all(torch.equal(mode[z], mode_of_loop[z]) for z in mode)
    np.testing.assert_allclose(result.history, result_of_loop.history, rtol=1e-9)
    for name, value in result_of_loop.params.items():
        torch.testing.assert_close(result.params[name], value, rtol=1e-7, atol=1e-9)
    assert result.bic == pytest.approx(result_of_loop.bic, rel=1e-9)


@pytest.mark.parametrize("chain", models.ONE, ids=lambda m: m.__name__)
def test_one_sequence(chain: models.Model) -> None:
    compare(chain, data(T))


@pytest.mark.parametrize("chain", models.MANY, ids=lambda m: m.__name__)
def test_sequences_in_a_plate(chain: models.Model) -> None:
    compare(chain, data(T, N))


@pytest.mark.parametrize(
    ("size", "history"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2), (5, 3)]
)
def test_short_chains(size: int, history: int) -> None:
    def chain(loop: Loop, x: Tensor) -> None:
        A, mu = simplex("A", *(2,) * (history + 1)), real("mu", 2)
        past: list[Any] = [torch.tensor(0)] * history
        for t in loop("time", len(x), history=history):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[tuple(past)]))
            past = [*past[1:], z]
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    compare(chain, data(size))


LONG = [models.gaussian, models.missing_steps, models.covariates, models.missing_by_obs_mask]


@pytest.mark.parametrize("chain", [*LONG, models.ragged_by_a_table], ids=lambda m: m.__name__)
def test_long_chains(chain: models.Model) -> None:
    """Where looks go by a part of the steps."""
    size = 260
    x = data(size, N) if chain in models.MANY else data(size)
    q, plans = {}, {}
    for way, loop in LOOPS.items():
        pyro.clear_param_store()
        em = ExactPosteriorEM(as_model(chain, loop))
        q[way] = em.posterior(x)
        plans[way] = "" if way == "loop" else notes(em, x)
    assert STEP_BY_STEP not in plans["vectorised"]
    ours, theirs = q["vectorised"], q["loop"]
    assert ours.log_evidence == pytest.approx(theirs.log_evidence, rel=1e-10)
    for t in (0, 1, 100, size - 1):
        torch.testing.assert_close(ours.probs(f"z_{t}"), theirs.probs(f"z_{t}"))


def test_one_bad_value_far_inside_is_named() -> None:
    x = data(260)
    x[143] = torch.nan
    em = ExactPosteriorEM(as_model(models.gaussian, vectorized_markov))
    with pytest.raises(PyroEMError, match="'x_143'"):
        em.fit(x)


def test_a_branch_at_one_step_far_inside_is_read_as_a_loop() -> None:
    em = ExactPosteriorEM(
        as_model(chain_with(lambda t, x: 1.0 if t == 143 else 0.0), LOOPS["loop"])
    )
    expected = em.posterior(data(260)).log_evidence
    pyro.clear_param_store()
    chain = chain_with(lambda t, x: 1.0 if t == 143 else 0.0)
    em = ExactPosteriorEM(as_model(chain, vectorized_markov))
    assert em.posterior(data(260)).log_evidence == pytest.approx(expected, rel=1e-10)
    assert STEP_BY_STEP in notes(em, data(260))


def test_no_history() -> None:
    """Steps that do not read each other."""

    def chain(loop: Loop, x: Tensor) -> None:
        w, mu = simplex("w", 2), real("mu", 2)
        for t in loop("time", len(x), history=0):
            z = pyro.sample(f"z_{t}", dist.Categorical(w))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    compare(chain, data(4))


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(2, 6),
    rows=st.integers(1, 3),
    states=st.integers(1, 3),
    seed=st.integers(0, 1000),
    inside=st.booleans(),
    dim=st.sampled_from([None, -2]),
    masked=st.booleans(),
    moving=st.booleans(),
)
def test_any_chain_by_brute_force(
    size: int,
    rows: int,
    states: int,
    seed: int,
    inside: bool,
    dim: int | None,
    masked: bool,
    moving: bool,
) -> None:
    x = data(size, rows, seed=seed)
    lengths = torch.randint(0, size + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    A0 = models.rows(size, states, states, seed=seed)
    A0 = A0 / A0.sum(-1, keepdim=True)
    mu0 = data(states, seed=seed + 1)

    def model(x: Tensor) -> None:
        A, mu = pyro.param("A", A0), pyro.param("mu", mu0)
        plate = pyro.plate("rows", rows, dim=-1)
        z: Any = torch.tensor(0)

        def step(t: Any) -> None:
            nonlocal z
            with poutine.mask(mask=(t < lengths) if masked else torch.tensor(True)):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[t, z] if moving else A[0][z]))
                pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

        if inside:
            for t in vectorized_markov("time", size, dim=dim):
                with plate:
                    step(t)
        else:
            with plate:
                for t in vectorized_markov("time", size, dim=dim):
                    step(t)

    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    q = em.posterior(x)
    assert STEP_BY_STEP not in notes(em, x)
    total = 0.0
    for n in range(rows):
        length = int(lengths[n]) if masked else size
        weights = []
        for path in itertools.product(range(states), repeat=length):
            log_p, before = 0.0, 0
            for t, k in enumerate(path):
                log_p += float(A0[t if moving else 0, before, k].log())
                log_p += float(dist.Normal(mu0[k], 1.0).log_prob(x[t, n]))
                before = k
            weights.append(log_p)
        joint = torch.tensor(weights)
        total += float(joint.logsumexp(0))
        if length:
            p = joint.softmax(0).reshape((states,) * length)
            for t in range(length):
                expected = p.sum([i for i in range(length) if i != t]) if length > 1 else p
                torch.testing.assert_close(q.probs(f"z_{t}")[n].float(), expected.float())
    assert q.log_evidence == pytest.approx(total, rel=1e-5, abs=1e-5)


def test_against_forward_and_backward_in_numpy() -> None:
    x = data(60)
    em = ExactPosteriorEM(as_model(models.gaussian, vectorized_markov))
    q = em.posterior(x)
    pi, A, mu, s = (pyro.param(n).detach().numpy() for n in ("pi", "A", "mu", "s"))
    like = np.exp(-0.5 * ((x.numpy()[:, None] - mu) / s) ** 2) / (s * np.sqrt(2 * np.pi))
    alpha, beta = [pi * like[0]], [np.ones(2)]
    for t in range(1, 60):
        alpha.append(alpha[-1] @ A * like[t])
        beta.append(A @ (like[60 - t] * beta[-1]))
    gamma = np.array(alpha) * np.array(beta[::-1])
    assert q.log_evidence == pytest.approx(np.log(alpha[-1].sum()), rel=1e-10)
    for t in (0, 1, 31, 59):
        np.testing.assert_allclose(q.probs(f"z_{t}"), gamma[t] / gamma[t].sum(), rtol=1e-9)


# ---------------------------------------------------------------- how often, and with what


def spied(chain: models.Model, seen: list[Any]) -> Callable[[Tensor], None]:
    def loop(*args: Any, **how: Any) -> Iterator[Any]:
        for t in vectorized_markov(*args, **how):
            seen.append(t if isinstance(t, int) else t.tolist())
            yield t

    return lambda x: chain(loop, x)


def test_the_body_runs_as_often_whatever_the_length() -> None:
    counts = []
    for size in (30, 300):
        pyro.clear_param_store()
        seen: list[Any] = []
        ExactPosteriorEM(spied(models.gaussian, seen)).fit(data(size), max_steps=3, tol=0)
        counts.append(len(seen))
        if size == 30:
            assert seen[:3] == [0, list(range(size - 1)), list(range(1, size))]
    assert counts[0] == counts[1]


def test_a_plain_call_is_a_loop_over_integers() -> None:
    x, seen = data(5), []
    model = spied(models.gaussian, seen)
    trace = poutine.trace(model).get_trace(x)
    assert seen == [0, 1, 2, 3, 4]
    assert [n for n in trace.nodes if n.startswith("z_")] == [f"z_{t}" for t in range(5)]
    seen.clear()
    Predictive(model, num_samples=2)(x)
    with poutine.block(hide_fn=lambda site: site["type"] == "sample"):
        model(x)
    assert set(map(type, seen)) == {int} and len(seen) % 5 == 0


def test_what_a_fitted_chain_answers() -> None:
    x = data(40) + 5.0 * (torch.arange(40) // 5 % 2)
    em = ExactPosteriorEM(as_model(models.gaussian, vectorized_markov))
    result = em.fit(x, tol=1e-7)
    pyro.clear_param_store()
    of_loop = ExactPosteriorEM(as_model(models.gaussian, models.plain)).fit(x, tol=1e-7)
    q, other = result.posterior, of_loop.posterior
    torch.testing.assert_close(q.joint("z_3", "z_4"), other.joint("z_3", "z_4"))
    torch.testing.assert_close(q.joint("z_3", "z_7"), other.joint("z_3", "z_7"))
    draws, drawn = q.sample(5, seed=1), other.sample(5, seed=1)
    assert all(torch.equal(draws[z], drawn[z]) for z in drawn)
    ours, theirs = result.standard_errors(), of_loop.standard_errors()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7, equal_nan=True)
    terms = em.elbo(x)
    assert terms.value == pytest.approx(float(result.log_evidence), abs=1e-6)
    predicted = em.predictive(x, num_samples=3, seed=0)
    assert predicted["x_11"].shape == (3,)
    copies = pickle.loads(pickle.dumps(result)), copy.deepcopy(result)
    for copied in copies:
        torch.testing.assert_close(copied.posterior.probs("z_3"), q.probs("z_3"))
        assert str(copied.plan) == str(result.plan)


# ---------------------------------------------------------------- bodies that need integers


def chain_with(use: Callable[[Any, Tensor], Any]) -> models.Model:
    def chain(loop: Loop, x: Tensor) -> None:
        A, mu, s = simplex("A", 2, 2), real("mu", 2), positive("s")
        z: Any = 0
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + use(t, x), s), obs=x[t])

    return chain


LEVELS = [0.1 * t for t in range(T)]


@pytest.mark.parametrize(
    "use",
    [
        lambda t, x: 0.1 * int(t),
        lambda t, x: 0.1 * float(t),
        lambda t, x: 0.5 if t > 3 else 0.0,
        lambda t, x: LEVELS[t],
        lambda t, x: dict(enumerate(LEVELS))[t],
        lambda t, x: {3: 1.0}.get(t, 0.0),
        lambda t, x: sum(0.1 for _ in range(t)),
        lambda t, x: x[:t].sum(),
        lambda t, x: 0.1 * len(f"{t:03d}") * int(f"{t:03d}"),
        lambda t, x: 1.0 if t in (2, 5) else 0.0,
        lambda t, x: pyro.param(f"level_{t}", torch.tensor(0.1, dtype=torch.float64)),
    ],
    ids=[
        "int",
        "float",
        "branch",
        "list",
        "dict",
        "get",
        "range",
        "slice",
        "format",
        "in",
        "param",
    ],
)
def test_bodies_that_need_integers(use: Callable[[Any, Tensor], Any]) -> None:
    compare(chain_with(use), data(T), vectorised=False)


@pytest.mark.parametrize(
    "use",
    [
        lambda v: v.max() > 3,
        lambda v: (v > 3).any(),
        lambda v: v.sum() > 3,
        lambda v: v.reshape(-1).max() > 3,
        lambda v: True in (v > 3),
        lambda v: len((v > 3).nonzero()) > 0,
        lambda v: v.numpy().max() > 3,
    ],
    ids=["max", "any", "sum", "reshape", "in", "nonzero", "numpy"],
)
def test_numbers_of_a_step_that_decide_what_the_body_does(use: Callable[[Tensor], Any]) -> None:
    """All steps but one go one way, also those that are looked at."""
    x = torch.full((9,), 4.0, dtype=torch.float64)
    x[2] = 0.0
    found = []
    for loop in LOOPS.values():
        pyro.clear_param_store()
        em = ExactPosteriorEM(as_model(chain_with(lambda t, x: float(bool(use(x[t])))), loop))
        found.append(em.score(x))
        says = STEP_BY_STEP in notes(em, x)
        assert says == (loop is vectorized_markov)
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_plate_of_the_same_name() -> None:
    def chain(loop: Loop, x: Tensor) -> None:
        mu = real("mu", 2)
        with pyro.plate("time", len(x)):
            pyro.sample("y", dist.Normal(mu[0], 1.0), obs=x)
        models.symbols(loop, (x > 0).long())

    compare(chain, data(T), vectorised=False)


def test_why_a_body_fails_with_index_tensors_is_said() -> None:
    x = data(T)
    model = as_model(chain_with(lambda t, x: x[t].reshape(1)[0]), vectorized_markov)
    assert "what a step reads another shape" in notes(ExactPosteriorEM(model), x)
    pyro.clear_param_store()
    bodies = chain_with(lambda t, x: torch.cat([x[t][None], x[:1]])[0])
    said = notes(ExactPosteriorEM(as_model(bodies, vectorized_markov)), x)
    assert "with index tensors, " in said and "<" not in said


def test_sums_over_earlier_steps_are_read_as_a_loop() -> None:
    def total(loop: Loop, x: Tensor) -> None:
        A, mu, s = simplex("A", 2, 2), real("mu", 2), positive("s")
        z, level = 0, torch.tensor(0.0, dtype=torch.float64)
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            level = 0.5 * level + x[t]
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + level, s), obs=x[t])

    def ever(loop: Loop, x: Tensor) -> None:
        """A sum that says the same twice: whether there was a shock at any step so far."""
        A, mu, s = simplex("A", 2, 2), real("mu", 2), positive("s")
        shock = torch.arange(len(x)) == 2
        z, was = 0, torch.tensor(False)
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            was = was | shock[t]
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + was, s), obs=x[t])

    compare(total, data(T), vectorised=False)
    compare(ever, data(T), vectorised=False)


def test_sums_that_happen_to_be_zero_are_found() -> None:
    """What is found out about a body holds for other data of the same form."""

    def chain(x: Tensor, shock: Tensor) -> None:
        A, mu, s = simplex("A", 2, 2), real("mu", 2), positive("s")
        z, was = 0, torch.tensor(False)
        for t in vectorized_markov("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            was = was | shock[t]
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + was, s), obs=x[t])

    assert STEP_BY_STEP in notes(ExactPosteriorEM(chain), data(T), torch.zeros(T, dtype=bool))


@pytest.mark.parametrize("rows", [N, T - 1])
def test_one_reading_serves_other_data(rows: int) -> None:
    def chain(x: Tensor, level: Tensor, lengths: Tensor) -> None:
        A, mu, s = simplex("A", 2, 2), real("mu", 2), positive("s")
        z: Any = 0
        with pyro.plate("rows", x.shape[1]):
            for t in vectorized_markov("time", len(x)):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                    pyro.sample(f"x_{t}", dist.Normal(mu[z] + level[t], s), obs=x[t])

    first = data(T, rows), torch.zeros(T), torch.full((rows,), T)
    then = data(T, rows, seed=1), data(T, seed=2), torch.arange(rows) + 1
    em = ExactPosteriorEM(chain)
    em.posterior(*first)
    assert em.posterior(*then).log_evidence == pytest.approx(
        ExactPosteriorEM(chain).posterior(*then).log_evidence, rel=1e-10
    )


def test_point_estimates_beside_a_chain() -> None:
    def chain(loop: Loop, x: Tensor) -> None:
        A = pyro.sample("A", dist.Dirichlet(2 * torch.ones(2, 2, dtype=x.dtype)).to_event(1))
        mu = real("mu", 2)
        z: Any = 0
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    found = []
    for loop in LOOPS.values():
        pyro.clear_param_store()
        em = ExactPosteriorEM(as_model(chain, loop), "map")
        assert STEP_BY_STEP not in notes(em, data(T))
        found.append(em.fit(data(T), max_steps=2, tol=0).elbo)
    assert found[0] == pytest.approx(found[1], rel=1e-10)


def test_scores_of_chains() -> None:
    x = data(T)
    em = ExactPosteriorEM(as_model(models.gaussian, vectorized_markov))
    assert em.score(x) == pytest.approx(em.posterior(x).log_evidence, rel=1e-12)
    y = data(T, seed=1)
    assert em.score(y) == pytest.approx(em.posterior(y).log_evidence, rel=1e-12)


def test_loops_that_cannot_be_told_apart_are_read_step_by_step() -> None:
    def chain(loop: Loop, x: Tensor) -> None:
        A, mu = simplex("A", 2, 2), real("mu", 2)
        for name in "ab":
            z: Any = 0
            for t in loop("time", len(x)):
                z = pyro.sample(f"{name}_{t}", dist.Categorical(A[z]))
                pyro.sample(f"x{name}_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    compare(chain, data(4), vectorised=False)


def test_a_counter_and_random_numbers_are_read_as_a_loop() -> None:
    def drawing(loop: Loop, x: Tensor) -> None:
        A, mu, s = simplex("A", 2, 2), real("mu", 2), positive("s")
        z: Any = 0
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + torch.randn(()), s), obs=x[t])

    em = ExactPosteriorEM(as_model(drawing, vectorized_markov))
    assert STEP_BY_STEP in notes(em, data(T))


def test_a_latent_of_two_steps_before_is_refused_as_in_a_loop() -> None:
    def chain(loop: Loop, x: Tensor) -> None:
        A, mu = simplex("A", 2, 2, 2), real("mu", 2)
        z: Any = torch.tensor(0)
        before: Any = torch.tensor(0)
        for t in loop("time", len(x)):
            now = pyro.sample(f"z_{t}", dist.Categorical(A[before, z]))
            before, z = z, now
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    said = []
    for loop in LOOPS.values():
        pyro.clear_param_store()
        with pytest.raises(PyroEMError, match="history=2") as error:
            ExactPosteriorEM(as_model(chain, loop)).posterior(data(T))
        said.append(str(error.value))
    assert said[0] == said[1]


def test_what_is_wrong_is_said_by_the_names_of_the_loop() -> None:
    x = data(T)
    x[3] = torch.nan
    said = []
    for loop in LOOPS.values():
        pyro.clear_param_store()
        with pytest.raises(PyroEMError) as error:
            ExactPosteriorEM(as_model(models.gaussian, loop)).fit(x)
        said.append(str(error.value))
    assert said[0] == said[1] and "'x_3'" in said[0]


@pytest.mark.parametrize(
    "how", [{"name": ""}, {"size": -1}, {"size": 2.5}, {"dim": 1}, {"history": -1}]
)
def test_wrong_arguments(how: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        vectorized_markov(**{"name": "time", "size": 3, **how})


def test_arguments_that_all_steps_share_are_held_once() -> None:
    """Also those of the first steps, which the run over integers made by themselves."""

    def model(x: Tensor) -> None:
        A = simplex("A", 2, 2)
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        z: Any = 0
        for t in vectorized_markov("t", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    program = ExactPosteriorEM(model)._ready((torch.linspace(0.0, 3.0, 50),), {})
    assert isinstance(program, Program)
    for graph in (program.graph, program.fresh_trace(None, None, False, detached=True)):
        group, _ = graph.group_of("x_7")
        assert group.arguments["loc"].shape[0] == 50
        assert group.arguments["loc"].stride(0) == 0
