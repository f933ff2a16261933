"""Planning with large data: latents without numbers, and the decisions that they must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints as C
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em import DataError, ExactPosteriorEM, ModelError
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.structure import Structure
from pyro_em.plan.kept import forget_readings
from pyro_em.tracing import runs
from pyro_em.tracing.allocation import (
    NumbersNeeded,
    Overspent,
    Shadows,
    is_shadow,
    spending_at_most,
)
from pyro_em.tracing.freed import keep_freed_memory
from tests.benchmarks.models import mixture

X = torch.cat([torch.randn(30, generator=torch.Generator().manual_seed(3)), torch.ones(10) * 4])
X = X.double()


@contextmanager
def sparing(limit: int = 0, large: int = 1) -> Iterator[None]:
    """Run with shadows as soon as a plain run has allocated ``limit`` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_PLAIN_BYTES", limit - 1)
        patch.setattr("pyro_em.tracing.lean._LARGE", large)
        yield


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and not t.is_meta:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def of_data(x: Tensor) -> float:
    return x.untyped_storage().nbytes()


def test_starts_are_drawn_as_without_shadows() -> None:
    """What the run that was broken off has initialised is forgotten with its random numbers."""

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", lambda: torch.randn(3))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            loc = mu[z]
            b = pyro.param("b", lambda: torch.randn(3))
            pyro.sample("x", dist.Normal(loc + b[z] * x.sin(), 1.0), obs=x)

    pyro.set_rng_seed(0)
    first = torch.randn(3)
    pyro.set_rng_seed(0)
    with sparing(limit=100):
        ExactPosteriorEM(model).plan(X)
    assert torch.equal(pyro.param("mu").detach(), first)
    assert not torch.equal(pyro.param("b"), pyro.param("mu"))


def test_a_constant_made_where_a_latent_is_may_be_kept() -> None:
    kept: dict[str, Tensor] = {}

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            if "zeros" not in kept:
                kept["zeros"] = torch.zeros(100_000, device=z.device)
            pyro.sample("x", dist.Normal(mu[z] + kept["zeros"][0], 1.0), obs=x)

    with sparing():
        ExactPosteriorEM(model).plan(X)
    assert not is_shadow(kept["zeros"])


# ---------------------------------------------------------------- memory


def test_planning_and_fitting_make_no_tensor_much_larger_than_the_data() -> None:
    keep_freed_memory()  # makes one large block, once per process
    x = torch.randn(50_000, 8)
    with sparing(2**24, 256), Largest() as planning:
        ExactPosteriorEM(mixture).plan(x, 16)
    assert planning.bytes <= 3 * of_data(x)
    pyro.clear_param_store()
    with sparing(2**24, 256), Largest() as fitting:
        ExactPosteriorEM(mixture).fit(x, 16, max_steps=2, tol=0)
    assert fitting.bytes <= 3 * of_data(x)
    pyro.clear_param_store()
    forget_readings()  # which know that it is read without numbers
    with Largest() as with_numbers:  # what the bound is about: S[z] is N x D x D
        ExactPosteriorEM(mixture).plan(x, 16)
    assert with_numbers.bytes >= 8 * of_data(x)


def test_a_refusal_of_large_data_needs_no_numbers() -> None:
    x = torch.randn(50_000, 8)
    x[40_000, 3] = torch.nan

    with (
        sparing(2**24, 256),
        Largest() as largest,
        pytest.raises(DataError, match="1 of 400000 observed values are NaN"),
    ):
        ExactPosteriorEM(mixture).plan(x, 16)
    assert largest.bytes <= 3 * of_data(x)


def test_the_budget_itself() -> None:
    A, z = torch.zeros(10, 1000), torch.zeros(1000, dtype=torch.long)
    with spending_at_most(2**23) as _, pytest.raises(Overspent):
        A[z].sum()  # 8,000,000 bytes, and then
        A[z, :].sum()
    with spending_at_most(2**23):
        A[z].sum()
    with spending_at_most(2**26):
        for _ in range(10_000):
            A.T.reshape(1000, 10).add_(1)  # views, and what is written in place, are not counted
    with Largest() as largest, spending_at_most(2**20), pytest.raises(Overspent):
        A[z]
    assert largest.bytes < 2**20  # stopped before it was made


# ---------------------------------------------------------------- the same decisions


def gaussians(x: Tensor) -> None:
    w = pyro.param("w", torch.ones(2) / 2, constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def masked(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x, obs_mask=x > -1)


def partly_labelled(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    labels = (x > 2).long()
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), obs=labels, obs_mask=x > 3)
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def binary_parents(x: Tensor) -> None:
    p = pyro.param("p", torch.tensor([0.3, 0.6]), constraint=C.unit_interval)
    mu = pyro.param("mu", torch.tensor([[0.0, 3.0], [1.0, -2.0]]))
    with pyro.plate("n", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.4)).long()
        b = pyro.sample("b", dist.Bernoulli(p[a])).long()
        pyro.sample("x", dist.Normal(Vindex(mu)[a, b], 1.0), obs=x)


def regressions(x: Tensor) -> None:
    B = pyro.param("B", torch.tensor([[0.0, 1.0], [2.0, -1.0]]))
    X = torch.stack([torch.ones_like(x), x], -1)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal((B[z] * X).sum(-1), 1.0), obs=2 * x)


def chains(x: Tensor) -> None:
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    rows = x.reshape(8, 5)
    z: Any = 0
    with pyro.plate("sequences", 8):
        for t in pyro.markov(range(5)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=rows[:, t])


def nested(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    with pyro.plate("groups", 8, dim=-2):
        g = pyro.sample("g", dist.Categorical(torch.ones(2) / 2))
        with pyro.plate("rows", 5, dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[g]))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x.reshape(8, 5))


def with_a_factor(x: Tensor) -> None:
    b = pyro.param("b", torch.tensor(0.3))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.factor("f", b * z * x.abs())
        pyro.deterministic("twice", 2 * z)


def multivariate(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([[0.0, 1.0], [3.0, 2.0]]))
    S = pyro.param("S", torch.eye(2).repeat(2, 1, 1), constraint=C.positive_definite)
    with pyro.plate("n", 20):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x.reshape(20, 2))


def counts(x: Tensor) -> None:
    p = pyro.param("p", torch.tensor([[0.2, 0.8], [0.7, 0.3]]), constraint=C.simplex)
    y = torch.stack([x.abs().round(), 5 - x.abs().round()], -1).clamp(min=0)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Multinomial(5, p[z]), obs=y)


def scaled(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    nu = pyro.param("nu", torch.tensor([4.0, 8.0]), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        w = pyro.sample("w", dist.Gamma(nu[z] / 2, nu[z] / 2))
        pyro.sample("x", dist.Normal(mu[z], w.rsqrt()), obs=x)


def with_heights(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        h = pyro.sample("h", dist.Normal(mu[z], 1.0))
        pyro.sample("x", dist.Normal(h, 0.5), obs=x)


MODELS = [
    gaussians,
    masked,
    partly_labelled,
    binary_parents,
    regressions,
    chains,
    nested,
    with_a_factor,
    multivariate,
    counts,
]


def looked_at(model: Callable[..., None], spare: bool) -> tuple[Structure, list[Any]]:
    pyro.clear_param_store()
    with sparing():
        return examine(model, (X,), {}, first_look=False, sparing=spare)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_shadows_show_the_same_model(model: Callable[..., None]) -> None:
    seen, problems = looked_at(model, True)
    assert any(is_shadow(s["value"]) for s in seen.unobserved.values())
    plain, plain_problems = looked_at(model, False)
    assert seen.unchecked and not plain.unchecked
    assert problems == plain_problems
    for part in ("plates", "sites", "latents", "barren", "max_plate_nesting", "sequential"):
        assert getattr(seen, part) == getattr(plain, part), part
    assert seen.edges == plain.edges and seen.notes == plain.notes
    shapes = {n: (v.shape, v.dtype) for n, v in seen.kept_values.items()}
    assert shapes == {n: (v.shape, v.dtype) for n, v in plain.kept_values.items()}
    assert not any(v.is_meta for v in seen.kept_values.values())


@pytest.mark.parametrize("model", [*MODELS, scaled, with_heights], ids=lambda m: m.__name__)
def test_shadows_change_no_bit_of_a_fit(model: Callable[..., None]) -> None:
    plain = ExactPosteriorEM(model)
    expected = plain.fit(X, max_steps=4, tol=0)
    text = str(expected.plan)
    pyro.clear_param_store()
    with sparing():
        found = ExactPosteriorEM(model).fit(X, max_steps=4, tol=0)
    assert str(found.plan) == text
    assert found.log_evidence == expected.log_evidence
    for name, value in expected.params.items():
        assert torch.equal(found.params[name], value)


def test_parameters_are_drawn_as_without_shadows() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.randn(2))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            s = pyro.param("s", lambda: torch.rand(2) + 1, constraint=C.positive)
            pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)

    pyro.set_rng_seed(5)
    expected, then = torch.randn(2), torch.rand(2) + 1
    pyro.set_rng_seed(5)
    with sparing():
        ExactPosteriorEM(model).plan(X)
    assert torch.equal(pyro.param("mu"), expected)
    assert torch.allclose(pyro.param("s"), then)  # nothing is drawn for z, and mu drawn once


# ---------------------------------------------------------------- models that read numbers


def test_a_model_that_reads_its_latents_runs_with_numbers() -> None:
    seen: list[Any] = []

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.randn(2))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            seen.append(int(z.sum()))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    pyro.set_rng_seed(7)
    plain, _ = examine(model, (X,), {})
    with_numbers, value = seen[0], pyro.param("mu").clone()
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    seen.clear()
    with sparing():
        found, problems = examine(model, (X,), {}, sparing=True)
    assert not problems and not found.unchecked
    assert found.sites == plain.sites
    assert seen[0] == with_numbers and torch.equal(pyro.param("mu"), value)


def test_a_model_that_writes_latents_into_its_own_tensor_runs_with_numbers() -> None:
    def model(x: Tensor) -> None:
        mu, loc = pyro.param("mu", torch.tensor([0.0, 3.0])), torch.zeros(len(x))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            if z.shape == x.shape:
                loc[:] = mu.detach()[z]
            pyro.sample("x", dist.Normal(mu[z] + 0 * loc, 1.0), obs=x)

    with sparing():
        found, _ = examine(model, (X,), {}, sparing=True)
    assert not found.unchecked


def test_a_parameter_that_begins_at_a_latent_gets_numbers() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            q = pyro.param("q", lambda: torch.zeros(2) + 0 * z.sum())
            pyro.sample("x", dist.Normal(q[z], 1.0), obs=x)

    with sparing():
        ExactPosteriorEM(model).plan(X)
    assert pyro.param("q").tolist() == [0.0, 0.0]


def test_what_a_model_keeps_on_a_latent_s_device_has_numbers() -> None:
    kept: list[Tensor] = []

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            if not kept:
                kept.append(torch.eye(2, device=z.device))
            pyro.sample("x", dist.Normal((kept[0][z] * mu).sum(-1), 1.0), obs=x)

    with sparing():
        structure, _ = examine(model, (X,), {}, sparing=True)
    assert structure.unchecked and torch.equal(kept[0], torch.eye(2))


def test_a_model_that_keeps_what_it_made_of_a_latent_gets_a_sentence() -> None:
    kept: list[Tensor] = []

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            if not kept:
                kept.append(mu.detach()[z])
            pyro.sample("x", dist.Normal(mu[z], kept[0] + 1), obs=x)

    with sparing(), pytest.raises(ModelError, match="keeps a tensor that it made of a latent"):
        ExactPosteriorEM(model).plan(X)


def test_a_model_that_catches_exceptions_does_not_catch_the_budget() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            try:
                loc = mu[z]
            except Exception:
                loc = x
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with sparing():
        found, _ = examine(model, (X,), {}, sparing=True)
    assert found.unchecked and ("z", "x") in found.edges


# ---------------------------------------------------------------- what validation would have said


def test_arguments_outside_their_constraint_are_refused_in_the_same_words() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(0.0, torch.tensor([-1.0, -2.0])[z]), obs=x)

    text = "running it plainly fails with ValueError: Expected parameter scale"
    with pytest.raises(ModelError, match=text):
        ExactPosteriorEM(model).plan(X)
    with sparing(), pytest.raises(ModelError, match=text):
        ExactPosteriorEM(model).plan(X)


@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_support_that_depends_on_a_latent_refuses_nothing(limit: int) -> None:
    def model(x: Tensor) -> None:
        low = torch.tensor([-9.0, 0.0])
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.25, 0.75])))
            pyro.sample("x", dist.Uniform(low[z], low[z] + 9), obs=x)

    with sparing(limit):
        result = ExactPosteriorEM(model).posterior(X)
        with pytest.raises(DataError, match="impossible under the model"):
            ExactPosteriorEM(model).posterior(X + 100)
    by_hand = torch.where(X < 0, 0.25 / 9, 0.75 / 9).log().sum()
    assert result.log_evidence == pytest.approx(float(by_hand))


# ---------------------------------------------------------------- what torch has to keep


@pytest.mark.parametrize(
    "read",
    [
        lambda z: z.sum().item(),
        lambda z: bool((z > 0).any()),
        lambda z: float(z[0]),
        lambda z: z.tolist(),
        lambda z: z.numpy(),
        lambda z: z.nonzero(),
        lambda z: torch.zeros(5)[z == 0],
        lambda z: z.unique(),
        lambda z: torch.equal(z, z + 1),
        lambda z: torch.zeros(5).index_add_(0, z, torch.ones(5)),
        lambda z: [1, 2][z[0]],
    ],
)
def test_a_shadow_is_never_read_as_a_number(read: Callable[[Tensor], Any]) -> None:
    z = torch.empty(5, dtype=torch.long, device="meta")
    with pytest.raises(NumbersNeeded), Shadows():
        read(z)


def test_shadows_and_tensors_meet_in_shadows() -> None:
    z, A = torch.empty(5, dtype=torch.long, device="meta"), torch.rand(3, 2, requires_grad=True)
    with Shadows():
        rows = A[z]
        assert rows.shape == (5, 2) and rows.requires_grad
        for t in (rows + torch.ones(2), rows @ A.T, rows.to("cpu"), torch.where(z > 0, A[0, 0], 1)):
            assert t.is_meta
        assert not (A + 1).is_meta


def test_a_compiled_function_inside_a_model_stays_compiled() -> None:
    double = torch.compile(lambda t: 2 * t, backend="eager")

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(double(mu)[z], 1.0), obs=x)

    assert "mu" in ExactPosteriorEM(model).plan(X).updates


def test_a_form_that_was_seen_needs_no_more_memory_on_other_data() -> None:
    """How many rows are chosen depends on the data: the run that starts parameters is watched too."""

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", lambda: torch.rand(2, 8))
        chosen = x[x[:, 0] > 0]
        with pyro.plate("rows", len(chosen)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=chosen)

    few, many = torch.ones(3000, 8), torch.ones(3000, 8)
    few[300:, 0] = -1.0
    how: dict[str, Any] = {"keep_random_state": False, "shadowed": False, "validated": False}
    with sparing(limit=2**17):
        pyro.clear_param_store()
        runs.first_run_again(model, (few,), {}, **how)
        assert "mu" in pyro.get_param_store()
        pyro.clear_param_store()
        before = torch.get_rng_state()
        with pytest.raises(NumbersNeeded):
            runs.first_run_again(model, (many,), {}, **how)
    assert not dict(pyro.get_param_store()) and torch.equal(torch.get_rng_state(), before)
