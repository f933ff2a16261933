"""Elements of a plate that read each other are found; models that only look like it are not."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch.distributions import constraints, transform_to

from pyro_em import ExactPosteriorEM, ModelError, TraceExact_ELBO
from tests.even_draws import even_draws

C = constraints
MU = torch.tensor([-1.0, 0.5], dtype=torch.float64)
X = torch.tensor([-1.0, 0.3, 2.0, 0.5, -0.7], dtype=torch.float64)


@pytest.fixture(autouse=True)
def in_double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(before)


def swap(z):
    """Two elements change places."""
    order = torch.arange(z.shape[-1])
    order[:2] = torch.tensor([1, 0])
    return z[..., order]


COUPLED = {
    "roll": lambda z: MU[z] + 0.5 * z.roll(1, -1),
    "flip": lambda z: MU[z.flip(-1)],
    "swap": lambda z: MU[swap(z)],
    "cumsum": lambda z: MU[z] + 0.3 * z.cumsum(-1),
    "mean": lambda z: MU[z] + z.double().mean(-1, keepdim=True),
    "sum of a look-up": lambda z: MU[z] + MU[z].sum(-1, keepdim=True),
    "maximum": lambda z: MU[z] + z.max(-1, keepdim=True).values,
    "differences": lambda z: MU[z] + torch.diff(z, prepend=z[..., :1], dim=-1),
    "padded": lambda z: MU[z] + F.pad(z.double(), (1, 0))[..., :-1],
    "sort": lambda z: MU[z.sort(-1).values],
    "first element": lambda z: MU[z] + z[..., :1],
    "last element": lambda z: MU[z] + z.select(-1, -1).unsqueeze(-1),
    "concatenation": lambda z: MU[torch.cat([z[..., 1:], z[..., :1]], -1)],
    "look-up shifted": lambda z: MU[z].roll(1, -1),
    "softmax": lambda z: MU[z] + torch.softmax(z.double(), -1),
    "matrix": lambda z: (torch.ones(z.shape[-1], z.shape[-1]) @ z.double().unsqueeze(-1)).squeeze(
        -1
    ),
    "einsum": lambda z: torch.einsum(
        "...n,nm->...m", z.double(), torch.eye(z.shape[-1]).roll(1, 0)
    ),
    "count": lambda z: MU[z] + ((z == 1).sum(-1, keepdim=True) > 1),
    "standardised": lambda z: F.layer_norm(z.double(), z.shape[-1:]),
    "convolution": lambda z: F.conv1d(
        z.double().reshape(-1, 1, z.shape[-1]), torch.ones(1, 1, 3), padding=1
    ).reshape(z.shape),
    "writing into memory": lambda z: torch.zeros(z.shape).index_copy(
        -1, torch.arange(1, z.shape[-1]), MU[z][..., :-1]
    ),
    "numpy": lambda z: torch.from_numpy(np.roll(z.numpy(), 1, -1)).double(),
    "loop over elements": lambda z: torch.stack(
        [MU[z][..., i - 1] for i in range(z.shape[-1])], -1
    ),
}


def vectorised(f, n=5):
    def model(x):
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        with pyro.plate("n", n):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(f(z), 1.0), obs=x)

    return model


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("how", list(COUPLED))
def test_elements_that_read_each_other_are_refused(how, n):
    with pytest.raises(ModelError, match=r"site 'x'.*reads latent 'z' of other elements.*'n'") as e:
        ExactPosteriorEM(vectorised(COUPLED[how], n)).posterior(X[:n])
    assert "for t in pyro.markov" in str(e.value)
    assert "ExactPosteriorEM(model, guide)" in str(e.value)


@pytest.mark.parametrize("call", ["fit", "posterior", "elbo", "step", "evaluate_loss", "SVI"])
def test_no_call_gives_a_number_for_them(call):
    model = vectorised(COUPLED["roll"])
    with pytest.raises(ModelError, match="other elements of plate 'n'"):
        if call == "SVI":
            TraceExact_ELBO().loss(model, lambda x: None, X)
        else:
            getattr(ExactPosteriorEM(model), call)(X)


@pytest.mark.slow
def test_they_are_found_in_large_data():
    """Large data are first looked at without numbers, which cannot show a shift."""
    n, D = 8_900, 32  # sigma[z] alone is more than a look with numbers allocates
    sigma = torch.eye(D).expand(2, D, D).contiguous()

    def model(x, shift):
        mu = pyro.param("mu", torch.randn(2, D))
        with pyro.plate("n", n):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            loc = mu[z].roll(1, -2) if shift else mu[z]
            pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=sigma[z]), obs=x)

    x = torch.randn(n, D)
    ExactPosteriorEM(model).posterior(x, False)
    with pytest.raises(ModelError, match="other elements of plate 'n'"):
        ExactPosteriorEM(model).posterior(x, True)


def test_a_plan_says_so():
    plan = ExactPosteriorEM(vectorised(COUPLED["roll"])).plan(X)
    (route,) = plan.routes
    assert route.route == "none" and "other elements of plate 'n'" in route.reason


def test_only_one_of_two_plates_is_blamed():
    def model(x):
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            a = pyro.sample("a", dist.Categorical(torch.ones(2)))
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(mu[a] + b.cumsum(-2), 1.0), obs=x)

    with pytest.raises(
        ModelError, match=r"'x'.*reads latent 'b' of other elements of plate 'rows'"
    ):
        ExactPosteriorEM(model).posterior(torch.randn(4, 3))


def test_a_latent_s_prior_and_a_mask_may_couple_too():
    def prior(x):
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            y = pyro.sample("y", dist.Categorical(logits=z.roll(1, -2)))
            pyro.sample("x", dist.Normal(MU.new_tensor([0.0, 1.0, 2.0])[y], 1.0), obs=x)

    def mask(x):
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            with poutine.mask(mask=z.flip(-1).bool()):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def factor(x):
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("x", z * z.roll(1, -1))

    with pytest.raises(ModelError, match=r"site 'y'.*'z' of other elements"):
        ExactPosteriorEM(prior).posterior(X)
    with pytest.raises(ModelError, match=r"site 'x': its mask reads latent 'z' of other elements"):
        ExactPosteriorEM(mask).posterior(X)
    with pytest.raises(ModelError, match=r"site 'x': its log density reads latent 'z' of other"):
        ExactPosteriorEM(factor).posterior(X)


def test_what_reads_the_shape_of_an_enumerated_value_is_refused():
    """No element reads another here, but an enumerated value has one element for its plate."""

    def norm(z):
        signs = 2.0 * z - 1.0  # its norm is the same whatever z is
        return signs / signs.norm(dim=-1, keepdim=True)

    def length(z):
        return z.double() * z.shape[-1]

    for f in (norm, length):
        with pytest.raises(ModelError, match="is not what the model computes for the same values"):
            ExactPosteriorEM(vectorised(f)).posterior(X)


@pytest.mark.parametrize("fault", ["shape", "shift"])
def test_sums_under_a_guide_s_draws_are_looked_at_too(fault):
    def model(x):
        with pyro.plate("n", 5):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            s = 2.0 * z - 1.0
            s = s / s.norm(dim=-1, keepdim=True) if fault == "shape" else s.roll(1, -1)
            pyro.sample("x", dist.Normal(h + s, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("n", 5):
            pyro.sample("h", dist.Normal(0.0, scale))

    words = {"shape": "is not what the model computes", "shift": "'z' of other elements of plate"}
    with pytest.raises(ModelError, match=words[fault]):
        ExactPosteriorEM(model, guide).elbo(X)
    pyro.clear_param_store()
    with pytest.raises(ModelError, match=words[fault]):
        TraceExact_ELBO().loss(model, guide, X)


def joint(f, w, x, z):
    return w.log()[z].sum() + dist.Normal(f(z), 1.0).log_prob(x).sum()


@pytest.mark.parametrize("marked", [False, True])
def test_a_guide_that_draws_the_latent_is_followed(marked):
    """Its elements share their costs: the score function's gradient is that of the bound."""
    f, x = COUPLED["roll"], X[:3]
    model = vectorised(f, 3)

    def guide(x):
        q = pyro.param(
            "q", torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.8, 0.2]]), constraint=C.simplex
        )
        with pyro.plate("n", 3):
            infer = {"enumerate": "parallel"} if marked else {}
            pyro.sample("z", dist.Categorical(q), infer=infer)

    em = ExactPosteriorEM(model, guide)
    route = next(r for r in em.plan(x).routes if r.site == "z")
    assert route.route == "guide" and "read each other's" in route.reason
    w, leaf = pyro.param("w").detach(), pyro.param("q").unconstrained()
    free = leaf.detach().clone().requires_grad_()
    q = transform_to(C.simplex)(free)
    bound = torch.zeros(())
    for values in itertools.product(range(2), repeat=3):
        z = torch.tensor(values)
        log_q = q.log()[torch.arange(3), z].sum()
        bound = bound + log_q.exp() * (joint(f, w, x, z) - log_q)
    (gradient,) = torch.autograd.grad(bound, free)
    torch.manual_seed(0)
    terms = em.elbo(x, num_particles=280)
    assert abs(terms.value - float(bound.detach())) < 3 * terms.standard_error
    loss, n = TraceExact_ELBO(), 450
    draws = [
        torch.autograd.grad(-loss.differentiable_loss(model, guide, x), leaf)[0] for _ in range(n)
    ]
    stacked = torch.stack(draws)
    error = stacked.std(0) / n**0.5
    assert bool(((stacked.mean(0) - gradient).abs() < 3 * error).all())


def test_a_guide_whose_own_elements_read_each_other_is_not_enumerated():
    def model(x):
        with pyro.plate("n", 4):
            y = pyro.sample("y", dist.Bernoulli(0.4))
            h = pyro.sample("h", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x):
        p = pyro.param("p", torch.full((4,), 0.5), constraint=C.unit_interval)
        with pyro.plate("n", 4):
            y = pyro.sample("y", dist.Bernoulli(p))
            pyro.sample("h", dist.Normal(y.roll(1, -1), 1.0))

    routes = {r.site: r for r in ExactPosteriorEM(model, guide).plan(X[:4]).routes}
    assert "score function" in routes["y"].reason

    def own(x):
        p = pyro.param("p", torch.full((4,), 0.5), constraint=C.unit_interval)
        with pyro.plate("n", 4):
            y = pyro.sample("y", dist.Bernoulli(p))
            pyro.sample("h", dist.Normal(y, 1.0))

    routes = {r.site: r for r in ExactPosteriorEM(model, own).plan(X[:4]).routes}
    assert "enumerated in the guide" in routes["y"].reason


def outside_its_plate(x):
    p = pyro.param("p", torch.tensor(0.4), constraint=C.unit_interval)
    with pyro.plate("n", 4):
        z = pyro.sample("z", dist.Bernoulli(p))
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=x[0])


def of_its_elements(x):
    with pyro.plate("n", 4):
        q = pyro.param("q", torch.full((4,), 0.5), constraint=C.unit_interval)
        pyro.sample("z", dist.Bernoulli(q))


def crossing(x):
    p = pyro.param("p", torch.tensor(0.4), constraint=C.unit_interval)
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows:
        z = pyro.sample("z", dist.Bernoulli(p))
    with columns:
        w = pyro.sample("w", dist.Bernoulli(p))
    with rows, columns:
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x[:4].reshape(2, 2))


def of_rows(x):
    with pyro.plate("rows", 2, dim=-2):
        q = pyro.param("q", torch.full((2, 1), 0.5), constraint=C.unit_interval)
        pyro.sample("z", dist.Bernoulli(q))


def bound_outside(x):
    coin, total = dist.Bernoulli(0.4), torch.zeros(())
    for values in itertools.product([0.0, 1.0], repeat=4):
        z = torch.tensor(values)
        log_p = coin.log_prob(z).sum() + dist.Normal(z.sum(), 1.0).log_prob(x[0])
        total = total + (log_p + 4 * torch.tensor(2.0).log()) / 16
    return float(total)


def bound_crossing(x):
    coin, x, total = dist.Bernoulli(0.4), x[:4].reshape(2, 2), torch.zeros(())
    w = torch.tensor([0.0, 1.0])
    for values in itertools.product([0.0, 1.0], repeat=2):
        z = torch.tensor(values)
        of_w = dist.Normal(z[:, None, None] + w, 1.0).log_prob(x[..., None]).sum(0)
        evidence = (coin.log_prob(w) + of_w).logsumexp(-1).sum()
        total = total + (coin.log_prob(z).sum() + evidence + 2 * torch.tensor(2.0).log()) / 4
    return float(total)


@pytest.mark.parametrize("strategy", ["exact", "guide"])
@pytest.mark.parametrize(
    ("model", "guide", "bound"),
    [(outside_its_plate, of_its_elements, bound_outside), (crossing, of_rows, bound_crossing)],
)
def test_the_guide_that_a_refusal_advises_helps(model, guide, bound, strategy):
    with pytest.raises(ModelError, match=r"give a guide that draws"):
        ExactPosteriorEM(model).posterior(X)
    pyro.clear_param_store()
    torch.manual_seed(0)
    terms = ExactPosteriorEM(model, guide, strategy=strategy).elbo(X, num_particles=340)
    assert abs(terms.value - bound(X)) < 3 * terms.standard_error


def test_a_guide_that_reads_a_plate_from_outside_is_not_enumerated():
    def model(x):
        with pyro.plate("n", 4):
            y = pyro.sample("y", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=x[0])

    def guide(x):
        p = pyro.param("p", torch.full((4,), 0.5), constraint=C.unit_interval)
        with pyro.plate("n", 4):
            y = pyro.sample("y", dist.Bernoulli(p))
        pyro.sample("h", dist.Normal(y.mean(-1), 1.0))

    routes = {r.site: r for r in ExactPosteriorEM(model, guide).plan(X[:4]).routes}
    assert "score function" in routes["y"].reason


# -------------------------------------------------------------------------- models that are fine


def plain(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def one_value(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(1)))
        pyro.sample("x", dist.Normal(torch.zeros(1)[z], 1.0), obs=x)


def sums_of_one(x):
    """With one element, or over features, sums mix nothing."""
    mu = pyro.param("mu", torch.randn(2, len(x)))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        loc = torch.softmax(mu[z], -1).sum(-1) + (mu[z] * torch.ones(len(x))).sum(-1)
        pyro.sample("x", dist.Normal(loc + mu[z].roll(1, -1)[..., 0], 1.0), obs=x)


def constant_draws(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([1.0, 0.0])))
        pyro.sample("x", dist.Normal(MU[z], 1.0), obs=x)


def floats(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        b = pyro.sample("b", dist.Binomial(3, 0.4))
        pyro.sample("x", dist.Normal(torch.where(z.bool(), b, -b), 1.0), obs=x)


def of_great_size(x):
    """Sums of large numbers in single precision that nearly cancel."""
    B = 1e6 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).float()
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2).float()))
        loc = (F.one_hot(z, 2).float() @ B).sum(-1) - B.sum(-1)[z]
        pyro.sample("x", dist.Normal(loc + (B[z] - B[0]).sum(-1), 1.0), obs=x.float())


def one_hot(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(len(x))))
        pyro.sample("x", dist.Normal((z * torch.arange(float(len(x)))).sum(-1), 1.0), obs=x)


def partly_observed(x):
    with pyro.plate("n", len(x)):
        mask = torch.arange(len(x)) % 2 == 0
        obs = torch.zeros(len(x), dtype=torch.long)
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), obs=obs, obs_mask=mask)
        pyro.sample("x", dist.Normal(MU[z], 1.0), obs=x, obs_mask=~mask)


def crossed(x):
    mu = pyro.param("mu", torch.randn(len(x), len(x)))
    rows, columns = pyro.plate("a", len(x), dim=-2), pyro.plate("b", len(x), dim=-1)
    with rows:
        z = pyro.sample("z", dist.Categorical(torch.ones(len(x))))
        with columns:
            y = pyro.sample("y", dist.Categorical(mu.exp()[z]))
            pyro.sample("x", dist.Normal(Vindex(mu)[z, y], 1.0), obs=x.expand(len(x), -1))


def chain(x):
    A = torch.ones(3, 3) + torch.eye(3)
    rows = pyro.plate("rows", len(x))
    z = 0
    for t in pyro.markov(range(4)):
        with rows:
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"x{t}", dist.Normal(z.double(), 1.0), obs=x)


def of_second_order(x):
    A = torch.rand(2, 2, 2)
    rows = pyro.plate("rows", len(x))
    y = z = torch.tensor(0)
    for t in pyro.markov(range(5), history=2):
        with rows:
            y, z = z, pyro.sample(f"z{t}", dist.Categorical(Vindex(A)[y, z]))
            pyro.sample(f"x{t}", dist.Normal(z.double() - y.double(), 1.0), obs=x)


def masks_and_scales(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        with poutine.mask(mask=z.bool()):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        with poutine.mask(mask=x > 0):
            pyro.sample("y", dist.Normal(MU[z], 1.0), obs=x)


def of_a_module(x):
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    torch.manual_seed(3)
    for p in net.parameters():
        torch.nn.init.normal_(p)
    net = pyro.module("net", net)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(net(F.one_hot(z, 2).double()).squeeze(-1), 1.0), obs=x)


def dropout(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        noise = torch.randn(len(x))
        pyro.sample("x", dist.Normal(MU[z] + noise + F.dropout(MU, 0.5)[z], 1.0), obs=x)


def noise_of_its_shape(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(MU[z] + F.dropout(MU[z], 0.5), 1.0), obs=x)


def features(x):
    """As many features as rows, and reductions over the features."""
    B = pyro.param("B", torch.randn(2, len(x)))
    D = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        loc = (B[z] * D).sum(-1) + torch.einsum("...d,de->...e", B[z], D)[..., 0]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def loops(x):
    z = {}
    for i in pyro.plate("n", len(x)):
        z[i] = pyro.sample(f"z{i}", dist.Categorical(torch.ones(2)))
        below = z[i - 1] if i else z[0]
        pyro.sample(f"x{i}", dist.Normal(MU[z[i]] + below, 1.0), obs=x[i])


def outside(x):
    """A latent of all rows: nothing of a plate is read."""
    z = pyro.sample("z", dist.Categorical(torch.ones(2)))
    levels = torch.randn(2, len(x), generator=torch.Generator().manual_seed(0))
    with pyro.plate("n", len(x)):
        loc = Vindex(levels)[z, torch.arange(len(x))].roll(1, -1).cumsum(-1)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


FINE = [
    plain,
    one_value,
    sums_of_one,
    constant_draws,
    floats,
    of_great_size,
    one_hot,
    partly_observed,
    crossed,
    chain,
    of_second_order,
    masks_and_scales,
    of_a_module,
    dropout,
    noise_of_its_shape,
    features,
    loops,
    outside,
]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("model", FINE)
def test_models_that_are_fine_are_not_refused(model, n):
    pyro.set_rng_seed(1)
    ExactPosteriorEM(model).posterior(torch.randn(n))


def test_a_density_that_cancels_is_no_other_model():
    """Next to no variance beside the factors: quadratic forms of 1e9 cancel as shapes have it."""
    generator = torch.Generator().manual_seed(0)
    loc, factor = torch.randn(2, 3, generator=generator), torch.randn(2, 3, 1, generator=generator)
    x = torch.randn(6, 3, generator=generator)

    def model():
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            spread = torch.tensor([0.2, 0.1, 1e-10])
            pyro.sample("x", dist.LowRankMultivariateNormal(loc[z], factor[z], spread), obs=x)

    em = ExactPosteriorEM(model)
    covariance = factor @ factor.mT + torch.tensor([0.2, 0.1, 1e-10]).diag_embed()
    each = dist.MultivariateNormal(loc, covariance).log_prob(x[:, None])
    expected = float((each + torch.tensor([0.4, 0.6]).log()).logsumexp(-1).sum())
    assert em.posterior().log_evidence == pytest.approx(expected, rel=1e-5)


def test_point_estimates_and_draws_are_not_refused():
    def model(x):
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(mu[z] + h, 1.0), obs=x)

    pyro.set_rng_seed(0)
    ExactPosteriorEM(model, "map").step(X)
    pyro.clear_param_store()
    ExactPosteriorEM(model, pyro.infer.autoguide.AutoNormal).step(X)


def test_random_subsamples_are_not_refused():
    x = torch.randn(20)

    def model(x):
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("n", len(x), subsample_size=5) as index:
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x[index])

    ExactPosteriorEM(model).posterior(x)


MIXED = {
    "mean": lambda h: -h.mean(-1, keepdim=True),
    "roll": lambda h: h.roll(1, -1),
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "own": lambda h: h,
}


@pytest.mark.parametrize("mixed", list(MIXED))
def test_draws_under_a_label_that_the_guide_sums(mixed: str) -> None:
    """q(z) q(h | z): where elements read each other's h, z is drawn with it, not enumerated."""
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
    where = torch.tensor([-0.5, 0.7], dtype=torch.float64)
    centre = torch.tensor([-1.0, 1.5], dtype=torch.float64)

    def model() -> None:
        shift = pyro.param("shift", torch.zeros((), dtype=torch.float64))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)))
            h = pyro.sample("h", dist.Normal(centre[z], 1.0))
            pyro.sample("x", dist.Normal(MIXED[mixed](h) + shift, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Categorical(q))
            pyro.sample("h", dist.Delta(where[z]))

    bound = 0.0
    for labels in itertools.product(range(2), repeat=3):
        z = torch.tensor(labels)
        held = poutine.condition(model, {"z": z, "h": where[z]})
        log_q = q[torch.arange(3), z].log().sum()
        log_p = poutine.trace(held).get_trace().log_prob_sum()
        bound += (log_q.exp() * (log_p - log_q)).item()
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide)
    how = next(r.reason for r in em.plan().routes if r.site == "z")
    assert ("enumerated in the guide" in how) == (mixed == "own")
    pyro.set_rng_seed(0)
    found = em.elbo(num_particles=150)
    assert found.value == pytest.approx(bound, abs=4 * (found.standard_error or 0.0) + 1e-9)


def test_rows_have_no_weights_of_their_own_where_their_draws_meet() -> None:
    x = torch.tensor([2.0, 2.0], dtype=torch.float64)

    def model() -> None:
        spread = pyro.param("spread", torch.tensor(3.0, dtype=torch.float64))
        with pyro.plate("n", 2):
            h = pyro.sample("h", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(spread * h.mean(-1, keepdim=True), 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("n", 2):
            pyro.sample("h", dist.Normal(x.new_zeros(()), 1.0))

    covariance = 4.5 * torch.ones(2, 2, dtype=torch.float64) + torch.eye(2, dtype=torch.float64)
    truth = dist.MultivariateNormal(x.new_zeros(2), covariance).log_prob(x).item()
    apart = 2 * dist.Normal(x.new_zeros(()), 5.5**0.5).log_prob(x[0]).item()
    assert truth - apart > 0.3  # what weights per row would give
    pyro.set_rng_seed(0)
    with even_draws(2):
        found = ExactPosteriorEM(model, guide, strategy="guide").estimate_evidence(
            num_particles=512
        )
    assert found.pointwise is None and found.value == pytest.approx(truth, abs=0.1)


def runs_of_a_map_fit(in_plate):
    """How often a mixture is run until its plan is made, its means in a plate of their own or not."""
    runs = []

    def model(x):
        runs.append(len(x))
        with pyro.plate("k", 2) if in_plate else contextlib.nullcontext():
            normal = dist.Normal(torch.zeros(2), 10.0)
            mu = pyro.sample("mu", normal if in_plate else normal.to_event(1))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    ExactPosteriorEM(model, guide="map").plan(X)
    return len(runs)


def test_components_that_rows_choose_from_are_not_moved():
    """No site of the components' plate reads their means, and an index is read row by row."""
    assert runs_of_a_map_fit(True) == runs_of_a_map_fit(False)
