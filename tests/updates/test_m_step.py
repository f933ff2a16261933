"""The M-step against something that is not us: stationarity by autograd, textbook EM in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from scipy.special import logsumexp
from torch.distributions import constraints, transform_to
from torch.nn.functional import one_hot, softplus

from pyro_em import ClosedForm, ExactPosteriorEM, Fixed, Gradient, LeastSquares, Newton, UsageError
from pyro_em.updates.update import NewtonOnSums

C = constraints
T = partial(torch.tensor, dtype=torch.float64)
K, N = 2, 30
RNG = np.random.default_rng(11)
REAL = T(np.concatenate([RNG.normal(-1.5, 0.7, 14), RNG.normal(2.0, 1.2, 16)]))
POSITIVE, UNIT = REAL.abs() + 0.1, REAL.sigmoid()
COUNTS = T(RNG.poisson(np.repeat([1.5, 6.0], [14, 16])))
VECTORS = T(RNG.normal(size=(N, 3))) @ T([[1.0, 0.4, 0.0], [0, 1, 0.3], [0, 0, 0.6]])
VECTORS = VECTORS + REAL[:, None]
BITS, SHARES = (VECTORS > 0).double(), torch.softmax(VECTORS, -1)
EXPOSURE = T(RNG.uniform(0.5, 3.0, N))
TRIALS = T(RNG.integers(3, 12, N))
SUCCESSES = (UNIT * TRIALS).round()
BASKETS = T(RNG.multinomial(9, [0.2, 0.3, 0.5], N))
WORDS = torch.tensor(RNG.integers(0, 3, N))
H = T(RNG.normal(size=N))
X2 = torch.stack([torch.ones_like(H), H], -1)
LINE = H * T(np.repeat([2.0, -1.0], 15)) + 0.3 * REAL
PREDICTORS = torch.stack([H, EXPOSURE], -1)
RESPONSE = LINE + T(RNG.normal(size=N)) * 0.4
MASK = torch.arange(N) % 4 != 0
SPD = T([[2.0, 0.3, 0.1], [0.3, 1.5, 0.2], [0.1, 0.2, 1.0]])
LO_HI, PAIR, KNOWN = T([-1.0, 1.5]), T([0.8, 1.7]), T([0.5, 2.0])
MU3 = LO_HI[:, None] + T([0.0, 0.1, -0.1])
ROWS = T([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
DIAGONAL = (torch.ones_like(ROWS), C.positive)


@dataclass
class Case:
    """A two-component mixture: an emission, its parameters with constraints, the plan expected."""

    x: torch.Tensor
    emission: object  # (parameters, z) -> distribution
    plan: str  # one letter per parameter, or one for all
    params: dict
    mask: torch.Tensor | None = None

    @property
    def exact(self):
        return "G" not in self.plan

    def model(self):
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        read = {n: pyro.param(n, v.clone(), constraint=c) for n, (v, c) in self.params.items()}
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(w))
            d = self.emission(SimpleNamespace(**read), z)
            pyro.sample("x", d if self.mask is None else d.mask(self.mask), obs=self.x)

    def log_joint(self, P):  # (N, K), by torch's own densities, one component at a time
        P = SimpleNamespace(**P)
        each = [self.emission(P, torch.tensor(k)).log_prob(self.x).expand(N) for k in range(K)]
        log_p = torch.stack(each, -1)
        return P.w.log() + (log_p if self.mask is None else log_p * self.mask[:, None])


LETTERS = {"C": ClosedForm, "L": LeastSquares, "N": NewtonOnSums, "P": Newton, "G": Gradient}
CASES = {}


def case(name, x, emission, plan="C", mask=None, **params):
    CASES[name] = Case(x, emission, plan, params, mask)


def real(value):
    return torch.as_tensor(value).double(), C.real


def positive(value):
    return torch.as_tensor(value).double(), C.positive


MU, STD, TWO, ONE = real(LO_HI), positive(PAIR), real(PAIR), positive(1.0)
ODDS, CHANCE, TABLE = real(MU3), (T([0.2, 0.5]), C.unit_interval), (ROWS, C.simplex)
Normal, Poisson = dist.Normal, dist.Poisson

case("normal", REAL, lambda P, z: Normal(P.mu[z], P.s[z]), mu=MU, s=STD)
case("tied scale", REAL, lambda P, z: Normal(P.mu[z], P.s), mu=MU, s=ONE)
case("log scale", REAL, lambda P, z: Normal(P.mu[z], P.s[z].exp()), mu=MU, s=TWO)
case("variance", REAL, lambda P, z: Normal(P.mu[z], P.s[z].sqrt()), mu=MU, s=STD)
case("precision", REAL, lambda P, z: Normal(P.mu[z], P.s.rsqrt()[z]), mu=MU, s=STD)
case("softplus", REAL, lambda P, z: Normal(P.mu[z], softplus(P.s)[z]), mu=MU, s=TWO)
case("known shape", REAL, lambda P, z: Normal(P.mu[z], P.s[z] * EXPOSURE), mu=MU, s=STD)
case("known scale", REAL, lambda P, z: Normal(P.mu[z], KNOWN[z]), mu=MU)
case("shared mean, known scales", REAL, lambda P, z: Normal(P.mu, KNOWN[z]), mu=real(0.3))
case("scales per row", REAL, lambda P, z: Normal(P.mu, KNOWN[z] * EXPOSURE), mu=real(0.3))
case(
    "constant and parameter",
    REAL,
    lambda P, z: Normal(torch.stack([torch.tensor(-1.0), P.mu])[z], P.s[z]),
    mu=real(1.0),
    s=STD,
)
case(
    "two parameters stacked",
    REAL,
    lambda P, z: Normal(torch.stack([P.a, P.b])[z], P.s[z]),
    a=real(-1.0),
    b=real(1.5),
    s=STD,
)
case("permuted", REAL, lambda P, z: Normal(P.mu.flip(0)[z], P.s[1 - z]), mu=MU, s=STD)
case("masked", REAL, lambda P, z: Normal(P.mu[z], P.s[z]), mask=MASK, mu=MU, s=STD)
case("lognormal", POSITIVE, lambda P, z: dist.LogNormal(P.mu[z], P.s[z]), mu=MU, s=STD)
case("diagonal", VECTORS, lambda P, z: Normal(P.mu[z], P.s[z]).to_event(1), mu=ODDS, s=DIAGONAL)
case(
    "spherical",
    VECTORS,
    lambda P, z: Normal(P.mu[z], P.s[z].unsqueeze(-1)).to_event(1),
    mu=ODDS,
    s=STD,
)
case(
    "mean tied over features, expanded",
    VECTORS,
    lambda P, z: (
        Normal(P.mu[z].unsqueeze(-1), P.s[z].unsqueeze(-1)).expand((*z.shape, 3)).to_event(1)
    ),
    mu=MU,
    s=STD,
)
for _name, _matrix, _constraint in (
    ("covariance_matrix", SPD, C.positive_definite),
    ("scale_tril", torch.linalg.cholesky(SPD), C.lower_cholesky),
    ("precision_matrix", SPD, C.positive_definite),
):
    case(
        f"mvn {_name}",
        VECTORS,
        lambda P, z, a=_name: dist.MultivariateNormal(P.mu[z], **{a: P.S[z]}),
        mu=ODDS,
        S=(_matrix.repeat(2, 1, 1), _constraint),
    )
    case(
        f"mvn tied {_name}",
        VECTORS,
        lambda P, z, a=_name: dist.MultivariateNormal(P.mu[z], **{a: P.S}),
        mu=ODDS,
        S=(_matrix, _constraint),
    )
case(
    "mvn shared mean, known covariances",
    VECTORS,
    lambda P, z: dist.MultivariateNormal(P.mu, torch.stack([SPD, 3 * SPD.inverse()])[z]),
    mu=real([0.0, 0.0, 0.0]),
)
case("poisson", COUNTS, lambda P, z: Poisson(P.r[z]), r=STD)
case("log rate", COUNTS, lambda P, z: Poisson(P.r[z].exp()), r=TWO)
case("exposure", COUNTS, lambda P, z: Poisson(P.r[z] * EXPOSURE), r=STD)
case("log rate, exposure", COUNTS, lambda P, z: Poisson(EXPOSURE * P.r.exp()[z]), r=TWO)
case("tied by a factor", COUNTS, lambda P, z: Poisson(P.r * KNOWN[z]), r=ONE)
case("exponential", POSITIVE, lambda P, z: dist.Exponential(P.r[z]), r=STD)
case("mean time", POSITIVE, lambda P, z: dist.Exponential(1 / P.r[z]), r=STD)
case("time exposure", POSITIVE, lambda P, z: dist.Exponential(P.r[z] / EXPOSURE), r=STD)
case("geometric", COUNTS, lambda P, z: dist.Geometric(P.p[z]), p=CHANCE)
case("geometric logits", COUNTS, lambda P, z: dist.Geometric(logits=P.p[z]), p=MU)
case(
    "bernoulli",
    BITS,
    lambda P, z: dist.Bernoulli(P.p[z]).to_event(1),
    p=(ROWS, C.unit_interval),
)
case("bernoulli logits", BITS, lambda P, z: dist.Bernoulli(logits=P.p[z]).to_event(1), p=ODDS)
case(
    "bernoulli sigmoid",
    (torch.stack([H, H.flip(0), EXPOSURE - 1.5], -1) > 0).double(),
    lambda P, z: dist.Bernoulli(P.p.sigmoid()[z]).to_event(1),
    p=ODDS,
)
case("binomial", SUCCESSES, lambda P, z: dist.Binomial(TRIALS, P.p[z]), p=CHANCE)
case("binomial logits", SUCCESSES, lambda P, z: dist.Binomial(TRIALS, logits=P.p[z]), p=MU)
case("multinomial", BASKETS, lambda P, z: dist.Multinomial(9, P.p[z]), p=TABLE)
case("multinomial logits", BASKETS, lambda P, z: dist.Multinomial(9, logits=P.p[z]), p=real(ROWS))
case("categorical", WORDS, lambda P, z: dist.Categorical(P.p[z]), p=TABLE)
case("positive rows", WORDS, lambda P, z: dist.Categorical(P.p[z]), p=positive(2 * ROWS))
case("categorical logits", WORDS, lambda P, z: dist.Categorical(logits=P.p[z]), p=real(ROWS))
case("one hot", one_hot(WORDS).double(), lambda P, z: dist.OneHotCategorical(P.p[z]), p=TABLE)
case("laplace scale", REAL, lambda P, z: dist.Laplace(LO_HI[z], P.s[z]), s=STD)
case(
    "regressions",
    LINE,
    lambda P, z: Normal(P.a[z] + (P.B[z] * X2[:, 1:]).sum(-1), P.s[z]),
    "LLC",
    a=MU,
    B=real([[0.5], [-0.5]]),
    s=STD,
)
case("common slope", LINE, lambda P, z: Normal(P.a[z] - P.b * H, KNOWN[z]), "L", a=MU, b=real(0.1))
case("matrix product", LINE, lambda P, z: Normal(X2 @ P.b + LO_HI[z], P.s), "LC", b=MU, s=ONE)
case("negated", REAL, lambda P, z: Normal(-P.mu[1 - z], 1.0), "L", mu=MU)
case("masked slope", LINE, lambda P, z: Normal(P.b[z] * H, P.s), "LC", mask=MASK, b=MU, s=ONE)
case("lognormal slope", LINE.exp(), lambda P, z: dist.LogNormal(P.b[z] * H, P.s), "LC", b=MU, s=ONE)
case(
    "rows without a use", REAL, lambda P, z: Normal(P.mu[z + 1], P.s[z]), mu=real([9, -1, 1]), s=STD
)
case(
    "counts per feature",
    BASKETS,
    lambda P, z: Poisson(P.r[z] * EXPOSURE[:, None]).to_event(1),
    r=positive(3 * ROWS),
)
case(
    "several questions",
    torch.stack([WORDS, WORDS.flip(0), WORDS.roll(5)], -1),
    lambda P, z: dist.Categorical(P.p[z]).to_event(1),
    p=(torch.stack([ROWS[[0, 0, 1]], ROWS[[1, 0, 1]]]), C.simplex),
)
case(
    "three looks at one matrix",
    VECTORS,
    lambda P, z: Normal(Vindex(P.m)[z.unsqueeze(-1), torch.tensor([2, 0, 2])], P.s).to_event(1),
    m=ODDS,
    s=ONE,
)
case(
    "pairs of vectors",
    torch.stack([VECTORS, VECTORS.flip(0)], 1),
    lambda P, z: (
        dist.MultivariateNormal(P.mu[z].unsqueeze(-2), P.S)
        .expand((*torch.broadcast_shapes(z.shape, (N,)), 2))
        .to_event(1)
    ),
    mu=ODDS,
    S=(SPD, C.positive_definite),
)
case("gamma", POSITIVE, lambda P, z: dist.Gamma(P.a[z], P.b[z]), "N", a=STD, b=STD)
case("beta", UNIT, lambda P, z: dist.Beta(P.a[z], P.b[z]), "N", a=STD, b=STD)
case("dirichlet", SHARES, lambda P, z: dist.Dirichlet(P.a[z]), "N", a=positive(1 + ROWS))
case("both places", POSITIVE, lambda P, z: dist.Gamma(P.r[z], 1 / P.r[1 - z]), "N", r=STD)
case(
    "negative binomial",
    (COUNTS**1.5).round(),
    lambda P, z: dist.NegativeBinomial(P.r[z], logits=P.p[z]),
    "N",
    r=STD,
    p=MU,
)
# The rest has no closed form, or only looks as if it had.
case(
    "logistic regressions",
    BITS[:, 0],
    lambda P, z: dist.Bernoulli(logits=(P.B[z] * X2).sum(-1)),
    "P",
    B=real([[0.5, 0.3], [-0.5, 0.1]]),
)
case("neural", LINE, lambda P, z: Normal(P.mu[z] + (H * P.h).tanh(), 0.5), "G", h=real(0.3), mu=MU)
case("mean equals scale", POSITIVE, lambda P, z: Normal(P.s[z], P.s[z]), "G", s=STD)
case("squared, of both signs", COUNTS, lambda P, z: Poisson(P.mu[z] ** 2), "G", mu=MU)
case("simplex slice", WORDS % 2, lambda P, z: dist.Categorical(P.p[z][..., :2]), "G", p=TABLE)
case(
    "reference class",
    WORDS,
    lambda P, z: dist.Categorical(logits=torch.cat([torch.zeros(2, 1), P.p], -1)[z]),
    "P",
    p=real([[0.1, 0.3], [0.5, -0.2]]),
)
case(
    "scale_tril of diag_embed",
    VECTORS,
    lambda P, z: dist.MultivariateNormal(P.mu[z], scale_tril=torch.diag_embed(P.s)[z]),
    "C",
    mu=ODDS,
    s=DIAGONAL,
)
case(
    "unit diagonal scale_tril",
    VECTORS,
    lambda P, z: dist.MultivariateNormal(P.mu[z], scale_tril=P.S[z]),
    "CG",
    mu=ODDS,
    S=(torch.eye(3).double().repeat(2, 1, 1), dist.constraints.unit_lower_cholesky),
)


def stationarity(log_joint, q, P, constraints_of):
    """The largest |∂ E_q[log joint]| in the unconstrained space, per parameter."""
    free = {
        n: transform_to(c).inv(P[n]).clone().requires_grad_() for n, c in constraints_of.items()
    }
    values = {n: transform_to(c)(free[n]) for n, c in constraints_of.items()}
    gradients = torch.autograd.grad((q * log_joint(values)).sum(), list(free.values()))
    return {n: float(g.abs().max()) for n, g in zip(free, gradients, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_the_expected_log_joint_is_stationary(name):
    c = CASES[name]
    em = ExactPosteriorEM(c.model)
    plan = em.plan()
    letters = c.plan * len(c.params) if len(c.plan) == 1 else c.plan
    for parameter, letter in zip(["w", *c.params], "C" + letters, strict=True):
        decided = plan.updates[parameter]
        assert type(decided.update) is LETTERS[letter], (parameter, decided.reason)
    assert plan.compiled or not c.exact
    q = em.posterior().probs("z")
    em.step()
    P = {n: pyro.param(n).detach() for n in ["w", *c.params]}
    found = stationarity(
        c.log_joint, q, P, {"w": C.simplex, **{n: v[1] for n, v in c.params.items()}}
    )
    assert max(found.values()) < (1e-9 if c.exact else 1e-6) * N, found
    by_hand = float(c.log_joint(P).logsumexp(-1).sum())
    assert em.elbo().log_evidence == pytest.approx(by_hand, rel=1e-9)
    steps = 5 if c.exact else 2  # a search by gradients has nothing new to it after one
    history = np.array([by_hand, *em.fit(max_steps=steps, tol=0, progress=False).history])
    assert len(history) == steps + 1
    assert np.all(np.diff(history) > -1e-9 * np.abs(history[1:]))


def run(model, *args, steps=30, **settings):
    """A monotone fit of exactly so many steps, from the model's own start."""
    pyro.clear_param_store()
    result = ExactPosteriorEM(model, **settings).fit(*args, max_steps=steps, tol=0, progress=False)
    path = np.array([*result.history, result.log_evidence])
    assert result.num_steps == steps, result.message
    assert np.all(np.diff(path) > -1e-9 * np.abs(path[1:]))
    return result


def close(found, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(found.detach()), expected, **{"rtol": 1e-8, **tolerance})


def responsibilities(log_joint):
    evidence = logsumexp(log_joint, axis=-1, keepdims=True)
    return np.exp(log_joint - evidence), float(evidence.sum())


@pytest.mark.parametrize(
    "lower,upper,constraint",
    [
        (-np.inf, np.inf, C.real),
        (-1.2, 1.9, C.interval(-1.2, 1.9)),
        (0.0, np.inf, C.positive),
    ],
)
def test_a_laplace_location_is_a_weighted_median(lower, upper, constraint):
    scales = torch.tensor([0.5, 2.0])

    def model(x):
        m = pyro.param("m", torch.tensor([0.5, 1.5]), constraint=constraint)
        shared = pyro.param("shared", torch.tensor(0.1), constraint=constraint)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Laplace(m[z], 1.0), obs=x)
            pyro.sample("y", dist.Laplace(shared, scales[z]), obs=x + 0.2)

    em = ExactPosteriorEM(model)
    assert type(em.plan(REAL).updates["m"].update) is ClosedForm
    q = em.posterior(REAL).probs("z")
    em.step(REAL)
    m, shared = pyro.param("m").detach(), pyro.param("shared").detach()
    for weight, x, found in [
        (q[:, 0], REAL, m[0]),
        (q[:, 1], REAL, m[1]),
        ((q / scales).sum(-1), REAL + 0.2, shared),
    ]:  # a convex, piecewise linear function has its least value at a knot or a bound
        knots = np.clip(x.numpy(), lower, upper)
        best = min(float(weight @ (x - g).abs()) for g in knots)
        assert float(weight @ (x - found).abs()) == pytest.approx(best, rel=1e-9)
    run(model, REAL)


CLIPPED = {
    "mean": ((-1.0, 0.2), REAL, lambda v: Normal(v, 1.0)),
    "scale": ((0.9, 1.2), REAL, lambda v: Normal(0.5, v)),
    "variance": ((0.9, 1.2), REAL, lambda v: Normal(-0.5, v.sqrt())),
    "rate": ((3.0, 5.0), COUNTS, lambda v: Poisson(v)),
    "mean time": ((0.8, 1.4), POSITIVE, lambda v: dist.Exponential(1 / v)),
    "probability": ((0.3, 0.35), COUNTS, lambda v: dist.Geometric(v)),
}


@pytest.mark.parametrize("kind", CLIPPED)
def test_interval_constrained_scalars_are_clipped(kind):
    """Against a grid over the interval, one number at a time."""
    (low, high), x, build = CLIPPED[kind]
    start = torch.tensor([0.55 * low + 0.45 * high, 0.45 * low + 0.55 * high])

    def model(x):
        v = pyro.param("v", start, constraint=C.interval(low, high))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", build(v[z]), obs=x)

    em = ExactPosteriorEM(model)
    assert type(em.plan(x).updates["v"].update) is ClosedForm
    q = em.posterior(x).probs("z")
    em.step(x)
    found, grid = pyro.param("v").detach(), torch.linspace(low, high, 2001)
    for k in range(2):
        best = (q[:, k] @ build(grid).log_prob(x[:, None])).max()
        assert float(q[:, k] @ build(found[k]).log_prob(x)) >= float(best) - 1e-9
    at_bound = torch.minimum((found - low).abs(), (found - high).abs())
    assert float(found.min()) >= low and float(found.max()) <= high and float(at_bound.min()) < 1e-9
    run(model, x)


def test_a_constrained_mean_keeps_its_constraint_beside_a_regression():
    """`a` shares an argument with `b`, and `b` is a coefficient elsewhere."""

    def model(x, y):
        a = pyro.param("a", torch.tensor(0.5), constraint=C.positive)
        b = pyro.param("b", torch.tensor(1.0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(torch.stack([a, b])[z], 1.0), obs=x)
            pyro.sample("y", dist.Normal(b * H + 0.5, 1.0), obs=y)

    result = run(model, REAL, LINE)
    assert float(result.params["a"]) >= 0
    assert type(result.plan.updates["b"].update) is LeastSquares


def test_one_parameter_in_two_families_of_one_form():
    """A Poisson count and exponential waiting times add up; a Normal mean beside them cannot."""
    counts, times = torch.tensor([3.0, 5.0, 4.0]), torch.tensor([0.2, 0.4])

    def model(extra):
        r = pyro.param("r", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("a", 3):
            pyro.sample("counts", dist.Poisson(r * 2.0), obs=counts)
        with pyro.plate("b", 2):
            pyro.sample("times", dist.Exponential(r), obs=times)
        if extra:
            pyro.sample("x", dist.Normal(r, 1.0), obs=torch.tensor(2.0))

    result = run(model, False, steps=2)
    assert type(result.plan.updates["r"].update) is ClosedForm
    close(result.params["r"], (12 + 2) / (6 + 0.6))
    result = run(model, True, steps=2)
    assert type(result.plan.updates["r"].update) is Gradient
    r = result.params["r"]
    assert float(14 / r - 6.6 + (2.0 - r)) == pytest.approx(0, abs=1e-7)


@pytest.mark.filterwarnings("ignore:parameter 'b'")
def test_boundary_estimates_through_a_map_do_not_end_the_fit():
    """A probability of one is at infinity through a sigmoid, as it is through `logits=`."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])

    def model(x, mapped):
        b = pyro.param("b", torch.tensor([[3.0, -2.0], [-1.0, 3.0]]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            given = {"probs": b.sigmoid()[z]} if mapped else {"logits": b[z]}
            pyro.sample("x", dist.Bernoulli(**given).to_event(1), obs=x)

    by_logits = run(model, x, False, steps=60)
    assert run(model, x, True, steps=60).log_evidence == pytest.approx(
        by_logits.log_evidence, abs=1e-8
    )


def test_fixed_and_torch_optimisers_by_glob():
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.05)

    def model(x):
        low = pyro.param("mu_low", torch.tensor(-1.0))
        high = pyro.param("mu_high", torch.tensor(1.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(torch.stack([low, high])[z], s), obs=x)

    em = ExactPosteriorEM(model, updates={"mu_*": Gradient(adam, steps=4), "s": Fixed()})
    result = em.fit(REAL, max_steps=150, tol=0, progress=False)
    assert float(result.params["s"]) == 1.0 and not result.plan.is_monotone
    pyro.clear_param_store()
    exact = run(model, REAL, steps=150, updates={"s": Fixed()})
    for name in ("mu_low", "mu_high"):
        close(result.params[name], exact.params[name], atol=1e-4)


PYROS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.01}),
    "a schedule": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 1.0}
    ),
}


def two_means(x):
    mu = pyro.param("mu", LO_HI.clone())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=x.dtype)))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


@pytest.mark.parametrize("of", list(PYROS))
def test_a_pyro_optimiser_moves_a_parameter_as_torch_s_does(of):
    found = []
    for optimizer in (PYROS[of](), lambda p: torch.optim.Adam(p, lr=0.01)):
        pyro.clear_param_store()
        em = ExactPosteriorEM(two_means, updates={"mu": Gradient(optimizer, steps=3)})
        found.append(em.fit(REAL, max_steps=4, tol=0).params["mu"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "optimizer, words",
    [
        (lambda p: torch.optim.LBFGS(p), "Gradient: LBFGS evaluates the loss several times"),
        (lambda p: None, "Gradient: it returned a NoneType, not a torch optimiser"),
    ],
)
def test_what_is_no_optimiser_of_one_gradient_is_refused(optimizer, words):
    pyro.clear_param_store()
    with pytest.raises(UsageError, match=words):
        ExactPosteriorEM(two_means, updates={"mu": Gradient(optimizer)}).fit(REAL, max_steps=2)
