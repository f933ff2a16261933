"""What users hold always pickles and deep-copies: numbers travel, links to the model do not."""

from __future__ import annotations

import copy
import functools
import itertools
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_em
from pyro_em import (
    Annealed,
    ExactPosteriorEM,
    Family,
    Fixed,
    Gradient,
    Hard,
    Kind,
    MonteCarlo,
    PyroEMError,
    Rule,
    UsageError,
    compare,
    register_family,
)
from pyro_em.families import registry as families
from pyro_em.families.family import BUILT_IN
from pyro_em.families.registry import family_of

X = torch.tensor([-1.3, 0.2, 0.4, 1.9, 2.2, -0.7], dtype=torch.float64)
WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "deepcopy": copy.deepcopy,
    "twice": lambda v: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(v)))),
}


def mixture(x):
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    log_scale = pyro.param("log_scale", torch.tensor([0.0, 0.1]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], log_scale[z].exp()), obs=x)


def power(x):
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(0.5, rate[z] ** (1 / 3)), obs=x)


def regression(x):
    a, b = (pyro.param(n, torch.tensor([-1.0, 1.0])) for n in "ab")
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(a[z] + b[z] * torch.arange(6.0), 1.0), obs=x)


def opaque(x):
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(loc[z].sin(), 1.0), obs=x)


def chain(x):
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])


def masked(x):
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    seen = torch.arange(len(x)) < 2
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w), obs=torch.ones(len(x)), obs_mask=seen)
        pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x)


def with_prior(x):
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def normal(x):
    a = pyro.param("a", torch.tensor(0.3))
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(h + a * z, 1.0), obs=x)


def normal_guide(x):
    m = pyro.param("m", torch.tensor(0.0))
    pyro.sample("h", dist.Normal(m, 1.0))


class Module(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(self.loc[z], 1.0), obs=x)


FITS: dict[str, Callable[[], ExactPosteriorEM]] = {
    "compiled": lambda: ExactPosteriorEM(mixture),
    "power": lambda: ExactPosteriorEM(power),
    "affine": lambda: ExactPosteriorEM(regression),
    "opaque": lambda: ExactPosteriorEM(opaque),
    "chain": lambda: ExactPosteriorEM(chain),
    "obs_mask": lambda: ExactPosteriorEM(masked),
    "map": lambda: ExactPosteriorEM(with_prior, "map"),
    "closure": lambda: ExactPosteriorEM(lambda x: mixture(x)),
    "module": lambda: ExactPosteriorEM(Module()),
    "optimiser": lambda: ExactPosteriorEM(
        mixture, updates={"loc": Gradient(lambda p: torch.optim.SGD(p, lr=0.01), steps=1)}
    ),
    "fixed": lambda: ExactPosteriorEM(mixture, updates={"w": Fixed()}),
    "hard": lambda: ExactPosteriorEM(mixture, strategy=Hard()),
    "annealed": lambda: ExactPosteriorEM(mixture, strategy=Annealed(lambda step: 1.0)),
    "Monte Carlo": lambda: ExactPosteriorEM(mixture, strategy=MonteCarlo(2)),
    "stochastic": lambda: ExactPosteriorEM(normal, normal_guide),
    "autoguide": lambda: ExactPosteriorEM(normal, AutoNormal),
}
NO_MODEL = {"opaque", "optimiser"}


def fit(em: ExactPosteriorEM, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return em.fit(X, **{"max_steps": 3, "tol": 0, "progress": False, **how})


def same(a: Any, b: Any) -> None:
    """Equal, tensors to the bit, and no memory in common."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b) or bool((torch.isnan(a) == torch.isnan(b)).all())
        assert a is not b
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            same(a[name], b[name])
    else:
        assert a == b or (a != a and b != b)


@pytest.mark.parametrize("name", FITS)
def test_results(name: str) -> None:
    em = FITS[name]()
    result = fit(em)
    for way in WAYS:
        check_copy(result, name, way)
    assert torch.isfinite(torch.tensor(em.evaluate_loss(X)))  # the original goes on
    em.step(X)


def check_copy(result: Any, name: str, way: str) -> None:
    """Hold a copy of a result against it."""
    copied = WAYS[way](result)
    same(dict(result.params), dict(copied.params))
    assert str(copied) == str(result) and str(copied.plan) == str(result.plan)
    assert list(copied.history) == list(result.history)
    assert copied.history.after_m_step == result.history.after_m_step
    assert copied.status is result.status
    if name in ("stochastic", "autoguide"):
        assert "DrawnPosterior" in repr(copied.posterior)
        if way == "deepcopy":
            assert copied.posterior.sample(2)["h"].shape == (2,)
        else:
            for call in (copied.posterior.sample, copied.posterior.mode, copied.posterior.entropy):
                with pytest.raises(UsageError, match=r"^a pickled copy: .* model"):
                    call()
        with pytest.raises(UsageError, match="standard_errors"):
            copied.standard_errors()
    else:
        q, p = result.posterior, copied.posterior
        assert repr(p) == repr(q) and p.entropy() == q.entropy() and copied.icl == result.icl
        same(q.mode(), p.mode())
        same(q.sample(3, seed=1), p.sample(3, seed=1))
        for site in q.graph.latents:
            same(q.probs(site), p.probs(site))
        if way != "deepcopy" and not result.plan.compiled:
            with pytest.raises(UsageError, match="a pickled copy of a result, without its model"):
                copied.standard_errors()
        else:
            errors, again = result.standard_errors(), copied.standard_errors()
            same(dict(errors), dict(again))
            same(errors.covariance, again.covariance)
    shown, again = (str(r.summary(standard_errors=False)) for r in (result, copied))
    assert shown == again


def test_a_shallow_copy_is_the_same_but_another_object() -> None:
    em = ExactPosteriorEM(lambda x: opaque(x), updates={"loc": Gradient(torch.optim.SGD)})
    assert copy.copy(em).model is em.model
    result = fit(ExactPosteriorEM(lambda x: opaque(x)))
    copied = copy.copy(result)
    assert copied is not result and copied.posterior is result.posterior
    same(dict(copied.standard_errors()), dict(result.standard_errors()))


def test_a_copy_does_not_move_with_the_original() -> None:
    em = ExactPosteriorEM(mixture, updates={"w": Fixed(), "log_scale": Fixed()})
    result = fit(em, max_steps=1)
    copied = pickle.loads(pickle.dumps(result))
    before = {n: v.clone() for n, v in copied.params.items()}
    errors = copied.standard_errors()["loc"].clone()
    fit(em, max_steps=20)
    same({"loc": copied.standard_errors()["loc"]}, {"loc": errors})
    pyro.clear_param_store()
    assert all(torch.equal(copied.params[n], v) for n, v in before.items())
    assert bool((copied.standard_errors()["loc"] == errors).all()) and bool((errors > 0).all())
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("name", FITS)
def test_plans_bounds_posteriors_and_steps(name: str) -> None:
    em, steps = FITS[name](), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, terms = em.plan(X), em.elbo(X)
        for copied in WAYS.values():
            assert str(copied(plan)) == str(plan)
            assert str(copied(terms)) == str(terms)
            if terms.pointwise is not None:
                same(terms.pointwise, copied(terms).pointwise)
        fit(em, max_steps=2, callbacks=[steps.append])
        steps += itertools.islice(em.steps(X), 2)
    for step, copied in itertools.product(steps, WAYS.values()):
        twin = copied(step)
        same(dict(step.params), dict(twin.params))
        assert (twin.index, twin.elbo) == (step.index, step.elbo)
        if step.posterior is not None:
            same(step.posterior.cells[0], twin.posterior.cells[0])


def test_a_plan_of_a_latent_without_a_route() -> None:
    plan = ExactPosteriorEM(normal).plan(X)
    for way in WAYS.values():
        assert str(way(plan)) == str(plan) and "none" in str(plan)


@pytest.mark.parametrize("way", WAYS)
def test_estimates_comparisons_and_errors(way: str) -> None:
    copied = WAYS[way]
    em = ExactPosteriorEM(mixture)
    fit(em, max_steps=30)
    estimate = em.estimate_evidence(X, num_particles=30, proposal="prior")
    assert str(copied(estimate)) == str(estimate)
    same(estimate.log_weights, copied(estimate).log_weights)
    errors = fit(em).standard_errors()
    same(dict(errors), dict(copied(errors)))
    found = compare({"EM": em}, X, max_steps=3, progress=False)
    assert str(copied(found)) == str(found)
    assert copied(found)["EM"].final_evidence == found["EM"].final_evidence


def test_a_result_whose_data_were_changed_pickles_and_says_so() -> None:
    x = X.clone()
    result = ExactPosteriorEM(mixture).fit(x, max_steps=2, tol=0, progress=False)
    x += 1
    copied = pickle.loads(pickle.dumps(result))
    assert torch.equal(copied.params["loc"], result.params["loc"])
    for ask in (lambda r: r.posterior, lambda r: r.standard_errors()):
        with pytest.raises(UsageError, match=r"the data, .* were changed"):
            ask(copied)


def test_only_numbers_that_are_needed_travel() -> None:
    """Neither the rest of a larger tensor nor the model's data as arguments."""
    big = torch.randn(200_000)
    result = ExactPosteriorEM(mixture).fit(big[:6], max_steps=2, tol=0, progress=False)
    assert len(pickle.dumps(result)) < 100_000
    drawn = ExactPosteriorEM(normal, normal_guide).fit(big, max_steps=2, progress=False)
    assert len(pickle.dumps(drawn)) < 100_000


# ------------------------------------------------------------------ process pools


def in_worker(seed: int) -> Any:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    local = torch.tensor(1.0)

    def model(x):
        mixture(x * local)

    return fit(ExactPosteriorEM(model), init="random", seed=seed)


def of_em(em: ExactPosteriorEM) -> float:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    return em.evaluate_loss(X)


def test_a_process_pool_returns_results() -> None:
    fork = multiprocessing.get_context("fork")
    fitted = ExactPosteriorEM(mixture)
    fit(fitted)
    with ProcessPoolExecutor(2, mp_context=fork) as pool:
        results = list(pool.map(in_worker, range(3)))
        loss = pool.submit(of_em, fitted).result(60)
    assert loss == fitted.evaluate_loss(X)
    for seed, result in enumerate(results):
        here = in_worker(seed)
        assert result.log_evidence == here.log_evidence
        same(here.posterior.probs("z"), result.posterior.probs("z"))
        same(dict(here.standard_errors()), dict(result.standard_errors()))


def test_errors_cross_processes() -> None:
    with pytest.raises(PyroEMError) as error:
        ExactPosteriorEM(mixture).fit(torch.tensor([torch.nan, 1.0]))
    copied = pickle.loads(pickle.dumps(error.value))
    assert str(copied) == str(error.value) and type(copied) is type(error.value)
    assert copied.problems == error.value.problems


# ------------------------------------------------------------------ the object itself


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExactPosteriorEM(mixture, strategy=Hard(), updates={"w": Fixed()}),
        lambda: ExactPosteriorEM(functools.partial(mixture)),
        lambda: ExactPosteriorEM(Module()),
        lambda: ExactPosteriorEM(normal, AutoNormal),
        lambda: ExactPosteriorEM(normal, normal_guide, pyro.optim.Adam({"lr": 0.1})),
        lambda: ExactPosteriorEM(with_prior, "map"),
    ],
)
def test_an_em_pickles_with_what_was_fitted(make: Callable[[], ExactPosteriorEM]) -> None:
    em = make()
    before = pickle.loads(pickle.dumps(em))  # before it has been run
    fit(em, max_steps=3)
    content = pickle.dumps(em)
    torch.manual_seed(1)
    loss = em.evaluate_loss(X)
    pyro.clear_param_store()
    again = pickle.loads(content)
    again.plan(X)
    torch.manual_seed(1)
    assert again.evaluate_loss(X) == pytest.approx(loss, rel=1e-12)
    assert fit(again, max_steps=1).total_steps == 4
    pyro.clear_param_store()
    assert fit(before, max_steps=1).total_steps == 1


def test_a_deep_copy_of_an_em() -> None:
    em = ExactPosteriorEM(lambda x: mixture(x), updates={"w": Fixed()})
    fit(em, max_steps=3)
    twin = copy.deepcopy(em)
    assert twin.evaluate_loss(X) == em.evaluate_loss(X)
    pyro.clear_param_store()
    em = ExactPosteriorEM(Module())
    twin = copy.deepcopy(em)
    fit(em, max_steps=3)
    assert twin.model.loc.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExactPosteriorEM(lambda x: mixture(x)), r"its model '.*<lambda>' does not"),
        (lambda: ExactPosteriorEM(normal, lambda x: normal_guide(x)), r"its guide '.*<lambda>'"),
        (
            lambda: ExactPosteriorEM(mixture, None, lambda p: torch.optim.Adam(p)),
            r"its optim '.*<lambda>'",
        ),
        (lambda: ExactPosteriorEM(mixture, strategy=Annealed(lambda t: 1.0)), "its strategy"),
    ],
)
def test_what_does_not_pickle_is_named(make: Callable[[], ExactPosteriorEM], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pickle.dumps(make())


# ------------------------------------------------------------------ families


def test_built_in_records_stay_themselves() -> None:
    for family in BUILT_IN.values():
        for way in WAYS.values():
            assert way(family) is family


def test_a_record_of_the_users_own_lets_results_travel(monkeypatch) -> None:
    monkeypatch.setattr(families, "REGISTRY", dict(families.REGISTRY))
    family = register_family(
        Family(
            dist.Gumbel,
            statistics=lambda x, a: {"exp": (-x / a["scale"]).exp()},
            constants=("scale",),
            rules={"loc": Rule(Kind.MEAN, lambda s, a: (s["exp"], s["weight"]))},
        )
    )
    assert family_of(dist.Gumbel(0.0, 1.0)) is family

    def model(x):
        loc = pyro.param("loc", torch.tensor([0.0, 1.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Gumbel(loc[z], 1.0), obs=x)

    q = ExactPosteriorEM(model).posterior(X)
    for way in WAYS.values():
        same(q.probs("z"), way(q).probs("z"))
        same(q.sample(2, seed=0), way(q).sample(2, seed=0))


def test_every_public_value_is_covered() -> None:
    """A new kind of result is to be added to these tests."""
    values = {"Comparison", "DrawnPosterior", "ELBOTerms", "EMResult", "EMStep", "EvidenceEstimate"}
    values |= {"History", "Plan", "Posterior", "StandardErrors"}
    assert values <= set(pyro_em.__all__)
