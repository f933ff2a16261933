"""Models that write to their data or clear the param store are named; buffers may be written."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule

from pyro_em import ExactPosteriorEM, ModelError, TraceExact_ELBO
from pyro_em.tracing.randomness import seeded


@pytest.fixture(autouse=True)
def new_store():
    pyro.clear_param_store()


def mixture(x, weight=None, shift=0.0):
    mu = pyro.param("mu", lambda: torch.tensor([-1.0, 1.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(mu[z] + shift, 1.0), obs=x)


def in_place(x):
    x.mul_(1.01)
    mixture(x)


def augmented(x):
    x *= 1.01
    mixture(x)


def uncounted(x):
    x.data.mul_(1.01)
    mixture(x)


def through_numpy(x):
    x.numpy()[:] += 0.5
    mixture(x)


def covariates(x, u):
    u.add_(0.1)
    mixture(x, shift=u)


def in_a_dict(data):
    data["x"].mul_(1.01)
    mixture(data["x"])


def anew_in_a_dict(data):
    data["x"] = data["x"] * 1.01
    mixture(data["x"])


def an_array(a):
    a *= 1.01
    mixture(torch.from_numpy(a))


def array_in_a_dict(data):
    data["x"] += 0.5
    mixture(torch.as_tensor(data["x"]))


def after_the_site(x):
    mixture(x)
    x.add_(1.0)


X = torch.randn(6)
WRITING = [
    (in_place, lambda: (X.clone(),), "argument 'x'"),
    (augmented, lambda: (X.clone(),), "argument 'x'"),
    (uncounted, lambda: (X.clone(),), "argument 'x'"),
    (through_numpy, lambda: (X.clone(),), "argument 'x'"),
    (covariates, lambda: (X.clone(), torch.zeros(6)), "argument 'u'"),
    (in_a_dict, lambda: ({"x": X.clone()},), r"argument 'data\['x'\]'"),
    (anew_in_a_dict, lambda: ({"x": X.clone()},), r"argument 'data\['x'\]'"),
    (an_array, lambda: (X.clone().numpy(),), "argument 'a'"),
    (array_in_a_dict, lambda: ({"x": X.clone().numpy()},), r"argument 'data\['x'\]'"),
    (after_the_site, lambda: (X.clone(),), "argument 'x'"),
]


@pytest.mark.parametrize(("model", "data", "where"), WRITING)
def test_a_model_that_writes_to_its_data_is_refused(model, data, where):
    match = f"{where}: the model writes to it while it runs, and site 'x' differs"
    with pytest.raises(ModelError, match=match):
        ExactPosteriorEM(model).fit(*data())
    with pytest.raises(ModelError, match=match):
        TraceExact_ELBO().loss(model, lambda *args: None, *data())


def test_data_that_the_model_holds_itself_are_watched_too():
    x = torch.randn(6)

    def closed():
        x.mul_(1.01)
        mixture(x)

    class Holds:
        def __init__(self):
            self.x = torch.randn(6)

        def model(self):
            self.x.mul_(1.01)
            mixture(self.x)

    with pytest.raises(ModelError, match="variable 'x': the model writes to it"):
        ExactPosteriorEM(closed).fit()
    with pytest.raises(ModelError, match="site 'x': the model writes to its observed value"):
        ExactPosteriorEM(Holds().model).fit()


def test_a_guide_that_writes_to_the_data_is_refused():
    def model(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x):
        x.mul_(1.01)
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(x, pyro.param("s", torch.tensor(1.0))))

    with pytest.raises(ModelError, match="argument 'x': the model writes to it"):
        ExactPosteriorEM(model, guide).fit(torch.randn(6))

    def clearing(x):
        pyro.clear_param_store()
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(ModelError, match="guide: it clears the param store"):
        ExactPosteriorEM(model, clearing).fit(torch.randn(6))


@pytest.mark.parametrize("guide", [None, AutoNormal])
def test_a_model_that_clears_the_param_store_is_refused(guide):
    def model(x):
        pyro.clear_param_store()
        mixture(x)
        if guide is not None:
            pyro.sample("h", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="model: it clears the param store while it runs"):
        ExactPosteriorEM(model, guide).fit(X.clone())


def test_a_scope_of_its_own_is_no_clearing():
    """Modules whose parameters are local swap the store while they run, and put it back."""

    def model(x):
        with pyro.get_param_store().scope():
            pyro.param("unused", torch.tensor(0.0))
        mixture(x)

    mixture(X)
    assert ExactPosteriorEM(model).fit(X.clone(), max_steps=2).num_steps == 2


def test_what_changes_once_is_told():
    def model(x):
        x.clamp_(min=-0.5)
        mixture(x)

    x = torch.tensor([-2.0, 0.3, 1.0])
    plan = ExactPosteriorEM(model).plan(x)
    assert any("argument 'x'" in n and "first run changed it" in n for n in plan.notes)


def test_buffers_counters_and_scratch_memory_may_be_written():
    calls, scratch = torch.zeros(()), torch.empty(6)

    def counts(x):
        calls.add_(1)
        scratch.copy_(x).mul_(2.0)
        mixture(scratch)

    assert ExactPosteriorEM(counts).fit(X.clone(), max_steps=3).num_steps == 3
    pyro.clear_param_store()

    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.net = torch.nn.Linear(1, 1)

        def forward(self, x):
            loc = self.net(self.norm(x.unsqueeze(-1))).squeeze(-1)
            mixture(x, shift=loc)

    ExactPosteriorEM(Net()).step(torch.randn(6))


def test_data_are_left_alone_by_looking():
    x = torch.randn(6)
    before = x.clone()
    ExactPosteriorEM(mixture).plan(x)
    assert torch.equal(x, before)


def test_a_seeded_block_queues_no_seed_for_devices_that_are_not_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would outlive the block, and most of the time of a short one goes to noting its stack."""
    for device in (torch.cuda, torch.xpu):
        monkeypatch.setattr(device, "manual_seed_all", lambda seed: pytest.fail("queued"))
    with seeded(5):
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(5)))
