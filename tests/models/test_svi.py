"""TraceExact_ELBO beside Pyro's own, and with plain torch optimisers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, ModelError, TraceExact_ELBO

X = torch.tensor([[0.2, 1.1, -0.3], [2.0, 1.5, 2.2]], dtype=torch.float64)


def chain(y):
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    s = pyro.param("s", torch.tensor(1.3), constraint=constraints.positive)
    with pyro.plate("sequences", len(y)):
        z = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"y{t}", dist.Normal(mu[z], s), obs=y[:, t])


def guide(*args):
    pass


def gradients(loss, model):
    store = pyro.get_param_store()
    value = loss.loss_and_grads(model, guide, X)
    found = {n: p.grad.clone() for n, p in store.named_parameters()}
    for _, p in store.named_parameters():
        p.grad = None
    return value, found


def test_loss_and_gradients_equal_those_of_enumeration() -> None:
    ours, exact = gradients(TraceExact_ELBO(), chain)
    theirs, enumerated = gradients(
        TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(chain, "parallel")
    )
    assert ours == pytest.approx(theirs, rel=1e-12)
    for name, g in exact.items():
        torch.testing.assert_close(g, enumerated[name])


def test_svi_reaches_the_optimum_of_em() -> None:
    def mixture(x):
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    x = torch.cat([torch.randn(20) - 2, torch.randn(30) + 2])
    svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 0.1}), TraceExact_ELBO())
    for _ in range(150):
        svi.step(x)
    loss = svi.evaluate_loss(x)
    pyro.clear_param_store()
    best = ExactPosteriorEM(mixture).fit(x, tol=1e-9).log_evidence
    assert best - 1e-3 <= -loss <= best + 1e-9


def test_as_a_module_with_a_torch_optimiser() -> None:
    class Mixture(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.mu = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))
            self.s = PyroParam(torch.tensor(1.0), constraints.positive)

        def forward(self, x):
            mu, s = self.mu, self.s
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
                pyro.sample("x", dist.Normal(mu[z], s), obs=x)

    with pyro.settings.context(module_local_params=True):
        model = Mixture()
        loss = TraceExact_ELBO()(model, PyroModule())
        optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
        values = []
        for _ in range(40):
            optimiser.zero_grad()
            value = loss(X.reshape(-1))
            value.backward()
            optimiser.step()
            values.append(float(value.detach()))
    assert values[-1] < values[0]


def test_what_cannot_be_exact_is_refused() -> None:
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu.exp(), 1.0), obs=x)

    with pytest.raises(ModelError, match="site 'mu': the guide lacks it, and a continuous latent"):
        TraceExact_ELBO().loss(model, guide, torch.tensor(1.0))


def test_each_step_draws_another_batch() -> None:
    seen: list[tuple[int, ...]] = []

    def model(x: torch.Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            seen.append(tuple(rows.tolist()))
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x[rows])

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), TraceExact_ELBO())
    x = torch.randn(1000)
    batches = []
    for _ in range(6):
        svi.step(x)
        batches.append(seen[-1])
    assert len(set(batches)) == 6
