"""Where a fit begins, and what a step on other data forgets."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints
from torch.utils.data import DataLoader

from pyro_em import ExactPosteriorEM, Gradient, PyroEMWarning, UsageError

X = torch.tensor([0.0, 1.0, 5.0, 6.5, 0.3, 5.5])
MODEL, STORE = "values in the model", "values in the param store"


def mixture(mu, w, x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def model(x):
    w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    mixture(pyro.param("mu", torch.tensor([0.5, 4.0])), w, x)


def lazy(x):
    w = pyro.param("w", lambda: torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    mixture(pyro.param("mu", lambda: torch.tensor([0.5, 4.0])), w, x)


def random(x):
    mixture(pyro.param("mu", lambda: torch.randn(2)), torch.ones(2) / 2, x)


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.mu = PyroParam(torch.tensor([0.5, 4.0]))
        self.w = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        mixture(self.mu, self.w.softmax(-1), x)


def notes_of(result):
    return [n for n in result.plan.notes if n.startswith("start:")]


@pytest.mark.parametrize("make", [lambda: model, lambda: lazy, lambda: random, Module])
def test_the_first_fit_begins_in_the_model_and_the_second_in_the_store(make):
    em = ExactPosteriorEM(make())
    first = em.fit(X, max_steps=3)
    assert first.start == MODEL and not notes_of(first)
    second = em.fit(X, max_steps=3)
    assert second.start == STORE and not notes_of(second)
    em.reset()
    again = em.fit(X, max_steps=3)
    assert again.start == MODEL and not notes_of(again)
    pyro.clear_param_store()
    assert em.fit(X, max_steps=3).start == MODEL


@pytest.mark.parametrize("make", [lambda: model, lambda: random, Module])
def test_looking_before_the_first_fit_changes_nothing(make):
    em = ExactPosteriorEM(make())
    em.plan(X)
    em.posterior(X)
    assert em.fit(X, max_steps=2).start == MODEL


def test_steps_before_a_fit_count():
    em = ExactPosteriorEM(model)
    em.step(X)
    assert em.fit(X, max_steps=2).start == STORE


@pytest.mark.parametrize("own", [model, lazy])
def test_a_second_object_says_whose_values_it_starts_from(own):
    ExactPosteriorEM(own).fit(X, max_steps=3)
    other = ExactPosteriorEM(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PyroEMWarning)
        result = other.fit(X, max_steps=3)
    assert result.start == STORE
    (note,) = notes_of(result)
    assert "'mu'" in note and "'w'" in note and "clear_param_store" in note
    assert note in str(result.plan)
    again = other.fit(X, max_steps=3)
    assert again.start == STORE and not notes_of(again)  # said once


def test_a_second_object_that_begins_at_the_models_values_has_nothing_to_say():
    ExactPosteriorEM(model).posterior(X)  # makes the parameters, and writes none
    result = ExactPosteriorEM(model).fit(X, max_steps=3)
    assert result.start == MODEL and not notes_of(result)


def test_the_random_state_stays():
    ExactPosteriorEM(random).fit(X, max_steps=2)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    result = ExactPosteriorEM(random).fit(X, max_steps=2, seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert result.start == STORE and notes_of(result)


def test_a_loaded_file_is_nobody_elses(tmp_path):
    em = ExactPosteriorEM(model)
    em.fit(X, max_steps=3)
    em.save(tmp_path / "fit.pt")
    other = ExactPosteriorEM(model)
    other.load(tmp_path / "fit.pt", X)
    result = other.fit(X, max_steps=2)
    assert result.start == STORE and not notes_of(result)


def test_a_start_that_was_asked_for_is_named():
    ExactPosteriorEM(model).fit(X, max_steps=3)
    result = ExactPosteriorEM(model).fit(X, max_steps=3, init="random", seed=0)
    assert result.start == "random" and not notes_of(result)


def test_a_stochastic_fit_says_where_it_begins():
    def pair():
        def own(x):
            with pyro.plate("n", len(x)):
                h = pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
                pyro.sample("x", dist.Normal(h, 1.0), obs=x)

        def guide(x):
            a = pyro.param("a", torch.tensor(0.3))
            with pyro.plate("n", len(x)):
                pyro.sample("h", dist.Normal(a * x, 0.5))

        return ExactPosteriorEM(own, guide, strategy="guide")

    em = pair()
    assert em.fit(X, max_steps=2).start == MODEL
    assert em.fit(X, max_steps=2).start == STORE
    result = pair().fit(X, max_steps=2)
    assert result.start == STORE and len(notes_of(result)) == 1


# ---------------------------------------------------------------- steps on other data


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if "forgotten" in str(w.message)]


def test_steps_on_batches_say_what_they_forget_once():
    em = ExactPosteriorEM(model)

    def batches():
        for _ in range(3):
            for batch in X.split(3):
                em.step(batch)

    (text,) = caught(batches)
    assert "em.fit(all data)" in text
    at = em.posterior(X).log_evidence
    assert ExactPosteriorEM(model).fit(X, tol=1e-9).log_evidence > at


def test_steps_on_a_buffer_that_is_filled_anew_say_it_too():
    em, buffer = ExactPosteriorEM(model), X[:3].clone()

    def batches():
        for batch in X.split(3):
            buffer.copy_(batch)
            em.step(buffer)

    assert len(caught(batches)) == 1


def test_a_step_on_other_data_after_a_fit_says_it():
    em = ExactPosteriorEM(model)
    em.fit(X, max_steps=2)
    assert len(caught(lambda: em.step(X[:4]))) == 1


def test_steps_on_the_same_data_say_nothing():
    em = ExactPosteriorEM(model)
    assert not caught(lambda: [em.step(X) for _ in range(3)])
    assert not caught(lambda: em.step(X.clone()))
    em.reset()
    assert not caught(lambda: em.step(X[:3]))


def test_small_gradient_steps_on_batches_forget_nothing():
    adam = Gradient(lambda p: torch.optim.Adam(p, lr=0.01), 1)
    em = ExactPosteriorEM(model, updates={"*": adam})
    assert not caught(lambda: [em.step(batch) for batch in X.split(3)])


def test_a_step_refuses_a_loader_in_the_words_of_the_model():
    with pytest.raises(UsageError, match="forgets what the batches before it said") as raised:
        ExactPosteriorEM(model).step(DataLoader(X, 3))
    assert "for batch in loader" not in str(raised.value)
    assert "em.fit(data)" in str(raised.value)

    def prior(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.raises(UsageError, match="forgets what the batches"):
        ExactPosteriorEM(prior, "map").step(DataLoader(X, 3))
    with pytest.raises(UsageError, match="for batch in loader"):
        ExactPosteriorEM(prior, pyro.infer.autoguide.AutoNormal, strategy="guide").step(
            DataLoader(X, 3)
        )
