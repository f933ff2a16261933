"""A network that nobody registers is never trained: plan and fit say so, and name it."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule

from pyro_em import ExactPosteriorEM, PyroEMWarning, UsageError

X = torch.tensor([-1.0, 0.4, 2.0, 0.1], dtype=torch.float64)
WHAT = r"site 'x': it depends on 2 tensors \('net.weight' of shape \(1, 1\), 'net.bias'"


@pytest.fixture(autouse=True)
def new_store():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def mixture(x, shift):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(mu[z] + shift, 1.0), obs=x)


def with_net(registered=False):
    net = torch.nn.Linear(1, 1)

    def model(x):
        if registered:
            pyro.module("net", net)
        mixture(x, net(x.new_ones(len(x), 1)).squeeze(-1))

    return model, net


def found(notes):
    return [n for n in notes if "no parameter" in n]


def test_a_network_without_pyro_module_is_named_by_plan_and_fit():
    model, _ = with_net()
    plan = ExactPosteriorEM(model).plan(X)
    assert list(plan.updates) == ["mu"]
    (note,) = found(plan.notes)
    assert "pyro.module(name, net)" in note and "requires_grad_(False)" in note
    with pytest.warns(PyroEMWarning, match=WHAT):
        ExactPosteriorEM(model).fit(X, max_steps=2)


@pytest.mark.parametrize("how", ["module", "frozen", "PyroModule"])
def test_registered_and_frozen_networks_are_no_finding(how):
    model, net = with_net(how == "module")
    if how == "frozen":
        net.requires_grad_(False)
    if how == "PyroModule":

        class Net(PyroModule):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(1, 1)

            def forward(self, x):
                mixture(x, self.net(x.new_ones(len(x), 1)).squeeze(-1))

        model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not found(ExactPosteriorEM(model).plan(X).notes)
        ExactPosteriorEM(model).fit(X, max_steps=2)


def test_where_nothing_else_could_be_learned_the_remedy_is_the_network():
    net = torch.nn.Linear(1, 1)

    def model(x):
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(net(x.new_ones(len(x), 1)).squeeze(-1), 1.0), obs=x)

    with pytest.raises(UsageError, match=r"no parameters(.|\n)*pyro.module\('net', net\)"):
        ExactPosteriorEM(model).fit(X)


def test_a_tensor_and_the_network_of_a_bound_method_are_named():
    scale = torch.tensor(1.0, requires_grad=True)

    class Holds:
        def __init__(self):
            self.net = torch.nn.Linear(1, 1)

        def model(self, x):
            mixture(x, self.net(x.new_ones(len(x), 1)).squeeze(-1) * (scale * 2.0))

    (note,) = found(ExactPosteriorEM(Holds().model).plan(X).notes)
    assert "'self.net.weight'" in note and "'scale' of shape ()" in note


def test_data_with_a_gradient_are_no_finding():
    def model(x):
        mixture(x, 0.0)

    assert not found(ExactPosteriorEM(model).plan(X.clone().requires_grad_()).notes)


def drawn(x, net):
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(net(h.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)


def test_model_and_guide_of_a_stochastic_fit_are_looked_at():
    net, encoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def model(x):
        drawn(x, net)

    def guide(x):
        loc = encoder(x.unsqueeze(-1)).squeeze(-1)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(loc, scale))

    em = ExactPosteriorEM(model, guide, strategy="guide")
    notes = found(em.plan(X).notes)
    assert [n.split(":")[0] for n in notes] == ["site 'x'", "guide site 'h'"]
    assert "'encoder.weight'" in notes[1] and "where the guide begins" in notes[1]
    with pytest.warns(PyroEMWarning, match="guide site 'h': it depends on 2 tensors"):
        em.fit(X, max_steps=2)


@pytest.mark.parametrize("registering", ["model", "guide"])
def test_who_registers_it_does_not_matter(registering):
    net = torch.nn.Linear(1, 1)

    def model(x):
        if registering == "model":
            pyro.module("net", net)
        drawn(x, net)

    def guide(x):
        if registering == "guide":
            pyro.module("net", net)
        loc = net(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(loc, 1.0))

    assert not found(ExactPosteriorEM(model, guide, strategy="guide").plan(X).notes)


def test_point_estimates_and_autoguides_are_no_finding():
    net = torch.nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        drawn(x, net)

    for guide in ("map", AutoNormal):
        pyro.clear_param_store()
        assert not found(ExactPosteriorEM(model, guide, strategy="guide").plan(X).notes)


@pytest.mark.parametrize(
    "shifted",
    [
        lambda mu, net: mu + net(torch.ones(1)),
        lambda mu, net: mu * net.bias.exp(),
        lambda mu, net: torch.stack([mu[0], mu[1] + net.weight[0, 0]]),
    ],
)
def test_a_parameter_beside_such_a_tensor_is_trained(shifted):
    net = torch.nn.Linear(1, 2).double()

    def model(x):
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0], dtype=torch.float64))
        loc = shifted(mu, net)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroEMWarning)
        result = ExactPosteriorEM(model).fit(X, tol=1e-8)
    assert result.plan.updates["mu"].reason.startswith("a tensor that is no registered parameter")
    mu = result.params["mu"].clone().requires_grad_()
    loc = shifted(mu, net)
    log_p = dist.Normal(loc, 1.0).log_prob(X[:, None]) - torch.tensor(2.0).log()
    (gradient,) = torch.autograd.grad(log_p.logsumexp(-1).sum(), mu)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=X.dtype), atol=1e-3, rtol=0)
    assert result.params["mu"].tolist() != [-1.0, 1.0]
