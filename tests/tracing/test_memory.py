"""Whose memory it is: a fit writes its parameters and nothing that the user holds."""

import math
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, TraceExact_ELBO, compare
from pyro_em.tracing.memory import settle

DATA = [0.0, 1.0, 5.0]


def mixture(mu, x):
    k = len(mu)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(k) / k))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def evidence_by_hand(mu, x):
    """The log evidence of the mixture, term by term."""
    total = 0.0
    for v in x:
        parts = [math.exp(-0.5 * (v - m) ** 2) / math.sqrt(2 * math.pi) for m in mu]
        total += math.log(sum(parts) / len(mu))
    return total


def with_param(start):
    def build(x):
        begin = start(x)
        return lambda x: mixture(pyro.param("mu", begin), x), None

    return build


def in_module(start):
    def build(x):
        class Mixture(PyroModule):
            def __init__(self):
                super().__init__()
                self.mu = start(x)

            def forward(self, x):
                mixture(self.mu, x)

        return Mixture(), None

    return build


def lazily_declared(x):
    class Mixture(PyroModule):
        def forward(self, x_):
            self.mu = PyroParam(x[:2])
            mixture(self.mu, x_)

    return Mixture(), None


def decorated(x):
    class Mixture(PyroModule):
        @PyroParam
        def mu(self):
            return x[:2]

        def forward(self, x_):
            mixture(self.mu, x_)

    return Mixture(), None


def two_from_one(x):
    def model(x_):
        a, b = pyro.param("a", x[:1]), pyro.param("b", x[:1])
        mixture(torch.cat([a, b + 0.5]), x_)

    return model, None


def constrained(x):
    real = constraints.independent(constraints.real, 1)
    return lambda x_: mixture(pyro.param("mu", x[1:], constraint=real), x_), None


def with_prior(x_):
    with pyro.plate("k", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    mixture(mu, x_)


def at_values(x):
    how = {"init_loc_fn": init_to_value(values={"mu": x[:2]})}
    return with_prior, AutoDelta(poutine.block(with_prior, hide=["z"]), **how)


def at_values_by_factory(x):
    return with_prior, lambda model: AutoDelta(
        model, init_loc_fn=init_to_value(values={"mu": x[:2]})
    )


def in_a_guide(x):
    def guide(x_):
        with pyro.plate("k", 2):
            pyro.sample("mu", dist.Delta(pyro.param("m", x[:2])))

    return with_prior, guide


def run_before_by_pyro(x):
    def model(x_):
        mixture(pyro.param("mu", x), x_)

    model(x)  # plain Pyro makes the very tensor of the data its parameter
    x.requires_grad_(False)
    return model, None


def seen_before_by_pyro(x):
    def model(x_):
        mixture(pyro.param("mu", x[:2]), x_)

    model(x)
    return model, None


SPELLINGS = {
    "the data": with_param(lambda x: x),
    "a view": with_param(lambda x: x[:2]),
    "a lazy view": with_param(lambda x: lambda: x[:2]),
    "numpy memory": with_param(lambda x: torch.from_numpy(x.numpy())),
    "a part of numpy memory": with_param(lambda x: torch.from_numpy(x.numpy()[1:])),
    "an expanded view": with_param(lambda x: x[1:2].expand(2)),
    "a transposed view": with_param(lambda x: x[:2].reshape(1, 2).T.reshape(2)),
    "a Parameter in pyro.param": with_param(lambda x: torch.nn.Parameter(x[:2])),
    "an identity transform": constrained,
    "two from one": two_from_one,
    "a PyroParam": in_module(lambda x: PyroParam(x[:2])),
    "a lazy PyroParam": in_module(lambda x: PyroParam(lambda: x[:2])),
    "an nn.Parameter": in_module(lambda x: torch.nn.Parameter(x[:2])),
    "an nn.Parameter of all": in_module(torch.nn.Parameter),
    "a PyroParam in forward": lazily_declared,
    "a decorated PyroParam": decorated,
    "values of an AutoDelta": at_values,
    "values of a factory's AutoDelta": at_values_by_factory,
    "a guide": in_a_guide,
    "the data, seen by Pyro": run_before_by_pyro,
    "a view, seen by Pyro": seen_before_by_pyro,
}


@pytest.mark.filterwarnings("ignore::pyro_em.PyroEMWarning")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_fit_leaves_the_data_and_begins_again_where_the_model_says(spelling):
    x = torch.tensor(DATA)
    model, guide = SPELLINGS[spelling](x)
    em = ExactPosteriorEM(model, guide)
    first = em.fit(x, max_steps=20, tol=0)
    assert x.tolist() == DATA
    assert not x.requires_grad
    got = first.params.get("mu")
    if guide is None and got is not None:
        assert first.log_evidence == pytest.approx(evidence_by_hand(got.tolist(), DATA), abs=1e-5)
    em.reset()
    again = em.fit(x, max_steps=20, tol=0)
    assert x.tolist() == DATA
    assert again.history[0] == first.history[0]
    em.step(x)
    for _ in zip(range(2), em.steps(x), strict=False):
        pass
    assert x.tolist() == DATA


def test_the_evidence_is_of_the_data_as_they_were():
    x = torch.tensor(DATA)
    result = ExactPosteriorEM(lambda x: mixture(pyro.param("mu", x), x)).fit(x)
    assert result.log_evidence == pytest.approx(-4.91609, abs=1e-4)


def test_another_object_begins_where_the_model_says():
    x, start = torch.tensor(DATA), torch.tensor([0.3, 4.0])

    def model(x):
        mixture(pyro.param("mu", start), x)

    first = ExactPosteriorEM(model).fit(x)
    assert start.tolist() == torch.tensor([0.3, 4.0]).tolist()
    pyro.clear_param_store()
    assert ExactPosteriorEM(model).fit(x).history[0] == first.history[0]


def test_stochastic_steps_leave_the_data():
    x = torch.tensor(DATA)

    def guide(x_):
        scale = pyro.param("s", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("k", 2):
            pyro.sample("mu", dist.Normal(pyro.param("m", x[:2]), scale))

    em = ExactPosteriorEM(with_prior, guide)
    em.fit(x, max_steps=3)
    em.step(x)
    assert x.tolist() == DATA
    result = em.fit(x, max_steps=2)
    mean = result.posterior.mean("mu")
    before = pyro.param("m").detach().clone()
    mean.add_(100.0)
    assert torch.equal(pyro.param("m"), before)


@pytest.mark.parametrize("start", [lambda x: x, lambda x: x[:2]], ids=["all", "view"])
def test_the_loss_for_svi_leaves_the_data(start):
    x = torch.tensor(DATA)

    def model(x_):
        mixture(pyro.param("mu", start(x)), x_)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), TraceExact_ELBO())
    for _ in range(2):  # the second time with the routes that are known already
        pyro.clear_param_store()
        for _ in range(3):
            svi.step(x)
        assert x.tolist() == DATA
        assert pyro.param("mu").tolist() != start(x).tolist()


def test_a_comparison_leaves_the_data():
    x = torch.tensor(DATA)

    def model(x_):
        mixture(pyro.param("mu", x), x_)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), TraceExact_ELBO())
    compare({"EM": ExactPosteriorEM(model), "SVI": svi}, x, max_steps=5, svi_steps=3)
    assert x.tolist() == DATA
    assert not x.requires_grad


def test_loaded_parameters_leave_the_data(tmp_path):
    x = torch.tensor(DATA)

    def model(x_):
        mixture(pyro.param("mu", x), x_)

    em = ExactPosteriorEM(model)
    em.fit(x, max_steps=3)
    em.save(tmp_path / "fit.pt")
    pyro.clear_param_store()
    ExactPosteriorEM(model).load(tmp_path / "fit.pt", x)
    assert x.tolist() == DATA
    assert pyro.param("mu").tolist() != DATA


def test_a_parameter_that_is_given_the_datas_memory_later_leaves_it():
    x = torch.tensor(DATA)
    em = ExactPosteriorEM(lambda x: mixture(pyro.param("mu", torch.tensor([0.0, 3.0])), x))
    em.fit(x, max_steps=2)
    pyro.param("mu").unconstrained().data = x[:2]
    em.fit(x, max_steps=2)
    assert x.tolist() == DATA

    module, _ = SPELLINGS["a PyroParam"](x)
    em = ExactPosteriorEM(module)
    em.fit(x, max_steps=2)
    module.mu = x[1:]
    em.fit(x, max_steps=2)
    assert x.tolist() == DATA


def test_module_parameters_stay_the_same_objects():
    x = torch.tensor(DATA)
    model, _ = SPELLINGS["an nn.Parameter"](x)
    leaf = model.mu
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ExactPosteriorEM(model).fit(x, max_steps=3)
    assert model.mu is leaf
    assert dict(model.named_parameters())["mu"] is leaf
    before = leaf.detach().clone()
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    assert torch.allclose(leaf, before - 0.5)
    assert torch.equal(model.state_dict()["mu"], leaf.detach())


def test_parameters_that_share_out_memory_move_together():
    flat = torch.arange(6.0)
    a, b = torch.nn.Parameter(flat[:2]), torch.nn.Parameter(flat[2:].reshape(2, 2))
    settle([b, a])
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert a.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()
    assert (a.tolist(), b.tolist()) == ([0.0, 1.0], [[2.0, 3.0], [4.0, 5.0]])
    where = a.data_ptr()
    settle([a, b])
    assert a.data_ptr() == where
    with torch.no_grad():
        a.zero_()
    assert flat.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_recurrent_network_in_the_guide_goes_on_working():
    network = torch.nn.LSTM(1, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x = torch.tensor(DATA)

    def guide(x):
        pyro.module("network", network)
        loc = network(x.reshape(-1, 1, 1))[0].sum((-1, -2))
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(loc, 1.0))

    def model(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    before = [p.detach().clone() for p in network.parameters()]
    ExactPosteriorEM(model, guide, strategy="guide").fit(x, max_steps=2)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters()}
    moved = [not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True)]
    assert any(moved)
    expected = network(x.reshape(-1, 1, 1))[0]
    again = torch.nn.LSTM(1, 2)
    again.load_state_dict(network.state_dict())
    assert torch.allclose(again(x.reshape(-1, 1, 1))[0], expected)


def test_what_is_handed_out_is_not_live():
    x = torch.tensor(DATA)
    em = ExactPosteriorEM(lambda x: mixture(pyro.param("mu", torch.tensor([0.0, 3.0])), x))
    result = em.fit(x)
    mu, probs = pyro.param("mu").detach().clone(), result.posterior.probs("z").clone()
    result.params["mu"].zero_()
    result.posterior.probs("z").zero_()
    em.posterior(x).probs("z").zero_()
    next(em.steps(x)).params["mu"].zero_()
    assert torch.allclose(pyro.param("mu"), mu, atol=1e-2)
    assert torch.equal(result.posterior.probs("z"), probs)


def test_a_posterior_keeps_what_was_observed():
    y = torch.tensor([0.0, 1.0, 1.0, 0.0])

    def model(x, y, seen):
        p = pyro.param("p", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(p), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)

    for seen in (torch.ones(4, dtype=torch.bool), torch.tensor([True, True, False, True])):
        labels = y.long()
        q = ExactPosteriorEM(model).posterior(torch.zeros(4), labels, seen)
        before = q.probs("z").clone()
        labels.copy_(1 - labels)
        seen.fill_(False)
        assert torch.equal(q.probs("z"), before)


def test_numpy_data_are_left_alone():
    array = np.array(DATA, dtype=np.float32)
    x = torch.from_numpy(array)
    em = ExactPosteriorEM(lambda x: mixture(pyro.param("mu", x), x))
    em.fit(x, max_steps=3)
    assert array.tolist() == DATA


def test_a_drawn_guide_built_from_values_leaves_them():
    x = torch.tensor(DATA)
    start = init_to_value(values={"mu": x[:2]})
    em = ExactPosteriorEM(with_prior, lambda model: AutoNormal(model, init_loc_fn=start))
    em.fit(x, max_steps=3)
    assert x.tolist() == DATA


def test_a_run_begins_when_the_sites_of_the_run_before_are_let_go():
    """Of a long chain each run has some KiB a step."""
    made, alive = [], []

    def model(x):
        alive.append(sum(fn() is not None for fn in made))
        mu, z = pyro.param("mu", torch.tensor([0.0, 3.0])), 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[z]))
            fn = dist.Normal(mu[z], 1.0)
            made.append(weakref.ref(fn))
            pyro.sample(f"x_{t}", fn, obs=x[t])

    ExactPosteriorEM(model).plan(torch.linspace(0, 3, 9))
    assert alive == [0, 9, 9, 0]  # plain, tagged, enumerated, at other parameters


def test_parameters_that_take_the_place_of_others_get_memory_of_their_own():
    x = torch.zeros(3)
    for _ in range(50):  # Python gives the identity of the one that is gone to the next
        p = torch.nn.Parameter(x[:2])
        settle([p])
        at = p.data_ptr()
        settle([p])
        assert p.data_ptr() == at
        with torch.no_grad():
            p.add_(1.0)
        assert not x.any()
        p.data = x[:2]  # somebody gives it other memory
        settle([p])
        assert p.data_ptr() != x.data_ptr()
        del p
