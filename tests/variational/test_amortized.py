"""Amortised guides against analytic posteriors, and as citizens of Pyro's SVI."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_em.errors import DataError, ModelError, UsageError
from pyro_em.variational.amortized import AutoAmortizedCategorical, AutoAmortizedNormal

pytestmark = pytest.mark.slow

W = torch.tensor([[1.0, 0.5, -0.3, 0.8], [-0.2, 1.2, 0.7, 0.1]], dtype=torch.float64)
NOISE = 0.7


def linear(x):
    """Linear Gaussian: x = h W + noise, whose posterior per datum is known."""
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ W, NOISE).to_event(1), obs=x)


def linear_data(n):
    return torch.randn(n, 2) @ W + NOISE * torch.randn(n, 4)


def counted(model):
    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        return model(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


def train(model, guide, *args, steps=300, lr=0.02, loss=None):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


# Against analytic posteriors.


@pytest.mark.parametrize(("hidden", "tolerance"), [((), 0.05), ((16,), 0.15)])
def test_a_linear_gaussian_model_gives_the_posterior_of_every_datum(hidden, tolerance) -> None:
    x = linear_data(200)
    guide = AutoAmortizedNormal(linear, hidden=hidden)
    loss = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    train(linear, guide, x, steps=60, lr=0.1, loss=loss)
    train(linear, guide, x, steps=40, lr=0.005, loss=loss)
    precision = torch.eye(2) + W @ W.T / NOISE**2
    scale = precision.diagonal() ** -0.5  # the best factorised Normal has these scales
    for data in (x, linear_data(50)):  # the second: new data, of another number
        mean = data @ W.T / NOISE**2 @ torch.linalg.inv(precision)
        assert (guide.median(data)["h"] - mean).abs().mean() < tolerance
        q = guide.posterior(data)["h"]
        assert (q.variance.sqrt() - scale).abs().mean() < 0.05


def test_a_mixture_gives_the_responsibilities() -> None:
    w, mu = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-2.0, 0.0, 1.5])

    def mixture(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    x = 2 * torch.randn(300)
    guide = AutoAmortizedCategorical(mixture, hidden=(16,))
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    train(mixture, config_enumerate(guide), x, steps=150, lr=0.04, loss=loss)
    for data in (x, torch.linspace(-3, 3, 20)):
        exact = (w.log() + dist.Normal(mu, 1.0).log_prob(data[:, None])).softmax(-1)
        torch.testing.assert_close(guide.posterior(data)["z"].probs, exact, atol=0.06, rtol=0)
    sure = exact.max(-1).values > 0.6
    assert (guide.median(data)["z"] == exact.argmax(-1))[sure].all()


def test_a_constrained_latent_gives_its_posterior_mean() -> None:
    def poisson(x):
        with pyro.plate("n", len(x)):
            rate = pyro.sample("rate", dist.Gamma(3.0, 0.1))
            with pyro.plate("t", 5, dim=-2):
                pyro.sample("x", dist.Poisson(rate), obs=x.T)

    x = torch.poisson(dist.Gamma(3.0, 0.1).sample((100,))[:, None].expand(-1, 5))
    guide = AutoAmortizedNormal(poisson, hidden=(16,))
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True)
    train(poisson, guide, x, steps=500, loss=loss)
    train(poisson, guide, x, steps=200, lr=0.003, loss=loss)
    mean = (3 + x.sum(1)) / (0.1 + 5)
    site = poutine.trace(guide).get_trace(x).nodes["rate"]
    assert (site["value"] > 0).all() and site["fn"].has_rsample
    assert ((guide.median(x)["rate"] - mean) / mean).abs().mean() < 0.1


def test_the_density_of_a_constrained_latent_has_the_jacobian() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            u = pyro.sample("u", dist.Uniform(-1.0, 2.0))
            pyro.sample("x", dist.Normal(p[..., 0] + u, 1.0), obs=x)

    trace = poutine.trace(AutoAmortizedNormal(model, init_scale=1.0)).get_trace(torch.randn(6))
    trace.compute_log_prob()
    p, u = trace.nodes["p"], trace.nodes["u"]
    assert p["value"].shape == (6, 3) and p["log_prob"].shape == (6,)
    s = (u["value"] + 1) / 3
    logistic = dist.Normal(0.0, 1.0).log_prob(torch.logit(s)) - (3 * s * (1 - s)).log()
    torch.testing.assert_close(u["log_prob"], logistic, atol=1e-4, rtol=1e-4)


def test_a_global_latent_gets_the_answer_of_auto_normal() -> None:
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    x = torch.randn(50) + 1
    ours, theirs = AutoAmortizedNormal(model), AutoNormal(model)
    for guide in (ours, theirs):
        train(model, guide, x, steps=200, lr=0.05)
    assert ours.median(x)["m"].item() == pytest.approx(x.sum().item() / 51, abs=0.1)
    assert theirs.median(x)["m"].item() == pytest.approx(ours.median(x)["m"].item(), abs=0.15)
    constraint = pyro.get_param_store()._constraints["AutoAmortizedNormal.scales.m"]
    assert constraint is constraints.positive


# Shapes, plates and features.


def test_nested_plates() -> None:
    def model(x):
        with pyro.plate("group", x.shape[0], dim=-2):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("unit", x.shape[1], dim=-1):
                h = pyro.sample("h", dist.Normal(b, 1.0))
                pyro.sample(
                    "x", dist.Normal(h[..., None], 1.0).expand([4, 3, 2]).to_event(1), obs=x
                )

    guide = AutoAmortizedNormal(model, hidden=(4,))
    x = torch.randn(4, 3, 2)
    values = guide(x)
    assert values["b"].shape == (4, 1) and values["h"].shape == (4, 3)
    assert len(guide.encoder.b.mean) == 6 and len(guide.encoder.h.mean) == 2
    train(model, guide, x, steps=3)
    # Row i of the data reaches row i of the latents and no other.
    head = guide.heads.b.weight
    nn.init.normal_(head)
    changed = x.clone()
    changed[2] += 1
    moved = guide.posterior(changed)["b"].mean - guide.posterior(x)["b"].mean
    assert (moved.squeeze(-1) != 0).tolist() == [False, False, True, False]


def test_discrete_kinds_and_their_shapes() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.3)).to_event(1))
            c = pyro.sample("c", dist.OneHotCategorical(torch.ones(4)))
            d = pyro.sample("d", dist.Categorical(torch.ones(2, 5)).to_event(1))
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + b.sum(-1) + c[..., 0] + d.sum(-1) + h, 1.0), obs=x)

    x = torch.randn(7)
    guide = AutoAmortizedCategorical(model)
    assert {n: tuple(v.shape) for n, v in guide(x).items()} == {
        "a": (7,),
        "b": (7, 3),
        "c": (7, 4),
        "d": (7, 2),
    }
    assert guide.posterior(x)["d"].base_dist.probs.shape == (7, 2, 5)
    assert guide.median(x)["b"].shape == (7, 3)
    assert list(AutoAmortizedNormal(model)(x)) == ["h"]


def test_latents_outside_plates_have_parameters_of_their_own() -> None:
    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(m, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h * (1 + k), s).to_event(1), obs=x)

    x = torch.randn(5, 2)
    guide = AutoAmortizedNormal(model, hidden=(4,), init_scale=0.2)
    assert {n: tuple(v.shape) for n, v in guide(x).items()} == {"m": (2,), "s": (), "h": (5, 2)}
    assert guide.posterior(x)["m"].variance.sqrt().tolist() == pytest.approx([0.2, 0.2])
    assert guide.median(x)["s"] == 1
    discrete = AutoAmortizedCategorical(model)
    assert discrete.posterior(x)["k"].probs.tolist() == [0.5, 0.5]
    both = AutoGuideList(model)
    both.append(AutoAmortizedNormal(poutine.block(model, hide=["k"]), hidden=(4,)))
    both.append(AutoAmortizedCategorical(poutine.block(model, expose=["k", "x"])))
    assert set(both(x)) == {"m", "s", "h", "k"}


def test_missing_and_masked_values_are_features_zero() -> None:
    def model(x, seen):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("d", 3, dim=-2):
                pyro.sample("x", dist.Normal(h, 1.0), obs=x.T, obs_mask=seen.T)

    x = torch.randn(6, 3)
    seen = torch.rand(6, 3) < 0.7
    guide = AutoAmortizedNormal(model, hidden=(4,))
    train(model, guide, x, seen, steps=5)
    one, other = (guide.median(torch.where(seen, x, v), seen) for v in (torch.nan, 7.0))
    torch.testing.assert_close(one["h"], other["h"])
    # What stands for an observed value counts in neither density.
    trace = poutine.trace(guide).get_trace(x, seen)
    trace.compute_log_prob()
    assert (trace.nodes["x_unobserved"]["log_prob"][seen.T] == 0).all()


def test_weights_of_the_model_are_those_of_the_guide() -> None:
    def model(x, weight):
        with pyro.plate("n", len(x)), poutine.scale(scale=weight):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    x = torch.randn(4)
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5])
    guide = AutoAmortizedNormal(model)
    guide(x, weight)
    assert torch.equal(poutine.trace(guide).get_trace(x, weight).nodes["h"]["scale"], weight)


def test_plates_with_a_dim_between_them() -> None:
    def model(x):
        a, c = pyro.plate("a", x.shape[0], dim=-3), pyro.plate("c", x.shape[2], dim=-1)
        with a, c:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("b", x.shape[1], dim=-2):
                pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, hidden=(4,))
    x = torch.randn(2, 5, 3)
    assert guide(x)["h"].shape == (2, 1, 3) and len(guide.encoder.h.mean) == 5
    assert guide(torch.randn(4, 5, 6))["h"].shape == (4, 1, 6)
    nn.init.normal_(guide.heads.h.weight)
    changed = x.clone()
    changed[1, 0, 2] += 1
    moved = guide.posterior(changed)["h"].mean != guide.posterior(x)["h"].mean
    assert moved.squeeze(1).tolist() == [[False, False, False], [False, False, True]]


def test_parallel_enumeration_with_particles_and_a_module_as_model() -> None:
    class Mixture(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.Parameter(torch.tensor([-1.0, 1.0]))
            self.s = PyroParam(torch.tensor(1.0), constraints.positive)

        def forward(self, x):
            s = self.s
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Categorical(torch.ones(2)))
                h = pyro.sample("h", dist.Normal(self.means[z], s))
                pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    model, x = Mixture(), torch.cat([torch.randn(20) - 3, torch.randn(20) + 3])
    guide = AutoGuideList(model)
    guide.append(AutoAmortizedNormal(model, hidden=(4,)))
    guide.append(AutoAmortizedCategorical(model, hidden=(4,)))
    loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=4, vectorize_particles=True)
    losses = train(model, config_enumerate(guide), x, steps=120, lr=0.05, loss=loss)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert (guide.median(x)["z"][:20] != guide.median(x)["z"][20:]).float().mean() > 0.9
    assert torch.isfinite(copy.deepcopy(guide[0])(x)["h"]).all()


def test_the_median_can_be_the_first_call() -> None:
    def model(x):
        m = pyro.sample("m", dist.LogNormal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    guide = AutoAmortizedNormal(model)
    medians = guide.median(torch.randn(3))
    assert medians["m"] == 1 and not medians["h"].requires_grad
    assert poutine.trace(guide).get_trace(torch.randn(3)).nodes["m"]["value"].requires_grad


# Sizes, subsampling and running the model.


def test_the_model_runs_once_where_an_argument_is_the_data() -> None:
    model = counted(linear)
    guide = AutoAmortizedNormal(model, hidden=(4,))
    for n in (8, 8, 3, 1):
        assert guide(linear_data(n))["h"].shape == (n, 2)
    assert model.calls == 1
    guide(x=linear_data(4))  # another way of calling
    assert model.calls == 2


@pytest.mark.parametrize("ambiguous", [True, False])
def test_the_model_runs_again_where_no_argument_is_the_data(ambiguous) -> None:
    def model(x, y):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x if ambiguous else x + y)

    model = counted(model)
    guide = AutoAmortizedNormal(model, hidden=(4,))
    x = torch.randn(5)
    guide(x, x)
    assert model.calls == 2
    nn.init.normal_(guide.heads.h.weight)
    y = torch.randn(5)
    moved = guide.posterior(x, y)["h"].mean - guide.posterior(x, x)["h"].mean
    assert bool((moved == 0).all()) == ambiguous


@pytest.mark.parametrize("in_guide", [False, True])
def test_subsampling_shares_its_indices(in_guide) -> None:
    def model(x):
        with pyro.plate("n", len(x), subsample_size=None if in_guide else 5) as ind:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x[ind])

    def create_plates(x):
        return pyro.plate("n", len(x), subsample_size=5, dim=-1)

    x = torch.arange(30.0)
    guide = AutoAmortizedNormal(model, hidden=(), create_plates=create_plates if in_guide else None)
    guide(x)
    with torch.no_grad():  # loc is the standardised datum
        guide.heads.h.weight[0] = 1.0
    seen = set()
    for data in (x, x, x[:20]):
        trace = poutine.trace(guide).get_trace(data)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(data)
        picked = replayed.nodes["x"]["value"]
        h, n = trace.nodes["h"], trace.nodes["n"]
        assert torch.equal(n["value"], replayed.nodes["n"]["value"]) and len(picked) == 5
        torch.testing.assert_close(h["fn"].mean, guide.encoder.h(picked[:, None]).squeeze(-1))
        assert h["scale"] == len(data) / 5 == replayed.nodes["h"]["scale"]
        seen.add(tuple(n["value"].tolist()))
    assert len(seen) == 3
    # A guide that is itself replayed uses the replayed indices.
    again = poutine.trace(poutine.replay(guide, trace)).get_trace(data)
    assert torch.equal(again.nodes["h"]["fn"].mean, trace.nodes["h"]["fn"].mean)
    train(model, guide, x, steps=3)


def test_batches_of_a_larger_set_are_scaled_from_the_second_call_on() -> None:
    def model(x, total):
        with pyro.plate("n", total, subsample_size=len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    guide = AutoAmortizedNormal(model)
    guide(torch.randn(10), 10)
    assert poutine.trace(guide).get_trace(torch.randn(5), 10).nodes["h"]["scale"] == 2


def test_batches_and_particles_in_svi() -> None:
    x = linear_data(64)
    guide = AutoAmortizedNormal(linear, hidden=(8,))
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    losses = [svi.step(batch) / len(batch) for _ in range(40) for batch in x.split(24)]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_supports_that_follow_the_data_are_those_of_the_call() -> None:
    def model(x, limit):
        with pyro.plate("n", len(x)):
            u = pyro.sample("u", dist.Uniform(torch.zeros_like(limit), limit))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    guide = AutoAmortizedNormal(model, init_scale=10.0)
    guide(torch.randn(3), torch.ones(3))
    limit = torch.tensor([0.1, 5.0, 1.0, 2.0])
    assert (guide(torch.randn(4), limit)["u"] <= limit).all()


# Encoders, names, copies.


def test_encoders_of_the_user() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("part.b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0).expand([len(x)]), obs=x)

    x = torch.randn(4)
    shared = AutoAmortizedNormal(model, nn.Linear(1, 3))
    assert shared(x)["part.b"].shape == (4,)
    assert shared.heads.a.weight.shape == (2, 3)
    train(model, shared, x, steps=2)
    names = set(pyro.get_param_store().keys())
    assert {"AutoAmortizedNormal.encoder$$$weight", "AutoAmortizedNormal.heads.a.bias"} <= names
    pyro.clear_param_store()
    each = AutoAmortizedNormal(model, {"part.b": nn.Linear(1, 2)}, hidden=(5,))
    each(x)
    assert each.heads.a.weight.shape == (2, 5) and each.heads.part.b.weight.shape == (2, 2)
    assert AutoAmortizedNormal(model, lambda features: features**2)(x)["a"].shape == (4,)


def test_names_and_printing() -> None:
    guide = AutoAmortizedNormal(linear, hidden=(8, 4))
    guide(linear_data(5))
    assert set(pyro.get_param_store().keys()) == {
        "AutoAmortizedNormal.encoder.h.layers.0.weight",
        "AutoAmortizedNormal.encoder.h.layers.0.bias",
        "AutoAmortizedNormal.encoder.h.layers.2.weight",
        "AutoAmortizedNormal.encoder.h.layers.2.bias",
        "AutoAmortizedNormal.heads.h.weight",
        "AutoAmortizedNormal.heads.h.bias",
    }
    assert "in_features=4, out_features=8" in repr(guide)


def test_large_counts_do_not_saturate() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(h.exp()[..., None].expand(len(x), 3)).to_event(1), obs=x)

    guide = AutoAmortizedNormal(model, hidden=(8,))
    assert not list(guide.parameters())  # nothing there before the first call
    x = torch.poisson(torch.rand(50, 3) * 800)
    guide(x)
    assert guide.encoder.h(x).abs().max() < 5


def test_copies_pickles_and_states() -> None:
    x = linear_data(5)
    guide = AutoAmortizedNormal(linear, hidden=(4,))
    train(linear, guide, x, steps=3)
    expected = guide.median(x)["h"]
    pyro.clear_param_store()
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(other.median(x)["h"], expected)
    pyro.clear_param_store()
    fresh = AutoAmortizedNormal(linear, hidden=(4,))
    fresh(x)
    fresh.load_state_dict(guide.state_dict())
    torch.testing.assert_close(fresh.median(x)["h"], expected)
    assert guide.model is not None  # pickling leaves the original whole

    loaded = pickle.loads(pickle.dumps(guide))
    with pytest.raises(UsageError, match="attach"):
        loaded.median(x=x)
    loaded.attach(linear)
    torch.testing.assert_close(loaded.median(x=x)["h"], expected)


def test_priors_with_parameters_can_be_pickled() -> None:
    def model(x):
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        L = pyro.param("L", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("n", len(x), subsample_size=2) as ind:
            h = pyro.sample("h", dist.MultivariateNormal(torch.zeros(2), scale_tril=L))
            g = pyro.sample("g", dist.Gamma(s, s))
            pyro.sample("x", dist.Normal(h.sum(-1) + g, s), obs=x[ind])

    guide = AutoAmortizedNormal(model)
    x = torch.randn(4)
    train(model, guide, x, steps=2)
    loaded = pickle.loads(pickle.dumps(guide))
    loaded.attach(model)
    assert loaded(x)["h"].shape == copy.deepcopy(guide)(x)["h"].shape == (2, 2)


def test_float64_follows_the_model() -> None:
    def model(x):
        loc = pyro.param("loc", lambda: x.new_zeros(2))
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h @ W.to(x), 1.0).to_event(1), obs=x)

    x = linear_data(5).double()
    guide = AutoAmortizedNormal(model)
    assert guide(x)["h"].dtype == torch.float64
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    copy.deepcopy(guide)(x)
    assert all(loss == loss for loss in train(model, guide, x, steps=3))


def test_the_same_seed_gives_the_same_guide() -> None:
    def fit():
        pyro.clear_param_store()
        torch.manual_seed(1)
        guide = AutoAmortizedNormal(linear, hidden=(4,))
        return train(linear, guide, torch.ones(3, 4), steps=5)

    assert fit() == fit()


# Refusals.


def refusal(error, guide, *args):
    with pytest.raises(error) as caught:
        guide(*args)
    return str(caught.value)


def test_refusals_say_where_what_and_why() -> None:
    def nothing_observed(x):
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu.sum(), 1.0), obs=x)

    text = refusal(ModelError, AutoAmortizedNormal(nothing_observed), torch.ones(3))
    assert text.startswith("site 'mu': nothing is observed inside its plates ['k'].")
    assert "AutoNormal" in text

    def sequential(x):
        for i in pyro.plate("n", len(x)):
            h = pyro.sample(f"h{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(h, 1.0), obs=x[i])

    text = refusal(ModelError, AutoAmortizedNormal(sequential), torch.ones(3))
    assert text.startswith("site 'h0': it is inside a sequential plate.")

    def binomial(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Binomial(3, torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    text = refusal(ModelError, AutoAmortizedCategorical(binomial), torch.ones(3))
    assert text.startswith("site 'k': Binomial latents have no amortised guide.")


def test_misuse_is_named() -> None:
    x = linear_data(3)
    text = refusal(UsageError, AutoAmortizedNormal(linear, {"g": nn.Linear(4, 2)}), x)
    assert text.startswith("encoder of site 'g'") and "['h']" in text
    text = refusal(UsageError, AutoAmortizedNormal(linear, lambda f: f.sum(0)), x)
    assert "(3, 4) to (4,)" in text
    with pytest.raises(UsageError, match="init_scale"):
        AutoAmortizedNormal(linear, init_scale=0.0)

    def columns(x):
        with pyro.plate("d", x.shape[1]):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("n", x.shape[0]):
                pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def optional(x):
        with pyro.plate("n", 3):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    guide = AutoAmortizedNormal(optional)
    guide(torch.randn(3))
    assert "it is not observed in this call" in refusal(DataError, guide, None)
    guide = AutoAmortizedNormal(columns)
    assert guide(torch.randn(6, 2))["h"].shape == (2,)
    text = refusal(DataError, guide, torch.randn(5, 2))
    assert "5 numbers per element; the first call had 6" in text
